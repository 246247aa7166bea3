//! The answering side: three queues per service, requests taken at most once, handlers within
//! a bound.
//!
//! A request is acknowledged *before* it is handled, as oslo.messaging does, but only once a
//! handler is free for it: what we cannot work on stays in the broker, so memory stays flat
//! under any load and another server can have it.

use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream, SelectAll};
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, BasicQosOptions, BasicRejectOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::amqp::delivery::{ack, body, offset_of};
use crate::amqp::link::Shared;
use crate::amqp::memory::{Admission, Memory};
use crate::amqp::reply;
use crate::amqp::session::{DeclareError, Session, is_stream, short};
use crate::amqp::stream::Start;
use crate::amqp::topology::service_queues;
use crate::dispatch::{self, new_id};
use crate::wire::{self, BadRequest, ReplyFrame, ReplyTo, RequestFrame};
use crate::{BusError, Delivered, Failure, Handler, Origin, ReadFrom, ServerHandle, Service};

/// oslo.messaging's own method, answered for every service where it is switched on.
const PING: &str = "oslo_rpc_server_ping";

/// Between attempts to serve while a queue does not work.
const NOT_YET_PAUSE: Duration = Duration::from_secs(1);

/// One service, across sessions.
pub(super) struct Server {
    service: Service,
    handler: Arc<dyn Handler>,
    /// The fanout queue keeps its name, so that a short outage loses no cast.
    fanout_id: String,
    /// What comes next in the stream of fanouts, where they come by one; 0 before the first.
    next_fanout: AtomicU64,
    permits: Arc<Semaphore>,
    memory: Mutex<Memory>,
    /// The last session this server was started on.
    started: tokio::sync::Mutex<u64>,
    /// Take no more requests.
    stop: CancellationToken,
    /// Drop the handlers that still run.
    kill: CancellationToken,
    consuming: TaskTracker,
    working: TaskTracker,
}

/// What a consumer yields, and whether it reads a stream; `None` marks its end.
type Deliveries = SelectAll<BoxStream<'static, Option<(bool, lapin::Result<Delivery>)>>>;

/// Serves. See [`crate::Transport::serve`].
pub(super) async fn serve(
    shared: &Arc<Shared>,
    service: Service,
    handler: Arc<dyn Handler>,
) -> Result<ServerHandle, BusError> {
    if service.concurrency == 0 {
        let what = format!("service {}: concurrency must be at least 1", service.topic);
        return Err(BusError::Config(what));
    }
    let stop = shared.closing.child_token();
    let server = Arc::new(Server {
        permits: Arc::new(Semaphore::new(service.concurrency.min(Semaphore::MAX_PERMITS))),
        service,
        handler,
        fanout_id: new_id(),
        next_fanout: AtomicU64::new(0),
        memory: Mutex::default(),
        started: tokio::sync::Mutex::new(0),
        stop: stop.clone(),
        kill: CancellationToken::new(),
        consuming: TaskTracker::new(),
        working: TaskTracker::new(),
    });
    shared.add_server(Arc::clone(&server));
    if let Some(session) = shared.current() {
        match server.start(shared, &session).await {
            // The supervisor starts it on the next session.
            Ok(()) | Err(DeclareError::LinkLost) => {}
            Err(DeclareError::NotYet(reason)) => {
                server.start_later(Arc::clone(shared), Arc::clone(&session), &reason);
            }
            Err(error) => {
                shared.remove_server(&server);
                return Err(error.into_bus_error(&session.peer));
            }
        }
    }
    let task = tokio::spawn(server.end(Arc::clone(shared)));
    Ok(ServerHandle::new(stop, task))
}

impl Server {
    /// Declares, binds and consumes on a session, unless that was done.
    pub(super) async fn start(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        session: &Arc<Session>,
    ) -> Result<(), DeclareError> {
        let mut started = self.started.lock().await;
        if *started >= session.generation || self.stop.is_cancelled() {
            return Ok(());
        }
        let (channel, deliveries) = self.consume(shared, session).await?;
        *started = session.generation;
        let (server, shared, session) = (Arc::clone(self), Arc::clone(shared), Arc::clone(session));
        self.consuming.spawn(async move {
            server.take_all(&shared, &session, &channel, deliveries).await;
            if !session.is_over() {
                // Gives back what was delivered and not acknowledged.
                let _ = channel.close(200, "OK".into()).await;
            }
        });
        Ok(())
    }

