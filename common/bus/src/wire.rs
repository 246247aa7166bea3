//! The body format of oslo.messaging, without any transport: bytes in, typed frames out.
//!
//! A body is a JSON object with two keys, a version and the real message *as a JSON string*
//! (failures nest a third time). Everything here is pure and bounded: bytes from a broker are
//! not trusted, and whatever they hold ends in a frame or in an error, never in a panic.

mod lenient;
mod packed;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde_json::{Map, Value, json};

pub use packed::unpack;

use crate::{BusError, Context, Failure, Notification, Priority, Request, Target, Version};

/// Largest body accepted, in bytes. Bigger ones are refused before they are parsed.
pub const MAX_BODY: usize = 64 * 1024 * 1024;

const ENVELOPE_VERSION: &str = "oslo.version";
const ENVELOPE_MESSAGE: &str = "oslo.message";
const CONTEXT_PREFIX: &str = "_context_";

/// Where the answer to a call goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// Correlates the answer with the call.
    pub msg_id: String,
    /// The caller's reply queue.
    pub queue: String,
    /// If set, the caller wants a keep-alive at least this often.
    pub monitor: Option<Duration>,
}

/// A request as it was on the wire.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestFrame {
    /// Method, arguments, context.
    pub request: Request,
    /// The interface namespace asked for.
    pub namespace: Option<String>,
    /// The interface version asked for.
    pub version: Version,
    /// Duplicate-detection id; empty when the sender gave none.
    pub unique_id: String,
    /// Where to answer; `None` for a cast.
    pub reply_to: Option<ReplyTo>,
}

/// A request that cannot be served because of its form.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct BadRequest {
    /// Where to say so, if the request got far enough to tell.
    pub reply_to: Option<ReplyTo>,
    /// What to say there.
    pub failure: Failure,
    /// The same for the log.
    #[source]
    pub error: BusError,
}

/// An answer, or a keep-alive while the answer is being made.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplyFrame {
    /// The call it belongs to.
    pub msg_id: String,
    /// What the method returned or raised.
    pub outcome: Result<Value, Failure>,
    /// Whether this is the last frame of the call. Keep-alives are not.
    pub ending: bool,
}

/// Writes a request: a call when `reply_to` is given, else a cast.
#[must_use]
pub fn encode_request(
    target: &Target,
    request: &Request,
    unique_id: &str,
    reply_to: Option<&ReplyTo>,
) -> Vec<u8> {
    seal(&Value::Object(request_object(target, request, unique_id, reply_to)))
}

/// The inner object of a request, for transports that need no envelope.
#[must_use]
pub fn request_object(
    target: &Target,
    request: &Request,
    unique_id: &str,
    reply_to: Option<&ReplyTo>,
) -> Map<String, Value> {
    let mut inner = Map::new();
    inner.insert("method".into(), request.method.as_str().into());
    inner.insert("args".into(), Value::Object(request.args.clone()));
    if let Some(namespace) = &target.namespace {
        inner.insert("namespace".into(), namespace.as_str().into());
    }
    inner.insert("version".into(), target.version.to_string().into());
    inner.insert("_unique_id".into(), unique_id.into());
    if let Some(reply_to) = reply_to {
        inner.insert("_msg_id".into(), reply_to.msg_id.as_str().into());
        inner.insert("_reply_q".into(), reply_to.queue.as_str().into());
        let monitor = reply_to.monitor.map_or(Value::Null, |every| every.as_secs().into());
        inner.insert("_timeout".into(), monitor);
    }
    insert_context(&mut inner, &request.context);
    inner
}

/// Reads a request.
///
/// # Errors
///
/// Everything that is not a request in this format. The error carries the address of the
/// caller where one could be read, so that it can be told.
pub fn decode_request(body: &[u8]) -> Result<RequestFrame, Box<BadRequest>> {
    let inner = open(body).map_err(|error| {
        Box::new(BadRequest { reply_to: None, failure: malformed(&error), error })
    })?;
    request_from_object(inner)
}

