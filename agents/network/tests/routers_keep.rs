//! Routers that stay: across restarts, kills, drift, foreign objects and bad documents.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/routed.rs"]
mod routed;
mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use routed::{Routed, Server, connect, is_alive, port, subnet};
use serde_json::json;
use stackhand_model::ObjectRef;
use stackhand_network::NetworkAgent;
use stackhand_network::desired::host_wish;
use stackhand_network::l2::netlink::NetlinkHost;
use stackhand_network::l2::{self, HostNet};
use stackhand_network::l3::netlink::KernelRouters;
use stackhand_network::l3::{self, RouterNet};
use stackhand_runtime::agent::{Cause, Outcome, PassReport};
use stackhand_testkit::wait_for;
use support::{agent, local, on_a_host, run, try_run};
use tokio::sync::Notify;
use uuid::Uuid;

fn reason(report: &PassReport, object: ObjectRef) -> &str {
    match &report.outcomes[&object] {
        Outcome::Failed { reason, .. } | Outcome::Pending { reason, .. } => reason,
        other => panic!("{object}: {other:?}"),
    }
}

fn is_active(report: &PassReport, object: ObjectRef) -> bool {
    matches!(report.outcomes[&object], Outcome::Active { .. })
}

#[test]
fn a_restart_writes_nothing_and_streams_through_the_translation_go_on() {
    on_a_host(|| async {
        let mut routed = Routed::new();
        routed.outside().await;
        let _guests = routed.guests().await;
        routed.float(Uuid::new_v4(), "203.0.113.50", routed.web);
        let (first, _) = agent("one");
        routed.documents.settle(&first).await;
        routed.documents.rest(&first).await;
        let outside = Server::start("outside", 0).await;
        let on_web = Server::start("web", 0).await;
        let (mut out, _) = connect("db", "198.51.100.1", outside.port).await.unwrap();
        let (mut into, _) = connect("outside", "203.0.113.50", on_web.port).await.unwrap();
        drop(first);
        assert!(is_alive(&mut out) && is_alive(&mut into), "without an agent");
        let (second, _) = agent("one");
        routed.documents.rest(&second).await;
        assert!(is_alive(&mut out) && is_alive(&mut into), "after the restart");
    });
}

#[test]
fn an_agent_killed_after_any_step_leaves_what_the_next_one_finishes() {
    on_a_host(|| async {
        let mut routed = Routed::new();
        routed.outside().await;
        let (web, _db) = routed.guests().await;
        let f = Uuid::new_v4();
        routed.float(f, "203.0.113.50", routed.web);
        one_step_a_life(&routed).await;
        let (first, _) = agent("one");
        routed.documents.rest(&first).await;
        drop(first);
        let on_web = Server::start("web", 0).await;
        let (mut stream, _) = connect("outside", "203.0.113.50", on_web.port).await.unwrap();
        // It leads elsewhere now: the flow is cut, however often the agent dies meanwhile.
        routed.float(f, "203.0.113.50", routed.db);
        one_step_a_life(&routed).await;
        assert!(!is_alive(&mut stream));
        let (next, _) = agent("one");
        routed.documents.rest(&next).await;
        assert!(web.reaches("198.51.100.1").await);
    });
}

/// Makes one change, forgets everything, looks again; until nothing is left to do.
async fn one_step_a_life(routed: &Routed) {
    let desired = routed.documents.desired();
    for _ in 0..200 {
        let host = Arc::new(NetlinkHost::new());
        let routers = KernelRouters::new(Arc::clone(&host));
        let seen = host.observe().await.unwrap();
        let wish = host_wish(&desired, &local("one"), &seen);
        let links = l2::plan(&wish.l2, &seen, &BTreeSet::new()).steps;
        let made = wish.l3.keys().all(|space| seen.spaces.contains_key(space));
        let spaces = wish.l3.keys().cloned().collect();
        let tables = l3::plan(&wish.l3, &routers.observe(&spaces).await.unwrap());
        let is_route = |step: &&l3::Step| matches!(step.change, l3::Change::SetRoute { .. });
        let (routes, nat): (Vec<_>, Vec<_>) = tables.iter().partition(is_route);
        if let Some(step) = nat.first().filter(|_| made) {
            routers.apply(&step.change).await.unwrap();
        } else if let Some(step) = links.first() {
            host.apply(&step.change).await.unwrap();
        } else if let Some(step) = routes.first() {
            routers.apply(&step.change).await.unwrap();
        } else {
            return;
        }
    }
    panic!("it does not come to rest");
}