    /// Keeps trying to start on a session while a queue of ours does not work: a classic queue
    /// on a lost node is back when its node is. Everything else on the session goes on.
    pub(super) fn start_later(
        self: &Arc<Self>,
        shared: Arc<Shared>,
        session: Arc<Session>,
        reason: &str,
    ) {
        let topic = &self.service.topic;
        tracing::warn!(topic, reason, "not served; bring the node back, or use quorum queues");
        let server = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = session.over() => return,
                    () = server.stop.cancelled() => return,
                    () = tokio::time::sleep(NOT_YET_PAUSE) => {}
                }
                match server.start(&shared, &session).await {
                    Ok(()) | Err(DeclareError::LinkLost) => return,
                    Err(DeclareError::NotYet(_)) => {}
                    Err(DeclareError::Refused(reason)) => session.end(reason),
                }
            }
        });
    }

    async fn consume(
        &self,
        shared: &Shared,
        session: &Session,
    ) -> Result<(Channel, Deliveries), DeclareError> {
        let queues = service_queues(&self.service, &self.fanout_id, &shared.options);
        for queue in &queues {
            session.declare_queue(queue).await?;
        }
        let channel = session.channel().await?;
        let prefetch = match shared.options.prefetch {
            0 => u16::try_from(self.service.concurrency).unwrap_or(u16::MAX),
            set => set,
        };
        let mut deliveries = SelectAll::new();
        let consuming = async {
            channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
            for (tag, queue) in (1..).zip(&queues) {
                let options = BasicConsumeOptions::default();
                let (name, tag) = (short(&queue.name)?, short(&tag.to_string())?);
                let mut arguments = FieldTable::default();
                let streamed = is_stream(queue);
                if streamed {
                    let start = match self.next_fanout.load(Ordering::Relaxed) {
                        0 => Start::From(ReadFrom::Next),
                        next => Start::Offset(next),
                    };
                    arguments.insert("x-stream-offset".into(), start.argument());
                }
                let consumer: Consumer =
                    channel.basic_consume(name, tag, options, arguments).await?;
                let marked = consumer.map(move |delivery| Some((streamed, delivery)));
                let with_end = marked.chain(stream::once(async { None }));
                deliveries.push(with_end.boxed());
            }
            Ok(())
        };
        let what = format!("consumers of {}", self.service.topic);
        consuming.await.map_err(|error: lapin::Error| session.refused(&what, &error))?;
        Ok((channel, deliveries))
    }

    async fn take_all(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        session: &Arc<Session>,
        channel: &Channel,
        mut deliveries: Deliveries,
    ) {
        loop {
            let next = async {
                let permit = Arc::clone(&self.permits).acquire_owned().await;
                (permit, deliveries.next().await.flatten())
            };
            let (permit, delivery) = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                () = session.over() => return,
                next = next => next,
            };
            let (Ok(permit), Some((streamed, Ok(delivery)))) = (permit, delivery) else {
                let topic = &self.service.topic;
                session.end(format!("the broker cancelled a consumer of {topic}"));
                return;
            };
            // Others than a stream could be told any place by whoever writes to them.
            let offset = if streamed { offset_of(&delivery) } else { None };
            self.take(shared, channel, delivery, offset, permit).await;
        }
    }

    /// Decides about one message, and starts its handler.
    async fn take(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        channel: &Channel,
        delivery: Delivery,
        offset: Option<u64>,
        permit: OwnedSemaphorePermit,
    ) {
        if offset.is_some_and(|offset| offset < self.next_fanout.load(Ordering::Relaxed)) {
            // Chunks of a stream are delivered whole: the first may begin before where we asked.
            let _ = ack(channel, &delivery);
            return;
        }
        let read = || self.next_fanout.fetch_max(offset.map_or(0, |it| it + 1), Ordering::Relaxed);
        let decoded = match body(&delivery) {
            Ok(body) => wire::decode_request(&body),
            Err(error) => Err(unreadable(error)),
        };
        let frame = match decoded {
            Ok(frame) => frame,
            Err(bad) => {
                shared.counts.malformed.add();
                tracing::warn!(topic = self.service.topic, error = %bad.error, "request dropped");
                // Failing to reject means that it comes again, and is dropped then.
                let _ = delivery.reject(BasicRejectOptions { requeue: false }).await;
                read();
                if let BadRequest { reply_to: Some(reply_to), failure, .. } = *bad {
                    self.answer(shared, &reply_to, Err(failure));
                }
                return;
            }
        };
        let admission = self.remember().admit(&frame.unique_id);
        let acked = ack(channel, &delivery);
        match admission {
            Admission::Fresh => {
                if !acked {
                    // The broker still has it, and will deliver it again, maybe elsewhere.
                    self.remember().forget(&frame.unique_id);
                    return;
                }
                read();
                shared.counts.served.add();
                let (server, shared) = (Arc::clone(self), Arc::clone(shared));
                self.working.spawn(async move {
                    tokio::select! {
                        biased;
                        () = server.kill.cancelled() => {}
                        () = server.work(&shared, frame, permit) => {}
                    }
                });
            }
            Admission::Running => shared.counts.duplicates.add(),
            Admission::Done(answer) => {
                shared.counts.duplicates.add();
                if let (Some(answer), Some(reply_to)) = (answer, frame.reply_to) {
                    self.working.spawn(reply::send(Arc::clone(shared), reply_to.queue, answer));
                }
            }
        }
    }

    /// Runs the handler and answers.
    async fn work(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        frame: RequestFrame,
        permit: OwnedSemaphorePermit,
    ) {
        let RequestFrame { request, namespace, version, unique_id, reply_to } = frame;
        let handled = if shared.options.rpc_ping_enabled && request.method == PING {
            Ok(Value::from("pong"))
        } else {
            let delivered = Delivered {
                request,
                namespace,
                version,
                unique_id: unique_id.clone(),
                is_call: reply_to.is_some(),
                origin: Origin::Broker,
            };
            let panicked = || shared.counts.panics.add();
            // Kept in one place: each call by value would make room for it once more.
            let handling = pin!(dispatch::run(self.handler.as_ref(), delivered, panicked));
            match &reply_to {
                Some(reply_to) => keep_alive(shared, reply_to, handling).await,
                None => handling.await,
            }
        };
        let answer = reply_to.as_ref().map(|reply_to| encode(reply_to, handled));
        self.remember().finish(&unique_id, answer.clone());
        drop(permit);
        if let (Some(answer), Some(reply_to)) = (answer, reply_to) {
            reply::send(Arc::clone(shared), reply_to.queue, answer).await;
        }
    }

    fn answer(&self, shared: &Arc<Shared>, to: &ReplyTo, outcome: Result<Value, Failure>) {
        let sending = reply::send(Arc::clone(shared), to.queue.clone(), encode(to, outcome));
        self.working.spawn(sending);
    }

    fn remember(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits to be stopped, then for what runs. Handlers that still run are dropped with this.
    async fn end(self: Arc<Self>, shared: Arc<Shared>) {
        let kill = self.kill.clone().drop_guard();
        self.stop.cancelled().await;
        {
            // No session can start this server any more once this lock was ours.
            let _started = self.started.lock().await;
        }
        shared.remove_server(&self);
        self.consuming.close();
        self.consuming.wait().await;
        self.working.close();
        self.working.wait().await;
        if let Some(session) = shared.current() {
            let [_, _, fanout] = service_queues(&self.service, &self.fanout_id, &shared.options);
            // A stream is the other servers', too.
            if !is_stream(&fanout) {
                session.delete_queue(&fanout.name).await;
            }
        }
        drop(kill);
    }

    /// Waits until a stopped server has answered everything it took.
    pub(super) async fn finished(&self) {
        self.consuming.close();
        self.consuming.wait().await;
        self.working.close();
        self.working.wait().await;
    }
}

