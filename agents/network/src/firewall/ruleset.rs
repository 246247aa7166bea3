//! Table of nftables as plain values, and what it takes to get from one to another. Pure.
//!
//! A rule is known by its tag, a digest of its text that it carries as its comment: the kernel
//! keeps rules in a form of its own, and a rule that anybody else put has no tag of ours.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use stackhand_kernel::netfilter::{Data, Element, Family, Judgement};
use stackhand_model::{MacAddr, ObjectRef, SecurityGroupId};
use uuid::Uuid;

/// The names of our tables, in whatever family.
pub const NAMES: [&str; 2] = ["stackhand", "stackhand_qos"];

/// The names of the tables in which the second renderer's chains are, in whatever family.
pub const XTABLES_NAMES: [&str; 3] = ["raw", "filter", "nat"];

/// A table of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableName {
    /// Rules on frames of bridges.
    Bridge,
    /// What the IP layer knows of bridged packets.
    Inet,
    /// Packet rates and marks, on bridges.
    Packets,
    /// Sets of addresses of `ipset`; this one and those below belong to the second renderer.
    Members,
    /// `ebtables`, nat: frames as they arrive.
    FramesFrom,
    /// `ebtables`, filter: frames as they go to another port.
    FramesTo,
    /// `iptables`, raw.
    Raw4,
    /// `ip6tables`, raw.
    Raw6,
    /// `iptables`, filter.
    Filter4,
    /// `ip6tables`, filter.
    Filter6,
}

/// All tables of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// By family.
    pub tables: BTreeMap<TableName, Table>,
}

/// One table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Switched off by somebody: its rules are there and judge nothing.
    pub dormant: bool,
    /// Chains by name.
    pub chains: BTreeMap<String, Chain>,
    /// Sets and maps by name.
    pub sets: BTreeMap<String, Set>,
}

/// A chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Where packets enter it; `None`: from other chains.
    pub base: Option<Base>,
    /// Its rules, in order. Shared, because comparing the same with itself should cost nothing.
    pub rules: Arc<Vec<Rule>>,
}

/// Where packets enter a chain. What the chain does not judge passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Base {
    /// The kernel's number of the hook: 0 arrival, 1 to the host, 2 forwarding, 4 departure.
    pub hook: u32,
    /// Lower is earlier.
    pub priority: i32,
    /// Whether packets that are not judged pass.
    pub accepts: bool,
}

/// A rule. Two with one tag are the same.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Its digest; empty for a rule that is not ours.
    pub tag: String,
    /// What `nft` is given; empty for one that was read back.
    pub text: String,
}

/// A set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// What it holds.
    pub shape: Shape,
    /// Its elements.
    pub elements: BTreeSet<Element>,
}

/// What a set or map of ours holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shape {
    /// Bridge → zone of its flows.
    Zones,
    /// Names of links.
    Links,
    /// Tap → verdict.
    Verdicts,
    /// Tap and Ethernet address.
    Macs,
    /// Tap, Ethernet and IP address, of IPv4 or IPv6; single addresses or ranges.
    Sources {
        /// IPv6.
        six: bool,
        /// Ranges.
        ranges: bool,
    },
    /// Tap and IPv6 address that it may claim.
    Claims {
        /// Ranges.
        ranges: bool,
    },
    /// IP addresses.
    Addresses {
        /// IPv6.
        six: bool,
        /// Ranges.
        ranges: bool,
    },
    /// None of ours.
    Unknown,
}

/// A part of an element's key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Field {
    /// A link's name.
    Link(String),
    /// An Ethernet address.
    Mac(MacAddr),
    /// An IP address.
    Ip(IpAddr),
}

