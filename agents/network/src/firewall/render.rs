//! From the model to tables of nftables. Pure.
//!
//! A frame from a guest meets `arrival` (is it who it says it is?), then `egress`; one to a guest
//! meets `ingress`. Each looks the tap up in a map; a tap that is in none is not filtered. The maps
//! lead to a *profile*, the chain of all ports that have the same groups, which leads to the chains
//! of these groups.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use stackhand_kernel::netfilter::{Data, Element, Judgement};
use stackhand_model::{Direction, Ethertype, NetworkId, PortId};
use stackhand_model::{SecurityGroupId, SecurityGroupRule, SecurityGroupSpec};
use uuid::Uuid;

use super::clauses::{self, members_set};
use super::model::{Group, Guard, Model, Touched};
use super::packets;
use super::ruleset::{Base, Chain, Field, Rule, Ruleset, Set, Shape, Table, TableName, digest};
use super::{Tracking, xtables};
use crate::qos::PacketRules;

/// The bit of a packet's mark that says: answer of an allowed flow. Used only by `br_netfilter`
/// tracking, set and cleared between arrival and forwarding; other bits are left alone.
const ANSWER: &str = "0x00800000";
const NO_ANSWER: &str = "0xff7fffff";

/// Zones for bridges are taken from here on; lower ones are for anybody else.
const FIRST_ZONE: u16 = 4097;

/// Before connection tracking, whose number is -200, and the raw hooks, -300.
const EARLY: i32 = -310;

/// The kinds of frame that a guest may send and receive. A tag or a length says another kind.
const KINDS: &str = "{ ip, ip6, arp, 0x8035 }";

/// Chooses a zone for each bridge of `model`: the one that it has, that another agent gave it, or the
/// lowest free one.
#[must_use]
pub fn zones_of(model: &Model, seen: &Ruleset) -> BTreeMap<String, u16> {
    let mut has: BTreeMap<String, u16> = BTreeMap::new();
    for set in seen.tables.values().filter_map(|table| table.sets.get(ZONES)) {
        for element in &set.elements {
            if let (Some(link), Some(Data::Value(value))) = (set.shape.link(element), &element.data)
                && let Some(zone) = value.first_chunk()
            {
                has.insert(link, u16::from_ne_bytes(*zone));
            }
        }
    }
    has.extend(xtables::zones(seen));
    for (bridge, zone) in &model.zones {
        has.entry(bridge.clone()).or_insert(*zone);
    }
    let mut taken: BTreeSet<u16> = BTreeSet::new();
    let mut zones = BTreeMap::new();
    for bridge in model.bridges.values() {
        if let Some(zone) = has.get(bridge).filter(|zone| **zone >= FIRST_ZONE)
            && taken.insert(*zone)
        {
            zones.insert(bridge.clone(), *zone);
        }
    }
    for bridge in model.bridges.values() {
        if !zones.contains_key(bridge)
            && let Some(zone) = (FIRST_ZONE..=u16::MAX).find(|zone| !taken.contains(zone))
        {
            taken.insert(zone);
            zones.insert(bridge.clone(), zone);
        }
    }
    zones
}

const ZONES: &str = "zones";
const BRIDGES: &str = "bridges";
const GUARDS: &str = "guards";
pub(super) const SENDERS: &str = "senders";
pub(super) const RECEIVERS: &str = "receivers";
const MACS: &str = "macs";

/// Chains of groups as they were rendered last: a group that did not change costs nothing.
#[derive(Clone, Debug, Default)]
pub struct Rendered(BTreeMap<SecurityGroupId, (Group, Rules)>);

/// The rules of a group, in and out.
type Rules = [Arc<Vec<Rule>>; 2];

impl Rendered {
    fn rules(&mut self, id: SecurityGroupId, group: &Group) -> &Rules {
        if self.0.get(&id).is_none_or(|(known, _)| known != group) {
            let rules = [Direction::Ingress, Direction::Egress].map(|direction| {
                let lines = clauses::clauses(group.spec(), direction);
                let lines = lines.iter().flat_map(|clause| clause.lines(direction));
                Arc::new(lines.map(Rule::new).collect())
            });
            self.0.insert(id, (group.clone(), rules));
        }
        &self.0[&id].1
    }
}

