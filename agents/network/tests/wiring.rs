//! The agent on the real kernel: wiring, rest, drift, foreign objects, restart.

#![allow(clippy::print_stdout, reason = "what was measured belongs to the output")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use stackhand_network::NetworkAgent;
use stackhand_runtime::agent::{Agent, Outcome, PassReport};
use stackhand_runtime::events::EventLog;
use stackhand_testkit::wait_for;
use tokio::sync::Notify;

use support::{
    Documents, agent, agent_with, link, local, mac, network, on_a_host, port, run, short, try_run,
};
use uuid::Uuid;

fn reason(outcome: &Outcome) -> &str {
    match outcome {
        Outcome::Failed { reason, .. } | Outcome::Pending { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_network_and_its_ports_are_wired_and_a_second_pass_writes_nothing() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a, b) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({"mtu": 1400})));
        documents.put("Port", "a", a, port(net, "one", 10, &json!({})));
        documents.put(
            "Port",
            "b",
            b,
            port(net, "one", 11, &json!({"admin_up": false, "queues": 4})),
        );
        let planned = agent.plan(documents.desired()).await.unwrap();
        assert!(
            planned.iter().any(|step| step.change.starts_with("create link tap")),
            "{planned:?}"
        );
        assert_eq!(link(&format!("brq{}", short(net))).await, None, "a plan touches nothing");

        let report = documents.settle(&agent).await;
        assert!(report.writes > 0);
        let bridge = format!("brq{}", short(net));
        let made = link(&bridge).await.unwrap();
        assert_eq!((&made["mtu"], &made["operstate"].is_string()), (&json!(1400), &true));
        assert_eq!(made["ifalias"], format!("stackhand:network:{net}"));
        let tap = link(&format!("tap{}", short(a))).await.unwrap();
        assert_eq!((&tap["master"], &tap["mtu"]), (&json!(bridge), &json!(1400)));
        assert_eq!(tap["ifalias"], format!("stackhand:port:{a}"));
        assert!(tap["flags"].as_array().unwrap().contains(&json!("UP")));
        assert_eq!(tap["linkinfo"]["info_data"]["persist"], json!(true));
        let other = link(&format!("tap{}", short(b))).await.unwrap();
        assert!(!other["flags"].as_array().unwrap().contains(&json!("UP")));
        assert_eq!(other["linkinfo"]["info_data"]["multi_queue"], json!(true));
        let addresses = run(&format!("ip -json address show dev tap{}", short(a))).await;
        assert!(
            !addresses.contains("fe80"),
            "the host must not be on the tenants' wire: {addresses}"
        );
        documents.rest(&agent).await;
    });
}

#[test]
fn a_restarted_agent_adopts_everything_without_a_write() {
    on_a_host(|| async {
        let net = Uuid::new_v4();
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        for last in 10..20 {
            documents.put(
                "Port",
                &format!("p{last}"),
                Uuid::new_v4(),
                port(net, "one", last, &json!({})),
            );
        }
        let (first, _) = agent("one");
        documents.settle(&first).await;
        drop(first);
        let (second, _) = agent("one");
        documents.rest(&second).await;
    });
}

#[test]
fn a_link_that_somebody_puts_into_our_bridge_is_told_and_left_there() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let net = Uuid::new_v4();
        let mut documents = Documents::default();
        let object = documents.put("Network", "net", net, network("local", &json!({})));
        documents.put("Port", "a", Uuid::new_v4(), port(net, "one", 10, &json!({})));
        let facts = |report: &PassReport| match &report.outcomes[&object] {
            Outcome::Active { observed } => observed.facts(&object),
            other => panic!("{other:?}"),
        };
        let report = documents.settle(&agent).await;
        assert_eq!(facts(&report)["foreign_ports"], json!(null));
        let bridge = format!("brq{}", short(net));
        run(&format!("ip link add theirs master {bridge} type veth peer name other")).await;
        let report = documents.settle(&agent).await;
        assert_eq!((report.writes, &facts(&report)["foreign_ports"]), (0, &json!(["theirs"])));
        assert_eq!(link("theirs").await.unwrap()["master"], json!(bridge));
    });
}

