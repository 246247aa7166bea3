//! A toy agent as a process of its own: started, asked over its socket, killed, stopped.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::ffi::OsString;
use std::io::Read;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stackhand_bus::local::LocalTransport;
use stackhand_model::{AgentKind, Document, Kind, ObjectRef};
use stackhand_runtime::agent::{Action, Agent, Desired, PassReport, PlannedStep, Refusal, Work};
use stackhand_runtime::api::Condition;
use stackhand_runtime::client::AgentClient;
use stackhand_runtime::config::AgentSection;
use stackhand_runtime::{AgentContext, Program};
use uuid::Uuid;

const ARGUMENTS: &str = "TOY_ARGUMENTS";
const LIMIT: Duration = Duration::from_secs(90);

#[derive(Debug)]
struct Toy;

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
struct Section {
    broken: bool,
}

impl AgentSection for Section {
    const AGENT: &'static str = "network";
}

impl Agent for Toy {
    const KIND: AgentKind = AgentKind::Network;

    fn admit(&self, _: &Desired, _: &BTreeSet<ObjectRef>) -> Result<(), Refusal> {
        Ok(())
    }

    async fn plan(&self, _: Arc<Desired>) -> Result<Vec<PlannedStep>, Refusal> {
        Ok(Vec::new())
    }

    async fn pass(&self, _: Work) -> PassReport {
        PassReport::default()
    }

    async fn act(&self, _: Action) -> Result<Value, Refusal> {
        Ok(Value::Null)
    }

    async fn facts(&self) -> Value {
        json!({"toy": true})
    }
}

/// The agent itself; the other tests start this one as a process.
#[test]
#[ignore = "is the program that the other tests start"]
fn toy_agent() {
    let arguments = std::env::var(ARGUMENTS).expect("started by hand");
    let arguments = std::iter::once("network-agent").chain(arguments.split('\n'));
    let start = |context: AgentContext<Section>| async move {
        if context.settings.agent.broken {
            return Err("the toy is broken".into());
        }
        Ok::<_, stackhand_runtime::StartError>(Toy)
    };
    let code = Program::new("1.2.3", start).main_with(arguments.map(OsString::from));
    // A test cannot return another status than 0 or 101.
    let code = if code == std::process::ExitCode::SUCCESS { 0 } else { 77 };
    std::process::exit(code);
}

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new(more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().display();
        let settings = format!(
            "host = \"compute1\"\nstate_dir = \"{path}/state\"\nrun_dir = \"{path}/run\"\n{more}"
        );
        std::fs::write(dir.path().join("stackhand.toml"), settings).unwrap();
        Self { dir }
    }

    fn command(&self, more: &[&str]) -> Command {
        let folder = self.dir.path().to_str().unwrap();
        let mut arguments = vec!["--config-dir", folder];
        arguments.extend(more);
        #[expect(clippy::disallowed_methods, reason = "a test that starts itself")]
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "toy_agent", "--ignored", "--nocapture"])
            .env(ARGUMENTS, arguments.join("\n"))
            .env_remove("NOTIFY_SOCKET")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn client(&self) -> AgentClient {
        let transport = LocalTransport::connect(self.dir.path().join("run/network.sock"));
        AgentClient::new(Arc::new(transport), AgentKind::Network, "compute1").with_limit(LIMIT)
    }
}

/// A running agent, killed when dropped.
struct Running(Child);

