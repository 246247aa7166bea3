//! Clones of files that share their blocks, where the file system can (XFS, btrfs).
#![expect(unsafe_code, reason = "the ioctl has no safe wrapper")]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use stackhand_image::files::{failed, remove};

use crate::backend::BackendError;

mod ioctl {
    nix::ioctl_write_int!(ficlone, 0x94, 9);
}

/// Gives `target` the contents of `source` at this moment, sharing its blocks.
///
/// # Errors
///
/// Fails with `EOPNOTSUPP` and relatives where the file system cannot.
pub(super) fn clone(source: &File, target: &File) -> io::Result<()> {
    let source = nix::libc::c_ulong::try_from(source.as_raw_fd()).map_err(io::Error::other)?;
    // SAFETY: FICLONE takes a file descriptor by value and touches no memory of ours; both
    // descriptors are open for the length of the call because we hold the files.
    unsafe { ioctl::ficlone(target.as_raw_fd(), source) }?;
    Ok(())
}

/// Tries whether files in `folder` can be cloned, with two small files.
pub(super) fn probe(folder: &Path) -> Result<bool, BackendError> {
    let [from, to] = ["probe-from", "probe-to"].map(|name| folder.join(name));
    let make = |path: &Path| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .map_err(failed("make", path))
    };
    let mut source = make(&from)?;
    let target = make(&to)?;
    source.write_all(&[1; 4096]).map_err(failed("write", &from))?;
    let works = clone(&source, &target).is_ok();
    remove(&from)?;
    remove(&to)?;
    Ok(works)
}
