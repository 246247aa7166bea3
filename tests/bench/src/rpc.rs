//! Calls a second over RabbitMQ, ours against Python's oslo.messaging on the same broker.
//!
//! Caller and server are two processes on all sides; requests and answers are alike. Two releases of
//! Python's: the newest asks for its answers every half second; 14, that of Debian 12, waits for
//! them as they come and is the harder floor.

use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures_util::future::{BoxFuture, join_all};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stackhand_bus::amqp::{AmqpOptions, AmqpTransport};
use stackhand_bus::{CallLimits, Delivered, Failure, Handler, Request, Service, Target, Transport};
use stackhand_testkit::broker::Broker;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::table::Row;

/// Callers at once, and calls in all, of each round.
const ROUNDS: [(usize, usize); 2] = [(1, 1_000), (16, 8_000)];

/// Each round goes to all in turn, so often, and the middle counts: a machine is not always as fast.
const TURNS: usize = 5;

/// Releases of Python's library, as `scripts/python-venv` takes them, their names in the table, and
/// what part of our calls they make: enough to tell.
const RELEASES: [(&str, &str, usize); 2] =
    [("", "oslo.messaging 17", 50), ("14", "oslo.messaging 14", 4)];

/// Answers with what it was asked.
#[derive(Debug)]
struct Echo;

impl Handler for Echo {
    fn handle(&self, delivered: Delivered) -> BoxFuture<'_, Result<Value, Failure>> {
        Box::pin(async move { Ok(Value::Object(delivered.request.args)) })
    }
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Speed {
    calls_per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
}

fn connect(url: &str) -> anyhow::Result<AmqpTransport> {
    Ok(AmqpTransport::connect(url.parse()?, &AmqpOptions::default())?)
}

/// Serves until standard input ends.
pub(crate) async fn serve(url: &str) -> anyhow::Result<()> {
    let transport = connect(url)?;
    let service = Service {
        exchange: "bench".into(),
        topic: "rust".into(),
        server: "bench".into(),
        concurrency: 64,
    };
    let _serving = transport.serve(service, Arc::new(Echo)).await?;
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    Ok(())
}

/// For each line of standard input, how many calls and how many at once, makes them and prints how
/// fast they were.
pub(crate) async fn call(url: &str) -> anyhow::Result<()> {
    let transport = Arc::new(connect(url)?);
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let (calls, callers) = line.split_once(' ').context("two numbers a line")?;
        let speed = our_speed(&transport, calls.parse()?, callers.parse()?).await?;
        writeln!(std::io::stdout(), "{}", serde_json::to_string(&speed)?)?;
    }
    transport.close().await;
    Ok(())
}

/// Measures both and compares.
pub(crate) async fn run() -> anyhow::Result<Vec<Row>> {
    // On this thread: the broker ends with the thread that started it.
    let broker = Broker::start();
    let mut theirs = Vec::new();
    for (release, name, part) in RELEASES {
        theirs.push((Python::start(release, name, &broker.url()).await?, part));
    }
    let program = std::env::current_exe()?;
    let _our_server = child(Command::new(&program).arg("rpc-server").arg(broker.url()))?;
    let mut ours = Caller::start(Command::new(&program).arg("rpc-caller").arg(broker.url()))?;
    let mut rows = Vec::new();
    for (callers, calls) in ROUNDS {
        let what = |what: &str| format!("rpc, {callers} at once: {what}");
        let (mut mine, mut all) = (Vec::new(), vec![Vec::new(); theirs.len()]);
        for _ in 0..TURNS {
            mine.push(ours.speed(calls, callers).await.context("our caller")?);
            for ((python, part), speeds) in theirs.iter_mut().zip(&mut all) {
                let speed = python.caller.speed(calls / *part, callers).await;
                speeds.push(speed.with_context(|| format!("the caller of {}", python.name))?);
            }
        }
        let mine = middle(mine);
        rows.push(Row::told(&what("p50"), mine.p50_ms, "ms"));
        rows.push(Row::told(&what("p99"), mine.p99_ms, "ms"));
        for ((python, _), speeds) in theirs.iter().zip(all) {
            let (name, theirs) = (python.name, middle(speeds));
            rows.push(Row::times(
                &what(&format!("calls, against {name}")),
                mine.calls_per_second,
                "/s",
                theirs.calls_per_second,
                3.0,
            ));
            rows.push(Row::told(&what(&format!("p50 of {name}")), theirs.p50_ms, "ms"));
            rows.push(Row::told(&what(&format!("p99 of {name}")), theirs.p99_ms, "ms"));
        }
    }
    Ok(rows)
}

