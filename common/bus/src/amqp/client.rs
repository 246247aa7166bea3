//! The asking side: calls with their answers, casts, notifications.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use lapin::options::{BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use crate::amqp::delivery::{Taken, body};
use crate::amqp::link::Shared;
use crate::amqp::options::seconds;
use crate::amqp::session::{DeclareError, Outgoing, SendError, Session, short};
use crate::amqp::topology::{self, Exchange, Queue, transient_queue};
use crate::dispatch::{check_call, new_id, timed_out};
use crate::wire::{self, ReplyFrame, ReplyTo};
use crate::{BusError, CallLimits, Failure, Notification, Request, Target};

/// After a reconnect, how long to look for an answer that the broker kept for us before a
/// confirmed call is sent again.
const KEPT_ANSWER: Duration = Duration::from_millis(300);

/// How many answers the broker sends ahead of their acknowledgement.
const PREFETCH: u16 = 256;

/// Between attempts to reach a target that has no queue.
const NO_QUEUE_PAUSE: Duration = Duration::from_millis(250);

/// The calls that wait for an answer.
#[derive(Debug)]
pub(super) struct ReplyBook {
    queue: String,
    pending: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    used: bool,
    calls: BTreeMap<String, Pending>,
}

#[derive(Debug)]
struct Pending {
    answer: oneshot::Sender<Result<Value, Failure>>,
    alive: mpsc::Sender<()>,
    /// Old servers send the result first and the ending after it.
    early: Option<Value>,
}

/// A call's place in the book; leaves it when dropped.
struct Waiting<'a> {
    book: &'a ReplyBook,
    msg_id: String,
    answer: oneshot::Receiver<Result<Value, Failure>>,
    alive: mpsc::Receiver<()>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.book.locked().calls.remove(&self.msg_id);
    }
}

impl ReplyBook {
    pub(super) fn new() -> Self {
        Self { queue: format!("reply_{}", new_id()), pending: Mutex::default() }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Book> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether any call was ever made: programs that only serve have no reply queue.
    pub(super) fn is_used(&self) -> bool {
        self.locked().used
    }

    fn enter(&self) -> Waiting<'_> {
        let msg_id = new_id();
        let (to_answer, answer) = oneshot::channel();
        let (to_alive, alive) = mpsc::channel(1);
        let mut book = self.locked();
        book.used = true;
        let pending = Pending { answer: to_answer, alive: to_alive, early: None };
        book.calls.insert(msg_id.clone(), pending);
        Waiting { book: self, msg_id, answer, alive }
    }

    /// Hands a frame to its call. Returns whether there was one.
    fn take(&self, frame: ReplyFrame) -> bool {
        let mut book = self.locked();
        if !frame.ending {
            let Some(pending) = book.calls.get_mut(&frame.msg_id) else { return false };
            if let Ok(early) = frame.outcome
                && !early.is_null()
            {
                pending.early = Some(early);
            }
            // A full channel holds a sign of life already.
            let _ = pending.alive.try_send(());
            return true;
        }
        let Some(pending) = book.calls.remove(&frame.msg_id) else { return false };
        let outcome = match (frame.outcome, pending.early) {
            (Ok(Value::Null), Some(early)) => Ok(early),
            (outcome, _) => outcome,
        };
        let _ = pending.answer.send(outcome);
        true
    }

    /// Consumes the reply queue in this session, once.
    pub(super) async fn consume(
        &self,
        shared: &Arc<Shared>,
        session: &Arc<Session>,
    ) -> Result<(), DeclareError> {
        session.replies.get_or_try_init(|| self.start(shared, session)).await.copied()
    }

    async fn start(
        &self,
        shared: &Arc<Shared>,
        session: &Arc<Session>,
    ) -> Result<(), DeclareError> {
        session.declare_queue(&transient_queue(self.queue.clone(), &shared.options)).await?;
        let channel = session.channel().await?;
        let consuming = async {
            channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            let queue = short(&self.queue)?;
            channel.basic_consume(queue, "1".into(), options, FieldTable::default()).await
        };
        let mut answers = consuming
            .await
            .map_err(|error| session.refused(&format!("consumer of {}", self.queue), &error))?;
        let (shared, session) = (Arc::clone(shared), Arc::clone(session));
        tokio::spawn(async move {
            let mut taken = Taken::at_most(PREFETCH / 4);
            loop {
                let delivery = tokio::select! {
                    () = session.over() => return,
                    delivery = answers.next() => delivery,
                    () = taken.due() => {
                        taken.acknowledge(&channel);
                        continue;
                    }
                };
                let Some(Ok(delivery)) = delivery else {
                    session.end("the broker cancelled the consumer of the reply queue");
                    return;
                };
                match body(&delivery).and_then(|body| wire::decode_reply(&body)) {
                    Ok(frame) => {
                        if !shared.replies.take(frame) {
                            shared.counts.unknown_replies.add();
                        }
                    }
                    Err(error) => {
                        shared.counts.malformed.add();
                        tracing::warn!(%error, "answer dropped");
                    }
                }
                // Last, so that whoever waits goes on at once. One that comes again is unknown then.
                taken.add(&channel, &delivery);
            }
        });
        Ok(())
    }
}

