//! What an agent is to the runtime: the part that differs between compute, network and storage.
//!
//! The runtime takes requests, keeps documents in the ledger, decides when a pass is due and
//! reports. An [`Agent`] judges a change against what is held ([`Agent::admit`]), says what a
//! pass would do ([`Agent::plan`]), makes a pass ([`Agent::pass`]), and performs actions that
//! are not wishes, such as a reboot ([`Agent::act`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use stackhand_model::{AgentKind, Document, ErrorCode, ObjectRef, State};

/// A document that was accepted, and whether its object is to go.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    /// The document as accepted.
    pub document: Arc<Document>,
    /// A delete was accepted; the document is kept until the object is gone.
    pub deleting: bool,
}

/// Everything that is wanted of this host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Desired {
    /// Every document held, by its object.
    pub objects: BTreeMap<ObjectRef, Held>,
    /// Grows by one with every change of `objects`.
    pub revision: u64,
}

/// Why a pass is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The agent has just started: look at everything, adopt what runs.
    Start,
    /// Documents changed.
    Change,
    /// The host changed: a netlink, nft or libvirt event.
    Host,
    /// An object that failed is due again.
    Retry,
    /// Nothing happened for a while: undo drift that nobody announced.
    Timer,
}

/// One pass's worth of work.
#[derive(Clone, Debug)]
pub struct Work {
    /// Everything that is wanted.
    pub desired: Arc<Desired>,
    /// Objects that may be worked on now. Others failed lately and wait out their back-off:
    /// leave them as they are and report nothing about them.
    pub due: BTreeSet<ObjectRef>,
    /// Why the pass is made.
    pub cause: Cause,
}

/// Facts seen on the host, for whoever asks how an object is.
#[derive(Clone)]
pub enum Observed {
    /// As they are.
    Facts(Value),
    /// Made when somebody asks, of what the agent saw last: an agent with thousands of objects is
    /// asked about few of them.
    Sight(Arc<dyn Sight>),
}

/// What an agent saw last.
pub trait Sight: Send + Sync {
    /// Facts about an object; null if there are none.
    fn facts(&self, object: &ObjectRef) -> Value;
}

impl Observed {
    /// The facts about an object.
    #[must_use]
    pub fn facts(&self, object: &ObjectRef) -> Value {
        match self {
            Self::Facts(facts) => facts.clone(),
            Self::Sight(sight) => sight.facts(object),
        }
    }
}

impl Default for Observed {
    fn default() -> Self {
        Self::Facts(Value::Null)
    }
}

impl From<Value> for Observed {
    fn from(facts: Value) -> Self {
        Self::Facts(facts)
    }
}

impl PartialEq for Observed {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Facts(one), Self::Facts(other)) => one == other,
            (Self::Sight(one), Self::Sight(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

impl fmt::Debug for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Facts(facts) => facts.fmt(f),
            Self::Sight(_) => f.write_str("Sight"),
        }
    }
}

/// How one object came out of a pass.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The host is as the document says.
    Active {
        /// Facts seen on the host.
        observed: Observed,
    },
    /// Work goes on by itself or waits for something; a wake or the timer brings the next pass.
    Pending {
        /// What it waits for.
        reason: String,
        /// Facts seen on the host.
        observed: Observed,
    },
    /// The attempt failed; the runtime retries with back-off.
    Failed {
        /// Why, naming object and action, with the remedy where one is known.
        reason: String,
        /// Facts seen on the host.
        observed: Observed,
    },
    /// The object was to go and is gone; its document may be forgotten.
    Gone,
}

impl Outcome {
    /// Active, with nothing to tell.
    #[must_use]
    pub fn active() -> Self {
        Self::Active { observed: Observed::default() }
    }

    /// Failed, with nothing to tell but the reason.
    #[must_use]
    pub fn failed(reason: impl Into<String>) -> Self {
        Self::Failed { reason: reason.into(), observed: Observed::default() }
    }

    /// The state in which this leaves an object.
    #[must_use]
    pub fn state(&self, deleting: bool) -> State {
        match self {
            Self::Failed { .. } => State::Error,
            _ if deleting => State::Deleting,
            Self::Active { .. } => State::Active,
            Self::Pending { .. } | Self::Gone => State::Pending,
        }
    }
}

