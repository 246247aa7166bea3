//! The small files beside the data: which inode is ours, and which folder is which backend.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{failed, sync_folder};
use crate::backend::{BackendError, Item};

/// What we note about an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// The inode of the file that we made for it.
    pub(super) inode: u64,
    /// The item it was cloned from and shares bytes with.
    pub(super) shares_with: Option<Item>,
}

#[derive(Serialize, Deserialize)]
struct RecordFile {
    inode: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shares_with: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct Identity {
    backend: String,
}

pub(super) fn read(path: &Path) -> Result<Option<Record>, BackendError> {
    Ok(read_json::<RecordFile>(path)?.map(|file| Record {
        inode: file.inode,
        shares_with: file.shares_with.as_deref().and_then(Item::recognise),
    }))
}

pub(super) fn write(path: &Path, record: &Record) -> Result<(), BackendError> {
    let shares_with = record.shares_with.map(|item| item.to_string());
    write_json(path, &RecordFile { inode: record.inode, shares_with })
}

/// Which backend a folder is, or is registered to be.
pub(super) fn read_identity(path: &Path) -> Result<Option<String>, BackendError> {
    Ok(read_json::<Identity>(path)?.map(|identity| identity.backend))
}

pub(super) fn write_identity(path: &Path, backend: &str) -> Result<(), BackendError> {
    write_json(path, &Identity { backend: backend.to_owned() })
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, BackendError> {
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
fn write_json(path: &Path, value: &impl Serialize) -> Result<(), BackendError> {
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
