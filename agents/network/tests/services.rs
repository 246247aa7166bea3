//! DNS and metadata by clients that nobody here wrote, in guests of their own.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use stackhand_model::{AgentKind, ObjectRef};
use stackhand_runtime::agent::{Agent, Outcome, PassReport};
use stackhand_runtime::ledger::Ledger;
use support::{Documents, Guest, agent, agent_of, local, mac, network, on_a_host, port, run};
use tokio::net::UdpSocket;
use uuid::Uuid;

/// A network with two guests on it, `web` at .10 and an unnamed one at .11.
struct World {
    documents: Documents,
    web: Guest,
    other: Guest,
    net: Uuid,
    instance: Uuid,
    /// Their ports.
    a: ObjectRef,
    b: ObjectRef,
}

impl World {
    async fn start() -> Self {
        let (net, a, b) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let web = Guest::start("web", a, &mac(10)).await;
        let other = Guest::start("other", b, &mac(11)).await;
        let instance = Uuid::new_v4();
        let mut documents = Documents::default();
        let spec = json!({
            "dns_domain": "int.example.org",
            "search_domains": ["example.org"],
            "subnets": [{
                "name": "main", "cidr": "10.7.0.0/24", "gateway": "10.7.0.1",
                "dhcp_address": "10.7.0.2",
            }],
        });
        documents.put("Network", "net", net, network("local", &spec));
        let guest = |role: &str| {
            json!({
                "hostname": role,
                "keys": {"me": "ssh-ed25519 AAAA me@here"},
                "user_data": "IyEvYmluL3NoCg==",
                "metadata": {"role": role},
            })
        };
        let more = |role: &str, device: Uuid| {
            json!({
                "owner": "external", "port_security": false, "dns_name": role, "device": device,
                "guest": guest(role),
            })
        };
        let a = documents.put("Port", "a", a, port(net, "one", 10, &more("web", instance)));
        let more = more("other", Uuid::new_v4());
        let b = documents.put("Port", "b", b, port(net, "one", 11, &more));
        Self { documents, web, other, net, instance, a, b }
    }
}

/// The body and the status of a page, as curl gets it.
async fn get(guest: &Guest, options: &str, path: &str) -> (String, u16) {
    let line = format!("curl -s -m 5 -w |%{{http_code}} {options} http://169.254.169.254{path}");
    let text = guest.run(&line).await;
    let (body, status) = text.trim_end().rsplit_once('|').unwrap();
    (body.trim_end().to_owned(), status.parse().unwrap())
}

#[test]
fn guests_find_one_another_by_name_and_the_world_by_forwarding() {
    on_a_host(|| async {
        run("ip link set lo up").await;
        let world = World::start().await;
        let mut settings = local("one");
        settings.dns_forwarders = vec!["127.0.0.1".parse().unwrap()];
        let (agent, _) = agent_of(settings, Duration::ZERO);
        world.documents.settle(&agent).await;
        world.documents.rest(&agent).await;

        let told = world.web.udhcpc("-O search -O ntpsrv").await.unwrap();
        assert_eq!(told["dns"], "10.7.0.2", "the server itself, as nobody else is named");
        assert_eq!(told["search"], "int.example.org example.org");

        let dig = |arguments: &'static str| {
            let line = format!("dig +tries=1 +time=3 +short @10.7.0.2 {arguments}");
            let guest = &world.web;
            async move { guest.run(&line).await.trim().to_owned() }
        };
        assert_eq!(dig("other.int.example.org").await, "10.7.0.11");
        assert_eq!(dig("+tcp other.int.example.org").await, "10.7.0.11");
        assert_eq!(dig("+noedns OTHER.int.example.org").await, "10.7.0.11");
        assert_eq!(dig("-x 10.7.0.10").await, "web.int.example.org.");
        let line = "dig +tries=1 +time=3 @10.7.0.2 nobody.int.example.org";
        let denied = world.web.run(line).await;
        assert!(denied.contains("NXDOMAIN") && denied.contains("SOA"), "{denied}");

        // Somebody out there who knows www.example.com, and nothing else in time.
        let upstream = UdpSocket::bind("127.0.0.1:53").await.unwrap();
        let answer = async {
            let mut bytes = [0; 1500];
            let (length, from) = upstream.recv_from(&mut bytes).await.unwrap();
            let mut answer = bytes[..length].to_vec();
            answer[2] |= 0x80;
            answer[6..8].copy_from_slice(&[0, 1]);
            // Without the OPT record that came after the question.
            answer[10..12].copy_from_slice(&[0, 0]);
            let question = 12 + answer[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
            answer.truncate(question);
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 80]);
            // A forger who does not see the query is not believed.
            let mut forged = answer.clone();
            forged[1] ^= 0xff;
            upstream.send_to(&forged, from).await.unwrap();
            upstream.send_to(&answer, from).await.unwrap();
        };
        let (told, ()) = tokio::join!(dig("www.example.com"), answer);
        assert_eq!(told, "192.0.2.80");
        let facts = agent.facts().await;
        assert_eq!(facts["dns"]["forwarded"], 1, "{facts}");
        world.documents.rest(&agent).await;
    });
}

