//! Netlink sockets, network namespaces and running host programs.

pub mod error;
pub mod exec;
pub mod netfilter;
pub mod netlink;
pub mod netns;
pub mod packet;
pub mod sysctl;
pub mod tun;

pub use error::{Chain, KernelError};
pub use netns::{Netns, NetnsId};