/// Where a verdict map leads.
pub type Target = Judgement;

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Edit {
    /// Deletes a table with all in it.
    DropTable(TableName),
    /// Makes a table.
    MakeTable(TableName),
    /// Makes a set or map.
    MakeSet(TableName, String, Shape),
    /// Makes a chain without rules.
    MakeChain(TableName, String, Option<Base>),
    /// Replaces the rules of a chain.
    Fill(TableName, String, Arc<Vec<Rule>>),
    /// Deletes a chain, which nothing leads to.
    DropChain(TableName, String),
    /// Deletes a set or map, which no rule uses.
    DropSet(TableName, String, Shape),
    /// Adds elements.
    Add(TableName, String, Shape, Vec<Element>),
    /// Removes elements, which are in order.
    Remove(TableName, String, Shape, Vec<Element>),
}

/// What to do, in three stages of one transaction each: rules and sets that are new, elements, and
/// what nothing uses any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What is made and filled.
    pub before: Vec<Edit>,
    /// Elements that come and go.
    pub elements: Vec<Edit>,
    /// What is deleted.
    pub after: Vec<Edit>,
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        self.tag == other.tag
    }
}

impl Eq for Rule {}

impl Rule {
    /// A rule with this text.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        let text = text.into();
        Self { tag: format!("stackhand {:016x}", digest(&text)), text }
    }

    /// A rule that was read back, by its comment.
    #[must_use]
    pub fn seen(comment: Option<&str>) -> Self {
        Self { tag: comment.unwrap_or_default().to_owned(), text: String::new() }
    }
}

