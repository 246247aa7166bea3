//! A lock shared by everybody on one broker: who owns the exclusive queue of its name holds it.
//!
//! The broker drops an exclusive queue with its connection, so a holder that dies lets go.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::amqp::link::{Shared, chance};
use crate::amqp::session::DeclareError;
use crate::amqp::topology::lock_queue;
use crate::{BusError, LockGuard};

/// Names locked or being locked by this transport. The broker would let one connection lock
/// the same name twice.
#[derive(Debug, Default)]
pub(super) struct Locks(Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl Locks {
    fn named(&self, name: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        Arc::clone(locks.entry(name.to_owned()).or_default())
    }
}

/// Takes a lock. See [`crate::Transport::lock`].
pub(super) async fn lock(
    shared: &Arc<Shared>,
    name: &str,
    limit: Duration,
) -> Result<LockGuard, BusError> {
    let deadline = Instant::now() + limit;
    let held_by_another = || BusError::Timeout {
        target: format!("lock {name:?}"),
        method: "lock".into(),
        seconds: limit.as_secs(),
    };
    let ours = shared.locks.named(name).lock_owned();
    let Ok(ours) = tokio::time::timeout_at(deadline, ours).await else {
        return Err(held_by_another());
    };
    let queue = lock_queue(name);
    loop {
        let session = shared.session(deadline).await?;
        match session.declare_queue(&queue).await {
            Ok(_) => {
                let runtime = tokio::runtime::Handle::current();
                return Ok(LockGuard::new(move || {
                    runtime.spawn(async move {
                        session.delete_queue(&queue.name).await;
                        drop(ours);
                    });
                }));
            }
            Err(DeclareError::Refused(reason)) if !reason.contains("RESOURCE_LOCKED") => {
                return Err(BusError::Refused { peer: session.peer.clone(), reason });
            }
            Err(_) => {}
        }
        if Instant::now() >= deadline {
            return Err(held_by_another());
        }
        let pause = Duration::from_millis(100).mul_f64(1.0 + chance());
        tokio::time::sleep_until((Instant::now() + pause).min(deadline)).await;
    }
}
