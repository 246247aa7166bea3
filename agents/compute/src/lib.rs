//! The compute agent: instances of this host, on libvirt.
//!
//! ```text
//! documents ── desired ───────────────────┐
//!                                         ├─> plan (pure) ──> steps ──> libvirt, files
//! domains, cache, files, taps ── observe ─┘                     └─────> fetches (background)
//! ```

pub mod agent;
pub mod checks;
pub mod config;
pub mod config_drive;
pub mod desired;
pub mod domain;
pub mod hypervisor;
pub mod initiator;
pub mod libvirt;
pub mod meter;
pub mod plan;
pub mod store;
pub mod usage;

pub(crate) use stackhand_image::files;
pub(crate) use stackhand_image::files::blocking;
pub use stackhand_runtime::chain;
