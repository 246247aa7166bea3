//! Segments, Ethernet addresses and IP addresses that a manifest leaves open.
//!
//! Earlier choices are kept; new ones are the lowest free.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::{Map, Value, json};
use stackhand_model::{
    Document, FixedIp, Kind, MacAddr, NetworkSpec, NetworkType, ObjectRef, PortOwner, PortSpec,
    Spec, Subnet,
};
use uuid::Uuid;

use super::allocate;
use super::draft::{Draft, Drafts};
use super::floating::external_network;
use super::held::Held;

/// Fills in segments of networks, addresses of DHCP servers, of ports and of floating IPs.
///
/// Problems are added to `problems`.
pub(crate) fn choose(drafts: &mut Drafts, held: &Held, problems: &mut Vec<String>) {
    segments(drafts, held, problems);
    let mut used = Used::of(drafts, held);
    dhcp_servers(drafts, held, &mut used, problems);
    ethernet(drafts, held, &mut used);
    ports(drafts, held, &mut used, problems);
    floating_ips(drafts, held, &mut used, problems);
}

fn of_kind(drafts: &Drafts, kind: Kind) -> Vec<ObjectRef> {
    drafts.keys().filter(|object| object.kind == kind).copied().collect()
}

fn segments(drafts: &mut Drafts, held: &Held, problems: &mut Vec<String>) {
    let mut taken: BTreeMap<String, BTreeSet<u32>> = BTreeMap::new();
    let scope = |network_type: NetworkType, physical: Option<&str>| {
        format!("{network_type:?}/{}", physical.unwrap_or_default())
    };
    let held_networks = held.of_kind(Kind::Network);
    for document in held_networks.values() {
        if let Spec::Network(network) = &document.spec
            && let Some(segment) = network.segment
        {
            let scope = scope(network.network_type, network.physical_network.as_deref());
            taken.entry(scope).or_default().insert(segment);
        }
    }
    let network_type = |draft: &Draft| {
        draft.field("type").and_then(|it| serde_json::from_value::<NetworkType>(it.clone()).ok())
    };
    for draft in drafts.values().filter(|draft| draft.value["kind"] == "Network") {
        if let (Some(network_type), Some(segment)) =
            (network_type(draft), draft.field("segment").and_then(Value::as_u64))
        {
            let scope = scope(network_type, draft.text("physical_network"));
            taken.entry(scope).or_default().extend(u32::try_from(segment));
        }
    }
    for object in of_kind(drafts, Kind::Network) {
        let Some(draft) = drafts.get_mut(&object) else { continue };
        let Some(network_type) = network_type(draft) else { continue };
        if draft.field("segment").is_some() || allocate::largest_segment(network_type) == 0 {
            continue;
        }
        let kept = held_networks.get(&object.id).and_then(|document| match &document.spec {
            Spec::Network(network) if network.network_type == network_type => network.segment,
            _ => None,
        });
        let taken = taken.entry(scope(network_type, draft.text("physical_network"))).or_default();
        if kept.is_none()
            && let Some(place) = held.out_of_sight(Kind::Network)
        {
            let problem = format!(
                "cannot be chosen while {place} is down, which may hold networks; write the \
                 number, or give --assume-lost {} if it will not come back",
                place.host
            );
            problems.push(draft.problem("spec.segment", problem));
            continue;
        }
        match kept.or_else(|| allocate::lowest_segment(network_type, taken)) {
            Some(segment) => {
                taken.insert(segment);
                draft.set("segment", segment);
            }
            None => problems.push(draft.problem("spec.segment", "every number is taken")),
        }
    }
}

/// Addresses in use, by network.
#[derive(Debug, Default)]
struct Used {
    addresses: BTreeMap<Uuid, BTreeSet<IpAddr>>,
    macs: BTreeMap<MacAddr, Uuid>,
}

