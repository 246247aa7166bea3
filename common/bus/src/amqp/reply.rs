//! Sends answers. An answer outlives the session it was made in: it waits for the link, and
//! for its caller's queue, each within a limit.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::amqp::link::Shared;
use crate::amqp::options::seconds;
use crate::amqp::session::{Outgoing, SendError, Session};

/// Between attempts while the caller's queue is missing.
const PAUSE: Duration = Duration::from_millis(250);

/// An answer that could not be sent for this long, outages included, is of no use to anybody.
const OLDEST: Duration = Duration::from_secs(600);

/// How long, and for how many, a queue that stayed missing counts as gone.
const DEAD_FOR: Duration = Duration::from_secs(60);
const DEAD_MOST: usize = 200;

/// Reply queues that were given up a short while ago.
#[derive(Debug, Default)]
pub(super) struct DeadQueues(Mutex<VecDeque<(String, Instant)>>);

impl DeadQueues {
    fn contains(&self, queue: &str) -> bool {
        let mut dead = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while dead.front().is_some_and(|(_, since)| since.elapsed() > DEAD_FOR) {
            dead.pop_front();
        }
        dead.iter().any(|(name, _)| name == queue)
    }

    fn add(&self, queue: &str) {
        let mut dead = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        dead.push_back((queue.to_owned(), Instant::now()));
        if dead.len() > DEAD_MOST {
            dead.pop_front();
        }
    }
}

/// Sends an answer to a caller's queue, trying as long as there is hope.
pub(super) async fn send(shared: Arc<Shared>, queue: String, body: Bytes) {
    if shared.dead_queues.contains(&queue) {
        shared.counts.unroutable_replies.add();
        return;
    }
    let Ok(_slot) = Arc::clone(&shared.waiting_replies).try_acquire_owned() else {
        shared.counts.unroutable_replies.add();
        tracing::warn!(queue, "answer dropped: too many others wait for their callers");
        return;
    };
    let oldest = Instant::now() + OLDEST;
    let patience = seconds(shared.options.missing_consumer_retry_timeout_seconds);
    let mut missing_since: Option<(u64, Instant)> = None;
    loop {
        let next = shared.next_session();
        let Ok(Some(session)) = tokio::time::timeout_at(oldest, next).await else { break };
        match send_once(&session, &queue, &body).await {
            Ok(()) => return,
            Err(SendError::LinkLost) => {}
            Err(SendError::NotYet(_)) if Instant::now() < oldest => {
                tokio::time::sleep(PAUSE).await;
            }
            Err(SendError::Unroutable | SendError::NoExchange) => {
                // A new session starts the clock anew: the caller reconnects too.
                let since = match missing_since {
                    Some((generation, since)) if generation == session.generation => since,
                    _ => missing_since.insert((session.generation, Instant::now())).1,
                };
                if since.elapsed() >= patience || Instant::now() >= oldest {
                    shared.dead_queues.add(&queue);
                    break;
                }
                tokio::time::sleep(PAUSE).await;
            }
            Err(SendError::Refused(reason) | SendError::NotYet(reason)) => {
                tracing::warn!(queue, reason, "answer refused by the broker");
                break;
            }
        }
    }
    shared.counts.unroutable_replies.add();
    tracing::warn!(queue, "answer dropped: its caller's queue is gone");
}

/// Sends an answer, or a keep-alive, if it can be sent right now.
pub(super) async fn send_once(
    session: &Session,
    queue: &str,
    body: &[u8],
) -> Result<(), SendError> {
    let message = Outgoing {
        exchange: "",
        key: queue,
        body,
        expiration: None,
        mandatory: true,
        unhurried: true,
    };
    session.publish(&message).await
}
