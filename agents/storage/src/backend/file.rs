//! Volumes and snapshots as sparse raw files in a folder.
//!
//! ```text
//! <folder>/volume-<id>                      complete items
//! <folder>/snapshot-<id>
//! <folder>/.stackhand/backend.json          which backend this folder is
//!                     <item>.json           record: the inode we made for the item
//!                     <item>.partial        being made
//!                     <item>.deleted        being deleted
//!                     <item>.revert         what a volume is set back to; the volume, as soon as
//!                                           the record names it
//! ```
//!
//! A file is ours if its record names its inode. The record is written as soon as the unfinished
//! file exists, and a rename keeps the inode; so at every instruction at which the power may fail
//! it is certain what is ours, what is unfinished, and what was put there by somebody else:
//!
//! | final name | record | in `.stackhand` | then it is |
//! |---|---|---|---|
//! | inode of the record | yes | | complete |
//! | anything else | | | foreign: left alone |
//! | nothing | yes | `.partial` | unfinished: removed and begun again |
//! | nothing | yes | `.deleted` | deleted: swept |
//! | nothing | yes | nothing | lost: never made again as an empty file |
//! | nothing | no | either | swept |
//!
//! Data is synced before the rename, and folders after it. The agent's state folder remembers
//! which folder a backend had: should its file system not be mounted one day, the backend is away
//! instead of empty.

mod access;
mod record;
mod reflink;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use stackhand_image::files::{names, remove, sync_folder};

use super::notes::{failed, open_to_read, read_identity, stat, write_identity};
use super::transfer::{self, Holes};
use super::{
    Backend, BackendError, Instant, Item, Leftover, Observed, Place, Presence, Progress, Seen,
    Usage, Write, lock,
};
use record::Record;

/// What is told about an item whose file was taken away.
const LOST: &str = "its file was there and is gone: put it back, or delete the object";

/// Our own folder inside the backend's.
const WORK: &str = ".stackhand";

/// A folder that keeps volumes as files.
#[derive(Debug)]
pub struct FileBackend {
    name: String,
    folder: PathBuf,
    /// Remembers, outside the folder, which folder this is.
    registration: PathBuf,
    /// Whether the folder may be made if it does not exist.
    may_make: bool,
    reflinks: OnceLock<bool>,
}

impl FileBackend {
    /// The backend called `name` in `folder`. Touches nothing yet: a folder that is away now may
    /// come later. `may_make` lets the folder be made at its first use.
    #[must_use]
    pub fn new(name: &str, folder: &Path, state_dir: &Path, may_make: bool) -> Self {
        Self {
            name: name.to_owned(),
            folder: folder.to_owned(),
            registration: state_dir.join("backends").join(format!("{name}.json")),
            may_make,
            reflinks: OnceLock::new(),
        }
    }

    fn place(&self) -> Place {
        Place::Folder(self.folder.clone())
    }

    fn path(&self, item: Item) -> PathBuf {
        self.folder.join(item.to_string())
    }

    fn work(&self) -> PathBuf {
        self.folder.join(WORK)
    }

    fn partial(&self, item: Item) -> PathBuf {
        self.work().join(format!("{item}.partial"))
    }

    fn deleted(&self, item: Item) -> PathBuf {
        self.work().join(format!("{item}.deleted"))
    }

    fn record(&self, item: Item) -> PathBuf {
        self.work().join(format!("{item}.json"))
    }

    fn away(&self, reason: String) -> BackendError {
        BackendError::Away { backend: self.name.clone(), reason }
    }

