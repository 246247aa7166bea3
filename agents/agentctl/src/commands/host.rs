//! `agentctl host`.

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;
use stackhand_model::AgentKind;
use stackhand_runtime::api::Control;

use super::Session;
use crate::exit::{Exit, Usage, chain};
use crate::fleet::{Filter, ask_all};
use crate::table::Cell;

/// Enable or disable a host for new objects.
///
/// What runs on a disabled host goes on running, and its documents can still be changed;
/// `agentctl apply` chooses other hosts for new objects. With --local it is this host.
#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  agentctl host disable node1 --reason 'new fan on Monday'
  agentctl host enable node1
  agentctl host disable --local --type compute --reason 'libvirt upgrade'")]
pub(crate) enum HostCommand {
    /// Let controllers choose the host for new objects
    Enable(Enable),
    /// Keep controllers from choosing the host for new objects
    Disable(Disable),
}

#[derive(Args, Debug)]
pub(crate) struct Target {
    /// The host; with --local it may be left out
    host: Option<String>,
    /// Only this agent: compute, network or storage
    #[arg(long = "type", value_name = "TYPE")]
    agent: Option<AgentKind>,
}

#[derive(Args, Debug)]
pub(crate) struct Enable {
    #[command(flatten)]
    target: Target,
}

#[derive(Args, Debug)]
pub(crate) struct Disable {
    #[command(flatten)]
    target: Target,
    /// Why; shown by `agentctl list`
    #[arg(long)]
    reason: String,
}

#[derive(Serialize)]
struct Row {
    host: String,
    #[serde(rename = "type")]
    agent: AgentKind,
    #[serde(flatten)]
    control: Control,
}

pub(crate) async fn run(command: &HostCommand, session: &mut Session) -> Result<Exit> {
    let (target, enabled, reason) = match command {
        HostCommand::Enable(it) => (&it.target, true, None),
        HostCommand::Disable(it) => (&it.target, false, Some(it.reason.as_str())),
    };
    let fleet = session.fleet().await?;
    if target.host.is_none() && !fleet.is_local() {
        bail!(Usage::new("name a HOST, or use --local for this one"));
    }
    let filter = Filter { host: target.host.clone(), agent: target.agent };
    let (living, down) = fleet.living(&filter).await?;
    let set = |member: crate::fleet::Member| async move {
        member.client.set_admin(enabled, reason).await
    };
    let mut rows = Vec::new();
    let mut exit = if down.is_empty() { Exit::Well } else { Exit::NotWell };
    for member in &down {
        let line = format!("agentctl: {} is down and keeps its setting", member.label());
        session.console.note(&line);
    }
    for (member, answer) in ask_all(&living, set).await {
        match answer {
            Ok(control) => {
                rows.push(Row { host: member.row.host, agent: member.row.agent, control });
            }
            Err(error) => {
                let line = format!("agentctl: {}: {}", member.label(), chain(&error.into()));
                session.console.note(&line);
                exit = Exit::Failure;
            }
        }
    }
    session.console.print(&rows, |out| {
        out.headers(&["HOST", "TYPE", "ADMIN", "REASON"]);
        for row in &rows {
            let admin = if row.control.enabled { "enabled" } else { "disabled" };
            let reason = row.control.reason.as_deref().unwrap_or_default();
            let host = row.host.as_str();
            out.row([Cell::from(host), row.agent.as_str().into(), admin.into(), reason.into()]);
        }
    })?;
    fleet.close().await;
    Ok(exit)
}