#[test]
fn what_is_deleted_is_gone_and_nothing_else_is() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a, b) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let mut documents = Documents::default();
        let network = documents.put("Network", "net", net, network("local", &json!({})));
        let first = documents.put("Port", "a", a, port(net, "one", 10, &json!({})));
        let second = documents.put("Port", "b", b, port(net, "one", 11, &json!({})));
        run("ip link add keep type bridge").await;
        run("ip link add tapforeign type bridge").await;
        documents.settle(&agent).await;

        documents.delete(first);
        let report = documents.pass(&agent).await;
        assert_eq!(report.outcomes[&first], Outcome::Gone);
        assert!(link(&format!("tap{}", short(a))).await.is_none());
        assert!(link(&format!("tap{}", short(b))).await.is_some());
        documents.forget(first);
        documents.rest(&agent).await;

        documents.delete(second);
        documents.delete(network);
        let report = documents.pass(&agent).await;
        assert_eq!(
            (&report.outcomes[&second], &report.outcomes[&network]),
            (&Outcome::Gone, &Outcome::Gone)
        );
        assert!(link(&format!("brq{}", short(net))).await.is_none());
        assert_eq!(run("ip netns list").await, "");
        assert!(link("keep").await.is_some() && link("tapforeign").await.is_some());
    });
}

#[test]
fn drift_is_heard_and_repaired_within_a_second() {
    on_a_host(|| async {
        let heard = Arc::new(Notify::new());
        let told = Arc::clone(&heard);
        let ask = Arc::new(move |_: &_| told.notify_one());
        let events = EventLog::new("one", "network");
        let agent = NetworkAgent::new(local("one"), Duration::ZERO, ask, events.clone()).unwrap();
        let wake = heard;
        let (net, a) = (Uuid::new_v4(), Uuid::new_v4());
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        documents.put("Port", "a", a, port(net, "one", 10, &json!({})));
        documents.settle(&agent).await;
        let (tap, bridge) = (format!("tap{}", short(a)), format!("brq{}", short(net)));
        let space = format!("qdhcp-{net}");
        let inside = run(&format!("ip -json -n {space} link show")).await;
        let far = serde_json::from_str::<Vec<serde_json::Value>>(&inside).unwrap();
        let far = far
            .iter()
            .filter_map(|link| link["ifname"].as_str())
            .find(|name| name.starts_with("ns-"));
        let far = far.unwrap().to_owned();
        let damages = [
            format!("ip link delete {tap}"),
            format!("ip link set {tap} nomaster"),
            format!("ip link set {tap} mtu 900"),
            format!("ip link delete {bridge}"),
            format!("ip link set {bridge} down"),
            format!("ip link set {bridge} type bridge stp_state 1"),
            format!("ip link set {bridge} type bridge ageing_time 100"),
            format!("ip -n {space} address flush dev {far}"),
            format!("ip -n {space} link set {far} down"),
        ];
        are_repaired(&damages, &documents, &agent, &wake).await;
        // A name alone makes no sound while sockets of ours keep the namespace: the next pass sees.
        run(&format!("ip netns delete {space}")).await;
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        let told = events.since(0, 1000);
        let repaired = |object: String, what: &str| {
            told.events.iter().any(|event| {
                event.kind == "DriftRepaired"
                    && event.object.as_deref() == Some(object.as_str())
                    && event.message.contains(what)
            })
        };
        assert!(repaired(format!("Port/{a}"), &format!("create link {tap}")), "{told:?}");
        assert!(repaired(format!("Network/{net}"), &format!("set link {bridge}: up")), "{told:?}");
    });
}

