//! Decides what to change, by comparing documents with what backends hold. Pure: no I/O, no clock.
//!
//! The order of the steps is: sweep, delete, make and grow. An item is made after the one it
//! starts from; a deletion waits for whatever still needs the item. Every due object gets a
//! verdict that holds if its steps succeed.

mod attach;
mod capacity;
mod delete;
mod make;
mod step;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::Value;
use stackhand_model::{AttachmentId, ObjectRef, SnapshotId, VolumeId};
use stackhand_runtime::agent::Outcome;

use crate::backend::{Item, Observed, Presence, Seen};
use crate::desired::Wanted;
use crate::export::chap::Key;
use crate::export::{Admission, SeenTarget};
pub use capacity::{Budget, Limits};
pub use step::{Change, Step, Task, WorkKind};

/// Name that steps on exports carry in place of a backend's.
pub const EXPORTS: &str = "exports";

/// A backend as the planner sees it.
#[derive(Clone, Debug)]
pub struct View {
    /// What it holds, or why nobody knows.
    pub observed: Result<Observed, String>,
    /// How much of it may be promised.
    pub limits: Limits,
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

    /// Whether nothing of an item is being made: a copy that has just begun has a file and not yet
    /// a record, and a volume on its way back to a snapshot is all in its leftovers for a moment.
    fn may_sweep(&self, item: Item) -> bool {
        let goes_back =
            matches!(item, Item::Volume(id) if self.situation.reverts.contains_key(&id));
        self.running(item).is_none() && !goes_back
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
                        let wipe = Change::Begin(Task::Wipe { name: left });
                        self.step(None, vec![], name, wipe);
                    }
                } else if leftover.item.is_none_or(|item| self.may_sweep(item)) {
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
    Outcome::Pending { reason, observed: Value::Null.into() }
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