impl Used {
    fn of(drafts: &Drafts, held: &Held) -> Self {
        let mut used = Self::default();
        for document in held.entries.values().flat_map(BTreeMap::values).map(|it| &it.document) {
            match &document.spec {
                Spec::Port(port) => {
                    used.macs.insert(port.mac, document.id);
                    let taken = used.addresses.entry(port.network.0).or_default();
                    taken.extend(port.fixed_ips.iter().map(|fixed| fixed.address));
                }
                Spec::Network(network) => {
                    let taken = used.addresses.entry(document.id).or_default();
                    taken.extend(network.subnets.iter().filter_map(|it| it.dhcp_address));
                }
                Spec::FloatingIp(floating) => {
                    if let Some(network) = external_network(floating.router.0, drafts, held) {
                        used.addresses.entry(network).or_default().insert(floating.address);
                    }
                }
                _ => {}
            }
        }
        let address = |value: &Value| value.as_str().and_then(|text| text.parse::<IpAddr>().ok());
        for (object, draft) in drafts {
            match object.kind {
                Kind::Port => {
                    if let Some(mac) = draft.text("mac").and_then(|mac| mac.parse().ok()) {
                        used.macs.insert(mac, object.id);
                    }
                    let given = draft.items("fixed_ips");
                    let given =
                        given.filter_map(|it| address(it).or_else(|| address(&it["address"])));
                    if let Some(network) = draft.id("network") {
                        used.addresses.entry(network).or_default().extend(given);
                    }
                }
                Kind::Network => {
                    let given =
                        draft.items("subnets").filter_map(|it| address(&it["dhcp_address"]));
                    used.addresses.entry(object.id).or_default().extend(given);
                }
                Kind::FloatingIp => {
                    let router = draft.id("router");
                    let network = router.and_then(|router| external_network(router, drafts, held));
                    if let Some(network) = network {
                        let given = draft.field("address").and_then(address);
                        used.addresses.entry(network).or_default().extend(given);
                    }
                }
                _ => {}
            }
        }
        used
    }

    /// The lowest free address of a subnet, taken from now on.
    fn take(&mut self, network: Uuid, subnet: &Subnet) -> Option<IpAddr> {
        let taken = self.addresses.entry(network).or_default();
        let address = allocate::lowest_free(subnet, taken)?;
        taken.insert(address);
        Some(address)
    }

    /// A certain address, if it is free.
    fn take_this(&mut self, network: Uuid, address: IpAddr) -> Option<IpAddr> {
        self.addresses.entry(network).or_default().insert(address).then_some(address)
    }
}

/// A network, from the manifest or as held.
fn network(id: Uuid, drafts: &Drafts, held: &Held) -> Option<NetworkSpec> {
    let object = ObjectRef { kind: Kind::Network, id };
    match drafts.get(&object) {
        Some(draft) => draft.spec(),
        None => match &held.newest(object)?.spec {
            Spec::Network(network) => Some(network.clone()),
            _ => None,
        },
    }
}

fn dhcp_servers(drafts: &mut Drafts, held: &Held, used: &mut Used, problems: &mut Vec<String>) {
    for object in of_kind(drafts, Kind::Network) {
        let kept: BTreeMap<String, IpAddr> = match held.newest(object).map(|it| &it.spec) {
            Some(Spec::Network(network)) => network
                .subnets
                .iter()
                .filter_map(|it| it.dhcp_address.map(|address| (it.name.to_string(), address)))
                .collect(),
            _ => BTreeMap::new(),
        };
        let Some(draft) = drafts.get_mut(&object) else { continue };
        let mut full = Vec::new();
        for (index, value) in draft.items_mut("subnets").enumerate() {
            let Ok(subnet) = serde_json::from_value::<Subnet>(value.clone()) else { continue };
            if !subnet.dhcp || subnet.dhcp_address.is_some() || allocate::is_self_addressed(&subnet)
            {
                continue;
            }
            let kept = kept.get(subnet.name.as_str()).copied();
            let kept = kept.filter(|address| subnet.cidr.contains(address));
            match kept.or_else(|| used.take(object.id, &subnet)) {
                Some(address) => value["dhcp_address"] = address.to_string().into(),
                None => full.push((index, subnet.cidr)),
            }
        }
        for (index, cidr) in full {
            let field = format!("spec.subnets[{index}].dhcp_address");
            problems.push(draft.problem(&field, format!("{cidr} has no free address")));
        }
    }
}

