//! Limits on ports, measured with real streams between guests.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::ops::Range;
use std::time::{Duration, Instant};

use serde_json::json;
use stackhand_kernel::Netns;
use stackhand_model::PortId;
use stackhand_runtime::agent::{Agent, Outcome};
use support::{Documents, Guest, agent, link, mac, network, on_a_host, port, run, short};
use uuid::Uuid;

/// What a stream without a limit does at the least.
const FREE: Range<f64> = 40.0..f64::INFINITY;

/// Bits a second that a TCP stream from one guest to another settles at, in millions.
async fn megabits(from: &Guest, to: &Guest, address: &str) -> f64 {
    const RUN: Duration = Duration::from_millis(2500);
    let receiver = Netns::named(to.name()).unwrap();
    let listener = receiver.inside("listen", || TcpListener::bind("0.0.0.0:0")).await.unwrap();
    let target = format!("{address}:{}", listener.local_addr().unwrap().port());
    let receive = tokio::task::spawn_blocking(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = vec![0; 1 << 16];
        let (start, mut late) = (Instant::now(), 0_usize);
        let mut since = None;
        loop {
            let read = stream.read(&mut buffer).unwrap();
            // Leaves out the start, when the bucket is full and the stream still grows.
            if start.elapsed() > RUN / 5 {
                since.get_or_insert_with(Instant::now);
                late += read;
            }
            if read == 0 || start.elapsed() > RUN {
                #[expect(clippy::cast_precision_loss, reason = "a rate needs no more")]
                return late as f64 * 8.0 / since.unwrap().elapsed().as_secs_f64() / 1e6;
            }
        }
    });
    let sender = Netns::named(from.name()).unwrap();
    let mut stream = sender.inside("connect", move || TcpStream::connect(target)).await.unwrap();
    let send = tokio::task::spawn_blocking(move || {
        let chunk = vec![7; 1 << 16];
        while stream.write_all(&chunk).is_ok() {}
    });
    let rate = receive.await.unwrap();
    send.await.unwrap();
    rate
}

/// The same, in a range. Measured again where it is not: a busy machine starves a stream, or lets a receiver find
/// what came while it did not run.
async fn megabits_within(range: Range<f64>, from: &Guest, to: &Guest, address: &str) -> f64 {
    let mut rates = Vec::new();
    for _ in 0..5 {
        let rate = megabits(from, to, address).await;
        if range.contains(&rate) {
            return rate;
        }
        rates.push(rate);
    }
    panic!("Mbit/s, not one within {range:?}: {rates:?}");
}

fn policy(to_guest: u32, from_guest: u32) -> serde_json::Value {
    json!({"bandwidth": [
        {"direction": "ingress", "max_kbps": to_guest, "max_burst_kbit": 100},
        {"direction": "egress", "max_kbps": from_guest, "max_burst_kbit": 100},
    ]})
}

