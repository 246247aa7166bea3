//! The asking side of a local socket: many calls at once over one connection.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::line::{Lines, write_line};
use super::{LocalOptions, RefusalKind, refusal_kind};
use crate::dispatch::{check_call, new_id, timed_out};
use crate::wire::{self, ReplyTo};
use crate::{BusError, CallLimits, Failure, Request, Target};

/// One connection. It ends for good with the first error; the next call makes another.
pub(super) struct Connection {
    peer: String,
    max_line: usize,
    outgoing: mpsc::Sender<Outgoing>,
    pending: Mutex<BTreeMap<String, Pending>>,
    ended: CancellationToken,
    /// What the server said before it closed.
    refusal: Mutex<Option<Failure>>,
}

/// A line to write, and whom to tell that it was.
struct Outgoing {
    line: Vec<u8>,
    written: oneshot::Sender<()>,
}

/// A call that waits for its answer.
struct Pending {
    answer: oneshot::Sender<Result<Value, Failure>>,
    alive: mpsc::Sender<()>,
}

/// Takes the call out of the book, whichever way it ends.
struct Entry<'a> {
    connection: &'a Connection,
    msg_id: String,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.connection.pending().remove(&self.msg_id);
    }
}

/// Why one attempt brought no answer.
pub(super) enum Attempt {
    /// The line was not written whole, so it was not executed: another connection may try.
    NotSent(BusError),
    /// Final.
    Failed(BusError),
}

impl Connection {
    pub(super) async fn open(path: &Path, options: &LocalOptions) -> Result<Arc<Self>, BusError> {
        let stream =
            UnixStream::connect(path).await.map_err(|error| explain_connect(path, &error))?;
        let (read, write) = stream.into_split();
        let (outgoing, lines) = mpsc::channel(16);
        let connection = Arc::new(Self {
            peer: path.display().to_string(),
            max_line: options.max_line,
            outgoing,
            pending: Mutex::default(),
            ended: CancellationToken::new(),
            refusal: Mutex::default(),
        });
        tokio::spawn(write_all(write, lines, connection.ended.clone()));
        tokio::spawn(Arc::clone(&connection).read_all(read, options.clone()));
        Ok(connection)
    }

    pub(super) fn is_open(&self) -> bool {
        !self.ended.is_cancelled()
    }

    pub(super) fn end(&self) {
        self.ended.cancel();
    }

    pub(super) fn ended(&self) -> CancellationToken {
        self.ended.clone()
    }

    /// Asks once.
    pub(super) async fn call(
        &self,
        target: &Target,
        request: &Request,
        limits: CallLimits,
        begun: Instant,
    ) -> Result<Value, Attempt> {
        check_call(target, &request.method, limits).map_err(Attempt::Failed)?;
        let deadline = begun + limits.total;
        let (answer, mut answered) = oneshot::channel();
        let (alive, mut heard) = mpsc::channel(1);
        let entry = Entry { connection: self, msg_id: new_id() };
        self.pending().insert(entry.msg_id.clone(), Pending { answer, alive });
        let reply_to =
            ReplyTo { msg_id: entry.msg_id.clone(), queue: String::new(), monitor: limits.monitor };
        let timeout = |passed| Err(Attempt::Failed(timed_out(target, &request.method, passed)));
        tokio::select! {
            sent = self.send(target, request, Some(&reply_to)) => sent?,
            () = sleep_until(deadline) => return timeout(limits.total),
        }
        loop {
            let silence = limits.monitor.map_or(deadline, |limit| Instant::now() + limit);
            tokio::select! {
                biased;
                outcome = &mut answered => return match outcome {
                    Ok(outcome) => outcome.map_err(|failure| Attempt::Failed(BusError::Remote(failure))),
                    Err(_) => Err(Attempt::Failed(self.lost())),
                },
                () = self.ended.cancelled() => {
                    // The answer may have been read just before the end.
                    return match answered.try_recv() {
                        Ok(outcome) => outcome.map_err(|failure| Attempt::Failed(BusError::Remote(failure))),
                        Err(_) => Err(Attempt::Failed(self.lost())),
                    };
                }
                Some(()) = heard.recv() => {}
                () = sleep_until(silence.min(deadline)) => return timeout(begun.elapsed()),
            }
        }
    }

