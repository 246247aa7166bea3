//! The whole suite on one host: three agents, a real broker, and agentctl as a person uses it.
//!
//! Everything runs in a network namespace of the test's own, so that the network agent's bridges
//! and the broker's ports are nobody else's.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]
#![expect(clippy::disallowed_methods, reason = "the runner limits a test's time")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use stackhand_model::AgentKind;
use stackhand_testkit::broker::Broker;
use stackhand_testkit::{Spawned, bin, in_netns, wait_for_sync};
use stackhand_tests::Said;

/// Seconds between reports, so that three missed ones are soon over.
const INTERVAL: u64 = 1;

/// An agent listens and has reported by then, on a machine that is busy with other tests.
const START: Duration = Duration::from_secs(30);

/// The documents of the tests: one for each of two agents.
const MANIFEST: &str = "\
kind: Network
name: inner
spec:
  type: local
  subnets: [{name: inner4, cidr: 192.168.9.0/24, gateway: 192.168.9.1}]
---
kind: Volume
name: data
spec: {size_gib: 1}
";

/// One host with its agents, and a controller on it.
struct Cloud {
    folder: tempfile::TempDir,
    name: String,
    broker: Broker,
    agents: BTreeMap<AgentKind, Spawned>,
}

impl Cloud {
    /// A broker, a controller's key that is trusted, settings; no agent yet.
    fn new() -> Self {
        run("ip", &["link", "set", "lo", "up"]);
        // Short, because a socket's path has at most 107 bytes.
        let folder = tempfile::Builder::new().prefix("shs-").tempdir().unwrap();
        // Ids follow from the cloud's name, and namespaces of networks from ids: none is shared
        // with another test that runs now.
        let name = format!("suite-{}", std::process::id());
        let broker = Broker::start();
        let at = |path: &str| folder.path().join(path);
        for path in ["etc/trusted_controllers", "run", "state"] {
            fs::create_dir_all(at(path)).unwrap();
        }
        let settings = format!(
            "host = \"node1\"\ncloud = \"{name}\"\nrun_dir = {:?}\n\
             [bus]\nurl = \"{}\"\n[heartbeat]\ninterval_seconds = {INTERVAL}\n",
            at("run"),
            broker.url(),
        );
        fs::write(at("etc/stackhand.toml"), settings).unwrap();
        for agent in AgentKind::ALL {
            let state = at("state").join(agent.as_str());
            fs::create_dir(&state).unwrap();
            let own = format!("state_dir = {state:?}\n");
            fs::write(at("etc").join(format!("{agent}.toml")), own).unwrap();
        }
        let cloud = Self { folder, name, broker, agents: BTreeMap::new() };
        let key = cloud.key();
        let made = cloud.agentctl(&["keygen", "--out", key.to_str().unwrap()]);
        assert!(made.is_done(), "{made:?}");
        fs::copy(
            PathBuf::from(format!("{}.pub", key.display())),
            cloud.at("etc/trusted_controllers/controller.pub"),
        )
        .unwrap();
        cloud
    }

