//! A firewall whose change ended half way, as a kill leaves it: the next agent finishes it.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/filtered.rs"]
mod filtered;
mod support;

use std::sync::{Arc, Mutex};

use filtered::{Site, all, all_out};
use serde_json::{Value, json};
use stackhand_kernel::netlink::WriteCount;
use stackhand_network::desired::host_wish;
use stackhand_network::firewall::netlink::KernelFirewall;
use stackhand_network::firewall::{FirewallHost, Plan, Rendered, render, zones_of};
use stackhand_network::l2::HostNet;
use stackhand_network::l2::netlink::NetlinkHost;
use support::{Documents, agent, local, on_a_host, run};
use uuid::Uuid;

/// What a plan is made of: each is one transaction.
const STAGES: usize = 3;

const GROUP: Uuid = Uuid::from_u128(0xa1 << 64);
const OTHER: Uuid = Uuid::from_u128(0xa2 << 64);
const GONE: Uuid = Uuid::from_u128(0xa3 << 64);

/// Before and after: rules change, a group goes and one comes, a port goes and one comes.
fn site(after: bool) -> Site {
    let mut site = Site::of(Uuid::from_u128(7 << 96));
    if after {
        let friends = json!([{"direction": "ingress", "remote_group": OTHER}]);
        site.group_of(GROUP, true, &joined(&all_out(), &friends));
        site.group_of(OTHER, true, &all_out());
        site.port_of(Uuid::from_u128(10 << 96), 10, &[GROUP], &json!({}));
        site.port_of(Uuid::from_u128(12 << 96), 12, &[OTHER, GROUP], &json!({}));
    } else {
        site.group_of(GROUP, true, &all());
        site.port_of(Uuid::from_u128(10 << 96), 10, &[GROUP], &json!({}));
        site.group_of(GONE, true, &all());
        site.port_of(Uuid::from_u128(11 << 96), 11, &[GROUP, GONE], &json!({}));
    }
    site
}

fn joined(one: &Value, other: &Value) -> Value {
    one.as_array().unwrap().iter().chain(other.as_array().unwrap()).cloned().collect()
}

/// Makes the first stages of what it takes to get to what `documents` ask for.
async fn begin(documents: &Documents, stages: usize) -> usize {
    let firewall = KernelFirewall::open(WriteCount::default()).unwrap();
    let tracking = firewall.probe().await.unwrap();
    let seen = NetlinkHost::new().observe().await.unwrap();
    let model = host_wish(&documents.desired(), &local("one"), &seen).firewall;
    let there = firewall.observe().await.unwrap();
    let zones = zones_of(&model, &there);
    let wanted = render(&model, tracking, &zones, &mut Rendered::default(), None);
    let Plan { before, elements, after } = wanted.plan(&there, &model.spared);
    let work = [&before, &elements, &after].iter().filter(|stage| !stage.is_empty()).count();
    let until = |stage, edits| if stages > stage { edits } else { Vec::new() };
    let part =
        Plan { before: until(0, before), elements: until(1, elements), after: until(2, after) };
    drop(there);
    firewall.apply(&part).await.unwrap();
    work
}

/// A listing, in which nothing depends on what was made first.
fn sorted(rules: &str) -> Vec<&str> {
    let mut words: Vec<&str> = rules.split([' ', ',', '\t', '\n']).collect();
    words.sort_unstable();
    words
}

#[test]
fn a_firewall_that_was_changed_up_to_any_stage_is_finished_by_the_next_agent() {
    for (after, reached) in [(false, 2), (true, 3)] {
        for stages in 0..=STAGES {
            let work = Arc::new(Mutex::new(0));
            let seen = Arc::clone(&work);
            on_a_host(|| async move {
                let site = site(after);
                if after {
                    let (agent, _) = agent("one");
                    let before = self::site(false);
                    let guests = (before.guest(10).await, before.guest(11).await);
                    before.settle(&agent).await;
                    drop(guests);
                    drop(site.guest(12).await);
                } else {
                    drop((site.guest(10).await, site.guest(11).await));
                }
                *seen.lock().unwrap() = begin(&site.documents, stages).await;
                let (agent, _) = agent("one");
                site.settle(&agent).await;
                site.documents.rest(&agent).await;
                let rules = run("nft list table bridge stackhand").await;
                // What is in force is what an agent makes that starts from nothing.
                run("nft delete table bridge stackhand").await;
                site.settle(&agent).await;
                assert_eq!(sorted(&run("nft list table bridge stackhand").await), sorted(&rules));
            });
            assert_eq!(*work.lock().unwrap(), reached, "stages that have work");
        }
    }
}
