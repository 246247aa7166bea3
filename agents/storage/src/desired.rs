//! What is wanted of this host, by kind, and what can never be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use stackhand_model::{
    AttachmentId, AttachmentSpec, Document, ErrorCode, ObjectRef, SnapshotId, SnapshotSpec, Spec,
    VolumeId, VolumeSource, VolumeSpec,
};
use stackhand_runtime::agent::{Desired, Refusal};

use crate::backend::Item;

/// Bytes of a GiB.
pub const GIB: u64 = 1 << 30;

/// The documents held, by kind.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Volumes.
    pub volumes: BTreeMap<VolumeId, Wish<VolumeSpec>>,
    /// Snapshots.
    pub snapshots: BTreeMap<SnapshotId, Wish<SnapshotSpec>>,
    /// Attachments.
    pub attachments: BTreeMap<AttachmentId, Wish<AttachmentSpec>>,
}

/// One document and whether its object is to go.
#[derive(Clone, Debug)]
pub struct Wish<S> {
    /// What is wanted.
    pub spec: S,
    /// A delete was accepted.
    pub deleting: bool,
    /// The document, for its name.
    pub document: Arc<Document>,
}

impl Wanted {
    /// Sorts documents by kind.
    #[must_use]
    pub fn new(desired: &Desired) -> Self {
        let mut wanted = Self::default();
        for (object, held) in &desired.objects {
            let (deleting, document) = (held.deleting, Arc::clone(&held.document));
            match &held.document.spec {
                Spec::Volume(spec) => {
                    let wish = Wish { spec: spec.clone(), deleting, document };
                    wanted.volumes.insert(VolumeId(object.id), wish);
                }
                Spec::Snapshot(spec) => {
                    let wish = Wish { spec: spec.clone(), deleting, document };
                    wanted.snapshots.insert(SnapshotId(object.id), wish);
                }
                Spec::Attachment(spec) => {
                    let wish = Wish { spec: spec.clone(), deleting, document };
                    wanted.attachments.insert(AttachmentId(object.id), wish);
                }
                // Documents of other agents do not get here.
                _ => {}
            }
        }
        wanted
    }

    /// Whether something is new, and all else is held as it was `before`, or was being deleted
    /// and is gone.
    #[must_use]
    pub fn only_adds_to(&self, before: &Self) -> bool {
        let differ = [
            compare(&self.volumes, &before.volumes),
            compare(&self.snapshots, &before.snapshots),
            compare(&self.attachments, &before.attachments),
        ];
        differ.iter().all(|differ| !differ.changed) && differ.iter().any(|differ| differ.added)
    }

    /// The item that an item is made from, as far as documents tell.
    #[must_use]
    pub fn source(&self, item: Item) -> Option<Item> {
        match item {
            Item::Volume(id) => match self.volumes.get(&id)?.spec.source {
                VolumeSource::Snapshot(source) => Some(Item::Snapshot(source)),
                VolumeSource::Volume(source) => Some(Item::Volume(source)),
                VolumeSource::Blank | VolumeSource::Image(_) => None,
            },
            Item::Snapshot(id) => Some(Item::Volume(self.snapshots.get(&id)?.spec.volume)),
        }
    }

    /// How an object is called in messages: its kind, name and id.
    #[must_use]
    pub fn call(&self, item: Item) -> String {
        let name = match item {
            Item::Volume(id) => self.volumes.get(&id).map(|wish| &wish.document.name),
            Item::Snapshot(id) => self.snapshots.get(&id).map(|wish| &wish.document.name),
        };
        match name {
            Some(name) => format!("{} {name} ({})", item.object().kind, item.object().id),
            None => item.object().to_string(),
        }
    }
}

struct Differ {
    added: bool,
    changed: bool,
}

