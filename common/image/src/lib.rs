//! Disk images for the agents: fetched, inspected before use, converted within limits, cached.
//!
//! ```text
//! document ──> Fetches ──> ImageCache::fetch ──> copy + hash ──> inspect ──> convert ──> contents
//!              (background)                       (bounded)      (pure)     (qemu-img)
//! ```
//!
//! An image comes from a stranger. Nothing in the cache refers to another file, every size has a
//! limit, and QEMU's tool is told each format and runs within limits of its own ([`ImageTool`]).

mod cache;
mod fetch;
mod fetches;
pub mod files;
mod http;
pub mod inspect;
#[cfg(test)]
mod tests;
mod tool;

pub use cache::{CacheSeen, CachedImage, ImageCache};
pub use fetch::{FetchError, Progress};
pub use fetches::{FetchState, Fetches};
pub use tool::{ImageTool, Info, ToolError, driver};

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

/// SHA-256 of a file, as hex digits. Blocks.
///
/// # Errors
///
/// Fails if the file cannot be read.
pub fn sha256_of(path: &std::path::Path) -> Result<String, files::FileError> {
    use std::io::Read;
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let mut file = std::fs::File::open(path).map_err(files::failed("open", path))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(files::failed("read", path))? {
            0 => return Ok(hex(context.finish().as_ref())),
            read => context.update(&buffer[..read]),
        }
    }
}
