//! A host that OpenStack's Linux bridge agent left is taken over, and given back, under traffic.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/program.rs"]
mod program;
#[path = "support/stream.rs"]
mod stream;
mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use program::Program;
use serde_json::json;
use stackhand_kernel::exec;
use stackhand_kernel::netfilter::Netfilter;
use stackhand_kernel::netlink::WriteCount;
use stackhand_kernel::tun::{NewTap, VirtioHeader};
use stackhand_network::takeover;
use stackhand_runtime::agent::{Agent, Outcome};
use stackhand_testkit::{Spawned, wait_for};
use stream::stream;
use support::{
    Documents, Guest, agent, agent_of, link, local, mac, network, on_a_host, port, run, short,
};
use uuid::Uuid;

/// The ids of one such host's objects.
struct Left {
    net: Uuid,
    /// Two guests on links that somebody else brings, and one behind a tap.
    ports: [Uuid; 3],
    remote: Uuid,
}

impl Left {
    /// What that agent, and nova, leave on a host with these objects: names, settings and rules as
    /// in a recorded one.
    async fn build() -> Self {
        let left = Self {
            net: Uuid::new_v4(),
            ports: [Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4()],
            remote: Uuid::new_v4(),
        };
        let bridge = format!("brq{}", short(left.net));
        run("ip link add under type veth peer name wire").await;
        run("ip address add 192.0.2.1/24 dev under").await;
        for name in ["under", "wire"] {
            run(&format!("ip link set {name} up")).await;
        }
        run(&format!("ip link add {bridge} type bridge forward_delay 0 stp_state 0")).await;
        run(&format!("ip link set {bridge} mtu 1450 up")).await;
        run("ip link add vxlan-77 type vxlan id 77 local 192.0.2.1 dev under srcport 0 0 dstport 8472")
            .await;
        run(&format!("ip link set vxlan-77 mtu 1450 master {bridge} up")).await;
        for entry in ["fa:16:3e:00:00:0d dst 192.0.2.2", "fa:16:3e:00:00:99 dst 192.0.2.9"] {
            run(&format!("bridge fdb replace {entry} dev vxlan-77")).await;
        }
        run("bridge fdb append 00:00:00:00:00:00 dev vxlan-77 dst 192.0.2.2").await;
        let tap = format!("tap{}", short(left.ports[2]));
        run(&format!("ip tuntap add {tap} mode tap user root")).await;
        run(&format!("ip link set {tap} mtu 1450 master {bridge} up")).await;
        left
    }

    /// Rules of that agent for one port, and sets that they use.
    async fn filter(&self) {
        let id = short(self.ports[0]);
        let (tap, cut) = (format!("tap{id}"), &id[..10]);
        run("ipset create NIPv459bf5cdc-6fa5-4c6c-9264- hash:net family inet").await;
        run("ipset add NIPv459bf5cdc-6fa5-4c6c-9264- 10.7.0.11").await;
        let rules = format!(
            "*raw\n:neutron-linuxbri-PREROUTING - [0:0]\n\
             -A PREROUTING -j neutron-linuxbri-PREROUTING\n\
             -A neutron-linuxbri-PREROUTING -m physdev --physdev-in {tap} -m comment --comment \
             \"Set zone for {cut}\" -j CT --zone 4097\nCOMMIT\n\
             *filter\n:mine - [0:0]\n:neutron-filter-top - [0:0]\n:neutron-linuxbri-FORWARD - [0:0]\n\
             :neutron-linuxbri-local - [0:0]\n:neutron-linuxbri-i{cut} - [0:0]\n\
             :neutron-linuxbri-sg-chain - [0:0]\n:neutron-linuxbri-sg-fallback - [0:0]\n\
             -A FORWARD -j neutron-filter-top\n-A FORWARD -j neutron-linuxbri-FORWARD\n\
             -A FORWARD -j mine\n-A mine -p udp -m udp --dport 9 -j DROP\n\
             -A neutron-filter-top -j neutron-linuxbri-local\n\
             -A neutron-linuxbri-FORWARD -m physdev --physdev-out {tap} --physdev-is-bridged \
             -m comment --comment \"Direct traffic from the VM interface to the chain.\" \
             -j neutron-linuxbri-sg-chain\n\
             -A neutron-linuxbri-sg-chain -m physdev --physdev-out {tap} --physdev-is-bridged \
             -j neutron-linuxbri-i{cut}\n-A neutron-linuxbri-sg-chain -j ACCEPT\n\
             -A neutron-linuxbri-i{cut} -m set --match-set NIPv459bf5cdc-6fa5-4c6c-9264- src \
             -j RETURN\n-A neutron-linuxbri-i{cut} -j neutron-linuxbri-sg-fallback\n\
             -A neutron-linuxbri-sg-fallback -j DROP\nCOMMIT\n"
        );
        let restore =
            exec::Program::new("/usr/sbin/iptables-restore").arg("--noflush").stdin(rules);
        restore.run().await.unwrap();
        let chain = format!("neutronMAC-{tap}");
        run(&format!("ebtables -t nat -N {chain} -P DROP")).await;
        run(&format!("ebtables -t nat -A PREROUTING -i {tap} -j {chain}")).await;
        run(&format!("ebtables -t nat -A {chain} -i {tap} --among-src {} -j RETURN", mac(10)))
            .await;
    }

