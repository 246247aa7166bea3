//! `agentctl diff --host`: what on a host differs from what its agents hold.

use anyhow::Result;
use serde::Serialize;
use stackhand_model::{AgentKind, ObjectRef};

use super::Session;
use crate::exit::{Exit, chain};
use crate::fleet::{Filter, ask_all};
use crate::table::{Cell, Table};

/// One step that an agent would take.
#[derive(Serialize)]
struct DriftRow {
    host: String,
    #[serde(rename = "type")]
    agent: AgentKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<ObjectRef>,
    change: String,
}

/// Asks the agents of a host what their next pass would do; nothing is touched.
pub(crate) async fn run(host: &str, session: &mut Session) -> Result<Exit> {
    let fleet = session.fleet().await?;
    let filter = Filter { host: Some(host.to_owned()), agent: None };
    let (living, down) = fleet.living(&filter).await?;
    let mut silent = !down.is_empty();
    let mut rows = Vec::new();
    for (member, answer) in
        ask_all(&living, |it| async move { it.client.plan(&[], &[]).await }).await
    {
        match answer {
            Ok(planned) => rows.extend(planned.steps.into_iter().map(|step| DriftRow {
                host: member.row.host.clone(),
                agent: member.row.agent,
                object: step.object,
                change: step.change,
            })),
            Err(error) => {
                let line = format!("agentctl: {}: {}", member.label(), chain(&error.into()));
                session.console.note(&line);
                silent = true;
            }
        }
    }
    for member in down {
        session.console.note(&format!("agentctl: {} is down", member.label()));
    }
    session.console.print(&rows, |out| table(&rows, out))?;
    fleet.close().await;
    if rows.is_empty() && !silent {
        session.console.note("agentctl: the host is as its agents hold it");
    }
    Ok(if rows.is_empty() && !silent { Exit::Well } else { Exit::NotWell })
}

fn table(rows: &[DriftRow], out: &mut Table) {
    out.headers(&["HOST", "TYPE", "OBJECT", "CHANGE"]);
    for row in rows {
        out.row([
            Cell::from(row.host.as_str()),
            Cell::from(row.agent.as_str()),
            Cell::from(row.object.map(|it| it.to_string()).unwrap_or_default()),
            Cell::from(row.change.as_str()),
        ]);
    }
}