#[test]
fn drift_of_overlays_and_limits_is_heard_and_repaired_within_a_second() {
    on_a_host(|| async {
        let (agent, wake) = agent("one");
        run("ip link add under type veth peer name wire").await;
        run("ip address add 192.0.2.1/24 dev under").await;
        let (net, here, limits) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let mut documents = Documents::default();
        for (last, name) in [(1, "one"), (2, "two")] {
            let spec = json!({"tunnel_address": format!("192.0.2.{last}")});
            documents.put("Host", name, Uuid::new_v4(), spec);
        }
        documents.put("Network", "net", net, network("vxlan", &json!({"segment": 77})));
        let both = json!([
            {"direction": "ingress", "max_kbps": 1000},
            {"direction": "egress", "max_kbps": 1000},
        ]);
        documents.put("QosPolicy", "limits", limits, json!({"bandwidth": both}));
        let limited = port(net, "one", 10, &json!({"qos_policy": limits}));
        documents.put("Port", "here", here, limited);
        documents.put("Port", "there", Uuid::new_v4(), port(net, "two", 11, &json!({})));
        documents.settle(&agent).await;
        let (id, bridge) = (short(here), format!("brq{}", short(net)));
        let damages = [
            "bridge fdb delete fa:16:3e:00:00:0b dev vxlan-77 dst 192.0.2.2 self".to_owned(),
            "bridge fdb replace fa:16:3e:00:00:0b dev vxlan-77 dst 192.0.2.9 self".to_owned(),
            "bridge fdb delete 00:00:00:00:00:00 dev vxlan-77 dst 192.0.2.2 self".to_owned(),
            "bridge fdb delete fa:16:3e:00:00:0b dev vxlan-77 master".to_owned(),
            "ip link set vxlan-77 type vxlan learning".to_owned(),
            "ip link delete vxlan-77".to_owned(),
            format!("ip neighbour delete 10.7.0.11 dev {bridge}"),
            format!("ip neighbour replace 10.7.0.11 lladdr 02:00:00:00:00:01 dev {bridge}"),
            "sysctl -w net.ipv6.conf.vxlan-77.disable_ipv6=0".to_owned(),
            format!("tc qdisc delete dev tap{id} root"),
            format!("tc qdisc change dev tap{id} root tbf rate 9mbit burst 10kb latency 50ms"),
            format!("tc filter delete dev tap{id} ingress"),
            format!("tc qdisc delete dev ifb{id} root"),
            format!("ip link delete ifb{id}"),
        ];
        are_repaired(&damages, &documents, &agent, &wake).await;
    });
}

/// Does each damage, and expects it to be heard and undone within a second.
async fn are_repaired(
    damages: &[String],
    documents: &Documents,
    agent: &NetworkAgent,
    wake: &Notify,
) {
    for damage in damages {
        // Nothing of what went before is left to be heard.
        tokio::time::sleep(Duration::from_millis(60)).await;
        drain(wake).await;
        run(damage).await;
        let start = std::time::Instant::now();
        tokio::time::timeout(Duration::from_secs(1), wake.notified())
            .await
            .unwrap_or_else(|_| panic!("nobody heard: {damage}"));
        let drift = agent.plan(documents.desired()).await.unwrap();
        assert!(!drift.is_empty(), "{damage}: a plan shows what it will do");
        documents.settle(agent).await;
        assert!(start.elapsed() < Duration::from_secs(1), "{damage}: {:?}", start.elapsed());
        println!("{damage}: repaired after {:?} by: {}", start.elapsed(), drift[0].change);
        documents.rest(agent).await;
    }
}

