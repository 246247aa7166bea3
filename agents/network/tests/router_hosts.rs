//! Two hosts joined by a wire: a router on one, guests on both.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/routed.rs"]
mod routed;
mod support;

use std::sync::mpsc;
use std::thread;

use routed::{Routed, Server, connect, guest, port, subnet};
use serde_json::json;
use support::{agent, on_a_host, run};
use tokio::sync::oneshot;
use uuid::Uuid;

/// What both hosts are told: as in [`Routed`], but network `a` is an overlay, and its guest, which
/// has the floating IP, is on host `two`.
fn told() -> Routed {
    let mut routed = Routed::new();
    let Routed { a, web, .. } = routed;
    let documents = &mut routed.documents;
    for (last, name) in [(1, "one"), (2, "two")] {
        let spec = json!({
            "tunnel_address": format!("192.0.2.{last}"),
            "bridge_mappings": if last == 1 { json!({"public": "eth1"}) } else { json!({}) },
        });
        documents.put("Host", name, Uuid::from_u128(last), spec);
    }
    let overlay = json!({
        "type": "vxlan", "segment": 4711, "subnets": [subnet("a", "10.7.0.0/24", "10.7.0.1")],
    });
    documents.put("Network", "a", a, overlay);
    let mut on_two = port(a, 10, "external", &[("a", "10.7.0.10")]);
    on_two["host"] = json!("two");
    documents.put("Port", "web", web, on_two);
    routed.float(Uuid::from_u128(50), "203.0.113.50", web);
    routed
}

#[test]
fn a_guest_on_another_host_reaches_out_and_is_reached_by_its_floating_ip() {
    let routed = told();
    let told = routed.clone();
    let (place_tx, place_rx) = mpsc::channel();
    let (wired_tx, wired_rx) = oneshot::channel::<()>();
    let (ready_tx, ready_rx) = oneshot::channel::<u16>();
    let (checked_tx, checked_rx) = oneshot::channel::<u16>();
    let (done_tx, done_rx) = oneshot::channel::<()>();
    let second = thread::spawn(move || {
        on_a_host(|| async move {
            let thread = nix::unistd::gettid();
            place_tx.send(format!("/proc/{}/task/{thread}/ns/net", std::process::id())).unwrap();
            wired_rx.await.unwrap();
            run("ip address add 192.0.2.2/24 dev wire").await;
            run("ip link set wire up").await;
            let (agent, _) = agent("two");
            let web = guest("web", told.web, 10, "10.7.0.10/24", "10.7.0.1").await;
            web.run("ip link set eth0 mtu 1450").await;
            told.documents.settle(&agent).await;
            told.documents.rest(&agent).await;
            assert!(!run("ip netns list").await.contains("qrouter-"), "the router is elsewhere");
            let server = Server::start("web", 0).await;
            ready_tx.send(server.port).unwrap();
            let outside = checked_rx.await.unwrap();
            let (_, seen) = connect("web", "198.51.100.1", outside).await.unwrap();
            assert_eq!(seen.to_string(), "203.0.113.50", "as its floating IP");
            assert!(web.reaches("10.8.0.11").await, "a guest of the other network and host");
            done_tx.send(()).unwrap();
        });
    });
    on_a_host(|| async move {
        let place = place_rx.recv().unwrap();
        run("ip link add wire type veth peer name far").await;
        run(&format!("ip link set far netns {place} name wire")).await;
        run("ip address add 192.0.2.1/24 dev wire").await;
        run("ip link set wire up").await;
        wired_tx.send(()).unwrap();
        routed.outside().await;
        let _db = guest("db", routed.db, 11, "10.8.0.11/24", "10.8.0.1").await;
        let (agent, _) = agent("one");
        routed.documents.settle(&agent).await;
        routed.documents.rest(&agent).await;
        let on_web = ready_rx.await.unwrap();
        let (_, seen) = connect("outside", "203.0.113.50", on_web).await.unwrap();
        assert_eq!(seen.to_string(), "203.0.113.1");
        let (_, seen) = connect("db", "203.0.113.50", on_web).await.unwrap();
        assert_eq!(seen.to_string(), "203.0.113.10", "turned back inside, across the overlay");
        let outside = Server::start("outside", 0).await;
        checked_tx.send(outside.port).unwrap();
        done_rx.await.unwrap();
        routed.documents.rest(&agent).await;
    });
    second.join().unwrap();
}
