//! The planner against the fake: it arrives, rests, repairs, and survives crashes at every step.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;
use stackhand_kernel::netfilter::FlowSide;
use stackhand_model::{FloatingIpId, RouterId};
use uuid::Uuid;

use super::fake::FakeRouters;
use super::{
    Change, Entry, Hop, RouterNet, Seen, SeenNat, SeenRoute, SeenRouter, Wanted, Wish, plan,
};

const SPACE: &str = "qrouter-a";

fn router() -> stackhand_model::ObjectRef {
    RouterId(Uuid::from_u128(1)).object()
}

fn floating(number: u8) -> stackhand_model::ObjectRef {
    FloatingIpId(Uuid::from_u128(100 + u128::from(number))).object()
}

fn outer(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, number)
}

fn inner(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, number)
}

/// A router whose floating IPs lead where `leads` says, with doors and routes.
fn wish(
    leads: &BTreeMap<u8, u8>,
    doors: &BTreeSet<u16>,
    snat: bool,
    routes: &BTreeSet<u8>,
) -> Wish {
    let mut wanted = Wanted {
        object: router(),
        routes: BTreeMap::new(),
        nat: BTreeSet::new(),
        owners: BTreeMap::new(),
    };
    let mut taken = BTreeSet::new();
    for (&from, &to) in leads {
        if taken.insert(to) {
            let (address, fixed) = (outer(from), inner(to));
            wanted.nat.insert(Entry::Floating { address, fixed });
            wanted.nat.insert(Entry::Fixed { fixed, address });
            wanted.owners.insert(address, floating(from));
        }
    }
    for &port in doors {
        let (address, to) = (outer(99), inner(1));
        let entry = Entry::Forwarded { protocol: 6, address, port, to, to_port: 80 };
        wanted.nat.insert(entry);
    }
    if snat {
        wanted.nat.insert(Entry::Masked { link: "qg-1".to_owned(), address: outer(1) });
    }
    for &route in routes {
        let via = Some(inner(route).into());
        let hops = BTreeSet::from([Hop { via, link: "qr-1".into() }]);
        let destination = format!("10.{route}.0.0/16").parse().unwrap();
        wanted.routes.insert(destination, hops);
    }
    BTreeMap::from([(SPACE.into(), wanted)])
}

fn any_wish() -> impl Strategy<Value = Wish> {
    let leads = btree_map(2..5_u8, 1..4_u8, 0..4);
    (leads, btree_set(1..3_u16, 0..3), any::<bool>(), btree_set(1..4_u8, 0..3))
        .prop_map(|(leads, doors, snat, routes)| wish(&leads, &doors, snat, &routes))
}

