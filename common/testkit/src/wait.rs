//! Waiting for a condition, with a deadline and a reason.

use std::future::Future;
use std::thread;
use std::time::{Duration, Instant};

/// How often a condition is looked at.
const INTERVAL: Duration = Duration::from_millis(10);

/// Looks at `condition` until it yields something, and returns that.
///
/// # Panics
///
/// When `limit` passes first; the message names `what` was waited for. The condition is looked
/// at once more after the limit, so a slow machine alone does not fail a test.
pub async fn wait_for<Found, Condition, Fut>(
    limit: Duration,
    what: &str,
    mut condition: Condition,
) -> Found
where
    Condition: FnMut() -> Fut,
    Fut: Future<Output = Option<Found>>,
{
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        let late = tokio::time::Instant::now() >= deadline;
        if let Some(found) = condition().await {
            return found;
        }
        assert!(!late, "waited {limit:?} for {what}, in vain");
        tokio::time::sleep(INTERVAL).await;
    }
}

/// As [`wait_for`], for tests without a runtime.
///
/// # Panics
///
/// As [`wait_for`].
pub fn wait_for_sync<Found>(
    limit: Duration,
    what: &str,
    mut condition: impl FnMut() -> Option<Found>,
) -> Found {
    let deadline = Instant::now() + limit;
    loop {
        let late = Instant::now() >= deadline;
        if let Some(found) = condition() {
            return found;
        }
        assert!(!late, "waited {limit:?} for {what}, in vain");
        thread::sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_value_of_a_condition_that_comes_true_is_returned() {
        let mut looks = 0;
        let found = wait_for(Duration::from_secs(5), "the third look", || {
            looks += 1;
            let look = looks;
            async move { (look == 3).then_some(look) }
        })
        .await;
        assert_eq!(found, 3);
    }

    #[test]
    #[should_panic(expected = "for pigs to fly, in vain")]
    fn a_condition_that_stays_false_fails_by_name() {
        wait_for_sync(Duration::from_millis(30), "pigs to fly", || None::<()>);
    }
}
