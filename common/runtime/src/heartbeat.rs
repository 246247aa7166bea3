//! Heartbeats: the agent tells the broker how it is, and what happens.
//!
//! Everything here gives up rather than wait: a broker that is away costs a report or, once the
//! queue is full, an event, never time of the agent's. Reports are made when they are sent, so
//! none is ever old. When the broker is back, a report goes out at once.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;
use serde::Serialize;
use stackhand_bus::{BusError, LinkState, Stream, Transport};
use stackhand_model::AgentKind;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::events::{Event, EventLog};
use crate::health::Health;
use crate::ledger::Ledger;
use crate::lifecycle::Shutdown;
use crate::report::{self, AgentId, Report};
use crate::status::Statuses;

/// Longest that the broker may take to take a record.
const PUBLISH_LIMIT: Duration = Duration::from_secs(5);

/// Longest that the last word may take.
const LAST_WORD_LIMIT: Duration = Duration::from_millis(800);

/// The name under which health hears of reports.
const PART: &str = "heartbeat";

/// Events that may wait for the broker.
const EVENT_QUEUE: usize = 1000;

/// A clock that differs from the time that passed by more than this has been set.
const CLOCK_STEP: Duration = Duration::from_secs(2);

/// Objects in error that a report names.
const MOST_FAILING: usize = 3;

/// Longest reason in a report, in bytes.
const REASON_BYTES: usize = 300;

/// Who this process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Which agent.
    pub agent: AgentKind,
    /// On which host.
    pub host: String,
    /// Availability zone of the host.
    pub zone: String,
    /// The cloud that it belongs to.
    pub cloud: String,
    /// Version of the agent.
    pub version: String,
    /// When its process began.
    pub started_at: Timestamp,
}

impl Identity {
    /// Which agent on which host, as one id.
    #[must_use]
    pub fn id(&self) -> AgentId {
        report::agent_id(&self.cloud, &self.host, self.agent)
    }
}

/// Asks the agent what troubles it; see [`Agent::troubles`](crate::agent::Agent::troubles).
pub type Troubles = Arc<dyn Fn() -> Vec<String> + Send + Sync>;

/// Makes reports. Clones share the count.
#[derive(Clone)]
pub struct Reporter {
    identity: Arc<Identity>,
    interval: Duration,
    signing: Option<bool>,
    ledger: Ledger,
    statuses: Statuses,
    events: EventLog,
    health: Health,
    troubles: Troubles,
    counts: Arc<Counts>,
    clock: Arc<std::sync::Mutex<Clock>>,
}

#[derive(Debug, Default)]
struct Counts {
    reports: AtomicU64,
    /// Events that the broker refused.
    events_refused: AtomicU64,
}

impl Reporter {
    /// A reporter that has made no report. `signing` is whether commands over the broker must be
    /// signed, or `None` where there is no broker.
    #[must_use]
    pub fn new(
        identity: Identity,
        interval: Duration,
        signing: Option<bool>,
        (ledger, statuses, events, health): (Ledger, Statuses, EventLog, Health),
        troubles: Troubles,
    ) -> Self {
        Self {
            identity: Arc::new(identity),
            interval,
            signing,
            ledger,
            statuses,
            events,
            health,
            troubles,
            counts: Arc::default(),
            clock: Arc::new(std::sync::Mutex::new(Clock::now())),
        }
    }

    /// Who reports.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How the agent is now. The number is that of the last report sent.
    #[must_use]
    pub fn report(&self) -> Report {
        let identity = &self.identity;
        let reasons = self.reasons();
        Report {
            id: identity.id(),
            agent: identity.agent,
            host: identity.host.clone(),
            zone: identity.zone.clone(),
            cloud: identity.cloud.clone(),
            version: identity.version.clone(),
            started_at: identity.started_at,
            sent_at: Timestamp::now(),
            interval_seconds: self.interval.as_secs(),
            sequence: self.counts.reports.load(Ordering::Relaxed),
            stopping: false,
            control: self.ledger.control().borrow().clone(),
            healthy: reasons.is_empty(),
            reasons,
            objects: self.statuses.counts(),
            signing: self.signing,
            events_dropped: self.events.dropped()
                + self.counts.events_refused.load(Ordering::Relaxed),
        }
    }

    fn next(&self, stopping: bool) -> Report {
        self.counts.reports.fetch_add(1, Ordering::Relaxed);
        Report { stopping, ..self.report() }
    }

    /// Why the agent is not well.
    fn reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        let parts = self.health.stuck().into_iter().chain(self.health.unready());
        reasons.extend(parts.map(|it| format!("{}: {}", it.part, it.reason)));
        if let Some(why) = &self.ledger.control().borrow().paused {
            reasons.push(format!("paused: {why}; the method `resume` lets it go on"));
        }
        if self.ledger.made_for() != self.identity.host {
            reasons.push(format!(
                "the ledger was made for host {}; if this machine is a copy of that one, stop the \
                 agent and move the ledger away",
                self.ledger.made_for()
            ));
        }
        let (failing, first) = self.statuses.failing(MOST_FAILING);
        if failing > 0 {
            let named: Vec<_> = first.iter().map(|(it, why)| format!("{it}: {why}")).collect();
            let objects = if failing == 1 { "object fails" } else { "objects fail" };
            reasons.push(format!("{failing} {objects}: {}", named.join("; ")));
        }
        let mut clock = self.clock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        reasons.extend(clock.look(Instant::now(), SystemTime::now()));
        drop(clock);
        reasons.extend((self.troubles)());
        for reason in &mut reasons {
            if reason.len() > REASON_BYTES {
                reason.truncate(reason.floor_char_boundary(REASON_BYTES));
                reason.push('…');
            }
        }
        reasons
    }
}

