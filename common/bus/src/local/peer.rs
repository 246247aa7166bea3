//! Who is at the other end of a Unix socket, and whether they may ask.
//!
//! The kernel recorded user and groups when the peer connected (`SO_PEERCRED`,
//! `SO_PEERGROUPS`). Looking the process up in `/proc` instead would judge whoever has that
//! process id now.

#![expect(unsafe_code, reason = "SO_PEERGROUPS has no safe wrapper yet")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::libc;
use nix::unistd::{Gid, Group, geteuid};
use tokio::net::UnixStream;

use crate::Origin;

/// A peer as the kernel knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) pid: i32,
    groups: Vec<u32>,
}

impl Peer {
    pub(super) fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        Ok(Self {
            uid: credentials.uid(),
            gid: credentials.gid(),
            pid: credentials.pid().unwrap_or(0),
            groups: supplementary_groups(stream)?,
        })
    }

    /// Root, the server's own user, and members of `group` may ask.
    pub(super) fn may_ask(&self, group: Option<Gid>) -> bool {
        self.uid == 0
            || self.uid == geteuid().as_raw()
            || group.is_some_and(|group| {
                self.gid == group.as_raw() || self.groups.contains(&group.as_raw())
            })
    }

    pub(super) fn origin(&self) -> Origin {
        Origin::Local { uid: self.uid, gid: self.gid, pid: self.pid }
    }
}

/// The id of a group of this host, if there is such a group.
pub(super) fn group_id(name: &str) -> Option<Gid> {
    match Group::from_name(name) {
        Ok(group) => group.map(|group| group.gid),
        Err(error) => {
            tracing::warn!(group = name, %error, "cannot look up the group");
            None
        }
    }
}

fn supplementary_groups(stream: &UnixStream) -> io::Result<Vec<u32>> {
    // The kernel knows at most NGROUPS_MAX; almost everybody has few.
    let mut groups = vec![0_u32; 64];
    loop {
        let capacity = groups.len() * size_of::<u32>();
        let mut length = libc::socklen_t::try_from(capacity)
            .map_err(|_| io::Error::other("a peer in too many groups"))?;
        // SAFETY: the descriptor is open for as long as `stream` is borrowed; the buffer is
        // writable for `length` bytes and `gid_t` is `u32`.
        let outcome = unsafe {
            libc::getsockopt(
                stream.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let needed = usize::try_from(length).unwrap_or(0) / size_of::<u32>();
        if outcome == 0 {
            groups.truncate(needed);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || needed <= groups.len() {
            return Err(error);
        }
        groups.resize(needed, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_kernel_names_this_process_and_its_groups() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        assert_eq!(peer.uid, geteuid().as_raw());
        assert_eq!(peer.pid, i32::try_from(std::process::id()).unwrap());
        let mut groups: Vec<u32> =
            nix::unistd::getgroups().unwrap().into_iter().map(Gid::as_raw).collect();
        groups.sort_unstable();
        let mut seen = peer.groups;
        seen.sort_unstable();
        assert_eq!(seen, groups);
    }

    #[test]
    fn a_stranger_may_ask_only_as_a_member_of_the_group() {
        let group = Some(Gid::from_raw(777));
        let stranger = Peer { uid: 65_533, gid: 65_533, pid: 1, groups: vec![5, 6] };
        assert!(!stranger.may_ask(group));
        assert!(!stranger.may_ask(None));
        assert!(Peer { gid: 777, ..stranger.clone() }.may_ask(group));
        assert!(Peer { groups: vec![5, 777], ..stranger }.may_ask(group));
        assert!(Peer { uid: 0, ..stranger }.may_ask(None));
    }
}
