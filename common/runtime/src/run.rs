//! An agent's process from its command line to its exit status. Wires; decides nothing.
//!
//! An agent's `main.rs` names its type, its settings and how it starts:
//!
//! ```ignore
//! fn main() -> std::process::ExitCode {
//!     Program::new(env!("CARGO_PKG_VERSION"), NetworkAgent::start).main()
//! }
//! ```
//!
//! Start: settings, log, ledger, agent, local socket, broker, first pass, `READY=1`. None of it
//! waits for a broker. End: no new requests; running ones and the pass finish; the last word;
//! links and ledger close.

mod options;
mod serve;

use std::error::Error;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use stackhand_model::AgentKind;

pub use options::command;

use crate::agent::Agent;
use crate::chain;
use crate::config::{AgentSection, Begin, Loaded, Settings};
use crate::events::{EventLog, NewEvent};
use crate::health::Health;
use crate::heartbeat::{Identity, Reporter};
use crate::http::HttpServer;
use crate::ledger::{self, Journal, Ledger};
use crate::lifecycle::{Ending, Shutdown, Signals, exit};
use crate::memory;
use crate::metrics::{Metrics, Reading};
use crate::preflight::{self, Check};
use crate::reconcile::{Pace, Reconciler, Surroundings};
use crate::service::{Api, Parts};
use crate::status::Statuses;
use crate::systemd::Notifier;
use crate::telemetry::{self, Telemetry};
use crate::wake::Wake;

use options::Options;
use serve::Guard;

/// Threads that run tasks. Agents mostly wait; blocking work has threads of its own.
const WORKERS: usize = 2;

/// Most threads for blocking work at once.
const BLOCKING_THREADS: usize = 64;

/// How long tasks that nobody waits for may take to notice the end.
const RUNTIME_END: Duration = Duration::from_millis(500);

/// Why an agent cannot start. Its causes are told with it.
pub type StartError = Box<dyn Error + Send + Sync>;

/// What an agent gets to work with.
#[derive(Clone, Debug)]
pub struct AgentContext<S> {
    /// All settings: the shared ones and the agent's own section.
    pub settings: Settings<S>,
    /// This host's name in the cloud.
    pub host: String,
    /// The cloud that the host belongs to; ids derived from names depend on it.
    pub cloud: String,
    /// Availability zone of the host.
    pub zone: String,
    /// The agent's own folder; the ledger is in it.
    pub state_dir: PathBuf,
    /// Notes about long operations.
    pub journal: Journal,
    /// Where the agent tells what happens.
    pub events: EventLog,
    /// Tells the loop that the host changed.
    pub wake: Wake,
    /// Where the agent's numbers go.
    pub metrics: Metrics,
    /// Where parts that must keep moving are watched, and parts that are not ready say so.
    pub health: Health,
    /// When to stop.
    pub shutdown: Shutdown,
}

type Start<A, S> = Box<dyn FnOnce(AgentContext<S>) -> Starting<A> + Send>;
type Starting<A> = Pin<Box<dyn Future<Output = Result<A, StartError>> + Send>>;
type Checks<S> = Box<dyn Fn(&Loaded<S>) -> Vec<Check> + Send>;
type Release = Box<dyn FnOnce() -> Releasing + Send>;
type Releasing = Pin<Box<dyn Future<Output = io::Result<String>> + Send>>;

/// One agent's program.
pub struct Program<A, S> {
    version: &'static str,
    start: Start<A, S>,
    checks: Checks<S>,
    release: Option<Release>,
}

