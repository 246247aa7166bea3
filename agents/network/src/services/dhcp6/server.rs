//! The servers: one packet socket and one task per network.
//!
//! Frames are read as they are, because it is the sender's Ethernet address that tells who it is;
//! answers go back to it without asking who has the address. The kernel hands on only what is for
//! the server's port.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};
use stackhand_kernel::packet::{self, Receive};
use stackhand_runtime::metrics::Reading;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::answer::{Ignored, answer};
use super::table::Table;
use super::wire::{Datagram, datagram};
use crate::frame::{Ends, udp6};
use crate::services::dhcp::{BUFFER, BURST, MOST_A_SECOND};
use crate::services::fleet::{Place, Service, alone_on, counter};
use crate::services::pace::Pace;

/// Where clients and relays send to.
const ALL_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
const SERVER: u16 = 547;
const CLIENT: u16 = 546;

/// The longest frame that is read. Longer ones are cut off, and then malformed.
const LONGEST: usize = 2048;

/// The DHCPv6 servers, and what they did since the agent started.
#[derive(Debug, Default)]
pub struct Server {
    answered: AtomicU64,
    failed: AtomicU64,
    declined: AtomicU64,
    ignored: [AtomicU64; Ignored::ALL.len()],
}

impl Server {
    pub(in crate::services) fn facts(&self, networks: usize) -> Value {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let ignored: BTreeMap<&str, u64> = Ignored::ALL
            .into_iter()
            .map(|reason| (reason.as_str(), read(&self.ignored[reason as usize])))
            .collect();
        json!({
            "networks": networks,
            "answered": read(&self.answered),
            "failed": read(&self.failed),
            "declined": read(&self.declined),
            "ignored": ignored,
        })
    }

    pub(in crate::services) fn readings(shared: &Arc<Self>) -> Vec<Reading> {
        let counter = |name, help, read| counter(shared, name, help, read);
        vec![
            counter("network_dhcp6_answers", "DHCPv6 messages answered", |it| &it.answered),
            counter("network_dhcp6_failures", "DHCPv6 answers that could not be sent", |it| {
                &it.failed
            }),
            counter(
                "network_dhcp6_unknown_clients",
                "DHCPv6 messages of clients that no port has",
                |it| &it.ignored[Ignored::UnknownClient as usize],
            ),
            counter("network_dhcp6_malformed", "DHCPv6 messages that made no sense", |it| {
                &it.ignored[Ignored::Malformed as usize]
            }),
        ]
    }

    /// Answers a message, if it gets an answer.
    fn hear(&self, place: &Place, socket: &UdpSocket, table: &Table, heard: Datagram<'_>) {
        let add = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        let (mac, address, _) = heard.from;
        let (to, own) = heard.to;
        // A bridge that does not know where somebody is brings it here, too.
        if to.0[0] & 1 == 0 && to != place.mac {
            return;
        }
        let answer = match answer(table, mac, heard.message) {
            Ok(answer) => answer,
            Err(reason) => {
                add(&self.ignored[reason as usize]);
                return;
            }
        };
        if answer.declined {
            warn!(at = %place.at, "a guest says that somebody else uses its address");
            add(&self.declined);
        }
        let own = if own.is_multicast() { place.mac.link_local() } else { own };
        let port = if answer.by_relay { SERVER } else { CLIENT };
        let ends = Ends { from: (place.mac, own, SERVER), to: (mac, address, port) };
        match SockRef::from(socket).send(&udp6(ends, &answer.message)) {
            Ok(_) => add(&self.answered),
            Err(error) => {
                debug!(at = %place.at, port = %answer.port, %error, "cannot answer");
                add(&self.failed)
            }
        };
    }
}

/// The sockets of one network's server.
#[derive(Debug)]
pub(crate) struct Sockets {
    /// Of whole frames. tokio knows no such kind; to it, it is a datagram socket like another.
    frames: UdpSocket,
    /// Hears nothing: switches between here and the guests are told by it who listens.
    _member: Socket,
}

impl Service for Server {
    const ACTION: &'static str = "serve DHCPv6";
    type Table = Table;
    type Binding = ();
    type Sockets = Sockets;

    fn binding(_: &Table) {}

    fn open(place: &Place, (): &()) -> io::Result<Self::Sockets> {
        alone_on("udp6", 547)?;
        let frames = packet::frames(place.index, Receive::EtherType(0x86dd))?;
        frames.attach_filter(&FOR_SERVERS)?;
        frames.set_recv_buffer_size(BUFFER)?;
        let member = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
        member.join_multicast_v6(&ALL_SERVERS, place.index)?;
        Ok(Sockets { frames: UdpSocket::from_std(frames.into())?, _member: member })
    }

    async fn run(
        self: Arc<Self>,
        place: Place,
        sockets: Self::Sockets,
        table: watch::Receiver<Arc<Table>>,
    ) {
        let mut pace = Pace::new(MOST_A_SECOND, BURST, Instant::now());
        let mut buffer = vec![0; LONGEST];
        loop {
            let length = match sockets.frames.recv(&mut buffer).await {
                Ok(length) => length,
                Err(error) => {
                    // The link is down or going; a pass will see to it.
                    debug!(at = %place.at, %error, "cannot receive");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let told = Arc::clone(&table.borrow());
            match datagram(&buffer[..length]) {
                Some(heard) => self.hear(&place, &sockets.frames, &told, heard),
                None => {
                    self.ignored[Ignored::Malformed as usize].fetch_add(1, Ordering::Relaxed);
                }
            }
            if let Some(rest) = pace.take(Instant::now()) {
                tokio::time::sleep(rest).await;
            }
        }
    }
}

/// Frames of UDP over IPv6 to port 547, in the kernel's filter language: load a byte or half a word
/// of the frame, compare, go on or give up.
const FOR_SERVERS: [SockFilter; 6] = {
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_HALF: u16 = 0x28;
    const IS_EQUAL: u16 = 0x15;
    const TAKE: u16 = 0x06;
    const NEXT_HEADER: u32 = 14 + 6;
    const DESTINATION_PORT: u32 = 14 + 40 + 2;
    [
        SockFilter::new(LOAD_BYTE, 0, 0, NEXT_HEADER),
        SockFilter::new(IS_EQUAL, 0, 3, 17),
        SockFilter::new(LOAD_HALF, 0, 0, DESTINATION_PORT),
        SockFilter::new(IS_EQUAL, 0, 1, SERVER as u32),
        SockFilter::new(TAKE, 0, 0, u32::MAX),
        SockFilter::new(TAKE, 0, 0, 0),
    ]
};
