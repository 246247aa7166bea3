//! Router advertisements: how guests on a router's links get IPv6 addresses and settings.
//!
//! ```text
//! documents ──> Advert ──> bytes (pure) ──> everybody on the link, now and then; who asks, at once
//! ```
//!
//! A guest that sends a solicitation gets its answer alone, so that one guest's storm is no
//! multicast for all. Nothing is said when a server stops: the router forwards on without us, and
//! its guests keep it.

mod advert;
mod server;
#[cfg(test)]
mod tests;

pub use advert::{Advert, Prefix, is_solicitation};
pub use server::Server;
