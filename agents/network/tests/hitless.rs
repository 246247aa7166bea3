//! The program itself on the real kernel: killed, restarted, and killed while it works.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/program.rs"]
mod program;
#[path = "support/stream.rs"]
mod stream;
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use program::Program;
use serde_json::{Value, json};
use stackhand_kernel::netlink::{Event, Monitor};
use stackhand_model::Document;
use stackhand_network::desired::host_wish;
use stackhand_network::l2::netlink::NetlinkHost;
use stackhand_network::l2::{HostNet, plan};
use stackhand_runtime::agent::Agent;
use stackhand_testkit::wait_for;
use stream::stream;
use support::{Documents, Guest, agent, link, local, mac, network, on_a_host, port, run, short};
use uuid::Uuid;

#[test]
fn flows_do_not_notice_that_the_agent_is_killed_and_started_again() {
    on_a_host(|| async {
        let (net, a, b) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let one = Guest::start("one", a, &mac(10)).await;
        let two = Guest::start("two", b, &mac(11)).await;
        one.run("ip address add 10.7.0.10/24 dev eth0").await;
        two.run("ip address add 10.7.0.11/24 dev eth0").await;
        let limits = Uuid::new_v4();
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        let more = json!({"owner": "external", "port_security": false, "qos_policy": limits});
        documents.put("Port", "a", a, port(net, "one", 10, &more));
        documents.put("Port", "b", b, port(net, "one", 11, &more));
        let bandwidth = json!([
            {"direction": "ingress", "max_kbps": 500_000},
            {"direction": "egress", "max_kbps": 500_000},
        ]);
        documents.put("QosPolicy", "limits", limits, json!({"bandwidth": bandwidth}));
        let program = Program::new();
        let mut agent = program.start();
        program.apply(&documents).await;

        let end = Arc::new(AtomicBool::new(false));
        let watched = stream(&one, &two, "10.7.0.11", Arc::clone(&end));
        let flood = async {
            let told = two.run("ping -i 0.002 -c 1500 -W 2 -q 10.7.0.10").await;
            end.store(true, Ordering::Relaxed);
            told
        };
        let restarts = async {
            for _ in 0..3 {
                agent.kill();
                agent = program.start();
                program.ready().await;
                program.all_active(&documents).await;
                assert_eq!(program.writes().await, 0, "a restart changes nothing");
            }
        };
        let (longest, told, ()) = tokio::join!(watched, flood, restarts);
        println!("{told}\nlongest answer on the open stream: {longest:?}");
        assert!(told.contains(" 0% packet loss"), "{told}");
        assert!(longest < Duration::from_millis(900), "a retransmission: {longest:?}");
    });
}

/// Documents for a host with one network of each simple type and some ports.
fn busy_host() -> Documents {
    let mut documents = Documents::default();
    for (number, name) in [(1, "one"), (2, "two")] {
        let spec = json!({"tunnel_address": format!("192.0.2.{number}")});
        documents.put("Host", name, Uuid::from_u128(number), spec);
    }
    let limits = Uuid::from_u128(0xcc);
    let bandwidth = json!([{"direction": "egress", "max_kbps": 1000}]);
    documents.put("QosPolicy", "limits", limits, json!({"bandwidth": bandwidth}));
    let group = Uuid::from_u128(0xdd);
    let rules = json!([{"direction": "ingress", "remote_group": group}]);
    documents.put("SecurityGroup", "group", group, json!({"rules": rules}));
    for (number, kind) in [(1_u8, "vxlan"), (2, "local")] {
        let net = Uuid::from_u128(u128::from(number) << 96);
        let mut more = json!({});
        if kind == "vxlan" {
            more = json!({"segment": 7});
        }
        documents.put("Network", kind, net, network(kind, &more));
        for last in 10..14 {
            let id = Uuid::from_u128(u128::from(number) << 104 | u128::from(last) << 96);
            let host = if last == 13 { "two" } else { "one" };
            let more = if last == 12 {
                json!({"port_security": true, "security_groups": [group]})
            } else {
                json!({"port_security": false, "qos_policy": limits})
            };
            documents.put("Port", &format!("{kind}{last}"), id, port(net, host, last, &more));
        }
    }
    documents
}

/// Guests of both networks are served all that they need.
fn assert_serves_both(facts: &Value) {
    for (service, sites) in [("dhcp", "networks"), ("dns", "networks"), ("metadata", "sites")] {
        assert_eq!(facts[service][sites], 2, "{service}: {facts}");
    }
}

