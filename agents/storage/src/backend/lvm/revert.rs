//! Setting volumes back to a snapshot. LVM has one command for it that uses the snapshot up; here
//! the snapshot stays, and a call that was cut off is finished by the next one.

use super::{LvmBackend, TAG, name_of};
use crate::backend::{Backend, BackendError, Item};

impl LvmBackend {
    /// A copy of the snapshot takes the volume's name. Each change is whole, and what a crash
    /// leaves is told by the names.
    pub(super) fn revert_thin(&self, item: Item, snapshot: Item) -> Result<(), BackendError> {
        let (name, group) = (name_of(item), self.group()?);
        let (fresh, old) = (format!("stackhand-revert-{item}"), format!("stackhand-old-{item}"));
        let find = |name: &str| group.volumes.iter().find(|volume| volume.name == name);
        let rename = |from: &str, to: &str| {
            self.change("revert", from, "lvrename", &[&self.options.group, from, to])
        };
        if find(&old).is_none() {
            let volume = self.must_have("revert", item)?;
            let original = self.must_have("revert to", snapshot)?;
            if find(&fresh).is_some() {
                self.change("revert", &fresh, "lvremove", &["-f", &self.full(&fresh)])?;
            }
            let (from, full) = (self.full(&name_of(snapshot)), self.full(&fresh));
            let args = ["-s", "-kn", "-ay", "-prw", "-n", &fresh, "--addtag", TAG, &from];
            self.change("revert", &fresh, "lvcreate", &args)?;
            if original.bytes < volume.bytes {
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
    pub(super) fn revert_thick(&self, item: Item, snapshot: Item) -> Result<(), BackendError> {
        let (name, snapshot_name) = (name_of(item), name_of(snapshot));
        self.must_have("revert", item)?;
        if self.have("revert to", snapshot)?.is_some() {
            let full = self.full(&snapshot_name);
            self.change("revert", &name, "lvconvert", &["--merge", "--interval", "1", &full])?;
        } else if !self.roll.has(snapshot) {
            return self.must_have("revert to", snapshot).map(drop);
        }
        if self.have("revert to", snapshot)?.is_some() {
            return Err(BackendError::Unable {
                action: "revert",
                subject: self.path(item).display().to_string(),
                reason: "LVM has not merged the snapshot yet: it goes on by itself".into(),
            });
        }
        self.roll.remove(snapshot)?;
        self.clone_item(snapshot, item, 0)
    }
}
