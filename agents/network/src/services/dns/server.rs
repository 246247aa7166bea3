//! The servers: for each address of a network's server one socket for UDP and one for TCP.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use stackhand_runtime::metrics::Reading;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::answer::{Decision, Transport, decide};
use super::forward::ask;
use super::zone::Zone;
use crate::services::fleet::{Place, Service, counter};
use crate::services::pace::Pace;

/// Queries a second that one address reads.
const MOST_A_SECOND: u32 = 2000;
/// Queries that may come at once.
const BURST: u32 = 500;
/// Room for queries that wait to be read, in bytes.
const BUFFER: usize = 128 << 10;
/// The longest query that is read.
const LONGEST: usize = 1232;
/// Queries of one network that wait for others at once.
const MOST_FORWARDED: usize = 64;
/// Queries of all networks that wait for others at once.
const MOST_FORWARDED_AT_ALL: usize = 1024;
/// TCP connections of one network at once.
const MOST_CONNECTIONS: usize = 32;
/// Time for a query to arrive on a TCP connection, and for its answer to be taken.
const IDLE: Duration = Duration::from_secs(5);
/// Age at which a TCP connection is closed.
const CONNECTION_LIMIT: Duration = Duration::from_secs(30);

/// The DNS servers, and what they did since the agent started.
#[derive(Debug)]
pub struct Server {
    answered: AtomicU64,
    forwarded: AtomicU64,
    unanswered: AtomicU64,
    dropped: AtomicU64,
    places: Semaphore,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            answered: AtomicU64::new(0),
            forwarded: AtomicU64::new(0),
            unanswered: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            places: Semaphore::new(MOST_FORWARDED_AT_ALL),
        }
    }
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What the tasks of one network share.
#[derive(Clone)]
struct Network {
    server: Arc<Server>,
    zone: watch::Receiver<Arc<Zone>>,
    waiting: Arc<Semaphore>,
}

impl Network {
    /// What to do with a query; nothing if the client has no business here.
    fn decide(&self, client: IpAddr, query: &[u8], by: Transport) -> Option<Decision> {
        let zone = self.zone.borrow();
        let decision = if zone.serves(client) { decide(&zone, query, by) } else { Decision::Drop };
        match decision {
            Decision::Drop => {
                add(&self.server.dropped);
                return None;
            }
            Decision::Answer(_) => add(&self.server.answered),
            Decision::Forward { .. } => {}
        }
        Some(decision)
    }

    /// What others say to a query, or `failure`.
    async fn forward(&self, query: &[u8], by: Transport, failure: Vec<u8>) -> Vec<u8> {
        let forwarders = self.zone.borrow().forwarders.clone();
        let places = self.waiting.try_acquire().ok().zip(self.server.places.try_acquire().ok());
        let told = match places {
            Some(_held) => ask(&forwarders, query, by).await,
            None => None,
        };
        add(if told.is_some() { &self.server.forwarded } else { &self.server.unanswered });
        told.unwrap_or(failure)
    }