/// Reads a request from its inner object.
///
/// # Errors
///
/// As [`decode_request`].
pub fn request_from_object(mut inner: Map<String, Value>) -> Result<RequestFrame, Box<BadRequest>> {
    let reply_to = take_reply_to(&mut inner);
    let refuse = |reply_to: Option<ReplyTo>, error: BusError| {
        Box::new(BadRequest { reply_to, failure: malformed(&error), error })
    };
    let unique_id = take_text(&mut inner, "_unique_id").unwrap_or_default();
    let Some(method) = take_text(&mut inner, "method").filter(|method| !method.is_empty()) else {
        return Err(refuse(reply_to, BusError::Malformed("the request names no method".into())));
    };
    let args = match inner.remove("args") {
        Some(Value::Object(args)) => args,
        None | Some(Value::Null) => Map::new(),
        Some(_) => {
            let what = format!("args of `{method}` is not an object");
            return Err(refuse(reply_to, BusError::Malformed(what)));
        }
    };
    let version = match inner.remove("version") {
        None | Some(Value::Null) => Ok(Version::V1_0),
        Some(Value::String(text)) => text.parse().map_err(|_| text),
        Some(other) => other.to_string().parse().map_err(|_| other.to_string()),
    };
    let version = match version {
        Ok(version) => version,
        Err(text) => {
            let what = format!("version {text:?} of `{method}` is not of the form `major.minor`");
            return Err(Box::new(BadRequest {
                reply_to,
                failure: Failure::unsupported_version(&text, &method),
                error: BusError::Malformed(what),
            }));
        }
    };
    let namespace = take_text(&mut inner, "namespace");
    let context = take_context(inner);
    Ok(RequestFrame {
        request: Request { method, args, context },
        namespace,
        version,
        unique_id,
        reply_to,
    })
}

/// Writes an answer, or a keep-alive when `ending` is false.
#[must_use]
pub fn encode_reply(frame: &ReplyFrame, unique_id: &str) -> Vec<u8> {
    seal(&reply_object(frame, unique_id))
}

/// The inner object of an answer, for transports that need no envelope.
#[must_use]
pub fn reply_object(frame: &ReplyFrame, unique_id: &str) -> Value {
    let (result, failure) = match &frame.outcome {
        Ok(result) => (result.clone(), Value::Null),
        Err(failure) => (Value::Null, encode_failure(failure).into()),
    };
    json!({
        "result": result,
        "failure": failure,
        "ending": frame.ending,
        "_msg_id": frame.msg_id,
        "_unique_id": unique_id,
    })
}

/// Reads an answer.
///
/// # Errors
///
/// Everything that is not an answer in this format.
pub fn decode_reply(body: &[u8]) -> Result<ReplyFrame, BusError> {
    let mut inner = open(body)?;
    let Some(msg_id) = take_text(&mut inner, "_msg_id") else {
        return Err(BusError::Malformed("the reply has no _msg_id".into()));
    };
    let outcome = match inner.remove("failure") {
        None | Some(Value::Null) => Ok(inner.remove("result").unwrap_or(Value::Null)),
        Some(Value::String(text)) => Err(decode_failure(&text)),
        Some(Value::Object(object)) => Err(failure_from_object(object)),
        Some(_) => return Err(BusError::Malformed("the reply's failure is not a string".into())),
    };
    let ending = inner.remove("ending").and_then(|ending| ending.as_bool()).unwrap_or(false);
    Ok(ReplyFrame { msg_id, outcome, ending })
}