#[test]
fn drift_in_a_routers_namespace_is_heard_and_repaired_and_what_is_foreign_stays() {
    on_a_host(|| async {
        let mut routed = Routed::new();
        routed.outside().await;
        let (web, _db) = routed.guests().await;
        routed.float(Uuid::new_v4(), "203.0.113.50", routed.web);
        let (agent, wake) = agent("one");
        routed.documents.settle(&agent).await;
        routed.documents.rest(&agent).await;
        let space = routed.space();
        let inside = |line: &str| format!("ip netns exec {space} {line}");
        let short = support::short(routed.gateway);
        run(&inside("nft add table inet foreign")).await;
        run(&inside("ip route add 192.0.2.0/24 via 10.7.0.10")).await;
        repair(&routed, &agent, &wake).await;
        let damages = [
            "nft delete table inet stackhand".to_owned(),
            "nft flush chain inet stackhand depart".to_owned(),
            "nft delete element inet stackhand floating { 203.0.113.50 }".to_owned(),
            "nft add element inet stackhand fixed { 10.9.9.9 : 203.0.113.50 }".to_owned(),
            "ip route delete default".to_owned(),
            "ip route replace default via 203.0.113.77".to_owned(),
            format!("ip address delete 203.0.113.50/32 dev qg-{short}"),
            format!("ip link set qg-{short} down"),
        ];
        for damage in damages {
            let start = Instant::now();
            run(&inside(&damage)).await;
            let writes = repair(&routed, &agent, &wake).await;
            assert!(writes > 0, "{damage}");
            assert!(start.elapsed() < Duration::from_secs(1), "{damage}: {:?}", start.elapsed());
            routed.documents.rest(&agent).await;
        }
        // Of settings nobody tells; the timer's pass finds them.
        run(&inside("sysctl -q -w net.ipv4.ip_forward=0")).await;
        assert!(routed.documents.pass_because(&agent, Cause::Timer).await.writes > 0);
        assert!(web.reaches("198.51.100.1").await);
        let on_web = Server::start("web", 0).await;
        connect("outside", "203.0.113.50", on_web.port).await.unwrap();
        assert!(try_run(&inside("nft list table inet foreign")).await.is_ok());
        let routes = run(&inside("ip route")).await;
        assert!(routes.contains("192.0.2.0/24 via 10.7.0.10"), "{routes}");
    });
}

/// Waits until the agent has heard of something, and lets it repair that.
async fn repair(routed: &Routed, agent: &NetworkAgent, wake: &Notify) -> u64 {
    tokio::time::timeout(Duration::from_secs(2), wake.notified()).await.expect("it is heard");
    let writes = routed.documents.pass_because(agent, Cause::Host).await.writes;
    // What the repair itself caused.
    while tokio::time::timeout(Duration::from_millis(50), wake.notified()).await.is_ok() {}
    writes
}

#[test]
fn a_deleted_router_is_gone_with_its_links_and_one_that_nobody_knows_is_swept() {
    on_a_host(|| async {
        let routed = Routed::new();
        routed.outside().await;
        let _guests = routed.guests().await;
        let (first, _) = agent("one");
        routed.documents.settle(&first).await;
        let mut documents = routed.documents.clone();
        let router = stackhand_model::RouterId(routed.router).object();
        documents.delete(router);
        let report = documents.pass(&first).await;
        assert_eq!(report.outcomes[&router], Outcome::Gone);
        assert!(!run("ip netns list").await.contains("qrouter-"));
        assert!(!run("ip link").await.contains(&format!("tap{}", support::short(routed.gateway))));

        routed.documents.settle(&first).await;
        let mut documents = routed.documents.clone();
        documents.forget(router);
        documents.pass(&first).await;
        wait_for(Duration::from_secs(5), "the orphan to be swept", || async {
            documents.pass_because(&first, Cause::Timer).await;
            (!run("ip netns list").await.contains("qrouter-")).then_some(())
        })
        .await;
    });
}