    fn at(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn key(&self) -> PathBuf {
        self.at("controller.pem")
    }

    fn start(&mut self, agent: AgentKind) {
        let etc = self.at("etc");
        let process = Spawned::start(bin(agent.binary()), [Path::new("--config-dir"), &etc]);
        self.agents.insert(agent, process);
    }

    fn start_all(&mut self) {
        for agent in AgentKind::ALL {
            self.start(agent);
        }
        self.wait_for_list([true; 3]);
    }

    /// Runs agentctl over the broker, without a key.
    fn agentctl(&self, arguments: &[&str]) -> Said {
        Said::by(
            Command::new(bin("agentctl"))
                .args(["--url", &self.broker.url(), "--cloud", &self.name])
                .args(arguments)
                .env("HOME", self.folder.path()),
        )
    }

    /// Runs agentctl over the broker, with the trusted key.
    fn command(&self, arguments: &[&str]) -> Said {
        let key = self.key();
        let mut all = vec!["--key", key.to_str().unwrap()];
        all.extend(arguments);
        self.agentctl(&all)
    }

    /// Writes the manifest and returns its path.
    fn manifest(&self) -> String {
        let path = self.at("manifest.yaml");
        fs::write(&path, MANIFEST).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Waits until `agentctl list` shows compute, network and storage alive or not, as expected.
    fn wait_for_list(&self, expected: [bool; 3]) -> Vec<Value> {
        let end = Instant::now() + START;
        loop {
            let said = self.agentctl(&["list", "-o", "json"]);
            let rows: Vec<Value> = serde_json::from_str(&said.out).unwrap_or_default();
            let alive: Vec<_> = rows.iter().filter_map(|row| row["alive"].as_bool()).collect();
            if alive == expected {
                return rows;
            }
            assert!(Instant::now() < end, "not listed as {expected:?} but so: {said:?}");
        }
    }

    /// Names and states of the documents that the agents hold.
    fn held(&self) -> Vec<(String, String)> {
        let mut all = Vec::new();
        for kind in ["network", "volume"] {
            let said = self.command(&["get", kind, "-o", "json"]);
            assert!(said.is_done(), "{said:?}");
            let rows: Vec<Value> = serde_json::from_str(&said.out).unwrap();
            let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
            all.extend(rows.iter().map(|row| (text(row, "name"), text(row, "state"))));
        }
        all
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

/// Named `broker` because that is how the test tiers know it, see `.config/nextest.toml`.
mod broker {
    use super::*;

    #[test]
    fn three_agents_are_alive_one_is_killed_and_comes_back_with_what_it_had_answered_for() {
        in_netns(|| async {
            let mut cloud = Cloud::new();
            cloud.start_all();

            let manifest = cloud.manifest();
            let unsigned = cloud.agentctl(&["apply", "-f", &manifest]);
            assert!(!unsigned.is_done() && unsigned.err.contains("not signed"), "{unsigned:?}");
            let applied = cloud.command(&["apply", "-f", &manifest, "--wait"]);
            assert!(applied.is_done(), "{applied:?}");
            let active = |name: &str| (name.to_owned(), "active".to_owned());
            assert_eq!(cloud.held(), [active("inner"), active("data")]);

            let again = cloud.command(&["apply", "-f", &manifest, "--dry-run"]);
            assert!(again.is_done(), "{again:?}");
            assert!(!again.out.contains("created") && !again.out.contains("updated"), "{again:?}");

            cloud.agents.get_mut(&AgentKind::Storage).unwrap().kill();
            let listed = cloud.wait_for_list([true, true, false]);
            assert_eq!(listed[2]["type"], "storage");
            assert_eq!(listed[2]["host"], "node1");

            let table = cloud.agentctl(&["list"]).out;
            assert_eq!(
                (table.matches(":-)").count(), table.matches("xxx").count()),
                (2, 1),
                "{table}"
            );

            cloud.start(AgentKind::Storage);
            cloud.wait_for_list([true; 3]);
            assert_eq!(cloud.held(), [active("inner"), active("data")]);

            let gone = cloud.command(&["delete", "-f", &manifest, "--wait"]);
            assert!(gone.is_done(), "{gone:?}");
            assert_eq!(cloud.held(), []);
            for (agent, process) in &mut cloud.agents {
                let status = process.terminate(START);
                assert!(status.success(), "{agent}: {status}\n{}", process.output());
            }
        });
    }

    #[test]
    fn agents_are_back_soon_after_their_broker_and_lose_nothing() {
        in_netns(|| async {
            let mut cloud = Cloud::new();
            cloud.start_all();
            let manifest = cloud.manifest();
            let applied = cloud.command(&["apply", "-f", &manifest, "--wait"]);
            assert!(applied.is_done(), "{applied:?}");

            cloud.broker.wait_until_streams_last(0);
            cloud.broker.kill(0);
            // Without a broker, an operator on the host still asks and acts.
            let run_dir = cloud.at("run");
            let local = |arguments: &[&str]| {
                let output = Command::new(bin("agentctl"))
                    .args(["--local", "--run-dir", run_dir.to_str().unwrap()])
                    .args(["--cloud", &cloud.name])
                    .args(arguments)
                    .output()
                    .unwrap();
                (output.status.code(), String::from_utf8(output.stdout).unwrap())
            };
            let mut listed = (None, String::new());
            wait_for_sync(START, "the agents to say that the broker is away", || {
                listed = local(&["list"]);
                (listed.1.matches("bus: ").count() == 3).then_some(())
            });
            assert_eq!(listed.1.matches(":-)").count(), 3, "{listed:?}");
            let (status, volumes) = local(&["get", "volume"]);
            assert_eq!(status, Some(0), "{volumes}");
            assert!(volumes.contains("data"), "{volumes}");

            cloud.broker.restart(0);
            cloud.broker.wait_until_up(0);
            cloud.wait_for_list([true; 3]);
            assert_eq!(cloud.held().len(), 2);
        });
    }
}
