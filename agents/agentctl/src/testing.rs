//! Agents that live in the test's process: they behave as real ones do where agentctl can tell.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde_json::{Value, json};
use stackhand_bus::memory::MemoryBroker;
use stackhand_bus::{Delivered, Failure, Handler, ServerHandle, Service, Transport};
use stackhand_model::{AgentKind, Document, ErrorCode, Kind, ObjectRef, State, Status};
use stackhand_runtime::api::{
    Applied, Change, Changed, Condition, Control, Deleted, EXCHANGE, Entry, Pong, Refused, Settled,
    Waiting,
};
use stackhand_runtime::events::{Event, Since};
use stackhand_runtime::report::{self, Report};
use uuid::Uuid;

use crate::cli::Cli;
use crate::commands::{self, Session};
use crate::console::Console;
use crate::exit::{Exit, explain, is_closed_pipe};
use crate::settings::Settings;

/// A writer whose text can be read afterwards.
#[derive(Clone, Debug, Default)]
pub(crate) struct Paper(Arc<Mutex<Vec<u8>>>);

impl Paper {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// How a run of agentctl ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) exit: Exit,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// A cloud of agents on a broker in this process.
pub(crate) struct Cloud {
    pub(crate) broker: MemoryBroker,
    pub(crate) agents: BTreeMap<(String, AgentKind), Arc<FakeAgent>>,
    servers: Vec<ServerHandle>,
}

impl Cloud {
    /// Hosts that each have all three agents, which have just reported.
    pub(crate) async fn start(hosts: &[&str]) -> Self {
        let broker = MemoryBroker::new();
        let mut cloud = Self { broker, agents: BTreeMap::new(), servers: Vec::new() };
        for host in hosts {
            for agent in AgentKind::ALL {
                cloud.add(host, agent).await;
            }
        }
        cloud
    }

    async fn add(&mut self, host: &str, kind: AgentKind) {
        let agent = Arc::new(FakeAgent::new(host, kind));
        let bus = self.broker.transport();
        let service = Service {
            exchange: EXCHANGE.into(),
            topic: kind.topic().into(),
            server: host.into(),
            concurrency: 8,
        };
        self.servers.push(bus.serve(service, agent.clone()).await.unwrap());
        self.report(&agent.report(0)).await;
        self.agents.insert((host.into(), kind), agent);
    }

    /// Publishes a report and the registration that goes with it.
    pub(crate) async fn report(&self, report: &Report) {
        let bus = self.broker.transport();
        let body = serde_json::to_value(report.registration()).unwrap();
        bus.publish(&report::registry(), body).await.unwrap();
        let body = serde_json::to_value(report).unwrap();
        bus.publish(&report::heartbeats(), body).await.unwrap();
    }

    pub(crate) fn agent(&self, host: &str, kind: AgentKind) -> &FakeAgent {
        &self.agents[&(host.to_owned(), kind)]
    }

    /// Runs a command line, without the program's name.
    pub(crate) async fn run(&self, line: &[&str]) -> Ran {
        use clap::Parser as _;
        let line = std::iter::once("agentctl").chain(line.iter().copied());
        let cli = Cli::try_parse_from(line).unwrap();
        let settings = Settings::load(&cli.globals).unwrap();
        let (out, err) = (Paper::default(), Paper::default());
        let console = Console::over(out.clone(), err.clone(), settings.output.value);
        let mut session =
            Session { settings, console, bus: Some(Arc::new(self.broker.transport())) };
        let exit = match Box::pin(commands::run(&cli.command, &mut session)).await {
            Ok(exit) => exit,
            Err(error) => {
                assert!(!is_closed_pipe(&error));
                let (exit, lines) = explain(&error);
                for line in lines {
                    session.console.note(&format!("agentctl: {line}"));
                }
                exit
            }
        };
        Ran { exit, out: out.text(), err: err.text() }
    }
}

/// Holds documents, makes objects active at once, answers as the own API does.
#[derive(Debug)]
pub(crate) struct FakeAgent {
    pub(crate) host: String,
    kind: AgentKind,
    state: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    entries: BTreeMap<ObjectRef, Entry>,
    control: Control,
    /// What was asked, in order.
    log: Vec<String>,
    /// Objects that never become active, with the reason.
    stuck: BTreeMap<Kind, String>,
    /// Refuses documents of this kind.
    refuses: Option<Kind>,
}

impl FakeAgent {
    fn new(host: &str, kind: AgentKind) -> Self {
        Self { host: host.into(), kind, state: Mutex::default() }
    }

