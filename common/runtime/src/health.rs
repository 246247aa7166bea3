//! Is the process alive, is it ready, and if not, why.
//!
//! *Alive* means that the parts that must keep moving (the reconcile loop above all) moved lately;
//! `/healthz` and the service manager's watchdog ask for it, and a process that is not alive gets
//! restarted. *Ready* means that it can do its work now; `/readyz` and the heartbeat tell the
//! reasons when it cannot. A broker that is away makes an agent not ready, never dead.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

/// What the process knows about itself. Clones share one state.
#[derive(Clone, Debug)]
pub struct Health {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    epoch: Instant,
    pulses: Mutex<BTreeMap<String, Watched>>,
    conditions: Mutex<BTreeMap<String, Option<String>>>,
}

#[derive(Debug)]
struct Watched {
    /// Milliseconds after the epoch of the last beat.
    last: Arc<AtomicU64>,
    limit: Duration,
}

/// A reason why the process is not alive or not ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// The part that it is about, such as `bus` or `reconcile`.
    pub part: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Proof of life of one part. When all clones are gone the part is no longer watched.
#[derive(Clone, Debug)]
pub struct Pulse {
    health: Arc<Shared>,
    registration: Arc<Registration>,
}

#[derive(Debug)]
struct Registration {
    part: String,
    last: Arc<AtomicU64>,
    shared: Arc<Shared>,
}

impl Health {
    /// A process that is alive, and ready until a part says otherwise.
    #[must_use]
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                epoch: Instant::now(),
                pulses: Mutex::new(BTreeMap::new()),
                conditions: Mutex::new(BTreeMap::new()),
            }),
        }
    }

    /// Watches a part that must beat at least once every `limit`. Counts as beating now.
    ///
    /// Choose `limit` well above what the part takes at worst: the process is restarted when it
    /// is exceeded.
    #[must_use]
    pub fn pulse(&self, part: &str, limit: Duration) -> Pulse {
        let last = Arc::new(AtomicU64::new(self.shared.now()));
        let watched = Watched { last: Arc::clone(&last), limit };
        self.shared.pulses().insert(part.to_owned(), watched);
        let registration =
            Registration { part: part.to_owned(), last, shared: Arc::clone(&self.shared) };
        Pulse { health: Arc::clone(&self.shared), registration: Arc::new(registration) }
    }

    /// Says that `part` is ready.
    pub fn ready(&self, part: &str) {
        self.shared.conditions().insert(part.to_owned(), None);
    }

    /// Says that `part` is not ready, and why.
    pub fn not_ready(&self, part: &str, reason: impl Into<String>) {
        self.shared.conditions().insert(part.to_owned(), Some(reason.into()));
    }

    /// Why the process is not alive. Empty: it is.
    #[must_use]
    pub fn stuck(&self) -> Vec<Reason> {
        let now = self.shared.now();
        let late = |(part, watched): (&String, &Watched)| {
            let silent =
                Duration::from_millis(now.saturating_sub(watched.last.load(Ordering::Relaxed)));
            (silent > watched.limit).then(|| Reason {
                part: part.clone(),
                reason: format!(
                    "has not moved for {} s; the limit is {} s",
                    silent.as_secs(),
                    watched.limit.as_secs()
                ),
            })
        };
        self.shared.pulses().iter().filter_map(late).collect()
    }

    /// Whether every watched part moved within its limit.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.stuck().is_empty()
    }

    /// Why the process is not ready. Empty: it is.
    #[must_use]
    pub fn unready(&self) -> Vec<Reason> {
        let reason = |(part, reason): (&String, &Option<String>)| {
            reason.as_ref().map(|reason| Reason { part: part.clone(), reason: reason.clone() })
        };
        self.shared.conditions().iter().filter_map(reason).collect()
    }
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

impl Pulse {
    /// Tells that the part moved.
    pub fn beat(&self) {
        self.registration.last.store(self.health.now(), Ordering::Relaxed);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut pulses = self.shared.pulses();
        // A part that was registered anew under the same name keeps its new registration.
        if pulses.get(&self.part).is_some_and(|watched| Arc::ptr_eq(&watched.last, &self.last)) {
            pulses.remove(&self.part);
        }
    }
}

impl Shared {
    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn pulses(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Watched>> {
        self.pulses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn conditions(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Option<String>>> {
        self.conditions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_stops_beating_makes_the_process_stuck_until_it_beats_again() {
        let health = Health::new();
        let pulse = health.pulse("reconcile", Duration::ZERO);
        let deadline = Instant::now() + Duration::from_secs(5);
        while health.is_alive() {
            assert!(Instant::now() < deadline, "silence was not noticed");
            std::thread::yield_now();
        }
        assert_eq!(health.stuck()[0].part, "reconcile");
        drop(pulse);
        assert!(health.is_alive(), "a part that ended is no longer watched");

        let pulse = health.pulse("reconcile", Duration::from_secs(60));
        pulse.beat();
        assert!(health.is_alive());
    }

    #[test]
    fn a_new_registration_outlives_the_old_one() {
        let health = Health::new();
        let old = health.pulse("bus", Duration::from_secs(60));
        let _new = health.pulse("bus", Duration::from_secs(60));
        drop(old);
        assert_eq!(health.shared.pulses().len(), 1);
    }

    #[test]
    fn readiness_lists_the_reasons_of_every_part_that_is_not_ready() {
        let health = Health::new();
        health.not_ready("bus", "connecting to broker1:5672");
        health.not_ready("libvirt", "no socket");
        health.ready("libvirt");
        let reasons = health.unready();
        assert_eq!(reasons.len(), 1);
        assert_eq!(reasons[0].reason, "connecting to broker1:5672");
    }
}