/// FNV-1a: short, the same on every host and in every version, and enough against chance.
pub(super) fn digest(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

impl TableName {
    /// All, in the order that they are made in.
    pub const ALL: [Self; 10] = [
        Self::Bridge,
        Self::Inet,
        Self::Packets,
        Self::Members,
        Self::FramesFrom,
        Self::FramesTo,
        Self::Raw4,
        Self::Raw6,
        Self::Filter4,
        Self::Filter6,
    ];

    /// Its family among tables of nftables; `None` for one of another program.
    #[must_use]
    pub fn family(self) -> Option<Family> {
        match self {
            Self::Bridge | Self::Packets => Some(Family::Bridge),
            Self::Inet => Some(Family::Inet),
            _ => None,
        }
    }

    /// The program that keeps it, and its name there.
    #[must_use]
    pub fn place(self) -> (&'static str, &'static str) {
        let [filter, packets] = NAMES;
        match self {
            Self::Bridge => ("bridge", filter),
            Self::Inet => ("inet", filter),
            Self::Packets => ("bridge", packets),
            Self::Members => ("ipset", "members"),
            Self::FramesFrom => ("ebtables", "nat"),
            Self::FramesTo => ("ebtables", "filter"),
            Self::Raw4 => ("iptables", "raw"),
            Self::Raw6 => ("ip6tables", "raw"),
            Self::Filter4 => ("iptables", "filter"),
            Self::Filter6 => ("ip6tables", "filter"),
        }
    }

    /// Whether its rules are on frames and kept by `ebtables`.
    pub(super) fn is_of_frames(self) -> bool {
        matches!(self, Self::FramesFrom | Self::FramesTo)
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (family, name) = self.place();
        write!(f, "{family} {name}")
    }
}

impl Ruleset {
    /// What it takes to get from `seen` to `self`. What belongs to a tap in `spared` stays, and no
    /// chain or set goes while there is one: some rule of it may use it.
    #[must_use]
    pub fn plan(&self, seen: &Self, spared: &BTreeSet<String>) -> Plan {
        let mut plan = Plan::default();
        let nothing = Table::default();
        for name in TableName::ALL {
            let wanted = self.tables.get(&name);
            let there = seen.tables.get(&name);
            let there = match (wanted, there) {
                (None, Some(_)) if spared.is_empty() => {
                    plan.after.push(Edit::DropTable(name));
                    continue;
                }
                (None, _) => continue,
                (Some(_), Some(table)) if table.dormant => {
                    plan.before.extend([Edit::DropTable(name), Edit::MakeTable(name)]);
                    &nothing
                }
                (Some(_), None) => {
                    plan.before.push(Edit::MakeTable(name));
                    &nothing
                }
                (Some(_), Some(table)) => table,
            };
            plan.table(name, wanted.unwrap_or(&nothing), there, spared);
        }
        plan
    }
}

impl Plan {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.before.is_empty() && self.elements.is_empty() && self.after.is_empty()
    }

    /// All changes, in order.
    pub fn edits(&self) -> impl Iterator<Item = &Edit> {
        self.before.iter().chain(&self.elements).chain(&self.after)
    }

    /// Whether something that passed before may not pass any more. Rates and marks judge nothing.
    #[must_use]
    pub fn narrows(&self) -> bool {
        self.edits().filter(|edit| edit.table() != TableName::Packets).any(|edit| match edit {
            Edit::Remove(..) | Edit::DropTable(_) | Edit::Fill(..) | Edit::DropChain(..) => true,
            Edit::Add(_, _, shape, _) => *shape == Shape::Verdicts,
            Edit::MakeTable(_) | Edit::MakeSet(..) | Edit::MakeChain(..) | Edit::DropSet(..) => {
                false
            }
        })
    }

    fn table(&mut self, name: TableName, wanted: &Table, seen: &Table, spared: &BTreeSet<String>) {
        for (set, Set { shape, .. }) in &wanted.sets {
            if !seen.sets.contains_key(set) {
                self.before.push(Edit::MakeSet(name, set.clone(), *shape));
            }
        }
        for (chain, want) in &wanted.chains {
            let there = seen.chains.get(chain);
            if there.is_some_and(|there| there.base != want.base) {
                self.before.push(Edit::DropChain(name, chain.clone()));
            }
            if there.is_none_or(|there| there.base != want.base) {
                self.before.push(Edit::MakeChain(name, chain.clone(), want.base));
            }
        }
        for (chain, want) in &wanted.chains {
            let same = seen.chains.get(chain).is_some_and(|there| {
                there.base == want.base
                    && (Arc::ptr_eq(&there.rules, &want.rules) || there.rules == want.rules)
            });
            let is_new_and_empty = want.rules.is_empty() && !seen.chains.contains_key(chain);
            if !same && !is_new_and_empty {
                self.before.push(Edit::Fill(name, chain.clone(), want.rules.clone()));
            }
        }
        for (set, want) in &wanted.sets {
            let none = BTreeSet::new();
            let there = seen.sets.get(set).map_or(&none, |there| &there.elements);
            let spares = |element: &&Element| {
                !spared.is_empty()
                    && want.shape.link(element).is_some_and(|link| {
                        let of_bridge = matches!(want.shape, Shape::Zones | Shape::Links);
                        of_bridge || spared.contains(&link)
                    })
            };
            let goes: Vec<Element> =
                there.difference(&want.elements).filter(|it| !spares(it)).cloned().collect();
            let comes: Vec<Element> = want.elements.difference(there).cloned().collect();
            if !goes.is_empty() {
                self.elements.push(Edit::Remove(name, set.clone(), want.shape, goes));
            }
            if !comes.is_empty() {
                self.elements.push(Edit::Add(name, set.clone(), want.shape, comes));
            }
        }
        if !spared.is_empty() {
            return;
        }
        let unwanted = seen.chains.keys().filter(|chain| !wanted.chains.contains_key(*chain));
        self.after.extend(unwanted.map(|chain| Edit::DropChain(name, chain.clone())));
        for (set, Set { shape, .. }) in &seen.sets {
            if !wanted.sets.contains_key(set) {
                self.after.push(Edit::DropSet(name, set.clone(), *shape));
            }
        }
    }
}

