//! `agentctl delete`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Serialize;
use stackhand_model::{Kind, ObjectRef, Spec};
use stackhand_runtime::api::Condition;
use uuid::Uuid;

use super::Session;
use crate::apply::client;
use crate::exit::{Exit, NotWell, Usage};
use crate::fleet::Filter;
use crate::manifest::draft::drafts;
use crate::manifest::expand::{MADE_FOR, expand};
use crate::manifest::held::{Held, Place};
use crate::manifest::source;
use crate::objects::{self, Gathered, gather_all};
use crate::progress::{Target, watch};
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
    let mut wanted: BTreeMap<ObjectRef, String> = BTreeMap::new();
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
    let mut late = false;
    for stage in stages(&wanted, &gathered.held) {
        let is_last = stage.is_last;
        let targets = send(&gathered, &stage.objects, &wanted).await?;
        if !is_last || args.wait.is_some() {
            let console = &mut session.console;
            let outcome =
                watch(&gathered.members, targets, Condition::Gone, limit, console).await?;
            late |= !outcome.late.is_empty();
            if late && !is_last {
                bail!(NotWell(
                    "instances are not gone, so their volumes stay; delete again to go on"
                        .to_owned()
                ));
            }
        }
    }
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
    Ok(if late || !gathered.silent.is_empty() { Exit::NotWell } else { Exit::Well })
}

/// Adds what agentctl made for the sake of objects that go.
fn made_for(wanted: &mut BTreeMap<ObjectRef, String>, held: &Held) {
    for (object, document) in held.world() {
        let owner = document.labels.get(MADE_FOR).and_then(|owner| owner.parse().ok());
        if owner.is_some_and(|owner: ObjectRef| wanted.contains_key(&owner)) {
            wanted.entry(object).or_insert_with(|| document.name.to_string());
        }
    }
}

struct Stage {
    objects: Vec<ObjectRef>,
    is_last: bool,
}

/// Instances that use volumes come first and alone, because a volume in use must not be taken
/// away; then everything else.
fn stages(wanted: &BTreeMap<ObjectRef, String>, held: &Held) -> Vec<Stage> {
    let storage = wanted.keys().any(|object| {
        matches!(object.kind, Kind::Attachment | Kind::Volume) && !held.holders(*object).is_empty()
    });
    let uses_volumes = |object: &ObjectRef| {
        held.newest(*object).is_some_and(
            |it| matches!(&it.spec, Spec::Instance(instance) if !instance.volumes.is_empty()),
        )
    };
    let reverse = || wanted.keys().rev().copied();
    let first: Vec<ObjectRef> = reverse().filter(|it| storage && uses_volumes(it)).collect();
    let done: BTreeSet<ObjectRef> = first.iter().copied().collect();
    let rest: Vec<ObjectRef> = reverse().filter(|it| !done.contains(it)).collect();
    let mut stages = Vec::new();
    if !first.is_empty() {
        stages.push(Stage { objects: first, is_last: rest.is_empty() });
    }
    if !rest.is_empty() {
        stages.push(Stage { objects: rest, is_last: true });
    }
    stages
}

/// Asks every holder to delete. Returns what to wait for.
async fn send(
    gathered: &Gathered,
    objects: &[ObjectRef],
    names: &BTreeMap<ObjectRef, String>,
) -> Result<Vec<Target>> {
    let mut batches: BTreeMap<Place, Vec<ObjectRef>> = BTreeMap::new();
    for object in objects {
        for place in gathered.held.holders(*object) {
            batches.entry(place.clone()).or_default().push(*object);
        }
    }
    let mut targets = Vec::new();
    for (place, objects) in batches {
        client(&gathered.members, &place)?
            .delete(&objects)
            .await
            .with_context(|| format!("cannot delete at {place}"))?;
        targets.extend(objects.into_iter().map(|object| Target {
            place: place.clone(),
            object,
            name: names.get(&object).cloned().unwrap_or_default(),
        }));
    }
    Ok(targets)
}
