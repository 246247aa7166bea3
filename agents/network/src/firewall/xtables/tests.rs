//! Names, listings and scripts of the second renderer. That its rules mean what they say is shown on
//! kernels (`tests/firewall.rs`), that it is planned as the first one in `firewall/tests.rs`.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use stackhand_model::{PortId, SecurityGroupId};
use uuid::Uuid;

use super::super::model::Guard;
use super::super::ruleset::{Edit, Plan, Ruleset, TableName};
use super::super::tests::model;
use super::super::{Means, Rendered, Tracking};
use super::render::{element, group_names, net};
use super::saved::{canonical, members, members_script, saved};
use super::{Model, kept, render};

/// What `iptables` takes, and `ipset`.
const LONGEST: usize = 28;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn names_fit_and_every_jump_leads_somewhere(mut model in model()) {
        // As long as names of taps are.
        for guard in model.guards.values_mut() {
            guard.tap = format!("{:0<14}", guard.tap);
        }
        let zones = [("brq".to_owned(), 4097)].into();
        let tables = render(&model, &zones, &BTreeSet::new()).tables;
        for (name, table) in &tables {
            for set in table.sets.keys() {
                prop_assert!(set.len() <= LONGEST, "{}", set);
            }
            for (chain, is) in &table.chains {
                prop_assert!(chain.len() <= LONGEST, "{}", chain);
                for rule in is.rules.iter() {
                    let to = rule.text.rsplit(' ').next().unwrap();
                    let found = !to.starts_with(super::PREFIX) || table.chains.contains_key(to);
                    prop_assert!(found, "{} {}: {}", name, chain, rule.text);
                    let set = rule.text.split(' ').skip_while(|word| *word != "--match-set").nth(1);
                    let has = |set: &str| tables[&TableName::Members].sets.contains_key(set);
                    prop_assert!(set.is_none_or(has), "{}", rule.text);
                }
            }
        }
    }

    #[test]
    fn what_is_restored_is_what_is_found_saved(model in model()) {
        let wanted = render(&model, &[("brq".to_owned(), 4097)].into(), &BTreeSet::new());
        let plan = wanted.plan(&Ruleset::default(), &BTreeSet::new());
        for (name, table) in &wanted.tables {
            let edits: Vec<&Edit> = plan.edits().filter(|edit| edit.table() == *name).collect();
            if *name == TableName::Members {
                let script = members_script(&edits, None);
                prop_assert_eq!(members(&script), Some(table.clone()), "{}", script);
                continue;
            }
            let script = super::saved::Saved::default().script(*name, &edits);
            // Into an empty table, an insertion is an addition.
            let text: Vec<String> = script.lines().map(|line| match line.strip_prefix("-I ") {
                Some(rest) => format!("-A {}", rest.replacen(" 1 ", " ", 1)),
                None => line.to_owned(),
            }).collect();
            let read = saved(&text.join("\n")).remove(0);
            prop_assert_eq!(&read.name, name.place().1);
            prop_assert_eq!(read.ours(*name), Some(table.clone()), "{}", script);
        }
    }

    #[test]
    fn any_listing_is_read_without_harm(text in "([*:]|-A |create |add |Bridge chain: )?[ -~\n]{0,60}") {
        for table in saved(&text) {
            for name in TableName::ALL {
                table.ours(name);
            }
        }
        members(&text);
        canonical(&text);
    }

    #[test]
    fn a_range_is_an_element_and_back(
        address in any::<u128>(), short in any::<u32>(), length in 0..=128_u8,
    ) {
        let six = ipnet::Ipv6Net::new(address.into(), length).unwrap().trunc();
        prop_assert_eq!(net(&element(six.into())), Some(six.into()));
        let four = ipnet::Ipv4Net::new(short.into(), length / 4).unwrap().trunc();
        prop_assert_eq!(net(&element(four.into())), Some(four.into()));
    }
}

