//! Which host gets an object whose manifest does not say.

use std::collections::BTreeMap;

use serde_json::Value;
use stackhand_model::{Document, Kind, ObjectRef, PortOwner, Spec, nearest};
use uuid::Uuid;

use super::draft::Drafts;
use super::held::Held;

/// Fills in hosts: an earlier choice is kept, a port follows its instance or router, a volume its
/// instance; others go to the open host that has the fewest of their kind, by name among equals.
///
/// Problems are added to `problems`.
pub(crate) fn choose(drafts: &mut Drafts, held: &Held, problems: &mut Vec<String>) {
    let mut load = Load::of(held);
    let mut followers: BTreeMap<ObjectRef, Following> = BTreeMap::new();
    for kind in [Kind::Instance, Kind::Router, Kind::Volume, Kind::Port, Kind::Attachment] {
        let objects: Vec<ObjectRef> =
            drafts.keys().filter(|object| object.kind == kind).copied().collect();
        for object in objects {
            if kind == Kind::Attachment {
                fill_connector(drafts, object, held);
                continue;
            }
            let Some(draft) = drafts.get_mut(&object) else { continue };
            let following = followers.get(&object);
            if draft.field("host").is_none() {
                let kept = held.newest(object).and_then(host_of).map(str::to_owned);
                let chosen = kept.map_or_else(
                    || {
                        let followed = following.and_then(|it| it.host_for(kind, held));
                        fresh(kind, followed.or_else(|| load.choose(kind, held)), held)
                    },
                    Ok,
                );
                match chosen {
                    Ok(host) => draft.set("host", host),
                    Err(problem) => problems.push(draft.problem("spec.host", problem)),
                }
            }
            if let Some(host) = draft.text("host").map(str::to_owned) {
                load.add(kind, &host);
                if let Some(problem) = unknown(kind, &host, held) {
                    problems.push(draft.problem("spec.host", problem));
                }
                for (follower, owner) in followers_of(kind, &draft.value["spec"]) {
                    let following = Following { host: host.clone(), owner, device: object.id };
                    followers.entry(follower).or_insert(following);
                }
            }
            if kind == Kind::Port
                && let Some(following) = followers.get(&object)
            {
                if draft.field("owner").is_none() {
                    let owner = serde_json::to_value(following.owner).unwrap_or(Value::Null);
                    draft.set("owner", owner);
                }
                if draft.field("device").is_none() {
                    draft.set("device", following.device.to_string());
                }
            }
        }
    }
}

/// Why an object is where another one is.
struct Following {
    host: String,
    owner: PortOwner,
    device: Uuid,
}

impl Following {
    fn host_for(&self, kind: Kind, held: &Held) -> Option<String> {
        // A volume can be reached from elsewhere; a port cannot.
        let fits = kind != Kind::Volume || held.open_hosts(kind.agent()).contains(&*self.host);
        fits.then(|| self.host.clone())
    }
}

/// Ports and volumes that an instance or router draws to its host.
fn followers_of(kind: Kind, spec: &Value) -> Vec<(ObjectRef, PortOwner)> {
    let id = |value: &Value| value.as_str().and_then(|text| text.parse::<Uuid>().ok());
    let list = |field: &str| spec[field].as_array().cloned().unwrap_or_default();
    let object = |kind: Kind, id: Option<Uuid>| id.map(|id| ObjectRef { kind, id });
    let mut found = Vec::new();
    let mut add = |object: Option<ObjectRef>, owner| found.extend(object.map(|it| (it, owner)));
    match kind {
        Kind::Instance => {
            for port in list("ports") {
                add(object(Kind::Port, id(&port["port"])), PortOwner::Instance);
            }
            for volume in list("volumes") {
                add(object(Kind::Volume, id(&volume["volume"])), PortOwner::Instance);
            }
        }
        Kind::Router => {
            for port in list("interfaces") {
                add(object(Kind::Port, id(&port)), PortOwner::RouterInterface);
            }
            add(object(Kind::Port, id(&spec["gateway"]["port"])), PortOwner::RouterGateway);
        }
        _ => {}
    }
    found
}

