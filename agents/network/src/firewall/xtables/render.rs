//! From the model to chains of `iptables` and `ebtables`. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use stackhand_kernel::netfilter::Element;
use stackhand_model::{Direction, Ethertype, MacAddr, SecurityGroupId};

use super::super::clauses::clauses;
use super::super::model::{Guard, Model};
use super::super::ruleset::{Chain, Field, Ruleset, Set, Shape, Table, TableName, address, digest};
use super::saved::{entry, wanted, zone_of};
use super::{DIGITS, words};

const ARRIVAL: &str = "stackhand-arrival";
const FORWARD: &str = "stackhand-forward";
const SENDERS: &str = "stackhand-senders";
const INTO: &str = "stackhand-into";
const PASSED: &str = "stackhand-passed";
const KINDS: &str = "stackhand-kinds";
const NEEDED_OUT: &str = "stackhand-needed-out";
const NEEDED_IN: &str = "stackhand-needed-in";

/// Kinds of frame that a guest may send and receive: IPv4, IPv6, ARP, RARP.
const FRAMES: [&str; 4] = ["IPv4", "IPv6", "ARP", "0x8035"];

/// The zones that bridges of the host have, by bridge.
pub(in crate::firewall) fn zones(seen: &Ruleset) -> BTreeMap<String, u16> {
    let table = seen.tables.get(&TableName::Raw4);
    let rules = table.and_then(|table| table.chains.get(ARRIVAL)).map(|chain| &chain.rules);
    rules
        .into_iter()
        .flat_map(|rules| rules.iter())
        .filter_map(|rule| zone_of(&rule.text))
        .collect()
}

/// The taps of no document whose chains are there and stay for a while.
pub(in crate::firewall) fn kept(model: &Model, seen: &Ruleset) -> BTreeSet<String> {
    let chains = |tap: &str| {
        dispatched(tap).into_iter().all(|(table, _, chain)| {
            seen.tables.get(&table).is_some_and(|table| table.chains.contains_key(&chain))
        })
    };
    model.spared.iter().filter(|tap| chains(tap)).cloned().collect()
}

/// What groups are called in names of chains and sets: the first digits of their ids, or a digest
/// where two begin alike.
pub(super) fn group_names(model: &Model) -> BTreeMap<SecurityGroupId, String> {
    let mut taken = BTreeSet::new();
    let rules = model.groups.values().flat_map(|group| &group.spec().rules);
    let remote = rules.filter_map(|rule| rule.remote_group.as_ref());
    let ids: BTreeSet<&SecurityGroupId> =
        model.groups.keys().chain(model.members.keys()).chain(remote).collect();
    let name = |id: &SecurityGroupId| {
        let mut name = id.0.simple().to_string();
        name.truncate(DIGITS);
        if !taken.insert(name.clone()) {
            name = short_digest(&id.to_string());
            taken.insert(name.clone());
        }
        (*id, name)
    };
    ids.into_iter().map(name).collect()
}

fn short_digest(text: &str) -> String {
    format!("{:015x}", digest(text) >> 4)
}

/// The lines that lead a tap's frames to its chains: table, chain that they are in, chain led to.
fn dispatched(tap: &str) -> Vec<(TableName, &'static str, String)> {
    let chain = |kind: &str| format!("stackhand-{kind}-{tap}");
    let mut all = vec![
        (TableName::FramesFrom, ARRIVAL, chain("is")),
        (TableName::FramesTo, INTO, chain("pi")),
    ];
    for (raw, filter) in IP_TABLES {
        all.push((raw, ARRIVAL, chain("is")));
        all.push((filter, SENDERS, chain("po")));
        all.push((filter, INTO, chain("pi")));
    }
    all
}

/// What a guest may send from.
type Source = (MacAddr, IpNet);

const IP_TABLES: [(TableName, TableName); 2] =
    [(TableName::Raw4, TableName::Filter4), (TableName::Raw6, TableName::Filter6)];

