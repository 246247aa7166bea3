//! Setting volumes back to a snapshot. LVM has one command for it that uses the snapshot up; here
//! the snapshot stays, and a call that was cut off is finished by the next one.

use super::{LvmBackend, TAG, name_of};
use crate::backend::notes::open_to_read;
use crate::backend::{BackendError, Item, Progress, transfer};

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

    /// What differs is written back from the snapshot, which stays as it is. LVM's own way, a merge,
    /// uses the snapshot up and gives the space of its old bytes to whoever comes next, unwiped.
    pub(super) fn revert_thick(
        &self,
        item: Item,
        snapshot: Item,
        progress: &Progress,
    ) -> Result<(), BackendError> {
        self.must_have("revert to", snapshot)?;
        let (path, from) = (self.path(item), self.path(snapshot));
        let (target, source) = (self.open_to_write(&path)?, open_to_read(&from)?);
        transfer::write_back((&source, &from), (&target, &path), progress)
    }
}