/// What a pass did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PassReport {
    /// How each object that was due came out. A due object that is missing counts as active.
    pub outcomes: BTreeMap<ObjectRef, Outcome>,
    /// Changes made to the host. A second pass over an unchanged host makes none.
    pub writes: u64,
}

/// One change a pass would make, for people and for `agentctl plan`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedStep {
    /// The object it serves; absent for clean-up of orphans.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<ObjectRef>,
    /// What would be done, in the kernel's or the program's terms, for example
    /// `create link tap6f0c8a8e-0d (tun, mtu 1450)`.
    pub change: String,
}

/// Why a request is refused, in terms a caller can act on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Refusal {
    /// What the caller can do about it.
    pub code: ErrorCode,
    /// What is wrong, naming object, field and remedy.
    pub message: String,
    /// The object it is about, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<ObjectRef>,
    /// The field it is about, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

impl Refusal {
    /// A refusal that is not about one object.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), object: None, field: None }
    }

    /// Names the object it is about.
    #[must_use]
    pub fn about(mut self, object: ObjectRef) -> Self {
        self.object = Some(object);
        self
    }

    /// Names the field it is about.
    #[must_use]
    pub fn at(mut self, field: &str) -> Self {
        self.field = Some(field.to_owned());
        self
    }
}

/// An action on one object, as `act` carries it.
#[derive(Clone, Debug, PartialEq)]
pub struct Action {
    /// The object.
    pub object: ObjectRef,
    /// Its document.
    pub document: Arc<Document>,
    /// What to do, for example `reboot`.
    pub name: String,
    /// Details, by action.
    pub params: Value,
    /// Follows the request through logs and events.
    pub request_id: String,
}

/// The part of an agent that differs between compute, network and storage.
pub trait Agent: Send + Sync + 'static {
    /// Which agent this is. Documents of other agents' kinds are refused before they reach it.
    const KIND: AgentKind;

    /// Judges a change before it is accepted: `wanted` is everything that would be held after
    /// it. Only for what can never work; what may heal by itself is accepted and reported in
    /// the object's status. Pure: looks at documents alone.
    ///
    /// # Errors
    ///
    /// Why the change is refused.
    fn admit(&self, wanted: &Desired, changed: &BTreeSet<ObjectRef>) -> Result<(), Refusal>;

    /// What a pass over `wanted` would change on the host now. Touches nothing.
    fn plan(
        &self,
        wanted: Arc<Desired>,
    ) -> impl Future<Output = Result<Vec<PlannedStep>, Refusal>> + Send;

    /// Moves the host one pass closer to what is wanted. One failed object does not stop the
    /// rest. Never called twice at once.
    fn pass(&self, work: Work) -> impl Future<Output = PassReport> + Send;

    /// Performs an action that is not a wish, such as a reboot. May run beside a pass.
    ///
    /// Implementations refuse unknown names with [`ErrorCode::Unsupported`] and the known ones.
    fn act(&self, action: Action) -> impl Future<Output = Result<Value, Refusal>> + Send;

    /// Facts about this host for controllers: capacity, versions, what the kernel can do. An
    /// object; its top-level keys are stable names.
    fn facts(&self) -> impl Future<Output = Value> + Send;

    /// What is not well with this host right now, for the heartbeat: short sentences with the
    /// remedy. Cheap: called at every report.
    fn troubles(&self) -> Vec<String> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use serde_json::json;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn facts_of_a_sight_are_those_of_the_moment_and_no_news() {
        struct Count(AtomicU32);
        impl Sight for Count {
            fn facts(&self, object: &ObjectRef) -> Value {
                json!({"id": object.id, "asked": self.0.fetch_add(1, Ordering::Relaxed)})
            }
        }
        let object = ObjectRef { kind: stackhand_model::Kind::Port, id: Uuid::from_u128(1) };
        let sight: Arc<dyn Sight> = Arc::new(Count(AtomicU32::new(0)));
        let observed = Observed::Sight(Arc::clone(&sight));
        assert_eq!(observed, Observed::Sight(sight));
        for asked in 0..2 {
            assert_eq!(observed.facts(&object), json!({"id": object.id, "asked": asked}));
        }
        let other = Observed::Sight(Arc::new(Count(AtomicU32::new(0))));
        assert!(observed != other && observed != Observed::default());
    }
}
