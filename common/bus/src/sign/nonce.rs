//! Remembering which commands were seen, for as long as they could be replayed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use jiff::Timestamp;

use super::Clock;

/// Most nonces remembered at once in memory. They come from trusted keys alone.
const MOST: usize = 100_000;

/// Why a nonce could not be remembered; the command is then refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot remember the nonce of a command: {0}")]
pub struct NonceError(pub String);

/// Remembers nonces. The ledger has one that outlives a restart.
pub trait NonceStore: Send + Sync + 'static {
    /// Remembers `nonce` until `expires` at least. False when it is remembered already. Two
    /// calls at once with one nonce must not both yield true.
    ///
    /// # Errors
    ///
    /// When it cannot be remembered.
    fn remember<'a>(
        &'a self,
        nonce: &'a str,
        expires: Timestamp,
    ) -> BoxFuture<'a, Result<bool, NonceError>>;
}

/// Nonces in memory: forgotten with the process, so a replay right after a restart gets through.
pub struct MemoryNonces {
    kept: Mutex<Kept>,
    clock: Clock,
    most: usize,
}

#[derive(Default)]
struct Kept {
    by_nonce: BTreeMap<String, Timestamp>,
    by_expiry: BTreeSet<(Timestamp, String)>,
}

impl std::fmt::Debug for MemoryNonces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryNonces").field("most", &self.most).finish_non_exhaustive()
    }
}

impl MemoryNonces {
    /// Remembers up to 100,000 nonces; beyond that commands are refused until some expire.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self::with_room(clock, MOST)
    }

    pub(super) fn with_room(clock: Clock, most: usize) -> Self {
        Self { kept: Mutex::default(), clock, most }
    }

    fn add(&self, nonce: &str, expires: Timestamp) -> Result<bool, NonceError> {
        let now = (self.clock)();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((expiry, _)) = kept.by_expiry.first()
            && *expiry < now
        {
            if let Some((_, old)) = kept.by_expiry.pop_first() {
                kept.by_nonce.remove(&old);
            }
        }
        if kept.by_nonce.contains_key(nonce) {
            return Ok(false);
        }
        if kept.by_nonce.len() >= self.most {
            return Err(NonceError(format!("{} are remembered already", self.most)));
        }
        kept.by_nonce.insert(nonce.to_owned(), expires);
        kept.by_expiry.insert((expires, nonce.to_owned()));
        Ok(true)
    }
}

impl NonceStore for MemoryNonces {
    fn remember<'a>(
        &'a self,
        nonce: &'a str,
        expires: Timestamp,
    ) -> BoxFuture<'a, Result<bool, NonceError>> {
        async move { self.add(nonce, expires) }.boxed()
    }
}
