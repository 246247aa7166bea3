//! Decides what to change, by comparing documents with what backends hold. Pure: no I/O, no clock.
//!
//! The order of the steps is: sweep, delete, make and grow. An item is made after the one it
//! starts from; a deletion waits for whatever still needs the item. Every due object gets a
//! verdict that holds if its steps succeed.

mod attach;
mod capacity;
mod delete;
mod make;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::Value;
use stackhand_model::{AttachmentId, ImageId, ImageSpec, ObjectRef, SnapshotId, VolumeId};
use stackhand_runtime::agent::Outcome;

use crate::backend::{Item, Observed, Presence, Seen};
use crate::desired::Wanted;
use crate::export::chap::Key;
use crate::export::{Admission, SeenTarget, Target, target_name};
pub use capacity::{Budget, Limits};

/// Name that steps on exports carry in place of a backend's.
pub const EXPORTS: &str = "exports";

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
    /// Begins to copy in the background.
    Copy {
        /// The item.
        item: Item,
        /// What it starts from.
        source: Item,
        /// Backend of the source.
        from: String,
        /// Its size.
        bytes: u64,
    },
    /// Begins to make an item from an image in the background.
    Import {
        /// The item.
        item: Item,
        /// Which image.
        id: ImageId,
        /// What it is.
        image: Box<ImageSpec>,
        /// Its size.
        bytes: u64,
    },
    /// Begins to set a volume back in the background.
    Revert {
        /// The volume.
        volume: VolumeId,
        /// What it is set back to.
        snapshot: Item,
    },
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
    /// Begins to overwrite a leftover in the background.
    Wipe {
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

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = &self.backend;
        match &self.change {
            Change::Create { item, bytes } => write!(f, "create {item} of {bytes} bytes on {on}"),
            Change::Clone { item, source, bytes } => {
                write!(f, "clone {source} to {item} of {bytes} bytes on {on}")
            }
            Change::Copy { item, source, from, bytes } => {
                write!(f, "copy {source} of {from} to {item} of {bytes} bytes on {on}")
            }
            Change::Import { item, id, bytes, .. } => {
                write!(f, "write image {id} to {item} of {bytes} bytes on {on}")
            }
            Change::Revert { volume, snapshot } => {
                write!(f, "set volume-{volume} back to {snapshot} on {on}")
            }
            Change::Activate { item } => write!(f, "activate {item} on {on}"),
            Change::CallOff { item } => write!(f, "call off the work on {item} on {on}"),
            Change::Extend { item, bytes } => write!(f, "grow {item} to {bytes} bytes on {on}"),
            Change::Delete { item } => write!(f, "delete {item} from {on}"),
            Change::Discard { item } => write!(f, "discard unfinished {item} on {on}"),
            Change::Sweep { name } => write!(f, "sweep {name} from {on}"),
            Change::Wipe { name } => write!(f, "wipe {name} on {on}"),
            Change::Publish { target } => {
                let to: Vec<&str> = target.admitted.keys().map(String::as_str).collect();
                write!(f, "export {} to {}", target_name(target.volume), to.join(", "))
            }
            Change::Withdraw { volume } => write!(f, "withdraw {}", target_name(*volume)),
        }
    }
}

/// A backend as the planner sees it.
#[derive(Clone, Debug)]
pub struct View {
    /// What it holds, or why nobody knows.
    pub observed: Result<Observed, String>,
    /// How much of it may be promised.
    pub limits: Limits,
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
    fn source(self) -> Option<Item> {
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

/// Work that runs in the background, or ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkState {
    /// Where.
    pub backend: String,
    /// What it is.
    pub kind: WorkKind,
    /// How far it is, 0 to 100.
    pub percent: u64,
    /// Why it ended, if it failed.
    pub failure: Option<String>,
}

/// How volumes are given to other hosts.
#[derive(Clone, Debug)]
pub struct Exports {
    /// What is exported, or why nobody knows.
    pub observed: Result<BTreeMap<VolumeId, SeenTarget>, String>,
    /// Where others reach it.
    pub portal: SocketAddr,
    /// Number of the volume at its target.
    pub lun: u32,
    /// What passwords are made from.
    pub key: Arc<Key>,
}

/// Everything the planner knows of the host.
#[derive(Clone, Debug)]
pub struct Situation {
    /// This host's name.
    pub host: String,
    /// Backend of volumes that name none.
    pub default_backend: String,
    /// The backends.
    pub backends: BTreeMap<String, View>,
    /// Work on items that is under way, and failed work that was not told yet.
    pub works: BTreeMap<Item, WorkState>,
    /// Leftovers that are being wiped or could not be, by backend and name.
    pub wipes: BTreeMap<(String, String), WorkState>,
    /// Volumes that are to be set back, and to what.
    pub reverts: BTreeMap<VolumeId, Item>,
    /// Attachments whose hosts were declared dead: they are shut out though logged in.
    pub fenced: BTreeSet<AttachmentId>,
    /// How volumes are given to other hosts; absent where they are not.
    pub exports: Option<Exports>,
}

/// What to do, and how each due object comes out if it succeeds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Changes, in order.
    pub steps: Vec<Step>,
    /// Verdicts on due objects.
    pub outcomes: BTreeMap<ObjectRef, Outcome>,
    /// Objects whose verdict holds only if the steps of another succeed.
    pub relies_on: BTreeMap<ObjectRef, ObjectRef>,
}

