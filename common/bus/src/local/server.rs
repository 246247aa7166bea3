//! The answering side of a local socket.
//!
//! Every bound is per listener or per connection, and every wait on a peer has an end, so that
//! no peer can take the agent's memory, its descriptors or its attention from the others.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::unistd::Gid;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::line::{LineError, Lines, write_line};
use super::peer::Peer;
use super::{LocalCounters, LocalOptions};
use crate::dispatch::{self, new_id};
use crate::wire::{self, ReplyFrame, RequestFrame};
use crate::{BusError, Delivered, Failure, Handler, Origin, Service};

/// How long a refused peer is waited for when it is told why.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(1);

/// What all connections of one listener share.
pub(super) struct Shared {
    pub(super) service: Service,
    pub(super) handler: Arc<dyn Handler>,
    pub(super) options: LocalOptions,
    pub(super) group: Option<Gid>,
    pub(super) counts: Arc<Counts>,
    /// Requests handled at once, over all connections.
    pub(super) working: Arc<Semaphore>,
}

/// What happened on a listener so far.
#[derive(Debug, Default)]
pub(super) struct Counts {
    connections: AtomicU64,
    requests: AtomicU64,
    refused_peers: AtomicU64,
    refused_busy: AtomicU64,
    malformed: AtomicU64,
    stalled: AtomicU64,
    slow_readers: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counts {
    pub(super) fn snapshot(&self) -> LocalCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LocalCounters {
            connections: read(&self.connections),
            requests: read(&self.requests),
            refused_peers: read(&self.refused_peers),
            refused_busy: read(&self.refused_busy),
            malformed: read(&self.malformed),
            stalled: read(&self.stalled),
            slow_readers: read(&self.slow_readers),
        }
    }
}

