//! When an object that failed is tried again: pure bookkeeping.

use std::collections::BTreeMap;
use std::time::Duration;

use stackhand_model::ObjectRef;
use tokio::time::Instant;

use super::Pace;
use crate::agent::Held;

/// Objects that failed, and until when each is left alone.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    waiting: BTreeMap<ObjectRef, Failing>,
}

#[derive(Debug)]
struct Failing {
    failures: u32,
    last: Instant,
    until: Instant,
    /// The document that failed; another one is tried at once.
    generation: u64,
    deleting: bool,
}

impl Backoff {
    /// Whether an object may be worked on now.
    pub(super) fn is_due(&self, object: &ObjectRef, held: &Held, now: Instant) -> bool {
        self.waiting.get(object).is_none_or(|failing| {
            failing.until <= now
                || failing.generation != held.document.generation
                || failing.deleting != held.deleting
        })
    }

    /// Counts a failure; `random` is any number.
    pub(super) fn failed(
        &mut self,
        object: ObjectRef,
        held: &Held,
        now: Instant,
        pace: &Pace,
        random: u32,
    ) {
        let (generation, deleting) = (held.document.generation, held.deleting);
        let earlier = match self.waiting.get(&object) {
            Some(it) if it.generation == generation && it.deleting == deleting => it.failures,
            _ => 0,
        };
        let until = now + delay(earlier, pace, random);
        let failures = earlier.saturating_add(1);
        let failing = Failing { failures, last: now, until, generation, deleting };
        self.waiting.insert(object, failing);
    }

    /// Forgets an object's failures.
    pub(super) fn succeeded(&mut self, object: &ObjectRef) {
        self.waiting.remove(object);
    }

    /// The host changed where the object is: brings its retry forward, though never nearer to the
    /// last try than the shortest back-off, for the try itself may be what changed the host.
    pub(super) fn host_changed(&mut self, object: &ObjectRef, pace: &Pace) {
        if let Some(failing) = self.waiting.get_mut(object) {
            failing.until = failing.until.min(failing.last + pace.retry_min);
        }
    }

    /// Forgets objects that are no longer held.
    pub(super) fn retain(&mut self, held: impl Fn(&ObjectRef) -> bool) {
        self.waiting.retain(|object, _| held(object));
    }

    /// When the next retry is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.waiting.values().map(|failing| failing.until).min()
    }
}

/// The shortest back-off, doubled with every earlier failure, at most the longest, less up to a
/// fifth at random so that many objects do not come back at the same moment.
fn delay(earlier: u32, pace: &Pace, random: u32) -> Duration {
    let full = pace.retry_min.saturating_mul(2_u32.saturating_pow(earlier)).min(pace.retry_max);
    let less = f64::from(random) / f64::from(u32::MAX) / 5.0;
    full.mul_f64(1.0 - less).max(pace.retry_min.min(full))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::fixtures::{group, object};

    const PACE: Pace = Pace {
        resync: Duration::from_secs(60),
        retry_min: Duration::from_secs(1),
        retry_max: Duration::from_secs(60),
    };

    #[tokio::test(start_paused = true)]
    async fn another_document_or_its_deletion_is_tried_at_once() {
        let object = object(1);
        let held = |generation, deleting| {
            let document = std::sync::Arc::new(group(1, "a", generation));
            Held { document, deleting }
        };
        let now = Instant::now();
        let mut backoff = Backoff::default();
        for _ in 0..4 {
            backoff.failed(object, &held(1, false), now, &PACE, 0);
        }
        assert_eq!(backoff.next(), Some(now + Duration::from_secs(8)));
        assert!(!backoff.is_due(&object, &held(1, false), now));
        assert!(backoff.is_due(&object, &held(2, false), now));
        assert!(backoff.is_due(&object, &held(1, true), now));
        backoff.failed(object, &held(2, false), now, &PACE, 0);
        assert_eq!(backoff.next(), Some(now + Duration::from_secs(1)), "counted from the start");
        backoff.succeeded(&object);
        assert_eq!(backoff.next(), None);
    }

    #[test]
    fn the_delay_doubles_up_to_its_limit_and_is_shortened_by_a_fifth_at_most() {
        let seconds = |earlier, random| delay(earlier, &PACE, random).as_secs_f64();
        let full: Vec<_> = (0..8).map(|earlier| seconds(earlier, 0)).collect();
        assert_eq!(full, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]);
        assert!((seconds(3, u32::MAX) - 6.4).abs() < 1e-6);
        assert_eq!(seconds(0, u32::MAX), 1.0, "never shorter than the shortest");
        assert_eq!(seconds(u32::MAX, 0), 60.0);
    }
}
