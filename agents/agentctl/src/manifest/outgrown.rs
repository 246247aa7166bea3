//! What a manifest no longer wants: documents that agentctl made for one of its objects and would
//! not make again, with `--prune` everything else of the cloud, and copies at agents that need
//! them no more.
//!
//! Pure.

use std::collections::{BTreeMap, BTreeSet};

use stackhand_model::{Document, ObjectRef, State};

use super::check::references;
use super::complete::{CLOUD, Completed};
use super::expand::MADE_FOR;
use super::held::Held;
use super::place::Needs;
use super::plan::{Action, Item};

/// Objects held that go.
pub(crate) fn gone(
    completed: &Completed,
    world: &BTreeMap<ObjectRef, Document>,
    prune: Option<&str>,
) -> BTreeSet<ObjectRef> {
    let wanted = |object: &ObjectRef| completed.documents.contains_key(object);
    let outgrown = |document: &Document| {
        let owner = document.labels.get(MADE_FOR).and_then(|owner| owner.parse().ok());
        owner.is_some_and(|owner: ObjectRef| wanted(&owner))
    };
    let pruned = |document: &Document| {
        prune.is_some() && document.labels.get(CLOUD).map(String::as_str) == prune
    };
    world
        .iter()
        .filter(|(object, document)| !wanted(object) && (outgrown(document) || pruned(document)))
        .map(|(object, _)| *object)
        .collect()
}

/// Documents of the manifest that cannot do without something that goes.
pub(crate) fn still_needed(
    completed: &Completed,
    world: &BTreeMap<ObjectRef, Document>,
    gone: &BTreeSet<ObjectRef>,
) -> Vec<String> {
    let mut problems = Vec::new();
    for document in completed.documents.values() {
        for (field, to) in references(document) {
            if gone.contains(&to)
                && let Some(lost) = world.get(&to)
            {
                problems.push(format!(
                    "{} {}: {field}: {} {} would be deleted: name it in the manifest",
                    document.kind(),
                    document.name,
                    to.kind,
                    lost.name
                ));
            }
        }
    }
    problems
}

/// What is told to go: objects everywhere, and copies where nobody needs them. Copies are left
/// alone when `all_seen` is false: an agent that does not answer may be the reason for one.
pub(crate) fn removals(
    gone: &BTreeSet<ObjectRef>,
    needs: &Needs,
    held: &Held,
    all_seen: bool,
) -> Vec<Item> {
    let mut items = Vec::new();
    for (place, entries) in &held.entries {
        let needed = needs.get(place);
        for (object, entry) in entries {
            if entry.status.state == State::Deleting {
                continue;
            }
            let action = if gone.contains(object) {
                Action::Delete
            } else if all_seen && !needed.is_some_and(|needed| needed.contains(object)) {
                Action::Drop
            } else {
                continue;
            };
            items.push(Item { place: place.clone(), document: entry.document.clone(), action });
        }
    }
    items
}
