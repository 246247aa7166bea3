//! Documents for tests: security groups, which depend on nothing.

use serde_json::json;
use stackhand_model::{Document, Kind, ObjectRef};
use uuid::Uuid;

/// The id of the `n`-th object.
pub(crate) fn id(n: u128) -> Uuid {
    Uuid::from_u128(0x5eed_0000_0000_4000_8000_0000_0000_0000 + n)
}

/// The `n`-th security group.
pub(crate) fn object(n: u128) -> ObjectRef {
    ObjectRef { kind: Kind::SecurityGroup, id: id(n) }
}

/// A document for the `n`-th security group.
pub(crate) fn group(n: u128, name: &str, generation: u64) -> Document {
    Document::from_value(&json!({
        "kind": "SecurityGroup", "id": id(n), "name": name, "generation": generation, "spec": {},
    }))
    .unwrap()
}

/// A document that the network agent has nothing to do with.
pub(crate) fn other_agents_document(n: u128) -> Document {
    Document::from_value(&json!({
        "kind": "Volume", "id": id(n), "name": "v", "spec": {"host": "h", "size_gib": 1},
    }))
    .unwrap()
}
