//! Which routers this host has: their links, routes and translations.
//!
//! First come the links, before networks are wired, because a network is wired here for a router's
//! sake, too. When it is known which of them could be wired, routes and translations follow. What
//! cannot be built is left out and told on its document; the rest of the router works.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use smol_str::SmolStr;
use stackhand_kernel::netlink::BridgePort;
use stackhand_model::{
    Document, FixedIp, FloatingIpId, FloatingIpSpec, NetworkId, NetworkSpec, ObjectRef, PortId,
    PortOwner, PortSpec, RouterId, RouterSpec, Spec,
};

use super::{Builder, Standing};

use crate::l2::{At, Make, ROUTING, Set, Wanted};
use crate::l3::{self, Entry, Hop};
use crate::names::{self, Mark};
use crate::services::metadata::{ADDRESS_V4, ADDRESS_V6};

/// A router of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterService {
    /// Its namespace.
    pub space: SmolStr,
    /// Its links, the gateway's first.
    pub links: Vec<RouterLink>,
}

/// A link of a router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterLink {
    /// The port.
    pub port: PortId,
    /// The network it is on.
    pub network: NetworkId,
    /// Its name in the router's namespace.
    pub link: SmolStr,
    /// Whether it is the way out.
    pub is_gateway: bool,
    /// The port's addresses with the prefixes of their subnets, in the document's order.
    pub addresses: Vec<IpNet>,
}

impl RouterService {
    /// The way out, if it has one.
    #[must_use]
    pub fn gateway(&self) -> Option<&RouterLink> {
        self.links.iter().find(|link| link.is_gateway)
    }

    /// The link on whose prefixes an address is.
    #[must_use]
    pub fn link_to(&self, address: IpAddr) -> Option<&RouterLink> {
        self.links.iter().find(|link| link.addresses.iter().any(|net| net.contains(&address)))
    }
}

impl RouterLink {
    fn first_v4(&self) -> Option<Ipv4Addr> {
        self.addresses.iter().find_map(|net| match net {
            IpNet::V4(net) => Some(net.addr()),
            IpNet::V6(_) => None,
        })
    }
}

/// What floating IPs cannot have.
#[derive(Debug, Default)]
struct Taken {
    /// Addresses of ports, by the external network that they are on.
    holders: BTreeMap<NetworkId, BTreeMap<IpAddr, PortId>>,
    /// Keys of translations, by router.
    keys: BTreeMap<RouterId, BTreeSet<(&'static str, Vec<u8>)>>,
}

impl<'a> Builder<'a> {
    /// Finds the links of this host's routers.
    pub(super) fn router_links(&mut self) {
        for (id, router) in self.all_routers() {
            if router.host != self.local.host || !router.admin_up {
                continue;
            }
            let mut service = RouterService { space: names::router_space(id), links: Vec::new() };
            let gateway = router.gateway.as_ref().map(|gateway| (gateway.port, true));
            let interfaces = router.interfaces.iter().map(|port| (*port, false));
            for (port, is_gateway) in gateway.into_iter().chain(interfaces) {
                match self.router_link(&service, port, is_gateway) {
                    Ok(link) => service.links.extend(link),
                    Err(Standing::Failed(reason)) => self.fail(id.object(), reason),
                    Err(Standing::Pending(reason)) => self.wait(id.object(), reason),
                }
            }
            self.wish.l2.spaces.insert(service.space.clone(), Mark::Router(id));
            self.wish.l2.links.insert(
                At::inside(service.space.clone(), "lo"),
                Wanted {
                    object: id.object(),
                    make: Make::Loopback,
                    set: Set { mark: Some(Mark::Router(id)), up: Some(true), ..Set::default() },
                    addresses: Some(BTreeSet::from([IpNet::V4(Ipv4Net::from(ADDRESS_V4))])),
                },
            );
            self.routed.extend(service.links.iter().map(|link| (link.port, id)));
            self.routed_networks.extend(service.links.iter().map(|link| link.network));
            self.wish.routers.insert(id, service);
        }
    }

