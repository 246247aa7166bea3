//! Volumes and snapshots as logical volumes of a volume group: thin ones from a pool, or thick.
//!
//! LVM's own metadata is the truth: a change of it is whole or not there, whenever the power fails.
//! What we made carries the tag `stackhand`:
//!
//! | name | tags | then it is |
//! |---|---|---|
//! | `volume-<id>`, `_snapshot-<id>` | `stackhand` | complete |
//! | the same | `stackhand`, `stackhand.new` | unfinished: removed and begun again |
//! | the same | no `stackhand` | foreign: left alone |
//! | `stackhand-wipe-<any>` | `stackhand` | deleted; its bytes are overwritten before its space is free |
//! | `stackhand-revert-<item>`, `stackhand-old-<item>` | `stackhand` | a thin volume on its way back to a snapshot |
//!
//! (LVM keeps names that begin with `snapshot` for itself, hence the underscore, as in Cinder.)
//!
//! | | thin | thick |
//! |---|---|---|
//! | a new volume reads as zeroes | the pool sees to it | freed space was wiped, see `wipe` |
//! | snapshot | at once | at once, takes the volume's size again |
//! | clone | at once | a copy in the background |
//! | deleted | at once | at once; its space is free once it is wiped |
//!
//! The agent's state folder keeps a roll of what was finished, so that a volume that somebody
//! removed is told as lost and never made again as an empty one, and the group's UUID, so that
//! another group of the same name is not taken for it.

mod command;
mod look;
mod memory;
mod report;
mod revert;
mod roll;

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use stackhand_kernel::exec::ExecError;
use tokio::runtime::Handle;

use super::notes::{failed, open_to_read};
use super::transfer::{self, Holes};
use super::{Backend, BackendError, Item, Observed, Place, Progress, Write, lock};
pub use command::LVM;
use command::Lvm;
use memory::{Change, Memory};
use report::{Group, Volume};
use roll::Roll;

/// Tag of everything that we made.
pub const TAG: &str = "stackhand";

/// Tag of what is not finished.
const UNFINISHED: &str = "stackhand.new";

/// How the names of deleted volumes begin whose bytes are still there.
const TO_WIPE: &str = "stackhand-wipe-";

/// Name of an item's logical volume.
pub(super) fn name_of(item: Item) -> String {
    match item {
        Item::Volume(_) => item.to_string(),
        Item::Snapshot(_) => format!("_{item}"),
    }
}

fn item_of(name: &str) -> Option<Item> {
    let item = Item::recognise(name.strip_prefix('_').unwrap_or(name))?;
    (name_of(item) == name).then_some(item)
}

/// How a group keeps volumes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// From a thin pool, as they are written to.
    Thin {
        /// The pool's name.
        pool: String,
    },
    /// Whole from the start.
    Thick,
}

/// What a backend in a volume group is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// The volume group.
    pub group: String,
    /// How it keeps volumes.
    pub allocation: Allocation,
    /// Disks that LVM may look at. Empty: all but those of attached volumes.
    pub devices: Vec<PathBuf>,
    /// Most bytes a second that a wipe writes.
    pub wipe_rate: u64,
    /// Whether freed space is overwritten before others get it. Thin pools see to it themselves.
    pub wipe: bool,
    /// Shared by all backends of the group: one change at a time.
    pub turn: Arc<Mutex<()>>,
}

/// A volume group that keeps volumes.
#[derive(Debug)]
pub struct LvmBackend {
    name: String,
    options: Options,
    lvm: Lvm,
    roll: Roll,
    memory: Memory,
}

impl LvmBackend {
    /// The backend called `name`. Touches nothing yet. Must be made inside the runtime, which
    /// runs its commands.
    #[must_use]
    pub fn new(name: &str, state_dir: &Path, options: Options) -> Self {
        let lvm = Lvm::new(options.devices.clone(), Arc::clone(&options.turn), Handle::current());
        let roll = Roll::new(&state_dir.join("backends"), name);
        Self { name: name.to_owned(), options, lvm, roll, memory: Memory::default() }
    }