/// Writes a failure as the string that travels inside a reply.
#[must_use]
pub fn encode_failure(failure: &Failure) -> String {
    // A re-raised remote error has the suffix on both; the far end adds it again.
    let (class, module) =
        match (failure.class.strip_suffix("_Remote"), failure.module.strip_suffix("_Remote")) {
            (Some(class), Some(module)) => (class, module),
            _ => (failure.class.as_str(), failure.module.as_str()),
        };
    json!({
        "class": class,
        "module": module,
        "message": failure.message,
        "tb": failure.traceback,
        "args": failure.args,
        "kwargs": failure.kwargs,
    })
    .to_string()
}

/// Reads the failure string of a reply. Text that is no failure object becomes a failure that
/// shows the text: the caller must learn that the method raised, whatever the form.
#[must_use]
pub fn decode_failure(text: &str) -> Failure {
    match lenient::parse(text) {
        Ok(Value::Object(object)) => failure_from_object(object),
        _ => {
            let mut failure =
                Failure::new("RemoteError", text.chars().take(4096).collect::<String>());
            failure.module = String::new();
            failure
        }
    }
}

/// Writes a notification in envelope 2.0 (driver `messagingv2`).
///
/// `timestamp` is UTC in the form `2026-01-02 03:04:05.678901`.
#[must_use]
pub fn encode_notification(
    notification: &Notification,
    message_id: &str,
    unique_id: &str,
    timestamp: &str,
) -> Vec<u8> {
    let mut inner = Map::new();
    inner.insert("message_id".into(), message_id.into());
    inner.insert("publisher_id".into(), notification.publisher_id.as_str().into());
    inner.insert("event_type".into(), notification.event_type.as_str().into());
    inner.insert("priority".into(), notification.priority.as_str().to_uppercase().into());
    inner.insert("payload".into(), notification.payload.clone());
    inner.insert("timestamp".into(), timestamp.into());
    inner.insert("_unique_id".into(), unique_id.into());
    insert_context(&mut inner, &notification.context);
    seal(&Value::Object(inner))
}

/// Reads a notification, enveloped or bare (driver `messaging`). The body does not say which
/// exchange and topic it came by, so the receiver gives them.
///
/// # Errors
///
/// Everything that is not a notification in this format.
pub fn decode_notification(
    exchange: &str,
    topic: &str,
    body: &[u8],
) -> Result<Notification, BusError> {
    let mut inner = open(body)?;
    let mut text = |key: &str| {
        take_text(&mut inner, key)
            .ok_or_else(|| BusError::Malformed(format!("the notification has no {key}")))
    };
    let event_type = text("event_type")?;
    let publisher_id = text("publisher_id")?;
    let priority = text("priority")?;
    let priority = priority_from(&priority).ok_or_else(|| {
        BusError::Malformed(format!("the notification's priority {priority:?} is not known"))
    })?;
    let payload = inner.remove("payload").unwrap_or(Value::Null);
    Ok(Notification {
        exchange: exchange.to_owned(),
        topic: topic.to_owned(),
        publisher_id,
        event_type,
        priority,
        payload,
        context: take_context(inner),
    })
}

/// Wraps an inner message in the envelope.
#[must_use]
pub fn seal(inner: &Value) -> Vec<u8> {
    let envelope = json!({ ENVELOPE_VERSION: "2.0", ENVELOPE_MESSAGE: inner.to_string() });
    envelope.to_string().into_bytes()
}

/// Takes the inner message out of its envelope; a body without envelope is the message itself.
///
/// # Errors
///
/// [`BusError::Malformed`] for bodies that are too big, not UTF-8, not JSON, nested too deep,
/// not an object, or in an envelope of another version.
pub fn open(body: &[u8]) -> Result<Map<String, Value>, BusError> {
    let mut outer = object("the body", lenient::parse(text_of(body)?))?;
    if !(outer.contains_key(ENVELOPE_VERSION) && outer.contains_key(ENVELOPE_MESSAGE)) {
        return Ok(outer);
    }
    let version = take_text(&mut outer, ENVELOPE_VERSION).unwrap_or_default();
    let understood = version.parse().is_ok_and(|version| Version::new(2, 0).serves(version));
    if !understood {
        let what = format!("envelope version {version:?} is not served, only 2.0");
        return Err(BusError::Malformed(what));
    }
    match outer.remove(ENVELOPE_MESSAGE) {
        Some(Value::String(inner)) => object("the enveloped message", lenient::parse(&inner)),
        _ => Err(BusError::Malformed("the enveloped message is not a string".into())),
    }
}

