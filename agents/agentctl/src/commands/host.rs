//! `agentctl host`.

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;
use stackhand_model::AgentKind;
use stackhand_runtime::api::Control;

use super::Session;
use crate::exit::{Exit, Usage, chain};
use crate::fleet::{Filter, ask_all};
use crate::roster::admin;
use crate::table::Cell;

/// Enable or disable a host for new objects; pause and resume its agents.
///
/// What runs on a disabled host goes on running, and its documents can still be changed;
/// `agentctl apply` chooses other hosts for new objects. A paused agent accepts documents and
/// changes nothing on its host, while somebody works there by hand; nothing it made stops. Both
/// last until they are taken back, also over restarts. With --local it is this host.
#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  agentctl host disable node1 --reason 'new fan on Monday'
  agentctl host enable node1
  agentctl host disable --local --type compute --reason 'libvirt upgrade'
  agentctl host pause node1 --type network --reason 'looking at its bridges'
  agentctl host resume node1")]
pub(crate) enum HostCommand {
    /// Let controllers choose the host for new objects
    Enable(Plain),
    /// Keep controllers from choosing the host for new objects
    Disable(WithReason),
    /// Have the agents change nothing on the host
    Pause(WithReason),
    /// Let paused agents work again
    Resume(Plain),
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
pub(crate) struct Plain {
    #[command(flatten)]
    target: Target,
}

#[derive(Args, Debug)]
pub(crate) struct WithReason {
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
    let target = match command {
        HostCommand::Enable(it) | HostCommand::Resume(it) => &it.target,
        HostCommand::Disable(it) | HostCommand::Pause(it) => &it.target,
    };
    let fleet = session.fleet().await?;
    if target.host.is_none() && !fleet.is_local() {
        bail!(Usage::new("name a HOST, or use --local for this one"));
    }
    let filter = Filter { host: target.host.clone(), agent: target.agent };
    let (living, down) = fleet.living(&filter).await?;
    let set = |member: crate::fleet::Member| async move {
        match command {
            HostCommand::Enable(_) => member.client.set_admin(true, None).await,
            HostCommand::Disable(it) => member.client.set_admin(false, Some(&it.reason)).await,
            HostCommand::Pause(it) => member.client.pause(Some(&it.reason)).await,
            HostCommand::Resume(_) => member.client.resume().await,
        }
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
            out.row([
                Cell::from(row.host.as_str()),
                row.agent.as_str().into(),
                admin(row.control.enabled, row.control.paused.is_some()),
                why(&row.control).into(),
            ]);
        }
    })?;
    fleet.close().await;
    Ok(exit)
}

fn why(control: &Control) -> String {
    let reasons = [&control.paused, &control.reason].into_iter().filter_map(Option::as_deref);
    reasons.collect::<Vec<_>>().join("; ")
}
