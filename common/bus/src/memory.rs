//! Both ends of the bus in one process, for tests.
//!
//! A [`MemoryBroker`] behaves as RabbitMQ does where callers can tell: one server of a topic
//! gets a message in turn, `server` picks one, fanout reaches all, a call whose server dies ends
//! at its limit, streams keep records by age and size, locks exclude. Time is tokio's, so tests
//! may pause it. [`MemoryBroker::take_down`] plays a broker that is away.
//!
//! It differs on purpose in one thing: a message to a topic nobody serves is not kept.

mod stream;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use serde_json::Value;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::dispatch::{check_call, new_id, run, timed_out};
use crate::{
    BusError, CallLimits, Delivered, Failure, Handler, LinkState, LockGuard, Notification, Origin,
    ReadFrom, Record, Request, ServerHandle, Service, Stream, Target, Transport,
};

const PEER: &str = "memory";

/// A broker that lives in this process. Clones are the same broker.
#[derive(Clone)]
pub struct MemoryBroker {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    link: watch::Sender<LinkState>,
    notifications: broadcast::Sender<Notification>,
}

#[derive(Default)]
struct State {
    servers: Vec<Server>,
    next_server: u64,
    /// Messages sent to each topic so far; decides whose turn it is.
    turns: BTreeMap<(String, String), usize>,
    streams: BTreeMap<String, stream::Log>,
    locks: BTreeMap<String, Arc<tokio::sync::Mutex<()>>>,
}

struct Server {
    id: u64,
    service: Service,
    inbox: mpsc::UnboundedSender<Parcel>,
}

/// A request on its way to a server.
struct Parcel {
    target: Target,
    delivered: Delivered,
    answer: Option<oneshot::Sender<Result<Value, Failure>>>,
}

impl Default for MemoryBroker {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBroker").field("servers", &self.shared.lock().servers.len()).finish()
    }
}

impl MemoryBroker {
    /// A broker that is up and has nothing declared.
    #[must_use]
    pub fn new() -> Self {
        let (link, _) = watch::channel(LinkState::Up { generation: 1 });
        let (notifications, _) = broadcast::channel(1024);
        Self { shared: Arc::new(Shared { state: Mutex::default(), link, notifications }) }
    }

    /// A new connection to this broker.
    #[must_use]
    pub fn transport(&self) -> MemoryTransport {
        MemoryTransport { shared: Arc::clone(&self.shared), closed: CancellationToken::new() }
    }

    /// Every notification published from now on. A reader that falls more than 1,024 behind
    /// misses the oldest.
    #[must_use]
    pub fn notifications(&self) -> broadcast::Receiver<Notification> {
        self.shared.notifications.subscribe()
    }

    /// Plays a broker that is away: sending fails, and transports say why. Servers stay.
    pub fn take_down(&self, reason: &str) {
        self.shared.link.send_replace(LinkState::Down { reason: reason.to_owned() });
        // Calls that wait were handed over; like on a real broker their answers may still come.
    }

    /// Ends [`take_down`](Self::take_down); the link's generation grows.
    pub fn bring_up(&self, generation: u64) {
        self.shared.link.send_replace(LinkState::Up { generation });
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives `parcel` to the server whose turn it is. False when there is none.
    fn route(&self, mut parcel: Parcel) -> bool {
        let mut state = self.lock();
        let State { servers, turns, .. } = &mut *state;
        let candidates: Vec<&Server> =
            servers.iter().filter(|server| server.takes(&parcel.target)).collect();
        if candidates.is_empty() {
            return false;
        }
        let key = (parcel.target.exchange.clone(), parcel.target.topic.clone());
        let turn = turns.entry(key).or_default();
        for _ in 0..candidates.len() {
            let server = candidates[*turn % candidates.len()];
            *turn = turn.wrapping_add(1);
            match server.inbox.send(parcel) {
                Ok(()) => return true,
                Err(back) => parcel = back.0,
            }
        }
        false
    }
}

impl Server {
    fn takes(&self, target: &Target) -> bool {
        self.service.exchange == target.exchange
            && self.service.topic == target.topic
            && target.server.as_ref().is_none_or(|server| *server == self.service.server)
    }
}

/// A connection to a [`MemoryBroker`].
pub struct MemoryTransport {
    shared: Arc<Shared>,
    closed: CancellationToken,
}

impl fmt::Debug for MemoryTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryTransport").field("closed", &self.closed.is_cancelled()).finish()
    }
}

impl MemoryTransport {
    fn check_up(&self) -> Result<(), BusError> {
        let unreachable =
            |reason: String| Err(BusError::Unreachable { peer: PEER.to_owned(), reason });
        if self.closed.is_cancelled() {
            return unreachable("this transport was closed".to_owned());
        }
        match &*self.shared.link.borrow() {
            LinkState::Up { .. } => Ok(()),
            LinkState::Down { reason } => unreachable(reason.clone()),
        }
    }

    async fn ask(
        &self,
        target: &Target,
        request: Request,
        limits: CallLimits,
    ) -> Result<Value, BusError> {
        check_call(target, &request.method, limits)?;
        self.check_up()?;
        let begun = Instant::now();
        let deadline = begun + limits.total;
        let method = request.method.clone();
        let (answer, mut answered) = oneshot::channel();
        let parcel = parcel(target, request, Some(answer));
        if !self.shared.route(parcel) {
            return Err(BusError::Undeliverable { target: target.to_string() });
        }
        tokio::select! {
            biased;
            outcome = &mut answered => match outcome {
                Ok(outcome) => outcome.map_err(BusError::Remote),
                Err(_) => {
                    // The server is gone. Nobody tells a caller; it waits as it was told to.
                    let silence = limits.monitor.map_or(deadline, |limit| Instant::now() + limit);
                    sleep_until(silence.min(deadline)).await;
                    Err(timed_out(target, &method, begun.elapsed()))
                }
            },
            () = sleep_until(deadline) => Err(timed_out(target, &method, limits.total)),
        }
    }

