//! What `agentctl` tells of a host's network, asked as a person asks: whether a packet gets from one
//! port to another, through routers and floating IPs too, and what on the host is not as it should
//! be. A real network agent on a real kernel, in namespaces of the test's own.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![expect(clippy::disallowed_methods, reason = "the runner limits a test's time")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use stackhand_model::AgentKind;
use stackhand_testkit::{Spawned, bin, on_a_host, wait_for};
use stackhand_tests::Said;

const LIMIT: Duration = Duration::from_secs(60);

/// Two networks behind a router, and one outside.
const MANIFEST: &str = "\
kind: Host
name: one
spec: {bridge_mappings: {public: eth1}}
---
kind: Network
name: outside
spec:
  type: flat
  physical_network: public
  external: true
  subnets: [{name: public, cidr: 203.0.113.0/24, gateway: 203.0.113.1, dhcp: false}]
---
kind: Network
name: a
spec: {type: local, subnets: [{name: a4, cidr: 10.7.0.0/24, gateway: 10.7.0.1, dhcp: false}]}
---
kind: Network
name: b
spec: {type: local, subnets: [{name: b4, cidr: 10.8.0.0/24, gateway: 10.8.0.1, dhcp: false}]}
---
kind: SecurityGroup
name: web
spec:
  rules:
    - {direction: ingress, protocol: tcp, port_range_min: 80, port_range_max: 80}
    - {direction: egress}
---
kind: Router
name: router
spec: {gateway: {network: outside}, interfaces: [{network: a}, {network: b}]}
---
kind: Port
name: front
spec: {network: a, host: one, owner: external, security_groups: [web],
       fixed_ips: [{subnet: a4, address: 10.7.0.10}]}
---
kind: Port
name: friend
spec: {network: a, host: one, owner: external, security_groups: [web],
       fixed_ips: [{subnet: a4, address: 10.7.0.11}]}
---
kind: Port
name: back
spec: {network: b, host: one, owner: external, security_groups: [web],
       fixed_ips: [{subnet: b4, address: 10.8.0.10}]}
---
kind: Port
name: client
spec: {network: outside, host: one, owner: external, port_security: false,
       fixed_ips: [{subnet: public, address: 203.0.113.200}]}
---
kind: FloatingIp
name: shop
spec: {address: 203.0.113.77, router: router, port: front}
";

/// One host with a network agent.
struct Site {
    folder: tempfile::TempDir,
    _agent: Spawned,
}

impl Site {
    async fn start() -> Self {
        run("ip link set lo up");
        run("ip link add eth1 type veth peer name far");
        run("ip link set far up");
        run("ip link set eth1 up");
        // Short, because a socket's path has at most 107 bytes.
        let folder = tempfile::Builder::new().prefix("sht-").tempdir_in("/tmp").unwrap();
        let at = |path: &str| folder.path().join(path);
        for path in ["etc", "run", "state"] {
            fs::create_dir(at(path)).unwrap();
        }
        let settings =
            format!("host = \"one\"\nstate_dir = {:?}\nrun_dir = {:?}\n", at("state"), at("run"));
        fs::write(at("etc/network.toml"), settings).unwrap();
        let etc = at("etc");
        let program = bin(AgentKind::Network.binary());
        let agent = Spawned::start(program, [Path::new("--config-dir"), &etc]);
        let site = Self { folder, _agent: agent };
        wait_for(LIMIT, "the agent to answer", || async {
            (site.agentctl("facts").status == 0).then_some(())
        })
        .await;
        site
    }

    fn agentctl(&self, line: &str) -> Said {
        let run_dir: PathBuf = self.folder.path().join("run");
        Said::by(
            Command::new(bin("agentctl"))
                .args(["--local", "--run-dir", run_dir.to_str().unwrap()])
                .args(line.split_whitespace())
                .env("HOME", self.folder.path()),
        )
    }

    /// The ports' taps by the ports' names.
    fn taps(&self) -> BTreeMap<String, String> {
        let said = self.agentctl("get port -o json");
        let rows: Vec<Value> =
            serde_json::from_str(&said.out).unwrap_or_else(|_| panic!("{said:?}"));
        let tap = |row: &Value| {
            let id = row["id"].as_str().unwrap();
            (row["name"].as_str().unwrap().to_owned(), format!("tap{}", &id[..11]))
        };
        rows.iter().map(tap).collect()
    }

    /// Asks about a TCP connection; the exit status must tell the same as the last line.
    fn explain(&self, from: &str, to: &str, port: u16) -> (bool, String) {
        let said = self.agentctl(&format!("explain {from} {to} --proto tcp --port {port}"));
        let passes = said.out.ends_with("It passes.\n");
        assert_eq!(said.status, if passes { 0 } else { 3 }, "{said:?}");
        (passes, said.out)
    }
}

fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_packet_is_followed_from_port_to_port_and_drift_is_shown_and_not_touched() {
    on_a_host(|| async {
        let site = Site::start().await;
        let manifest = site.folder.path().join("manifest.yaml");
        fs::write(&manifest, MANIFEST).unwrap();
        let applied = site.agentctl(&format!("apply -f {}", manifest.display()));
        assert_eq!(applied.status, 0, "{applied:?}");
        let taps = site.taps();
        for name in ["front", "friend", "back", "client"] {
            run(&format!("ip netns add {name}"));
            let tap = &taps[name];
            run(&format!("ip link add {tap} type veth peer name eth0 netns {name}"));
            run(&format!("ip -n {name} link set eth0 up"));
        }
        let waited = site.agentctl(&format!("apply -f {} --wait=60", manifest.display()));
        assert_eq!(waited.status, 0, "{waited:?}");

        explained(&site, &taps).await;
        drifted(&site, &taps["front"]).await;
    });
}

async fn explained(site: &Site, taps: &BTreeMap<String, String>) {
    let (passes, told) = site.explain("front", "friend", 80);
    assert!(passes, "{told}");
    assert!(told.contains("passes by spec.rules[0] of SecurityGroup"), "{told}");
    let (passes, told) = site.explain("front", "friend", 81);
    assert!(!passes && told.contains("NO  rules in"), "{told}");

    // Through the router, to the port's own address.
    let (passes, told) = site.explain("front", "back", 80);
    assert!(passes, "{told}");
    for line in [
        "out of front on one",
        "through router on one",
        "10.8.0.10 is reached by the route to 10.8.0.0/24",
        "10.7.0.10 stays the source",
        "into back on one",
        "by way of 1 router",
    ] {
        assert!(told.contains(line), "{line} is not in: {told}");
    }
    // From outside, to the floating IP.
    let (passes, told) = site.explain("client", "front", 80);
    assert!(passes, "{told}");
    assert!(told.contains("floating IP 203.0.113.77 leads to 10.7.0.10"), "{told}");
    let (passes, told) = site.explain("client", "front", 443);
    assert!(!passes && told.contains("NO  rules in"), "{told}");
    // Out, with the floating IP as source; and with the router's own address.
    let (passes, told) = site.explain("front", "client", 80);
    assert!(passes && told.contains("10.7.0.10 becomes 203.0.113.77, its floating IP"), "{told}");
    let (passes, told) = site.explain("back", "client", 80);
    assert!(passes && told.contains("the router's address"), "{told}");
    // Nothing leads from outside to a port without a floating IP.
    let (passes, told) = site.explain("client", "back", 80);
    assert!(!passes && told.contains("NO  network"), "{told}");

    // What the kernel has is told, not what it should have.
    assert_eq!(site.agentctl("host pause --reason test").status, 0);
    run(&format!("ip link set {} down", taps["back"]));
    let (passes, told) = site.explain("front", "back", 80);
    assert!(!passes && told.contains(&format!("{} is down", taps["back"])), "{told}");
    assert_eq!(site.agentctl("host resume").status, 0);
    wait_for(LIMIT, "the link to be up again", || async {
        site.explain("front", "back", 80).0.then_some(())
    })
    .await;
}

async fn drifted(site: &Site, tap: &str) {
    let clean = || async {
        let said = site.agentctl("diff --host one");
        (said.status == 0).then_some(said)
    };
    let said = wait_for(LIMIT, "no drift", clean).await;
    assert!(said.err.contains("the host is as its agents hold it"), "{said:?}");
    // While nobody repairs.
    assert_eq!(site.agentctl("host pause --reason test").status, 0);
    run(&format!("ip link set {tap} nomaster"));
    run("nft flush set bridge stackhand macs");
    let state = || (run("nft list ruleset"), run("ip -brief link show"));
    let before = state();
    for _ in 0..2 {
        let said = site.agentctl("diff --host one");
        assert_eq!(said.status, 3, "{said:?}");
        assert!(said.out.contains(&format!("set link {tap}")), "{said:?}");
        assert!(said.out.contains("firewall: add to macs of bridge stackhand"), "{said:?}");
    }
    assert_eq!(state(), before, "nothing was touched");
    let other = site.agentctl("diff --host two");
    assert_ne!(other.status, 0, "there is no such host: {other:?}");
    assert_eq!(site.agentctl("host resume").status, 0);
    wait_for(LIMIT, "no drift", clean).await;
    assert_ne!(state(), before, "it was repaired");
}
