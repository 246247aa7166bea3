//! The way of a flow's first packet through a router, as `agentctl explain` tells it: what its
//! namespace would do, step by step, from what was seen of it. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use serde::Serialize;
use smol_str::SmolStr;

use super::{Entry, Hop, SeenNat, SeenRouter};
use crate::firewall::{Packet, Transport};
use crate::l2::{At, Seen, SeenLink};

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What it is.
    pub what: &'static str,
    /// Whether the packet goes on.
    pub passes: bool,
    /// What was found, in words.
    pub finding: String,
}

impl Check {
    /// One that lets the packet go on, or not.
    pub fn new(what: &'static str, passes: bool, finding: impl Into<String>) -> Self {
        Self { what, passes, finding: finding.into() }
    }
}

/// What became of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    /// In the order in which the packet meets them.
    pub checks: Vec<Check>,
    /// The packet as it leaves.
    pub packet: Packet,
    /// The link it leaves by, and the neighbour it goes to.
    pub out: Option<(SmolStr, IpAddr)>,
}

/// Follows `packet`, which came by the link `entered` of namespace `space`.
#[must_use]
pub fn walk(space: &str, entered: &str, packet: Packet, links: &Seen, router: &SeenRouter) -> Walk {
    let mut walk = Walk { checks: Vec::new(), packet, out: None };
    let none = BTreeSet::new();
    let link = |name: &str| links.links.get(&At::inside(space, name));
    let Some(from) = link(entered).filter(|link| link.up) else {
        let text = format!("link {entered} of {space} is not there, or down");
        walk.checks.push(Check::new("link in", false, text));
        return walk;
    };
    walk.checks.push(Check::new("link in", true, format!("{entered} of {space} is up")));
    let entries = match &router.nat {
        SeenNat::Built(entries) => entries,
        SeenNat::Absent => {
            walk.checks.push(Check::new("translations", false, "their table is not there"));
            &none
        }
        SeenNat::Changed => {
            walk.checks.push(Check::new("translations", false, "somebody changed their rules"));
            &none
        }
    };
    let (passes, finding) = walk.forwarded(from);
    walk.checks.push(Check::new("forwarding", passes, finding));
    let translated = entries.iter().find_map(|entry| walk.destination(entry));
    let finding = match translated {
        Some((to, port, text)) => {
            walk.packet.destination = to;
            if let (Some(port), Transport::Ports(_, at)) = (port, &mut walk.packet.transport) {
                *at = port;
            }
            text
        }
        None => format!("{} is not translated", walk.packet.destination),
    };
    walk.checks.push(Check::new("destination", true, finding));
    let to = walk.packet.destination;
    let inside = links.links.iter().filter(|(at, _)| at.space.as_deref() == Some(space));
    if inside.clone().any(|(_, link)| link.addresses.iter().any(|net| net.addr() == to)) {
        let text = format!("{to} is the router's own address: nothing is forwarded");
        walk.checks.push(Check::new("route", false, text));
        return walk;
    }
    let connected = inside.filter(|(_, link)| link.up).flat_map(|(at, link)| {
        let hop = Hop { via: None, link: at.link.clone() };
        link.addresses.iter().map(move |net| (IpNet::trunc(net), hop.clone()))
    });
    let routes = router.routes.iter();
    let set = routes.filter_map(|(net, route)| Some((*net, route.hops.first()?.clone())));
    let ways = connected.chain(set).filter(|(net, _)| net.contains(&to));
    let Some((net, hop)) = ways.max_by_key(|(net, _)| net.prefix_len()) else {
        let text = format!("there is no route to {to}");
        walk.checks.push(Check::new("route", false, text));
        return walk;
    };
    let next = hop.via.unwrap_or(to);
    let up = link(&hop.link).is_some_and(|link| link.up);
    let word = if up { "" } else { ", which is down" };
    let text = format!("{to} is reached by the route to {net}: to {next} by {}{word}", hop.link);
    walk.checks.push(Check::new("route", up, text));
    let turned = walk.packet.destination != packet.destination;
    let finding = walk.source(entries, entered, &hop.link, turned);
    walk.checks.push(Check::new("source", true, finding));
    walk.out = Some((hop.link, next));
    walk
}

impl Walk {
    fn forwarded(&self, from: &SeenLink) -> (bool, String) {
        let on = match self.packet.destination {
            // Reserved for the metadata service, which is the router itself.
            IpAddr::V4(to) if to.is_link_local() => {
                return (false, "what is sent to 169.254.0.0/16 is never forwarded".to_owned());
            }
            IpAddr::V4(_) => from.routing.forwarding,
            IpAddr::V6(_) => from.routing.v6.is_some_and(|v6| v6.forwarding),
        };
        let finding = if on { "packets are forwarded" } else { "forwarding is turned off" };
        (on, finding.to_owned())
    }

    /// Where an entry leads the packet, if it is about it.
    fn destination(&self, entry: &Entry) -> Option<(IpAddr, Option<u16>, String)> {
        let Packet { destination: IpAddr::V4(to), protocol, transport, .. } = self.packet else {
            return None;
        };
        match (entry, transport) {
            (Entry::Floating { address, fixed }, _) if *address == to => {
                let text = format!("floating IP {to} leads to {fixed}");
                Some(((*fixed).into(), None, text))
            }
            (
                Entry::Forwarded { protocol: of, address, port, to: fixed, to_port },
                Transport::Ports(_, at),
            ) if (*of, *address, *port) == (protocol, to, at) => {
                let text = format!("port {at} of {to} leads to port {to_port} of {fixed}");
                Some(((*fixed).into(), Some(*to_port), text))
            }
            _ => None,
        }
    }