    /// The zone in which that agent has the flows of the bridge tracked.
    async fn zone(&self, zone: u16) {
        let bridge = format!("brq{}", short(self.net));
        let rules = format!(
            "*raw\n:neutron-linuxbri-PREROUTING - [0:0]\n-A PREROUTING -j neutron-linuxbri-PREROUTING\n\
             -A neutron-linuxbri-PREROUTING -m physdev --physdev-in {bridge} -j CT --zone {zone}\n\
             -A neutron-linuxbri-PREROUTING -i {bridge} -j CT --zone {zone}\nCOMMIT\n"
        );
        let restore = exec::Program::new("/usr/sbin/iptables-restore").arg("--noflush");
        restore.stdin(rules).run().await.unwrap();
    }

    fn documents(&self) -> Documents {
        let mut documents = Documents::default();
        for (number, name) in [(1, "one"), (2, "two")] {
            let spec = json!({"tunnel_address": format!("192.0.2.{number}")});
            documents.put("Host", name, Uuid::from_u128(number), spec);
        }
        let more = json!({"segment": 77, "subnets": [
            {"name": "main", "cidr": "10.7.0.0/24", "dhcp": false}
        ]});
        documents.put("Network", "net", self.net, network("vxlan", &more));
        for (last, id) in (10..).zip(self.ports) {
            let owner = if last == 12 { "instance" } else { "external" };
            let more = json!({"owner": owner, "port_security": false});
            documents.put("Port", &format!("p{last}"), id, port(self.net, "one", last, &more));
        }
        let more = json!({"port_security": false});
        documents.put("Port", "there", self.remote, port(self.net, "two", 13, &more));
        documents
    }
}

/// Two guests in the bridge that nova made, with a steady flood from one to the other.
async fn guests(left: &Left) -> [Guest; 2] {
    let guests = [
        Guest::start("first", left.ports[0], &mac(10)).await,
        Guest::start("second", left.ports[1], &mac(11)).await,
    ];
    for (last, (guest, id)) in (10..).zip(guests.iter().zip(left.ports)) {
        run(&format!("ip link set tap{} mtu 1450 master brq{} up", short(id), short(left.net)))
            .await;
        guest.run(&format!("ip address add 10.7.0.{last}/24 dev eth0")).await;
    }
    assert!(guests[0].reaches("10.7.0.11").await);
    guests
}

