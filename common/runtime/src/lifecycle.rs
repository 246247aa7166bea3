//! From the first signal to the exit status, in order and within a limit.
//!
//! ```text
//!  running ──SIGTERM, SIGINT──> stopping ──────────> closing ──> ended
//!                               no new work taken;   connections
//!                               running work ends,   closed
//!                               or is journalled
//!                               when told to abandon
//! ```
//!
//! * [`Shutdown::stopping`]: take no new work. Servers stop consuming, loops end after the pass.
//! * [`Shutdown::abandoning`]: three quarters of the limit are gone. Work that still runs writes
//!   into the ledger how far it came and returns.
//! * [`Shutdown::closing`]: no work is left, or the limit passed. Links to brokers and files close.
//!
//! Whoever works holds a [`Busy`]. A second signal ends the process at once: the ledger is made
//! for that. SIGHUP calls the reload hook.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::signal::unix::{Signal as SignalStream, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

/// Longest time that closing may take, in addition to the limit for work.
const CLOSE_LIMIT: Duration = Duration::from_secs(3);

/// The phases of the process's end. Clones share one state.
#[derive(Clone, Debug)]
pub struct Shutdown {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limit: Duration,
    stopping: CancellationToken,
    abandoning: CancellationToken,
    closing: CancellationToken,
    reason: Mutex<Option<String>>,
    work: Tracker,
    closers: Tracker,
}

/// Somebody who works; the process waits for the drop, within its limit.
#[derive(Debug)]
pub struct Busy {
    tracker: Tracker,
    id: u64,
}

/// Named things in progress.
#[derive(Clone, Debug)]
struct Tracker {
    running: Arc<Mutex<(u64, BTreeMap<u64, String>)>>,
    count: watch::Sender<usize>,
}

/// How the process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All work ended in time.
    Clean,
    /// The limit passed first.
    Unfinished {
        /// What still ran.
        work: Vec<String>,
    },
    /// A second signal came.
    Forced(Terminating),
}

/// A signal that asks the process to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terminating {
    /// SIGTERM, from the service manager.
    Term,
    /// SIGINT, from a terminal.
    Interrupt,
}

/// A signal that the process acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// End.
    Terminate(Terminating),
    /// SIGHUP: read the settings again.
    Reload,
}

/// The signals of this process. Make it first thing in `main`: from then on the default actions
/// are off.
#[derive(Debug)]
pub struct Signals {
    term: SignalStream,
    interrupt: SignalStream,
    hangup: SignalStream,
}

/// Exit status of an agent.
pub mod exit {
    /// Ended in order.
    pub const CLEAN: u8 = 0;
    /// Cannot run: a port in use, a ledger that does not open.
    pub const FAILED: u8 = 1;
    /// Wrong arguments.
    pub const USAGE: u8 = 2;
    /// Ended on request, but work was left unfinished when the limit passed.
    pub const UNFINISHED: u8 = 3;
    /// Wrong settings (`EX_CONFIG`). Units do not restart on it: it does not heal by itself.
    pub const CONFIG: u8 = 78;
}

