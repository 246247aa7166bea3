//! Errors that travel to callers.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a caller can do about a failure. Callers branch on this, never on text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request itself is wrong; sending it again cannot help. Correct it.
    BadRequest,
    /// The caller may not do this: unsigned, untrusted or replayed. Check keys and clocks.
    Forbidden,
    /// The object is not known here. Check the id and the host.
    NotFound,
    /// The request contradicts something accepted earlier, or a newer generation is held. Look again, then decide.
    Conflict,
    /// The object is in a state in which this cannot be done. Bring it into another first.
    WrongState,
    /// This build, host or backend cannot do it. Choose another.
    Unsupported,
    /// A limit is reached: disk, memory, address pool. Free something or choose another host.
    Exhausted,
    /// Something the agent needs is away for now. Try again.
    Unavailable,
    /// The time given was not enough. The work may go on.
    Timeout,
    /// A defect in the agent or an answer it cannot explain. See its log.
    Internal,
}

impl ErrorCode {
    /// The name as written in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::WrongState => "wrong_state",
            Self::Unsupported => "unsupported",
            Self::Exhausted => "exhausted",
            Self::Unavailable => "unavailable",
            Self::Timeout => "timeout",
            Self::Internal => "internal",
        }
    }

    /// The exception class under which the code travels as a remote failure.
    #[must_use]
    pub fn class(self) -> &'static str {
        match self {
            Self::BadRequest => "BadRequest",
            Self::Forbidden => "Forbidden",
            Self::NotFound => "NotFound",
            Self::Conflict => "Conflict",
            Self::WrongState => "WrongState",
            Self::Unsupported => "Unsupported",
            Self::Exhausted => "Exhausted",
            Self::Unavailable => "Unavailable",
            Self::Timeout => "Timeout",
            Self::Internal => "Internal",
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What is wrong with a document, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub struct DocumentError {
    /// The document as far as it could be read, for example `Port web-1`.
    pub document: String,
    /// Path of the field, for example `spec.fixed_ips[0].address`; empty for the whole.
    pub field: String,
    /// What is wrong and what was expected.
    pub problem: String,
    /// File, line and column, where the document came from text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<String>,
}

impl fmt::Display for DocumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(location) = &self.location {
            write!(f, "{location}: ")?;
        }
        write!(f, "{}", self.document)?;
        if !self.field.is_empty() {
            write!(f, ": {}", self.field)?;
        }
        write!(f, ": {}", self.problem)
    }
}
