//! DHCPv6 by clients that nobody here wrote, in guests of their own.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::time::Duration;

use serde_json::{Value, json};
use stackhand_kernel::exec::Program;
use stackhand_runtime::agent::Agent;
use stackhand_testkit::wait_for;
use support::{Documents, Guest, agent, agent_of, local, mac, network, on_a_host, port, run};
use uuid::Uuid;

const WAIT: Duration = Duration::from_secs(60);

/// A network with IPv4 and IPv6, and one guest at .10 of both.
struct World {
    documents: Documents,
    guest: Guest,
    net: Uuid,
}

impl World {
    async fn start(mode: &str) -> Self {
        let (net, a) = (Uuid::new_v4(), Uuid::new_v4());
        let guest = Guest::start("guest", a, &mac(10)).await;
        let mut documents = Documents::default();
        documents.put("Network", "net", net, network("local", &two_families(mode, &[])));
        let more = json!({
            "owner": "external", "dns_name": "web", "guest": {"hostname": "web"},
            "fixed_ips": [
                {"subnet": "main", "address": "10.7.0.10"},
                {"subnet": "six", "address": "fd00:7::10"},
            ],
            "extra_dhcp_options":
                [{"name": "bootfile-url", "value": "tftp://boot/x", "ip_version": 6}],
        });
        documents.put("Port", "a", a, port(net, "one", 10, &more));
        Self { documents, guest, net }
    }

    /// Waits until the guest may speak: its link-local address is its own.
    async fn speaks(&self) {
        wait_for(WAIT, "a link-local address", || async {
            let has = self.guest.run("ip -6 address show dev eth0 scope link -tentative").await;
            has.contains("fe80").then_some(())
        })
        .await;
    }

    /// Puts a router whose port is on the network.
    fn put_router(&mut self) {
        let (router, inside) = (Uuid::new_v4(), Uuid::new_v4());
        let more = json!({
            "owner": "router-interface", "device": router,
            "fixed_ips": [
                {"subnet": "main", "address": "10.7.0.1"}, {"subnet": "six", "address": "fd00:7::1"},
            ],
        });
        self.documents.put("Port", "inside", inside, port(self.net, "one", 1, &more));
        let spec = json!({"host": "one", "interfaces": [inside]});
        self.documents.put("Router", "router", router, spec);
    }

    /// Runs a client in the guest until that has the addresses of both families.
    async fn until_both(&self, client: &str) {
        let arguments = ["netns", "exec", "guest", "sh", "-c", client];
        let client = Program::new("/usr/sbin/ip").args(arguments).limit(WAIT);
        let bound = wait_for(WAIT, "both addresses", || async {
            let has = self.guest.run("ip address show dev eth0").await;
            (has.contains("inet 10.7.0.10/24") && has.contains("inet6 fd00:7::10/128"))
                .then_some(())
        });
        tokio::select! {
            () = bound => {}
            ended = client.run() => panic!("the client ended: {ended:?}"),
        }
    }

    /// What ISC's client was told when it came to `reason`.
    async fn dhclient(&self, options: &str, reason: &str) -> support::Told {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        let file = |name: &str| folder.path().join(name).display().to_string();
        let body = format!(
            "#!/bin/sh\ncase $reason in BOUND6) \
             ip -6 address replace $new_ip6_address/64 dev eth0;; esac\n\
             env > {0}.$reason.new; mv {0}.$reason.new {0}.$reason\n",
            file("told")
        );
        std::fs::write(file("script"), body).unwrap();
        support::make_executable(&file("script"));
        std::fs::write(file("leases"), "").unwrap();
        let conf = "request dhcp6.name-servers, dhcp6.domain-search, dhcp6.bootfile-url;\n";
        std::fs::write(file("conf"), conf).unwrap();
        let arguments = format!(
            "netns exec guest dhclient -6 {options} -d -cf {} -lf {} -pf {} -sf {} eth0",
            file("conf"),
            file("leases"),
            file("pid"),
            file("script"),
        );
        let client = Program::new("/usr/sbin/ip").args(arguments.split_whitespace()).limit(WAIT);
        let told = format!("{}.{reason}", file("told"));
        let done = wait_for(WAIT, "dhclient to be told", || async {
            std::path::Path::new(&told).exists().then_some(())
        });
        tokio::select! {
            () = done => {}
            ended = client.run() => {
                let is_told = std::path::Path::new(&told).exists();
                assert!(is_told, "dhclient ended: {ended:?}");
            }
        }
        support::told(&told)
    }
}

/// Subnets of both families, and what else is said of the IPv6 one.
fn two_families(mode: &str, more: &[(&str, &str)]) -> Value {
    let mut six = json!({
        "name": "six", "cidr": "fd00:7::/64", "gateway": "fd00:7::1", "ipv6_mode": mode,
    });
    for (key, value) in more {
        six[*key] = json!(value);
    }
    let main = json!({
        "name": "main", "cidr": "10.7.0.0/24", "gateway": "10.7.0.1", "dhcp_address": "10.7.0.2",
    });
    json!({"dns_domain": "int.example.org", "subnets": [main, six]})
}

