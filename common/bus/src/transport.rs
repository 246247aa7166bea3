//! The interface every transport implements.
//!
//! It is small on purpose: ask, tell, announce, serve, and the two stream verbs. Futures are
//! boxed so that programs choose a transport at run time by URL.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{BusError, Context, Failure, Notification, Request, Target, Version};

/// How long a call may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallLimits {
    /// From sending to the final answer.
    pub total: Duration,
    /// If set, the server sends keep-alives and silence for this long fails the call early.
    /// At least 2 s; the server answers at half of it.
    pub monitor: Option<Duration>,
}

impl CallLimits {
    /// A limit on the whole call, without monitoring.
    #[must_use]
    pub const fn total(total: Duration) -> Self {
        Self { total, monitor: None }
    }
}

impl Default for CallLimits {
    /// 60 s, oslo.messaging's `rpc_response_timeout`.
    fn default() -> Self {
        Self::total(Duration::from_secs(60))
    }
}

/// Who sent a request, as far as the transport can vouch for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Over a broker: only a signature says who.
    Broker,
    /// Over the local socket: the kernel vouches for these (`SO_PEERCRED`).
    Local {
        /// User id of the peer process.
        uid: u32,
        /// Group id of the peer process.
        gid: u32,
        /// Process id of the peer.
        pid: i32,
    },
    /// Same process, in tests.
    Memory,
}

/// A request as it reaches a server.
#[derive(Clone, Debug, PartialEq)]
pub struct Delivered {
    /// Method, arguments, context.
    pub request: Request,
    /// The namespace the caller asked for.
    pub namespace: Option<String>,
    /// The version the caller asked for.
    pub version: Version,
    /// Sender's duplicate-detection id; the same for every copy of one request.
    pub unique_id: String,
    /// Whether somebody waits for the answer. Answers to casts are dropped.
    pub is_call: bool,
    /// Who sent it.
    pub origin: Origin,
}

/// Serves the requests of one [`Service`]. Called concurrently, within the service's bound.
pub trait Handler: Send + Sync + 'static {
    /// Answers one request. Every failure becomes an answer; panics are caught and answered too.
    ///
    /// A handler must check version and namespace itself (see [`Version::serves`]) and answer
    /// [`Failure::unsupported_version`] or [`Failure::no_such_method`].
    fn handle(&self, delivered: Delivered) -> BoxFuture<'_, Result<Value, Failure>>;
}

/// What a server offers and how much it takes on at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Scope of the topic.
    pub exchange: String,
    /// Topic to serve.
    pub topic: String,
    /// This server's name within the topic, usually the host name.
    pub server: String,
    /// Most requests handled at once; further ones wait in the broker or socket. At least 1.
    pub concurrency: usize,
}

/// Stops a server when dropped or asked.
#[derive(Debug)]
pub struct ServerHandle {
    stop: CancellationToken,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl ServerHandle {
    /// Ties a server's task to a token that ends it.
    #[must_use]
    pub fn new(stop: CancellationToken, task: tokio::task::JoinHandle<()>) -> Self {
        Self { stop, task: Some(task) }
    }

    /// Stops taking requests, lets running ones finish and answers them, then returns.
    ///
    /// Gives up waiting after `limit`; handlers that still run are dropped.
    pub async fn shut_down(mut self, limit: Duration) {
        self.stop.cancel();
        if let Some(mut task) = self.task.take()
            && tokio::time::timeout(limit, &mut task).await.is_err()
        {
            task.abort();
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Whether the transport can carry messages now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Connected, topology declared, consumers running. The number grows by one with every
    /// successful (re)connection.
    Up {
        /// Connections made so far, this one included.
        generation: u64,
    },
    /// Not connected.
    Down {
        /// Why, and what is being done about it; shown to operators.
        reason: String,
    },
}

/// A stream: an append-only log on the broker that many may read from any point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Queue name, for example `stackhand.heartbeats`.
    pub name: String,
    /// How long records are kept.
    pub max_age: Duration,
    /// Most bytes kept, whatever their age.
    pub max_bytes: u64,
}

/// Where to start reading a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    /// The oldest record kept.
    First,
    /// Records at most this old. Brokers keep chunks, so a few older ones may come too.
    Age(Duration),
    /// Only records published from now on.
    Next,
}

/// One record of a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Position in the stream.
    pub offset: u64,
    /// What was published.
    pub body: Value,
}

/// One way to carry messages.
pub trait Transport: Send + Sync + fmt::Debug + 'static {
    /// Sends a request and waits for its answer.
    fn call<'a>(
        &'a self,
        target: &'a Target,
        request: Request,
        limits: CallLimits,
    ) -> BoxFuture<'a, Result<Value, BusError>>;

    /// Sends a request that gets no answer. Returns when the transport has taken it.
    fn cast<'a>(
        &'a self,
        target: &'a Target,
        request: Request,
    ) -> BoxFuture<'a, Result<(), BusError>>;

    /// Publishes a notification.
    fn notify(&self, notification: Notification) -> BoxFuture<'_, Result<(), BusError>>;

    /// Serves a topic until the handle is dropped. Returns once requests can arrive, or at once
    /// while the broker is away (serving starts when it is back).
    fn serve(
        &self,
        service: Service,
        handler: Arc<dyn Handler>,
    ) -> BoxFuture<'_, Result<ServerHandle, BusError>>;

    /// Appends a record to a stream, declaring the stream if needed.
    fn publish<'a>(
        &'a self,
        stream: &'a Stream,
        body: Value,
    ) -> BoxFuture<'a, Result<(), BusError>>;

    /// Reads a stream from a point on. With `follow` the result goes on for ever; without, it
    /// ends at the last record present when reading began.
    fn read<'a>(
        &'a self,
        stream: &'a Stream,
        from: ReadFrom,
        follow: bool,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<Record, BusError>>, BusError>>;

    /// Takes the lock called `name`, shared by all controllers of the broker, waiting up to
    /// `limit`. It is held until the guard is dropped or this process is gone.
    fn lock<'a>(
        &'a self,
        name: &'a str,
        limit: Duration,
    ) -> BoxFuture<'a, Result<LockGuard, BusError>>;

    /// The state of the link, now and as it changes.
    fn link(&self) -> watch::Receiver<LinkState>;

    /// Closes connections in order. The transport is of no use afterwards.
    fn close(&self) -> BoxFuture<'_, ()>;
}

/// Holds a lock of [`Transport::lock`] until dropped.
pub struct LockGuard(Option<Box<dyn FnOnce() + Send>>);

impl LockGuard {
    /// A guard that runs `release` when dropped.
    #[must_use]
    pub fn new(release: impl FnOnce() + Send + 'static) -> Self {
        Self(Some(Box::new(release)))
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LockGuard")
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        if let Some(release) = self.0.take() {
            release();
        }
    }
}

impl Delivered {
    /// The context of the request.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.request.context
    }
}