impl Edit {
    /// The table that it changes.
    #[must_use]
    pub fn table(&self) -> TableName {
        match self {
            Self::DropTable(name)
            | Self::MakeTable(name)
            | Self::MakeSet(name, ..)
            | Self::MakeChain(name, ..)
            | Self::Fill(name, ..)
            | Self::DropChain(name, ..)
            | Self::DropSet(name, ..)
            | Self::Add(name, ..)
            | Self::Remove(name, ..) => *name,
        }
    }
}

/// Makes the changes on values, as the kernel does on its own.
impl Ruleset {
    /// Makes one change.
    pub fn change(&mut self, edit: &Edit) {
        if let Edit::DropTable(name) = edit {
            return drop(self.tables.remove(name));
        }
        let table = self.tables.entry(edit.table()).or_default();
        match edit {
            Edit::DropTable(_) | Edit::MakeTable(_) => {}
            Edit::MakeSet(_, set, shape) => {
                let new = Set { shape: *shape, elements: BTreeSet::new() };
                table.sets.insert(set.clone(), new);
            }
            Edit::MakeChain(_, chain, base) => {
                let new = Chain { base: *base, rules: Arc::default() };
                table.chains.insert(chain.clone(), new);
            }
            Edit::Fill(_, chain, rules) => {
                table.chains.entry(chain.clone()).or_default().rules = Arc::clone(rules);
            }
            Edit::DropChain(_, chain) => drop(table.chains.remove(chain)),
            Edit::DropSet(_, set, _) => drop(table.sets.remove(set)),
            Edit::Add(_, set, _, elements) => {
                if let Some(set) = table.sets.get_mut(set) {
                    set.elements.extend(elements.iter().cloned());
                }
            }
            Edit::Remove(_, set, _, elements) => {
                if let Some(set) = table.sets.get_mut(set) {
                    set.elements.retain(|element| elements.binary_search(element).is_err());
                }
            }
        }
    }
}

/// The script by which `nft` makes changes other than those of elements.
pub(super) fn script(edits: &[Edit]) -> String {
    let mut text = String::new();
    let edits: Vec<&Edit> = edits.iter().filter(|it| it.table().family().is_some()).collect();
    // A chain is emptied before any is deleted: they may lead to one another.
    for edit in &edits {
        if let Edit::DropChain(table, chain) = edit {
            let _ = writeln!(text, "flush chain {table} {chain}");
        }
    }
    for edit in edits {
        let _ = match edit {
            Edit::DropTable(table) => writeln!(text, "delete table {table}"),
            Edit::MakeTable(table) => writeln!(text, "add table {table}"),
            Edit::MakeSet(table, set, shape) => {
                let declaration = shape.declaration(*table);
                writeln!(text, "add {} {table} {set} {{ {declaration} }}", shape.word())
            }
            Edit::MakeChain(table, chain, None) => writeln!(text, "add chain {table} {chain}"),
            Edit::MakeChain(table, chain, Some(base)) => {
                writeln!(text, "add chain {table} {chain} {{ {base} }}")
            }
            Edit::Fill(table, chain, rules) => {
                let _ = writeln!(text, "flush chain {table} {chain}");
                rules.iter().try_for_each(|Rule { text: rule, tag }| {
                    writeln!(text, "add rule {table} {chain} {rule} comment \"{tag}\"")
                })
            }
            Edit::DropChain(table, chain) => writeln!(text, "delete chain {table} {chain}"),
            Edit::DropSet(table, set, shape) => {
                writeln!(text, "delete {} {table} {set}", shape.word())
            }
            Edit::Add(..) | Edit::Remove(..) => Ok(()),
        };
    }
    text
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hook = match self.hook {
            0 => "prerouting",
            1 => "input",
            4 => "postrouting",
            _ => "forward",
        };
        write!(f, "type filter hook {hook} priority {}; policy accept;", self.priority)
    }
}

