//! An advertisement as bytes (RFC 4861, 8106, 4191), and what a solicitation looks like.

use std::net::Ipv6Addr;

use ipnet::Ipv6Net;
use stackhand_model::MacAddr;

/// Seconds that guests keep the router without hearing of it again: many intervals, so that a
/// restart of the agent, or half an hour without one, goes unnoticed.
const ROUTER_LIFETIME: u16 = 1800;
/// Seconds that an address from a prefix is valid, and preferred.
const VALID: u32 = 86_400;
const PREFERRED: u32 = 14_400;

const SOLICITATION: u8 = 133;
const ADVERTISEMENT: u8 = 134;

mod option {
    pub(super) const SOURCE: u8 = 1;
    pub(super) const PREFIX: u8 = 3;
    pub(super) const MTU: u8 = 5;
    pub(super) const ROUTE: u8 = 24;
    pub(super) const DNS: u8 = 25;
    pub(super) const SEARCH: u8 = 31;
}

/// What a router says of itself on a link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advert {
    /// Largest IP packet in bytes.
    pub mtu: u32,
    /// Addresses come by DHCPv6.
    pub managed: bool,
    /// Other settings come by DHCPv6.
    pub other: bool,
    /// Ranges on the link.
    pub prefixes: Vec<Prefix>,
    /// DNS servers.
    pub dns: Vec<Ipv6Addr>,
    /// Domains that short names are looked up in.
    pub search: Vec<String>,
    /// Ranges that are reached by this router besides all others.
    pub routes: Vec<Ipv6Net>,
}

/// A range on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The range.
    pub net: Ipv6Net,
    /// Whether guests make themselves addresses in it.
    pub autonomous: bool,
}

impl Advert {
    /// The ICMPv6 message; the kernel fills in its checksum.
    #[must_use]
    pub fn bytes(&self, mac: MacAddr) -> Vec<u8> {
        let flags = u8::from(self.managed) << 7 | u8::from(self.other) << 6;
        let mut bytes = vec![ADVERTISEMENT, 0, 0, 0, 64, flags];
        bytes.extend(ROUTER_LIFETIME.to_be_bytes());
        // Reachable and retransmission times: the guest's own.
        bytes.extend([0; 8]);
        bytes.extend([option::SOURCE, 1]);
        bytes.extend(mac.0);
        if self.mtu >= 1280 {
            bytes.extend([option::MTU, 1, 0, 0]);
            bytes.extend(self.mtu.to_be_bytes());
        }
        for prefix in &self.prefixes {
            // On the link; and whether addresses are made of it.
            let flags = 0x80 | u8::from(prefix.autonomous) << 6;
            bytes.extend([option::PREFIX, 4, prefix.net.prefix_len(), flags]);
            bytes.extend(VALID.to_be_bytes());
            bytes.extend(PREFERRED.to_be_bytes());
            bytes.extend([0; 4]);
            bytes.extend(prefix.net.network().octets());
        }
        for route in &self.routes {
            bytes.extend([option::ROUTE, 3, route.prefix_len(), 0]);
            bytes.extend(u32::from(ROUTER_LIFETIME).to_be_bytes());
            bytes.extend(route.network().octets());
        }
        let servers: Vec<u8> = self.dns.iter().take(3).flat_map(Ipv6Addr::octets).collect();
        listed(&mut bytes, option::DNS, &servers);
        let names: Vec<u8> = self.search.iter().take(6).flat_map(|name| labels(name)).collect();
        listed(&mut bytes, option::SEARCH, &names);
        bytes
    }
}

/// An option with a lifetime, filled up to a multiple of eight bytes; nothing if it is empty.
fn listed(bytes: &mut Vec<u8>, option: u8, value: &[u8]) {
    let units = (8 + value.len()).div_ceil(8);
    let Ok(units) = u8::try_from(units) else { return };
    if value.is_empty() {
        return;
    }
    bytes.extend([option, units, 0, 0]);
    bytes.extend(u32::from(ROUTER_LIFETIME).to_be_bytes());
    bytes.extend_from_slice(value);
    let padding = usize::from(units) * 8 - 8 - value.len();
    bytes.resize(bytes.len() + padding, 0);
}

fn labels(name: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(name.len() + 2);
    for label in name.split('.').filter(|label| (1..=63).contains(&label.len())) {
        bytes.push(u8::try_from(label.len()).unwrap_or(63));
        bytes.extend(label.bytes());
    }
    bytes.push(0);
    bytes
}

/// Whether an ICMPv6 message is a router solicitation as RFC 4861, 6.1.1 wants it. The kernel saw
/// to its checksum.
#[must_use]
pub fn is_solicitation(bytes: &[u8], source: Ipv6Addr, hop_limit: u8) -> bool {
    let [SOLICITATION, 0, _, _, _, _, _, _, options @ ..] = bytes else { return false };
    let mut rest = options;
    while let [kind, units, ..] = rest {
        // Who has no address yet cannot say that it is to be found under one.
        if *kind == option::SOURCE && source.is_unspecified() {
            return false;
        }
        match rest.get(usize::from(*units) * 8..) {
            Some(after) if *units > 0 => rest = after,
            _ => return false,
        }
    }
    hop_limit == 255 && rest.is_empty()
}
