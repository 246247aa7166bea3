//! Signed commands: who may order a host around when anybody on the broker can reach it.
//!
//! A controller signs each request of our own API with its Ed25519 key; an agent carries out
//! only what a key from its `trusted_controllers/` signed, for this agent, just now, and once.
//! The signature travels in the request context, under [`CONTEXT_KEY`]:
//!
//! ```json
//! {"key": "56475aa75463474c", "time": "2026-11-21T10:00:00.000Z",
//!  "nonce": "000102030405060708090a0b0c0d0e0f", "signature": "<base64 of 64 bytes>"}
//! ```
//!
//! `key` is the key id: the first 16 hex digits of SHA-256 over the 32 public bytes. `time` is
//! UTC in RFC 3339. `nonce` is 32 lower-case hex digits, new for every request.
//!
//! # What is signed
//!
//! The UTF-8 bytes of one JSON array, with no white space between tokens, the keys of every
//! object in ascending order of code points, and characters outside ASCII as they are:
//!
//! ```text
//! ["stackhand-signature-1", exchange, topic, server or null, fanout, namespace or null,
//!  version, method, args, request_id, time, nonce]
//! ```
//!
//! `server` is null when any server may take the request, and for fanout. `version` is
//! `major.minor`. `request_id` is the one of the context, or the empty string. Python writes
//! these bytes with `json.dumps(array, sort_keys=True, separators=(",", ":"),
//! ensure_ascii=False).encode()`. Integers beyond 64 bits and floats of 10^16 and more are
//! written differently by different programs and must not be used in arguments.
//!
//! # Test vector
//!
//! The key whose seed is the bytes 00 to 1f has the public bytes
//! `A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg=` and the id `56475aa75463474c`. It signs
//!
//! ```text
//! ["stackhand-signature-1","stackhand","stackhand.compute","host1",false,null,"1.0","delete",{"force":true,"note":"café \"\n","refs":[{"id":"8f1c","kind":"Instance"}]},"req-1","2026-11-21T10:00:00.000Z","000102030405060708090a0b0c0d0e0f"]
//! ```
//!
//! (`\"` and `\n` are two characters each) with
//! `Vb0jURSjcMsePduQmcIhw6eWjxaYeWVC+wDx07PkcyJHzZo9a0Z8UlKnlIJdlXtZ0UxUu8LVrB2O4srcRgypBQ==`.
//! OpenSSL made it, not this crate.
//!
//! # What a signature does not cover
//!
//! Context keys other than the request id. And a request to *any* server of a topic is valid at
//! each of them: a thief of the message can have it carried out once per host. Controllers
//! therefore name the server.

mod guard;
mod key;
mod nonce;
#[cfg(test)]
mod tests;
mod trusted;
mod verify;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

pub use self::guard::VerifyingHandler;
pub use self::key::{KeyError, KeyId, PublicKey, SigningKey};
pub use self::nonce::{MemoryNonces, NonceError, NonceStore};
pub use self::trusted::TrustedKeys;
pub use self::verify::{Refusal, Verifier};
use crate::dispatch::new_id;
use crate::{
    BusError, CallLimits, Context, Handler, LinkState, LockGuard, Notification, ReadFrom, Record,
    Request, ServerHandle, Service, Stream, Target, Transport, Version,
};

/// The context key that holds the signature.
pub const CONTEXT_KEY: &str = "stackhand_signature";

/// First element of what is signed; a change of the form gets another one.
const FORMAT: &str = "stackhand-signature-1";

/// The time of day. Tests bring their own.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// A signature as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Signature {
    key: String,
    time: String,
    nonce: String,
    signature: String,
}

/// Everything a signature covers.
struct Signed<'a> {
    exchange: &'a str,
    topic: &'a str,
    server: Option<&'a str>,
    fanout: bool,
    namespace: Option<&'a str>,
    version: Version,
    method: &'a str,
    args: &'a Map<String, Value>,
    request_id: &'a str,
    time: &'a str,
    nonce: &'a str,
}

impl Signed<'_> {
    fn to_bytes(&self) -> Vec<u8> {
        let mut text = String::from("[");
        let head = [
            json!(FORMAT),
            json!(self.exchange),
            json!(self.topic),
            json!(if self.fanout { None } else { self.server }),
            json!(self.fanout),
            json!(self.namespace),
            json!(self.version.to_string()),
            json!(self.method),
        ];
        for value in head {
            text.push_str(&value.to_string());
            text.push(',');
        }
        canonical_object(self.args, &mut text);
        for value in [self.request_id, self.time, self.nonce] {
            text.push(',');
            text.push_str(&json!(value).to_string());
        }
        text.push(']');
        text.into_bytes()
    }
}

