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

/// One table of one program as it was saved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Saved {
    /// Its name.
    pub(crate) name: String,
    /// Its chains, those of the host among them.
    pub(crate) chains: Vec<String>,
    /// Its rules in order, each with its chain.
    pub(crate) rules: Vec<(String, String)>,
}

/// What a chain of the host is that leads to ours: where packets enter it is its name.
pub(super) fn entry() -> Base {
    Base { hook: 0, priority: 0, accepts: true }
}

/// The tables that a program saved; or that the old `ebtables` lists, which saves only by a script that
/// may be another's.
pub(crate) fn saved(text: &str) -> Vec<Saved> {
    let mut tables: Vec<Saved> = Vec::new();
    let mut listed = None;
    for line in text.lines() {
        let begun = line.strip_prefix('*').or_else(|| line.strip_prefix("Bridge table: "));
        if let Some(name) = begun {
            tables.push(Saved { name: name.trim().to_owned(), ..Saved::default() });
            listed = None;
            continue;
        }
        let Some(table) = tables.last_mut() else { continue };
        if let Some(rest) = line.strip_prefix("Bridge chain: ") {
            let chain = rest.split(',').next().unwrap_or_default().to_owned();
            table.chains.push(chain.clone());
            listed = Some(chain);
        } else if let Some(chain) = &listed {
            if !line.trim().is_empty() {
                table.rules.push((chain.clone(), line.trim().to_owned()));
            }
        } else if let Some(rest) = line.strip_prefix(':') {
            table.chains.push(rest.split(' ').next().unwrap_or_default().to_owned());
        } else if let Some((chain, rule)) =
            line.strip_prefix("-A ").and_then(|rest| rest.split_once(' '))
        {
            table.rules.push((chain.to_owned(), rule.trim().to_owned()));
        }
    }
    tables
}

/// Where a rule jumps to, if that is the last that it says. A comment may hold the same letters, but not
/// as its own last word.
pub(crate) fn target_of(rule: &str) -> Option<&str> {
    let (before, target) = rule.rsplit_once(' ')?;
    (before == "-j" || before.ends_with(" -j")).then_some(target)
}

/// The link that a rule is about and the zone that it has its flows tracked in.
pub(crate) fn zone_of(rule: &str) -> Option<(String, u16)> {
    let words: Vec<&str> = rule.split(' ').collect();
    let after = |option| words.iter().skip_while(move |word| **word != option).nth(1);
    let link = after("-i").or_else(|| after("--physdev-in"))?;
    Some(((*link).to_owned(), after("--zone")?.parse().ok()?))
}

fn is_ours(chain: &str) -> bool {
    chain.starts_with(PREFIX)
}

/// Whether a rule of another's chain leads to one of ours.
fn leads_to_ours(rule: &str) -> bool {
    target_of(rule).is_some_and(is_ours)
}

impl Saved {
    /// What of it is ours, if anything is.
    pub(super) fn ours(&self, name: TableName) -> Option<Table> {
        let mut lines: BTreeMap<&String, Vec<&String>> =
            self.chains.iter().map(|chain| (chain, Vec::new())).collect();
        for (chain, rule) in &self.rules {
            lines.entry(chain).or_default().push(rule);
        }
        let mut table = Table::default();
        for (chain, lines) in lines {
            let entered = !is_ours(chain);
            let mut rules: Vec<Rule> = Vec::new();
            for (place, line) in lines.into_iter().enumerate() {
                if !entered || leads_to_ours(line) {
                    if entered && place > rules.len() {
                        // Others' lines come before: ours is not where it should be.
                        rules.push(Rule::seen(None));
                    }
                    rules.push(listed(name, line));
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
        let there: BTreeSet<&str> = self.chains.iter().map(String::as_str).collect();
        let (mut made, mut filled) = (String::new(), String::new());
        let mut gone: BTreeSet<&str> = BTreeSet::new();
        let policy = if name.is_of_frames() { "RETURN" } else { "- [0:0]" };
        for edit in edits {
            match edit {
                Edit::MakeChain(_, chain, None) => {
                    let _ = writeln!(made, ":{chain} {policy}");
                }
                Edit::Fill(_, chain, rules) if is_ours(chain) => {
                    if there.contains(chain.as_str()) {
                        let _ = writeln!(made, "-F {chain}");
                    }
                    for rule in rules.iter() {
                        let _ = writeln!(filled, "-A {chain} {}", worded(name, rule));
                    }
                }
                Edit::Fill(_, chain, rules) => {
                    self.leave(chain, &mut filled);
                    let place = if name.is_of_frames() { "" } else { "1 " };
                    for rule in rules.iter().rev() {
                        let _ = writeln!(filled, "-I {chain} {place}{}", worded(name, rule));
                    }
                }
                Edit::DropChain(_, chain) if is_ours(chain) => {
                    gone.extend(there.get(chain.as_str()));
                }
                Edit::DropChain(_, chain) => self.leave(chain, &mut filled),
                Edit::DropTable(_) => gone.extend(there.iter().filter(|chain| is_ours(chain))),
                _ => {}
            }
        }
        // Chains that only we lead to are let go of here, too, when all go.
        let all = edits.iter().any(|edit| matches!(edit, Edit::DropTable(_)));
        if all {
            self.clear(&gone, &mut filled)
        } else {
            delete(&gone, &mut filled)
        }
        // `ebtables` takes the next table, or the end, for the end of one.
        let end = if name.is_of_frames() { "" } else { "COMMIT\n" };
        let (_, table) = name.place();
        let whole = made + &filled;
        if whole.is_empty() { whole } else { format!("*{table}\n{whole}{end}") }
    }

    /// Takes our lines out of another's chain.
    fn leave(&self, chain: &str, script: &mut String) {
        for (_, rule) in self.rules.iter().filter(|(of, rule)| of == chain && leads_to_ours(rule)) {
            let _ = writeln!(script, "-D {chain} {rule}");
        }
    }

    /// Deletes chains, and the rules of others that lead to them.
    pub(crate) fn clear(&self, doomed: &BTreeSet<&str>, script: &mut String) {
        let leads_there = |(chain, rule): &&(String, String)| {
            !doomed.contains(chain.as_str())
                && target_of(rule).is_some_and(|target| doomed.contains(target))
        };
        for (chain, rule) in self.rules.iter().filter(leads_there) {
            let _ = writeln!(script, "-D {chain} {rule}");
        }
        delete(doomed, script);
    }
}

/// Deletes chains that nothing else leads to. They are emptied before: they lead to one another.
fn delete(doomed: &BTreeSet<&str>, script: &mut String) {
    for word in ["-F", "-X"] {
        for chain in doomed {
            let _ = writeln!(script, "{word} {chain}");
        }
    }
}

/// A rule as a program lists it.
fn listed(name: TableName, line: &str) -> Rule {
    if name.is_of_frames() {
        return canonical(line);
    }
    Rule { tag: comment_of(line).unwrap_or_default(), text: line.to_owned() }
}

/// A rule as it is wanted.
pub(super) fn wanted(name: TableName, line: String) -> Rule {
    if name.is_of_frames() { canonical(&line) } else { Rule::new(line) }
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
