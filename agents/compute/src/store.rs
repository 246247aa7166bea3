//! Instances' own files: one folder each, with a record of what it was made from.
//!
//! ```text
//! <state>/instances/<id>/instance.json   the record; also the proof that the folder is ours
//!                       /disk            root disk: a qcow2 overlay over cached contents
//!                       /console.log     what the guest wrote to its serial console
//!                  <id>.deleted          being removed
//! ```
//!
//! The record comes first and each file gets its name when it is complete, so whatever a crash
//! leaves behind is either finished by the next pass or removed with the folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stackhand_image::{ImageTool, ToolError};
use stackhand_model::{FileFormat, ImageId, InstanceId, PowerState};

use crate::files::{
    FileError, failed, make_passage, make_readable, names, read_json, remove, sync_folder,
    write_json,
};

/// What an instance was made from, and how it was left.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What the root disk lies over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// The kernel that it boots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Pinned>,
    /// Its RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ramdisk: Option<Pinned>,
    /// Generation of the document with which it was seen running last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_running: Option<u64>,
    /// A power state that takes the place of the document's, until the next generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power: Option<PowerOverride>,
}

/// Cached contents that an image had when it was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pinned {
    /// The image.
    pub image: ImageId,
    /// Its contents.
    pub contents: String,
}

/// What a root disk lies over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The image and its contents.
    #[serde(flatten)]
    pub pinned: Pinned,
    /// Format of the contents.
    pub format: FileFormat,
}

/// A power state asked for by an action, or chosen by the guest itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerOverride {
    /// Generation of the document that it overrides.
    pub generation: u64,
    /// The state.
    pub state: PowerState,
    /// The guest shut itself down.
    #[serde(default)]
    pub by_guest: bool,
}

impl Record {
    /// Names of the contents that the instance needs.
    pub fn contents(&self) -> impl Iterator<Item = &str> {
        let base = self.base.as_ref().map(|base| &base.pinned);
        base.into_iter().chain(&self.kernel).chain(&self.ramdisk).map(|p| p.contents.as_str())
    }
}

/// What is found of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderSeen {
    /// Its record; absent if the agent died between making the folder and writing it.
    pub record: Option<Record>,
    /// Whether the root disk is there.
    pub disk: bool,
}

/// What is found of all instances.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreSeen {
    /// Folders by instance.
    pub folders: BTreeMap<InstanceId, FolderSeen>,
    /// Folders that are being removed.
    pub deleted: BTreeSet<InstanceId>,
}

/// Why a root disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A file could not be handled.
    #[error(transparent)]
    File(#[from] FileError),
    /// qemu-img failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
}

/// The folder of all instances. Calls block unless they are async.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
    tool: ImageTool,
}

impl Store {
    /// The store in `folder`, using the image tool at `qemu_img`.
    #[must_use]
    pub fn new(folder: &Path, tool: ImageTool) -> Self {
        Self { folder: folder.to_owned(), tool }
    }

    /// The folder of an instance.
    #[must_use]
    pub fn path(&self, id: InstanceId) -> PathBuf {
        self.folder.join(id.to_string())
    }

    /// The root disk of an instance.
    #[must_use]
    pub fn disk(&self, id: InstanceId) -> PathBuf {
        self.path(id).join("disk")
    }

    /// The console log of an instance.
    #[must_use]
    pub fn console_log(&self, id: InstanceId) -> PathBuf {
        self.path(id).join("console.log")
    }

    fn record(&self, id: InstanceId) -> PathBuf {
        self.path(id).join("instance.json")
    }

    /// Looks at all folders.
    ///
    /// # Errors
    ///
    /// Fails if a folder or record cannot be read.
    pub fn look(&self) -> Result<StoreSeen, FileError> {
        let mut seen = StoreSeen::default();
        for name in names(&self.folder)? {
            if let Some(id) = name.strip_suffix(".deleted").and_then(|id| id.parse().ok()) {
                seen.deleted.insert(InstanceId(id));
            } else if let Ok(id) = name.parse::<InstanceId>()
                && id.to_string() == name
            {
                let found = FolderSeen {
                    record: read_json(&self.record(id))?,
                    disk: self.disk(id).is_file(),
                };
                seen.folders.insert(id, found);
            }
        }
        Ok(seen)
    }

    /// Makes an instance's folder if there is none, and writes its record.
    ///
    /// # Errors
    ///
    /// Fails if the disk takes no more.
    pub fn prepare(&self, id: InstanceId, record: &Record) -> Result<(), FileError> {
        let path = self.path(id);
        make_passage(&self.folder)?;
        make_passage(&path)?;
        make_readable(&self.console_log(id))?;
        sync_folder(&self.folder)?;
        write_json(&self.record(id), record)
    }