/// Sorts by itself: whether `serde_json` does depends on features that any crate may switch on.
fn canonical(value: &Value, text: &mut String) {
    match value {
        Value::Object(object) => canonical_object(object, text),
        Value::Array(values) => {
            text.push('[');
            for (at, value) in values.iter().enumerate() {
                if at > 0 {
                    text.push(',');
                }
                canonical(value, text);
            }
            text.push(']');
        }
        plain => text.push_str(&plain.to_string()),
    }
}

fn canonical_object(object: &Map<String, Value>, text: &mut String) {
    let mut entries: Vec<_> = object.iter().collect();
    entries.sort_unstable_by_key(|(key, _)| *key);
    text.push('{');
    for (at, (key, value)) in entries.into_iter().enumerate() {
        if at > 0 {
            text.push(',');
        }
        text.push_str(&json!(key).to_string());
        text.push(':');
        canonical(value, text);
    }
    text.push('}');
}

/// Signs outgoing requests with one key.
pub struct Signer {
    key: SigningKey,
    clock: Clock,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("key", self.key.id()).finish_non_exhaustive()
    }
}

impl Signer {
    /// Signs with `key`, by the clock of this host.
    #[must_use]
    pub fn new(key: SigningKey) -> Self {
        Self::with_clock(key, Arc::new(Timestamp::now))
    }

    /// Signs with `key`, by a given clock.
    #[must_use]
    pub fn with_clock(key: SigningKey, clock: Clock) -> Self {
        Self { key, clock }
    }

    /// The id of the key in use.
    #[must_use]
    pub fn key_id(&self) -> &KeyId {
        self.key.id()
    }

    /// Puts a signature over `request`, as sent to `target`, into its context. One from before
    /// is replaced.
    pub fn sign(&self, target: &Target, request: &mut Request) {
        let time = (self.clock)().strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string();
        self.sign_at(target, request, &time, &new_id());
    }

    fn sign_at(&self, target: &Target, request: &mut Request, time: &str, nonce: &str) {
        let signed = Signed {
            exchange: &target.exchange,
            topic: &target.topic,
            server: target.server.as_deref(),
            fanout: target.fanout,
            namespace: target.namespace.as_deref(),
            version: target.version,
            method: &request.method,
            args: &request.args,
            request_id: request.context.request_id(),
            time,
            nonce,
        };
        let signature = BASE64.encode(self.key.sign(&signed.to_bytes()));
        let key = self.key.id().to_string();
        let travels = json!({ "key": key, "time": time, "nonce": nonce, "signature": signature });
        request.context.0.insert(CONTEXT_KEY.to_owned(), travels);
    }
}

/// Takes the signature out of a context, so that it is not passed on with related requests.
fn strip(context: &mut Context) {
    context.0.remove(CONTEXT_KEY);
}

/// Signs every call and cast to one exchange, and passes everything else through.
#[derive(Debug)]
pub struct SigningTransport {
    inner: Arc<dyn Transport>,
    signer: Arc<Signer>,
    exchange: String,
}

impl SigningTransport {
    /// Signs what goes to `exchange`, usually `stackhand`.
    #[must_use]
    pub fn new(inner: Arc<dyn Transport>, signer: Arc<Signer>, exchange: &str) -> Self {
        Self { inner, signer, exchange: exchange.to_owned() }
    }

    fn signed(&self, target: &Target, mut request: Request) -> Request {
        if target.exchange == self.exchange {
            self.signer.sign(target, &mut request);
        }
        request
    }
}

impl Transport for SigningTransport {
    fn call<'a>(
        &'a self,
        target: &'a Target,
        request: Request,
        limits: CallLimits,
    ) -> BoxFuture<'a, Result<Value, BusError>> {
        self.inner.call(target, self.signed(target, request), limits)
    }

    fn cast<'a>(
        &'a self,
        target: &'a Target,
        request: Request,
    ) -> BoxFuture<'a, Result<(), BusError>> {
        self.inner.cast(target, self.signed(target, request))
    }

    fn notify(&self, notification: Notification) -> BoxFuture<'_, Result<(), BusError>> {
        self.inner.notify(notification)
    }

    fn serve(
        &self,
        service: Service,
        handler: Arc<dyn Handler>,
    ) -> BoxFuture<'_, Result<ServerHandle, BusError>> {
        self.inner.serve(service, handler)
    }

    fn publish<'a>(
        &'a self,
        stream: &'a Stream,
        body: Value,
    ) -> BoxFuture<'a, Result<(), BusError>> {
        self.inner.publish(stream, body)
    }

    fn read<'a>(
        &'a self,
        stream: &'a Stream,
        from: ReadFrom,
        follow: bool,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<Record, BusError>>, BusError>> {
        self.inner.read(stream, from, follow)
    }

    fn lock<'a>(
        &'a self,
        name: &'a str,
        limit: Duration,
    ) -> BoxFuture<'a, Result<LockGuard, BusError>> {
        self.inner.lock(name, limit)
    }

    fn link(&self) -> watch::Receiver<LinkState> {
        self.inner.link()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        self.inner.close()
    }
}
