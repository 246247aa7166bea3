//! `agentctl wait`.

use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};
use stackhand_model::{Kind, ObjectRef, id_from_name};
use stackhand_runtime::api::Condition;

use super::Session;
use crate::exit::Exit;
use crate::fleet::Filter;
use crate::manifest::held::Place;
use crate::objects;
use crate::progress::{Target, watch};

/// Wait until objects are active or gone.
///
/// Exit status 3 when they are not in time; standard error tells which and why.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl wait instance/web port/web
  agentctl wait instance/web --for gone --seconds 30")]
pub(crate) struct Wait {
    /// The objects, as KIND/NAME or KIND/ID
    #[arg(required = true, value_parser = objects::parse_ref, value_name = "KIND/NAME")]
    objects: Vec<(Kind, String)>,
    /// What to wait for
    #[arg(long = "for", value_enum, default_value_t)]
    condition: For,
    /// Give up after this many seconds
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum For {
    /// The host is as the document says
    #[default]
    Active,
    /// The object is no longer held
    Gone,
    /// The agent has tried: active, in error or gone
    Settled,
}

pub(crate) async fn run(args: &Wait, session: &mut Session) -> Result<Exit> {
    let fleet = session.fleet().await?;
    let all = objects::gather_all(&fleet, &Filter::default()).await?;
    let rows = objects::rows(&all.held);
    let condition = match args.condition {
        For::Active => Condition::Active,
        For::Gone => Condition::Gone,
        For::Settled => Condition::Settled,
    };
    let mut targets = Vec::new();
    for (kind, name) in &args.objects {
        match objects::find(&rows, *kind, name, fleet.cloud()) {
            Ok(row) => {
                let object = row.document.object();
                targets.extend(all.held.holders(object).into_iter().map(|place: &Place| Target {
                    place: place.clone(),
                    object,
                    name: row.name.clone(),
                }));
            }
            // Held by nobody is gone.
            Err(_) if condition == Condition::Gone => {
                let id = name.parse().unwrap_or_else(|_| id_from_name(fleet.cloud(), *kind, name));
                let object = ObjectRef { kind: *kind, id };
                session.console.note(&format!("{} {name} is gone", object.kind));
            }
            Err(error) => return Err(error),
        }
    }
    let limit = Duration::from_secs(args.seconds);
    let outcome = watch(&all.members, targets, condition, limit, &mut session.console).await?;
    fleet.close().await;
    Ok(outcome.exit())
}
