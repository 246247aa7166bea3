//! What every agent shares: config, telemetry, ledger, reconcile loop, own API, lifecycle.

pub mod agent;
pub mod api;
pub mod client;
pub mod config;
pub mod events;
pub mod health;
pub mod heartbeat;
pub mod http;
pub mod ledger;
pub mod lifecycle;
mod memory;
pub mod metrics;
pub mod preflight;
pub mod reconcile;
pub mod report;
pub mod run;
pub mod service;
pub mod status;
pub mod systemd;
pub mod telemetry;
#[cfg(test)]
pub(crate) mod testing;
pub mod wake;

pub use run::{AgentContext, Program, StartError};

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
