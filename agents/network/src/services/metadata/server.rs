//! The servers: a listener for each address, every connection bounded in number, size and time.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use stackhand_metadata::SEED_BYTES;
use stackhand_model::PortId;
use stackhand_runtime::http::{Bounds, serve_connection};
use stackhand_runtime::metrics::Reading;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::debug;

use super::passwords::{LONGEST, NotKept, Passwords};
use super::{Known, Table};
use crate::services::fleet::{Place, Service, counter};
use crate::services::pace::Pace;

/// Requests a second that one port may make.
const MOST_A_SECOND: u32 = 50;
/// Requests that one port may make at once: a boot of cloud-init makes some forty.
const BURST: u32 = 200;
/// Connections of one source at once.
const MOST_BY_SOURCE: usize = 16;
/// Connections of one listener at once.
const MOST_CONNECTIONS: usize = 256;
/// Connections of all listeners at once.
const MOST_AT_ALL: usize = 4096;
/// Ports whose pace is kept before those that rest are forgotten.
const MOST_KEPT: usize = 1024;
/// The longest path that is looked at.
const LONGEST_PATH: usize = 1024;

/// What a connection may use up.
const BOUNDS: Bounds = Bounds {
    head_bytes: 16 * 1024,
    headers: 64,
    head_limit: Duration::from_secs(10),
    connection_limit: Duration::from_secs(60),
};

/// The metadata servers, and what they did since the agent started.
#[derive(Debug)]
pub struct Server {
    served: AtomicU64,
    missing: AtomicU64,
    strangers: AtomicU64,
    slowed: AtomicU64,
    turned_away: AtomicU64,
    places: Arc<Semaphore>,
    random: SystemRandom,
    /// Where guests' passwords are kept; without it none is taken.
    passwords: OnceLock<Arc<Passwords>>,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            served: AtomicU64::new(0),
            missing: AtomicU64::new(0),
            strangers: AtomicU64::new(0),
            slowed: AtomicU64::new(0),
            turned_away: AtomicU64::new(0),
            places: Arc::new(Semaphore::new(MOST_AT_ALL)),
            random: SystemRandom::new(),
            passwords: OnceLock::new(),
        }
    }
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What the connections of one site share.
struct Site {
    server: Arc<Server>,
    table: watch::Receiver<Arc<Table>>,
    paces: Mutex<BTreeMap<PortId, Pace>>,
}

impl Site {
    /// The answer to a request from `source`. What the request says of itself is not looked at.
    async fn answer(&self, source: IpAddr, method: &Method, uri: &Uri, body: Body) -> Response {
        let table = Arc::clone(&self.table.borrow());
        let Some(guest) = table.guests.get(&source) else {
            add(&self.server.strangers);
            return StatusCode::NOT_FOUND.into_response();
        };
        if !self.may_ask(guest.port) {
            add(&self.server.slowed);
            return (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, "1")]).into_response();
        }
        let passwords = self.server.passwords.get();
        let path = uri.path();
        if method == Method::POST
            && stackhand_metadata::takes_password(path)
            && let Some(passwords) = passwords
        {
            return take_password(passwords, guest, body).await;
        }
        if method != Method::GET && method != Method::HEAD {
            let allowed = [(header::ALLOW, "GET, HEAD"), (header::CONNECTION, "close")];
            return (StatusCode::METHOD_NOT_ALLOWED, allowed).into_response();
        }
        let mut seed = [0; SEED_BYTES];
        let seed = match self.server.random.fill(&mut seed) {
            Ok(()) => &seed[..],
            Err(_none) => &[],
        };
        let password = passwords.and_then(|passwords| passwords.of(guest.id));
        let page = if path.len() <= LONGEST_PATH {
            guest.page(path, seed, password.as_deref())
        } else {
            None
        };
        match page {
            Some(page) => {
                add(&self.server.served);
                ([(header::CONTENT_TYPE, page.content_type)], page.body).into_response()
            }
            None => {
                add(&self.server.missing);
                StatusCode::NOT_FOUND.into_response()
            }
        }
    }

    fn may_ask(&self, port: PortId) -> bool {
        let now = Instant::now();
        let mut paces = self.paces.lock().unwrap_or_else(PoisonError::into_inner);
        if paces.len() >= MOST_KEPT {
            paces.retain(|_, pace| !pace.is_full(now));
        }
        paces.entry(port).or_insert_with(|| Pace::new(MOST_A_SECOND, BURST, now)).try_take(now)
    }

    async fn listen(self: Arc<Self>, place: Place, listener: TcpListener) {
        let mut connections = JoinSet::new();
        let mut sources: BTreeMap<IpAddr, usize> = BTreeMap::new();
        loop {
            let (stream, source) = tokio::select! {
                Some(ended) = connections.join_next() => {
                    if let Ok(source) = ended {
                        release(&mut sources, source);
                    }
                    continue;
                }
                accepted = listener.accept(), if connections.len() < MOST_CONNECTIONS => {
                    match accepted {
                        Ok((stream, peer)) => (stream, peer.ip()),
                        Err(error) => {
                            debug!(at = %place.at, %error, "cannot accept");
                            tokio::time::sleep(Duration::from_millis(100)).await;
                            continue;
                        }
                    }
                }
            };
            let has = sources.entry(source).or_default();
            let free = Arc::clone(&self.server.places).try_acquire_owned();
            let Some(held) = free.ok().filter(|_| *has < MOST_BY_SOURCE) else {
                add(&self.server.turned_away);
                continue;
            };
            *has += 1;
            let site = Arc::clone(&self);
            connections.spawn(async move {
                let _held = held;
                site.talk(stream, source).await;
                source
            });
        }
    }

    async fn talk(self: Arc<Self>, stream: TcpStream, source: IpAddr) {
        let handler = move |method: Method, uri: Uri, body: Body| async move {
            Ok::<_, Infallible>(self.answer(source, &method, &uri, body).await)
        };
        serve_connection(stream, Router::new().fallback(handler), BOUNDS).await;
    }
}

