//! Random documents for property tests and for the walk on the kernel: small universes, so that
//! overlaps, moves and leftovers are common. Included by path from `tests/`, hence no `crate::`.

use std::sync::Arc;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use serde_json::json;
use stackhand_model::Document;
use stackhand_runtime::agent::{Desired, Held};
use uuid::Uuid;

/// Documents of one moment.
#[derive(Clone, Debug)]
pub(crate) struct World {
    networks: Vec<Option<Network>>,
    ports: Vec<Option<Port>>,
}

#[derive(Clone, Debug)]
struct Network {
    kind: &'static str,
    mtu: Option<u32>,
    dhcp: bool,
    dhcp_address: u8,
}

#[derive(Clone, Debug)]
struct Port {
    network: u8,
    host: u8,
    external: bool,
    up: bool,
    queues: bool,
    address: u8,
    policy: Option<u8>,
}

const NETWORKS: u8 = 3;
const PORTS: u8 = 5;

/// All types of network.
pub(crate) const ALL: [&str; 6] = ["local", "flat", "vxlan", "vlan", "gre", "geneve"];

/// A random world with networks of these types.
pub(crate) fn any_world(types: &'static [&'static str]) -> impl Strategy<Value = World> {
    let kind = prop::sample::select(types);
    let network = (kind, option::of(1300..1303_u32), any::<bool>(), 2..4_u8)
        .prop_map(|(kind, mtu, dhcp, dhcp_address)| Network { kind, mtu, dhcp, dhcp_address });
    let port = (
        0..NETWORKS,
        0..3_u8,
        prop::bool::weighted(0.2),
        any::<bool>(),
        any::<bool>(),
        0..2_u8,
        option::of(0..4_u8),
    )
        .prop_map(|(network, host, external, up, queues, address, policy)| Port {
            network,
            host,
            external,
            up,
            queues,
            address,
            policy,
        });
    (
        vec(option::weighted(0.8, network), usize::from(NETWORKS)),
        vec(option::weighted(0.8, port), usize::from(PORTS)),
    )
        .prop_map(|(networks, ports)| World { networks, ports })
}

const HOSTS: [&str; 3] = ["one", "two", "three"];

impl World {
    /// Its documents. The host called `one` has tunnel address 192.0.2.1 and the link `eth9` to
    /// the physical network `public`.
    pub(crate) fn desired(&self) -> Desired {
        let mut desired = Desired::default();
        let mut put = |kind: &str, id: u128, name: &str, spec: serde_json::Value| {
            let value =
                json!({"kind": kind, "id": Uuid::from_u128(id), "name": name, "spec": spec});
            let document = Document::from_value(&value).expect("a world is well formed");
            let held = Held { document: Arc::new(document), deleting: false };
            desired.objects.insert(held.document.object(), held);
        };
        for (number, name) in HOSTS.iter().enumerate() {
            let address = format!("192.0.2.{}", number + 1);
            let mut spec = json!({"tunnel_address": address});
            if number == 0 {
                spec["bridge_mappings"] = json!({"public": "eth9"});
            }
            put("Host", 0xff00 + number as u128, name, spec);
        }
        let limits = [
            json!([{"direction": "ingress", "max_kbps": 8000}]),
            json!([{"direction": "egress", "max_kbps": 64, "max_burst_kbit": 100}]),
            json!([
                {"direction": "ingress", "max_kbps": 1_000_000},
                {"direction": "egress", "max_kbps": 10_000, "max_burst_kbit": 10},
            ]),
        ];
        for (number, limits) in limits.into_iter().enumerate() {
            let mut spec = json!({"bandwidth": limits});
            if number == 2 {
                spec["packet_rate"] = json!([{"direction": "egress", "max_kpps": 5}]);
            }
            put("QosPolicy", 0xcc00 + number as u128, &format!("policy{number}"), spec);
        }
        // Groups that refer to each other, and one to a group of which there is no document.
        for (number, remote) in [(0, 1), (1, 0), (2, 9)] {
            let spec = json!({"rules": [
                {"direction": "egress"},
                {"direction": "ingress", "remote_group": Uuid::from_u128(group_id(remote))},
            ]});
            put("SecurityGroup", group_id(number), &format!("group{number}"), spec);
        }
        for (number, network) in (0_u8..).zip(&self.networks) {
            let Some(network) = network else { continue };
            let mut spec = json!({"type": network.kind});
            if matches!(network.kind, "flat" | "vlan") {
                spec["physical_network"] = json!("public");
            }
            // Where segments make names, two networks want the same now and then.
            let shared = matches!(network.kind, "vlan" | "vxlan") && network.dhcp;
            if !matches!(network.kind, "flat" | "local") {
                spec["segment"] = json!(100 + number + u8::from(shared));
            }
            if let Some(mtu) = network.mtu {
                spec["mtu"] = json!(mtu);
            }
            spec["subnets"] = json!([{
                "name": "main",
                "cidr": format!("10.{number}.0.0/24"),
                "dhcp": network.dhcp,
                "dhcp_address": format!("10.{number}.0.{}", network.dhcp_address),
            }]);
            put("Network", network_id(number), &format!("net{number}"), spec);
        }
        for (number, port) in (0_u8..).zip(&self.ports) {
            let Some(port) = port else { continue };
            let mut spec = json!({
                "network": Uuid::from_u128(network_id(port.network)),
                "host": HOSTS[usize::from(port.host)],
                "mac": format!("fa:16:3e:00:00:{number:02x}"),
                "owner": if port.external { "external" } else { "instance" },
                "admin_up": port.up,
                "queues": if port.queues { 4 } else { 1 },
                "port_security": !(port.up && port.queues),
                "security_groups": [Uuid::from_u128(group_id((number + port.address) % 3))],
                "fixed_ips": [{
                    "subnet": "main",
                    "address": format!("10.{}.0.{}", port.network, 10 + 10 * number + port.address),
                }],
            });
            // One of them has no document.
            if let Some(policy) = port.policy {
                spec["qos_policy"] = json!(Uuid::from_u128(0xcc00 + u128::from(policy)));
            }
            put(
                "Port",
                0xaaaa_0000_0000_0000_0000_0000_0000_0000 + (u128::from(number) << 100),
                &format!("port{number}"),
                spec,
            );
        }
        desired
    }
}

fn group_id(number: u8) -> u128 {
    0xdd00 + u128::from(number)
}

fn network_id(number: u8) -> u128 {
    0xbbbb_0000_0000_0000_0000_0000_0000_0000 + (u128::from(number) << 100)
}
