//! The storage agent: volumes, snapshots and their attachments on this host.
//!
//! ```text
//! documents ── desired ──┐
//!                        ├─> plan (pure) ──> steps ──> backend
//! backends ── observe ───┘                     └─────> copies (background) ──> backend
//! ```

pub mod agent;
pub mod backend;
pub mod checks;
pub mod config;
pub mod copies;
pub mod desired;
pub mod plan;

#[cfg(test)]
mod testing;

/// An error with its causes, on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