#[test]
fn bandwidth_is_held_in_both_directions_changed_in_place_and_let_go() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a, b, limits) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let one = Guest::start("one", a, &mac(10)).await;
        let two = Guest::start("two", b, &mac(11)).await;
        one.run("ip address add 10.7.0.10/24 dev eth0").await;
        two.run("ip address add 10.7.0.11/24 dev eth0").await;
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        let open = json!({"owner": "external", "port_security": false});
        let mut limited = open.clone();
        limited["qos_policy"] = json!(limits);
        let object = documents.put("Port", "a", a, port(net, "one", 10, &limited));
        documents.put("Port", "b", b, port(net, "one", 11, &open));
        let report = documents.pass(&agent).await;
        let Outcome::Pending { reason, .. } = &report.outcomes[&object] else {
            panic!("{report:?}")
        };
        assert!(reason.contains(&format!("waits for the document of QosPolicy {limits}")));
        assert!(one.reaches("10.7.0.11").await, "wired all the same");
        let free = megabits_within(FREE, &one, &two, "10.7.0.11").await;

        documents.put("QosPolicy", "limits", limits, policy(20_000, 10_000));
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        let sent = megabits_within(7.0..10.5, &one, &two, "10.7.0.11").await;
        let received = megabits_within(14.0..21.0, &two, &one, "10.7.0.10").await;
        println!(
            "free {free:.1} Mbit/s; limited: sent {sent:.2} of 10, received {received:.2} of 20"
        );

        documents.put("QosPolicy", "limits", limits, policy(5000, 5000));
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        megabits_within(3.5..5.3, &one, &two, "10.7.0.11").await;

        let tap = format!("tap{}", short(a));
        for damage in [
            format!("tc qdisc delete dev {tap} root"),
            format!("tc qdisc delete dev {tap} ingress"),
            format!("ip link delete ifb{}", short(a)),
        ] {
            run(&damage).await;
            documents.settle(&agent).await;
            documents.rest(&agent).await;
        }
        megabits_within(3.5..5.3, &one, &two, "10.7.0.11").await;

        documents.put("Port", "a", a, port(net, "one", 10, &open));
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        assert!(link(&format!("ifb{}", short(a))).await.is_none());
        let left = run(&format!("tc qdisc show dev {tap}")).await;
        assert!(!left.contains("tbf") && !left.contains("ingress"), "{left}");
        megabits_within(FREE, &one, &two, "10.7.0.11").await;
    });
}

#[test]
fn a_queue_that_is_not_ours_stays_and_is_told_where_it_is_in_the_way() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a, limits) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        documents.put("Port", "a", a, port(net, "one", 10, &json!({})));
        documents.settle(&agent).await;
        let tap = format!("tap{}", short(a));
        run(&format!("tc qdisc add dev {tap} root tbf rate 1mbit burst 10kb latency 50ms")).await;
        documents.rest(&agent).await;
        documents.put("QosPolicy", "limits", limits, policy(20_000, 10_000));
        let limited = port(net, "one", 10, &json!({"qos_policy": limits}));
        let object = documents.put("Port", "a", a, limited);
        let report = documents.pass(&agent).await;
        let Outcome::Failed { reason, .. } = &report.outcomes[&object] else {
            panic!("{report:?}")
        };
        assert!(reason.contains(&format!("{tap} has a tbf queue that is not ours")), "{reason}");
        run(&format!("tc qdisc delete dev {tap} root")).await;
        documents.settle(&agent).await;
        documents.rest(&agent).await;
    });
}

/// How many packets that are sent as fast as they go arrive in a second, and of how many.
async fn arrived(from: &Guest, to: &Guest, address: &str) -> (u32, u32) {
    let receiver = Netns::named(to.name()).unwrap();
    let socket = receiver.inside("listen", || UdpSocket::bind("0.0.0.0:0")).await.unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let target = format!("{address}:{}", socket.local_addr().unwrap().port());
    let receive = tokio::task::spawn_blocking(move || {
        let (mut count, mut late) = (0, 0);
        while late < 10 {
            match socket.recv(&mut [0; 64]) {
                Ok(_) => count += 1,
                Err(_) => late += 1,
            }
        }
        count
    });
    let sender = Netns::named(from.name()).unwrap();
    let socket = sender.inside("send", || UdpSocket::bind("0.0.0.0:0")).await.unwrap();
    let send = tokio::task::spawn_blocking(move || {
        let (start, mut sent) = (Instant::now(), 0);
        while start.elapsed() < Duration::from_secs(1) {
            sent += u32::from(socket.send_to(&[7; 32], &target).is_ok());
        }
        sent
    });
    let (sent, received) = tokio::join!(send, receive);
    (received.unwrap(), sent.unwrap())
}

