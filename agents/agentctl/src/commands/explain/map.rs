//! Who is next on the way of a packet, from documents. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use stackhand_model::{
    FloatingIpSpec, NetworkId, NetworkSpec, PortId, PortSpec, RouterId, RouterSpec, Spec,
};

use crate::objects::ObjectRow;

/// A port, with the row that it is shown by.
#[derive(Clone, Copy, Debug)]
pub(super) struct PortAt<'a> {
    pub(super) row: &'a ObjectRow,
    pub(super) spec: &'a PortSpec,
}

/// A router, with the row that it is shown by.
#[derive(Clone, Copy, Debug)]
pub(super) struct RouterAt<'a> {
    pub(super) row: &'a ObjectRow,
    pub(super) spec: &'a RouterSpec,
}

/// Who has an address on a network.
#[derive(Clone, Copy, Debug)]
pub(super) enum Holder<'a> {
    /// A router, by this port of it.
    Router(RouterAt<'a>, PortAt<'a>),
    /// Any other port.
    Port(PortAt<'a>),
}

/// What documents say of networks, and of what joins them.
#[derive(Debug, Default)]
pub(super) struct Map<'a> {
    networks: BTreeMap<NetworkId, &'a NetworkSpec>,
    ports: BTreeMap<PortId, PortAt<'a>>,
    routers: BTreeMap<RouterId, RouterAt<'a>>,
    floating: Vec<&'a FloatingIpSpec>,
}

impl<'a> Map<'a> {
    pub(super) fn new(rows: &'a [ObjectRow]) -> Self {
        let mut map = Self::default();
        for row in rows {
            match &row.document.spec {
                Spec::Network(spec) => drop(map.networks.insert(NetworkId(row.id), spec)),
                Spec::Port(spec) => drop(map.ports.insert(PortId(row.id), PortAt { row, spec })),
                Spec::Router(spec) => {
                    map.routers.insert(RouterId(row.id), RouterAt { row, spec });
                }
                Spec::FloatingIp(spec) => map.floating.push(spec),
                _ => {}
            }
        }
        map
    }

    pub(super) fn port(&self, id: PortId) -> Option<PortAt<'a>> {
        self.ports.get(&id).copied()
    }

    /// The address by which `from` reaches `to`, whose own address is `own`: its floating IP, if it
    /// has one and no router joins their networks.
    pub(super) fn destination(&self, from: PortAt<'a>, to: PortAt<'a>, own: IpAddr) -> IpAddr {
        let (one, other) = (from.spec.network, to.spec.network);
        let is_on = |router: &RouterSpec, network| {
            router
                .interfaces
                .iter()
                .any(|port| self.port(*port).is_some_and(|port| port.spec.network == network))
        };
        let joined = |router: &RouterAt<'_>| is_on(router.spec, one) && is_on(router.spec, other);
        if one == other || self.routers.values().any(joined) {
            return own;
        }
        let leads = |floating: &&&FloatingIpSpec| {
            floating.port == Some(PortId(to.row.id)) && floating.address.is_ipv4() == own.is_ipv4()
        };
        self.floating.iter().find(leads).map_or(own, |floating| floating.address)
    }

    /// Whom a guest sends what is for `destination` to.
    pub(super) fn first_hop(
        &self,
        from: PortAt<'a>,
        source: IpAddr,
        destination: IpAddr,
    ) -> Result<IpAddr, String> {
        let network = from.spec.network;
        let Some(spec) = self.networks.get(&network) else {
            return Err(format!("no agent holds the document of network {network}"));
        };
        if spec.subnets.iter().any(|subnet| subnet.cidr.contains(&destination)) {
            return Ok(destination);
        }
        let subnet = spec.subnets.iter().find(|subnet| subnet.cidr.contains(&source));
        subnet.and_then(|subnet| subnet.gateway).ok_or_else(|| {
            format!("{destination} is on no subnet of network {network}, which has no gateway")
        })
    }

    /// Who has `address` on a network.
    pub(super) fn holder(&self, network: NetworkId, address: IpAddr) -> Option<Holder<'a>> {
        let has = |port: &&PortAt<'a>| {
            port.spec.network == network
                && port.spec.fixed_ips.iter().any(|fixed| fixed.address == address)
        };
        if let Some(port) = self.ports.values().find(has) {
            let router = self.routers.values().find(|router| {
                let id = PortId(port.row.id);
                let gateway = router.spec.gateway.as_ref().map(|gateway| gateway.port);
                gateway == Some(id) || router.spec.interfaces.contains(&id)
            });
            return Some(match router {
                Some(router) => Holder::Router(*router, *port),
                None => Holder::Port(*port),
            });
        }
        let floating = self.floating.iter().find(|floating| floating.address == address)?;
        let router = self.routers.get(&floating.router)?;
        let gateway = self.port(router.spec.gateway.as_ref()?.port)?;
        (gateway.spec.network == network).then_some(Holder::Router(*router, gateway))
    }
}
