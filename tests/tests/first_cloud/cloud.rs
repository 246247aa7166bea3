//! A host inside this host with its agents, and what is asked of them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use assert_cmd::Command;
use serde_json::Value;
use stackhand_model::AgentKind;
use stackhand_testkit::{Spawned, bin, wait_for_sync};

/// What a command may take, on a machine that is busy with other tests.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Documents of the first cloud, with what agentctl makes: the host, ports and the attachment.
pub(crate) const OBJECTS: usize = 16;

/// The top of the tree.
pub(crate) fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Runs a program to its end and returns what it printed.
pub(crate) fn run<'a>(program: &Path, arguments: impl IntoIterator<Item = &'a str>) -> String {
    run_within(LIMIT, program, arguments)
}

fn run_within<'a>(
    limit: Duration,
    program: &Path,
    arguments: impl IntoIterator<Item = &'a str>,
) -> String {
    let mut command = Command::new(program);
    let output = command.args(arguments).timeout(limit).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// One host, its agents, and agentctl on it.
pub(crate) struct Cloud {
    // Ended in this order: agents would start again what ends before them.
    pub(crate) agents: BTreeMap<AgentKind, Spawned>,
    pub(crate) host: Host,
    pub(crate) name: String,
    folder: tempfile::TempDir,
    guest: String,
}

/// A host inside this host, removed with everything that runs on it.
pub(crate) struct Host(PathBuf);

/// The machine of the manifest.
pub(crate) struct Guest {
    pub(crate) instance: String,
    /// Its address on its own network.
    address: String,
    /// The address by which the world outside reaches it.
    floating: String,
}

impl Guest {
    pub(crate) fn domain(&self) -> String {
        format!("instance-{}", &self.instance[..8])
    }

    /// The command that pings it from outside.
    pub(crate) fn ping<'a, const N: usize>(&'a self, options: [&'a str; N]) -> Vec<&'a str> {
        let command = ["ip", "netns", "exec", "provider", "ping", "-n", &self.floating];
        command.into_iter().chain(options).collect()
    }
}

impl Host {
    pub(crate) fn new(folder: PathBuf) -> Self {
        let host = Self(folder);
        host.up();
        host
    }

    fn up(&self) {
        run(&Self::script(), ["up", self.path()]);
    }

    fn down(&self) {
        run(&Self::script(), ["down", self.path()]);
    }

    /// Gives it links to the world outside and to other hosts.
    fn meet_provider(&self) {
        run(&top().join("scripts/provider"), [self.path()]);
    }

    pub(crate) fn script() -> PathBuf {
        top().join("scripts/private-host")
    }

    pub(crate) fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }

    /// Runs a program on it.
    pub(crate) fn run<'a>(&'a self, command: impl IntoIterator<Item = &'a str>) -> String {
        run(&Self::script(), ["exec", self.path()].into_iter().chain(command))
    }

    /// Starts a program on it. The process is the program's own: the script becomes it.
    pub(crate) fn start<'a>(&'a self, command: impl IntoIterator<Item = &'a str>) -> Spawned {
        Spawned::start(Self::script(), ["exec", self.path()].into_iter().chain(command))
    }
}

impl Drop for Host {
    #[expect(clippy::print_stderr, reason = "a host that stays is told")]
    fn drop(&mut self) {
        let down = Command::new(Self::script()).args(["down", self.path()]).timeout(LIMIT).ok();
        if let Err(problem) = down {
            eprintln!("{problem}");
        }
    }
}

