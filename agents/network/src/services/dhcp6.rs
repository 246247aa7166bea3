//! DHCPv6 for the ports of this host's networks: settings for guests that make themselves addresses
//! (stateless), and addresses for those that are given them (stateful).
//!
//! ```text
//! documents ──> Table (who gets what) ──watch──> server task of the network
//! guest ──frame to UDP 547 on the link in qdhcp-<network>──> answer (pure) ──frame──> guest
//! ```
//!
//! As with [`super::dhcp`], leases are static and nothing is remembered. A client is known by the
//! Ethernet address that its frames come from, since neither its link-local address nor its DUID
//! need tell it; what comes by a relay is known by what the relay says of it.

mod answer;
mod server;
mod table;
#[cfg(test)]
mod tests;
mod wire;

pub use answer::{Answer, Ignored, answer};
pub use server::Server;
pub use table::{Client, Table, extra};
