//! Copies and wipes: bytes moved in bounded pieces, with progress, and called off at any piece.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use super::notes::failed;
use super::{BackendError, Progress};

/// Bytes between two looks at whether the copy was called off.
const CHUNK: u64 = 8 << 20;

/// Bytes that are compared with zeroes at once, where the source has no notion of holes.
const PIECE: usize = 1 << 20;

/// Bytes of which a snapshot keeps the old ones when one of them is written.
const SNAPSHOT_PIECE: usize = 4 << 10;

/// What becomes of bytes that are zero in the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holes {
    /// They are left out: the target reads as zeroes where nothing was written.
    Kept,
    /// They are written: the target may hold anything.
    Filled,
}

/// Copies all of `source` to the same places of `target`, which is empty, each with its path.
/// A target that is a file gets the source's length.
pub(super) fn copy(
    (source, source_path): (&File, &Path),
    (target, target_path): (&File, &Path),
    holes: Holes,
    progress: &Progress,
) -> Result<(), BackendError> {
    let reading = |errno: Errno| failed("read", source_path)(errno.into());
    // The end, rather than the metadata: block devices have no length there.
    let length = lseek(source, 0, Whence::SeekEnd).map_err(reading)?;
    let total = unsigned(length);
    progress.total.store(total, Ordering::Relaxed);
    if target.metadata().map_err(failed("look at", target_path))?.is_file() {
        target.set_len(total).map_err(failed("size", target_path))?;
    }
    let job = Copy { source, source_path, target, target_path, holes, progress };
    let mut position = 0;
    while position < length {
        let data = match lseek(source, position, Whence::SeekData) {
            Ok(data) => data,
            Err(Errno::ENXIO) => length,
            // No notion of holes: zeroes are looked for instead.
            Err(Errno::EINVAL) => {
                job.search(unsigned(position)..total)?;
                break;
            }
            Err(errno) => return Err(reading(errno)),
        };
        if data > position {
            job.hole(unsigned(position)..unsigned(data.min(length)))?;
        }
        if data >= length {
            break;
        }
        let end = match lseek(source, data, Whence::SeekHole) {
            Ok(hole) => hole,
            Err(Errno::EINVAL) => length,
            Err(errno) => return Err(reading(errno)),
        };
        job.range(unsigned(data)..unsigned(end.min(length)))?;
        position = end;
    }
    progress.done.store(total, Ordering::Relaxed);
    Ok(())
}

struct Copy<'a> {
    source: &'a File,
    source_path: &'a Path,
    target: &'a File,
    target_path: &'a Path,
    holes: Holes,
    progress: &'a Progress,
}

impl Copy<'_> {
    fn go_on(&self, position: u64) -> Result<(), BackendError> {
        self.progress.done.store(position, Ordering::Relaxed);
        if self.progress.cancelled.load(Ordering::Relaxed) {
            return Err(BackendError::Cancelled { path: self.target_path.to_owned() });
        }
        Ok(())
    }

    fn hole(&self, span: Range<u64>) -> Result<(), BackendError> {
        if self.holes == Holes::Filled {
            zero(self.target, self.target_path, span.clone(), |position| self.go_on(position))?;
        }
        self.go_on(span.end)
    }

    /// Copies a span that holds data, inside the kernel where it can.
    fn range(&self, span: Range<u64>) -> Result<(), BackendError> {
        let (mut source, mut target) = (self.source, self.target);
        let mut position = span.start;
        source.seek(SeekFrom::Start(position)).map_err(failed("read", self.source_path))?;
        target.seek(SeekFrom::Start(position)).map_err(failed("write", self.target_path))?;
        while position < span.end {
            self.go_on(position)?;
            let copied = io::copy(&mut source.take(CHUNK.min(span.end - position)), &mut target)
                .map_err(failed("copy into", self.target_path))?;
            if copied == 0 {
                // Shorter than it was at the start.
                return Err(failed("read", self.source_path)(io::ErrorKind::UnexpectedEof.into()));
            }
            position += copied;
        }
        self.go_on(position)
    }

    /// Copies a span piece by piece; those that are all zeroes are holes.
    fn search(&self, span: Range<u64>) -> Result<(), BackendError> {
        let (mut buffer, zeroes) = (vec![0; PIECE], vec![0; PIECE]);
        let mut position = span.start;
        while position < span.end {
            self.go_on(position)?;
            let length = usize::try_from(span.end - position).unwrap_or(PIECE).min(PIECE);
            let piece = &mut buffer[..length];
            self.source.read_exact_at(piece, position).map_err(failed("read", self.source_path))?;
            let next = position + u64::try_from(length).unwrap_or(0);
            if *piece == zeroes[..length] {
                self.hole(position..next)?;
            } else {
                self.target
                    .write_all_at(piece, position)
                    .map_err(failed("copy into", self.target_path))?;
            }
            position = next;
        }
        Ok(())
    }
}