#[test]
fn each_bad_wish_is_told_on_its_object_and_all_else_is_wired() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        run("ip link add under type veth peer name wire").await;
        run("ip address add 192.0.2.1/24 dev under").await;
        run("ip link add mine type vxlan id 77 dstport 4789").await;
        run("ip link add br-ex type bridge").await;
        let mut documents = Documents::default();
        let mut put = |kind: &str, name: &str, spec: serde_json::Value| {
            let id = Uuid::new_v4();
            (documents.put(kind, name, id, spec), id)
        };
        let mappings = json!({"bridged": "br-ex", "lost": "eth77", "tagged": "under"});
        let own = json!({"tunnel_address": "192.0.2.1", "bridge_mappings": mappings});
        put("Host", "one", own);
        for (name, address) in [("twin", "192.0.2.1"), ("six", "2001:db8::6")] {
            put("Host", name, json!({"tunnel_address": address}));
        }
        let flat = |physical: &str| network("flat", &json!({"physical_network": physical}));
        let tagged = json!({"physical_network": "tagged", "segment": 7});
        let wishes = [
            (
                "taken",
                network("vxlan", &json!({"segment": 77})),
                "VNI 77 on UDP port 4789 is taken by link mine",
            ),
            (
                "large",
                network("vxlan", &json!({"segment": 78, "mtu": 1500})),
                "mtu 1500 does not fit",
            ),
            ("bridged", flat("bridged"), "is a bridge, which no other bridge can have as its port"),
            ("lost", flat("lost"), "link eth77 of physical network"),
            ("unmapped", flat("elsewhere"), "no link to physical network"),
            ("tagged", network("vlan", &tagged), "load the module 8021q"),
            ("good", network("vxlan", &json!({"segment": 79})), ""),
        ];
        let mut expected = Vec::new();
        for (name, spec, reason) in wishes {
            let (object, id) = put("Network", name, spec);
            let last = 10 + u8::try_from(expected.len()).unwrap();
            let (port_object, port_id) = put("Port", name, port(id, "one", last, &json!({})));
            expected.push((object, reason, port_object, port_id));
            if name == "good" {
                for (other, last, reason) in [
                    ("twin", 30, "this host's own tunnel address"),
                    ("six", 31, "both must be IPv4 or both IPv6"),
                ] {
                    let (object, _) = put("Port", other, port(id, other, last, &json!({})));
                    expected.push((object, reason, object, Uuid::nil()));
                }
            }
        }
        let report = documents.pass(&agent).await;
        let has_vlans = agent.facts().await["abilities"]["vlan"] == json!(true);
        for (object, wanted, port, id) in expected {
            if wanted.is_empty() || wanted.contains("8021q") && has_vlans {
                for object in [object, port] {
                    let outcome = &report.outcomes[&object];
                    assert!(matches!(outcome, Outcome::Active { .. }), "{object}: {outcome:?}");
                }
                assert!(link(&format!("tap{}", short(id))).await.is_some());
                continue;
            }
            let told = reason(&report.outcomes[&object]);
            assert!(told.contains(wanted), "{told}");
            if port != object {
                let told = reason(&report.outcomes[&port]);
                assert!(told.contains("waits for its network"), "{told}");
            }
        }
        assert!(link("mine").await.is_some() && link("br-ex").await.unwrap()["master"].is_null());
    });
}

#[test]
fn of_two_ports_with_one_name_the_first_is_wired_and_filtered_and_the_other_told() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let net = Uuid::new_v4();
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        let filtered = json!({"port_security": true});
        let mut ports = Vec::new();
        // Admission refuses the second; what an older ledger holds is not admitted anew.
        for (last, end) in [(10, 1), (11, 2)] {
            let id = Uuid::from_u128(0xaa_bbcc_ddee << 88 | end);
            let spec = port(net, "one", last, &filtered);
            ports.push(documents.put("Port", &format!("p{last}"), id, spec));
        }
        let good = Uuid::new_v4();
        ports.push(documents.put("Port", "good", good, port(net, "one", 12, &filtered)));
        let report = documents.pass(&agent).await;
        for object in [ports[0], ports[2]] {
            let outcome = &report.outcomes[&object];
            assert!(matches!(outcome, Outcome::Active { .. }), "{object}: {outcome:?}");
        }
        let told = reason(&report.outcomes[&ports[1]]);
        assert!(told.contains(&format!("link tapaabbccdd-ee is taken by {}", ports[0])), "{told}");
        let guards = run("nft list map bridge stackhand guards").await;
        for tap in ["tapaabbccdd-ee".to_owned(), format!("tap{}", short(good))] {
            assert!(guards.contains(&tap), "{guards}");
        }
        let sources = run("nft list set bridge stackhand macs").await;
        assert!(!sources.contains(&mac(11)), "{sources}");
    });
}