#[test]
fn packets_are_counted_and_marked_and_the_rules_go_with_the_policy() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a, b, limits) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let one = Guest::start("one", a, &mac(10)).await;
        let two = Guest::start("two", b, &mac(11)).await;
        one.run("ip address add 10.7.0.10/24 dev eth0").await;
        two.run("ip address add 10.7.0.11/24 dev eth0").await;
        // What arrives without the mark goes nowhere; only the second guest looks.
        for line in [
            "nft add table inet seen",
            "nft add chain inet seen in { type filter hook input priority 0 ; policy accept ; }",
            "nft add rule inet seen in ip dscp != 46 drop",
        ] {
            two.run(line).await;
        }
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        let open = json!({"owner": "external", "port_security": false});
        documents.put("Port", "a", a, port(net, "one", 10, &open));
        documents.put("Port", "b", b, port(net, "one", 11, &open));
        documents.settle(&agent).await;
        assert!(!one.reaches("10.7.0.11").await, "unmarked");

        let mut limited = open.clone();
        limited["qos_policy"] = json!(limits);
        documents.put("QosPolicy", "limits", limits, json!({"dscp": 46}));
        documents.put("Port", "a", a, port(net, "one", 10, &limited));
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        let (all, _) = arrived(&one, &two, "10.7.0.11").await;
        let rate = json!([{"direction": "egress", "max_kpps": 1}]);
        documents.put("QosPolicy", "limits", limits, json!({"dscp": 46, "packet_rate": rate}));
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        let (some, sent) = arrived(&one, &two, "10.7.0.11").await;
        println!("{all} packets a second without a rate; with 1,000 a second {some} of {sent}");
        assert!(all > 4000, "{all}");
        assert!((700..1400).contains(&some), "{some} of {sent}");

        for damage in [
            "nft delete table bridge stackhand_qos".to_owned(),
            format!("nft flush chain bridge stackhand_qos from-tap{}", short(a)),
            "nft insert rule bridge stackhand_qos sent drop".to_owned(),
        ] {
            run(&damage).await;
            let drift = agent.plan(documents.desired()).await.unwrap();
            let object = drift.first().and_then(|step| step.object);
            let is_of_port = object == Some(PortId(a).object());
            assert!(is_of_port || !damage.contains("from-tap"), "{damage}: {drift:?}");
            assert!(!drift.is_empty(), "{damage}");
            documents.settle(&agent).await;
            documents.rest(&agent).await;
        }
        documents.put("Port", "a", a, port(net, "one", 10, &open));
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        assert!(!run("nft list tables").await.contains("stackhand_qos"));
    });
}

#[test]
fn a_rate_goes_on_counting_while_those_of_other_ports_come_change_and_go() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, limits, others) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let ports = [Uuid::new_v4(), Uuid::new_v4()];
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        let rate = |kpps| json!({"packet_rate": [{"direction": "egress", "max_kpps": kpps}]});
        documents.put("QosPolicy", "limits", limits, rate(1));
        documents.put("QosPolicy", "others", others, rate(2));
        let of = |policy| json!({"port_security": false, "qos_policy": policy});
        documents.put("Port", "a", ports[0], port(net, "one", 10, &of(limits)));
        documents.settle(&agent).await;
        // A rule that is written anew counts from nothing, and has another handle.
        let listing =
            format!("nft --handle list chain bridge stackhand_qos from-tap{}", short(ports[0]));
        let rules = || run(&listing);
        let before = rules().await;
        assert!(before.contains("limit rate over 1000/second"), "{before}");
        documents.put("Port", "b", ports[1], port(net, "one", 11, &of(others)));
        documents.settle(&agent).await;
        documents.put("QosPolicy", "others", others, rate(3));
        documents.settle(&agent).await;
        let all = run("nft list table bridge stackhand_qos").await;
        assert!(all.contains("limit rate over 3000/second"), "{all}");
        documents.put("Port", "b", ports[1], port(net, "one", 11, &json!({})));
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        assert!(!run("nft list table bridge stackhand_qos").await.contains("3000"));
        assert_eq!(rules().await, before);
    });
}