    /// Reads the record of an instance.
    ///
    /// # Errors
    ///
    /// Fails if it cannot be read.
    pub fn read(&self, id: InstanceId) -> Result<Option<Record>, FileError> {
        read_json(&self.record(id))
    }

    /// Makes the root disk over contents at `base`. The base is not opened: it was inspected.
    ///
    /// # Errors
    ///
    /// Fails if qemu-img fails.
    pub async fn make_disk(
        &self,
        id: InstanceId,
        base: &Path,
        format: FileFormat,
        bytes: u64,
    ) -> Result<(), DiskError> {
        let (disk, partial) = (self.disk(id), self.path(id).join("disk.partial"));
        remove(&partial)?;
        self.tool.make_overlay(&partial, base, format, bytes).await?;
        let finish = move || {
            File::open(&partial)
                .and_then(|file| file.sync_all())
                .map_err(failed("sync", &partial))?;
            fs::rename(&partial, &disk).map_err(failed("rename to", &disk))?;
            disk.parent().map_or(Ok(()), sync_folder)
        };
        Ok(crate::blocking(finish).await?)
    }

    /// Removes everything of an instance, or what is left of a removal.
    ///
    /// # Errors
    ///
    /// Fails if files cannot be removed.
    pub fn remove(&self, id: InstanceId) -> Result<(), FileError> {
        let (path, deleted) = (self.path(id), self.folder.join(format!("{id}.deleted")));
        let clear = || match fs::remove_dir_all(&deleted) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed("remove", &deleted)(error))
            }
            _ => Ok(()),
        };
        clear()?;
        match fs::rename(&path, &deleted) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            renamed => renamed.map_err(failed("rename to", &deleted))?,
        }
        sync_folder(&self.folder)?;
        clear()
    }

    /// The last `most` bytes of an instance's console log, and whether there is more before.
    ///
    /// # Errors
    ///
    /// Fails if the log cannot be read; one that does not exist is empty.
    pub fn read_console(&self, id: InstanceId, most: u64) -> Result<(String, bool), FileError> {
        let path = self.console_log(id);
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((String::new(), false));
            }
            opened => opened.map_err(failed("open", &path))?,
        };
        let length = file.metadata().map_err(failed("look at", &path))?.len();
        let start = length.saturating_sub(most);
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(start))
            .and_then(|_| file.take(most).read_to_end(&mut bytes))
            .map_err(failed("read", &path))?;
        Ok((String::from_utf8_lossy(&bytes).into_owned(), start > 0))
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const ID: InstanceId = InstanceId(Uuid::from_u128(3));

    #[test]
    fn a_folder_is_prepared_noted_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(
            &root.path().join("instances"),
            ImageTool::new(Path::new("/usr/bin/qemu-img"), 60),
        );
        assert_eq!(store.look().unwrap(), StoreSeen::default());
        let record = Record { seen_running: Some(4), ..Record::default() };
        store.prepare(ID, &record).unwrap();
        store.prepare(ID, &record).unwrap();
        fs::write(store.disk(ID), "x").unwrap();
        let seen = store.look().unwrap().folders.remove(&ID).unwrap();
        assert_eq!(seen, FolderSeen { record: Some(record), disk: true });
        fs::rename(store.path(ID), root.path().join(format!("instances/{ID}.deleted"))).unwrap();
        assert_eq!(store.look().unwrap().deleted.len(), 1);
        store.remove(ID).unwrap();
        store.remove(ID).unwrap();
        assert_eq!(store.look().unwrap(), StoreSeen::default());
    }

    #[test]
    fn guests_can_pass_through_and_the_agent_can_read_the_log_whatever_the_umask() {
        use std::os::unix::fs::PermissionsExt;
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(
            &root.path().join("instances"),
            ImageTool::new(Path::new("/usr/bin/qemu-img"), 60),
        );
        store.prepare(ID, &Record::default()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&root.path().join("instances")), mode(&store.path(ID))), (0o711, 0o711));
        assert!(store.console_log(ID).is_file(), "made by us, so it stays readable to us");
    }

    #[test]
    fn the_end_of_a_long_console_log_is_read() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path(), ImageTool::new(Path::new("/usr/bin/qemu-img"), 60));
        assert_eq!(store.read_console(ID, 10).unwrap(), (String::new(), false));
        store.prepare(ID, &Record::default()).unwrap();
        fs::write(store.console_log(ID), b"0123456789abc\xff").unwrap();
        assert!(!store.read_console(ID, 100).unwrap().1);
        let (text, more) = store.read_console(ID, 4).unwrap();
        assert_eq!((text.as_str(), more), ("abc\u{fffd}", true));
    }
}
