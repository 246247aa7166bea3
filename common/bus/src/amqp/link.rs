//! Keeps one session up: connect, declare, announce, wait for its end, back off, again.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ClientConfig;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::amqp::client::ReplyBook;
use crate::amqp::counters::Counts;
use crate::amqp::dial::{DialError, dial};
use crate::amqp::lock::Locks;
use crate::amqp::reply::DeadQueues;
use crate::amqp::server::Server;
use crate::amqp::session::{DeclareError, Session};
use crate::amqp::url::Broker;
use crate::amqp::{AmqpOptions, AmqpUrl};
use crate::{BusError, LinkState};

/// A session that lived this long was a good one: the next attempt comes at once.
const GOOD_SESSION: Duration = Duration::from_secs(5);

/// Answers that may wait for their caller's queue at once.
const WAITING_REPLIES: usize = 1024;

/// What every part of a transport shares.
pub(super) struct Shared {
    pub(super) url: AmqpUrl,
    pub(super) options: AmqpOptions,
    pub(super) counts: Counts,
    /// The public view of the link.
    pub(super) state: watch::Sender<LinkState>,
    pub(super) replies: ReplyBook,
    pub(super) dead_queues: DeadQueues,
    pub(super) waiting_replies: Arc<Semaphore>,
    pub(super) locks: Locks,
    /// No new work.
    pub(super) closing: CancellationToken,
    /// No link either.
    pub(super) stop: CancellationToken,
    view: watch::Sender<View>,
    servers: Mutex<Vec<Arc<Server>>>,
}

/// The link as the transport's own parts see it.
#[derive(Clone, Debug)]
enum View {
    Down { reason: String, refused: bool },
    Up(Arc<Session>),
    Closed,
}

impl Shared {
    pub(super) fn new(url: AmqpUrl, options: AmqpOptions) -> Self {
        let reason = format!("connecting to {url}");
        Self {
            options,
            counts: Counts::default(),
            state: watch::Sender::new(LinkState::Down { reason: reason.clone() }),
            replies: ReplyBook::new(),
            dead_queues: DeadQueues::default(),
            waiting_replies: Arc::new(Semaphore::new(WAITING_REPLIES)),
            locks: Locks::default(),
            closing: CancellationToken::new(),
            stop: CancellationToken::new(),
            view: watch::Sender::new(View::Down { reason, refused: false }),
            servers: Mutex::default(),
            url,
        }
    }

    /// The session, waiting for one until `deadline`.
    ///
    /// Fails at once where waiting will not help: the broker refuses us, or we are closed.
    pub(super) async fn session(&self, deadline: Instant) -> Result<Arc<Session>, BusError> {
        let mut view = self.view.subscribe();
        loop {
            let seen = view.borrow_and_update().clone();
            let waiting_for = match seen {
                View::Up(session) if !session.is_over() => return Ok(session),
                View::Up(session) => session.why().to_owned(),
                View::Down { reason, refused: false } => reason,
                View::Down { reason, refused: true } => {
                    return Err(BusError::Refused { peer: self.url.to_string(), reason });
                }
                View::Closed => return Err(self.unreachable("the transport was closed")),
            };
            match tokio::time::timeout_at(deadline, view.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(self.unreachable("the transport was closed")),
                Err(_) => return Err(self.unreachable(&waiting_for)),
            }
        }
    }

    /// The session, if there is one right now.
    pub(super) fn current(&self) -> Option<Arc<Session>> {
        match &*self.view.borrow() {
            View::Up(session) if !session.is_over() => Some(Arc::clone(session)),
            _ => None,
        }
    }

    /// The session, however long it takes; `None` once the transport is closed.
    pub(super) async fn next_session(&self) -> Option<Arc<Session>> {
        let mut view = self.view.subscribe();
        loop {
            match &*view.borrow_and_update() {
                View::Up(session) if !session.is_over() => return Some(Arc::clone(session)),
                View::Closed => return None,
                _ => {}
            }
            view.changed().await.ok()?;
        }
    }

    fn unreachable(&self, reason: &str) -> BusError {
        BusError::Unreachable { peer: self.url.to_string(), reason: reason.to_owned() }
    }

    pub(super) fn add_server(&self, server: Arc<Server>) {
        self.servers_locked().push(server);
    }

    pub(super) fn remove_server(&self, server: &Arc<Server>) {
        self.servers_locked().retain(|other| !Arc::ptr_eq(other, server));
    }

    /// Waits until every server has finished, or the limit has passed.
    pub(super) async fn servers_done(&self, limit: Duration) {
        let servers = self.servers_locked().clone();
        let all = async {
            for server in servers {
                server.finished().await;
            }
        };
        let _ = tokio::time::timeout(limit, all).await;
    }

