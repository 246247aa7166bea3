//! Reading and writing files under `/proc/sys`. What is below `net` belongs to the namespace of
//! the thread that opens it: use [`Netns::inside`](crate::Netns::inside) for others.

use std::io;
use std::path::{Component, Path, PathBuf};

use crate::KernelError;

/// Reads the setting at `key`, a path such as `net/ipv4/ip_forward`, without the final newline.
///
/// # Errors
///
/// Fails if there is no such setting.
pub fn read(key: &str) -> Result<String, KernelError> {
    path(key)
        .and_then(std::fs::read_to_string)
        .map(|text| text.trim_end().to_owned())
        .map_err(|source| KernelError::Sysctl { action: "read", key: key.to_owned(), source })
}

/// Writes the setting at `key`.
///
/// # Errors
///
/// Fails if there is no such setting or the value is refused.
pub fn write(key: &str, value: &str) -> Result<(), KernelError> {
    path(key).and_then(|path| std::fs::write(path, value)).map_err(|source| KernelError::Sysctl {
        action: "write",
        key: key.to_owned(),
        source,
    })
}

fn path(key: &str) -> io::Result<PathBuf> {
    let relative = Path::new(key);
    if relative.components().all(|part| matches!(part, Component::Normal(_))) {
        Ok(Path::new("/proc/sys").join(relative))
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}
