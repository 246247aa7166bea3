//! Netlink sockets, network namespaces and running host programs.

pub mod error;
pub mod exec;

pub use error::{Chain, KernelError};
