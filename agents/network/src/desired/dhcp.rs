//! Which DHCP servers this host has, and what they tell.
//!
//! A network without `dhcp_hosts` is served by every host that has a guest of it. All those servers
//! have the same address and the same Ethernet address, and each hears only the guests of its own
//! host, because the server's port and the uplink are isolated from one another on the bridge.
//! So no guest depends on another host, and no two servers meet.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use smol_str::SmolStr;
use stackhand_kernel::netlink::BridgePort;
use stackhand_model::{MacAddr, NetworkId, PortId};
use stackhand_model::{NetworkSpec, PortOwner, PortSpec, Subnet};
use uuid::Uuid;

use super::dhcp6::Server;
use super::{Builder, dhcp6, needs_tap};
use crate::l2::{At, Make, SERVING, Set, Wanted};
use crate::names::{self, Mark};
use crate::services::dhcp::{self, Client, Scope, Table};
use crate::services::metadata::{ADDRESS_V4, ADDRESS_V6};
use crate::services::{Site, dns};

/// Whether this host serves the network's guests.
pub(super) fn serves(network: &NetworkSpec, host: &str, has_taps: bool) -> bool {
    let wanted = network.subnets.iter().any(|it| is_served(it) || dhcp6::is_served(it));
    wanted
        && if network.dhcp_hosts.is_empty() { has_taps } else { network.dhcp_hosts.contains(host) }
}

fn is_served(subnet: &Subnet) -> bool {
    subnet.dhcp && matches!(subnet.cidr, IpNet::V4(_))
}

