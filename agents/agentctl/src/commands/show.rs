//! `agentctl show`.

use anyhow::Result;
use clap::Args;

use super::Session;
use crate::exit::Exit;

/// Show all that is known about one agent.
///
/// Exit status 3 when it is down or not well.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl show node1/network
  agentctl show 36fd95cb")]
pub(crate) struct Show {
    /// The agent: HOST/TYPE, or its id or the beginning of it
    #[arg(value_name = "AGENT")]
    agent: String,
}

pub(crate) async fn run(args: &Show, session: &mut Session) -> Result<Exit> {
    let fleet = session.fleet().await?;
    let member = fleet.one(&args.agent).await?;
    session.console.print_tree(&member.row)?;
    fleet.close().await;
    Ok(if member.row.is_well() { Exit::Well } else { Exit::NotWell })
}