async fn underlay() {
    run("ip link add under type veth peer name wire").await;
    run("ip address add 192.0.2.1/24 dev under").await;
}

#[test]
fn an_executor_that_ends_after_any_step_is_finished_by_the_next() {
    let mut steps = 0;
    let mut stop = 0;
    // On a host of its own for each step.
    while stop <= steps {
        let total = Arc::new(std::sync::Mutex::new(0));
        let count = Arc::clone(&total);
        on_a_host(|| async move {
            underlay().await;
            let documents = busy_host();
            let desired = documents.desired();
            let host = NetlinkHost::new();
            let seen = host.observe().await.unwrap();
            let wish = host_wish(&desired, &local("one"), &seen);
            let plan = plan(&wish.l2, &seen, &std::collections::BTreeSet::new());
            *count.lock().unwrap() = plan.steps.len();
            for step in plan.steps.iter().take(stop) {
                host.apply(&step.change).await.unwrap();
            }
            drop(host);
            let (agent, _) = agent("one");
            documents.settle(&agent).await;
            documents.rest(&agent).await;
            assert_serves_both(&agent.facts().await);
        });
        steps = *total.lock().unwrap();
        // Every step near the start, where kinds differ; then every third.
        stop += if stop < 12 { 1 } else { 3 };
    }
    assert!(steps > 20, "{steps}");
}

#[test]
fn a_program_that_is_killed_at_any_moment_leaves_nothing_that_the_next_does_not_finish() {
    on_a_host(|| async {
        underlay().await;
        let documents = busy_host();
        let program = Program::new();
        let mut agent = program.start();
        program.ready().await;
        let desired = documents.desired();
        let all: Vec<Document> =
            desired.objects.values().map(|held| held.document.as_ref().clone()).collect();
        program.client().apply(&all).await.unwrap();
        let links = || async { run("ip -brief link show").await.lines().count() };
        let mut seen = Vec::new();
        for wait in [0, 3, 6, 10, 15, 22, 30, 45] {
            tokio::time::sleep(Duration::from_millis(wait)).await;
            agent.kill();
            seen.push(links().await);
            // What it made is torn down at random, so that there is work again.
            if wait % 2 == 0 {
                let tap = format!("tap{}", short(Uuid::from_u128(1 << 104 | 10 << 96)));
                for doomed in ["vxlan-7", &tap] {
                    drop(support::try_run(&format!("ip link delete {doomed}")).await);
                }
            }
            agent = program.start();
            program.ready().await;
        }
        println!("links after each kill: {seen:?}");
        program.all_active(&documents).await;
        let before = program.writes().await;
        agent.kill();
        let _agent = program.start();
        program.ready().await;
        program.all_active(&documents).await;
        assert_eq!(program.writes().await, 0, "after {before} writes before");
        assert_serves_both(&program.client().facts().await.unwrap());
        assert!(link("vxlan-7").await.is_some());
    });
}

#[test]
fn a_link_that_somebody_brings_is_wired_within_fifty_milliseconds() {
    on_a_host(|| async {
        let net = Uuid::new_v4();
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        let program = Program::new();
        let _agent = program.start();
        program.apply(&documents).await;
        let mut waits = Vec::new();
        for last in 10..15 {
            let id = Uuid::new_v4();
            let more = json!({"owner": "external", "port_security": false});
            let object =
                documents.put("Port", &format!("p{last}"), id, port(net, "one", last, &more));
            let document = documents.desired().objects[&object].document.as_ref().clone();
            program.client().apply(&[document]).await.unwrap();
            wait_for(Duration::from_secs(10), "the port to wait for its link", || async {
                let entries = program.client().get(None, Some(&[id])).await.unwrap();
                let reason = entries[0].status.reason.clone().unwrap_or_default();
                reason.contains("waits for link").then_some(())
            })
            .await;
            let mut monitor = Monitor::open().unwrap();
            let tap = format!("tap{}", short(id));
            let watched = tokio::spawn(async move {
                let mut came = None;
                loop {
                    let Some(Event::Link(link)) = monitor.next().await else { continue };
                    if link.name == tap {
                        let came = *came.get_or_insert_with(Instant::now);
                        if link.master.is_some() {
                            return came.elapsed();
                        }
                    }
                }
            });
            Guest::start(&format!("guest{last}"), id, &mac(last)).await;
            let wait = tokio::time::timeout(Duration::from_secs(5), watched);
            waits.push(wait.await.expect("it is wired").unwrap());
        }
        println!("wired after {waits:?}");
        let best = waits.iter().min().unwrap();
        assert!(*best < Duration::from_millis(50), "{waits:?}");
    });
}
