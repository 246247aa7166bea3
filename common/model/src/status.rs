//! What an agent says about an object.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ObjectRef;

/// Where an object is on its way from wish to fact.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Accepted; work is under way or waits for something named in the reason.
    Pending,
    /// The host is as the document says.
    Active,
    /// The last attempt failed; the reason says why. It is tried again.
    Error,
    /// A delete was accepted and is under way.
    Deleting,
}

impl State {
    /// The name as written in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Error => "error",
            Self::Deleting => "deleting",
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// An agent's answer about one object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// The object.
    pub object: ObjectRef,
    /// Where it stands.
    pub state: State,
    /// Why it is not active, with the remedy where one is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The document's generation that this state is about.
    pub generation: u64,
    /// Facts seen on the host, by kind: link names, paths, addresses, power state.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub observed: Value,
}