/// Makes a call. See [`crate::Transport::call`].
pub(super) async fn call(
    shared: &Arc<Shared>,
    target: &Target,
    request: Request,
    limits: CallLimits,
) -> Result<Value, BusError> {
    check_call(target, &request.method, limits)?;
    shared.counts.calls.add();
    let begun = Instant::now();
    let deadline = begun + limits.total;
    let mut waiting = shared.replies.enter();
    let reply_to = ReplyTo {
        msg_id: waiting.msg_id.clone(),
        queue: shared.replies.queue.clone(),
        monitor: limits.monitor,
    };
    let body = wire::encode_request(target, &request, &new_id(), Some(&reply_to));
    let timeout = |passed: Duration| {
        shared.counts.timeouts.add();
        timed_out(target, &request.method, passed)
    };

    // The call is in one of three states: to be sent, handed over, or over.
    let mut handed_over = false;
    let mut silence = resend_after(shared, limits);
    loop {
        let session = match shared.session(deadline).await {
            Ok(session) => session,
            Err(error) if Instant::now() >= deadline => {
                shared.counts.timeouts.add();
                return Err(error);
            }
            Err(error) => return Err(error),
        };
        match shared.replies.consume(shared, &session).await {
            Ok(()) | Err(DeclareError::LinkLost) => {}
            Err(error) => return Err(error.into_bus_error(&session.peer)),
        }
        if handed_over {
            let kept = Instant::now() + KEPT_ANSWER;
            let kept = if shared.options.resend_confirmed_calls { kept } else { deadline };
            tokio::select! {
                biased;
                answer = &mut waiting.answer => return answered(answer),
                () = session.over() => continue,
                () = sleep_until(kept.min(deadline)) => {}
            }
            shared.counts.resent.add();
        }
        let sending = hand_over(shared, &session, target, &body, deadline, handed_over, silence);
        let mut sending = pin!(sending);
        let sent = tokio::select! {
            biased;
            answer = &mut waiting.answer => {
                // Most often the broker has confirmed it by now, which frees its channel.
                let _ = sending.as_mut().now_or_never();
                return answered(answer);
            }
            sent = &mut sending => sent,
            () = sleep_until(deadline) => return Err(timeout(limits.total)),
        };
        match sent {
            Ok(()) => handed_over = true,
            Err(SendError::LinkLost) => continue,
            Err(SendError::NotYet(_)) => {
                tokio::time::sleep(NO_QUEUE_PAUSE).await;
                continue;
            }
            Err(SendError::Unroutable | SendError::NoExchange) => {
                return Err(BusError::Undeliverable { target: target.to_string() });
            }
            Err(SendError::Refused(reason)) => {
                return Err(BusError::Refused { peer: session.peer.clone(), reason });
            }
        }
        let again = silence.map_or(deadline, |silence| Instant::now() + silence);
        silence = silence.map(|silence| silence * 2);
        loop {
            let silence = limits.monitor.map_or(deadline, |monitor| Instant::now() + monitor);
            tokio::select! {
                biased;
                answer = &mut waiting.answer => return answered(answer),
                () = session.over() => break,
                Some(()) = waiting.alive.recv() => {}
                () = sleep_until(silence.min(deadline)) => {
                    return Err(timeout(begun.elapsed()));
                }
                () = sleep_until(again) => break,
            }
        }
    }
}

/// How long a call may hear nothing before it is sent again.
fn resend_after(shared: &Shared, limits: CallLimits) -> Option<Duration> {
    let after = seconds(shared.options.resend_silent_calls_seconds);
    let wanted = shared.options.resend_confirmed_calls && limits.monitor.is_none();
    (wanted && !after.is_zero()).then_some(after)
}

fn answered(
    answer: Result<Result<Value, Failure>, oneshot::error::RecvError>,
) -> Result<Value, BusError> {
    match answer {
        Ok(outcome) => outcome.map_err(BusError::Remote),
        // The sender lives in the book for as long as we wait.
        Err(_) => Err(BusError::Malformed("the answer was lost inside this process".into())),
    }
}

