//! Notes of which backend a place is, and the calls on files that all backends share.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use stackhand_image::files::{self, read_json, write_json};

use super::BackendError;

#[derive(Serialize, Deserialize)]
struct Identity {
    backend: String,
}

/// Which backend a place is, or is registered to be.
pub(super) fn read_identity(path: &Path) -> Result<Option<String>, BackendError> {
    Ok(read_json::<Identity>(path)?.map(|identity| identity.backend))
}

pub(super) fn write_identity(path: &Path, backend: &str) -> Result<(), BackendError> {
    Ok(write_json(path, &Identity { backend: backend.to_owned() })?)
}

/// Looks at a path itself, links not followed; absent if nothing is there.
pub(super) fn stat(path: &Path) -> Result<Option<fs::Metadata>, BackendError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(failed("look at", path)(source)),
    }
}

pub(super) fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> BackendError + use<'a> {
    move |source| files::failed(action, path)(source).into()
}

/// Opens a file or device. Links are not followed, but for those of `/dev`, which are udev's.
pub(super) fn open_to_read(path: &Path) -> Result<File, BackendError> {
    let real;
    let path = if path.starts_with("/dev") {
        real = fs::canonicalize(path).map_err(failed("find", path))?;
        &real
    } else {
        path
    };
    OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits())
        .open(path)
        .map_err(failed("open", path))
}
