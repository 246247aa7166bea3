//! What is made: items, what they are made from, and their growth.

use serde_json::{Value, json};
use stackhand_model::{ImageId, VolumeId, VolumeSource, VolumeSpec};
use stackhand_runtime::agent::Outcome;

use super::{Change, Planner, Standing, Task, waits_its_turn, working};
use crate::backend::{Item, Observed, Presence, Seen, Usage};
use crate::desired::{GIB, Wish};

impl<'a> Planner<'a> {
    pub(super) fn backend_of(&self, wish: &'a Wish<VolumeSpec>) -> &'a str {
        wish.spec.backend.as_deref().unwrap_or(&self.situation.default_backend)
    }

    /// Whether the item's bytes can be used in this pass; plans what it takes.
    pub(super) fn stand(&mut self, item: Item) -> Standing {
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
                Standing::Ready { .. } => Outcome::Active { observed: observed.into() },
                Standing::Waits(reason) => {
                    Outcome::Pending { reason: reason.clone(), observed: observed.into() }
                }
                Standing::Failed(reason) => {
                    Outcome::Failed { reason: reason.clone(), observed: observed.into() }
                }
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
        if let Item::Volume(id) = item
            && !deleting
            && let Some(&snapshot) = self.situation.reverts.get(&id)
        {
            return self.set_back(id, snapshot, &backend);
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
                    Presence::Broken { what } => Standing::Failed(what.clone()),
                    Presence::Inactive if deleting || !self.due.contains(&object) => {
                        Standing::Waits("its device is not there yet".into())
                    }
                    Presence::Inactive => {
                        let steps = self.plan.steps.len();
                        let standing =
                            self.grow(item, seen, wish_bytes, &backend, deleting, &mut facts);
                        // One that grows is activated by that.
                        if self.plan.steps.len() == steps {
                            self.step(Some(object), vec![], &backend, Change::Activate { item });
                        }
                        standing
                    }
                    Presence::Lost => Standing::Failed(format!(
                        "{} was there and is gone: put it back (then adopt it), or delete the object",
                        place.display()
                    )),
                    Presence::Ready => {
                        self.grow(item, seen, wish_bytes, &backend, deleting, &mut facts)
                    }
                    Presence::Partial => match self.running(item) {
                        Some(work) => working(work, &mut facts),
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
                Some(work) => working(work, &mut facts),
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
                    observed: facts.clone().into(),
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
                            observed: facts.clone().into(),
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
            self.situation.works.get(&item).and_then(|work| work.failure.as_ref())
        {
            return Standing::Failed(failure.clone());
        }
        if let Item::Volume(id) = item
            && let Some(wish) = self.wanted.volumes.get(&id)
            && let VolumeSource::Image(image) = wish.spec.source
        {
            return self.import(item, image, wish, backend, facts);
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
        let instant = from == backend
            && match item {
                Item::Snapshot(_) => observed.instant.snapshots,
                Item::Volume(_) => observed.instant.clones,
            };
        let cost = if observed.thick {
            // A snapshot has room for every byte of its volume to change.
            bytes
        } else {
            // What the new item may come to use; and a source whose blocks become shared needs
            // room for all that is overwritten later.
            let own = if matches!(item, Item::Volume(_)) { bytes } else { 0 };
            let unshared = source_seen.is_some_and(|seen| !seen.shared);
            if !instant {
                own.max(allocated)
            } else if matches!(source, Item::Volume(_)) && unshared {
                own.saturating_add(allocated)
            } else {
                own
            }
        };
        if !instant && source_seen.is_some_and(|seen| seen.usage == Usage::Written) {
            let remedy = if observed.instant.snapshots {
                "make it from a snapshot of that volume"
            } else {
                "stop the instance, or keep volumes on XFS or btrfs"
            };
            return Standing::Waits(format!(
                "a running guest writes to {}, and backend {backend} cannot clone at once: {remedy}",
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
            let path = match self.situation.backends.get(&from).map(|view| &view.observed) {
                Some(Ok(there)) => there.place.path(source),
                _ => return Standing::Failed(format!("backend {from} is away")),
            };
            let task = Task::Copy { item, source, path, bytes };
            self.step(Some(object), needs, backend, Change::Begin(task));
            facts["progress_percent"] = 0.into();
            Standing::Waits("copying has begun".into())
        }
    }

    fn import(
        &mut self,
        item: Item,
        id: ImageId,
        wish: &Wish<VolumeSpec>,
        backend: &str,
        facts: &mut Value,
    ) -> Standing {
        let Some(image) = &wish.spec.image else {
            return Standing::Failed(format!(
                "what image {id} is, its document does not tell: fill in spec.image"
            ));
        };
        let bytes = wish.spec.size_gib * GIB;
        if let Err(reason) = self.promise(backend, bytes) {
            return Standing::Failed(reason);
        }
        let image = Box::new(image.clone());
        let change = Change::Begin(Task::Import { item, id, image, bytes });
        self.step(Some(item.object()), vec![], backend, change);
        facts["size_bytes"] = bytes.into();
        facts["progress_percent"] = 0.into();
        Standing::Waits("the image is being fetched".into())
    }

    /// A volume that an action asked to be set back.
    fn set_back(&mut self, volume: VolumeId, snapshot: Item, backend: &str) -> (Standing, Value) {
        let (item, mut facts) = (Item::Volume(volume), json!({"backend": backend}));
        let failure = self.situation.works.get(&item).and_then(|work| work.failure.clone());
        let standing = match (self.running(item), failure) {
            (Some(work), _) => working(work, &mut facts),
            (None, Some(failure)) => Standing::Failed(failure),
            (None, None) if !self.due.contains(&item.object()) => waits_its_turn(),
            (None, None) => {
                let change = Change::Begin(Task::Revert { volume, snapshot });
                self.step(Some(item.object()), vec![], backend, change);
                Standing::Waits(format!("is set back to {}", self.wanted.call(snapshot)))
            }
        };
        (standing, facts)
    }

    pub(super) fn promise(&mut self, backend: &str, bytes: u64) -> Result<(), String> {
        if let Some(view) = self.situation.backends.get(backend)
            && let Ok(observed) = &view.observed
            && let Some(reason) = view.limits.stops(observed.fill)
        {
            return Err(format!("backend {backend} takes nothing more: {reason}"));
        }
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

    pub(super) fn waits_for(&self, item: Item, reason: &str) -> String {
        format!("waits for {}: {reason}", self.wanted.call(item))
    }
}
