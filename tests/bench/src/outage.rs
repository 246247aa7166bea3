//! How soon three agents answer again after their broker has died and is back.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::future::try_join_all;
use stackhand_bus::amqp::{AmqpOptions, AmqpTransport};
use stackhand_model::AgentKind;
use stackhand_runtime::client::AgentClient;
use stackhand_testkit::broker::Broker;
use stackhand_testkit::{Spawned, bin};

use crate::agents::write_settings;
use crate::table::Row;

/// How long agents are away from their broker: long enough for the longest wait between attempts.
const AWAY: Duration = Duration::from_secs(10);

pub(crate) async fn run() -> anyhow::Result<Vec<Row>> {
    // On this thread: the broker ends with the thread that started it.
    let mut broker = Broker::start();
    let folder = tempfile::tempdir()?;
    let mut processes = Vec::new();
    for agent in AgentKind::ALL {
        let own = folder.path().join(agent.as_str());
        std::fs::create_dir(&own)?;
        write_settings(&own, agent, &broker.url())?;
        processes
            .push(Spawned::start(bin(agent.binary()), [Path::new("--config-dir"), own.as_path()]));
    }
    all_answer(&broker.url()).await.context("the agents did not start")?;
    broker.kill(0);
    tokio::time::sleep(AWAY).await;
    broker.restart(0);
    broker.wait_until_up(0);
    let back = Instant::now();
    all_answer(&broker.url()).await.context("the agents did not come back")?;
    let seconds = back.elapsed().as_secs_f64();
    Ok(vec![Row::at_most("three agents answer again after their broker", seconds, "s", 5.0)])
}

/// Waits until each agent has answered, by a connection made for that.
async fn all_answer(url: &str) -> anyhow::Result<()> {
    let transport = AmqpTransport::connect(url.parse()?, &AmqpOptions::default())?;
    let transport = Arc::new(transport);
    let pings = AgentKind::ALL.map(|agent| {
        let client = AgentClient::new(transport.clone(), agent, "bench");
        async move {
            let end = Instant::now() + Duration::from_secs(60);
            // A queue that its agent has not declared yet is told as nobody there.
            while let Err(error) = client.ping().await {
                if Instant::now() > end {
                    return Err(error);
                }
            }
            Ok(())
        }
    });
    try_join_all(pings).await?;
    Ok(())
}
