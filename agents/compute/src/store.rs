//! Instances' own files: one folder each, with a record of what it was made from.
//!
//! ```text
//! <state>/instances/<id>/instance.json   the record; also the proof that the folder is ours
//!                       /disk            root disk: a qcow2 overlay over cached contents, or blank
//!                       /disk.eph0       ephemeral disk, formatted as ext4
//!                       /disk.swap       swap disk
//!                       /disk.config     config drive
//!                       /disk.copy       a snapshot under way
//!                       /console.log     what the guest wrote to its serial console
//!                  <id>.deleted          being removed
//! ```
//!
//! The record comes first and each file gets its name when it is complete, so whatever a crash
//! leaves behind is either finished by the next pass or removed with the folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stackhand_image::{ImageTool, ToolError};
use stackhand_kernel::exec::{ExecError, Program};
use stackhand_model::{Connection, FileFormat, ImageId, InstanceId, PowerState, VolumeId};

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
    /// The CD in its drive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cdrom: Option<Pinned>,
    /// Hash of what its config drive tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_drive: Option<String>,
    /// Devices that its volumes have in the guest; they keep them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub targets: BTreeMap<VolumeId, String>,
    /// Sizes in GiB that the running guest was told of its volumes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sizes: BTreeMap<VolumeId, u64>,
    /// Volumes that this host's own initiator takes in for it, and how it lets go of them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attached: BTreeMap<VolumeId, Connection>,
    /// It is being rebuilt: its root disk is to be made anew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rebuild: bool,
    /// A snapshot of it is under way.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub snapshot: bool,
}

/// A file of an instance that the guest sees as a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The root disk.
    Root,
    /// The ephemeral disk.
    Ephemeral,
    /// The swap disk.
    Swap,
    /// The config drive.
    ConfigDrive,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Root, Self::Ephemeral, Self::Swap, Self::ConfigDrive];

    /// Name of its file.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Self::Root => "disk",
            Self::Ephemeral => "disk.eph0",
            Self::Swap => "disk.swap",
            Self::ConfigDrive => "disk.config",
        }
    }

    /// What it is, for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Root => "root disk",
            Self::Ephemeral => "ephemeral disk",
            Self::Swap => "swap disk",
            Self::ConfigDrive => "config drive",
        }
    }
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
        let others = [&self.kernel, &self.ramdisk, &self.cdrom];
        base.into_iter().chain(others.into_iter().flatten()).map(|p| p.contents.as_str())
    }
}

/// What is found of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderSeen {
    /// Its record; absent if the agent died between making the folder and writing it.
    pub record: Option<Record>,
    /// Disks that are there.
    pub parts: BTreeSet<Part>,
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
    /// The program that formats it failed.
    #[error(transparent)]
    Program(#[from] Box<ExecError>),
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

    /// A disk of an instance.
    #[must_use]
    pub fn part(&self, id: InstanceId, part: Part) -> PathBuf {
        self.path(id).join(part.file())
    }

    /// Where a snapshot of an instance is put together.
    #[must_use]
    pub fn copy(&self, id: InstanceId) -> PathBuf {
        self.path(id).join("disk.copy")
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
                    parts: Part::ALL
                        .into_iter()
                        .filter(|&part| self.part(id, part).is_file())
                        .collect(),
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
        let partial = self.partial(id, Part::Root);
        remove(&partial)?;
        self.tool.make_overlay(&partial, base, format, bytes).await?;
        self.name_part(id, Part::Root).await
    }

    /// Makes an empty disk: a sparse file, formatted if it is not the root disk.
    ///
    /// # Errors
    ///
    /// Fails if the disk takes no more or the program that formats it fails.
    pub async fn make_blank(
        &self,
        id: InstanceId,
        part: Part,
        bytes: u64,
    ) -> Result<(), DiskError> {
        let partial = self.partial(id, part);
        let path = partial.clone();
        let make = move || {
            remove(&path)?;
            File::create(&path).and_then(|file| file.set_len(bytes)).map_err(failed("make", &path))
        };
        crate::blocking(make).await?;
        let path = partial.display().to_string();
        let format = match part {
            Part::Ephemeral => Some(Program::new("/usr/sbin/mkfs.ext4").args([
                "-q",
                "-F",
                "-L",
                "ephemeral0",
                "-E",
                "nodiscard,lazy_itable_init=1",
            ])),
            Part::Swap => Some(Program::new("/usr/sbin/mkswap").args(["-q", "-L", "swap0"])),
            Part::Root | Part::ConfigDrive => None,
        };
        if let Some(format) = format {
            format.arg(path).run().await.map_err(Box::new)?;
        }
        self.name_part(id, part).await
    }

    /// Writes a config drive in place of the one that was there.
    ///
    /// # Errors
    ///
    /// Fails if the disk takes no more.
    pub async fn write_config_drive(
        &self,
        id: InstanceId,
        image: Vec<u8>,
    ) -> Result<(), DiskError> {
        let partial = self.partial(id, Part::ConfigDrive);
        let write = move || {
            remove(&partial)?;
            OpenOptions::new()
                .write(true)
                .create_new(true)
                // It may hold passwords; QEMU's user is given it by libvirt.
                .mode(0o600)
                .open(&partial)
                .and_then(|mut file| file.write_all(&image))
                .map_err(failed("write", &partial))
        };
        crate::blocking(write).await?;
        self.name_part(id, Part::ConfigDrive).await
    }

    fn partial(&self, id: InstanceId, part: Part) -> PathBuf {
        self.path(id).join(format!("{}.partial", part.file()))
    }

    /// Gives a disk that is complete its name.
    async fn name_part(&self, id: InstanceId, part: Part) -> Result<(), DiskError> {
        let (partial, disk) = (self.partial(id, part), self.part(id, part));
        let finish = move || {
            File::open(&partial)
                .and_then(|file| file.sync_all())
                .map_err(failed("sync", &partial))?;
            fs::rename(&partial, &disk).map_err(failed("rename to", &disk))?;
            disk.parent().map_or(Ok(()), sync_folder)
        };
        Ok(crate::blocking(finish).await?)
    }

    /// Removes a disk; one that is not there is removed already.
    ///
    /// # Errors
    ///
    /// Fails if it stays.
    pub fn remove_part(&self, id: InstanceId, part: Part) -> Result<(), FileError> {
        remove(&self.part(id, part))?;
        sync_folder(&self.path(id))
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

    /// What an instance's console log holds from `start` on, or the end of it.
    ///
    /// # Errors
    ///
    /// Fails if the log cannot be read; one that does not exist is empty.
    pub fn read_console(
        &self,
        id: InstanceId,
        start: Option<u64>,
        most: u64,
    ) -> Result<ConsoleText, FileError> {
        let path = self.console_log(id);
        let mut file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(ConsoleText::default());
            }
            opened => opened.map_err(failed("open", &path))?,
        };
        let length = file.metadata().map_err(failed("look at", &path))?.len();
        let start = begin(length, start, most);
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(start))
            .and_then(|_| file.take(most).read_to_end(&mut bytes))
            .map_err(failed("read", &path))?;
        Ok(ConsoleText::new(start, &bytes))
    }

    /// Begins an instance's console log anew, as a file that is ours.
    ///
    /// # Errors
    ///
    /// Fails if the log cannot be removed or made.
    pub fn begin_console(&self, id: InstanceId) -> Result<(), FileError> {
        let path = self.console_log(id);
        remove(&path)?;
        make_readable(&path)
    }
}