impl Running {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().try_into().unwrap()), signal).unwrap();
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the agent does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn output(&mut self) -> (String, String) {
        let (mut out, mut err) = (String::new(), String::new());
        self.0.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.0.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        (out, err)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn answers(client: &AgentClient) {
    let deadline = Instant::now() + LIMIT;
    while let Err(error) = client.ping().await {
        assert!(Instant::now() < deadline, "no answer: {error}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn group(n: u128) -> Document {
    let id = Uuid::from_u128(n);
    let name = format!("g{n}");
    Document::from_value(&json!({"kind": "SecurityGroup", "id": id, "name": name, "spec": {}}))
        .unwrap()
}

#[tokio::test]
async fn an_agent_keeps_what_it_answered_for_over_kill_and_ends_in_order() {
    let host = Host::new("");
    let mut first = Running(host.command(&[]).spawn().unwrap());
    let client = host.client();
    answers(&client).await;
    client.apply(&[group(1), group(2)]).await.unwrap();
    client
        .delete(&[ObjectRef { kind: Kind::SecurityGroup, id: Uuid::from_u128(2) }])
        .await
        .unwrap();
    first.signal(Signal::SIGKILL);
    assert!(!first.wait().success());

    let mut second = Running(host.command(&[]).spawn().unwrap());
    let client = host.client();
    answers(&client).await;
    let object = group(1).object();
    client.wait(&[object], Condition::Active, LIMIT).await.unwrap();
    let names: Vec<_> = client.get(None, None).await.unwrap();
    assert_eq!(names.len(), 2, "the deleted one is there until its pass says that it is gone");

    // Another process is told who has the ledger.
    let mut third = Running(host.command(&["--export-ledger"]).spawn().unwrap());
    assert!(!third.wait().success());
    let holder = format!("held by process {}", second.0.id());
    let (_, err) = third.output();
    assert!(err.contains(&holder), "{err}");

    second.signal(Signal::SIGTERM);
    let status = second.wait();
    assert!(status.success(), "{status} {:?}", second.output());
    assert!(!host.dir.path().join("run/network.sock").exists(), "the socket is gone");

    let mut export = Running(host.command(&["--export-ledger"]).spawn().unwrap());
    assert!(export.wait().success());
    let (out, _) = export.output();
    let json = &out[out.find('{').unwrap()..=out.rfind('}').unwrap()];
    let exported: Value = serde_json::from_str(json).unwrap();
    assert_eq!(exported["documents"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn the_service_manager_hears_ready_only_when_the_agent_answers() {
    let host = Host::new("");
    let notices = host.dir.path().join("notify");
    let manager = UnixDatagram::bind(&notices).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let mut agent = Running(host.command(&[]).env("NOTIFY_SOCKET", &notices).spawn().unwrap());
    heard(&manager, "READY=1");
    host.client().ping().await.unwrap();
    agent.signal(Signal::SIGTERM);
    heard(&manager, "STOPPING=1");
    assert!(agent.wait().success());
}

fn heard(manager: &UnixDatagram, wanted: &str) {
    let mut buffer = [0; 4096];
    loop {
        let length = manager.recv(&mut buffer).expect("not heard");
        if buffer[..length].starts_with(wanted.as_bytes()) {
            return;
        }
    }
}

#[test]
fn an_agent_that_cannot_start_says_why_on_standard_error() {
    let cases: [(&str, &[&str], &str); 4] = [
        ("[network]\nbroken = true\n", &[], "the toy is broken"),
        ("[buss]\n", &[], "did you mean"),
        ("", &["--confg"], "--config"),
        ("[network]\nbroken = 7\n", &["--check-config"], "network.broken"),
    ];
    for (settings, arguments, words) in cases {
        let host = Host::new(settings);
        let mut agent = Running(host.command(arguments).spawn().unwrap());
        assert!(!agent.wait().success(), "{settings}{arguments:?}");
        let (_, err) = agent.output();
        assert!(err.contains(words), "{settings}{arguments:?}: {err}");
    }
    let host = Host::new("");
    std::fs::create_dir(host.dir.path().join("state")).unwrap();
    damage(&host.dir.path().join("state/ledger.redb"));
    let mut agent = Running(host.command(&[]).spawn().unwrap());
    assert!(!agent.wait().success());
    let (_, err) = agent.output();
    assert!(err.contains("is damaged") && err.contains("backup"), "{err}");
}

fn damage(path: &Path) {
    std::fs::write(path, [0x5a; 9000]).unwrap();
}

#[test]
fn settings_and_preflight_are_told_without_starting() {
    let host = Host::new("");
    for (argument, words) in [
        ("--print-config", "host = \"compute1\""),
        ("--check-config", "are good"),
        ("--version", "network-agent 1.2.3"),
        ("--help", "--export-ledger"),
    ] {
        let mut agent = Running(host.command(&[argument]).spawn().unwrap());
        assert!(agent.wait().success(), "{argument}");
        let (out, err) = agent.output();
        assert!(out.contains(words), "{argument}: {out}{err}");
    }
    let mut agent = Running(host.command(&["--preflight", "-o", "json"]).spawn().unwrap());
    agent.wait();
    let (out, _) = agent.output();
    let json = &out[out.find('{').unwrap()..=out.rfind('}').unwrap()];
    let report: Value = serde_json::from_str(json).unwrap();
    assert!(report["findings"].as_array().unwrap().iter().any(|it| it["check"] == "state-dir"));
    assert!(!host.dir.path().join("state/ledger.redb").exists(), "looking makes no ledger");
}

/// The same over a real RabbitMQ, started by the test.
mod broker {
    use futures_util::StreamExt;
    use stackhand_bus::amqp::{AmqpOptions, AmqpTransport};
    use stackhand_bus::sign::{Signer, SigningKey, SigningTransport};
    use stackhand_bus::{ReadFrom, Transport};
    use stackhand_model::ErrorCode;
    use stackhand_runtime::report::{self, Registration, Report};
    use stackhand_testkit::broker::Broker;

    use super::*;

    async fn reports(transport: &Arc<dyn Transport>, wanted: impl Fn(&Report) -> bool) -> Report {
        let deadline = Instant::now() + LIMIT;
        let records = loop {
            match transport.read(&report::heartbeats(), ReadFrom::First, true).await {
                Ok(records) => break records,
                // A broker that has just started does not have its queues at once.
                Err(error) if error.is_transient() && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) => panic!("{error}"),
            }
        };
        let reports = records.map(|it| serde_json::from_value::<Report>(it.unwrap().body).unwrap());
        let found = reports.filter(|it| std::future::ready(wanted(it)));
        tokio::pin!(found);
        tokio::time::timeout(LIMIT, found.next()).await.expect("no such report").unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn signed_commands_are_obeyed_and_the_host_goes_on_without_a_broker() {
        let mut rabbit = Broker::start();
        let keys = tempfile::tempdir().unwrap();
        let key = SigningKey::generate().unwrap();
        std::fs::write(keys.path().join("controller.pub"), key.public("test").to_string()).unwrap();
        let host = Host::new(&format!(
            "[bus]\nurl = \"{}\"\n[signing]\ntrusted_controllers = \"{}\"\n\
             [heartbeat]\ninterval_seconds = 1\n",
            rabbit.url(),
            keys.path().display()
        ));
        let url = rabbit.url().parse().unwrap();
        let plain: Arc<dyn Transport> =
            Arc::new(AmqpTransport::connect(url, &AmqpOptions::default()).unwrap());
        let mut agent = Running(host.command(&[]).spawn().unwrap());

        let first = reports(&plain, |report| report.sequence == 1).await;
        assert_eq!((first.host.as_str(), first.signing), ("compute1", Some(true)));
        let took = first.sent_at.duration_since(first.started_at);
        println!("from the start of the process to its first heartbeat: {took:#}");
        let limit = if cfg!(debug_assertions) { 2000 } else { 200 };
        assert!(took.as_millis() < limit, "{took:#}");

        let stranger = AgentClient::new(Arc::clone(&plain), AgentKind::Network, "compute1");
        stranger.ping().await.unwrap();
        let refused = stranger.get(None, None).await.unwrap_err();
        assert_eq!(refused.refused().expect("no refusal").code, ErrorCode::Forbidden);
        let signer = Arc::new(Signer::new(key));
        let signing = SigningTransport::new(Arc::clone(&plain), signer, "stackhand");
        let client = AgentClient::new(Arc::new(signing), AgentKind::Network, "compute1");
        client.apply(&[group(1)]).await.unwrap();
        client.wait(&[group(1).object()], Condition::Active, LIMIT).await.unwrap();

        tokio::task::block_in_place(|| rabbit.wait_until_streams_last(0));
        rabbit.kill(0);
        let local = host.client();
        local.apply(&[group(2)]).await.unwrap();
        local.wait(&[group(2).object()], Condition::Active, LIMIT).await.unwrap();
        let deadline = Instant::now() + LIMIT;
        while local.report().await.unwrap().reasons.is_empty() {
            assert!(Instant::now() < deadline, "the report does not miss the broker");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        rabbit.restart(0);
        let back = Instant::now();
        let restarted = jiff::Timestamp::now();
        reports(&plain, |it| it.sent_at > restarted).await;
        println!("heartbeats are back {:?} after the broker", back.elapsed());
        assert_eq!(client.get(None, None).await.unwrap().len(), 2);

        agent.signal(Signal::SIGTERM);
        assert!(agent.wait().success(), "{:?}", agent.output());
        let last = reports(&plain, |report| report.stopping).await;
        assert_eq!(last.id, first.id);
        let records = plain.read(&report::registry(), ReadFrom::First, false).await.unwrap();
        let records: Vec<_> = records.collect().await;
        let last = records.last().unwrap().as_ref().unwrap().body.clone();
        assert!(serde_json::from_value::<Registration>(last).unwrap().stopping);
        plain.close().await;
    }
}

// Keeps the error type of agents that cannot fail in the public interface.
const _: fn() = || {
    let start = |_: AgentContext<Section>| async { Ok::<_, Infallible>(Toy) };
    let _program: Program<Toy, Section> = Program::new("0", start);
};