    /// Makes sure that this is the folder it was last time, and at the very first time makes it
    /// ours.
    fn enter(&self) -> Result<(), BackendError> {
        let registered = read_identity(&self.registration)?;
        if self.may_make && registered.is_none() {
            // Guests' processes run as other users and must pass through to files whose names they
            // were given, whatever the umask says.
            fs::create_dir_all(&self.folder).map_err(failed("make folder", &self.folder))?;
            fs::set_permissions(&self.folder, fs::Permissions::from_mode(0o711))
                .map_err(failed("set the mode of", &self.folder))?;
        }
        match fs::metadata(&self.folder) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => {
                return Err(self.away(format!("{} is not a folder", self.folder.display())));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(self.away(format!(
                    "there is no folder {}: make it, or mount its file system",
                    self.folder.display()
                )));
            }
            Err(source) => return Err(failed("look at", &self.folder)(source)),
        }
        let marker = self.work().join("backend.json");
        let found = read_identity(&marker)?;
        match (registered, found) {
            (Some(registered), Some(found)) if registered == found => Ok(()),
            (Some(_), _) => Err(self.away(format!(
                "{} is not the folder that held this backend's volumes: mount the right file \
                 system, or remove {} to begin anew without them",
                self.folder.display(),
                self.registration.display()
            ))),
            (None, Some(found)) => self.register(&found),
            (None, None) => {
                let work = self.work();
                match DirBuilder::new().mode(0o700).create(&work) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(failed("make folder", &work)(error));
                    }
                    _ => {}
                }
                let identity = uuid::Uuid::new_v4().to_string();
                write_identity(&marker, &identity)?;
                sync_folder(&self.folder)?;
                self.register(&identity)
            }
        }
    }

    fn register(&self, identity: &str) -> Result<(), BackendError> {
        if let Some(folder) = self.registration.parent() {
            fs::create_dir_all(folder).map_err(failed("make folder", folder))?;
        }
        write_identity(&self.registration, identity)
    }

    /// What is known about an item from its record and the three places where it can be.
    fn look(&self, item: Item, sharing: &BTreeSet<Item>) -> Result<Option<Seen>, BackendError> {
        let path = self.path(item);
        let record = record::read(&self.record(item))?;
        let seen = |presence, metadata: Option<&fs::Metadata>, usage| Seen {
            presence,
            bytes: metadata.map_or(0, fs::Metadata::len),
            allocated_bytes: metadata.map_or(0, |metadata| metadata.blocks() * 512),
            shared: sharing.contains(&item)
                || record.as_ref().is_some_and(|record| record.shares_with.is_some()),
            usage,
        };
        if let Some(metadata) = stat(&path)? {
            return Ok(Some(match foreign(&metadata, record.as_ref()) {
                Some(what) => seen(Presence::Foreign { what }, Some(&metadata), Usage::Free),
                None => seen(Presence::Ready, Some(&metadata), lock::usage(&path)?),
            }));
        }
        if let Some(metadata) = stat(&self.partial(item))? {
            return Ok(record
                .is_some()
                .then(|| seen(Presence::Partial, Some(&metadata), Usage::Free)));
        }
        match &record {
            Some(record) => {
                let deleted = stat(&self.deleted(item))?;
                let gone = deleted.is_some_and(|metadata| metadata.ino() == record.inode);
                Ok((!gone).then(|| seen(Presence::Lost, None, Usage::Free)))
            }
            None => Ok(None),
        }
    }

    fn reverted(&self, item: Item) -> PathBuf {
        self.work().join(format!("{item}.revert"))
    }

    /// Whether the record says that the file of a volume that is set back is the volume now.
    fn is_reverted(&self, item: Item) -> Result<bool, BackendError> {
        let record = record::read(&self.record(item))?;
        let fresh = stat(&self.reverted(item))?;
        Ok(fresh.zip(record).is_some_and(|(fresh, record)| fresh.ino() == record.inode))
    }

    /// Gives that file its name.
    fn finish_revert(&self, item: Item) -> Result<(), BackendError> {
        if self.is_reverted(item)? {
            let path = self.path(item);
            fs::rename(self.reverted(item), &path).map_err(failed("rename to", &path))?;
            sync_folder(&self.folder)?;
            sync_folder(&self.work())?;
        }
        Ok(())
    }

    /// Whether the item is there and ours.
    ///
    /// # Errors
    ///
    /// Fails if something foreign holds its name.
    fn have(&self, action: &'static str, item: Item) -> Result<Option<fs::Metadata>, BackendError> {
        let path = self.path(item);
        let Some(metadata) = stat(&path)? else { return Ok(None) };
        match foreign(&metadata, record::read(&self.record(item))?.as_ref()) {
            Some(what) => Err(BackendError::InTheWay { action, path, what }),
            None => Ok(Some(metadata)),
        }
    }

    /// Makes an item: unfinished file, record, contents, sync, rename, sync.
    fn make(
        &self,
        item: Item,
        shares_with: Option<Item>,
        fill: impl FnOnce(&File, &Path) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let path = self.path(item);
        self.enter()?;
        if self.have("make", item)?.is_some() {
            return Ok(());
        }
        let before = self.look(item, &BTreeSet::new())?;
        if before.is_some_and(|seen| seen.presence == Presence::Lost) {
            return Err(BackendError::InTheWay { action: "make", path, what: LOST.into() });
        }
        self.discard(item)?;
        let partial = self.partial(item);
        let file = new_file(&partial)?;
        let finish = || -> Result<(), BackendError> {
            let inode = file.metadata().map_err(failed("look at", &partial))?.ino();
            record::write(&self.record(item), &Record { inode, shares_with })?;
            fill(&file, &partial)?;
            access::keep(&file, &partial)?;
            if matches!(item, Item::Snapshot(_)) {
                file.set_permissions(fs::Permissions::from_mode(0o400))
                    .map_err(failed("set the mode of", &partial))?;
            }
            file.sync_all().map_err(failed("sync", &partial))?;
            renameat2(AT_FDCWD, &partial, AT_FDCWD, &path, RenameFlags::RENAME_NOREPLACE).map_err(
                |errno| match errno {
                    Errno::EEXIST => BackendError::InTheWay {
                        action: "make",
                        path: path.clone(),
                        what: "something else took the name meanwhile".into(),
                    },
                    errno => failed("rename to", &path)(errno.into()),
                },
            )?;
            sync_folder(&self.folder)?;
            Ok(sync_folder(&self.work())?)
        };
        let outcome = finish();
        if outcome.is_err()
            && let Err(error) = self.discard(item)
        {
            // The next look finds it and tries again.
            tracing::warn!(%item, %error, "cannot remove the unfinished file of an item");
        }
        outcome
    }
}

