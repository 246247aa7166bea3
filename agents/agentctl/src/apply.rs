//! Carrying plans out: documents to agents, storage before compute.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde_json::Value;
use stackhand_bus::BusError;
use stackhand_model::{
    AgentKind, Connector, Document, ErrorCode, IscsiClient, Kind, ObjectRef, Spec,
};
use stackhand_runtime::api::Condition;
use stackhand_runtime::client::{AgentClient, ClientError};

use crate::console::Console;
use crate::exit::{NotWell, Usage};
use crate::fleet::{Fleet, Member};
use crate::manifest::complete::{Completed, complete, next_generation};
use crate::manifest::held::{Held, Place, connection_of};
use crate::manifest::plan::{Action, Item, Plan, Scope, plan};
use crate::manifest::room::Size;
use crate::manifest::source::Piece;
use crate::objects::Gathered;
use crate::progress::{Target, watch};
use crate::removal::{drop_copies, remove};

/// Works out what a manifest means for the agents. Sends nothing. With `prune`, everything else
/// of the cloud goes.
///
/// # Errors
///
/// Every problem of the whole manifest, as [`Usage`]; agents that are needed and down.
pub(crate) async fn prepare(
    fleet: &Fleet,
    gathered: &mut Gathered,
    pieces: Vec<Piece>,
    prune: bool,
) -> Result<(Completed, Plan)> {
    survey(gathered, mentions_instances(&pieces)).await;
    let held = &gathered.held;
    let completed = complete(pieces, held, fleet.cloud()).map_err(Usage::several)?;
    let scope = Scope {
        local: fleet.is_local(),
        all_seen: gathered.silent.is_empty(),
        prune: prune.then(|| fleet.cloud().to_owned()),
    };
    let plan = plan(&completed, held, &scope).map_err(|problems| NotWell(problems.join("; ")))?;
    Ok((completed, plan))
}

fn mentions_instances(pieces: &[Piece]) -> bool {
    pieces.iter().any(|piece| {
        let kind = piece.value["kind"].as_str().and_then(|kind| kind.parse().ok());
        kind == Some(Kind::Instance)
    })
}

/// Asks hosts about themselves: what choosing a host, attaching a volume and building an overlay
/// go by. An agent without an answer is not chosen for its room, and the rest still works.
async fn survey(gathered: &mut Gathered, compute: bool) {
    let asked = |agent| agent == AgentKind::Network || (compute && agent == AgentKind::Compute);
    let members: Vec<Member> =
        gathered.members.iter().filter(|it| asked(it.row.agent)).cloned().collect();
    let answers =
        crate::fleet::ask_all(&members, |member| async move { member.client.facts().await });
    for (member, answer) in answers.await {
        let Ok(facts) = answer else { continue };
        let host = member.row.host;
        if member.row.agent == AgentKind::Network {
            if let Some(told) = facts.get("host") {
                gathered.held.told.insert(host, told.clone());
            }
            continue;
        }
        gathered.held.connectors.insert(host.clone(), connector(&host, &facts));
        if let Some(capacity) = capacity(&facts) {
            gathered.held.capacity.insert(host, capacity);
        }
    }
}

/// What a compute host may give to instances in all.
fn capacity(facts: &Value) -> Option<Size> {
    let within = facts.get("capacity")?;
    let number = |key: &str| within.get(key).and_then(Value::as_u64);
    Some(Size { vcpus: number("vcpus")?, memory_mib: number("memory_mib")? })
}

fn connector(host: &str, facts: &Value) -> Connector {
    let within = facts.get("connector").unwrap_or(facts);
    let text = |key: &str| within.get(key).and_then(Value::as_str);
    Connector {
        host: host.to_owned(),
        initiator: text("initiator").map(str::to_owned),
        client: match text("client") {
            Some("host") => IscsiClient::Host,
            _ => IscsiClient::Qemu,
        },
        address: text("address").and_then(|address| address.parse().ok()),
    }
}

/// Asks every agent whether it would take what it is to be sent.
///
/// # Errors
///
/// Every refusal.
pub(crate) async fn rehearse(members: &[Member], plan: &Plan) -> Result<()> {
    let mut problems = Vec::new();
    let mut asking = FuturesUnordered::new();
    let mut batches: BTreeMap<Place, Vec<Document>> = BTreeMap::new();
    // Both stages at once: an instance is judged with its image.
    for (place, items) in plan.stages().into_iter().flatten() {
        let documents = items.iter().map(|item| item.document.clone());
        batches.entry(place).or_default().extend(documents);
    }
    for (place, documents) in batches {
        let client = client(members, &place)?;
        asking.push(async move { (place, client.dry_run(&documents).await) });
    }
    while let Some((place, answer)) = asking.next().await {
        if let Err(error) = answer {
            problems.extend(refusals(&place, error)?);
        }
    }
    problems.sort();
    if problems.is_empty() { Ok(()) } else { Err(Usage::several(problems).into()) }
}

/// The refusals in an error, or the error itself when nothing was refused.
fn refusals(place: &Place, error: ClientError) -> Result<Vec<String>> {
    match error {
        ClientError::Refused(refused)
            if !matches!(refused.code, ErrorCode::Unavailable | ErrorCode::Internal) =>
        {
            if refused.problems.is_empty() {
                return Ok(vec![format!("{place} refuses: {}", refused.message)]);
            }
            let each = refused.problems.iter();
            Ok(each.map(|it| format!("{place} refuses: {}", it.message)).collect())
        }
        error => Err(anyhow::Error::new(error).context(format!("cannot ask {place}"))),
    }
}