impl Cloud {
    /// The host, libvirt and the image of guests that a script makes; no agent yet.
    pub(crate) fn new(image: &str) -> Self {
        // Made by scripts/setup; here only where that was left out.
        let guest = run_within(Duration::from_secs(900), &top().join("scripts").join(image), []);
        let guest = guest.trim().to_owned();
        // Short, because a socket's path has at most 107 bytes. Guests run as another user and
        // must get through.
        let folder = tempfile::Builder::new().prefix("shf-").tempdir().unwrap();
        open(folder.path());
        // Ids follow from it: none is that of another test.
        let name = format!("first-cloud-{}", std::process::id());
        let at = |path: &str| folder.path().join(path);
        for path in ["etc", "run", "state"] {
            fs::create_dir(at(path)).unwrap();
        }
        let settings = format!(
            "host = \"node1\"\ncloud = \"{name}\"\nrun_dir = {:?}\n[reconcile]\nresync_seconds = 1\n",
            at("run")
        );
        fs::write(at("etc/stackhand.toml"), settings).unwrap();
        for agent in AgentKind::ALL {
            let state = at("state").join(agent.as_str());
            fs::create_dir(&state).unwrap();
            open(&state);
            let mut own = format!(
                "state_dir = {state:?}\n[http]\nlisten = \"unix:{}\"\n",
                at(&format!("{agent}.http")).display()
            );
            if agent == AgentKind::Network {
                own += "[network]\ntunnel_address = \"192.0.2.11\"\n\
                        bridge_mappings = { extnet = \"ext0\" }\n";
            }
            if agent == AgentKind::Compute {
                own += "[compute]\nvirt_type = \"qemu\"\ndisk_cache = \"writeback\"\nimage_cache_hours = 0\n";
            }
            fs::write(at("etc").join(format!("{agent}.toml")), own).unwrap();
        }
        let host = Host::new(at("host"));
        host.meet_provider();
        Self { agents: BTreeMap::new(), host, name, folder, guest }
    }

    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    pub(crate) fn start(&mut self, agent: AgentKind) {
        let program = bin(agent.binary());
        let etc = self.at("etc");
        let command = [program.to_str().unwrap(), "--config-dir", etc.to_str().unwrap()];
        self.agents.insert(agent, self.host.start(command));
    }

    pub(crate) fn start_all(&mut self) {
        for agent in AgentKind::ALL {
            self.start(agent);
        }
        for agent in AgentKind::ALL {
            self.wait_for_passes(agent, 1);
        }
    }

    pub(crate) fn kill(&mut self, agent: AgentKind) {
        self.agents.get_mut(&agent).unwrap().kill();
    }

    /// Runs agentctl on this host, and returns what it printed.
    pub(crate) fn agentctl(&self, arguments: &[&str]) -> String {
        let run_dir = self.at("run");
        let common = ["--local", "--run-dir", run_dir.to_str().unwrap(), "--cloud", &self.name];
        run(&bin("agentctl"), common.into_iter().chain(arguments.iter().copied()))
    }

    /// Runs an agentctl command that takes the manifest.
    pub(crate) fn with_manifest(&self, arguments: &[&str]) -> String {
        let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFirstCloudTestKey test";
        self.with(&top().join("examples/first-cloud.yaml"), key, arguments)
    }

    /// Runs an agentctl command that takes a manifest with the guests' image and a key.
    pub(crate) fn with(&self, manifest: &Path, key: &str, arguments: &[&str]) -> String {
        let (guest, key) = (format!("GUEST={}", self.guest), format!("KEY={key}"));
        let given = ["-f", manifest.to_str().unwrap(), "--set", &guest, "--set", &key];
        self.agentctl(&[arguments, &given].concat())
    }

    /// What the agents hold: kind, name, state.
    pub(crate) fn held(&self) -> Vec<(String, String, String)> {
        let rows: Vec<Value> =
            serde_json::from_str(&self.agentctl(&["get", "-o", "json"])).unwrap();
        let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
        rows.iter().map(|row| (text(row, "kind"), text(row, "name"), text(row, "state"))).collect()
    }

    /// One document as the agents hold it.
    pub(crate) fn get(&self, kind: &str, name: &str) -> Value {
        let rows = self.agentctl(&["get", kind, name, "-o", "json"]);
        serde_json::from_str::<Vec<Value>>(&rows).unwrap().remove(0)
    }