/// Runs a handler, and tells a caller who wants to know that it still runs.
async fn keep_alive<T>(
    shared: &Shared,
    reply_to: &ReplyTo,
    mut handling: Pin<&mut impl Future<Output = T>>,
) -> T {
    // Below two seconds the reference server sends none either.
    let Some(monitor) = reply_to.monitor.filter(|monitor| *monitor >= Duration::from_secs(2))
    else {
        return handling.await;
    };
    let alive =
        ReplyFrame { msg_id: reply_to.msg_id.clone(), outcome: Ok(Value::Null), ending: false };
    loop {
        if let Ok(handled) = tokio::time::timeout(monitor / 2, handling.as_mut()).await {
            return handled;
        }
        let Some(session) = shared.current() else { continue };
        let body = wire::encode_reply(&alive, &new_id());
        tokio::select! {
            biased;
            handled = handling.as_mut() => return handled,
            // Best effort: the next one or the answer itself will show.
            sent = reply::send_once(&session, &reply_to.queue, &body) => {
                if let Err(error) = sent {
                    tracing::debug!(?error, "keep-alive not sent");
                }
            }
        }
    }
}

fn encode(reply_to: &ReplyTo, outcome: Result<Value, Failure>) -> Bytes {
    let frame = ReplyFrame { msg_id: reply_to.msg_id.clone(), outcome, ending: true };
    wire::encode_reply(&frame, &new_id()).into()
}

/// What is done with a body that cannot be unpacked: where its caller waits is inside.
fn unreadable(error: BusError) -> Box<BadRequest> {
    let failure = Failure::new("MalformedMessage", error.to_string());
    Box::new(BadRequest { reply_to: None, failure, error })
}