/// The tables that enforce `model`. With `touched`, the elements of other ports and groups are left out:
/// for who compares the tables of two models that are alike there.
#[must_use]
pub fn render(
    model: &Model,
    tracking: Tracking,
    zones: &BTreeMap<String, u16>,
    rendered: &mut Rendered,
    touched: Option<&Touched>,
) -> Ruleset {
    let mut ruleset = Ruleset::default();
    if let Some(table) = packets::table(&model.packets, touched) {
        ruleset.tables.insert(TableName::Packets, table);
    }
    if model.guards.is_empty() {
        return ruleset;
    }
    rendered.0.retain(|id, _| model.groups.contains_key(id));
    let mut bridge = Table::default();
    skeleton(&mut bridge, tracking);
    let none = BTreeSet::new();
    for (id, members) in &model.members {
        let told = touched.is_none_or(|touched| touched.members.contains(id));
        member_sets(&mut bridge, *id, if told { members } else { &none });
    }
    for (id, group) in &model.groups {
        for (word, rules) in ["in", "out"].into_iter().zip(rendered.rules(*id, group)) {
            let chain = Chain { base: None, rules: Arc::clone(rules) };
            bridge.chains.insert(group_chain(*id, word), chain);
        }
    }
    let mut profiles = BTreeMap::new();
    for (id, guard) in &model.guards {
        let key = guard.open.then(|| {
            let alike = profiles.entry((guard.stateful, &guard.groups));
            *alike.or_insert_with(|| profile(&mut bridge, guard, tracking))
        });
        if touched.is_none_or(|touched| touched.guards.contains(id)) {
            port(&mut bridge, guard, key);
        }
    }
    let zone = |(bridge, zone): (&String, &u16)| Element {
        data: Some(Data::Value(zone.to_ne_bytes().to_vec())),
        ..Element::new(Field::key(&[Field::Link(bridge.clone())]))
    };
    let zones = Set { shape: Shape::Zones, elements: zones.iter().map(zone).collect() };
    match tracking {
        Tracking::Bridge => drop(bridge.sets.insert(ZONES.to_owned(), zones)),
        Tracking::BrNetfilter => {
            let bridges = zones.elements.iter().map(|zone| Element::new(zone.key.clone()));
            let bridges = Set { shape: Shape::Links, elements: bridges.collect() };
            let mut told = told_by_ip();
            told.sets.extend([(ZONES.to_owned(), zones), (BRIDGES.to_owned(), bridges)]);
            ruleset.tables.insert(TableName::Inet, told);
        }
    }
    ruleset.tables.insert(TableName::Bridge, bridge);
    ruleset
}

/// The table that tells what the IP layer knows of bridged packets.
fn told_by_ip() -> Table {
    let mut table = Table::default();
    let arrival = Base { hook: 0, priority: EARLY, accepts: true };
    chain(&mut table, "arrival", Some(arrival), [format!("ct zone set iifname map @{ZONES}")]);
    let forward = Base { hook: 2, priority: 0, accepts: true };
    // Packets that the host routes are none of ours.
    let told = format!(
        "iifname @{BRIDGES} ct state established,related meta mark set meta mark | {ANSWER}"
    );
    chain(&mut table, "told", Some(forward), [told]);
    table
}

pub(super) fn chain<Line: Into<String>>(
    table: &mut Table,
    name: &str,
    base: Option<Base>,
    lines: impl IntoIterator<Item = Line>,
) {
    let rules = Arc::new(lines.into_iter().map(Rule::new).collect());
    table.chains.insert(name.to_owned(), Chain { base, rules });
}

fn group_chain(group: SecurityGroupId, word: &str) -> String {
    format!("group-{group}-{word}")
}

