//! Streams: RabbitMQ's append-only queues, over plain AMQP.
//!
//! AMQP tells nobody where a stream ends: the broker's message count is seconds old, and a
//! consumer that hears nothing cannot know whether there is nothing. So a reader that is to
//! stop at the end appends a *mark* first and stops when it reads it. Marks are a few bytes,
//! belong to their reader, and are skipped by everybody else.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Consumer};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::amqp::client::{Needs, send};
use crate::amqp::delivery::offset_of;
use crate::amqp::link::Shared;
use crate::amqp::options::seconds;
use crate::amqp::session::{DeclareError, Outgoing, Session, short};
use crate::amqp::topology::{interval, stream_queue, text};
use crate::dispatch::new_id;
use crate::{BusError, ReadFrom, Record, Stream, wire};

/// Records delivered ahead of their acknowledgement. Streams insist on a bound.
const PREFETCH: u16 = 512;

/// Acknowledge this often; it only moves the window.
const ACK_EVERY: u64 = 128;

/// A broker that holds a record delivers it well within this time.
const SILENCE: Duration = Duration::from_secs(10);

/// Between attempts to subscribe.
const AGAIN: Duration = Duration::from_millis(200);

/// How a mark begins; its id and the end of the object follow.
const MARK: &str = r#"{"stackhand.mark":""#;

/// Appends a record. See [`crate::Transport::publish`].
pub(super) async fn publish(
    shared: &Shared,
    stream: &Stream,
    body: &Value,
) -> Result<(), BusError> {
    let body = body.to_string().into_bytes();
    if body.len() > wire::MAX_BODY {
        let what = format!("a record of {} bytes is more than {}", body.len(), wire::MAX_BODY);
        return Err(BusError::Malformed(what));
    }
    append(shared, stream, &body).await
}

async fn append(shared: &Shared, stream: &Stream, body: &[u8]) -> Result<(), BusError> {
    let queue = stream_queue(stream);
    let message = Outgoing {
        exchange: "",
        key: &queue.name,
        body,
        expiration: None,
        mandatory: true,
        unhurried: false,
    };
    send(shared, Needs::Queue(&queue), &message).await
}

/// Where the next consumer starts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Start {
    From(ReadFrom),
    Offset(u64),
}

impl Start {
    /// The consumer's argument `x-stream-offset`.
    pub(super) fn argument(self) -> AMQPValue {
        match self {
            Self::From(ReadFrom::First) => text("first"),
            Self::From(ReadFrom::Next) => text("next"),
            Self::From(ReadFrom::Age(age)) => text(&interval(age)),
            Self::Offset(offset) => {
                AMQPValue::LongLongInt(i64::try_from(offset).unwrap_or(i64::MAX))
            }
        }
    }
}

/// Reads. See [`crate::Transport::read`].
pub(super) async fn read(
    shared: &Arc<Shared>,
    stream: &Stream,
    from: ReadFrom,
    follow: bool,
) -> Result<BoxStream<'static, Result<Record, BusError>>, BusError> {
    if !follow && from == ReadFrom::Next {
        return Ok(futures_util::stream::empty().boxed());
    }
    let mark = if follow {
        None
    } else {
        let mark = format!("{MARK}{}\"}}", new_id());
        append(shared, stream, mark.as_bytes()).await?;
        Some(mark)
    };
    // Subscribed before we return, so that a reader of what comes next misses nothing.
    let limit = seconds(shared.options.send_timeout_seconds);
    let deadline = Instant::now() + limit;
    let start = Start::From(from);
    let (session, consumer) = loop {
        let session = shared.session(deadline).await?;
        match subscribe(&session, stream, start).await {
            Ok(consumer) => break (session, consumer),
            Err(DeclareError::LinkLost | DeclareError::NotYet(_)) if Instant::now() < deadline => {
                tokio::time::sleep(AGAIN).await;
            }
            Err(error) => return Err(error.into_bus_error(&session.peer)),
        }
    };

    let (records, out) = mpsc::channel(256);
    let mut reader =
        Reader { shared: Arc::clone(shared), stream: stream.clone(), start, mark, records };
    tokio::spawn(async move { reader.run(session, consumer).await });
    let out = futures_util::stream::unfold(out, |mut out| async {
        out.recv().await.map(|record| (record, out))
    });
    Ok(out.boxed())
}

