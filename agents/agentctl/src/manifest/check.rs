//! What must hold across documents: references lead somewhere, nothing is given out twice.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;
use stackhand_model::{
    Document, Kind, MacAddr, ObjectRef, Spec, VolumeSource, id_from_name, nearest,
};
use uuid::Uuid;

use super::draft::{Draft, Drafts};
use super::held::Held;

/// Every problem between the documents of a manifest and those that agents hold.
pub(crate) fn across(
    drafts: &Drafts,
    documents: &BTreeMap<ObjectRef, Document>,
    held: &Held,
    cloud: &str,
) -> Vec<String> {
    let mut world = held.world();
    world.extend(documents.iter().map(|(object, document)| (*object, document.clone())));
    let mut problems = Vec::new();
    for (object, document) in documents {
        let Some(draft) = drafts.get(object) else { continue };
        for (field, to) in references(document) {
            if !world.contains_key(&to) {
                problems.push(draft.problem(&field, missing(draft, to, &world, cloud)));
            }
        }
    }
    problems.extend(shared_addresses(drafts, &world));
    problems
}

/// The objects that a document cannot do without, with the field that names each.
pub(crate) fn references(document: &Document) -> Vec<(String, ObjectRef)> {
    let mut found = Vec::new();
    let mut add = |field: String, object: ObjectRef| found.push((format!("spec.{field}"), object));
    match &document.spec {
        Spec::Host(_) | Spec::QosPolicy(_) | Spec::Network(_) => {}
        Spec::SecurityGroup(group) => {
            for (index, rule) in group.rules.iter().enumerate() {
                if let Some(remote) = rule.remote_group {
                    add(format!("rules[{index}].remote_group"), remote.object());
                }
            }
        }
        Spec::Port(port) => {
            add("network".into(), port.network.object());
            for (index, group) in port.security_groups.iter().enumerate() {
                add(format!("security_groups[{index}]"), group.object());
            }
            if let Some(policy) = port.qos_policy {
                add("qos_policy".into(), policy.object());
            }
        }
        Spec::Router(router) => {
            for (index, port) in router.interfaces.iter().enumerate() {
                add(format!("interfaces[{index}]"), port.object());
            }
            if let Some(gateway) = &router.gateway {
                add("gateway.port".into(), gateway.port.object());
            }
        }
        Spec::FloatingIp(floating) => {
            add("router".into(), floating.router.object());
            if let Some(port) = floating.port {
                add("port".into(), port.object());
            }
        }
        Spec::Image(image) => {
            let boot = [("kernel", image.kernel), ("ramdisk", image.ramdisk)];
            for (field, image) in boot {
                image.into_iter().for_each(|image| add(field.into(), image.object()));
            }
        }
        Spec::Volume(volume) => match volume.source {
            VolumeSource::Blank => {}
            VolumeSource::Image(image) => add("source.image".into(), image.object()),
            VolumeSource::Snapshot(snapshot) => add("source.snapshot".into(), snapshot.object()),
            VolumeSource::Volume(volume) => add("source.volume".into(), volume.object()),
        },
        Spec::Snapshot(snapshot) => add("volume".into(), snapshot.volume.object()),
        Spec::Attachment(attachment) => add("volume".into(), attachment.volume.object()),
        Spec::Instance(instance) => {
            let images = [
                ("image", instance.image),
                ("kernel", instance.kernel),
                ("ramdisk", instance.ramdisk),
            ];
            for (field, image) in images {
                image.into_iter().for_each(|image| add(field.into(), image.object()));
            }
            for (index, port) in instance.ports.iter().enumerate() {
                add(format!("ports[{index}].port"), port.port.object());
            }
            for (index, volume) in instance.volumes.iter().enumerate() {
                add(format!("volumes[{index}].volume"), volume.volume.object());
            }
        }
    }
    found
}

fn missing(
    draft: &Draft,
    to: ObjectRef,
    world: &BTreeMap<ObjectRef, Document>,
    cloud: &str,
) -> String {
    let written = written(&draft.raw, to, cloud);
    let what = written.map_or_else(|| to.id.to_string(), |name| format!("{name:?}"));
    let names = world.iter().filter(|(object, _)| object.kind == to.kind);
    let hint = written
        .and_then(|name| nearest(name, names.map(|(_, document)| document.name.as_str())))
        .map(|near| format!("; did you mean {near:?}?"))
        .unwrap_or_default();
    format!("there is no {} {what} in the manifest or at the agents{hint}", to.kind)
}

/// The name in a document, as written, that stands for an object.
fn written<'a>(value: &'a Value, object: ObjectRef, cloud: &str) -> Option<&'a str> {
    match value {
        Value::String(text) => {
            (id_from_name(cloud, object.kind, text) == object.id).then_some(text)
        }
        Value::Array(items) => items.iter().find_map(|item| written(item, object, cloud)),
        Value::Object(fields) => fields.values().find_map(|item| written(item, object, cloud)),
        _ => None,
    }
}

/// Ports of one network that share an address.
fn shared_addresses(drafts: &Drafts, world: &BTreeMap<ObjectRef, Document>) -> Vec<String> {
    let mut macs: BTreeMap<(Uuid, MacAddr), ObjectRef> = BTreeMap::new();
    let mut addresses: BTreeMap<(Uuid, IpAddr), ObjectRef> = BTreeMap::new();
    let mut problems = Vec::new();
    let mut clash = |one: ObjectRef, other: ObjectRef, field: String, what: String| {
        // Told at the document that the user can change.
        let (draft, holder) = match (drafts.get(&one), drafts.get(&other)) {
            (Some(draft), _) => (draft, other),
            (None, Some(draft)) => (draft, one),
            (None, None) => return,
        };
        let name = world.get(&holder).map_or_else(String::new, |it| it.name.to_string());
        problems.push(draft.problem(&field, format!("{what} is already that of Port {name}")));
    };
    for (object, document) in world.iter().filter(|(object, _)| object.kind == Kind::Port) {
        let Spec::Port(port) = &document.spec else { continue };
        if let Some(other) = macs.insert((port.network.0, port.mac), *object) {
            clash(*object, other, "spec.mac".into(), port.mac.to_string());
        }
        for (index, fixed) in port.fixed_ips.iter().enumerate() {
            if let Some(other) = addresses.insert((port.network.0, fixed.address), *object)
                && other != *object
            {
                let field = format!("spec.fixed_ips[{index}].address");
                clash(*object, other, field, fixed.address.to_string());
            }
        }
    }
    problems
}
