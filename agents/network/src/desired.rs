//! From documents to what is wanted of this host. Pure.
//!
//! A network is *wired* here when the host has a port of it that needs a tap, serves its DHCP, or
//! has a router with a link on it.
//! Ports of other hosts are wanted as forwarding entries and neighbours of their network's overlay.
//!
//! What the host's underlay looks like (which link has the tunnel address, what MTU it has) is
//! taken from what was seen, because documents leave the MTU open on purpose.

mod dhcp;
mod dhcp6;
mod guests;
mod routers;
#[cfg(test)]
mod tests;
mod uplink;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use smol_str::SmolStr;
use stackhand_kernel::netlink::{BridgePort, Tap};
use stackhand_model::{Direction, Document, MacAddr, NetworkId, ObjectRef, PortId, RouterId, Spec};
use stackhand_model::{
    FloatingIpSpec, HostSpec, NetworkSpec, PortOwner, PortSpec, QosPolicyId, QosPolicySpec,
};
use stackhand_runtime::agent::Desired;

use crate::firewall::Model;
use crate::firewall::model::Surroundings;
use crate::l2::{At, BRIDGE, Make, Owner, Seen, SeenLink, Set, Wanted, Wish};
use crate::l3;
use crate::names::{self, Mark};
use crate::qos::{self, PacketRules};
use crate::services::Site;
use crate::settings::Renderer;

pub(crate) use guests::guest_id;
pub use routers::{RouterLink, RouterService};

/// What this host is, as far as documents do not say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// Its name in the cloud.
    pub host: String,
    /// User that may attach to taps.
    pub tap_user: Option<u32>,
    /// Group that may attach to taps.
    pub tap_group: Option<u32>,
    /// UDP port of VXLAN.
    pub vxlan_port: u16,
    /// Seconds that a DHCP lease lasts.
    pub lease_seconds: u32,
    /// Domain of ports whose network names none.
    pub dns_domain: String,
    /// DNS servers that are asked for names that are not ours.
    pub dns_forwarders: Vec<IpAddr>,
    /// Whether links of OpenStack's Linux bridge agent are adopted.
    pub takeover: bool,
    /// What is to enforce security groups.
    pub firewall: Renderer,
}

/// Everything that is wanted of this host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostWish {
    /// Links and forwarding.
    pub l2: Wish,
    /// Routes and translations of routers.
    pub l3: l3::Wish,
    /// Routers of this host.
    pub routers: BTreeMap<RouterId, RouterService>,
    /// What guests are served, by the link inside a namespace.
    pub services: BTreeMap<At, Site>,
    /// Networks that are wired here.
    pub wired: BTreeMap<NetworkId, Wired>,
    /// What the taps of this host let through.
    pub firewall: Model,
    /// What documents alone say about an object: why it cannot be active.
    pub standing: BTreeMap<ObjectRef, Standing>,
}

/// How a network is wired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wired {
    /// Its bridge.
    pub bridge: SmolStr,
    /// Its links to other hosts.
    pub uplinks: BTreeSet<SmolStr>,
    /// Largest IP packet in bytes.
    pub mtu: u32,
}

/// Why an object is not active whatever the host does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It waits for something that may come by itself.
    Pending(String),
    /// Somebody has to act.
    Failed(String),
}

/// Computes what is wanted of this host.
#[must_use]
pub fn host_wish(desired: &Desired, local: &Local, seen: &Seen) -> HostWish {
    let documents = Documents::sort(desired, &local.host);
    let mut builder = Builder {
        local,
        seen,
        documents: &documents,
        parents: BTreeSet::new(),
        routed: BTreeMap::new(),
        routed_networks: BTreeSet::new(),
        wish: HostWish::default(),
    };
    builder.wish.l2.takeover = local.takeover;
    builder.wish.l2.known = desired.objects.keys().copied().collect();
    builder.host_document();
    builder.router_links();
    for (&id, &network) in &documents.networks {
        builder.network(id, network);
    }
    builder.raise_parents();
    builder.router_tables();
    builder.router_services();
    builder.ports_without_network();
    builder.firewall(desired);
    builder.wish
}

