//! A backend in memory: behaves like the real ones, and can be told to fail.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{
    Backend, BackendError, Instant, Item, Observed, Place, Presence, Progress, Seen, Usage, Write,
};

/// Volumes that exist only in memory.
#[derive(Debug)]
pub struct FakeBackend {
    host: Mutex<Host>,
}

/// What the backend holds and how it behaves.
#[derive(Debug)]
pub struct Host {
    /// What [`Backend::observe`] answers.
    pub observed: Observed,
    /// How often it was looked at; recalling is none.
    pub looks: u64,
    /// The backend as a whole is away.
    pub away: bool,
    /// Items for which every change fails.
    pub broken: BTreeSet<Item>,
    /// What each complete item holds, told by a word.
    pub contents: BTreeMap<Item, String>,
}

impl FakeBackend {
    /// An empty backend of `bytes`.
    #[must_use]
    pub fn new(bytes: u64, instant_copies: bool) -> Self {
        let observed = Observed {
            total_bytes: bytes,
            free_bytes: bytes,
            instant: Instant { snapshots: instant_copies, clones: instant_copies },
            thick: false,
            fill: None,
            troubles: vec![],
            place: Place::Folder(PathBuf::from("/fake")),
            items: BTreeMap::new(),
            leftovers: BTreeSet::new(),
        };
        Self {
            host: Mutex::new(Host {
                observed,
                looks: 0,
                away: false,
                broken: BTreeSet::new(),
                contents: BTreeMap::new(),
            }),
        }
    }

    /// Looks into the backend, or changes it behind the agent's back.
    pub fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(
        &self,
        item: Item,
        bytes: u64,
        source: Option<Item>,
        shared: bool,
    ) -> Result<(), BackendError> {
        let mut host = self.host();
        host.allow("make", item)?;
        match host.observed.items.get(&item).map(|seen| &seen.presence) {
            None => {}
            Some(Presence::Ready) => return Ok(()),
            Some(_) => {
                return Err(BackendError::InTheWay {
                    action: "make",
                    path: host.observed.place.path(item),
                    what: "it exists".into(),
                });
            }
        }
        let contents = match source {
            None => "zeroes".to_owned(),
            Some(source) => match host.contents.get(&source).cloned() {
                Some(contents) => contents,
                None => return Err(host.fails("open", source)),
            },
        };
        if shared && let Some(seen) = source.and_then(|source| host.observed.items.get_mut(&source))
        {
            seen.shared = true;
        }
        host.contents.insert(item, contents);
        host.observed.items.insert(
            item,
            Seen {
                presence: Presence::Ready,
                bytes,
                allocated_bytes: 0,
                shared,
                usage: Usage::Free,
            },
        );
        Ok(())
    }
}

impl Host {
    fn allow(&self, action: &'static str, item: Item) -> Result<(), BackendError> {
        if self.broken.contains(&item) { Err(self.fails(action, item)) } else { Ok(()) }
    }

    fn fails(&self, action: &'static str, item: Item) -> BackendError {
        BackendError::Io {
            action,
            path: self.observed.place.path(item),
            source: std::io::Error::other("the fake was told so, or it is not there"),
        }
    }
}

impl Backend for FakeBackend {
    fn observe(&self) -> Result<Observed, BackendError> {
        self.host().looks += 1;
        self.recall()
    }

    fn recall(&self) -> Result<Observed, BackendError> {
        let host = self.host();
        if host.away {
            return Err(BackendError::Away { backend: "fake".into(), reason: "told so".into() });
        }
        Ok(host.observed.clone())
    }

    fn create(&self, item: Item, bytes: u64) -> Result<(), BackendError> {
        self.make(item, bytes, None, false)
    }

    fn clone_item(&self, item: Item, source: Item, bytes: u64) -> Result<(), BackendError> {
        self.make(item, bytes, Some(source), true)
    }

    fn copy(
        &self,
        item: Item,
        source: &Path,
        bytes: u64,
        _progress: &Progress,
    ) -> Result<(), BackendError> {
        let name = source.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        self.make(item, bytes, Item::recognise(name), false)
    }

    fn import(&self, item: Item, bytes: u64, _write: &mut Write<'_>) -> Result<(), BackendError> {
        self.make(item, bytes, None, false)
    }

    fn revert(&self, item: Item, snapshot: Item, _progress: &Progress) -> Result<(), BackendError> {
        let mut host = self.host();
        host.allow("revert", item)?;
        let Some(contents) = host.contents.get(&snapshot).cloned() else {
            return Err(host.fails("revert to", snapshot));
        };
        host.contents.insert(item, contents);
        Ok(())
    }

    fn activate(&self, item: Item) -> Result<(), BackendError> {
        let mut host = self.host();
        host.allow("activate", item)?;
        if let Some(seen) = host.observed.items.get_mut(&item) {
            seen.presence = Presence::Ready;
        }
        Ok(())
    }

    fn wipe(&self, leftover: &str, _progress: &Progress) -> Result<(), BackendError> {
        self.sweep(leftover)
    }

    fn extend(&self, item: Item, bytes: u64) -> Result<(), BackendError> {
        let mut host = self.host();
        host.allow("extend", item)?;
        match host.observed.items.get_mut(&item) {
            Some(seen) if matches!(seen.presence, Presence::Ready | Presence::Inactive) => {
                seen.presence = Presence::Ready;
                seen.bytes = seen.bytes.max(bytes);
                Ok(())
            }
            _ => Err(host.fails("extend", item)),
        }
    }

    fn delete(&self, item: Item) -> Result<(), BackendError> {
        let mut host = self.host();
        host.allow("delete", item)?;
        let path = host.observed.place.path(item);
        match host.observed.items.get(&item) {
            Some(Seen { presence: Presence::Foreign { what }, .. }) => {
                Err(BackendError::InTheWay { action: "delete", path, what: what.clone() })
            }
            Some(seen) if seen.usage != Usage::Free => {
                Err(BackendError::InUse { action: "delete", path })
            }
            _ => {
                host.observed.items.remove(&item);
                host.contents.remove(&item);
                Ok(())
            }
        }
    }

    fn discard(&self, item: Item) -> Result<(), BackendError> {
        let mut host = self.host();
        host.allow("discard", item)?;
        if host.observed.items.get(&item).is_some_and(|seen| seen.presence == Presence::Partial) {
            host.observed.items.remove(&item);
        }
        Ok(())
    }

    fn sweep(&self, leftover: &str) -> Result<(), BackendError> {
        self.host().observed.leftovers.retain(|left| left.name != leftover);
        Ok(())
    }

    fn adopt(&self, item: Item) -> Result<(), BackendError> {
        let mut host = self.host();
        host.allow("adopt", item)?;
        match host.observed.items.get_mut(&item) {
            Some(seen) => {
                seen.presence = Presence::Ready;
                Ok(())
            }
            None => Err(host.fails("adopt", item)),
        }
    }
}
