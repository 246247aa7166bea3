//! Long work in the background: copies, images, volumes set back, wipes.
//!
//! A pass starts a work and goes on; later passes see how far it is. What a work has made so far
//! is an unfinished item or a leftover of its backend, so one that dies with the agent is found
//! and begun again by the next start. A volume that is set back is noted in the ledger before.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stackhand_image::{ImageCache, ImageTool, ToolError, driver};
use stackhand_model::{ObjectRef, VolumeId};
use stackhand_runtime::ledger::Journal;
use stackhand_runtime::wake::Wake;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::backend::{Backend, BackendError, Item, Progress};
use crate::desired::GIB;
use crate::plan::{Task, WorkKind, WorkState};
use stackhand_runtime::chain;

/// How often running work has its progress looked at.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// What a work is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// An item that is made or set back.
    Item(Item),
    /// A leftover of a backend.
    Leftover {
        /// The backend.
        backend: String,
        /// Its name there.
        name: String,
    },
}

/// Images for volumes: fetched, inspected and converted as for instances.
#[derive(Clone, Debug)]
pub struct Images {
    /// Where they are kept while volumes are made from them.
    pub cache: ImageCache,
    /// What converts them.
    pub tool: ImageTool,
}

/// Key of the ledger's note that a volume is being set back.
#[must_use]
pub fn revert_note(volume: VolumeId) -> String {
    format!("revert/{volume}")
}

/// The works of this agent.
pub struct Works {
    table: Arc<Mutex<BTreeMap<Key, Running>>>,
    turns: Arc<Semaphore>,
    wipe_turns: Arc<Semaphore>,
    images: Images,
    journal: Journal,
    wake: Wake,
}

impl std::fmt::Debug for Works {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Works").field("states", &self.states()).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Running {
    backend: String,
    kind: WorkKind,
    gauge: Gauge,
    failure: Option<String>,
}

/// How far a work is: its own count, or that of the image it waits for.
#[derive(Clone, Debug, Default)]
struct Gauge {
    own: Arc<Progress>,
    image: Option<Arc<Progress>>,
    /// The image is there and is being written.
    writing: Arc<AtomicBool>,
}

impl Gauge {
    fn percent(&self) -> u64 {
        let Some(image) = &self.image else { return self.own.percent() };
        // Half for the way here, half for the way to the volume. Formats that QEMU has to convert
        // first take half of what is left.
        let converting = image.converting.load(Ordering::Relaxed);
        let fetched = if converting { 75 } else { 50 };
        if self.writing.load(Ordering::Relaxed) {
            fetched + self.own.percent() * (100 - fetched) / 100
        } else if converting {
            50 + image.percent() / 4
        } else {
            image.percent() / 2
        }
    }

    fn cancel(&self) {
        self.own.cancelled.store(true, Ordering::Relaxed);
        if let Some(image) = &self.image {
            image.cancelled.store(true, Ordering::Relaxed);
        }
    }
}

/// What a task is about.
fn key(task: &Task, backend: &str) -> Key {
    match task {
        Task::Copy { item, .. } | Task::Import { item, .. } => Key::Item(*item),
        Task::Revert { volume, .. } => Key::Item(Item::Volume(*volume)),
        Task::Wipe { name } => Key::Leftover { backend: backend.to_owned(), name: name.clone() },
    }
}

