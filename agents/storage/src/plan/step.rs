//! What a plan is made of: single changes, and the long work that some of them begin.

use std::fmt;
use std::path::PathBuf;

use stackhand_model::{ImageId, ImageSpec, ObjectRef, VolumeId};

use crate::backend::Item;
use crate::export::{Target, target_name};

/// One change to a backend.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The object it serves; absent for clean-up.
    pub object: Option<ObjectRef>,
    /// Others that it serves as well.
    pub also: Vec<ObjectRef>,
    /// Objects whose steps must have succeeded before this one is tried.
    pub needs: Vec<ObjectRef>,
    /// Where.
    pub backend: String,
    /// What.
    pub change: Change,
}

/// What a step does.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Makes an item of zeroes.
    Create {
        /// The item.
        item: Item,
        /// Its size.
        bytes: u64,
    },
    /// Makes an item from another at once.
    Clone {
        /// The item.
        item: Item,
        /// What it starts from.
        source: Item,
        /// Its size.
        bytes: u64,
    },
    /// Begins work in the background.
    Begin(Task),
    /// Makes an item's device appear.
    Activate {
        /// The item.
        item: Item,
    },
    /// Calls off the work on an item.
    CallOff {
        /// What was being made.
        item: Item,
    },
    /// Grows an item.
    Extend {
        /// The item.
        item: Item,
        /// Its new size.
        bytes: u64,
    },
    /// Removes an item.
    Delete {
        /// The item.
        item: Item,
    },
    /// Removes what was begun and not finished.
    Discard {
        /// The item.
        item: Item,
    },
    /// Removes a leftover.
    Sweep {
        /// Its name.
        name: String,
    },
    /// Gives a volume to other hosts, or changes to whom.
    Publish {
        /// As it is to be.
        target: Box<Target>,
    },
    /// Takes a volume back from other hosts.
    Withdraw {
        /// The volume.
        volume: VolumeId,
    },
}

/// Long work, which is done in the background.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    /// Makes an item from the bytes of another.
    Copy {
        /// The item.
        item: Item,
        /// What it starts from.
        source: Item,
        /// Where that is.
        path: PathBuf,
        /// Size of what is made.
        bytes: u64,
    },
    /// Makes a volume from an image.
    Import {
        /// The volume.
        item: Item,
        /// Which image.
        id: ImageId,
        /// What it is.
        image: Box<ImageSpec>,
        /// Size of what is made.
        bytes: u64,
    },
    /// Sets a volume back to a snapshot.
    Revert {
        /// The volume.
        volume: VolumeId,
        /// The snapshot.
        snapshot: Item,
    },
    /// Overwrites a leftover and removes it.
    Wipe {
        /// Its name.
        name: String,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = &self.backend;
        match &self.change {
            Change::Create { item, bytes } => write!(f, "create {item} of {bytes} bytes on {on}"),
            Change::Clone { item, source, bytes } => {
                write!(f, "clone {source} to {item} of {bytes} bytes on {on}")
            }
            Change::Begin(task) => write!(f, "{task} on {on}"),
            Change::Activate { item } => write!(f, "activate {item} on {on}"),
            Change::CallOff { item } => write!(f, "call off the work on {item} on {on}"),
            Change::Extend { item, bytes } => write!(f, "grow {item} to {bytes} bytes on {on}"),
            Change::Delete { item } => write!(f, "delete {item} from {on}"),
            Change::Discard { item } => write!(f, "discard unfinished {item} on {on}"),
            Change::Sweep { name } => write!(f, "sweep {name} from {on}"),
            Change::Publish { target } => {
                let to: Vec<&str> = target.admitted.keys().map(String::as_str).collect();
                write!(f, "export {} to {}", target_name(target.volume), to.join(", "))
            }
            Change::Withdraw { volume } => write!(f, "withdraw {}", target_name(*volume)),
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Copy { item, source, path, bytes } => {
                write!(f, "copy {source} at {} to {item} of {bytes} bytes", path.display())
            }
            Self::Import { item, id, bytes, .. } => {
                write!(f, "write image {id} to {item} of {bytes} bytes")
            }
            Self::Revert { volume, snapshot } => {
                write!(f, "set volume-{volume} back to {snapshot}")
            }
            Self::Wipe { name } => write!(f, "wipe {name}"),
        }
    }
}

impl Task {
    /// What it is, for those who see it run.
    #[must_use]
    pub fn kind(&self) -> WorkKind {
        match self {
            Self::Copy { source, .. } => WorkKind::Copy { source: *source },
            Self::Import { id, .. } => WorkKind::Import { image: *id },
            Self::Revert { snapshot, .. } => WorkKind::Revert { snapshot: *snapshot },
            Self::Wipe { .. } => WorkKind::Wipe,
        }
    }
}

/// What work in the background is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkKind {
    /// Makes an item from another.
    Copy {
        /// What it is made from.
        source: Item,
    },
    /// Makes a volume from an image.
    Import {
        /// The image.
        image: ImageId,
    },
    /// Sets a volume back.
    Revert {
        /// To what.
        snapshot: Item,
    },
    /// Overwrites what was deleted.
    Wipe,
}

impl WorkKind {
    /// The item whose bytes the work reads.
    pub(super) fn source(self) -> Option<Item> {
        match self {
            Self::Copy { source } => Some(source),
            Self::Revert { snapshot } => Some(snapshot),
            Self::Import { .. } | Self::Wipe => None,
        }
    }
}

impl fmt::Display for WorkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Copy { .. } => "copying",
            Self::Import { .. } => "writing the image",
            Self::Revert { .. } => "going back to the snapshot",
            Self::Wipe => "wiping",
        })
    }
}
