//! Whether a packet may pass, and by which rule: the rules that [`render`](super::render()) writes for
//! the kernel, for people and for flows that are under way. Pure.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use stackhand_model::{Direction, Ethertype, PortId, SecurityGroupId, SecurityGroupRule};

use super::clauses::{Matches, matches};
use super::model::{Guard, Model};

/// The first packet of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Packet {
    /// Who sends.
    pub source: IpAddr,
    /// Who receives.
    pub destination: IpAddr,
    /// Protocol number.
    pub protocol: u8,
    /// What is known of the rest.
    pub transport: Transport,
}

/// What a packet says behind its IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// Source and destination port.
    Ports(u16, u16),
    /// ICMP type and code.
    Icmp(u8, u8),
    /// Nothing that rules ask for.
    None,
}

/// What becomes of a packet at one port, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// It passes: the port is not filtered.
    Unguarded,
    /// It passes: no guest could do without.
    Needed {
        /// What it is.
        what: &'static str,
    },
    /// It passes by a rule.
    Rule {
        /// The rule's group.
        group: SecurityGroupId,
        /// Its place in `spec.rules`.
        index: usize,
    },
    /// It is dropped.
    Dropped {
        /// Why.
        why: String,
    },
}

impl Verdict {
    /// Whether the packet passes.
    #[must_use]
    pub fn passes(&self) -> bool {
        !matches!(self, Self::Dropped { .. })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unguarded => f.write_str("passes: the port is not filtered"),
            Self::Needed { what } => write!(f, "passes: {what} is always allowed"),
            Self::Rule { group, index } => {
                write!(f, "passes by spec.rules[{index}] of SecurityGroup {group}")
            }
            Self::Dropped { why } => write!(f, "is dropped: {why}"),
        }
    }
}

impl Packet {
    fn family(&self) -> Ethertype {
        if self.source.is_ipv4() { Ethertype::IPv4 } else { Ethertype::IPv6 }
    }

    /// What DHCP and neighbour discovery need, if the packet is of it.
    fn needed(&self, direction: Direction) -> Option<&'static str> {
        let out = direction == Direction::Egress;
        let (server, client) = if self.source.is_ipv4() { (67, 68) } else { (547, 546) };
        match (self.protocol, self.transport) {
            (17, Transport::Ports(from, to)) => {
                let dhcp = if out { (client, server) } else { (server, client) };
                ((from, to) == dhcp).then_some("DHCP")
            }
            (58, Transport::Icmp(kind, _)) if self.source.is_ipv6() => match kind {
                130..=132 | 143 => Some("multicast listener discovery"),
                133 if out => Some("router solicitation"),
                134 if !out => Some("router advertisement"),
                135 | 136 => Some("neighbour discovery"),
                _ => None,
            },
            _ => None,
        }
    }

    /// What no guest may send.
    fn forbidden(&self) -> Option<&'static str> {
        match (self.protocol, self.transport, self.source.is_ipv4()) {
            (17, Transport::Ports(67, 68), true) | (17, Transport::Ports(547, 546), false) => {
                Some("guests do not serve DHCP")
            }
            (58, Transport::Icmp(134 | 137, _), false) => Some("guests do not act as routers"),
            _ => None,
        }
    }
}

impl Model {
    /// What becomes of the first packet of a flow at `port`, in or out.
    #[must_use]
    pub fn judge(&self, port: PortId, direction: Direction, packet: &Packet) -> Verdict {
        let Some(guard) = self.guards.get(&port) else { return Verdict::Unguarded };
        let drop = |why: &str| Verdict::Dropped { why: why.to_owned() };
        if !guard.open {
            return drop("the port is administratively down, or about to go");
        }
        if direction == Direction::Egress {
            if let Some(why) = packet.forbidden() {
                return drop(why);
            }
            let starts = packet.source.is_unspecified() && packet.needed(direction).is_some();
            if !starts && !guard.has(packet.source) {
                return drop(&format!(
                    "{} is neither in the port's fixed_ips nor in its allowed_address_pairs",
                    packet.source
                ));
            }
        }
        if let Some(what) = packet.needed(direction) {
            return Verdict::Needed { what };
        }
        self.by_rule(guard, direction, packet).unwrap_or_else(|| {
            let word = if direction == Direction::Ingress { "ingress" } else { "egress" };
            drop(&match guard.groups.len() {
                0 => "the port has no security group".to_owned(),
                1 => format!("no {word} rule of its security group allows it"),
                count => format!("no {word} rule of its {count} security groups allows it"),
            })
        })
    }

    fn by_rule(&self, guard: &Guard, direction: Direction, packet: &Packet) -> Option<Verdict> {
        guard.groups.iter().find_map(|id| {
            let rules = &self.groups.get(id)?.spec().rules;
            let index = rules.iter().position(|rule| self.allows(rule, direction, packet))?;
            Some(Verdict::Rule { group: *id, index })
        })
    }

    pub(super) fn allows(
        &self,
        rule: &SecurityGroupRule,
        direction: Direction,
        packet: &Packet,
    ) -> bool {
        let other = match direction {
            Direction::Ingress => packet.source,
            Direction::Egress => packet.destination,
        };
        let remote = match (rule.remote_group, rule.remote_cidr) {
            (Some(group), _) => self
                .members
                .get(&group)
                .is_some_and(|members| members.iter().any(|net| net.contains(&other))),
            (None, Some(net)) => net.contains(&other),
            (None, None) if rule.remote_addresses.is_empty() => true,
            (None, None) => rule.remote_addresses.iter().any(|net| net.contains(&other)),
        };
        let traffic = match (matches(rule), packet.transport) {
            (Matches::Everything, _) => true,
            (Matches::Protocol(protocol), _) => protocol == packet.protocol,
            (Matches::Ports(protocol, min, max), Transport::Ports(_, to)) => {
                protocol == packet.protocol && (min..=max).contains(&to)
            }
            (Matches::Type(protocol, kind, code), Transport::Icmp(is, of)) => {
                protocol == packet.protocol && kind == is && code.is_none_or(|code| code == of)
            }
            _ => false,
        };
        rule.direction == direction && rule.ethertype == packet.family() && remote && traffic
    }
}
