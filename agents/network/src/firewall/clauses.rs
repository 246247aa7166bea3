//! From a group's rules to as few matches as do the same. Pure.
//!
//! Groups of real clouds hold hundreds of rules of which most differ in one part: the same ports for
//! many ranges of addresses, or many ports for the same. Each packet that begins a flow walks a chain
//! of one line a clause, so rules are first gathered by the other side, then sides with equal traffic
//! are joined.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use stackhand_model::{
    Direction, Ethertype, SecurityGroupId, SecurityGroupRule, SecurityGroupSpec,
};

/// Ranges that have a line each rather than a set of their own: to make a set without a name the kernel
/// looks through all that a table has, and a packet finds as many lines as fast.
const FEW: usize = 3;

/// Rules of one direction that share the other side and the traffic.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Clause {
    pub(super) family: Ethertype,
    pub(super) remote: Remote,
    pub(super) traffic: Traffic,
}

/// The other side.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Remote {
    Any,
    /// Ranges that do not overlap.
    Nets(Vec<IpNet>),
    Members(SecurityGroupId),
}

/// Traffic in one family. Nothing in it: all.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Traffic {
    /// Protocols, whatever is in them.
    pub(super) protocols: BTreeSet<u8>,
    /// By protocol: ranges of destination ports that do not touch.
    pub(super) ports: BTreeMap<u8, Vec<(u16, u16)>>,
    /// By protocol: types, and codes of those that allow one code alone.
    pub(super) types: BTreeMap<u8, BTreeSet<(u8, Option<u8>)>>,
}

/// What one rule says about traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Matches {
    Everything,
    Protocol(u8),
    Ports(u8, u16, u16),
    Type(u8, u8, Option<u8>),
}

/// What `rule` says about traffic.
pub(super) fn matches(rule: &SecurityGroupRule) -> Matches {
    // Protocol 0 stands for any, as it does for Neutron.
    let Some(protocol) = rule.protocol_number().filter(|number| *number != 0) else {
        return Matches::Everything;
    };
    let byte = |number: u16| u8::try_from(number).unwrap_or(u8::MAX);
    match (protocol, rule.port_range_min, rule.port_range_max) {
        (_, None, _) => Matches::Protocol(protocol),
        (1 | 58, Some(kind), code) => Matches::Type(protocol, byte(kind), code.map(byte)),
        (_, Some(min), max) => Matches::Ports(protocol, min, max.unwrap_or(min)),
    }
}

/// The clauses of a group's rules of one direction.
pub(super) fn clauses(group: &SecurityGroupSpec, direction: Direction) -> Vec<Clause> {
    let mut by_remote: BTreeMap<(Ethertype, Remote), BTreeSet<Matches>> = BTreeMap::new();
    for rule in group.rules.iter().filter(|rule| rule.direction == direction) {
        let mut add = |remote| {
            by_remote.entry((rule.ethertype, remote)).or_default().insert(matches(rule));
        };
        match (rule.remote_group, rule.remote_cidr) {
            (Some(remote), _) => add(Remote::Members(remote)),
            (None, Some(net)) if net.prefix_len() == 0 => add(Remote::Any),
            (None, Some(net)) => add(Remote::Nets(vec![net.trunc()])),
            (None, None) if rule.remote_addresses.is_empty() => add(Remote::Any),
            (None, None) => {
                rule.remote_addresses.iter().for_each(|net| add(Remote::Nets(vec![net.trunc()])));
            }
        }
    }
    let mut by_traffic: BTreeMap<(Ethertype, Traffic), Vec<IpNet>> = BTreeMap::new();
    let mut clauses = Vec::new();
    for ((family, remote), matches) in by_remote {
        let traffic = Traffic::of(&matches);
        match remote {
            Remote::Nets(nets) => by_traffic.entry((family, traffic)).or_default().extend(nets),
            remote => clauses.push(Clause { family, remote, traffic }),
        }
    }
    clauses.extend(by_traffic.into_iter().map(|((family, traffic), nets)| Clause {
        family,
        remote: Remote::Nets(IpNet::aggregate(&nets)),
        traffic,
    }));
    clauses
}

