//! How fast something may go: so many at once, so many a second.

use std::time::Duration;

use tokio::time::Instant;

/// A bucket of tokens that fills with time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    rate: f64,
    burst: f64,
    left: f64,
    at: Instant,
}

impl Pace {
    pub(super) fn new(rate: u32, burst: u32, now: Instant) -> Self {
        let burst = f64::from(burst);
        Self { rate: f64::from(rate), burst, left: burst, at: now }
    }

    fn fill(&mut self, now: Instant) {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.rate;
        self.left = (self.left + gained).min(self.burst);
        self.at = now;
    }

    /// Takes one; returns how long to rest before the next.
    pub(super) fn take(&mut self, now: Instant) -> Option<Duration> {
        self.fill(now);
        self.left -= 1.0;
        (self.left < 0.0).then(|| Duration::from_secs_f64(-self.left / self.rate))
    }

    /// Takes one if there is one.
    pub(super) fn try_take(&mut self, now: Instant) -> bool {
        self.fill(now);
        let has = self.left >= 1.0;
        if has {
            self.left -= 1.0;
        }
        has
    }

    /// Whether nothing was taken lately, so that forgetting this one changes nothing.
    pub(super) fn is_full(&mut self, now: Instant) -> bool {
        self.fill(now);
        self.left >= self.burst
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_a_storm_is_slowed_down() {
        let start = Instant::now();
        let mut pace = Pace::new(1000, 200, start);
        for _ in 0..200 {
            assert_eq!(pace.take(start), None);
        }
        let mut now = start;
        for _ in 0..1000 {
            if let Some(rest) = pace.take(now) {
                now += rest;
            }
        }
        let took = (now - start).as_secs_f64();
        assert!((0.9..1.1).contains(&took), "{took}");
    }

    #[test]
    fn who_asks_too_often_is_refused_until_time_has_passed() {
        let start = Instant::now();
        let mut pace = Pace::new(10, 2, start);
        assert!(pace.try_take(start) && pace.try_take(start) && !pace.try_take(start));
        assert!(!pace.is_full(start));
        let later = start + Duration::from_millis(101);
        assert!(pace.try_take(later) && !pace.try_take(later));
        assert!(pace.is_full(later + Duration::from_secs(1)));
    }
}
