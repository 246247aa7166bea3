//! The thread that writes: takes what waits, judges, commits once, answers all.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;
use stackhand_model::{Document, ErrorCode, ObjectRef};
use tokio::sync::{mpsc, oneshot};

use super::file::{Batch, Contents, Migration, Store};
use super::rules::{self, Verdict};
use super::{Accepted, Admit, LedgerError, Shared};
use crate::agent::{Desired, Held, Refusal};
use crate::api::{Applied, Change, Changed, Control, Deleted, Refused};

/// Most requests in one commit.
const MOST_TOGETHER: usize = 512;

type Reply<T> = oneshot::Sender<Result<T, Refused>>;

/// Answers one request, with the failure of its batch if that failed.
type Later = Box<dyn FnOnce(Option<&Refused>) + Send>;

/// What the writer is asked to do.
pub(super) enum Command {
    Apply {
        documents: Vec<Document>,
        request_id: Arc<str>,
        dry_run: bool,
        admit: Admit,
        reply: Reply<Applied>,
    },
    Delete {
        objects: Vec<ObjectRef>,
        request_id: Arc<str>,
        admit: Admit,
        reply: Reply<Deleted>,
    },
    Forget {
        objects: Vec<ObjectRef>,
        reply: Reply<()>,
    },
    Control {
        change: Box<dyn FnOnce(&mut Control) + Send>,
        reply: Reply<Control>,
    },
    Journal {
        key: String,
        value: Option<Value>,
        reply: Reply<()>,
    },
    /// Written when something else is, or soon; nobody waits.
    Nonces {
        changes: Vec<(String, Option<u64>)>,
    },
    /// Answered when all that came before is written.
    Written {
        reply: Reply<()>,
    },
    Close {
        reply: oneshot::Sender<()>,
    },
}

/// The writer's own state: what is on disk, and what this batch adds to it.
pub(super) struct Writer {
    shared: Arc<Shared>,
    store: Store,
    migrations: &'static [Migration],
    /// What would be held if the batch were committed.
    working: Desired,
    control: Control,
    batch: Batch,
    /// Objects of the batch, so that a later command overwrites an earlier one's row.
    rows: BTreeMap<ObjectRef, Option<(Held, Accepted)>>,
    answers: Vec<Later>,
}

impl Writer {
    pub(super) fn new(
        shared: Arc<Shared>,
        store: Store,
        working: Desired,
        migrations: &'static [Migration],
    ) -> Self {
        let control = shared.control.borrow().clone();
        Self {
            shared,
            store,
            migrations,
            working,
            control,
            batch: Batch::default(),
            rows: BTreeMap::new(),
            answers: Vec::new(),
        }
    }

