//! Addresses of links.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
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
}

pub(super) fn family(address: IpAddr) -> AddressFamily {
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

fn refused(action: &'static str, object: String, source: io::Error) -> KernelError {
    KernelError::Netlink { action, object, source }
}