/// What is the same on every host.
fn skeleton(table: &mut Table, tracking: Tracking) {
    let mut set = |name: &str, shape| {
        table.sets.insert(name.to_owned(), Set { shape, elements: BTreeSet::new() });
    };
    for map in [GUARDS, SENDERS, RECEIVERS] {
        set(map, Shape::Verdicts);
    }
    set(MACS, Shape::Macs);
    for ranges in [false, true] {
        for six in [false, true] {
            set(&sources_set(six, ranges), Shape::Sources { six, ranges });
        }
        set(&claims_set(ranges), Shape::Claims { ranges });
    }
    let arrival = Base { hook: 0, priority: EARLY, accepts: true };
    let first = match tracking {
        Tracking::Bridge => format!("ct zone set meta ibrname map @{ZONES}"),
        // Nobody but us may say that a packet is an answer.
        Tracking::BrNetfilter => format!("meta mark set meta mark & {NO_ANSWER}"),
    };
    chain(table, "arrival", Some(arrival), [first, format!("iifname vmap @{GUARDS}")]);
    // Behind br_netfilter, whose number is 0, and after the IP layer's hooks that it calls.
    let at = |hook, priority| Some(Base { hook, priority, accepts: true });
    chain(table, "egress", at(2, 10), [format!("iifname vmap @{SENDERS}")]);
    chain(table, "to-host", at(1, 10), [format!("iifname vmap @{SENDERS}")]);
    chain(table, "ingress", at(2, 11), [format!("oifname vmap @{RECEIVERS}")]);

    chain(table, "guard", None, [
        format!("iifname . ether saddr != @{MACS} drop"),
        "ether type vmap { ip : goto guard4, ip6 : goto guard6, arp : goto guard-arp, 0x8035 : accept }".to_owned(),
        "drop".to_owned(),
    ]);
    let is_own = |six: bool| {
        let ip = if six { "ip6" } else { "ip" };
        [false, true].map(|ranges| {
            format!("iifname . ether saddr . {ip} saddr @{} accept", sources_set(six, ranges))
        })
    };
    let [own, own_ranges] = is_own(false);
    chain(
        table,
        "guard4",
        None,
        [
            // No guest serves DHCP.
            "udp sport 67 udp dport 68 drop".to_owned(),
            own,
            own_ranges,
            "ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept".to_owned(),
            "drop".to_owned(),
        ],
    );
    let [own, own_ranges] = is_own(true);
    let claim = |ranges| format!("iifname . @th,64,128 @{}", claims_set(ranges));
    chain(
        table,
        "claims",
        None,
        [format!("{} return", claim(false)), format!("{} return", claim(true)), "drop".to_owned()],
    );
    chain(
        table,
        "guard6",
        None,
        [
            // No guest is a router, nor serves DHCP.
            "icmpv6 type { 134, 137 } drop".to_owned(),
            "udp sport 547 udp dport 546 drop".to_owned(),
            // A neighbour advertisement claims the address behind its eight-byte header.
            "icmpv6 type 136 jump claims".to_owned(),
            own,
            own_ranges,
            // Duplicate address detection, and joining the groups that it needs.
            "ip6 saddr :: ip6 daddr ff02::/16 icmpv6 type { 131, 135, 143 } accept".to_owned(),
            "drop".to_owned(),
        ],
    );
    let [own, own_ranges] = [false, true].map(|ranges| {
        format!("iifname . arp saddr ether . arp saddr ip @{} accept", sources_set(false, ranges))
    });
    chain(
        table,
        "guard-arp",
        None,
        [
            "arp htype != 1 drop".to_owned(),
            "arp ptype != 0x0800 drop".to_owned(),
            "arp hlen != 6 drop".to_owned(),
            "arp plen != 4 drop".to_owned(),
            own,
            own_ranges,
            // A probe before an address is taken (RFC 5227).
            format!(
                "arp operation request arp saddr ip 0.0.0.0 iifname . arp saddr ether @{MACS} accept"
            ),
            "drop".to_owned(),
        ],
    );

    // Without these no guest gets an address or finds a neighbour; the guard has seen to the sender.
    let common =
        [format!("ether type != {KINDS} drop"), "ether type { arp, 0x8035 } accept".to_owned()];
    let out = [
        "udp sport 68 udp dport 67 meta protocol ip accept",
        "udp sport 546 udp dport 547 meta protocol ip6 accept",
        "icmpv6 type { 130, 131, 132, 133, 135, 136, 143 } accept",
    ];
    let into = [
        "udp sport 67 udp dport 68 meta protocol ip accept",
        "udp sport 547 udp dport 546 meta protocol ip6 accept",
        "icmpv6 type { 130, 131, 132, 134, 135, 136, 143 } accept",
    ];
    for (name, lines) in [("needed-out", out), ("needed-in", into)] {
        let lines = common.iter().cloned().chain(lines.map(str::to_owned));
        chain(table, name, None, lines);
    }
}

fn sources_set(six: bool, ranges: bool) -> String {
    format!("sources{}{}", if six { 6 } else { 4 }, if ranges { "-ranges" } else { "" })
}