    async fn udp(self, place: Place, socket: Arc<UdpSocket>) {
        let mut pace = Pace::new(MOST_A_SECOND, BURST, Instant::now());
        let mut buffer = vec![0; LONGEST];
        let mut waiting = JoinSet::new();
        loop {
            let (length, client) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                Err(error) => {
                    debug!(at = %place.at, %error, "cannot receive");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            while waiting.try_join_next().is_some() {}
            let query = &buffer[..length];
            // A client that is gone is its own problem, so nobody looks at what sending gives.
            match self.decide(client.ip(), query, Transport::Udp) {
                None | Some(Decision::Drop) => {}
                Some(Decision::Answer(answer)) => drop(socket.send_to(&answer, client).await),
                Some(Decision::Forward { failure }) => {
                    let (network, socket) = (self.clone(), Arc::clone(&socket));
                    let query = query.to_vec();
                    waiting.spawn(async move {
                        let answer = network.forward(&query, Transport::Udp, failure).await;
                        drop(socket.send_to(&answer, client).await);
                    });
                }
            }
            if let Some(rest) = pace.take(Instant::now()) {
                tokio::time::sleep(rest).await;
            }
        }
    }

    async fn tcp(self, place: Place, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            if connections.len() >= MOST_CONNECTIONS {
                connections.join_next().await;
            }
            match listener.accept().await {
                Ok((stream, client)) => {
                    let network = self.clone();
                    connections.spawn(async move {
                        let _ = timeout(CONNECTION_LIMIT, network.talk(stream, client)).await;
                    });
                }
                Err(error) => {
                    debug!(at = %place.at, %error, "cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
            while connections.try_join_next().is_some() {}
        }
    }

    async fn talk(&self, mut stream: TcpStream, client: SocketAddr) -> io::Result<()> {
        loop {
            let length = timeout(IDLE, stream.read_u16()).await??;
            if usize::from(length) > LONGEST {
                return Ok(());
            }
            let mut query = vec![0; usize::from(length)];
            timeout(IDLE, stream.read_exact(&mut query)).await??;
            let mut answer = match self.decide(client.ip(), &query, Transport::Tcp) {
                None | Some(Decision::Drop) => return Ok(()),
                Some(Decision::Answer(answer)) => answer,
                Some(Decision::Forward { failure }) => {
                    self.forward(&query, Transport::Tcp, failure).await
                }
            };
            let length = u16::try_from(answer.len()).map_err(|_| io::ErrorKind::InvalidData)?;
            answer.splice(..0, length.to_be_bytes());
            timeout(IDLE, stream.write_all(&answer)).await??;
        }
    }
}

impl Server {
    pub(in crate::services) fn facts(&self, networks: usize) -> Value {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "networks": networks,
            "answered": read(&self.answered),
            "forwarded": read(&self.forwarded),
            "unanswered": read(&self.unanswered),
            "dropped": read(&self.dropped),
        })
    }

    pub(in crate::services) fn readings(shared: &Arc<Self>) -> Vec<Reading> {
        let counter = |name, help, read| counter(shared, name, help, read);
        vec![
            counter("network_dns_answers", "DNS queries about names of ports answered", |it| {
                &it.answered
            }),
            counter("network_dns_forwarded", "DNS queries that other servers answered", |it| {
                &it.forwarded
            }),
            counter("network_dns_unanswered", "DNS queries that no other server answered", |it| {
                &it.unanswered
            }),
            counter("network_dns_dropped", "DNS messages that were no queries of guests", |it| {
                &it.dropped
            }),
        ]
    }
}

impl Service for Server {
    const ACTION: &'static str = "serve DNS";
    type Table = Zone;
    type Binding = BTreeSet<IpAddr>;
    type Sockets = Vec<(UdpSocket, TcpListener)>;

    fn binding(zone: &Zone) -> BTreeSet<IpAddr> {
        zone.servers.clone()
    }

    fn open(place: &Place, addresses: &BTreeSet<IpAddr>) -> io::Result<Self::Sockets> {
        addresses.iter().map(|address| open(place, *address)).collect()
    }

    async fn run(
        self: Arc<Self>,
        place: Place,
        sockets: Self::Sockets,
        zone: watch::Receiver<Arc<Zone>>,
    ) {
        let waiting = Arc::new(Semaphore::new(MOST_FORWARDED));
        let network = Network { server: self, zone, waiting };
        let mut tasks = JoinSet::new();
        for (udp, tcp) in sockets {
            tasks.spawn(network.clone().udp(place.clone(), Arc::new(udp)));
            tasks.spawn(network.clone().tcp(place.clone(), tcp));
        }
        // They never end; a panic in one ends all, and the next pass starts them anew.
        tasks.join_next().await;
    }
}

fn open(place: &Place, address: IpAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let udp = bound(place, address, Type::DGRAM, Protocol::UDP)?;
    udp.set_recv_buffer_size(BUFFER)?;
    let tcp = bound(place, address, Type::STREAM, Protocol::TCP)?;
    tcp.listen(64)?;
    Ok((UdpSocket::from_std(udp.into())?, TcpListener::from_std(tcp.into())?))
}

/// A socket on port 53 of one of our addresses, which may still be about to come.
fn bound(place: &Place, address: IpAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let domain = Domain::for_address(SocketAddr::new(address, 53));
    let socket = Socket::new(domain, kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    socket.bind_device(Some(place.at.link.as_bytes()))?;
    let address = match address {
        IpAddr::V4(_) => {
            socket.set_freebind_v4(true)?;
            SocketAddr::new(address, 53)
        }
        IpAddr::V6(v6) => {
            socket.set_only_v6(true)?;
            socket.set_freebind_v6(true)?;
            let scope = if v6.is_unicast_link_local() { place.index } else { 0 };
            SocketAddrV6::new(v6, 53, 0, scope).into()
        }
    };
    socket.bind(&address.into())?;
    Ok(socket)
}