#[test]
fn a_host_is_taken_over_and_given_back_without_a_lost_packet() {
    on_a_host(|| async {
        let left = Left::build().await;
        let guests = guests(&left).await;
        let tap = format!("tap{}", short(left.ports[2]));
        // A guest has it open, as QEMU would.
        let held = NewTap::open(&tap, false, VirtioHeader::Without).unwrap();
        let documents = left.documents();
        let before = link("vxlan-77").await.unwrap()["ifindex"].clone();

        // Unasked, nothing is touched.
        let (cautious, _) = agent("one");
        let report = documents.pass(&cautious).await;
        let network = Uuid::from_u128(left.net.as_u128());
        let (_, outcome) = report.outcomes.iter().find(|(object, _)| object.id == network).unwrap();
        let Outcome::Failed { reason, .. } = outcome else { panic!("{outcome:?}") };
        assert!(reason.contains("exists and is not ours"), "{reason}");
        assert!(reason.contains("network.takeover = true"), "{reason}");
        assert_eq!(report.writes, 0);
        drop(cautious);

        let mut willing = local("one");
        (willing.takeover, willing.vxlan_port) = (true, 8472);
        let (agent, _) = agent_of(willing, Duration::ZERO);
        let flood = async {
            let ping = "ping -i 0.002 -c 1000 -W 2 -q 10.7.0.11";
            guests[0].run(ping).await
        };
        let take = async {
            documents.settle(&agent).await;
            documents.rest(&agent).await;
        };
        let (lost, ()) = tokio::join!(flood, take);
        assert!(lost.contains(" 0% packet loss"), "{lost}");
        let bridge = link(&format!("brq{}", short(left.net))).await.unwrap();
        assert_eq!(bridge["ifalias"], format!("stackhand:network:{}", left.net));
        let vxlan = link("vxlan-77").await.unwrap();
        assert_eq!(
            (&vxlan["ifindex"], &vxlan["linkinfo"]["info_data"]["learning"]),
            (&before, &json!(false))
        );
        assert_eq!(
            link(&tap).await.unwrap()["ifalias"],
            format!("stackhand:port:{}", left.ports[2])
        );
        let fdb = run("bridge fdb show dev vxlan-77").await;
        assert!(fdb.contains("fa:16:3e:00:00:0d dst 192.0.2.2"), "{fdb}");
        assert!(!fdb.contains("192.0.2.9"), "what no document speaks of goes: {fdb}");

        drop(agent);
        let flood = guests[0].run("ping -i 0.002 -c 500 -W 2 -q 10.7.0.11");
        let (lost, released) = tokio::join!(flood, takeover::release());
        assert!(lost.contains(" 0% packet loss"), "{lost}");
        assert_eq!(released.unwrap(), 3, "bridge, overlay and tap");
        assert!(!run("ip -details link show").await.contains("stackhand"));
        drop(held);
    });
}

#[test]
fn flows_that_the_other_agent_tracked_go_on_through_takeover_and_restart() {
    on_a_host(|| async {
        let left = Left::build().await;
        left.zone(5000).await;
        let guests = guests(&left).await;
        // What the host tracks of the stream, which is told by its number: another one is another.
        let netfilter = Netfilter::open(WriteCount::default()).unwrap();
        let tracked = || async {
            let flows = netfilter.flows().await.unwrap();
            flows.into_iter().find(|flow| flow.original.protocol == 6)
        };
        let mut documents = left.documents();
        let (client, server) = (Uuid::new_v4(), Uuid::new_v4());
        documents.put(
            "SecurityGroup",
            "client",
            client,
            json!({"rules": [
                {"direction": "egress"},
            ]}),
        );
        documents.put(
            "SecurityGroup",
            "server",
            server,
            json!({"rules": [
                {"direction": "ingress", "protocol": "tcp", "remote_group": client},
            ]}),
        );
        for (last, id, group) in [(10, left.ports[0], client), (11, left.ports[1], server)] {
            let more = json!({
                "owner": "external", "port_security": true, "security_groups": [group],
            });
            documents.put("Port", &format!("p{last}"), id, port(left.net, "one", last, &more));
        }
        let mut willing = local("one");
        (willing.takeover, willing.vxlan_port) = (true, 8472);

        let end = Arc::new(AtomicBool::new(false));
        let watched = stream(&guests[0], &guests[1], "10.7.0.11", Arc::clone(&end));
        let agents = async {
            let flow = wait_for(Duration::from_secs(20), "the stream to be tracked", tracked).await;
            assert_eq!(flow.zone, 5000);
            let (agent, _) = agent_of(willing.clone(), Duration::ZERO);
            documents.settle(&agent).await;
            documents.rest(&agent).await;
            assert!(!run("iptables-save").await.contains("neutron"));
            let zones = run("nft list map inet stackhand zones").await;
            assert!(zones.contains(" : 5000"), "{zones}");
            assert_eq!(tracked().await, Some(flow.clone()), "after the takeover");
            drop(agent);
            let (agent, _) = agent_of(willing, Duration::ZERO);
            documents.rest(&agent).await;
            assert_eq!(tracked().await, Some(flow), "after the restart");
            // No rule lets anything begin in the other direction.
            assert!(!guests[1].reaches("10.7.0.10").await);
            end.store(true, Ordering::Relaxed);
        };
        let (longest, ()) = tokio::join!(watched, agents);
        println!("longest answer on the open stream: {longest:?}");
    });
}

