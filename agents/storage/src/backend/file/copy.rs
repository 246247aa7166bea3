//! Copies that keep holes as holes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::failed;
use crate::backend::{BackendError, Progress};

/// Bytes between two looks at whether the copy was called off.
const CHUNK: u64 = 8 << 20;

/// Copies the data of `source` to the same places of `target`, which is empty, and gives it the
/// same size.
pub(super) fn sparse(
    source: &File,
    source_path: &Path,
    target: &File,
    target_path: &Path,
    progress: &Progress,
) -> Result<(), BackendError> {
    let reading = |errno: Errno| failed("read", source_path)(errno.into());
    // The end, rather than the metadata: block devices have no length there.
    let length = lseek(source, 0, Whence::SeekEnd).map_err(reading)?;
    let total = unsigned(length);
    progress.total.store(total, Ordering::Relaxed);
    target.set_len(total).map_err(failed("size", target_path))?;
    let mut position = 0;
    while position < length {
        let data = match lseek(source, position, Whence::SeekData) {
            Ok(data) => data,
            Err(Errno::ENXIO) => break,
            // No notion of holes: all of it is data.
            Err(Errno::EINVAL) => position,
            Err(errno) => return Err(reading(errno)),
        };
        let end = match lseek(source, data, Whence::SeekHole) {
            Ok(hole) => hole,
            Err(Errno::EINVAL) => length,
            Err(errno) => return Err(reading(errno)),
        };
        range(source, source_path, target, target_path, data..end.min(length), progress)?;
        position = end;
    }
    progress.done.store(total, Ordering::Relaxed);
    Ok(())
}

fn range(
    mut source: &File,
    source_path: &Path,
    mut target: &File,
    target_path: &Path,
    span: Range<i64>,
    progress: &Progress,
) -> Result<(), BackendError> {
    let (mut position, end) = (unsigned(span.start), unsigned(span.end));
    source.seek(SeekFrom::Start(position)).map_err(failed("read", source_path))?;
    target.seek(SeekFrom::Start(position)).map_err(failed("write", target_path))?;
    while position < end {
        if progress.cancelled.load(Ordering::Relaxed) {
            return Err(BackendError::Cancelled { path: target_path.to_owned() });
        }
        // Inside the kernel where it can, through memory where it cannot.
        let copied = io::copy(&mut source.take(CHUNK.min(end - position)), &mut target)
            .map_err(failed("copy into", target_path))?;
        if copied == 0 {
            // Shorter than it was at the start.
            return Err(failed("read", source_path)(io::ErrorKind::UnexpectedEof.into()));
        }
        position += copied;
        progress.done.store(position, Ordering::Relaxed);
    }
    Ok(())
}

fn unsigned(offset: i64) -> u64 {
    u64::try_from(offset).unwrap_or(0)
}
