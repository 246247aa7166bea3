//! The fake and the kernel must agree, or tests against the fake prove nothing.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;
#[path = "../src/l2/worlds.rs"]
mod worlds;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use stackhand_kernel::netlink::QueueKind;
use stackhand_network::desired::host_wish;
use stackhand_network::l2::fake::FakeHost;
use stackhand_network::l2::netlink::NetlinkHost;
use stackhand_network::l2::{At, Change, HostNet, Make, Seen, SeenKind, plan};
use stackhand_runtime::agent::{Agent, Cause, Desired, Work};
use stackhand_testkit::wait_for;
use support::{agent, local, on_a_host, run};
use worlds::{ALL, any_world};

/// Plans and performs until nothing is left; returns the changes of the first round.
async fn converge(host: &impl HostNet, desired: &Desired) -> Vec<Change> {
    let mut first = None;
    for _ in 0..4 {
        let seen = host.observe().await.unwrap();
        let wish = host_wish(desired, &local("one"), &seen);
        let orphans = plan(&wish.l2, &seen, &BTreeSet::new()).orphans;
        let steps = plan(&wish.l2, &seen, &orphans).steps;
        if steps.is_empty() {
            return first.unwrap_or_default();
        }
        for step in &steps {
            host.apply(&step.change).await.unwrap_or_else(|error| {
                panic!("{}: {}", step.change, stackhand_kernel::Chain(&error))
            });
        }
        first = first.or_else(|| Some(steps.into_iter().map(|step| step.change).collect()));
    }
    panic!("it does not come to rest");
}

/// What both must agree on: not what the kernel chooses by itself.
fn comparable(mut seen: Seen, desired: &Desired) -> Seen {
    let wish = host_wish(desired, &local("one"), &seen);
    seen.links.retain(|at, link| {
        link.kind != SeenKind::Loopback
            && wish.l2.links.get(at).is_some_and(|wanted| wanted.make != Make::Brought)
    });
    for (at, link) in &mut seen.links {
        link.carrier = false;
        link.mac = None;
        // The kernel counts a bucket's depth in units of time.
        if let Some(QueueKind::Shaper(shaper)) = &mut link.queue {
            shaper.burst >>= 10;
        }
        if wish.l2.links[at].set.routing.is_none() {
            link.routing = Default::default();
        }
    }
    seen.forwarding.retain(|_, table| *table != Default::default());
    seen.neighbours.retain(|_, table| !table.is_empty());
    seen
}

#[test]
fn a_long_walk_through_random_worlds_leaves_both_in_the_same_state() {
    // What every kernel has.
    walk(&["local", "flat", "vxlan"], 40);
}

fn walk(types: &'static [&'static str], turns: usize) {
    on_a_host(|| async {
        run("ip link add under type veth peer name wire").await;
        run("ip address add 192.0.2.1/24 dev under").await;
        run("ip link add eth9 type veth peer name wire9").await;
        run("ip link add docker0 type bridge").await;
        let kernel = NetlinkHost::new();
        let fake = FakeHost::new(Seen::clone(&*kernel.observe().await.unwrap()));
        let mut runner = TestRunner::deterministic();
        for turn in 0..turns {
            let world = any_world(types).new_tree(&mut runner).unwrap().current();
            let desired = world.desired();
            let on_kernel = converge(&kernel, &desired).await;
            let on_fake = converge(&fake, &desired).await;
            assert_eq!(on_kernel, on_fake, "turn {turn}");
            let before = kernel.writes();
            assert_eq!(converge(&kernel, &desired).await, [], "turn {turn}");
            assert_eq!(kernel.writes(), before, "turn {turn}: a second pass writes nothing");
            // Of what it saw before it looks again only at what changed. Links may change by themselves
            // while two look.
            let seen = wait_for(Duration::from_secs(10), "both to see the same", || async {
                let (kept, anew) = (kernel.observe().await, NetlinkHost::new().observe().await);
                let (kept, anew) = (kept.unwrap(), anew.unwrap());
                (kept == anew).then_some(kept)
            })
            .await;
            assert!(seen.links.contains_key(&At::host("docker0")));
            assert_eq!(
                comparable(Seen::clone(&seen), &desired),
                comparable(fake.seen(), &desired),
                "turn {turn}"
            );
        }
    });
}

#[test]
fn what_an_agent_leaves_that_saw_all_changes_is_what_one_wants_that_sees_the_host_first() {
    on_a_host(|| async {
        run("ip link add under type veth peer name wire").await;
        run("ip address add 192.0.2.1/24 dev under").await;
        run("ip link add eth9 type veth peer name wire9").await;
        let (old, _) = agent("one");
        let mut runner = TestRunner::deterministic();
        for turn in 0..25 {
            let world = any_world(&["local", "flat", "vxlan"]).new_tree(&mut runner).unwrap();
            let desired = Arc::new(world.current().desired());
            let mut passes = 0;
            while passes == 0 || !old.plan(Arc::clone(&desired)).await.unwrap().is_empty() {
                passes += 1;
                assert!(passes < 5, "turn {turn}: it does not come to rest");
                let due = desired.objects.keys().copied().collect();
                let desired = Arc::clone(&desired);
                old.pass(Work { desired, due, cause: Cause::Change }).await;
            }
            let (new, _) = agent("one");
            assert_eq!(new.plan(Arc::clone(&desired)).await.unwrap(), [], "turn {turn}");
        }
    });
}

/// What needs a full kernel.
mod lab {
    use super::*;

    #[test]
    #[ignore = "runs in the lab"]
    fn a_walk_through_worlds_of_all_types_leaves_both_in_the_same_state() {
        walk(&ALL, 25);
    }

    #[test]
    fn the_fake_and_a_full_kernel_agree() {
        stackhand_testkit::in_the_lab("lab::a_walk");
    }
}
