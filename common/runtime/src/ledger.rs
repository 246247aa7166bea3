//! The ledger: every document an agent accepted, on disk before the caller hears of it.
//!
//! One thread writes. It takes all requests that wait, judges them one by one against what is
//! held, commits them in one transaction, and answers them: many callers share one flush.
//! Everything held is kept decoded in memory too; readers take [`Ledger::desired`] and never
//! touch the disk.
//!
//! A write that fails (a full disk) refuses the requests of that batch and changes nothing; the
//! store is opened anew before the next one, because its file may or may not hold the batch.
//!
//! Long operations keep notes here, in the [`Journal`], and the bus its nonces, so that a command
//! cannot be replayed to an agent that has just started.

mod export;
mod file;
#[cfg(test)]
pub(crate) mod fixtures;
mod journal;
mod nonces;
pub(crate) mod rules;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use jiff::Timestamp;
use serde_json::Value;
use stackhand_model::{AgentKind, Document, ErrorCode, ObjectRef};
use tokio::sync::{mpsc, oneshot, watch};

pub use export::export;
pub use journal::Journal;
pub use nonces::Nonces;

use crate::agent::{Desired, Refusal};
use crate::api::{Applied, Control, Deleted, Refused};
use file::{Contents, MIGRATIONS, Migration, Store};
use writer::{Command, Writer};

/// Requests that may wait for the writer before further ones wait to be put in line.
const QUEUE: usize = 1024;

/// What the agent says to a change before it is accepted; see
/// [`Agent::admit`](crate::agent::Agent::admit).
pub type Admit =
    Arc<dyn Fn(&Desired, &BTreeSet<ObjectRef>) -> Result<(), Refusal> + Send + Sync + 'static>;

/// When, and by which request, a document came to be as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// When the document, or its deletion, was accepted.
    pub at: Timestamp,
    /// The request that brought it.
    pub request_id: Arc<str>,
}

/// A document's place in the ledger at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The document and whether its object is to go.
    pub held: crate::agent::Held,
    /// When and by which request.
    pub accepted: Accepted,
}

/// The ledger of one agent. Clones share it.
#[derive(Clone, Debug)]
pub struct Ledger {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
}

/// What readers see: what is on disk, decoded.
#[derive(Debug)]
struct Shared {
    agent: AgentKind,
    path: PathBuf,
    /// The host that the ledger was made for.
    host: String,
    image: RwLock<Image>,
    revision: watch::Sender<u64>,
    control: watch::Sender<Control>,
}

#[derive(Debug)]
struct Image {
    desired: Arc<Desired>,
    accepted: BTreeMap<ObjectRef, Accepted>,
    journal: BTreeMap<String, Value>,
    nonces: BTreeMap<String, u64>,
}

/// Why a ledger cannot be opened or written, with the remedy.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// Another process has it.
    #[error("the ledger is held by {}; stop it first ({})", or_another(.holder), .path.display())]
    Held {
        /// The lock.
        path: PathBuf,
        /// Who holds it, as it wrote there.
        holder: String,
    },
    /// It was there once.
    #[error(
        "ledger {} is missing or empty, but one was made there; put it back from a backup, or, if \
         this host is to begin with nothing, remove {}",
        .path.display(), .marker.display()
    )]
    Lost {
        /// Where it was.
        path: PathBuf,
        /// What tells that it was there.
        marker: PathBuf,
    },
    /// Its contents cannot be trusted.
    #[error(
        "ledger {path} is damaged: {problem}; put it back from a backup, or, if the controller \
         can apply everything again, move it aside with `mv {path} {path}.damaged` and remove \
         {marker}",
        path = .path.display(), marker = .path.with_extension("marker").display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A newer program wrote it.
    #[error(
        "ledger {} has schema {found}, and this program knows {newest} at most; install the \
         version that wrote it, or put back the copy {}.v{newest} made before it was migrated",
        .path.display(), .path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u32,
        /// The newest schema known here.
        newest: u32,
    },
    /// Another kind of agent made it.
    #[error(
        "ledger {} belongs to the {theirs} agent, not to the {ours} agent; set `state_dir` to \
         this agent's own folder",
        .path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Who made it.
        theirs: String,
        /// Who opened it.
        ours: AgentKind,
    },
    /// The file system refuses.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no thread to write with.
    #[error("cannot start the ledger's writer")]
    Thread(#[source] io::Error),
}

