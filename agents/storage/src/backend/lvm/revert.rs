//! Setting volumes back to a snapshot. LVM has one command for it that uses the snapshot up; here
//! the snapshot stays, and a call that was cut off is finished by the next one.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{LvmBackend, TAG, name_of};
use crate::backend::{BackendError, Item, Progress};

/// How often a merge is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// LVM's letter for a volume that a snapshot is merged into.
const MERGING: char = 'O';

/// How the names begin of what a volume becomes, and of what it was.
const FRESH: &str = "stackhand-revert-";
const OLD: &str = "stackhand-old-";

/// The volume that such a name belongs to. Left behind if the volume is deleted on the way back.
pub(super) fn of_revert(name: &str) -> Option<Item> {
    Item::recognise(name.strip_prefix(FRESH).or_else(|| name.strip_prefix(OLD))?)
}

impl LvmBackend {
    /// A copy of the snapshot takes the volume's name. Each change is whole, and what a crash
    /// leaves is told by the names.
    pub(super) fn revert_thin(&self, item: Item, snapshot: Item) -> Result<(), BackendError> {
        let (name, group) = (name_of(item), self.group()?);
        let (fresh, old) = (format!("{FRESH}{item}"), format!("{OLD}{item}"));
        let find = |name: &str| group.volumes.iter().find(|volume| volume.name == name);
        let rename = |from: &str, to: &str| {
            self.change("revert", from, "lvrename", &[&self.options.group, from, to])
        };
        if find(&old).is_none() {
            let volume = self.must_have("revert", item)?;
            let original = self.must_have("revert to", snapshot)?;
            let (from, full) = (self.full(&name_of(snapshot)), self.full(&fresh));
            // Left by a call that was cut off; perhaps one that went back to another snapshot.
            let left = find(&fresh);
            let kept = left.filter(|it| it.origin.as_deref() == Some(original.name.as_str()));
            if left.is_some() && kept.is_none() {
                self.change("revert", &fresh, "lvremove", &["-f", &full])?;
            }
            if kept.is_none() {
                let args = ["-s", "-kn", "-ay", "-prw", "-n", &fresh, "--addtag", TAG, &from];
                self.change("revert", &fresh, "lvcreate", &args)?;
            }
            if kept.map_or(original.bytes, |it| it.bytes) < volume.bytes {
                let size = format!("{}b", volume.bytes);
                self.change("revert", &fresh, "lvextend", &["-L", &size, &full])?;
            }
            rename(&name, &old)?;
            rename(&fresh, &name)?;
        } else if find(&name).is_none() {
            // Cut off between the two.
            rename(&fresh, &name)?;
        }
        self.change("revert", &old, "lvremove", &["-f", &self.full(&old)])
    }

    /// The snapshot is merged back, which uses it up; then it is taken again of the same bytes.
    pub(super) fn revert_thick(
        &self,
        item: Item,
        snapshot: Item,
        progress: &Progress,
    ) -> Result<(), BackendError> {
        let (name, from) = (name_of(item), self.full(&name_of(snapshot)));
        if self.is_merging(item)? {
            // Whoever had begun it is gone; the kernel goes on, and LVM is to see the end.
            self.change("revert", &name, "lvchange", &["--poll", "y", &self.full(&name)])?;
        } else if self.have("revert to", snapshot)?.is_some() {
            self.change("revert", &name, "lvconvert", &["--merge", "--background", &from])?;
        } else if !self.roll.has(snapshot) {
            return self.must_have("revert to", snapshot).map(drop);
        }
        while self.is_merging(item)? {
            if progress.cancelled.load(Ordering::Relaxed) {
                return Err(BackendError::Cancelled { path: self.path(item) });
            }
            std::thread::sleep(LOOK_EVERY);
        }
        // Noted as finished all along: a call that is cut off before this is known as such.
        if self.have("revert to", snapshot)?.is_none() {
            self.take_snapshot(snapshot, item)?;
        }
        self.roll.add(snapshot)
    }

    /// Whether a snapshot is being merged into the volume. LVM hides the snapshot meanwhile.
    fn is_merging(&self, item: Item) -> Result<bool, BackendError> {
        Ok(self.must_have("revert", item)?.kind == MERGING)
    }
}
