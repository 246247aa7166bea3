//! Nonces of signed commands that were seen, kept until their window has passed.
//!
//! A nonce is known to this process at once, and stands in line for the disk before the command
//! that it came with. So whatever a command changes in the ledger, its nonce is on disk no later;
//! a command that changes the host at once waits for [`Ledger::written`] first. Neither can be
//! replayed to an agent that has just started.

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use stackhand_bus::sign::{NonceError, NonceStore};

use super::Ledger;
use super::writer::Command;

/// Most nonces remembered at once. They come from trusted keys alone.
const MOST: usize = 100_000;

/// Most expired nonces taken out with a new one.
const SWEEP: usize = 64;

/// Nonces that come (with their expiry) and go.
type Changes = Vec<(String, Option<u64>)>;

/// The nonces seen, kept in the ledger. Clones share them.
#[derive(Clone, Debug)]
pub struct Nonces {
    ledger: Ledger,
}

impl Nonces {
    pub(super) fn new(ledger: Ledger) -> Self {
        Self { ledger }
    }

    /// Remembers a nonce until `expiry`, both in seconds since 1970. `None`: it was seen before.
    fn claim(&self, nonce: &str, expiry: u64, now: u64) -> Result<Option<Changes>, NonceError> {
        let mut image = self.ledger.shared.write();
        if image.nonces.get(nonce).is_some_and(|&until| until >= now) {
            return Ok(None);
        }
        let expired = image.nonces.extract_if(.., |_, until| *until < now).take(SWEEP);
        let mut changes: Changes = expired.map(|(nonce, _)| (nonce, None)).collect();
        if image.nonces.len() >= MOST {
            let problem = format!("{MOST} are remembered already; try again in a minute");
            return Err(NonceError(problem));
        }
        changes.push((nonce.to_owned(), Some(expiry)));
        image.nonces.insert(nonce.to_owned(), expiry);
        Ok(Some(changes))
    }

    async fn remember_until(&self, nonce: &str, expiry: u64, now: u64) -> Result<bool, NonceError> {
        let Some(changes) = self.claim(nonce, expiry, now)? else { return Ok(false) };
        let sent = self.ledger.commands.send(Command::Nonces { changes }).await;
        sent.map(|()| true).map_err(|_closed| NonceError("the agent stops".to_owned()))
    }

    /// How many are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ledger.shared.read().nonces.len()
    }

    /// Whether none is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl NonceStore for Nonces {
    fn remember<'a>(
        &'a self,
        nonce: &'a str,
        expires: Timestamp,
    ) -> BoxFuture<'a, Result<bool, NonceError>> {
        let seconds = |time: Timestamp| u64::try_from(time.as_second()).unwrap_or(0);
        // Rounded up: rather remembered for too long.
        self.remember_until(nonce, seconds(expires).saturating_add(1), seconds(Timestamp::now()))
            .boxed()
    }
}

#[cfg(test)]
mod tests {
    use stackhand_model::AgentKind;

    use super::*;

    #[tokio::test]
    async fn a_nonce_is_accepted_once_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Ledger::open(dir.path(), AgentKind::Network, "compute1").unwrap();
        let ledger = open();
        let nonces = ledger.nonces();
        assert!(nonces.remember_until("n1", 100, 40).await.unwrap());
        assert!(!nonces.remember_until("n1", 100, 41).await.unwrap());
        ledger.close().await;
        assert!(nonces.remember_until("n3", 100, 41).await.is_err(), "not on disk, so not let in");

        let nonces = open().nonces();
        assert!(!nonces.remember_until("n1", 100, 100).await.unwrap());
        assert!(nonces.remember_until("n2", 200, 101).await.unwrap(), "and takes n1 out");
        nonces.ledger.close().await;
        let nonces = open().nonces();
        assert_eq!(nonces.len(), 1);
        assert!(nonces.remember_until("n1", 300, 102).await.unwrap());
        assert!(NonceStore::remember(&nonces, "n4", Timestamp::MAX).await.unwrap());
    }
}
