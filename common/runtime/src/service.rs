//! The agent's half of the own API: every request from its arrival to its answer.
//!
//! A request that changes what is wanted is answered when the ledger has it on disk; the host
//! follows in the reconcile loop. That makes every request safe to send again. Requests that wait
//! (`wait`, `events`) have places of their own, so that waiting never keeps others out.

mod args;
mod diff;
#[cfg(test)]
mod tests;
mod wait;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value};
use stackhand_bus::{Delivered, Failure, Handler, Origin, Service, Version};
use stackhand_model::{AgentKind, Document, ErrorCode, ObjectRef, parse_json};
use tokio::sync::Semaphore;
use tracing::Instrument;

use crate::agent::{Action, Agent, Desired, Held, Refusal};
use crate::api::{
    Applied, Change, Deleted, DocumentChange, EXCHANGE, Entry, LONGEST_POLL, MOST_RESOURCES,
    Planned, Pong, Refused, VERSION,
};
use crate::events::{EventLog, NewEvent, Since};
use crate::heartbeat::Reporter;
use crate::ledger::{Admit, Ledger, rules};
use crate::lifecycle::Shutdown;
use crate::preflight::{self, Check};
use crate::status::Statuses;
use crate::wake::Wake;

/// Requests that may wait at once, besides those that are worked on.
const WAITERS: usize = 64;

/// Most events in one answer.
const MOST_EVENTS: usize = 1000;

/// The longest reason that an operator may give.
const MOST_REASON: usize = 1000;

/// What the API works with.
#[derive(Clone, Debug)]
pub struct Parts {
    /// What is wanted.
    pub ledger: Ledger,
    /// How objects are.
    pub statuses: Statuses,
    /// What happened.
    pub events: EventLog,
    /// How the agent is.
    pub reporter: Reporter,
    /// Whether the host is fit.
    pub checks: Vec<Check>,
    /// What the host's ears and actions tell.
    pub wake: Wake,
    /// Whether new requests are still taken.
    pub shutdown: Shutdown,
    /// Most requests worked on at once.
    pub concurrency: usize,
}

/// Serves the own API of one agent.
pub struct Api<A> {
    agent: Arc<A>,
    parts: Parts,
    admit: Admit,
    working: Semaphore,
    waiting: Semaphore,
}

impl<A: Agent> Api<A> {
    /// An API for an agent.
    #[must_use]
    pub fn new(agent: Arc<A>, parts: Parts) -> Self {
        let judge = Arc::clone(&agent);
        let admit: Admit = Arc::new(move |wanted, changed| judge.admit(wanted, changed));
        let working = Semaphore::new(parts.concurrency.max(1));
        Self { agent, parts, admit, working, waiting: Semaphore::new(WAITERS) }
    }

    /// What a transport has to serve: topic, server, and room for those that wait.
    #[must_use]
    pub fn service(&self) -> Service {
        let identity = self.parts.reporter.identity();
        Service {
            exchange: EXCHANGE.to_owned(),
            topic: identity.agent.topic().to_owned(),
            server: identity.host.clone(),
            concurrency: self.parts.concurrency.max(1) + WAITERS,
        }
    }

    async fn dispatch(&self, delivered: Delivered) -> Result<Value, Failure> {
        let Delivered { request, namespace, version, .. } = delivered;
        let method = request.method.as_str();
        if namespace.is_some() || !VERSION.serves(version) {
            return Err(unsupported(namespace.as_deref(), version, method));
        }
        if !args::METHODS.iter().any(|(name, _)| *name == method) {
            return Err(Failure::no_such_method(method));
        }
        let waits = matches!(method, "wait" | "events");
        let places = if waits { &self.waiting } else { &self.working };
        // Closed never; a full house of waiters is told, for one cannot know how long it lasts.
        let _place = if waits {
            match places.try_acquire() {
                Ok(place) => Some(place),
                Err(_full) => {
                    let why = format!("{WAITERS} requests wait already; ask again later");
                    return Err(Refused::new(ErrorCode::Exhausted, why).into());
                }
            }
        } else {
            places.acquire().await.ok()
        };
        let request_id = request.context.request_id().to_owned();
        self.serve(method, request.args, &request_id).await.map_err(Failure::from)
    }

