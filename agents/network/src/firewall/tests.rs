//! Properties of the planner and the renderer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;
use serde_json::{Value, json};
use stackhand_model::{Direction, Document, Ethertype, NetworkId, PortId, SecurityGroupId};
use uuid::Uuid;

use super::clauses::{Clause, Remote, Traffic, clauses};
use super::fake::FakeFirewall;
use super::model::Group;
use super::ruleset::{self, Rule, TableName};
use super::*;
use crate::qos::PacketRules;

fn id(number: u8) -> Uuid {
    Uuid::from_u128(u128::from(number) << 96 | 1)
}

fn group_id(number: u8) -> SecurityGroupId {
    SecurityGroupId(id(number))
}

fn group(number: u8, rules: &Value) -> Group {
    let document = json!({
        "kind": "SecurityGroup", "id": id(number), "name": format!("g{number}"), "generation": 1,
        "spec": {"rules": rules},
    });
    Group::of(&Arc::new(Document::from_value(&document).unwrap())).unwrap()
}

/// An address of a small world, so that rules and packets meet.
fn net() -> impl Strategy<Value = IpNet> {
    (any::<bool>(), 0..16_u8, prop::sample::select(vec![0, 1, 2, 4])).prop_map(
        |(six, last, wide)| {
            if six {
                format!("fd00::{last:x}/{}", 128 - wide).parse::<IpNet>().unwrap().trunc()
            } else {
                format!("10.0.0.{last}/{}", 32 - wide).parse::<IpNet>().unwrap().trunc()
            }
        },
    )
}

fn means() -> impl Strategy<Value = Means> {
    prop::sample::select(vec![
        Means::Nftables(Tracking::Bridge),
        Means::Nftables(Tracking::BrNetfilter),
        Means::Iptables,
    ])
}

fn rule() -> impl Strategy<Value = Value> {
    let traffic = prop_oneof![
        Just(json!({})),
        prop::sample::select(vec!["tcp", "UDP", "6", "icmp", "esp", "0"])
            .prop_map(|it| json!({"protocol": it})),
        (prop::sample::select(vec!["tcp", "udp"]), 1..20_u16, 0..6_u16).prop_map(
            |(it, min, more)| {
                json!({"protocol": it, "port_range_min": min, "port_range_max": min + more})
            }
        ),
        (0..3_u16, prop::option::of(0..3_u16)).prop_map(|(kind, code)| {
            json!({"protocol": "icmp", "port_range_min": kind, "port_range_max": code})
        }),
    ];
    let remote = prop_oneof![
        Just(json!({})),
        net().prop_map(|net| json!({"remote_cidr": net})),
        (0..3_u8).prop_map(|number| json!({"remote_group": id(number)})),
        prop::collection::vec(net(), 1..3).prop_map(|nets| json!({"remote_addresses": nets})),
    ];
    (any::<bool>(), any::<bool>(), traffic, remote).prop_map(|(ingress, six, traffic, remote)| {
        let mut rule = json!({
            "direction": if ingress { "ingress" } else { "egress" },
            "ethertype": if six { "IPv6" } else { "IPv4" },
        });
        for part in [traffic, remote] {
            for (key, value) in
                part.as_object().unwrap().iter().filter(|(_, value)| !value.is_null())
            {
                rule[key] = value.clone();
            }
        }
        // Ranges of the other family would be refused with the document.
        let is_of_family = |net: &Value| net.as_str().unwrap().contains(':') == six;
        if rule.get("remote_cidr").is_some_and(|net| !is_of_family(net)) {
            rule.as_object_mut().unwrap().remove("remote_cidr");
        }
        if let Some(Value::Array(nets)) = rule.get_mut("remote_addresses") {
            nets.retain(is_of_family);
        }
        rule
    })
}

fn packet() -> impl Strategy<Value = Packet> {
    let transport = prop_oneof![
        (Just(6), (1..30_u16).prop_map(|port| Transport::Ports(4000, port))),
        (Just(17), (1..30_u16).prop_map(|port| Transport::Ports(4000, port))),
        (Just(50), Just(Transport::None)),
        (Just(1), (0..4_u8, 0..4_u8).prop_map(|(kind, code)| Transport::Icmp(kind, code))),
    ];
    (any::<bool>(), 0..16_u8, 0..16_u8, transport).prop_map(
        |(six, from, to, (protocol, transport))| {
            let address = |last: u8| -> IpAddr {
                let text = if six { format!("fd00::{last:x}") } else { format!("10.0.0.{last}") };
                text.parse().unwrap()
            };
            let protocol = if six && protocol == 1 { 58 } else { protocol };
            Packet { source: address(from), destination: address(to), protocol, transport }
        },
    )
}