#[test]
fn a_foreign_link_on_our_name_fails_that_object_alone_until_it_goes() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a, b) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let foreign = format!("tap{}", short(a));
        run(&format!("ip link add {foreign} type veth peer name other")).await;
        run(&format!("ip link set {foreign} alias mine")).await;
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        let first = documents.put("Port", "a", a, port(net, "one", 10, &json!({})));
        let second = documents.put("Port", "b", b, port(net, "one", 11, &json!({})));
        let report = documents.pass(&agent).await;
        let why = reason(&report.outcomes[&first]);
        assert!(why.contains("exists and is not ours") && why.contains("mine"), "{why}");
        assert!(matches!(report.outcomes[&second], Outcome::Active { .. }));
        documents.delete(first);
        assert_eq!(documents.pass(&agent).await.outcomes[&first], Outcome::Gone);
        assert!(link(&foreign).await.is_some(), "a foreign link is never deleted");
        documents.put("Port", "a", a, port(net, "one", 10, &json!({})));
        run(&format!("ip link delete {foreign}")).await;
        documents.settle(&agent).await;
        documents.rest(&agent).await;
    });
}

#[test]
fn a_link_left_half_made_is_finished_and_an_orphan_is_swept_after_its_grace() {
    on_a_host(|| async {
        let (agent, _) = agent_with("one", Duration::from_millis(300));
        let (net, a, lost) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let bridge = format!("brq{}", short(net));
        // As if killed between making it and marking it.
        run(&format!("ip link add {bridge} group {} type bridge", 0x5348_0001)).await;
        run("ip link add taplost type bridge").await;
        run(&format!("ip link set taplost alias stackhand:port:{lost}")).await;
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        documents.put("Port", "a", a, port(net, "one", 10, &json!({})));
        documents.settle(&agent).await;
        assert_eq!(link(&bridge).await.unwrap()["ifalias"], format!("stackhand:network:{net}"));
        assert!(link("taplost").await.is_some(), "not before its time");
        assert!(agent.troubles().iter().any(|trouble| trouble.contains("taplost")));
        let settled = wait_for(Duration::from_secs(5), "the orphan to be swept", || async {
            documents.settle(&agent).await;
            link("taplost").await.is_none().then_some(())
        });
        settled.await;
        documents.rest(&agent).await;
    });
}

#[test]
fn a_port_that_somebody_else_brings_is_wired_when_it_comes_and_let_go_when_it_is_deleted() {
    on_a_host(|| async {
        let (agent, wake) = agent("one");
        let (net, a) = (Uuid::new_v4(), Uuid::new_v4());
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        let object =
            documents.put("Port", "a", a, port(net, "one", 10, &json!({"owner": "external"})));
        let report = documents.pass(&agent).await;
        assert!(reason(&report.outcomes[&object]).starts_with("waits for link tap"));
        drain(&wake).await;
        let tap = format!("tap{}", short(a));
        run(&format!("ip link add {tap} type veth peer name guest")).await;
        tokio::time::timeout(Duration::from_secs(1), heard(&wake)).await.unwrap();
        documents.settle(&agent).await;
        assert_eq!(link(&tap).await.unwrap()["master"], format!("brq{}", short(net)));
        assert_eq!(link(&tap).await.unwrap()["ifalias"], json!(null));
        documents.rest(&agent).await;
        documents.delete(object);
        assert_eq!(documents.pass(&agent).await.outcomes[&object], Outcome::Gone);
        assert_eq!(link(&tap).await.unwrap()["master"], json!(null), "let go, not deleted");
    });
}

