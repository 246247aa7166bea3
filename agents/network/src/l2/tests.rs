use proptest::prelude::*;
use stackhand_kernel::netlink::BridgePort;
use stackhand_model::{NetworkId, PortId};
use stackhand_runtime::agent::Desired;
use uuid::Uuid;

use super::fake::{FakeHost, bare};
use super::worlds::{ALL, World, any_world};
use super::*;
use crate::desired::{HostWish, Local, host_wish};
use crate::settings::Renderer;

fn local() -> Local {
    Local {
        host: "one".into(),
        tap_user: Some(0),
        tap_group: None,
        vxlan_port: 4789,
        lease_seconds: 3600,
        dns_domain: "stackhand.internal".to_owned(),
        dns_forwarders: Vec::new(),
        takeover: false,
        firewall: Renderer::Auto,
    }
}

/// A host with an underlay, a link to a physical network, and links of other people.
fn host() -> Seen {
    let mut seen = Seen::default();
    let mut under = bare(SeenKind::Other("hardware".into()), Owner::Foreign(None));
    under.addresses.insert("192.0.2.1/24".parse().unwrap());
    seen.links.insert(At::host("under"), under);
    let eth9 = bare(SeenKind::Other("hardware".into()), Owner::Foreign(None));
    seen.links.insert(At::host("eth9"), eth9);
    for name in ["docker0", "tapmine", "brqmine", "vxlan-9"] {
        let bridge = bare(SeenKind::Bridge(BRIDGE), Owner::Foreign(Some("mine".into())));
        seen.links.insert(At::host(name), bridge);
    }
    seen
}

fn wish(desired: &Desired, seen: &Seen) -> HostWish {
    host_wish(desired, &local(), seen)
}

fn next(desired: &Desired, seen: &Seen) -> Plan {
    let wish = wish(desired, seen);
    let orphans = plan(&wish.l2, seen, &BTreeSet::new()).orphans;
    plan(&wish.l2, seen, &orphans)
}

/// Plans and performs until nothing is left; returns the changes made.
fn converge(seen: &mut Seen, desired: &Desired) -> Vec<Change> {
    let mut done = Vec::new();
    for _ in 0..3 {
        for step in next(desired, seen).steps {
            seen.perform(&step.change).unwrap_or_else(|error| panic!("{}: {error}", step.change));
            done.push(step.change);
        }
    }
    done
}

fn settled(world: &World) -> Seen {
    let mut seen = host();
    converge(&mut seen, &world.desired());
    seen
}

/// Something that happens behind the agent's back.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Delete,
    Down,
    Unmark,
    Unbridge,
    Mtu,
    Addresses,
    Forwarding,
}

fn any_damage() -> impl Strategy<Value = Vec<(Damage, prop::sample::Index)>> {
    let kind = prop::sample::select(vec![
        Damage::Delete,
        Damage::Down,
        Damage::Unmark,
        Damage::Unbridge,
        Damage::Mtu,
        Damage::Addresses,
        Damage::Forwarding,
    ]);
    prop::collection::vec((kind, any::<prop::sample::Index>()), 0..6)
}

fn damage(seen: &mut Seen, damages: &[(Damage, prop::sample::Index)]) {
    for (damage, which) in damages {
        let ours: Vec<At> = seen
            .links
            .iter()
            .filter(|(_, link)| {
                matches!(link.owner, Owner::Ours(_)) && link.kind != SeenKind::Loopback
            })
            .map(|(at, _)| at.clone())
            .collect();
        if ours.is_empty() {
            return;
        }
        let at = which.get(&ours).clone();
        if matches!(damage, Damage::Delete) {
            seen.perform(&Change::Delete { links: vec![at] }).unwrap();
            continue;
        }
        if matches!(damage, Damage::Forwarding) {
            seen.forwarding.clear();
            seen.neighbours.clear();
            continue;
        }
        let link = seen.links.get_mut(&at).unwrap();
        match damage {
            Damage::Down => link.up = false,
            Damage::Unmark => link.owner = Owner::Unfinished,
            Damage::Unbridge => {
                link.bridge = None;
                link.port = BridgePort::default();
            }
            Damage::Mtu => link.mtu = 700,
            Damage::Addresses => link.addresses = ["10.99.0.1/24".parse().unwrap()].into(),
            Damage::Delete | Damage::Forwarding => {}
        }
    }
}

