//! Benchmarks: each figure against a bar, as a ratio to a floor measured in the same run where
//! the bar is one.
//!
//! `make bench` builds the programs with the release profile and runs all of them; a name as
//! argument runs one. The table goes to standard output, the raw numbers to
//! `tests/bench/results/<name>.json`. A bar that is missed makes the exit status 1.

mod agents;
mod compute;
mod firewall;
mod fleet;
mod ledger;
mod nat;
mod network;
mod outage;
mod ports;
mod routers;
mod rpc;
mod services;
mod storage;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use table::Row;

/// Measures speed and memory against the bars.
#[derive(Debug, Parser)]
struct Arguments {
    /// Which to run: rpc, ledger, agents, outage, list, compute, ports, firewall, routers, services, nat, storage.
    /// Default: all.
    #[arg(value_parser = [
        "rpc", "ledger", "agents", "outage", "list", "compute", "ports", "firewall", "routers", "services", "nat",
        "storage",
    ])]
    names: Vec<String>,
    #[command(subcommand)]
    role: Option<Role>,
}

/// Roles of this program's own child processes.
#[derive(Debug, Subcommand)]
enum Role {
    /// Serve calls until standard input ends.
    #[command(hide = true)]
    RpcServer {
        /// Broker to serve on.
        url: String,
    },
    /// Make calls as standard input says and print how fast they were.
    #[command(hide = true)]
    RpcCaller {
        /// Broker to call through.
        url: String,
    },
    /// Measure the storage agent inside a machine of the lab.
    #[command(hide = true)]
    StorageInside {
        /// Where the figures go.
        figures: PathBuf,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    match arguments.role {
        Some(Role::RpcServer { url }) => {
            rpc::serve(&url).await?;
            return Ok(ExitCode::SUCCESS);
        }
        Some(Role::RpcCaller { url }) => {
            rpc::call(&url).await?;
            return Ok(ExitCode::SUCCESS);
        }
        Some(Role::StorageInside { figures }) => {
            storage::inside(&figures).await?;
            return Ok(ExitCode::SUCCESS);
        }
        None => {}
    }
    let wanted =
        |name: &str| arguments.names.is_empty() || arguments.names.iter().any(|it| it == name);
    let mut missed = false;
    let mut all: Vec<Row> = Vec::new();
    if wanted("rpc") {
        all.extend(finish("rpc", rpc::run().await?)?);
    }
    if wanted("ledger") {
        all.extend(finish("ledger", ledger::run().await?)?);
    }
    if wanted("agents") {
        all.extend(finish("agents", agents::run().await?)?);
    }
    if wanted("outage") {
        all.extend(finish("outage", outage::run().await?)?);
    }
    if wanted("list") {
        all.extend(finish("list", fleet::run().await?)?);
    }
    if wanted("compute") {
        all.extend(finish("compute", compute::run().await?)?);
    }
    if wanted("ports") {
        all.extend(finish("ports", ports::run().await?)?);
    }
    if wanted("firewall") {
        all.extend(finish("firewall", firewall::run().await?)?);
    }
    if wanted("routers") {
        all.extend(finish("routers", routers::run().await?)?);
    }
    if wanted("services") {
        all.extend(finish("services", services::run().await?)?);
    }
    if wanted("nat") {
        all.extend(finish("nat", nat::run().await?)?);
    }
    if wanted("storage") {
        all.extend(finish("storage", storage::run().await?)?);
    }
    missed |= all.iter().any(|row| !row.met());
    table::print(&all)?;
    Ok(if missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Keeps the raw numbers of one benchmark.
fn finish(name: &str, rows: Vec<Row>) -> anyhow::Result<Vec<Row>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("results");
    std::fs::create_dir_all(&folder)?;
    let text = serde_json::to_string_pretty(&rows)? + "\n";
    std::fs::write(folder.join(format!("{name}.json")), text)?;
    Ok(rows)
}
