//! A firewall whose change ended half way, as a kill leaves it: the next agent finishes it.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/filtered.rs"]
mod filtered;
#[path = "support/rules.rs"]
mod rules;
mod support;

use std::sync::{Arc, Mutex};

use filtered::{Site, all, all_out};
use serde_json::{Value, json};
use stackhand_kernel::netlink::WriteCount;
use stackhand_network::desired::host_wish;
use stackhand_network::firewall::netlink::KernelFirewall;
use stackhand_network::firewall::{Edit, FirewallHost, Means, Plan, Rendered};
use stackhand_network::l2::HostNet;
use stackhand_network::l2::netlink::NetlinkHost;
use stackhand_network::settings::Renderer;
use support::{Documents, agent, local, on_a_host, run};
use uuid::Uuid;

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

/// Makes the first steps of what it takes to get to what `documents` ask for. Returns how many there
/// are.
async fn begin(documents: &Documents, first: usize) -> usize {
    let local = local("one");
    let firewall = KernelFirewall::open(WriteCount::default(), local.firewall).unwrap();
    let means = firewall.probe().await.unwrap();
    let seen = NetlinkHost::new().observe().await.unwrap();
    let model = host_wish(&documents.desired(), &local, &seen).firewall;
    let there = firewall.observe().await.unwrap();
    let wanted = means.tables(&model, &there, &mut Rendered::default(), None);
    let steps = steps(wanted.plan(&there, &model.spared));
    drop(there);
    for step in steps.iter().take(first) {
        firewall.apply(step).await.unwrap();
    }
    steps.len()
}

/// What a plan is made of: each is one transaction, or less where iptables loads two tables at once.
fn steps(plan: Plan) -> Vec<Plan> {
    let Plan { before, elements, after } = plan;
    let parts = |edits: Vec<Edit>, new: &dyn Fn(Vec<Edit>) -> Plan| {
        let alike = |one: &Edit, other: &Edit| {
            one.table() == other.table() || one.table().family().is_some()
        };
        edits.chunk_by(alike).map(|edits| new(edits.to_vec())).collect::<Vec<Plan>>()
    };
    let mut steps = parts(before, &|before| Plan { before, ..Plan::default() });
    steps.extend(parts(elements, &|elements| Plan { elements, ..Plan::default() }));
    // What goes, goes in the opposite order: what nothing uses any more first.
    steps.extend(parts(after, &|after| Plan { after, ..Plan::default() }).into_iter().rev());
    steps
}

/// What is in force.
async fn listing(means: Means) -> String {
    match means {
        Means::Nftables(_) => run("nft list table bridge stackhand").await,
        Means::Iptables => rules::saved().await,
    }
}

/// Somebody deletes it.
async fn wipe(means: Means) {
    match means {
        Means::Nftables(_) => drop(run("nft delete table bridge stackhand").await),
        Means::Iptables => {
            for program in ["iptables", "ip6tables"] {
                for table in ["raw", "filter"] {
                    run(&format!("{program} -t {table} -F")).await;
                    run(&format!("{program} -t {table} -X")).await;
                }
            }
            for table in ["nat", "filter"] {
                run(&format!("ebtables -t {table} -F")).await;
                run(&format!("ebtables -t {table} -X")).await;
            }
            run("ipset destroy").await;
        }
    }
}

/// A listing, in which nothing depends on what was made first.
fn sorted(rules: &str) -> Vec<&str> {
    let mut words: Vec<&str> = rules.split([' ', ',', '\t', '\n']).collect();
    words.sort_unstable();
    words
}

#[test]
fn a_firewall_that_was_changed_up_to_any_step_is_finished_by_the_next_agent() {
    // Tables of iptables are made and left one by one.
    let iptables = local("one").firewall == Renderer::Iptables;
    for (after, reached) in
        [(false, if iptables { 6 } else { 2 }), (true, if iptables { 14 } else { 3 })]
    {
        for first in 0..=reached {
            let all = Arc::new(Mutex::new(0));
            let told = Arc::clone(&all);
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
                *told.lock().unwrap() = begin(&site.documents, first).await;
                let (agent, _) = agent("one");
                site.settle(&agent).await;
                site.documents.rest(&agent).await;
                let firewall = KernelFirewall::open(WriteCount::default(), local("one").firewall);
                let means = firewall.unwrap().probe().await.unwrap();
                let rules = listing(means).await;
                // What is in force is what an agent makes that starts from nothing.
                wipe(means).await;
                site.settle(&agent).await;
                assert_eq!(sorted(&listing(means).await), sorted(&rules));
            });
            assert_eq!(*all.lock().unwrap(), reached, "steps that have work");
        }
    }
}

#[test]
fn so_is_one_of_iptables() {
    support::again_with_iptables("a_firewall_that_was");
}