#[test]
fn bad_documents_fail_alone_and_say_why() {
    on_a_host(|| async {
        let mut routed = Routed::new();
        routed.outside().await;
        let (web, _db) = routed.guests().await;
        let (agent, _) = agent("one");
        let good = routed.float(Uuid::from_u128(1), "203.0.113.50", routed.web);
        let again = routed.float(Uuid::from_u128(2), "203.0.113.51", routed.web);
        let twice = routed.float(Uuid::from_u128(3), "203.0.113.50", routed.db);
        let outside = routed.float(Uuid::new_v4(), "192.0.2.9", routed.db);
        let gateways = routed.float(Uuid::new_v4(), "203.0.113.10", routed.db);
        let nowhere = routed.float(Uuid::new_v4(), "203.0.113.53", Uuid::from_u128(77));
        let spec =
            json!({"address": "203.0.113.54", "router": Uuid::from_u128(78), "port": routed.db});
        let no_router = routed.documents.put("FloatingIp", "lost", Uuid::new_v4(), spec);
        // A third network that overlaps the first.
        // Of two that overlap the one with the lower id stays.
        let (c, on_c) = (Uuid::new_v4(), Uuid::from_u128(u128::MAX));
        let net = json!({"type": "local", "subnets": [subnet("c", "10.7.0.0/16", "10.7.0.254")]});
        routed.documents.put("Network", "c", c, net);
        let on_c_spec = port(c, 20, "router-interface", &[("c", "10.7.0.254")]);
        routed.documents.put("Port", "on-c", on_c, on_c_spec);
        let missing = Uuid::from_u128(79);
        let router = routed.put_router(&json!({
            "interfaces": [routed.on_a, routed.on_b, on_c, missing],
            "routes": [
                {"destination": "172.16.0.0/12", "next_hop": "10.8.0.99"},
                {"destination": "172.31.0.0/16", "next_hop": "192.0.2.1"},
            ],
        }));
        let elsewhere =
            json!({"host": "two", "interfaces": [], "gateway": {"port": routed.gateway}});
        let remote = routed.documents.put("Router", "remote", Uuid::new_v4(), elsewhere);

        let report = routed.documents.pass(&agent).await;
        let told = [
            (again, "fixed address 10.7.0.10 has another floating IP"),
            (twice, "too; take a free one"),
            (outside, "is on no subnet of network"),
            (gateways, "is that of port"),
            (nowhere, "waits for the document of port"),
            (no_router, "waits for the document of router"),
        ];
        for (object, text) in told {
            let why = reason(&report, object);
            assert!(why.contains(text), "{object}: {why}");
        }
        assert!(is_active(&report, good));
        let why = reason(&report, router);
        assert!(why.contains("overlaps") || why.contains("next_hop"), "{why}");
        assert!(is_active(&report, remote), "another host's router is none of ours");
        // All the rest works.
        assert!(web.reaches("10.8.0.11").await);
        assert!(web.reaches("198.51.100.1").await);
        let routes = run(&format!("ip -n {} route", routed.space())).await;
        assert!(routes.contains("172.16.0.0/12 via 10.8.0.99"), "{routes}");
        let writes = routed.documents.pass(&agent).await.writes;
        assert_eq!(writes, 0, "trouble that stays is not worked on for ever");
    });
}

#[test]
fn a_foreign_namespace_on_a_routers_name_fails_the_router_and_is_left_alone() {
    on_a_host(|| async {
        let routed = Routed::new();
        routed.outside().await;
        run(&format!("ip netns add {}", routed.space())).await;
        run(&format!("ip -n {} link set lo up", routed.space())).await;
        let (agent, _) = agent("one");
        let report = routed.documents.pass(&agent).await;
        let router = stackhand_model::RouterId(routed.router).object();
        assert!(reason(&report, router).contains("is not ours"));
        let links = run(&format!("ip -n {} -o link", routed.space())).await;
        assert_eq!(links.lines().count(), 1, "{links}");
        let tables = run(&format!("ip netns exec {} nft list tables", routed.space())).await;
        assert_eq!(tables.trim(), "");
    });
}