    fn is_thin(&self) -> bool {
        self.options.allocation != Allocation::Thick
    }

    fn place(&self) -> Place {
        Place::Group(self.options.group.clone())
    }

    fn path(&self, item: Item) -> PathBuf {
        self.place().path(item)
    }

    fn device(&self, name: &str) -> PathBuf {
        Path::new("/dev").join(&self.options.group).join(name)
    }

    fn not_ours(&self, action: &'static str, name: &str) -> BackendError {
        let what = "it is not one of ours".into();
        BackendError::InTheWay { action, path: self.device(name), what }
    }

    /// `group/volume`, as LVM's commands take it.
    fn full(&self, name: &str) -> String {
        format!("{}/{name}", self.options.group)
    }

    fn away(&self, reason: String) -> BackendError {
        BackendError::Away { backend: self.name.clone(), reason }
    }

    fn change(
        &self,
        action: &'static str,
        subject: &str,
        command: &str,
        args: &[&str],
    ) -> Result<(), BackendError> {
        self.known_change(action, subject, command, args).map(drop)
    }

    /// A change whose effect the caller knows.
    fn known_change(
        &self,
        action: &'static str,
        subject: &str,
        command: &str,
        args: &[&str],
    ) -> Result<Change<'_>, BackendError> {
        let change = self.memory.change();
        self.lvm.change(command, args).map_err(|source| BackendError::Program {
            action,
            subject: self.full(subject),
            source,
        })?;
        Ok(change)
    }

    /// Looks at the group, and makes sure that it is the one it was last time.
    fn group(&self) -> Result<Group, BackendError> {
        let (name, look) = (&self.options.group, self.memory.look());
        let read = |columns: &str| {
            let json = self.lvm.report("vgs", &["-o", columns, name]).map_err(|error| {
                let reason = match &*error {
                    ExecError::Failed { stderr, .. } if stderr.contains("not found") => format!(
                        "there is no volume group {name}: connect its disks, or make it with \
                         `vgcreate {name} DISK...`"
                    ),
                    ExecError::Start { .. } => format!("{LVM} cannot be run: install lvm2"),
                    error => error.to_string(),
                };
                self.away(reason)
            })?;
            report::parse(&json).map_err(|why| self.away(format!("volume group {name}: {why}")))
        };
        let group = match read(report::COLUMNS)? {
            Some(group) => group,
            None => read(report::GROUP_COLUMNS)?
                .ok_or_else(|| self.away(format!("volume group {name} has no report")))?,
        };
        self.roll.check_identity(&group.uuid).map_err(|error| match error {
            roll::RollError::Other(expected) => self.away(format!(
                "volume group {name} is not the one that held this backend's volumes (UUID {}, \
                 expected {expected}): connect the right disks, or remove {} to begin anew \
                 without them",
                group.uuid,
                self.roll.identity().display()
            )),
            roll::RollError::Backend(error) => error,
        })?;
        self.memory.keep(&look, group.clone());
        Ok(group)
    }

    /// The group as it is remembered: a look costs half as much as a change. Only for what LVM
    /// itself refuses if it is no longer so.
    fn known_group(&self) -> Result<Group, BackendError> {
        self.memory.recall().map_or_else(|| self.group(), Ok)
    }

    /// The pool, where there is one.
    fn pool<'a>(&self, group: &'a Group) -> Result<Option<&'a Volume>, BackendError> {
        let Allocation::Thin { pool } = &self.options.allocation else { return Ok(None) };
        let name = &self.options.group;
        match group.volumes.iter().find(|volume| volume.name == *pool) {
            Some(volume) if volume.kind == 't' => Ok(Some(volume)),
            Some(_) => Err(self.away(format!("{name}/{pool} is not a thin pool"))),
            None => Err(self.away(format!(
                "volume group {name} has no thin pool {pool}: make it with `lvcreate --type \
                 thin-pool -l 95%FREE -n {pool} {name}`"
            ))),
        }
    }

    /// The item's volume, if it is there and ours.
    fn have(&self, action: &'static str, item: Item) -> Result<Option<Volume>, BackendError> {
        self.have_in(self.group()?, action, item)
    }

    fn have_in(
        &self,
        group: Group,
        action: &'static str,
        item: Item,
    ) -> Result<Option<Volume>, BackendError> {
        let name = name_of(item);
        let found = group.volumes.into_iter().find(|volume| volume.name == name);
        match found {
            Some(volume) if !volume.tags.contains(TAG) => {
                Err(BackendError::InTheWay { action, path: self.path(item), what: FOREIGN.into() })
            }
            found => Ok(found),
        }
    }

    fn must_have(&self, action: &'static str, item: Item) -> Result<Volume, BackendError> {
        self.have(action, item)?.ok_or_else(|| BackendError::Unable {
            action,
            subject: self.path(item).display().to_string(),
            reason: "it is not there".into(),
        })
    }

    /// Makes an empty volume; `tags` beside ours.
    fn allocate(&self, item: Item, bytes: u64, unfinished: bool) -> Result<(), BackendError> {
        let (name, size) = (name_of(item), format!("{bytes}b"));
        let mut args = vec!["-n", &name, "--addtag", TAG];
        if unfinished {
            args.extend(["--addtag", UNFINISHED]);
        }
        let pool;
        match &self.options.allocation {
            // A thin volume reads as zeroes: there is no old signature to wipe.
            Allocation::Thin { pool: it } => {
                pool = self.full(it);
                args.extend(["-Wn", "-V", &size, "-T", &pool]);
            }
            Allocation::Thick => args.extend(["-Wy", "-Zy", "-L", &size, &self.options.group]),
        }
        let change = self.known_change("make", &name, "lvcreate", &args)?;
        if let Allocation::Thin { pool } = &self.options.allocation
            && !unfinished
        {
            change.remember(|group| group.volumes.push(Volume::new_thin(&name, pool, bytes)));
        }
        Ok(())
    }

    /// Runs `make` unless the item is there; begins anew what was not finished.
    fn make(
        &self,
        item: Item,
        make: impl FnOnce() -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        match self.have_in(self.known_group()?, "make", item)? {
            Some(volume) if volume.tags.contains(UNFINISHED) => self.discard(item)?,
            Some(_) => return self.roll.add(item),
            None if self.roll.has(item) => {
                let path = self.path(item);
                return Err(BackendError::InTheWay { action: "make", path, what: LOST.into() });
            }
            None => {}
        }
        make()?;
        self.roll.add(item)
    }

    /// Makes an item from another as it is now.
    fn take_snapshot(&self, item: Item, source: Item) -> Result<(), BackendError> {
        let original = self.must_have("copy", source)?;
        let (name, from) = (name_of(item), self.full(&name_of(source)));
        let mut args = vec!["-s", "-n", &name, "--addtag", TAG];
        // Room for every byte of the volume to change; LVM cuts it down to what can be used.
        let space = format!("{}b", original.bytes + original.bytes / 32 + (16 << 20));
        match item {
            Item::Snapshot(_) if !self.is_thin() => args.extend(["-L", &space]),
            // Such a snapshot would not be activated after a reboot, and nothing would read it.
            _ => args.extend(["-kn", "-ay"]),
        }
        if matches!(item, Item::Snapshot(_)) {
            args.push("-pr");
        }
        args.push(&from);
        self.change("make", &name, "lvcreate", &args)
    }

    /// Takes a volume of ours out of use: thin ones are gone, thick ones wait to be wiped.
    fn take_out(&self, name: &str) -> Result<(), BackendError> {
        let full = self.full(name);
        if self.is_thin() || !self.options.wipe {
            let change = self.known_change("delete", name, "lvremove", &["-f", &full])?;
            if self.is_thin() {
                change.remember(|group| group.remove_thin(name));
            }
            return Ok(());
        }
        let doomed = format!("{TO_WIPE}{}", uuid::Uuid::new_v4());
        self.change("delete", name, "lvrename", &[&self.options.group, name, &doomed])
    }

    fn open_to_write(&self, path: &Path) -> Result<File, BackendError> {
        File::options()
            .read(true)
            .write(true)
            // Nobody else has it: a device in use is refused by the kernel.
            .custom_flags(nix::libc::O_EXCL)
            .open(path)
            .map_err(failed("open", path))
    }
}

