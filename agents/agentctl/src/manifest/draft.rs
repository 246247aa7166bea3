//! Documents on their way from manifest to agents: plain values that get filled in step by step.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use stackhand_model::{Document, DocumentError, Kind, ObjectRef, resolve_names};
use uuid::Uuid;

use super::source::Piece;
use super::spots::Origin;

/// One document that may still have gaps.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    /// Where it was written.
    pub(crate) origin: Origin,
    /// As written, for error messages.
    pub(crate) raw: Value,
    /// With names resolved and gaps filled.
    pub(crate) value: Value,
}

/// All documents of a manifest, by object, in a fixed order.
pub(crate) type Drafts = BTreeMap<ObjectRef, Draft>;

impl Draft {
    /// A problem of this document, told with its place.
    pub(crate) fn problem(&self, field: &str, problem: impl std::fmt::Display) -> String {
        format!("{}: {}: {field}: {problem}", self.origin.of(field), self.title())
    }

    /// `Port web`, or as much of it as was written.
    pub(crate) fn title(&self) -> String {
        let kind = self.value["kind"].as_str().unwrap_or("document");
        let name = self.value["name"].as_str().unwrap_or("without a name");
        format!("{kind} {name}")
    }

    /// The name as written.
    pub(crate) fn name(&self) -> &str {
        self.value["name"].as_str().unwrap_or_default()
    }

    /// A field of the spec.
    pub(crate) fn field(&self, name: &str) -> Option<&Value> {
        self.value.get("spec").and_then(|spec| spec.get(name)).filter(|value| !value.is_null())
    }

    /// A field of the spec as text.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        self.field(name).and_then(Value::as_str)
    }

    /// A reference in the spec.
    pub(crate) fn id(&self, name: &str) -> Option<Uuid> {
        self.text(name).and_then(|text| text.parse().ok())
    }

    /// The spec as a type, where it has no gaps left.
    pub(crate) fn spec<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_value(self.value.get("spec")?.clone()).ok()
    }

    /// Fills in a field of the spec.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<Value>) {
        if let Some(Value::Object(spec)) = self.value.get_mut("spec") {
            spec.insert(name.to_owned(), value.into());
        }
    }

    /// Takes a field out of the spec.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        self.value.get_mut("spec")?.as_object_mut()?.remove(name)
    }

    /// The elements of a list in the spec.
    pub(crate) fn items(&self, name: &str) -> impl Iterator<Item = &Value> {
        self.field(name).and_then(Value::as_array).into_iter().flatten()
    }

    /// The elements of a list in the spec, to be filled in.
    pub(crate) fn items_mut(&mut self, name: &str) -> impl Iterator<Item = &mut Value> {
        self.value
            .get_mut("spec")
            .and_then(|spec| spec.get_mut(name))
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
    }

    /// The labels.
    pub(crate) fn label(&self, name: &str) -> Option<&str> {
        self.value.get("labels").and_then(|labels| labels.get(name)).and_then(Value::as_str)
    }

    /// Sets a label.
    pub(crate) fn set_label(&mut self, name: &str, text: &str) {
        if let Value::Object(document) = &mut self.value
            && let Value::Object(labels) =
                document.entry("labels").or_insert_with(|| Map::new().into())
        {
            labels.insert(name.to_owned(), text.into());
        }
    }

    /// The document, if nothing is missing.
    ///
    /// # Errors
    ///
    /// What is missing or wrong, with the place.
    pub(crate) fn read(&self) -> Result<Document, String> {
        Document::from_value(&self.value).map_err(|mut error| {
            error.location = Some(self.origin.of(&written(&error)));
            error.to_string()
        })
    }
}

/// The field that an error is about, an unknown one included.
fn written(error: &DocumentError) -> String {
    let field = &error.field;
    match error.problem.strip_prefix("unknown field `").and_then(|rest| rest.split_once('`')) {
        Some((name, _)) if field.is_empty() => name.to_owned(),
        Some((name, _)) if !field.ends_with(name) => format!("{field}.{name}"),
        _ => field.clone(),
    }
}

/// Reads pieces into drafts: kind and id known, names resolved within the cloud.
///
/// # Errors
///
/// Every piece without kind and name, and every object that is there twice.
pub(crate) fn drafts(pieces: Vec<Piece>, cloud: &str) -> Result<Drafts, Vec<String>> {
    let mut drafts = Drafts::new();
    let mut problems = Vec::new();
    for Piece { origin, value: raw } in pieces {
        let mut value = raw.clone();
        resolve_names(cloud, &mut value);
        let draft = Draft { origin, raw, value };
        let kind = draft.value["kind"].as_str().and_then(|kind| kind.parse::<Kind>().ok());
        let id = draft.value["id"].as_str().and_then(|id| id.parse::<Uuid>().ok());
        let (Some(kind), Some(id), Some(_)) = (kind, id, draft.value["name"].as_str()) else {
            // It cannot be read either; that tells what is missing.
            problems.extend(draft.read().err());
            continue;
        };
        let object = ObjectRef { kind, id };
        if let Some(first) = drafts.get(&object) {
            problems.push(
                draft.problem("name", format!("is already used at {}", first.origin.of("name"))),
            );
            continue;
        }
        drafts.insert(object, draft);
    }
    if problems.is_empty() { Ok(drafts) } else { Err(problems) }
}