    /// All routers, of this host and of others.
    fn all_routers(&self) -> Vec<(RouterId, &'a RouterSpec)> {
        let of = |document: &&'a Document| match &document.spec {
            Spec::Router(router) => Some((RouterId(document.id), router)),
            _ => None,
        };
        self.documents.others.iter().filter_map(of).collect()
    }

    /// The link of a router's port; nothing if the port is down; or why there is none.
    fn router_link(
        &self,
        service: &RouterService,
        port: PortId,
        is_gateway: bool,
    ) -> Result<Option<RouterLink>, Standing> {
        let field = if is_gateway { "gateway.port" } else { "interfaces" };
        let failed = |text: String| Err(Standing::Failed(format!("{field}: port {port} {text}")));
        let Some(&spec) = self.documents.by_id.get(&port) else {
            let reason = format!("waits for the document of port {port} ({field})");
            return Err(Standing::Pending(reason));
        };
        let Some(network) = self.documents.networks.get(&spec.network) else {
            let reason =
                format!("waits for the document of network {} of port {port}", spec.network);
            return Err(Standing::Pending(reason));
        };
        let (owner, word) = if is_gateway {
            (PortOwner::RouterGateway, "router-gateway")
        } else {
            (PortOwner::RouterInterface, "router-interface")
        };
        if spec.owner != owner {
            return failed(format!("is not a router's; set its owner to {word}"));
        }
        if spec.host != self.local.host {
            return failed(format!(
                "is on host {}; set its host to {}, which has the router",
                spec.host, self.local.host
            ));
        }
        if is_gateway && !network.external {
            return failed(format!(
                "is on network {}, which is not external; set external there, or take another",
                spec.network
            ));
        }
        if spec.fixed_ips.is_empty() {
            return failed("has no address; give it a fixed IP".to_owned());
        }
        if let Some(other) = self.routed.get(&port) {
            return failed(format!("belongs to router {other}, too; give each a port of its own"));
        }
        if !spec.admin_up {
            return Ok(None);
        }
        let addresses = addresses(spec, network);
        for net in &addresses {
            let clash = service.links.iter().find_map(|link| {
                let overlaps =
                    |other: &&IpNet| other.contains(&net.trunc()) || net.contains(&other.trunc());
                link.addresses.iter().find(overlaps).map(|other| (link.port, other.trunc()))
            });
            if let Some((other, prefix)) = clash {
                return failed(format!(
                    "is on {}, which overlaps {prefix} of port {other}; a router cannot tell \
                     them apart",
                    net.trunc()
                ));
            }
        }
        let link = if is_gateway { names::gateway_link(port) } else { names::router_link(port) };
        Ok(Some(RouterLink { port, network: spec.network, link, is_gateway, addresses }))
    }

    /// Wants the pair that joins a router's port to its network's bridge.
    pub(super) fn router_port(&mut self, id: PortId, port: &PortSpec, mtu: u32, bridge: &SmolStr) {
        let router = self.routed.get(&id).and_then(|router| self.wish.routers.get(router));
        let found = router.and_then(|router| {
            let link = router.links.iter().find(|link| link.port == id)?;
            Some((At::inside(router.space.clone(), link.link.clone()), link.addresses.clone()))
        });
        let Some((far, mut addresses)) = found else {
            let claimed = self.all_routers().iter().any(|(_, router)| {
                let gateway = router.gateway.as_ref().map(|gateway| gateway.port);
                gateway == Some(id) || router.interfaces.contains(&id)
            });
            if !claimed {
                self.wait(id.object(), "waits for a router that has it");
            }
            return;
        };
        let has_v6 = addresses.iter().any(|net| matches!(net, IpNet::V6(_)));
        if has_v6 && port.owner == PortOwner::RouterInterface {
            addresses.extend(IpNet::new(ADDRESS_V6.into(), 64).ok());
        }
        let common =
            Set { mark: Some(Mark::Port(id)), mtu: Some(mtu), up: Some(true), ..Set::default() };
        let near = Wanted {
            object: id.object(),
            make: Make::Pair { peer: far.clone(), peer_mac: port.mac },
            set: Set {
                bridge: Some(Some(bridge.clone())),
                ipv6_off: Some(true),
                port: Some(BridgePort::default()),
                ..common.clone()
            },
            addresses: None,
        };
        if !self.want(At::host(names::tap(id)), near) {
            return;
        }
        let end = Wanted {
            object: id.object(),
            make: Make::PairEnd,
            set: Set {
                mac: Some(port.mac),
                ipv6_off: Some(!has_v6),
                routing: Some(ROUTING),
                ..common
            },
            addresses: Some(addresses.into_iter().collect()),
        };
        self.want(far, end);
    }

