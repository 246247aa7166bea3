//! The bus of one host: a Unix socket per agent, no broker.
//!
//! One JSON object a line. A request is the inner object of oslo.messaging ([`crate::wire`])
//! without its envelope: `method`, `args`, `namespace`, `version`, `_context_*`, `_unique_id`,
//! and for calls `_msg_id` and `_timeout`; an answer is `result`, `failure`, `ending`,
//! `_msg_id`, `_unique_id`. Two things are ours: `_topic` names the agent that is meant, so that a
//! wrong socket says so, and an answer with an empty `_msg_id` is about the connection, which
//! then closes. Any number of calls may be under way on a connection; answers come as they are
//! ready.
//!
//! ```text
//! {"method":"ping","args":{},"version":"1.0","_msg_id":"8f…","_unique_id":"c0…","_timeout":null}
//! {"result":"pong","failure":null,"ending":true,"_msg_id":"8f…","_unique_id":"7a…"}
//! ```
//!
//! The kernel says who asks: root, the agent's own user and one group may, others are told no.
//! The socket file's mode is the first gate, the peer's credentials are the second.

mod bind;
mod client;
mod line;
mod peer;
mod server;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use serde_json::Value;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use self::bind::Bound;
use self::client::{Attempt, Connection};
use self::server::Counts;
use crate::dispatch::{check_call, timed_out};
use crate::{
    BusError, CallLimits, Failure, Handler, LinkState, LockGuard, Notification, ReadFrom, Record,
    Request, ServerHandle, Service, Stream, Target, Transport,
};

/// Bounds and access of a local socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalOptions {
    /// Longest line accepted and sent, in bytes. 16 MiB.
    pub max_line: usize,
    /// Most peers connected at once. 128.
    pub max_connections: usize,
    /// Most requests under way per connection; further ones are not read. 64.
    pub max_in_flight: usize,
    /// How long a peer may take nothing of its answers before it is cut off. 10 s.
    pub write_timeout: Duration,
    /// How long a line may stay begun without growing. 30 s.
    pub partial_line_timeout: Duration,
    /// Mode of the socket file. 0660.
    pub mode: u32,
    /// The group that owns the socket and whose members may ask; passed over where the host
    /// has no such group. `stackhand`.
    pub group: Option<String>,
}

impl Default for LocalOptions {
    fn default() -> Self {
        Self {
            max_line: 16 * 1024 * 1024,
            max_connections: 128,
            max_in_flight: 64,
            write_timeout: Duration::from_secs(10),
            partial_line_timeout: Duration::from_secs(30),
            mode: 0o660,
            group: Some("stackhand".to_owned()),
        }
    }
}

/// What happened on a listener so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalCounters {
    /// Peers let in.
    pub connections: u64,
    /// Requests taken on.
    pub requests: u64,
    /// Peers refused because of who they are.
    pub refused_peers: u64,
    /// Peers refused because all connections were taken.
    pub refused_busy: u64,
    /// Lines that were no request, or too long.
    pub malformed: u64,
    /// Connections ended because a line was begun and not finished.
    pub stalled: u64,
    /// Connections ended because the peer did not read its answers.
    pub slow_readers: u64,
}

/// A bound socket that does not answer yet.
#[derive(Debug)]
pub struct LocalListener {
    bound: Bound,
    options: LocalOptions,
    counts: Arc<Counts>,
}

impl LocalListener {
    /// Binds the socket at `path`, replacing only a socket that nobody answers on.
    ///
    /// # Errors
    ///
    /// [`BusError::Refused`] when the path is taken by a live server or by something that is no
    /// socket; [`BusError::Config`] for a path too long or a folder that is missing or closed.
    pub async fn bind(path: &Path, options: LocalOptions) -> Result<Self, BusError> {
        let bound = bind::bind(path, &options).await?;
        Ok(Self { bound, options, counts: Arc::default() })
    }