    /// A counter of an agent, from what it serves to Prometheus; nothing while it does not.
    fn counter(&self, agent: AgentKind, name: &str) -> Option<u64> {
        let mut stream = UnixStream::connect(self.at(&format!("{agent}.http"))).ok()?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: agent\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}_total ")));
        Some(line.unwrap_or_else(|| panic!("no {name} in:\n{text}")).parse().unwrap())
    }

    /// Waits until an agent's process has made that many passes more than it has now.
    pub(crate) fn wait_for_passes(&self, agent: AgentKind, more: u64) {
        let count = || self.counter(agent, "stackhand_reconcile_passes");
        let before = count().unwrap_or(0);
        wait_for_sync(LIMIT, &format!("{more} passes of the {agent} agent"), || {
            count().filter(|now| *now >= before + more)
        });
    }

    pub(crate) fn writes(&self, agent: AgentKind) -> u64 {
        self.counter(agent, "stackhand_reconcile_writes").unwrap()
    }

    /// Applies the manifest and waits for its guest.
    pub(crate) fn first_guest(&self) -> Guest {
        let applied = self.with_manifest(&["apply", "--wait=60"]);
        assert!(applied.contains("create"), "{applied}");
        let held = self.held();
        assert!(held.len() == OBJECTS && held.iter().all(|it| it.2 == "active"), "{held:?}");
        let id = |kind: &str, name: &str| self.get(kind, name)["id"].as_str().unwrap().to_owned();
        let port = self.get("port", "demo-int1");
        let address = port["document"]["spec"]["fixed_ips"][0]["address"].as_str().unwrap();
        let floating = self.get("floatingip", "demo-ip");
        let floating = floating["document"]["spec"]["address"].as_str().unwrap();
        let guest = Guest {
            instance: id("instance", "demo"),
            address: address.to_owned(),
            floating: floating.to_owned(),
        };
        self.wait_for_guest(&guest);
        guest
    }

    /// Waits until a guest has its address, sees its volume, and answers.
    pub(crate) fn wait_for_guest(&self, guest: &Guest) {
        for told in [
            format!("guest: eth0 has address {}/24", guest.address),
            "guest: /dev/vdb has 1073741824 bytes".to_owned(),
            "guest: my name by metadata is demo.stackhand.internal, and there are keys: 1"
                .to_owned(),
            "guest: the router is 192.168.0.254".to_owned(),
        ] {
            wait_for_sync(LIMIT, &format!("{told:?} on the console"), || {
                self.console(&guest.instance).contains(&told).then_some(())
            });
        }
        self.host.run(guest.ping(["-c", "2", "-w", "20"]));
    }

    /// The host loses its power and gets it back; the agents start as they do at boot.
    pub(crate) fn lose_power(&mut self) {
        for process in self.agents.values_mut() {
            process.kill();
        }
        self.agents.clear();
        self.host.down();
        // What is in memory on a real host.
        for entry in fs::read_dir(self.at("run")).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        self.host.up();
        self.host.meet_provider();
        self.start_all();
    }

    /// What a guest has told on its console since it was started.
    pub(crate) fn console(&self, instance: &str) -> String {
        let log = self.at("state/compute/instances").join(instance).join("console.log");
        String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned()
    }

    /// What is in a folder below the agents' state; nothing if it is not there.
    pub(crate) fn files(&self, path: &str) -> Vec<PathBuf> {
        let folder = self.at("state").join(path);
        fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for Cloud {
    #[expect(clippy::print_stderr, reason = "what guests said explains a failure")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            for path in self.files("compute/instances") {
                let instance = path.file_name().unwrap_or_default().to_string_lossy();
                eprintln!("console of {instance}:\n{}", self.console(&instance));
            }
        }
    }
}

/// Lets everybody through a folder.
fn open(folder: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o711)).unwrap();
}
