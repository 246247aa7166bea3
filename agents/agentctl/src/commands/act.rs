//! `agentctl act`.

use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::{Map, Value};
use stackhand_model::{Kind, ObjectRef};
use stackhand_runtime::api::Condition;

use super::Session;
use crate::console::{Output, tame};
use crate::exit::Exit;
use crate::fleet::{Filter, Fleet, Member};
use crate::manifest::held::Place;
use crate::objects;
use crate::progress::{Target, watch};

/// Perform an action on an object, such as a reboot.
///
/// The agent tells which actions it knows when it is asked for one that it does not.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl act instance/web reboot --param type=hard
  agentctl act volume/data revert --param snapshot=Snapshot/ID --wait
  agentctl act instance/web console-log")]
pub(crate) struct Act {
    /// The object, as KIND/NAME or KIND/ID
    #[arg(value_parser = objects::parse_ref, value_name = "KIND/NAME")]
    object: (Kind, String),
    /// The action
    action: String,
    /// A detail of it; values that read as JSON are taken as such, others as text
    #[arg(long = "param", value_parser = parse_param, value_name = "KEY=VALUE")]
    params: Vec<(String, Value)>,
    /// Wait until what the action began is over, telling how it gets on; at most this many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true,
          default_missing_value = "300", value_parser = clap::value_parser!(u64).range(1..=3600))]
    wait: Option<u64>,
}

fn parse_param(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text.split_once('=').ok_or("must be of the form KEY=VALUE")?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    Ok((key.to_owned(), value))
}

/// An object and the agent that has it.
pub(crate) struct Found {
    fleet: Fleet,
    member: Member,
    object: ObjectRef,
    /// The object's name.
    pub(crate) name: String,
}

impl Found {
    /// Has the agent do something with the object.
    pub(crate) async fn act(&self, action: &str, params: Value) -> Result<Value> {
        let answer = self.member.client.act(self.object, action, params).await;
        answer.with_context(|| format!("cannot {action} {} {}", self.object.kind, self.name))
    }

    /// Waits until what an action began is over.
    async fn wait(&self, limit: Duration, session: &mut Session) -> Result<Exit> {
        let Self { member, object, name, .. } = self;
        let place = Place { agent: member.row.agent, host: member.row.host.clone() };
        let target = Target { object: *object, place, name: name.clone() };
        let (members, console) = (std::slice::from_ref(member), &mut session.console);
        Ok(watch(members, vec![target], Condition::Done, limit, console).await?.exit())
    }

    /// Leaves the agents.
    pub(crate) async fn close(&self) {
        self.fleet.close().await;
    }
}

/// Finds an object by name or id, and its agent.
pub(crate) async fn find(session: &Session, kind: Kind, name: &str) -> Result<Found> {
    let fleet = session.fleet().await?;
    let all = objects::gather(&fleet, &Filter::default(), |member| {
        (member.row.agent == kind.agent()).then_some(Some(kind))
    })
    .await?;
    let rows = objects::rows(&all.held);
    let row = objects::find(&rows, kind, name, fleet.cloud())?;
    let home = row.home().map(|holding| holding.host.clone()).unwrap_or_default();
    let (object, name) = (row.document.object(), row.name.clone());
    let member = all
        .members
        .into_iter()
        .find(|member| member.row.agent == kind.agent() && member.row.host == home)
        .with_context(|| format!("no {} answers on {home}", kind.agent().binary()))?;
    Ok(Found { fleet, member, object, name })
}

pub(crate) async fn run(args: &Act, session: &mut Session) -> Result<Exit> {
    let (kind, name) = &args.object;
    let found = find(session, *kind, name).await?;
    let params: Map<String, Value> = args.params.iter().cloned().collect();
    let answer = found.act(&args.action, params.into()).await?;
    show(session, &answer)?;
    let exit = match args.wait {
        Some(seconds) => found.wait(Duration::from_secs(seconds), session).await?,
        None => Exit::Well,
    };
    found.close().await;
    Ok(exit)
}

/// Shows what an action answered.
pub(crate) fn show(session: &mut Session, answer: &Value) -> Result<()> {
    let for_people = matches!(session.console.output(), Output::Table | Output::Wide);
    match text(answer) {
        _ if answer.is_null() => {}
        Some(text) if for_people || answer.is_string() => session.console.text(&text)?,
        _ => session.console.print_tree(answer)?,
    }
    Ok(())
}

/// An answer that is a text or a log, as lines.
fn text(answer: &Value) -> Option<String> {
    let (text, cut) = match answer {
        Value::String(text) => (text.as_str(), false),
        other => (other["log"].as_str()?, other["truncated"] == true),
    };
    let mut lines = String::from(if cut { "[what came before is left out]\n" } else { "" });
    for line in text.lines() {
        lines.push_str(&tame(line));
        lines.push('\n');
    }
    Some(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_json_where_they_read_as_such() {
        assert_eq!(parse_param("hard=true"), Ok(("hard".into(), Value::Bool(true))));
        assert_eq!(parse_param("name=a=b"), Ok(("name".into(), "a=b".into())));
        assert_eq!(parse_param("n=3"), Ok(("n".into(), 3.into())));
        assert!(parse_param("n").is_err());
    }

    #[test]
    fn a_log_is_shown_as_lines_that_do_not_drive_the_terminal() {
        let log = serde_json::json!({"log": "up\r\n\u{1b}[2Jdone", "truncated": true});
        let lines = "[what came before is left out]\nup\n [2Jdone\n";
        assert_eq!(text(&log).as_deref(), Some(lines));
        assert_eq!(text(&"done".into()).as_deref(), Some("done\n"));
        assert_eq!(text(&serde_json::json!({"rebooted": "soft"})), None);
    }
}