    /// A report sent `age` seconds ago.
    pub(crate) fn report(&self, age: i64) -> Report {
        let now = Timestamp::now();
        Report {
            id: report::agent_id("default", &self.host, self.kind),
            agent: self.kind,
            host: self.host.clone(),
            zone: "nova".into(),
            cloud: "default".into(),
            version: "0.1.0".into(),
            started_at: now,
            sent_at: Timestamp::from_second(now.as_second() - age).unwrap(),
            interval_seconds: 10,
            sequence: 1,
            stopping: false,
            control: self.state.lock().unwrap().control.clone(),
            healthy: true,
            reasons: Vec::new(),
            objects: BTreeMap::new(),
            signing: Some(false),
            events_dropped: 0,
        }
    }

    /// Objects of a kind never become active here.
    pub(crate) fn keep_pending(&self, kind: Kind, reason: &str) {
        self.state.lock().unwrap().stuck.insert(kind, reason.into());
    }

    /// Documents of a kind are refused here.
    pub(crate) fn refuse(&self, kind: Kind) {
        self.state.lock().unwrap().refuses = Some(kind);
    }

    /// Requests that change something, in order, and the log is empty again.
    pub(crate) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }

    /// Names of the documents held.
    pub(crate) fn names(&self) -> Vec<String> {
        let state = self.state.lock().unwrap();
        let documents = state.entries.values().map(|entry| &entry.document);
        documents.map(|it| format!("{} {}", it.kind(), it.name)).collect()
    }

    /// A document held.
    pub(crate) fn document(&self, kind: Kind, name: &str) -> Option<Document> {
        let state = self.state.lock().unwrap();
        let mut documents = state.entries.values().map(|entry| &entry.document);
        documents.find(|it| it.kind() == kind && it.name.as_str() == name).cloned()
    }

    fn answer(&self, method: &str, args: &Value) -> Result<Value, Refused> {
        let mut state = self.state.lock().unwrap();
        let read = |name: &str| serde_json::from_value(args[name].clone());
        let encode = |it: Result<Value, serde_json::Error>| Ok(it.unwrap());
        match method {
            "ping" => encode(serde_json::to_value(Pong {
                agent: self.kind,
                host: self.host.clone(),
                version: "0.1.0".into(),
                time: Timestamp::now(),
                started_at: Timestamp::now(),
            })),
            "facts" => {
                Ok(json!({"connector": {"initiator": format!("iqn.2026-11.org.x:{}", self.host)}}))
            }
            "set_admin" => {
                state.control.enabled = args["enabled"].as_bool().unwrap();
                state.control.reason = args["reason"].as_str().map(str::to_owned);
                encode(serde_json::to_value(&state.control))
            }
            "pause" | "resume" => {
                state.control.paused = args["reason"].as_str().map(str::to_owned);
                encode(serde_json::to_value(&state.control))
            }
            "apply" => {
                let documents: Vec<Document> =
                    serde_json::from_value(args["resources"].clone()).unwrap();
                let dry_run = args["dry_run"] == true;
                if let Some(refused) = documents.iter().find(|it| Some(it.kind()) == state.refuses)
                {
                    let message = format!("{} {} cannot be here", refused.kind(), refused.name);
                    return Err(Refused::new(ErrorCode::Unsupported, message));
                }
                let mut objects = Vec::new();
                for document in documents {
                    let object = document.object();
                    let held = state.entries.get(&object).map(|it| it.document.generation);
                    if held.is_some_and(|held| held > document.generation) {
                        return Err(Refused::new(ErrorCode::Conflict, "a newer one is held"));
                    }
                    let change = match held {
                        Some(held) if held == document.generation => Change::Unchanged,
                        Some(_) => Change::Updated,
                        None => Change::Created,
                    };
                    let generation = document.generation;
                    objects.push(Changed { object, change, generation });
                    if !dry_run {
                        state.log.push(format!("apply {} {}", document.kind(), document.name));
                        let entry = self.entry(document, &state.stuck);
                        state.entries.insert(object, entry);
                    }
                }
                encode(serde_json::to_value(Applied { objects, revision: 1, dry_run }))
            }
            "delete" => {
                let refs: Vec<ObjectRef> = read("refs").unwrap_or_default();
                let mut objects = Vec::new();
                for object in refs {
                    let gone = state.entries.remove(&object);
                    if let Some(entry) = &gone {
                        state.log.push(format!("delete {} {}", object.kind, entry.document.name));
                    }
                    let change = if gone.is_some() { Change::Deleting } else { Change::Absent };
                    objects.push(Changed { object, change, generation: 0 });
                }
                encode(serde_json::to_value(Deleted { objects, revision: 2 }))
            }
            "get" => {
                let kind: Option<Kind> = serde_json::from_value(args["kind"].clone()).unwrap();
                let ids: Option<Vec<Uuid>> = serde_json::from_value(args["ids"].clone()).unwrap();
                let entries: Vec<&Entry> = state
                    .entries
                    .iter()
                    .filter(|(object, _)| kind.is_none_or(|kind| kind == object.kind))
                    .filter(|(object, _)| ids.as_ref().is_none_or(|ids| ids.contains(&object.id)))
                    .map(|(_, entry)| entry)
                    .collect();
                encode(serde_json::to_value(entries))
            }
            "events" => {
                let events = state.entries.keys().zip(1..).map(|(object, sequence)| Event {
                    sequence,
                    time: Timestamp::now(),
                    host: self.host.clone(),
                    agent: self.kind.to_string(),
                    object: Some(object.to_string()),
                    kind: "Applied".into(),
                    message: "is active".into(),
                    request_id: None,
                });
                let events: Vec<Event> = events.collect();
                let last = events.last().map_or(0, |event| event.sequence);
                encode(serde_json::to_value(Since { events, missed: 0, last }))
            }
            "act" => {
                let object: ObjectRef = serde_json::from_value(args["ref"].clone()).unwrap();
                let (action, params) = (&args["action"], &args["params"]);
                Ok(json!({"object": object, "did": action, "params": params}))
            }
            other => panic!("the fake has no {other}"),
        }
    }

