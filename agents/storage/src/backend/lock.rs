//! QEMU's own locks on image files: who has a file open, and keeping writers out.
//!
//! QEMU takes open-file-description locks on single bytes: byte 100 + n says that it uses
//! permission n, byte 200 + n that it suffers nobody else to use it. Permission 1 is writing and
//! 3 is resizing. We read the first range to learn who uses a file, and hold bytes of the second
//! while a copy is made, so that a guest that starts meanwhile is refused by its own QEMU instead
//! of spoiling the copy.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{self, c_short};

use super::notes::{failed, open_to_read};
use super::{BackendError, Usage};

const USES: i64 = 100;
const REFUSES: i64 = 200;
const WRITING: i64 = 1;
const RESIZING: i64 = 3;
const PERMISSIONS: i64 = 64;

/// Who has the file open.
pub(super) fn usage(path: &Path) -> Result<Usage, BackendError> {
    let file = match open_to_read(path) {
        // libvirt gives the file of a running guest to that guest's user.
        Err(BackendError::Io { source, .. }) if source.kind() == ErrorKind::PermissionDenied => {
            return Ok(Usage::Written);
        }
        opened => opened?,
    };
    let held = |start, length| {
        is_held(&file, start, length).map_err(|e| failed("read locks of", path)(e.into()))
    };
    Ok(if held(USES + WRITING, 1)? {
        Usage::Written
    } else if held(USES, PERMISSIONS)? {
        Usage::Read
    } else {
        Usage::Free
    })
}

/// Keeps QEMU from opening the file for writing for as long as the returned file is open.
///
/// # Errors
///
/// Fails if it is open for writing now.
pub(super) fn keep_writers_out(file: File, path: &Path) -> Result<File, BackendError> {
    for permission in [WRITING, RESIZING] {
        let lock = range(libc::F_RDLCK, REFUSES + permission, 1);
        fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock))
            .map_err(|errno| failed("lock", path)(errno.into()))?;
    }
    // In this order there is no gap: a writer that came first is seen now, one that comes later
    // sees our lock.
    if is_held(&file, USES + WRITING, 1)
        .map_err(|errno| failed("read locks of", path)(errno.into()))?
    {
        return Err(BackendError::InUse { action: "copy", path: path.to_owned() });
    }
    Ok(file)
}

/// Whether somebody else holds a lock of any kind on the bytes.
fn is_held(file: &File, start: i64, length: i64) -> nix::Result<bool> {
    // Asking for a write lock conflicts with every other.
    let mut lock = range(libc::F_WRLCK, start, length);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn range(kind: i32, start: i64, length: i64) -> libc::flock {
    libc::flock {
        l_type: c_short::try_from(kind).unwrap_or_default(),
        l_whence: c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}