/// Sends a plan's documents: everything but instances first, then, when storage has told how
/// their volumes are reached, instances. Returns what to wait for.
///
/// # Errors
///
/// An agent refuses or is away; an attachment does not become active within `limit`. What was
/// sent before stays, and applying again goes on from there.
pub(crate) async fn carry_out(
    gathered: &Gathered,
    plan: &Plan,
    limit: Duration,
    console: &mut Console,
) -> Result<Vec<Target>> {
    let [first, instances] = plan.stages();
    send(&gathered.members, first).await?;
    let connections = attach(gathered, plan, limit, console).await?;
    let mut ready: Vec<Item> = Vec::new();
    for item in instances.into_values().flatten() {
        let mut item = item.clone();
        fill(&mut item.document, plan, &connections, &gathered.held)?;
        ready.push(item);
    }
    let mut batches: BTreeMap<Place, Vec<&Item>> = BTreeMap::new();
    for item in &ready {
        batches.entry(item.place.clone()).or_default().push(item);
    }
    send(&gathered.members, batches).await?;
    clear(gathered, plan, limit, console).await?;
    Ok(targets(plan))
}

/// Deletes what a plan deletes. Guests let go of what goes before it goes.
async fn clear(
    gathered: &Gathered,
    plan: &Plan,
    limit: Duration,
    console: &mut Console,
) -> Result<()> {
    let going = plan.deleted();
    if going.keys().any(|object| object.kind == Kind::Attachment) {
        let instances: Vec<Target> =
            targets(plan).into_iter().filter(|it| it.object.kind == Kind::Instance).collect();
        let outcome =
            watch(&gathered.members, instances, Condition::Active, limit, console).await?;
        if !outcome.late.is_empty() {
            bail!(NotWell(
                "instances may still use volumes that go; apply again to go on".to_owned()
            ));
        }
    }
    remove(gathered, &going, limit, true, console).await?;
    drop_copies(gathered, plan.dropped()).await
}

/// What a plan brings about, unchanged objects included: they may still be on their way.
pub(crate) fn targets(plan: &Plan) -> Vec<Target> {
    let sent = plan
        .items
        .iter()
        .filter(|item| matches!(item.action, Action::Create | Action::Update | Action::Unchanged));
    sent.map(|item| Target {
        object: item.document.object(),
        place: item.place.clone(),
        name: item.document.name.to_string(),
    })
    .collect()
}

async fn send(members: &[Member], batches: BTreeMap<Place, Vec<&Item>>) -> Result<()> {
    let mut sending = FuturesUnordered::new();
    for (place, items) in batches {
        let client = client(members, &place)?;
        let documents: Vec<Document> = items.iter().map(|item| item.document.clone()).collect();
        sending.push(async move { (place, client.apply(&documents).await) });
    }
    let mut failed = Vec::new();
    while let Some((place, answer)) = sending.next().await {
        if let Err(error) = answer {
            failed.push(match refusals(&place, error) {
                Ok(refused) => refused.join("; "),
                Err(error) => crate::exit::chain(&error),
            });
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    failed.sort();
    bail!("not everything was applied, apply again to go on: {}", failed.join("; "))
}

/// Waits for the attachments that instances need. Returns how each volume is reached.
async fn attach(
    gathered: &Gathered,
    plan: &Plan,
    limit: Duration,
    console: &mut Console,
) -> Result<BTreeMap<ObjectRef, Value>> {
    let needed: BTreeSet<ObjectRef> =
        plan.awaited.values().flat_map(BTreeMap::values).copied().collect();
    let waiting: Vec<Target> =
        targets(plan).into_iter().filter(|it| needed.contains(&it.object)).collect();
    if waiting.is_empty() {
        return Ok(BTreeMap::new());
    }
    let outcome =
        watch(&gathered.members, waiting.clone(), Condition::Active, limit, console).await?;
    if !outcome.late.is_empty() {
        bail!(NotWell("instances wait for their volumes; apply again to go on".to_owned()));
    }
    let mut connections = BTreeMap::new();
    for target in waiting {
        let client = client(&gathered.members, &target.place)?;
        let entries = client
            .get(Some(target.object.kind), Some(&[target.object.id]))
            .await
            .with_context(|| format!("cannot read {} {}", target.object.kind, target.name))?;
        let connection = entries.first().and_then(|entry| connection_of(&entry.status.observed));
        let connection = connection
            .with_context(|| format!("{} tells no connection for {}", target.place, target.name))?;
        connections.insert(target.object, serde_json::to_value(connection)?);
    }
    Ok(connections)
}

/// Puts connections where a document has stand-ins, and corrects its generation.
fn fill(
    document: &mut Document,
    plan: &Plan,
    connections: &BTreeMap<ObjectRef, Value>,
    held: &Held,
) -> Result<()> {
    let object = document.object();
    let Some(awaited) = plan.awaited.get(&object) else { return Ok(()) };
    let Spec::Instance(instance) = &mut document.spec else { return Ok(()) };
    for (index, attachment) in awaited {
        let connection = connections.get(attachment);
        if let (Some(volume), Some(connection)) = (instance.volumes.get_mut(*index), connection) {
            volume.connection = serde_json::from_value(connection.clone())?;
        }
    }
    // It may turn out to be what is held.
    document.generation = next_generation(document, held.newest(object));
    Ok(())
}

/// The client of an agent.
///
/// # Errors
///
/// It is not there.
pub(crate) fn client(members: &[Member], place: &Place) -> Result<AgentClient, BusError> {
    members
        .iter()
        .find(|member| member.row.agent == place.agent && member.row.host == place.host)
        .map(|member| member.client.clone())
        .ok_or_else(|| BusError::Undeliverable { target: place.to_string() })
}
