//! A loop that drives the agent as the runtime would.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use stackhand_compute::agent::ComputeAgent;
use stackhand_compute::config::{ComputeSection, VirtType};
use stackhand_compute::libvirt::Libvirt;
use stackhand_model::{Document, ErrorCode, ObjectRef};
use stackhand_runtime::agent::{
    Action, Agent, Cause, Desired, Held, Outcome, PassReport, Refusal, Work,
};
use stackhand_runtime::wake::Wake;
pub(crate) use stackhand_testkit::guest::{Libvirtd, UP, kernel, ramdisk, run};
use stackhand_testkit::wait_for;
use uuid::Uuid;

pub(crate) fn document(kind: &str, id: u128, generation: u64, spec: &Value) -> Document {
    let (name, id) = (format!("{}{id}", kind.to_lowercase()), Uuid::from_u128(id));
    Document::from_value(&json!({
        "kind": kind, "id": id, "name": name, "generation": generation, "spec": spec,
    }))
    .unwrap()
}

/// An agent and a loop that makes passes all the time, as the runtime does on events.
pub(crate) struct Driven {
    pub(crate) agent: Arc<ComputeAgent<Libvirt>>,
    shared: Arc<Mutex<Shared>>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    desired: Desired,
    last: PassReport,
    revision_of_last: u64,
    writes: u64,
    passes: u64,
    /// Why anything ever waited or failed, for what is told in one pass alone.
    told: BTreeSet<String>,
}

impl Driven {
    pub(crate) fn new(state: &Path, uri: &str) -> Self {
        Self::with(state, uri, VirtType::Qemu, |agent| agent)
    }