/// The tables that enforce `model`, beside those of packets. `kept` are taps whose chains stay as they
/// are.
pub(in crate::firewall) fn render(
    model: &Model,
    zones: &BTreeMap<String, u16>,
    kept: &BTreeSet<String>,
) -> Ruleset {
    let mut draft = Draft::default();
    if model.guards.is_empty() {
        return Ruleset::default();
    }
    let names = group_names(model);
    let members = |six: bool, group: &SecurityGroupId| {
        format!("stackhand-m{}-{}", if six { 6 } else { 4 }, names[group])
    };
    let taps: BTreeSet<&String> = model.guards.values().map(|it| &it.tap).chain(kept).collect();
    for (table, from, to) in taps.into_iter().flat_map(|tap| dispatched(tap)) {
        draft.line(table, from, lead(table, from, &to));
    }
    draft.skeleton();
    for (bridge, zone) in zones {
        for (raw, _) in IP_TABLES {
            draft.line(raw, ARRIVAL, format!("-i {bridge} -j CT --zone {zone}"));
        }
    }
    for (id, nets) in &model.members {
        for six in [false, true] {
            draft.members(members(six, id), six, nets);
        }
    }
    for (id, group) in &model.groups {
        for (kind, direction, target) in
            [("go", Direction::Egress, PASSED), ("gi", Direction::Ingress, "ACCEPT")]
        {
            let chain = format!("stackhand-{kind}-{}", names[id]);
            for (_, table) in IP_TABLES {
                draft.chain(table, &chain, [] as [String; 0]);
            }
            for clause in clauses(group.spec(), direction) {
                let six = clause.family == Ethertype::IPv6;
                let table = if six { TableName::Filter6 } else { TableName::Filter4 };
                for what in words::matches(&clause, direction, |group| members(six, group)) {
                    draft.line(table, &chain, format!("{what}-j {target}"));
                }
            }
        }
    }
    for guard in model.guards.values() {
        draft.who_it_is(guard);
        draft.what_passes(guard, &names);
    }
    draft.0
}

/// A line that leads to the chain of a tap, whose name the chain's ends with.
fn lead(table: TableName, from: &str, to: &str) -> String {
    // After the prefix and the two letters of a kind.
    let tap = to.splitn(3, '-').nth(2).unwrap_or_default();
    match (table, from) {
        (TableName::FramesFrom, _) => format!("-i {tap} -j {to}"),
        (TableName::FramesTo, _) => format!("-o {tap} -j {to}"),
        (_, INTO) => format!("-m physdev --physdev-out {tap} --physdev-is-bridged -j {to}"),
        // Not only what is bridged: the host may be the guest's router.
        _ => format!("-m physdev --physdev-in {tap} -j {to}"),
    }
}

#[derive(Debug, Default)]
struct Draft(Ruleset);

impl Draft {
    fn table(&mut self, name: TableName) -> &mut Table {
        self.0.tables.entry(name).or_default()
    }

    /// Adds a line to a chain, which is made if it is not there.
    fn line(&mut self, table: TableName, chain: &str, line: impl Into<String>) {
        let rule = wanted(table, line.into());
        let chain = self.table(table).chains.entry(chain.to_owned()).or_default();
        Arc::make_mut(&mut chain.rules).push(rule);
    }

    fn chain<Line: Into<String>>(
        &mut self,
        table: TableName,
        chain: &str,
        lines: impl IntoIterator<Item = Line>,
    ) {
        self.table(table).chains.entry(chain.to_owned()).or_default();
        lines.into_iter().for_each(|line| self.line(table, chain, line));
    }

    /// The line by which a chain of the host leads to one of ours.
    fn entry(&mut self, table: TableName, hook: &str, chain: &str) {
        let rule = wanted(table, format!("-j {chain}"));
        let new = Chain { base: Some(entry()), rules: Arc::new(vec![rule]) };
        self.table(table).chains.insert(hook.to_owned(), new);
    }

