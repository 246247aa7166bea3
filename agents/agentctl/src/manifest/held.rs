//! What the agents hold and where they are: the ground on which a manifest is completed.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use stackhand_model::{AgentKind, Connection, Connector, Document, Kind, ObjectRef, State};
use stackhand_runtime::api::Entry;
use uuid::Uuid;

use super::room::Size;

/// One agent by its place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) agent: AgentKind,
    pub(crate) host: String,
}

impl Place {
    pub(crate) fn new(agent: AgentKind, host: &str) -> Self {
        Self { agent, host: host.to_owned() }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on {}", self.agent.binary(), self.host)
    }
}

/// One agent, as far as planning is concerned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seat {
    /// It answers.
    pub(crate) alive: bool,
    /// Operators want new objects there.
    pub(crate) enabled: bool,
    /// The availability zone of its host.
    pub(crate) zone: String,
    /// Why it is not alive or not enabled.
    pub(crate) reason: String,
    /// How many objects of each kind it holds, where its last word tells.
    pub(crate) holds: Option<BTreeMap<Kind, u64>>,
}

/// What all agents hold.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    /// Every agent known.
    pub(crate) seats: BTreeMap<Place, Seat>,
    /// Documents by agent. Agents that are down are missing.
    pub(crate) entries: BTreeMap<Place, BTreeMap<ObjectRef, Entry>>,
    /// What compute hosts tell about themselves for attachments, by host.
    pub(crate) connectors: BTreeMap<String, Connector>,
    /// What compute hosts may give to instances in all, by host.
    pub(crate) capacity: BTreeMap<String, Size>,
    /// What network agents' settings say of their hosts: specs of Host documents, by host.
    pub(crate) told: BTreeMap<String, Value>,
}

impl Held {
    /// Adds what an agent answered.
    pub(crate) fn add(&mut self, place: Place, entries: Vec<Entry>) {
        let by_object = entries.into_iter().map(|entry| (entry.document.object(), entry)).collect();
        self.entries.insert(place, by_object);
    }

    /// The newest document of an object that any agent holds.
    pub(crate) fn newest(&self, object: ObjectRef) -> Option<&Document> {
        self.entries
            .values()
            .filter_map(|entries| entries.get(&object))
            .map(|entry| &entry.document)
            .max_by_key(|document| document.generation)
    }

    /// The newest document of every object that is not about to go.
    pub(crate) fn world(&self) -> BTreeMap<ObjectRef, Document> {
        let mut world: BTreeMap<ObjectRef, Document> = BTreeMap::new();
        for entry in self.entries.values().flat_map(BTreeMap::values) {
            if entry.status.state == State::Deleting {
                continue;
            }
            let object = entry.document.object();
            if world.get(&object).is_none_or(|it| it.generation < entry.document.generation) {
                world.insert(object, entry.document.clone());
            }
        }
        world
    }

    /// Every document of a kind, those about to go included, newest first choice.
    pub(crate) fn of_kind(&self, kind: Kind) -> BTreeMap<Uuid, &Document> {
        let mut found: BTreeMap<Uuid, &Document> = BTreeMap::new();
        for (object, entry) in self.entries.values().flatten().filter(|(it, _)| it.kind == kind) {
            let newer = found
                .get(&object.id)
                .is_none_or(|known| known.generation < entry.document.generation);
            if newer {
                found.insert(object.id, &entry.document);
            }
        }
        found
    }

    /// Where an object's document is held.
    pub(crate) fn holders(&self, object: ObjectRef) -> BTreeSet<&Place> {
        let holds = |entries: &BTreeMap<ObjectRef, Entry>| entries.contains_key(&object);
        self.entries.iter().filter(|(_, it)| holds(it)).map(|(place, _)| place).collect()
    }

    /// The storage agent's answer to an attachment, once that is active at this generation.
    pub(crate) fn connection(&self, attachment: ObjectRef, generation: u64) -> Option<Connection> {
        self.entries.values().filter_map(|entries| entries.get(&attachment)).find_map(|entry| {
            let status = &entry.status;
            (status.state == State::Active
                && status.generation == generation
                && entry.document.generation == generation)
                .then(|| connection_of(&status.observed))?
        })
    }

    /// An agent that does not answer and may hold an object of a kind that nobody else holds.
    ///
    /// While there is one, what looks new may only be out of sight, and must not be made a second
    /// time elsewhere.
    pub(crate) fn out_of_sight(&self, kind: Kind) -> Option<&Place> {
        let may_hold = |seat: &Seat| {
            seat.holds.as_ref().is_none_or(|it| it.get(&kind).is_some_and(|count| *count > 0))
        };
        self.seats
            .iter()
            .find(|(place, seat)| place.agent == kind.agent() && !seat.alive && may_hold(seat))
            .map(|(place, _)| place)
    }

    /// Forgets agents that do not answer on hosts that will not come back.
    pub(crate) fn assume_lost(&mut self, hosts: &[String]) {
        self.seats.retain(|place, seat| seat.alive || !hosts.contains(&place.host));
    }

    /// Hosts that have an agent of a kind, down ones included.
    pub(crate) fn hosts(&self, agent: AgentKind) -> BTreeSet<&str> {
        let places = self.seats.keys().filter(|place| place.agent == agent);
        places.map(|place| &*place.host).collect()
    }

    /// Hosts whose agent of a kind answers and takes new objects.
    pub(crate) fn open_hosts(&self, agent: AgentKind) -> BTreeSet<&str> {
        let open = self
            .seats
            .iter()
            .filter(|(place, seat)| place.agent == agent && seat.alive && seat.enabled);
        open.map(|(place, _)| &*place.host).collect()
    }
}

/// The connection in what a storage agent observed of an attachment.
pub(crate) fn connection_of(observed: &Value) -> Option<Connection> {
    serde_json::from_value(observed.get("connection")?.clone()).ok()
}