impl std::fmt::Debug for Reporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reporter").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// Notices when somebody sets the clock.
#[derive(Debug)]
struct Clock {
    at: Instant,
    shown: SystemTime,
    /// The last step and until when it is told.
    step: Option<(String, Instant)>,
}

/// How long a step of the clock is told.
const TELL_STEP: Duration = Duration::from_secs(60);

impl Clock {
    fn now() -> Self {
        Self { at: Instant::now(), shown: SystemTime::now(), step: None }
    }

    /// What is wrong with the clock, if anything is.
    fn look(&mut self, at: Instant, shown: SystemTime) -> Option<String> {
        let passed = at.saturating_duration_since(self.at);
        let expected = self.shown + passed;
        let (off, direction) = match shown.duration_since(expected) {
            Ok(ahead) => (ahead, "forward"),
            Err(behind) => (behind.duration(), "back"),
        };
        if off > CLOCK_STEP {
            let seconds = off.as_secs();
            let what = format!(
                "clock: it went {direction} by {seconds} s at once; signed commands need a clock \
                 that is kept by a time service"
            );
            self.step = Some((what, at + TELL_STEP));
        }
        self.at = at;
        self.shown = shown;
        self.step.as_ref().filter(|(_, until)| at < *until).map(|(what, _)| what.clone())
    }
}

/// Reports and registers until the process closes, then says the last word.
pub async fn run(
    transport: Arc<dyn Transport>,
    reporter: Reporter,
    register_interval: Duration,
    shutdown: Shutdown,
) {
    let (heartbeats, registry) = (report::heartbeats(), report::registry());
    let events = tokio::spawn(pump(
        Arc::clone(&transport),
        reporter.events.sink(EVENT_QUEUE),
        reporter.counts.clone(),
        shutdown.closing(),
    ));
    let mut link = transport.link();
    let mut control = reporter.ledger.control();
    let mut ticks = interval(reporter.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut registered: Option<Instant> = None;
    let closing = shutdown.closing();
    loop {
        tokio::select! {
            biased;
            () = closing.cancelled() => break,
            _now = ticks.tick() => {}
            changed = link.changed() => if changed.is_err() { break },
            // The ledger outlives this task.
            _changed = control.changed() => registered = None,
        }
        if matches!(*link.borrow(), LinkState::Down { .. }) {
            // Making and refusing a record each interval would be noise.
            continue;
        }
        let report = reporter.next(false);
        let registration = report.registration();
        let sent = tokio::select! {
            biased;
            () = closing.cancelled() => break,
            sent = publish(&*transport, &heartbeats, &report, PUBLISH_LIMIT) => sent,
        };
        let due = registered.is_none_or(|at| at.elapsed() >= register_interval);
        let sent = match sent {
            Ok(()) if due => {
                let sent = publish(&*transport, &registry, &registration, PUBLISH_LIMIT).await;
                registered = sent.is_ok().then(Instant::now).or(registered);
                sent
            }
            other => other,
        };
        match sent {
            Ok(()) => reporter.health.ready(PART),
            Err(error) => {
                tracing::warn!(error, "the broker is connected and takes no report");
                reporter.health.not_ready(PART, format!("the broker takes no report: {error}"));
            }
        }
    }
    let report = reporter.next(true);
    if matches!(*link.borrow(), LinkState::Up { .. }) {
        let registration = report.registration();
        let (reported, unregistered) = tokio::join!(
            publish(&*transport, &heartbeats, &report, LAST_WORD_LIMIT),
            publish(&*transport, &registry, &registration, LAST_WORD_LIMIT),
        );
        if let Err(error) = reported.and(unregistered) {
            tracing::info!(error, "the last word did not reach the broker");
        }
    }
    if timeout(LAST_WORD_LIMIT, events).await.is_err() {
        tracing::warn!("events that waited for the broker are lost");
    }
}

/// Publishes one record within a limit, or says why not.
async fn publish(
    transport: &dyn Transport,
    stream: &Stream,
    record: &impl Serialize,
    limit: Duration,
) -> Result<(), String> {
    let body = serde_json::to_value(record).map_err(|error| error.to_string())?;
    match timeout(limit, transport.publish(stream, body)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_elapsed) => Err(format!("{} took no record within {limit:?}", stream.name)),
    }
}

/// Sends events as they happen. While the broker is away they wait in the queue, which drops
/// and counts what does not fit.
async fn pump(
    transport: Arc<dyn Transport>,
    mut queue: mpsc::Receiver<Event>,
    counts: Arc<Counts>,
    closing: CancellationToken,
) {
    let stream = report::events();
    let mut link = transport.link();
    loop {
        let event = tokio::select! {
            biased;
            event = queue.recv() => event,
            // What waits is sent first.
            () = closing.cancelled() => None,
        };
        let Some(event) = event else { return };
        let Ok(body) = serde_json::to_value(&event) else { continue };
        loop {
            tokio::select! {
                biased;
                up = link.wait_for(|state| matches!(state, LinkState::Up { .. })) => {
                    if up.is_err() {
                        return;
                    }
                }
                () = closing.cancelled() => return,
            }
            let failed =
                match timeout(PUBLISH_LIMIT, transport.publish(&stream, body.clone())).await {
                    Ok(Ok(())) => break,
                    Ok(Err(error)) => error,
                    Err(_elapsed) => BusError::Timeout {
                        target: stream.name.clone(),
                        method: "publish".to_owned(),
                        seconds: PUBLISH_LIMIT.as_secs(),
                    },
                };
            if !failed.is_transient() || closing.is_cancelled() {
                counts.events_refused.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(error = %failed, "event not published");
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
