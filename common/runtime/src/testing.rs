//! A toy agent on a toy host, for tests: names of documents say how their objects behave.
//!
//! | name | behaviour |
//! |---|---|
//! | `fails…` | every attempt fails |
//! | `panics…` | the pass panics |
//! | `waits…` | pending for ever |
//! | others | made in the first attempt, gone in the first after a delete |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use stackhand_model::{AgentKind, ErrorCode, ObjectRef};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use crate::agent::{
    Action, Agent, Cause, Desired, Outcome, PassReport, PlannedStep, Refusal, Work,
};
use crate::events::EventLog;
use crate::health::Health;
use crate::ledger::Ledger;
use crate::lifecycle::Shutdown;
use crate::metrics::Metrics;
use crate::reconcile::{Pace, Surroundings};
use crate::status::Statuses;
use crate::wake::Wake;

pub(crate) const PACE: Pace = Pace {
    resync: Duration::from_secs(300),
    retry_min: Duration::from_secs(1),
    retry_max: Duration::from_secs(60),
};

/// One pass as the agent saw it.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) at: Instant,
    pub(crate) cause: Cause,
    pub(crate) due: BTreeSet<ObjectRef>,
}

#[derive(Debug)]
pub(crate) struct Toy {
    /// Object → the generation that it was made from.
    pub(crate) host: Mutex<BTreeMap<ObjectRef, u64>>,
    seen: mpsc::UnboundedSender<Seen>,
    /// Passes that may go on.
    pub(crate) gate: Semaphore,
}

impl Toy {
    pub(crate) fn new() -> (Arc<Self>, mpsc::UnboundedReceiver<Seen>) {
        let (seen, passes) = mpsc::unbounded_channel();
        let gate = Semaphore::new(Semaphore::MAX_PERMITS);
        (Arc::new(Self { host: Mutex::default(), seen, gate }), passes)
    }

    fn changes(&self, wanted: &Desired) -> Vec<(ObjectRef, bool)> {
        let host = self.host.lock().unwrap();
        let differs = |(object, held): (&ObjectRef, &crate::agent::Held)| {
            let there = host.get(object).copied();
            let wanted = (!held.deleting).then_some(held.document.generation);
            (there != wanted).then_some((*object, held.deleting))
        };
        wanted.objects.iter().filter_map(differs).collect()
    }
}

impl Agent for Toy {
    const KIND: AgentKind = AgentKind::Network;

    fn admit(&self, wanted: &Desired, changed: &BTreeSet<ObjectRef>) -> Result<(), Refusal> {
        match changed.iter().find(|it| wanted.objects[it].document.name.as_str() == "never") {
            Some(object) => Err(Refusal::new(ErrorCode::Unsupported, "no such thing here")
                .about(*object)
                .at("name")),
            None => Ok(()),
        }
    }

    async fn plan(&self, wanted: Arc<Desired>) -> Result<Vec<PlannedStep>, Refusal> {
        let step = |(object, deleting): (ObjectRef, bool)| PlannedStep {
            object: Some(object),
            change: if deleting { "take away" } else { "make" }.to_owned(),
        };
        Ok(self.changes(&wanted).into_iter().map(step).collect())
    }

    async fn pass(&self, work: Work) -> PassReport {
        let seen = Seen { at: Instant::now(), cause: work.cause, due: work.due.clone() };
        // Tests that do not look are fine.
        let _ = self.seen.send(seen);
        self.gate.acquire().await.unwrap().forget();
        let mut report = PassReport::default();
        for object in &work.due {
            let held = &work.desired.objects[object];
            let name = held.document.name.as_str();
            let outcome = if name.starts_with("fails") {
                Outcome::failed("the toy does not want to")
            } else if name.starts_with("panics") {
                panic!("toy panic");
            } else if name.starts_with("waits") {
                Outcome::Pending { reason: "waits for a tap".into(), observed: Value::Null.into() }
            } else if held.deleting {
                report.writes += u64::from(self.host.lock().unwrap().remove(object).is_some());
                Outcome::Gone
            } else {
                let generation = held.document.generation;
                let before = self.host.lock().unwrap().insert(*object, generation);
                report.writes += u64::from(before != Some(generation));
                Outcome::Active { observed: json!({"generation": generation}).into() }
            };
            report.outcomes.insert(*object, outcome);
        }
        report
    }

    async fn act(&self, action: Action) -> Result<Value, Refusal> {
        match action.name.as_str() {
            "poke" => Ok(json!({"poked": action.object, "hard": action.params["hard"]})),
            other => {
                let message = format!("no action {other:?}; there is: poke");
                Err(Refusal::new(ErrorCode::Unsupported, message))
            }
        }
    }

    async fn facts(&self) -> Value {
        json!({"toy": true})
    }

    fn troubles(&self) -> Vec<String> {
        if self.host.lock().unwrap().is_empty() { vec!["the toy is bored".into()] } else { vec![] }
    }
}

/// Everything around a loop or an API, in a folder of its own.
pub(crate) struct Bench {
    pub(crate) with: Surroundings,
    pub(crate) _dir: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path(), AgentKind::Network, "compute1").unwrap();
        let with = Surroundings {
            statuses: Statuses::new(ledger.clone()),
            ledger,
            wake: Wake::new(),
            events: EventLog::new("compute1", "network"),
            metrics: Metrics::new("network", "0.1.0"),
            health: Health::new(),
            shutdown: Shutdown::new(Duration::from_secs(5)),
        };
        Self { with, _dir: dir }
    }
}
