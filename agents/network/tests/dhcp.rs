//! DHCP by clients that nobody here wrote, in guests of their own.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use stackhand_kernel::netlink::{Links, WriteCount};
use stackhand_kernel::tun::{NewTap, VirtioHeader};
use stackhand_kernel::{Netns, packet};
use stackhand_runtime::agent::{Agent, Outcome};
use stackhand_testkit::wait_for;
use support::{Documents, Guest, agent, agent_of, local, mac, network, on_a_host, port, run};
use uuid::Uuid;

#[test]
fn guests_get_their_leases_and_reach_one_another_and_the_server() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a, b) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let first = Guest::start("first", a, &mac(10)).await;
        let second = Guest::start("second", b, &mac(11)).await;
        let mut documents = Documents::default();
        let more = json!({"mtu": 1400, "dns_domain": "int.example.org"});
        documents.put("Network", "net", net, network("local", &more));
        let more = json!({"owner": "external", "dns_name": "web"});
        documents.put("Port", "a", a, port(net, "one", 10, &more));
        let more = json!({
            "owner": "external",
            "extra_dhcp_options": [{"name": "bootfile-name", "value": "boot.efi"}],
        });
        documents.put("Port", "b", b, port(net, "one", 11, &more));
        documents.settle(&agent).await;
        documents.rest(&agent).await;

        let told = first.udhcpc("-O search -O domain").await.unwrap();
        assert_eq!(told["ip"], "10.7.0.10");
        assert_eq!(told["mask"], "24");
        assert_eq!(told["router"], "10.7.0.1");
        assert_eq!(told["dns"], "192.0.2.53");
        assert_eq!(told["domain"], "int.example.org");
        assert_eq!(told["hostname"], "web");
        assert_eq!(told["mtu"], "1400");
        assert_eq!(told["lease"], "3600");
        assert_eq!(told["serverid"], "10.7.0.2");
        assert_eq!(
            told["staticroutes"], "169.254.169.254/32 10.7.0.2 0.0.0.0/0 10.7.0.1",
            "the metadata service, and the default that goes with classless routes"
        );
        let told = second.udhcpc("-O bootfile -r 10.7.0.99").await.unwrap();
        assert_eq!(told["ip"], "10.7.0.11", "the one that it asked for is not its own");
        assert_eq!(told["boot_file"], "boot.efi");
        assert_eq!(told["hostname"], "host-10-7-0-11");

        assert!(first.reaches("10.7.0.11").await && second.reaches("10.7.0.10").await);
        assert!(first.reaches("10.7.0.2").await, "the server answers pings");
        documents.rest(&agent).await;
        let facts = agent.facts().await;
        assert!(facts["dhcp"]["answered"].as_u64().unwrap() >= 4, "{facts}");
    });
}

#[test]
fn a_client_that_no_port_knows_gets_nothing_and_is_counted() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a) = (Uuid::new_v4(), Uuid::new_v4());
        let guest = Guest::start("guest", a, &mac(66)).await;
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        documents.put("Port", "a", a, port(net, "one", 10, &json!({"owner": "external"})));
        documents.settle(&agent).await;
        guest.udhcpc("-t 3").await.unwrap_err();
        let facts = agent.facts().await;
        assert_eq!(facts["dhcp"]["answered"], 0, "{facts}");
        assert!(facts["dhcp"]["ignored"]["unknown_client"].as_u64().unwrap() >= 1, "{facts}");
    });
}

#[test]
fn testers_of_dhcp_servers_are_answered_also_by_a_relay() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a) = (Uuid::new_v4(), Uuid::new_v4());
        let guest = Guest::start("guest", a, &mac(10)).await;
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        documents.put("Port", "a", a, port(net, "one", 10, &json!({"owner": "external"})));
        documents.settle(&agent).await;
        guest.udhcpc("").await.unwrap();
        let client = mac(10);
        for how in ["", "-i"] {
            let line = format!("dhcping -v -t 10 -s 10.7.0.2 -c 10.7.0.10 -h {client} {how}");
            let told = guest.run(&line).await;
            assert!(told.contains("Got answer from: 10.7.0.2"), "{told}");
        }
        // This one speaks as a relay does: what it gets is for the relay's address and port.
        guest.perfdhcp(&format!("-4 -b mac={client} 10.7.0.2")).await;
    });
}

