//! A network's way out of the host: a link of the host, one VLAN of it, or an overlay.
//!
//! VXLAN has one link for all other hosts, which is told where every address is. GRE and Geneve
//! have one link for each other host (decision 8); the bridge is told which address is behind
//! which. Those links are isolated from one another, so that what came from one host never goes on
//! to another: without that, three hosts would be a loop.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use smol_str::SmolStr;
use stackhand_kernel::netlink::{BridgePort, Geneve, Gre, Vxlan};
use stackhand_model::{MacAddr, NetworkId, NetworkSpec, NetworkType};

use super::Builder;
use crate::l2::{At, Forwarding, Make, SeenKind, Set, Wanted};
use crate::names::{self, Mark};

/// UDP port of Geneve, assigned by IANA.
const GENEVE_PORT: u16 = 6081;

/// The way out of a network, and the largest packet that fits through it.
pub(super) struct Uplink {
    pub(super) limit: u32,
    pub(super) default_mtu: u32,
    /// What limits it, for messages.
    pub(super) by: String,
    kind: Kind,
}

enum Kind {
    None,
    Flat { link: String },
    Vlan { link: String, id: u16 },
    Vxlan { vni: u32, local: IpAddr },
    Gre { key: u32, local: IpAddr },
    Geneve { vni: u32, local: IpAddr },
}

/// A network's ports on other hosts.
#[derive(Default)]
struct Remote {
    /// By the other host's tunnel address: the addresses behind it.
    hosts: BTreeMap<IpAddr, BTreeSet<MacAddr>>,
    neighbours: BTreeMap<IpAddr, MacAddr>,
}