fn claims_set(ranges: bool) -> String {
    format!("claims{}", if ranges { "-ranges" } else { "" })
}

/// The chains of all ports that have the same groups as this one. Returns what they are known by.
fn profile(table: &mut Table, guard: &Guard, tracking: Tracking) -> u64 {
    let groups: Vec<String> = guard.groups.iter().map(ToString::to_string).collect();
    let key = digest(&format!("{} {}", guard.stateful, groups.join(" ")));
    let answers = match tracking {
        Tracking::Bridge => "ct state established,related accept".to_owned(),
        Tracking::BrNetfilter => format!("meta mark & {ANSWER} == {ANSWER} accept"),
    };
    for word in ["out", "in"] {
        let lines = guard
            .stateful
            .then(|| answers.clone())
            .into_iter()
            .chain([format!("jump needed-{word}")])
            .chain(guard.groups.iter().map(|id| format!("jump {}", group_chain(*id, word))))
            .chain(["drop".to_owned()]);
        chain(table, &profile_chain(key, word), None, lines);
    }
    key
}

fn profile_chain(key: u64, word: &str) -> String {
    format!("ports-{key:016x}-{word}")
}

/// The elements of one port that has the chains of `profile`, or is shut.
fn port(table: &mut Table, guard: &Guard, profile: Option<u64>) {
    let tap = || Field::Link(guard.tap.clone());
    let mut lead = |map: &str, judgement: Judgement| {
        let data = Some(Data::Verdict(judgement));
        add(table, map, Element { data, ..Element::new(Field::key(&[tap()])) });
    };
    lead(GUARDS, Judgement::Jump("guard".to_owned()));
    for (word, map) in [("out", SENDERS), ("in", RECEIVERS)] {
        let chain = profile.map(|key| Judgement::Jump(profile_chain(key, word)));
        lead(map, chain.unwrap_or(Judgement::Drop));
    }
    if profile.is_none() {
        return;
    }
    for mac in guard.macs() {
        add(table, MACS, Element::new(Field::key(&[tap(), Field::Mac(mac)])));
    }
    for (mac, net) in &guard.sources {
        let six = matches!(net, IpNet::V6(_));
        let key = |address| Field::key(&[tap(), Field::Mac(*mac), Field::Ip(address)]);
        let (set, element) = single_or_range(*net, key);
        add(table, &sources_set(six, set), element);
        if six {
            let key = |address| Field::key(&[tap(), Field::Ip(address)]);
            let (set, element) = single_or_range(*net, key);
            add(table, &claims_set(set), element);
        }
    }
}

pub(super) fn add(table: &mut Table, set: &str, element: Element) {
    if let Some(set) = table.sets.get_mut(set) {
        set.elements.insert(element);
    }
}

/// The element for a range in a set of concatenations, and whether it is more than one address.
fn single_or_range(net: IpNet, key: impl Fn(IpAddr) -> Vec<u8>) -> (bool, Element) {
    let (first, last) = (net.network(), net.broadcast());
    let single = first == last;
    let end = (!single).then(|| key(last));
    (!single, Element { end, ..Element::new(key(first)) })
}

/// The sets of a group's members: single addresses apart from ranges, which cost more to change.
fn member_sets(table: &mut Table, group: SecurityGroupId, members: &BTreeSet<IpNet>) {
    for six in [false, true] {
        let of_family = members.iter().filter(|net| matches!(net, IpNet::V6(_)) == six);
        let (single, ranges): (Vec<IpNet>, Vec<IpNet>) =
            of_family.partition(|net| net.prefix_len() == net.max_prefix_len());
        let single = single.into_iter().map(|net| Element::new(key_of(net.addr())));
        let ranges = merged(&ranges).into_iter().map(|(first, last)| Element {
            end: Some(key_of(last)),
            ..Element::new(key_of(first))
        });
        for (ranged, elements) in [(false, single.collect()), (true, ranges.collect())] {
            let shape = Shape::Addresses { six, ranges: ranged };
            table.sets.insert(members_set(group, six, ranged), Set { shape, elements });
        }
    }
}

fn key_of(address: IpAddr) -> Vec<u8> {
    Field::key(&[Field::Ip(address)])
}

