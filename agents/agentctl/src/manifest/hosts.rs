//! Which host gets an object whose manifest does not say.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use stackhand_model::{Document, Kind, ObjectRef, PortOwner, Spec, nearest};
use uuid::Uuid;

use super::draft::{Draft, Drafts};
use super::expand::ANTI_AFFINITY;
use super::floating::network_of;
use super::held::Held;
use super::room::{Room, Wish, physical_network, size_of};

/// Fills in hosts: an earlier choice is kept, a port follows its instance or router, a volume its
/// instance; others go where [`Room`] finds a place for them.
///
/// Problems are added to `problems`.
pub(crate) fn choose(drafts: &mut Drafts, held: &Held, problems: &mut Vec<String>) {
    let mut room = Room::of(drafts, held);
    let mut followers: BTreeMap<ObjectRef, Following> = BTreeMap::new();
    for kind in [Kind::Instance, Kind::Router, Kind::Volume, Kind::Port, Kind::Attachment] {
        let of_kind = drafts.keys().filter(|object| object.kind == kind).copied();
        // What has a place comes first: it takes room from what has none.
        let (settled, open): (Vec<ObjectRef>, Vec<ObjectRef>) =
            of_kind.partition(|object| has_host(drafts, held, *object));
        for object in settled.into_iter().chain(open) {
            if kind == Kind::Attachment {
                fill_connector(drafts, object, held);
                continue;
            }
            let wish = wish(drafts, held, object);
            let Some(draft) = drafts.get_mut(&object) else { continue };
            draft.take("availability_zone");
            let following = followers.get(&object);
            let kept = held.newest(object).and_then(host_of).map(str::to_owned);
            if draft.field("host").is_none() {
                let chosen = match kept {
                    Some(kept) => Ok(kept),
                    None => {
                        let followed = following.and_then(|it| it.host_for(kind, held));
                        let chosen = match followed {
                            Some(host) => Ok(host),
                            None if kind == Kind::Port => only_host(held),
                            None => room.choose(&wish),
                        };
                        chosen.and_then(|host| fresh(kind, host, held))
                    }
                };
                match chosen {
                    Ok(host) => draft.set("host", host),
                    Err(problem) => problems.push(draft.problem("spec.host", problem)),
                }
            } else if let Some(problem) = moved(kind, draft, kept.as_deref()) {
                problems.push(draft.problem("spec.host", problem));
            }
            if let Some(host) = draft.text("host").map(str::to_owned) {
                room.add(kind, &host, wish.size, wish.group.as_deref());
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

fn has_host(drafts: &Drafts, held: &Held, object: ObjectRef) -> bool {
    drafts.get(&object).is_some_and(|draft| draft.field("host").is_some())
        || held.newest(object).and_then(host_of).is_some()
}

/// What a host must have for an object of the manifest.
fn wish(drafts: &Drafts, held: &Held, object: ObjectRef) -> Wish {
    let kind = object.kind;
    let draft = drafts.get(&object);
    let ends = draft.map(|draft| followers_of(kind, &draft.value["spec"])).unwrap_or_default();
    let physical: BTreeSet<String> = ends
        .into_iter()
        .filter(|(end, _)| end.kind == Kind::Port)
        .filter_map(|(port, _)| network_of(port.id, drafts, held))
        .filter_map(|network| physical_network(network, drafts, held))
        .collect();
    let size = draft.filter(|_| kind == Kind::Instance).map(size_of).unwrap_or_default();
    let zone = draft.and_then(|draft| draft.text("availability_zone"));
    let group = draft.and_then(|draft| draft.label(ANTI_AFFINITY));
    let owned = |text: Option<&str>| text.map(str::to_owned);
    Wish { kind, zone: owned(zone), size, group: owned(group), physical }
}

/// Why an object may not be where the manifest now says.
fn moved(kind: Kind, draft: &Draft, kept: Option<&str>) -> Option<String> {
    let kept = kept.filter(|kept| draft.text("host") != Some(kept))?;
    let stays = matches!(kind, Kind::Instance | Kind::Volume);
    stays.then(|| {
        format!(
            "it is on {kept} and cannot be moved by a manifest; delete it first, or write {kept}"
        )
    })
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

/// The host of a port that nothing draws anywhere.
fn only_host(held: &Held) -> Result<String, String> {
    let agent = Kind::Port.agent();
    let open = held.open_hosts(agent);
    match (open.first(), open.len()) {
        (Some(host), 1) => Ok((*host).to_owned()),
        _ => {
            let hosts: Vec<&str> = held.hosts(agent).into_iter().collect();
            if hosts.is_empty() {
                return Err("no host has a network-agent; start one, see `agentctl list`".into());
            }
            let hosts = hosts.join(", ");
            Err(format!("is needed: nothing that has a host uses it; hosts are {hosts}"))
        }
    }
}

/// A host for an object that nobody who answers holds, if that means that it is new.
fn fresh(kind: Kind, host: String, held: &Held) -> Result<String, String> {
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
