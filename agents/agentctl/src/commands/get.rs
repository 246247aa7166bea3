//! `agentctl get` and `agentctl describe`.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use stackhand_model::{Kind, State};
use stackhand_runtime::events::Event;

use super::Session;
use crate::console::Output;
use crate::exit::Exit;
use crate::fleet::{Filter, Member, ask_all};
use crate::objects::{self, Gathered, ObjectRow};

/// List the objects that agents hold, with their states.
///
/// One line per object; HOSTS are those whose agents hold its document. Exit status 3 when one
/// that is listed is in error, or an agent that may hold more did not answer.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl get                        everything
  agentctl get ports --host node1 -o wide
  agentctl get instance web db
  agentctl get volumes -o json | jq '.[].document.spec.size_gib'")]
pub(crate) struct Get {
    /// The kind, such as port or instances. Default: all
    kind: Option<Kind>,
    /// Names or ids. Default: all of the kind
    #[arg(requires = "kind", value_name = "NAME|ID")]
    names: Vec<String>,
    #[command(flatten)]
    filter: Filter,
}

/// How many of an object's latest events are shown.
const LATEST_EVENTS: usize = 10;

/// Show one object: document, state, facts seen on the host, and its latest events.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl describe port web
  agentctl describe instance 3b61dab4-46b4-536e-acb6-84fb5c6309a9")]
pub(crate) struct Describe {
    /// The kind, such as port or instance
    kind: Kind,
    /// Its name or id
    #[arg(value_name = "NAME|ID")]
    name: String,
    #[command(flatten)]
    filter: Filter,
}

pub(crate) async fn run(args: &Get, session: &mut Session) -> Result<Exit> {
    let fleet = session.fleet().await?;
    // Wide output shows names of objects that other agents hold, such as an instance's ports.
    let asked = args.kind.filter(|_| session.console.output() != Output::Wide);
    let all = objects::gather(&fleet, &args.filter, |member| interest(asked, member)).await?;
    fleet.close().await;
    let rows = objects::rows(&all.held);
    let names = objects::names(&rows);
    let mut shown: Vec<ObjectRow> = Vec::new();
    match args.kind {
        None => shown = rows,
        Some(kind) if args.names.is_empty() => {
            shown.extend(rows.into_iter().filter(|row| row.kind == kind));
        }
        Some(kind) => {
            let mut seen = BTreeSet::new();
            for name in &args.names {
                let row = objects::find(&rows, kind, name, fleet.cloud())?;
                if seen.insert(row.id) {
                    shown.push(row.clone());
                }
            }
        }
    }
    session.console.print(&shown, |out| objects::table(&shown, &names, out))?;
    Ok(verdict(&shown, &all, session))
}

pub(crate) async fn describe(args: &Describe, session: &mut Session) -> Result<Exit> {
    let fleet = session.fleet().await?;
    let all =
        objects::gather(&fleet, &args.filter, |member| interest(Some(args.kind), member)).await?;
    let rows = objects::rows(&all.held);
    let row = objects::find(&rows, args.kind, &args.name, fleet.cloud());
    if row.is_err() {
        // Perhaps one that did not answer has it.
        tell_silent(&all, session);
    }
    let row = row?.clone();
    let events = latest_events(&row, &all).await;
    fleet.close().await;
    session.console.print_tree(&Described { row: &row, events })?;
    Ok(verdict(&[row], &all, session))
}

/// One object in full.
#[derive(Debug, Serialize)]
struct Described<'a> {
    #[serde(flatten)]
    row: &'a ObjectRow,
    events: Vec<Event>,
}

/// What happened to an object lately, as its holders remember it; those that do not say, do not.
async fn latest_events(row: &ObjectRow, all: &Gathered) -> Vec<Event> {
    let holds = |member: &&Member| {
        member.row.agent == row.kind.agent()
            && row.held_by.iter().any(|it| it.host == member.row.host)
    };
    let holders: Vec<Member> = all.members.iter().filter(holds).cloned().collect();
    let ask = |member: Member| async move {
        member.client.events(0, usize::from(u16::MAX), Duration::ZERO).await
    };
    let object = row.document.object().to_string();
    let answers = ask_all(&holders, ask).await.into_iter();
    let mut events: Vec<Event> = answers
        .filter_map(|(_, answer)| answer.ok())
        .flat_map(|answer| answer.events)
        .filter(|event| event.object.as_deref() == Some(&object))
        .collect();
    events.sort_by(|a, b| (a.time, &a.host, a.sequence).cmp(&(b.time, &b.host, b.sequence)));
    events.split_off(events.len().saturating_sub(LATEST_EVENTS))
}

/// What to ask an agent for: all it holds, if the kind is one of its own.
fn interest(kind: Option<Kind>, member: &Member) -> Option<Option<Kind>> {
    match kind {
        Some(kind) if kind.agent() != member.row.agent => None,
        _ => Some(None),
    }
}

fn tell_silent(all: &Gathered, session: &mut Session) {
    for silent in &all.silent {
        session.console.note(&format!("agentctl: {silent}"));
    }
}

fn verdict(rows: &[ObjectRow], all: &Gathered, session: &mut Session) -> Exit {
    tell_silent(all, session);
    let wrong = rows.iter().any(|row| row.state == State::Error);
    if wrong || !all.silent.is_empty() { Exit::NotWell } else { Exit::Well }
}
