//! From a manifest with gaps to complete documents.
//!
//! Pure: the manifest and what the agents hold go in, documents or every problem come out.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use stackhand_model::{Document, Kind, ObjectRef, Spec};
use uuid::Uuid;

use super::draft::{Draft, Drafts, drafts};
use super::expand::{MADE_FOR, expand};
use super::held::Held;
use super::source::Piece;
use super::spots::Origin;
use super::{addresses, check, floating, guest, hosts};

/// The label that names the cloud of a document.
pub(crate) const CLOUD: &str = "cloud";

/// The label of Host documents that no manifest wrote.
const AS_TOLD: &str = "told-by";

/// A manifest whose gaps are filled.
#[derive(Clone, Debug, Default)]
pub(crate) struct Completed {
    /// What is wanted, ready to be sent.
    pub(crate) documents: BTreeMap<ObjectRef, Document>,
    /// Instances that wait for storage: which attachment fills which of their volumes. The
    /// documents have a stand-in there.
    pub(crate) awaited: BTreeMap<ObjectRef, BTreeMap<usize, ObjectRef>>,
}

/// Documents of the hosts, as the settings of their network agents say. What an operator wrote
/// wins.
fn hosts_as_told(pieces: &[Piece], held: &Held) -> Vec<Piece> {
    let written: BTreeSet<&str> = pieces
        .iter()
        .filter(|it| {
            it.value["kind"].as_str().and_then(|kind| kind.parse().ok()) == Some(Kind::Host)
        })
        .filter_map(|it| it.value["name"].as_str())
        .collect();
    let by_hand = |host: &str| {
        let mut documents = held.of_kind(Kind::Host).into_values();
        documents.any(|it| it.name.as_str() == host && !it.labels.contains_key(AS_TOLD))
    };
    held.told
        .iter()
        .filter(|(host, spec)| {
            spec.as_object().is_some_and(|fields| !fields.is_empty())
                && !written.contains(host.as_str())
                && !by_hand(host)
        })
        .map(|(host, spec)| {
            let source = format!("settings of network-agent on {host}");
            let value = json!({
                "kind": "Host", "name": host, "labels": {AS_TOLD: "settings"}, "spec": spec,
            });
            Piece { origin: Origin::of_text(&source, "", 1).remove(0), value }
        })
        .collect()
}

/// Fills the gaps of a manifest.
///
/// # Errors
///
/// Every problem of the whole manifest.
pub(crate) fn complete(
    mut pieces: Vec<Piece>,
    held: &Held,
    cloud: &str,
) -> Result<Completed, Vec<String>> {
    pieces.extend(hosts_as_told(&pieces, held));
    let mut drafts = drafts(expand(pieces, cloud)?, cloud)?;
    let mut problems = Vec::new();
    floating::bind(&mut drafts, held, cloud, &mut problems);
    hosts::choose(&mut drafts, held, &mut problems);
    addresses::choose(&mut drafts, held, &mut problems);
    guest::tell(&mut drafts, held);

    let mut completed = Completed::default();
    let (instances, others): (Vec<ObjectRef>, Vec<ObjectRef>) =
        drafts.keys().copied().partition(|object| object.kind == Kind::Instance);
    for object in others {
        if let Some(draft) = drafts.get_mut(&object) {
            if object.kind == Kind::Volume {
                tell_image(draft, held, &completed.documents);
            }
            match finish(draft, held.newest(object), cloud) {
                Ok(document) => {
                    completed.documents.insert(object, document);
                }
                Err(problem) => tell(draft, problem, &mut problems),
            }
        }
    }
    for object in instances {
        plug_ports(&mut drafts, object, held, &completed.documents);
        let awaited = plug_volumes(&mut drafts, object, held, &completed.documents);
        if let Some(draft) = drafts.get_mut(&object) {
            match finish(draft, held.newest(object), cloud) {
                Ok(document) => {
                    completed.documents.insert(object, document);
                }
                Err(problem) => tell(draft, problem, &mut problems),
            }
        }
        if !awaited.is_empty() {
            completed.awaited.insert(object, awaited);
        }
    }
    // A document that could not be read makes others look wrong that refer to it.
    if problems.is_empty() {
        problems = check::across(&drafts, &completed.documents, held, cloud);
    }
    if problems.is_empty() { Ok(completed) } else { Err(dedup(problems)) }
}

/// Adds a problem, unless it is but the consequence of another: a field that could not be chosen
/// is missing, too.
fn tell(draft: &Draft, problem: String, problems: &mut Vec<String>) {
    let about = format!(": {}: ", draft.title());
    let told = problems.iter().any(|it| it.contains(&about));
    let consequence = ["missing field", "is needed"].iter().any(|it| problem.contains(it));
    if !(told && consequence) {
        problems.push(problem);
    }
}

/// Keeps the first of several equal problems, in order.
fn dedup(problems: Vec<String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    problems.into_iter().filter(|problem| seen.insert(problem.clone())).collect()
}

