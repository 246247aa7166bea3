//! Keeping our way into files that are given away.
//!
//! libvirt makes a running guest's files its own user's, who shares them with nobody. An access
//! list survives that: it names the agent's user beside the owner, so that a volume can grow
//! and be looked at while a guest uses it, without any capability.

use std::fs::File;
use std::path::Path;

use rustix::fs::{XattrFlags, fsetxattr};
use rustix::io::Errno;

use crate::backend::BackendError;
use crate::backend::notes::failed;

/// Attribute in which the kernel keeps access lists.
const ATTRIBUTE: &str = "system.posix_acl_access";

const VERSION: u32 = 2;
const OWNER: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHERS: u16 = 0x20;
const READ_WRITE: u16 = 6;
const NONE: u16 = 0;
const NOBODY: u32 = u32::MAX;

/// Lets this process's user read and write the file, whoever will own it.
pub(super) fn keep(file: &File, path: &Path) -> Result<(), BackendError> {
    let me = nix::unistd::geteuid();
    if me.is_root() {
        return Ok(());
    }
    match fsetxattr(file, ATTRIBUTE, &list(me.as_raw()), XattrFlags::empty()) {
        // Without access lists (NFS, some FUSE) the volume works, but cannot grow under a guest.
        Err(Errno::OPNOTSUPP) => Ok(()),
        set => set.map_err(|errno| failed("set the access list of", path)(errno.into())),
    }
}

/// The list in the kernel's form: little-endian, entries in the order of their tags.
fn list(user: u32) -> Vec<u8> {
    let entries = [
        (OWNER, READ_WRITE, NOBODY),
        (USER, READ_WRITE, user),
        (GROUP, NONE, NOBODY),
        (MASK, READ_WRITE, NOBODY),
        (OTHERS, NONE, NOBODY),
    ];
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_what_the_kernel_takes_and_gives_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let list = list(12345);
        match fsetxattr(file.as_file(), ATTRIBUTE, &list, XattrFlags::empty()) {
            Err(Errno::OPNOTSUPP) => {
                panic!("the temporary folder's file system has no access lists")
            }
            set => set.unwrap(),
        }
        let mut kept = vec![0; 100];
        let length = rustix::fs::fgetxattr(file.as_file(), ATTRIBUTE, &mut kept).unwrap();
        assert_eq!(kept[..length], list[..]);
    }
}
