//! `agentctl events`.

use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use jiff::Timestamp;
use stackhand_bus::{ReadFrom, Transport};
use stackhand_runtime::api::LONGEST_POLL;
use stackhand_runtime::events::Event;
use stackhand_runtime::report;

use super::Session;
use crate::console::{Console, Output};
use crate::exit::Exit;
use crate::fleet::{Filter, Fleet, Member};
use crate::table::{Cell, Table};

/// Show what happened lately: objects that changed state, and why.
///
/// With --follow it goes on until interrupted; -o json then prints one event a line.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl events --since 10m
  agentctl events --follow --host node1
  agentctl events --object port/3b61dab4-46b4-536e-acb6-84fb5c6309a9")]
pub(crate) struct Events {
    #[command(flatten)]
    filter: Filter,
    /// Go on as events happen
    #[arg(long)]
    follow: bool,
    /// How far back: 90s, 10m, 2h, 1d
    #[arg(long, default_value = "1h", value_parser = parse_span, value_name = "TIME")]
    since: Duration,
    /// Only events about this object, KIND/ID
    #[arg(long, value_name = "KIND/ID")]
    object: Option<stackhand_model::ObjectRef>,
}

fn parse_span(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a span of time such as 90s, 10m, 2h or 1d");
    let (number, unit) = text.split_at(text.len() - text.chars().last().map_or(0, char::len_utf8));
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(wrong)
}

impl Events {
    fn admits(&self, event: &Event, oldest: Timestamp) -> bool {
        let agent = self.filter.agent.map(stackhand_model::AgentKind::as_str);
        event.time >= oldest
            && self.filter.host.as_ref().is_none_or(|host| *host == event.host)
            && agent.is_none_or(|agent| agent == event.agent)
            && self.object.is_none_or(|it| event.object.as_deref() == Some(&*it.to_string()))
    }
}

pub(crate) async fn run(args: &Events, session: &mut Session) -> Result<Exit> {
    let fleet = session.fleet().await?;
    let oldest = Timestamp::now() - args.since;
    let mut past = Vec::new();
    if args.follow {
        let mut events = match fleet.bus() {
            Some(bus) => from_stream(bus.as_ref(), args.since, true).await?,
            None => from_agents(&fleet, &args.filter).await?,
        };
        while let Some(event) = events.next().await {
            let event = event?;
            if args.admits(&event, oldest) {
                tell(&event, &mut session.console)?;
            }
        }
        return Ok(Exit::Well);
    }
    match fleet.bus() {
        Some(bus) => {
            let mut events = from_stream(bus.as_ref(), args.since, false).await?;
            while let Some(event) = events.next().await {
                past.push(event?);
            }
        }
        None => {
            for member in fleet.living(&args.filter).await?.0 {
                let since = member.client.events(0, usize::from(u16::MAX), Duration::ZERO).await?;
                past.extend(since.events);
            }
        }
    }
    fleet.close().await;
    past.retain(|event| args.admits(event, oldest));
    past.sort_by(|a, b| (a.time, &a.host, a.sequence).cmp(&(b.time, &b.host, b.sequence)));
    session.console.print(&past, |out| table(&past, out))?;
    Ok(Exit::Well)
}

/// Events of all hosts, from the broker's stream.
async fn from_stream(
    bus: &dyn Transport,
    since: Duration,
    follow: bool,
) -> Result<BoxStream<'static, Result<Event>>> {
    let stream = report::events();
    let records = bus
        .read(&stream, ReadFrom::Age(since.max(Duration::from_secs(1))), follow)
        .await
        .with_context(|| format!("cannot read stream {}", stream.name))?;
    Ok(records
        .filter_map(|record| async move {
            match record {
                // Records of newer or foreign programs are passed over.
                Ok(record) => serde_json::from_value(record.body).ok().map(Ok),
                Err(error) => Some(Err(error.into())),
            }
        })
        .boxed())
}

/// Events of this host's agents, each asked for the next ones again and again.
async fn from_agents(fleet: &Fleet, filter: &Filter) -> Result<BoxStream<'static, Result<Event>>> {
    let (living, _) = fleet.living(filter).await?;
    let each = living.into_iter().map(|member: Member| {
        stream::try_unfold((member, 0), |(member, since)| async move {
            let limit = LONGEST_POLL.min(Duration::from_secs(20));
            let answer = member
                .client
                .events(since, 1000, limit)
                .await
                .with_context(|| format!("cannot follow {}", member.label()))?;
            let last = answer.last;
            Ok::<_, anyhow::Error>(Some((answer.events, (member, last))))
        })
        .flat_map(|events| match events {
            Ok(events) => stream::iter(events.into_iter().map(Ok).collect::<Vec<_>>()),
            Err(error) => stream::iter(vec![Err(error)]),
        })
        .boxed()
    });
    Ok(stream::select_all(each).boxed())
}

fn tell(event: &Event, console: &mut Console) -> Result<()> {
    match console.output() {
        Output::Json => console.json_line(event)?,
        Output::Yaml => console.print_tree(&[event])?,
        Output::Table | Output::Wide => console.text(&format!(
            "{} {} {} {} {}{}\n",
            event.time.strftime("%Y-%m-%dT%H:%M:%SZ"),
            event.host,
            event.agent,
            event.kind,
            event.object.as_ref().map(|it| format!("{it} ")).unwrap_or_default(),
            crate::console::tame(&event.message),
        ))?,
    }
    Ok(())
}

fn table(events: &[Event], out: &mut Table) {
    out.headers(&["TIME", "HOST", "TYPE", "EVENT", "OBJECT", "+REQUEST", "MESSAGE"]);
    for event in events {
        out.row([
            Cell::from(event.time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
            Cell::from(event.host.as_str()),
            Cell::from(event.agent.as_str()),
            Cell::from(event.kind.as_str()),
            Cell::from(event.object.as_deref().unwrap_or_default()),
            Cell::from(event.request_id.as_deref().unwrap_or_default()),
            Cell::from(event.message.as_str()),
        ]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_of_time_are_numbers_with_a_unit() {
        assert_eq!(parse_span("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_span("2h"), Ok(Duration::from_secs(7200)));
        for text in ["", "m", "5", "5w", "-1s", "1.5h", "99999999999999999999d", "5µ"] {
            assert!(parse_span(text).is_err(), "{text:?}");
        }
    }
}