#[test]
fn the_program_takes_a_host_over_and_its_command_line_gives_it_back() {
    on_a_host(|| async {
        let left = Left::build().await;
        left.filter().await;
        let guests = guests(&left).await;
        let tap = format!("tap{}", short(left.ports[2]));
        let held = NewTap::open(&tap, false, VirtioHeader::Without).unwrap();
        let before = run("ip -details link show").await;
        assert!(!before.contains("stackhand"), "{before}");

        let program = Program::with("[network]\ntakeover = true\nvxlan_port = 8472\n");
        let mut agent = program.start();
        let flood = guests[0].run("ping -i 0.002 -c 1500 -W 2 -q 10.7.0.11");
        let taken = async {
            program.apply(&left.documents()).await;
            wait_for(Duration::from_secs(20), "the other agent's filter to go", || async {
                (!run("iptables-save").await.contains("neutron-linuxbri")).then_some(())
            })
            .await;
            let refusal = program.release().await.unwrap_err();
            assert!(refusal.contains("the ledger is held by"), "while it runs: {refusal}");
            agent.kill();
            // What a killed process held is let go of in a moment of the kernel's choice.
            wait_for(Duration::from_secs(20), "the host to be given back", || async {
                program.release().await.ok()
            })
            .await
        };
        let (lost, told) = tokio::join!(flood, taken);
        assert!(lost.contains(" 0% packet loss"), "{lost}");
        assert!(told.starts_with("3 links are not this agent's any more"), "{told}");
        let after = run("ip -details link show").await;
        assert!(!after.contains("stackhand"), "{after}");
        for name in [format!("brq{}", short(left.net)), "vxlan-77".to_owned(), tap] {
            assert!(after.contains(&format!(" {name}: ")), "{name} stays: {after}");
        }
        let again = program.release().await.unwrap();
        assert!(again.starts_with("0 links"), "{again}");
        drop(held);
    });
}