#[test]
fn isc_dhclient_is_bound_and_renews_while_the_agent_restarts() {
    on_a_host(|| async {
        let mut quick = local("one");
        // It renews after half of that.
        quick.lease_seconds = 4;
        let (net, a) = (Uuid::new_v4(), Uuid::new_v4());
        let guest = Guest::start("guest", a, &mac(10)).await;
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({"mtu": 1300})));
        documents.put("Port", "a", a, port(net, "one", 10, &json!({"owner": "external"})));
        let (first, _) = agent_of(quick.clone(), Duration::ZERO);
        documents.settle(&first).await;
        drop(first);
        let (second, _) = agent_of(quick, Duration::ZERO);
        documents.rest(&second).await;
        let told = guest.dhclient().await;
        assert_eq!(told["new_ip_address"], "10.7.0.10");
        assert_eq!(told["new_interface_mtu"], "1300");
        assert_eq!(told["new_routers"], "10.7.0.1");
        assert_eq!(told["reason"], "RENEW");
        documents.rest(&second).await;
    });
}

#[test]
fn a_changed_address_is_told_at_the_next_renewal_and_the_socket_stays() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a) = (Uuid::new_v4(), Uuid::new_v4());
        let guest = Guest::start("guest", a, &mac(10)).await;
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &json!({})));
        documents.put("Port", "a", a, port(net, "one", 10, &json!({"owner": "external"})));
        documents.settle(&agent).await;
        assert_eq!(guest.udhcpc("").await.unwrap()["ip"], "10.7.0.10");
        let before = sockets(net).await;
        let more = json!({
            "owner": "external",
            "fixed_ips": [{"subnet": "main", "address": "10.7.0.20"}],
        });
        documents.put("Port", "a", a, port(net, "one", 10, &more));
        assert_eq!(documents.settle(&agent).await.writes, 0, "a lease is no kernel's business");
        assert_eq!(sockets(net).await, before);
        assert_eq!(guest.udhcpc("-r 10.7.0.10").await.unwrap()["ip"], "10.7.0.20");
    });
}

#[test]
fn every_host_serves_its_own_guests_and_no_other_hosts() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a) = (Uuid::new_v4(), Uuid::new_v4());
        run("ip netns add outside").await;
        run("ip link add eth9 type veth peer name eth0 netns outside").await;
        run("ip -n outside link set eth0 up address fa:16:3e:00:00:0a").await;
        let guest = Guest::start("guest", a, &mac(10)).await;
        let mut documents = Documents::default();
        let host = json!({"bridge_mappings": {"public": "eth9"}});
        documents.put("Host", "one", Uuid::new_v4(), host);
        let flat = network("flat", &json!({"physical_network": "public"}));
        documents.put("Network", "net", net, flat);
        documents.put("Port", "a", a, port(net, "one", 10, &json!({"owner": "external"})));
        documents.settle(&agent).await;
        assert_eq!(guest.udhcpc("").await.unwrap()["ip"], "10.7.0.10");
        // The same client on the other side of the uplink is not heard: another host's server is
        // there for it, with the same address.
        let before = agent.facts().await["dhcp"]["answered"].clone();
        let outside =
            "ip netns exec outside busybox udhcpc -f -n -q -i eth0 -t 2 -T 1 -s /bin/true";
        support::try_run(outside).await.unwrap_err();
        assert_eq!(agent.facts().await["dhcp"]["answered"], before);
        // Guests themselves do reach the outside.
        run("ip -n outside address add 10.7.0.200/24 dev eth0").await;
        run("ip -n outside link set eth0 address fa:16:3e:00:00:c8").await;
        assert!(guest.reaches("10.7.0.200").await);
        documents.rest(&agent).await;
    });
}

