//! Hosts, guests and documents for tests of the agent on the real kernel.

#![allow(dead_code, reason = "each test file uses its share")]

pub(crate) mod frames;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use stackhand_kernel::exec::Program;
use stackhand_model::{Document, ObjectRef};
use stackhand_network::NetworkAgent;
use stackhand_network::desired::Local;
use stackhand_network::settings::Renderer;
use stackhand_runtime::agent::{Action, Agent, Cause, Desired, Held, Outcome, PassReport, Work};
use stackhand_runtime::events::EventLog;
use tokio::sync::Notify;
use uuid::Uuid;

pub(crate) use stackhand_testkit::on_a_host;

/// Runs a program of the host in the calling thread's namespaces; it must succeed.
pub(crate) async fn run(line: &str) -> String {
    try_run(line).await.unwrap_or_else(|error| panic!("{error}"))
}

/// The same, with the failure told.
pub(crate) async fn try_run(line: &str) -> Result<String, String> {
    let mut words = line.split_whitespace();
    let name = words.next().unwrap();
    let path = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .map(|folder| format!("{folder}/{name}"))
        .into_iter()
        .find(|path| std::path::Path::new(path).exists())
        .unwrap_or_else(|| panic!("this test needs the program {name}"));
    let output = Program::new(path).args(words).limit(Duration::from_secs(30)).run().await;
    output.map(|output| output.text()).map_err(|error| error.to_string())
}

/// What `ip -json` says of a link, or nothing.
pub(crate) async fn link(name: &str) -> Option<Value> {
    let text = try_run(&format!("ip -json -details link show dev {name}")).await.ok()?;
    serde_json::from_str::<Value>(&text).unwrap().get(0).cloned()
}

/// Documents held, as the runtime would hold them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Documents(BTreeMap<ObjectRef, Held>);

impl Documents {
    pub(crate) fn put(
        &mut self,
        kind: &str,
        name: &str,
        id: Uuid,
        spec: impl Into<Value>,
    ) -> ObjectRef {
        let spec = spec.into();
        let value = json!({"kind": kind, "id": id, "name": name, "generation": 1, "spec": spec});
        let document = Document::from_value(&value).unwrap();
        let object = document.object();
        self.0.insert(object, Held { document: Arc::new(document), deleting: false });
        object
    }

    pub(crate) fn delete(&mut self, object: ObjectRef) {
        self.0.get_mut(&object).unwrap().deleting = true;
    }

    pub(crate) fn forget(&mut self, object: ObjectRef) {
        self.0.remove(&object);
    }

    pub(crate) fn desired(&self) -> Arc<Desired> {
        Arc::new(Desired { objects: self.0.clone(), revision: 1 })
    }

    /// Something to be done with one of them.
    pub(crate) fn action(&self, object: ObjectRef, name: &str) -> Action {
        Action {
            object,
            document: Arc::clone(&self.0[&object].document),
            name: name.to_owned(),
            params: Value::Null,
            request_id: "req-test".to_owned(),
        }
    }

    /// One pass in which everything is due.
    pub(crate) async fn pass(&self, agent: &NetworkAgent) -> PassReport {
        self.pass_because(agent, Cause::Change).await
    }

    pub(crate) async fn pass_because(&self, agent: &NetworkAgent, cause: Cause) -> PassReport {
        let due = self.0.keys().copied().collect();
        agent.pass(Work { desired: self.desired(), due, cause }).await
    }

    /// One pass after which everything is active.
    pub(crate) async fn settle(&self, agent: &NetworkAgent) -> PassReport {
        let report = self.pass_because(agent, Cause::Host).await;
        for (object, outcome) in &report.outcomes {
            assert!(matches!(outcome, Outcome::Active { .. }), "{object}: {outcome:?}");
        }
        report
    }

    /// A second pass, which must change nothing.
    pub(crate) async fn rest(&self, agent: &NetworkAgent) {
        let steps = agent.plan(self.desired()).await.unwrap();
        assert_eq!(steps, [], "nothing is left to do");
        assert_eq!(self.settle(agent).await.writes, 0, "a second pass writes nothing");
    }
}