fn member_nets() -> impl Strategy<Value = BTreeMap<SecurityGroupId, BTreeSet<IpNet>>> {
    prop::collection::vec(prop::collection::btree_set(net(), 0..4), 3)
        .prop_map(|all| (0..).map(group_id).zip(all).collect())
}

pub(super) fn model() -> impl Strategy<Value = Model> {
    let guard = (
        prop::collection::btree_set(0..3_u8, 0..3),
        any::<bool>(),
        prop::bool::weighted(0.9),
        prop::collection::btree_set(net(), 0..3),
        0..2_u8,
    );
    let groups = prop::collection::vec(prop::collection::vec(rule(), 0..5), 3);
    let limits =
        (prop::option::of(1..3_u32), prop::option::of(1..3_u32), prop::option::of(1..3_u8));
    let limits = prop::collection::btree_map(0..5_u8, limits, 0..3);
    (prop::collection::btree_map(0..5_u8, guard, 0..4), groups, member_nets(), limits).prop_map(
        |(guards, groups, members, limits)| {
            let mut model = Model { members, ..Model::default() };
            for (number, (to_guest, from_guest, dscp)) in limits {
                let object = PortId(id(number)).object();
                let rules = PacketRules { object, to_guest, from_guest, dscp };
                model.packets.insert(format!("tap{number}"), rules);
            }
            for (number, rules) in (0..).zip(groups) {
                model.groups.insert(group_id(number), group(number, &json!(rules)));
            }
            for (number, (in_groups, stateful, open, nets, network)) in guards {
                let mac = stackhand_model::MacAddr([2, 0, 0, 0, 0, number]);
                let own = IpNet::from(IpAddr::V6(mac.link_local()));
                let network = NetworkId(id(network));
                model.bridges.insert(network, format!("brq{}", network.short()));
                let guard = Guard {
                    tap: format!("tap{number}"),
                    network,
                    sources: nets.into_iter().chain([own]).map(|net| (mac, net)).collect(),
                    groups: in_groups.into_iter().map(group_id).collect(),
                    stateful,
                    open,
                };
                model.guards.insert(PortId(id(number)), guard);
            }
            model
        },
    )
}

/// A model that has something of both.
fn mixed(one: &Model, other: &Model, picks: &[bool]) -> Model {
    fn mix<K: Ord + Clone, V: Clone>(
        one: &BTreeMap<K, V>,
        other: &BTreeMap<K, V>,
        picks: &[bool],
    ) -> BTreeMap<K, V> {
        let keys: BTreeSet<&K> = one.keys().chain(other.keys()).collect();
        let from = |(key, first): (&K, &bool)| {
            let value = if *first { one.get(key) } else { other.get(key) };
            value.map(|value| (key.clone(), value.clone()))
        };
        keys.into_iter().zip(picks.iter().cycle()).filter_map(from).collect()
    }
    Model {
        guards: mix(&one.guards, &other.guards, picks),
        groups: mix(&one.groups, &other.groups, picks),
        members: mix(&one.members, &other.members, picks),
        packets: mix(&one.packets, &other.packets, picks),
        bridges: one.bridges.iter().chain(&other.bridges).map(|(a, b)| (*a, b.clone())).collect(),
        ..Model::default()
    }
}

