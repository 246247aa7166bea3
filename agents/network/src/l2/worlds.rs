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
    kind: u8,
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
}

const NETWORKS: u8 = 3;
const PORTS: u8 = 5;

/// A random world.
pub(crate) fn any_world() -> impl Strategy<Value = World> {
    let network = (0..4_u8, option::of(1300..1303_u32), any::<bool>(), 2..4_u8)
        .prop_map(|(kind, mtu, dhcp, dhcp_address)| Network { kind, mtu, dhcp, dhcp_address });
    let port =
        (0..NETWORKS, 0..3_u8, prop::bool::weighted(0.2), any::<bool>(), any::<bool>(), 0..2_u8)
            .prop_map(|(network, host, external, up, queues, address)| Port {
                network,
                host,
                external,
                up,
                queues,
                address,
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
        for (number, network) in (0_u8..).zip(&self.networks) {
            let Some(network) = network else { continue };
            let mut spec = match network.kind {
                0 => json!({"type": "local"}),
                1 => json!({"type": "flat", "physical_network": "public"}),
                _ => {
                    json!({"type": "vxlan", "segment": 100 + u32::from(number) + u32::from(network.kind)})
                }
            };
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
            let spec = json!({
                "network": Uuid::from_u128(network_id(port.network)),
                "host": HOSTS[usize::from(port.host)],
                "mac": format!("fa:16:3e:00:00:{number:02x}"),
                "owner": if port.external { "external" } else { "instance" },
                "admin_up": port.up,
                "queues": if port.queues { 4 } else { 1 },
                "fixed_ips": [{
                    "subnet": "main",
                    "address": format!("10.{}.0.{}", port.network, 10 + 10 * number + port.address),
                }],
            });
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

fn network_id(number: u8) -> u128 {
    0xbbbb_0000_0000_0000_0000_0000_0000_0000 + (u128::from(number) << 100)
}