pub(crate) fn local(host: &str) -> Local {
    Local {
        host: host.to_owned(),
        tap_user: Some(0),
        tap_group: None,
        vxlan_port: 4789,
        lease_seconds: 3600,
        dns_domain: "stackhand.internal".to_owned(),
        dns_forwarders: Vec::new(),
        takeover: false,
        firewall: match std::env::var(RENDERER).as_deref() {
            Ok("iptables") => Renderer::Iptables,
            Ok(other) => panic!("{RENDERER}={other}"),
            Err(_) => Renderer::Auto,
        },
    }
}

/// Runs the tests of this program whose names begin so once more, with iptables as the renderer.
pub(crate) fn again_with_iptables(tests: &str) {
    let output = assert_cmd::Command::new(std::env::current_exe().unwrap())
        .args(["--test-threads=2", tests])
        .env(RENDERER, "iptables")
        .timeout(Duration::from_secs(100))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("test result: ok") && !said.contains(" 0 passed"), "{said}");
}

/// Names the renderer of firewalls, where it is not to be the one that the kernel prefers.
pub(crate) const RENDERER: &str = "STACKHAND_TEST_RENDERER";

/// An agent whose orphans have no grace, and what tells that it asked for a pass.
pub(crate) fn agent(host: &str) -> (NetworkAgent, Arc<Notify>) {
    agent_with(host, Duration::ZERO)
}

pub(crate) fn agent_with(host: &str, grace: Duration) -> (NetworkAgent, Arc<Notify>) {
    agent_of(local(host), grace)
}

pub(crate) fn agent_of(local: Local, grace: Duration) -> (NetworkAgent, Arc<Notify>) {
    let heard = Arc::new(Notify::new());
    let told = Arc::clone(&heard);
    let wake = Arc::new(move |_: &_| told.notify_one());
    let events = EventLog::new(&local.host, "network");
    (NetworkAgent::new(local, grace, wake, events).unwrap(), heard)
}

/// A network of one subnet with DHCP.
pub(crate) fn network(kind: &str, more: &Value) -> Value {
    let mut spec = json!({
        "type": kind,
        "subnets": [{
            "name": "main",
            "cidr": "10.7.0.0/24",
            "gateway": "10.7.0.1",
            "dhcp_address": "10.7.0.2",
            "dns_servers": ["192.0.2.53"],
        }],
    });
    for (key, value) in more.as_object().unwrap() {
        spec[key] = value.clone();
    }
    spec
}

/// A port with the MAC address and address that end in `last`, which is not filtered unless `more`
/// says so.
pub(crate) fn port(network: Uuid, host: &str, last: u8, more: &Value) -> Value {
    let mut spec = json!({
        "network": network,
        "host": host,
        "mac": mac(last),
        "fixed_ips": [{"subnet": "main", "address": format!("10.7.0.{last}")}],
        "port_security": false,
    });
    for (key, value) in more.as_object().unwrap() {
        spec[key] = value.clone();
    }
    spec
}

pub(crate) fn mac(last: u8) -> String {
    format!("fa:16:3e:00:00:{last:02x}")
}

/// The first eleven characters of an id, as names of links have them.
pub(crate) fn short(id: Uuid) -> String {
    id.to_string().chars().take(11).collect()
}

/// A guest: a namespace whose `eth0` is the other end of a port's tap. Its port's owner is
/// `external`, since a tap alone has nobody behind it.
#[derive(Debug)]
pub(crate) struct Guest {
    name: String,
    folder: tempfile::TempDir,
}

/// What a guest's DHCP client was told, by the client's own names.
pub(crate) type Told = BTreeMap<String, String>;

