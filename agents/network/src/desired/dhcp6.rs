//! What DHCPv6 tells the guests of a network. It is served by whoever serves DHCPv4.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv6Net};
use stackhand_model::{
    Ipv6Mode, MacAddr, NetworkId, NetworkSpec, PortId, PortOwner, PortSpec, Subnet,
};

use super::{Builder, needs_tap};
use crate::services::dhcp6::{self, Client, Table};
use crate::services::dns;

/// Whether DHCPv6 serves a subnet.
pub(super) fn is_served(subnet: &Subnet) -> bool {
    use Ipv6Mode::{Dhcpv6Stateful, Dhcpv6Stateless};
    subnet.dhcp
        && matches!(subnet.cidr, IpNet::V6(_))
        && matches!(subnet.ipv6_mode, Some(Dhcpv6Stateful | Dhcpv6Stateless))
}

/// Who serves: a port, its Ethernet address, and its document if it has one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Server<'a> {
    pub(super) port: PortId,
    pub(super) mac: MacAddr,
    pub(super) spec: Option<&'a PortSpec>,
}

/// The DHCPv6 half of a network's server.
#[derive(Debug)]
pub(super) struct Half {
    /// The server's addresses, with the prefixes of their subnets.
    pub(super) addresses: Vec<Ipv6Net>,
    pub(super) table: Arc<Table>,
}

impl Server<'_> {
    /// The server's address on a subnet: that of its port's document, the subnet's own choice, or
    /// as guests make theirs. DHCPv6 itself works without any, DNS does not.
    pub(super) fn address(&self, subnet: &Subnet) -> Option<Ipv6Addr> {
        let IpNet::V6(net) = subnet.cidr else { return None };
        let fixed = self.spec.and_then(|port| {
            let fixed = port.fixed_ips.iter().find(|fixed| fixed.subnet == subnet.name);
            fixed.map(|fixed| fixed.address)
        });
        let made = || {
            let own = u128::from(self.mac.interface_id());
            (net.prefix_len() == 64).then(|| Ipv6Addr::from(u128::from(net.network()) | own).into())
        };
        match fixed.or(subnet.dhcp_address).or_else(made) {
            Some(IpAddr::V6(address)) => Some(address),
            _ => None,
        }
    }
}

impl<'a> Builder<'a> {
    /// Who serves DHCP on a network, on this host if `here`.
    pub(super) fn dhcp_server(&self, id: NetworkId, here: bool) -> Server<'a> {
        let is_server = |port: &PortSpec| {
            port.owner == PortOwner::Dhcp && (!here || port.host == self.local.host)
        };
        let found = self.documents.ports_of(id).find(|(_, port)| is_server(port));
        match found {
            Some((port, spec)) => Server { port, mac: spec.mac, spec: Some(spec) },
            None => {
                let (port, mac) = super::dhcp::derived(id);
                Server { port, mac, spec: None }
            }
        }
    }

    /// The DNS servers that guests of a subnet are told of by IPv6.
    pub(super) fn dns_servers6(&self, subnet: &Subnet, server: Server<'_>) -> Vec<Ipv6Addr> {
        let v6 = |address: &IpAddr| match address {
            IpAddr::V6(v6) if !v6.is_unspecified() => Some(*v6),
            _ => None,
        };
        match subnet.dns_servers.as_slice() {
            // As with IPv4: the server itself, unless others are named.
            [] if is_served(subnet) => server.address(subnet).into_iter().collect(),
            given => given.iter().filter_map(v6).collect(),
        }
    }

    /// What the network's server tells by DHCPv6, if that serves any of its subnets.
    pub(super) fn dhcp6(
        &mut self,
        id: NetworkId,
        network: &NetworkSpec,
        mtu: u32,
        search: &[String],
        only_here: bool,
    ) -> Option<Half> {
        let server = self.dhcp_server(id, true);
        let served: Vec<&Subnet> =
            network.subnets.iter().filter(|subnet| is_served(subnet)).collect();
        if served.is_empty() {
            return None;
        }
        let addresses = served.iter().filter_map(|subnet| {
            Ipv6Net::new(server.address(subnet)?, subnet.cidr.prefix_len()).ok()
        });
        let ntp = network.ntp_servers.iter().filter_map(|address| match address {
            IpAddr::V6(v6) => Some(*v6),
            IpAddr::V4(_) => None,
        });
        let table = Table {
            server: Table::name_of(server.port),
            mtu,
            dns: served.iter().flat_map(|subnet| self.dns_servers6(subnet, server)).collect(),
            search: search.to_vec(),
            ntp: ntp.collect(),
            lease_seconds: self.local.lease_seconds,
            clients: self.clients6(id, &served, only_here),
        };
        Some(Half { addresses: addresses.collect(), table: Arc::new(table) })
    }

    fn clients6(
        &mut self,
        id: NetworkId,
        served: &[&Subnet],
        only_here: bool,
    ) -> BTreeMap<MacAddr, Client> {
        let mut clients = BTreeMap::new();
        for (port, spec) in self.documents.ports_of(id) {
            if !needs_tap(spec) || (only_here && spec.host != self.local.host) {
                continue;
            }
            let on = |address: IpAddr| served.iter().find(|it| it.cidr.contains(&address));
            let known = spec.fixed_ips.iter().filter_map(|fixed| match fixed.address {
                IpAddr::V6(v6) => Some((v6, on(fixed.address)?)),
                IpAddr::V4(_) => None,
            });
            let known: Vec<_> = known.collect();
            let Some((first, _)) = known.first() else { continue };
            let options = dhcp6::extra(&spec.extra_dhcp_options).unwrap_or_else(|reason| {
                self.fail(port.object(), reason);
                BTreeMap::new()
            });
            let name = spec.dns_name.clone();
            let given = known
                .iter()
                .filter(|(_, subnet)| subnet.ipv6_mode == Some(Ipv6Mode::Dhcpv6Stateful));
            let client = Client {
                port,
                addresses: given.map(|(address, _)| *address).collect(),
                host_name: name.unwrap_or_else(|| dns::host_name_of((*first).into())),
                options,
            };
            clients.insert(spec.mac, client);
        }
        clients
    }
}
