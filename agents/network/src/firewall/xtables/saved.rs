//! What `iptables-save`, `ebtables-save` and `ipset save` print, and what the programs are given to
//! restore. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::super::ruleset::{Base, Chain, Edit, Rule, Set, Shape, Table, TableName};
use super::PREFIX;
use super::render::{element, net};

/// Elements that a set may have.
const MOST_MEMBERS: u32 = 1 << 20;

/// Ethernet types that some programs name.
const NAMED: [(&str, &str); 4] =
    [("IPv4", "0x800"), ("ARP", "0x806"), ("RARP", "0x8035"), ("IPv6", "0x86dd")];

/// One table of one program as it was saved: the lines of its chains, without `-A` and the name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Saved(BTreeMap<String, Vec<String>>);

/// What a chain of the host is that leads to ours: where packets enter it is its name.
pub(super) fn entry() -> Base {
    Base { hook: 0, priority: 0, accepts: true }
}

/// The tables that a program saved, by name; or that the old `ebtables` lists, which saves only by a
/// script that may be another's.
pub(super) fn saved(text: &str) -> BTreeMap<String, Saved> {
    let mut tables: BTreeMap<String, Saved> = BTreeMap::new();
    let mut name = String::new();
    let mut listed = None;
    for line in text.lines() {
        if let Some(table) = line.strip_prefix("Bridge table: ") {
            table.trim().clone_into(&mut name);
        } else if let Some(rest) = line.strip_prefix("Bridge chain: ") {
            let chain = rest.split(',').next().unwrap_or_default().to_owned();
            tables.entry(name.clone()).or_default().0.entry(chain.clone()).or_default();
            listed = Some(chain);
        } else if let Some(chain) = &listed {
            if !line.trim().is_empty() {
                let table = tables.entry(name.clone()).or_default();
                table.0.entry(chain.clone()).or_default().push(line.trim().to_owned());
            }
        } else if let Some(table) = line.strip_prefix('*') {
            table.trim().clone_into(&mut name);
        } else if let Some(rest) = line.strip_prefix(':') {
            let chain = rest.split(' ').next().unwrap_or_default().to_owned();
            tables.entry(name.clone()).or_default().0.entry(chain).or_default();
        } else if let Some((chain, rule)) =
            line.strip_prefix("-A ").and_then(|rest| rest.split_once(' '))
        {
            let table = tables.entry(name.clone()).or_default();
            table.0.entry(chain.to_owned()).or_default().push(rule.trim().to_owned());
        }
    }
    tables
}

fn is_ours(chain: &str) -> bool {
    chain.starts_with(PREFIX)
}

/// Whether a line of another's chain leads to one of ours.
fn leads_to_ours(line: &str) -> bool {
    let mut words = line.split(' ').skip_while(|word| !matches!(*word, "-j" | "-g"));
    words.nth(1).is_some_and(is_ours)
}

impl Saved {
    /// What of it is ours, if anything is.
    pub(super) fn ours(&self, name: TableName) -> Option<Table> {
        let rule = |line: &String| {
            if name.is_of_frames() {
                canonical(line)
            } else {
                Rule { tag: comment_of(line).unwrap_or_default(), text: line.clone() }
            }
        };
        let mut table = Table::default();
        for (chain, lines) in &self.0 {
            let entered = !is_ours(chain);
            let mut rules: Vec<Rule> = Vec::new();
            for (place, line) in lines.iter().enumerate() {
                if !entered || leads_to_ours(line) {
                    if entered && place > rules.len() {
                        // Others' lines come before: ours is not where it should be.
                        rules.push(Rule::seen(None));
                    }
                    rules.push(rule(line));
                }
            }
            if !entered || !rules.is_empty() {
                let base = entered.then(entry);
                table.chains.insert(chain.clone(), Chain { base, rules: Arc::new(rules) });
            }
        }
        (!table.chains.is_empty()).then_some(table)
    }

    /// The part of a script that makes the changes of one table; nothing if there are none.
    pub(super) fn script(&self, name: TableName, edits: &[&Edit]) -> String {
        let mut made = String::new();
        let mut filled = String::new();
        let mut gone: BTreeSet<&String> = BTreeSet::new();
        let policy = if name.is_of_frames() { "RETURN" } else { "- [0:0]" };
        for edit in edits {
            match edit {
                Edit::MakeChain(_, chain, None) => {
                    let _ = writeln!(made, ":{chain} {policy}");
                }
                Edit::Fill(_, chain, rules) if is_ours(chain) => {
                    if self.0.contains_key(chain) {
                        let _ = writeln!(made, "-F {chain}");
                    }
                    for rule in rules.iter() {
                        let _ = writeln!(filled, "-A {chain} {}", worded(name, rule));
                    }
                }
                Edit::Fill(_, chain, rules) => {
                    self.leave(chain, &mut filled);
                    for rule in rules.iter().rev() {
                        let _ = match name.is_of_frames() {
                            true => writeln!(filled, "-I {chain} {}", worded(name, rule)),
                            false => writeln!(filled, "-I {chain} 1 {}", worded(name, rule)),
                        };
                    }
                }
                Edit::DropChain(_, chain) => {
                    gone.insert(chain);
                }
                Edit::DropTable(_) => gone.extend(self.0.keys()),
                _ => {}
            }
        }
        for chain in gone.iter().filter(|chain| !is_ours(chain)) {
            self.leave(chain, &mut filled);
        }
        // Emptied before any is deleted: they lead to one another.
        for word in ["-F", "-X"] {
            for chain in gone.iter().filter(|chain| is_ours(chain) && self.0.contains_key(**chain))
            {
                let _ = writeln!(filled, "{word} {chain}");
            }
        }
        let (_, table) = name.place();
        let whole = made + &filled;
        // `ebtables` takes the next table, or the end, for the end of one.
        let end = if name.is_of_frames() { "" } else { "COMMIT\n" };
        if whole.is_empty() { whole } else { format!("*{table}\n{whole}{end}") }
    }