#[test]
fn a_guest_reads_its_own_metadata_and_nobody_elses() {
    on_a_host(|| async {
        let world = World::start().await;
        let (agent, _) = agent("one");
        world.documents.settle(&agent).await;
        for (guest, name) in [(&world.web, "web"), (&world.other, "other")] {
            guest.udhcpc("").await.unwrap();
            guest.run("ip route add 169.254.169.254 via 10.7.0.2").await;
            let (name_told, status) = get(guest, "", "/latest/meta-data/hostname").await;
            assert_eq!((name_told.as_str(), status), (&*format!("{name}.int.example.org"), 200));
        }
        let (body, _) = get(&world.web, "", "/openstack/latest/meta_data.json").await;
        let told: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(told["uuid"], world.instance.to_string());
        assert_eq!(told["meta"]["role"], "web");
        assert_eq!(get(&world.web, "", "/openstack/latest/user_data").await.0, "#!/bin/sh");
        let (body, _) = get(&world.web, "", "/openstack/latest/network_data.json").await;
        let told: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(told["networks"][0]["type"], "ipv4_dhcp");

        // What a client says of itself does not count.
        let lies =
            "-H X-Forwarded-For:10.7.0.11 -H X-Instance-ID:00000000-0000-0000-0000-000000000001";
        let (told, _) = get(&world.web, lies, "/latest/meta-data/hostname").await;
        assert_eq!(told, "web.int.example.org");
        // An address that no port has is nobody's.
        world.web.run("ip address add 10.7.0.99/24 dev eth0").await;
        let as_stranger = "--interface 10.7.0.99";
        assert_eq!(get(&world.web, as_stranger, "/latest/meta-data/hostname").await.1, 404);
        assert_eq!(get(&world.web, "", "/latest/meta-data/no-such-thing").await.1, 404);
        assert_eq!(get(&world.web, "-X POST -d x=1", "/latest/user-data").await.1, 405);
        let long = format!("-H X-Long:{}", "x".repeat(40_000));
        assert_eq!(get(&world.web, &long, "/latest/").await.1, 431);
        let facts = agent.facts().await;
        assert_eq!(facts["metadata"]["strangers"], 1, "{facts}");
        world.documents.rest(&agent).await;
    });
}

#[test]
fn a_guest_leaves_a_password_once_and_its_owner_reads_it_from_its_port() {
    on_a_host(|| async {
        let mut world = World::start().await;
        let state = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(state.path(), AgentKind::Network, "one").unwrap();
        let start = || {
            let (mut agent, heard) = agent("one");
            agent.keep_passwords(ledger.journal());
            (agent, heard)
        };
        let (first, _) = start();
        world.documents.settle(&first).await;
        for guest in [&world.web, &world.other] {
            guest.udhcpc("").await.unwrap();
            guest.run("ip route add 169.254.169.254 via 10.7.0.2").await;
        }
        let path = "/openstack/latest/password";
        let (web, other) = (&world.web, &world.other);
        assert_eq!(get(web, "", path).await, (String::new(), 200), "nothing yet");
        let long = format!("-d {}", "x".repeat(1021));
        for bad in [&long, "-d \x1b[2J", "-X POST"] {
            assert_eq!(get(web, bad, path).await.1, 400, "{bad}");
        }
        assert_eq!(get(web, "-d c2VjcmV0", "/openstack/2012-08-10/password").await.1, 405);
        assert_eq!(get(web, "-d c2VjcmV0", path).await.1, 200);
        assert_eq!(get(web, "-d YWdhaW4=", path).await.1, 409, "once");
        assert_eq!(get(web, "", path).await, ("c2VjcmV0".into(), 200));
        assert_eq!(get(other, "", path).await, (String::new(), 200), "nobody else's");

        let observed = |report: &PassReport, object| match &report.outcomes[&object] {
            Outcome::Active { observed } => observed.facts(&object)["password"].clone(),
            other => panic!("{other:?}"),
        };
        // Its owner reads it, also from an agent that started since.
        drop(first);
        let (second, _) = start();
        let report = world.documents.settle(&second).await;
        assert_eq!(observed(&report, world.a), "c2VjcmV0");
        assert_eq!(observed(&report, world.b), Value::Null);
        let forget = |object| second.act(world.documents.action(object, "forget-password"));
        assert!(forget(world.b).await.unwrap_err().message.contains("its guest left none"));
        forget(world.a).await.unwrap();
        assert_eq!(get(web, "-d YWdhaW4=", path).await.1, 200, "after it was forgotten");
        // It goes with the port.
        world.documents.delete(world.a);
        world.documents.pass(&second).await;
        assert!(ledger.journal().list("password/").is_empty());
    });
}