const FOREIGN: &str = "a logical volume that the agent did not make";
const LOST: &str = "it was there and is gone: bring it back (vgcfgrestore), or delete the object";

impl Backend for LvmBackend {
    fn observe(&self) -> Result<Observed, BackendError> {
        self.look(&self.group()?)
    }

    fn recall(&self) -> Result<Observed, BackendError> {
        self.look(&self.known_group()?)
    }

    fn create(&self, item: Item, bytes: u64) -> Result<(), BackendError> {
        self.make(item, || self.allocate(item, bytes, false))
    }

    fn clone_item(&self, item: Item, source: Item, bytes: u64) -> Result<(), BackendError> {
        self.make(item, || self.take_snapshot(item, source))?;
        if matches!(item, Item::Volume(_)) { self.extend(item, bytes) } else { Ok(()) }
    }

    fn copy(
        &self,
        item: Item,
        source: &Path,
        bytes: u64,
        progress: &Progress,
    ) -> Result<(), BackendError> {
        let from = lock::keep_writers_out(open_to_read(source)?, source)?;
        let holes = if self.is_thin() { Holes::Kept } else { Holes::Filled };
        self.import(item, bytes, &mut |path| {
            let target = self.open_to_write(path)?;
            transfer::copy((&from, source), (&target, path), holes, progress)
        })
    }

