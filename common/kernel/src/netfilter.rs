//! Netfilter's netlink: nftables and connection tracking of one namespace, without a process.
//!
//! `nft` reads all elements of a table before it changes one of them: tens of milliseconds where
//! the kernel needs microseconds. So rules are loaded by `nft`, and everything that changes often
//! is an element of a set or map, and goes by here.
//!
//! Every request that the kernel accepted as a change is counted, as for route netlink.

mod attribute;
mod conntrack;
mod listing;
mod nft;

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::sys::{AsyncSocket, SocketAddr, TokioSocket};
use tokio::sync::Mutex;

use crate::netlink::WriteCount;
use crate::{KernelError, Netns};

pub use conntrack::{Flow, FlowSide};
pub use listing::{ListedBase, ListedChain, Listing};
pub use nft::{Data, Element, Family, Judgement, NftChange, Structure, Table};

/// The netlink family of netfilter.
const NETLINK_NETFILTER: isize = 12;

/// The group that hears of changes to nftables.
const NFTABLES_GROUP: u32 = 7;

/// Room for one transaction, which must be one datagram, and for answers nobody has read yet.
const BUFFER: usize = 8 << 20;

/// What one read takes at most; the kernel writes lists in pieces of up to 32 KiB.
const PIECE: usize = 64 << 10;

/// How often a list is asked for until it is whole.
const DUMPS: usize = 10;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM_NFTABLES: u16 = 10;
const NEW_GENERATION: u16 = SUBSYSTEM_NFTABLES << 8 | 15;

/// Netfilter of one namespace. Clones share the socket, which closes with the last of them.
#[derive(Clone)]
pub struct Netfilter {
    socket: Arc<Mutex<TokioSocket>>,
    sequence: Arc<AtomicU32>,
    writes: WriteCount,
}

impl std::fmt::Debug for Netfilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Netfilter")
    }
}

/// One message to the kernel.
struct Request {
    /// Subsystem and type.
    kind: u16,
    flags: u16,
    family: u8,
    /// The subsystem of a batch's begin and end.
    resource: u16,
    attributes: Vec<u8>,
}

/// One message from the kernel.
struct Answer<'a> {
    attributes: &'a [u8],
}

impl Netfilter {
    /// Opens a socket in the calling thread's namespace. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub fn open(writes: WriteCount) -> Result<Self, KernelError> {
        Self::connect(writes).map_err(|source| refused("open a socket", "netfilter", source))
    }

    /// Opens a socket in `namespace`.
    ///
    /// # Errors
    ///
    /// Fails if the namespace does not exist, or without `CAP_SYS_ADMIN`.
    pub async fn open_in(namespace: &Netns, writes: WriteCount) -> Result<Self, KernelError> {
        namespace.inside("open a netfilter socket", move || Self::connect(writes)).await
    }

    /// The same as [`Netfilter::open`], for use on a thread that has entered a namespace.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub fn connect(writes: WriteCount) -> io::Result<Self> {
        Ok(Self {
            socket: Arc::new(Mutex::new(socket()?)),
            sequence: Arc::new(AtomicU32::new(1)),
            writes,
        })
    }

    /// The counter that this handle's writes go to.
    #[must_use]
    pub fn writes(&self) -> &WriteCount {
        &self.writes
    }

    /// Asks for everything of a kind and keeps what `take` makes of it. A list that changed while
    /// the kernel wrote it may lack entries, so it is asked for again.
    async fn dump<T>(
        &self,
        kind: u16,
        family: u8,
        attributes: &[u8],
        mut take: impl FnMut(&Answer<'_>) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMPS {
            let request = Request {
                kind,
                flags: NLM_F_REQUEST | NLM_F_DUMP,
                family,
                resource: 0,
                attributes: attributes.to_vec(),
            };
            let mut found = Vec::new();
            let whole = self.talk(&[request], |answer| found.extend(take(answer))).await?;
            if whole {
                return Ok(found);
            }
        }
        Err(io::Error::from_raw_os_error(nix::libc::EINTR))
    }

    /// Asks for one change and waits for the kernel's word.
    async fn change(&self, kind: u16, family: u8, attributes: Vec<u8>) -> io::Result<()> {
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        self.talk(&[Request { kind, flags, family, resource: 0, attributes }], |_| {}).await?;
        self.writes.add();
        Ok(())
    }

    /// Asks for changes of nftables that are made all or not at all.
    async fn transaction(&self, mut requests: Vec<Request>) -> io::Result<()> {
        let Some(last) = requests.last_mut() else { return Ok(()) };
        last.flags |= NLM_F_ACK;
        let frame = |kind| Request {
            kind,
            flags: NLM_F_REQUEST,
            family: 0,
            resource: SUBSYSTEM_NFTABLES,
            attributes: Vec::new(),
        };
        requests.insert(0, frame(BATCH_BEGIN));
        requests.push(frame(BATCH_END));
        self.talk(&requests, |_| {}).await?;
        self.writes.add();
        Ok(())
    }

    /// Sends requests in one datagram and reads until the kernel has answered the last that wants
    /// an answer, or refused one. Returns whether nothing changed while a list was written.
    async fn talk(
        &self,
        requests: &[Request],
        mut take: impl FnMut(&Answer<'_>),
    ) -> io::Result<bool> {
        let count = u32::try_from(requests.len()).unwrap_or(u32::MAX);
        let first = self.sequence.fetch_add(count, Ordering::Relaxed);
        let mut datagram = Vec::new();
        let mut last = first;
        for (request, sequence) in requests.iter().zip((0..).map(|at| first.wrapping_add(at))) {
            request.write(&mut datagram, sequence);
            if request.flags & (NLM_F_ACK | NLM_F_DUMP) != 0 {
                last = sequence;
            }
        }
        let socket = self.socket.lock().await;
        let kernel = SocketAddr::new(0, 0);
        poll_fn(|context| socket.poll_send_to(context, &datagram, &kernel)).await?;
        let mut whole = true;
        let mut piece = Vec::with_capacity(PIECE);
        loop {
            piece.clear();
            poll_fn(|context| socket.poll_recv(context, &mut piece)).await?;
            let mut rest = piece.as_slice();
            while let Some(message) = Header::take(&mut rest) {
                // What a request that was given up left behind.
                if message.sequence.wrapping_sub(first) >= count {
                    continue;
                }
                whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        let code =
                            message.body.first_chunk().map_or(0, |it| i32::from_ne_bytes(*it));
                        if code < 0 {
                            return Err(io::Error::from_raw_os_error(-code));
                        }
                        if message.sequence == last {
                            return Ok(whole);
                        }
                    }
                    _ => {
                        if let Some((_, attributes)) = message.body.split_at_checked(4) {
                            take(&Answer { attributes });
                        }
                    }
                }
            }
        }
    }
}