    /// What is the same on every host.
    fn skeleton(&mut self) {
        self.entry(TableName::FramesFrom, "PREROUTING", ARRIVAL);
        self.entry(TableName::FramesTo, "FORWARD", INTO);
        let kinds = FRAMES.map(|kind| format!("-p {kind} -j RETURN"));
        self.chain(TableName::FramesTo, KINDS, kinds);
        self.line(TableName::FramesTo, KINDS, "-j DROP");
        for (raw, filter) in IP_TABLES {
            self.entry(raw, "PREROUTING", ARRIVAL);
            self.entry(filter, "INPUT", SENDERS);
            self.entry(filter, "FORWARD", FORWARD);
            self.chain(filter, FORWARD, [SENDERS, INTO].map(|chain| format!("-j {chain}")));
            // Whoever may send is judged by who receives, and by nobody else.
            self.chain(filter, PASSED, [format!("-j {INTO}"), "-j ACCEPT".to_owned()]);
        }
        let udp = |from: u16, to: u16| format!("-p udp -m udp --sport {from} --dport {to}");
        let six = |kinds: [u8; 7]| {
            kinds.map(|kind| format!("-p ipv6-icmp -m icmp6 --icmpv6-type {kind}"))
        };
        let (v4, v6) = (TableName::Filter4, TableName::Filter6);
        let out = six([130, 131, 132, 133, 135, 136, 143]);
        let into = six([130, 131, 132, 134, 135, 136, 143]);
        for (table, chain, target, what) in [
            (v4, NEEDED_OUT, PASSED, vec![udp(68, 67)]),
            (v4, NEEDED_IN, "ACCEPT", vec![udp(67, 68)]),
            (v6, NEEDED_OUT, PASSED, [vec![udp(546, 547)], out.to_vec()].concat()),
            (v6, NEEDED_IN, "ACCEPT", [vec![udp(547, 546)], into.to_vec()].concat()),
        ] {
            let lines = what.into_iter().map(|what| format!("{what} -j {target}"));
            self.chain(table, chain, lines);
        }
    }

    /// A group's members, as a set.
    fn members(&mut self, name: String, six: bool, nets: &BTreeSet<IpNet>) {
        let of_family = nets.iter().filter(|net| matches!(net, IpNet::V6(_)) == six);
        let nets = IpNet::aggregate(&of_family.copied().collect());
        let elements = nets.into_iter().flat_map(halves).map(element).collect();
        let set = Set { shape: Shape::Addresses { six, ranges: true }, elements };
        self.table(TableName::Members).sets.insert(name, set);
    }

    /// Who a guest may say it is, on arrival.
    fn who_it_is(&mut self, guard: &Guard) {
        let chain = |kind: &str| format!("stackhand-{kind}-{}", guard.tap);
        let is = chain("is");
        let tables = [TableName::FramesFrom, TableName::Raw4, TableName::Raw6];
        if !guard.open {
            return tables.iter().for_each(|table| self.line(*table, &is, "-j DROP"));
        }
        let (frames, macs) = (TableName::FramesFrom, chain("ma"));
        for mac in guard.macs() {
            self.line(frames, &macs, format!("-s {mac} -j RETURN"));
        }
        self.line(frames, &macs, "-j DROP");
        self.line(frames, &is, format!("-j {macs}"));
        for kind in FRAMES.iter().filter(|kind| **kind != "ARP") {
            self.line(frames, &is, format!("-p {kind} -j RETURN"));
        }
        let arp = "--arp-htype 1 --arp-ptype 0x800";
        let (v4, v6): (Vec<Source>, Vec<Source>) =
            guard.sources.iter().copied().partition(|(_, net)| matches!(net, IpNet::V4(_)));
        for (mac, net) in &v4 {
            let net = plain(net);
            let claim = format!("-p ARP {arp} --arp-ip-src {net} --arp-mac-src {mac} -j RETURN");
            self.line(frames, &is, claim);
        }
        for mac in guard.macs() {
            // A probe before an address is taken (RFC 5227).
            let probe = format!("--arp-op Request {arp} --arp-ip-src 0.0.0.0 --arp-mac-src {mac}");
            self.line(frames, &is, format!("-p ARP {probe} -j RETURN"));
        }
        self.line(frames, &is, "-j DROP");

        let own = |(mac, net): &Source| format!("-s {net} -m mac --mac-source {mac} -j RETURN");
        // No guest serves DHCP.
        self.line(TableName::Raw4, &is, "-p udp -m udp --sport 67 --dport 68 -j DROP");
        self.chain(TableName::Raw4, &is, v4.iter().map(own));
        let start = "-s 0.0.0.0/32 -p udp -m udp --sport 68 --dport 67 -j RETURN";
        self.chain(TableName::Raw4, &is, [start, "-j DROP"]);

        // No guest is a router, nor serves DHCP.
        let claims = chain("cl");
        let kind = |kind: u8| format!("-p ipv6-icmp -m icmp6 --icmpv6-type {kind}");
        let lines = [
            format!("{} -j DROP", kind(134)),
            format!("{} -j DROP", kind(137)),
            "-p udp -m udp --sport 547 --dport 546 -j DROP".to_owned(),
            format!("{} -j {claims}", kind(136)),
        ];
        self.chain(TableName::Raw6, &is, lines);
        self.chain(TableName::Raw6, &is, v6.iter().map(own));
        // Duplicate address detection, and joining the groups that it needs.
        let joins = [131, 135, 143]
            .map(|number| format!("-s ::/128 -d ff02::/16 {} -j RETURN", kind(number)));
        self.chain(TableName::Raw6, &is, joins);
        self.line(TableName::Raw6, &is, "-j DROP");
        let nets: BTreeSet<IpNet> = v6.iter().map(|(_, net)| *net).collect();
        self.chain(TableName::Raw6, &claims, nets.iter().filter_map(claim));
        self.line(TableName::Raw6, &claims, "-j DROP");
    }