    fn servers_locked(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Server>>> {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts every server on a session. Servers that run on it already stay as they are; one
    /// whose queue does not work yet is tried again beside the others.
    async fn start_servers(self: &Arc<Self>, session: &Arc<Session>) -> Result<(), DeclareError> {
        let servers = self.servers_locked().clone();
        for server in servers {
            match server.start(self, session).await {
                Err(DeclareError::NotYet(reason)) => {
                    server.start_later(Arc::clone(self), Arc::clone(session), &reason);
                }
                other => other?,
            }
        }
        Ok(())
    }

    fn set_up(&self, session: &Arc<Session>) {
        tracing::info!(peer = session.peer, generation = session.generation, "broker connected");
        self.view.send_replace(View::Up(Arc::clone(session)));
        self.state.send_replace(LinkState::Up { generation: session.generation });
    }

    fn set_down(&self, error: &DialError) {
        let DialError { reason, refused } = error.clone();
        let news =
            !matches!(&*self.state.borrow(), LinkState::Down { reason: old } if *old == reason);
        if news {
            tracing::warn!(reason, "broker not connected");
            self.state.send_replace(LinkState::Down { reason: reason.clone() });
        }
        self.view.send_replace(View::Down { reason, refused });
    }
}

/// Runs until the transport is closed or dropped.
pub(super) async fn supervise(shared: Arc<Shared>, tls: Option<Arc<ClientConfig>>) {
    let mut brokers = shuffled(shared.url.hosts.clone());
    let mut generation = 0;
    let mut attempt = 0;
    loop {
        let connecting = connect(&shared, &mut brokers, tls.as_ref(), generation + 1);
        let Some(outcome) = shared.stop.run_until_cancelled(connecting).await else { break };
        match outcome {
            Ok(session) => {
                generation += 1;
                if generation > 1 {
                    shared.counts.reconnects.add();
                }
                let since = Instant::now();
                run(&shared, &session).await;
                if shared.stop.is_cancelled() {
                    break;
                }
                attempt = if since.elapsed() >= GOOD_SESSION { 0 } else { attempt + 1 };
            }
            Err(error) => {
                shared.set_down(&error);
                attempt += 1;
            }
        }
        let delay = match attempt {
            0 => Duration::from_millis(200).mul_f64(chance()),
            more => shared.options.retry_delay(more - 1).mul_f64(0.5 + chance() / 2.0),
        };
        if shared.stop.run_until_cancelled(tokio::time::sleep(delay)).await.is_none() {
            break;
        }
    }
    shared.view.send_replace(View::Closed);
    shared.state.send_replace(LinkState::Down { reason: "the transport was closed".into() });
}

/// One pass over the brokers, from the one after the last good one.
async fn connect(
    shared: &Arc<Shared>,
    brokers: &mut [Broker],
    tls: Option<&Arc<ClientConfig>>,
    generation: u64,
) -> Result<Arc<Session>, DialError> {
    let mut reasons = Vec::new();
    let mut refused = false;
    for _ in 0..brokers.len() {
        brokers.rotate_left(1);
        let Some(broker) = brokers.last() else { break };
        let peer = broker.address();
        match dial(broker, &shared.url.vhost, &shared.options, tls.cloned()).await {
            Ok((connection, socket)) => {
                let session = Session::new(generation, peer.clone(), connection, socket);
                let session = Arc::new(session);
                match prepare(shared, &session).await {
                    Ok(()) => return Ok(session),
                    Err(error) => {
                        refused |= matches!(error, DeclareError::Refused(_));
                        let reason = match error {
                            DeclareError::LinkLost => session.why().to_owned(),
                            DeclareError::NotYet(reason) | DeclareError::Refused(reason) => reason,
                        };
                        session.close().await;
                        reasons.push(format!("{peer}: {reason}"));
                    }
                }
            }
            Err(error) => {
                refused |= error.refused;
                reasons.push(format!("{peer}: {}", error.reason));
            }
        }
    }
    Err(DialError { reason: reasons.join("; "), refused })
}

/// Everything that has to stand before the link counts as up, within a limit.
async fn prepare(shared: &Arc<Shared>, session: &Arc<Session>) -> Result<(), DeclareError> {
    let watched = Arc::clone(session);
    tokio::spawn(async move { watched.watch().await });
    let declare = async {
        if shared.replies.is_used() {
            shared.replies.consume(shared, session).await?;
        }
        shared.start_servers(session).await
    };
    let limit = tokio::time::sleep(Duration::from_secs(30));
    tokio::select! {
        declared = declare => declared,
        () = session.over() => Err(DeclareError::LinkLost),
        () = limit => {
            session.end("declaring queues took more than 30 s");
            Err(DeclareError::LinkLost)
        }
    }
}

async fn run(shared: &Arc<Shared>, session: &Arc<Session>) {
    shared.set_up(session);
    // A server or first call that came between preparing and now finds the session by itself
    // or is started here; both do no harm.
    if let Err(DeclareError::Refused(reason) | DeclareError::NotYet(reason)) =
        shared.start_servers(session).await
    {
        session.end(reason);
    }
    tokio::select! {
        () = session.over() => {
            let reason = format!("lost {}: {}; reconnecting", session.peer, session.why());
            shared.set_down(&DialError { reason, refused: false });
        }
        () = shared.stop.cancelled() => {}
    }
    session.close().await;
}

fn shuffled(mut brokers: Vec<Broker>) -> Vec<Broker> {
    for last in (1..brokers.len()).rev() {
        let pick = usize::try_from(Uuid::new_v4().as_u64_pair().0 >> 32).unwrap_or(0) % (last + 1);
        brokers.swap(last, pick);
    }
    brokers
}

/// A random number within 0..1.
pub(super) fn chance() -> f64 {
    let bits = u32::try_from(Uuid::new_v4().as_u64_pair().0 >> 32).unwrap_or(0);
    f64::from(bits) / f64::from(u32::MAX)
}
