//! Passwords that guests made for themselves and left for their owners, encrypted with their keys.
//!
//! The one thing that a service remembers: a guest says it once, at its first boot. It is kept in the agent's
//! ledger before the guest is answered, told in the status of the guest's ports, and forgotten with
//! the last of them, or when an owner says so: the guest may then leave another.

use std::collections::BTreeSet;

use stackhand_kernel::Chain;
use stackhand_model::InstanceId;
use stackhand_runtime::agent::Refusal;
use stackhand_runtime::ledger::Journal;
use tokio::sync::Mutex;
use tracing::warn;

use super::Known;
use crate::agent::Wake;

/// The longest password in bytes: as long as Nova takes.
pub(super) const LONGEST: usize = 1020;

const PREFIX: &str = "password/";

/// The passwords of this host's guests.
pub struct Passwords {
    journal: Journal,
    /// Told whose status has something new.
    wake: Wake,
    /// Held while one is left, so that of two at once the second is refused.
    turn: Mutex<()>,
}

impl std::fmt::Debug for Passwords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passwords").finish_non_exhaustive()
    }
}

/// Why a password is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotKept {
    /// There is one.
    Taken,
    /// It is empty, too long, or not text.
    Bad,
    /// The disk takes no more.
    Failed,
}

fn key(id: InstanceId) -> String {
    format!("{PREFIX}{id}")
}

impl Passwords {
    /// Those in a ledger.
    pub fn new(journal: Journal, wake: Wake) -> Self {
        Self { journal, wake, turn: Mutex::default() }
    }

    /// Whether nobody left any.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.journal.list(PREFIX).is_empty()
    }

    /// What a guest left.
    #[must_use]
    pub fn of(&self, id: InstanceId) -> Option<String> {
        self.journal.get(&key(id)).unwrap_or_else(|error| {
            warn!(instance = %id, %error, "cannot read the password of a guest");
            None
        })
    }

    /// Keeps what a guest leaves, if it left nothing before.
    pub(super) async fn leave(&self, guest: &Known, bytes: &[u8]) -> Result<(), NotKept> {
        let text = std::str::from_utf8(bytes).map_err(|_binary| NotKept::Bad)?.trim();
        // It ends up on terminals.
        if text.is_empty() || text.len() > LONGEST || text.chars().any(char::is_control) {
            return Err(NotKept::Bad);
        }
        let _turn = self.turn.lock().await;
        if self.of(guest.id).is_some() {
            return Err(NotKept::Taken);
        }
        self.journal.put(&key(guest.id), &text).await.map_err(|error| {
            warn!(instance = %guest.id, error = %Chain(&error), "cannot keep the password of a guest");
            NotKept::Failed
        })?;
        (self.wake)(&BTreeSet::from([guest.port.object()]));
        Ok(())
    }

    /// Forgets what a guest left; whether there was anything.
    ///
    /// # Errors
    ///
    /// Fails if the disk takes no more.
    pub async fn forget(&self, id: InstanceId) -> Result<bool, Refusal> {
        let known = self.of(id).is_some();
        self.journal.remove(&key(id)).await?;
        Ok(known)
    }

    /// Forgets what guests left that are not here any more.
    pub async fn keep_only(&self, guests: &BTreeSet<InstanceId>) {
        for (key, _) in self.journal.list(PREFIX) {
            let id = key[PREFIX.len()..].parse();
            if id.is_ok_and(|id| guests.contains(&id)) {
                continue;
            }
            if let Err(error) = self.journal.remove(&key).await {
                warn!(key, error = %Chain(&error), "cannot forget the password of a guest");
            }
        }
    }
}