    async fn serve(
        &self,
        method: &str,
        args: Map<String, Value>,
        request_id: &str,
    ) -> Result<Value, Refused> {
        match method {
            "apply" => encode(self.apply(args::read(method, args)?, request_id).await?),
            "plan" => encode(self.plan(args::read(method, args)?).await?),
            "delete" => encode(self.delete(args::read(method, args)?, request_id).await?),
            "get" => encode(self.get(&args::read(method, args)?)),
            "wait" => encode(self.wait(args::read(method, args)?).await?),
            "act" => self.act(args::read(method, args)?, request_id).await,
            "facts" => {
                let _none: args::Nothing = args::read(method, args)?;
                Ok(self.agent.facts().await)
            }
            "preflight" => {
                let _none: args::Nothing = args::read(method, args)?;
                encode(preflight::run(&self.parts.checks).await)
            }
            "events" => encode(self.events(&args::read(method, args)?).await?),
            "report" => {
                let _none: args::Nothing = args::read(method, args)?;
                encode(self.parts.reporter.report())
            }
            "set_admin" => encode(self.set_admin(args::read(method, args)?, request_id).await?),
            "pause" => encode(self.pause(args::read(method, args)?, request_id).await?),
            "resume" => {
                let _none: args::Nothing = args::read(method, args)?;
                let control = self.parts.ledger.set_control(|it| it.paused = None).await?;
                self.tell("Resumed", "passes are made again".to_owned(), request_id);
                encode(control)
            }
            "ping" => {
                let _none: args::Nothing = args::read(method, args)?;
                encode(self.pong())
            }
            _ => Err(Refused::new(ErrorCode::Internal, format!("{method} is not wired"))),
        }
    }

    async fn apply(&self, args: args::Apply, request_id: &str) -> Result<Applied, Refused> {
        limit("resources", args.resources.len())?;
        let documents = documents(&args.resources)?;
        let _busy = self.begin("apply")?;
        let admit = Arc::clone(&self.admit);
        let applied = self.parts.ledger.apply(documents, request_id, args.dry_run, admit).await?;
        let count = |change| applied.objects.iter().filter(|it| it.change == change).count();
        let (created, updated) = (count(Change::Created), count(Change::Updated));
        if !args.dry_run && created + updated > 0 {
            let message = format!("accepted {created} new and {updated} changed documents");
            self.tell("Accepted", message, request_id);
        }
        Ok(applied)
    }

    async fn delete(&self, args: args::Refs, request_id: &str) -> Result<Deleted, Refused> {
        limit("refs", args.refs.len())?;
        let _busy = self.begin("delete")?;
        let admit = Arc::clone(&self.admit);
        let deleted = self.parts.ledger.delete(args.refs, request_id, admit).await?;
        let count = deleted.objects.iter().filter(|it| it.change == Change::Deleting).count();
        if count > 0 {
            self.tell("Deleting", format!("accepted the deletion of {count} objects"), request_id);
        }
        Ok(deleted)
    }

    async fn plan(&self, args: args::Plan) -> Result<Planned, Refused> {
        limit("resources", args.resources.len())?;
        limit("delete", args.delete.len())?;
        let documents = documents(&args.resources)?;
        let held = self.parts.ledger.desired();
        let mut wanted = Desired::clone(&held);
        let mut told = Vec::new();
        let mut changed = std::collections::BTreeSet::new();
        for verdict in rules::judge(self.agent_kind(), &held, documents).map_err(Refused::of)? {
            let object = verdict.document.object();
            let before = held.objects.get(&object).map(|it| it.document.to_value());
            let fields =
                before.map_or(Vec::new(), |it| diff::diff(&it, &verdict.document.to_value()));
            let name = verdict.document.name.to_string();
            told.push(DocumentChange { object, name, change: verdict.change, fields });
            if verdict.change != Change::Unchanged {
                changed.insert(object);
                let document = verdict.document;
                wanted.objects.insert(object, Held { document, deleting: false });
            }
        }
        for object in args.delete {
            rules::check_kind(self.agent_kind(), object)?;
            let (name, change) = match wanted.objects.get_mut(&object) {
                None => (String::new(), Change::Absent),
                Some(held) => {
                    held.deleting = true;
                    changed.insert(object);
                    (held.document.name.to_string(), Change::Deleting)
                }
            };
            told.push(DocumentChange { object, name, change, fields: Vec::new() });
        }
        if !changed.is_empty() {
            wanted.revision += 1;
            self.agent.admit(&wanted, &changed)?;
        }
        let steps = self.agent.plan(Arc::new(wanted)).await?;
        Ok(Planned { documents: told, steps })
    }