    /// Computes routes and translations, now that it is known what could be wired.
    pub(super) fn router_tables(&mut self) {
        for (id, router) in self.all_routers() {
            let Some(service) = self.wish.routers.get(&id).cloned() else { continue };
            let missing = service.links.iter().find(|link| {
                !self
                    .wish
                    .l2
                    .links
                    .contains_key(&At::inside(service.space.clone(), link.link.clone()))
            });
            if let Some(link) = missing {
                let reason = match self.wish.standing.get(&link.network.object()) {
                    Some(Standing::Failed(why) | Standing::Pending(why)) => why.clone(),
                    None => "its port cannot be made".to_owned(),
                };
                let text =
                    format!("waits for network {} of port {}: {reason}", link.network, link.port);
                self.wait(id.object(), text);
            }
            let mut wanted = l3::Wanted {
                object: id.object(),
                routes: self.routes(id, router, &service),
                nat: BTreeSet::new(),
                owners: BTreeMap::new(),
            };
            let gateway = service.gateway().cloned();
            if let Some(gateway) = &gateway
                && let Some(address) = gateway.first_v4()
            {
                let snat = router.gateway.as_ref().is_some_and(|gateway| gateway.snat);
                for link in service.links.iter().filter(|link| snat || !link.is_gateway) {
                    wanted.nat.insert(Entry::Masked { link: link.link.to_string(), address });
                }
            }
            self.wish.l3.insert(service.space.clone(), wanted);
        }
        self.floating_ips();
    }

    fn routes(
        &mut self,
        id: RouterId,
        router: &RouterSpec,
        service: &RouterService,
    ) -> BTreeMap<IpNet, BTreeSet<Hop>> {
        let mut routes: BTreeMap<IpNet, BTreeSet<Hop>> = BTreeMap::new();
        let connected: BTreeSet<IpNet> =
            service.links.iter().flat_map(|link| link.addresses.iter().map(IpNet::trunc)).collect();
        for link in &service.links {
            let Some(network) = self.documents.networks.get(&link.network) else { continue };
            for subnet in &network.subnets {
                let overlaps =
                    |net: &IpNet| net.contains(&subnet.cidr) || subnet.cidr.contains(net);
                if connected.contains(&subnet.cidr) {
                    let Some(gateway) = subnet.gateway.filter(|_| link.is_gateway) else {
                        continue;
                    };
                    let hop = Hop { via: Some(gateway), link: link.link.clone() };
                    // The first subnet of a family that has one.
                    routes.entry(default_route(gateway)).or_insert_with(|| BTreeSet::from([hop]));
                } else if !connected.iter().any(overlaps) {
                    // Neighbours on a subnet that the router has no address on.
                    let hop = Hop { via: None, link: link.link.clone() };
                    routes.entry(subnet.cidr).or_insert_with(|| BTreeSet::from([hop]));
                }
            }
        }
        let mut asked: BTreeMap<IpNet, BTreeSet<Hop>> = BTreeMap::new();
        for (index, route) in router.routes.iter().enumerate() {
            let destination = route.destination.trunc();
            let own = service
                .links
                .iter()
                .any(|link| link.addresses.iter().any(|net| net.addr() == route.next_hop));
            let Some(link) = service.link_to(route.next_hop).filter(|_| !own) else {
                let text = if own { "is the router itself" } else { "is on none of its subnets" };
                self.fail(
                    id.object(),
                    format!("routes[{index}].next_hop: {} {text}", route.next_hop),
                );
                continue;
            };
            if connected.contains(&destination) {
                self.fail(
                    id.object(),
                    format!("routes[{index}].destination: {destination} is a subnet of its own"),
                );
                continue;
            }
            let hop = Hop { via: Some(route.next_hop), link: link.link.clone() };
            asked.entry(destination).or_default().insert(hop);
        }
        // What is asked for comes before what follows from subnets.
        routes.extend(asked);
        routes
    }

