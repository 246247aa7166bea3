//! The fake of routers and the kernel must agree, as those of links must.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use stackhand_model::{FloatingIpId, RouterId};
use stackhand_network::l2::HostNet;
use stackhand_network::l2::netlink::NetlinkHost;
use stackhand_network::l3::fake::FakeRouters;
use stackhand_network::l3::netlink::KernelRouters;
use stackhand_network::l3::{Change, Entry, Hop, RouterNet, Seen, Wanted, Wish, plan};
use support::{on_a_host, run};
use uuid::Uuid;

const SPACE: &str = "qrouter-00000000-0000-0000-0000-000000000001";

fn outer(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, last)
}

fn inner(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 7, 0, last)
}

/// Floating IPs by where they lead, doors, whether the source is translated, and routes by next hops.
type World = (BTreeMap<u8, u8>, BTreeSet<u16>, bool, BTreeMap<u8, BTreeSet<u8>>);

fn any_world() -> impl Strategy<Value = World> {
    (
        btree_map(20..26_u8, 10..16_u8, 0..5),
        btree_set(80..84_u16, 0..3),
        any::<bool>(),
        btree_map(0..4_u8, btree_set(2..5_u8, 1..3), 0..4),
    )
}

fn wish((leads, doors, snat, routes): &World) -> Wish {
    let mut wanted = Wanted {
        object: RouterId(Uuid::from_u128(1)).object(),
        routes: BTreeMap::new(),
        nat: BTreeSet::new(),
        owners: BTreeMap::new(),
    };
    let mut taken = BTreeSet::new();
    for (&from, &to) in leads.iter().filter(|(_, to)| taken.insert(**to)) {
        let (address, fixed) = (outer(from), inner(to));
        wanted.nat.extend([Entry::Floating { address, fixed }, Entry::Fixed { fixed, address }]);
        let owner = FloatingIpId(Uuid::from_u128(100 + u128::from(from))).object();
        wanted.owners.insert(address, owner);
    }
    for &port in doors {
        let (address, to) = (outer(99), inner(9));
        wanted.nat.insert(Entry::Forwarded { protocol: 6, address, port, to, to_port: 80 });
    }
    if *snat {
        wanted.nat.insert(Entry::Masked { link: "qg-a".into(), address: outer(10) });
    }
    for (&net, hops) in routes {
        let hop = |last: &u8| Hop { via: Some(IpAddr::V4(outer(*last))), link: "qg-a".into() };
        let destination = format!("198.51.{net}.0/24").parse().unwrap();
        wanted.routes.insert(destination, hops.iter().map(hop).collect());
    }
    [(SPACE.into(), wanted)].into()
}

/// Plans and performs until nothing is left; returns the changes of the first round and what is
/// there then.
async fn converge(routers: &impl RouterNet, wish: &Wish) -> (Vec<Change>, Seen) {
    let mut first = None;
    for _ in 0..4 {
        let seen = routers.observe(&[SPACE.into()].into()).await.unwrap();
        let steps = plan(wish, &seen);
        if steps.is_empty() {
            return (first.unwrap_or_default(), seen);
        }
        for step in &steps {
            routers.apply(&step.change).await.unwrap_or_else(|error| {
                panic!("{}: {}", step.change, stackhand_kernel::Chain(&error))
            });
        }
        first = first.or_else(|| Some(steps.into_iter().map(|step| step.change).collect()));
    }
    panic!("it does not come to rest");
}

#[test]
fn a_long_walk_of_a_router_leaves_both_in_the_same_state() {
    on_a_host(|| async {
        run(&format!("ip netns add {SPACE}")).await;
        for (link, net) in [("qg-a", "203.0.113.10/24"), ("qr-a", "10.7.0.1/24")] {
            run(&format!("ip -n {SPACE} link add {link} type veth peer name peer-{link}")).await;
            run(&format!("ip -n {SPACE} address add {net} dev {link}")).await;
            run(&format!("ip -n {SPACE} link set {link} up")).await;
            run(&format!("ip -n {SPACE} link set peer-{link} up")).await;
        }
        // Somebody else's route and table stay.
        run(&format!("ip -n {SPACE} route add 192.0.2.0/24 via 203.0.113.77")).await;
        run(&format!("ip netns exec {SPACE} nft add table inet theirs")).await;
        let host = Arc::new(NetlinkHost::new());
        host.observe().await.unwrap();
        let kernel = KernelRouters::new(Arc::clone(&host));
        let fake = FakeRouters::default();
        let start = kernel.observe(&[SPACE.into()].into()).await.unwrap();
        fake.meddle(|seen| *seen = start);
        let mut runner = TestRunner::deterministic();
        for turn in 0..60 {
            let wish = wish(&any_world().new_tree(&mut runner).unwrap().current());
            let (on_kernel, kernel_has) = converge(&kernel, &wish).await;
            let (on_fake, fake_has) = converge(&fake, &wish).await;
            assert_eq!(on_kernel, on_fake, "turn {turn}");
            assert_eq!(kernel_has, fake_has, "turn {turn}");
            let before = host.writes();
            assert_eq!(converge(&kernel, &wish).await.0, [], "turn {turn}");
            assert_eq!(host.writes(), before, "turn {turn}: a second pass writes nothing");
        }
        let routes = run(&format!("ip -n {SPACE} route show 192.0.2.0/24")).await;
        assert!(routes.contains("via 203.0.113.77"), "{routes}");
        let tables = run(&format!("ip netns exec {SPACE} nft list tables")).await;
        assert!(tables.contains("inet theirs"), "{tables}");
    });
}
