//! Whole commands against agents in this process.

use stackhand_model::{AgentKind, Connection, Kind, Spec};

use crate::exit::Exit;
use crate::testing::Cloud;

const WEB: &str = "
kind: Network
name: int1
spec: {type: vxlan, subnets: [{name: s, cidr: 192.168.0.0/24, gateway: 192.168.0.254}]}
---
kind: Port
name: web
spec: {network: int1}
---
kind: Image
name: tiny
spec: {source: /srv/tiny.qcow2, format: qcow2}
---
kind: Volume
name: data
spec: {size_gib: 1}
---
kind: Instance
name: demo
spec: {host: '${HOST}', vcpus: 1, memory_mib: 64, image: tiny, ports: [web], volumes: [data]}
";

struct Manifest {
    folder: tempfile::TempDir,
}

impl Manifest {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("m.yaml"), text).unwrap();
        Self { folder }
    }

    fn path(&self) -> String {
        self.folder.path().join("m.yaml").display().to_string()
    }
}

#[tokio::test]
async fn list_shows_every_agent_and_tells_by_its_exit_that_one_is_down() {
    let cloud = Cloud::start(&["node1"]).await;
    let all_well = cloud.run(&["list"]).await;
    assert_eq!(all_well.exit, Exit::Well, "{all_well:?}");
    assert_eq!(all_well.out.matches(":-)").count(), 3, "{}", all_well.out);

    let mut gone = cloud.agent("node1", AgentKind::Network).report(0);
    gone.host = "node2".into();
    gone.id = stackhand_runtime::report::agent_id("default", "node2", AgentKind::Network);
    gone.sent_at = jiff::Timestamp::now() - std::time::Duration::from_secs(40);
    gone.reasons = vec!["libvirt gone".into()];
    cloud.report(&gone).await;
    let one_down = cloud.run(&["list"]).await;
    assert_eq!(one_down.exit, Exit::NotWell);
    let line = one_down.out.lines().last().unwrap();
    assert!(line.contains("node2  nova  xxx    enabled"), "{}", one_down.out);
    assert!(line.ends_with("no heartbeat for 40s; last word: libvirt gone"), "{line}");

    let down = cloud.run(&["list", "--down", "-o", "json"]).await;
    let rows: serde_json::Value = serde_json::from_str(&down.out).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!(rows[0]["host"], "node2");
    let filtered = cloud.run(&["list", "--host", "node1", "--type", "storage"]).await;
    assert_eq!((filtered.exit, filtered.out.lines().count()), (Exit::Well, 2));
    let nobody = cloud.run(&["list", "--host", "nod1"]).await;
    assert_eq!(nobody.exit, Exit::Usage);
    assert_eq!(nobody.err, "agentctl: no agent is known on host \"nod1\"; did you mean node1?\n");
}