    fn get(&self, args: &args::Get) -> Vec<Entry> {
        let desired = self.parts.ledger.desired();
        let wanted = |object: &ObjectRef| {
            args.kind.is_none_or(|kind| kind == object.kind)
                && args.ids.as_ref().is_none_or(|ids| ids.contains(&object.id))
        };
        let entry = |object: &ObjectRef| {
            let held = desired.objects.get(object)?;
            let status = self.parts.statuses.within(&desired, object)?;
            // Forgotten since the look at what is wanted: it is as if asked a moment later.
            let accepted = self.parts.ledger.accepted(object)?;
            Some(Entry {
                document: Document::clone(&held.document),
                status,
                accepted: accepted.at,
                request_id: accepted.request_id.as_ref().to_owned(),
            })
        };
        desired.objects.keys().filter(|object| wanted(object)).filter_map(entry).collect()
    }

    async fn act(&self, args: args::Act, request_id: &str) -> Result<Value, Refused> {
        let object = args.object;
        rules::check_kind(self.agent_kind(), object)?;
        let about = |code, message| Refused::from(Refusal::new(code, message).about(object));
        let Some(entry) = self.parts.ledger.entry(&object) else {
            let host = &self.parts.reporter.identity().host;
            return Err(about(ErrorCode::NotFound, format!("{object} is not held on {host}")));
        };
        if entry.held.deleting {
            return Err(about(ErrorCode::WrongState, format!("{object} is being deleted")));
        }
        let _busy = self.begin("act")?;
        // An action leaves no trace in the ledger; the nonce of its command must be on disk first.
        self.parts.ledger.written().await?;
        let action = Action {
            object,
            document: entry.held.document,
            name: args.action,
            params: args.params,
            request_id: request_id.to_owned(),
        };
        let name = action.name.clone();
        let result = self.agent.act(action).await;
        let (kind, message) = match &result {
            Ok(_) => ("Acted", format!("{name}: done")),
            Err(refusal) => ("ActionRefused", format!("{name}: {refusal}")),
        };
        let event = NewEvent::new(kind, message).about(object.to_string()).caused_by(request_id);
        self.parts.events.add(event);
        result.map_err(Refused::from)
    }

    async fn events(&self, args: &args::Events) -> Result<Since, Refused> {
        let wait = seconds("wait_seconds", args.wait_seconds, LONGEST_POLL)?;
        let limit = args.limit.unwrap_or(MOST_EVENTS).clamp(1, MOST_EVENTS);
        let mut follower = self.parts.events.follow();
        let stopping = self.parts.shutdown.stopping();
        let next = async {
            loop {
                let since = self.parts.events.since(args.since, limit);
                if !since.events.is_empty() {
                    return since;
                }
                // Fallen behind means that there are events: look again.
                let _ = follower.recv().await;
            }
        };
        tokio::select! {
            since = next => Ok(since),
            () = tokio::time::sleep(wait) => Ok(self.parts.events.since(args.since, limit)),
            () = stopping.cancelled() => Ok(self.parts.events.since(args.since, limit)),
        }
    }

    async fn set_admin(
        &self,
        args: args::SetAdmin,
        request_id: &str,
    ) -> Result<crate::api::Control, Refused> {
        let reason = checked_reason(args.reason)?;
        let enabled = args.enabled;
        let message = match (enabled, &reason) {
            (true, _) => "the host may get new objects".to_owned(),
            (false, Some(why)) => format!("the host is to get no new objects: {why}"),
            (false, None) => "the host is to get no new objects".to_owned(),
        };
        let change = move |control: &mut crate::api::Control| {
            control.enabled = enabled;
            control.reason = if enabled { None } else { reason };
        };
        let control = self.parts.ledger.set_control(change).await?;
        self.tell(if enabled { "Enabled" } else { "Disabled" }, message, request_id);
        Ok(control)
    }

    async fn pause(
        &self,
        args: args::Pause,
        request_id: &str,
    ) -> Result<crate::api::Control, Refused> {
        let why = checked_reason(args.reason)?.unwrap_or_else(|| "no reason given".to_owned());
        let message = format!("no passes are made: {why}");
        let control = self.parts.ledger.set_control(|it| it.paused = Some(why)).await?;
        self.tell("Paused", message, request_id);
        Ok(control)
    }

