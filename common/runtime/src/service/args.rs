//! The arguments of each method, read strictly: an argument that does not exist is an error.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use stackhand_model::{ErrorCode, Kind, ObjectRef, nearest};
use uuid::Uuid;

use crate::api::{Condition, Refused};

#[derive(Deserialize)]
pub(super) struct Apply {
    pub(super) resources: Vec<Value>,
    #[serde(default)]
    pub(super) dry_run: bool,
}

#[derive(Deserialize)]
pub(super) struct Plan {
    #[serde(default)]
    pub(super) resources: Vec<Value>,
    #[serde(default)]
    pub(super) delete: Vec<ObjectRef>,
}

#[derive(Deserialize)]
pub(super) struct Refs {
    pub(super) refs: Vec<ObjectRef>,
}

#[derive(Deserialize)]
pub(super) struct Get {
    pub(super) kind: Option<Kind>,
    pub(super) ids: Option<Vec<Uuid>>,
}

#[derive(Deserialize)]
pub(super) struct Wait {
    pub(super) refs: Vec<ObjectRef>,
    pub(super) condition: Condition,
    pub(super) timeout: f64,
}

#[derive(Deserialize)]
pub(super) struct Act {
    #[serde(rename = "ref")]
    pub(super) object: ObjectRef,
    pub(super) action: String,
    #[serde(default)]
    pub(super) params: Value,
}

#[derive(Deserialize)]
pub(super) struct Events {
    #[serde(default)]
    pub(super) since: u64,
    pub(super) limit: Option<usize>,
    #[serde(default)]
    pub(super) wait_seconds: f64,
}

#[derive(Deserialize)]
pub(super) struct SetAdmin {
    pub(super) enabled: bool,
    pub(super) reason: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct Pause {
    pub(super) reason: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct Nothing {}

/// Every method and its arguments.
pub(super) const METHODS: [(&str, &[&str]); 14] = [
    ("apply", &["resources", "dry_run"]),
    ("plan", &["resources", "delete"]),
    ("delete", &["refs"]),
    ("get", &["kind", "ids"]),
    ("wait", &["refs", "condition", "timeout"]),
    ("act", &["ref", "action", "params"]),
    ("facts", &[]),
    ("preflight", &[]),
    ("events", &["since", "limit", "wait_seconds"]),
    ("report", &[]),
    ("set_admin", &["enabled", "reason"]),
    ("pause", &["reason"]),
    ("resume", &[]),
    ("ping", &[]),
];

/// Reads a method's arguments. Null counts as absent.
pub(super) fn read<T: DeserializeOwned>(
    method: &str,
    mut args: Map<String, Value>,
) -> Result<T, Refused> {
    let known = METHODS.iter().find(|(name, _)| *name == method).map_or(&[][..], |(_, it)| it);
    let bad = |message: String| Refused::new(ErrorCode::BadRequest, message);
    if let Some(unknown) = args.keys().find(|key| !known.contains(&key.as_str())) {
        let shown: String = unknown.chars().take(80).collect();
        let mut message = format!("{method} has no argument {shown:?}");
        match nearest(unknown, known.iter().copied()) {
            Some(near) => message.push_str(&format!("; did you mean `{near}`?")),
            None if known.is_empty() => message.push_str("; it takes none"),
            None => message.push_str(&format!("; it takes `{}`", known.join("`, `"))),
        }
        return Err(bad(message).at(&shown));
    }
    args.retain(|_, value| !value.is_null());
    serde_path_to_error::deserialize(Value::Object(args)).map_err(|error| {
        let path = error.path().to_string();
        let problem = error.into_inner();
        match path.as_str() {
            "." => bad(format!("{method}: {problem}")),
            _ => bad(format!("{method}: argument {path}: {problem}")).at(&path),
        }
    })
}
