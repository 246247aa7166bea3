//! Routers, floating IPs and port forwardings on the real kernel.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/routed.rs"]
mod routed;
mod support;

use routed::{Routed, Server, connect, is_alive};
use serde_json::{Value, json};
use support::{agent, on_a_host, run};
use uuid::Uuid;

#[test]
fn guests_reach_one_another_and_the_outside_which_sees_the_routers_address() {
    on_a_host(|| async {
        let routed = Routed::new();
        routed.outside().await;
        let (web, db) = routed.guests().await;
        let (agent, _) = agent("one");
        let report = routed.documents.settle(&agent).await;
        assert!(report.writes > 0);
        routed.documents.rest(&agent).await;
        assert!(web.reaches("10.8.0.11").await, "the other network");
        assert!(web.reaches("203.0.113.1").await, "the external network");
        assert!(db.reaches("198.51.100.1").await, "beyond it, by the default route");

        let server = Server::start("outside", 0).await;
        let (_, seen) = connect("web", "198.51.100.1", server.port).await.unwrap();
        assert_eq!(seen.to_string(), "203.0.113.10", "translated");
        let inside = Server::start("db", 0).await;
        let (_, seen) = connect("web", "10.8.0.11", inside.port).await.unwrap();
        assert_eq!(seen.to_string(), "10.7.0.10", "not translated inside");
        let list = format!("ip netns exec {} conntrack -L -d 198.51.100.1", routed.space());
        let listed = run(&list).await;
        assert!(listed.contains("dst=203.0.113.10"), "{listed}");
    });
}

#[test]
fn a_floating_ip_works_both_ways_and_from_inside_and_is_cut_when_it_goes() {
    on_a_host(|| async {
        let mut routed = Routed::new();
        routed.outside().await;
        let (web, _db) = routed.guests().await;
        let (agent, _) = agent("one");
        let (f, g) = (Uuid::new_v4(), Uuid::new_v4());
        let floating = routed.float(f, "203.0.113.50", routed.web);
        routed.documents.settle(&agent).await;
        routed.documents.rest(&agent).await;

        let on_web = Server::start("web", 0).await;
        let outside = Server::start("outside", 0).await;
        let (mut stream, seen) = connect("outside", "203.0.113.50", on_web.port).await.unwrap();
        assert_eq!(seen.to_string(), "203.0.113.1", "the caller's own address");
        let (_, seen) = connect("web", "198.51.100.1", outside.port).await.unwrap();
        assert_eq!(seen.to_string(), "203.0.113.50", "the guest sends as its floating IP");
        let (_, seen) = connect("db", "203.0.113.50", on_web.port).await.unwrap();
        assert_eq!(seen.to_string(), "203.0.113.10", "from another network, by the router");
        let (_, seen) = connect("web", "203.0.113.50", on_web.port).await.unwrap();
        assert_eq!(seen.to_string(), "203.0.113.50", "a guest reaches itself");

        routed.float(g, "203.0.113.51", routed.db);
        let report = routed.documents.settle(&agent).await;
        // The address, and one transaction.
        assert_eq!(report.writes, 2);
        let (_, seen) = connect("db", "203.0.113.50", on_web.port).await.unwrap();
        assert_eq!(seen.to_string(), "203.0.113.51", "from one floating IP to another");
        assert!(is_alive(&mut stream), "flows of others are left alone");

        routed.documents.delete(floating);
        let report = routed.documents.pass(&agent).await;
        assert_eq!(report.outcomes[&floating], stackhand_runtime::agent::Outcome::Gone);
        assert!(!is_alive(&mut stream), "flows of what goes are cut");
        assert!(connect("outside", "203.0.113.50", on_web.port).await.is_err());
        routed.documents.forget(floating);
        routed.documents.rest(&agent).await;
        assert!(web.reaches("198.51.100.1").await);
    });
}

#[test]
fn forwarded_ports_and_ranges_lead_to_different_guests_and_others_do_not() {
    on_a_host(|| async {
        let mut routed = Routed::new();
        routed.outside().await;
        let _guests = routed.guests().await;
        let (agent, _) = agent("one");
        let on_web = Server::start("web", 8080).await;
        let on_db = Server::start("db", 0).await;
        let forward = |external: Value, to: &str, port: Value| {
            json!({
                "protocol": "tcp", "external_port": external,
                "internal_address": to, "internal_port": port,
            })
        };
        let db_port = on_db.port;
        // The last of the range, whose ports are as many on both sides.
        let (many, inside) = ("2000:5432", format!("{}:{db_port}", db_port - 3432));
        let spec = json!({
            "address": "203.0.113.60",
            "router": routed.router,
            "port_forwardings": [
                forward(json!(80), "10.7.0.10", json!(on_web.port)),
                forward(json!(many), "10.8.0.11", json!(inside)),
            ],
        });
        routed.documents.put("FloatingIp", "shared", Uuid::from_u128(7), spec);
        routed.documents.settle(&agent).await;
        routed.documents.rest(&agent).await;
        let (_, seen) = connect("outside", "203.0.113.60", 80).await.unwrap();
        assert_eq!(seen.to_string(), "203.0.113.1");
        let (mut to_db, _) = connect("outside", "203.0.113.60", 5432).await.unwrap();
        let (_, seen) = connect("web", "203.0.113.60", 5432).await.unwrap();
        assert_eq!(seen.to_string(), "203.0.113.10", "from inside");
        assert!(connect("outside", "203.0.113.60", 8080).await.is_err(), "not forwarded");

        let spec = json!({
            "address": "203.0.113.60",
            "router": routed.router,
            "port_forwardings": [forward(json!(5432), "10.8.0.11", json!(db_port))],
        });
        routed.documents.put("FloatingIp", "shared", Uuid::from_u128(7), spec);
        routed.documents.settle(&agent).await;
        assert!(is_alive(&mut to_db), "what leads where it led goes on");
        for closed in [80, 2000, 5431] {
            assert!(connect("outside", "203.0.113.60", closed).await.is_err(), "{closed}");
        }
    });
}
