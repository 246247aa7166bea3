//! Bytes of an image on their way into the cache: hashed, sampled and written as they come.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use ring::digest::{Context, SHA256, SHA512};
use stackhand_model::ImageSpec;

use crate::files::{FileError, failed, remove};
use crate::inspect::{HEADER_BYTES, Refused, Sample, TAIL_BYTES};
use crate::tool::ToolError;

/// Why an image could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Reading or writing failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is nothing that could be an image.
    #[error("{source_name} is not a plain file")]
    NotAFile {
        /// The source.
        source_name: String,
    },
    /// This kind of source is not known.
    #[error("cannot fetch {source_name}: give an absolute path or a file, http or https URL")]
    UnsupportedSource {
        /// The source.
        source_name: String,
    },
    /// A web server did not give it.
    #[error("cannot fetch {source_name}: {reason}")]
    Http {
        /// The source.
        source_name: String,
        /// Why.
        reason: String,
    },
    /// The bytes are not those that were asked for.
    #[error("{source_name} has checksum {found}, and {wanted} was asked for")]
    Checksum {
        /// The source.
        source_name: String,
        /// What was asked for.
        wanted: String,
        /// What it has.
        found: String,
    },
    /// It is not let in.
    #[error("{source_name} is refused: {reason}")]
    Refused {
        /// The source.
        source_name: String,
        /// Why.
        reason: Refused,
    },
    /// It could not be converted.
    #[error("cannot convert {source_name}")]
    Convert {
        /// The source.
        source_name: String,
        /// Why.
        source: ToolError,
    },
    /// It is larger than it may be.
    #[error("{source_name} has more than {most} bytes; see max_image_gib")]
    TooLarge {
        /// The source.
        source_name: String,
        /// The limit.
        most: u64,
    },
    /// The fetch was called off.
    #[error("fetching {source_name} was called off")]
    Cancelled {
        /// The source.
        source_name: String,
    },
}

/// How often work without a loop of its own looks whether it was called off.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How far a fetch, a conversion or a copy is; also the way to call it off.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes that are dealt with, holes included.
    pub done: AtomicU64,
    /// Bytes in all, 0 if not known.
    pub total: AtomicU64,
    /// All bytes are there and are being converted.
    pub converting: AtomicBool,
    /// Set to call it off.
    pub cancelled: AtomicBool,
}

impl Progress {
    /// How far, 0 to 100.
    #[must_use]
    pub fn percent(&self) -> u64 {
        let total = self.total.load(Ordering::Relaxed);
        let done = self.done.load(Ordering::Relaxed).min(total);
        done.saturating_mul(100).checked_div(total).unwrap_or(0)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Returns when it is called off.
    pub(crate) async fn called_off(&self) {
        while !self.is_cancelled() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// What came in.
#[derive(Debug)]
pub(crate) struct Taken {
    /// SHA-256 of all bytes.
    pub(crate) sha256: String,
    /// SHA-512 of them, if the document gives one.
    pub(crate) sha512: Option<String>,
    /// What is looked at of them.
    pub(crate) sample: Sample,
}

impl Taken {
    /// Compares with what was asked for.
    pub(crate) fn check(&self, spec: &ImageSpec) -> Result<(), FetchError> {
        let Some(wanted) = &spec.checksum else { return Ok(()) };
        let found = match &self.sha512 {
            Some(sha512) => format!("sha512:{sha512}"),
            None => format!("sha256:{}", self.sha256),
        };
        if found == wanted.to_lowercase() {
            return Ok(());
        }
        let source_name = spec.source.clone();
        Err(FetchError::Checksum { source_name, wanted: wanted.clone(), found })
    }
}

/// Takes an image's bytes in, in order, into a file of their own.
pub(crate) struct Intake {
    path: PathBuf,
    file: File,
    sha256: Context,
    sha512: Option<Context>,
    sample: Sample,
    most: u64,
    source_name: String,
}

impl Intake {
    /// Begins anew at `path`.
    pub(crate) fn begin(path: &Path, spec: &ImageSpec, most: u64) -> Result<Self, FetchError> {
        remove(path)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed("make", path))?;
        Ok(Self::with(path, file, spec, most))
    }

    /// Goes on with what is at `path`; `None` if nothing is. Reads all of it.
    pub(crate) fn take_up(
        path: &Path,
        spec: &ImageSpec,
        most: u64,
    ) -> Result<Option<Self>, FetchError> {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(failed("open", path))?,
        };
        let mut intake = Self::with(path, file, spec, most);
        let mut buffer = vec![0; 1 << 20];
        loop {
            match intake.file.read(&mut buffer).map_err(failed("read", path))? {
                0 => return Ok(Some(intake)),
                read => intake.note(&buffer[..read])?,
            }
        }
    }

    fn with(path: &Path, file: File, spec: &ImageSpec, most: u64) -> Self {
        let wants_sha512 = spec.checksum.as_deref().is_some_and(|sum| sum.starts_with("sha512:"));
        Self {
            path: path.to_owned(),
            file,
            sha256: Context::new(&SHA256),
            sha512: wants_sha512.then(|| Context::new(&SHA512)),
            sample: Sample::default(),
            most,
            source_name: spec.source.clone(),
        }
    }

    /// Bytes taken so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.sample.bytes
    }