impl Guest {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) async fn start(name: &str, port: Uuid, mac: &str) -> Self {
        let tap = format!("tap{}", short(port));
        run(&format!("ip netns add {name}")).await;
        run(&format!("ip link add {tap} type veth peer name eth0 address {mac} netns {name}"))
            .await;
        run(&format!("ip -n {name} link set eth0 up")).await;
        run(&format!("ip -n {name} link set lo up")).await;
        Self { name: name.to_owned(), folder: tempfile::tempdir_in("/tmp").unwrap() }
    }

    pub(crate) async fn run(&self, line: &str) -> String {
        run(&format!("ip netns exec {} {line}", self.name)).await
    }

    pub(crate) async fn try_run(&self, line: &str) -> Result<String, String> {
        try_run(&format!("ip netns exec {} {line}", self.name)).await
    }

    pub(crate) async fn reaches(&self, address: &str) -> bool {
        self.try_run(&format!("ping -c 1 -W 2 {address}")).await.is_ok()
    }

    /// Gets a lease by busybox's client and configures `eth0` with it. It asks for long: the kernel
    /// takes a new link into a bridge in a moment of its own choice, and drops what comes before.
    pub(crate) async fn udhcpc(&self, options: &str) -> Result<Told, String> {
        let script = self.folder.path().join("script");
        let told = self.folder.path().join("told");
        let body = format!(
            "#!/bin/sh\n[ \"$1\" = bound ] || [ \"$1\" = renew ] || exit 0\nenv > {told}\n\
             ip address flush dev eth0\nip address add $ip/$mask dev eth0\n\
             ip link set eth0 mtu ${{mtu:-1500}}\n",
            told = told.display()
        );
        std::fs::write(&script, body).unwrap();
        make_executable(&script.display().to_string());
        drop(std::fs::remove_file(&told));
        let line = format!(
            "busybox udhcpc -f -n -q -i eth0 -t 20 -T 1 -O mtu -O staticroutes -O 26 {options} -s {}",
            script.display()
        );
        if let Err(error) = self.try_run(&line).await {
            let ports = run("bridge -d link").await;
            let counters = run("ip -s -s link").await;
            return Err(format!("{error}\n{ports}\n{counters}"));
        }
        Ok(self::told(&told.display().to_string()))
    }

    /// Has Kea's tester make exchanges with a server; both halves of most of them must be answered.
    pub(crate) async fn perfdhcp(&self, options: &str) {
        // 3: one was not answered in time, as may be where others keep the machine busy.
        let line =
            format!("perfdhcp -R 1 -n 20 -r 20 -d 10 -W 2000000 -l eth0 {options} || [ $? = 3 ]");
        let inside = ["netns", "exec", &self.name, "sh", "-c", &line];
        let mut told = String::new();
        for _ in 0..5 {
            let tester = Program::new("/usr/sbin/ip").args(inside).limit(Duration::from_secs(60));
            told = tester.run().await.unwrap().text();
            let received = told.lines().filter_map(|line| line.strip_prefix("received packets: "));
            let received: Vec<u32> =
                received.map(|number| number.trim().parse().unwrap()).collect();
            if received.len() == 2 && received.iter().all(|number| *number >= 10) {
                return;
            }
        }
        panic!("{told}");
    }

    /// Gets a lease by ISC's client, and lets it renew once.
    pub(crate) async fn dhclient(&self) -> Told {
        let file = |name: &str| self.folder.path().join(name).display().to_string();
        let body = format!(
            "#!/bin/sh\ncase $reason in BOUND|REBOOT|RENEW) env > {told}.new; mv {told}.new {told};; \
             PREINIT) ip link set eth0 up;; esac\n\
             case $reason in BOUND|REBOOT) ip address replace $new_ip_address/24 dev eth0;; esac\n\
             printf '%s\\n' \"$reason\" >> {reasons}\n",
            reasons = file("reasons"),
            told = file("isc-told"),
        );
        std::fs::write(file("isc-script"), body).unwrap();
        make_executable(&file("isc-script"));
        std::fs::write(file("leases"), "").unwrap();
        let conf = "timeout 10;\ninitial-interval 1;\nrequest subnet-mask, routers, domain-name, \
                    domain-name-servers, interface-mtu, host-name;\n";
        std::fs::write(file("conf"), conf).unwrap();
        let arguments = format!(
            "netns exec {} dhclient -4 -1 -d -cf {} -lf {} -pf {} -sf {} eth0",
            self.name,
            file("conf"),
            file("leases"),
            file("pid"),
            file("isc-script"),
        );
        let client = Program::new("/usr/sbin/ip")
            .args(arguments.split_whitespace())
            .limit(Duration::from_secs(60));
        let reasons = file("reasons");
        let renewed = stackhand_testkit::wait_for(
            Duration::from_secs(30),
            "dhclient to be bound and to renew",
            || async {
                let text = std::fs::read_to_string(&reasons).unwrap_or_default();
                text.contains("RENEW").then_some(())
            },
        );
        tokio::select! {
            () = renewed => {}
            ended = client.run() => panic!("dhclient ended: {ended:?}"),
        }
        told(&file("isc-told"))
    }
}

pub(crate) fn make_executable(path: &str) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

pub(crate) fn told(path: &str) -> Told {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}