    fn entry(&self, document: Document, stuck: &BTreeMap<Kind, String>) -> Entry {
        let stuck = stuck.get(&document.kind());
        let observed = match document.kind() {
            Kind::Attachment => json!({"connection": {"type": "block", "path": "/dev/vg/data"}}),
            _ => Value::Null,
        };
        Entry {
            status: Status {
                object: document.object(),
                state: if stuck.is_some() { State::Pending } else { State::Active },
                reason: stuck.cloned(),
                generation: document.generation,
                observed,
            },
            document,
            accepted: Timestamp::UNIX_EPOCH,
            request_id: "req-1".into(),
        }
    }

    async fn wait(&self, args: &Value) -> Result<Value, Refused> {
        let refs: Vec<ObjectRef> = serde_json::from_value(args["refs"].clone()).unwrap();
        let condition: Condition = serde_json::from_value(args["condition"].clone()).unwrap();
        let look = || -> (Vec<Settled>, Vec<Waiting>) {
            let state = self.state.lock().unwrap();
            let mut settled = Vec::new();
            let mut waiting = Vec::new();
            for object in &refs {
                let status = state.entries.get(object).map(|entry| entry.status.clone());
                let met = match (condition, &status) {
                    (Condition::Gone, None) => true,
                    (Condition::Gone, Some(_)) | (_, None) => false,
                    (_, Some(status)) => status.state == State::Active,
                };
                if met {
                    settled.push(Settled { object: *object, status });
                } else {
                    let reason = status.as_ref().and_then(|it| it.reason.clone());
                    let percent = |it: &Status| it.observed.get("progress_percent")?.as_u64();
                    let progress_percent = status.as_ref().and_then(percent);
                    let state = status.map(|it| it.state);
                    let reason = reason.unwrap_or_default();
                    waiting.push(Waiting { object: *object, state, reason, progress_percent });
                }
            }
            (settled, waiting)
        };
        let (settled, waiting) = look();
        if waiting.is_empty() {
            return Ok(serde_json::to_value(settled).unwrap());
        }
        tokio::time::sleep(Duration::from_secs_f64(args["timeout"].as_f64().unwrap())).await;
        let mut refused = Refused::new(ErrorCode::Timeout, "not in time");
        refused.waiting = look().1;
        Err(refused)
    }
}

impl Handler for FakeAgent {
    fn handle(&self, delivered: Delivered) -> BoxFuture<'_, Result<Value, Failure>> {
        async move {
            let args = Value::Object(delivered.request.args);
            match delivered.request.method.as_str() {
                "wait" => self.wait(&args).await.map_err(Failure::from),
                method => self.answer(method, &args).map_err(Failure::from),
            }
        }
        .boxed()
    }
}
