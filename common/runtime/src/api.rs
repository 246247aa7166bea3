//! The own API as it travels: what every agent is asked and answers.
//!
//! One topic per agent ([`AgentKind::topic`]) on [`EXCHANGE`], server = host name, version
//! [`VERSION`], no namespace. The agent's half is in [`service`](crate::service), the caller's in
//! [`client`](crate::client). Failures travel as remote failures whose class is
//! [`ErrorCode::class`]; their keyword arguments are those of [`Refused`].
//!
//! | method | arguments | answer |
//! |---|---|---|
//! | `apply` | `resources`, `dry_run`? | [`Applied`] |
//! | `plan` | `resources`?, `delete`? | [`Planned`] |
//! | `delete` | `refs` | [`Deleted`] |
//! | `get` | `kind`?, `ids`? | list of [`Entry`] |
//! | `wait` | `refs`, `condition`, `timeout` | list of [`Settled`], or a `Timeout` failure |
//! | `act` | `ref`, `action`, `params`? | by action |
//! | `facts` | | object |
//! | `preflight` | | [`Report`](crate::preflight::Report) |
//! | `events` | `since`?, `limit`?, `wait_seconds`? | [`Since`](crate::events::Since) |
//! | `report` | | [`Report`](crate::report::Report) |
//! | `set_admin` | `enabled`, `reason`? | [`Control`] |
//! | `pause` | `reason`? | [`Control`] |
//! | `resume` | | [`Control`] |
//! | `ping` | | [`Pong`] |

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use stackhand_bus::{Failure, Target, Version};
use stackhand_model::{AgentKind, Document, ErrorCode, ObjectRef, State, Status};

use crate::agent::{PlannedStep, Refusal};

/// Scope of the topics.
pub const EXCHANGE: &str = "stackhand";

/// The version of the API that agents serve.
pub const VERSION: Version = Version::V1_0;

/// Most documents in one `apply`.
pub const MOST_RESOURCES: usize = 20_000;

/// Longest that `wait` waits.
pub const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Longest that `events` waits for the next one.
pub const LONGEST_POLL: Duration = Duration::from_secs(60);

/// The address of an agent's own API.
#[must_use]
pub fn target(agent: AgentKind, host: &str) -> Target {
    Target::topic(EXCHANGE, agent.topic()).on_server(host).at_version(VERSION)
}

/// What a request did, or would do, to one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// It was not held before.
    Created,
    /// Another content or generation was held.
    Updated,
    /// The same was held.
    Unchanged,
    /// It is kept until its object is gone.
    Deleting,
    /// It was not held, so there is nothing to delete.
    Absent,
}

/// What became of one object of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// The object.
    pub object: ObjectRef,
    /// What happened to its document.
    pub change: Change,
    /// The generation held now; 0 for an absent one.
    pub generation: u64,
}

/// The answer to `apply`. On disk before it is sent, unless it was a dry run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// One for each document, in the order sent.
    pub objects: Vec<Changed>,
    /// Revision of everything that is held; grows with every change.
    pub revision: u64,
    /// Nothing was changed; this is what would have happened.
    pub dry_run: bool,
}

/// The answer to `delete`. On disk before it is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// One for each reference, in the order sent.
    pub objects: Vec<Changed>,
    /// Revision of everything that is held; grows with every change.
    pub revision: u64,
}

/// One field that differs between what is held and what would be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FieldChange {
    /// Path of the field, for example `spec.fixed_ips[0].address`.
    pub field: String,
    /// What is held; null where the field is new.
    #[serde(default)]
    pub from: Value,
    /// What would be held; null where the field goes away.
    #[serde(default)]
    pub to: Value,
}

/// What would happen to one document, and how its content would change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DocumentChange {
    /// The object.
    pub object: ObjectRef,
    /// Its document's name.
    pub name: String,
    /// What would happen.
    pub change: Change,
    /// Fields that would differ; empty where the document is new or goes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<FieldChange>,
}

/// The answer to `plan`: what applying would change, first among documents, then on the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// Documents that were sent or referred to.
    pub documents: Vec<DocumentChange>,
    /// What the next pass would then do on the host.
    pub steps: Vec<PlannedStep>,
}

