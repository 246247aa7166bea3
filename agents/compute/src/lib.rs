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
pub mod desired;
pub mod domain;
pub mod fetches;
pub mod files;
pub mod hypervisor;
pub mod image;
pub mod libvirt;
pub mod plan;
pub mod store;

/// Bytes as lower-case hex digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ok = write!(text, "{byte:02x}");
        text
    })
}

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

/// Runs file work on a thread that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, files::FileError> + Send + 'static,
) -> Result<T, files::FileError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        let source = std::io::Error::other(error);
        Err(files::FileError { action: "finish work on", path: "files".into(), source })
    })
}
