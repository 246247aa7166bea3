//! `agentctl list` over a broker that 5,000 agents report to.

use std::process::Stdio;
use std::time::Instant;

use anyhow::ensure;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use jiff::Timestamp;
use serde_json::Value;
use stackhand_bus::Transport;
use stackhand_bus::amqp::{AmqpOptions, AmqpTransport};
use stackhand_model::AgentKind;
use stackhand_runtime::api::Control;
use stackhand_runtime::report::{Report, agent_id, heartbeats, registry};
use stackhand_testkit::bin;
use stackhand_testkit::broker::Broker;
use tokio::process::Command;

use crate::table::Row;

const AGENTS: usize = 5_000;

pub(crate) async fn run() -> anyhow::Result<Vec<Row>> {
    // On this thread: the broker ends with the thread that started it.
    let broker = Broker::start();
    let transport = AmqpTransport::connect(broker.url().parse()?, &AmqpOptions::default())?;
    let transport = &transport;
    stream::iter(0..AGENTS)
        .map(|number| async move {
            let report = report(number);
            let registration = serde_json::to_value(report.registration())?;
            transport.publish(&registry(), registration).await?;
            transport.publish(&heartbeats(), serde_json::to_value(report)?).await?;
            anyhow::Ok(())
        })
        .buffer_unordered(64)
        .try_collect::<()>()
        .await?;

    let begun = Instant::now();
    let output = Command::new(bin("agentctl"))
        .args(["--url", &broker.url(), "list", "-o", "json"])
        .stderr(Stdio::inherit())
        .output()
        .await?;
    let seconds = begun.elapsed().as_secs_f64();
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    ensure!(rows.len() == AGENTS, "agentctl listed {} agents", rows.len());
    transport.close().await;
    Ok(vec![Row::at_most("agentctl list, 5,000 agents", seconds, "s", 1.0)])
}

fn report(number: usize) -> Report {
    let host = format!("host{}", number / 3);
    let agent = AgentKind::ALL[number % 3];
    let now = Timestamp::now();
    Report {
        id: agent_id("default", &host, agent),
        agent,
        host,
        zone: "nova".into(),
        cloud: "default".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        started_at: now,
        sent_at: now,
        // Long enough to be alive when the list is made.
        interval_seconds: 60,
        sequence: 1,
        stopping: false,
        control: Control::default(),
        healthy: true,
        reasons: Vec::new(),
        objects: Default::default(),
        signing: Some(true),
        events_dropped: 0,
    }
}
