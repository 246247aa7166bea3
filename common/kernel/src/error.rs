//! Why the kernel did not do what was asked, with the object's name.

use std::io;

/// A kernel operation that did not work.
///
/// Each variant says what was being done to which object; the cause stays in `source`. There is
/// no `From<io::Error>` on purpose: a bare `?` would lose the object's name.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A netlink request was refused, or its answer made no sense.
    #[error("cannot {action} on {object}")]
    Netlink {
        /// What was being done.
        action: &'static str,
        /// To which link, address or entry.
        object: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },

    /// A link that an operation needs is not there.
    #[error("link {link} does not exist")]
    NoSuchLink {
        /// Its name.
        link: String,
    },

    /// A namespace could not be entered, made or removed, or work inside it failed.
    #[error("cannot {action} in namespace {namespace}")]
    Namespace {
        /// What was being done.
        action: &'static str,
        /// Name or path of the namespace.
        namespace: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },

    /// A file under `/proc/sys` could not be read or written.
    #[error("cannot {action} sysctl {key}")]
    Sysctl {
        /// Read or write.
        action: &'static str,
        /// Path below `/proc/sys`.
        key: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },

    /// A name that the kernel would refuse or take for something else.
    #[error("{name:?} is not a {what}")]
    BadName {
        /// The name.
        name: String,
        /// What it should have been.
        what: &'static str,
    },
}

impl KernelError {
    /// The kernel's error number, where it gave one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::NoSuchLink { .. } => Some(nix::libc::ENODEV),
            Self::BadName { .. } => Some(nix::libc::EINVAL),
            Self::Netlink { source, .. }
            | Self::Namespace { source, .. }
            | Self::Sysctl { source, .. } => source.raw_os_error(),
        }
    }

    /// Whether the object was not there.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        use nix::libc::{EADDRNOTAVAIL, ENODEV, ENOENT, ESRCH};
        matches!(self.errno(), Some(ENODEV | ENOENT | ESRCH | EADDRNOTAVAIL))
    }

    /// Whether the object was there already.
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.errno() == Some(nix::libc::EEXIST)
    }

    /// Whether waiting and trying again can help without anybody's attention.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        use nix::libc::{EAGAIN, EBUSY, EINTR, ENOBUFS, ENOMEM};
        matches!(self, Self::NoSuchLink { .. })
            || matches!(self.errno(), Some(EAGAIN | EBUSY | EINTR | ENOBUFS | ENOMEM))
    }
}

/// Prints an error and all its causes on one line: `outer: middle: root`.
#[derive(Debug)]
pub struct Chain<'a>(pub &'a (dyn std::error::Error + 'static));

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut next = self.0.source();
        while let Some(cause) = next {
            write!(f, ": {cause}")?;
            next = cause.source();
        }
        Ok(())
    }
}
