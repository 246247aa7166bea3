//! What travels: requests with their context, and notifications.

use serde_json::{Map, Value};
use uuid::Uuid;

/// One method call, before a transport gives it an address and an id.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Method name at the far end.
    pub method: String,
    /// Keyword arguments. There are no positional ones.
    pub args: Map<String, Value>,
    /// Who asks, and under which request id.
    pub context: Context,
}

impl Request {
    /// A request with a fresh context. `args` that is not an object counts as no arguments.
    #[must_use]
    pub fn new(method: &str, args: Value) -> Self {
        let args = match args {
            Value::Object(args) => args,
            _ => Map::new(),
        };
        Self { method: method.to_owned(), args, context: Context::fresh() }
    }

    /// Makes the request on behalf of an earlier one.
    #[must_use]
    pub fn with_context(mut self, context: Context) -> Self {
        self.context = context;
        self
    }
}

/// The request context: keys that travel as `_context_<key>` and come back on related calls.
///
/// Unknown keys are kept, so that a request that passes through us loses nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Context(pub Map<String, Value>);

impl Context {
    /// A context with a new request id and nothing else.
    #[must_use]
    pub fn fresh() -> Self {
        let mut keys = Map::new();
        keys.insert("request_id".into(), format!("req-{}", Uuid::new_v4()).into());
        Self(keys)
    }

    /// The id that follows a request through every log line; empty when the sender gave none.
    #[must_use]
    pub fn request_id(&self) -> &str {
        self.0.get("request_id").and_then(Value::as_str).unwrap_or_default()
    }
}

/// How urgent a notification is; part of its routing key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the meaning, fixed by oslo.messaging")]
pub enum Priority {
    Debug,
    Info,
    Warn,
    Error,
    Critical,
    Audit,
    Sample,
}

impl Priority {
    /// The lower-case name used in routing keys.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
            Self::Critical => "critical",
            Self::Audit => "audit",
            Self::Sample => "sample",
        }
    }
}

/// A one-way event for whoever listens, for example telemetry.
#[derive(Clone, Debug, PartialEq)]
pub struct Notification {
    /// Exchange it is published to, usually the service's control exchange.
    pub exchange: String,
    /// Topic, usually `notifications`; the routing key is `<topic>.<priority>`.
    pub topic: String,
    /// Who tells: `<service>.<host>`.
    pub publisher_id: String,
    /// What happened, for example `compute.instance.create.end`.
    pub event_type: String,
    /// How urgent it is.
    pub priority: Priority,
    /// The event's data.
    pub payload: Value,
    /// The request that caused it.
    pub context: Context,
}
