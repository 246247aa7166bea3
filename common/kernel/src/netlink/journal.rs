//! Which parts of a namespace changed since they were looked at.
//!
//! The kernel tells a listening socket of a change before it answers whoever asked for the change.
//! So what lies in the socket when it is read are all changes so far, one's own among them: who
//! keeps what was seen need only look again at what the journal names. A journal that overflowed
//! says that everything is to be looked at.

use std::collections::BTreeSet;
use std::io;

use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};

use crate::KernelError;

/// Room for changes between two looks, in bytes.
const BUFFER: usize = 2 << 20;

/// What one read takes at most.
const PIECE: usize = 64 << 10;

// Groups: links, neighbours, queues, addresses of both families, IPv6's sysctls, and those of
// routing.
const GROUPS: [u32; 8] = [1, 3, 4, 5, 9, 12, 24, 25];

const NEW_LINK: u16 = 16;
const DEL_LINK: u16 = 17;
const NEW_ADDRESS: u16 = 20;
const DEL_ADDRESS: u16 = 21;
const NEW_NEIGHBOUR: u16 = 28;
const DEL_NEIGHBOUR: u16 = 29;
const NEW_QUEUE: u16 = 36;
const DEL_FILTER: u16 = 45;
const NEW_CONF: u16 = 80;
const DEL_CONF: u16 = 81;

/// In an entry's state: it stays until somebody takes it away.
const SET_BY_SOMEBODY: u16 = 0x40 | 0x80;

const FAMILY_BRIDGE: u8 = 7;

/// What changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Anything may have: the journal overflowed.
    pub all: bool,
    /// Numbers of links that appeared, changed or went.
    pub links: BTreeSet<u32>,
    /// Some link got or lost an address.
    pub addresses: bool,
    /// A forwarding entry that somebody set appeared, changed or went.
    pub forwarding: bool,
    /// A neighbour that somebody set, or may have set, appeared, changed or went.
    pub neighbours: bool,
    /// A queue or filter appeared, changed or went.
    pub queues: bool,
}

/// The journal of one namespace, kept by the kernel from the moment it is opened on.
pub struct Journal(Socket);

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Journal")
    }
}

impl Journal {
    /// Opens one for the calling thread's namespace.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub fn open() -> Result<Self, KernelError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            socket.set_non_blocking(true)?;
            // Best effort: with a small buffer it overflows sooner, and says so.
            drop(socket.set_rx_buf_sz(BUFFER));
            for group in GROUPS {
                socket.add_membership(group)?;
            }
            Ok(Self(socket))
        };
        open().map_err(|source| KernelError::Netlink {
            action: "keep a journal",
            object: "route netlink".to_owned(),
            source,
        })
    }

    /// What changed since the last call.
    #[must_use]
    pub fn read(&self) -> Changed {
        let mut changed = Changed::default();
        let mut piece = Vec::with_capacity(PIECE);
        loop {
            piece.clear();
            match self.0.recv(&mut piece, 0) {
                Ok(_) => changed.take(&piece),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return changed,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Full, or broken: then every look finds it so.
                Err(error) => {
                    changed.all = true;
                    if error.raw_os_error() != Some(nix::libc::ENOBUFS) {
                        return changed;
                    }
                }
            }
        }
    }
}

impl Changed {
    /// Whether nothing did.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// Reads what the kernel told: messages of length, kind, flags, sequence and port, each followed
    /// by what its kind says.
    fn take(&mut self, mut rest: &[u8]) {
        while let Some(head) = rest.first_chunk::<16>() {
            let [a, b, c, d, e, f, ..] = *head;
            let length = u32::from_ne_bytes([a, b, c, d]);
            let body = usize::try_from(length).ok().and_then(|length| rest.get(16..length));
            let Some(body) = body else {
                self.all = true;
                return;
            };
            self.message(u16::from_ne_bytes([e, f]), body);
            rest = rest.get((16 + body.len()).next_multiple_of(4)..).unwrap_or_default();
        }
    }

    fn message(&mut self, kind: u16, body: &[u8]) {
        let number = |at: usize| {
            body.get(at..).and_then(<[u8]>::first_chunk).map(|bytes| u32::from_ne_bytes(*bytes))
        };
        match kind {
            NEW_LINK | DEL_LINK => match number(4) {
                Some(link) => drop(self.links.insert(link)),
                None => self.all = true,
            },
            // Behind the family comes the link's number as the first attribute. Numbers below zero
            // are those of defaults.
            NEW_CONF | DEL_CONF => match number(8).map(u32::cast_signed) {
                Some(link) if link > 0 => drop(self.links.insert(link.cast_unsigned())),
                Some(_) => {}
                None => self.all = true,
            },
            NEW_ADDRESS | DEL_ADDRESS => self.addresses = true,
            NEW_NEIGHBOUR | DEL_NEIGHBOUR => {
                let state = body.get(8..).and_then(<[u8]>::first_chunk);
                let set = state.is_none_or(|it| u16::from_ne_bytes(*it) & SET_BY_SOMEBODY != 0);
                if body.first() == Some(&FAMILY_BRIDGE) {
                    self.forwarding |= set;
                } else {
                    // Of one that goes the kernel does not say who set it.
                    self.neighbours |= set || kind == DEL_NEIGHBOUR;
                }
            }
            // The link's own description names its queue.
            NEW_QUEUE..=DEL_FILTER => {
                self.queues = true;
                self.links.extend(number(4));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Changed;

    #[test]
    fn a_message_that_is_cut_off_means_that_anything_may_have_changed() {
        let mut changed = Changed::default();
        changed.take(&[40, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert!(changed.all);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_an_end(bytes in prop::collection::vec(any::<u8>(), 0..90)) {
            Changed::default().take(&bytes);
        }
    }
}