#[test]
fn what_does_not_prove_itself_is_not_adopted() {
    on_a_host(|| async {
        let left = Left::build().await;
        let documents = left.documents();
        let mut willing = local("one");
        willing.takeover = true;
        // Hosts of both kinds must use one port: this agent was not told that agent's.
        let (agent, _) = agent_of(willing.clone(), Duration::ZERO);
        let report = documents.pass(&agent).await;
        let reasons = format!("{report:?}");
        assert!(reasons.contains("it uses UDP port 8472, and this agent 4789"), "{reasons}");
        assert!(link("vxlan-77").await.unwrap()["ifalias"].is_null());

        // A mark of somebody else is a claim, and a veth pair is no tap.
        willing.vxlan_port = 8472;
        let (agent, _) = agent_of(willing, Duration::ZERO);
        let tap = format!("tap{}", short(left.ports[2]));
        run("ip link set vxlan-77 alias mine").await;
        run(&format!("ip link delete {tap}")).await;
        run(&format!("ip link add {tap} type veth peer name other")).await;
        let report = documents.pass(&agent).await;
        let reasons = format!("{report:?}");
        assert!(
            reasons.contains(r#"link vxlan-77 exists and is not ours (its alias is \"mine\")"#)
        );
        assert!(reasons.contains(&format!("link {tap} exists and is not ours")), "{reasons}");
    });
}

#[test]
fn the_other_agents_filter_goes_and_other_peoples_rules_stay() {
    on_a_host(|| async {
        let left = Left::build().await;
        left.filter().await;
        let before = run("iptables-save").await;
        assert!(before.contains("neutron-linuxbri-sg-chain"), "{before}");
        let writes = WriteCount::default();
        let done = takeover::remove_filters(&writes).await.unwrap();
        assert_eq!(done.len(), 3, "{done:?}");
        let after = run("iptables-save").await;
        assert!(!after.contains("neutron"), "{after}");
        assert!(
            after.contains("-A FORWARD -j mine") && after.contains("-A mine -p udp"),
            "{after}"
        );
        assert!(!run("ebtables-save").await.contains("neutronMAC"));
        assert_eq!(run("ipset list -name").await.trim(), "");
        let count = writes.get();
        assert_eq!(takeover::remove_filters(&writes).await.unwrap(), [""; 0]);
        assert_eq!(writes.get(), count, "a second time there is nothing to do");
    });
}

/// Starts what that agent starts for a network's DHCP, with the same arguments, for one guest.
async fn dnsmasq(folder: &Path, space: &str, link: &str) -> Spawned {
    let file = |name: &str| folder.join(name).display().to_string();
    std::fs::write(file("host"), format!("{},host-10-7-0-10,10.7.0.10\n", mac(10))).unwrap();
    let arguments = format!(
        "netns exec {space} dnsmasq --keep-in-foreground --no-hosts --no-resolv --user=root \
         --pid-file={} --dhcp-hostsfile={} --dhcp-leasefile={} --except-interface=lo \
         --bind-dynamic --interface={link} --dhcp-range=set:subnet,10.7.0.0,static,255.255.255.0,86400s \
         --conf-file=/dev/null --log-facility=-",
        file("pid"),
        file("host"),
        file("leases"),
    );
    let server = Spawned::start("/usr/sbin/ip", arguments.split_whitespace());
    wait_for(Duration::from_secs(20), "dnsmasq to listen", || async {
        let sockets = run(&format!("ip netns exec {space} ss -lunH sport = 67")).await;
        (!sockets.trim().is_empty()).then_some(())
    })
    .await;
    server
}

#[test]
fn the_other_agents_dhcp_server_is_named_and_serves_until_it_is_ended() {
    on_a_host(|| async {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        let left = Left::build().await;
        let server = Uuid::new_v4();
        let (space, id) = (format!("qdhcp-{}", left.net), short(server));
        run(&format!("ip netns add {space}")).await;
        run(&format!("ip link add tap{id} type veth peer name ns-{id} netns {space}")).await;
        run(&format!("ip link set tap{id} mtu 1450 master brq{} up", short(left.net))).await;
        run(&format!("ip -n {space} link set ns-{id} address {} mtu 1450 up", mac(2))).await;
        run(&format!("ip -n {space} address add 10.7.0.2/24 dev ns-{id}")).await;
        run(&format!("ip -n {space} link set lo up")).await;
        let mut dnsmasq = dnsmasq(folder.path(), &space, &format!("ns-{id}")).await;
        let guest = Guest::start("first", left.ports[0], &mac(10)).await;
        run(&format!("ip link set tap{} master brq{} up", short(left.ports[0]), short(left.net)))
            .await;
        assert_eq!(guest.udhcpc("").await.unwrap()["ip"], "10.7.0.10");

        let mut documents = left.documents();
        documents.put("Network", "net", left.net, network("vxlan", &json!({"segment": 77})));
        let more = json!({"owner": "dhcp", "port_security": false});
        documents.put("Port", "server", server, port(left.net, "one", 2, &more));
        let mut second = port(left.net, "one", 11, &json!({"port_security": false}));
        second["owner"] = json!("instance");
        documents.put("Port", "p11", left.ports[1], second);
        let mut willing = local("one");
        (willing.takeover, willing.vxlan_port) = (true, 8472);
        let (agent, _) = agent_of(willing, Duration::ZERO);
        let report = documents.pass(&agent).await;
        let (_, outcome) =
            report.outcomes.iter().find(|(object, _)| object.id == left.net).unwrap();
        let Outcome::Failed { reason, .. } = outcome else { panic!("{outcome:?}") };
        let wanted =
            format!("cannot serve DHCP in namespace {space}: another program serves there");
        assert!(reason.contains(&wanted), "{reason}");
        assert!(reason.contains(&format!("ip netns pids {space} | xargs kill")), "{reason}");
        // It goes on serving; everything but the servers is taken over.
        assert!(link(&format!("tap{id}")).await.unwrap()["ifalias"].is_string());
        assert_eq!(guest.udhcpc("").await.unwrap()["ip"], "10.7.0.10");

        dnsmasq.kill();
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        assert_eq!(guest.udhcpc("").await.unwrap()["ip"], "10.7.0.10");
        let facts = agent.facts().await;
        assert!(facts["dhcp"]["answered"].as_u64().unwrap() >= 2, "{}", facts["dhcp"]);
    });
}
