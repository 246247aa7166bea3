//! Route netlink: links, addresses, routes, neighbours and forwarding entries of one namespace.
//!
//! [`Links`] is a handle on one netlink socket. Reading gives plain values ([`Link`], [`Address`],
//! …); writing takes plain values ([`NewLink`], [`LinkChange`], …). No netlink type shows outside
//! this module. Every write that the kernel accepted is counted, so that callers can prove that
//! they changed nothing.

mod address;
mod link;
mod monitor;
mod neighbour;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::StreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;

use crate::{KernelError, Netns};

pub use address::{Address, RouteEntry};
pub use link::{
    Bridge, BridgePort, Link, LinkChange, LinkKind, MAX_LINK_NAME, NewKind, NewLink, Peer, Tap,
    Vxlan,
};
pub use monitor::{Event, Monitor};
pub use neighbour::{FdbEntry, FdbTable, Neighbour};

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
    handle: Handle,
    writes: WriteCount,
}

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
        let (connection, handle, _) = rtnetlink::new_connection()?;
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
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut handle = self.handle.clone();
        let mut replies = handle.request(request).map_err(closed)?;
        while let Some(reply) = replies.next().await {
            match reply.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Overrun(_) => return Err(overrun()),
                _ => {}
            }
        }
        self.writes.add();
        Ok(())
    }

    /// Sends a request that reads, and hands every answer to `take`.
    async fn read(
        &self,
        message: RouteNetlinkMessage,
        dump: bool,
        mut take: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | if dump { NLM_F_DUMP } else { 0 };
        let mut handle = self.handle.clone();
        let mut replies = handle.request(request).map_err(closed)?;
        let mut answered = false;
        while let Some(reply) = replies.next().await {
            answered = true;
            match reply.payload {
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::Overrun(_) => return Err(overrun()),
                NetlinkPayload::InnerMessage(inner) => take(inner),
                _ => {}
            }
        }
        // A dump that is empty ends with a word of its own that is not forwarded.
        if !answered && !dump {
            return Err(io::ErrorKind::NotConnected.into());
        }
        Ok(())
    }
}

/// Whether `error` says that the socket's task has ended, so that a new handle is needed.
#[must_use]
pub fn is_closed(error: &KernelError) -> bool {
    matches!(error, KernelError::Netlink { source, .. } if source.kind() == io::ErrorKind::NotConnected)
}

fn closed(_: rtnetlink::Error) -> io::Error {
    io::ErrorKind::NotConnected.into()
}

fn overrun() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::ENOBUFS)
}
