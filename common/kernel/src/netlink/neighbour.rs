//! Neighbours (which Ethernet address an IP address has) and forwarding entries (behind which
//! port or host an Ethernet address is).

use std::io;
use std::net::IpAddr;

use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::RouteType;
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use stackhand_model::MacAddr;

use super::{Links, Write};
use crate::KernelError;

/// The Ethernet address under which a VXLAN link files its flood list.
const FLOOD: MacAddr = MacAddr([0; 6]);

/// Which table a forwarding entry is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FdbTable {
    /// The link's own, for a VXLAN link: the address is behind that host.
    Link {
        /// The other host's tunnel address.
        via: IpAddr,
    },
    /// The bridge's that the link belongs to: the address is behind this port.
    Bridge,
}

/// A forwarding entry that somebody set; what the kernel learned by itself is its own business.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FdbEntry {
    /// Number of the link.
    pub link: u32,
    /// The Ethernet address; all zeroes in a VXLAN link's own table: its flood list.
    pub mac: MacAddr,
    /// Which table.
    pub table: FdbTable,
}

/// A neighbour that somebody set for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    /// Number of the link.
    pub link: u32,
    /// The IP address.
    pub address: IpAddr,
    /// Its Ethernet address.
    pub mac: MacAddr,
}

/// A change to one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryChange {
    /// Sets a forwarding entry. An Ethernet address points to one host, the newest; the flood list
    /// grows.
    Forward(FdbEntry),
    /// Removes a forwarding entry.
    Unforward(FdbEntry),
    /// Sets a neighbour for good, replacing what was known of the address.
    Know(Neighbour),
    /// Removes a neighbour.
    Forget(Neighbour),
}

impl EntryChange {
    fn describe(&self) -> Write {
        match self {
            Self::Forward(entry) => {
                let more = if entry.mac == FLOOD { NLM_F_APPEND } else { NLM_F_REPLACE };
                (RouteNetlinkMessage::NewNeighbour(describe_fdb(*entry)), NLM_F_CREATE | more)
            }
            Self::Unforward(entry) => (RouteNetlinkMessage::DelNeighbour(describe_fdb(*entry)), 0),
            Self::Know(entry) => {
                let message = RouteNetlinkMessage::NewNeighbour(describe_neighbour(*entry));
                (message, NLM_F_CREATE | NLM_F_REPLACE)
            }
            Self::Forget(entry) => {
                (RouteNetlinkMessage::DelNeighbour(describe_neighbour(*entry)), 0)
            }
        }
    }

    /// What the kernel's word means.
    fn judge(&self, result: io::Result<()>) -> Result<(), KernelError> {
        let Err(source) = result else { return Ok(()) };
        let (action, object, fine) = match self {
            Self::Forward(entry) => {
                let fine = (entry.mac == FLOOD).then_some(nix::libc::EEXIST);
                ("set", format!("FDB entry {}", entry.mac), fine)
            }
            Self::Unforward(entry) => {
                ("remove", format!("FDB entry {}", entry.mac), Some(nix::libc::ENOENT))
            }
            Self::Know(entry) => ("set", format!("neighbour {}", entry.address), None),
            Self::Forget(entry) => {
                ("remove", format!("neighbour {}", entry.address), Some(nix::libc::ENOENT))
            }
        };
        if fine.is_some() && source.raw_os_error() == fine {
            return Ok(());
        }
        Err(refused(action, object, source))
    }
}