#[test]
fn several_next_hops_share_the_load_and_ipv6_is_routed_without_translation() {
    on_a_host(|| async {
        let mut routed = Routed::new();
        routed.outside().await;
        let Routed { ext, a, gateway, on_a, .. } = routed;
        let both = |v4: serde_json::Value, name: &str, cidr: &str, gateway: &str| json!([v4, {"name": name, "cidr": cidr, "gateway": gateway, "dhcp": false}]);
        let public = subnet("public", "203.0.113.0/24", "203.0.113.1");
        let public = both(public, "public6", "2001:db8:e::/64", "2001:db8:e::1");
        let spec = json!({
            "type": "flat", "physical_network": "public", "external": true, "subnets": public,
        });
        routed.documents.put("Network", "ext", ext, spec);
        let inner = subnet("a", "10.7.0.0/24", "10.7.0.1");
        let inner = both(inner, "a6", "2001:db8:a::/64", "2001:db8:a::1");
        routed.documents.put("Network", "a", a, json!({"type": "local", "subnets": inner}));
        let addresses = [("public", "203.0.113.10"), ("public6", "2001:db8:e::10")];
        routed.documents.put("Port", "gw", gateway, port(ext, 1, "router-gateway", &addresses));
        let addresses = [("a", "10.7.0.1"), ("a6", "2001:db8:a::1")];
        routed.documents.put("Port", "on-a", on_a, port(a, 2, "router-interface", &addresses));
        routed.put_router(&json!({"routes": [
            {"destination": "172.16.0.0/12", "next_hop": "10.7.0.10"},
            {"destination": "172.16.0.0/12", "next_hop": "10.8.0.11"},
        ]}));
        let (web, _db) = routed.guests().await;
        web.run("ip address add 2001:db8:a::10/64 dev eth0 nodad").await;
        web.run("ip route add default via 2001:db8:a::1").await;
        run("ip -n outside address add 2001:db8:e::1/64 dev eth0 nodad").await;
        run("ip -n outside route add 2001:db8:a::/64 via 2001:db8:e::10").await;
        let (agent, _) = agent("one");
        routed.documents.settle(&agent).await;
        routed.documents.rest(&agent).await;
        assert!(web.reaches("2001:db8:e::1").await, "out");
        run("ip netns exec outside ping -c 1 -W 2 2001:db8:a::10").await;
        let space = routed.space();
        let routes = run(&format!("ip -n {space} route show 172.16.0.0/12")).await;
        let (one, other) = ("nexthop via 10.7.0.10", "nexthop via 10.8.0.11");
        assert!(routes.contains(one) && routes.contains(other), "{routes}");
        let show = format!("ip -n {space} -6 address show dev qr-{}", support::short(on_a));
        let links = run(&show).await;
        assert!(links.contains("fe80::a9fe:a9fe") && !links.contains("tentative"), "{links}");
        let lo = run(&format!("ip -n {space} address show dev lo")).await;
        assert!(lo.contains("169.254.169.254/32"), "{lo}");

        routed.put_router(&json!({"routes": [
            {"destination": "172.16.0.0/12", "next_hop": "10.8.0.11"},
        ]}));
        routed.documents.settle(&agent).await;
        let routes = run(&format!("ip -n {space} route show 172.16.0.0/12")).await;
        assert!(routes.contains("via 10.8.0.11") && !routes.contains("nexthop"), "{routes}");
    });
}

#[test]
fn without_snat_the_outside_sees_the_guest_and_a_router_that_is_down_is_not_there() {
    on_a_host(|| async {
        let mut routed = Routed::new();
        routed.outside().await;
        run("ip -n outside route add 10.7.0.0/16 via 203.0.113.10").await;
        let (web, _db) = routed.guests().await;
        let (agent, _) = agent("one");
        routed.documents.settle(&agent).await;
        let outside = Server::start("outside", 0).await;
        let (mut masked, _) = connect("web", "198.51.100.1", outside.port).await.unwrap();
        routed.put_router(&json!({"gateway": {"port": routed.gateway, "snat": false}}));
        routed.documents.settle(&agent).await;
        routed.documents.rest(&agent).await;
        assert!(!is_alive(&mut masked), "flows that were translated are cut");
        let (_, seen) = connect("web", "198.51.100.1", outside.port).await.unwrap();
        assert_eq!(seen.to_string(), "10.7.0.10");

        routed.put_router(&json!({"admin_up": false}));
        routed.documents.settle(&agent).await;
        assert!(!run("ip netns list").await.contains("qrouter-"));
        assert!(!web.reaches("10.8.0.11").await);
        routed.documents.rest(&agent).await;
    });
}

#[test]
fn a_new_address_is_announced_to_its_neighbours() {
    on_a_host(|| async {
        let mut routed = Routed::new();
        routed.outside().await;
        let _guests = routed.guests().await;
        let (agent, _) = agent("one");
        routed.documents.settle(&agent).await;
        // The neighbour believes somebody else to have the address.
        run("ip -n outside neighbour replace 203.0.113.50 lladdr 02:00:00:00:00:99 dev eth0 nud stale")
            .await;
        run("ip netns exec outside sysctl -q -w net.ipv4.conf.all.arp_accept=1").await;
        routed.float(Uuid::new_v4(), "203.0.113.50", routed.web);
        routed.documents.settle(&agent).await;
        wait_for(Duration::from_secs(5), "the neighbour to learn of it", || async {
            let known = run("ip -n outside neighbour show 203.0.113.50").await;
            known.contains(&support::mac(1)).then_some(())
        })
        .await;
    });
}