fn ethernet(drafts: &mut Drafts, held: &Held, used: &mut Used) {
    for object in of_kind(drafts, Kind::Port) {
        let Some(draft) = drafts.get_mut(&object) else { continue };
        if draft.field("mac").is_some() {
            continue;
        }
        let kept = match held.newest(object).map(|it| &it.spec) {
            Some(Spec::Port(port)) => Some(port.mac),
            _ => None,
        };
        let free = |mac: &MacAddr| used.macs.get(mac).is_none_or(|owner| *owner == object.id);
        let chosen = kept
            .or_else(|| (0..=u8::MAX).map(|attempt| allocate::mac(object.id, attempt)).find(free))
            .unwrap_or_else(|| allocate::mac(object.id, 0));
        used.macs.insert(chosen, object.id);
        draft.set("mac", chosen.to_string());
    }
}

fn ports(drafts: &mut Drafts, held: &Held, used: &mut Used, problems: &mut Vec<String>) {
    let mut objects = of_kind(drafts, Kind::Port);
    // Routers first: they want the gateway's address, which nobody else is given.
    objects.sort_by_key(|object| owner(drafts, *object) != PortOwner::RouterInterface);
    for object in objects {
        let owner = owner(drafts, object);
        let Some(draft) = drafts.get(&object) else { continue };
        let Some(network_id) = draft.id("network") else { continue };
        let Some(network) = network(network_id, drafts, held) else { continue };
        let mac = draft.text("mac").and_then(|mac| mac.parse::<MacAddr>().ok());
        let kept: Vec<FixedIp> = match held.newest(object).map(|it| &it.spec) {
            Some(Spec::Port(PortSpec { network, fixed_ips, .. })) if network.0 == network_id => {
                fixed_ips.clone()
            }
            _ => Vec::new(),
        };
        let mut pick = |subnet: &Subnet| -> Option<IpAddr> {
            let kept = kept.iter().find(|it| it.subnet == subnet.name).map(|it| it.address);
            if let Some(kept) = kept.filter(|address| subnet.cidr.contains(address)) {
                return Some(kept);
            }
            if owner == PortOwner::RouterInterface
                && let Some(gateway) = subnet.gateway
                && let Some(address) = used.take_this(network_id, gateway)
            {
                return Some(address);
            }
            if allocate::is_self_addressed(subnet) && owner == PortOwner::Instance {
                return mac.map(|mac| allocate::eui64(&subnet.cidr, mac));
            }
            used.take(network_id, subnet)
        };
        let mut found = Vec::new();
        let mut wrong = Vec::new();
        if draft.field("fixed_ips").is_some() {
            for (index, item) in draft.items("fixed_ips").enumerate() {
                match complete(item, &network, &mut pick) {
                    Ok(fixed) => found.push(fixed),
                    Err(problem) => {
                        wrong.push(draft.problem(&format!("spec.fixed_ips[{index}]"), problem));
                    }
                }
            }
        } else if !kept.is_empty() {
            found.extend(kept.iter().filter_map(|fixed| serde_json::to_value(fixed).ok()));
        } else {
            for subnet in defaults(&network) {
                match pick(subnet) {
                    Some(address) => found.push(fixed_ip(subnet, address)),
                    None => wrong.push(draft.problem(
                        "spec.fixed_ips",
                        format!("subnet {} has no free address", subnet.name),
                    )),
                }
            }
        }
        problems.extend(wrong);
        if let Some(draft) = drafts.get_mut(&object)
            && !found.is_empty()
        {
            draft.set("fixed_ips", found);
        }
    }
}

