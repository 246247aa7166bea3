//! Routes of the main table.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteProtocol,
    RouteScope, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Links;
use super::address::family;
use crate::KernelError;

/// A next hop of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hop {
    /// The neighbour; `None`: the destination is on the link itself.
    pub gateway: Option<IpAddr>,
    /// Number of the link.
    pub link: u32,
}

/// A route of the main table. Several next hops share the load, flow by flow.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteEntry {
    /// Where to; `0.0.0.0/0` and `::/0` are the default.
    pub destination: IpNet,
    /// By which ways.
    pub hops: BTreeSet<Hop>,
    /// Who set it, by the kernel's numbers: 3 at boot, 4 an administrator, others by convention.
    pub protocol: u8,
}

impl Links {
    /// The routes of the main table that somebody asked for, in order; those that come with an
    /// address or a router advertisement are left out.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn routes(&self) -> Result<Vec<RouteEntry>, KernelError> {
        let query = RouteNetlinkMessage::GetRoute(RouteMessage::default());
        let mut routes = self
            .dump(query, |answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => parse(&message),
                _ => None,
            })
            .await
            .map_err(|source| refused("list", "routes".to_owned(), source))?;
        routes.sort_unstable();
        Ok(routes)
    }

    /// Sets a route, replacing one to the same destination.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn set_route(&self, route: &RouteEntry) -> Result<(), KernelError> {
        let message = RouteNetlinkMessage::NewRoute(describe(route));
        self.write(message, NLM_F_CREATE | NLM_F_REPLACE)
            .await
            .map_err(|source| refused("set", format!("route to {}", route.destination), source))
    }

    /// Removes a route. One that is not there is fine.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn remove_route(&self, route: &RouteEntry) -> Result<(), KernelError> {
        let message = RouteNetlinkMessage::DelRoute(describe(route));
        match self.write(message, 0).await {
            Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(()),
            result => result.map_err(|source| {
                refused("remove", format!("route to {}", route.destination), source)
            }),
        }
    }
}

fn describe(route: &RouteEntry) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.destination.addr());
    header.destination_prefix_length = route.destination.prefix_len();
    header.table = RouteHeader::RT_TABLE_MAIN;
    header.protocol = RouteProtocol::from(route.protocol);
    let on_link = route.hops.iter().all(|hop| hop.gateway.is_none());
    header.scope = match route.hops.len() {
        // Any: to be removed, whatever its ways.
        0 => RouteScope::NoWhere,
        _ if on_link => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    header.kind = RouteType::Unicast;
    message
        .attributes
        .push(RouteAttribute::Destination(RouteAddress::from(route.destination.addr())));
    let gateway =
        |hop: &Hop| hop.gateway.map(|next| RouteAttribute::Gateway(RouteAddress::from(next)));
    match route.hops.iter().collect::<Vec<_>>().as_slice() {
        [] => {}
        [hop] => {
            message.attributes.extend(gateway(hop));
            message.attributes.push(RouteAttribute::Oif(hop.link));
        }
        hops => {
            let hop = |hop: &&Hop| {
                let mut next = RouteNextHop::default();
                next.interface_index = hop.link;
                next.attributes.extend(gateway(hop));
                next
            };
            message.attributes.push(RouteAttribute::MultiPath(hops.iter().map(hop).collect()));
        }
    }
    message
}

/// Whether a route is a plain one of the main table, and not one that the kernel makes by itself.
pub(super) fn is_set_by_somebody(message: &RouteMessage) -> bool {
    let header = &message.header;
    let by_kernel = matches!(
        header.protocol,
        RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect
    );
    header.table == RouteHeader::RT_TABLE_MAIN && header.kind == RouteType::Unicast && !by_kernel
}

fn parse(message: &RouteMessage) -> Option<RouteEntry> {
    if !is_set_by_somebody(message) {
        return None;
    }
    let header = &message.header;
    let mut destination = match header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let (mut gateway, mut link) = (None, None);
    let mut hops = BTreeSet::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::MultiPath(several) => hops.extend(several.iter().map(|hop| {
                let gateway = hop.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Gateway(address) => ip(address),
                    _ => None,
                });
                Hop { gateway, link: hop.interface_index }
            })),
            _ => {}
        }
    }
    hops.extend(link.map(|link| Hop { gateway, link }));
    let destination = IpNet::new(destination, header.destination_prefix_length).ok()?;
    Some(RouteEntry { destination, hops, protocol: header.protocol.into() })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

fn refused(action: &'static str, object: String, source: io::Error) -> KernelError {
    KernelError::Netlink { action, object, source }
}