#[test]
fn frames_are_known_however_their_rules_are_listed() {
    let ours = "-p ARP --arp-htype 1 --arp-ptype 0x800 --arp-ip-src 10.0.0.1 --arp-mac-src fa:16:3e:00:00:0a -j RETURN";
    let old = "-p ARP --arp-ptype IPv4 --arp-htype 1 --arp-ip-src 10.0.0.1 --arp-mac-src fa:16:3e:0:0:a -j RETURN ";
    assert_eq!(canonical(ours), canonical(old));
    assert_ne!(canonical(ours), canonical(&old.replace("10.0.0.1", "10.0.0.2")));
    assert_eq!(canonical("-p 0x8035 -j RETURN"), canonical("-p RARP -j RETURN"));
}

#[test]
fn a_line_of_ours_that_is_not_the_first_is_put_first() {
    let listed = "*filter\n:FORWARD ACCEPT\n-A FORWARD -j ACCEPT\n-A FORWARD -j stackhand-into\n";
    let table = saved(listed).remove(0);
    let seen = table.ours(TableName::FramesTo).unwrap().chains.remove("FORWARD").unwrap();
    let wanted = vec![canonical("-j stackhand-into")];
    assert_ne!(*seen.rules, wanted);
    let fill = Edit::Fill(TableName::FramesTo, "FORWARD".to_owned(), wanted.into());
    let script = table.script(TableName::FramesTo, &[&fill]);
    assert_eq!(script, "*filter\n-D FORWARD -j stackhand-into\n-I FORWARD -j stackhand-into\n");
}

#[test]
fn a_rule_that_speaks_of_our_chains_and_does_not_lead_there_is_not_ours() {
    let listed = "*filter\n:FORWARD ACCEPT [0:0]\n\
        -A FORWARD -m comment --comment \"not -j stackhand-forward\" -j mine\n\
        -A FORWARD -m comment --comment \"-j stackhand-forward\"\nCOMMIT\n";
    assert_eq!(saved(listed).remove(0).ours(TableName::Filter4), None);
}

#[test]
fn what_nftables_holds_stays_until_bridges_show_their_packets() {
    let mut model = Model { unshown: true, ..Model::default() };
    let (stateful, open, network) = (true, true, stackhand_model::NetworkId(Uuid::nil()));
    let tap = "tap1".to_owned();
    let guard =
        Guard { tap, network, sources: BTreeSet::new(), groups: BTreeSet::new(), stateful, open };
    model.guards.insert(PortId(Uuid::nil()), guard);
    let rendered = || Rendered::default();
    let nft = Means::Nftables(Tracking::BrNetfilter);
    let seen = nft.tables(&model, &Ruleset::default(), &mut rendered(), None);
    let goes = |model: &Model| {
        let plan = Means::Iptables
            .tables(model, &seen, &mut rendered(), None)
            .plan(&seen, &BTreeSet::new());
        plan.after.iter().filter(|edit| matches!(edit, Edit::DropTable(_))).count()
    };
    assert_eq!(goes(&model), 0);
    model.unshown = false;
    assert_eq!(goes(&model), 2);
}

#[test]
fn a_tap_that_is_spared_is_filtered_as_it_was() {
    let of = |tap: &str| {
        let (stateful, open, network) = (true, true, stackhand_model::NetworkId(Uuid::nil()));
        Guard {
            tap: tap.to_owned(),
            network,
            sources: BTreeSet::new(),
            groups: BTreeSet::new(),
            stateful,
            open,
        }
    };
    let mut model = Model::default();
    for number in 1..=2_u128 {
        model.guards.insert(PortId(Uuid::from_u128(number)), of(&format!("tap{number}")));
    }
    let seen = render(&model, &BTreeMap::new(), &BTreeSet::new());
    let (_, lost) = model.guards.pop_first().unwrap();
    // One of which nothing is there is not led to chains that are not, either.
    model.spared = [lost.tap, "tap9".to_owned()].into();
    let kept = kept(&model, &seen);
    assert_eq!(kept, ["tap1".to_owned()].into());
    assert_eq!(render(&model, &BTreeMap::new(), &kept).plan(&seen, &model.spared), Plan::default());
}

#[test]
fn groups_that_begin_alike_have_names_of_their_own() {
    let mut model = Model::default();
    for last in 1..=2_u128 {
        model.members.insert(SecurityGroupId(Uuid::from_u128(7 << 96 | last)), BTreeSet::new());
    }
    let names: BTreeSet<String> = group_names(&model).into_values().collect();
    assert_eq!(names.len(), 2, "{names:?}");
}