impl Plan {
    /// Compares what is wanted with what is there. Objects that are not `due` stay as they are.
    #[must_use]
    pub fn new(wanted: &Wanted, situation: &Situation, due: &BTreeSet<ObjectRef>) -> Self {
        let mut planner = Planner {
            wanted,
            situation,
            due,
            budgets: situation
                .backends
                .iter()
                .filter_map(|(name, view)| {
                    let observed = view.observed.as_ref().ok()?;
                    Some((name.clone(), Budget::new(observed, &view.limits)))
                })
                .collect(),
            plan: Self::default(),
            standings: BTreeMap::new(),
            withdrawn: BTreeSet::new(),
            guests: BTreeMap::new(),
        };
        planner.sweep();
        planner.delete();
        for &id in wanted.volumes.keys() {
            planner.stand(Item::Volume(id));
        }
        for &id in wanted.snapshots.keys() {
            planner.stand(Item::Snapshot(id));
        }
        for (&id, wish) in &wanted.attachments {
            if !wish.deleting && due.contains(&id.object()) {
                let outcome = planner.attach(id, wish);
                planner.plan.outcomes.insert(id.object(), outcome);
            }
        }
        planner.publish();
        planner.plan
    }
}

/// Whether an item's bytes can be used in this pass.
#[derive(Clone, Debug)]
enum Standing {
    /// They are there, or will be once the steps before are done.
    Ready { backend: String, bytes: u64 },
    /// Not yet.
    Waits(String),
    /// Not, unless somebody does something.
    Failed(String),
}

struct Planner<'a> {
    wanted: &'a Wanted,
    situation: &'a Situation,
    due: &'a BTreeSet<ObjectRef>,
    budgets: BTreeMap<String, Budget>,
    plan: Plan,
    standings: BTreeMap<Item, Standing>,
    /// Volumes whose export ends in this pass.
    withdrawn: BTreeSet<VolumeId>,
    /// What is to be exported.
    guests: BTreeMap<VolumeId, Guests>,
}

/// Who is to have a volume over the network.
#[derive(Debug)]
struct Guests {
    backend: String,
    bytes: u64,
    admitted: BTreeMap<String, Admission>,
    /// Attachments whose turn it is.
    due: Vec<ObjectRef>,
}

impl<'a> Planner<'a> {
    fn seen(&self, backend: &str, item: Item) -> Option<&'a Seen> {
        self.situation.backends.get(backend)?.observed.as_ref().ok()?.items.get(&item)
    }

    /// The backend that holds anything of that name, ours before foreign.
    fn holder(&self, item: Item) -> Option<(&'a str, &'a Seen)> {
        let mut found = self
            .situation
            .backends
            .keys()
            .filter_map(|name| Some((name.as_str(), self.seen(name, item)?)))
            .collect::<Vec<_>>();
        found.sort_by_key(|(_, seen)| matches!(seen.presence, Presence::Foreign { .. }));
        found.into_iter().next()
    }

    /// Running work on the item.
    fn running(&self, item: Item) -> Option<&'a WorkState> {
        self.situation.works.get(&item).filter(|work| work.failure.is_none())
    }

    fn step(
        &mut self,
        object: Option<ObjectRef>,
        needs: Vec<ObjectRef>,
        backend: &str,
        change: Change,
    ) {
        let (backend, also) = (backend.to_owned(), vec![]);
        self.plan.steps.push(Step { object, also, needs, backend, change });
    }

    fn sweep(&mut self) {
        for (name, view) in &self.situation.backends {
            let Ok(observed) = &view.observed else { continue };
            for leftover in &observed.leftovers {
                let known =
                    self.situation.wipes.contains_key(&(name.clone(), leftover.name.clone()));
                let left = leftover.name.clone();
                if leftover.to_wipe {
                    if !known {
                        self.step(None, vec![], name, Change::Wipe { name: left });
                    }
                } else if leftover.item.is_none_or(|item| self.running(item).is_none()) {
                    // A copy that has just begun has a file and not yet a record.
                    self.step(None, vec![], name, Change::Sweep { name: left });
                }
            }
        }
    }
}

fn working(work: &WorkState, facts: &mut Value) -> Standing {
    facts["progress_percent"] = work.percent.into();
    Standing::Waits(format!("{}, {} % done", work.kind, work.percent))
}

fn waits_its_turn() -> Standing {
    Standing::Waits("its last attempt failed and the next is not due yet".into())
}

fn pending(reason: String) -> Outcome {
    Outcome::Pending { reason, observed: Value::Null }
}

/// Items that backends hold and no document asks for. They are kept and told.
#[must_use]
pub fn orphans(wanted: &Wanted, situation: &Situation) -> Vec<(String, Item)> {
    let known = |item: &Item| match item {
        Item::Volume(VolumeId(id)) => wanted.volumes.contains_key(&VolumeId(*id)),
        Item::Snapshot(SnapshotId(id)) => wanted.snapshots.contains_key(&SnapshotId(*id)),
    };
    let mut found = Vec::new();
    for (name, view) in &situation.backends {
        let Ok(observed) = &view.observed else { continue };
        for (&item, seen) in &observed.items {
            if !known(&item) && !matches!(seen.presence, Presence::Foreign { .. }) {
                found.push((name.clone(), item));
            }
        }
    }
    found
}
