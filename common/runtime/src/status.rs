//! How every object is: what passes found, seen together with what is wanted now.
//!
//! A finding is about one generation of one document. As soon as another is accepted, or the
//! object's deletion, the finding no longer counts and the object is pending (or deleting), so
//! that nobody takes the old answer for the new one.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use serde_json::Value;
use stackhand_model::{Kind, ObjectRef, State, Status};
use tokio::sync::watch;

use crate::agent::{Desired, Held, Observed};
use crate::ledger::Ledger;

/// The statuses of one agent's objects. Clones share them.
#[derive(Clone, Debug)]
pub struct Statuses {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    ledger: Ledger,
    control: watch::Receiver<crate::api::Control>,
    found: RwLock<BTreeMap<ObjectRef, Finding>>,
    revision: watch::Sender<u64>,
}

/// How a pass left an object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Finding {
    pub(crate) state: State,
    pub(crate) reason: Option<String>,
    pub(crate) observed: Observed,
    /// The document's generation that it is about.
    pub(crate) generation: u64,
    /// Whether the object was to go.
    pub(crate) deleting: bool,
}

/// An object that a pass left otherwise than the one before.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Changed {
    pub(crate) object: ObjectRef,
    pub(crate) before: Option<Finding>,
    pub(crate) now: Finding,
}

/// Objects by kind and state.
pub type Counts = BTreeMap<Kind, BTreeMap<State, u64>>;

impl Statuses {
    /// Nothing is known of any object yet.
    #[must_use]
    pub fn new(ledger: Ledger) -> Self {
        let control = ledger.control();
        let found = RwLock::default();
        Self {
            shared: Arc::new(Shared { ledger, control, found, revision: watch::Sender::new(0) }),
        }
    }

    /// How an object is. `None`: it is not held.
    #[must_use]
    pub fn of(&self, object: &ObjectRef) -> Option<Status> {
        let desired = self.shared.ledger.desired();
        self.within(&desired, object)
    }

    /// The same, as of a `desired` that the caller has already.
    #[must_use]
    pub fn within(&self, desired: &Desired, object: &ObjectRef) -> Option<Status> {
        let held = desired.objects.get(object)?;
        let found = self.shared.found.read().unwrap_or_else(PoisonError::into_inner);
        Some(judge(*object, held, found.get(object), || self.paused()))
    }

    /// Grows by one whenever a finding changed.
    #[must_use]
    pub fn revision(&self) -> watch::Receiver<u64> {
        self.shared.revision.subscribe()
    }

    /// How many objects of each kind are in each state.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::new();
        self.for_each(|object, state, _reason| {
            *counts.entry(object.kind).or_default().entry(state).or_default() += 1;
        });
        counts
    }

    /// Objects in error: how many, and the first few with their reasons.
    #[must_use]
    pub fn failing(&self, most: usize) -> (usize, Vec<(ObjectRef, String)>) {
        let mut count = 0;
        let mut first = Vec::new();
        self.for_each(|object, state, reason| {
            if state == State::Error {
                count += 1;
                if first.len() < most {
                    first.push((object, reason.unwrap_or_default().to_owned()));
                }
            }
        });
        (count, first)
    }

    fn for_each(&self, mut visit: impl FnMut(ObjectRef, State, Option<&str>)) {
        let desired = self.shared.ledger.desired();
        let found = self.shared.found.read().unwrap_or_else(PoisonError::into_inner);
        for (object, held) in &desired.objects {
            match found.get(object).filter(|it| it.is_about(held)) {
                Some(it) => visit(*object, it.state, it.reason.as_deref()),
                None if held.deleting => visit(*object, State::Deleting, None),
                None => visit(*object, State::Pending, None),
            }
        }
    }

    /// Takes over what a pass found; returns what is different now, and what it was before, if that
    /// was known. Objects that are no longer held are forgotten.
    pub(crate) fn record(&self, findings: Vec<(ObjectRef, Finding)>) -> Vec<Changed> {
        let desired = self.shared.ledger.desired();
        let mut found = self.shared.found.write().unwrap_or_else(PoisonError::into_inner);
        let before = found.len();
        found.retain(|object, _| desired.objects.contains_key(object));
        let mut changed = Vec::new();
        let mut touched = found.len() != before;
        for (object, now) in findings {
            if !desired.objects.contains_key(&object) {
                continue;
            }
            match found.get(&object) {
                Some(same) if *same == now => {}
                _ => {
                    touched = true;
                    let before = found.insert(object, now.clone());
                    changed.push(Changed { object, before, now });
                }
            }
        }
        drop(found);
        if touched {
            self.shared.revision.send_modify(|revision| *revision += 1);
        }
        changed
    }

    fn paused(&self) -> Option<String> {
        self.shared.control.borrow().paused.clone()
    }
}

impl Finding {
    fn is_about(&self, held: &Held) -> bool {
        self.generation == held.document.generation && self.deleting == held.deleting
    }
}

/// The status of an object from what is wanted and what was found.
fn judge(
    object: ObjectRef,
    held: &Held,
    found: Option<&Finding>,
    paused: impl FnOnce() -> Option<String>,
) -> Status {
    let generation = held.document.generation;
    // Facts stay of use while the next generation is worked on.
    let observed = found.map_or(Value::Null, |it| it.observed.facts(&object));
    if let Some(found) = found.filter(|it| it.is_about(held)) {
        let (state, reason) = (found.state, found.reason.clone());
        return Status { object, state, reason, generation, observed };
    }
    let state = if held.deleting { State::Deleting } else { State::Pending };
    let reason = match paused() {
        Some(why) => format!("accepted; the agent is paused: {why}"),
        None => "accepted; waits for the next pass".to_owned(),
    };
    Status { object, state, reason: Some(reason), generation, observed }
}
