//! Waiting without being woken.

use std::future::poll_fn;
use std::pin::pin;
use std::task::{Context, Waker};
use std::time::Duration;

/// How long nobody is woken because the broker has a message that is unhurried.
const UNHURRIED: Duration = Duration::from_millis(5);

/// Begins at once and ends as `future` does, but is not woken by it before [`UNHURRIED`] has passed;
/// polled for another reason, it sees the end earlier.
pub(super) async fn unhurried<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let mut pause = pin!(tokio::time::sleep(UNHURRIED));
    poll_fn(|cx| {
        let over = pause.as_mut().poll(cx).is_ready();
        let waker = if over { cx.waker() } else { Waker::noop() };
        future.as_mut().poll(&mut Context::from_waker(waker))
    })
    .await
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::sync::oneshot;
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_end_that_comes_early_wakes_nobody_before_the_pause_is_over() {
        let begun = Instant::now();
        let (sender, end) = oneshot::channel();
        let mut waiting = pin!(unhurried(end));
        assert!(waiting.as_mut().now_or_never().is_none());
        sender.send(1).unwrap();
        assert_eq!(waiting.await, Ok(1));
        // The clock of this test stands still until everything waits for it.
        assert_eq!(begun.elapsed(), Duration::ZERO, "whoever polls again sees it");

        let (sender, end) = oneshot::channel();
        let waiting = tokio::spawn(unhurried(end));
        tokio::task::yield_now().await;
        sender.send(2).unwrap();
        assert_eq!(waiting.await.unwrap(), Ok(2));
        assert_eq!(begun.elapsed(), UNHURRIED);
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_that_comes_late_is_told_at_once() {
        let begun = Instant::now();
        let late = UNHURRIED * 3;
        unhurried(tokio::time::sleep(late)).await;
        assert_eq!(begun.elapsed(), late);
    }
}