fn compare<I: Ord, S>(now: &BTreeMap<I, Wish<S>>, before: &BTreeMap<I, Wish<S>>) -> Differ {
    let same = |old: &Wish<S>, new: &Wish<S>| {
        new.deleting == old.deleting && Arc::ptr_eq(&new.document, &old.document)
    };
    Differ {
        added: now.keys().any(|id| !before.contains_key(id)),
        changed: before.iter().any(|(id, old)| match now.get(id) {
            Some(new) => !same(old, new),
            None => !old.deleting,
        }),
    }
}

/// Judges a change by documents alone. `before` is what was held at the last pass.
///
/// # Errors
///
/// Refuses what can never work.
pub fn admit(
    host: &str,
    backends: &BTreeSet<String>,
    before: &Wanted,
    wanted: &Wanted,
    changed: &BTreeSet<ObjectRef>,
) -> Result<(), Refusal> {
    for (&id, wish) in wanted.volumes.iter().filter(|(_, wish)| !wish.deleting) {
        if changed.contains(&id.object()) {
            volume(host, backends, before, wanted, id, &wish.spec)
                .map_err(|refusal| refusal.about(id.object()))?;
        }
    }
    let mut users: BTreeMap<VolumeId, AttachmentId> = BTreeMap::new();
    for (&id, wish) in wanted.attachments.iter().filter(|(_, wish)| !wish.deleting) {
        let Some(volume) = wanted.volumes.get(&wish.spec.volume) else { continue };
        let Some(other) = users.insert(wish.spec.volume, id) else { continue };
        let involved = [id.object(), other.object(), wish.spec.volume.object()];
        if !volume.spec.multiattach && involved.iter().any(|object| changed.contains(object)) {
            let mine = if changed.contains(&id.object()) { id } else { other };
            let theirs = if mine == id { other } else { id };
            let to = wanted.attachments.get(&theirs).map_or("", |wish| &wish.spec.connector.host);
            return Err(Refusal::new(
                ErrorCode::Conflict,
                format!(
                    "{} is attached to host {to} by {}, and multiattach is not set: delete that \
                     attachment first",
                    wanted.call(Item::Volume(wish.spec.volume)),
                    theirs.object()
                ),
            )
            .about(mine.object())
            .at("spec.volume"));
        }
    }
    Ok(())
}

fn volume(
    host: &str,
    backends: &BTreeSet<String>,
    before: &Wanted,
    wanted: &Wanted,
    id: VolumeId,
    spec: &VolumeSpec,
) -> Result<(), Refusal> {
    if spec.host != host {
        return Err(Refusal::new(
            ErrorCode::BadRequest,
            format!("spec.host is {}, this is {host}: send it there", spec.host),
        )
        .at("spec.host"));
    }
    if let Some(backend) = &spec.backend
        && !backends.contains(backend)
    {
        let known: Vec<&str> = backends.iter().map(String::as_str).collect();
        return Err(Refusal::new(
            ErrorCode::BadRequest,
            format!("host {host} has no backend {backend:?}; it has: {}", known.join(", ")),
        )
        .at("spec.backend"));
    }
    if let (VolumeSource::Image(image), None) = (&spec.source, &spec.image)
        && !before.volumes.contains_key(&id)
    {
        return Err(Refusal::new(
            ErrorCode::BadRequest,
            format!("which image {image} is must be filled in by the controller"),
        )
        .at("spec.image"));
    }
    if let Some(old) = before.volumes.get(&id)
        && old.spec.size_gib > spec.size_gib
    {
        return Err(Refusal::new(
            ErrorCode::BadRequest,
            format!("it has {} GiB, and volumes only grow", old.spec.size_gib),
        )
        .at("spec.size_gib"));
    }
    let mut seen = BTreeSet::from([Item::Volume(id)]);
    let mut item = Item::Volume(id);
    while let Some(source) = wanted.source(item) {
        if !seen.insert(source) {
            return Err(Refusal::new(
                ErrorCode::BadRequest,
                format!("it would be made from itself, by way of {}", wanted.call(source)),
            )
            .at("spec.source"));
        }
        item = source;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
