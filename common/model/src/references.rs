//! Names in place of ids: how manifests refer to other objects.
//!
//! On the wire a reference is a UUID. In a manifest it may be the other object's name; this
//! turns names into the ids that [`id_from_name`] derives, before a document is parsed.

use serde_json::Value;
use uuid::Uuid;

use crate::{Kind, id_from_name};

/// Where documents of a kind refer to another kind. `*` stands for every element of a list.
const REFERENCES: [(Kind, &str, Kind); 21] = [
    (Kind::Port, "network", Kind::Network),
    (Kind::Port, "security_groups/*", Kind::SecurityGroup),
    (Kind::Port, "qos_policy", Kind::QosPolicy),
    (Kind::Port, "device", Kind::Instance),
    (Kind::SecurityGroup, "rules/*/remote_group", Kind::SecurityGroup),
    (Kind::Router, "interfaces/*", Kind::Port),
    (Kind::Router, "gateway/port", Kind::Port),
    (Kind::FloatingIp, "router", Kind::Router),
    (Kind::FloatingIp, "port", Kind::Port),
    (Kind::Image, "kernel", Kind::Image),
    (Kind::Image, "ramdisk", Kind::Image),
    (Kind::Volume, "source/image", Kind::Image),
    (Kind::Volume, "source/snapshot", Kind::Snapshot),
    (Kind::Volume, "source/volume", Kind::Volume),
    (Kind::Snapshot, "volume", Kind::Volume),
    (Kind::Attachment, "volume", Kind::Volume),
    (Kind::Instance, "image", Kind::Image),
    (Kind::Instance, "kernel", Kind::Image),
    (Kind::Instance, "ramdisk", Kind::Image),
    (Kind::Instance, "ports/*/port", Kind::Port),
    (Kind::Instance, "volumes/*/volume", Kind::Volume),
];

/// Fills in a document's id from its name and turns names in its references into ids.
///
/// What is already a UUID, or is not text, stays as it is; the parser judges it afterwards.
pub fn resolve_names(cloud: &str, document: &mut Value) {
    let Some(kind) =
        document.get("kind").and_then(Value::as_str).and_then(|kind| kind.parse::<Kind>().ok())
    else {
        return;
    };
    if document.get("id").is_none()
        && let Some(name) = document.get("name").and_then(Value::as_str)
    {
        let id = id_from_name(cloud, kind, name).to_string();
        if let Value::Object(fields) = document {
            fields.insert("id".into(), id.into());
        }
    }
    let Some(spec) = document.get_mut("spec") else { return };
    for (_, path, to) in REFERENCES.iter().filter(|(from, ..)| *from == kind) {
        visit(spec, path, &mut |text| {
            if text.parse::<Uuid>().is_err() {
                *text = id_from_name(cloud, *to, text).to_string();
            }
        });
    }
}

fn visit(value: &mut Value, path: &str, change: &mut impl FnMut(&mut String)) {
    let (step, rest) = match path.split_once('/') {
        Some((step, rest)) => (step, Some(rest)),
        None => (path, None),
    };
    let mut descend = |child: &mut Value| match (rest, child) {
        (Some(rest), child) => visit(child, rest, change),
        (None, Value::String(text)) => change(text),
        (None, _) => {}
    };
    match (step, value) {
        ("*", Value::Array(items)) => items.iter_mut().for_each(descend),
        (_, Value::Object(fields)) => {
            if let Some(child) = fields.get_mut(step) {
                descend(child);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_become_the_ids_derived_from_them_and_ids_stay() {
        let group = "6f0c8a8e-0d1b-4f0e-9a43-2f9a2f0c5a11";
        let mut document = json!({
            "kind": "Port",
            "name": "web",
            "spec": {"network": "int1", "security_groups": ["ssh", group], "mac": 7},
        });
        resolve_names("default", &mut document);
        let id = |kind, name| id_from_name("default", kind, name).to_string();
        assert_eq!(
            document,
            json!({
                "kind": "Port",
                "id": id(Kind::Port, "web"),
                "name": "web",
                "spec": {
                    "network": id(Kind::Network, "int1"),
                    "security_groups": [id(Kind::SecurityGroup, "ssh"), group],
                    "mac": 7,
                },
            })
        );
    }
}
