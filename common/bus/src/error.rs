//! Why a request did not get an answer, and failures that travel as answers.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A failure raised by a remote method, in the shape oslo.messaging gives exceptions.
///
/// Callers switch on [`class`](Self::class) alone: modules differ between releases and programs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{class}: {message}")]
pub struct Failure {
    /// Exception class name without its module, for example `NoSuchMethod`.
    pub class: String,
    /// Python module of the class; decides what a Python caller can rebuild.
    #[serde(default)]
    pub module: String,
    /// What went wrong, for people.
    #[serde(default)]
    pub message: String,
    /// Positional arguments that rebuild the exception.
    #[serde(default)]
    pub args: Vec<Value>,
    /// Keyword arguments that rebuild the exception. Our own API puts machine-readable
    /// detail here, under the keys `code`, `document`, `field`.
    #[serde(default)]
    pub kwargs: Map<String, Value>,
    /// Formatted traceback lines; empty from us.
    #[serde(default, rename = "tb")]
    pub traceback: Vec<String>,
}

impl Failure {
    /// A failure with a class of our own module.
    #[must_use]
    pub fn new(class: &str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            class: class.to_owned(),
            module: "stackhand".to_owned(),
            args: vec![Value::String(message.clone())],
            message,
            kwargs: Map::new(),
            traceback: Vec::new(),
        }
    }

    /// What a dispatcher answers to a method it does not have.
    #[must_use]
    pub fn no_such_method(method: &str) -> Self {
        let mut failure =
            Self::new("NoSuchMethod", format!("Endpoint does not support RPC method {method}"));
        failure.module = "oslo_messaging.rpc.dispatcher".to_owned();
        failure
    }

    /// What a dispatcher answers to a version it does not serve.
    #[must_use]
    pub fn unsupported_version(version: &str, method: &str) -> Self {
        let mut failure = Self::new(
            "UnsupportedVersion",
            format!("Endpoint does not support RPC version {version}. Attempted method: {method}"),
        );
        failure.module = "oslo_messaging.rpc.dispatcher".to_owned();
        failure
    }
}

/// Why an operation on the bus did not work.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The remote method ran and raised.
    #[error("{0}")]
    Remote(#[source] Failure),
    /// No answer within the limit. The method may or may not have run.
    #[error("no answer from {target} to `{method}` within {seconds} s")]
    Timeout {
        /// Who was asked.
        target: String,
        /// What was asked.
        method: String,
        /// The limit that passed.
        seconds: u64,
    },
    /// Nobody is there to take the message.
    #[error("nobody listens at {target}")]
    Undeliverable {
        /// Who was asked.
        target: String,
    },
    /// The broker or socket cannot be reached now; trying later may help.
    #[error("cannot reach {peer}: {reason}")]
    Unreachable {
        /// Broker address or socket path, without secrets.
        peer: String,
        /// What happened.
        reason: String,
    },
    /// The broker refused what was asked, and will again: credentials, vhost, queue options.
    #[error("{peer} refused: {reason}")]
    Refused {
        /// Broker address or socket path, without secrets.
        peer: String,
        /// What it said, with the remedy where one is known.
        reason: String,
    },
    /// A message that does not follow the wire format.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// The configuration of the bus itself is wrong.
    #[error("{0}")]
    Config(String),
    /// This transport has no such operation, for example streams on a local socket.
    #[error("{transport} does not offer {operation}")]
    Unsupported {
        /// Which transport.
        transport: &'static str,
        /// Which operation.
        operation: &'static str,
    },
}

impl BusError {
    /// Whether waiting and trying again can help without anybody's attention.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::Unreachable { .. } | Self::Undeliverable { .. })
    }
}