impl Backend for FileBackend {
    fn observe(&self) -> Result<Observed, BackendError> {
        self.enter()?;
        let work = self.work();
        let mut items = BTreeSet::new();
        let mut leftovers = BTreeSet::new();
        for name in names(&self.folder)? {
            items.extend(Item::recognise(&name));
        }
        let mut sharing = BTreeSet::new();
        for name in names(&work)? {
            let item = name.split('.').next().and_then(Item::recognise);
            let Some(item) = item else { continue };
            if name == format!("{item}.json") {
                items.insert(item);
                let record = record::read(&work.join(&name))?;
                sharing.extend(record.and_then(|record| record.shares_with));
            } else if name == format!("{item}.revert") && self.is_reverted(item)? {
                self.finish_revert(item)?;
            } else if name != format!("{item}.partial") || stat(&self.record(item))?.is_none() {
                leftovers.insert(Leftover { name, item: Some(item), to_wipe: false });
            }
        }
        let mut seen = BTreeMap::new();
        for item in items {
            if let Some(found) = self.look(item, &sharing)? {
                seen.insert(item, found);
            }
        }
        let space = nix::sys::statvfs::statvfs(&self.folder)
            .map_err(|errno| failed("measure", &self.folder)(errno.into()))?;
        let reflinks = match self.reflinks.get() {
            Some(known) => *known,
            None => {
                let probed = reflink::probe(&work)?;
                *self.reflinks.get_or_init(|| probed)
            }
        };
        Ok(Observed {
            total_bytes: space.blocks() * space.fragment_size(),
            free_bytes: space.blocks_available() * space.fragment_size(),
            instant: Instant { snapshots: reflinks, clones: reflinks },
            thick: false,
            fill: None,
            troubles: vec![],
            place: self.place(),
            items: seen,
            leftovers,
        })
    }