/// Hears of changes to nftables in one namespace.
pub struct NftMonitor(TokioSocket);

impl std::fmt::Debug for NftMonitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NftMonitor")
    }
}

impl NftMonitor {
    /// Listens in the calling thread's namespace. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub fn open() -> Result<Self, KernelError> {
        let open = || {
            let mut socket = socket()?;
            socket.socket_mut().add_membership(NFTABLES_GROUP)?;
            Ok(Self(socket))
        };
        open().map_err(|source| refused("listen", "nftables", source))
    }

    /// Returns when something of a table with one of these names, of whatever family, changed;
    /// `None` once the socket fails.
    pub async fn next_of<'n>(&mut self, names: &[&'n str]) -> Option<&'n str> {
        let mut piece = Vec::with_capacity(PIECE);
        loop {
            piece.clear();
            match poll_fn(|context| self.0.poll_recv(context, &mut piece)).await {
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {
                    return names.first().copied();
                }
                Err(_) => return None,
                Ok(_) => {}
            }
            let mut rest = piece.as_slice();
            while let Some(message) = Header::take(&mut rest) {
                // The kernel tells the end of a transaction, too, which names no table.
                if message.kind != NEW_GENERATION
                    && let Some((_, attributes)) = message.body.split_at_checked(4)
                    && let Some(table) = attribute::text(attributes, nft::TABLE)
                    && let Some(name) = names.iter().find(|name| **name == table)
                {
                    return Some(name);
                }
            }
        }
    }

    /// Returns when something changed; `None` once the socket fails. What was changed is not
    /// told: changes that were lost for want of room are changes, too.
    pub async fn next(&mut self) -> Option<()> {
        let mut piece = Vec::with_capacity(PIECE);
        match poll_fn(|context| self.0.poll_recv(context, &mut piece)).await {
            Err(error) if error.raw_os_error() != Some(nix::libc::ENOBUFS) => None,
            _ => Some(()),
        }
    }
}

fn socket() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
    // Best effort: without the privilege the kernel's bound on buffers holds.
    let _ = setsockopt(&FdOf(&socket), sockopt::SndBufForce, &BUFFER);
    let _ = setsockopt(&FdOf(&socket), sockopt::RcvBufForce, &BUFFER);
    Ok(socket)
}

/// The socket as what `setsockopt` takes.
struct FdOf<'a>(&'a TokioSocket);

impl std::os::fd::AsFd for FdOf<'_> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.socket_ref().as_fd()
    }
}

impl Request {
    fn write(&self, datagram: &mut Vec<u8>, sequence: u32) {
        let length = 20 + self.attributes.len();
        datagram.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        datagram.extend(self.kind.to_ne_bytes());
        datagram.extend(self.flags.to_ne_bytes());
        datagram.extend(sequence.to_ne_bytes());
        datagram.extend([0; 4]);
        datagram.extend([self.family, 0]);
        datagram.extend(self.resource.to_be_bytes());
        datagram.extend(&self.attributes);
        datagram.resize(datagram.len().next_multiple_of(4), 0);
    }
}

/// A message as it lies in what was read.
struct Header<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

impl<'a> Header<'a> {
    /// Takes the next message off `rest`; `None` at the end, also of what makes no sense.
    fn take(rest: &mut &'a [u8]) -> Option<Self> {
        let head: &[u8; 16] = rest.first_chunk()?;
        let [a, b, c, d, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *head;
        let length = usize::try_from(u32::from_ne_bytes([a, b, c, d])).ok()?;
        let body = rest.get(16..length)?;
        *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Self {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            body,
        })
    }
}

fn refused(action: &'static str, object: impl Into<String>, source: io::Error) -> KernelError {
    KernelError::Netlink { action, object: object.into(), source }
}