async fn subscribe(
    session: &Session,
    stream: &Stream,
    start: Start,
) -> Result<(Channel, Consumer), DeclareError> {
    session.declare_queue_once(&stream_queue(stream)).await?;
    let channel = session.channel().await?;
    let consuming = async {
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), start.argument());
        let options = BasicConsumeOptions::default();
        channel.basic_consume(short(&stream.name)?, "1".into(), options, arguments).await
    };
    let what = format!("consumer of {}", stream.name);
    let consumer = consuming.await.map_err(|error| session.refused(&what, &error))?;
    Ok((channel, consumer))
}

/// Reads on, across sessions.
struct Reader {
    shared: Arc<Shared>,
    stream: Stream,
    start: Start,
    /// Stop at this record; `None` follows.
    mark: Option<String>,
    records: mpsc::Sender<Result<Record, BusError>>,
}

/// Why reading stopped.
enum Stopped {
    /// All was read, or nobody reads any more.
    Done,
    /// The session ended; there is more.
    LinkLost,
}

impl Reader {
    async fn run(&mut self, session: Arc<Session>, consumer: (Channel, Consumer)) {
        let mut next = Some((session, consumer));
        loop {
            if let Some((session, (channel, consumer))) = next.take() {
                let stopped = self.read_on(&session, consumer).await;
                if !session.is_over() {
                    let _ = channel.close(200, "OK".into()).await;
                }
                if matches!(stopped, Stopped::Done) {
                    return;
                }
            }
            next = self.subscribe_again().await;
            if next.is_none() && (self.records.is_closed() || self.shared.stop.is_cancelled()) {
                return;
            }
        }
    }

    /// Subscribes on the next session, after what was read. `None` asks for another try.
    async fn subscribe_again(&mut self) -> Option<(Arc<Session>, (Channel, Consumer))> {
        let session = tokio::select! {
            () = self.records.closed() => return None,
            session = self.shared.next_session() => session?,
        };
        match subscribe(&session, &self.stream, self.start).await {
            Ok(consumer) => Some((session, consumer)),
            Err(error) => {
                if let DeclareError::Refused(_) = error {
                    let error = error.into_bus_error(&session.peer);
                    let _ = self.records.send(Err(error)).await;
                }
                tokio::time::sleep(AGAIN).await;
                None
            }
        }
    }

    async fn read_on(&mut self, session: &Session, mut consumer: Consumer) -> Stopped {
        let mut unacked = 0;
        loop {
            let silence = async {
                match self.mark {
                    Some(_) => tokio::time::sleep(SILENCE).await,
                    None => std::future::pending().await,
                }
            };
            let delivery = tokio::select! {
                biased;
                delivery = consumer.next() => delivery,
                () = self.records.closed() => return Stopped::Done,
                () = session.over() => return Stopped::LinkLost,
                () = silence => {
                    let reason = format!("stream {} went silent before its end", self.stream.name);
                    let error = BusError::Unreachable { peer: session.peer.clone(), reason };
                    let _ = self.records.send(Err(error)).await;
                    return Stopped::Done;
                }
            };
            let Some(Ok(delivery)) = delivery else {
                session.end(format!("the broker cancelled a consumer of {}", self.stream.name));
                return Stopped::LinkLost;
            };
            unacked += 1;
            if unacked >= ACK_EVERY {
                unacked = 0;
                // A lost ack ends the session, which shows above.
                let _ = delivery.ack(BasicAckOptions { multiple: true }).await;
            }
            let Some(offset) = offset_of(&delivery) else { continue };
            // Chunks are delivered whole: the first may begin before where we asked.
            if matches!(self.start, Start::Offset(start) if offset < start) {
                continue;
            }
            self.start = Start::Offset(offset + 1);
            if delivery.data.starts_with(MARK.as_bytes()) {
                if self.mark.as_ref().is_some_and(|mark| mark.as_bytes() == delivery.data) {
                    return Stopped::Done;
                }
                continue;
            }
            match wire::open_record(&delivery.data) {
                Ok(body) => {
                    if self.records.send(Ok(Record { offset, body })).await.is_err() {
                        return Stopped::Done;
                    }
                }
                Err(error) => {
                    self.shared.counts.malformed.add();
                    tracing::warn!(stream = self.stream.name, offset, %error, "record skipped");
                }
            }
        }
    }
}