#[test]
fn a_flat_network_takes_its_link_and_says_what_is_wrong_with_one() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a) = (Uuid::new_v4(), Uuid::new_v4());
        let mut documents = Documents::default();
        let flat = network("flat", &json!({"physical_network": "public"}));
        let network = documents.put("Network", "net", net, flat);
        let port = documents.put("Port", "a", a, port(net, "one", 10, &json!({})));
        let report = documents.pass(&agent).await;
        assert!(reason(&report.outcomes[&network]).contains("bridge_mappings"));
        assert!(reason(&report.outcomes[&port]).contains("waits for its network"));

        let host = documents.put(
            "Host",
            "one",
            Uuid::new_v4(),
            json!({"bridge_mappings": {"public": "eth9"}}),
        );
        let report = documents.pass(&agent).await;
        assert!(reason(&report.outcomes[&host]).contains("no link eth9"));
        assert!(reason(&report.outcomes[&network]).contains("eth9 of physical network"));

        run("ip link add eth9 mtu 1480 type veth peer name wire").await;
        run("ip address add 192.0.2.9/24 dev eth9").await;
        let report = documents.pass(&agent).await;
        assert!(reason(&report.outcomes[&network]).contains("192.0.2.9/24"));

        run("ip address flush dev eth9").await;
        documents.settle(&agent).await;
        assert_eq!(link("eth9").await.unwrap()["master"], format!("brq{}", short(net)));
        assert_eq!(link(&format!("tap{}", short(a))).await.unwrap()["mtu"], json!(1480));
        documents.rest(&agent).await;

        documents.delete(port);
        documents.delete(network);
        documents.pass(&agent).await;
        assert!(link("eth9").await.is_some(), "the operator's link stays");
        assert!(try_run(&format!("ip link show brq{}", short(net))).await.is_err());
    });
}

#[test]
fn a_vxlan_network_forwards_to_the_hosts_of_remote_ports() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, here, there) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        run("ip link add under mtu 1500 type veth peer name wire").await;
        run("ip address add 192.0.2.1/24 dev under").await;
        let mut documents = Documents::default();
        documents.put("Host", "one", Uuid::new_v4(), json!({"tunnel_address": "192.0.2.1"}));
        documents.put("Network", "net", net, network("vxlan", &json!({"segment": 77})));
        documents.put("Port", "here", here, port(net, "one", 10, &json!({})));
        let remote = documents.put("Port", "there", there, port(net, "two", 11, &json!({})));
        let report = documents.pass(&agent).await;
        assert!(reason(&report.outcomes[&remote]).contains("host two has no tunnel address"));

        let two = Uuid::new_v4();
        documents.put("Host", "two", two, json!({"tunnel_address": "192.0.2.2"}));
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        assert_eq!(link(&format!("tap{}", short(here))).await.unwrap()["mtu"], json!(1450));
        let fdb = run("bridge fdb show dev vxlan-77").await;
        assert!(fdb.contains("fa:16:3e:00:00:0b dst 192.0.2.2"), "{fdb}");
        assert!(fdb.contains("00:00:00:00:00:00 dst 192.0.2.2"), "{fdb}");
        let neighbours = run("ip neighbour show nud permanent").await;
        assert!(neighbours.contains("10.7.0.11 dev brq"), "{neighbours}");

        // The port moves to this host: it is forwarded nowhere any more.
        documents.put("Port", "there", there, port(net, "one", 11, &json!({})));
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        let fdb = run("bridge fdb show dev vxlan-77").await;
        assert!(!fdb.contains("dst 192.0.2.2"), "{fdb}");

        let wrong = network("vxlan", &json!({"segment": 77, "mtu": 1500}));
        let network = documents.put("Network", "net", net, wrong);
        let report = documents.pass(&agent).await;
        let why = reason(&report.outcomes[&network]);
        assert!(
            why.contains("mtu 1500 does not fit through link under, which leaves 1450"),
            "{why}"
        );
        assert!(link("vxlan-77").await.is_none());
    });
}

#[test]
fn facts_say_what_the_kernel_can_do_and_how_it_filters() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let facts = agent.facts().await;
        assert_eq!(facts["abilities"]["vxlan"], json!(true), "{facts}");
        assert_eq!(facts["firewall"]["enforced"], json!(true), "{facts}");
        assert!(!facts["kernel"].as_str().unwrap().is_empty());
    });
}

/// Returns when the agent asked for a pass.
async fn heard(wake: &Notify) {
    wake.notified().await;
}

/// Forgets what was asked for so far.
async fn drain(wake: &Notify) {
    while tokio::time::timeout(Duration::from_millis(5), wake.notified()).await.is_ok() {}
}