/// What Nova answers to a guest that leaves a password.
async fn take_password(passwords: &Passwords, guest: &Known, body: Body) -> Response {
    // The rest of what is too long is not read.
    let closing = [(header::CONNECTION, "close")];
    let Ok(bytes) = axum::body::to_bytes(body, LONGEST).await else {
        return (StatusCode::BAD_REQUEST, closing).into_response();
    };
    let status = match passwords.leave(guest, &bytes).await {
        Ok(()) => StatusCode::OK,
        Err(NotKept::Taken) => StatusCode::CONFLICT,
        Err(NotKept::Bad) => StatusCode::BAD_REQUEST,
        Err(NotKept::Failed) => StatusCode::SERVICE_UNAVAILABLE,
    };
    status.into_response()
}

fn release(sources: &mut BTreeMap<IpAddr, usize>, source: IpAddr) {
    if let Some(has) = sources.get_mut(&source) {
        *has -= 1;
        if *has == 0 {
            sources.remove(&source);
        }
    }
}

impl Server {
    pub(in crate::services) fn passwords(&self) -> &OnceLock<Arc<Passwords>> {
        &self.passwords
    }

    pub(in crate::services) fn facts(&self, sites: usize) -> Value {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "sites": sites,
            "served": read(&self.served),
            "missing": read(&self.missing),
            "strangers": read(&self.strangers),
            "slowed": read(&self.slowed),
            "turned_away": read(&self.turned_away),
        })
    }

    pub(in crate::services) fn readings(shared: &Arc<Self>) -> Vec<Reading> {
        let counter = |name, help, read| counter(shared, name, help, read);
        vec![
            counter("network_metadata_pages", "Metadata pages served to guests", |it| &it.served),
            counter("network_metadata_missing", "Requests for metadata that is not there", |it| {
                &it.missing
            }),
            counter(
                "network_metadata_strangers",
                "Metadata requests from addresses that no guest has",
                |it| &it.strangers,
            ),
            counter("network_metadata_slowed", "Metadata requests refused as too many", |it| {
                &it.slowed
            }),
            counter(
                "network_metadata_turned_away",
                "Metadata connections closed as too many",
                |it| &it.turned_away,
            ),
        ]
    }
}

impl Service for Server {
    const ACTION: &'static str = "serve metadata";
    type Table = Table;
    type Binding = std::collections::BTreeSet<IpAddr>;
    type Sockets = Vec<TcpListener>;

    fn binding(table: &Table) -> Self::Binding {
        table.listen.clone()
    }

    fn open(place: &Place, addresses: &Self::Binding) -> io::Result<Self::Sockets> {
        addresses.iter().map(|address| open(place, *address)).collect()
    }

    async fn run(
        self: Arc<Self>,
        place: Place,
        listeners: Self::Sockets,
        table: watch::Receiver<Arc<Table>>,
    ) {
        let site = Arc::new(Site { server: self, table, paces: Mutex::default() });
        let mut tasks = JoinSet::new();
        for listener in listeners {
            tasks.spawn(Arc::clone(&site).listen(place.clone(), listener));
        }
        // They never end; a panic in one ends all, and the next pass starts them anew.
        tasks.join_next().await;
    }
}

fn open(place: &Place, address: IpAddr) -> io::Result<TcpListener> {
    let domain = Domain::for_address(SocketAddr::new(address, 80));
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    // The address may still be about to come.
    let address = match address {
        IpAddr::V4(_) => {
            socket.set_freebind_v4(true)?;
            SocketAddr::new(address, 80)
        }
        IpAddr::V6(v6) => {
            socket.set_only_v6(true)?;
            socket.set_freebind_v6(true)?;
            SocketAddrV6::new(v6, 80, 0, place.index).into()
        }
    };
    socket.bind(&address.into())?;
    socket.listen(256)?;
    TcpListener::from_std(socket.into())
}
