//! Deciding whether a command may be carried out.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;

use super::{CONTEXT_KEY, Clock, KeyId, NonceStore, Signature, Signed, TrustedKeys};
use crate::{Delivered, Failure, Service};

/// How far a command's time may be from ours, unless set otherwise.
const DEFAULT_WINDOW: Duration = Duration::from_secs(60);

/// Why a command is not carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no signature.
    #[error(
        "the command is not signed; use a controller with a key (`agentctl keygen`) whose public half is trusted here"
    )]
    Unsigned,
    /// The signature does not have the documented form.
    #[error("the signature is malformed: {0}")]
    Malformed(String),
    /// The key is not trusted on this host.
    #[error(
        "key {0} is not trusted here; put its public half into the trusted controllers' folder"
    )]
    UnknownKey(String),
    /// The signature does not fit the command.
    #[error(
        "the signature by key {0} does not fit: the command was changed, or signed for another host"
    )]
    BadSignature(KeyId),
    /// The command is too old.
    #[error(
        "the command is {seconds} s old, more than the {window} s allowed; it was delayed, or the clocks of controller and host differ by as much"
    )]
    Stale {
        /// Measured difference.
        seconds: i64,
        /// Allowed difference.
        window: i64,
    },
    /// The command comes from the future.
    #[error(
        "the command is from {seconds} s in the future, more than the {window} s allowed; the clocks of controller and host differ by as much"
    )]
    Future {
        /// Measured difference.
        seconds: i64,
        /// Allowed difference.
        window: i64,
    },
    /// The command was carried out before.
    #[error("the command was seen before; it is not carried out twice")]
    Replayed,
    /// It cannot be remembered that the command was seen.
    #[error("{0}")]
    Unavailable(String),
}

impl Refusal {
    /// The reason in one word, for counters and for callers.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unsigned => "unsigned",
            Self::Malformed(_) => "malformed_signature",
            Self::UnknownKey(_) => "unknown_key",
            Self::BadSignature(_) => "bad_signature",
            Self::Stale { .. } => "stale",
            Self::Future { .. } => "future",
            Self::Replayed => "replayed",
            Self::Unavailable(_) => "nonces_unavailable",
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        let mut failure = Self::new("Forbidden", refusal.to_string());
        failure.kwargs.insert("code".to_owned(), refusal.code().into());
        failure
    }
}

/// Checks signatures against the keys of this host.
pub struct Verifier {
    trusted: Arc<TrustedKeys>,
    nonces: Arc<dyn NonceStore>,
    clock: Clock,
    window: SignedDuration,
    refused: Mutex<BTreeMap<&'static str, u64>>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier")
            .field("trusted", &self.trusted)
            .field("window", &self.window)
            .finish_non_exhaustive()
    }
}

impl Verifier {
    /// Trusts `trusted`, remembers in `nonces`, and allows 60 s between the clocks.
    #[must_use]
    pub fn new(trusted: Arc<TrustedKeys>, nonces: Arc<dyn NonceStore>) -> Self {
        Self {
            trusted,
            nonces,
            clock: Arc::new(Timestamp::now),
            window: SignedDuration::try_from(DEFAULT_WINDOW).unwrap_or(SignedDuration::MAX),
            refused: Mutex::default(),
        }
    }

    /// Allows `window` between a command's time and ours, either way.
    #[must_use]
    pub fn with_window(mut self, window: Duration) -> Self {
        // More than a day defeats the purpose and would have the store grow.
        let window = window.min(Duration::from_secs(24 * 3600));
        self.window = SignedDuration::try_from(window).unwrap_or(SignedDuration::MAX);
        self
    }

    /// Takes the time from `clock`.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// How many commands were refused so far, by [`Refusal::code`].
    #[must_use]
    pub fn refused(&self) -> BTreeMap<&'static str, u64> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Decides whether `delivered`, which reached `service`, may be carried out, and by whose
    /// key. A command that may is remembered: asked again, the answer is no.
    ///
    /// # Errors
    ///
    /// The [`Refusal`], which is also counted.
    pub async fn verify(&self, service: &Service, delivered: &Delivered) -> Result<KeyId, Refusal> {
        let verdict = self.judge(service, delivered).await;
        if let Err(refusal) = &verdict {
            let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
            *refused.entry(refusal.code()).or_default() += 1;
        }
        verdict
    }

    async fn judge(&self, service: &Service, delivered: &Delivered) -> Result<KeyId, Refusal> {
        let travels = delivered.context().0.get(CONTEXT_KEY).ok_or(Refusal::Unsigned)?;
        let signature = Signature::deserialize(travels)
            .map_err(|error| Refusal::Malformed(error.to_string()))?;
        let (bytes, time) = parse(&signature)?;
        let key = self
            .trusted
            .get(&signature.key)
            .ok_or_else(|| Refusal::UnknownKey(signature.key.chars().take(64).collect()))?;
        // The transport does not tell how the request was addressed: to this server, to any, or
        // to all. The signature fits one of them.
        let addresses = [(Some(service.server.as_str()), false), (None, false), (None, true)];
        let fits = addresses.into_iter().any(|(server, fanout)| {
            let signed = Signed {
                exchange: &service.exchange,
                topic: &service.topic,
                server,
                fanout,
                namespace: delivered.namespace.as_deref(),
                version: delivered.version,
                method: &delivered.request.method,
                args: &delivered.request.args,
                request_id: delivered.context().request_id(),
                time: &signature.time,
                nonce: &signature.nonce,
            };
            key.verifies(&signed.to_bytes(), &bytes)
        });
        if !fits {
            return Err(Refusal::BadSignature(key.id().clone()));
        }
        self.check_time(time)?;
        let unseen = format!("{}:{}", key.id(), signature.nonce);
        let expires = time.checked_add(self.window).unwrap_or(Timestamp::MAX);
        match self.nonces.remember(&unseen, expires).await {
            Ok(true) => Ok(key.id().clone()),
            Ok(false) => Err(Refusal::Replayed),
            Err(error) => Err(Refusal::Unavailable(error.to_string())),
        }
    }

    fn check_time(&self, time: Timestamp) -> Result<(), Refusal> {
        let age = (self.clock)().duration_since(time);
        let window = self.window.as_secs();
        // Rounded up, so that the number told is never within the window it is outside of.
        let whole = |age: SignedDuration| age.as_secs() + i64::from(age.subsec_nanos() > 0);
        if age > self.window {
            return Err(Refusal::Stale { seconds: whole(age), window });
        }
        if age < -self.window {
            return Err(Refusal::Future { seconds: whole(-age), window });
        }
        Ok(())
    }
}

/// Checks the form of what travels; the one accepted form of each part keeps a signature from
/// having two spellings.
fn parse(signature: &Signature) -> Result<(Vec<u8>, Timestamp), Refusal> {
    let malformed = |what: &str| Refusal::Malformed(what.to_owned());
    let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if signature.nonce.len() != 32 || !signature.nonce.bytes().all(hex) {
        return Err(malformed("the nonce is not 32 lower-case hex digits"));
    }
    if !signature.time.ends_with('Z') || signature.time.len() > 40 {
        return Err(malformed("the time is not UTC in RFC 3339"));
    }
    let time = signature.time.parse().map_err(|_| malformed("the time is not UTC in RFC 3339"))?;
    let bytes = BASE64
        .decode(&signature.signature)
        .map_err(|_| malformed("the signature is not base64"))?;
    Ok((bytes, time))
}