/// Tells the storage agent who wants the volume, where the manifest does not.
fn fill_connector(drafts: &mut Drafts, object: ObjectRef, held: &Held) {
    let Some(draft) = drafts.get(&object) else { return };
    let owner = draft
        .label(super::expand::MADE_FOR)
        .and_then(|owner| owner.parse::<ObjectRef>().ok())
        .and_then(|owner| drafts.get(&owner))
        .and_then(|instance| instance.text("host"))
        .map(str::to_owned);
    let volume = draft.id("volume").map(|id| ObjectRef { kind: Kind::Volume, id });
    let volume_host = volume.and_then(|volume| match drafts.get(&volume) {
        Some(draft) => draft.text("host"),
        None => held.newest(volume).and_then(host_of),
    });
    let mut connector =
        draft.field("connector").cloned().unwrap_or_else(|| Value::Object(<_>::default()));
    if connector.get("host").is_none()
        && let Some(owner) = owner
    {
        connector["host"] = owner.into();
    }
    let host = connector.get("host").and_then(Value::as_str).map(str::to_owned);
    if let Some(known) = host.as_ref().and_then(|host| held.connectors.get(host))
        && volume_host != host.as_deref()
        && let (Value::Object(given), Ok(Value::Object(known))) =
            (&mut connector, serde_json::to_value(known))
    {
        for (key, value) in known {
            given.entry(key).or_insert(value);
        }
    }
    if let Some(draft) = drafts.get_mut(&object) {
        draft.set("connector", connector);
    }
}

/// The host that a document names.
pub(crate) fn host_of(document: &Document) -> Option<&str> {
    match &document.spec {
        Spec::Port(port) => Some(&port.host),
        Spec::Router(router) => Some(&router.host),
        Spec::Volume(volume) => Some(&volume.host),
        Spec::Instance(instance) => Some(&instance.host),
        _ => None,
    }
}

/// A host for an object that nobody who answers holds, if that means that it is new.
fn fresh(kind: Kind, chosen: Option<String>, held: &Held) -> Result<String, String> {
    let Some(host) = chosen else { return Err(nowhere(kind, held)) };
    match held.out_of_sight(kind) {
        // A port has no state of its own, and goes where what it belongs to goes.
        Some(place) if kind != Kind::Port => Err(format!(
            "cannot be chosen while {place} is down, which may hold it; write the host, or give \
             --assume-lost {} if it will not come back",
            place.host
        )),
        _ => Ok(host),
    }
}

fn nowhere(kind: Kind, held: &Held) -> String {
    let agent = kind.agent();
    let hosts: Vec<&str> = held.hosts(agent).into_iter().collect();
    if hosts.is_empty() {
        return format!("no host has a {}; start one, see `agentctl list`", agent.binary());
    }
    if kind == Kind::Port {
        return format!(
            "is needed: nothing that has a host uses it; hosts are {}",
            hosts.join(", ")
        );
    }
    format!("no {} is up and enabled; hosts are {}", agent.binary(), hosts.join(", "))
}

fn unknown(kind: Kind, host: &str, held: &Held) -> Option<String> {
    let hosts = held.hosts(kind.agent());
    // Documents of remote ports are for the hosts that talk to them, known here or not.
    if hosts.contains(host) || kind == Kind::Port {
        return None;
    }
    let hint = match (nearest(host, hosts.iter().copied()), hosts.is_empty()) {
        (Some(near), _) => format!("; did you mean {near}?"),
        (None, true) => String::new(),
        (None, false) => {
            format!("; hosts are {}", hosts.into_iter().collect::<Vec<_>>().join(", "))
        }
    };
    Some(format!("no {} is known on {host:?}{hint}", kind.agent().binary()))
}

/// How many objects of each kind a host has.
struct Load(BTreeMap<(Kind, String), usize>);

impl Load {
    fn of(held: &Held) -> Self {
        let mut load = Self(BTreeMap::new());
        for kind in [Kind::Instance, Kind::Router, Kind::Volume] {
            for document in held.of_kind(kind).values() {
                if let Some(host) = host_of(document) {
                    load.add(kind, host);
                }
            }
        }
        load
    }

    fn add(&mut self, kind: Kind, host: &str) {
        *self.0.entry((kind, host.to_owned())).or_default() += 1;
    }

    fn choose(&self, kind: Kind, held: &Held) -> Option<String> {
        let hosts = held.open_hosts(kind.agent());
        if kind == Kind::Port && hosts.len() > 1 {
            return None;
        }
        let load = |host: &str| self.0.get(&(kind, host.to_owned())).copied().unwrap_or(0);
        hosts.into_iter().min_by_key(|host| (load(host), *host)).map(str::to_owned)
    }
}