    /// One whose guests run on that engine, and that was changed before it begins.
    pub(crate) fn with(
        state: &Path,
        uri: &str,
        virt_type: VirtType,
        change: impl FnOnce(ComputeAgent<Libvirt>) -> ComputeAgent<Libvirt>,
    ) -> Self {
        let section = ComputeSection {
            libvirt_uri: uri.to_owned(),
            virt_type,
            shutdown_timeout_seconds: 2,
            image_cache_hours: 0,
            ..ComputeSection::default()
        };
        let wake = Wake::new();
        let libvirt = Libvirt::new(uri, Arc::new(|_| {})).unwrap();
        let agent = change(ComputeAgent::new("here", state, &section, libvirt, wake));
        let agent = Arc::new(agent);
        let shared = Arc::new(Mutex::new(Shared::default()));
        let task = tokio::spawn({
            let (agent, shared) = (Arc::clone(&agent), Arc::clone(&shared));
            async move {
                loop {
                    let desired = Arc::new(shared.lock().unwrap().desired.clone());
                    let due = desired.objects.keys().copied().collect();
                    let revision = desired.revision;
                    let work = Work { desired, due, cause: Cause::Timer };
                    let report = agent.pass(work).await;
                    {
                        let mut shared = shared.lock().unwrap();
                        for (object, outcome) in &report.outcomes {
                            if let Outcome::Pending { reason, .. }
                            | Outcome::Failed { reason, .. } = outcome
                            {
                                shared.told.insert(reason.clone());
                            }
                            if *outcome == Outcome::Gone {
                                shared.desired.objects.remove(object);
                            }
                        }
                        shared.writes += report.writes;
                        shared.passes += 1;
                        shared.revision_of_last = revision;
                        shared.last = report;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        });
        Self { agent, shared, task }
    }

    pub(crate) fn want(&self, documents: impl IntoIterator<Item = Document>, deleting: bool) {
        let mut shared = self.shared.lock().unwrap();
        shared.desired.revision += 1;
        for document in documents {
            let held = Held { document: Arc::new(document), deleting };
            shared.desired.objects.insert(held.document.object(), held);
        }
    }

    /// Changes made to the host so far.
    pub(crate) fn writes(&self) -> u64 {
        self.shared.lock().unwrap().writes
    }

    /// Waits for so many more passes.
    pub(crate) async fn passes(&self, count: u64) {
        let target = self.shared.lock().unwrap().passes + count;
        wait_for(Duration::from_secs(30), "passes", async || {
            (self.shared.lock().unwrap().passes >= target).then_some(())
        })
        .await;
    }

    fn last(&self, object: ObjectRef) -> Option<Outcome> {
        let shared = self.shared.lock().unwrap();
        let fresh = shared.revision_of_last == shared.desired.revision;
        fresh.then(|| shared.last.outcomes.get(&object).cloned()).flatten()
    }

    /// Waits until an object comes out in a way that is good.
    pub(crate) async fn until<T>(
        &self,
        object: ObjectRef,
        what: &str,
        good: impl Fn(&Outcome) -> Option<T>,
    ) -> T {
        let found = Mutex::new(None);
        let waited = wait_for(Duration::from_secs(60), what, async || {
            *found.lock().unwrap() = self.last(object);
            found.lock().unwrap().as_ref().and_then(&good)
        });
        waited.await
    }

    pub(crate) async fn until_active(&self, object: ObjectRef) -> Value {
        self.until(object, &format!("{object} to be active"), |outcome| match outcome {
            Outcome::Active { observed } => Some(observed.facts(&object)),
            Outcome::Failed { reason, .. } => panic!("{object} failed: {reason}"),
            _ => None,
        })
        .await
    }

    /// Waits until an object waits or fails with a reason that contains `text`.
    pub(crate) async fn until_reason(&self, object: ObjectRef, text: &str) -> String {
        self.until(object, &format!("{object} to say {text:?}"), |outcome| match outcome {
            Outcome::Pending { reason, .. } | Outcome::Failed { reason, .. } => {
                reason.contains(text).then(|| reason.clone())
            }
            _ => None,
        })
        .await
    }

    /// Waits until a text was ever told as a reason.
    pub(crate) async fn until_told(&self, text: &str) {
        wait_for(Duration::from_secs(60), &format!("{text:?} to be told"), async || {
            let shared = self.shared.lock().unwrap();
            shared.told.iter().any(|reason| reason.contains(text)).then_some(())
        })
        .await;
    }

    pub(crate) async fn until_gone(&self, object: ObjectRef) {
        wait_for(Duration::from_secs(60), "the object to be gone", async || {
            let shared = self.shared.lock().unwrap();
            (!shared.desired.objects.contains_key(&object)).then_some(())
        })
        .await;
    }

    pub(crate) async fn act(
        &self,
        document: &Document,
        name: &str,
        params: Value,
    ) -> Result<Value, Refusal> {
        self.agent
            .act(Action {
                object: document.object(),
                document: Arc::new(document.clone()),
                name: name.to_owned(),
                params,
                request_id: "req-test".into(),
            })
            .await
    }

    /// Waits until the console log contains a text.
    pub(crate) async fn until_console(&self, document: &Document, text: &str) -> String {
        wait_for(Duration::from_secs(180), &format!("the console to say {text:?}"), async || {
            let log = self.act(document, "console-log", Value::Null).await.unwrap();
            let log = log["log"].as_str().unwrap().to_owned();
            log.contains(text).then_some(log)
        })
        .await
    }

    /// Types a line on the console and waits until what the guest says then contains a text.
    pub(crate) async fn talk(&self, instance: &Document, line: &str, expected: &str) -> String {
        let opened = self.act(instance, "console-open", Value::Null).await.unwrap();
        let session = &opened["session"];
        let twice = self.act(instance, "console-open", Value::Null).await.unwrap_err();
        assert_eq!(twice.code, ErrorCode::Conflict, "a console has one holder");
        let mut said = String::new();
        let mut input = STANDARD.encode(format!("{line}\n"));
        for _ in 0..200 {
            let io =
                json!({"session": session, "input": std::mem::take(&mut input), "wait_ms": 500});
            let answer = self.act(instance, "console-io", io).await.unwrap();
            let output = STANDARD.decode(answer["output"].as_str().unwrap()).unwrap();
            said.push_str(&String::from_utf8_lossy(&output));
            if said.contains(expected) {
                self.act(instance, "console-close", json!({"session": session})).await.unwrap();
                return said;
            }
        }
        panic!("the guest did not answer {expected:?}, but {said:?}");
    }

    /// Ends the agent at once, whatever it is doing.
    pub(crate) async fn kill(mut self) {
        self.task.abort();
        let _aborted = (&mut self.task).await;
    }
}

impl Drop for Driven {
    #[expect(clippy::print_stderr, reason = "what was waited for explains a failure")]
    fn drop(&mut self) {
        self.task.abort();
        if std::thread::panicking()
            && let Ok(shared) = self.shared.lock()
        {
            eprintln!("told: {:#?}\nlast: {:#?}", shared.told, shared.last.outcomes);
        }
    }
}
