//! What the agent remembers of a volume group outside of it: which items were finished, which
//! group it was, and how far wipes came. A file each, in a folder of the state folder.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use stackhand_image::files::{failed, names, read_json, remove, sync_folder, write_json};

use crate::backend::notes::{read_identity, write_identity};
use crate::backend::{BackendError, Item};

#[derive(Debug)]
pub(super) struct Roll {
    identity: PathBuf,
    folder: PathBuf,
}

/// Why the group's identity is in doubt.
#[derive(Debug)]
pub(super) enum RollError {
    /// It was another one, with this UUID.
    Other(String),
    /// Nobody knows.
    Backend(BackendError),
}

impl Roll {
    pub(super) fn new(folder: &Path, backend: &str) -> Self {
        Self {
            identity: folder.join(format!("{backend}.json")),
            folder: folder.join(format!("{backend}.items")),
        }
    }

    pub(super) fn identity(&self) -> &Path {
        &self.identity
    }

    /// Makes sure that the group is the one it was last time, and at the first time notes it.
    pub(super) fn check_identity(&self, uuid: &str) -> Result<(), RollError> {
        match read_identity(&self.identity).map_err(RollError::Backend)? {
            Some(known) if known == uuid => Ok(()),
            Some(known) => Err(RollError::Other(known)),
            None => {
                fs::create_dir_all(&self.folder).map_err(|error| {
                    RollError::Backend(failed("make", &self.folder)(error).into())
                })?;
                write_identity(&self.identity, uuid).map_err(RollError::Backend)
            }
        }
    }

    pub(super) fn has(&self, item: Item) -> bool {
        self.folder.join(item.to_string()).exists()
    }

    pub(super) fn items(&self) -> Result<BTreeSet<Item>, BackendError> {
        Ok(names(&self.folder)?.iter().filter_map(|name| Item::recognise(name)).collect())
    }

    /// Notes that an item is finished.
    pub(super) fn add(&self, item: Item) -> Result<(), BackendError> {
        let path = self.folder.join(item.to_string());
        fs::create_dir_all(&self.folder).map_err(failed("make", &self.folder))?;
        File::create(&path).map_err(failed("make", &path))?;
        Ok(sync_folder(&self.folder)?)
    }

    pub(super) fn remove(&self, item: Item) -> Result<(), BackendError> {
        Ok(remove(&self.folder.join(item.to_string()))?)
    }

    fn wiped(&self, leftover: &str) -> PathBuf {
        self.folder.join(format!("{leftover}.wiped"))
    }

    /// How far a wipe is, in bytes; what is not known is 0.
    pub(super) fn progress(&self, leftover: &str) -> u64 {
        read_json(&self.wiped(leftover)).ok().flatten().unwrap_or(0)
    }

    pub(super) fn keep_progress(&self, leftover: &str, done: u64) {
        if let Err(error) = write_json(&self.wiped(leftover), &done) {
            // A wipe that is cut off then begins earlier.
            tracing::debug!(%error, "cannot note how far a wipe is");
        }
    }

    pub(super) fn forget_progress(&self, leftover: &str) -> Result<(), BackendError> {
        Ok(remove(&self.wiped(leftover))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_roll_remembers_items_wipes_and_which_group_it_was() {
        let root = tempfile::tempdir().unwrap();
        let roll = Roll::new(root.path(), "fast");
        assert!(roll.items().unwrap().is_empty());
        roll.check_identity("a").unwrap();
        roll.check_identity("a").unwrap();
        let other = roll.check_identity("b").unwrap_err();
        assert!(matches!(other, RollError::Other(known) if known == "a"));

        let item = Item::Volume(stackhand_model::VolumeId(uuid::Uuid::from_u128(1)));
        roll.add(item).unwrap();
        assert!(roll.has(item));
        roll.keep_progress("stackhand-wipe-x", 4096);
        assert_eq!(roll.progress("stackhand-wipe-x"), 4096);
        assert_eq!(roll.progress("stackhand-wipe-y"), 0);
        assert_eq!(roll.items().unwrap(), [item].into());
        roll.remove(item).unwrap();
        roll.forget_progress("stackhand-wipe-x").unwrap();
        assert_eq!((roll.has(item), roll.progress("stackhand-wipe-x")), (false, 0));
    }
}