/// Publishes a call until a queue has it. A target without queues is tried again for a while:
/// after a broker's restart its servers need a moment to declare them. One that the broker does not
/// confirm within the `silence` is published anew: a quorum queue that lost its leader may have
/// lost it, too, and says nothing.
async fn hand_over(
    shared: &Shared,
    session: &Session,
    target: &Target,
    body: &[u8],
    deadline: Instant,
    again: bool,
    mut silence: Option<Duration>,
) -> Result<(), SendError> {
    let (exchange, key) = topology::address(target, &shared.options);
    let patience = Instant::now() + seconds(shared.options.undeliverable_grace_seconds);
    let mut patience = if again { deadline } else { patience };
    loop {
        session.declare_exchange(&exchange).await?;
        let message = Outgoing {
            exchange: &exchange.name,
            key: &key,
            body,
            expiration: Some(deadline.saturating_duration_since(Instant::now())),
            mandatory: true,
            unhurried: true,
        };
        let sending = session.publish(&message);
        let sent = match silence {
            None => sending.await,
            Some(limit) => match tokio::time::timeout(limit, sending).await {
                Ok(sent) => sent,
                Err(_unconfirmed) => {
                    silence = Some(limit * 2);
                    // It may be in a queue after all.
                    patience = deadline;
                    shared.counts.resent.add();
                    continue;
                }
            },
        };
        match sent {
            Err(SendError::Unroutable | SendError::NoExchange) if Instant::now() < patience => {
                tokio::time::sleep(NO_QUEUE_PAUSE).await;
            }
            other => return other,
        }
    }
}

/// Sends a cast. See [`crate::Transport::cast`].
pub(super) async fn cast(
    shared: &Shared,
    target: &Target,
    request: &Request,
) -> Result<(), BusError> {
    let (exchange, key) = topology::address(target, &shared.options);
    let body = wire::encode_request(target, request, &new_id(), None);
    let message = Outgoing {
        exchange: &exchange.name,
        key: &key,
        body: &body,
        expiration: None,
        mandatory: false,
        unhurried: false,
    };
    send(shared, Needs::Exchange(&exchange), &message).await
}

/// Publishes a notification. See [`crate::Transport::notify`].
pub(super) async fn notify(shared: &Shared, notification: &Notification) -> Result<(), BusError> {
    let name = format!("{}.{}", notification.topic, notification.priority.as_str());
    // The publisher makes the queue, so that events wait for whoever wants them.
    let queue = topology::topic_queue(&notification.exchange, name, &shared.options);
    let timestamp = jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M:%S%.6f").to_string();
    let message_id = uuid::Uuid::new_v4().to_string();
    let body = wire::encode_notification(notification, &message_id, &new_id(), &timestamp);
    let message = Outgoing {
        exchange: &notification.exchange,
        key: &queue.name,
        body: &body,
        expiration: None,
        mandatory: false,
        unhurried: false,
    };
    send(shared, Needs::Queue(&queue), &message).await
}

/// What must be declared before a message is published.
#[derive(Clone, Copy, Debug)]
pub(super) enum Needs<'a> {
    /// The exchange; queues are the receivers' business.
    Exchange(&'a Exchange),
    /// The queue as well.
    Queue(&'a Queue),
}

/// Publishes on session after session until it works, is refused, or time is up.
pub(super) async fn send(
    shared: &Shared,
    needs: Needs<'_>,
    message: &Outgoing<'_>,
) -> Result<(), BusError> {
    let limit = seconds(shared.options.send_timeout_seconds);
    let deadline = Instant::now() + limit;
    let mut not_yet = None;
    loop {
        let session = shared.session(deadline).await?;
        let peer = session.peer.clone();
        let attempt = async {
            match needs {
                Needs::Exchange(exchange) => session.declare_exchange(exchange).await?,
                Needs::Queue(queue) => session.declare_queue_once(queue).await?,
            }
            session.publish(message).await
        };
        match tokio::time::timeout_at(deadline, attempt).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(SendError::Refused(reason))) => return Err(BusError::Refused { peer, reason }),
            // What was deleted since it was declared is declared by the next attempt.
            Ok(Err(SendError::LinkLost | SendError::NoExchange | SendError::Unroutable)) => {
                if let Needs::Queue(queue) = needs {
                    session.forget_queue(&queue.name);
                }
            }
            Ok(Err(SendError::NotYet(reason))) => {
                not_yet = Some(reason);
                sleep_until(deadline.min(Instant::now() + NO_QUEUE_PAUSE)).await;
            }
            Err(_) if not_yet.is_some() => {
                return Err(BusError::Unreachable { peer, reason: not_yet.unwrap_or_default() });
            }
            Err(_) => {
                let mut reason = format!("the broker did not take the message within {limit:?}");
                if let Some(why) = session.blocked() {
                    reason.push_str(&format!(
                        ": it takes none ({why}); look at `rabbitmq-diagnostics alarms`"
                    ));
                }
                return Err(BusError::Unreachable { peer, reason });
            }
        }
    }
}
