//! TAP devices, which netlink can describe but not make.
//!
//! A tap is made by an ioctl and goes away with its file descriptor until it is told to persist.
//! [`NewTap::open`] gives it in that first state, so that the caller can mark it before
//! [`NewTap::persist`]: after a crash between the two nothing is left behind.
#![expect(unsafe_code, reason = "TUNSETIFF and its kin are ioctls")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::libc;

use crate::KernelError;

const IFF_TAP: libc::c_short = 0x0002;
const IFF_MULTI_QUEUE: libc::c_short = 0x0100;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;

nix::ioctl_write_ptr_bad!(
    /// Attaches to a tap, making it if need be.
    tunsetiff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);
nix::ioctl_write_int_bad!(
    /// Keeps the tap when its file is closed.
    tunsetpersist,
    nix::request_code_write!(b'T', 203, size_of::<libc::c_int>())
);
nix::ioctl_write_int_bad!(
    /// Lets one user attach to the tap.
    tunsetowner,
    nix::request_code_write!(b'T', 204, size_of::<libc::c_int>())
);
nix::ioctl_write_int_bad!(
    /// Lets one group attach to the tap.
    tunsetgroup,
    nix::request_code_write!(b'T', 206, size_of::<libc::c_int>())
);

/// A tap that lasts as long as this value, until told to persist. Frames read and written go
/// through the file, each with no header before it unless asked for.
#[derive(Debug)]
pub struct NewTap {
    name: String,
    file: File,
}

/// Whether frames on a tap's file have a virtio header before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtioHeader {
    /// As a hypervisor wants it.
    With,
    /// As a program that reads frames wants it.
    Without,
}

impl NewTap {
    /// Makes the tap `name` in the calling thread's namespace, or attaches to it if it exists and
    /// nobody else has.
    ///
    /// # Errors
    ///
    /// Fails without `CAP_NET_ADMIN`, without `/dev/net/tun`, or if a link of another kind has
    /// the name.
    pub fn open(name: &str, multi_queue: bool, header: VirtioHeader) -> Result<Self, KernelError> {
        let fail = |source| KernelError::Netlink {
            action: "create tap",
            object: format!("link {name}"),
            source,
        };
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '%', ' ', '\0']) {
            return Err(KernelError::BadName { name: name.to_owned(), what: "link name" });
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(fail)?;
        let mut flags = IFF_TAP | IFF_NO_PI;
        if header == VirtioHeader::With {
            flags |= IFF_VNET_HDR;
        }
        if multi_queue {
            flags |= IFF_MULTI_QUEUE;
        }
        // SAFETY: all zeroes is a valid `ifreq`: integers, arrays of them and null pointers.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = flags;
        // SAFETY: the descriptor is open and `request` is a valid `ifreq` for the whole call.
        unsafe { tunsetiff(file.as_raw_fd(), &raw const request) }
            .map_err(|errno| fail(errno.into()))?;
        Ok(Self { name: name.to_owned(), file })
    }

    /// Lets only this user and group attach to it, besides holders of `CAP_NET_ADMIN`.
    ///
    /// Without an owner any user of the host may attach to a tap that persists.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub fn own(&self, user: Option<u32>, group: Option<u32>) -> Result<(), KernelError> {
        if let Some(user) = user {
            // SAFETY: the descriptor is open; the argument is a plain number.
            unsafe { tunsetowner(self.file.as_raw_fd(), user.cast_signed()) }
                .map_err(|errno| self.error("set the owner", errno.into()))?;
        }
        if let Some(group) = group {
            // SAFETY: the descriptor is open; the argument is a plain number.
            unsafe { tunsetgroup(self.file.as_raw_fd(), group.cast_signed()) }
                .map_err(|errno| self.error("set the group", errno.into()))?;
        }
        Ok(())
    }

    /// Keeps the tap after this value is gone.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub fn persist(self) -> Result<(), KernelError> {
        // SAFETY: the descriptor is open; the argument is a plain number.
        unsafe { tunsetpersist(self.file.as_raw_fd(), 1) }
            .map_err(|errno| self.error("make it persist", errno.into()))?;
        Ok(())
    }

    /// The file that frames are read from and written to; non-blocking.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.file.into()
    }

    fn error(&self, action: &'static str, source: io::Error) -> KernelError {
        KernelError::Netlink { action, object: format!("link {}", self.name), source }
    }
}