impl Works {
    /// No works yet; at most `at_once` will run at the same time, and as many wipes.
    #[must_use]
    pub fn new(at_once: u32, images: Images, journal: Journal, wake: Wake) -> Self {
        let turns = usize::try_from(at_once).unwrap_or(1).max(1);
        Self {
            table: Arc::default(),
            turns: Arc::new(Semaphore::new(turns)),
            wipe_turns: Arc::new(Semaphore::new(turns)),
            images,
            journal,
            wake,
        }
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<Key, Running>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works under way, and failed ones that were not [`Works::forget`]ten.
    #[must_use]
    pub fn states(&self) -> BTreeMap<Key, WorkState> {
        let state = |work: &Running| WorkState {
            backend: work.backend.clone(),
            kind: work.kind,
            percent: work.gauge.percent(),
            failure: work.failure.clone(),
        };
        self.table().iter().map(|(key, work)| (key.clone(), state(work))).collect()
    }

    /// Volumes that are to be set back, and to which snapshot.
    #[must_use]
    pub fn reverts(&self) -> BTreeMap<VolumeId, Item> {
        let read = |(key, value): &(String, serde_json::Value)| {
            let volume = key.strip_prefix("revert/")?.parse().ok()?;
            Some((volume, Item::recognise(value.as_str()?)?))
        };
        self.journal.list("revert/").iter().filter_map(read).collect()
    }

    /// Has a pass look at an object.
    pub fn wake_up(&self, object: ObjectRef) {
        self.wake.object_changed(object);
    }

    /// Forgets failed works, which makes way for another attempt.
    pub fn forget(&self, keys: impl IntoIterator<Item = Key>) {
        let mut table = self.table();
        for key in keys {
            if table.get(&key).is_some_and(|work| work.failure.is_some()) {
                table.remove(&key);
            }
        }
    }

    /// Calls the work on an item off. It ends by itself soon after.
    pub fn call_off(&self, item: Item) {
        if let Some(work) = self.table().get(&Key::Item(item)) {
            work.gauge.cancel();
        }
    }

    /// Starts a work. One that runs already goes on.
    pub fn start(&self, name: &str, backend: Arc<dyn Backend>, task: Task) {
        let key = key(&task, name);
        let mut gauge = Gauge::default();
        if matches!(task, Task::Import { .. }) {
            gauge.image = Some(Arc::default());
        }
        let running = Running {
            backend: name.to_owned(),
            kind: task.kind(),
            gauge: gauge.clone(),
            failure: None,
        };
        {
            let mut table = self.table();
            if table.get(&key).is_some_and(|work| work.failure.is_none()) {
                return;
            }
            table.insert(key.clone(), running);
        }
        let turns = if matches!(task, Task::Wipe { .. }) { &self.wipe_turns } else { &self.turns };
        let turns = Arc::clone(turns);
        let (table, wake) = (Arc::clone(&self.table), self.wake.clone());
        let (images, journal) = (self.images.clone(), self.journal.clone());
        tokio::spawn(async move {
            let _turn = turns.acquire_owned().await;
            let mut work = tokio::spawn(perform(backend, task, gauge, images, journal));
            let outcome = loop {
                tokio::select! {
                    outcome = &mut work => break outcome,
                    () = tokio::time::sleep(TELL_EVERY) => tell(&wake, &key),
                }
            };
            let failure = match outcome {
                Ok(outcome) => outcome.err(),
                Err(error) => Some(format!("the work broke off: {error}")),
            };
            {
                let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
                match failure {
                    None => drop(table.remove(&key)),
                    Some(failure) => {
                        tracing::warn!(?key, failure, "work in the background failed");
                        if let Some(work) = table.get_mut(&key) {
                            work.failure = Some(failure);
                        }
                    }
                }
            }
            // What is made from it waits, too.
            tell(&wake, &key);
            wake.host_changed();
        });
    }
}

fn tell(wake: &Wake, key: &Key) {
    if let Key::Item(item) = key {
        wake.object_changed(item.object());
    }
}

/// Does one work to its end; the error is for people. Being called off is no error.
async fn perform(
    backend: Arc<dyn Backend>,
    task: Task,
    gauge: Gauge,
    images: Images,
    journal: Journal,
) -> Result<(), String> {
    let Gauge { own: progress, image: fetched, writing } = gauge;
    let done = match task {
        Task::Copy { item, path, bytes, .. } => {
            on_thread(move || {
                if progress.cancelled.load(Ordering::Relaxed) {
                    return Err(BackendError::Cancelled { path });
                }
                backend.copy(item, &path, bytes, &progress)
            })
            .await
        }
        Task::Import { item, id, image, bytes } => {
            let fetched = fetched.unwrap_or_default();
            let found = match images.cache.fetch(id, &image, &fetched).await {
                Ok(found) => found,
                Err(_) if fetched.cancelled.load(Ordering::Relaxed) => return Ok(()),
                Err(error) => return Err(chain(&error)),
            };
            if found.virtual_bytes > bytes {
                return Err(format!(
                    "image {id} has a disk of {} bytes: size_gib must be at least {}",
                    found.virtual_bytes,
                    found.virtual_bytes.div_ceil(GIB)
                ));
            }
            writing.store(true, Ordering::Relaxed);
            let (cache, runtime) = (images.cache.clone(), Handle::current());
            let contents = found.contents.clone();
            let done = on_thread(move || {
                let source = cache.path(&found.contents);
                if found.disk == stackhand_model::FileFormat::Raw {
                    return backend.copy(item, &source, bytes, &progress);
                }
                backend.import(item, bytes, &mut |target| {
                    let format = driver(found.disk);
                    let write = images.tool.to_raw(&source, format, target, true, bytes, &progress);
                    runtime.block_on(write).map(drop).map_err(|error| match error {
                        ToolError::Cancelled { .. } => {
                            BackendError::Cancelled { path: target.to_owned() }
                        }
                        error => BackendError::Unable {
                            action: "write the image to",
                            subject: target.display().to_string(),
                            reason: chain(&error),
                        },
                    })
                })
            })
            .await;
            // Volumes do not lean on images; the next one is fetched anew.
            let cache = images.cache;
            let _kept = on_thread(move || {
                let cleared = cache.forget(id).and(cache.remove_contents(&contents));
                if let Err(error) = cleared {
                    tracing::debug!(%error, "an image stays in the cache");
                }
                Ok(())
            })
            .await;
            done
        }
        Task::Revert { volume, snapshot } => {
            let item = Item::Volume(volume);
            let done = on_thread(move || backend.revert(item, snapshot, &progress)).await;
            if done.is_ok()
                && let Err(error) = journal.remove(&revert_note(volume)).await
            {
                // It would be set back again, which does no harm before the note is gone.
                return Err(format!("cannot note that {item} is set back: {error}"));
            }
            done
        }
        Task::Wipe { name } => on_thread(move || backend.wipe(&name, &progress)).await,
    };
    match done {
        Ok(()) | Err(BackendError::Cancelled { .. }) => Ok(()),
        Err(error) => Err(chain(&error)),
    }
}

async fn on_thread(
    work: impl FnOnce() -> Result<(), BackendError> + Send + 'static,
) -> Result<(), BackendError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(BackendError::Away {
            backend: String::new(),
            reason: format!("the work broke off: {error}"),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_of_an_image_to_a_volume_is_told_from_0_to_100_and_never_back() {
        for foreign in [false, true] {
            let gauge = Gauge { image: Some(Arc::default()), ..Gauge::default() };
            let image = gauge.image.clone().unwrap();
            let mut told = Vec::new();
            let mut run = |progress: &Progress| {
                progress.total.store(10, Ordering::Relaxed);
                for done in 0..=10 {
                    progress.done.store(done, Ordering::Relaxed);
                    told.push(gauge.percent());
                }
            };
            run(&image);
            if foreign {
                image.converting.store(true, Ordering::Relaxed);
                run(&image);
            }
            gauge.writing.store(true, Ordering::Relaxed);
            run(&gauge.own);
            assert!(told.is_sorted(), "{told:?}");
            assert_eq!((told[0], told[told.len() - 1]), (0, 100));
        }
    }
}
