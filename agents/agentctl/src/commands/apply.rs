//! `agentctl apply` and `agentctl plan`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Serialize;
use serde_json::Value;
use stackhand_model::{Document, Kind, ObjectRef};
use stackhand_runtime::api::{Condition, FieldChange};
use uuid::Uuid;

use super::Session;
use crate::apply::{carry_out, client, prepare, rehearse, targets};
use crate::console::Output;
use crate::exit::{Exit, Usage};
use crate::fleet::Filter;
use crate::manifest::held::Place;
use crate::manifest::plan::{Action, Plan};
use crate::manifest::source::{self, Piece};
use crate::objects::{Gathered, gather_all};
use crate::progress::watch;
use crate::table::{Cell, Table, Tone};

/// Where manifests come from.
#[derive(Args, Debug)]
pub(crate) struct Sources {
    /// A manifest: a file, a folder, or - for standard input; may be repeated
    #[arg(short, long = "file", value_name = "FILE|DIR|-")]
    files: Vec<PathBuf>,
    /// What ${NAME} in the manifest stands for; may be repeated
    #[arg(long = "set", value_parser = source::parse_set, value_name = "NAME=VALUE")]
    set: Vec<(String, String)>,
    /// A file of such values, `NAME: value` a line; may be repeated, --set wins
    #[arg(long, value_name = "FILE")]
    values: Vec<PathBuf>,
    /// A host that is down and will not come back: what it may hold is not waited for; may be
    /// repeated
    #[arg(long, value_name = "HOST")]
    assume_lost: Vec<String>,
    /// Delete everything of this cloud that the manifest does not name
    #[arg(long)]
    prune: bool,
}

impl Sources {
    /// Reads them.
    ///
    /// # Errors
    ///
    /// Every problem of all files.
    pub(crate) fn read(&self) -> Result<Vec<Piece>> {
        if self.files.is_empty() {
            bail!(Usage::new("give a manifest by --file: a file, a folder, or -".to_owned()));
        }
        let values = source::values(&self.values, &self.set)?;
        Ok(source::read(&self.files, &values)?)
    }
}

/// Apply a manifest: make the hosts as it says.
///
/// A manifest is YAML or JSON: documents of kind, name and spec, see `agentctl schema`. Names
/// stand for ids. What it leaves open is chosen: hosts, Ethernet and IP addresses, segments;
/// earlier choices are kept. Applying twice changes nothing. Everything is checked, also by the
/// agents, before anything is sent.
///
/// Short forms: `flavor`, `networks: [int1]`, `ports: [web]` and `volumes: [data]` of an instance,
/// `{network: int1}` as an interface or gateway of a router, `network` and `instance` of a floating
/// IP. A volume of an instance is attached by itself. See docs/reference/documents.md.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl apply -f cloud.yaml --wait
  agentctl apply -f site/ --set HOST=node1 --dry-run
  agentctl apply -f site/ --values north.yaml --prune
  cat web.yaml | agentctl apply -f - --wait=60")]
pub(crate) struct Apply {
    #[command(flatten)]
    sources: Sources,
    /// Do not ask before objects are deleted
    #[arg(long)]
    yes: bool,
    /// Check everything, send nothing
    #[arg(long)]
    dry_run: bool,
    /// Wait until all objects are active, telling how they get on; at most this many seconds
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true,
          default_missing_value = "300", value_parser = clap::value_parser!(u64).range(1..=3600))]
    wait: Option<u64>,
}

/// Show what applying a manifest would change: documents, and steps on the hosts.
///
/// With --host and without a manifest: what on that host differs from what its agents hold, and what
/// they would do about it. Sends nothing that is kept, touches nothing. Exit status 3 when something
/// would change.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl plan -f cloud.yaml
  agentctl diff -f cloud.yaml -v
  agentctl diff --host node1")]
pub(crate) struct PlanCommand {
    #[command(flatten)]
    sources: Sources,
    /// Compare this host with what its agents hold
    #[arg(long, value_name = "HOST", conflicts_with_all = ["files", "prune", "assume_lost"])]
    host: Option<String>,
    /// Show what would be done on the hosts too, in the kernel's terms
    #[arg(short = 'v', long)]
    steps: bool,
}