    fn create(&self, item: Item, bytes: u64) -> Result<(), BackendError> {
        self.make(item, None, |file, path| file.set_len(bytes).map_err(failed("size", path)))
    }

    fn clone_item(&self, item: Item, source: Item, bytes: u64) -> Result<(), BackendError> {
        self.have("copy", source)?;
        let from = open_to_read(&self.path(source))?;
        self.make(item, Some(source), |file, path| {
            reflink::clone(&from, file).map_err(failed("clone into", path))?;
            grow(file, path, bytes)
        })
    }

    fn copy(
        &self,
        item: Item,
        source: &Path,
        bytes: u64,
        progress: &Progress,
    ) -> Result<(), BackendError> {
        let from = open_to_read(source)?;
        let quiet = lock::keep_writers_out(from, source)?;
        self.make(item, None, |file, path| {
            file.set_len(0).map_err(failed("size", path))?;
            transfer::copy((&quiet, source), (file, path), Holes::Kept, progress)?;
            grow(file, path, bytes)
        })
    }

    fn import(&self, item: Item, bytes: u64, write: &mut Write<'_>) -> Result<(), BackendError> {
        self.make(item, None, |file, path| {
            file.set_len(bytes).map_err(failed("size", path))?;
            write(path)?;
            grow(file, path, bytes)
        })
    }

    fn revert(&self, item: Item, snapshot: Item, progress: &Progress) -> Result<(), BackendError> {
        self.enter()?;
        let path = self.path(item);
        self.finish_revert(item)?;
        let Some(old) = self.have("revert", item)? else {
            return Err(failed("revert", &path)(io::ErrorKind::NotFound.into()));
        };
        self.have("revert to", snapshot)?;
        if lock::usage(&path)? != Usage::Free {
            return Err(BackendError::InUse { action: "revert", path });
        }
        let source_path = self.path(snapshot);
        let source = open_to_read(&source_path)?;
        let fresh = self.reverted(item);
        remove(&fresh)?;
        let file = new_file(&fresh)?;
        let cloned = reflink::clone(&source, &file).is_ok();
        if !cloned {
            transfer::copy((&source, &source_path), (&file, &fresh), Holes::Kept, progress)?;
        }
        grow(&file, &fresh, old.len())?;
        access::keep(&file, &fresh)?;
        file.sync_all().map_err(failed("sync", &fresh))?;
        // From this note on the new file is the volume; the rename is finished by whoever comes.
        let inode = file.metadata().map_err(failed("look at", &fresh))?.ino();
        let shares_with = cloned.then_some(snapshot);
        record::write(&self.record(item), &Record { inode, shares_with })?;
        self.finish_revert(item)
    }

    fn activate(&self, _item: Item) -> Result<(), BackendError> {
        Ok(())
    }

    fn wipe(&self, leftover: &str, _progress: &Progress) -> Result<(), BackendError> {
        // The file system gives out zeroes; removing it is enough.
        self.sweep(leftover)
    }

