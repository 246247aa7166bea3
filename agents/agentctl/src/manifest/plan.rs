//! From complete documents to what each agent is sent.
//!
//! Pure. Agents get what they need and do not hold yet: documents of the manifest that changed,
//! and documents held elsewhere that became needed.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use stackhand_model::{Document, Kind, ObjectRef, State};

use super::complete::{Completed, says_the_same};
use super::held::{Held, Place};
use super::outgrown::{gone, removals, still_needed};
use super::place::{Needs, needs};

/// What happens to a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Action {
    /// Nobody held it.
    Create,
    /// Another content was held.
    Update,
    /// It goes to an agent that did not hold it.
    Copy,
    /// It is held as it is wanted.
    Unchanged,
    /// Its object goes.
    Delete,
    /// It leaves an agent that does not need it any more.
    Drop,
}

impl Action {
    /// Whether its document is sent.
    pub(crate) fn is_sent(self) -> bool {
        matches!(self, Self::Create | Self::Update | Self::Copy)
    }

    /// The name as written in JSON.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Update => "update",
            Self::Copy => "copy",
            Self::Unchanged => "unchanged",
            Self::Delete => "delete",
            Self::Drop => "drop",
        }
    }
}

/// One document at one agent.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Item {
    pub(crate) place: Place,
    pub(crate) document: Document,
    pub(crate) action: Action,
}

/// All that a manifest means for the agents.
#[derive(Clone, Debug, Default)]
pub(crate) struct Plan {
    /// One per document of the manifest and agent, copies of others, and what goes; by kind in the
    /// order of application, then by name and place.
    pub(crate) items: Vec<Item>,
    /// Instances that wait for storage, see [`Completed`].
    pub(crate) awaited: BTreeMap<ObjectRef, BTreeMap<usize, ObjectRef>>,
}

/// What a plan is about.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scope {
    /// The agents of one host, which get everything.
    pub(crate) local: bool,
    /// Every agent has told what it holds.
    pub(crate) all_seen: bool,
    /// The cloud of which everything goes that the manifest does not name.
    pub(crate) prune: Option<String>,
}

/// Works out what each agent is sent.
///
/// # Errors
///
/// Agents that are needed and down; documents that need what would go.
pub(crate) fn plan(completed: &Completed, held: &Held, scope: &Scope) -> Result<Plan, Vec<String>> {
    let mut world = held.world();
    let gone = gone(completed, &world, scope.prune.as_deref());
    let lost = still_needed(completed, &world, &gone);
    if !lost.is_empty() {
        return Err(lost);
    }
    world.retain(|object, _| !gone.contains(object));
    world.extend(completed.documents.iter().map(|(object, it)| (*object, it.clone())));
    let places: BTreeSet<Place> =
        held.seats.iter().filter(|(_, seat)| seat.alive).map(|(place, _)| place.clone()).collect();
    let needs = needs(&world, &places, scope.local);
    let mut items = items(&needs, &world, completed, held);
    let mut problems = Vec::new();
    for place in items.iter().map(|item| &item.place).collect::<BTreeSet<_>>() {
        let waiting = || {
            let theirs = items.iter().filter(|it| it.place == *place);
            let names: Vec<String> = theirs
                .filter(|it| it.action != Action::Unchanged)
                .take(3)
                .map(|it| format!("{} {}", it.document.kind(), it.document.name))
                .collect();
            names.join(", ")
        };
        match held.seats.get(place) {
            Some(seat) if seat.alive => {}
            Some(seat) => {
                problems.push(format!(
                    "{place} is down ({}): needed for {}",
                    seat.reason,
                    waiting()
                ));
            }
            None => problems.push(format!("there is no {place}: needed for {}", waiting())),
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    items.extend(removals(&gone, &needs, held, scope.all_seen));
    items.sort_by(|a, b| order(a).cmp(&order(b)));
    Ok(Plan { items, awaited: completed.awaited.clone() })
}

fn items(
    needs: &Needs,
    world: &BTreeMap<ObjectRef, Document>,
    completed: &Completed,
    held: &Held,
) -> Vec<Item> {
    let mut items = Vec::new();
    for (place, objects) in needs {
        let theirs = held.entries.get(place);
        for object in objects {
            let Some(document) = world.get(object) else { continue };
            let wanted = completed.documents.contains_key(object);
            let held_there = theirs
                .and_then(|theirs| theirs.get(object))
                .filter(|entry| entry.status.state != State::Deleting)
                .map(|entry| &entry.document);
            let action = match held_there {
                Some(there)
                    if there.generation >= document.generation
                        && says_the_same(there, document) =>
                {
                    Action::Unchanged
                }
                Some(_) => Action::Update,
                None if held.newest(*object).is_some() => Action::Copy,
                None => Action::Create,
            };
            // What the manifest does not name is told only where something is sent, and an agent
            // that is down catches up when it is next applied to.
            let down = held.seats.get(place).is_none_or(|seat| !seat.alive);
            if wanted || (action != Action::Unchanged && !down) {
                items.push(Item { place: place.clone(), document: document.clone(), action });
            }
        }
    }
    items
}

fn order(item: &Item) -> (Kind, &str, uuid::Uuid, &Place) {
    let document = &item.document;
    (document.kind(), document.name.as_str(), document.id, &item.place)
}

impl Plan {
    /// What is sent to each agent: first everything but instances, then instances. Storage thus
    /// comes before compute.
    pub(crate) fn stages(&self) -> [BTreeMap<Place, Vec<&Item>>; 2] {
        let mut stages = [BTreeMap::new(), BTreeMap::new()];
        for item in self.items.iter().filter(|item| item.action.is_sent()) {
            let stage = usize::from(item.document.kind() == Kind::Instance);
            stages[stage].entry(item.place.clone()).or_insert_with(Vec::new).push(item);
        }
        stages
    }

    /// Objects that go, by name.
    pub(crate) fn deleted(&self) -> BTreeMap<ObjectRef, String> {
        let going = self.items.iter().filter(|item| item.action == Action::Delete);
        going.map(|it| (it.document.object(), it.document.name.to_string())).collect()
    }

    /// Copies that leave agents.
    pub(crate) fn dropped(&self) -> BTreeMap<Place, Vec<ObjectRef>> {
        let mut copies: BTreeMap<Place, Vec<ObjectRef>> = BTreeMap::new();
        for item in self.items.iter().filter(|item| item.action == Action::Drop) {
            copies.entry(item.place.clone()).or_default().push(item.document.object());
        }
        copies
    }

    /// Whether everything is held as it is wanted.
    pub(crate) fn is_empty(&self) -> bool {
        self.items.iter().all(|item| item.action == Action::Unchanged)
    }
}
