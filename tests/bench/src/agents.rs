//! Each agent alone with a broker: how soon it reports, and what it costs when idle.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use futures_util::StreamExt;
use stackhand_bus::amqp::{AmqpOptions, AmqpTransport};
use stackhand_bus::{ReadFrom, Transport};
use stackhand_model::AgentKind;
use stackhand_runtime::report::{Report, heartbeats};
use stackhand_testkit::broker::Broker;
use stackhand_testkit::{Spawned, bin};

use crate::table::Row;

/// How long an agent is watched doing nothing.
const IDLE: Duration = Duration::from_secs(20);

pub(crate) async fn run() -> anyhow::Result<Vec<Row>> {
    // On this thread: the broker ends with the thread that started it.
    let broker = Broker::start();
    let transport = AmqpTransport::connect(broker.url().parse()?, &AmqpOptions::default())?;
    // The stream is there before the first agent, as it is in a cloud that runs.
    let mut reports = transport.read(&heartbeats(), ReadFrom::Next, true).await?;
    let mut rows = Vec::new();
    let mut together = 0.0;
    for agent in AgentKind::ALL {
        let folder = tempfile::tempdir()?;
        write_settings(folder.path(), agent, &broker.url())?;
        let begun = Instant::now();
        let mut process =
            Spawned::start(bin(agent.binary()), [Path::new("--config-dir"), folder.path()]);
        let first = loop {
            let next = tokio::time::timeout(Duration::from_secs(20), reports.next()).await;
            let Ok(Some(record)) = next else {
                bail!("{agent} did not report:\n{}", process.output());
            };
            let report: Report = serde_json::from_value(record?.body)?;
            if report.agent == agent && !report.stopping {
                break begun.elapsed();
            }
        };
        rows.push(Row::at_most(
            &format!("{agent}: start to first heartbeat"),
            first.as_secs_f64() * 1000.0,
            "ms",
            200.0,
        ));
        let before = cpu_seconds(process.pid())?;
        let watched = Instant::now();
        tokio::time::sleep(IDLE).await;
        let used = cpu_seconds(process.pid())? - before;
        let share = used / watched.elapsed().as_secs_f64() * 100.0;
        let rss = status_mib(process.pid(), "VmRSS:")?;
        together += rss;
        rows.push(Row::at_most(&format!("{agent}: idle memory (RSS)"), rss, "MiB", 15.0));
        let own = status_mib(process.pid(), "RssAnon:")?;
        rows.push(Row::told(&format!("{agent}: of it, not from files"), own, "MiB"));
        rows.push(Row::at_most(&format!("{agent}: idle share of a core"), share, "%", 0.2));
        let status = process.terminate(Duration::from_secs(20));
        ensure!(status.success(), "{agent} ended with {status}:\n{}", process.output());
    }
    rows.push(Row::at_most("three agents idle, together (RSS)", together, "MiB", 45.0));
    transport.close().await;
    Ok(rows)
}

/// Settings of an agent that keeps everything in `folder` and wants no signatures.
pub(crate) fn write_settings(folder: &Path, agent: AgentKind, url: &str) -> anyhow::Result<()> {
    let state = folder.join("state");
    let run = folder.join("run");
    fs::create_dir(&state)?;
    fs::create_dir(&run)?;
    let text = format!(
        "host = \"bench\"\nstate_dir = {state:?}\nrun_dir = {run:?}\n\
         [bus]\nurl = {url:?}\n[signing]\nrequired = false\n"
    );
    let file = folder.join(format!("{}.toml", agent.as_str()));
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// Processor time used so far, by /proc/PID/stat (fields 14 and 15, in hundredths of a second).
pub(crate) fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').context("/proc/PID/stat has no name")?.1;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok());
    let (user, system) = ticks(11).zip(ticks(12)).context("/proc/PID/stat is short")?;
    Ok((user + system) / 100.0)
}

/// An amount of memory, by /proc/PID/status.
pub(crate) fn status_mib(pid: u32, name: &str) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|number| number.parse::<f64>().ok())
        .with_context(|| format!("/proc/PID/status has no {name}"))?;
    Ok(kib / 1024.0)
}