impl Shape {
    fn word(self) -> &'static str {
        if matches!(self, Self::Zones | Self::Verdicts) { "map" } else { "set" }
    }

    fn declaration(self, table: TableName) -> String {
        let ip = |six| if six { "ipv6_addr" } else { "ipv4_addr" };
        let flags = |ranges| if ranges { " flags interval;" } else { "" };
        match self {
            Self::Zones if table == TableName::Bridge => {
                "typeof meta ibrname : ct zone;".to_owned()
            }
            Self::Zones => "typeof iifname : ct zone;".to_owned(),
            Self::Links => "type ifname;".to_owned(),
            Self::Verdicts => "type ifname : verdict;".to_owned(),
            Self::Macs => "type ifname . ether_addr;".to_owned(),
            Self::Sources { six, ranges } => {
                format!("type ifname . ether_addr . {};{}", ip(six), flags(ranges))
            }
            Self::Claims { ranges } => format!("typeof iifname . @th,64,128;{}", flags(ranges)),
            Self::Addresses { six, ranges } => format!("type {};{}", ip(six), flags(ranges)),
            Self::Unknown => String::new(),
        }
    }

    /// The link that an element is about.
    #[must_use]
    pub fn link(self, element: &Element) -> Option<String> {
        if matches!(self, Self::Addresses { .. } | Self::Unknown) {
            return None;
        }
        let name = element.key.get(..16)?;
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(16);
        Some(String::from_utf8_lossy(&name[..end]).into_owned())
    }

    /// An element in words.
    #[must_use]
    pub fn tell(self, element: &Element) -> String {
        let mut parts: Vec<String> = self.link(element).into_iter().collect();
        let start = if parts.is_empty() { 0 } else { 16 };
        let with_mac = matches!(self, Self::Macs | Self::Sources { .. });
        let mut rest = element.key.get(start..).unwrap_or_default();
        if with_mac && let Some(mac) = rest.first_chunk::<6>() {
            parts.push(MacAddr(*mac).to_string());
            rest = rest.get(8..).unwrap_or_default();
        }
        let end = element.end.as_deref().and_then(|end| end.get(end.len() - rest.len()..));
        match (address(rest), end.and_then(address)) {
            (Some(from), Some(to)) if from != to => parts.push(format!("{from}-{to}")),
            (Some(from), _) => parts.push(from.to_string()),
            _ => {}
        }
        let target = match &element.data {
            Some(Data::Verdict(Judgement::Jump(chain))) => format!(" : jump {chain}"),
            Some(Data::Verdict(Judgement::Drop)) => " : drop".to_owned(),
            Some(Data::Verdict(Judgement::Accept)) => " : accept".to_owned(),
            Some(Data::Verdict(Judgement::Other(code))) => format!(" : verdict {code}"),
            Some(Data::Value(value)) => match value.first_chunk() {
                Some(zone) => format!(" : zone {}", u16::from_ne_bytes(*zone)),
                None => String::new(),
            },
            None => String::new(),
        };
        parts.join(" ") + &target
    }
}

/// The address that these bytes are, of either family.
pub(super) fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(four).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|six| Ipv6Addr::from(six).into())
}

impl Field {
    /// The bytes that rules compare.
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Link(name) => {
                let mut bytes = name.clone().into_bytes();
                bytes.resize(16, 0);
                bytes
            }
            Self::Mac(mac) => mac.0.into_iter().chain([0, 0]).collect(),
            Self::Ip(IpAddr::V4(four)) => four.octets().to_vec(),
            Self::Ip(IpAddr::V6(six)) => six.octets().to_vec(),
        }
    }

    /// Several as one key.
    #[must_use]
    pub fn key(fields: &[Self]) -> Vec<u8> {
        fields.iter().flat_map(Self::bytes).collect()
    }
}

/// The group that a chain or set of ours belongs to, by its name.
pub(super) fn group_of(name: &str) -> Option<ObjectRef> {
    let rest = name.strip_prefix("group-").or_else(|| name.strip_prefix("members-"))?;
    let id = Uuid::parse_str(rest.get(..36)?).ok()?;
    Some(SecurityGroupId(id).object())
}