#[tokio::test]
async fn a_manifest_is_applied_storage_first_and_the_connection_comes_from_storage() {
    let cloud = Cloud::start(&["node1"]).await;
    let manifest = Manifest::new(WEB);
    let line = ["apply", "-f", &manifest.path(), "--set", "HOST=node1", "--wait"];
    let applied = cloud.run(&line).await;
    assert_eq!(applied.exit, Exit::Well, "{applied:?}");
    let expected = "\
ACTION  KIND        NAME       HOST
create  Network     int1       node1
create  Port        web        node1
create  Image       tiny       node1
create  Volume      data       node1
create  Attachment  demo-data  node1
create  Instance    demo       node1
";
    assert_eq!(applied.out, expected);
    let compute = cloud.agent("node1", AgentKind::Compute);
    assert_eq!(compute.take_log(), ["apply Image tiny", "apply Instance demo"]);
    let instance = compute.document(Kind::Instance, "demo").unwrap();
    let Spec::Instance(spec) = &instance.spec else { panic!() };
    assert_eq!(spec.volumes[0].connection, Connection::Block { path: "/dev/vg/data".into() });
    assert_eq!(instance.generation, 1);
    assert!(applied.err.contains("Instance demo on node1: active"), "{}", applied.err);

    // Once more: nothing is sent, nothing changes.
    cloud.agent("node1", AgentKind::Network).take_log();
    cloud.agent("node1", AgentKind::Storage).take_log();
    let again = cloud.run(&line).await;
    assert_eq!(again.exit, Exit::Well);
    assert_eq!(again.out.matches("unchanged").count(), 6, "{}", again.out);
    for agent in cloud.agents.values() {
        assert_eq!(agent.take_log(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn nothing_is_sent_when_one_agent_refuses_or_in_a_dry_run() {
    let cloud = Cloud::start(&["node1"]).await;
    let manifest = Manifest::new(WEB);
    let dry =
        cloud.run(&["apply", "-f", &manifest.path(), "--set", "HOST=node1", "--dry-run"]).await;
    assert_eq!(dry.exit, Exit::Well, "{dry:?}");
    assert!(dry.out.contains("create  Instance    demo"), "{}", dry.out);
    cloud.agent("node1", AgentKind::Compute).refuse(Kind::Instance);
    let refused = cloud.run(&["apply", "-f", &manifest.path(), "--set", "HOST=node1"]).await;
    assert_eq!(refused.exit, Exit::Usage);
    assert_eq!(
        refused.err,
        "agentctl: compute-agent on node1 refuses: Instance demo cannot be here\n"
    );
    for agent in cloud.agents.values() {
        assert_eq!(agent.names(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn objects_that_are_not_there_in_time_are_told_with_the_reason() {
    let cloud = Cloud::start(&["node1"]).await;
    cloud.agent("node1", AgentKind::Network).keep_pending(Kind::Port, "the tap is missing");
    let manifest = Manifest::new(WEB);
    let line = ["apply", "-f", &manifest.path(), "--set", "HOST=node1", "--wait=1"];
    let late = cloud.run(&line).await;
    assert_eq!(late.exit, Exit::NotWell, "{late:?}");
    let told = "agentctl: Port web on node1 is not active after 1s: the tap is missing";
    assert!(late.err.contains(told), "{}", late.err);
}

#[tokio::test]
async fn an_instance_is_not_sent_while_its_volume_is_not_attached() {
    let cloud = Cloud::start(&["node1"]).await;
    let storage = cloud.agent("node1", AgentKind::Storage);
    storage.keep_pending(Kind::Attachment, "the export is being made");
    let manifest = Manifest::new(WEB);
    let line = ["apply", "-f", &manifest.path(), "--set", "HOST=node1", "--wait=1"];
    let late = cloud.run(&line).await;
    assert_eq!(late.exit, Exit::NotWell);
    assert!(late.err.contains("instances wait for their volumes"), "{}", late.err);
    let compute = cloud.agent("node1", AgentKind::Compute);
    assert_eq!(compute.names(), ["Image tiny"]);
}

#[tokio::test]
async fn a_manifest_is_deleted_in_reverse_with_what_was_made_for_it() {
    let cloud = Cloud::start(&["node1"]).await;
    let manifest = Manifest::new(WEB);
    cloud.run(&["apply", "-f", &manifest.path(), "--set", "HOST=node1"]).await;
    let storage = cloud.agent("node1", AgentKind::Storage);
    storage.take_log();
    let line = ["delete", "-f", &manifest.path(), "--set", "HOST=node1", "--wait"];
    let deleted = cloud.run(&line).await;
    assert_eq!(deleted.exit, Exit::Well, "{deleted:?}");
    assert_eq!(storage.take_log(), ["delete Attachment demo-data", "delete Volume data"]);
    for agent in cloud.agents.values() {
        assert_eq!(agent.names(), Vec::<String>::new());
    }
    let first = deleted.out.lines().nth(1).unwrap();
    assert!(first.starts_with("delete  Instance"), "{}", deleted.out);
    let again = cloud.run(&line).await;
    assert_eq!((again.exit, again.out.matches("absent").count()), (Exit::Well, 6), "{again:?}");
}

#[tokio::test]
async fn deleting_an_instance_lets_its_volumes_go_and_keeps_them() {
    let cloud = Cloud::start(&["node1"]).await;
    let manifest = Manifest::new(WEB);
    cloud.run(&["apply", "-f", &manifest.path(), "--set", "HOST=node1"]).await;
    let deleted = cloud.run(&["delete", "instance", "demo"]).await;
    assert_eq!(deleted.exit, Exit::Well, "{deleted:?}");
    assert_eq!(cloud.agent("node1", AgentKind::Storage).names(), ["Volume data"]);
    let unknown = cloud.run(&["delete", "volume", "dato"]).await;
    assert_eq!(unknown.err, "agentctl: no agent holds a Volume \"dato\"; did you mean \"data\"?\n");
}

#[tokio::test]
async fn get_lists_objects_by_kind_and_describe_shows_one() {
    let cloud = Cloud::start(&["node1"]).await;
    let manifest = Manifest::new(WEB);
    cloud.run(&["apply", "-f", &manifest.path(), "--set", "HOST=node1"]).await;
    let ports = cloud.run(&["get", "ports"]).await;
    let mut lines = ports.out.lines();
    let head: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(
        head,
        ["NAME", "ID", "NETWORK", "MAC", "ADDRESSES", "HOST", "STATE", "HOSTS", "REASON"]
    );
    let cells: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!((cells[0], cells[2], cells[4], cells[6]), ("web", "int1", "192.168.0.2", "active"));
    let wide = cloud.run(&["get", "instances", "-o", "wide"]).await;
    let shown: Vec<&str> = wide.out.lines().nth(1).unwrap().split_whitespace().collect();
    for cell in ["tiny", "web", "192.168.0.2", "data"] {
        assert!(shown.contains(&cell), "{cell} in {}", wide.out);
    }
    let all = cloud.run(&["get"]).await;
    assert_eq!(all.out.lines().count(), 7, "{}", all.out);
    let one = cloud.run(&["describe", "instance", "demo", "-o", "json"]).await;
    let one: serde_json::Value = serde_json::from_str(&one.out).unwrap();
    assert_eq!(one["document"]["spec"]["vcpus"], 1);
    assert_eq!(one["held_by"][0]["host"], "node1");
    let events = one["events"].as_array().unwrap();
    let object = format!("Instance/{}", one["id"].as_str().unwrap());
    assert!(!events.is_empty() && events.iter().all(|event| event["object"] == object), "{one:#}");
    let missing = cloud.run(&["get", "instance", "demi"]).await;
    assert_eq!(missing.exit, Exit::Failure);
    assert!(missing.err.contains("did you mean \"demo\"?"), "{}", missing.err);
}

#[tokio::test]
async fn an_export_can_be_applied_again_without_a_change() {
    let cloud = Cloud::start(&["node1"]).await;
    let manifest = Manifest::new(WEB);
    cloud.run(&["apply", "-f", &manifest.path(), "--set", "HOST=node1"]).await;
    let exported = cloud.run(&["export"]).await;
    let again = Manifest::new(&exported.out);
    let applied = cloud.run(&["apply", "-f", &again.path()]).await;
    assert_eq!(applied.exit, Exit::Well, "{applied:?}");
    assert_eq!(applied.out.matches("unchanged").count(), 6, "{}", applied.out);
}

#[tokio::test]
async fn a_disabled_host_is_not_chosen_and_its_reason_is_kept() {
    let cloud = Cloud::start(&["node1", "node2"]).await;
    let set = cloud.run(&["host", "disable", "node1", "--reason", "new fan"]).await;
    assert_eq!(set.exit, Exit::Well, "{set:?}");
    assert!(set.out.contains("node1  compute  disabled  new fan"), "{}", set.out);
    for agent in AgentKind::ALL {
        cloud.report(&cloud.agent("node1", agent).report(0)).await;
    }
    let manifest = Manifest::new(&WEB.replace("host: '${HOST}', ", ""));
    let applied = cloud.run(&["apply", "-f", &manifest.path()]).await;
    assert_eq!(applied.exit, Exit::Well, "{applied:?}");
    assert!(cloud.agent("node1", AgentKind::Compute).names().is_empty());
    assert!(!cloud.agent("node2", AgentKind::Compute).names().is_empty());
}

#[tokio::test]
async fn an_agent_is_paused_with_a_reason_and_resumed() {
    let cloud = Cloud::start(&["node1"]).await;
    let line = ["host", "pause", "node1", "--type", "network", "--reason", "looking at bridges"];
    let paused = cloud.run(&line).await;
    assert_eq!(paused.exit, Exit::Well, "{paused:?}");
    assert_eq!(paused.out.lines().count(), 2, "{}", paused.out);
    assert!(paused.out.contains("node1  network  paused  looking at bridges"), "{}", paused.out);
    cloud.report(&cloud.agent("node1", AgentKind::Network).report(0)).await;
    let listed = cloud.run(&["list", "--type", "network"]).await;
    assert!(listed.out.contains("paused: looking at bridges"), "{}", listed.out);
    let resumed = cloud.run(&["host", "resume", "node1"]).await;
    assert_eq!((resumed.exit, resumed.out.matches("enabled").count()), (Exit::Well, 3));
}

#[tokio::test]
async fn only_one_controller_applies_at_a_time() {
    use stackhand_bus::Transport as _;
    let cloud = Cloud::start(&["node1"]).await;
    let bus = cloud.broker.transport();
    let held =
        bus.lock("stackhand.apply.default", std::time::Duration::from_secs(1)).await.unwrap();
    let manifest = Manifest::new(WEB);
    let line = ["apply", "-f", &manifest.path(), "--set", "HOST=node1", "--timeout", "1"];
    let busy = cloud.run(&line).await;
    assert_eq!(busy.exit, Exit::Failure);
    assert!(busy.err.contains("is another apply running?"), "{}", busy.err);
    drop(held);
    assert_eq!(cloud.run(&line).await.exit, Exit::Well);
}

#[tokio::test]
async fn ping_wait_act_and_facts_reach_the_agents() {
    let cloud = Cloud::start(&["node1"]).await;
    let ping = cloud.run(&["ping", "-o", "json"]).await;
    assert_eq!((ping.exit, ping.out.matches("\"answered\": true").count()), (Exit::Well, 3));
    let facts = cloud.run(&["facts", "--type", "compute"]).await;
    assert!(facts.out.contains("iqn.2026-11.org.x:node1"), "{}", facts.out);
    let manifest = Manifest::new(WEB);
    cloud.run(&["apply", "-f", &manifest.path(), "--set", "HOST=node1"]).await;
    let waited = cloud.run(&["wait", "instance/demo", "port/web"]).await;
    assert_eq!(waited.exit, Exit::Well, "{waited:?}");
    let gone = cloud.run(&["wait", "instance/demo", "--for", "gone", "--seconds", "1"]).await;
    assert_eq!(gone.exit, Exit::NotWell, "{gone:?}");
    let acted = cloud.run(&["act", "instance/demo", "reboot", "--param", "hard=true"]).await;
    assert!(acted.out.contains("did: reboot"), "{acted:?}");
    assert!(acted.out.contains("hard: true"), "{acted:?}");
    let waited = cloud.run(&["act", "instance/demo", "reboot", "--wait"]).await;
    assert!(waited.err.contains("Instance demo on node1: active"), "{waited:?}");
}

#[tokio::test]
async fn an_action_that_is_not_over_in_time_is_told_with_the_reason() {
    let cloud = Cloud::start(&["node1"]).await;
    cloud.agent("node1", AgentKind::Compute).keep_pending(Kind::Instance, "boots, 40 % done");
    let manifest = Manifest::new(WEB);
    cloud.run(&["apply", "-f", &manifest.path(), "--set", "HOST=node1"]).await;
    let late = cloud.run(&["act", "instance/demo", "reboot", "--wait=1"]).await;
    assert_eq!(late.exit, Exit::NotWell, "{late:?}");
    assert!(late.err.contains("is not done after 1s: boots, 40 % done"), "{late:?}");
}

#[tokio::test]
async fn a_wrong_manifest_is_told_before_anything_is_sent() {
    let cloud = Cloud::start(&["node1"]).await;
    let manifest =
        Manifest::new(&WEB.replace("vcpus: 1", "vcpos: 1").replace("192.168.0.254", "1.1.1.1"));
    let wrong = cloud.run(&["apply", "-f", &manifest.path(), "--set", "HOST=node1"]).await;
    assert_eq!(wrong.exit, Exit::Usage);
    assert_eq!(wrong.err.lines().count(), 2, "{}", wrong.err);
    assert!(
        wrong.err.contains(
            "m.yaml:4:72: Network int1: spec.subnets[0].gateway: 1.1.1.1 is not in 192.168.0.0/24"
        ),
        "{}",
        wrong.err
    );
    assert!(wrong.err.contains("did you mean `vcpus`?"), "{}", wrong.err);
    let unset = cloud.run(&["apply", "-f", &manifest.path()]).await;
    assert!(
        unset.err.contains("${HOST} has no value; give one with --set HOST=…"),
        "{}",
        unset.err
    );
}
