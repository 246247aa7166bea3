//! The servers: one socket and one task per network.
//!
//! A server hears by a UDP socket bound to its link inside `qdhcp-<network>` and answers by raw
//! frames, because its clients have no address to answer ARP with yet.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use socket2::{Domain, Protocol, Socket, Type};
use stackhand_kernel::packet::{self, Receive};
use stackhand_runtime::metrics::Reading;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::answer::{Delivery, Ignored, answer};
use super::table::Table;
use crate::services::fleet::{Place, Service, alone_on, counter};
use crate::services::pace::Pace;

/// Messages a second that one network's server reads. What comes faster is dropped by the kernel
/// once the socket's small buffer is full.
pub(in crate::services) const MOST_A_SECOND: u32 = 1000;

/// Messages that may come at once.
pub(in crate::services) const BURST: u32 = 200;

/// Room for messages that wait to be read, in bytes: a burst and no more.
pub(in crate::services) const BUFFER: usize = 256 << 10;

/// The longest message that is read. Longer ones are cut off, and then malformed.
const LONGEST: usize = 2048;

/// The DHCP servers, and what they did since the agent started.
#[derive(Debug, Default)]
pub struct Server {
    answered: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    ignored: [AtomicU64; Ignored::ALL.len()],
}

impl Server {
    fn ignore(&self, reason: Ignored) {
        self.ignored[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn ignored(&self, reason: Ignored) -> u64 {
        self.ignored[reason as usize].load(Ordering::Relaxed)
    }

    pub(in crate::services) fn facts(&self, networks: usize) -> Value {
        let ignored: BTreeMap<&str, u64> = Ignored::ALL
            .into_iter()
            .map(|reason| (reason.as_str(), self.ignored(reason)))
            .collect();
        json!({
            "networks": networks,
            "answered": self.answered.load(Ordering::Relaxed),
            "refused": self.refused.load(Ordering::Relaxed),
            "failed": self.failed.load(Ordering::Relaxed),
            "ignored": ignored,
        })
    }

    pub(in crate::services) fn readings(shared: &Arc<Self>) -> Vec<Reading> {
        let counter = |name, help, read| counter(shared, name, help, read);
        vec![
            counter("network_dhcp_answers", "DHCP offers and acknowledgements sent", |it| {
                &it.answered
            }),
            counter("network_dhcp_refusals", "DHCP refusals sent", |it| &it.refused),
            counter("network_dhcp_failures", "DHCP answers that could not be sent", |it| {
                &it.failed
            }),
            counter(
                "network_dhcp_unknown_clients",
                "DHCP messages of clients that no port has",
                |it| &it.ignored[Ignored::UnknownClient as usize],
            ),
            counter("network_dhcp_malformed", "DHCP messages that made no sense", |it| {
                &it.ignored[Ignored::Malformed as usize]
            }),
        ]
    }

    fn tell(&self, place: &Place, sent: io::Result<()>, answer: &super::Answer) {
        match sent {
            Ok(()) if answer.refusal => self.refused.fetch_add(1, Ordering::Relaxed),
            Ok(()) => self.answered.fetch_add(1, Ordering::Relaxed),
            Err(error) => {
                debug!(at = %place.at, port = %answer.port, %error, "cannot answer");
                self.failed.fetch_add(1, Ordering::Relaxed)
            }
        };
    }
}

impl Service for Server {
    const ACTION: &'static str = "serve DHCP";
    type Table = Table;
    type Binding = ();
    type Sockets = (UdpSocket, Socket);

    fn binding(_: &Table) {}

    fn open(place: &Place, (): &()) -> io::Result<Self::Sockets> {
        alone_on("udp", 67)?;
        let hear = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        hear.set_nonblocking(true)?;
        hear.set_reuse_address(true)?;
        hear.set_broadcast(true)?;
        hear.set_recv_buffer_size(BUFFER)?;
        hear.bind_device(Some(place.at.link.as_bytes()))?;
        hear.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 67)).into())?;
        let say = packet::frames(place.index, Receive::Nothing)?;
        Ok((UdpSocket::from_std(hear.into())?, say))
    }

    async fn run(
        self: Arc<Self>,
        place: Place,
        (hear, say): Self::Sockets,
        table: watch::Receiver<Arc<Table>>,
    ) {
        let mut pace = Pace::new(MOST_A_SECOND, BURST, Instant::now());
        let mut buffer = vec![0; LONGEST];
        loop {
            let length = match hear.recv(&mut buffer).await {
                Ok(length) => length,
                Err(error) => {
                    // The link is down or going; a pass will see to it.
                    debug!(at = %place.at, %error, "cannot receive");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let told = Arc::clone(&table.borrow());
            match answer(&told, &buffer[..length]) {
                Ok(answer) => {
                    let sent = match (answer.delivery, answer.frame(place.mac)) {
                        (Delivery::Relay(relay), _) => {
                            let relay = SocketAddrV4::new(relay, 67);
                            hear.send_to(&answer.message, relay).await.map(drop)
                        }
                        (_, Some(frame)) => say.send(&frame).map(drop),
                        (_, None) => Ok(()),
                    };
                    self.tell(&place, sent, &answer);
                }
                Err(reason) => {
                    if reason == Ignored::Declined {
                        warn!(at = %place.at, "a guest says that somebody else uses its address");
                    }
                    self.ignore(reason);
                }
            }
            if let Some(rest) = pace.take(Instant::now()) {
                tokio::time::sleep(rest).await;
            }
        }
    }
}