impl Builder<'_> {
    /// Wants the network's DHCP server. Returns whether it is to be kept apart from other hosts, or
    /// nothing if there is no server.
    pub(super) fn dhcp(
        &mut self,
        id: NetworkId,
        network: &NetworkSpec,
        mtu: u32,
        bridge: &SmolStr,
    ) -> Option<bool> {
        let Server { port, mac, spec: own } = self.dhcp_server(id, true);
        if own.is_none() && network.dhcp_hosts.len() > 1 {
            self.fail(
                id.object(),
                format!(
                    "several dhcp_hosts need a port with owner dhcp on each, and host {} has none; \
                     add one, or leave dhcp_hosts out so that every host serves its own guests",
                    self.local.host
                ),
            );
            return None;
        }
        let kept_apart = own.is_none() && network.dhcp_hosts.is_empty();
        let mut scopes = Vec::new();
        let mut addresses = BTreeSet::new();
        for subnet in network.subnets.iter().filter(|subnet| is_served(subnet)) {
            let IpNet::V4(net) = subnet.cidr else { continue };
            let Some(server) = self.server_address(id, subnet, own) else {
                self.fail(
                    id.object(),
                    format!(
                        "subnet {} has no address for its DHCP server; set its dhcp_address to a \
                         free address, or turn its dhcp off",
                        subnet.name
                    ),
                );
                continue;
            };
            scopes.push(self.scope(id, subnet, net, server));
            addresses.extend(Ipv4Net::new(server, net.prefix_len()).map(IpNet::V4));
        }
        let domain = self.domain(network);
        let mut search = vec![domain.clone()];
        search.extend(network.search_domains.iter().filter(|name| **name != domain).cloned());
        let six = self.dhcp6(id, network, mtu, &search, kept_apart);
        if scopes.is_empty() && six.is_none() {
            return None;
        }
        let own6 = six.iter().flat_map(|six| &six.addresses);
        let mut servers: BTreeSet<IpAddr> = own6.clone().map(|net| net.addr().into()).collect();
        servers.extend(scopes.iter().map(|scope| IpAddr::V4(scope.server)));
        addresses.extend(own6.copied().map(IpNet::V6));
        let mut listen = BTreeSet::from([IpAddr::V4(ADDRESS_V4)]);
        if six.is_some() && self.is_metadata6_ours(id, network) {
            listen.insert(ADDRESS_V6.into());
            addresses.extend(IpNet::new(ADDRESS_V6.into(), 64));
        }
        addresses.insert(IpNet::V4(Ipv4Net::from(ADDRESS_V4)));
        let space = names::dhcp_space(id);
        let near = At::host(names::tap(port));
        let far = At::inside(space.clone(), names::dhcp_link(port));
        let common =
            Set { mark: Some(Mark::Dhcp(id)), mtu: Some(mtu), up: Some(true), ..Set::default() };
        let wanted = Wanted {
            object: id.object(),
            make: Make::Pair { peer: far.clone(), peer_mac: mac },
            set: Set {
                bridge: Some(Some(bridge.clone())),
                port: Some(BridgePort { isolated: kept_apart, ..BridgePort::default() }),
                ipv6_off: Some(true),
                ..common.clone()
            },
            addresses: None,
        };
        if !self.want(near, wanted) {
            return None;
        }
        let wanted = Wanted {
            object: id.object(),
            make: Make::PairEnd,
            set: Set {
                mac: Some(mac),
                ipv6_off: Some(six.is_none()),
                routing: six.as_ref().map(|_| SERVING),
                ..common
            },
            addresses: Some(addresses),
        };
        self.want(far.clone(), wanted);
        self.wish.l2.spaces.insert(space, Mark::Network(id));
        let clients = self.clients(id, &scopes, kept_apart);
        let metadata = self.metadata(&[id], listen);
        let site = Site {
            dns: Some(Arc::new(self.zone(id, network, servers))),
            metadata: Some(Arc::new(metadata)),
            dhcp6: six.map(|six| six.table),
            ..Site::of(id.object())
        };
        let table = Table {
            mtu,
            domain: Some(domain),
            search,
            ntp: network.ntp_servers.iter().filter_map(v4).collect(),
            lease_seconds: self.local.lease_seconds,
            scopes,
            clients,
        };
        let site = Site { dhcp: (!table.scopes.is_empty()).then(|| Arc::new(table)), ..site };
        self.wish.services.insert(far, site);
        Some(kept_apart)
    }

    /// Whether the metadata service's IPv6 address is this server's: nobody else on the network may
    /// have it.
    fn is_metadata6_ours(&self, id: NetworkId, network: &NetworkSpec) -> bool {
        let mut routers = self
            .documents
            .ports_of(id)
            .filter(|(_, port)| port.owner == PortOwner::RouterInterface);
        let routed = routers.any(|(_, port)| port.fixed_ips.iter().any(|it| it.address.is_ipv6()));
        !routed && network.dhcp_hosts.len() <= 1
    }

    /// The address of the DHCP port on a subnet: that of its port document, the subnet's own
    /// choice, or the gateway's if no port has it.
    fn server_address(
        &self,
        network: NetworkId,
        subnet: &Subnet,
        port: Option<&PortSpec>,
    ) -> Option<Ipv4Addr> {
        let fixed = port.and_then(|port| {
            port.fixed_ips
                .iter()
                .find(|fixed| fixed.subnet == subnet.name)
                .map(|fixed| fixed.address)
        });
        let gateway = subnet.gateway.filter(|gateway| !self.has_port(network, *gateway));
        fixed.or(subnet.dhcp_address).or(gateway).as_ref().and_then(v4)
    }

    /// Whether a port of the network has the address.
    fn has_port(&self, network: NetworkId, address: IpAddr) -> bool {
        self.documents
            .ports_of(network)
            .any(|(_, port)| port.fixed_ips.iter().any(|fixed| fixed.address == address))
    }

    fn scope(&self, id: NetworkId, subnet: &Subnet, net: Ipv4Net, server: Ipv4Addr) -> Scope {
        let router = subnet.gateway.as_ref().and_then(v4);
        // A router answers for the metadata service where there is one.
        let routed = subnet.gateway.is_some_and(|gateway| self.has_port(id, gateway));
        let metadata_by = if routed { router } else { Some(server) };
        let given = subnet.host_routes.iter().map(|route| (route.destination, route.next_hop));
        // As dnsmasq does: the server itself, unless others are named; 0.0.0.0 says: nobody.
        let dns = match subnet.dns_servers.as_slice() {
            [] => vec![server],
            given => given.iter().filter_map(v4).filter(|it| !it.is_unspecified()).collect(),
        };
        Scope { net, server, router, dns, routes: dhcp::routes(given, router, metadata_by) }
    }

    fn clients(
        &mut self,
        id: NetworkId,
        scopes: &[Scope],
        only_here: bool,
    ) -> BTreeMap<MacAddr, Client> {
        let mut clients = BTreeMap::new();
        for (port, spec) in self.documents.ports_of(id) {
            if !needs_tap(spec) || (only_here && spec.host != self.local.host) {
                continue;
            }
            let found = spec.fixed_ips.iter().find_map(|fixed| {
                let IpAddr::V4(address) = fixed.address else { return None };
                let scope = scopes.iter().position(|scope| scope.net.contains(&address))?;
                Some((address, scope))
            });
            let Some((address, scope)) = found else { continue };
            let extra = dhcp::extra(&spec.extra_dhcp_options).unwrap_or_else(|reason| {
                self.fail(port.object(), reason);
                dhcp::Extra::default()
            });
            let host_name =
                spec.dns_name.clone().unwrap_or_else(|| dns::host_name_of(address.into()));
            let client = Client {
                port,
                address,
                scope,
                host_name,
                options: extra.options,
                next_server: extra.next_server,
            };
            clients.insert(spec.mac, client);
        }
        clients
    }
}

fn v4(address: &IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(v4) => Some(*v4),
        IpAddr::V6(_) => None,
    }
}

/// The DHCP port of a network whose documents name none: the same on every host.
pub(super) fn derived(network: NetworkId) -> (PortId, MacAddr) {
    let id = Uuid::new_v5(&network.0, b"stackhand:dhcp");
    let [a, b, c, ..] = id.into_bytes();
    (PortId(id), MacAddr([0xfa, 0x16, 0x3f, a, b, c]))
}