impl<A: Agent, S: AgentSection> Program<A, S> {
    /// The program of an agent, its version and how it starts. `start` must not wait for what may
    /// be away for long (libvirt, a broker): the agent starts without and says what it misses.
    pub fn new<F, E>(
        version: &'static str,
        start: impl FnOnce(AgentContext<S>) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Result<A, E>> + Send + 'static,
        E: Into<StartError>,
    {
        let start: Start<A, S> = Box::new(move |context| {
            let starting = start(context);
            Box::pin(async move { starting.await.map_err(Into::into) })
        });
        Self { version, start, checks: Box::new(|_settings| Vec::new()), release: None }
    }

    /// Adds the agent's own preflight checks to those that all agents have.
    #[must_use]
    pub fn with_checks(
        mut self,
        checks: impl Fn(&Loaded<S>) -> Vec<Check> + Send + 'static,
    ) -> Self {
        self.checks = Box::new(checks);
        self
    }

    /// Adds what `--release` does: take the agent's marks from the host, and say so.
    #[must_use]
    pub fn with_release<F>(mut self, release: impl FnOnce() -> F + Send + 'static) -> Self
    where
        F: Future<Output = io::Result<String>> + Send + 'static,
    {
        self.release = Some(Box::new(move || Box::pin(release())));
        self
    }

    /// Runs the program: reads the command line, does what it asks, returns the exit status.
    #[must_use]
    pub fn main(self) -> ExitCode {
        self.main_with(std::env::args_os())
    }

    /// The same with other arguments than the process's; the first is the program's name.
    #[must_use]
    pub fn main_with(self, arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
        let started_at = Timestamp::now();
        let options = match Options::read(A::KIND, self.version, arguments) {
            Ok(options) => options,
            Err(error) => {
                // Help and version come this way, too.
                let _ = error.print();
                return ExitCode::from(if error.use_stderr() { exit::USAGE } else { exit::CLEAN });
            }
        };
        let loaded = match options.config.begin::<S>() {
            Begin::Run(loaded) => loaded,
            Begin::Exit { out, err, code } => {
                tell(io::stdout(), &out);
                tell(io::stderr(), &err);
                return ExitCode::from(code);
            }
        };
        // Fails only if it was done before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        if options.export_ledger {
            return export(&loaded, A::KIND);
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name(A::KIND.as_str())
            .enable_all()
            .build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return fail("cannot start threads", &error),
        };
        if options.release {
            return release(&runtime, &loaded, A::KIND, self.release);
        }
        let mut checks = preflight::common_checks(&loaded);
        checks.extend((self.checks)(&loaded));
        if options.preflight {
            let report = runtime.block_on(preflight::run(&checks));
            tell(io::stdout(), &options.show(&report));
            let code = if report.is_fit() { exit::CLEAN } else { exit::FAILED };
            return ExitCode::from(code);
        }
        raise_open_files();
        let telemetry = match telemetry::start(&loaded.settings.common.log) {
            Ok(telemetry) => telemetry,
            Err(error) => return fail("cannot start logging", &error),
        };
        let process =
            Process { version: self.version, started_at, loaded: *loaded, checks, options };
        let ending = runtime.block_on(Box::pin(run::<A, S>(process, self.start, &telemetry)));
        runtime.shutdown_timeout(RUNTIME_END);
        match ending {
            Ok(ending) => {
                tracing::info!(?ending, "ended");
                ExitCode::from(&ending)
            }
            Err(error) => {
                tracing::error!(error = %chain(&*error), "cannot run");
                ExitCode::from(exit::FAILED)
            }
        }
    }
}

impl<A: Agent, S: AgentSection> std::fmt::Debug for Program<A, S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Program").field("agent", &A::KIND).finish_non_exhaustive()
    }
}

struct Process<S> {
    version: &'static str,
    started_at: Timestamp,
    loaded: Loaded<S>,
    checks: Vec<Check>,
    options: Options,
}

