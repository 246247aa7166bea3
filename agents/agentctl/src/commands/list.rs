//! `agentctl list`.

use anyhow::Result;
use clap::Args;

use super::Session;
use crate::exit::Exit;
use crate::fleet::{Filter, rows_of};
use crate::roster::table;

/// List the agents: alive or down, since when and why.
///
/// An agent is alive, `:-)`, when its last heartbeat is at most three of its intervals old;
/// otherwise it is down, `xxx`, and listed with its last word. With --local the agents that have
/// a socket on this host are asked. Exit status 3 when one that is listed is down.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl list                      all agents
  agentctl list --down               only those that are down
  agentctl list --type network -o wide
  agentctl list -o json | jq '.[] | select(.alive | not) | .host'")]
pub(crate) struct List {
    #[command(flatten)]
    filter: Filter,
    /// Only agents that are down
    #[arg(long)]
    down: bool,
}

pub(crate) async fn run(args: &List, session: &mut Session) -> Result<Exit> {
    let fleet = session.fleet().await?;
    let mut rows = rows_of(&fleet.select(&args.filter).await?);
    rows.retain(|row| !(args.down && row.alive));
    if rows.is_empty() && !args.down {
        session.console.note(&format!("agentctl: {}", fleet.nobody(&[])));
    }
    session.console.print(&rows, |out| table(&rows, out))?;
    fleet.close().await;
    Ok(if rows.iter().all(|row| row.alive) { Exit::Well } else { Exit::NotWell })
}
