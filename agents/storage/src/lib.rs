//! The storage agent: volumes, snapshots and their attachments on this host.
//!
//! ```text
//! documents ── desired ──────────┐
//!                                ├─> plan (pure) ──> steps ──> backends, exports
//! backends, exports ── observe ──┘                     └─────> works (background) ──> backends
//! ```

pub mod agent;
pub mod attach;
pub mod backend;
pub mod checks;
pub mod config;
pub mod desired;
pub mod export;
pub mod plan;
pub mod works;

#[cfg(test)]
mod testing;
