//! What guests of a network are told besides their addresses: names, and who they are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv6Net};
use stackhand_model::{
    InstanceId, InstancePort, Ipv6Mode, NetworkId, NetworkSpec, PortId, PortSpec,
};
use uuid::Uuid;

use super::{Builder, RouterLink, needs_tap};
use crate::l2::At;
use crate::services::Site;
use crate::services::dns::{self, Zone};
use crate::services::metadata::{ADDRESS_V4, ADDRESS_V6, Known, Table};
use crate::services::ra::{Advert, Prefix};

impl Builder<'_> {
    /// What this host's routers serve to the guests behind them.
    pub(super) fn router_services(&mut self) {
        let mut sites = Vec::new();
        for (id, router) in &self.wish.routers {
            let inner = || router.links.iter().filter(|link| !link.is_gateway);
            // The address is the router's own, whichever link a guest comes by.
            let networks: Vec<NetworkId> = inner().map(|link| link.network).collect();
            let metadata = Arc::new(self.metadata(&networks, [ADDRESS_V4.into()].into()));
            let site = Site { metadata: Some(metadata), ..Site::of(id.object()) };
            sites.push((At::inside(router.space.clone(), "lo"), site));
            let with_v6 = |link: &&RouterLink| link.addresses.iter().any(|it| it.addr().is_ipv6());
            for link in inner().filter(with_v6) {
                let metadata = self.metadata(&[link.network], [ADDRESS_V6.into()].into());
                let site = Site {
                    metadata: Some(Arc::new(metadata)),
                    ra: self.advert(link).map(Arc::new),
                    ..Site::of(id.object())
                };
                sites.push((At::inside(router.space.clone(), link.link.clone()), site));
            }
        }
        self.wish.services.extend(sites);
    }

    /// What a router says of itself on a link. Subnets without a mode, or whose `dhcp` is off, are
    /// left to whoever set them up.
    fn advert(&self, link: &RouterLink) -> Option<Advert> {
        let network = self.documents.networks.get(&link.network)?;
        let mut advert = Advert {
            mtu: self.wish.wired.get(&link.network).map_or(0, |wired| wired.mtu),
            search: vec![self.domain(network)],
            routes: vec![Ipv6Net::from(ADDRESS_V6)],
            ..Advert::default()
        };
        advert.search.extend(network.search_domains.iter().cloned());
        let server = self.dhcp_server(link.network, false);
        for subnet in &network.subnets {
            let (IpNet::V6(net), Some(mode)) = (subnet.cidr, subnet.ipv6_mode) else { continue };
            let own = |own: &IpNet| subnet.cidr.contains(&own.addr());
            if !subnet.dhcp || !link.addresses.iter().any(own) {
                continue;
            }
            advert.managed |= mode == Ipv6Mode::Dhcpv6Stateful;
            advert.other |= mode == Ipv6Mode::Dhcpv6Stateless;
            // Addresses are made of 64 bits alone.
            let autonomous = mode != Ipv6Mode::Dhcpv6Stateful && net.prefix_len() == 64;
            advert.prefixes.push(Prefix { net, autonomous });
            advert.dns.extend(self.dns_servers6(subnet, server));
        }
        (!advert.prefixes.is_empty()).then_some(advert)
    }

    /// The names of a network's ports, served on `servers`.
    pub(super) fn zone(
        &self,
        id: NetworkId,
        network: &NetworkSpec,
        servers: BTreeSet<IpAddr>,
    ) -> Zone {
        // The subnets' own servers know the tenant's names; the host's know the world's.
        let own: BTreeSet<IpAddr> = network
            .subnets
            .iter()
            .flat_map(|subnet| subnet.dns_servers.iter().copied())
            .filter(|server| may_be_asked(*server) && !servers.contains(server))
            .collect();
        let forwarders = if own.is_empty() {
            self.local.dns_forwarders.clone()
        } else {
            own.into_iter().collect()
        };
        let mut zone = Zone {
            domain: self.domain(network),
            servers,
            nets: network.subnets.iter().map(|subnet| subnet.cidr).collect(),
            forwarders,
            ..Zone::default()
        };
        for (_, port) in self.documents.ports_of(id) {
            for fixed in &port.fixed_ips {
                match &port.dns_name {
                    Some(name) => zone.add(name, fixed.address),
                    None => zone.add(&dns::host_name_of(fixed.address), fixed.address),
                }
            }
        }
        zone
    }

    /// The domain of a network's ports, in lower case, without a final dot.
    pub(super) fn domain(&self, network: &NetworkSpec) -> String {
        let domain = network.dns_domain.as_ref().unwrap_or(&self.local.dns_domain);
        domain.trim_end_matches('.').to_ascii_lowercase()
    }

    /// The guests of some networks by the addresses that they ask from. Of two that share one, which
    /// only a mistake can cause, neither is told anything.
    pub(super) fn metadata(&self, networks: &[NetworkId], listen: BTreeSet<IpAddr>) -> Table {
        let mut guests: BTreeMap<IpAddr, Option<Arc<Known>>> = BTreeMap::new();
        for id in networks {
            let Some(network) = self.documents.networks.get(id) else { continue };
            for (port, spec) in self.documents.ports_of(*id).filter(|(_, port)| needs_tap(port)) {
                let Some(known) = self.known(port, spec, network) else { continue };
                let known = Arc::new(known);
                let fixed = spec.fixed_ips.iter().map(|fixed| fixed.address);
                for address in fixed.chain([spec.mac.link_local().into()]) {
                    let unique = || Some(Arc::clone(&known));
                    guests.entry(address).and_modify(|held| *held = None).or_insert_with(unique);
                }
            }
        }
        let guests = guests.into_iter().filter_map(|(address, known)| Some((address, known?)));
        Table { listen, guests: guests.collect() }
    }

    fn known(&self, port: PortId, spec: &PortSpec, network: &NetworkSpec) -> Option<Known> {
        let data = Arc::clone(spec.guest.as_ref()?);
        let id = guest_id(port, spec);
        let name = match (&data.name, &spec.dns_name) {
            (Some(name), _) => name.as_str().to_owned(),
            (None, Some(name)) => name.clone(),
            (None, None) => id.to_string(),
        };
        Some(Known {
            port,
            id,
            name,
            data,
            interfaces: self.interfaces(port, spec),
            domain: self.domain(network),
        })
    }

    /// All interfaces of the guest behind a port that this host knows of.
    fn interfaces(&self, port: PortId, spec: &PortSpec) -> Vec<InstancePort> {
        let own = [(port, spec)];
        let all: &[(PortId, &PortSpec)] = match spec.device {
            Some(device) => self.documents.by_device.get(&device).map_or(&own, Vec::as_slice),
            None => &own,
        };
        let told = |(port, spec): &(PortId, &PortSpec)| {
            let network = self.documents.networks.get(&spec.network);
            InstancePort {
                port: *port,
                mac: spec.mac,
                mtu: network.and_then(|network| network.mtu),
                queues: spec.queues,
                network: Some(spec.network),
                addresses: network.map(|it| it.guest_addresses(spec)).unwrap_or_default(),
            }
        };
        all.iter().map(told).collect()
    }
}

/// The guest behind a port; a port without an instance is a guest of its own.
pub(crate) fn guest_id(port: PortId, spec: &PortSpec) -> InstanceId {
    InstanceId(spec.device.unwrap_or(port.0))
}

/// Ports by the instance that they belong to.
pub(super) type ByDevice<'a> = BTreeMap<Uuid, Vec<(PortId, &'a PortSpec)>>;

/// Whether a server that a tenant names may be asked on its behalf: from the host, so not one that
/// only the host can reach.
fn may_be_asked(server: IpAddr) -> bool {
    let near = match server {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    !(near || server.is_loopback() || server.is_unspecified() || server.is_multicast())
}
