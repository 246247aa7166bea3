//! Small files of an agent's own folders, written so that a power cut leaves the old or the new.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A file could not be read, written or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", .path.display())]
pub struct FileError {
    /// What was tried.
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why not.
    pub source: io::Error,
}

/// Turns an I/O error into one that names what was tried, on what.
pub fn failed<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> FileError + use<'a> {
    move |source| FileError { action, path: path.to_owned(), source }
}

/// Makes a folder that guests' processes, which run as other users, can pass through to a file
/// whose name they were given. Whatever the umask says.
///
/// # Errors
///
/// Fails if the folder cannot be made or its mode set.
pub fn make_passage(folder: &Path) -> Result<(), FileError> {
    fs::create_dir_all(folder).map_err(failed("make folder", folder))?;
    let mode = fs::metadata(folder).map_err(failed("look at", folder))?.permissions().mode();
    if mode & 0o777 != 0o711 {
        let passage = fs::Permissions::from_mode(0o711);
        fs::set_permissions(folder, passage).map_err(failed("set the mode of", folder))?;
    }
    Ok(())
}

/// Makes an empty file that is ours, if there is none, for somebody with more rights to append to:
/// a log that libvirt makes belongs to root and could not be read.
///
/// # Errors
///
/// Fails if the file cannot be made.
pub fn make_readable(path: &Path) -> Result<(), FileError> {
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(failed("make", path)(error))
        }
        _ => Ok(()),
    }
}

/// Names in a folder; none if there is no folder.
///
/// # Errors
///
/// Fails if the folder cannot be listed.
pub fn names(folder: &Path) -> Result<Vec<String>, FileError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(failed("list", folder)(source)),
    };
    entries
        .map(|entry| Ok(entry?.file_name().into_string().ok()))
        .collect::<io::Result<Vec<_>>>()
        .map(|names| names.into_iter().flatten().collect())
        .map_err(failed("list", folder))
}

/// Removes a file; one that is not there is removed already.
///
/// # Errors
///
/// Fails if it is there and stays.
pub fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Makes renames and removals in a folder survive a power cut.
///
/// # Errors
///
/// Fails if the folder cannot be synced.
pub fn sync_folder(folder: &Path) -> Result<(), FileError> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("sync folder", folder))
}

/// Reads a value; `None` if there is no file.
///
/// # Errors
///
/// Fails if the file cannot be read or holds something else.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, FileError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed("read", path)(source)),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| failed("understand", path)(error.into()))
}

/// Writes a value in place of the one that was there, on disk when this returns.
///
/// # Errors
///
/// Fails if it cannot be written; the old value stays then.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), FileError> {
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

/// Runs file work on a thread that may block.
///
/// # Errors
///
/// Those of the work, or that it broke off.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
) -> Result<T, FileError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        let source = io::Error::other(error);
        Err(FileError { action: "finish work on", path: "files".into(), source })
    })
}
