//! Addresses of links, and routes.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Links;
use crate::KernelError;

/// An address of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// Number of the link.
    pub link: u32,
    /// The address and the prefix it is on.
    pub net: IpNet,
}

/// A route of the main table by one next hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteEntry {
    /// Where to; `0.0.0.0/0` and `::/0` are the default.
    pub destination: IpNet,
    /// The next hop; `None`: on the link.
    pub gateway: Option<IpAddr>,
    /// Number of the link.
    pub link: Option<u32>,
}

impl Links {
    /// Every address of the namespace, in order.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn addresses(&self) -> Result<Vec<Address>, KernelError> {
        let query = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let mut addresses = self
            .dump(query, |answer| match answer {
                RouteNetlinkMessage::NewAddress(message) => parse(&message),
                _ => None,
            })
            .await
            .map_err(|source| refused("list", "addresses".to_owned(), source))?;
        addresses.sort_unstable();
        addresses.dedup();
        Ok(addresses)
    }

    /// Gives a link an address. One that it has already is fine.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn add_address(&self, address: Address) -> Result<(), KernelError> {
        let message = RouteNetlinkMessage::NewAddress(describe(address));
        match self.write(message, NLM_F_CREATE | NLM_F_EXCL).await {
            Err(error) if error.raw_os_error() == Some(nix::libc::EEXIST) => Ok(()),
            result => {
                result.map_err(|source| refused("add", format!("address {}", address.net), source))
            }
        }
    }

    /// Takes an address from a link. One that it does not have is fine.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn remove_address(&self, address: Address) -> Result<(), KernelError> {
        let message = RouteNetlinkMessage::DelAddress(describe(address));
        match self.write(message, 0).await {
            Err(error) if error.raw_os_error() == Some(nix::libc::EADDRNOTAVAIL) => Ok(()),
            result => result
                .map_err(|source| refused("remove", format!("address {}", address.net), source)),
        }
    }

    /// The routes of the main table that somebody asked for, in order; those that come with an
    /// address are left out.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn routes(&self) -> Result<Vec<RouteEntry>, KernelError> {
        let query = RouteNetlinkMessage::GetRoute(RouteMessage::default());
        let mut routes = self
            .dump(query, |answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => parse_route(&message),
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
    pub async fn set_route(&self, route: RouteEntry) -> Result<(), KernelError> {
        let message = RouteNetlinkMessage::NewRoute(describe_route(route));
        self.write(message, NLM_F_CREATE | NLM_F_REPLACE)
            .await
            .map_err(|source| refused("set", format!("route to {}", route.destination), source))
    }

    /// Removes a route. One that is not there is fine.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn remove_route(&self, route: RouteEntry) -> Result<(), KernelError> {
        let message = RouteNetlinkMessage::DelRoute(describe_route(route));
        match self.write(message, 0).await {
            Err(error) if error.raw_os_error() == Some(nix::libc::ESRCH) => Ok(()),
            result => result.map_err(|source| {
                refused("remove", format!("route to {}", route.destination), source)
            }),
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn describe(address: Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.net.addr());
    message.header.prefix_len = address.net.prefix_len();
    message.header.index = address.link;
    message.attributes.push(AddressAttribute::Local(address.net.addr()));
    message.attributes.push(AddressAttribute::Address(address.net.addr()));
    if let IpNet::V4(net) = address.net
        && net.prefix_len() < 31
    {
        message.attributes.push(AddressAttribute::Broadcast(net.broadcast()));
    }
    message
}

pub(super) fn parse(message: &AddressMessage) -> Option<Address> {
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            // On a point-to-point link this is the other side's.
            AddressAttribute::Address(address) => found = found.or(Some(*address)),
            AddressAttribute::Local(address) => found = Some(*address),
            _ => {}
        }
    }
    let net = IpNet::new(found?, message.header.prefix_len).ok()?;
    Some(Address { link: message.header.index, net })
}

fn describe_route(route: RouteEntry) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.destination.addr());
    header.destination_prefix_length = route.destination.prefix_len();
    header.table = RouteHeader::RT_TABLE_MAIN;
    header.protocol = RouteProtocol::Static;
    header.scope = if route.gateway.is_some() { RouteScope::Universe } else { RouteScope::Link };
    header.kind = RouteType::Unicast;
    message
        .attributes
        .push(RouteAttribute::Destination(RouteAddress::from(route.destination.addr())));
    message
        .attributes
        .extend(route.gateway.map(|next| RouteAttribute::Gateway(RouteAddress::from(next))));
    message.attributes.extend(route.link.map(RouteAttribute::Oif));
    message
}

fn parse_route(message: &RouteMessage) -> Option<RouteEntry> {
    let header = &message.header;
    let by_kernel = matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra);
    if header.table != RouteHeader::RT_TABLE_MAIN || header.kind != RouteType::Unicast || by_kernel
    {
        return None;
    }
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    };
    let mut destination = match header.address_family {
        AddressFamily::Inet => IpAddr::from([0; 4]),
        AddressFamily::Inet6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let (mut gateway, mut link) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Oif(index) => link = Some(*index),
            _ => {}
        }
    }
    let destination = IpNet::new(destination, header.destination_prefix_length).ok()?;
    Some(RouteEntry { destination, gateway, link })
}

fn refused(action: &'static str, object: String, source: io::Error) -> KernelError {
    KernelError::Netlink { action, object, source }
}
