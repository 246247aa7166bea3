//! What keeps the bytes of volumes and snapshots, behind one narrow trait.
//!
//! A backend knows nothing of documents: it lists what it holds ([`Backend::observe`]) and makes
//! one change at a time. Calls block, so they are made on threads for that. Each is safe to
//! repeat, and leaves, when it is cut off at any instruction, either nothing or something that
//! the next look recognises as an unfinished item or a leftover of ours.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

pub use stackhand_image::Progress;
use stackhand_image::files::FileError;
use stackhand_kernel::exec::ExecError;
use stackhand_model::{Connection, FileFormat, ObjectRef, SnapshotId, VolumeId};

pub mod fake;
pub mod file;
mod lock;
pub mod lvm;
mod notes;
mod transfer;

/// Something a backend keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Item {
    /// A volume's bytes.
    Volume(VolumeId),
    /// A snapshot's bytes. They never change.
    Snapshot(SnapshotId),
}

impl Item {
    /// The object it belongs to.
    #[must_use]
    pub fn object(self) -> ObjectRef {
        match self {
            Self::Volume(id) => id.object(),
            Self::Snapshot(id) => id.object(),
        }
    }

    /// Recovers the item from its name, or `None` if no item of ours is called so.
    #[must_use]
    pub fn recognise(name: &str) -> Option<Self> {
        let item = if let Some(id) = name.strip_prefix("volume-") {
            Self::Volume(id.parse().ok()?)
        } else {
            Self::Snapshot(name.strip_prefix("snapshot-")?.parse().ok()?)
        };
        // UUIDs have several spellings; ours has one.
        (item.to_string() == name).then_some(item)
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(id) => write!(f, "volume-{id}"),
            Self::Snapshot(id) => write!(f, "snapshot-{id}"),
        }
    }
}

/// Everything a backend holds that concerns us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// Bytes of the file system or pool.
    pub total_bytes: u64,
    /// Bytes not used by anybody.
    pub free_bytes: u64,
    /// What is made at once, however large it is.
    pub instant: Instant,
    /// Whether an item takes its whole size from the start.
    pub thick: bool,
    /// How full the pool is, where volumes share one.
    pub fill: Option<Fill>,
    /// What is wrong with the backend although it can be looked at.
    pub troubles: Vec<String>,
    /// Where its items are found.
    pub place: Place,
    /// Items by name, including foreign things that hold a name of ours.
    pub items: BTreeMap<Item, Seen>,
    /// What is to be swept up.
    pub leftovers: BTreeSet<Leftover>,
}

/// What a backend makes at once, by sharing blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Instant {
    /// Snapshots of volumes, also while guests write to them.
    pub snapshots: bool,
    /// Volumes from snapshots and volumes.
    pub clones: bool,
}

/// How full a pool is that volumes share, in hundredths of a percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fill {
    /// Space for data.
    pub data: u32,
    /// Space for the map of the data.
    pub metadata: u32,
}

/// Something unfinished or half deleted that is proved ours and belongs to no item that exists.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Leftover {
    /// Its name, for [`Backend::sweep`].
    pub name: String,
    /// The item that it was part of, where that still matters.
    pub item: Option<Item>,
    /// Whether it holds a tenant's bytes on space that others will get: [`Backend::wipe`] it.
    pub to_wipe: bool,
}

/// Where a backend's items are found by others on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Raw files in a folder, each called as its item.
    Folder(PathBuf),
    /// Logical volumes of a volume group.
    Group(String),
}

impl Place {
    /// How the host itself reaches an item.
    #[must_use]
    pub fn connection(&self, item: Item) -> Connection {
        match self {
            Self::Folder(_) => Connection::File { path: self.path(item), format: FileFormat::Raw },
            Self::Group(_) => Connection::Block { path: self.path(item) },
        }
    }

    /// The path of an item.
    #[must_use]
    pub fn path(&self, item: Item) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.join(item.to_string()),
            Self::Group(group) => Path::new("/dev").join(group).join(lvm::name_of(item)),
        }
    }
}

/// What is known of one item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// What state it is in.
    pub presence: Presence,
    /// Its size.
    pub bytes: u64,
    /// Bytes that it takes up, those shared with other items included.
    pub allocated_bytes: u64,
    /// Whether it shares bytes with another item, so that overwriting it needs space.
    pub shared: bool,
    /// Who has it open.
    pub usage: Usage,
}

/// What state an item is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Complete.
    Ready,
    /// Begun and not finished.
    Partial,
    /// Complete, and its device is not there: to be activated.
    Inactive,
    /// Finished once; its bytes were taken away behind our back.
    Lost,
    /// Ours, and its bytes cannot be relied on.
    Broken {
        /// What is wrong and what helps.
        what: String,
    },
    /// Its name is held by something that we did not make.
    Foreign {
        /// What is there.
        what: String,
    },
}

/// Who has an item open, as QEMU's file locks or the device tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Usage {
    /// Nobody.
    #[default]
    Free,
    /// A guest that only reads.
    Read,
    /// A guest that writes.
    Written,
}