/// Gives `target`, which `source` is a snapshot of, the bytes of `source` where the two differ.
/// Only there: each other write would have the snapshot keep one more old piece.
pub(super) fn write_back(
    (source, source_path): (&File, &Path),
    (target, target_path): (&File, &Path),
    progress: &Progress,
) -> Result<(), BackendError> {
    let length = lseek(source, 0, Whence::SeekEnd)
        .map_err(|errno| failed("measure", source_path)(errno.into()))?;
    let total = unsigned(length);
    progress.total.store(total, Ordering::Relaxed);
    let (mut wanted, mut there) = (vec![0; PIECE], vec![0; PIECE]);
    let mut position = 0;
    while position < total {
        progress.done.store(position, Ordering::Relaxed);
        if progress.cancelled.load(Ordering::Relaxed) {
            return Err(BackendError::Cancelled { path: target_path.to_owned() });
        }
        let length = usize::try_from(total - position).unwrap_or(PIECE).min(PIECE);
        let (wanted, there) = (&mut wanted[..length], &mut there[..length]);
        source.read_exact_at(wanted, position).map_err(failed("read", source_path))?;
        target.read_exact_at(there, position).map_err(failed("read", target_path))?;
        if wanted != there {
            let pairs = wanted.chunks(SNAPSHOT_PIECE).zip(there.chunks(SNAPSHOT_PIECE));
            for (at, (wanted, there)) in (position..).step_by(SNAPSHOT_PIECE).zip(pairs) {
                if wanted != there {
                    target.write_all_at(wanted, at).map_err(failed("write", target_path))?;
                }
            }
        }
        position += u64::try_from(length).unwrap_or(0);
    }
    target.sync_all().map_err(failed("sync", target_path))?;
    progress.done.store(total, Ordering::Relaxed);
    Ok(())
}

/// Makes a span of a file or block device read as zeroes, telling `step` how far it is.
fn zero(
    target: &File,
    path: &Path,
    span: Range<u64>,
    mut step: impl FnMut(u64) -> Result<(), BackendError>,
) -> Result<(), BackendError> {
    let mut position = span.start;
    let mut buffer = Vec::new();
    while position < span.end {
        step(position)?;
        let length = CHUNK.min(span.end - position);
        // Block devices do it by themselves where they can, else the kernel writes zeroes.
        let flags = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        match fallocate(target, flags, signed(position), signed(length)) {
            Ok(()) => {}
            Err(Errno::EOPNOTSUPP | Errno::EINVAL) => {
                buffer.resize(usize::try_from(length).unwrap_or(PIECE), 0);
                target.write_all_at(&buffer, position).map_err(failed("overwrite", path))?;
            }
            Err(errno) => return Err(failed("overwrite", path)(errno.into())),
        }
        position += length;
    }
    step(position)
}

