//! Telling neighbours where an address is now: gratuitous ARP and unsolicited advertisements.
//!
//! An address that moves between hosts or routers stays in the neighbours' tables for minutes
//! with the old Ethernet address. So each address that is given to a router's link is announced,
//! three times: a bridge or switch on the way may not pass frames of a new link yet. Whether a
//! frame arrived is never known, and nothing waits for it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use smol_str::SmolStr;
use stackhand_kernel::Netns;
use stackhand_kernel::packet::{self, Receive};
use stackhand_model::MacAddr;
use tokio::task::JoinSet;
use tracing::debug;

use crate::frame::{checksum, ethernet, pseudo6};

/// When an address is announced, counted from when it was given.
const MOMENTS: [Duration; 3] = [Duration::ZERO, Duration::from_secs(1), Duration::from_secs(3)];

const BROADCAST: MacAddr = MacAddr([0xff; 6]);

/// All IPv6 nodes, and the Ethernet address that they listen on.
const ALL_NODES: (Ipv6Addr, MacAddr) =
    (Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), MacAddr([0x33, 0x33, 0, 0, 0, 1]));

/// A link whose addresses are to be announced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// Its namespace.
    pub space: SmolStr,
    /// Its number there.
    pub index: u32,
    /// Its Ethernet address.
    pub mac: MacAddr,
    /// The addresses.
    pub addresses: BTreeSet<IpAddr>,
}

/// Announces addresses, without being waited for.
#[derive(Debug, Default)]
pub struct Announcer {
    /// By namespace.
    tasks: Mutex<BTreeMap<SmolStr, JoinSet<()>>>,
}

impl Announcer {
    /// Announces the addresses of a link now and a few times more.
    pub fn announce(&self, link: Announced) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let tasks = tasks.entry(link.space.clone()).or_default();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            if let Err(error) = announce(&link).await {
                debug!(space = %link.space, %error, "cannot announce addresses");
            }
        });
    }

    /// Stops in namespaces that are to go: a socket would keep them.
    pub fn leave(&self, goes: impl Fn(&str) -> bool) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|space, tasks| !goes(space) && !tasks.is_empty());
    }
}

async fn announce(link: &Announced) -> io::Result<()> {
    let space = Netns::named(&link.space).map_err(io::Error::other)?;
    let index = link.index;
    let open = move || packet::frames(index, Receive::Nothing);
    let socket = space.inside("open a packet socket", open).await.map_err(io::Error::other)?;
    let mut passed = Duration::ZERO;
    for moment in MOMENTS {
        tokio::time::sleep(moment - passed).await;
        passed = moment;
        for address in &link.addresses {
            for frame in frames(link.mac, *address) {
                // A full queue drops it, as a wire may.
                drop(socket.send(&frame));
            }
        }
    }
    Ok(())
}

/// The frames that announce an address.
fn frames(mac: MacAddr, address: IpAddr) -> Vec<Vec<u8>> {
    match address {
        // Some neighbours take news from requests alone, others from replies.
        IpAddr::V4(v4) => vec![arp(mac, v4, 1), arp(mac, v4, 2)],
        IpAddr::V6(v6) => vec![advertisement(mac, v6)],
    }
}

/// Gratuitous ARP, RFC 5227: sender and target are the address itself.
fn arp(mac: MacAddr, address: Ipv4Addr, operation: u16) -> Vec<u8> {
    let mut frame = ethernet(mac, BROADCAST, 0x0806);
    // Ethernet, IPv4, lengths of their addresses.
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac.0);
    frame.extend(address.octets());
    frame.extend(BROADCAST.0);
    frame.extend(address.octets());
    frame
}

/// Unsolicited neighbour advertisement, RFC 4861 section 7.2.6: from a router, overriding.
fn advertisement(mac: MacAddr, address: Ipv6Addr) -> Vec<u8> {
    let (all, all_mac) = ALL_NODES;
    let mut body = vec![136, 0, 0, 0, 0xa0, 0, 0, 0];
    body.extend(address.octets());
    // Target link-layer address, in units of eight bytes.
    body.extend([2, 1]);
    body.extend(mac.0);
    let pseudo = pseudo6(address, all, 58, body.len());
    let sum = checksum(&[&pseudo, &body]);
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = ethernet(mac, all_mac, 0x86dd);
    let length = u16::try_from(body.len()).unwrap_or_default();
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([58, 255]);
    frame.extend(address.octets());
    frame.extend(all.octets());
    frame.extend(body);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddr = MacAddr([0xfa, 0x16, 0x3e, 0, 0, 1]);

    #[test]
    fn an_arp_announcement_has_the_address_on_both_sides() {
        let frame = arp(MAC, Ipv4Addr::new(203, 0, 113, 5), 1);
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[..6], [0xff; 6]);
        assert_eq!(frame[28..32], [203, 0, 113, 5]);
        assert_eq!(frame[38..42], [203, 0, 113, 5]);
    }

    #[test]
    fn an_advertisement_sums_up_to_all_ones() {
        let address: Ipv6Addr = "2001:db8::1".parse().unwrap();
        let frame = advertisement(MAC, address);
        assert_eq!(frame.len(), 14 + 40 + 32);
        // A checksum over a message with its checksum in place is zero.
        assert_eq!(checksum(&[&pseudo6(address, ALL_NODES.0, 58, 32), &frame[54..]]), 0);
    }
}