    /// Takes the next bytes.
    pub(crate) fn take(&mut self, chunk: &[u8]) -> Result<(), FetchError> {
        self.note(chunk)?;
        self.file.write_all(chunk).map_err(failed("write", &self.path))?;
        Ok(())
    }

    fn note(&mut self, chunk: &[u8]) -> Result<(), FetchError> {
        let length = u64::try_from(chunk.len()).unwrap_or(u64::MAX);
        if self.sample.bytes.saturating_add(length) > self.most {
            return Err(FetchError::TooLarge {
                source_name: self.source_name.clone(),
                most: self.most,
            });
        }
        self.sha256.update(chunk);
        if let Some(sha512) = &mut self.sha512 {
            sha512.update(chunk);
        }
        self.sample.note(chunk);
        Ok(())
    }

    /// All bytes were taken: on disk when this returns.
    pub(crate) fn finish(self) -> Result<Taken, FetchError> {
        self.file.sync_all().map_err(failed("sync", &self.path))?;
        Ok(Taken {
            sha256: crate::hex(self.sha256.finish().as_ref()),
            sha512: self.sha512.map(|context| crate::hex(context.finish().as_ref())),
            sample: self.sample,
        })
    }
}

/// Copies a file of this host. Blocks.
pub(crate) fn copy_file(
    source: &Path,
    partial: &Path,
    spec: &ImageSpec,
    most: u64,
    progress: &Progress,
) -> Result<Taken, FetchError> {
    // Non-blocking, so that a pipe cannot hold us up before it is found out.
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(source)
        .map_err(failed("open", source))?;
    let metadata = file.metadata().map_err(failed("look at", source))?;
    if !metadata.is_file() {
        return Err(FetchError::NotAFile { source_name: spec.source.clone() });
    }
    progress.total.store(metadata.len(), Ordering::Relaxed);
    let mut intake = Intake::begin(partial, spec, most)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        if progress.is_cancelled() {
            return Err(FetchError::Cancelled { source_name: spec.source.clone() });
        }
        match file.read(&mut buffer) {
            Ok(0) => return intake.finish(),
            Ok(read) => intake.take(&buffer[..read])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed("read", source)(error).into()),
        }
        progress.done.store(intake.bytes(), Ordering::Relaxed);
    }
}

impl Sample {
    /// Notes the next bytes of an image.
    pub(crate) fn note(&mut self, chunk: &[u8]) {
        self.bytes += u64::try_from(chunk.len()).unwrap_or(u64::MAX);
        let missing = HEADER_BYTES - self.header.len();
        self.header.extend_from_slice(&chunk[..missing.min(chunk.len())]);
        self.tail.extend_from_slice(&chunk[chunk.len().saturating_sub(TAIL_BYTES)..]);
        let surplus = self.tail.len().saturating_sub(TAIL_BYTES);
        self.tail.drain(..surplus);
    }
}
