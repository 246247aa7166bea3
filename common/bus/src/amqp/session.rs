//! One connection to one broker and everything declared on it: a *generation* of the link.
//!
//! A session never heals. Whatever breaks it ends it, with a reason, and the supervisor makes
//! the next one. What has to survive (reply queue name, pending calls, duplicates seen) lives
//! outside.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ErrorKind, Event, ExchangeKind};
use tokio::sync::{OnceCell, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::BusError;
use crate::amqp::dial::Socket;
use crate::amqp::link::chance;
use crate::amqp::topology::{Exchange, Queue, lock_queue, text};
use crate::amqp::unhurried::unhurried;

/// Publishes at once per session. See [`Session::publish`].
const LANES: usize = 16;

/// The lock under which streams are made.
const MAKING_STREAMS: &str = "streams";

/// Making one takes the broker well under a second.
const MAKING_PATIENCE: Duration = Duration::from_secs(5);

/// Between looks at whether the lock is free, with jitter.
const MAKING_PAUSE: Duration = Duration::from_millis(50);

/// AMQP's reply code for another connection's exclusive queue.
const RESOURCE_LOCKED: u16 = 405;

/// Why a message was not handed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SendError {
    /// The session ended; whether the broker took the message is unknown.
    LinkLost,
    /// No queue is bound where it was sent.
    Unroutable,
    /// The exchange is gone. It will be declared again.
    NoExchange,
    /// The queue is there but does not work now; it may soon.
    NotYet(String),
    /// The broker took it and said no.
    Refused(String),
}

/// Why something could not be declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DeclareError {
    /// The session ended.
    LinkLost,
    /// A replicated queue exists and has no leader now, as after a node's crash; or a stream is
    /// missing and another program makes one. It will be there.
    NotYet(String),
    /// The broker refuses, and will again.
    Refused(String),
}

impl From<DeclareError> for SendError {
    fn from(error: DeclareError) -> Self {
        match error {
            DeclareError::LinkLost => Self::LinkLost,
            DeclareError::NotYet(reason) => Self::NotYet(reason),
            DeclareError::Refused(reason) => Self::Refused(reason),
        }
    }
}

/// One message to publish.
#[derive(Debug)]
pub(super) struct Outgoing<'a> {
    pub(super) exchange: &'a str,
    pub(super) key: &'a str,
    pub(super) body: &'a [u8],
    /// The broker drops the message when it has waited this long.
    pub(super) expiration: Option<Duration>,
    /// Tell us when no queue takes it.
    pub(super) mandatory: bool,
    /// Its sender waits for something else, which comes soon after the confirmation, or for nothing:
    /// to be woken for the confirmation alone costs more than it tells.
    pub(super) unhurried: bool,
}

/// See the module.
pub(super) struct Session {
    pub(super) generation: u64,
    /// `host:port` of the broker.
    pub(super) peer: String,
    /// Set once the reply queue is consumed in this session.
    pub(super) replies: OnceCell<()>,
    connection: Connection,
    socket: Socket,
    declarer: tokio::sync::Mutex<Option<Channel>>,
    exchanges: Mutex<BTreeSet<Exchange>>,
    queues: Mutex<BTreeSet<String>>,
    lanes: Mutex<Vec<Channel>>,
    free_lanes: Semaphore,
    /// Why the broker takes no messages at present, in its words.
    blocked: Mutex<Option<String>>,
    end: CancellationToken,
    why: OnceLock<String>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({} #{})", self.peer, self.generation)
    }
}

impl Session {
    pub(super) fn new(
        generation: u64,
        peer: String,
        connection: Connection,
        socket: Socket,
    ) -> Self {
        Self {
            generation,
            peer,
            replies: OnceCell::new(),
            connection,
            socket,
            declarer: tokio::sync::Mutex::new(None),
            exchanges: Mutex::default(),
            queues: Mutex::default(),
            lanes: Mutex::default(),
            free_lanes: Semaphore::new(LANES),
            blocked: Mutex::default(),
            end: CancellationToken::new(),
            why: OnceLock::new(),
        }
    }