/// The documents by kind, without those that are to go.
#[derive(Debug, Default)]
struct Documents<'a> {
    networks: BTreeMap<NetworkId, &'a NetworkSpec>,
    ports: BTreeMap<NetworkId, BTreeMap<PortId, &'a PortSpec>>,
    by_device: guests::ByDevice<'a>,
    /// Tunnel addresses by host name.
    tunnels: BTreeMap<&'a str, IpAddr>,
    policies: BTreeMap<QosPolicyId, &'a QosPolicySpec>,
    others: Vec<&'a Document>,
    own: Option<(ObjectRef, &'a HostSpec)>,
    /// All ports by their ids.
    by_id: BTreeMap<PortId, &'a PortSpec>,
    leaving_floating: Vec<(ObjectRef, &'a FloatingIpSpec)>,
    leaving: BTreeMap<PortId, &'a PortSpec>,
}

impl<'a> Documents<'a> {
    fn sort(desired: &'a Desired, host: &str) -> Self {
        let mut documents = Self::default();
        // They come in order, and maps are made of all at once.
        let (mut networks, mut by_id) = (Vec::new(), Vec::new());
        for (object, held) in &desired.objects {
            let document = held.document.as_ref();
            match &document.spec {
                Spec::Port(port) if held.deleting => {
                    documents.leaving.insert(PortId(object.id), port);
                }
                Spec::FloatingIp(floating) if held.deleting => {
                    documents.leaving_floating.push((*object, floating));
                }
                _ if held.deleting => {}
                Spec::Network(network) => {
                    networks.push((NetworkId(object.id), network));
                }
                Spec::Port(port) => {
                    by_id.push((PortId(object.id), port));
                    if let Some(device) = port.device {
                        let ports = documents.by_device.entry(device).or_default();
                        ports.push((PortId(object.id), port));
                    }
                    documents
                        .ports
                        .entry(port.network)
                        .or_default()
                        .insert(PortId(object.id), port);
                }
                Spec::Host(spec) => {
                    if document.name.as_str() == host {
                        documents.own = Some((*object, spec));
                    }
                    if let Some(address) = spec.tunnel_address {
                        documents.tunnels.insert(document.name.as_str(), address);
                    }
                }
                Spec::QosPolicy(spec) => {
                    documents.policies.insert(QosPolicyId(object.id), spec);
                }
                _ => documents.others.push(document),
            }
        }
        documents.networks = networks.into_iter().collect();
        documents.by_id = by_id.into_iter().collect();
        documents
    }

    fn ports_of(&self, network: NetworkId) -> impl Iterator<Item = (PortId, &'a PortSpec)> {
        self.ports.get(&network).into_iter().flatten().map(|(id, port)| (*id, *port))
    }
}

struct Builder<'a> {
    local: &'a Local,
    seen: &'a Seen,
    documents: &'a Documents<'a>,
    /// Links of the host that VLANs are on.
    parents: BTreeSet<String>,
    /// Ports that are links of this host's routers, and the networks that those are on.
    routed: BTreeMap<PortId, RouterId>,
    routed_networks: BTreeSet<NetworkId>,
    wish: HostWish,
}

