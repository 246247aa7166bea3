//! The loop that moves the host to what is wanted: on change, on events, on a timer.
//!
//! One pass at a time, never interrupted. Which objects a pass may work on is decided here:
//! those that failed lately wait out their back-off, alone; the others go on. A pass that panics
//! fails its objects and nothing else.

mod backoff;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use stackhand_model::{ObjectRef, State};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use crate::agent::{Agent, Cause, Desired, Observed, Outcome, PassReport, Work};
use crate::events::{EventLog, NewEvent};
use crate::health::{Health, Pulse};
use crate::ledger::Ledger;
use crate::lifecycle::Shutdown;
use crate::metrics::Metrics;
use crate::status::{Changed, Finding, Statuses};
use crate::wake::Wake;

use backoff::Backoff;

/// Events of the host that arrive within this time share a pass.
const GATHER: Duration = Duration::from_millis(3);

/// How long a pass may take before the process counts as stuck and the service manager ends it.
pub const PASS_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Most events of one kind that a single pass adds; further ones are told as a number.
const MOST_EVENTS: usize = 200;

/// How often to act when nothing was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Between passes while nothing happens.
    pub resync: Duration,
    /// Before the first new try of an object that failed; doubles with each further failure.
    pub retry_min: Duration,
    /// Most time between tries.
    pub retry_max: Duration,
}

/// Passes so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passes {
    /// Begun.
    pub begun: u64,
    /// Ended.
    pub ended: u64,
    /// The revision that the last one to end was about.
    pub revision: u64,
}

/// The parts of the process that the loop works with.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// What is wanted.
    pub ledger: Ledger,
    /// Where findings go.
    pub statuses: Statuses,
    /// What the host's ears tell.
    pub wake: Wake,
    /// Where changes of state are told.
    pub events: EventLog,
    /// Where passes are counted.
    pub metrics: Metrics,
    /// Where the loop's movement is watched.
    pub health: Health,
    /// When to end.
    pub shutdown: Shutdown,
}

/// The loop.
#[derive(Debug)]
pub struct Reconciler<A> {
    agent: Arc<A>,
    with: Surroundings,
    pace: Pace,
    backoff: Backoff,
    passes: watch::Sender<Passes>,
    pulse: Pulse,
}

impl<A: Agent> Reconciler<A> {
    /// A loop that has not begun.
    #[must_use]
    pub fn new(agent: Arc<A>, with: Surroundings, pace: Pace) -> Self {
        let pulse = with.health.pulse("reconcile", PASS_LIMIT);
        let passes = watch::Sender::new(Passes::default());
        Self { agent, with, pace, backoff: Backoff::default(), passes, pulse }
    }

    /// Counts passes, for whoever waits for one.
    #[must_use]
    pub fn passes(&self) -> watch::Receiver<Passes> {
        self.passes.subscribe()
    }

    /// Makes passes until the process stops. The first one begins at once.
    pub async fn run(mut self) {
        let stopping = self.with.shutdown.stopping();
        let mut revision = self.with.ledger.revision();
        let mut control = self.with.ledger.control();
        let mut cause = Cause::Start;
        loop {
            self.pulse.beat();
            if control.borrow_and_update().paused.is_some() {
                tokio::select! {
                    biased;
                    () = stopping.cancelled() => break,
                    // The ledger outlives the loop.
                    _changed = control.changed() => {}
                    () = sleep(PASS_LIMIT / 10) => {}
                }
                continue;
            }
            let Some(busy) = self.with.shutdown.begin("a reconcile pass") else { break };
            revision.mark_unchanged();
            let worked_on = self.pass(cause).await;
            drop(busy);
            let resync = Instant::now() + self.pace.resync;
            cause = loop {
                self.pulse.beat();
                if control.borrow().paused.is_some() {
                    break cause.max(Cause::Change);
                }
                let retry = self.backoff.next();
                let due = retry.map_or(resync, |retry| retry.min(resync));
                let nap = due.min(Instant::now() + PASS_LIMIT / 10);
                tokio::select! {
                    biased;
                    () = stopping.cancelled() => return,
                    _changed = revision.changed() => {
                        // What this loop itself forgot is no news.
                        if *revision.borrow() != worked_on {
                            break Cause::Change;
                        }
                    }
                    _changed = control.changed() => {}
                    () = self.with.wake.heard() => {
                        sleep(GATHER).await;
                        break Cause::Host;
                    }
                    () = sleep_until(nap) => {
                        if nap == due {
                            let retrying = retry.is_some_and(|retry| retry <= due);
                            break if retrying { Cause::Retry } else { Cause::Timer };
                        }
                    }
                }
            };
        }
    }