    /// Answers peers until the handle is dropped. The socket file is removed at the end.
    ///
    /// # Errors
    ///
    /// [`BusError::Config`] when the service has no concurrency.
    pub fn serve(
        self,
        service: Service,
        handler: Arc<dyn Handler>,
    ) -> Result<ServerHandle, BusError> {
        if service.concurrency == 0 {
            let what = format!("the concurrency of {} must be at least 1", service.topic);
            return Err(BusError::Config(what));
        }
        let Bound { listener, file, group } = self.bound;
        let shared = Arc::new(server::Shared {
            working: Arc::new(Semaphore::new(service.concurrency.min(Semaphore::MAX_PERMITS))),
            service,
            handler,
            options: self.options,
            group,
            counts: self.counts,
        });
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let file = file;
            server::accept(shared, listener, stopped).await;
            drop(file);
        });
        Ok(ServerHandle::new(stop, task))
    }
}

/// The bus through one socket: asks the agent behind it, or is that agent.
pub struct LocalTransport {
    path: PathBuf,
    options: LocalOptions,
    link: watch::Sender<LinkState>,
    connection: tokio::sync::Mutex<Kept>,
    served: Mutex<Option<Arc<Counts>>>,
    closed: CancellationToken,
}

/// The connection in use, and how many there were.
#[derive(Default)]
struct Kept {
    connection: Option<Arc<Connection>>,
    generation: u64,
}

impl fmt::Debug for LocalTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalTransport").field("path", &self.path).finish_non_exhaustive()
    }
}

impl LocalTransport {
    /// A transport through the socket at `path`. Connects with the first request, and again
    /// whenever the connection was lost.
    #[must_use]
    pub fn connect(path: impl Into<PathBuf>) -> Self {
        Self::with_options(path, LocalOptions::default())
    }

    /// As [`connect`](Self::connect), with other bounds.
    #[must_use]
    pub fn with_options(path: impl Into<PathBuf>, options: LocalOptions) -> Self {
        let reason = "no request was made yet".to_owned();
        Self {
            path: path.into(),
            options,
            link: watch::channel(LinkState::Down { reason }).0,
            connection: tokio::sync::Mutex::default(),
            served: Mutex::default(),
            closed: CancellationToken::new(),
        }
    }

    /// What happened on the socket while this transport served it; zeros if it does not.
    #[must_use]
    pub fn counters(&self) -> LocalCounters {
        let served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        served.as_ref().map(|counts| counts.snapshot()).unwrap_or_default()
    }

    /// The open connection, or a new one.
    async fn connection(&self) -> Result<Arc<Connection>, BusError> {
        if self.closed.is_cancelled() {
            let reason = "this transport was closed".to_owned();
            return Err(BusError::Unreachable { peer: self.path.display().to_string(), reason });
        }
        let mut kept = self.connection.lock().await;
        if let Some(connection) = kept.connection.as_ref().filter(|open| open.is_open()) {
            return Ok(Arc::clone(connection));
        }
        match Connection::open(&self.path, &self.options).await {
            Ok(connection) => {
                kept.connection = Some(Arc::clone(&connection));
                kept.generation += 1;
                self.link.send_replace(LinkState::Up { generation: kept.generation });
                let (link, ended) = (self.link.clone(), connection.ended());
                let reason = format!("the connection to {} closed", self.path.display());
                let generation = kept.generation;
                tokio::spawn(async move {
                    ended.cancelled().await;
                    link.send_if_modified(|state| {
                        let current = *state == LinkState::Up { generation };
                        if current {
                            *state = LinkState::Down { reason };
                        }
                        current
                    });
                });
                Ok(connection)
            }
            Err(error) => {
                kept.connection = None;
                self.link.send_replace(LinkState::Down { reason: error.to_string() });
                Err(error)
            }
        }
    }

    async fn ask(
        &self,
        target: &Target,
        request: &Request,
        limits: CallLimits,
    ) -> Result<Value, BusError> {
        check_call(target, &request.method, limits)?;
        let begun = Instant::now();
        let deadline = begun + limits.total;
        let mut again = true;
        loop {
            let connection = timeout_at(deadline, self.connection())
                .await
                .map_err(|_| timed_out(target, &request.method, limits.total))??;
            match connection.call(target, request, limits, begun).await {
                Ok(answer) => return Ok(answer),
                Err(Attempt::NotSent(_)) if again => again = false,
                Err(Attempt::NotSent(error) | Attempt::Failed(error)) => return Err(error),
            }
        }
    }

