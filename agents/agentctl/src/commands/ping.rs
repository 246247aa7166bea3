//! `agentctl ping`.

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use stackhand_model::AgentKind;

use super::Session;
use crate::exit::{Exit, chain};
use crate::fleet::{Filter, ask_all};
use crate::table::{Cell, Table, Tone};

/// Ask agents whether they are there, and how fast they answer.
///
/// Needs no key. Exit status 3 when one does not answer, or there is none to ask.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl ping
  agentctl ping --host node1 --timeout 2")]
pub(crate) struct Ping {
    #[command(flatten)]
    filter: Filter,
}

#[derive(Serialize)]
struct PingRow {
    host: String,
    #[serde(rename = "type")]
    agent: AgentKind,
    answered: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    milliseconds: Option<f64>,
    version: String,
    /// How far its clock is ahead of this one; negative when behind.
    #[serde(skip_serializing_if = "Option::is_none")]
    clock_offset_seconds: Option<f64>,
    reason: String,
}

pub(crate) async fn run(args: &Ping, session: &mut Session) -> Result<Exit> {
    let fleet = session.fleet().await?;
    let members = fleet.select(&args.filter).await?;
    // Those that look down are asked too: that is what one wants to know.
    let limit = fleet.limit().min(Duration::from_secs(10));
    let answers = ask_all(&members, |member| async move {
        let start = Instant::now();
        let answer = member.client.clone().with_limit(limit).ping().await;
        (answer, start.elapsed())
    });
    let mut rows = Vec::new();
    for (member, (answer, took)) in answers.await {
        let host = member.row.host.clone();
        let agent = member.row.agent;
        rows.push(match answer {
            Ok(pong) => {
                let middle = Timestamp::now() - took / 2;
                let offset = pong.time.duration_since(middle).as_secs_f64();
                PingRow {
                    host: pong.host,
                    agent,
                    answered: true,
                    milliseconds: Some(rounded(took.as_secs_f64() * 1000.0)),
                    version: pong.version,
                    clock_offset_seconds: Some(rounded(offset)),
                    reason: String::new(),
                }
            }
            Err(error) => PingRow {
                host,
                agent,
                answered: false,
                milliseconds: None,
                version: member.row.version,
                clock_offset_seconds: None,
                reason: chain(&error.into()),
            },
        });
    }
    session.console.print(&rows, |out| table(&rows, out))?;
    fleet.close().await;
    if rows.is_empty() {
        session.console.note(&format!("agentctl: {}", fleet.nobody(&[])));
    }
    let well = !rows.is_empty() && rows.iter().all(|row| row.answered);
    Ok(if well { Exit::Well } else { Exit::NotWell })
}

fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

fn table(rows: &[PingRow], out: &mut Table) {
    out.headers(&["HOST", "TYPE", "ANSWER", "MS", "VERSION", "+CLOCK", "REASON"]);
    for row in rows {
        let answer = match row.answered {
            true => Cell::toned(":-)", Tone::Good),
            false => Cell::toned("xxx", Tone::Bad),
        };
        let number = |it: Option<f64>| it.map_or_else(String::new, |it| format!("{it:.1}"));
        out.row([
            Cell::from(row.host.as_str()),
            Cell::from(row.agent.as_str()),
            answer,
            Cell::from(number(row.milliseconds)),
            Cell::from(row.version.as_str()),
            Cell::from(number(row.clock_offset_seconds)),
            Cell::from(row.reason.as_str()),
        ]);
    }
}