/// Ranges of one family as first and last addresses, none of which touches another.
fn merged(nets: &[IpNet]) -> Vec<(IpAddr, IpAddr)> {
    let mut merged: Vec<(IpAddr, IpAddr)> = Vec::new();
    let mut sorted = nets.to_vec();
    sorted.sort_unstable_by_key(|net| (net.network(), net.broadcast()));
    for net in sorted {
        let (first, last) = (net.network(), net.broadcast());
        match merged.last_mut() {
            Some((_, end)) if first <= *end || next(*end) == Some(first) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// The address behind this one.
fn next(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(it) => u32::from(it).checked_add(1).map(|it| Ipv4Addr::from(it).into()),
        IpAddr::V6(it) => u128::from(it).checked_add(1).map(|it| Ipv6Addr::from(it).into()),
    }
}

/// The key behind this one, read as a number; `None` behind the last.
pub(super) fn behind(key: &[u8]) -> Option<Vec<u8>> {
    let mut key = key.to_vec();
    for byte in key.iter_mut().rev() {
        let (more, over) = byte.overflowing_add(1);
        *byte = more;
        if !over {
            return Some(key);
        }
    }
    None
}

/// The key before this one.
pub(super) fn before(key: &[u8]) -> Vec<u8> {
    let mut key = key.to_vec();
    for byte in key.iter_mut().rev() {
        let (less, under) = byte.overflowing_sub(1);
        *byte = less;
        if !under {
            break;
        }
    }
    key
}

/// What a set of ours holds, by its name.
pub(super) fn shape_of(name: &str) -> Shape {
    let ranges = name.ends_with("-ranges");
    let plain = name.strip_suffix("-ranges").unwrap_or(name);
    match plain {
        ZONES => Shape::Zones,
        BRIDGES => Shape::Links,
        GUARDS | SENDERS | RECEIVERS => Shape::Verdicts,
        MACS => Shape::Macs,
        "sources4" | "sources6" => Shape::Sources { six: plain.ends_with('6'), ranges },
        "claims" => Shape::Claims { ranges },
        _ if plain.starts_with("members-") => {
            Shape::Addresses { six: plain.ends_with("-6"), ranges }
        }
        _ => Shape::Unknown,
    }
}

/// A firewall that has everything that rules may hold, to try a kernel with.
pub(super) fn sample(tracking: Tracking) -> Ruleset {
    let (stateful, open) = (true, true);
    let group = SecurityGroupId(Uuid::nil());
    let guard = Guard {
        tap: "tap0".to_owned(),
        network: NetworkId(Uuid::nil()),
        sources: BTreeSet::new(),
        groups: BTreeSet::from([group]),
        stateful,
        open,
    };
    let mut model = Model::default();
    model.guards.insert(PortId(Uuid::nil()), guard);
    model.members.insert(group, BTreeSet::new());
    let mut ruleset = render(&model, tracking, &BTreeMap::new(), &mut Rendered::default(), None);
    let rule = |port_range_min| SecurityGroupRule {
        direction: Direction::Ingress,
        ethertype: Ethertype::IPv4,
        protocol: Some(if port_range_min < 9 { "icmp" } else { "tcp" }.to_owned()),
        port_range_min: Some(port_range_min),
        port_range_max: Some(port_range_min),
        remote_cidr: None,
        remote_group: (port_range_min > 9).then_some(group),
        remote_addresses: BTreeSet::new(),
    };
    let spec = SecurityGroupSpec { stateful, rules: vec![rule(8), rule(22)] };
    if let Some(table) = ruleset.tables.get_mut(&TableName::Bridge) {
        for (word, direction) in [("in", Direction::Ingress), ("out", Direction::Egress)] {
            let lines = clauses::clauses(&spec, direction);
            let lines = lines.iter().flat_map(|clause| clause.lines(direction));
            chain(table, &group_chain(group, word), None, lines);
        }
    }
    ruleset
}

/// Every limit and mark that there is, to try a kernel with.
pub(super) fn sample_packets() -> Ruleset {
    let object = PortId(Uuid::nil()).object();
    let (rate, dscp) = (Some(1000), Some(46));
    let rules = PacketRules { object, to_guest: rate, from_guest: rate, dscp };
    let model = Model { packets: [("tap0".to_owned(), rules)].into(), ..Model::default() };
    render(&model, Tracking::Bridge, &BTreeMap::new(), &mut Rendered::default(), None)
}