/// Why a backend could not do something.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The backend as a whole cannot be used.
    #[error("cannot use backend {backend}: {reason}")]
    Away {
        /// The backend.
        backend: String,
        /// What is wrong and what helps.
        reason: String,
    },
    /// A system call failed.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Something that we did not make is in the way. It is left as it is.
    #[error("cannot {action} {}: {what}", .path.display())]
    InTheWay {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What is there.
        what: String,
    },
    /// A guest has the item open.
    #[error("cannot {action} {}: a running guest has it open", .path.display())]
    InUse {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
    },
    /// A program failed.
    #[error("cannot {action} {subject}")]
    Program {
        /// What was tried.
        action: &'static str,
        /// On what.
        subject: String,
        /// Why not.
        source: Box<ExecError>,
    },
    /// The backend can never do that.
    #[error("cannot {action} {subject}: {reason}")]
    Unable {
        /// What was asked for.
        action: &'static str,
        /// On what.
        subject: String,
        /// Why not, and what helps.
        reason: String,
    },
    /// The copy was called off.
    #[error("copying {} was called off", .path.display())]
    Cancelled {
        /// What was being made.
        path: PathBuf,
    },
}

impl From<FileError> for BackendError {
    fn from(FileError { action, path, source }: FileError) -> Self {
        Self::Io { action, path, source }
    }
}

/// Writes the bytes of an item that is being made to the path it is given.
pub type Write<'a> = dyn FnMut(&Path) -> Result<(), BackendError> + 'a;

/// Keeps volumes and snapshots. All calls block.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Looks at everything. Changes nothing.
    ///
    /// # Errors
    ///
    /// Fails if the backend as a whole cannot be used; nothing may be concluded about its items.
    fn observe(&self) -> Result<Observed, BackendError>;

    /// As [`Backend::observe`], but where a look is dear it may be what was seen up to a minute
    /// and a bit ago, with what this backend changed since. Good enough to place something new:
    /// making it fails where this is no longer so.
    ///
    /// # Errors
    ///
    /// As [`Backend::observe`].
    fn recall(&self) -> Result<Observed, BackendError> {
        self.observe()
    }

    /// Makes an item of zeroes.
    ///
    /// # Errors
    ///
    /// Fails if there is no space or something foreign has its name.
    fn create(&self, item: Item, bytes: u64) -> Result<(), BackendError>;

    /// Makes an item from another of this backend at once, with all it holds at this moment.
    /// Only where [`Observed::instant`] says so.
    ///
    /// # Errors
    ///
    /// As [`Backend::create`].
    fn clone_item(&self, item: Item, source: Item, bytes: u64) -> Result<(), BackendError>;

    /// Makes an item from the bytes at `source`, which may be a file or a block device. Keeps
    /// guests from writing to `source` for as long as it takes.
    ///
    /// # Errors
    ///
    /// As [`Backend::create`], and if a guest has `source` open for writing, or the copy was
    /// called off. What was made until then is removed.
    fn copy(
        &self,
        item: Item,
        source: &Path,
        bytes: u64,
        progress: &Progress,
    ) -> Result<(), BackendError>;

    /// Makes an item of `bytes` that `write` fills: it is given the path of what reads as zeroes
    /// or as nothing yet, and has that size.
    ///
    /// # Errors
    ///
    /// As [`Backend::create`], and those of `write`. What was made until then is removed.
    fn import(&self, item: Item, bytes: u64, write: &mut Write<'_>) -> Result<(), BackendError>;

    /// Gives a volume the bytes that a snapshot of it has. The volume keeps its size.
    ///
    /// # Errors
    ///
    /// Fails if a guest has the volume open or there is no space. What was cut off may leave some
    /// bytes of each, and is finished by the next call.
    fn revert(&self, item: Item, snapshot: Item, progress: &Progress) -> Result<(), BackendError>;

    /// Makes the device of an item appear.
    ///
    /// # Errors
    ///
    /// Fails if it cannot.
    fn activate(&self, item: Item) -> Result<(), BackendError>;

    /// Grows an item to `bytes`, and has its device appear if it was not there. One that has that
    /// size or more stays as it is.
    ///
    /// # Errors
    ///
    /// Fails if there is no space or it is not ours.
    fn extend(&self, item: Item, bytes: u64) -> Result<(), BackendError>;

    /// Removes an item, or what is left of it. An item that is not there is removed already.
    ///
    /// # Errors
    ///
    /// Fails if it is not ours or a guest has it open.
    fn delete(&self, item: Item) -> Result<(), BackendError>;

    /// Removes what was begun of an item and not finished.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be removed.
    fn discard(&self, item: Item) -> Result<(), BackendError>;

    /// Removes one of [`Observed::leftovers`].
    ///
    /// # Errors
    ///
    /// Fails if it cannot be removed.
    fn sweep(&self, leftover: &str) -> Result<(), BackendError>;

    /// Overwrites one of [`Observed::leftovers`] that asks for it, at a bounded rate, then
    /// removes it. Begins where an earlier call was cut off.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be written to or removed.
    fn wipe(&self, leftover: &str, progress: &Progress) -> Result<(), BackendError>;

    /// Takes over the foreign file that holds an item's name, as it is, as the item.
    ///
    /// # Errors
    ///
    /// Fails if what is there cannot be an item.
    fn adopt(&self, item: Item) -> Result<(), BackendError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_as_we_write_them_are_recognised() {
        let id = "6f0c8a8e-0d1b-4f0e-9a43-2f9a2f0c5a11";
        for name in [format!("volume-{id}"), format!("snapshot-{id}")] {
            assert_eq!(Item::recognise(&name).map(|item| item.to_string()), Some(name));
        }
        for name in [
            id.to_owned(),
            format!("volume-{id}.bak"),
            format!("volume-{}", id.to_uppercase()),
            format!("volume-{}", id.replace('-', "")),
            format!("backup-{id}"),
        ] {
            assert_eq!(Item::recognise(&name), None, "{name}");
        }
    }
}
