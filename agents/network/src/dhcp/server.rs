//! The servers: one socket and one task per network, kept across passes.
//!
//! A server hears by a UDP socket bound to its link inside `qdhcp-<network>` and answers by raw
//! frames, because its clients have no address to answer ARP with yet. It survives passes: a new
//! table is handed to the running task. It is opened anew only when its namespace or link was.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use stackhand_kernel::packet::{self, Receive};
use stackhand_kernel::{KernelError, Netns, NetnsId};
use stackhand_model::{MacAddr, NetworkId};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::answer::{Delivery, Ignored, answer};
use super::table::Table;

/// Messages a second that one network's server reads. What comes faster is dropped by the kernel
/// once the socket's small buffer is full.
const MOST_A_SECOND: u32 = 1000;

/// Messages that may come at once.
const BURST: u32 = 200;

/// Room for messages that wait to be read, in bytes: a burst and no more.
const BUFFER: usize = 256 << 10;

/// The longest message that is read. Longer ones are cut off, and then malformed.
const LONGEST: usize = 2048;

/// What the servers did since the agent started.
#[derive(Debug, Default)]
pub struct Counters {
    answered: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    ignored: [AtomicU64; Ignored::ALL.len()],
}

impl Counters {
    /// Offers and acknowledgements sent.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Refusals sent.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Answers that could not be sent.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Messages that got no answer, by reason.
    #[must_use]
    pub fn ignored(&self, reason: Ignored) -> u64 {
        self.ignored[reason as usize].load(Ordering::Relaxed)
    }

    fn ignore(&self, reason: Ignored) {
        self.ignored[reason as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// Where a server listens. Differs once the namespace or the link was made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    space: NetnsId,
    link: u32,
    mac: MacAddr,
}

struct Server {
    place: Place,
    table: watch::Sender<Arc<Table>>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a server is to be.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its namespace.
    pub space: String,
    /// Its link there.
    pub link: String,
    /// The link's number.
    pub index: u32,
    /// The link's Ethernet address.
    pub mac: MacAddr,
    /// What it tells.
    pub table: Arc<Table>,
}

/// The DHCP servers of this host.
#[derive(Default)]
pub struct Servers {
    running: BTreeMap<NetworkId, Server>,
    counters: Arc<Counters>,
}

impl std::fmt::Debug for Servers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.running.keys()).finish()
    }
}

impl Servers {
    /// What they did.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Networks that are served.
    pub fn networks(&self) -> impl Iterator<Item = NetworkId> {
        self.running.keys().copied()
    }

    /// Stops the servers of networks that are not in `keep`, so that their namespaces can go.
    pub fn retain(&mut self, keep: impl Fn(NetworkId) -> bool) {
        self.running.retain(|network, _| keep(*network));
    }

    /// Makes a network's server be as wanted.
    ///
    /// # Errors
    ///
    /// Fails if its sockets cannot be opened. A server that runs goes on as it was.
    pub async fn serve(&mut self, network: NetworkId, wanted: &Wanted) -> Result<(), KernelError> {
        let space = Netns::named(&wanted.space)?;
        let id = space.id().ok_or_else(|| KernelError::Namespace {
            action: "open a DHCP socket",
            namespace: wanted.space.clone(),
            source: io::ErrorKind::NotFound.into(),
        })?;
        let place = Place { space: id, link: wanted.index, mac: wanted.mac };
        if let Some(server) = self.running.get(&network)
            && server.place == place
            && !server.task.is_finished()
        {
            server.table.send_if_modified(|table| {
                let changed = *table != wanted.table;
                if changed {
                    *table = Arc::clone(&wanted.table);
                }
                changed
            });
            return Ok(());
        }
        self.running.remove(&network);
        let (link, index) = (wanted.link.clone(), wanted.index);
        let (hear, say) = space.inside("open a DHCP socket", move || open(&link, index)).await?;
        let (table, told) = watch::channel(Arc::clone(&wanted.table));
        let counters = Arc::clone(&self.counters);
        let task = tokio::spawn(run(network, hear, say, wanted.mac, told, counters));
        self.running.insert(network, Server { place, table, task });
        Ok(())
    }
}

fn open(link: &str, index: u32) -> io::Result<(UdpSocket, Socket)> {
    let hear = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    hear.set_nonblocking(true)?;
    hear.set_reuse_address(true)?;
    hear.set_broadcast(true)?;
    hear.set_recv_buffer_size(BUFFER)?;
    hear.bind_device(Some(link.as_bytes()))?;
    hear.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 67)).into())?;
    let say = packet::frames(index, Receive::Nothing)?;
    Ok((UdpSocket::from_std(hear.into())?, say))
}

async fn run(
    network: NetworkId,
    hear: UdpSocket,
    say: Socket,
    mac: MacAddr,
    table: watch::Receiver<Arc<Table>>,
    counters: Arc<Counters>,
) {
    let mut pace = Pace::new(Instant::now());
    let mut buffer = vec![0; LONGEST];
    loop {
        let length = match hear.recv(&mut buffer).await {
            Ok(length) => length,
            Err(error) => {
                // The link is down or going; a pass will see to it.
                debug!(%network, %error, "cannot receive");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let told = Arc::clone(&table.borrow());
        match answer(&told, &buffer[..length]) {
            Ok(answer) => {
                let sent = match (answer.delivery, answer.frame(mac)) {
                    (Delivery::Relay(relay), _) => {
                        hear.send_to(&answer.message, SocketAddrV4::new(relay, 67)).await.map(drop)
                    }
                    (_, Some(frame)) => say.send(&frame).map(drop),
                    (_, None) => Ok(()),
                };
                match sent {
                    Ok(()) if answer.refusal => counters.refused.fetch_add(1, Ordering::Relaxed),
                    Ok(()) => counters.answered.fetch_add(1, Ordering::Relaxed),
                    Err(error) => {
                        debug!(%network, port = %answer.port, %error, "cannot answer");
                        counters.failed.fetch_add(1, Ordering::Relaxed)
                    }
                };
            }
            Err(Ignored::Declined) => {
                counters.ignore(Ignored::Declined);
                warn!(%network, "a guest says that somebody else uses its address");
            }
            Err(reason) => counters.ignore(reason),
        }
        if let Some(rest) = pace.take(Instant::now()) {
            tokio::time::sleep(rest).await;
        }
    }
}

/// How fast messages may be read: so many at once, so many a second.
#[derive(Debug)]
struct Pace {
    left: f64,
    at: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Self { left: f64::from(BURST), at: now }
    }

    /// Takes one; returns how long to rest before the next.
    fn take(&mut self, now: Instant) -> Option<Duration> {
        let rate = f64::from(MOST_A_SECOND);
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * rate;
        self.left = (self.left + gained).min(f64::from(BURST)) - 1.0;
        self.at = now;
        (self.left < 0.0).then(|| Duration::from_secs_f64(-self.left / rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_a_storm_is_slowed_down() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        for _ in 0..BURST {
            assert_eq!(pace.take(start), None);
        }
        let mut now = start;
        for _ in 0..MOST_A_SECOND {
            if let Some(rest) = pace.take(now) {
                now += rest;
            }
        }
        let took = (now - start).as_secs_f64();
        assert!((0.9..1.1).contains(&took), "{took}");
    }
}
