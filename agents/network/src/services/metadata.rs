//! The metadata service: what a guest reads about itself over HTTP.
//!
//! A guest is known by the address that it asks from, on its network: the firewall sees to it that
//! this is its own. What a client says of itself in headers counts for nothing, so no guest reads
//! another's. Pages are made when they are asked for, from the documents; only a password that a guest
//! left is kept.

mod passwords;
mod server;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use stackhand_metadata::{Guest, Page};
use stackhand_model::{GuestData, InstanceId, InstancePort, PortId};

pub use passwords::Passwords;
pub use server::Server;

/// Where guests ask by IPv4.
pub const ADDRESS_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Where guests ask by IPv6: link-local, so each on its own link.
pub const ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0xa9fe);

/// Who may read what, by one link.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Addresses that the service listens on.
    pub listen: BTreeSet<IpAddr>,
    /// Guests by each address that they may ask from.
    pub guests: BTreeMap<IpAddr, Arc<Known>>,
}

/// A guest behind a port.
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    /// The port that it asks by.
    pub port: PortId,
    /// The instance.
    pub id: InstanceId,
    /// Its name, where its data does not say one.
    pub name: String,
    /// What it is told.
    pub data: Arc<GuestData>,
    /// Its interfaces.
    pub interfaces: Vec<InstancePort>,
    /// The domain of the network that it asks by.
    pub domain: String,
}

impl Known {
    /// What the guest finds at `path`, with fresh random bytes and the password that it left.
    fn page(&self, path: &str, seed: &[u8], password: Option<&str>) -> Option<Page> {
        let guest = Guest {
            id: self.id,
            name: &self.name,
            data: &self.data,
            ports: &self.interfaces,
            domain: Some(&self.domain),
            seed,
            password,
        };
        stackhand_metadata::page(&guest, path)
    }
}
