//! DNS for guests: the names of a network's ports, and everything else by forwarding.
//!
//! ```text
//! documents ──> Zone (names and addresses) ──> answer (pure) ──> guest
//!                                                └─ not ours ──> forward ──> the host's servers
//! ```
//!
//! A query is bytes from a hostile guest: it is parsed by hickory-proto, and one that makes no sense
//! is refused or dropped. What is forwarded goes on as it came, under a number and from a port of
//! our own, so that nobody who cannot see the query can answer it.

mod answer;
mod forward;
mod server;
#[cfg(test)]
mod tests;
mod zone;

pub use answer::{Decision, Transport, decide};
pub use server::Server;
pub use zone::{Zone, host_name_of};
