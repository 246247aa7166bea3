use std::fs;

use serde_json::json;
use stackhand_model::{Document, ErrorCode};
use stackhand_runtime::agent::{Cause, Held};
use tempfile::TempDir;
use uuid::Uuid;

use super::*;
use crate::hypervisor::Power;
use crate::hypervisor::fake::FakeHypervisor;

const INSTANCE: InstanceId = InstanceId(Uuid::from_u128(1 << 100));

/// An agent on a hypervisor in memory, with real files.
struct Bench {
    root: TempDir,
    agent: ComputeAgent<FakeHypervisor>,
    desired: Desired,
}

impl Bench {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("vmlinuz"), "kernel").unwrap();
        let agent = Self::agent(&root);
        let mut bench = Self { root, agent, desired: Desired::default() };
        let source = bench.root.path().join("vmlinuz");
        bench.want(document("Image", 9, &json!({"source": source, "format": "kernel"})), false);
        bench
    }

    fn agent(root: &TempDir) -> ComputeAgent<FakeHypervisor> {
        let hypervisor = FakeHypervisor::default();
        let section = ComputeSection { image_cache_hours: 0, ..ComputeSection::default() };
        ComputeAgent::new("here", root.path(), &section, hypervisor, Wake::new())
    }

    fn want(&mut self, document: Document, deleting: bool) {
        let held = Held { document: Arc::new(document), deleting };
        self.desired.objects.insert(held.document.object(), held);
    }

    async fn pass(&mut self) -> PassReport {
        let due = self.desired.objects.keys().copied().collect();
        let desired = Arc::new(self.desired.clone());
        let report = self.agent.pass(Work { desired, due, cause: Cause::Timer }).await;
        // The probe is asked for by a pass and answers in the background.
        while self.agent.memory().probing {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for (object, outcome) in &report.outcomes {
            if *outcome == Outcome::Gone {
                self.desired.objects.remove(object);
            }
        }
        report
    }

    async fn settle(&mut self) -> PassReport {
        for _ in 0..100 {
            let fetching = self.agent.fetches.states().values().any(|f| f.failure.is_none())
                || self.agent.memory().probing;
            let report = self.pass().await;
            if report.writes == 0 && !fetching {
                return report;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("does not come to rest");
    }

    fn power(&self) -> Option<Power> {
        self.agent.hypervisor.host().domains.get(&INSTANCE.0).map(|domain| domain.power)
    }

    async fn act(&self, name: &str, params: Value) -> Result<Value, Refusal> {
        let document = Arc::clone(&self.desired.objects[&INSTANCE.object()].document);
        let (object, name) = (document.object(), name.to_owned());
        let request_id = "req-test".to_owned();
        self.agent.act(Action { object, document, name, params, request_id }).await
    }
}

fn document(kind: &str, id: u128, spec: &Value) -> Document {
    let (name, id) = (format!("{}{id}", kind.to_lowercase()), Uuid::from_u128(id));
    let document = json!({"kind": kind, "id": id, "name": name, "generation": 1, "spec": spec});
    Document::from_value(&document).unwrap()
}

fn instance(fields: Value) -> Document {
    let mut spec =
        json!({"host": "here", "vcpus": 1, "memory_mib": 64, "kernel": Uuid::from_u128(9)});
    if let Value::Object(fields) = fields {
        spec.as_object_mut().unwrap().extend(fields);
    }
    document("Instance", 1 << 100, &spec)
}

fn reason(report: &PassReport) -> &str {
    match &report.outcomes[&INSTANCE.object()] {
        Outcome::Pending { reason, .. } | Outcome::Failed { reason, .. } => reason,
        other => panic!("came out as {other:?}"),
    }
}

#[tokio::test]
async fn an_instance_arrives_rests_and_leaves_nothing() {
    let mut bench = Bench::new();
    bench.want(instance(json!({})), false);
    let planned = bench.agent.plan(Arc::new(bench.desired.clone())).await.unwrap();
    assert!(planned.iter().any(|step| step.change.starts_with("fetch image")), "{planned:?}");
    bench.settle().await;
    assert_eq!(bench.power(), Some(Power::Running));
    assert_eq!(bench.agent.plan(Arc::new(bench.desired.clone())).await.unwrap(), []);
    for held in bench.desired.objects.values_mut() {
        held.deleting = true;
    }
    bench.settle().await;
    assert_eq!(bench.power(), None);
    let left = |name: &str| fs::read_dir(bench.root.path().join(name)).unwrap().count();
    assert_eq!((left("instances"), left("images"), bench.desired.objects.len()), (0, 0, 0));
}

#[tokio::test]
async fn one_refused_domain_does_not_stop_another_and_heals() {
    let mut bench = Bench::new();
    let other = InstanceId(Uuid::from_u128(2 << 100));
    let spec = instance(json!({})).to_value()["spec"].clone();
    bench.want(instance(json!({})), false);
    bench.want(document("Instance", 2 << 100, &spec), false);
    bench.agent.hypervisor.host().broken.insert(INSTANCE.0);
    for _ in 0..20 {
        bench.pass().await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let report = bench.pass().await;
    assert!(matches!(report.outcomes[&INSTANCE.object()], Outcome::Failed { .. }), "{report:?}");
    assert!(matches!(report.outcomes[&other.object()], Outcome::Active { .. }), "{report:?}");
    bench.agent.hypervisor.host().broken.clear();
    bench.settle().await;
    assert_eq!(bench.power(), Some(Power::Running));
}

#[tokio::test]
async fn without_libvirt_instances_wait_and_images_do_not() {
    let mut bench = Bench::new();
    bench.agent.hypervisor.host().away = true;
    bench.want(instance(json!({})), false);
    let report = bench.settle().await;
    assert_eq!(reason(&report), "libvirt at fake is away: told so");
    let image = ImageId(Uuid::from_u128(9)).object();
    assert!(matches!(report.outcomes[&image], Outcome::Active { .. }), "{report:?}");
    assert_eq!(bench.act("start", Value::Null).await.unwrap_err().code, ErrorCode::Unavailable);
}

#[tokio::test]
async fn the_engine_is_probed_once_per_boot_and_told() {
    let mut bench = Bench::new();
    bench.settle().await;
    let facts = bench.agent.facts().await;
    assert_eq!(facts["virt_type"], "qemu");
    let troubles = bench.agent.troubles();
    assert!(troubles[0].starts_with("guests run without KVM, slowly:"), "{troubles:?}");
    // A new agent on the same host does not try again.
    bench.agent = Bench::agent(&bench.root);
    bench.agent.hypervisor.host().kvm = true;
    bench.settle().await;
    assert_eq!(bench.agent.facts().await["virt_type"], "qemu");
    fs::remove_file(bench.root.path().join("virt-type.json")).unwrap();
    bench.agent = Bench::agent(&bench.root);
    bench.agent.hypervisor.host().kvm = true;
    bench.settle().await;
    assert_eq!(bench.agent.facts().await["virt_type"], "kvm");
}

#[tokio::test]
async fn what_an_action_holds_is_left_alone_by_a_pass() {
    let mut bench = Bench::new();
    bench.want(instance(json!({})), false);
    bench.settle().await;
    let lock = bench.agent.lock_of(INSTANCE);
    let guard = lock.lock().await;
    bench.agent.hypervisor.host().domains.clear();
    let report = bench.pass().await;
    assert_eq!((reason(&report), report.writes), ("an action is under way", 0));
    drop(guard);
    bench.settle().await;
    assert_eq!(bench.power(), Some(Power::Running));
}

#[tokio::test]
async fn actions_in_the_wrong_state_and_unknown_ones_are_refused() {
    let mut bench = Bench::new();
    bench.want(instance(json!({"power_state": "shutoff"})), false);
    assert_eq!(bench.act("start", Value::Null).await.unwrap_err().code, ErrorCode::WrongState);
    bench.settle().await;
    for (name, params, code) in [
        ("pause", Value::Null, ErrorCode::WrongState),
        ("reboot", Value::Null, ErrorCode::WrongState),
        ("reboot", json!({"type": "gentle"}), ErrorCode::BadRequest),
        ("console-log", json!({"kib": 0}), ErrorCode::BadRequest),
        ("console-log", json!({"kib": "all"}), ErrorCode::BadRequest),
        ("explode", Value::Null, ErrorCode::Unsupported),
    ] {
        let refusal = bench.act(name, params).await.unwrap_err();
        assert_eq!((refusal.code, refusal.object), (code, Some(INSTANCE.object())), "{name}");
    }
    let log = bench.act("console-log", Value::Null).await.unwrap();
    assert_eq!(log, json!({"log": "", "truncated": false, "next": 0}));
}

#[tokio::test]
async fn consoles_have_one_holder_and_screens_and_disks_become_pictures() {
    use base64::Engine as _;
    let base64 = base64::engine::general_purpose::STANDARD;
    let mut bench = Bench::new();
    bench.want(instance(json!({"root_disk_gib": 1})), false);
    bench.settle().await;
    let session = bench.act("console-open", Value::Null).await.unwrap()["session"].clone();
    let code = |answer: Result<Value, Refusal>| answer.unwrap_err().code;
    assert_eq!(code(bench.act("console-open", Value::Null).await), ErrorCode::Conflict);
    let io = |session: &Value, text: &str| json!({"session": session, "input": base64.encode(text), "wait_ms": 2000});
    let said = bench.act("console-io", io(&session, "hello")).await.unwrap();
    assert_eq!(said, json!({"output": base64.encode("hello"), "closed": false}));
    let other = bench.act("console-open", json!({"force": true})).await.unwrap()["session"].clone();
    assert_eq!(code(bench.act("console-io", io(&session, "x")).await), ErrorCode::WrongState);
    bench.act("console-close", json!({"session": session})).await.unwrap();
    assert!(bench.act("console-io", io(&other, "x")).await.is_ok(), "closed by its holder alone");
    bench.act("console-close", json!({"session": other})).await.unwrap();
    assert_eq!(code(bench.act("console-io", io(&other, "x")).await), ErrorCode::WrongState);
    let garbled = json!({"session": other, "input": "no base64!"});
    assert_eq!(code(bench.act("console-io", garbled).await), ErrorCode::BadRequest);

    let png = bench.act("screenshot", Value::Null).await.unwrap()["png"].clone();
    assert!(base64.decode(png.as_str().unwrap()).unwrap().starts_with(b"\x89PNG"));
    let bad = json!({"name": "../../etc/passwd"});
    assert_eq!(code(bench.act("snapshot", bad).await), ErrorCode::BadRequest);
    let image = bench.act("snapshot", json!({"name": "web-1"})).await.unwrap();
    assert_eq!(fs::read(image["path"].as_str().unwrap()).unwrap(), b"a copy");
    let again = bench.act("snapshot", json!({"name": "web-1"})).await;
    assert_eq!(code(again), ErrorCode::Conflict);
    assert!(!bench.agent.store.copy(INSTANCE).exists());
}

#[tokio::test]
async fn what_an_instance_needs_must_be_left_on_the_host() {
    let mut bench = Bench::new();
    bench.want(instance(json!({"memory_mib": 3000})), false);
    bench.settle().await;
    assert_eq!(bench.power(), Some(Power::Running));
    // 4096 MiB in all, 512 kept for the host.
    let spec = instance(json!({"memory_mib": 1000})).to_value()["spec"].clone();
    bench.want(document("Instance", 2 << 100, &spec), false);
    let other = InstanceId(Uuid::from_u128(2 << 100));
    let report = bench.settle().await;
    let Outcome::Failed { reason, .. } = &report.outcomes[&other.object()] else {
        panic!("{report:?}")
    };
    assert!(reason.contains("needs 1000 MiB of memory, and this host has 584 left"), "{reason}");
    assert!(!bench.agent.store.path(other).exists(), "nothing is half made");
    assert_eq!(bench.agent.facts().await["capacity"]["vcpus"], 8);
}

#[test]
fn what_can_never_work_is_refused_at_the_door() {
    let bench = Bench::new();
    let judge = |document: Document| {
        let mut wanted = bench.desired.clone();
        let object = document.object();
        let held = Held { document: Arc::new(document), deleting: false };
        wanted.objects.insert(object, held);
        bench.agent.admit(&wanted, &BTreeSet::from([object]))
    };
    judge(instance(json!({}))).unwrap();
    for (fields, code, field) in [
        (json!({"host": "there"}), ErrorCode::BadRequest, "spec.host"),
        (json!({"command_line": "a\u{1}b"}), ErrorCode::BadRequest, "spec.command_line"),
        (json!({"image": Uuid::from_u128(9)}), ErrorCode::BadRequest, "spec.image"),
        (json!({"cdrom": Uuid::from_u128(9)}), ErrorCode::BadRequest, "spec.cdrom"),
    ] {
        let refusal = judge(instance(fields.clone())).unwrap_err();
        assert_eq!((refusal.code, refusal.field.as_deref()), (code, Some(field)), "{fields}");
    }
}
