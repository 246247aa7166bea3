//! Small files beside the data, and the calls on files that all backends share. A note is the
//! old one or the new one, whatever happens.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

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
    write_json(path, &Identity { backend: backend.to_owned() })
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, BackendError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed("read", path)(source)),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| failed("understand", path)(error.into()))
}

/// Writes a file as a whole: it is the old one or the new one, whatever happens.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), BackendError> {
    let mut text =
        serde_json::to_vec(value).map_err(|error| failed("write", path)(error.into()))?;
    text.push(b'\n');
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = Path::new(&temporary);
    File::create(temporary)
        .and_then(|mut file| {
            file.write_all(&text)?;
            file.sync_all()
        })
        .map_err(failed("write", temporary))?;
    fs::rename(temporary, path).map_err(failed("rename to", path))?;
    path.parent().map_or(Ok(()), sync_folder)
}

/// Looks at a path itself, links not followed; absent if nothing is there.
pub(super) fn stat(path: &Path) -> Result<Option<fs::Metadata>, BackendError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(failed("look at", path)(source)),
    }
}

/// Removes a file; one that is not there is removed already.
pub(super) fn remove(path: &Path) -> Result<(), BackendError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Makes renames in a folder survive a power cut.
pub(super) fn sync_folder(folder: &Path) -> Result<(), BackendError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("sync folder", folder))
}

/// Names in a folder, those that are not UTF-8 left out: none of ours is.
pub(super) fn names(folder: &Path) -> Result<Vec<String>, BackendError> {
    fs::read_dir(folder)
        .and_then(|entries| {
            entries
                .map(|entry| Ok(entry?.file_name().into_string().ok()))
                .collect::<io::Result<Vec<_>>>()
        })
        .map(|names| names.into_iter().flatten().collect())
        .map_err(failed("list", folder))
}

pub(super) fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> BackendError + use<'a> {
    move |source| BackendError::Io { action, path: path.to_owned(), source }
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
