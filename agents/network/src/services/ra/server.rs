//! The servers: one raw socket for each of a router's links.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use stackhand_runtime::metrics::Reading;
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::debug;

use super::advert::{Advert, is_solicitation};
use crate::services::fleet::{Place, Service, counter};
use crate::services::pace::Pace;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

/// How often everybody is told.
const INTERVAL: Duration = Duration::from_secs(60);
/// The same while the link is new.
const FIRST_INTERVAL: Duration = Duration::from_secs(4);
/// How often everybody is told while the link is new.
const FIRST_ADVERTS: u32 = 3;
/// Messages a second that one link reads.
const MOST_A_SECOND: u32 = 200;
const BURST: u32 = 50;
const BUFFER: usize = 64 << 10;

/// The servers, and what they did since the agent started.
#[derive(Debug, Default)]
pub struct Server {
    sent: AtomicU64,
    solicited: AtomicU64,
    ignored: AtomicU64,
}

impl Server {
    pub(in crate::services) fn facts(&self, links: usize) -> Value {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "links": links,
            "sent": read(&self.sent),
            "solicited": read(&self.solicited),
            "ignored": read(&self.ignored),
        })
    }

    pub(in crate::services) fn readings(shared: &Arc<Self>) -> Vec<Reading> {
        let help = "Router advertisements sent";
        vec![counter(shared, "network_router_advertisements", help, |it| &it.sent)]
    }

    fn say(&self, place: &Place, socket: &UdpSocket, advert: &Advert, to: Ipv6Addr) -> bool {
        let to = SocketAddrV6::new(to, 0, 0, place.index);
        match SockRef::from(socket).send_to(&advert.bytes(place.mac), &to.into()) {
            Ok(_) => {
                self.sent.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(error) => {
                // The link has no address of its own yet.
                debug!(at = %place.at, %error, "cannot advertise");
                false
            }
        }
    }
}

impl Service for Server {
    const ACTION: &'static str = "advertise a router";
    type Table = Advert;
    type Binding = ();
    /// Of raw ICMPv6. tokio knows no such kind; to it, it is a datagram socket like another.
    type Sockets = UdpSocket;

    fn binding(_: &Advert) {}

    fn open(place: &Place, (): &()) -> io::Result<Self::Sockets> {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
        socket.set_nonblocking(true)?;
        socket.set_recv_buffer_size(BUFFER)?;
        socket.bind_device(Some(place.at.link.as_bytes()))?;
        socket.join_multicast_v6(&ALL_ROUTERS, place.index)?;
        socket.set_multicast_if_v6(place.index)?;
        socket.set_multicast_loop_v6(false)?;
        socket.set_multicast_hops_v6(255)?;
        socket.set_unicast_hops_v6(255)?;
        // What was forwarded on its way here has lost at least one hop.
        socket.set_recv_hoplimit_v6(true)?;
        UdpSocket::from_std(socket.into())
    }

    async fn run(
        self: Arc<Self>,
        place: Place,
        socket: Self::Sockets,
        mut advert: watch::Receiver<Arc<Advert>>,
    ) {
        let mut pace = Pace::new(MOST_A_SECOND, BURST, Instant::now());
        let mut told = 0;
        let mut next = Instant::now();
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(next) => {
                    let now = Arc::clone(&advert.borrow_and_update());
                    told += u32::from(self.say(&place, &socket, &now, ALL_NODES));
                    let interval = if told < FIRST_ADVERTS { FIRST_INTERVAL } else { INTERVAL };
                    next = Instant::now() + interval;
                }
                // What changed is told at once.
                Ok(()) = advert.changed() => next = Instant::now(),
                ready = socket.readable() => {
                    let Ok(()) = ready else { return };
                    let heard = socket.try_io(Interest::READABLE, || hear(&socket));
                    if let Ok(Some(source)) = heard {
                        self.solicited.fetch_add(1, Ordering::Relaxed);
                        let now = Arc::clone(&advert.borrow());
                        let to = if source.is_unspecified() { ALL_NODES } else { source };
                        self.say(&place, &socket, &now, to);
                    } else if matches!(heard, Ok(None)) {
                        self.ignored.fetch_add(1, Ordering::Relaxed);
                    }
                    if let Some(rest) = pace.take(Instant::now()) {
                        tokio::time::sleep(rest).await;
                    }
                }
            }
        }
    }
}

/// Reads one message; the sender if it is a solicitation.
fn hear(socket: &UdpSocket) -> io::Result<Option<Ipv6Addr>> {
    let mut bytes = [0; 512];
    let mut parts = [io::IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!(i32);
    let fd = socket.as_raw_fd();
    let message = recvmsg::<SockaddrIn6>(fd, &mut parts, Some(&mut space), MsgFlags::empty())?;
    let limits = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv6HopLimit(limit) => u8::try_from(limit).ok(),
        _ => None,
    });
    let source = message.address.map(|address| address.ip());
    let length = message.bytes;
    let heard = source.zip(limits);
    Ok(heard.and_then(|(source, limit)| {
        is_solicitation(&bytes[..length], source, limit).then_some(source)
    }))
}
