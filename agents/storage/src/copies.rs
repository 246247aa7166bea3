//! Copies that run in the background.
//!
//! A pass starts a copy and goes on; later passes see how far it is. What a copy has made so far
//! is an unfinished item of its backend, so a copy that dies with the agent is found, discarded
//! and begun again by the next start.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stackhand_runtime::wake::Wake;
use tokio::sync::Semaphore;

use crate::backend::{Backend, BackendError, Item, Progress};
use crate::chain;
use crate::plan::CopyState;

/// How often a running copy has its progress looked at.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// The copies of this agent.
pub struct Copies {
    table: Arc<Mutex<BTreeMap<Item, Running>>>,
    turns: Arc<Semaphore>,
    wake: Wake,
}

impl std::fmt::Debug for Copies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copies").field("states", &self.states()).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Running {
    backend: String,
    source: Item,
    progress: Arc<Progress>,
    failure: Option<String>,
}

/// A copy to start.
#[derive(Clone, Debug)]
pub struct Job {
    /// What is made.
    pub item: Item,
    /// On which backend.
    pub backend: String,
    /// From which item.
    pub source: Item,
    /// Where that is.
    pub path: PathBuf,
    /// Size of what is made.
    pub bytes: u64,
}

impl Copies {
    /// No copies yet; at most `at_once` will run at the same time.
    #[must_use]
    pub fn new(at_once: u32, wake: Wake) -> Self {
        let turns = usize::try_from(at_once).unwrap_or(1).max(1);
        Self { table: Arc::default(), turns: Arc::new(Semaphore::new(turns)), wake }
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<Item, Running>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies under way, and failed ones that were not [`Copies::forget`]ten.
    #[must_use]
    pub fn states(&self) -> BTreeMap<Item, CopyState> {
        let state = |copy: &Running| CopyState {
            backend: copy.backend.clone(),
            source: copy.source,
            percent: copy.progress.percent(),
            failure: copy.failure.clone(),
        };
        self.table().iter().map(|(&item, copy)| (item, state(copy))).collect()
    }

    /// Forgets failed copies, which makes way for another attempt.
    pub fn forget(&self, items: impl IntoIterator<Item = Item>) {
        let mut table = self.table();
        for item in items {
            if table.get(&item).is_some_and(|copy| copy.failure.is_some()) {
                table.remove(&item);
            }
        }
    }

    /// Calls a copy off. It ends by itself soon after.
    pub fn call_off(&self, item: Item) {
        if let Some(copy) = self.table().get(&item) {
            copy.progress.cancelled.store(true, Ordering::Relaxed);
        }
    }

    /// Starts a copy. One that runs already goes on.
    pub fn start(&self, backend: Arc<dyn Backend>, job: Job) {
        let progress = Arc::new(Progress::default());
        let running = Running {
            backend: job.backend.clone(),
            source: job.source,
            progress: Arc::clone(&progress),
            failure: None,
        };
        {
            let mut table = self.table();
            if table.get(&job.item).is_some_and(|copy| copy.failure.is_none()) {
                return;
            }
            table.insert(job.item, running);
        }
        let (table, wake) = (Arc::clone(&self.table), self.wake.clone());
        let turns = Arc::clone(&self.turns);
        tokio::spawn(async move {
            let _turn = turns.acquire_owned().await;
            let (item, bytes) = (job.item, job.bytes);
            let mut work = tokio::task::spawn_blocking(move || {
                if progress.cancelled.load(Ordering::Relaxed) {
                    return Err(BackendError::Cancelled { path: job.path });
                }
                backend.copy(item, &job.path, bytes, &progress)
            });
            let outcome = loop {
                tokio::select! {
                    outcome = &mut work => break outcome,
                    () = tokio::time::sleep(TELL_EVERY) => wake.object_changed(item.object()),
                }
            };
            let failure = match outcome {
                Ok(Ok(()) | Err(BackendError::Cancelled { .. })) => None,
                Ok(Err(error)) => Some(chain(&error)),
                Err(error) => Some(format!("the copy broke off: {error}")),
            };
            {
                let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
                match failure {
                    None => drop(table.remove(&item)),
                    Some(failure) => {
                        tracing::warn!(%item, %failure, "a copy failed");
                        if let Some(copy) = table.get_mut(&item) {
                            copy.failure = Some(failure);
                        }
                    }
                }
            }
            // What is made from it waits, too.
            wake.object_changed(item.object());
            wake.host_changed();
        });
    }
}
