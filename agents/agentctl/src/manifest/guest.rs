//! What guests are told about themselves, put where the agents look that tell it: instances carry
//! it for config drives, their ports for the metadata service.

use serde_json::{Map, Value};
use stackhand_model::{AgentKind, Kind, ObjectRef, PortOwner, Spec};
use uuid::Uuid;

use super::draft::Drafts;
use super::held::{Held, Place};

/// Fills in what instances and their ports tell. Hosts are known by now.
pub(crate) fn tell(drafts: &mut Drafts, held: &Held) {
    let instances: Vec<ObjectRef> =
        drafts.keys().filter(|object| object.kind == Kind::Instance).copied().collect();
    for object in instances {
        let Some(draft) = drafts.get_mut(&object) else { continue };
        let mut guest = match draft.field("guest") {
            None => Map::new(),
            Some(Value::Object(guest)) => guest.clone(),
            // Reading it tells what is wrong.
            Some(_) => continue,
        };
        let seat = draft.text("host").map(|host| Place::new(AgentKind::Compute, host));
        let zone = seat.and_then(|seat| held.seats.get(&seat)).map(|seat| &seat.zone);
        if let Some(zone) = zone.filter(|zone| !zone.is_empty()) {
            guest.entry("availability_zone").or_insert_with(|| zone.clone().into());
        }
        if !guest.is_empty() {
            draft.set("guest", guest.clone());
        }
        let host_name = host_name(guest.get("hostname").and_then(Value::as_str), draft.name());
        guest.entry("name").or_insert_with(|| draft.name().into());
        let ports: Vec<Uuid> = draft
            .items("ports")
            .filter_map(|item| item["port"].as_str().and_then(|id| id.parse().ok()))
            .collect();
        let mut named = Vec::new();
        for id in ports {
            let Some(port) = drafts.get_mut(&ObjectRef { kind: Kind::Port, id }) else { continue };
            if port.field("guest").is_none() {
                port.set("guest", guest.clone());
            }
            // One port of each network has the instance's name there.
            let network = port.id("network");
            if port.field("dns_name").is_none()
                && !named.contains(&network)
                && let Some(name) = &host_name
            {
                port.set("dns_name", name.clone());
            }
            named.push(network);
        }
    }
    keep(drafts, held);
}

/// A port that is applied without its instance belongs to it as before, and tells the same.
fn keep(drafts: &mut Drafts, held: &Held) {
    for (object, draft) in drafts.iter_mut().filter(|(object, _)| object.kind == Kind::Port) {
        let Some(Spec::Port(port)) = held.newest(*object).map(|it| &it.spec) else { continue };
        if draft.field("device").is_some() || port.owner != PortOwner::Instance {
            continue;
        }
        let text = |text: &Option<String>| text.clone().map(Value::from);
        let kept = [
            ("device", port.device.map(|device| device.to_string().into())),
            ("guest", port.guest.as_ref().and_then(|it| serde_json::to_value(it).ok())),
            ("dns_name", text(&port.dns_name)),
        ];
        for (field, value) in kept {
            if let Some(value) = value
                && draft.field(field).is_none()
            {
                draft.set(field, value);
            }
        }
    }
}

/// The name under which DNS knows an instance, if its host name or its own name can be one.
fn host_name(given: Option<&str>, name: &str) -> Option<String> {
    let first = given.unwrap_or(name).split('.').next().unwrap_or_default().to_lowercase();
    let good = (1..=63).contains(&first.len())
        && !first.starts_with('-')
        && !first.ends_with('-')
        && first.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    good.then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_dns_cannot_have_is_left_out() {
        assert_eq!(host_name(None, "Web-1"), Some("web-1".into()));
        assert_eq!(host_name(Some("db.example.org"), "x"), Some("db".into()));
        for name in ["my web", "-a", "a_b", "", "ä"] {
            assert_eq!(host_name(None, name), None, "{name}");
        }
    }
}