fn or_another(holder: &str) -> &str {
    if holder.is_empty() { "another process" } else { holder }
}

impl LedgerError {
    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    fn damaged(path: &Path, problem: &str) -> Self {
        Self::Damaged { path: path.to_owned(), problem: problem.to_owned() }
    }

    /// Sorts the store's errors into what one can do about them.
    fn store(action: &'static str, path: &Path, error: redb::Error) -> Self {
        match error {
            // What the store's library says to a file that is too short or is not its own.
            redb::Error::Io(source)
                if action != "write"
                    && matches!(
                        source.kind(),
                        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
                    ) =>
            {
                Self::damaged(path, &source.to_string())
            }
            redb::Error::Io(source) => Self::io(action, path, source),
            redb::Error::DatabaseAlreadyOpen => {
                Self::Held { path: path.to_owned(), holder: String::new() }
            }
            other => Self::damaged(path, &other.to_string()),
        }
    }

    /// Whether the disk, a quota or a limit is what is in the way.
    fn is_full(&self) -> bool {
        let Self::Io { source, .. } = self else { return false };
        matches!(
            source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
        )
    }

    /// What callers are told when a write failed.
    fn refusal(&self) -> Refusal {
        let cause = std::error::Error::source(self).map_or(String::new(), |it| format!(": {it}"));
        if self.is_full() {
            return Refusal::new(
                ErrorCode::Exhausted,
                format!("{self}{cause}; nothing was accepted: free space there and send it again"),
            );
        }
        Refusal::new(
            ErrorCode::Unavailable,
            format!("{self}{cause}; nothing was accepted: look at the disk and send it again"),
        )
    }
}

impl Ledger {
    /// Opens the ledger in `dir`, making it where there was none, and starts its writer.
    ///
    /// # Errors
    ///
    /// Another process has it, it is damaged, lost, newer than this program or another agent's;
    /// or the file system refuses. Each with the remedy.
    pub fn open(dir: &Path, agent: AgentKind, host: &str) -> Result<Self, LedgerError> {
        Self::open_with(dir, agent, host, MIGRATIONS)
    }

    fn open_with(
        dir: &Path,
        agent: AgentKind,
        host: &str,
        migrations: &'static [Migration],
    ) -> Result<Self, LedgerError> {
        let (store, contents) = Store::open(dir, agent, host, migrations)?;
        if contents.host != host {
            tracing::warn!(
                made_for = contents.host,
                host,
                path = %store.path().display(),
                "this ledger was made for a host of another name; if this machine is a copy of \
                 that one, stop the agent and move the ledger away"
            );
        }
        let Contents {
            objects, accepted, journal, nonces, control, revision, host: made_for, ..
        } = contents;
        let desired = Desired { objects, revision };
        let working = desired.clone();
        let image = Image { desired: Arc::new(desired), accepted, journal, nonces };
        let shared = Arc::new(Shared {
            agent,
            path: store.path().to_owned(),
            host: made_for,
            image: RwLock::new(image),
            revision: watch::Sender::new(revision),
            control: watch::Sender::new(control),
        });
        let (commands, queue) = mpsc::channel(QUEUE);
        let writer = Writer::new(Arc::clone(&shared), store, working, migrations);
        std::thread::Builder::new()
            .name("ledger".to_owned())
            .stack_size(512 * 1024)
            .spawn(move || writer.run(queue))
            .map_err(LedgerError::Thread)?;
        Ok(Self { shared, commands })
    }

    /// Everything that is wanted now.
    #[must_use]
    pub fn desired(&self) -> Arc<Desired> {
        Arc::clone(&self.shared.read().desired)
    }