    /// Takes our lines out of another's chain.
    fn leave(&self, chain: &str, script: &mut String) {
        for line in self.0.get(chain).into_iter().flatten().filter(|line| leads_to_ours(line)) {
            let _ = writeln!(script, "-D {chain} {line}");
        }
    }
}

/// A rule as the program is given it.
fn worded(name: TableName, Rule { tag, text }: &Rule) -> String {
    if name.is_of_frames() {
        return text.clone();
    }
    format!("-m comment --comment \"{tag}\" {text}")
}

/// The comment of a line, if it is one of ours.
fn comment_of(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("--comment \"")?;
    let (comment, _) = rest.split_once('"')?;
    comment.starts_with("stackhand ").then(|| comment.to_owned())
}

/// A rule of `ebtables`, known by what it says however it is written: numbers and addresses in one
/// form, options in one order.
pub(super) fn canonical(line: &str) -> Rule {
    let mut options: Vec<String> = Vec::new();
    for word in line.split_whitespace() {
        if word.starts_with('-') || options.is_empty() {
            options.push(word.to_owned());
        } else if let Some(option) = options.last_mut() {
            option.push(' ');
            option.push_str(&in_one_form(word));
        }
    }
    options.sort();
    Rule { tag: Rule::new(options.join(" ")).tag, text: line.to_owned() }
}

fn in_one_form(word: &str) -> String {
    if let Some((_, number)) = NAMED.iter().find(|(name, _)| name.eq_ignore_ascii_case(word)) {
        return (*number).to_owned();
    }
    if let Some(Ok(number)) = word.strip_prefix("0x").map(|it| u32::from_str_radix(it, 16)) {
        return format!("{number:#x}");
    }
    let bytes: Option<Vec<String>> = word
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).ok().map(|byte| format!("{byte:02x}")))
        .collect();
    match bytes {
        Some(bytes) if bytes.len() == 6 => bytes.join(":"),
        _ => word.to_owned(),
    }
}

/// Our sets among those that `ipset save` printed.
pub(super) fn members(text: &str) -> Option<Table> {
    let mut table = Table::default();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["create", name, rest @ ..] if is_ours(name) => {
                let shape = Shape::Addresses { six: rest.contains(&"inet6"), ranges: true };
                let set = Set { shape, elements: BTreeSet::new() };
                table.sets.insert((*name).to_owned(), set);
            }
            ["add", name, address, ..] => {
                let single = || address.parse::<IpAddr>().ok().map(IpNet::from);
                let net = address.parse().ok().or_else(single);
                if let (Some(set), Some(net)) = (table.sets.get_mut(*name), net) {
                    set.elements.insert(element(net));
                }
            }
            _ => {}
        }
    }
    (!table.sets.is_empty()).then_some(table)
}

/// The script that makes the changes of sets. `there` are those that exist.
pub(super) fn members_script(edits: &[&Edit], there: Option<&Table>) -> String {
    let mut text = String::new();
    for edit in edits {
        match edit {
            Edit::MakeSet(_, set, shape) => {
                let six = matches!(shape, Shape::Addresses { six: true, .. });
                let family = if six { "inet6" } else { "inet" };
                let _ =
                    writeln!(text, "create {set} hash:net family {family} maxelem {MOST_MEMBERS}");
            }
            Edit::Add(_, set, _, elements) | Edit::Remove(_, set, _, elements) => {
                let word = if matches!(edit, Edit::Add(..)) { "add" } else { "del" };
                for net in elements.iter().filter_map(net) {
                    let _ = writeln!(text, "{word} {set} {net}");
                }
            }
            Edit::DropSet(_, set, _) => {
                let _ = writeln!(text, "destroy {set}");
            }
            Edit::DropTable(_) => {
                for set in there.iter().flat_map(|table| table.sets.keys()) {
                    let _ = writeln!(text, "destroy {set}");
                }
            }
            _ => {}
        }
    }
    text
}