/// Where a part of a file starts that is `length` long: at `start`, or so that its end is read. A
/// file that is shorter than it was has begun anew.
pub(crate) fn begin(length: u64, start: Option<u64>, most: u64) -> u64 {
    let latest = length.saturating_sub(most);
    start.map_or(latest, |start| if start > length { 0 } else { start })
}

/// A part of a console log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleText {
    /// The text; bytes that are not UTF-8 are replaced.
    pub text: String,
    /// Where it starts in the log.
    pub start: u64,
    /// Where what comes after starts.
    pub next: u64,
}

impl ConsoleText {
    /// Bytes of a log that start at `start`.
    #[must_use]
    pub fn new(start: u64, bytes: &[u8]) -> Self {
        let next = start + u64::try_from(bytes.len()).unwrap_or(0);
        Self { text: String::from_utf8_lossy(bytes).into_owned(), start, next }
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
        fs::write(store.part(ID, Part::Root), "x").unwrap();
        let seen = store.look().unwrap().folders.remove(&ID).unwrap();
        assert_eq!(seen, FolderSeen { record: Some(record), parts: [Part::Root].into() });
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
    fn a_part_starts_where_it_is_asked_for_or_so_that_the_end_is_read() {
        assert_eq!(begin(100, None, 30), 70);
        assert_eq!(begin(10, None, 30), 0);
        assert_eq!(begin(100, Some(40), 30), 40);
        assert_eq!(begin(100, Some(100), 30), 100);
        assert_eq!(begin(100, Some(101), 30), 0, "it has begun anew");
    }

    #[test]
    fn the_end_of_a_long_console_log_is_read() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path(), ImageTool::new(Path::new("/usr/bin/qemu-img"), 60));
        assert_eq!(store.read_console(ID, None, 10).unwrap(), ConsoleText::default());
        store.prepare(ID, &Record::default()).unwrap();
        fs::write(store.console_log(ID), b"0123456789abc\xff").unwrap();
        assert_eq!(store.read_console(ID, None, 100).unwrap().start, 0);
        let end = store.read_console(ID, None, 4).unwrap();
        assert_eq!((end.text.as_str(), end.start, end.next), ("abc\u{fffd}", 10, 14));
        assert_eq!(store.read_console(ID, Some(12), 100).unwrap().text, "c\u{fffd}");
        assert_eq!(store.read_console(ID, Some(14), 100).unwrap().text, "");
        fs::write(store.console_log(ID), b"anew").unwrap();
        assert_eq!(store.read_console(ID, Some(14), 100).unwrap().text, "anew");
        store.begin_console(ID).unwrap();
        assert_eq!(store.read_console(ID, None, 100).unwrap(), ConsoleText::default());
    }

    #[tokio::test]
    async fn blank_disks_are_made_and_formatted() {
        let root = tempfile::tempdir().unwrap();
        let tool = ImageTool::new(Path::new("/usr/bin/qemu-img"), 60);
        let store = Store::new(&root.path().join("instances"), tool);
        store.prepare(ID, &Record::default()).unwrap();
        for (part, offset, magic) in
            [(Part::Ephemeral, 0x438, &b"\x53\xef"[..]), (Part::Swap, 4086, b"SWAPSPACE2")]
        {
            store.make_blank(ID, part, 64 << 20).await.unwrap();
            let bytes = fs::read(store.part(ID, part)).unwrap();
            assert_eq!(bytes.len(), 64 << 20);
            assert_eq!(&bytes[offset..offset + magic.len()], magic, "{part:?}");
        }
        store.remove_part(ID, Part::Swap).unwrap();
        store.remove_part(ID, Part::Swap).unwrap();
        assert_eq!(store.look().unwrap().folders[&ID].parts, [Part::Ephemeral].into());
    }
}