    fn import(&self, item: Item, bytes: u64, write: &mut Write<'_>) -> Result<(), BackendError> {
        self.make(item, || {
            self.allocate(item, bytes, true)?;
            let mut fill = || {
                let path = self.path(item);
                write(&path)?;
                open_to_read(&path)?.sync_all().map_err(failed("sync", &path))?;
                let name = name_of(item);
                let full = self.full(&name);
                self.change("finish", &name, "lvchange", &["--deltag", UNFINISHED, &full])
            };
            fill().inspect_err(|_| {
                if let Err(error) = self.discard(item) {
                    // The next look finds it and tries again.
                    tracing::warn!(%item, %error, "cannot remove the unfinished volume");
                }
            })
        })
    }

    fn revert(&self, item: Item, snapshot: Item, progress: &Progress) -> Result<(), BackendError> {
        if self.have("revert", item)?.is_some_and(|volume| volume.open) {
            return Err(BackendError::InUse { action: "revert", path: self.path(item) });
        }
        if self.is_thin() {
            self.revert_thin(item, snapshot)
        } else {
            self.revert_thick(item, snapshot, progress)
        }
    }

    fn activate(&self, item: Item) -> Result<(), BackendError> {
        let name = name_of(item);
        self.must_have("activate", item)?;
        self.change("activate", &name, "lvchange", &["-ay", "-K", &self.full(&name)])
    }

    fn extend(&self, item: Item, bytes: u64) -> Result<(), BackendError> {
        let volume = self.must_have("extend", item)?;
        if volume.bytes >= bytes {
            return Ok(());
        }
        let name = name_of(item);
        if volume.kind == 'o' && volume.open {
            return Err(BackendError::Unable {
                action: "extend",
                subject: self.path(item).display().to_string(),
                reason: "a thick volume with snapshots cannot grow while it is used: stop the \
                         instance, or delete the snapshots"
                    .into(),
            });
        }
        let (size, full) = (format!("{bytes}b"), self.full(&name));
        let is_origin = volume.kind == 'o';
        if is_origin && volume.active {
            self.change("extend", &name, "lvchange", &["-an", &full])?;
        }
        self.change("extend", &name, "lvextend", &["-L", &size, &full])?;
        if is_origin || !volume.active {
            self.activate(item)?;
        }
        Ok(())
    }