    /// Writes one request and waits until the socket has taken it.
    pub(super) async fn send(
        &self,
        target: &Target,
        request: &Request,
        reply_to: Option<&ReplyTo>,
    ) -> Result<(), Attempt> {
        let mut inner = wire::request_object(target, request, &new_id(), reply_to);
        inner.remove("_reply_q");
        inner.insert("_topic".to_owned(), target.topic.as_str().into());
        let mut line = Value::Object(inner).to_string().into_bytes();
        if line.len() > self.max_line {
            let (length, limit) = (line.len(), self.max_line);
            let what = format!("`{}` is {length} bytes, more than {limit}", request.method);
            return Err(Attempt::Failed(BusError::Malformed(what)));
        }
        line.push(b'\n');
        let (written, confirmed) = oneshot::channel();
        if self.outgoing.send(Outgoing { line, written }).await.is_err() {
            return Err(Attempt::NotSent(self.lost()));
        }
        confirmed.await.map_err(|_| Attempt::NotSent(self.lost()))
    }

    /// What to tell a caller whose connection went away.
    fn lost(&self) -> BusError {
        let refusal = self.refusal.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (peer, reason) = (self.peer.clone(), |failure: Failure| failure.message);
        match refusal {
            Some(failure) if refusal_kind(&failure) == RefusalKind::Lasting => {
                BusError::Refused { peer, reason: reason(failure) }
            }
            Some(failure) => BusError::Unreachable { peer, reason: reason(failure) },
            None => BusError::Unreachable {
                peer,
                reason: "the connection closed before the answer; the request may or may not \
                         have been carried out"
                    .to_owned(),
            },
        }
    }

    fn pending(&self) -> MutexGuard<'_, BTreeMap<String, Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read_all(self: Arc<Self>, read: OwnedReadHalf, options: LocalOptions) {
        let mut lines = Lines::new(read, options.max_line, options.partial_line_timeout);
        loop {
            let line = tokio::select! {
                line = lines.next() => line,
                () = self.ended.cancelled() => break,
            };
            match line {
                Ok(Some(line)) => {
                    if !self.take(&line) {
                        break;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(peer = self.peer, %error, "local connection ended");
                    break;
                }
            }
        }
        self.ended.cancel();
    }

    /// Takes in one answer. False when the connection is of no further use.
    fn take(&self, line: &[u8]) -> bool {
        let frame = match wire::decode_reply(line) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::warn!(peer = self.peer, %error, "answer dropped, connection ended");
                return false;
            }
        };
        if frame.msg_id.is_empty() {
            *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = frame.outcome.err();
            return false;
        }
        let mut pending = self.pending();
        if frame.ending {
            if let Some(call) = pending.remove(&frame.msg_id) {
                let _gave_up = call.answer.send(frame.outcome);
            }
        } else if let Some(call) = pending.get(&frame.msg_id) {
            let _one_is_enough = call.alive.try_send(());
        }
        true
    }
}

async fn write_all(
    mut write: OwnedWriteHalf,
    mut lines: mpsc::Receiver<Outgoing>,
    ended: CancellationToken,
) {
    loop {
        let outgoing = tokio::select! {
            outgoing = lines.recv() => outgoing,
            () = ended.cancelled() => None,
        };
        let Some(outgoing) = outgoing else { break };
        let written = tokio::select! {
            // A server that takes its time is the caller's limit to judge.
            written = write_line(&mut write, &outgoing.line, Duration::from_secs(3600)) => written,
            () = ended.cancelled() => break,
        };
        if written.is_err() {
            // The reader may still find out why: the server says so before it closes.
            let grace = Instant::now() + Duration::from_millis(200);
            tokio::select! {
                () = ended.cancelled() => {}
                () = sleep_until(grace) => {}
            }
            break;
        }
        let _gave_up = outgoing.written.send(());
    }
    ended.cancel();
}

/// Turns a failed connect into an error with a remedy.
fn explain_connect(path: &Path, error: &io::Error) -> BusError {
    let peer = path.display().to_string();
    let program = path.file_stem().map_or("the agent".into(), |stem| stem.to_string_lossy());
    match error.kind() {
        io::ErrorKind::NotFound => BusError::Unreachable {
            peer,
            reason: format!("there is no such socket; is {program} running?"),
        },
        io::ErrorKind::ConnectionRefused => BusError::Unreachable {
            peer,
            reason: format!("nobody listens on it any more; is {program} running?"),
        },
        io::ErrorKind::PermissionDenied => BusError::Refused {
            peer,
            reason: "permission denied; be root or in group stackhand".to_owned(),
        },
        _ => BusError::Unreachable { peer, reason: error.to_string() },
    }
}