/// One document that an agent holds, and how its object is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The document as accepted.
    pub document: Document,
    /// How its object is.
    pub status: Status,
    /// When this generation, or its deletion, was accepted.
    pub accepted: Timestamp,
    /// The request that brought it.
    pub request_id: String,
}

/// What `wait` waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    /// The host is as the document says.
    Active,
    /// The agent no longer holds the document, or never did.
    Gone,
    /// The agent tried: it is active, in error or gone.
    Settled,
    /// As active, and the agent has looked at it since it was last told of it: what an action
    /// began is over.
    Done,
}

/// One object at the end of a `wait`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settled {
    /// The object.
    pub object: ObjectRef,
    /// How it is; absent when it is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
}

/// One object that was not there when a `wait` ran out of time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// The object.
    pub object: ObjectRef,
    /// Where it stands; absent when the agent does not hold it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    /// Why it is not there yet.
    pub reason: String,
    /// How far long work on it is, 0 to 100, where the agent tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress_percent: Option<u64>,
}

/// The answer to `ping`. Open to everybody, so it tells little.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// Which agent answers.
    pub agent: AgentKind,
    /// On which host.
    pub host: String,
    /// Its version.
    pub version: String,
    /// Its clock.
    pub time: Timestamp,
    /// When its process began.
    pub started_at: Timestamp,
}

/// What operators set on an agent as a whole. Kept in the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control {
    /// Whether controllers should choose this host for new objects. The agent serves either way.
    pub enabled: bool,
    /// Why it is disabled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why the agent makes no passes, if it was told to make none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<String>,
}

impl Default for Control {
    fn default() -> Self {
        Self { enabled: true, reason: None, paused: None }
    }
}

/// Why an agent refused a request: the keyword arguments of a failure of the own API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// What the caller can do about it.
    pub code: ErrorCode,
    /// What is wrong, naming object, field and remedy.
    pub message: String,
    /// The object it is about, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<ObjectRef>,
    /// The field or argument it is about, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The document as far as it could be read, for example `Port web-1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document: Option<String>,
    /// Every problem found, where there is more than one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Refusal>,
    /// Objects that a `wait` waited for in vain.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waiting: Vec<Waiting>,
}

impl Refused {
    /// A refusal that names nothing in particular.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            object: None,
            field: None,
            document: None,
            problems: Vec::new(),
            waiting: Vec::new(),
        }
    }

    /// Names the field or argument it is about.
    #[must_use]
    pub fn at(mut self, field: &str) -> Self {
        self.field = Some(field.to_owned());
        self
    }

    /// One refusal from several: the first one speaks, all are listed.
    #[must_use]
    pub fn of(mut problems: Vec<Refusal>) -> Self {
        let more = problems.len().saturating_sub(1);
        let first = match problems.first() {
            Some(first) => first.clone(),
            None => Refusal::new(ErrorCode::Internal, "refused without a reason"),
        };
        let mut message = first.message;
        match more {
            0 => problems.clear(),
            1 => message.push_str(" (and one more problem)"),
            _ => message.push_str(&format!(" (and {more} more problems)")),
        }
        let (object, field) = (first.object, first.field);
        Self { object, field, problems, ..Self::new(first.code, message) }
    }

    /// Reads a remote failure. `None`: it is not one of the own API's.
    #[must_use]
    pub fn from_failure(failure: &Failure) -> Option<Self> {
        let mut kwargs = failure.kwargs.clone();
        kwargs.entry("message").or_insert_with(|| failure.message.clone().into());
        serde_json::from_value(Value::Object(kwargs)).ok().or_else(|| {
            // What stands before the API (signatures) has words of its own; the class is ours.
            let code = [ErrorCode::Forbidden, ErrorCode::Unavailable, ErrorCode::Exhausted]
                .into_iter()
                .find(|code| failure.module == "stackhand" && code.class() == failure.class)?;
            Some(Self::new(code, &failure.message))
        })
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        let Refusal { code, message, object, field } = refusal;
        Self { object, field, ..Self::new(code, message) }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        let mut failure = Self::new(refused.code.class(), &refused.message);
        failure.kwargs = match serde_json::to_value(refused) {
            Ok(Value::Object(kwargs)) => kwargs,
            _ => Map::new(),
        };
        failure
    }
}
