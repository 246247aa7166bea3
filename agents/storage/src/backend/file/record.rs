//! The small files beside the data: which inode is ours.

use std::path::Path;

use serde::{Deserialize, Serialize};
use stackhand_image::files::{read_json, write_json};

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

pub(super) fn read(path: &Path) -> Result<Option<Record>, BackendError> {
    Ok(read_json::<RecordFile>(path)?.map(|file| Record {
        inode: file.inode,
        shares_with: file.shares_with.as_deref().and_then(Item::recognise),
    }))
}

pub(super) fn write(path: &Path, record: &Record) -> Result<(), BackendError> {
    let shares_with = record.shares_with.map(|item| item.to_string());
    Ok(write_json(path, &RecordFile { inode: record.inode, shares_with })?)
}
