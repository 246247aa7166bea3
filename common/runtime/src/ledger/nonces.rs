//! Nonces of signed commands that were seen, kept until their window has passed.

use super::Ledger;
use super::writer::Command;

/// The nonces seen, kept in the ledger. Clones share them.
#[derive(Clone, Debug)]
pub struct Nonces {
    ledger: Ledger,
}

impl Nonces {
    pub(super) fn new(ledger: Ledger) -> Self {
        Self { ledger }
    }

    /// Remembers a nonce until `expiry`, in seconds since 1970. False: it was seen before.
    ///
    /// It is known to this process at once and on disk with the next commit, at the latest with
    /// the one that this causes.
    #[must_use]
    pub fn claim(&self, nonce: &str, expiry: u64, now: u64) -> bool {
        let mut image = self.ledger.shared.write();
        if image.nonces.get(nonce).is_some_and(|&until| until > now) {
            return false;
        }
        image.nonces.insert(nonce.to_owned(), expiry);
        let mut changes = vec![(nonce.to_owned(), Some(expiry))];
        let expired: Vec<_> = image.nonces.iter().filter(|(_, until)| **until <= now).collect();
        changes.extend(expired.into_iter().take(64).map(|(nonce, _)| (nonce.clone(), None)));
        drop(image);
        // A full queue or a stopping agent: the memory of this process has to do.
        if self.ledger.commands.try_send(Command::Nonces { changes }).is_err() {
            tracing::debug!("the nonce of a command was not written down");
        }
        true
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