fn middle(mut speeds: Vec<Speed>) -> Speed {
    speeds.sort_by(|one, other| one.calls_per_second.total_cmp(&other.calls_per_second));
    speeds[speeds.len() / 2]
}

fn child(command: &mut Command) -> anyhow::Result<Child> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))
}

/// A process that makes calls when told to, over one connection, as agents and services do.
struct Caller {
    process: Child,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Caller {
    fn start(command: &mut Command) -> anyhow::Result<Self> {
        let mut process = child(command)?;
        let output = process.stdout.take().context("it has no output")?;
        Ok(Self { process, answers: BufReader::new(output).lines() })
    }

    async fn speed(&mut self, calls: usize, callers: usize) -> anyhow::Result<Speed> {
        let input = self.process.stdin.as_mut().context("it has no input")?;
        input.write_all(format!("{calls} {callers}\n").as_bytes()).await?;
        let answer = self.answers.next_line().await?.context("it ended")?;
        serde_json::from_str(&answer).context("it printed no figures")
    }
}

/// One release of Python's library, with a server and a caller that run.
struct Python {
    name: &'static str,
    caller: Caller,
    _serving: Child,
}

impl Python {
    async fn start(release: &str, name: &'static str, url: &str) -> anyhow::Result<Self> {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let output = Command::new(top.join("scripts/python-venv"))
            .args((!release.is_empty()).then_some(release))
            .stderr(Stdio::inherit())
            .output()
            .await?;
        ensure!(output.status.success(), "scripts/python-venv {release} failed");
        let interpreter = String::from_utf8(output.stdout)?.trim().to_owned();
        let script = top.join("tests/python/bench.py");
        let server = format!("python{release}");
        let mut serving =
            child(Command::new(&interpreter).arg(&script).args(["serve", url, &server]))?;
        let mut ready = String::new();
        let output = serving.stdout.take().context("the Python server has no output")?;
        BufReader::new(output).read_line(&mut ready).await?;
        ensure!(ready.trim() == "ready", "the server of {name} did not start");
        let mut calling = Command::new(&interpreter);
        let caller = Caller::start(calling.arg(&script).args(["call", url, &server]))?;
        Ok(Self { name, caller, _serving: serving })
    }
}

async fn our_speed(
    transport: &Arc<AmqpTransport>,
    calls: usize,
    callers: usize,
) -> anyhow::Result<Speed> {
    let limits = CallLimits::total(Duration::from_secs(30));
    let target = Target::topic("bench", "rust").on_server("bench");
    transport.call(&target, Request::new("echo", json!({"warm": "up"})), limits).await?;
    let begun = Instant::now();
    let work = |_caller| {
        let (transport, target) = (Arc::clone(transport), target.clone());
        tokio::spawn(async move {
            let mut latencies = Vec::with_capacity(calls / callers);
            for number in 0..calls / callers {
                let args = json!({"number": number, "text": "x".repeat(100)});
                let begun = Instant::now();
                transport.call(&target, Request::new("echo", args), limits).await?;
                latencies.push(begun.elapsed().as_secs_f64() * 1000.0);
            }
            anyhow::Ok(latencies)
        })
    };
    let mut latencies = Vec::with_capacity(calls);
    for caller in join_all((0..callers).map(work)).await {
        latencies.extend(caller??);
    }
    let seconds = begun.elapsed().as_secs_f64();
    latencies.sort_by(f64::total_cmp);
    let made = u32::try_from(latencies.len())?;
    Ok(Speed {
        calls_per_second: f64::from(made) / seconds,
        p50_ms: latencies[latencies.len() / 2],
        p99_ms: latencies[latencies.len() * 99 / 100],
    })
}