#[test]
fn a_storm_on_one_network_does_not_slow_down_another() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (loud, quiet) = (Uuid::new_v4(), Uuid::new_v4());
        let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
        let storm = Guest::start("storm", a, &mac(10)).await;
        let guest = Guest::start("guest", b, &mac(11)).await;
        let mut documents = Documents::default();
        documents.put("Network", "loud", loud, network("local", &json!({})));
        documents.put("Network", "quiet", quiet, network("local", &json!({})));
        documents.put("Port", "a", a, port(loud, "one", 10, &json!({"owner": "external"})));
        documents.put("Port", "b", b, port(quiet, "one", 11, &json!({"owner": "external"})));
        documents.settle(&agent).await;

        let space = Netns::named(storm.name()).unwrap();
        let index = Links::open_in(&space, WriteCount::default()).await.unwrap();
        let index = index.index("eth0").await.unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let leased = Arc::clone(&over);
        let start = std::time::Instant::now();
        let flood = space.inside("send", move || {
            let socket = packet::frames(index, packet::Receive::Nothing)?;
            let frame = discover();
            let mut sent = 0_u64;
            // 10,000 a second where the machine allows it, until the other network's guest has a lease.
            while sent < 20_000 || !leased.load(Ordering::Relaxed) {
                for _ in 0..100 {
                    sent += u64::from(socket.send(&frame).is_ok());
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            Ok(sent)
        });
        let lease = async {
            let read = || async {
                let facts = agent.facts().await;
                facts["dhcp"]["ignored"]["unknown_client"].as_u64().filter(|read| *read > 300)
            };
            wait_for(Duration::from_secs(30), "the storm", read).await;
            let told = guest.udhcpc("").await;
            over.store(true, Ordering::Relaxed);
            told.unwrap()
        };
        let (sent, told) = tokio::join!(flood, lease);
        assert_eq!(told["ip"], "10.7.0.11");
        let facts = agent.facts().await;
        let read = facts["dhcp"]["ignored"]["unknown_client"].as_u64().unwrap();
        let (sent, seconds) = (sent.unwrap(), start.elapsed().as_secs() + 1);
        // A burst, and so many a second: the rest is dropped before anybody looks at it.
        assert!(read <= 400 + 1000 * seconds, "read {read} of {sent} in {seconds} s");
    });
}

#[test]
fn a_guest_behind_a_tap_is_answered_as_a_hypervisor_would_hand_it_on() {
    on_a_host(|| async {
        let (agent, _) = agent("one");
        let (net, a) = (Uuid::new_v4(), Uuid::new_v4());
        let mut documents = Documents::default();
        let network = documents.put("Network", "net", net, network("local", &json!({})));
        let mut spec = port(net, "one", 10, &json!({}));
        spec["mac"] = json!("02:00:00:00:00:09");
        let object = documents.put("Port", "a", a, spec);
        documents.settle(&agent).await;
        let name = format!("tap{}", support::short(a));
        // As QEMU does: attach to the tap that the agent made.
        let tap = NewTap::open(&name, false, VirtioHeader::Without).unwrap();
        let mut tap = std::fs::File::from(tap.into_fd());
        let report = documents.settle(&agent).await;
        assert_eq!(report.writes, 0);
        let Outcome::Active { observed } = &report.outcomes[&object] else { unreachable!() };
        assert_eq!(observed.facts(&object)["carrier"], json!(true), "somebody has it open");

        let offer = wait_for(Duration::from_secs(5), "an offer on the tap", || {
            // Again and again, as clients do: the bridge may not pass frames on yet.
            tap.write_all(&discover()).unwrap();
            let mut frame = vec![0; 2048];
            let read = tap.read(&mut frame).ok();
            let offered = read.filter(|length| {
                *length > 42 && frame[..6] == [2, 0, 0, 0, 0, 9] && frame[36..38] == [0, 68]
            });
            async move { offered.map(|length| frame[..length].to_vec()) }
        })
        .await;
        assert_eq!(offer[26..30], [10, 7, 0, 2], "from the server");
        assert_eq!(offer[42 + 16..42 + 20], [10, 7, 0, 10], "with the port's address");
        // The tap outlives its guest, and a pass leaves it alone while it is in use.
        drop(tap);
        documents.rest(&agent).await;
        documents.delete(object);
        documents.delete(network);
        documents.pass(&agent).await;
        assert!(support::link(&name).await.is_none());
    });
}

/// A broadcast of a client with the Ethernet address 02:00:00:00:00:09.
fn discover() -> Vec<u8> {
    let mut dhcp = vec![0; 300];
    dhcp[..4].copy_from_slice(&[1, 1, 6, 0]);
    dhcp[28..34].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    dhcp[236..244].copy_from_slice(&[99, 130, 83, 99, 53, 1, 1, 255]);
    let mut ip = vec![0x45, 0, 1, 72, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255];
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 9, 8, 0]);
    frame.extend(ip);
    // UDP without a checksum, which IPv4 allows.
    frame.extend([0, 68, 0, 67, 1, 52, 0, 0]);
    frame.extend(dhcp);
    frame
}

/// The sockets of a network's DHCP server, with their numbers.
async fn sockets(network: Uuid) -> String {
    run(&format!("ip netns exec qdhcp-{network} ss -lunHe")).await
}