impl Traffic {
    fn of(all: &BTreeSet<Matches>) -> Self {
        let mut traffic = Self::default();
        if all.contains(&Matches::Everything) {
            return traffic;
        }
        for matches in all {
            match *matches {
                Matches::Everything => {}
                Matches::Protocol(protocol) => drop(traffic.protocols.insert(protocol)),
                Matches::Ports(protocol, min, max) => {
                    let ranges = traffic.ports.entry(protocol).or_default();
                    // They come in order of their beginnings.
                    match ranges.last_mut() {
                        Some((_, last)) if u32::from(min) <= u32::from(*last) + 1 => {
                            *last = max.max(*last);
                        }
                        _ => ranges.push((min, max)),
                    }
                }
                Matches::Type(protocol, kind, code) => {
                    traffic.types.entry(protocol).or_default().insert((kind, code));
                }
            }
        }
        traffic.ports.retain(|protocol, _| !traffic.protocols.contains(protocol));
        traffic.types.retain(|protocol, _| !traffic.protocols.contains(protocol));
        traffic
    }

    /// Whether it is all traffic.
    pub(super) fn is_everything(&self) -> bool {
        self.protocols.is_empty() && self.ports.is_empty() && self.types.is_empty()
    }
}

impl Clause {
    /// The lines of a chain that accept what the clause allows. `members` names a group's set of
    /// addresses.
    pub(super) fn lines(&self, direction: Direction) -> Vec<String> {
        let side = match (self.family, direction) {
            (Ethertype::IPv4, Direction::Ingress) => "ip saddr",
            (Ethertype::IPv4, Direction::Egress) => "ip daddr",
            (Ethertype::IPv6, Direction::Ingress) => "ip6 saddr",
            (Ethertype::IPv6, Direction::Egress) => "ip6 daddr",
        };
        let six = self.family == Ethertype::IPv6;
        let family = if six { "meta protocol ip6" } else { "meta protocol ip" };
        let remotes = match &self.remote {
            Remote::Any => vec![family.to_owned()],
            Remote::Nets(nets) if nets.len() <= FEW => {
                nets.iter().map(|net| format!("{side} {net}")).collect()
            }
            Remote::Nets(nets) => vec![format!("{side} {}", one_of(nets.iter()))],
            Remote::Members(group) => [false, true]
                .map(|ranges| format!("{side} @{}", members_set(*group, six, ranges)))
                .to_vec(),
        };
        let traffic = self.traffic.matches();
        let line = |remote: &String, traffic: &String| format!("{remote} {traffic}accept");
        remotes.iter().flat_map(|it| traffic.iter().map(move |what| line(it, what))).collect()
    }
}

/// The set that holds the members of a group.
pub(super) fn members_set(group: SecurityGroupId, six: bool, ranges: bool) -> String {
    let family = if six { 6 } else { 4 };
    let ranges = if ranges { "-ranges" } else { "" };
    format!("members-{group}-{family}{ranges}")
}

impl Traffic {
    /// Matches of which one must hold, each with a blank at its end; an empty one holds always.
    fn matches(&self) -> Vec<String> {
        if self.is_everything() {
            return vec![String::new()];
        }
        let mut all = Vec::new();
        if !self.protocols.is_empty() {
            all.push(format!("meta l4proto {} ", one_of(self.protocols.iter())));
        }
        for (protocol, ranges) in &self.ports {
            let range = |(min, max): &(u16, u16)| {
                if min == max { min.to_string() } else { format!("{min}-{max}") }
            };
            let ports = one_of(ranges.iter().map(range));
            all.push(format!("meta l4proto {protocol} th dport {ports} "));
        }
        for (protocol, types) in &self.types {
            // Type and code are the first two bytes behind the IP header.
            let whole: Vec<u8> =
                types.iter().filter(|(_, code)| code.is_none()).map(|(kind, _)| *kind).collect();
            if !whole.is_empty() {
                all.push(format!("meta l4proto {protocol} @th,0,8 {} ", one_of(whole.iter())));
            }
            let single: Vec<u16> = types
                .iter()
                .filter(|(kind, _)| !types.contains(&(*kind, None)))
                .filter_map(|(kind, code)| Some(u16::from(*kind) << 8 | u16::from((*code)?)))
                .collect();
            if !single.is_empty() {
                all.push(format!("meta l4proto {protocol} @th,0,16 {} ", one_of(single.iter())));
            }
        }
        all
    }
}

/// A value, or a set without a name of several.
fn one_of(values: impl ExactSizeIterator<Item: ToString>) -> String {
    let is_one = values.len() == 1;
    let values: Vec<String> = values.map(|value| value.to_string()).collect();
    let list = values.join(", ");
    if is_one { list } else { format!("{{ {list} }}") }
}