    /// One pass over everything that is due. Returns the revision after it.
    async fn pass(&mut self, cause: Cause) -> u64 {
        let woken = self.with.wake.take();
        for object in &woken.objects {
            self.backoff.host_changed(object, &self.pace);
        }
        let desired = self.with.ledger.desired();
        self.backoff.retain(|object| desired.objects.contains_key(object));
        let begin = Instant::now();
        let due: BTreeSet<ObjectRef> = desired
            .objects
            .iter()
            .filter(|(object, held)| self.backoff.is_due(object, held, begin))
            .map(|(object, _)| *object)
            .collect();
        self.passes.send_modify(|passes| passes.begun += 1);

        let work = Work { desired: Arc::clone(&desired), due: due.clone(), cause };
        let report = match AssertUnwindSafe(self.agent.pass(work)).catch_unwind().await {
            Ok(report) => report,
            Err(panic) => failed_pass(&due, panic.as_ref()),
        };
        let took = begin.elapsed();
        self.with.metrics.reconcile_passes.inc();
        self.with.metrics.reconcile_writes.inc_by(report.writes);
        self.with.metrics.reconcile_seconds.observe(took.as_secs_f64());
        let writes = report.writes;
        let failures = self.take_over(cause, &desired, &due, report).await;
        self.with.wake.pass_ended();
        tracing::debug!(?cause, due = due.len(), writes, failures, ?took, "pass ended");

        let held = self.with.ledger.desired();
        let documents = i64::try_from(held.objects.len()).unwrap_or(i64::MAX);
        self.with.metrics.ledger_documents.set(documents);
        self.passes.send_modify(|passes| {
            passes.ended += 1;
            passes.revision = desired.revision;
        });
        // Everything that changed but for what was forgotten asks for another pass.
        if self.only_forgotten(&desired, &held) { held.revision } else { desired.revision }
    }

    fn only_forgotten(&self, before: &Desired, after: &Desired) -> bool {
        after.objects.iter().all(|(object, held)| {
            before.objects.get(object).is_some_and(|it| {
                it.deleting == held.deleting && Arc::ptr_eq(&it.document, &held.document)
            })
        })
    }

    /// Turns what the agent reports into findings, back-off, events and forgotten documents.
    async fn take_over(
        &mut self,
        cause: Cause,
        desired: &Desired,
        due: &BTreeSet<ObjectRef>,
        mut report: PassReport,
    ) -> usize {
        let now = Instant::now();
        let mut findings = Vec::with_capacity(due.len());
        let mut gone = Vec::new();
        let mut failures = 0;
        for object in due {
            let Some(held) = desired.objects.get(object) else { continue };
            let outcome = report.outcomes.remove(object).unwrap_or_else(Outcome::active);
            let state = outcome.state(held.deleting);
            let (reason, observed) = match outcome {
                Outcome::Active { observed } => (None, observed),
                Outcome::Pending { reason, observed } => (Some(reason), observed),
                Outcome::Failed { reason, observed } => (Some(reason), observed),
                Outcome::Gone if held.deleting => {
                    gone.push(*object);
                    (Some("gone; its document is being forgotten".to_owned()), Observed::default())
                }
                Outcome::Gone => (Some("it is gone from the host".to_owned()), Observed::default()),
            };
            if state == State::Error {
                failures += 1;
                let kind = [("kind", object.kind.as_str().to_owned())];
                self.with.metrics.reconcile_failures.get_or_create(&kind).inc();
                let random = u32::try_from(Uuid::new_v4().as_u128() >> 96).unwrap_or_default();
                self.backoff.failed(*object, held, now, &self.pace, random);
            } else {
                self.backoff.succeeded(object);
            }
            let (generation, deleting) = (held.document.generation, held.deleting);
            findings.push((*object, Finding { state, reason, observed, generation, deleting }));
        }
        let mut requests = Vec::new();
        if !gone.is_empty() {
            requests = gone.iter().map(|object| self.with.ledger.accepted(object)).collect();
            if let Err(refused) = self.with.ledger.forget(gone.clone()).await {
                tracing::warn!(error = %refused, count = gone.len(), "cannot forget what is gone");
                self.retry_forgetting(desired, &gone, &mut findings, &refused.message);
                gone.clear();
            }
        }
        for (object, accepted) in gone.into_iter().zip(requests).take(MOST_EVENTS) {
            let name = desired.objects.get(&object).map(|held| held.document.name.to_string());
            let event = NewEvent::new("Gone", format!("{} is gone", name.unwrap_or_default()));
            let event = event.about(object.to_string());
            self.with.events.add(match accepted {
                Some(accepted) => event.caused_by(&*accepted.request_id),
                None => event,
            });
        }
        self.tell(cause, desired, findings);
        failures
    }