impl Builder<'_> {
    /// How the network's frames leave the host, or why they cannot.
    pub(super) fn uplink(&self, network: &NetworkSpec) -> Result<Uplink, String> {
        // Documents are checked: what the type needs is there and in range.
        let segment = network.segment.unwrap_or_default();
        let physical = network.physical_network.as_deref().unwrap_or_default();
        match network.network_type {
            NetworkType::Local => Ok(Uplink {
                limit: 65535,
                default_mtu: 1500,
                by: "a local bridge".to_owned(),
                kind: Kind::None,
            }),
            NetworkType::Flat => self.flat(physical),
            NetworkType::Vlan => {
                let (link, mtu) = self.mapped(physical)?;
                let id = u16::try_from(segment).unwrap_or_default();
                let kind = Kind::Vlan { link: link.clone(), id };
                Ok(Uplink { limit: mtu, default_mtu: mtu, by: format!("link {link}"), kind })
            }
            // What comes before the guest's packet: outer IP header, then that of the overlay,
            // then the guest's Ethernet header.
            NetworkType::Vxlan => {
                self.overlay(8 + 8 + 14, |local| Kind::Vxlan { vni: segment, local })
            }
            NetworkType::Gre => self.overlay(8 + 14, |local| Kind::Gre { key: segment, local }),
            NetworkType::Geneve => {
                self.overlay(8 + 8 + 14, |local| Kind::Geneve { vni: segment, local })
            }
        }
    }

    /// The host's link to a physical network, and its MTU.
    fn mapped(&self, physical: &str) -> Result<(&String, u32), String> {
        let host = &self.local.host;
        let own = self.documents.own.map(|(_, spec)| spec);
        let link = own.and_then(|spec| spec.bridge_mappings.get(physical)).ok_or_else(|| {
            format!(
                "host {host} has no link to physical network {physical:?}; add it to \
                 bridge_mappings of its Host document"
            )
        })?;
        let seen = self.seen.links.get(&At::host(link.clone())).ok_or_else(|| {
            format!("link {link} of physical network {physical:?} does not exist")
        })?;
        if seen.kind == SeenKind::Loopback {
            return Err(format!("link {link} is the loopback link, which leads nowhere"));
        }
        Ok((link, seen.mtu))
    }

    fn flat(&self, physical: &str) -> Result<Uplink, String> {
        let (link, mtu) = self.mapped(physical)?;
        let seen = &self.seen.links[&At::host(link.clone())];
        if let Some(net) = seen.addresses.first() {
            return Err(format!(
                "link {link} of physical network {physical:?} has address {net}, which \
                 would be cut off; use a link without addresses"
            ));
        }
        if matches!(seen.kind, SeenKind::Bridge(_)) {
            return Err(format!(
                "link {link} of physical network {physical:?} is a bridge, which no other bridge \
                 can have as its port; use the link that is in it"
            ));
        }
        let kind = Kind::Flat { link: link.clone() };
        Ok(Uplink { limit: mtu, default_mtu: mtu, by: format!("link {link}"), kind })
    }

    fn overlay(&self, overhead: u32, kind: impl FnOnce(IpAddr) -> Kind) -> Result<Uplink, String> {
        let host = &self.local.host;
        let own = self.documents.own.map(|(_, spec)| spec);
        let local = own.and_then(|spec| spec.tunnel_address).ok_or_else(|| {
            format!("host {host} has no tunnel_address; set it in its Host document")
        })?;
        let (link, mtu) = self
            .link_with(local)
            .ok_or_else(|| format!("no link of this host has the tunnel address {local}"))?;
        let outer = if local.is_ipv4() { 20 } else { 40 };
        let limit = mtu.saturating_sub(outer + overhead);
        let by = format!("link {link}");
        Ok(Uplink { limit, default_mtu: limit, by, kind: kind(local) })
    }

    /// Wants the network's links to other hosts, and what they are told. Returns their names.
    pub(super) fn wire_uplink(
        &mut self,
        (id, network): (NetworkId, &NetworkSpec),
        uplink: &Uplink,
        mtu: u32,
        bridge: &SmolStr,
        kept_apart: bool,
    ) -> BTreeSet<SmolStr> {
        let port = BridgePort { isolated: kept_apart, ..BridgePort::default() };
        let ours = |make, port| Wanted {
            object: id.object(),
            make,
            set: Set {
                mark: Some(Mark::Network(id)),
                mtu: Some(mtu),
                bridge: Some(Some(bridge.clone())),
                up: Some(true),
                ipv6_off: Some(true),
                port: Some(port),
                ..Set::default()
            },
            addresses: None,
        };
        let tunnel = BridgePort { neighbour_suppression: true, ..port };
        let mut links: BTreeMap<SmolStr, Wanted> = BTreeMap::new();
        let mut neighbours = BTreeMap::new();
        match &uplink.kind {
            Kind::None => {}
            Kind::Flat { link } => {
                let mut wanted = ours(Make::Brought, port);
                wanted.set = Set { mark: None, mtu: None, ipv6_off: None, ..wanted.set };
                links.insert(link.into(), wanted);
            }
            Kind::Vlan { link, id } => {
                self.parents.insert(link.clone());
                let make = Make::Vlan { parent: link.clone(), id: *id };
                links.insert(names::vlan(link, *id), ours(make, port));
            }
            Kind::Vxlan { vni, local } => {
                let remote = self.remote(id, network, *local);
                let name = names::vxlan(*vni);
                let make = Make::Vxlan(Vxlan {
                    vni: *vni,
                    local: Some(*local),
                    port: self.local.vxlan_port,
                    learning: false,
                });
                let mut wanted = ours(make, tunnel);
                wanted.set.learning = Some(false);
                links.insert(name.clone(), wanted);
                let mut forwarding = Forwarding::default();
                for (via, macs) in remote.hosts {
                    forwarding.flood.insert(via);
                    forwarding.unicast.extend(macs.iter().map(|mac| (*mac, [via].into())));
                    forwarding.in_bridge.extend(macs);
                }
                self.wish.l2.forwarding.insert(name, forwarding);
                neighbours = remote.neighbours;
            }
            Kind::Gre { key, local } => {
                let (key, local) = (*key, *local);
                let remote = self.remote(id, network, local);
                neighbours = remote.neighbours;
                for (via, macs) in remote.hosts {
                    let name = names::gre(id, via);
                    let make = Make::Gre(Gre { key, local, remote: via });
                    let port = BridgePort { isolated: true, ..tunnel };
                    links.insert(name.clone(), ours(make, port));
                    let forwarding = Forwarding { in_bridge: macs, ..Forwarding::default() };
                    self.wish.l2.forwarding.insert(name, forwarding);
                }
            }
            Kind::Geneve { vni, local } => {
                let remote = self.remote(id, network, *local);
                neighbours = remote.neighbours;
                for (via, macs) in remote.hosts {
                    let name = names::geneve(id, via);
                    let geneve = Geneve { vni: *vni, remote: via, port: GENEVE_PORT };
                    let port = BridgePort { isolated: true, ..tunnel };
                    links.insert(name.clone(), ours(Make::Geneve(geneve), port));
                    let forwarding = Forwarding { in_bridge: macs, ..Forwarding::default() };
                    self.wish.l2.forwarding.insert(name, forwarding);
                }
            }
        }
        self.wish.l2.neighbours.insert(bridge.clone(), neighbours);
        let wanted = |(name, wanted): (SmolStr, _)| {
            self.want(At::host(name.clone()), wanted).then_some(name)
        };
        links.into_iter().filter_map(wanted).collect()
    }

    /// What there is of the network on other hosts that can be reached from `local`.
    fn remote(&mut self, id: NetworkId, network: &NetworkSpec, local: IpAddr) -> Remote {
        let mut remote = Remote::default();
        let ports = self.documents.ports_of(id);
        for (port_id, port) in ports.filter(|(_, port)| port.host != self.local.host) {
            match self.tunnel_to(&port.host, local) {
                Ok(via) => {
                    remote.hosts.entry(via).or_default().insert(port.mac);
                    let fixed = port.fixed_ips.iter();
                    remote.neighbours.extend(fixed.map(|fixed| (fixed.address, port.mac)));
                }
                Err(reason) => self.wait(port_id.object(), reason),
            }
        }
        let servers = network.dhcp_hosts.iter().filter(|host| **host != self.local.host);
        for via in servers.filter_map(|host| self.tunnel_to(host, local).ok()) {
            remote.hosts.entry(via).or_default();
        }
        remote
    }

    /// Where another host takes packets of overlays, or why it cannot be told.
    fn tunnel_to(&self, host: &str, local: IpAddr) -> Result<IpAddr, String> {
        let via = self.documents.tunnels.get(host).copied().ok_or_else(|| {
            format!(
                "host {host} has no tunnel address here; send its Host document with \
                 tunnel_address"
            )
        })?;
        if via == local {
            return Err(format!("host {host} has this host's own tunnel address {via}"));
        }
        if via.is_ipv4() != local.is_ipv4() {
            return Err(format!(
                "host {host} has the tunnel address {via} and this host {local}; both must be \
                 IPv4 or both IPv6"
            ));
        }
        Ok(via)
    }

    /// A VLAN carries nothing while the link that it is on is down.
    pub(super) fn raise_parents(&mut self) {
        let Some((object, _)) = self.documents.own else { return };
        for link in std::mem::take(&mut self.parents) {
            let set = Set { up: Some(true), ..Set::default() };
            let wanted = Wanted { object, make: Make::Brought, set, addresses: None };
            self.wish.l2.links.entry(At::host(link)).or_insert(wanted);
        }
    }
}