    fn delete(&self, item: Item) -> Result<(), BackendError> {
        let group = self.memory.recent().map_or_else(|| self.group(), Ok)?;
        let mut found = self.have_in(group, "delete", item)?;
        if found.as_ref().is_some_and(|volume| volume.open) {
            // Not any more, perhaps.
            found = self.have("delete", item)?;
        }
        if let Some(volume) = found {
            if volume.open {
                return Err(BackendError::InUse { action: "delete", path: self.path(item) });
            }
            if volume.kind == 's' && self.options.wipe {
                // Its space holds old bytes of the volume, which the snapshot itself hides.
                let full = self.full(&volume.name);
                self.change("delete", &volume.name, "lvconvert", &["--splitsnapshot", &full])?;
            }
            self.take_out(&volume.name)?;
        }
        self.roll.remove(item)
    }

    fn discard(&self, item: Item) -> Result<(), BackendError> {
        match self.have("discard", item)? {
            Some(volume) if volume.tags.contains(UNFINISHED) => self.take_out(&volume.name),
            _ => Ok(()),
        }
    }

    fn sweep(&self, leftover: &str) -> Result<(), BackendError> {
        let found = self.group()?.volumes.into_iter().find(|volume| volume.name == leftover);
        match found {
            None => Ok(()),
            Some(volume) if volume.tags.contains(TAG) && revert::of_revert(leftover).is_some() => {
                self.change("sweep", leftover, "lvremove", &["-f", &self.full(leftover)])
            }
            Some(_) => Err(self.not_ours("sweep", leftover)),
        }
    }

    fn wipe(&self, leftover: &str, progress: &Progress) -> Result<(), BackendError> {
        let found = self.group()?.volumes.into_iter().find(|volume| volume.name == leftover);
        let path = self.device(leftover);
        let Some(volume) = found else { return self.roll.forget_progress(leftover) };
        if !leftover.starts_with(TO_WIPE) || !volume.tags.contains(TAG) {
            return Err(self.not_ours("wipe", leftover));
        }
        let full = self.full(leftover);
        if !volume.active {
            self.change("wipe", leftover, "lvchange", &["-ay", &full])?;
        }
        if !volume.writable {
            // What a snapshot was kept in.
            self.change("wipe", leftover, "lvchange", &["-prw", &full])?;
        }
        let target = self.open_to_write(&path)?;
        let from = self.roll.progress(leftover);
        transfer::wipe(&target, &path, from, self.options.wipe_rate, progress, |done| {
            self.roll.keep_progress(leftover, done);
        })?;
        drop(target);
        self.change("wipe", leftover, "lvremove", &["-f", &full])?;
        self.roll.forget_progress(leftover)
    }

    fn adopt(&self, item: Item) -> Result<(), BackendError> {
        let name = name_of(item);
        let found = self.group()?.volumes.into_iter().find(|volume| volume.name == name);
        let Some(volume) = found else {
            let what = "there is no such volume".into();
            return Err(BackendError::InTheWay { action: "adopt", path: self.path(item), what });
        };
        if volume.pool.is_some() != self.is_thin() {
            let what = "it is not of this backend's kind (thin, thick)".into();
            return Err(BackendError::InTheWay { action: "adopt", path: self.path(item), what });
        }
        self.change("adopt", &name, "lvchange", &["--addtag", TAG, &self.full(&name)])?;
        self.roll.add(item)
    }
}

#[cfg(test)]
mod tests {
    use stackhand_model::{SnapshotId, VolumeId};
    use uuid::Uuid;

    use super::*;

    #[test]
    fn names_are_those_that_lvm_allows_and_are_recognised() {
        let id = Uuid::from_u128(7);
        for item in [Item::Volume(VolumeId(id)), Item::Snapshot(SnapshotId(id))] {
            let name = name_of(item);
            assert!(!name.starts_with("snapshot"), "LVM keeps such names for itself: {name}");
            assert_eq!(item_of(&name), Some(item));
        }
        assert_eq!(item_of(&format!("snapshot-{id}")), None);
        assert_eq!(item_of(&format!("_volume-{id}")), None);
    }
}