    /// One document, if it is held.
    #[must_use]
    pub fn entry(&self, object: &ObjectRef) -> Option<Entry> {
        let image = self.shared.read();
        let held = image.desired.objects.get(object)?.clone();
        let accepted = image.accepted.get(object)?.clone();
        Some(Entry { held, accepted })
    }

    /// When and by which request every document came, at the revision of `desired` or later.
    #[must_use]
    pub fn accepted(&self, object: &ObjectRef) -> Option<Accepted> {
        self.shared.read().accepted.get(object).cloned()
    }

    /// The revision of what is wanted, now and as it changes.
    #[must_use]
    pub fn revision(&self) -> watch::Receiver<u64> {
        self.shared.revision.subscribe()
    }

    /// What operators set, now and as it changes.
    #[must_use]
    pub fn control(&self) -> watch::Receiver<Control> {
        self.shared.control.subscribe()
    }

    /// The file, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// The host that the ledger was made for.
    #[must_use]
    pub fn made_for(&self) -> &str {
        &self.shared.host
    }

    /// Which agent's it is.
    #[must_use]
    pub fn agent(&self) -> AgentKind {
        self.shared.agent
    }

    /// Accepts documents, all or none; on disk when this returns. A dry run changes nothing.
    ///
    /// # Errors
    ///
    /// The rules of generations, the agent's judgement, or a disk that takes no more.
    pub async fn apply(
        &self,
        documents: Vec<Document>,
        request_id: &str,
        dry_run: bool,
        admit: Admit,
    ) -> Result<Applied, Refused> {
        let request_id = Arc::from(request_id);
        self.ask(|reply| Command::Apply { documents, request_id, dry_run, admit, reply }).await
    }

    /// Accepts that objects are to go; on disk when this returns.
    ///
    /// # Errors
    ///
    /// The agent's judgement, or a disk that takes no more.
    pub async fn delete(
        &self,
        objects: Vec<ObjectRef>,
        request_id: &str,
        admit: Admit,
    ) -> Result<Deleted, Refused> {
        let request_id = Arc::from(request_id);
        self.ask(|reply| Command::Delete { objects, request_id, admit, reply }).await
    }

    /// Forgets objects that were to go and are gone. Others are left as they are.
    ///
    /// # Errors
    ///
    /// A disk that takes no more; try again later.
    pub async fn forget(&self, objects: Vec<ObjectRef>) -> Result<(), Refused> {
        self.ask(|reply| Command::Forget { objects, reply }).await
    }

    /// Changes what operators set.
    ///
    /// # Errors
    ///
    /// A disk that takes no more.
    pub async fn set_control(
        &self,
        change: impl FnOnce(&mut Control) + Send + 'static,
    ) -> Result<Control, Refused> {
        self.ask(|reply| Command::Control { change: Box::new(change), reply }).await
    }

    /// The agent's own notes.
    #[must_use]
    pub fn journal(&self) -> Journal {
        Journal::new(self.clone())
    }

    /// The nonces of signed commands.
    #[must_use]
    pub fn nonces(&self) -> Nonces {
        Nonces::new(self.clone())
    }

    /// Returns once everything that was asked before is on disk; at once if it is already.
    ///
    /// # Errors
    ///
    /// A disk that takes no more.
    pub async fn written(&self) -> Result<(), Refused> {
        self.ask(|reply| Command::Written { reply }).await
    }

    /// Writes what waits and closes the file. Later requests are refused.
    pub async fn close(&self) {
        let (reply, closed) = oneshot::channel();
        if self.commands.send(Command::Close { reply }).await.is_ok() {
            // The writer drops the sender when the file is closed.
            let _ = closed.await;
        }
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, Refused>>) -> Command,
    ) -> Result<T, Refused> {
        let (reply, answer) = oneshot::channel();
        let closed =
            || Refused::new(ErrorCode::Unavailable, "the ledger is closed: the agent stops");
        self.commands.send(command(reply)).await.map_err(|_closed| closed())?;
        answer.await.map_err(|_dropped| closed())?
    }
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, Image> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Image> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Accepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} by {}", self.at, self.request_id)
    }
}