/// Shells start programs with 1024 open files at most, which select(2) needs and nothing here
/// does. As many as are allowed; preflight tells when those are few.
fn raise_open_files() {
    if let Ok((_soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// From the open ledger to its closing.
async fn run<A: Agent, S: AgentSection>(
    process: Process<S>,
    start: Start<A, S>,
    telemetry: &Telemetry,
) -> Result<Ending, StartError> {
    let Process { version, started_at, loaded, checks, options } = process;
    let signals = Signals::install()?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let settings = loaded.settings;
    let common = &settings.common;
    let notifier = Notifier::from_environment();
    notifier.status("starting");
    let metrics = Metrics::new(A::KIND.as_str(), version);
    let health = Health::new();
    let shutdown = Shutdown::new(common.shutdown.limit());
    let events = EventLog::new(&common.host, A::KIND.as_str());
    let ledger = Ledger::open(&common.state_dir, A::KIND, &common.host)?;
    let wake = Wake::new();
    // Connecting goes on while the agent starts.
    let broker = serve::connect(common)?;

    let context = AgentContext {
        host: common.host.clone(),
        cloud: common.cloud.clone(),
        zone: common.zone.clone(),
        state_dir: common.state_dir.clone(),
        journal: ledger.journal(),
        events: events.clone(),
        wake: wake.clone(),
        metrics: metrics.clone(),
        health: health.clone(),
        shutdown: shutdown.clone(),
        settings: settings.clone(),
    };
    let agent = Arc::new(start(context).await?);

    let identity = Identity {
        agent: A::KIND,
        host: common.host.clone(),
        zone: common.zone.clone(),
        cloud: common.cloud.clone(),
        version: version.to_owned(),
        started_at,
    };
    let statuses = Statuses::new(ledger.clone());
    let guard = match broker {
        Some(_) if common.signing.required => Some(Guard::new(common, &ledger)),
        _ => None,
    };
    let (agents, guards) = (Arc::clone(&agent), guard.clone());
    let troubles = move || {
        let mut troubles = agents.troubles();
        troubles.extend(guards.as_ref().map(Guard::troubles).unwrap_or_default());
        troubles
    };
    let reporter = Reporter::new(
        identity,
        common.heartbeat.interval(),
        broker.as_ref().map(|_| common.signing.required),
        (ledger.clone(), statuses.clone(), events.clone(), health.clone()),
        Arc::new(troubles),
    );
    let parts = Parts {
        ledger: ledger.clone(),
        statuses: statuses.clone(),
        events: events.clone(),
        reporter: reporter.clone(),
        checks,
        wake: wake.clone(),
        shutdown: shutdown.clone(),
        concurrency: usize::try_from(common.bus.concurrency).unwrap_or(16),
    };
    let api = Arc::new(Api::new(Arc::clone(&agent), parts));
    let surroundings = Surroundings {
        ledger: ledger.clone(),
        statuses,
        wake,
        events: events.clone(),
        metrics: metrics.clone(),
        health: health.clone(),
        shutdown: shutdown.clone(),
    };
    let http = match &common.http.listen {
        Some(listen) => Some(HttpServer::bind(listen, metrics.clone(), health.clone()).await?),
        None => None,
    };
    readings(&metrics, &events, &ledger);
    serve::local(common, Arc::clone(&api), &shutdown).await?;
    let reconcile = &common.reconcile;
    let pace = Pace {
        resync: reconcile.resync(),
        retry_min: reconcile.retry_min(),
        retry_max: reconcile.retry_max(),
    };
    let reconciler = Reconciler::new(agent, surroundings, pace);
    let mut passes = reconciler.passes();
    let paused = ledger.control().borrow().paused.is_some();
    tokio::spawn(reconciler.run());
    if let Some(broker) = broker {
        let parts = serve::Parts { health: &health, metrics: &metrics, events: &events };
        serve::broker(broker, common, api, guard, reporter, parts, &shutdown).await?;
    }
    if let Some(http) = http {
        tokio::spawn(http.serve(shutdown.closing()));
    }
    close_last(&ledger, &shutdown);
    let watchdog = notifier.clone();
    let (alive, ended) = (health.clone(), shutdown.closing());
    tokio::spawn(async move { watchdog.feed_watchdog(alive, ended).await });
    if !paused {
        // The loop outlives this wait.
        let _ = passes.wait_for(|passes| passes.begun > 0).await;
    }
    events.add(NewEvent::new("Started", format!("{} {version} started", A::KIND.binary())));
    let documents = ledger.desired().objects.len();
    tracing::info!(version, documents, socket = %settings.socket().display(), "ready");
    notifier.ready();
    notifier.status(&format!("serving; {documents} documents"));

    tokio::spawn(memory::keep_small(shutdown.stopping()));
    let stopping = shutdown.stopping();
    let (bye, limit) = (notifier.clone(), common.shutdown.limit());
    tokio::spawn(async move {
        stopping.cancelled().await;
        bye.stopping(limit + Duration::from_secs(5));
        bye.status("stopping");
    });
    let reload = || {
        notifier.reloading();
        reload::<S>(&options, telemetry);
        notifier.ready();
    };
    Ok(shutdown.supervise(signals, reload).await)
}

/// The ledger closes when nobody works any more.
fn close_last(ledger: &Ledger, shutdown: &Shutdown) {
    let closer = shutdown.closer("the ledger");
    let (ledger, closing) = (ledger.clone(), shutdown.closing());
    tokio::spawn(async move {
        closing.cancelled().await;
        ledger.close().await;
        drop(closer);
    });
}

fn readings(metrics: &Metrics, events: &EventLog, ledger: &Ledger) {
    let (log, held) = (events.clone(), ledger.clone());
    metrics.register_readings(vec![
        Reading::counter("events_dropped", "Events that a slow reader did not get", move || {
            log.dropped()
        }),
        Reading::gauge("ledger_revision", "Revision of what is wanted", move || {
            held.desired().revision
        }),
    ]);
}

/// Takes over what can change while running: the level of the log.
fn reload<S: AgentSection>(options: &Options, telemetry: &Telemetry) {
    match crate::config::load::<S>(&options.config.sources()) {
        Ok(loaded) => match telemetry.set_level(&loaded.settings.common.log.level) {
            Ok(()) => tracing::info!("log.level read again; other settings need a restart"),
            Err(error) => tracing::error!(error = %chain(&error), "the log's level stays"),
        },
        Err(errors) => {
            for problem in &errors.problems {
                tracing::error!(%problem, "settings are wrong; the old ones stay");
            }
        }
    }
}

fn export<S: AgentSection>(loaded: &Loaded<S>, agent: AgentKind) -> ExitCode {
    let common = &loaded.settings.common;
    match ledger::export(&common.state_dir, agent, &common.host) {
        Ok(json) => {
            tell(io::stdout(), &format!("{json:#}\n"));
            ExitCode::from(exit::CLEAN)
        }
        Err(error) => fail("cannot export the ledger", &error),
    }
}

/// Takes the agent's marks from the host, while the ledger is held so that no agent runs.
fn release<S: AgentSection>(
    runtime: &tokio::runtime::Runtime,
    loaded: &Loaded<S>,
    agent: AgentKind,
    release: Option<Release>,
) -> ExitCode {
    let Some(release) = release else {
        return fail(
            "cannot release",
            &io::Error::other("this agent leaves no marks to take away"),
        );
    };
    let common = &loaded.settings.common;
    let released = runtime.block_on(async {
        let held = Ledger::open(&common.state_dir, agent, &common.host);
        let _ledger = held.map_err(io::Error::other)?;
        release().await
    });
    match released {
        Ok(told) => {
            tell(io::stdout(), &told);
            ExitCode::from(exit::CLEAN)
        }
        Err(error) => fail("cannot release", &error),
    }
}

fn fail(what: &str, error: &(dyn Error + 'static)) -> ExitCode {
    tell(io::stderr(), &format!("error: {what}: {}\n", chain(error)));
    ExitCode::from(exit::FAILED)
}

/// Writes text out. A reader that went away is no error.
fn tell(mut out: impl Write, text: &str) {
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