/// Whether a clause holds for a packet, by the words that it has for the kernel.
fn holds(
    clause: &Clause,
    direction: Direction,
    packet: &Packet,
    members: &BTreeMap<SecurityGroupId, BTreeSet<IpNet>>,
) -> bool {
    let other = match direction {
        Direction::Ingress => packet.source,
        Direction::Egress => packet.destination,
    };
    let six = clause.family == Ethertype::IPv6;
    let remote = match &clause.remote {
        Remote::Any => true,
        Remote::Nets(nets) => nets.iter().any(|net| net.contains(&other)),
        Remote::Members(group) => members[group].iter().any(|net| net.contains(&other)),
    };
    let Traffic { protocols, ports, types } = &clause.traffic;
    let traffic = clause.traffic.is_everything()
        || protocols.contains(&packet.protocol)
        || match packet.transport {
            Transport::Ports(_, to) => ports
                .get(&packet.protocol)
                .is_some_and(|ranges| ranges.iter().any(|(min, max)| (min..=max).contains(&&to))),
            Transport::Icmp(kind, code) => types.get(&packet.protocol).is_some_and(|types| {
                types.contains(&(kind, None)) || types.contains(&(kind, Some(code)))
            }),
            Transport::None => false,
        };
    packet.source.is_ipv6() == six && remote && traffic
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn clauses_allow_what_the_rules_allow_and_nothing_else(
        rules in prop::collection::vec(rule(), 0..12),
        members in member_nets(),
        packets in prop::collection::vec(packet(), 30),
    ) {
        let group = group(9, &json!(rules));
        let port = PortId(id(1));
        let guard = Guard {
            tap: "tap1".into(), network: NetworkId(id(1)), sources: BTreeSet::new(),
            groups: [group_id(9)].into(), stateful: true, open: true,
        };
        let model = Model {
            guards: [(port, guard)].into(), groups: [(group_id(9), group.clone())].into(), members,
            ..Model::default()
        };
        for direction in [Direction::Ingress, Direction::Egress] {
            let clauses = clauses(group.spec(), direction);
            for packet in &packets {
                let by_clause = clauses.iter().any(|it| holds(it, direction, packet, &model.members));
                let by_rule = group.spec().rules.iter().any(|rule| model.allows(rule, direction, packet));
                prop_assert_eq!(by_clause, by_rule, "{:?} {:?} {:?}", direction, packet, clauses);
            }
        }
    }

    #[test]
    fn any_firewall_becomes_any_other_and_then_nothing_is_left_to_do(
        one in model(), other in model(), stage in 0..3_usize, by in means(), means in means(),
    ) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
            let mut enforcer = Enforcer::new(FakeFirewall::default(), by);
            enforcer.enforce(&one).await.unwrap();
            // Broken off between two transactions, and begun anew by an agent that knows nothing, and
            // may have other means.
            enforcer.host().break_off_after(stage);
            drop(enforcer.enforce(&other).await);
            let mut enforcer = Enforcer::new(enforcer.into_host(), means);
            enforcer.enforce(&other).await.unwrap();
            let seen = enforcer.host().ruleset();
            let mut fresh = Enforcer::new(FakeFirewall::default(), means);
            fresh.enforce(&other).await.unwrap();
            prop_assert_eq!(without_zones(&seen), without_zones(&fresh.host().ruleset()));
            let before = enforcer.host().transactions();
            let mut restarted = Enforcer::new(enforcer.into_host(), means);
            prop_assert_eq!(restarted.enforce(&other).await.unwrap(), Done::default());
            prop_assert_eq!(restarted.host().transactions(), before, "a restart writes nothing");
            Ok(())
        })?;
    }

    #[test]
    fn a_change_that_is_compared_in_part_is_the_one_that_is_compared_in_whole(
        one in model(), other in model(), picks in prop::collection::vec(any::<bool>(), 1..9),
    ) {
        let other = mixed(&one, &other, &picks);
        let (spared, tracking) = (BTreeSet::new(), Tracking::BrNetfilter);
        let mut rendered = Rendered::default();
        let mut tables = |model: &Model, seen: &Ruleset, touched: Option<&Touched>| {
            render(model, tracking, &zones_of(model, seen), &mut rendered, touched)
        };
        let there = tables(&one, &Ruleset::default(), None);
        let whole = tables(&other, &there, None).plan(&there, &spared);
        let touched = other.touched(&one);
        let part = tables(&one, &there, Some(&touched));
        let part = tables(&other, &there, Some(&touched)).plan(&part, &spared);
        prop_assert_eq!(part, whole);
    }

    #[test]
    fn many_changes_one_by_one_leave_what_an_agent_makes_that_starts_from_nothing(
        models in prop::collection::vec(model(), 2..4),
        picks in prop::collection::vec(any::<bool>(), 1..9),
        means in means(),
    ) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
            let mut enforcer = Enforcer::new(FakeFirewall::default(), means);
            let mut last = models[0].clone();
            for model in &models {
                last = mixed(&last, model, &picks);
                enforcer.enforce(&last).await.unwrap();
                prop_assert_eq!(enforcer.enforce(&last).await.unwrap(), Done::default());
            }
            let mut fresh = Enforcer::new(FakeFirewall::default(), means);
            fresh.enforce(&last).await.unwrap();
            let (ours, fresh) = (enforcer.host().ruleset(), fresh.host().ruleset());
            prop_assert_eq!(without_zones(&ours), without_zones(&fresh));
            Ok(())
        })?;
    }

    #[test]
    fn what_somebody_changes_is_put_back(one in model(), pick in any::<prop::sample::Index>()) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
            let mut enforcer = Enforcer::new(FakeFirewall::default(), Means::Nftables(Tracking::Bridge));
            enforcer.enforce(&one).await.unwrap();
            let whole = enforcer.host().ruleset();
            let Some(table) = whole.tables.get(&TableName::Bridge) else { return Ok(()) };
            let chain = pick.get(&table.chains.keys().cloned().collect::<Vec<_>>()).clone();
            enforcer.host().meddle(|ruleset| {
                let table = ruleset.tables.get_mut(&TableName::Bridge).unwrap();
                let rules = Arc::make_mut(&mut table.chains.get_mut(&chain).unwrap().rules);
                rules.insert(0, Rule::seen(None));
                for set in table.sets.values_mut() {
                    set.elements.pop_first();
                }
            });
            let done = enforcer.enforce(&one).await.unwrap();
            prop_assert!(done.changes.iter().any(|(_, change)| change.contains(&chain)), "{:?}", done);
            prop_assert_eq!(enforcer.host().ruleset(), whole);
            Ok(())
        })?;
    }

    #[test]
    fn a_tap_that_is_spared_keeps_its_elements(one in model()) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
            let mut enforcer = Enforcer::new(FakeFirewall::default(), Means::Nftables(Tracking::Bridge));
            enforcer.enforce(&one).await.unwrap();
            let whole = enforcer.host().ruleset();
            // The documents of all ports but one are lost.
            let mut lost = one.clone();
            while lost.guards.len() > 1 {
                lost.spared.extend(lost.guards.pop_first().map(|(_, guard)| guard.tap));
            }
            enforcer.enforce(&lost).await.unwrap();
            prop_assert_eq!(enforcer.host().ruleset(), whole);
            Ok(())
        })?;
    }
}

