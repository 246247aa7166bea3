//! Fetches of images that run in the background.
//!
//! A pass starts a fetch and goes on; later passes see how far it is. Images that ask for the same
//! source share one fetch. One that dies with the agent leaves an unfinished file, which the next
//! start takes up or removes.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stackhand_model::{ImageId, ImageSpec};
use stackhand_runtime::wake::Wake;
use tokio::sync::Semaphore;

use crate::cache::ImageCache;
use crate::fetch::{FetchError, Progress};

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
    spec: ImageSpec,
    progress: Arc<Progress>,
    failure: Option<String>,
    /// The image whose fetch this one waits for.
    follows: Option<ImageId>,
}

/// A fetch that runs in the background, or ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchState {
    /// How far it is, 0 to 100.
    pub percent: u64,
    /// All bytes are there and are being converted.
    pub converting: bool,
    /// Why it ended, if it failed.
    pub failure: Option<String>,
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
            converting: fetch.progress.converting.load(Ordering::Relaxed),
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

    /// Calls a fetch off. It ends by itself soon after, unless another image waits for it.
    pub fn call_off(&self, id: ImageId) {
        let mut table = self.table();
        if table.get(&id).is_some_and(|fetch| fetch.follows.is_some()) {
            table.remove(&id);
        } else if let Some(fetch) = table.get(&id)
            && !table.values().any(|other| other.follows == Some(id))
        {
            fetch.progress.cancelled.store(true, Ordering::Relaxed);
        }
    }

    /// Starts a fetch. One that runs already goes on; one of the same source is joined.
    pub fn start(&self, id: ImageId, spec: ImageSpec) {
        let progress = {
            let mut table = self.table();
            if table.get(&id).is_some_and(|fetch| fetch.failure.is_none()) {
                return;
            }
            let leader = table.iter().find(|(_, other)| {
                other.failure.is_none()
                    && other.follows.is_none()
                    && !other.progress.is_cancelled()
                    && other.spec.source == spec.source
                    && other.spec.checksum == spec.checksum
                    && other.spec.format == spec.format
            });
            let (follows, progress) = match leader {
                Some((&leader, other)) => (Some(leader), Arc::clone(&other.progress)),
                None => (None, Arc::default()),
            };
            let fetch = Running {
                spec: spec.clone(),
                progress: Arc::clone(&progress),
                failure: None,
                follows,
            };
            table.insert(id, fetch);
            if follows.is_some() {
                return;
            }
            progress
        };
        let (table, wake) = (Arc::clone(&self.table), self.wake.clone());
        let (turns, cache) = (Arc::clone(&self.turns), self.cache.clone());
        tokio::spawn(async move {
            let _turn = turns.acquire_owned().await;
            let mut work = Box::pin(cache.fetch(id, &spec, &progress));
            let outcome = loop {
                tokio::select! {
                    outcome = &mut work => break outcome,
                    () = tokio::time::sleep(TELL_EVERY) => wake.object_changed(id.object()),
                }
            };
            let followers = followers(&table, id);
            let failure = match outcome {
                Ok(image) => {
                    let mut failure = None;
                    for &follower in &followers {
                        if let Err(error) = cache.adopt(follower, &image).await {
                            failure = Some(stackhand_runtime::chain(&error));
                        }
                    }
                    failure
                }
                Err(FetchError::Cancelled { .. }) => None,
                Err(error) => Some(stackhand_runtime::chain(&error)),
            };
            if let Some(failure) = &failure {
                tracing::warn!(image = %id, failure, "a fetch failed");
            }
            {
                // One that joined in the meantime finds it in the cache, or begins anew.
                let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
                table.retain(|&other, fetch| {
                    if other != id && fetch.follows != Some(id) {
                        return true;
                    }
                    fetch.failure.clone_from(&failure);
                    fetch.follows = None;
                    fetch.failure.is_some()
                });
            }
            // Instances wait for it, too.
            wake.objects_changed(followers.into_iter().chain([id]).map(ImageId::object));
            wake.host_changed();
        });
    }
}

/// The images that wait for the fetch of `id`.
fn followers(table: &Mutex<BTreeMap<ImageId, Running>>, id: ImageId) -> Vec<ImageId> {
    let table = table.lock().unwrap_or_else(PoisonError::into_inner);
    table.iter().filter(|(_, other)| other.follows == Some(id)).map(|(&other, _)| other).collect()
}