    /// Ends the session. The first reason given is kept.
    pub(super) fn end(&self, reason: impl Into<String>) {
        let _ = self.why.set(reason.into());
        self.end.cancel();
    }

    pub(super) fn is_over(&self) -> bool {
        self.end.is_cancelled()
    }

    /// Waits for the end.
    pub(super) async fn over(&self) {
        self.end.cancelled().await;
    }

    pub(super) fn why(&self) -> &str {
        self.why.get().map_or("the connection was closed", String::as_str)
    }

    /// Why the broker takes no messages at present, if it said so.
    pub(super) fn blocked(&self) -> Option<String> {
        locked(&self.blocked).clone()
    }

    /// Watches the connection until the session is over.
    pub(super) async fn watch(&self) {
        let events = self.connection.events_listener();
        let mut events = std::pin::pin!(events);
        loop {
            tokio::select! {
                () = self.over() => return,
                event = events.next() => match event {
                    // Soft errors concern one channel, and whoever uses it hears of them.
                    Some(Event::Error(error)) if error.is_amqp_soft_error() => {}
                    Some(Event::Error(error)) => self.end(error.to_string()),
                    Some(Event::ConnectionBlocked(reason)) => {
                        tracing::warn!(peer = %self.peer, reason, "broker holds our messages back");
                        *locked(&self.blocked) = Some(reason);
                    }
                    Some(Event::ConnectionUnblocked) => {
                        tracing::info!(peer = %self.peer, "broker takes our messages again");
                        *locked(&self.blocked) = None;
                    }
                    Some(_) => {}
                    None => self.end("the connection's events ended"),
                },
                // Not every way to lose a connection makes an event.
                () = tokio::time::sleep(Duration::from_millis(500)) => {
                    if !self.connection.status().connected() {
                        self.end("the connection is no longer open");
                    }
                }
            }
        }
    }

    /// Closes the connection, politely if the broker answers soon.
    pub(super) async fn close(&self) {
        self.end("closed by us");
        if self.connection.status().connected() {
            let bye = self.connection.close(200, "OK".into());
            let _ = tokio::time::timeout(Duration::from_secs(2), bye).await;
        }
        self.socket.cut();
    }

    /// A channel of the caller's own.
    pub(super) async fn channel(&self) -> Result<Channel, DeclareError> {
        self.connection.create_channel().await.map_err(|error| self.lost(&error))
    }

    /// Declares an exchange unless this session has. An existing one that differs only in
    /// durability is used as it is.
    pub(super) async fn declare_exchange(&self, exchange: &Exchange) -> Result<(), DeclareError> {
        if locked(&self.exchanges).contains(exchange) {
            return Ok(());
        }
        let mut declarer = self.declarer.lock().await;
        let declared = self.try_exchange(&mut declarer, exchange, false).await;
        match declared {
            Err(error) if inequivalent(&error, "durable") => {
                tracing::warn!(
                    exchange = exchange.name,
                    "exchange exists with another durability than configured; using it as it is"
                );
                self.try_exchange(&mut declarer, exchange, true).await
            }
            other => other,
        }
        .map_err(|error| self.refused(&format!("exchange {}", exchange.name), &error))?;
        locked(&self.exchanges).insert(exchange.clone());
        Ok(())
    }

    async fn try_exchange(
        &self,
        declarer: &mut Option<Channel>,
        exchange: &Exchange,
        passive: bool,
    ) -> lapin::Result<()> {
        let name = short(&exchange.name)?;
        let kind = if exchange.fanout { ExchangeKind::Fanout } else { ExchangeKind::Topic };
        let options = ExchangeDeclareOptions {
            passive,
            durable: exchange.durable,
            auto_delete: exchange.auto_delete,
            ..ExchangeDeclareOptions::default()
        };
        let channel = self.declaring(declarer).await?;
        let declared = channel.exchange_declare(name, kind, options, FieldTable::default()).await;
        settle(declarer, declared)
    }

