//! DHCPv4 for the ports of this host's networks: one process, one socket per network.
//!
//! ```text
//! documents ──> Table (who gets what) ──watch──> server task of the network
//! guest ──UDP 67 in qdhcp-<network>──> answer (pure) ──raw frame──> guest
//! ```
//!
//! Leases are static: a port's addresses are in its document, so there is nothing to remember and
//! a restart loses nothing. A client that no document knows gets no answer. Guests are hostile:
//! [`answer()`] takes any bytes and never panics, and each server drops what comes faster than it
//! is willing to read, so that one network's storm is its own.

mod answer;
mod server;
mod table;
#[cfg(test)]
mod tests;
mod wire;

pub use answer::{Answer, Delivery, Ignored, answer};
pub use server::Server;
pub(super) use server::{BUFFER, BURST, MOST_A_SECOND};
pub use table::{Client, Extra, Scope, Table, extra, routes};
