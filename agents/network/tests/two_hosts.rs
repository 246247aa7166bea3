//! Two hosts, each with an agent of its own, joined by a wire: guests on one overlay.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::sync::mpsc;
use std::thread;

use serde_json::json;
use support::{Documents, Guest, agent, mac, network, on_a_host, port, run};
use tokio::sync::oneshot;
use uuid::Uuid;

/// What both hosts are told.
fn documents(net: Uuid, ports: [Uuid; 2]) -> Documents {
    let mut documents = Documents::default();
    for (last, name) in [(1, "one"), (2, "two")] {
        let spec = json!({"tunnel_address": format!("192.0.2.{last}")});
        documents.put("Host", name, Uuid::from_u128(last), spec);
    }
    documents.put("Network", "net", net, network("vxlan", &json!({"segment": 4711})));
    for (last, id) in (10..).zip(ports) {
        let host = if last == 10 { "one" } else { "two" };
        let spec = port(net, host, last, &json!({"owner": "external"}));
        documents.put("Port", &format!("p{last}"), id, spec);
    }
    documents
}

#[test]
fn guests_on_two_hosts_get_leases_at_home_and_reach_one_another() {
    let (net, a, b) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    let (place_tx, place_rx) = mpsc::channel();
    let (wired_tx, wired_rx) = oneshot::channel::<()>();
    let (ready_tx, ready_rx) = oneshot::channel::<()>();
    let (done_tx, done_rx) = oneshot::channel::<()>();
    let second = thread::spawn(move || {
        on_a_host(|| async move {
            let thread = nix::unistd::gettid();
            place_tx.send(format!("/proc/{}/task/{thread}/ns/net", std::process::id())).unwrap();
            wired_rx.await.unwrap();
            run("ip address add 192.0.2.2/24 dev wire").await;
            run("ip link set wire up").await;
            let (agent, _) = agent("two");
            let documents = documents(net, [a, b]);
            let guest = Guest::start("guest", b, &mac(11)).await;
            documents.settle(&agent).await;
            documents.rest(&agent).await;
            let told = guest.udhcpc("").await.unwrap();
            assert_eq!((&told["ip"], &told["mtu"]), (&"10.7.0.11".into(), &"1450".into()));
            ready_tx.send(()).unwrap();
            done_rx.await.unwrap();
            documents.rest(&agent).await;
        });
    });
    on_a_host(|| async move {
        let place = place_rx.recv().unwrap();
        run("ip link add wire type veth peer name far").await;
        run(&format!("ip link set far netns {place} name wire")).await;
        run("ip address add 192.0.2.1/24 dev wire").await;
        run("ip link set wire up").await;
        wired_tx.send(()).unwrap();
        let (agent, _) = agent("one");
        let documents = documents(net, [a, b]);
        let guest = Guest::start("guest", a, &mac(10)).await;
        documents.settle(&agent).await;
        let told = guest.udhcpc("").await.unwrap();
        assert_eq!((&told["ip"], &told["serverid"]), (&"10.7.0.10".into(), &"10.7.0.2".into()));
        ready_rx.await.unwrap();
        assert!(guest.reaches("10.7.0.11").await, "across the overlay");
        // A full packet of the guest's MTU passes the underlay in one piece.
        guest.run("ping -c 1 -W 2 -M do -s 1422 10.7.0.11").await;
        // ARP for the other guest is answered here, even with the wire cut.
        run("ip link set wire down").await;
        guest.run("ip neighbour flush dev eth0").await;
        guest.run("arping -c 1 -I eth0 -w 3 10.7.0.11").await;
        assert!(!guest.reaches("10.7.0.11").await);
        run("ip link set wire up").await;
        documents.rest(&agent).await;
        done_tx.send(()).unwrap();
    });
    second.join().unwrap();
}
