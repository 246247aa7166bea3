//! Packet rates and DSCP marks, as a table of their own on the bridges. Pure.
//!
//! Two chains for each port at most, entered by maps from the link's name, so that a frame costs the
//! same with one port as with a thousand. They judge nothing: what is too fast is dropped before
//! anything filters it, or after.

use std::collections::{BTreeMap, BTreeSet};

use stackhand_kernel::netfilter::{Data, Element, Judgement};

use super::model::Touched;
use super::render::{RECEIVERS, SENDERS, add, chain};
use super::ruleset::{Base, Field, Set, Shape, Table};
use crate::qos::PacketRules;

/// The table; `None` if there is nothing to limit or mark. With `touched`, the chains and elements
/// of other links are left out.
pub(super) fn table(
    packets: &BTreeMap<String, PacketRules>,
    touched: Option<&Touched>,
) -> Option<Table> {
    if packets.is_empty() {
        return None;
    }
    let mut table = Table::default();
    // Before and after everything that filters.
    for (name, map, (hook, priority), side) in
        [("sent", SENDERS, (0, -400), "iifname"), ("received", RECEIVERS, (4, 400), "oifname")]
    {
        let set = Set { shape: Shape::Verdicts, elements: BTreeSet::new() };
        table.sets.insert(map.to_owned(), set);
        let base = Base { hook, priority, accepts: true };
        chain(&mut table, name, Some(base), [format!("{side} vmap @{map}")]);
    }
    for (link, rules) in packets {
        if touched.is_none_or(|touched| touched.packets.contains(link)) {
            port(&mut table, link, rules);
        }
    }
    Some(table)
}

fn port(table: &mut Table, link: &str, rules: &PacketRules) {
    let limit = |rate: &u32| {
        let burst = (rate / 10).max(5);
        format!("limit rate over {rate}/second burst {burst} packets drop")
    };
    let mut sent: Vec<String> = rules.from_guest.iter().map(limit).collect();
    if let Some(dscp) = rules.dscp {
        sent.extend(["ip", "ip6"].map(|ip| format!("{ip} dscp set {dscp}")));
    }
    let received: Vec<String> = rules.to_guest.iter().map(limit).collect();
    for (word, map, lines) in [("from", SENDERS, sent), ("to", RECEIVERS, received)] {
        if lines.is_empty() {
            continue;
        }
        let name = format!("{word}-{link}");
        chain(table, &name, None, lines);
        let data = Some(Data::Verdict(Judgement::Jump(name)));
        let key = Field::key(&[Field::Link(link.to_owned())]);
        add(table, map, Element { data, ..Element::new(key) });
    }
}

/// The link that a chain of the table belongs to, by its name.
pub(super) fn link_of(chain: &str) -> Option<&str> {
    chain.strip_prefix("from-").or_else(|| chain.strip_prefix("to-"))
}
