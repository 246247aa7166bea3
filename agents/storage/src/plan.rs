//! Decides what to change, by comparing documents with what backends hold. Pure: no I/O, no clock.
//!
//! The order of the steps is: sweep, delete, make and grow. An item is made after the one it
//! starts from; a deletion waits for whatever still needs the item. Every due object gets a
//! verdict that holds if its steps succeed.

mod capacity;
mod delete;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::{Value, json};
use stackhand_model::{AttachmentId, ObjectRef, SnapshotId, VolumeId};
use stackhand_runtime::agent::Outcome;

use crate::backend::{Item, Observed, Presence, Seen, Usage};
use crate::desired::{GIB, Wanted, Wish};
pub use capacity::{Budget, Limits};

/// One change to a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The object it serves; absent for clean-up.
    pub object: Option<ObjectRef>,
    /// Objects whose steps must have succeeded before this one is tried.
    pub needs: Vec<ObjectRef>,
    /// Where.
    pub backend: String,
    /// What.
    pub change: Change,
}

/// What a step does.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Calls a copy off.
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
            Change::CallOff { item } => write!(f, "call off the copy to {item} on {on}"),
            Change::Extend { item, bytes } => write!(f, "grow {item} to {bytes} bytes on {on}"),
            Change::Delete { item } => write!(f, "delete {item} from {on}"),
            Change::Discard { item } => write!(f, "discard unfinished {item} on {on}"),
            Change::Sweep { name } => write!(f, "sweep {name} from {on}"),
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

