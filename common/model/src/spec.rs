//! What is wanted of each kind of object. One file per agent.

pub mod compute;
pub mod guest;
pub mod network;
pub mod storage;

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a rule broken by a spec is told: the field's path and the problem.
pub(crate) type Broken = (String, String);

pub(crate) fn broken<T>(field: impl Into<String>, problem: impl Into<String>) -> Result<T, Broken> {
    Err((field.into(), problem.into()))
}

/// Text that must not reach logs or terminals: passwords and keys. It travels and is stored as
/// it is; only `Debug` hides it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

pub(crate) fn yes() -> bool {
    true
}
