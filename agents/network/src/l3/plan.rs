//! From what is wanted and what is seen of routers to what is done. Pure: no clock, no I/O.
//!
//! Translations come first, so that no flow starts untranslated once its links are there, and
//! are told under the floating IP that they serve. Routes need links and come last.

use std::collections::{BTreeMap, BTreeSet};

use smol_str::SmolStr;
use stackhand_model::ObjectRef;

use super::{Change, Entry, Seen, SeenNat, SeenRouter, Wanted};

/// One change, and the object it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The object.
    pub object: ObjectRef,
    /// The change.
    pub change: Change,
}

/// Compares what is wanted of routers with what is seen. A namespace that is not seen is one that
/// will be made.
#[must_use]
pub fn plan<'a>(
    wish: impl IntoIterator<Item = (&'a SmolStr, &'a Wanted)>,
    seen: &Seen,
) -> Vec<Step> {
    let nothing = SeenRouter::default();
    let mut steps = Vec::new();
    for (space, wanted) in wish {
        let has = seen.get(space).map_or(&nothing, AsRef::as_ref);
        translations(space, wanted, &has.nat, &mut steps);
        routes(space, wanted, has, &mut steps);
    }
    steps
}

fn translations(space: &SmolStr, wanted: &Wanted, seen: &SeenNat, steps: &mut Vec<Step>) {
    let SeenNat::Built(has) = seen else {
        let change = Change::Build {
            space: space.clone(),
            replace: *seen == SeenNat::Changed,
            entries: wanted.nat.clone(),
        };
        steps.push(Step { object: wanted.object, change });
        return;
    };
    let owner =
        |entry: &Entry| wanted.owners.get(&entry.address()).copied().unwrap_or(wanted.object);
    let is_cut = |entry: &Entry| matches!(entry, Entry::Cut { .. });
    let mut going: BTreeMap<(&str, Vec<u8>), &Entry> = has
        .difference(&wanted.nat)
        .filter(|entry| !is_cut(entry))
        .map(|entry| (entry.key(), entry))
        .collect();
    let mut transactions: BTreeMap<ObjectRef, Transaction> = BTreeMap::new();
    // What comes takes the place of what has its key, whoever that served.
    for entry in wanted.nat.difference(has) {
        let transaction = transactions.entry(owner(entry)).or_default();
        transaction.add.insert(entry.clone());
        if let Some(old) = going.remove(&entry.key()) {
            transaction.remove(old);
        }
    }
    for old in going.into_values() {
        transactions.entry(owner(old)).or_default().remove(old);
    }
    // Notes that a crash left.
    for cut in has.iter().filter(|entry| is_cut(entry)) {
        transactions.entry(owner(cut)).or_default().cuts.insert(cut.clone());
    }
    for (object, Transaction { remove, mut add, cuts }) in transactions {
        let space = space.clone();
        if !remove.is_empty() || !add.is_empty() {
            add.extend(cuts.difference(has).cloned());
            let change = Change::Translate { space: space.clone(), remove, add };
            steps.push(Step { object, change });
        }
        if !cuts.is_empty() {
            steps.push(Step { object, change: Change::Cut { space, cuts } });
        }
    }
}

/// The changes that serve one object.
#[derive(Default)]
struct Transaction {
    remove: BTreeSet<Entry>,
    add: BTreeSet<Entry>,
    cuts: BTreeSet<Entry>,
}

impl Transaction {
    fn remove(&mut self, entry: &Entry) {
        self.remove.insert(entry.clone());
        self.cuts.extend(entry.cut());
    }
}

fn routes(space: &SmolStr, wanted: &Wanted, has: &SeenRouter, steps: &mut Vec<Step>) {
    for (destination, hops) in &wanted.routes {
        let seen = has.routes.get(destination);
        if seen.is_none_or(|seen| seen.hops != *hops || !seen.ours) {
            let change = Change::SetRoute {
                space: space.clone(),
                destination: *destination,
                hops: hops.clone(),
            };
            steps.push(Step { object: wanted.object, change });
        }
    }
    let ours = has.routes.iter().filter(|(_, route)| route.ours);
    for (destination, _) in ours.filter(|(to, _)| !wanted.routes.contains_key(to)) {
        let change = Change::RemoveRoute { space: space.clone(), destination: *destination };
        steps.push(Step { object: wanted.object, change });
    }
}