/// A copy that runs in the background, or ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyState {
    /// Where the copy goes.
    pub backend: String,
    /// What it is made from.
    pub source: Item,
    /// How far it is, 0 to 100.
    pub percent: u64,
    /// Why it ended, if it failed.
    pub failure: Option<String>,
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
    /// Copies under way, and failed ones that were not told yet.
    pub copies: BTreeMap<Item, CopyState>,
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

    /// A running copy to the item.
    fn running(&self, item: Item) -> Option<&'a CopyState> {
        self.situation.copies.get(&item).filter(|copy| copy.failure.is_none())
    }

    fn step(
        &mut self,
        object: Option<ObjectRef>,
        needs: Vec<ObjectRef>,
        backend: &str,
        change: Change,
    ) {
        self.plan.steps.push(Step { object, needs, backend: backend.to_owned(), change });
    }

    fn sweep(&mut self) {
        for (name, view) in &self.situation.backends {
            let Ok(observed) = &view.observed else { continue };
            for leftover in &observed.leftovers {
                // A copy that has just begun has a file and not yet a record.
                if self.running(leftover.item).is_none() {
                    self.step(None, vec![], name, Change::Sweep { name: leftover.name.clone() });
                }
            }
        }
    }

    // Making --------------------------------------------------------------------------------

    fn backend_of(&self, wish: &'a Wish<stackhand_model::VolumeSpec>) -> &'a str {
        wish.spec.backend.as_deref().unwrap_or(&self.situation.default_backend)
    }

    /// Whether the item's bytes can be used in this pass; plans what it takes.
    fn stand(&mut self, item: Item) -> Standing {
        if let Some(known) = self.standings.get(&item) {
            return known.clone();
        }
        // Whoever asks again on the way is part of a circle.
        let circle = Standing::Failed("it would be made from itself".into());
        self.standings.insert(item, circle);
        let (standing, observed) = self.work_out(item);
        self.standings.insert(item, standing.clone());
        let deleting = match item {
            Item::Volume(id) => self.wanted.volumes.get(&id).is_none_or(|wish| wish.deleting),
            Item::Snapshot(id) => self.wanted.snapshots.get(&id).is_none_or(|wish| wish.deleting),
        };
        if !deleting && self.due.contains(&item.object()) {
            let outcome = match &standing {
                Standing::Ready { .. } => Outcome::Active { observed },
                Standing::Waits(reason) => Outcome::Pending { reason: reason.clone(), observed },
                Standing::Failed(reason) => Outcome::Failed { reason: reason.clone(), observed },
            };
            // A problem found by the way, such as a size that cannot shrink, was told already.
            self.plan.outcomes.entry(item.object()).or_insert(outcome);
        }
        standing
    }

    fn work_out(&mut self, item: Item) -> (Standing, Value) {
        let object = item.object();
        let (wish_bytes, backend, deleting) = match item {
            Item::Volume(id) => match self.wanted.volumes.get(&id) {
                Some(wish) => (
                    Some(wish.spec.size_gib * GIB),
                    self.backend_of(wish).to_owned(),
                    wish.deleting,
                ),
                None => {
                    return (Standing::Waits(format!("{object} is not known here")), Value::Null);
                }
            },
            Item::Snapshot(id) => match self.wanted.snapshots.get(&id) {
                Some(wish) => {
                    let backend = match self.holder(item) {
                        Some((backend, _)) => backend.to_owned(),
                        None => match self.stand(Item::Volume(wish.spec.volume)) {
                            Standing::Ready { backend, .. } => backend,
                            Standing::Waits(reason) => {
                                let reason =
                                    self.waits_for(Item::Volume(wish.spec.volume), &reason);
                                return (Standing::Waits(reason), Value::Null);
                            }
                            Standing::Failed(reason) => {
                                let reason =
                                    self.waits_for(Item::Volume(wish.spec.volume), &reason);
                                return (Standing::Waits(reason), Value::Null);
                            }
                        },
                    };
                    (None, backend, wish.deleting)
                }
                None => {
                    return (Standing::Waits(format!("{object} is not known here")), Value::Null);
                }
            },
        };
        let Some(view) = self.situation.backends.get(&backend) else {
            let known: Vec<&str> = self.situation.backends.keys().map(String::as_str).collect();
            let reason =
                format!("there is no backend {backend:?}; there are: {}", known.join(", "));
            return (Standing::Failed(reason), Value::Null);
        };
        let observed = match &view.observed {
            Ok(observed) => observed,
            Err(reason) => {
                let reason = format!("backend {backend} is away: {reason}");
                return (Standing::Failed(reason), Value::Null);
            }
        };
        if let Some((other, _)) = self.holder(item)
            && other != backend
            && self.seen(&backend, item).is_none()
        {
            let reason =
                format!("it is on backend {other}; moving to {backend} is not supported yet");
            return (Standing::Failed(reason), json!({"backend": other}));
        }
        let place = observed.place.path(item);
        let mut facts = json!({"backend": backend, "path": place});
        let standing = match observed.items.get(&item) {
            Some(seen) => {
                facts["size_bytes"] = seen.bytes.into();
                facts["allocated_bytes"] = seen.allocated_bytes.into();
                match &seen.presence {
                    Presence::Foreign { what } => Standing::Failed(format!(
                        "{} is {what}; move it away, or take it over with the action adopt",
                        place.display()
                    )),
                    Presence::Lost => Standing::Failed(format!(
                        "{} was there and is gone: put it back (then adopt it), or delete the object",
                        place.display()
                    )),
                    Presence::Ready => {
                        self.grow(item, seen, wish_bytes, &backend, deleting, &mut facts)
                    }
                    Presence::Partial => match self.running(item) {
                        Some(copy) => copying(copy, &mut facts),
                        None if deleting => Standing::Waits("it is being deleted".into()),
                        None if !self.due.contains(&object) => waits_its_turn(),
                        None => {
                            self.step(Some(object), vec![], &backend, Change::Discard { item });
                            self.make(item, wish_bytes, &backend, observed, &mut facts)
                        }
                    },
                }
            }
            None => match self.running(item) {
                Some(copy) => copying(copy, &mut facts),
                None if deleting => Standing::Waits("it is being deleted".into()),
                None if !self.due.contains(&object) => waits_its_turn(),
                None => self.make(item, wish_bytes, &backend, observed, &mut facts),
            },
        };
        (standing, facts)
    }

    /// A volume that is there: has it the right size?
    fn grow(
        &mut self,
        item: Item,
        seen: &Seen,
        wish_bytes: Option<u64>,
        backend: &str,
        deleting: bool,
        facts: &mut Value,
    ) -> Standing {
        let object = item.object();
        let ready = |bytes| Standing::Ready { backend: backend.to_owned(), bytes };
        let Some(bytes) = wish_bytes.filter(|_| !deleting && self.due.contains(&object)) else {
            return ready(seen.bytes);
        };
        if seen.bytes > bytes {
            // Its bytes can be used all the same.
            self.plan.outcomes.insert(
                object,
                Outcome::Failed {
                    reason: format!(
                        "it has {} bytes and size_gib asks for {bytes}: volumes only grow; ask for at \
                         least {} GiB",
                        seen.bytes,
                        seen.bytes.div_ceil(GIB)
                    ),
                    observed: facts.clone(),
                },
            );
        } else if seen.bytes < bytes {
            match self.promise(backend, bytes - seen.bytes) {
                Ok(()) => {
                    self.step(Some(object), vec![], backend, Change::Extend { item, bytes });
                    facts["size_bytes"] = bytes.into();
                    return ready(bytes);
                }
                Err(reason) => {
                    self.plan.outcomes.insert(
                        object,
                        Outcome::Failed {
                            reason: format!("cannot grow: {reason}"),
                            observed: facts.clone(),
                        },
                    );
                }
            }
        }
        ready(seen.bytes)
    }

    fn make(
        &mut self,
        item: Item,
        wish_bytes: Option<u64>,
        backend: &str,
        observed: &Observed,
        facts: &mut Value,
    ) -> Standing {
        let object = item.object();
        if let Some(failure) =
            self.situation.copies.get(&item).and_then(|copy| copy.failure.as_ref())
        {
            return Standing::Failed(failure.clone());
        }
        if let Item::Volume(id) = item
            && let Some(wish) = self.wanted.volumes.get(&id)
            && let stackhand_model::VolumeSource::Image(_) = wish.spec.source
        {
            return Standing::Failed("volumes from images are not supported yet".into());
        }
        let Some(source) = self.wanted.source(item) else {
            let bytes = wish_bytes.unwrap_or(0);
            return match self.promise(backend, bytes) {
                Ok(()) => {
                    self.step(Some(object), vec![], backend, Change::Create { item, bytes });
                    facts["size_bytes"] = bytes.into();
                    Standing::Ready { backend: backend.to_owned(), bytes }
                }
                Err(reason) => Standing::Failed(reason),
            };
        };
        let (from, source_bytes) = match self.stand(source) {
            Standing::Ready { backend, bytes } => (backend, bytes),
            Standing::Waits(reason) | Standing::Failed(reason) => {
                return Standing::Waits(self.waits_for(source, &reason));
            }
        };
        let bytes = wish_bytes.unwrap_or(source_bytes);
        if bytes < source_bytes {
            return Standing::Failed(format!(
                "{} has {source_bytes} bytes: size_gib must be at least {}",
                self.wanted.call(source),
                source_bytes.div_ceil(GIB)
            ));
        }
        let source_seen = self.seen(&from, source);
        let allocated = source_seen.map_or(0, |seen| seen.allocated_bytes);
        let instant = from == backend && observed.instant_copies;
        // What the new item may come to use; and a source whose blocks become shared needs room
        // for all that is overwritten later.
        let own = if matches!(item, Item::Volume(_)) { bytes } else { 0 };
        let cost = if !instant {
            own.max(allocated)
        } else if matches!(source, Item::Volume(_)) && source_seen.is_some_and(|seen| !seen.shared)
        {
            own.saturating_add(allocated)
        } else {
            own
        };
        if !instant && source_seen.is_some_and(|seen| seen.usage == Usage::Written) {
            return Standing::Waits(format!(
                "a running guest writes to {}, and the file system of backend {backend} cannot clone \
                 at once: stop the instance, or keep volumes on XFS or btrfs",
                self.wanted.call(source)
            ));
        }
        if let Err(reason) = self.promise(backend, cost) {
            return Standing::Failed(reason);
        }
        let needs = vec![source.object()];
        facts["size_bytes"] = bytes.into();
        if instant {
            self.step(Some(object), needs, backend, Change::Clone { item, source, bytes });
            Standing::Ready { backend: backend.to_owned(), bytes }
        } else {
            self.step(Some(object), needs, backend, Change::Copy { item, source, from, bytes });
            facts["progress_percent"] = 0.into();
            Standing::Waits("copying has begun".into())
        }
    }

    fn promise(&mut self, backend: &str, bytes: u64) -> Result<(), String> {
        match self.budgets.get_mut(backend) {
            Some(budget) => budget.take(bytes).map_err(|left| {
                format!(
                    "{bytes} bytes do not fit: backend {backend} can promise {left} more; free space, \
                     or raise storage.backends.{backend}.overcommit_percent"
                )
            }),
            None => Err(format!("backend {backend} is away")),
        }
    }

    fn waits_for(&self, item: Item, reason: &str) -> String {
        format!("waits for {}: {reason}", self.wanted.call(item))
    }

    // Attaching -----------------------------------------------------------------------------

    fn attach(
        &mut self,
        id: AttachmentId,
        wish: &Wish<stackhand_model::AttachmentSpec>,
    ) -> Outcome {
        let volume = Item::Volume(wish.spec.volume);
        let name = self.wanted.call(volume);
        let Some(volume_wish) = self.wanted.volumes.get(&wish.spec.volume) else {
            return pending(format!("waits for {name}: it is not known here"));
        };
        if volume_wish.deleting {
            return Outcome::failed(format!("{name} is being deleted"));
        }
        let connector = &wish.spec.connector;
        if connector.host != self.situation.host {
            return Outcome::failed(format!(
                "host {} is not this host ({}), and exports to other hosts are not supported yet: run \
                 the instance here",
                connector.host, self.situation.host
            ));
        }
        let first = self
            .wanted
            .attachments
            .iter()
            .find(|(_, other)| !other.deleting && other.spec.volume == wish.spec.volume);
        if let Some((&first, other)) = first
            && first != id
            && !volume_wish.spec.multiattach
        {
            return Outcome::failed(format!(
                "{name} is attached to host {} by {}, and multiattach is not set",
                other.spec.connector.host,
                first.object()
            ));
        }
        if let Some((&copy, _)) = self
            .situation
            .copies
            .iter()
            .find(|(_, copy)| copy.source == volume && copy.failure.is_none())
            && !wish.spec.read_only
        {
            return pending(format!(
                "waits for the copy from {name} to {}",
                self.wanted.call(copy)
            ));
        }
        match self.stand(volume) {
            Standing::Waits(reason) | Standing::Failed(reason) => {
                pending(self.waits_for(volume, &reason))
            }
            Standing::Ready { backend, .. } => {
                let observed = self.situation.backends.get(&backend).map(|view| &view.observed);
                let Some(Ok(observed)) = observed else {
                    return Outcome::failed(format!("backend {backend} is away"));
                };
                self.plan.relies_on.insert(id.object(), volume.object());
                Outcome::Active {
                    observed: json!({
                        "connection": observed.place.connection(volume),
                        "read_only": wish.spec.read_only,
                    }),
                }
            }
        }
    }
}

fn copying(copy: &CopyState, facts: &mut Value) -> Standing {
    facts["progress_percent"] = copy.percent.into();
    Standing::Waits(format!("copying, {} % done", copy.percent))
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