    /// Gives the packet the source that it leaves with; tells which.
    fn source(
        &mut self,
        entries: &BTreeSet<Entry>,
        entered: &str,
        out: &str,
        turned: bool,
    ) -> String {
        let IpAddr::V4(from) = self.packet.source else {
            return "IPv6 is not translated".to_owned();
        };
        let keeps = !entered.starts_with("qr-") || (!out.starts_with("qg-") && !turned);
        let fixed = |entry: &Entry| match entry {
            Entry::Fixed { fixed, address } if *fixed == from => Some(*address),
            _ => None,
        };
        let masked = |entry: &Entry| match entry {
            Entry::Masked { link, address } if link == out => Some(*address),
            _ => None,
        };
        let (what, address): (_, Option<Ipv4Addr>) = if keeps {
            ("", None)
        } else if let Some(address) = entries.iter().find_map(fixed) {
            ("its floating IP", Some(address))
        } else {
            ("the router's address", entries.iter().find_map(masked))
        };
        match address {
            Some(address) => {
                self.packet.source = address.into();
                format!("{from} becomes {address}, {what}")
            }
            None => format!("{from} stays the source"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::SeenRoute;
    use super::*;
    use crate::l2::{Owner, ROUTING, SeenKind, fake};

    const SPACE: &str = "qrouter-1";

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn v4(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    /// A router on 10.7.0.0/24 whose way out is 192.0.2.0/24.
    fn router() -> (Seen, SeenRouter) {
        let mut seen = Seen::default();
        for (name, net) in [("qr-a", "10.7.0.1/24"), ("qg-b", "192.0.2.10/24")] {
            let mut link = fake::bare(SeenKind::Pair, Owner::Unfinished);
            link.up = true;
            link.routing = ROUTING;
            link.addresses = BTreeSet::from([net.parse().unwrap()]);
            seen.links.insert(At::inside(SPACE, name), link);
        }
        let hop = Hop { via: Some(ip("192.0.2.1")), link: "qg-b".into() };
        let route = SeenRoute { hops: BTreeSet::from([hop]), ours: true };
        let nat = BTreeSet::from([
            Entry::Floating { address: v4("192.0.2.77"), fixed: v4("10.7.0.7") },
            Entry::Fixed { fixed: v4("10.7.0.7"), address: v4("192.0.2.77") },
            Entry::Masked { link: "qg-b".into(), address: v4("192.0.2.10") },
            Entry::Forwarded {
                protocol: 6,
                address: v4("192.0.2.88"),
                port: 2222,
                to: v4("10.7.0.9"),
                to_port: 22,
            },
        ]);
        let routes = BTreeMap::from([("0.0.0.0/0".parse().unwrap(), route)]);
        (seen, SeenRouter { routes, nat: SeenNat::Built(nat) })
    }

    fn go(entered: &str, source: &str, destination: &str, port: u16) -> Walk {
        let (seen, router) = router();
        let (source, destination) = (ip(source), ip(destination));
        let transport = Transport::Ports(40000, port);
        let packet = Packet { source, destination, protocol: 6, transport };
        walk(SPACE, entered, packet, &seen, &router)
    }

    fn passes(walk: &Walk) -> bool {
        walk.checks.iter().all(|check| check.passes)
    }

    #[test]
    fn what_goes_out_gets_the_floating_ip_or_the_routers_address() {
        let walk = go("qr-a", "10.7.0.7", "198.51.100.1", 80);
        assert!(passes(&walk), "{walk:?}");
        assert_eq!(walk.packet.source, ip("192.0.2.77"));
        assert_eq!(walk.out, Some(("qg-b".into(), ip("192.0.2.1"))));
        assert_eq!(go("qr-a", "10.7.0.8", "192.0.2.200", 80).packet.source, ip("192.0.2.10"));
    }

    #[test]
    fn what_comes_in_is_led_inside_and_keeps_its_source() {
        let walk = go("qg-b", "198.51.100.1", "192.0.2.77", 80);
        assert_eq!(walk.packet.destination, ip("10.7.0.7"));
        assert_eq!(walk.packet.source, ip("198.51.100.1"));
        assert_eq!(walk.out, Some(("qr-a".into(), ip("10.7.0.7"))));
        let walk = go("qg-b", "198.51.100.1", "192.0.2.88", 2222);
        assert_eq!(walk.packet.destination, ip("10.7.0.9"));
        assert_eq!(walk.packet.transport, Transport::Ports(40000, 22));
    }

    #[test]
    fn what_was_turned_back_inside_does_not_keep_its_source() {
        let walk = go("qr-a", "10.7.0.7", "192.0.2.88", 2222);
        assert_eq!(walk.packet.source, ip("192.0.2.77"));
        assert_eq!(walk.out, Some(("qr-a".into(), ip("10.7.0.9"))));
    }

    #[test]
    fn it_is_told_what_stops_a_packet() {
        let stopped =
            |walk: &Walk, what| walk.checks.iter().any(|check| check.what == what && !check.passes);
        assert!(stopped(&go("qr-a", "10.7.0.7", "10.7.0.1", 80), "route"), "the router itself");
        assert!(stopped(&go("qr-a", "10.7.0.7", "169.254.169.254", 80), "forwarding"));
        assert!(stopped(&go("qr-c", "10.7.0.7", "192.0.2.1", 80), "link in"));
        let (seen, mut router) = router();
        router.routes.clear();
        router.nat = SeenNat::Changed;
        let (source, destination) = (ip("10.7.0.7"), ip("198.51.100.1"));
        let packet = Packet { source, destination, protocol: 1, transport: Transport::Icmp(8, 0) };
        let walk = walk(SPACE, "qr-a", packet, &seen, &router);
        assert!(stopped(&walk, "route") && stopped(&walk, "translations"), "{walk:?}");
    }
}