    fn floating_ips(&mut self) {
        let floating: Vec<(FloatingIpId, &'a FloatingIpSpec)> = self
            .documents
            .others
            .iter()
            .filter_map(|document| match &document.spec {
                Spec::FloatingIp(spec) => Some((FloatingIpId(document.id), spec)),
                _ => None,
            })
            .collect();
        // Taken out, so that they can be read while the rest of the wish is written.
        let routers = std::mem::take(&mut self.wish.routers);
        let mut taken = Taken::default();
        for (id, spec) in floating {
            let Some(service) = routers.get(&spec.router) else {
                if !self.all_routers().iter().any(|(router, _)| *router == spec.router) {
                    self.wait(
                        id.object(),
                        format!("waits for the document of router {}", spec.router),
                    );
                }
                continue;
            };
            match self.floating_ip(service, id.object(), spec, &mut taken) {
                Ok(()) => {}
                Err(Standing::Failed(reason)) => self.fail(id.object(), reason),
                Err(Standing::Pending(reason)) => self.wait(id.object(), reason),
            }
        }
        self.wish.routers = routers;
        for &(object, spec) in &self.documents.leaving_floating {
            if let IpAddr::V4(address) = spec.address
                && let Some(service) = self.wish.routers.get(&spec.router)
                && let Some(wanted) = self.wish.l3.get_mut(&service.space)
            {
                wanted.owners.entry(address).or_insert(object);
            }
        }
    }

    fn floating_ip(
        &mut self,
        service: &RouterService,
        object: ObjectRef,
        spec: &FloatingIpSpec,
        taken: &mut Taken,
    ) -> Result<(), Standing> {
        let failed = |text: String| Err(Standing::Failed(text));
        let IpAddr::V4(address) = spec.address else {
            return failed(format!(
                "address: {} is IPv6, which needs no translation; route to the port's own address",
                spec.address
            ));
        };
        if spec.port.is_none() && spec.port_forwardings.is_empty() {
            return Ok(());
        }
        let Some(gateway) = service.gateway() else {
            return failed(format!(
                "router {} has no gateway; give it one on the network of {address}",
                spec.router
            ));
        };
        if let Some(network) = self.documents.networks.get(&gateway.network)
            && !network.subnets.iter().any(|subnet| subnet.cidr.contains(&spec.address))
        {
            return failed(format!(
                "address: {address} is on no subnet of network {}, where the router's gateway is",
                gateway.network
            ));
        }
        let entries = self.translations(service, gateway, address, spec)?;
        let holders = taken.holders.entry(gateway.network).or_insert_with(|| {
            let ports = self.documents.ports_of(gateway.network);
            let addresses = |(id, port): (PortId, &'a PortSpec)| {
                port.fixed_ips.iter().map(move |fixed| (fixed.address, id))
            };
            ports.flat_map(addresses).collect()
        });
        if let Some(port) = holders.get(&spec.address) {
            return failed(format!("address: {address} is that of port {port}; take a free one"));
        }
        let qg = At::inside(service.space.clone(), gateway.link.clone());
        let (Some(wanted), Some(link)) =
            (self.wish.l3.get_mut(&service.space), self.wish.l2.links.get_mut(&qg))
        else {
            let text = format!("waits for the gateway of router {}", spec.router);
            return Err(Standing::Pending(text));
        };
        if let Some(other) = wanted.owners.get(&address) {
            return failed(format!("address: {address} is that of {other}, too; take a free one"));
        }
        let keys = taken.keys.entry(spec.router).or_insert_with(|| {
            // Of what was there before any floating IP.
            wanted.nat.iter().map(Entry::key).collect()
        });
        if let Some(taken) = entries.iter().find(|entry| keys.contains(&entry.key())) {
            return failed(match taken {
                Entry::Fixed { fixed, .. } => {
                    format!("fixed address {fixed} has another floating IP; free it first")
                }
                other => format!("{other} contradicts another translation"),
            });
        }
        wanted.owners.insert(address, object);
        keys.extend(entries.iter().map(Entry::key));
        wanted.nat.extend(entries);
        link.addresses.get_or_insert_default().insert(IpNet::V4(Ipv4Net::from(address)));
        Ok(())
    }

    /// The elements that a floating IP asks for.
    fn translations(
        &self,
        service: &RouterService,
        gateway: &RouterLink,
        address: Ipv4Addr,
        spec: &FloatingIpSpec,
    ) -> Result<BTreeSet<Entry>, Standing> {
        let inside = |field: &str, to: IpAddr| match to {
            IpAddr::V4(v4) if service.link_to(to).is_some_and(|link| link.port != gateway.port) => {
                Ok(v4)
            }
            _ => Err(Standing::Failed(format!(
                "{field}: {to} is on no internal IPv4 subnet of router {}; give the router an \
                 interface there",
                spec.router
            ))),
        };
        let Some(port) = spec.port else {
            let mut entries = BTreeSet::new();
            for (index, forward) in spec.port_forwardings.iter().enumerate() {
                let field = format!("port_forwardings[{index}].internal_address");
                let to = inside(&field, forward.internal_address)?;
                let protocol = forward.protocol_number();
                let pairs = forward.pairs();
                entries.extend(pairs.map(|(port, to_port)| Entry::Forwarded {
                    protocol,
                    address,
                    port,
                    to,
                    to_port,
                }));
            }
            return Ok(entries);
        };
        let Some(&target) = self.documents.by_id.get(&port) else {
            return Err(Standing::Pending(format!("waits for the document of port {port}")));
        };
        let first = || target.fixed_ips.iter().map(|fixed| fixed.address).find(IpAddr::is_ipv4);
        let Some(fixed) = spec.fixed_address.or_else(first) else {
            return Err(Standing::Failed(format!("port: {port} has no IPv4 address")));
        };
        if !target.fixed_ips.iter().any(|own| own.address == fixed) {
            return Err(Standing::Failed(format!("fixed_address: port {port} has no {fixed}")));
        }
        let on = service.link_to(fixed).map(|link| link.network);
        if on.is_some_and(|network| network != target.network) {
            return Err(Standing::Failed(format!(
                "port: {port} is on network {}, where router {} has no interface",
                target.network, spec.router
            )));
        }
        let fixed = inside("fixed_address", fixed)?;
        Ok(BTreeSet::from([Entry::Floating { address, fixed }, Entry::Fixed { fixed, address }]))
    }
}

/// A port's addresses with the prefixes of their subnets.
fn addresses(port: &PortSpec, network: &NetworkSpec) -> Vec<IpNet> {
    let net = |fixed: &FixedIp| {
        let subnet = network.subnet(&fixed.subnet)?;
        IpNet::new(fixed.address, subnet.cidr.prefix_len()).ok()
    };
    port.fixed_ips.iter().filter_map(net).collect()
}

fn default_route(gateway: IpAddr) -> IpNet {
    let anywhere = match gateway {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    };
    IpNet::new_assert(anywhere, 0)
}