/// One document at one agent.
#[derive(Clone, Debug, Serialize)]
struct ChangeRow {
    action: Action,
    kind: Kind,
    name: String,
    id: Uuid,
    host: String,
    generation: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    fields: Vec<FieldChange>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    steps: Vec<String>,
}

pub(crate) async fn run(args: &Apply, session: &mut Session) -> Result<Exit> {
    let pieces = args.sources.read()?;
    let fleet = session.fleet().await?;
    let lock = match args.dry_run {
        true => None,
        false => Some(fleet.lock().await?),
    };
    let mut gathered = gather_all(&fleet, &Filter::default()).await?;
    gathered.held.assume_lost(&args.sources.assume_lost);
    warn_of_silent(&gathered, session);
    let (_completed, plan) = prepare(&fleet, &mut gathered, pieces, args.sources.prune).await?;
    rehearse(&gathered.members, &plan).await?;
    if args.sources.prune && !args.dry_run && !args.yes {
        confirm(&plan, session)?;
    }
    let limit = Duration::from_secs(args.wait.unwrap_or(300));
    if !args.dry_run && !plan.is_empty() {
        carry_out(&gathered, &plan, limit, &mut session.console).await?;
    }
    // Others may go on: what follows only looks.
    drop(lock);
    let rows = rows(&plan);
    let mut exit = Exit::Well;
    if let Some(seconds) = args.wait
        && !args.dry_run
    {
        let limit = Duration::from_secs(seconds);
        let console = &mut session.console;
        let outcome =
            watch(&gathered.members, targets(&plan), Condition::Active, limit, console).await?;
        exit = outcome.exit();
    }
    session.console.print(&rows, |out| table(&rows, out))?;
    if args.dry_run {
        session.console.note("agentctl: dry run: nothing was sent");
    }
    fleet.close().await;
    Ok(exit)
}

pub(crate) async fn show_plan(args: &PlanCommand, session: &mut Session) -> Result<Exit> {
    if let Some(host) = &args.host {
        return super::drift::run(host, session).await;
    }
    let pieces = args.sources.read()?;
    let fleet = session.fleet().await?;
    let mut gathered = gather_all(&fleet, &Filter::default()).await?;
    gathered.held.assume_lost(&args.sources.assume_lost);
    warn_of_silent(&gathered, session);
    let (_completed, plan) = prepare(&fleet, &mut gathered, pieces, args.sources.prune).await?;
    let mut rows = rows(&plan);
    rows.retain(|row| row.action != Action::Unchanged);
    ask_agents(&gathered, &plan, &mut rows, args.steps).await?;
    session.console.print(&rows, |out| table(&rows, out))?;
    if matches!(session.console.output(), Output::Table | Output::Wide) {
        let text = details(&rows);
        session.console.text(&text)?;
    }
    fleet.close().await;
    if rows.is_empty() {
        session.console.note("agentctl: nothing would change");
    }
    Ok(if rows.is_empty() { Exit::Well } else { Exit::NotWell })
}

/// Adds what agents say would change.
async fn ask_agents(
    gathered: &Gathered,
    plan: &Plan,
    rows: &mut [ChangeRow],
    steps: bool,
) -> Result<()> {
    let mut batches: BTreeMap<Place, Vec<Document>> = BTreeMap::new();
    let mut going: BTreeMap<Place, Vec<ObjectRef>> = BTreeMap::new();
    for item in &plan.items {
        if item.action.is_sent() {
            batches.entry(item.place.clone()).or_default().push(item.document.clone());
        } else if item.action != Action::Unchanged {
            batches.entry(item.place.clone()).or_default();
            going.entry(item.place.clone()).or_default().push(item.document.object());
        }
    }
    for (place, documents) in batches {
        let going = going.get(&place).map_or(&[][..], Vec::as_slice);
        let planned = client(&gathered.members, &place)?
            .plan(&documents, going)
            .await
            .with_context(|| format!("cannot ask {place} for its plan"))?;
        let theirs =
            |row: &&mut ChangeRow| row.host == place.host && row.kind.agent() == place.agent;
        for row in rows.iter_mut().filter(theirs) {
            let of_row = |object: Option<ObjectRef>| {
                object.is_some_and(|it| it.id == row.id && it.kind == row.kind)
            };
            let fields = planned.documents.iter().filter(|it| of_row(Some(it.object)));
            row.fields = fields.flat_map(|it| it.fields.clone()).collect();
            if steps {
                let theirs = planned.steps.iter().filter(|step| of_row(step.object));
                row.steps = theirs.map(|step| step.change.clone()).collect();
            }
        }
        // Steps that serve no single object are told at the agent's first row.
        let loose = planned.steps.iter().filter(|step| step.object.is_none());
        if steps && let Some(row) = rows.iter_mut().find(theirs) {
            row.steps.extend(loose.map(|step| step.change.clone()));
        }
    }
    Ok(())
}