/// Overwrites all of a block device from `from` on with zeroes, at most `rate` bytes a second.
/// `kept` is told now and then how far it is.
pub(super) fn wipe(
    target: &File,
    path: &Path,
    from: u64,
    rate: u64,
    progress: &Progress,
    mut kept: impl FnMut(u64),
) -> Result<(), BackendError> {
    let length =
        lseek(target, 0, Whence::SeekEnd).map_err(|errno| failed("measure", path)(errno.into()))?;
    let total = unsigned(length);
    progress.total.store(total, Ordering::Relaxed);
    let begin = Instant::now();
    let mut told = from;
    zero(target, path, from.min(total)..total, |position| {
        progress.done.store(position, Ordering::Relaxed);
        if progress.cancelled.load(Ordering::Relaxed) {
            return Err(BackendError::Cancelled { path: path.to_owned() });
        }
        if position - told >= 32 * CHUNK {
            target.sync_data().map_err(failed("sync", path))?;
            kept(position);
            told = position;
        }
        let due = Duration::from_secs_f64(as_float(position - from) / as_float(rate.max(1)));
        std::thread::sleep(due.saturating_sub(begin.elapsed()));
        Ok(())
    })?;
    target.sync_all().map_err(failed("sync", path))
}

#[expect(clippy::cast_precision_loss, reason = "a rate need not be exact")]
fn as_float(number: u64) -> f64 {
    number as f64
}

fn unsigned(offset: i64) -> u64 {
    u64::try_from(offset).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_copy_keeps_holes_or_fills_them_with_zeroes() {
        let root = tempfile::tempdir().unwrap();
        let [from, sparse, full] = ["from", "sparse", "full"].map(|name| root.path().join(name));
        let open = |path: &Path| {
            File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
        };
        let source = open(&from);
        source.set_len(20 << 20).unwrap();
        source.write_all_at(&[7; 4096], 9 << 20).unwrap();
        for (path, holes) in [(&sparse, Holes::Kept), (&full, Holes::Filled)] {
            let target = open(path);
            if holes == Holes::Filled {
                (&target).write_all(&vec![1; 20 << 20]).unwrap();
            }
            let progress = Progress::default();
            copy((&source, &from), (&target, path), holes, &progress).unwrap();
            assert!(std::fs::read(path).unwrap() == std::fs::read(&from).unwrap(), "{holes:?}");
            assert_eq!(progress.percent(), 100);
        }
    }

    #[test]
    fn what_differs_is_written_back_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| root.path().join(name));
        let mut bytes = vec![3; (2 << 20) + 5000];
        std::fs::write(&from, &bytes).unwrap();
        for at in [0, PIECE - 1, (2 << 20) + 4999] {
            bytes[at] = 4;
        }
        std::fs::write(&to, &bytes).unwrap();
        let source = File::open(&from).unwrap();
        let target = File::options().read(true).write(true).open(&to).unwrap();
        let progress = Progress { cancelled: true.into(), ..Progress::default() };
        assert!(write_back((&source, &from), (&target, &to), &progress).is_err());
        assert!(std::fs::read(&to).unwrap() == bytes, "called off before anything was written");
        let progress = Progress::default();
        write_back((&source, &from), (&target, &to), &progress).unwrap();
        assert!(std::fs::read(&to).unwrap() == std::fs::read(&from).unwrap());
        assert_eq!(progress.percent(), 100);
        // There is nothing more to write: that would fail.
        let target = File::open(&to).unwrap();
        write_back((&source, &from), (&target, &to), &Progress::default()).unwrap();
    }

    #[test]
    fn a_wipe_goes_on_where_it_was_and_leaves_zeroes() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("device");
        std::fs::write(&path, vec![1; 12 << 20]).unwrap();
        let target = File::options().read(true).write(true).open(&path).unwrap();
        let progress = Progress::default();
        wipe(&target, &path, 8 << 20, u64::MAX, &progress, |_| {}).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes[..8 << 20].iter().all(|&byte| byte == 1));
        assert!(bytes[8 << 20..].iter().all(|&byte| byte == 0));
    }
}
