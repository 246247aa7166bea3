//! The caller's half of the own API: typed methods over any transport.
//!
//! For agentctl, other controllers and tests.

use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use stackhand_bus::{BusError, CallLimits, Context, Request, Target, Transport};
use stackhand_model::{AgentKind, Document, Kind, ObjectRef};
use uuid::Uuid;

use crate::api::{
    self, Applied, Condition, Control, Deleted, Entry, Planned, Pong, Refused, Settled,
};
use crate::events::Since;
use crate::preflight;
use crate::report::Report;

/// One agent, as callers see it.
#[derive(Clone, Debug)]
pub struct AgentClient {
    transport: Arc<dyn Transport>,
    target: Target,
    limit: Duration,
    context: Option<Context>,
}

/// Why a call did not bring the answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The agent answered and refused; branch on its code.
    #[error("{0}")]
    Refused(Box<Refused>),
    /// No answer came, or one that is not of the own API.
    #[error(transparent)]
    Bus(BusError),
    /// The answer does not read as it should: the agent is of another version.
    #[error("cannot understand the answer of {target} to `{method}`")]
    Answer {
        /// Who answered.
        target: String,
        /// What was asked.
        method: &'static str,
        /// What does not fit.
        source: serde_json::Error,
    },
}

impl ClientError {
    /// The agent's refusal, if it is one.
    #[must_use]
    pub fn refused(&self) -> Option<&Refused> {
        match self {
            Self::Refused(refused) => Some(refused),
            _ => None,
        }
    }
}

/// A result of a call.
pub type Answer<T> = Result<T, ClientError>;

impl AgentClient {
    /// The agent of a kind on a host, with a limit of 60 s on each call.
    #[must_use]
    pub fn new(transport: Arc<dyn Transport>, agent: AgentKind, host: &str) -> Self {
        Self {
            transport,
            target: api::target(agent, host),
            limit: CallLimits::default().total,
            context: None,
        }
    }

    /// The same with another limit on each call.
    #[must_use]
    pub fn with_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The same with one context, and so one request id, for all calls. Without this each call
    /// gets a request id of its own.
    #[must_use]
    pub fn with_context(mut self, context: Context) -> Self {
        self.context = Some(context);
        self
    }

    /// Who is asked.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Hands documents to the agent, all or none. They are on its disk when this returns.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; `Conflict` where a newer generation is held, `Exhausted` on a full disk.
    pub async fn apply(&self, documents: &[Document]) -> Answer<Applied> {
        self.ask("apply", json!({"resources": values(documents)}), self.limit).await
    }

    /// What [`apply`](Self::apply) would answer, without doing it.
    ///
    /// # Errors
    ///
    /// As for [`apply`](Self::apply).
    pub async fn dry_run(&self, documents: &[Document]) -> Answer<Applied> {
        let args = json!({"resources": values(documents), "dry_run": true});
        self.ask("apply", args, self.limit).await
    }

    /// What would change if `documents` were applied and `delete` deleted: documents and steps on
    /// the host. With neither: what the next pass would do.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; the refusals of [`apply`](Self::apply) too.
    pub async fn plan(&self, documents: &[Document], delete: &[ObjectRef]) -> Answer<Planned> {
        let args = json!({"resources": values(documents), "delete": delete});
        self.ask("plan", args, self.limit).await
    }

    /// Asks for objects to go. That is on the agent's disk when this returns; use
    /// [`wait`](Self::wait) to see them gone.
    ///
    /// # Errors
    ///
    /// [`ClientError`]. Unknown objects are no error: they are reported as absent.
    pub async fn delete(&self, objects: &[ObjectRef]) -> Answer<Deleted> {
        self.ask("delete", json!({"refs": objects}), self.limit).await
    }

    /// Documents held and how their objects are: of one kind or all, of some ids or all.
    ///
    /// # Errors
    ///
    /// [`ClientError`]. Unknown ids are no error: they are not in the answer.
    pub async fn get(&self, kind: Option<Kind>, ids: Option<&[Uuid]>) -> Answer<Vec<Entry>> {
        self.ask("get", json!({"kind": kind, "ids": ids}), self.limit).await
    }

    /// Waits until all objects meet the condition.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; `Timeout` with the objects that are not there and why.
    pub async fn wait(
        &self,
        objects: &[ObjectRef],
        condition: Condition,
        timeout: Duration,
    ) -> Answer<Vec<Settled>> {
        let args =
            json!({"refs": objects, "condition": condition, "timeout": timeout.as_secs_f64()});
        // The agent's own answer should win over the transport's.
        self.ask("wait", args, timeout + self.limit.min(Duration::from_secs(10))).await
    }

    /// Performs an action on an object, such as a reboot.
    ///
    /// # Errors
    ///
    /// [`ClientError`]; `Unsupported` with the known actions.
    pub async fn act(&self, object: ObjectRef, action: &str, params: Value) -> Answer<Value> {
        let args = json!({"ref": object, "action": action, "params": params});
        self.ask("act", args, self.limit).await
    }

    /// Facts about the host.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn facts(&self) -> Answer<Value> {
        self.ask("facts", json!({}), self.limit).await
    }

    /// Checks whether the host can do the agent's work.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn preflight(&self) -> Answer<preflight::Report> {
        self.ask("preflight", json!({}), self.limit).await
    }

    /// Events after number `since`, at most `limit`; waits up to `wait` for the first.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn events(&self, since: u64, limit: usize, wait: Duration) -> Answer<Since> {
        let args = json!({"since": since, "limit": limit, "wait_seconds": wait.as_secs_f64()});
        self.ask("events", args, wait + self.limit).await
    }

    /// The agent's report, as its heartbeats carry it.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn report(&self) -> Answer<Report> {
        self.ask("report", json!({}), self.limit).await
    }

    /// Tells controllers to choose this host for new objects, or not to.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn set_admin(&self, enabled: bool, reason: Option<&str>) -> Answer<Control> {
        self.ask("set_admin", json!({"enabled": enabled, "reason": reason}), self.limit).await
    }

    /// Tells the agent to make no passes until told to resume. What runs goes on running.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn pause(&self, reason: Option<&str>) -> Answer<Control> {
        self.ask("pause", json!({"reason": reason}), self.limit).await
    }

    /// Lets the agent make passes again.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn resume(&self) -> Answer<Control> {
        self.ask("resume", json!({}), self.limit).await
    }

    /// Asks who is there. Needs no signature.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn ping(&self) -> Answer<Pong> {
        self.ask("ping", json!({}), self.limit).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: &'static str,
        args: Value,
        limit: Duration,
    ) -> Answer<T> {
        let mut request = Request::new(method, args);
        // An absent argument and a null one mean the same; the former is shorter.
        request.args.retain(|_, value| !value.is_null());
        if let Some(context) = &self.context {
            request = request.with_context(context.clone());
        }
        let limits = CallLimits::total(limit);
        let answer =
            self.transport.call(&self.target, request, limits).await.map_err(
                |error| match &error {
                    BusError::Remote(failure) => Refused::from_failure(failure)
                        .map_or(ClientError::Bus(error), |it| ClientError::Refused(Box::new(it))),
                    _ => ClientError::Bus(error),
                },
            )?;
        serde_json::from_value(answer).map_err(|source| ClientError::Answer {
            target: self.target.to_string(),
            method,
            source,
        })
    }
}

fn values(documents: &[Document]) -> Vec<Value> {
    documents.iter().map(Document::to_value).collect()
}