    /// Declares and binds a queue.
    pub(super) async fn declare_queue(&self, queue: &Queue) -> Result<(), DeclareError> {
        if let Some((exchange, _)) = &queue.binding {
            self.declare_exchange(exchange).await?;
        }
        let mut declarer = self.declarer.lock().await;
        let what = format!("queue {}", queue.name);
        let declared = if is_stream(queue) {
            self.try_stream(&mut declarer, queue).await
        } else {
            self.try_queue(&mut declarer, queue, false).await
        };
        match declared {
            // Quorum queues and streams promise something; the others can be taken as found.
            Err(error)
                if inequivalent(&error, "durable")
                    && !queue.arguments.contains_key("x-queue-type") =>
            {
                tracing::warn!(
                    queue = queue.name,
                    "queue exists with another durability than configured; using it as it is"
                );
                self.try_queue(&mut declarer, queue, true).await
            }
            // Quorum queues and streams find a leader again, with all they hold. A classic queue
            // is on one node: without it we need a new one. RabbitMQ permits that for a queue
            // that crashed, and refuses with the same 404 while its node is down.
            Err(error)
                if code(&error) == Some(404) && !queue.arguments.contains_key("x-queue-type") =>
            {
                tracing::warn!(queue = queue.name, %error, "queue is stuck; making it anew");
                let anew = async {
                    let channel = self.declaring(&mut declarer).await?;
                    let name = short(&queue.name)?;
                    let deleted = channel.queue_delete(name, QueueDeleteOptions::default()).await;
                    settle(&mut declarer, deleted)
                };
                match anew.await {
                    Ok(_) => self.try_queue(&mut declarer, queue, false).await,
                    Err(error) => Err(error),
                }
            }
            // Nobody refuses: the program that makes a stream now takes longer than we wait.
            Err(error) if is_stream(queue) && code(&error) == Some(RESOURCE_LOCKED) => {
                let reason = format!("cannot declare {what} yet: another program makes a stream");
                return Err(DeclareError::NotYet(reason));
            }
            other => other,
        }
        .map_err(|error| self.refused(&what, &error))?;
        if let Some((exchange, key)) = &queue.binding {
            let bind = async {
                let (name, exchange) = (short(&queue.name)?, short(&exchange.name)?);
                let channel = self.declaring(&mut declarer).await?;
                let options = QueueBindOptions::default();
                let none = FieldTable::default();
                let bound = channel.queue_bind(name, exchange, short(key)?, options, none).await;
                settle(&mut declarer, bound)
            };
            bind.await.map_err(|error| self.refused(&what, &error))?;
        }
        Ok(())
    }

    /// As [`declare_queue`](Self::declare_queue), once per session.
    pub(super) async fn declare_queue_once(&self, queue: &Queue) -> Result<(), DeclareError> {
        if locked(&self.queues).contains(&queue.name) {
            return Ok(());
        }
        self.declare_queue(queue).await?;
        locked(&self.queues).insert(queue.name.clone());
        Ok(())
    }

    /// Makes the next [`declare_queue_once`](Self::declare_queue_once) declare again.
    pub(super) fn forget_queue(&self, name: &str) {
        locked(&self.queues).remove(name);
    }

    async fn try_queue(
        &self,
        declarer: &mut Option<Channel>,
        queue: &Queue,
        passive: bool,
    ) -> lapin::Result<()> {
        let name = short(&queue.name)?;
        let options = QueueDeclareOptions {
            passive,
            durable: queue.durable,
            exclusive: queue.exclusive,
            auto_delete: queue.auto_delete,
            ..QueueDeclareOptions::default()
        };
        let channel = self.declaring(declarer).await?;
        let declared = channel.queue_declare(name, options, queue.arguments.clone()).await;
        settle(declarer, declared).map(drop)
    }