    /// The disk did not take the removal: the objects stay, and are tried again with back-off.
    fn retry_forgetting(
        &mut self,
        desired: &Desired,
        gone: &[ObjectRef],
        findings: &mut [(ObjectRef, Finding)],
        why: &str,
    ) {
        for (object, finding) in findings.iter_mut().filter(|(object, _)| gone.contains(object)) {
            finding.state = State::Error;
            finding.reason = Some(format!("gone, but its document cannot be forgotten: {why}"));
            if let Some(held) = desired.objects.get(object) {
                self.backoff.failed(*object, held, Instant::now(), &self.pace, 0);
            }
        }
    }

    /// Records findings and adds an event for each change of state.
    fn tell(&self, cause: Cause, desired: &Desired, findings: Vec<(ObjectRef, Finding)>) {
        let mut told = 0;
        let mut adopted = 0;
        for Changed { object, before, now } in self.with.statuses.record(findings) {
            let same_words = before.as_ref().is_some_and(|before| {
                let failed = now.state == State::Error && before.reason != now.reason;
                before.state == now.state && before.generation == now.generation && !failed
            });
            if same_words || (now.deleting && now.state == State::Deleting) {
                continue;
            }
            if cause == Cause::Start && now.state == State::Active {
                adopted += 1;
                continue;
            }
            told += 1;
            if told > MOST_EVENTS {
                continue;
            }
            let name = desired.objects.get(&object).map(|it| it.document.name.to_string());
            let name = name.unwrap_or_default();
            let (kind, message) = match (now.state, &now.reason) {
                (State::Active, _) => ("Active", format!("{name} is active")),
                (State::Error, Some(reason)) => ("Failed", format!("{name}: {reason}")),
                (State::Pending | State::Deleting, Some(reason)) => {
                    ("Pending", format!("{name}: {reason}"))
                }
                (state, None) => ("Changed", format!("{name} is {state}")),
            };
            if now.state == State::Error {
                tracing::warn!(%object, reason = now.reason, "object failed");
            }
            let event = NewEvent::new(kind, message).about(object.to_string());
            self.with.events.add(match self.with.ledger.accepted(&object) {
                Some(accepted) => event.caused_by(&*accepted.request_id),
                None => event,
            });
        }
        if adopted > 0 {
            let message = format!("{adopted} objects are active after the start");
            self.with.events.add(NewEvent::new("Adopted", message));
        }
        if told > MOST_EVENTS {
            let message = format!("{} more objects changed in this pass", told - MOST_EVENTS);
            self.with.events.add(NewEvent::new("Changed", message));
        }
    }
}

/// What a pass that panicked amounts to: every object failed.
fn failed_pass(due: &BTreeSet<ObjectRef>, panic: &(dyn std::any::Any + Send)) -> PassReport {
    let what = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned());
    tracing::error!(panic = what, "a reconcile pass panicked; this is a defect");
    let reason = format!("the pass broke off by a defect of the agent: {what}");
    let outcomes = due.iter().map(|object| (*object, Outcome::failed(&reason))).collect();
    PassReport { outcomes, writes: 0 }
}