impl Shutdown {
    /// A running process that gives work `limit` to end.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self {
            shared: Arc::new(Shared {
                limit,
                stopping: CancellationToken::new(),
                abandoning: CancellationToken::new(),
                closing: CancellationToken::new(),
                reason: Mutex::new(None),
                work: Tracker::new(),
                closers: Tracker::new(),
            }),
        }
    }

    /// Asks the process to end. The first reason is kept.
    pub fn request(&self, reason: impl Into<String>) {
        let mut kept = self.shared.reason.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get_or_insert_with(|| reason.into());
        drop(kept);
        self.shared.stopping.cancel();
    }

    /// Why the process ends, once it was asked to.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        self.shared.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Longest time from the request to the end, for the service manager.
    #[must_use]
    pub fn longest(&self) -> Duration {
        self.shared.limit + CLOSE_LIMIT
    }

    /// Cancelled when no new work is to be taken.
    #[must_use]
    pub fn stopping(&self) -> CancellationToken {
        self.shared.stopping.clone()
    }

    /// Cancelled when running work is to journal its state and return.
    #[must_use]
    pub fn abandoning(&self) -> CancellationToken {
        self.shared.abandoning.clone()
    }

    /// Cancelled when links and files are to close.
    #[must_use]
    pub fn closing(&self) -> CancellationToken {
        self.shared.closing.clone()
    }

    /// Marks work that the process waits for before it closes. `None` once it is stopping: do not
    /// begin.
    #[must_use]
    pub fn begin(&self, what: impl Into<String>) -> Option<Busy> {
        // Marked before looking: work that begins while the process starts to stop is either
        // refused here or waited for there.
        let busy = self.shared.work.add(what.into());
        (!self.shared.stopping.is_cancelled()).then_some(busy)
    }

    /// Marks something that needs the closing phase, such as a link that says good-bye. Hold it
    /// from the start and drop it when closed.
    #[must_use]
    pub fn closer(&self, what: impl Into<String>) -> Busy {
        self.shared.closers.add(what.into())
    }

    /// Waits for a request to end, then goes through the phases. Returns what was left.
    async fn go_through(&self) -> Ending {
        let shared = &self.shared;
        shared.stopping.cancelled().await;
        let start = Instant::now();
        let end = start + shared.limit;
        if !shared.work.idle_by(start + shared.limit / 4 * 3).await {
            shared.abandoning.cancel();
            shared.work.idle_by(end).await;
        }
        let mut left = shared.work.names();
        // Also for those who wait on it without holding work.
        shared.abandoning.cancel();
        shared.closing.cancel();
        if !shared.closers.idle_by(Instant::now() + CLOSE_LIMIT).await {
            left.extend(shared.closers.names());
        }
        if left.is_empty() { Ending::Clean } else { Ending::Unfinished { work: left } }
    }

    /// Runs until the process has to end, then ends it in order. `reload` is called on SIGHUP.
    pub async fn supervise(&self, mut signals: Signals, mut reload: impl FnMut()) -> Ending {
        let phases = self.go_through();
        tokio::pin!(phases);
        let mut asked = false;
        loop {
            tokio::select! {
                ending = &mut phases => return ending,
                received = signals.next() => match received {
                    Signal::Reload => reload(),
                    Signal::Terminate(which) if asked => {
                        tracing::warn!(signal = %which, "second signal: ending at once");
                        return Ending::Forced(which);
                    }
                    Signal::Terminate(which) => {
                        tracing::info!(signal = %which, limit = ?self.shared.limit, "stopping");
                        asked = true;
                        self.request(which.to_string());
                    }
                },
            }
        }
    }
}

impl Signals {
    /// Takes over SIGTERM, SIGINT and SIGHUP.
    ///
    /// # Errors
    ///
    /// Fails if a handler cannot be installed, or outside a Tokio runtime.
    pub fn install() -> io::Result<Self> {
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// The next signal.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            Some(()) = self.term.recv() => Signal::Terminate(Terminating::Term),
            Some(()) = self.interrupt.recv() => Signal::Terminate(Terminating::Interrupt),
            Some(()) = self.hangup.recv() => Signal::Reload,
            else => std::future::pending().await,
        }
    }
}

impl Ending {
    /// The exit status that tells it: 0, [`exit::UNFINISHED`], or 128 + the signal's number.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Clean => exit::CLEAN,
            Self::Unfinished { .. } => exit::UNFINISHED,
            Self::Forced(Terminating::Interrupt) => 128 + 2,
            Self::Forced(Terminating::Term) => 128 + 15,
        }
    }
}

impl From<&Ending> for ExitCode {
    fn from(ending: &Ending) -> Self {
        Self::from(ending.code())
    }
}

impl fmt::Display for Terminating {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Term => "SIGTERM",
            Self::Interrupt => "SIGINT",
        })
    }
}

impl Tracker {
    fn new() -> Self {
        let (count, _watcher) = watch::channel(0);
        Self { running: Arc::default(), count }
    }

    fn add(&self, what: String) -> Busy {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.0 += 1;
        let id = running.0;
        running.1.insert(id, what);
        self.count.send_replace(running.1.len());
        Busy { tracker: self.clone(), id }
    }

    fn names(&self) -> Vec<String> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.1.values().cloned().collect()
    }

    /// Waits until nothing is in progress. False if `deadline` came first.
    async fn idle_by(&self, deadline: Instant) -> bool {
        let mut count = self.count.subscribe();
        matches!(timeout_at(deadline, count.wait_for(|&count| count == 0)).await, Ok(Ok(_)))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut running = self.tracker.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.1.remove(&self.id);
        self.tracker.count.send_replace(running.1.len());
    }
}

#[cfg(test)]
mod tests;