/// Something that may be there when the agent comes: by us, by others, or by a crash.
fn any_seen() -> impl Strategy<Value = Seen> {
    let nat = prop_oneof![
        Just(SeenNat::Absent),
        Just(SeenNat::Changed),
        (any_wish(), any::<bool>()).prop_map(|(wish, note)| {
            let mut entries = wish[SPACE].nat.clone();
            if note {
                entries.insert(Entry::Cut { protocol: 0, address: outer(2), port: 0 });
            }
            SeenNat::Built(entries)
        }),
    ];
    (nat, any_wish(), any::<bool>()).prop_map(|(nat, wish, ours)| {
        let routes = wish[SPACE].routes.clone();
        let route = |(to, hops)| (to, SeenRoute { hops, ours });
        let routes = routes.into_iter().map(route).collect();
        BTreeMap::from([(SPACE.into(), Arc::new(SeenRouter { routes, nat }))])
    })
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// Does the steps of one plan, at most `most`; returns whether there were more.
async fn perform(fake: &FakeRouters, wish: &Wish, most: usize) -> bool {
    let seen = fake.observe(&wish.keys().cloned().collect()).await.unwrap();
    let steps = plan(wish, &seen);
    for step in steps.iter().take(most) {
        fake.apply(&step.change).await.unwrap();
    }
    steps.len() > most
}

fn is_as_wanted(seen: &Seen, wish: &Wish) -> bool {
    let (router, wanted) = (&seen[SPACE], &wish[SPACE]);
    let ours = router.routes.iter().filter(|(_, route)| route.ours);
    let ours: BTreeMap<_, _> = ours.map(|(to, route)| (*to, route.hops.clone())).collect();
    router.nat == SeenNat::Built(wanted.nat.clone()) && ours == wanted.routes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn one_plan_arrives_and_the_next_is_empty(seen in any_seen(), wish in any_wish()) {
        let fake = FakeRouters::default();
        fake.meddle(|state| *state = seen);
        block_on(perform(&fake, &wish, usize::MAX));
        let after = fake.seen();
        prop_assert!(is_as_wanted(&after, &wish), "{after:?}");
        prop_assert_eq!(plan(&wish, &after), []);
    }

    #[test]
    fn a_crash_after_any_step_costs_nothing(seen in any_seen(), wish in any_wish()) {
        let fake = FakeRouters::default();
        fake.meddle(|state| *state = seen);
        while block_on(perform(&fake, &wish, 1)) {}
        prop_assert!(is_as_wanted(&fake.seen(), &wish));
    }

    #[test]
    fn what_leads_elsewhere_is_cut_even_if_the_agent_dies_before(
        before in any_wish(),
        wish in any_wish(),
    ) {
        let fake = FakeRouters::default();
        block_on(perform(&fake, &before, usize::MAX));
        let stale: BTreeSet<Entry> =
            before[SPACE].nat.difference(&wish[SPACE].nat).filter_map(Entry::cut).collect();
        let mut cut = BTreeSet::new();
        loop {
            let seen = fake.seen();
            let steps = plan(&wish, &seen);
            let Some(step) = steps.first() else { break };
            // A translation never goes without a note that its flows are to be cut.
            if let Change::Translate { remove, add, .. } = &step.change {
                let noted = remove.iter().filter_map(Entry::cut).all(|note| add.contains(&note));
                prop_assert!(noted, "{step:?}");
            }
            if let Change::Cut { cuts, .. } = &step.change {
                cut.extend(cuts.iter().cloned());
            }
            block_on(fake.apply(&step.change)).unwrap();
        }
        prop_assert_eq!(cut, stale);
    }

    #[test]
    fn an_entry_reads_back_from_the_kernels_bytes(wish in any_wish()) {
        for entry in &wish[SPACE].nat {
            for entry in std::iter::once(entry.clone()).chain(entry.cut()) {
                let read = Entry::parse(entry.key().0, &entry.element());
                prop_assert_eq!(read, Some(entry));
            }
        }
    }
}

#[test]
fn floating_ips_that_swap_their_ports_do_so_one_by_one() {
    let fake = FakeRouters::default();
    let none = BTreeSet::new();
    let before = wish(&BTreeMap::from([(2, 1), (3, 2)]), &none, true, &none_of());
    block_on(perform(&fake, &before, usize::MAX));
    let after = wish(&BTreeMap::from([(2, 2), (3, 1)]), &none, true, &none_of());
    let steps = plan(&after, &fake.seen());
    let objects: BTreeSet<_> = steps.iter().map(|step| step.object).collect();
    assert_eq!(objects, BTreeSet::from([floating(2), floating(3)]));
    block_on(perform(&fake, &after, usize::MAX));
    assert!(is_as_wanted(&fake.seen(), &after));
}

fn none_of() -> BTreeSet<u8> {
    BTreeSet::new()
}

#[test]
fn a_broken_floating_ip_does_not_hold_up_another() {
    let fake = FakeRouters::default();
    let none = BTreeSet::new();
    block_on(perform(&fake, &wish(&BTreeMap::new(), &none, true, &none_of()), usize::MAX));
    let wanted = wish(&BTreeMap::from([(2, 1), (3, 2)]), &none, true, &none_of());
    let steps = plan(&wanted, &fake.seen());
    let (broken, whole): (Vec<_>, Vec<_>) =
        steps.into_iter().partition(|step| step.object == floating(2));
    fake.set_broken(broken.iter().map(|step| step.change.clone()).collect());
    for step in broken {
        assert!(block_on(fake.apply(&step.change)).is_err());
    }
    for step in whole {
        block_on(fake.apply(&step.change)).unwrap();
    }
    let SeenNat::Built(entries) = &fake.seen()[SPACE].nat else { panic!() };
    assert!(entries.contains(&Entry::Floating { address: outer(3), fixed: inner(2) }));
}

#[test]
fn routes_of_others_to_other_places_stay() {
    let mut seen = Seen::new();
    let hops = BTreeSet::from([Hop { via: None, link: "qr-1".into() }]);
    let foreign = SeenRoute { hops, ours: false };
    let router = SeenRouter {
        routes: BTreeMap::from([("10.99.0.0/16".parse().unwrap(), foreign)]),
        nat: SeenNat::Absent,
    };
    seen.insert(SPACE.into(), Arc::new(router));
    let none = BTreeSet::new();
    let steps = plan(&wish(&BTreeMap::new(), &none, false, &none_of()), &seen);
    assert!(matches!(steps.as_slice(), [step] if matches!(step.change, Change::Build { .. })));
}

#[test]
fn a_note_names_flows_that_were_translated_in_or_out_and_no_others() {
    let side = |source: Ipv4Addr, destination: Ipv4Addr, port| FlowSide {
        source: source.into(),
        destination: destination.into(),
        protocol: 6,
        source_port: 40000,
        destination_port: port,
        icmp: None,
    };
    let all = Entry::Cut { protocol: 0, address: outer(5), port: 0 };
    let door = Entry::Cut { protocol: 6, address: outer(5), port: 80 };
    let far = Ipv4Addr::new(198, 51, 100, 1);
    let inbound = (side(far, outer(5), 80), side(inner(1), far, 40000));
    let outbound = (side(inner(1), far, 443), side(far, outer(5), 40000));
    let other = (side(inner(1), far, 443), side(far, outer(6), 40000));
    let cuts = |note: &Entry, (original, reply): &(FlowSide, FlowSide)| note.cuts(original, reply);
    assert!(cuts(&all, &inbound) && cuts(&all, &outbound) && !cuts(&all, &other));
    assert!(cuts(&door, &inbound) && !cuts(&door, &outbound));
    let elsewhere = (side(far, outer(5), 81), inbound.1);
    assert!(!cuts(&door, &elsewhere));
}