/// Shows what would be deleted and asks whether it may.
fn confirm(plan: &Plan, session: &mut Session) -> Result<()> {
    let going = plan.deleted();
    if going.is_empty() {
        return Ok(());
    }
    for (object, name) in &going {
        session.console.note(&format!("  delete {} {name}", object.kind));
    }
    let what = match going.len() {
        1 => "one object".to_owned(),
        several => format!("{several} objects"),
    };
    if !session.console.ask(&format!("Delete {what} of the cloud? [y/N] "))? {
        bail!(Usage::new(format!("{what} would be deleted; give --yes if that is wanted")));
    }
    Ok(())
}

/// Agents that do not answer hold documents that are not seen now.
fn warn_of_silent(gathered: &Gathered, session: &mut Session) {
    for silent in &gathered.silent {
        session.console.note(&format!("agentctl: what it holds is not looked at: {silent}"));
    }
}

fn rows(plan: &Plan) -> Vec<ChangeRow> {
    plan.items
        .iter()
        .map(|item| ChangeRow {
            action: item.action,
            kind: item.document.kind(),
            name: item.document.name.to_string(),
            id: item.document.id,
            host: item.place.host.clone(),
            generation: item.document.generation,
            fields: Vec::new(),
            steps: Vec::new(),
        })
        .collect()
}

fn table(rows: &[ChangeRow], out: &mut Table) {
    out.headers(&["ACTION", "KIND", "NAME", "+ID", "HOST", "+GENERATION"]);
    for row in rows {
        let tone = match row.action {
            Action::Create | Action::Copy => Tone::Good,
            Action::Update => Tone::Warning,
            Action::Delete => Tone::Bad,
            Action::Unchanged | Action::Drop => Tone::Plain,
        };
        out.row([
            Cell::toned(row.action.as_str(), tone),
            Cell::from(row.kind.as_str()),
            Cell::from(row.name.as_str()),
            Cell::from(row.id.to_string()),
            Cell::from(row.host.as_str()),
            Cell::from(row.generation.to_string()),
        ]);
    }
}

/// Fields and steps, one a line, under their object.
fn details(rows: &[ChangeRow]) -> String {
    let mut text = String::new();
    let shown = |value: &Value| match value {
        Value::Null => "nothing".to_owned(),
        other => other.to_string(),
    };
    for row in rows.iter().filter(|row| !row.fields.is_empty() || !row.steps.is_empty()) {
        text.push_str(&format!("\n{} {} on {}\n", row.kind, row.name, row.host));
        for change in &row.fields {
            let (from, to) = (shown(&change.from), shown(&change.to));
            text.push_str(&format!("  {}: {from} -> {to}\n", change.field));
        }
        for step in &row.steps {
            text.push_str(&format!("  * {}\n", crate::console::tame(step)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches;

    use super::*;

    #[test]
    fn a_manifest_must_be_given() {
        let command = Apply::augment_args(clap::Command::new("apply"));
        let matches = command.try_get_matches_from(["apply"]).unwrap();
        let problem = Apply::from_arg_matches(&matches).unwrap().sources.read().unwrap_err();
        assert!(problem.is::<Usage>() && problem.to_string().contains("--file"), "{problem}");
    }
}