    /// Serves until everybody who could ask is gone, or one asks to close.
    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Command>) {
        let mut closing = None;
        while let Some(first) = queue.blocking_recv() {
            let rest = std::iter::from_fn(|| queue.try_recv().ok()).take(MOST_TOGETHER);
            for command in std::iter::once(first).chain(rest) {
                if let Command::Close { reply } = command {
                    closing = Some(reply);
                    break;
                }
                self.take(command);
            }
            self.commit();
            if closing.is_some() {
                break;
            }
        }
        // Closes the file, then tells whoever waits for that.
        drop(self);
        drop(queue);
        drop(closing);
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Apply { documents, request_id, dry_run, admit, reply } => {
                match self.apply(documents, &request_id, dry_run, &admit) {
                    Ok(applied) if dry_run => answer(reply, Ok(applied)),
                    Ok(applied) => self.later(reply, applied),
                    Err(refused) => answer(reply, Err(refused)),
                }
            }
            Command::Delete { objects, request_id, admit, reply } => {
                match self.delete(&objects, &request_id, &admit) {
                    Ok(deleted) => self.later(reply, deleted),
                    Err(refused) => answer(reply, Err(refused)),
                }
            }
            Command::Forget { objects, reply } => {
                for object in objects {
                    if self.working.objects.get(&object).is_some_and(|held| held.deleting) {
                        self.working.objects.remove(&object);
                        self.working.revision += 1;
                        self.rows.insert(object, None);
                    }
                }
                self.later(reply, ());
            }
            Command::Control { change, reply } => {
                change(&mut self.control);
                self.batch.control = Some(self.control.clone());
                let control = self.control.clone();
                self.later(reply, control);
            }
            Command::Journal { key, value, reply } => {
                self.batch.journal.push((key, value));
                self.later(reply, ());
            }
            Command::Nonces { changes } => self.batch.nonces.extend(changes),
            Command::Written { reply } => self.later(reply, ()),
            Command::Close { .. } => {}
        }
    }

    fn apply(
        &mut self,
        documents: Vec<Document>,
        request_id: &Arc<str>,
        dry_run: bool,
        admit: &Admit,
    ) -> Result<Applied, Refused> {
        let verdicts =
            rules::judge(self.shared.agent, &self.working, documents).map_err(Refused::of)?;
        let objects: Vec<_> = verdicts
            .iter()
            .map(|Verdict { document, change }| Changed {
                object: document.object(),
                change: *change,
                generation: document.generation,
            })
            .collect();
        let changes = verdicts
            .into_iter()
            .filter(|verdict| verdict.change != Change::Unchanged)
            .map(|verdict| Held { document: verdict.document, deleting: false })
            .collect();
        self.change(changes, request_id, dry_run, admit)?;
        Ok(Applied { objects, revision: self.working.revision, dry_run })
    }

    fn delete(
        &mut self,
        objects: &[ObjectRef],
        request_id: &Arc<str>,
        admit: &Admit,
    ) -> Result<Deleted, Refused> {
        let mut told = Vec::with_capacity(objects.len());
        let mut changes = BTreeMap::new();
        for &object in objects {
            rules::check_kind(self.shared.agent, object)?;
            let (change, generation) = match self.working.objects.get(&object) {
                None => (Change::Absent, 0),
                Some(held) => {
                    if !held.deleting {
                        let document = Arc::clone(&held.document);
                        changes.insert(object, Held { document, deleting: true });
                    }
                    (Change::Deleting, held.document.generation)
                }
            };
            told.push(Changed { object, change, generation });
        }
        self.change(changes.into_values().collect(), request_id, false, admit)?;
        Ok(Deleted { objects: told, revision: self.working.revision })
    }

    /// Puts changes into the batch if the agent admits them.
    fn change(
        &mut self,
        changes: Vec<Held>,
        request_id: &Arc<str>,
        dry_run: bool,
        admit: &Admit,
    ) -> Result<(), Refused> {
        if changes.is_empty() {
            return Ok(());
        }
        let mut before = Vec::with_capacity(changes.len());
        let mut changed = BTreeSet::new();
        for held in changes {
            let object = held.document.object();
            changed.insert(object);
            before.push((object, self.working.objects.insert(object, held)));
        }
        self.working.revision += 1;
        // A panic in the agent's judgement must not end the thread that writes.
        let admitted = catch_unwind(AssertUnwindSafe(|| admit(&self.working, &changed)))
            .unwrap_or_else(|_panic| {
                let why = "the agent failed to judge the request; this is a defect, see its log";
                Err(Refusal::new(ErrorCode::Internal, why))
            });
        if dry_run || admitted.is_err() {
            self.working.revision -= 1;
            for (object, held) in before {
                match held {
                    Some(held) => self.working.objects.insert(object, held),
                    None => self.working.objects.remove(&object),
                };
            }
            return admitted.map_err(Refused::from);
        }
        let accepted = Accepted { at: Timestamp::now(), request_id: Arc::clone(request_id) };
        for object in changed {
            if let Some(held) = self.working.objects.get(&object) {
                self.rows.insert(object, Some((held.clone(), accepted.clone())));
            }
        }
        Ok(())
    }

    /// Answers when the batch is on disk, or has failed.
    fn later<T: Send + 'static>(&mut self, reply: Reply<T>, value: T) {
        self.answers.push(Box::new(move |failure| {
            answer(reply, failure.map_or(Ok(value), |refused| Err(refused.clone())));
        }));
    }

    fn commit(&mut self) {
        let mut batch = std::mem::take(&mut self.batch);
        batch.documents = std::mem::take(&mut self.rows).into_iter().collect();
        batch.revision = self.working.revision;
        let answers = std::mem::take(&mut self.answers);
        let empty = batch.documents.is_empty()
            && batch.journal.is_empty()
            && batch.nonces.is_empty()
            && batch.control.is_none();
        let failure = if empty { None } else { self.write(batch).err() };
        for answer in answers {
            answer(failure.as_ref());
        }
    }

    fn write(&mut self, batch: Batch) -> Result<(), Refused> {
        let reopened = if self.store.in_doubt() { self.reload(&batch) } else { Ok(()) };
        match reopened.and_then(|()| self.store.commit(&batch)) {
            Ok(()) => {
                self.publish(batch);
                Ok(())
            }
            Err(error) => {
                let refusal = error.refusal();
                tracing::error!(error = %refusal, "the ledger takes no writes");
                // Nobody sends a nonce again: it goes with the next batch. One that has expired
                // need not; it is taken out when the ledger is next opened and written.
                let now = u64::try_from(Timestamp::now().as_second()).unwrap_or(0);
                let still_good = |until: &Option<u64>| until.is_some_and(|until| until >= now);
                self.batch.nonces = batch.nonces;
                self.batch.nonces.retain(|(_, until)| still_good(until));
                // Back to what readers see; the file is looked at before the next write.
                self.working = Desired::clone(&self.shared.read().desired);
                self.control = self.shared.control.borrow().clone();
                Err(refusal.into())
            }
        }
    }

    /// Opens the file after a failed write. Should it hold the batch that failed, readers must
    /// see that before anything is judged; requests judged before are refused.
    fn reload(&mut self, batch: &Batch) -> Result<(), LedgerError> {
        let contents = self.store.reopen(self.migrations)?;
        let Contents { objects, accepted, journal, nonces, control, revision, .. } = contents;
        let same = self.shared.read().desired.objects == objects;
        if !same {
            let mut image = self.shared.write();
            // Larger than any revision told so far, though the failed batch was not told.
            let revision = revision.max(batch.revision) + 1;
            image.desired = Arc::new(Desired { objects, revision });
            image.accepted = accepted;
            image.journal = journal;
            image.nonces.extend(nonces);
            drop(image);
            self.shared.control.send_replace(control);
            self.shared.revision.send_replace(revision);
            return Err(LedgerError::Io {
                action: "go on with",
                path: self.store.path().to_owned(),
                source: std::io::Error::other("an earlier write that had failed was found done"),
            });
        }
        let mut image = self.shared.write();
        image.journal = journal;
        drop(image);
        self.shared.control.send_if_modified(|shown| {
            let differs = *shown != control;
            *shown = control;
            differs
        });
        tracing::info!(path = %self.store.path().display(), "the ledger is open again");
        Ok(())
    }

    /// Shows readers what has been written.
    fn publish(&mut self, batch: Batch) {
        let mut image = self.shared.write();
        let changed = !batch.documents.is_empty();
        if changed {
            // Copies only if a pass still looks at the previous one.
            let desired = Arc::make_mut(&mut image.desired);
            desired.revision = batch.revision;
            let mut accepted = BTreeMap::new();
            for (object, row) in batch.documents {
                match row {
                    Some((held, when)) => {
                        desired.objects.insert(object, held);
                        accepted.insert(object, Some(when));
                    }
                    None => {
                        desired.objects.remove(&object);
                        accepted.insert(object, None);
                    }
                }
            }
            for (object, when) in accepted {
                match when {
                    Some(when) => image.accepted.insert(object, when),
                    None => image.accepted.remove(&object),
                };
            }
        }
        for (key, value) in batch.journal {
            match value {
                Some(value) => image.journal.insert(key, value),
                None => image.journal.remove(&key),
            };
        }
        drop(image);
        if changed {
            self.shared.revision.send_replace(batch.revision);
        }
        if let Some(control) = batch.control {
            self.shared.control.send_replace(control);
        }
    }
}

fn answer<T>(reply: Reply<T>, result: Result<T, Refused>) {
    // Whoever asked may have gone; what was written stays written.
    let _ = reply.send(result);
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Command")
    }
}