#[test]
fn a_guest_is_given_its_address_and_keeps_it_while_the_agent_restarts() {
    on_a_host(|| async {
        let mut world = World::start("dhcpv6-stateful").await;
        let chosen = two_families("dhcpv6-stateful", &[("dhcp_address", "fd00:7::2")]);
        world.documents.put("Network", "net", world.net, network("local", &chosen));
        let mut quick = local("one");
        // It renews after half of that.
        quick.lease_seconds = 8;
        let (first, _) = agent_of(quick.clone(), Duration::ZERO);
        world.documents.settle(&first).await;
        world.documents.rest(&first).await;
        world.speaks().await;
        let told = world.dhclient("", "BOUND6").await;
        assert_eq!(told["new_ip6_address"], "fd00:7::10");
        assert_eq!(told["new_dhcp6_name_servers"], "fd00:7::2");
        assert_eq!(told["new_dhcp6_domain_search"], "int.example.org.");
        assert_eq!(told["new_dhcp6_bootfile_url"], "tftp://boot/x");

        // Names and metadata are there by IPv6, too.
        let name = world.guest.run("drill -Q web.int.example.org AAAA @fd00:7::2").await;
        assert_eq!(name.trim(), "fd00:7::10");
        let page = "curl -g -s -m 5 http://[fe80::a9fe:a9fe%eth0]/latest/meta-data/hostname";
        assert_eq!(world.guest.run(page).await.trim(), "web.int.example.org");

        drop(first);
        let (second, _) = agent_of(quick, Duration::ZERO);
        world.documents.rest(&second).await;
        let told = world.dhclient("", "RENEW6").await;
        assert_eq!(told["new_ip6_address"], "fd00:7::10");
        let facts = second.facts().await;
        assert!(facts["dhcp6"]["answered"].as_u64().unwrap() >= 2, "{facts}");
    });
}

#[test]
fn a_guest_that_makes_its_own_address_is_told_settings_alone() {
    on_a_host(|| async {
        let world = World::start("dhcpv6-stateless").await;
        let (agent, _) = agent("one");
        world.documents.settle(&agent).await;
        world.documents.rest(&agent).await;
        world.speaks().await;
        let told = world.dhclient("-S", "RENEW6").await;
        let server = &told["new_dhcp6_name_servers"];
        assert!(server.starts_with("fd00:7::f816:3fff:fe"), "made as guests make theirs: {server}");
        assert!(!told.contains_key("new_ip6_address"));
        // IPv6 goes when nobody is to be served by it, and the server's link is as it was.
        let mut documents = world.documents.clone();
        documents.put("Network", "net", world.net, network("local", &two_families("slaac", &[])));
        documents.settle(&agent).await;
        documents.rest(&agent).await;
        let has = run(&format!("ip netns exec qdhcp-{} ip -6 address", world.net)).await;
        assert!(!has.contains("fd00:7:"), "{has}");
    });
}

#[test]
fn dhcpcd_follows_what_the_router_says_and_is_given_both_addresses() {
    on_a_host(|| async {
        let mut world = World::start("dhcpv6-stateful").await;
        world.put_router();
        let (agent, _) = agent("one");
        world.documents.settle(&agent).await;
        world.documents.rest(&agent).await;
        world.speaks().await;
        let told = world.guest.run("rdisc6 -1 -w 5000 eth0").await;
        let managed = told.lines().find(|line| line.contains("Stateful address conf."));
        assert!(managed.is_some_and(|line| line.contains("Yes")), "{told}");

        run("mount -t tmpfs leases /var/lib/dhcpcd").await;
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        let conf = folder.path().join("conf").display().to_string();
        std::fs::write(&conf, "duid ll\noption domain_name_servers\ninterface eth0\nia_na\n")
            .unwrap();
        world.until_both(&format!("exec dhcpcd -B -d -c /bin/true -f {conf} eth0")).await;
        let route = world.guest.run("ip -6 route show default").await;
        assert!(route.contains("via fe80::"), "{route}");
        world.documents.rest(&agent).await;
    });
}

#[test]
fn systemd_networkd_follows_what_the_router_says_and_is_given_both_addresses() {
    on_a_host(|| async {
        let mut world = World::start("dhcpv6-stateful").await;
        world.put_router();
        let (agent, _) = agent("one");
        world.documents.settle(&agent).await;
        std::fs::create_dir_all("/run/systemd/network").unwrap();
        let text = "[Match]\nName=eth0\n[Network]\nDHCP=yes\nIPv6AcceptRA=yes\n";
        std::fs::write("/run/systemd/network/eth0.network", text).unwrap();
        // Where /sys cannot be written there is no udev, and it waits for none.
        let networkd = "mount -o remount,ro /sys && exec /lib/systemd/systemd-networkd";
        world.until_both(networkd).await;
        let facts = agent.facts().await;
        assert!(facts["dhcp6"]["answered"].as_u64().unwrap() >= 1, "{facts}");
        world.documents.rest(&agent).await;
    });
}

#[test]
fn a_tester_of_dhcpv6_servers_is_answered_also_by_a_relay() {
    on_a_host(|| async {
        let world = World::start("dhcpv6-stateful").await;
        let (agent, _) = agent("one");
        world.documents.settle(&agent).await;
        world.speaks().await;
        for relay in ["", "-A 1"] {
            // Its relay says nothing of the client: that is known by its name.
            let name = "-b duid=0001000100000001fa163e00000a";
            world.guest.perfdhcp(&format!("-6 {name} {relay} all")).await;
        }
        let facts = agent.facts().await;
        assert!(facts["dhcp6"]["answered"].as_u64().unwrap() >= 40, "{facts}");
    });
}