    /// Declares a stream, and makes it alone if it is not there.
    ///
    /// RabbitMQ 3.10 does not bear two clients that make its first streams at once: a channel
    /// crashes in it, and after the node's next crash no stream ever has a leader again. So
    /// whoever makes one holds a lock that all programs of ours on the broker respect.
    async fn try_stream(&self, declarer: &mut Option<Channel>, queue: &Queue) -> lapin::Result<()> {
        match self.try_queue(declarer, queue, true).await {
            Ok(()) => return self.try_queue(declarer, queue, false).await,
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(error),
        }
        let lock = lock_queue(MAKING_STREAMS);
        let patience = Instant::now() + MAKING_PATIENCE;
        while let Err(error) = self.try_queue(declarer, &lock, false).await {
            let locked = code(&error) == Some(RESOURCE_LOCKED);
            if !locked || Instant::now() > patience {
                return Err(error);
            }
            tokio::time::sleep(MAKING_PAUSE.mul_f64(1.0 + chance())).await;
        }
        let made = self.try_queue(declarer, queue, false).await;
        let unlock = async {
            let channel = self.declaring(declarer).await?;
            channel.queue_delete(short(&lock.name)?, QueueDeleteOptions::default()).await
        };
        // Should this fail, the lock ends with the connection.
        let unlocked = unlock.await;
        let _ = settle(declarer, unlocked);
        made
    }

    /// Deletes a queue; one that is not there is as good.
    pub(super) async fn delete_queue(&self, name: &str) {
        let mut declarer = self.declarer.lock().await;
        let delete = async {
            let channel = self.declaring(&mut declarer).await?;
            let deleted = channel.queue_delete(short(name)?, QueueDeleteOptions::default()).await;
            settle(&mut declarer, deleted)
        };
        if let Err(error) = delete.await {
            tracing::debug!(queue = name, %error, "queue not deleted");
        }
    }

    async fn declaring<'a>(&self, declarer: &'a mut Option<Channel>) -> lapin::Result<&'a Channel> {
        if declarer.as_ref().is_none_or(|channel| !channel.status().connected()) {
            *declarer = None;
        }
        match declarer {
            Some(channel) => Ok(channel),
            None => Ok(declarer.insert(self.connection.create_channel().await?)),
        }
    }

    /// Publishes and waits until the broker has the message.
    ///
    /// Each publish in flight has a channel to itself: lapin gives a returned message to
    /// whichever confirm comes next on the channel, so only alone is the answer surely ours.
    pub(super) async fn publish(&self, message: &Outgoing<'_>) -> Result<(), SendError> {
        let (Ok(exchange), Ok(key)) = (short(message.exchange), short(message.key)) else {
            let reason = "exchange and routing key must be at most 255 bytes long".to_owned();
            return Err(SendError::Refused(reason));
        };
        let sending = async {
            let lane = self.free_lanes.acquire().await.map_err(|_| SendError::LinkLost)?;
            let channel = locked(&self.lanes).pop();
            let channel = match channel {
                Some(channel) => channel,
                None => self.new_lane().await?,
            };
            let options = BasicPublishOptions { mandatory: message.mandatory, immediate: false };
            let properties = properties(message.expiration);
            let outcome = {
                let mut confirm = pin!(async {
                    let publish =
                        channel.basic_publish(exchange, key, options, message.body, properties);
                    publish.await?.await
                });
                // While lanes are many, nobody waits for this one.
                if message.unhurried && self.free_lanes.available_permits() >= LANES / 2 {
                    unhurried(confirm.as_mut()).await
                } else {
                    confirm.as_mut().await
                }
            };
            if outcome.is_ok() {
                locked(&self.lanes).push(channel);
            }
            drop(lane);
            match outcome {
                Ok(Confirmation::Ack(None)) => Ok(()),
                Ok(Confirmation::Ack(Some(_)) | Confirmation::Nack(Some(_))) => {
                    Err(SendError::Unroutable)
                }
                Ok(Confirmation::Nack(None)) => {
                    // Its process died, or it is full.
                    Err(SendError::NotYet("the queue did not accept the message".into()))
                }
                Ok(Confirmation::NotRequested) => Err(self.lost_at("confirms are off")),
                Err(error) if code(&error) == Some(404) => {
                    locked(&self.exchanges).retain(|known| known.name != message.exchange);
                    Err(SendError::NoExchange)
                }
                Err(error) if code(&error) == Some(403) => {
                    Err(SendError::Refused(error.to_string()))
                }
                Err(error) => Err(self.lost_at(&error.to_string())),
            }
        };
        tokio::select! {
            biased;
            sent = sending => sent,
            () = self.over() => Err(SendError::LinkLost),
        }
    }

    async fn new_lane(&self) -> Result<Channel, SendError> {
        let channel = self.channel().await?;
        let confirming = channel.confirm_select(ConfirmSelectOptions::default()).await;
        confirming.map_err(|error| self.lost_at(&error.to_string()))?;
        Ok(channel)
    }

    fn lost_at(&self, reason: &str) -> SendError {
        self.end(reason);
        SendError::LinkLost
    }

    /// Ends the session over an error.
    pub(super) fn lost(&self, error: &lapin::Error) -> DeclareError {
        self.end(error.to_string());
        DeclareError::LinkLost
    }

    /// Sorts an error of a declaration: refusals leave the session as it is.
    pub(super) fn refused(&self, what: &str, error: &lapin::Error) -> DeclareError {
        if code(error) == Some(404) {
            return DeclareError::NotYet(format!("cannot declare {what} yet: {error}"));
        }
        let said = match error.kind() {
            ErrorKind::ProtocolError(amqp) if error.is_amqp_soft_error() => {
                amqp.get_message().to_string()
            }
            ErrorKind::IOError(io) if io.kind() == std::io::ErrorKind::InvalidInput => {
                io.to_string()
            }
            _ => return self.lost(error),
        };
        let remedy = if said.contains("inequivalent arg") {
            "; set the same queue options as the programs that made it, \
             or delete it with rabbitmqctl delete_queue while they are stopped"
        } else if said.contains("ACCESS_REFUSED") {
            "; give the user permission with rabbitmqctl set_permissions"
        } else {
            ""
        };
        DeclareError::Refused(format!("cannot declare {what}: {said}{remedy}"))
    }
}

