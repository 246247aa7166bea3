//! Documents for tests.
#![expect(clippy::needless_pass_by_value, reason = "callers write json!(…) in place")]

use std::sync::Arc;

use serde_json::{Value, json};
use stackhand_model::Document;
use stackhand_runtime::agent::Held;
use uuid::Uuid;

/// A volume of 1 GiB of host `here`, with other values for some fields.
pub(crate) fn volume(id: u128, fields: Value) -> Document {
    let mut spec = json!({"host": "here", "size_gib": 1});
    for (key, value) in fields.as_object().unwrap() {
        spec[key] = value.clone();
    }
    document("Volume", id, spec)
}

/// A snapshot of a volume.
pub(crate) fn snapshot(id: u128, volume: u128) -> Document {
    document("Snapshot", id, json!({"volume": Uuid::from_u128(volume)}))
}

/// A volume given to a host.
pub(crate) fn attachment(id: u128, volume: u128, host: &str) -> Document {
    let spec = json!({"volume": Uuid::from_u128(volume), "connector": {"host": host}});
    document("Attachment", id, spec)
}

fn document(kind: &str, id: u128, spec: Value) -> Document {
    let name = format!("{}{id}", kind.to_lowercase());
    let id = Uuid::from_u128(id);
    Document::from_value(&json!({"kind": kind, "id": id, "name": name, "spec": spec})).unwrap()
}

pub(crate) fn held(document: Document) -> Held {
    Held { document: Arc::new(document), deleting: false }
}

pub(crate) fn going(document: Document) -> Held {
    Held { document: Arc::new(document), deleting: true }
}