#[test]
fn a_guest_that_asks_too_much_is_slowed_down_and_its_neighbour_is_not() {
    on_a_host(|| async {
        let world = World::start().await;
        let (agent, _) = agent("one");
        world.documents.settle(&agent).await;
        for guest in [&world.web, &world.other] {
            guest.udhcpc("").await.unwrap();
            guest.run("ip route add 169.254.169.254 via 10.7.0.2").await;
        }
        let many = "-o /dev/null http://169.254.169.254/latest/?[1-400]";
        let told = world.web.run(&format!("curl -s -m 20 -w %{{http_code}} {many}")).await;
        assert!(told.contains("429") && told.contains("200"), "{told}");
        assert_eq!(get(&world.other, "", "/latest/meta-data/hostname").await.1, 200);
        let facts = agent.facts().await;
        assert!(facts["metadata"]["slowed"].as_u64().unwrap() > 50, "{facts}");
    });
}

#[test]
fn a_router_gives_guests_ipv6_addresses_and_answers_for_metadata() {
    on_a_host(|| async {
        let (net, router, inside, a) =
            (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let web = Guest::start("web", a, &mac(10)).await;
        let mut documents = Documents::default();
        let spec = json!({
            "mtu": 1400,
            "dns_domain": "int.example.org",
            "subnets": [
                {"name": "main", "cidr": "10.7.0.0/24", "gateway": "10.7.0.1",
                 "dhcp_address": "10.7.0.2"},
                {"name": "six", "cidr": "2001:db8:7::/64", "gateway": "2001:db8:7::1",
                 "ipv6_mode": "slaac", "dns_servers": ["2001:db8::53"]},
            ],
        });
        documents.put("Network", "net", net, network("local", &spec));
        let own = "2001:db8:7:0:f816:3eff:fe00:a";
        let more = json!({
            "owner": "external", "port_security": false, "guest": {"hostname": "web"},
            "fixed_ips": [
                {"subnet": "main", "address": "10.7.0.10"}, {"subnet": "six", "address": own},
            ],
        });
        documents.put("Port", "a", a, port(net, "one", 10, &more));
        let more = json!({
            "owner": "router-interface", "device": router,
            "fixed_ips": [
                {"subnet": "main", "address": "10.7.0.1"},
                {"subnet": "six", "address": "2001:db8:7::1"},
            ],
        });
        documents.put("Port", "inside", inside, port(net, "one", 1, &more));
        let spec = json!({"host": "one", "interfaces": [inside]});
        documents.put("Router", "router", router, spec);
        let (agent, _) = agent("one");
        documents.settle(&agent).await;
        documents.rest(&agent).await;

        // By the kernel's own client; its addresses are its own once nobody else had them.
        stackhand_testkit::wait_for(Duration::from_secs(15), "an address by SLAAC", || async {
            let has = web.run("ip -6 address show dev eth0").await;
            (has.contains(&format!("{own}/64")) && !has.contains("tentative")).then_some(())
        })
        .await;
        let routes = web.run("ip -6 route show dev eth0").await;
        assert!(routes.contains("default via fe80:"), "{routes}");
        let told = web.run("rdisc6 -1 -q -w 3000 eth0").await;
        assert!(told.contains("2001:db8:7::/64"), "{told}");
        let told = web.run("rdisc6 -1 -w 3000 eth0").await;
        assert!(told.contains("2001:db8::53") && told.contains("1400 bytes"), "{told}");
        assert!(told.contains("int.example.org"), "{told}");

        // By the router, in both families.
        web.udhcpc("").await.unwrap();
        web.run("ip route add default via 10.7.0.1").await;
        assert_eq!(
            get(&web, "", "/latest/meta-data/hostname").await,
            ("web.int.example.org".into(), 200)
        );
        // The DHCP client took the link down and up: its own address is looked for once more.
        let six = "curl -g -s -m 5 http://[fe80::a9fe:a9fe%eth0]/latest/meta-data/hostname";
        let told = stackhand_testkit::wait_for(Duration::from_secs(10), "metadata", || async {
            web.try_run(six).await.ok()
        })
        .await;
        assert_eq!(told.trim(), "web.int.example.org");
        let facts = agent.facts().await;
        assert!(facts["router_advertisements"]["sent"].as_u64().unwrap() >= 1, "{facts}");
        documents.rest(&agent).await;
    });
}

#[test]
fn names_and_metadata_are_there_again_after_a_restart() {
    on_a_host(|| async {
        let world = World::start().await;
        let (first, _) = agent("one");
        world.documents.settle(&first).await;
        world.web.udhcpc("").await.unwrap();
        world.web.run("ip route add 169.254.169.254 via 10.7.0.2").await;
        drop(first);
        let (second, _) = agent("one");
        let report = world.documents.settle(&second).await;
        assert_eq!(report.writes, 0, "a restart finds everything in place");
        assert_eq!(get(&world.web, "", "/latest/meta-data/hostname").await.1, 200);
        let line = "dig +tries=1 +time=1 +short @10.7.0.2 other.int.example.org";
        assert_eq!(world.web.run(line).await.trim(), "10.7.0.11");
        assert!(run(&format!("ip netns exec qdhcp-{} ss -lnHtu", world.net)).await.contains(":53"));
    });
}