impl Builder<'_> {
    fn fail(&mut self, object: ObjectRef, reason: impl Into<String>) {
        let standing = self.wish.standing.entry(object);
        // What somebody has to act on is told before what may come by itself.
        let standing = standing.or_insert_with(|| Standing::Pending(String::new()));
        if let Standing::Pending(_) = standing {
            *standing = Standing::Failed(reason.into());
        }
    }

    fn wait(&mut self, object: ObjectRef, reason: impl Into<String>) {
        self.wish.standing.entry(object).or_insert_with(|| Standing::Pending(reason.into()));
    }

    /// Wants a link; of two that want the same name the first keeps it.
    fn want(&mut self, at: At, wanted: Wanted) -> bool {
        match self.wish.l2.links.entry(at) {
            Entry::Vacant(free) => {
                free.insert(wanted);
                true
            }
            Entry::Occupied(taken) => {
                let (at, first) = (taken.key().clone(), taken.get().object);
                let reason = format!("link {at} is taken by {first}");
                self.wish.l2.contested.insert((at, wanted.object));
                self.fail(wanted.object, reason);
                false
            }
        }
    }

    /// Says what of this host's own document does not match the host.
    fn host_document(&mut self) {
        let Some((object, spec)) = self.documents.own else { return };
        for (physical, link) in &spec.bridge_mappings {
            if !self.seen.links.contains_key(&At::host(link.clone())) {
                self.fail(
                    object,
                    format!(
                        "bridge_mappings.{physical}: this host has no link {link}; create it or \
                         correct the mapping"
                    ),
                );
            }
        }
        if let Some(address) = spec.tunnel_address
            && self.link_with(address).is_none()
        {
            self.fail(
                object,
                format!(
                    "tunnel_address: no link of this host has {address}; add the address or \
                     correct the document"
                ),
            );
        }
    }

    /// The link that has an address, and its MTU.
    fn link_with(&self, address: IpAddr) -> Option<(&str, u32)> {
        self.seen.links.iter().find_map(|(at, link)| {
            let has = link.addresses.iter().any(|net| net.addr() == address);
            (at.space.is_none() && has).then_some((at.link.as_str(), link.mtu))
        })
    }

    fn network(&mut self, id: NetworkId, network: &NetworkSpec) {
        let here: Vec<(PortId, &PortSpec)> =
            self.documents.ports_of(id).filter(|(_, port)| port.host == self.local.host).collect();
        let has_taps = here.iter().any(|(_, port)| needs_tap(port));
        let serves = dhcp::serves(network, &self.local.host, has_taps);
        if !has_taps && !serves && !self.routed_networks.contains(&id) {
            return;
        }
        let uplink = match self.uplink(network) {
            Ok(uplink) => uplink,
            Err(reason) => {
                self.ports_wait(&here, &format!("waits for its network: {reason}"));
                return self.fail(id.object(), reason);
            }
        };
        let mtu = network.mtu.unwrap_or(uplink.default_mtu);
        if mtu > uplink.limit {
            let reason = format!(
                "mtu {mtu} does not fit through {}, which leaves {}; lower spec.mtu or raise the \
                 link's MTU",
                uplink.by, uplink.limit
            );
            self.ports_wait(&here, &format!("waits for its network: {reason}"));
            return self.fail(id.object(), reason);
        }
        let bridge = names::bridge(id);
        let wanted = Wanted {
            object: id.object(),
            make: Make::Bridge,
            set: Set {
                mark: Some(Mark::Network(id)),
                mac: Some(bridge_mac(id)),
                mtu: Some(mtu),
                up: Some(true),
                ipv6_off: Some(true),
                as_bridge: Some(BRIDGE),
                ..Set::default()
            },
            addresses: None,
        };
        if !self.want(At::host(bridge.clone()), wanted) {
            return self.ports_wait(&here, "waits for its network, whose bridge cannot be made");
        }
        let dhcp = serves.then(|| self.dhcp(id, network, mtu, &bridge)).flatten();
        // Every host answers its own guests from the same address: the servers must not meet.
        let kept_apart = dhcp.is_some_and(|kept_apart| kept_apart);
        let uplinks = self.wire_uplink((id, network), &uplink, mtu, &bridge, kept_apart);
        for (port_id, port) in here {
            self.local_port(port_id, port, mtu, &bridge);
        }
        self.wish.wired.insert(id, Wired { bridge, uplinks, mtu });
    }

    fn ports_wait(&mut self, ports: &[(PortId, &PortSpec)], reason: &str) {
        for (id, _) in ports {
            self.wait(id.object(), reason);
        }
    }

    fn local_port(&mut self, id: PortId, port: &PortSpec, mtu: u32, bridge: &SmolStr) {
        let mut set = Set {
            mark: Some(Mark::Port(id)),
            mtu: Some(mtu),
            bridge: Some(Some(bridge.clone())),
            up: Some(port.admin_up),
            ipv6_off: Some(true),
            port: Some(BridgePort::default()),
            ..Set::default()
        };
        self.limit(id, port, mtu, &mut set);
        let make = match port.owner {
            PortOwner::Instance => Make::Tap(Tap {
                user: self.local.tap_user,
                group: self.local.tap_group,
                multi_queue: port.queues > 1,
                persist: true,
            }),
            PortOwner::External => {
                set.mark = None;
                Make::Brought
            }
            PortOwner::RouterInterface | PortOwner::RouterGateway => {
                return self.router_port(id, port, mtu, bridge);
            }
            // Wired with the DHCP server.
            PortOwner::Dhcp => return,
        };
        let wanted = Wanted { object: id.object(), make, set, addresses: None };
        self.want(At::host(names::tap(id)), wanted);
    }

    /// What the port's policy means for its link; a link more if it limits what the guest sends.
    fn limit(&mut self, id: PortId, port: &PortSpec, mtu: u32, set: &mut Set) {
        let policy = port.qos_policy.and_then(|policy| {
            let held = self.documents.policies.get(&policy);
            if held.is_none() {
                self.wait(id.object(), format!("waits for the document of QosPolicy {policy}"));
            }
            held
        });
        let rules = policy.and_then(|policy| PacketRules::of(id.object(), policy));
        self.wish.firewall.packets.extend(rules.map(|rules| (names::tap(id).into(), rules)));
        let bucket = |direction| policy.and_then(|policy| qos::shaper(policy, direction, mtu));
        set.shaper = Some(bucket(Direction::Ingress));
        set.redirect = Some(None);
        let Some(sent) = bucket(Direction::Egress) else { return };
        let name = names::ifb(id);
        set.redirect = Some(Some(name.clone()));
        let queue = Set {
            mark: Some(Mark::Port(id)),
            mtu: Some(mtu),
            up: Some(true),
            ipv6_off: Some(true),
            shaper: Some(Some(sent)),
            ..Set::default()
        };
        let wanted = Wanted { object: id.object(), make: Make::Ifb, set: queue, addresses: None };
        self.want(At::host(name), wanted);
    }

    /// Ports whose network nobody has told us of, and links that ports to go leave behind.
    fn ports_without_network(&mut self) {
        for (network, ports) in &self.documents.ports {
            if self.documents.networks.contains_key(network) {
                continue;
            }
            for (id, port) in ports {
                if port.host == self.local.host {
                    self.wait(id.object(), format!("waits for the document of network {network}"));
                }
            }
        }
        for (id, port) in &self.documents.leaving {
            let at = At::host(names::tap(*id));
            if port.owner == PortOwner::External && !self.wish.l2.links.contains_key(&at) {
                self.wish.l2.released.insert(at, id.object());
            }
        }
    }

    fn firewall(&mut self, desired: &Desired) {
        let orphan = |(at, link): (&At, &SeenLink)| match link.owner {
            Owner::Ours(mark @ Mark::Port(_)) if at.space.is_none() => {
                (!self.wish.l2.known.contains(&mark.object())).then(|| at.link.to_string())
            }
            _ => None,
        };
        let wired = self.wish.wired.iter();
        let around = Surroundings {
            host: &self.local.host,
            bridges: wired.map(|(id, wired)| (*id, wired.bridge.to_string())).collect(),
            has_link: &|name| self.seen.links.contains_key(&At::host(name)),
            orphans: self.seen.links.iter().filter_map(orphan).collect(),
            barred: self.wish.l2.contested.iter().map(|(_, object)| *object).collect(),
        };
        let firewall = Model::new(desired, around);
        for (object, reason) in &firewall.lacking {
            self.wait(*object, reason);
        }
        let packets = std::mem::take(&mut self.wish.firewall.packets);
        self.wish.firewall = Model { packets, ..firewall };
    }
}

/// The Ethernet address of a network's bridge. Without one of its own a bridge takes the lowest of
/// its ports, and whenever that changes the kernel forgets the neighbours we told it.
fn bridge_mac(network: NetworkId) -> MacAddr {
    let [a, b, c, d, e, ..] = network.0.into_bytes();
    // Locally administered, of one station.
    MacAddr([0x0e, a, b, c, d, e])
}

/// Whether the port gets a link into its network's bridge.
fn needs_tap(port: &PortSpec) -> bool {
    matches!(port.owner, PortOwner::Instance | PortOwner::External)
}