fn owner(drafts: &Drafts, object: ObjectRef) -> PortOwner {
    drafts
        .get(&object)
        .and_then(|draft| draft.field("owner"))
        .and_then(|owner| serde_json::from_value(owner.clone()).ok())
        .unwrap_or_default()
}

/// The subnets that a port has an address of when its manifest does not say: the first of each
/// family.
fn defaults(network: &NetworkSpec) -> impl Iterator<Item = &Subnet> {
    let first =
        |v4: bool| network.subnets.iter().find(move |subnet| subnet.cidr.addr().is_ipv4() == v4);
    first(true).into_iter().chain(first(false))
}

fn fixed_ip(subnet: &Subnet, address: IpAddr) -> Value {
    json!({"subnet": subnet.name, "address": address.to_string()})
}

/// Completes `192.168.0.5`, `{address}` and `{subnet}`. What is complete, or cannot be
/// understood, stays as it is.
fn complete(
    item: &Value,
    network: &NetworkSpec,
    pick: &mut impl FnMut(&Subnet) -> Option<IpAddr>,
) -> Result<Value, String> {
    let fields = match item {
        Value::String(address) => Map::from_iter([("address".to_owned(), address.clone().into())]),
        Value::Object(fields) => fields.clone(),
        other => return Ok(other.clone()),
    };
    let text = |key: &str| fields.get(key).and_then(Value::as_str);
    match (text("subnet"), text("address")) {
        (None, Some(address)) => {
            let Ok(address) = address.parse::<IpAddr>() else {
                return Err(format!("{address:?} is not an IP address"));
            };
            let subnet = network.subnets.iter().find(|it| it.cidr.contains(&address));
            subnet
                .map(|subnet| fixed_ip(subnet, address))
                .ok_or_else(|| format!("{address} is in no subnet of the port's network"))
        }
        (Some(name), None) => {
            let subnet = network.subnets.iter().find(|it| it.name.as_str() == name);
            let subnet = subnet.ok_or_else(|| {
                let names: Vec<&str> = network.subnets.iter().map(|it| it.name.as_str()).collect();
                format!("the network has no subnet {name:?}; it has {}", names.join(", "))
            })?;
            pick(subnet)
                .map(|address| fixed_ip(subnet, address))
                .ok_or_else(|| format!("subnet {name} has no free address"))
        }
        _ => Ok(Value::Object(fields)),
    }
}

fn floating_ips(drafts: &mut Drafts, held: &Held, used: &mut Used, problems: &mut Vec<String>) {
    for object in of_kind(drafts, Kind::FloatingIp) {
        let Some(draft) = drafts.get(&object) else { continue };
        if draft.field("address").is_some() {
            continue;
        }
        let kept = match held.newest(object) {
            Some(Document { spec: Spec::FloatingIp(floating), .. }) => Some(floating.address),
            _ => None,
        };
        let chosen = match kept {
            Some(kept) => Ok(kept),
            None => lowest_external(draft, drafts, held, used),
        };
        let Some(draft) = drafts.get_mut(&object) else { continue };
        match chosen {
            Ok(address) => draft.set("address", address.to_string()),
            Err(problem) => problems.push(draft.problem("spec.address", problem)),
        }
    }
}

/// The lowest free IPv4 address of the external network that a floating IP's router leads to.
fn lowest_external(
    floating: &Draft,
    drafts: &Drafts,
    held: &Held,
    used: &mut Used,
) -> Result<IpAddr, &'static str> {
    let router = floating.id("router").ok_or("cannot be chosen: spec.router is needed")?;
    let network_id = external_network(router, drafts, held)
        .ok_or("is needed: the router has no gateway whose network is known")?;
    let network = network(network_id, drafts, held)
        .ok_or("is needed: the router's external network is not known")?;
    let subnets = network.subnets.iter().filter(|it| it.cidr.addr().is_ipv4());
    let mut free = subnets.filter_map(|subnet| used.take(network_id, subnet));
    free.next().ok_or("the external network has no free address")
}