    fn extend(&self, item: Item, bytes: u64) -> Result<(), BackendError> {
        let path = self.path(item);
        let Some(found) = self.have("extend", item)? else {
            return Err(failed("extend", &path)(io::ErrorKind::NotFound.into()));
        };
        let file = OpenOptions::new()
            .write(true)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&path)
            .map_err(failed("open", &path))?;
        if file.metadata().map_err(failed("look at", &path))?.ino() != found.ino() {
            return Err(BackendError::InTheWay {
                action: "extend",
                path,
                what: "it was replaced meanwhile".into(),
            });
        }
        grow(&file, &path, bytes)?;
        file.sync_all().map_err(failed("sync", &path))
    }

    fn delete(&self, item: Item) -> Result<(), BackendError> {
        self.enter()?;
        let path = self.path(item);
        if self.have("delete", item)?.is_some() {
            if lock::usage(&path)? != Usage::Free {
                return Err(BackendError::InUse { action: "delete", path });
            }
            let deleted = self.deleted(item);
            fs::rename(&path, &deleted).map_err(failed("rename to", &deleted))?;
            sync_folder(&self.folder)?;
            sync_folder(&self.work())?;
        }
        self.discard(item)?;
        remove(&self.deleted(item))?;
        Ok(sync_folder(&self.work())?)
    }

    fn discard(&self, item: Item) -> Result<(), BackendError> {
        let partial = self.partial(item);
        let record = record::read(&self.record(item))?;
        let of_partial = match (stat(&partial)?, record) {
            (Some(metadata), Some(record)) => metadata.ino() == record.inode,
            _ => false,
        };
        // The record goes first: without it the file is swept, without the file it would be lost.
        // One that proves a complete file ours stays.
        if of_partial || stat(&self.path(item))?.is_none() {
            remove(&self.record(item))?;
        }
        Ok(remove(&partial)?)
    }

    fn sweep(&self, leftover: &str) -> Result<(), BackendError> {
        let item = leftover.split('.').next().and_then(Item::recognise);
        let path = self.work().join(leftover);
        // A name with a folder in it, or one that is not ours, was never listed.
        let Some(item) = item.filter(|_| !leftover.contains('/')) else {
            return Err(BackendError::InTheWay {
                action: "sweep",
                path,
                what: "it is not one of ours".into(),
            });
        };
        if leftover == format!("{item}.deleted") && stat(&self.path(item))?.is_none() {
            remove(&self.record(item))?;
        }
        remove(&path)?;
        Ok(sync_folder(&self.work())?)
    }

    fn adopt(&self, item: Item) -> Result<(), BackendError> {
        self.enter()?;
        let path = self.path(item);
        let in_the_way = |what: &str| BackendError::InTheWay {
            action: "adopt",
            path: path.clone(),
            what: what.to_owned(),
        };
        let metadata = stat(&path)?.ok_or_else(|| in_the_way("there is no such file"))?;
        if !metadata.is_file() {
            return Err(in_the_way("it is not a plain file"));
        }
        if metadata.nlink() != 1 {
            return Err(in_the_way("it has another name besides; copy it instead"));
        }
        if metadata.len() == 0 || metadata.len() % 512 != 0 {
            return Err(in_the_way(
                "its size is no multiple of 512 bytes, so it is not a raw disk",
            ));
        }
        record::write(&self.record(item), &Record { inode: metadata.ino(), shares_with: None })
    }
}

/// Says what is there if it is not the file that we made.
fn foreign(metadata: &fs::Metadata, record: Option<&Record>) -> Option<String> {
    let kind = metadata.file_type();
    if kind.is_symlink() {
        Some("a symbolic link that the agent did not make".into())
    } else if kind.is_dir() {
        Some("a folder that the agent did not make".into())
    } else if !kind.is_file() {
        Some("something that is not a plain file".into())
    } else if record.is_none_or(|record| record.inode != metadata.ino()) {
        Some("a file that the agent did not make".into())
    } else {
        None
    }
}

/// Makes a file that is not there, for its owner alone.
fn new_file(path: &Path) -> Result<File, BackendError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .mode(0o600)
        .open(path)
        .map_err(failed("make", path))
}

fn grow(file: &File, path: &Path, bytes: u64) -> Result<(), BackendError> {
    if file.metadata().map_err(failed("look at", path))?.len() < bytes {
        file.set_len(bytes).map_err(failed("grow", path))?;
    }
    Ok(())
}