    fn tell(&self, target: &Target, request: &Request) -> Result<(), BusError> {
        self.check_up()?;
        if target.fanout {
            let state = self.shared.lock();
            let everyone = Target { server: None, ..target.clone() };
            for server in state.servers.iter().filter(|server| server.takes(&everyone)) {
                let _ended_meanwhile = server.inbox.send(parcel(target, request.clone(), None));
            }
        } else {
            // As on a broker, a cast to nobody is lost without a word.
            let _nobody = self.shared.route(parcel(target, request.clone(), None));
        }
        Ok(())
    }

    fn listen(
        &self,
        service: Service,
        handler: Arc<dyn Handler>,
    ) -> Result<ServerHandle, BusError> {
        if service.concurrency == 0 {
            let what = format!("the concurrency of {} must be at least 1", service.topic);
            return Err(BusError::Config(what));
        }
        let concurrency = service.concurrency;
        let (inbox, parcels) = mpsc::unbounded_channel();
        let id = {
            let mut state = self.shared.lock();
            let id = state.next_server;
            state.next_server += 1;
            state.servers.push(Server { id, service, inbox });
            id
        };
        let stop = self.closed.child_token();
        let shared = Arc::clone(&self.shared);
        let task = tokio::spawn(serve(shared, id, parcels, concurrency, handler, stop.clone()));
        Ok(ServerHandle::new(stop, task))
    }
}

/// Works on what arrives, at most `concurrency` at once, until `stop`; then finishes what runs
/// and passes on what has not begun.
async fn serve(
    shared: Arc<Shared>,
    id: u64,
    mut parcels: mpsc::UnboundedReceiver<Parcel>,
    concurrency: usize,
    handler: Arc<dyn Handler>,
    stop: CancellationToken,
) {
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = running.join_next() => {}
            Some(parcel) = parcels.recv(), if running.len() < concurrency => {
                let handler = Arc::clone(&handler);
                running.spawn(async move {
                    let outcome = run(handler.as_ref(), parcel.delivered, || {}).await;
                    if let Some(answer) = parcel.answer {
                        let _caller_gave_up = answer.send(outcome);
                    }
                });
            }
        }
    }
    shared.lock().servers.retain(|server| server.id != id);
    parcels.close();
    while let Ok(parcel) = parcels.try_recv() {
        if !parcel.target.fanout {
            let _nobody_left = shared.route(parcel);
        }
    }
    while running.join_next().await.is_some() {}
}

fn parcel(
    target: &Target,
    request: Request,
    answer: Option<oneshot::Sender<Result<Value, Failure>>>,
) -> Parcel {
    let delivered = Delivered {
        request,
        namespace: target.namespace.clone(),
        version: target.version,
        unique_id: new_id(),
        is_call: answer.is_some(),
        origin: Origin::Memory,
    };
    Parcel { target: target.clone(), delivered, answer }
}

impl Transport for MemoryTransport {
    fn call<'a>(
        &'a self,
        target: &'a Target,
        request: Request,
        limits: CallLimits,
    ) -> BoxFuture<'a, Result<Value, BusError>> {
        self.ask(target, request, limits).boxed()
    }

    fn cast<'a>(
        &'a self,
        target: &'a Target,
        request: Request,
    ) -> BoxFuture<'a, Result<(), BusError>> {
        async move { self.tell(target, &request) }.boxed()
    }

    fn notify(&self, notification: Notification) -> BoxFuture<'_, Result<(), BusError>> {
        async move {
            self.check_up()?;
            let _nobody_listens = self.shared.notifications.send(notification);
            Ok(())
        }
        .boxed()
    }

    fn serve(
        &self,
        service: Service,
        handler: Arc<dyn Handler>,
    ) -> BoxFuture<'_, Result<ServerHandle, BusError>> {
        async move { self.listen(service, handler) }.boxed()
    }

    fn publish<'a>(
        &'a self,
        stream: &'a Stream,
        body: Value,
    ) -> BoxFuture<'a, Result<(), BusError>> {
        async move {
            self.check_up()?;
            let mut state = self.shared.lock();
            state.streams.entry(stream.name.clone()).or_default().append(stream, body);
            Ok(())
        }
        .boxed()
    }

    fn read<'a>(
        &'a self,
        stream: &'a Stream,
        from: ReadFrom,
        follow: bool,
    ) -> BoxFuture<'a, Result<BoxStream<'static, Result<Record, BusError>>, BusError>> {
        async move {
            self.check_up()?;
            Ok(stream::read(&self.shared, stream, from, follow))
        }
        .boxed()
    }

    fn lock<'a>(
        &'a self,
        name: &'a str,
        limit: Duration,
    ) -> BoxFuture<'a, Result<LockGuard, BusError>> {
        async move {
            self.check_up()?;
            let lock = Arc::clone(self.shared.lock().locks.entry(name.to_owned()).or_default());
            match tokio::time::timeout(limit, lock.lock_owned()).await {
                Ok(held) => Ok(LockGuard::new(move || drop(held))),
                Err(_) => Err(BusError::Timeout {
                    target: format!("lock {name}"),
                    method: "lock".to_owned(),
                    seconds: limit.as_secs(),
                }),
            }
        }
        .boxed()
    }

    fn link(&self) -> watch::Receiver<LinkState> {
        self.shared.link.subscribe()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move { self.closed.cancel() }.boxed()
    }
}
