//! What is shown of each kind of object.

use std::collections::BTreeMap;

use serde_json::Value;
use stackhand_model::{Kind, ObjectRef, Spec, VolumeSource};

use super::{ObjectRow, spec};

/// The columns of a kind; `+` marks those of wide output.
pub(super) fn headers(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Host => &["TUNNEL", "MAPPINGS"],
        Kind::QosPolicy => &["KBPS", "KPPS", "DSCP"],
        Kind::SecurityGroup => &["RULES", "+STATEFUL"],
        Kind::Network => &["TYPE", "SEGMENT", "SUBNETS", "+PHYSICAL", "+MTU", "+EXTERNAL"],
        Kind::Port => &["NETWORK", "MAC", "ADDRESSES", "HOST", "+OWNER", "+GROUPS"],
        Kind::Router => &["HOST", "GATEWAY", "+INTERFACES", "+ROUTES"],
        Kind::FloatingIp => &["ADDRESS", "PORT", "ROUTER", "+FORWARDINGS"],
        Kind::Image => &["FORMAT", "GIB", "+CONTENTS", "+SOURCE"],
        Kind::Volume => &["HOST", "GIB", "SOURCE", "+BACKEND"],
        Kind::Snapshot => &["VOLUME"],
        Kind::Attachment => &["VOLUME", "CONNECTOR", "+READONLY"],
        Kind::Instance => &[
            "HOST",
            "POWER",
            "VCPUS",
            "MIB",
            "+IMAGE",
            "+PORTS",
            "+ADDRESSES",
            "+DISKS",
            "+VOLUMES",
            "+VNC",
        ],
    }
}

/// The cells that go with [`headers`].
pub(super) fn cells(row: &ObjectRow, names: &BTreeMap<ObjectRef, String>) -> Vec<String> {
    let name = |object: ObjectRef| {
        names
            .get(&object)
            .cloned()
            .unwrap_or_else(|| object.id.to_string().chars().take(8).collect())
    };
    let list = |objects: &mut dyn Iterator<Item = ObjectRef>| {
        objects.map(name).collect::<Vec<_>>().join(",")
    };
    let maybe = |text: Option<String>| text.unwrap_or_default();
    let observed = |key: &str| row.home().and_then(|home| home.observed.get(key));
    match spec(row) {
        Spec::Host(host) => vec![
            maybe(host.tunnel_address.map(|it| it.to_string())),
            host.bridge_mappings
                .iter()
                .map(|(physical, link)| format!("{physical}:{link}"))
                .collect::<Vec<_>>()
                .join(","),
        ],
        Spec::QosPolicy(policy) => vec![
            policy.bandwidth.iter().map(|it| it.max_kbps.to_string()).collect::<Vec<_>>().join(","),
            policy
                .packet_rate
                .iter()
                .map(|it| it.max_kpps.to_string())
                .collect::<Vec<_>>()
                .join(","),
            maybe(policy.dscp.map(|it| it.to_string())),
        ],
        Spec::SecurityGroup(group) => {
            vec![group.rules.len().to_string(), yes(group.stateful)]
        }
        Spec::Network(network) => vec![
            format!("{:?}", network.network_type).to_lowercase(),
            maybe(network.segment.map(|it| it.to_string())),
            network.subnets.iter().map(|it| it.cidr.to_string()).collect::<Vec<_>>().join(","),
            maybe(network.physical_network.clone()),
            maybe(network.mtu.map(|it| it.to_string())),
            yes(network.external),
        ],
        Spec::Port(port) => vec![
            name(port.network.object()),
            port.mac.to_string(),
            port.fixed_ips.iter().map(|it| it.address.to_string()).collect::<Vec<_>>().join(","),
            port.host.clone(),
            serde_json::to_value(port.owner)
                .ok()
                .and_then(|it| it.as_str().map(str::to_owned))
                .unwrap_or_default(),
            list(&mut port.security_groups.iter().map(|it| it.object())),
        ],
        Spec::Router(router) => vec![
            router.host.clone(),
            maybe(router.gateway.as_ref().map(|it| name(it.port.object()))),
            list(&mut router.interfaces.iter().map(|it| it.object())),
            router.routes.len().to_string(),
        ],
        Spec::FloatingIp(floating) => vec![
            floating.address.to_string(),
            maybe(floating.port.map(|it| name(it.object()))),
            name(floating.router.object()),
            floating.port_forwardings.len().to_string(),
        ],
        Spec::Image(image) => vec![
            format!("{:?}", image.format).to_lowercase(),
            maybe(observed("virtual_bytes").and_then(Value::as_u64).map(gib)),
            // As much as tells contents apart.
            maybe(
                observed("contents")
                    .and_then(Value::as_str)
                    .map(|it| it.trim_start_matches("sha256:").chars().take(12).collect()),
            ),
            image.source.clone(),
        ],
        Spec::Volume(volume) => vec![
            volume.host.clone(),
            volume.size_gib.to_string(),
            match volume.source {
                VolumeSource::Blank => "blank".to_owned(),
                VolumeSource::Image(image) => format!("image {}", name(image.object())),
                VolumeSource::Snapshot(snapshot) => format!("snapshot {}", name(snapshot.object())),
                VolumeSource::Volume(volume) => format!("volume {}", name(volume.object())),
            },
            maybe(volume.backend.clone()),
        ],
        Spec::Snapshot(snapshot) => vec![name(snapshot.volume.object())],
        Spec::Attachment(attachment) => vec![
            name(attachment.volume.object()),
            attachment.connector.host.clone(),
            yes(attachment.read_only),
        ],
        Spec::Instance(instance) => vec![
            instance.host.clone(),
            observed("power_state")
                .and_then(Value::as_str)
                .unwrap_or(instance.power_state.as_str())
                .to_owned(),
            instance.vcpus.to_string(),
            instance.memory_mib.to_string(),
            maybe(instance.image.map(|it| name(it.object()))),
            list(&mut instance.ports.iter().map(|it| it.port.object())),
            instance
                .ports
                .iter()
                .flat_map(|port| &port.addresses)
                .map(|given| given.address.addr().to_string())
                .collect::<Vec<_>>()
                .join(","),
            observed("disks")
                .and_then(Value::as_object)
                .map(|disks| disks.keys().cloned().collect::<Vec<_>>().join(","))
                .unwrap_or_default(),
            list(&mut instance.volumes.iter().map(|it| it.volume.object())),
            observed("vnc").and_then(Value::as_str).unwrap_or_default().to_owned(),
        ],
    }
}

/// Bytes in GiB, with as many places as small images need.
fn gib(bytes: u64) -> String {
    let hundredths = bytes.div_ceil((1 << 30) / 100);
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

fn yes(it: bool) -> String {
    if it { "yes" } else { "no" }.to_owned()
}
