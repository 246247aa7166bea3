//! Fetches of images that run in the background.
//!
//! A pass starts a fetch and goes on; later passes see how far it is. One that dies with the agent
//! leaves an unfinished file, which the next start removes before it begins again.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stackhand_model::{ImageId, ImageSpec};
use stackhand_runtime::wake::Wake;
use tokio::sync::Semaphore;

use crate::image::{FetchError, ImageCache, Progress};
use crate::plan::FetchState;

/// How often a running fetch has its progress looked at.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// The fetches of this agent.
#[derive(Debug)]
pub struct Fetches {
    cache: ImageCache,
    table: Arc<Mutex<BTreeMap<ImageId, Running>>>,
    turns: Arc<Semaphore>,
    wake: Wake,
}

#[derive(Debug)]
struct Running {
    progress: Arc<Progress>,
    failure: Option<String>,
}

impl Fetches {
    /// No fetches yet; at most `at_once` will run at the same time.
    #[must_use]
    pub fn new(cache: ImageCache, at_once: u32, wake: Wake) -> Self {
        let turns = usize::try_from(at_once).unwrap_or(1).max(1);
        Self { cache, table: Arc::default(), turns: Arc::new(Semaphore::new(turns)), wake }
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<ImageId, Running>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches under way, and failed ones that were not [`Fetches::forget`]ten.
    #[must_use]
    pub fn states(&self) -> BTreeMap<ImageId, FetchState> {
        let state = |fetch: &Running| FetchState {
            percent: fetch.progress.percent(),
            failure: fetch.failure.clone(),
        };
        self.table().iter().map(|(&id, fetch)| (id, state(fetch))).collect()
    }

    /// Forgets failed fetches, which makes way for another attempt.
    pub fn forget(&self, ids: impl IntoIterator<Item = ImageId>) {
        let mut table = self.table();
        for id in ids {
            if table.get(&id).is_some_and(|fetch| fetch.failure.is_some()) {
                table.remove(&id);
            }
        }
    }

    /// Calls a fetch off. It ends by itself soon after.
    pub fn call_off(&self, id: ImageId) {
        if let Some(fetch) = self.table().get(&id) {
            fetch.progress.cancelled.store(true, Ordering::Relaxed);
        }
    }

    /// Starts a fetch. One that runs already goes on.
    pub fn start(&self, id: ImageId, spec: ImageSpec) {
        let progress = Arc::new(Progress::default());
        {
            let mut table = self.table();
            if table.get(&id).is_some_and(|fetch| fetch.failure.is_none()) {
                return;
            }
            table.insert(id, Running { progress: Arc::clone(&progress), failure: None });
        }
        let (table, wake) = (Arc::clone(&self.table), self.wake.clone());
        let (turns, cache) = (Arc::clone(&self.turns), self.cache.clone());
        tokio::spawn(async move {
            let _turn = turns.acquire_owned().await;
            let mut work = tokio::task::spawn_blocking(move || cache.fetch(id, &spec, &progress));
            let outcome = loop {
                tokio::select! {
                    outcome = &mut work => break outcome,
                    () = tokio::time::sleep(TELL_EVERY) => wake.object_changed(id.object()),
                }
            };
            let failure = match outcome {
                Ok(Ok(_) | Err(FetchError::Cancelled { .. })) => None,
                Ok(Err(error)) => Some(crate::chain(&error)),
                Err(error) => Some(format!("the fetch broke off: {error}")),
            };
            {
                let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
                match failure {
                    None => drop(table.remove(&id)),
                    Some(failure) => {
                        tracing::warn!(image = %id, %failure, "a fetch failed");
                        if let Some(fetch) = table.get_mut(&id) {
                            fetch.failure = Some(failure);
                        }
                    }
                }
            }
            // Instances wait for it, too.
            wake.object_changed(id.object());
            wake.host_changed();
        });
    }
}
