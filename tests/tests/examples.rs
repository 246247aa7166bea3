//! The examples that need no guest, applied as their first lines say, in a machine of the lab: VLANs need a full kernel.
//!
//! `first_cloud.rs` applies `first-cloud.yaml`.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use assert_cmd::Command;
use serde_json::Value;
use stackhand_model::AgentKind;
use stackhand_testkit::{Spawned, bin, wait_for_sync};

/// What a command may take in a machine that QEMU translates.
const LIMIT: Duration = Duration::from_secs(90);

/// Runs a program to its end and returns what it printed.
fn run(program: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    let output = command.args(arguments).timeout(LIMIT).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// Names of the links that are there, but for those that the kernel makes with its GRE modules.
fn links() -> Vec<String> {
    let text = run(Path::new("/sbin/ip"), &["-json", "link", "show"]);
    let links: Vec<Value> = serde_json::from_str(&text).unwrap();
    let names = links.iter().map(|link| link["ifname"].as_str().unwrap().to_owned());
    names.filter(|name| !["gre0", "gretap0", "erspan0"].contains(&name.as_str())).collect()
}

/// A host whose network and storage agents run.
struct Host {
    agents: BTreeMap<AgentKind, Spawned>,
    folder: tempfile::TempDir,
}

impl Host {
    fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("shx-").tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        for path in ["etc", "run"] {
            fs::create_dir(at(path)).unwrap();
        }
        let common = format!("host = \"node1\"\ncloud = \"examples\"\nrun_dir = {:?}\n", at("run"));
        fs::write(at("etc/stackhand.toml"), common).unwrap();
        let mut agents = BTreeMap::new();
        for agent in [AgentKind::Network, AgentKind::Storage] {
            let state = at(agent.as_str());
            fs::create_dir(&state).unwrap();
            let mut own = format!("state_dir = {state:?}\n");
            if agent == AgentKind::Network {
                own += "[network]\nbridge_mappings = { extnet = \"ext0\" }\n";
            } else {
                // The machine's files are in its memory, which is small.
                own += "[storage.backends.default]\novercommit_percent = 1000\n";
            }
            fs::write(at("etc").join(format!("{agent}.toml")), own).unwrap();
            let etc = at("etc").display().to_string();
            let process = Spawned::start(bin(agent.binary()), ["--config-dir", &etc]);
            agents.insert(agent, process);
        }
        let host = Self { agents, folder };
        wait_for_sync(LIMIT, "both agents", || {
            host.agentctl(&["list", "-o", "json"]).matches("\"alive\": true").nth(1).map(drop)
        });
        host
    }

    fn agentctl(&self, arguments: &[&str]) -> String {
        let run_dir = self.folder.path().join("run").display().to_string();
        let common = ["--local", "--run-dir", &run_dir, "--cloud", "examples"];
        run(&bin("agentctl"), &[&common, arguments].concat())
    }

    /// Kind, name and state of what the agents hold besides the host.
    fn held(&self) -> Vec<String> {
        let rows: Vec<Value> =
            serde_json::from_str(&self.agentctl(&["get", "-o", "json"])).unwrap();
        let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
        let rows = rows.iter().filter(|row| row["kind"] != "Host");
        let mut held: Vec<_> =
            rows.map(|row| ["kind", "name", "state"].map(|key| text(row, key)).join(" ")).collect();
        held.sort();
        held
    }

    /// Applies an example twice, hands over, and deletes it.
    fn holds(&self, example: &str, given: &[&str], expected: &[&str], look: impl FnOnce(&Self)) {
        let before = links();
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(example);
        let manifest = [&["-f", file.to_str().unwrap()], given].concat();
        let applied = self.agentctl(&[&["apply", "--wait=60"], &manifest[..]].concat());
        assert!(applied.contains("create"), "{applied}");
        assert_eq!(self.held(), expected, "{example}");
        let again = self.agentctl(&[&["apply", "--wait=60"], &manifest[..]].concat());
        assert!(!again.contains("create") && !again.contains("update"), "{example}: {again}");
        look(self);
        self.agentctl(&[&["delete", "--wait=60"], &manifest[..]].concat());
        assert_eq!(self.held(), [] as [&str; 0], "{example}");
        assert_eq!(links(), before, "{example}");
    }
}

/// Named `lab` because that is how the test tiers know it, see `.config/nextest.toml`.
mod lab {
    use super::*;

    #[test]
    #[ignore = "runs in the lab"]
    fn every_example_is_applied_changes_nothing_again_and_goes() {
        run(Path::new("/sbin/ip"), &["link", "add", "ext0", "type", "dummy"]);
        run(Path::new("/sbin/ip"), &["link", "set", "ext0", "up"]);
        let mut host = Host::start();
        host.holds(
            "hello.yaml",
            &[],
            &["Network hello active", "Port hello-port active", "Volume hello-volume active"],
            |host| {
                let port = host.agentctl(&["get", "port", "hello-port", "-o", "json"]);
                assert!(port.contains("192.168.77."), "{port}");
            },
        );
        host.holds(
            "ipv6.yaml",
            &[],
            &[
                "Network dual active",
                "Network stateful active",
                "Port dual-port active",
                "Port stateful-port active",
                "SecurityGroup dual active",
            ],
            |host| {
                let port = host.agentctl(&["get", "port", "dual-port", "-o", "json"]);
                assert!(port.contains("192.168.20.") && port.contains("fd00:20::"), "{port}");
            },
        );
        host.holds(
            "provider-vlan.yaml",
            &["--set", "VLAN=120", "--set", "HOST=node1"],
            &[
                "Network site active",
                "Port site-port active",
                "QosPolicy fair active",
                "SecurityGroup site active",
            ],
            |_| {
                let vlan = links().into_iter().find(|name| name.ends_with(".120"));
                let vlan = vlan.expect("a link for VLAN 120");
                let told = run(
                    Path::new("/sbin/ip"),
                    &["-json", "-details", "link", "show", "dev", &vlan],
                );
                let told: Value = serde_json::from_str(&told).unwrap();
                assert_eq!(told[0]["linkinfo"]["info_data"]["id"], 120, "{told}");
                assert_eq!(told[0]["link"], "ext0", "{told}");
            },
        );
        for (agent, process) in &mut host.agents {
            let status = process.terminate(LIMIT);
            assert!(status.success(), "{agent}: {status}\n{}", process.output());
        }
    }

    #[test]
    fn examples_are_applied_where_there_is_a_full_kernel() {
        stackhand_testkit::in_the_lab("lab::every_example");
    }
}
