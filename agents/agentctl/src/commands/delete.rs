//! `agentctl delete`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use serde::Serialize;
use stackhand_model::{Kind, ObjectRef};
use uuid::Uuid;

use super::Session;
use crate::exit::{Exit, Usage};
use crate::fleet::Filter;
use crate::manifest::draft::drafts;
use crate::manifest::expand::{MADE_FOR, expand};
use crate::manifest::held::Held;
use crate::manifest::source;
use crate::objects::{self, gather_all};
use crate::removal::{Wanted, remove};
use crate::table::Cell;

/// Delete what a manifest names, or objects of a kind.
///
/// In the reverse of the order of application: instances first, and their volumes are let go
/// only when the instances are gone. What agentctl made for an object, such as attachments, goes
/// with it. What nobody holds is no error.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl delete -f cloud.yaml --wait
  agentctl delete instance web db")]
pub(crate) struct Delete {
    /// The kind, such as port or instance
    #[arg(required_unless_present = "files", conflicts_with = "files")]
    kind: Option<Kind>,
    /// Names or ids
    #[arg(requires = "kind", value_name = "NAME|ID")]
    names: Vec<String>,
    /// A manifest: a file, a folder, or - for standard input; may be repeated
    #[arg(short, long = "file", value_name = "FILE|DIR|-")]
    files: Vec<PathBuf>,
    /// What ${NAME} in the manifest stands for; may be repeated
    #[arg(long = "set", value_parser = source::parse_set, value_name = "NAME=VALUE")]
    set: Vec<(String, String)>,
    /// A file of such values, `NAME: value` a line; may be repeated, --set wins
    #[arg(long, value_name = "FILE")]
    values: Vec<PathBuf>,
    /// Wait until all are gone, telling how they get on; at most this many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true,
          default_missing_value = "300", value_parser = clap::value_parser!(u64).range(1..=3600))]
    wait: Option<u64>,
}

#[derive(Serialize)]
struct Row {
    change: &'static str,
    kind: Kind,
    name: String,
    id: Uuid,
    hosts: Vec<String>,
}

pub(crate) async fn run(args: &Delete, session: &mut Session) -> Result<Exit> {
    let named = match args.kind {
        Some(_) => None,
        None => {
            let values = source::values(&args.values, &args.set)?;
            Some(source::read(&args.files, &values)?)
        }
    };
    if args.kind.is_some() && args.names.is_empty() {
        bail!(Usage::new("name the objects to delete; `agentctl get KIND` lists them"));
    }
    let fleet = session.fleet().await?;
    let _lock = fleet.lock().await?;
    let gathered = gather_all(&fleet, &Filter::default()).await?;
    for silent in &gathered.silent {
        session.console.note(&format!("agentctl: it keeps what it holds: {silent}"));
    }
    let rows = objects::rows(&gathered.held);
    let mut wanted = Wanted::new();
    match (named, args.kind) {
        (Some(pieces), _) => {
            let cloud = fleet.cloud();
            let drafts = expand(pieces, cloud)
                .and_then(|pieces| drafts(pieces, cloud))
                .map_err(Usage::several)?;
            wanted.extend(drafts.into_iter().map(|(it, draft)| (it, draft.name().to_owned())));
        }
        (None, Some(kind)) => {
            for name in &args.names {
                let row = objects::find(&rows, kind, name, fleet.cloud())?;
                wanted.insert(row.document.object(), row.name.clone());
            }
        }
        (None, None) => {}
    }
    made_for(&mut wanted, &gathered.held);
    let limit = Duration::from_secs(args.wait.unwrap_or(120));
    let console = &mut session.console;
    let in_time = remove(&gathered, &wanted, limit, args.wait.is_some(), console).await?;
    let rows: Vec<Row> = wanted
        .iter()
        .rev()
        .map(|(object, name)| {
            let holders = gathered.held.holders(*object);
            Row {
                change: if holders.is_empty() { "absent" } else { "delete" },
                kind: object.kind,
                name: name.clone(),
                id: object.id,
                hosts: holders.into_iter().map(|place| place.host.clone()).collect(),
            }
        })
        .collect();
    session.console.print(&rows, |out| {
        out.headers(&["ACTION", "KIND", "NAME", "+ID", "HOSTS"]);
        for row in &rows {
            let (kind, name) = (row.kind.as_str(), row.name.as_str());
            let hosts = row.hosts.join(",");
            out.row([
                Cell::from(row.change),
                kind.into(),
                name.into(),
                row.id.to_string().into(),
                hosts.into(),
            ]);
        }
    })?;
    fleet.close().await;
    Ok(if !in_time || !gathered.silent.is_empty() { Exit::NotWell } else { Exit::Well })
}

/// Adds what agentctl made for the sake of objects that go.
fn made_for(wanted: &mut Wanted, held: &Held) {
    for (object, document) in held.world() {
        let owner = document.labels.get(MADE_FOR).and_then(|owner| owner.parse().ok());
        if owner.is_some_and(|owner: ObjectRef| wanted.contains_key(&owner)) {
            wanted.entry(object).or_insert_with(|| document.name.to_string());
        }
    }
}
