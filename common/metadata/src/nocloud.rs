//! NoCloud's layout: three YAML files, of which JSON is a part.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use stackhand_model::{AddressSource, InstancePort};

use crate::Guest;

pub(crate) fn files(guest: &Guest<'_>) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut meta = json!({
        "instance-id": guest.id.to_string(),
        "local-hostname": guest.host_name(),
    });
    if !guest.data.keys.is_empty() {
        meta["public-keys"] = guest.data.keys.values().cloned().collect();
    }
    let yaml = |value: &Value| format!("{value:#}\n").into_bytes();
    files.insert("meta-data".to_owned(), yaml(&meta));
    // cloud-init takes the drive for incomplete without it.
    files.insert("user-data".to_owned(), guest.data.user_data_bytes().unwrap_or_default());
    if !guest.ports.is_empty() {
        files.insert("network-config".to_owned(), yaml(&network_config(guest.ports)));
    }
    files
}

/// Version 2 of cloud-init's own format, which is netplan's.
fn network_config(ports: &[InstancePort]) -> Value {
    let ethernets = ports.iter().enumerate().map(|(index, port)| {
        let by = |wanted: &[AddressSource]| port.addresses.iter().any(|a| wanted.contains(&a.by));
        let mut ethernet = json!({
            "match": {"macaddress": port.mac.to_string()},
            "dhcp4": by(&[AddressSource::Dhcp]),
            "dhcp6": by(&[AddressSource::Dhcpv6Stateful, AddressSource::Dhcpv6Stateless]),
        });
        if let Some(mtu) = port.mtu {
            ethernet["mtu"] = mtu.into();
        }
        let fixed = || port.addresses.iter().filter(|a| a.by == AddressSource::Static);
        let addresses: Vec<Value> = fixed().map(|given| given.address.to_string().into()).collect();
        if !addresses.is_empty() {
            ethernet["addresses"] = addresses.into();
            let defaults = fixed().filter_map(|given| {
                let any = if given.address.addr().is_ipv4() { "0.0.0.0/0" } else { "::/0" };
                given.gateway.map(|gateway| json!({"to": any, "via": gateway}))
            });
            let further = fixed()
                .flat_map(|given| &given.routes)
                .map(|route| json!({"to": route.destination.to_string(), "via": route.next_hop}));
            ethernet["routes"] = defaults.chain(further).collect();
            let servers: Vec<Value> =
                fixed().flat_map(|given| &given.dns_servers).map(|server| json!(server)).collect();
            if !servers.is_empty() {
                ethernet["nameservers"] = json!({"addresses": servers});
            }
        }
        (format!("interface{index}"), ethernet)
    });
    json!({"version": 2, "ethernets": ethernets.collect::<Map<_, _>>()})
}