    /// What goes in and out.
    fn what_passes(&mut self, guard: &Guard, names: &BTreeMap<SecurityGroupId, String>) {
        let chain = |kind: &str| format!("stackhand-{kind}-{}", guard.tap);
        let frames = if guard.open { format!("-j {KINDS}") } else { "-j DROP".to_owned() };
        self.line(TableName::FramesTo, &chain("pi"), frames);
        for (_, filter) in IP_TABLES {
            for (port, profile, group, needed, target) in
                [("po", "so", "go", NEEDED_OUT, PASSED), ("pi", "si", "gi", NEEDED_IN, "ACCEPT")]
            {
                if !guard.open {
                    self.line(filter, &chain(port), "-j DROP");
                    continue;
                }
                let groups: Vec<&String> = guard.groups.iter().map(|id| &names[id]).collect();
                let key = short_digest(&format!("{} {groups:?}", guard.stateful));
                let profile = format!("stackhand-{profile}-{key}");
                self.line(filter, &chain(port), format!("-j {profile}"));
                if self.table(filter).chains.contains_key(&profile) {
                    continue;
                }
                if guard.stateful {
                    let answers = "-m conntrack --ctstate RELATED,ESTABLISHED";
                    self.line(filter, &profile, format!("{answers} -j {target}"));
                }
                self.line(filter, &profile, format!("-j {needed}"));
                let lines = groups.iter().map(|name| format!("-j stackhand-{group}-{name}"));
                self.chain(filter, &profile, lines);
                self.line(filter, &profile, "-j DROP");
            }
        }
    }
}

/// A range as `ebtables` lists it.
fn plain(net: &IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() }
}

/// A neighbour advertisement for an address of this range: it is behind eight bytes of header, and no
/// extension header is before that.
fn claim(net: &IpNet) -> Option<String> {
    let IpNet::V6(net) = net else { return None };
    let bytes = [net.network().octets(), net.netmask().octets()];
    let [address, mask] = bytes.map(|bytes| {
        [0, 4, 8, 12].map(|at| u32::from_be_bytes([0, 1, 2, 3].map(|next| bytes[at + next])))
    });
    let words = (0..4)
        .filter(|index| mask[*index] != 0)
        .map(|index| format!("&&{}&{:#x}={:#x}", 48 + 4 * index, mask[index], address[index]));
    Some(format!("-m u32 --u32 3&0xFF=58{} -j RETURN", words.collect::<String>()))
}

/// Ranges that a set takes: not that of all addresses, but its halves.
fn halves(net: IpNet) -> Vec<IpNet> {
    let all = net.prefix_len() == 0;
    let halves = net.subnets(net.prefix_len() + u8::from(all));
    halves.map_or_else(|_| vec![net], Iterator::collect)
}

/// A range as an element: from its first address to its last.
pub(super) fn element(net: IpNet) -> Element {
    let key = |address| Field::key(&[Field::Ip(address)]);
    Element { end: Some(key(net.broadcast())), ..Element::new(key(net.network())) }
}

/// The range that an element is.
pub(super) fn net(element: &Element) -> Option<IpNet> {
    let end = element.end.as_ref()?;
    let number = |key: &[u8]| key.iter().fold(0, |number, byte| number << 8 | u128::from(*byte));
    let unused = u128::BITS - 8 * u32::try_from(element.key.len()).ok()?;
    let alike = (number(&element.key) ^ number(end)).leading_zeros().checked_sub(unused)?;
    IpNet::new(address(&element.key)?, u8::try_from(alike).ok()?).ok()
}