/// Zones depend on what was there before.
fn without_zones(ruleset: &Ruleset) -> Ruleset {
    let mut ruleset = ruleset.clone();
    for table in ruleset.tables.values_mut() {
        table.sets.remove("zones");
        for chain in table.chains.values_mut() {
            Arc::make_mut(&mut chain.rules).retain(|rule| !rule.text.contains("--zone"));
        }
    }
    ruleset
}

#[test]
fn a_dormant_table_is_made_anew() {
    let wanted = render::sample(Tracking::Bridge);
    let mut seen = wanted.clone();
    seen.tables.get_mut(&TableName::Bridge).unwrap().dormant = true;
    let plan = wanted.plan(&seen, &BTreeSet::new());
    let script = ruleset::script(&plan.before);
    assert!(
        script.starts_with("delete table bridge stackhand\nadd table bridge stackhand\n"),
        "{script}"
    );
}

#[test]
fn many_ranges_with_the_same_ports_are_one_line() {
    let rules: Vec<Value> = (0..200)
        .map(|number| {
            json!({
                "direction": "ingress", "protocol": "tcp", "port_range_min": 80,
                "port_range_max": 80, "remote_cidr": format!("10.{number}.0.0/24"),
            })
        })
        .collect();
    let group = group(1, &json!(rules));
    let clauses = clauses(group.spec(), Direction::Ingress);
    assert_eq!(clauses.len(), 1);
    assert_eq!(clauses[0].lines(Direction::Ingress).len(), 1);
}

#[test]
fn zones_are_kept_and_the_lowest_free_one_is_taken() {
    let network = |number: u8| (NetworkId(id(number)), format!("brq{number}"));
    let zones = |bridges: BTreeMap<_, _>, seen: &Ruleset| {
        zones_of(&Model { bridges, ..Model::default() }, seen)
    };
    let both = zones([network(1), network(2)].into(), &Ruleset::default());
    assert_eq!(both.values().copied().collect::<Vec<_>>(), [4097, 4098]);
    let guard = Guard {
        tap: "tap1".into(),
        network: network(2).0,
        sources: BTreeSet::new(),
        groups: BTreeSet::new(),
        stateful: true,
        open: true,
    };
    let model = Model { guards: [(PortId(id(1)), guard)].into(), ..Model::default() };
    let taken = [("brq2".into(), 4098)].into();
    let seen = render(&model, Tracking::Bridge, &taken, &mut Rendered::default(), None);
    let later = zones([network(2), network(3)].into(), &seen);
    assert_eq!(later, [("brq2".into(), 4098), ("brq3".into(), 4097)].into());
}
