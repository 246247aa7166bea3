//! `agentctl facts`.

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use serde_json::Value;
use stackhand_model::AgentKind;

use super::Session;
use crate::exit::{Exit, chain};
use crate::fleet::{Filter, ask_all};

/// Show facts about hosts: capacity, versions, what the kernel can do.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl facts --host node1
  agentctl facts --type compute -o json")]
pub(crate) struct Facts {
    #[command(flatten)]
    filter: Filter,
}

#[derive(Serialize)]
struct HostFacts {
    host: String,
    #[serde(rename = "type")]
    agent: AgentKind,
    facts: Value,
}

pub(crate) async fn run(args: &Facts, session: &mut Session) -> Result<Exit> {
    let fleet = session.fleet().await?;
    let (living, mut down) = fleet.living(&args.filter).await?;
    let mut all = Vec::new();
    for (member, answer) in ask_all(&living, |it| async move { it.client.facts().await }).await {
        match answer {
            Ok(facts) => {
                all.push(HostFacts { host: member.row.host, agent: member.row.agent, facts });
            }
            Err(error) => {
                let line = format!("agentctl: {}: {}", member.label(), chain(&error.into()));
                session.console.note(&line);
                down.push(member);
            }
        }
    }
    session.console.print_tree(&all)?;
    fleet.close().await;
    Ok(if down.is_empty() { Exit::Well } else { Exit::NotWell })
}