impl DeclareError {
    /// For a caller that waits on this very declaration.
    pub(super) fn into_bus_error(self, peer: &str) -> BusError {
        let peer = peer.to_owned();
        match self {
            Self::LinkLost => BusError::Unreachable { peer, reason: "the connection broke".into() },
            Self::NotYet(reason) => BusError::Unreachable { peer, reason },
            Self::Refused(reason) => BusError::Refused { peer, reason },
        }
    }
}

/// A failed operation closes its channel: do not use it again.
fn settle<T>(declarer: &mut Option<Channel>, outcome: lapin::Result<T>) -> lapin::Result<T> {
    if outcome.is_err() {
        *declarer = None;
    }
    outcome
}

/// AMQP's short strings hold 255 bytes; lapin panics beyond.
pub(super) fn short(text: &str) -> lapin::Result<ShortString> {
    ShortString::try_new(text).map_err(|_| {
        let what = format!("a name of {} bytes is longer than AMQP's 255", text.len());
        let error = std::io::Error::new(std::io::ErrorKind::InvalidInput, what);
        lapin::Error::from(error)
    })
}

fn properties(expiration: Option<Duration>) -> BasicProperties {
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_content_encoding("utf-8".into())
        .with_headers(FieldTable::default())
        .with_delivery_mode(2)
        .with_priority(0);
    match expiration {
        Some(limit) => {
            properties.with_expiration(limit.as_millis().clamp(1, 1 << 31).to_string().into())
        }
        None => properties,
    }
}

/// The reply code of an error that the broker sent.
pub(super) fn code(error: &lapin::Error) -> Option<u16> {
    match error.kind() {
        ErrorKind::ProtocolError(amqp) => Some(amqp.get_id()),
        _ => None,
    }
}

/// Whether a queue is a stream.
pub(super) fn is_stream(queue: &Queue) -> bool {
    queue.arguments.inner().get("x-queue-type") == Some(&text("stream"))
}

/// Whether a queue is not there at all, rather than out of reach.
fn is_missing(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(amqp) if amqp.get_id() == 404
        && amqp.get_message().as_str().contains("no queue"))
}

fn inequivalent(error: &lapin::Error, argument: &str) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(amqp) if amqp.get_id() == 406
        && amqp.get_message().as_str().contains(&format!("inequivalent arg '{argument}'")))
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