impl Links {
    /// The forwarding entries that somebody set, in order.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn forwarding(&self) -> Result<Vec<FdbEntry>, KernelError> {
        let mut entries = self.dump_neighbours(AddressFamily::Bridge, parse_fdb).await?;
        entries.sort_unstable();
        entries.dedup();
        Ok(entries)
    }

    /// The neighbours that somebody set for good, in order.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn neighbours(&self) -> Result<Vec<Neighbour>, KernelError> {
        let mut entries = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            entries.extend(self.dump_neighbours(family, parse_neighbour).await?);
        }
        entries.sort_unstable();
        Ok(entries)
    }

    async fn dump_neighbours<T>(
        &self,
        family: AddressFamily,
        take: impl Fn(&NeighbourMessage) -> Option<T>,
    ) -> Result<Vec<T>, KernelError> {
        let mut query = NeighbourMessage::default();
        query.header.family = family;
        self.dump(RouteNetlinkMessage::GetNeighbour(query), |answer| match answer {
            RouteNetlinkMessage::NewNeighbour(message) => take(&message),
            _ => None,
        })
        .await
        .map_err(|source| refused("list", "neighbours".to_owned(), source))
    }

    /// Makes changes to entries, in order, and tells how each came out: one that fails stops no
    /// other. Thousands take little longer than the kernel needs for them.
    ///
    /// To set an entry that is there already is fine, and so is to remove one that is not.
    pub async fn change_entries(&self, changes: &[EntryChange]) -> Vec<Result<(), KernelError>> {
        let results =
            self.write_all(changes.iter().map(|change| change.describe()).collect()).await;
        let results = changes.iter().zip(results);
        results.map(|(change, result)| change.judge(result)).collect()
    }
}

fn describe_fdb(entry: FdbEntry) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = entry.link;
    message.header.kind = RouteType::Unspec;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(entry.mac.0.to_vec()));
    match entry.table {
        FdbTable::Link { via } => {
            message.header.flags = NeighbourFlags::Own;
            message.header.state = NeighbourState::Permanent;
            message.attributes.push(NeighbourAttribute::Destination(via.into()));
        }
        FdbTable::Bridge => {
            message.header.flags = NeighbourFlags::Controller;
            message.header.state = NeighbourState::Noarp;
        }
    }
    message
}

/// The state bits that say that an entry does not age.
fn is_static(state: NeighbourState) -> bool {
    let bits = u16::from(state);
    bits & (u16::from(NeighbourState::Permanent) | u16::from(NeighbourState::Noarp)) != 0
}

fn parse_fdb(message: &NeighbourMessage) -> Option<FdbEntry> {
    let (mut mac, mut via, mut in_bridge) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = bytes.as_slice().try_into().ok().map(MacAddr);
            }
            NeighbourAttribute::Destination(address) => via = ip(address),
            NeighbourAttribute::Controller(_) => in_bridge = true,
            _ => {}
        }
    }
    if message.header.family != AddressFamily::Bridge || !is_static(message.header.state) {
        return None;
    }
    let table = match via {
        // A bridge's own addresses and those of its ports are permanent; ours are static.
        None if in_bridge && message.header.state == NeighbourState::Noarp => FdbTable::Bridge,
        Some(via) if !in_bridge => FdbTable::Link { via },
        _ => return None,
    };
    Some(FdbEntry { link: message.header.ifindex, mac: mac?, table })
}

fn describe_neighbour(entry: Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family =
        if entry.address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.ifindex = entry.link;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unspec;
    message.attributes.push(NeighbourAttribute::Destination(entry.address.into()));
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(entry.mac.0.to_vec()));
    message
}

fn parse_neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = bytes.as_slice().try_into().ok().map(MacAddr);
            }
            NeighbourAttribute::Destination(destination) => address = ip(destination),
            _ => {}
        }
    }
    Some(Neighbour { link: message.header.ifindex, address: address?, mac: mac? })
}

/// In a bridge-family message the parser leaves addresses as bytes.
fn ip(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        NeighbourAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        NeighbourAddress::Other(bytes) => <[u8; 4]>::try_from(bytes.as_slice())
            .map(IpAddr::from)
            .or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from))
            .ok(),
        _ => None,
    }
}

fn refused(action: &'static str, object: String, source: io::Error) -> KernelError {
    KernelError::Netlink { action, object, source }
}

/// Whether the message is about an entry that does not come and go with traffic.
pub(super) fn is_set_by_somebody(message: &NeighbourMessage) -> bool {
    if message.header.family == AddressFamily::Bridge {
        parse_fdb(message).is_some()
    } else {
        parse_neighbour(message).is_some()
    }
}
