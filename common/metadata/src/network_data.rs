//! `network_data.json`: a guest's interfaces, for guests that configure themselves from it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};
use stackhand_model::{AddressSource, GuestAddress, InstancePort};

pub(crate) fn network_data(ports: &[InstancePort]) -> Value {
    let mut networks = Vec::new();
    let mut servers = Vec::new();
    for port in ports {
        for given in &port.addresses {
            let index = networks.len();
            networks.push(network(port, given, index));
            for server in &given.dns_servers {
                if !servers.contains(server) && !server.is_unspecified() {
                    servers.push(*server);
                }
            }
        }
    }
    let services: Vec<Value> = servers.iter().map(service).collect();
    let links: Vec<Value> = ports.iter().map(link).collect();
    json!({"links": links, "networks": networks, "services": services})
}

/// The tap's name: what the interface is called on the host.
fn link_id(port: &InstancePort) -> String {
    format!("tap{}", port.port.short())
}

fn link(port: &InstancePort) -> Value {
    json!({
        "id": link_id(port),
        "vif_id": port.port,
        "type": "bridge",
        "mtu": port.mtu,
        "ethernet_mac_address": port.mac.to_string(),
    })
}

fn service(address: &IpAddr) -> Value {
    json!({"type": "dns", "address": address})
}

fn network(port: &InstancePort, given: &GuestAddress, index: usize) -> Value {
    let address = given.address.addr();
    let kind = match (given.by, address) {
        (AddressSource::Static, IpAddr::V4(_)) => "ipv4",
        (AddressSource::Static, IpAddr::V6(_)) => "ipv6",
        (AddressSource::Dhcp, _) => "ipv4_dhcp",
        (AddressSource::Slaac, _) => "ipv6_slaac",
        (AddressSource::Dhcpv6Stateless, _) => "ipv6_dhcpv6-stateless",
        (AddressSource::Dhcpv6Stateful, _) => "ipv6_dhcpv6-stateful",
    };
    let mut network = json!({
        "id": format!("network{index}"),
        "type": kind,
        "link": link_id(port),
        "network_id": port.network,
    });
    // A guest that has DHCP is told there; saying it twice invites two truths.
    if given.by != AddressSource::Dhcp {
        let mut routes: Vec<Value> = Vec::new();
        if let Some(gateway) = given.gateway {
            let any = match address {
                IpAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            routes.push(json!({"network": any, "netmask": any, "gateway": gateway}));
        }
        for route in &given.routes {
            routes.push(json!({
                "network": route.destination.network(),
                "netmask": route.destination.netmask(),
                "gateway": route.next_hop,
            }));
        }
        network["ip_address"] = json!(address);
        network["netmask"] = json!(given.address.netmask());
        network["routes"] = routes.into();
        let servers = given.dns_servers.iter().filter(|server| !server.is_unspecified());
        network["services"] = servers.map(service).collect();
    }
    network
}
