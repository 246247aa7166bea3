//! A group's clauses in the words of `iptables`. Pure.

use ipnet::IpNet;
use stackhand_model::{Direction, Ethertype};

use super::super::clauses::{Clause, Remote, Traffic};

/// Ports that one `multiport` match takes; a range counts as two.
const MOST_PORTS: usize = 15;

/// Matches of which one must hold for what the clause allows. `members` names the set of a group's
/// addresses.
pub(super) fn matches(
    clause: &Clause,
    direction: Direction,
    members: impl Fn(&stackhand_model::SecurityGroupId) -> String,
) -> Vec<String> {
    let (address, side) = match direction {
        Direction::Ingress => ("-s", "src"),
        Direction::Egress => ("-d", "dst"),
    };
    let remotes = match &clause.remote {
        Remote::Any => vec![String::new()],
        Remote::Nets(nets) => nets.iter().map(|net: &IpNet| format!("{address} {net} ")).collect(),
        Remote::Members(group) => vec![format!("-m set --match-set {} {side} ", members(group))],
    };
    let traffic = traffic(&clause.traffic, clause.family);
    let both = |remote: &String, what: &String| format!("{remote}{what}");
    remotes.iter().flat_map(|it| traffic.iter().map(move |what| both(it, what))).collect()
}

/// Each with a blank at its end; an empty one holds always.
fn traffic(traffic: &Traffic, family: Ethertype) -> Vec<String> {
    if traffic.is_everything() {
        return vec![String::new()];
    }
    let mut all: Vec<String> = traffic.protocols.iter().map(|it| format!("-p {it} ")).collect();
    for (protocol, ranges) in &traffic.ports {
        for ports in lists(ranges) {
            all.push(format!("-p {protocol} -m multiport --dports {ports} "));
        }
    }
    for (protocol, types) in &traffic.types {
        for (kind, code) in types {
            if code.is_none() || !types.contains(&(*kind, None)) {
                all.push(icmp(*protocol, family, *kind, *code));
            }
        }
    }
    all
}

/// Lists of ports and ranges, each short enough for one match.
fn lists(ranges: &[(u16, u16)]) -> Vec<String> {
    let mut lists: Vec<String> = Vec::new();
    let mut room = 0;
    for (min, max) in ranges {
        let (cost, word) =
            if min == max { (1, min.to_string()) } else { (2, format!("{min}:{max}")) };
        match lists.last_mut() {
            Some(list) if room >= cost => {
                list.push(',');
                list.push_str(&word);
            }
            _ => {
                room = MOST_PORTS;
                lists.push(word);
            }
        }
        room -= cost;
    }
    lists
}

/// A type, or one with its code. ICMP of the other family has no match of its own: its first bytes
/// are compared, of IPv6 where no extension header is before them.
fn icmp(protocol: u8, family: Ethertype, kind: u8, code: Option<u8>) -> String {
    let of = code.map_or_else(String::new, |code| format!("/{code}"));
    let (mask, value) = match code {
        None => (0xff00_0000_u32, u32::from(kind) << 24),
        Some(code) => (0xffff_0000, u32::from(kind) << 24 | u32::from(code) << 16),
    };
    match (protocol, family) {
        (1, Ethertype::IPv4) => format!("-p icmp -m icmp --icmp-type {kind}{of} "),
        (58, Ethertype::IPv6) => format!("-p ipv6-icmp -m icmp6 --icmpv6-type {kind}{of} "),
        (_, Ethertype::IPv4) => {
            format!("-p {protocol} -m u32 --u32 0>>22&0x3C@0&{mask:#x}={value:#x} ")
        }
        (_, Ethertype::IPv6) => {
            format!("-p {protocol} -m u32 --u32 3&0xFF={protocol}&&40&{mask:#x}={value:#x} ")
        }
    }
}