    fn pong(&self) -> Pong {
        let identity = self.parts.reporter.identity();
        Pong {
            agent: identity.agent,
            host: identity.host.clone(),
            version: identity.version.clone(),
            time: Timestamp::now(),
            started_at: identity.started_at,
        }
    }

    fn agent_kind(&self) -> AgentKind {
        A::KIND
    }

    fn begin(&self, what: &str) -> Result<crate::lifecycle::Busy, Refused> {
        self.parts.shutdown.begin(what).ok_or_else(|| {
            Refused::new(ErrorCode::Unavailable, "the agent stops; send it again in a moment")
        })
    }

    fn tell(&self, kind: &str, message: String, request_id: &str) {
        self.parts.events.add(NewEvent::new(kind, message).caused_by(request_id));
    }
}

impl<A: Agent> Handler for Api<A> {
    fn handle(&self, delivered: Delivered) -> BoxFuture<'_, Result<Value, Failure>> {
        let span = tracing::info_span!(
            "request",
            request_id = delivered.request.context.request_id(),
            method = delivered.request.method,
        );
        let from = match delivered.origin {
            Origin::Local { uid, pid, .. } => format!("uid {uid}, process {pid}"),
            Origin::Broker => "broker".to_owned(),
            Origin::Memory => "memory".to_owned(),
        };
        let begin = std::time::Instant::now();
        Box::pin(
            async move {
                let changes = matches!(
                    delivered.request.method.as_str(),
                    "apply" | "delete" | "act" | "set_admin" | "pause" | "resume"
                );
                let result = self.dispatch(delivered).await;
                let took = begin.elapsed();
                match &result {
                    Ok(_) if changes => tracing::info!(%from, ?took, "request served"),
                    Ok(_) => tracing::debug!(%from, ?took, "request served"),
                    // Whoever waits in slices times out all the time.
                    Err(failure) if failure.class == ErrorCode::Timeout.class() => {
                        tracing::debug!(%from, ?took, error = %failure, "request timed out");
                    }
                    Err(failure) => {
                        tracing::warn!(%from, ?took, error = %failure, "request refused");
                    }
                }
                result
            }
            .instrument(span),
        )
    }
}

impl<A> fmt::Debug for Api<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("parts", &self.parts).finish_non_exhaustive()
    }
}

fn unsupported(namespace: Option<&str>, version: Version, method: &str) -> Failure {
    let asked = match namespace {
        Some(namespace) => format!("{version} (namespace {namespace})"),
        None => version.to_string(),
    };
    Failure::unsupported_version(&asked, method)
}

fn documents(values: &[Value]) -> Result<Vec<Document>, Refused> {
    parse_json(values).map_err(|error| {
        let mut refused = Refused::new(ErrorCode::BadRequest, error.to_string());
        refused.field = (!error.field.is_empty()).then_some(error.field);
        refused.document = Some(error.document);
        refused
    })
}

fn limit(name: &str, count: usize) -> Result<(), Refused> {
    if count <= MOST_RESOURCES {
        return Ok(());
    }
    let message =
        format!("{name} holds {count} entries; the most is {MOST_RESOURCES}: send them in parts");
    Err(Refused::new(ErrorCode::BadRequest, message).at(name))
}

fn seconds(name: &str, value: f64, longest: Duration) -> Result<Duration, Refused> {
    match Duration::try_from_secs_f64(value) {
        Ok(asked) if asked <= longest => Ok(asked),
        _ => {
            let most = longest.as_secs();
            let message = format!("{name} must be a number of seconds from 0 to {most}");
            Err(Refused::new(ErrorCode::BadRequest, message).at(name))
        }
    }
}

fn checked_reason(reason: Option<String>) -> Result<Option<String>, Refused> {
    match reason {
        Some(text) if text.len() > MOST_REASON || text.chars().any(char::is_control) => {
            let message = format!(
                "reason must be one line of at most {MOST_REASON} bytes without control characters"
            );
            Err(Refused::new(ErrorCode::BadRequest, message).at("reason"))
        }
        Some(text) if text.trim().is_empty() => Ok(None),
        other => Ok(other),
    }
}

fn encode(answer: impl Serialize) -> Result<Value, Refused> {
    serde_json::to_value(answer).map_err(|error| {
        Refused::new(ErrorCode::Internal, format!("cannot encode the answer: {error}"))
    })
}