/// Tells a volume what the image is that it starts from: storage agents have no image documents.
fn tell_image(draft: &mut Draft, held: &Held, documents: &BTreeMap<ObjectRef, Document>) {
    let image = draft.field("source").and_then(|source| source["image"].as_str()?.parse().ok());
    let Some(id) = image else { return };
    let object = ObjectRef { kind: Kind::Image, id };
    let image = documents.get(&object).or_else(|| held.newest(object)).map(|it| &it.spec);
    if let Some(Spec::Image(image)) = image
        && let Ok(image) = serde_json::to_value(image)
        && draft.field("image").is_none()
    {
        draft.set("image", image);
    }
}

/// Fills in what an instance has to know of its ports.
fn plug_ports(
    drafts: &mut Drafts,
    object: ObjectRef,
    held: &Held,
    documents: &BTreeMap<ObjectRef, Document>,
) {
    let Some(draft) = drafts.get_mut(&object) else { return };
    let spec = |kind: Kind, id: Uuid| {
        let object = ObjectRef { kind, id };
        documents.get(&object).or_else(|| held.newest(object)).map(|document| &document.spec)
    };
    for item in draft.items_mut("ports") {
        let id = item["port"].as_str().and_then(|id| id.parse::<Uuid>().ok());
        let (Some(id), Value::Object(fields)) = (id, item) else { continue };
        let Some(Spec::Port(port)) = spec(Kind::Port, id) else { continue };
        fields.entry("mac").or_insert_with(|| port.mac.to_string().into());
        fields.entry("network").or_insert_with(|| port.network.to_string().into());
        if port.queues > 1 {
            fields.entry("queues").or_insert_with(|| port.queues.into());
        }
        let Some(Spec::Network(network)) = spec(Kind::Network, port.network.0) else { continue };
        if let Some(mtu) = network.mtu {
            fields.entry("mtu").or_insert_with(|| mtu.into());
        }
        if let Ok(addresses) = serde_json::to_value(network.guest_addresses(port)) {
            fields.entry("addresses").or_insert(addresses);
        }
    }
}

/// Fills in the connections of an instance's volumes, as far as the storage agents have answered.
/// Returns which attachments are still awaited.
fn plug_volumes(
    drafts: &mut Drafts,
    object: ObjectRef,
    held: &Held,
    documents: &BTreeMap<ObjectRef, Document>,
) -> BTreeMap<usize, ObjectRef> {
    let mut awaited = BTreeMap::new();
    let attachments: BTreeMap<Uuid, ObjectRef> = documents
        .iter()
        .filter_map(|(attachment, document)| match &document.spec {
            Spec::Attachment(spec) => {
                let owner = document.labels.get(MADE_FOR)?.parse::<ObjectRef>().ok()?;
                (owner == object).then_some((spec.volume.0, *attachment))
            }
            _ => None,
        })
        .collect();
    let Some(draft) = drafts.get_mut(&object) else { return awaited };
    for (index, item) in draft.items_mut("volumes").enumerate() {
        let volume = item["volume"].as_str().and_then(|id| id.parse::<Uuid>().ok());
        let size =
            volume.map(|id| ObjectRef { kind: Kind::Volume, id }).and_then(
                |object| match documents
                    .get(&object)
                    .or_else(|| held.newest(object))
                    .map(|it| &it.spec)
                {
                    Some(Spec::Volume(volume)) => Some(volume.size_gib),
                    _ => None,
                },
            );
        if let (Value::Object(fields), Some(size)) = (&mut *item, size) {
            fields.entry("size_gib").or_insert_with(|| size.into());
        }
        let attachment = volume.and_then(|volume| attachments.get(&volume));
        let (Some(attachment), Value::Object(fields)) = (attachment, item) else { continue };
        if fields.contains_key("connection") {
            continue;
        }
        let known = documents
            .get(attachment)
            .and_then(|document| held.connection(*attachment, document.generation));
        let connection = known.and_then(|known| serde_json::to_value(known).ok());
        let connection = connection.unwrap_or_else(|| {
            awaited.insert(index, *attachment);
            stand_in()
        });
        fields.insert("connection".into(), connection);
    }
    awaited
}

/// Stands in a document for a connection that is not known yet. It is never sent.
fn stand_in() -> Value {
    json!({"type": "block", "path": "/awaiting-attachment"})
}

/// Reads a complete draft and gives it its generation: that of the document held if they say the
/// same, else the next.
fn finish(draft: &mut Draft, held: Option<&Document>, cloud: &str) -> Result<Document, String> {
    draft.set_label(CLOUD, cloud);
    let mut document = draft.read()?;
    if document.generation == 0 {
        document.generation = next_generation(&document, held);
    }
    Ok(document)
}

/// The generation for a document, given the newest one that is held.
pub(crate) fn next_generation(document: &Document, held: Option<&Document>) -> u64 {
    match held {
        Some(held) if says_the_same(held, document) => held.generation,
        Some(held) => held.generation + 1,
        None => 1,
    }
}

/// Whether two documents differ in nothing but their generation.
pub(crate) fn says_the_same(one: &Document, other: &Document) -> bool {
    one.id == other.id
        && one.name == other.name
        && one.labels == other.labels
        && one.spec == other.spec
}
