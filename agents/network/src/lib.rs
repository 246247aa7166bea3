//! Stackhand's network agent: makes this host's network what the documents ask for.

pub mod admit;
pub mod agent;
pub mod checks;
pub mod desired;
pub mod firewall;
mod frame;
pub mod freshness;
pub mod l2;
pub mod l3;
pub mod names;
mod probe;
pub mod qos;
pub mod services;
pub mod settings;
pub mod takeover;
mod watch;

pub use agent::NetworkAgent;
pub use settings::NetworkSettings;
