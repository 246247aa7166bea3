//! Is this host fit for the agent, and if not, what exactly is to be done.
//!
//! A [`Check`] looks at one thing and changes nothing. [`run`] runs all of them, each within a
//! limit: a check that hangs or panics is a finding, too. `agentctl doctor` shows the findings;
//! an agent runs them at start and on the `preflight` method of its API.
//!
//! [`common_checks`] holds what every agent needs. Each agent adds its own.

mod clock;
mod denials;
mod host;
mod network;
mod paths;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, oneshot};

use crate::config::{AgentSection, Loaded};

/// How long one check may take, unless it says otherwise.
pub const CHECK_LIMIT: Duration = Duration::from_secs(20);

/// How bad a finding is, from harmless to fatal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// As it should be.
    Pass,
    /// Good to know.
    Info,
    /// Works, but not well or not for long.
    Warning,
    /// The agent cannot do its work.
    Failure,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Name of the check, such as `state-dir`.
    pub check: String,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub finding: String,
    /// The exact command or setting that puts it right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// All findings of a host's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The findings, in the order of the checks.
    pub findings: Vec<Finding>,
}

/// One look at one thing. It must not change anything.
#[derive(Clone)]
pub struct Check {
    name: Arc<str>,
    limit: Duration,
    look: Arc<dyn Fn() -> BoxFuture<'static, Vec<Finding>> + Send + Sync>,
}

impl Check {
    /// A check called `name` that awaits `look`. Blocking work belongs into
    /// [`Check::blocking`].
    pub fn new<F, L>(name: &str, look: L) -> Self
    where
        L: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = Vec<Finding>> + Send + 'static,
    {
        Self { name: name.into(), limit: CHECK_LIMIT, look: Arc::new(move || Box::pin(look())) }
    }

    /// A check whose `look` blocks, on files or system calls.
    ///
    /// It runs on a thread of its own rather than on the runtime's: one that hangs in the kernel
    /// must not keep the process from ending. A later run waits for it instead of adding to it.
    pub fn blocking<L>(name: &str, look: L) -> Self
    where
        L: Fn() -> Vec<Finding> + Send + Sync + 'static,
    {
        let look = Arc::new(look);
        let one_at_a_time = Arc::new(Mutex::new(()));
        let own_name = name.to_owned();
        Self::new(name, move || {
            let (look, name) = (Arc::clone(&look), own_name.clone());
            let turn = Arc::clone(&one_at_a_time).lock_owned();
            async move {
                let turn = turn.await;
                let (answer, findings) = oneshot::channel();
                let work = move || {
                    let _turn = turn;
                    // Nobody waits any more when it took too long.
                    let _ = answer.send(look());
                };
                let thread = std::thread::Builder::new().name("preflight".into());
                match thread.spawn(work) {
                    Ok(_detached) => findings.await.unwrap_or_else(|_| vec![crashed(&name)]),
                    Err(_no_thread) => vec![crashed(&name)],
                }
            }
        })
    }

    /// The same with another limit than [`CHECK_LIMIT`].
    #[must_use]
    pub fn with_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The check's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    async fn run(&self) -> Vec<Finding> {
        let mut task = tokio::spawn((self.look)());
        match tokio::time::timeout(self.limit, &mut task).await {
            Ok(Ok(findings)) => findings,
            Ok(Err(_panicked)) => vec![crashed(&self.name)],
            Err(_elapsed) => {
                task.abort();
                vec![Finding::failure(
                    &self.name,
                    format!("no answer within {:?}", self.limit),
                    "look for storage or a service that hangs: journalctl -b -p warning",
                )]
            }
        }
    }
}

fn crashed(name: &str) -> Finding {
    Finding::failure(name, "the check itself crashed", "report this with the agent's log")
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Check")
            .field("name", &self.name)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl Finding {
    /// As it should be.
    #[must_use]
    pub fn pass(check: &str, finding: impl Into<String>) -> Self {
        Self::new(check, Severity::Pass, finding, None)
    }

    /// Good to know.
    #[must_use]
    pub fn info(check: &str, finding: impl Into<String>) -> Self {
        Self::new(check, Severity::Info, finding, None)
    }

    /// Works, but not well; `remedy` puts it right.
    #[must_use]
    pub fn warning(check: &str, finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, Severity::Warning, finding, Some(remedy.into()))
    }

    /// The agent cannot work; `remedy` puts it right.
    #[must_use]
    pub fn failure(check: &str, finding: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, Severity::Failure, finding, Some(remedy.into()))
    }

    fn new(
        check: &str,
        severity: Severity,
        finding: impl Into<String>,
        remedy: Option<String>,
    ) -> Self {
        Self { check: check.to_owned(), severity, finding: finding.into(), remedy }
    }
}

impl Report {
    /// The worst severity; [`Severity::Pass`] where nothing was checked.
    #[must_use]
    pub fn worst(&self) -> Severity {
        self.findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Pass)
    }

    /// Whether the agent can do its work: nothing failed.
    #[must_use]
    pub fn is_fit(&self) -> bool {
        self.worst() < Severity::Failure
    }

    /// The findings at least as bad as `severity`.
    pub fn at_least(&self, severity: Severity) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(move |finding| finding.severity >= severity)
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pass => "pass",
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Failure => "FAILURE",
        })
    }
}

/// One finding a line, its remedy on the next.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
        for finding in &self.findings {
            writeln!(f, "{:7}  {:width$}  {}", finding.severity, finding.check, finding.finding)?;
            if let Some(remedy) = &finding.remedy {
                writeln!(f, "{:7}  {:width$}  -> {remedy}", "", "")?;
            }
        }
        Ok(())
    }
}

/// Runs all checks at once, each within its limit. The findings come in the order of the checks.
pub async fn run(checks: &[Check]) -> Report {
    let findings = futures_util::future::join_all(checks.iter().map(Check::run)).await;
    Report { findings: findings.into_iter().flatten().collect() }
}

/// What every agent needs on its host.
#[must_use]
pub fn common_checks<S: AgentSection>(loaded: &Loaded<S>) -> Vec<Check> {
    let common = loaded.settings.common.clone();
    let agent = S::AGENT;
    let warnings = loaded.warnings.clone();
    let mut checks = vec![
        Check::blocking("config", move || paths::config(&warnings)),
        Check::blocking("state-dir", {
            let dir = common.state_dir.clone();
            move || paths::state_dir(agent, &dir)
        }),
        Check::blocking("run-dir", {
            let dir = common.run_dir.clone();
            move || paths::run_dir(&dir)
        }),
        Check::blocking("clock", clock::check),
        Check::blocking("kernel", host::kernel),
        Check::blocking("security-module", || denials::check(Path::new("/"))),
        Check::blocking("open-files", move || host::open_files(agent)),
        Check::new("host-name", {
            let host = common.host.clone();
            move || network::host_name(host.clone())
        }),
    ];
    if let Some(url) = common.bus.url.clone() {
        let signing = common.signing;
        checks.push(Check::blocking("trusted-controllers", move || {
            paths::trusted_controllers(&signing)
        }));
        checks.push(Check::new("broker", move || network::brokers(url.brokers())));
    }
    checks
}