/// Reads a stream record: plain JSON of any kind.
///
/// # Errors
///
/// [`BusError::Malformed`] as for [`open`].
pub fn open_record(body: &[u8]) -> Result<Value, BusError> {
    let text = text_of(body)?;
    lenient::parse(text)
        .map_err(|error| BusError::Malformed(format!("the record is not JSON: {error}")))
}

fn text_of(body: &[u8]) -> Result<&str, BusError> {
    if body.len() > MAX_BODY {
        let what = format!("{} bytes, more than the {MAX_BODY} accepted", body.len());
        return Err(BusError::Malformed(what));
    }
    std::str::from_utf8(body).map_err(|error| BusError::Malformed(format!("not UTF-8: {error}")))
}

fn object(
    what: &str,
    parsed: Result<Value, serde_json::Error>,
) -> Result<Map<String, Value>, BusError> {
    match parsed {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(BusError::Malformed(format!("{what} is not a JSON object"))),
        Err(error) => Err(BusError::Malformed(format!("{what} is not JSON: {error}"))),
    }
}

fn malformed(error: &BusError) -> Failure {
    Failure::new("MalformedMessage", error.to_string())
}

fn take_text(object: &mut Map<String, Value>, key: &str) -> Option<String> {
    match object.remove(key) {
        Some(Value::String(text)) => Some(text),
        _ => None,
    }
}

fn take_reply_to(inner: &mut Map<String, Value>) -> Option<ReplyTo> {
    let monitor = inner
        .remove("_timeout")
        .and_then(|seconds| seconds.as_f64())
        .filter(|seconds| *seconds >= 1.0)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds.trunc()).ok());
    let msg_id = take_text(inner, "_msg_id");
    let queue = take_text(inner, "_reply_q");
    Some(ReplyTo { msg_id: msg_id?, queue: queue?, monitor })
}

fn insert_context(inner: &mut Map<String, Value>, context: &Context) {
    for (key, value) in &context.0 {
        inner.insert(format!("{CONTEXT_PREFIX}{key}"), value.clone());
    }
}

fn take_context(inner: Map<String, Value>) -> Context {
    let keys = inner
        .into_iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(CONTEXT_PREFIX)?.to_owned(), value)));
    Context(keys.collect())
}

fn failure_from_object(mut object: Map<String, Value>) -> Failure {
    let mut text = |key: &str| match object.remove(key) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text,
        Some(other) => other.to_string(),
    };
    let class = text("class");
    let (module, message) = (text("module"), text("message"));
    let args = match object.remove("args") {
        Some(Value::Array(args)) => args,
        _ => Vec::new(),
    };
    let kwargs = match object.remove("kwargs") {
        Some(Value::Object(kwargs)) => kwargs,
        _ => Map::new(),
    };
    let traceback = match object.remove("tb") {
        Some(Value::Array(lines)) => {
            lines.into_iter().filter_map(|line| line.as_str().map(str::to_owned)).collect()
        }
        _ => Vec::new(),
    };
    let class = if class.is_empty() { "RemoteError".to_owned() } else { class };
    Failure { class, module, message, args, kwargs, traceback }
}

fn priority_from(text: &str) -> Option<Priority> {
    const ALL: [Priority; 7] = [
        Priority::Debug,
        Priority::Info,
        Priority::Warn,
        Priority::Error,
        Priority::Critical,
        Priority::Audit,
        Priority::Sample,
    ];
    ALL.into_iter().find(|priority| priority.as_str().eq_ignore_ascii_case(text))
}