/// Accepts peers until `stop`, then lets running requests finish and answers them.
pub(super) async fn accept(shared: Arc<Shared>, listener: UnixListener, stop: CancellationToken) {
    let seats = Arc::new(Semaphore::new(shared.options.max_connections));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: the peers that are served will give some back.
                tracing::warn!(%error, "cannot accept a local connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let shared = Arc::clone(&shared);
        match Arc::clone(&seats).try_acquire_owned() {
            Ok(seat) => {
                let stop = stop.clone();
                connections.spawn(async move {
                    receive(shared, stream, stop).await;
                    drop(seat);
                });
            }
            // Refusals are bounded too: a peer beyond the bound is not even told.
            Err(_) if connections.len() < shared.options.max_connections * 2 => {
                count(&shared.counts.refused_busy);
                let most = shared.options.max_connections;
                let what = format!("all {most} connections of this agent are taken; try later");
                connections.spawn(refuse(stream, Failure::new("Busy", what)));
            }
            Err(_) => count(&shared.counts.refused_busy),
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Checks who the peer is and serves it.
async fn receive(shared: Arc<Shared>, stream: UnixStream, stop: CancellationToken) {
    let peer = match Peer::of(&stream) {
        Ok(peer) => peer,
        Err(error) => {
            count(&shared.counts.refused_peers);
            tracing::warn!(%error, "cannot tell who connected; refused");
            return;
        }
    };
    if !peer.may_ask(shared.group) {
        count(&shared.counts.refused_peers);
        tracing::warn!(uid = peer.uid, gid = peer.gid, pid = peer.pid, "local peer refused");
        let group = shared.options.group.as_deref().unwrap_or("(none set)");
        let what = format!("uid {} may not ask this agent; be root or in group {group}", peer.uid);
        return refuse(stream, Failure::new("Forbidden", what)).await;
    }
    count(&shared.counts.connections);
    let (read, write) = stream.into_split();
    let ended = CancellationToken::new();
    let (answers, lines) = mpsc::channel(1);
    let writing = tokio::spawn(write_answers(Arc::clone(&shared), write, lines, ended.clone()));
    let connection = Connection { shared, origin: peer.origin(), answers, ended };
    connection.read_requests(read, stop).await;
    drop(connection);
    let _the_writer_never_panics = writing.await;
}

/// Says why and closes. What the peer is just sending is read and dropped first: a simple
/// client would fail at its writing, and never read the reason.
async fn refuse(mut stream: UnixStream, failure: Failure) {
    let line = encode("", Err(failure), true, usize::MAX);
    let telling = async {
        stream.write_all(&line).await?;
        stream.shutdown().await?;
        let mut dropped = [0; 4096];
        while stream.read(&mut dropped).await? > 0 {}
        io::Result::Ok(())
    };
    let _gone_or_slow = tokio::time::timeout(REFUSAL_PATIENCE, telling).await;
}

/// One peer that may ask.
struct Connection {
    shared: Arc<Shared>,
    origin: Origin,
    answers: mpsc::Sender<Vec<u8>>,
    ended: CancellationToken,
}

impl Connection {
    async fn read_requests(&self, read: OwnedReadHalf, stop: CancellationToken) {
        let options = &self.shared.options;
        let mut lines = Lines::new(read, options.max_line, options.partial_line_timeout);
        let places = Arc::new(Semaphore::new(options.max_in_flight));
        let mut running = JoinSet::new();
        loop {
            while running.try_join_next().is_some() {}
            // A peer with too many requests under way is not read until one is answered.
            let next = async {
                let place = Arc::clone(&places).acquire_owned().await.ok()?;
                Some((place, lines.next().await))
            };
            let (place, line) = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = self.ended.cancelled() => break,
                next = next => match next {
                    Some(next) => next,
                    None => break,
                },
            };
            match line {
                Ok(Some(line)) if line.iter().all(u8::is_ascii_whitespace) => {}
                Ok(Some(line)) => {
                    if !self.take(&line, place, &mut running).await {
                        break;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    self.give_up_on(&error).await;
                    break;
                }
            }
        }
        // What runs is finished and answered, also for a peer that closed its writing half.
        while running.join_next().await.is_some() {}
    }

    /// Starts on one line. False when the connection must end.
    async fn take(
        &self,
        line: &[u8],
        place: OwnedSemaphorePermit,
        running: &mut JoinSet<()>,
    ) -> bool {
        let (frame, topic) = match decode(line) {
            Ok(decoded) => decoded,
            Err((msg_id, failure)) => {
                count(&self.shared.counts.malformed);
                tracing::warn!(reason = failure.message, "malformed local request");
                let known = msg_id.is_some();
                self.answer(&msg_id.unwrap_or_default(), Err(failure)).await;
                return known;
            }
        };
        let served = &self.shared.service.topic;
        if let (Some(topic), Some(reply_to)) =
            (topic.filter(|topic| topic != served), &frame.reply_to)
        {
            let what = format!("this socket serves {served}, not {topic}");
            self.answer(&reply_to.msg_id, Err(Failure::new("WrongTopic", what))).await;
            return true;
        }
        count(&self.shared.counts.requests);
        let shared = Arc::clone(&self.shared);
        let (origin, answers) = (self.origin.clone(), self.answers.clone());
        running.spawn(async move {
            work(&shared, frame, origin, &answers).await;
            drop(place);
        });
        true
    }

    async fn give_up_on(&self, error: &LineError) {
        let class = match error {
            LineError::TooLong(_) => {
                count(&self.shared.counts.malformed);
                "MalformedMessage"
            }
            LineError::Stalled(_) => {
                count(&self.shared.counts.stalled);
                "MalformedMessage"
            }
            // The peer is gone: nobody to tell, nothing to note.
            LineError::Io(_) => return,
        };
        tracing::warn!(%error, "local connection ended");
        self.answer("", Err(Failure::new(class, error.to_string()))).await;
    }

    async fn answer(&self, msg_id: &str, outcome: Result<Value, Failure>) {
        let line = encode(msg_id, outcome, true, self.shared.options.max_line);
        let _peer_is_gone = self.answers.send(line).await;
    }
}

/// Handles one request within the service's bound and sends the answer.
async fn work(
    shared: &Shared,
    frame: RequestFrame,
    origin: Origin,
    answers: &mpsc::Sender<Vec<u8>>,
) {
    let RequestFrame { request, namespace, version, unique_id, reply_to } = frame;
    let delivered =
        Delivered { request, namespace, version, unique_id, is_call: reply_to.is_some(), origin };
    let handling = async {
        let Ok(_turn) = shared.working.acquire().await else {
            return Err(Failure::new("InternalError", "the agent is shutting down"));
        };
        dispatch::run(shared.handler.as_ref(), delivered, || {}).await
    };
    let Some(reply_to) = reply_to else {
        let _casts_have_no_answer = handling.await;
        return;
    };
    let alive = || encode(&reply_to.msg_id, Ok(Value::Null), false, usize::MAX);
    tokio::pin!(handling);
    let outcome = match reply_to.monitor.map(|monitor| monitor / 2) {
        Some(every) if every >= Duration::from_secs(1) => loop {
            tokio::select! {
                biased;
                outcome = &mut handling => break outcome,
                () = tokio::time::sleep(every) => {
                    // A full channel means that something else is being written.
                    let _busy_is_alive = answers.try_send(alive());
                }
            }
        },
        _ => handling.await,
    };
    let line = encode(&reply_to.msg_id, outcome, true, shared.options.max_line);
    let _peer_is_gone = answers.send(line).await;
}

/// Writes what the connection's tasks hand over, until the last of them is done.
async fn write_answers(
    shared: Arc<Shared>,
    mut write: OwnedWriteHalf,
    mut lines: mpsc::Receiver<Vec<u8>>,
    ended: CancellationToken,
) {
    while let Some(line) = lines.recv().await {
        if let Err(error) = write_line(&mut write, &line, shared.options.write_timeout).await {
            if error.kind() == io::ErrorKind::TimedOut {
                count(&shared.counts.slow_readers);
                tracing::warn!("a local peer does not read its answers; connection ended");
            }
            break;
        }
    }
    ended.cancel();
}

/// Reads a line: the request and the topic its sender meant.
///
/// The error has the id to answer to, if the line got far enough to tell.
fn decode(line: &[u8]) -> Result<(RequestFrame, Option<String>), (Option<String>, Failure)> {
    let malformed = |error: &BusError| Failure::new("MalformedMessage", error.to_string());
    let mut inner = wire::open(line).map_err(|error| (None, malformed(&error)))?;
    let topic = match inner.remove("_topic") {
        Some(Value::String(topic)) => Some(topic),
        _ => None,
    };
    // There is one place to answer to: the connection.
    if inner.contains_key("_msg_id") {
        inner.insert("_reply_q".to_owned(), Value::String(String::new()));
    }
    match wire::request_from_object(inner) {
        Ok(frame) => Ok((frame, topic)),
        Err(bad) => Err((bad.reply_to.map(|reply_to| reply_to.msg_id), bad.failure)),
    }
}

fn encode(msg_id: &str, outcome: Result<Value, Failure>, ending: bool, limit: usize) -> Vec<u8> {
    let encode = |outcome| {
        let frame = ReplyFrame { msg_id: msg_id.to_owned(), outcome, ending };
        let mut line = wire::reply_object(&frame, &new_id()).to_string().into_bytes();
        line.push(b'\n');
        line
    };
    let line = encode(outcome);
    if line.len() <= limit {
        return line;
    }
    let what = format!("the answer is {} bytes, more than the {limit} of a line", line.len());
    encode(Err(Failure::new("AnswerTooLarge", what)))
}
