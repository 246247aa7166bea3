//! Notes that an agent keeps for itself: how far a long operation came.
//!
//! Write the note before the step, take it out after the last one; after a crash
//! [`Journal::list`] tells what was under way.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use stackhand_model::ErrorCode;

use super::Ledger;
use super::writer::Command;
use crate::agent::Refusal;

/// Longest key, in bytes.
const MOST_KEY: usize = 512;

/// An agent's notes, kept in its ledger. Clones share them.
#[derive(Clone, Debug)]
pub struct Journal {
    ledger: Ledger,
}

impl Journal {
    pub(super) fn new(ledger: Ledger) -> Self {
        Self { ledger }
    }

    /// Keeps a note under a key, in place of the one that was there; on disk when this returns.
    ///
    /// # Errors
    ///
    /// A key that is empty or longer than 512 bytes, a value that JSON cannot hold, or a disk
    /// that takes no more.
    pub async fn put(&self, key: &str, note: &impl Serialize) -> Result<(), Refusal> {
        if key.is_empty() || key.len() > MOST_KEY {
            let problem = format!("journal key {key:?} must have 1 to {MOST_KEY} bytes");
            return Err(Refusal::new(ErrorCode::Internal, problem));
        }
        let value = serde_json::to_value(note).map_err(|error| {
            Refusal::new(ErrorCode::Internal, format!("cannot encode journal note {key}: {error}"))
        })?;
        self.write(key, Some(value)).await
    }

    /// Takes a note out, if it is there; on disk when this returns.
    ///
    /// # Errors
    ///
    /// A disk that takes no more.
    pub async fn remove(&self, key: &str) -> Result<(), Refusal> {
        if !self.ledger.shared.read().journal.contains_key(key) {
            return Ok(());
        }
        self.write(key, None).await
    }

    /// The note under a key. `None`: there is none.
    ///
    /// # Errors
    ///
    /// The note is not a `T`.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, Refusal> {
        let note = self.ledger.shared.read().journal.get(key).cloned();
        note.map(serde_json::from_value).transpose().map_err(|error| {
            Refusal::new(ErrorCode::Internal, format!("cannot read journal note {key}: {error}"))
        })
    }

    /// The notes whose keys begin with `prefix`, by key.
    #[must_use]
    pub fn list(&self, prefix: &str) -> Vec<(String, Value)> {
        let image = self.ledger.shared.read();
        let from = image.journal.range(prefix.to_owned()..);
        from.take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    async fn write(&self, key: &str, value: Option<Value>) -> Result<(), Refusal> {
        let key = key.to_owned();
        let written = self.ledger.ask(|reply| Command::Journal { key, value, reply }).await;
        written.map_err(|refused| Refusal::new(refused.code, refused.message))
    }
}