fn foreign(seen: &Seen) -> BTreeMap<&At, &SeenLink> {
    seen.links
        .iter()
        .filter(|(at, link)| matches!(link.owner, Owner::Foreign(_)) && at.link != "eth9")
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn from_any_world_the_next_is_reached_and_then_nothing_is_done(
        old in any_world(&ALL), new in any_world(&ALL), damages in any_damage(),
    ) {
        let mut seen = settled(&old);
        damage(&mut seen, &damages);
        converge(&mut seen, &new.desired());
        let left = next(&new.desired(), &seen);
        prop_assert_eq!(left.steps, []);
        let wish = wish(&new.desired(), &seen);
        // Two networks on one segment, which admission refuses: who has the link keeps it.
        if left.problems.is_empty() {
            let mut neighbours = wish.l2.neighbours.clone();
            neighbours.retain(|_, entries| !entries.is_empty());
            prop_assert_eq!(&seen.neighbours, &neighbours);
            let mut forwarding = wish.l2.forwarding.clone();
            forwarding.retain(|_, table| *table != Forwarding::default());
            prop_assert_eq!(&seen.forwarding, &forwarding);
        }
        for (at, wanted) in &wish.l2.links {
            let there = seen.links.contains_key(at);
            prop_assert!(there || wanted.make == Make::Brought, "{} is missing", at);
        }
    }

    #[test]
    fn what_is_not_ours_is_never_touched(old in any_world(&ALL), new in any_world(&ALL)) {
        let mut seen = settled(&old);
        let before = seen.clone();
        converge(&mut seen, &new.desired());
        prop_assert_eq!(foreign(&before), foreign(&seen));
    }

    #[test]
    fn a_link_wanted_before_and_after_is_never_gone_in_between(old in any_world(&ALL), new in any_world(&ALL)) {
        let mut seen = settled(&old);
        let before = wish(&old.desired(), &seen).l2.links;
        let after = wish(&new.desired(), &seen).l2.links;
        let kept: Vec<&At> = after
            .iter()
            .filter(|(at, wanted)| {
                before.get(*at).is_some_and(|was| was.make == wanted.make && was.object == wanted.object)
                    && seen.links.contains_key(*at)
            })
            .map(|(at, _)| at)
            .collect();
        for step in next(&new.desired(), &seen).steps {
            seen.perform(&step.change).unwrap();
            for at in &kept {
                prop_assert!(seen.links.contains_key(*at), "{} was cut by {}", at, step.change);
            }
        }
    }

    #[test]
    fn a_pass_that_was_cut_short_anywhere_is_finished_by_the_next(
        old in any_world(&ALL), new in any_world(&ALL), stop in any::<prop::sample::Index>(),
    ) {
        let mut seen = settled(&old);
        let steps = next(&new.desired(), &seen).steps;
        for step in steps.iter().take(stop.index(steps.len() + 1)) {
            seen.perform(&step.change).unwrap();
        }
        converge(&mut seen, &new.desired());
        prop_assert_eq!(next(&new.desired(), &seen).steps, []);
    }

    #[test]
    fn an_empty_world_leaves_nothing_of_ours(old in any_world(&ALL)) {
        let mut seen = settled(&old);
        converge(&mut seen, &Desired::default());
        let mut clean = host();
        // The operator's link stays up.
        clean.links.get_mut(&At::host("eth9")).unwrap().up = seen.links[&At::host("eth9")].up;
        prop_assert_eq!(seen, clean);
    }
}

#[tokio::test]
async fn a_broken_step_does_not_stop_the_others() {
    let (net, a, b) =
        (Uuid::from_u128(1 << 100), Uuid::from_u128(2 << 100), Uuid::from_u128(3 << 100));
    let links = |id| Wanted {
        object: PortId(id).object(),
        make: Make::Tap(Tap::default()),
        set: Set { mark: Some(Mark::Port(PortId(id))), ..Set::default() },
        addresses: None,
    };
    let mut wish = Wish::default();
    let bridge = Wanted {
        object: NetworkId(net).object(),
        make: Make::Bridge,
        set: Set { mark: Some(Mark::Network(NetworkId(net))), ..Set::default() },
        addresses: None,
    };
    wish.links.insert(At::host("brq"), bridge);
    wish.links.insert(At::host("tapa"), links(a));
    wish.links.insert(At::host("tapb"), links(b));
    let fake = FakeHost::default();
    let steps = plan(&wish, &fake.seen(), &BTreeSet::new()).steps;
    let stuck = steps.iter().find(|step| step.object == Some(PortId(a).object())).unwrap();
    fake.set_broken(vec![stuck.change.clone()]);
    let mut failed = 0;
    for step in &steps {
        failed += usize::from(fake.apply(&step.change).await.is_err());
    }
    assert_eq!((failed, fake.writes()), (1, 2));
    fake.set_broken(Vec::new());
    let left = plan(&wish, &fake.observe().await.unwrap(), &BTreeSet::new()).steps;
    assert_eq!(left, std::slice::from_ref(stuck));
}

#[test]
fn a_name_that_two_ids_share_is_an_error_on_the_second() {
    let object = PortId(Uuid::from_u128(1)).object();
    let mut wish = Wish::default();
    let wanted = Wanted {
        object,
        make: Make::Tap(Tap::default()),
        set: Set { mark: Some(Mark::Port(PortId(object.id))), ..Set::default() },
        addresses: None,
    };
    wish.links.insert(At::host("tap00000000-00"), wanted);
    let other = PortId(Uuid::from_u128(2));
    wish.known.insert(other.object());
    wish.contested.insert((At::host("tap00000000-00"), other.object()));
    let mut seen = Seen::default();
    let link = bare(SeenKind::Tap(Tap::default()), Owner::Ours(Mark::Port(other)));
    seen.links.insert(At::host("tap00000000-00"), link);
    let plan = plan(&wish, &seen, &BTreeSet::new());
    assert_eq!(plan.steps, []);
    assert!(plan.problems[&object].contains("which wants it, too"));
}

#[test]
fn changes_are_told_in_the_kernels_words() {
    let set = Set {
        mtu: Some(1450),
        bridge: Some(Some("brq1".into())),
        up: Some(true),
        ..Set::default()
    };
    let change = Change::Make { at: At::host("tap1"), make: Make::Tap(Tap::default()), set };
    assert_eq!(change.to_string(), "create link tap1 (tap; mtu 1450, master brq1, up)");
    let change =
        Change::Forward { link: "vxlan-7".into(), mac: None, via: "192.0.2.2".parse().unwrap() };
    assert_eq!(change.to_string(), "forward flood by vxlan-7 to 192.0.2.2");
}
