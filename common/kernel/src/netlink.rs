//! Route netlink: links, addresses, routes, neighbours, forwarding entries and queues of one
//! namespace.
//!
//! [`Links`] is a handle on one netlink socket. Reading gives plain values ([`Link`], [`Address`],
//! …); writing takes plain values ([`NewLink`], [`LinkChange`], …). No netlink type shows outside
//! this module. Every write that the kernel accepted is counted, so that callers can prove that
//! they changed nothing.

mod address;
mod journal;
mod link;
mod monitor;
mod neighbour;
mod route;
mod traffic;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::StreamExt;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::proto::{ConnectionHandle, new_connection};
use rtnetlink::sys::{SocketAddr, protocols::NETLINK_ROUTE};

use crate::{KernelError, Netns};

pub use address::Address;
pub use journal::{Changed, Journal};
pub use link::{
    Bridge, BridgePort, Geneve, Gre, Link, LinkChange, LinkKind, MAX_LINK_NAME, NewKind, NewLink,
    Peer, Routing, RoutingV6, Tap, Vxlan,
};
pub use monitor::{Event, Monitor};
pub use neighbour::{EntryChange, FdbEntry, FdbTable, Neighbour};
pub use route::{Hop, RouteEntry};
pub use traffic::{Queue, QueueKind, Shaper};

/// How often a list is asked for until it is whole.
const DUMPS: usize = 10;

/// Requests that are in the kernel's hands at once, at most: the answers of all must fit in the
/// socket's buffer, in which each takes less than a KiB.
const IN_FLIGHT: usize = 128;

/// Set by the kernel on a list that changed while it was written.
const NLM_F_DUMP_INTR: u16 = 0x10;

/// Counts writes that the kernel accepted. Clones share one count.
#[derive(Clone, Debug, Default)]
pub struct WriteCount(Arc<AtomicU64>);

impl WriteCount {
    /// Writes so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts one write made by other means than netlink.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Route netlink of one namespace. Clones share the socket, which closes with the last of them.
#[derive(Clone, Debug)]
pub struct Links {
    handle: ConnectionHandle<RouteNetlinkMessage>,
    writes: WriteCount,
}

/// A request that changes something, with its flags.
type Write = (RouteNetlinkMessage, u16);

impl Links {
    /// Opens a socket in the calling thread's namespace. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub fn open(writes: WriteCount) -> Result<Self, KernelError> {
        Self::connect(writes).map_err(|source| KernelError::Netlink {
            action: "open a socket",
            object: "route netlink".to_owned(),
            source,
        })
    }

    /// Opens a socket in `namespace`.
    ///
    /// # Errors
    ///
    /// Fails if the namespace does not exist, or without `CAP_SYS_ADMIN`.
    pub async fn open_in(namespace: &Netns, writes: WriteCount) -> Result<Self, KernelError> {
        namespace.inside("open a netlink socket", move || Self::connect(writes)).await
    }

    /// The same as [`Links::open`], for use on a thread that has entered a namespace.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub fn connect(writes: WriteCount) -> io::Result<Self> {
        let (mut connection, handle, _) = new_connection(NETLINK_ROUTE)?;
        connection.set_forward_ack(true);
        tokio::spawn(connection);
        Ok(Self { handle, writes })
    }

    /// The counter that this handle's writes go to.
    #[must_use]
    pub fn writes(&self) -> &WriteCount {
        &self.writes
    }

    /// Sends a request that changes something and waits for the kernel's word.
    async fn write(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut results = self.write_all(vec![(message, flags)]).await;
        results.pop().unwrap_or_else(|| Err(closed()))
    }

    /// Sends requests that change something, many in one datagram, and waits for the kernel's word
    /// on each. The kernel takes them in order; one that it refuses stops no other.
    async fn write_all(&self, writes: Vec<Write>) -> Vec<io::Result<()>> {
        let mut results = Vec::with_capacity(writes.len());
        let mut writes = writes.into_iter().peekable();
        while writes.peek().is_some() {
            let some = writes.by_ref().take(IN_FLIGHT).map(|(message, flags)| {
                let mut request = NetlinkMessage::from(message);
                request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
                request
            });
            let some: Vec<_> = some.collect();
            let whole = results.len() + some.len();
            if let Ok(mut answers) = self.handle.request_batch(some, kernel()) {
                while let Some(answer) = answers.next().await {
                    match answer.payload {
                        NetlinkPayload::Error(error) => results.push(match error.code {
                            Some(_) => Err(error.to_io()),
                            None => {
                                self.writes.add();
                                Ok(())
                            }
                        }),
                        NetlinkPayload::Overrun(_) => results.push(Err(overrun())),
                        _ => {}
                    }
                }
            }
            results.resize_with(whole, || Err(closed()));
        }
        results
    }

    /// Asks for one thing and hands every answer to `take`.
    async fn get(
        &self,
        message: RouteNetlinkMessage,
        take: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        let answered = self.read(message, NLM_F_REQUEST, take).await?.answered;
        if answered { Ok(()) } else { Err(io::ErrorKind::NotConnected.into()) }
    }

    /// Asks for everything of a kind and keeps what `take` makes of it. A list that changed while
    /// the kernel wrote it may lack entries, so it is asked for again.
    async fn dump<T>(
        &self,
        message: RouteNetlinkMessage,
        mut take: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMPS {
            let mut found = Vec::new();
            let read = self
                .read(message.clone(), NLM_F_REQUEST | NLM_F_DUMP, |answer| {
                    found.extend(take(answer));
                })
                .await?;
            if read.whole {
                return Ok(found);
            }
        }
        Err(io::Error::from_raw_os_error(nix::libc::EINTR))
    }

    async fn read(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut take: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<Read> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        let mut replies = self.handle.request(request, kernel()).map_err(|_| closed())?;
        let mut read = Read { answered: false, whole: true };
        while let Some(reply) = replies.next().await {
            read.answered = true;
            read.whole &= reply.header.flags & NLM_F_DUMP_INTR == 0;
            match reply.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Overrun(_) => return Err(overrun()),
                NetlinkPayload::InnerMessage(inner) => take(inner),
                _ => {}
            }
        }
        Ok(read)
    }
}

/// How an answer came.
struct Read {
    /// Whether there was one.
    answered: bool,
    /// Whether nothing changed while it was written.
    whole: bool,
}

/// Whether `error` says that the socket's task has ended, so that a new handle is needed.
#[must_use]
pub fn is_closed(error: &KernelError) -> bool {
    matches!(error, KernelError::Netlink { source, .. } if source.kind() == io::ErrorKind::NotConnected)
}

/// Whom requests go to.
fn kernel() -> SocketAddr {
    SocketAddr::new(0, 0)
}

fn closed() -> io::Error {
    io::ErrorKind::NotConnected.into()
}

fn overrun() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::ENOBUFS)
}