    async fn tell(&self, target: &Target, request: &Request) -> Result<(), BusError> {
        let limit = self.options.write_timeout;
        let deadline = Instant::now() + limit;
        let mut again = true;
        loop {
            let late = |_| timed_out(target, &request.method, limit);
            let connection = timeout_at(deadline, self.connection()).await.map_err(late)??;
            let sending = connection.send(target, request, None);
            match timeout_at(deadline, sending).await.map_err(late)? {
                Ok(()) => return Ok(()),
                Err(Attempt::NotSent(_)) if again => again = false,
                Err(Attempt::NotSent(error) | Attempt::Failed(error)) => return Err(error),
            }
        }
    }

    async fn listen(
        &self,
        service: Service,
        handler: Arc<dyn Handler>,
    ) -> Result<ServerHandle, BusError> {
        let listener = LocalListener::bind(&self.path, self.options.clone()).await?;
        let counts = Arc::clone(&listener.counts);
        let handle = listener.serve(service, handler)?;
        *self.served.lock().unwrap_or_else(PoisonError::into_inner) = Some(counts);
        self.link.send_replace(LinkState::Up { generation: 1 });
        Ok(handle)
    }

    /// Takes a file lock beside the socket. Waits by asking again: a thread that waits in the
    /// kernel could not be given up on.
    async fn take_lock(&self, name: &str, limit: Duration) -> Result<LockGuard, BusError> {
        let path = bind::lock_path(&self.path, name)?;
        let deadline = Instant::now() + limit;
        loop {
            if let Some(held) = bind::try_lock(&path)? {
                return Ok(LockGuard::new(move || drop(held)));
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(BusError::Timeout {
                    target: path.display().to_string(),
                    method: "lock".to_owned(),
                    seconds: limit.as_secs(),
                });
            }
            sleep_until((now + Duration::from_millis(50)).min(deadline)).await;
        }
    }
}

impl Drop for LocalTransport {
    fn drop(&mut self) {
        if let Some(connection) = &self.connection.get_mut().connection {
            connection.end();
        }
    }
}

/// What a refusal by the server means to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RefusalKind {
    /// It will be refused again.
    Lasting,
    /// Later may be better.
    Passing,
}

fn refusal_kind(failure: &Failure) -> RefusalKind {
    if failure.class == "Busy" { RefusalKind::Passing } else { RefusalKind::Lasting }
}

fn unsupported<T>(operation: &'static str) -> BoxFuture<'static, Result<T, BusError>>
where
    T: Send + 'static,
{
    std::future::ready(Err(BusError::Unsupported { transport: "a local socket", operation }))
        .boxed()
}

impl Transport for LocalTransport {
    fn call<'a>(
        &'a self,
        target: &'a Target,
        request: Request,
        limits: CallLimits,
    ) -> BoxFuture<'a, Result<Value, BusError>> {
        async move { self.ask(target, &request, limits).await }.boxed()
    }

    fn cast<'a>(
        &'a self,
        target: &'a Target,
        request: Request,
    ) -> BoxFuture<'a, Result<(), BusError>> {
        async move { self.tell(target, &request).await }.boxed()
    }

    fn notify(&self, _notification: Notification) -> BoxFuture<'_, Result<(), BusError>> {
        unsupported("notifications")
    }

    fn serve(
        &self,
        service: Service,
        handler: Arc<dyn Handler>,
    ) -> BoxFuture<'_, Result<ServerHandle, BusError>> {
        self.listen(service, handler).boxed()
    }

    fn publish<'a>(
        &'a self,
        _stream: &'a Stream,
        _body: Value,
    ) -> BoxFuture<'a, Result<(), BusError>> {
        unsupported("streams")
    }

    fn read<'a>(
        &'a self,
        _stream: &'a Stream,
        _from: ReadFrom,
        _follow: bool,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<Record, BusError>>, BusError>> {
        unsupported("streams")
    }

    fn lock<'a>(
        &'a self,
        name: &'a str,
        limit: Duration,
    ) -> BoxFuture<'a, Result<LockGuard, BusError>> {
        self.take_lock(name, limit).boxed()
    }

    fn link(&self) -> watch::Receiver<LinkState> {
        self.link.subscribe()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move {
            self.closed.cancel();
            if let Some(connection) = self.connection.lock().await.connection.take() {
                connection.end();
            }
        }
        .boxed()
    }
}
