//! The image cache: what disks, kernels and RAM disks start from.
//!
//! ```text
//! <state>/images/<sha256>           contents, read-only, shared by all images with these bytes
//!               <image id>.json     which contents an image has, and what it was asked for by
//!               <image id>.partial  being fetched
//! ```
//!
//! The folder is the agent's own. Contents are hashed as they are copied and inspected before
//! they get their name, so a name in the cache means: complete, checked, harmless to open.

pub mod inspect;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ring::digest::{Context, SHA256, SHA512};
use serde::{Deserialize, Serialize};
use stackhand_model::{ImageFormat, ImageId, ImageSpec};

use crate::files::{FileError, failed, make_passage, read_json, remove, sync_folder, write_json};
use inspect::{HEADER_BYTES, Refused, inspect};

/// What the cache knows of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachedImage {
    /// Where it was fetched from.
    pub source: String,
    /// The checksum that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// Its format.
    pub format: ImageFormat,
    /// Name of its contents: their SHA-256.
    pub contents: String,
    /// Bytes of the contents.
    pub bytes: u64,
    /// Size of the disk that it holds.
    pub virtual_bytes: u64,
}

impl CachedImage {
    /// Whether this is what a document asks for.
    #[must_use]
    pub fn is_of(&self, spec: &ImageSpec) -> bool {
        self.source == spec.source && self.checksum == spec.checksum && self.format == spec.format
    }
}

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
    /// This kind of source is not built yet.
    #[error("cannot fetch {source_name}: only absolute paths and file:// are supported yet")]
    UnsupportedSource {
        /// The source.
        source_name: String,
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
    /// It is larger than it may be.
    #[error("{source_name} has more than {most} bytes; see compute.max_image_gib")]
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

/// How far a fetch is; also the way to call it off.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes fetched.
    pub done: AtomicU64,
    /// Bytes to fetch, 0 if not known.
    pub total: AtomicU64,
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
}

/// The cache's folder. All calls block.
#[derive(Clone, Debug)]
pub struct ImageCache {
    folder: PathBuf,
    most_bytes: u64,
}

/// What is in the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheSeen {
    /// Images whose contents are there.
    pub images: BTreeMap<ImageId, CachedImage>,
    /// Contents, by name.
    pub contents: BTreeSet<String>,
    /// What is left of fetches, running ones included.
    pub partials: BTreeSet<ImageId>,
}

impl ImageCache {
    /// The cache in `folder`, for images of at most `most_bytes`.
    #[must_use]
    pub fn new(folder: &Path, most_bytes: u64) -> Self {
        Self { folder: folder.to_owned(), most_bytes }
    }

    /// The path of contents.
    #[must_use]
    pub fn path(&self, contents: &str) -> PathBuf {
        self.folder.join(contents)
    }

    fn record(&self, id: ImageId) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }

    fn partial(&self, id: ImageId) -> PathBuf {
        self.folder.join(format!("{id}.partial"))
    }

    /// Looks at the cache.
    ///
    /// # Errors
    ///
    /// Fails if the folder or a record cannot be read.
    pub fn look(&self) -> Result<CacheSeen, FileError> {
        let mut seen = CacheSeen::default();
        let mut records = BTreeMap::new();
        for name in crate::files::names(&self.folder)? {
            if let Some(id) = name.strip_suffix(".json").and_then(|id| id.parse().ok()) {
                if let Some(image) = read_json::<CachedImage>(&self.folder.join(&name))? {
                    records.insert(ImageId(id), image);
                }
            } else if let Some(id) = name.strip_suffix(".partial").and_then(|id| id.parse().ok()) {
                seen.partials.insert(ImageId(id));
            } else if is_contents(&name) {
                seen.contents.insert(name);
            }
        }
        seen.images = records
            .into_iter()
            .filter(|(_, image)| seen.contents.contains(&image.contents))
            .collect();
        Ok(seen)
    }

    /// Fetches an image: copies, hashes, checks, inspects, and only then gives it its name.
    ///
    /// # Errors
    ///
    /// Fails if the source cannot be read, is not what was asked for or is not let in. Nothing
    /// of it stays then.
    pub fn fetch(
        &self,
        id: ImageId,
        spec: &ImageSpec,
        progress: &Progress,
    ) -> Result<CachedImage, FetchError> {
        let partial = self.partial(id);
        let outcome = self.fetch_to(id, &partial, spec, progress);
        if outcome.is_err() {
            // If even that fails, the next look finds it.
            let _left = remove(&partial);
        }
        outcome
    }

    fn fetch_to(
        &self,
        id: ImageId,
        partial: &Path,
        spec: &ImageSpec,
        progress: &Progress,
    ) -> Result<CachedImage, FetchError> {
        let source_name = spec.source.clone();
        let path = match spec.source.strip_prefix("file://").unwrap_or(&spec.source) {
            path if path.starts_with('/') => Path::new(path).to_owned(),
            _ => return Err(FetchError::UnsupportedSource { source_name }),
        };
        make_passage(&self.folder)?;
        // Non-blocking, so that a pipe cannot hold us up before it is found out.
        let source = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(&path)
            .map_err(failed("open", &path))?;
        let metadata = source.metadata().map_err(failed("look at", &path))?;
        if !metadata.is_file() {
            return Err(FetchError::NotAFile { source_name });
        }
        progress.total.store(metadata.len(), Ordering::Relaxed);
        remove(partial)?;
        let mut target = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(partial)
            .map_err(failed("make", partial))?;
        let fetched = Fetched::new(spec)
            .read(source, &mut target, self.most_bytes, progress)
            .map_err(|problem| match problem {
                Problem::Read(error) => failed("read", &path)(error).into(),
                Problem::Write(error) => failed("write", partial)(error).into(),
                Problem::TooLarge => {
                    FetchError::TooLarge { source_name: source_name.clone(), most: self.most_bytes }
                }
                Problem::Cancelled => FetchError::Cancelled { source_name: source_name.clone() },
            })?;
        if let Some(wanted) = &spec.checksum
            && fetched.checksum.as_deref() != Some(wanted.to_lowercase().as_str())
        {
            let found = fetched.checksum.unwrap_or_default();
            return Err(FetchError::Checksum { source_name, wanted: wanted.clone(), found });
        }
        let inspected = inspect(spec.format, &fetched.header, fetched.bytes, self.most_bytes)
            .map_err(|reason| FetchError::Refused { source_name, reason })?;
        target
            .set_permissions(fs::Permissions::from_mode(0o444))
            .map_err(failed("set the mode of", partial))?;
        target.sync_all().map_err(failed("sync", partial))?;
        let contents = self.path(&fetched.sha256);
        fs::rename(partial, &contents).map_err(failed("rename to", &contents))?;
        sync_folder(&self.folder)?;
        let image = CachedImage {
            source: spec.source.clone(),
            checksum: spec.checksum.clone(),
            format: spec.format,
            contents: fetched.sha256,
            bytes: fetched.bytes,
            virtual_bytes: inspected.virtual_bytes,
        };
        write_json(&self.record(id), &image)?;
        Ok(image)
    }

    /// Forgets an image. Its contents stay for those who use them.
    ///
    /// # Errors
    ///
    /// Fails if its record cannot be removed.
    pub fn forget(&self, id: ImageId) -> Result<(), FileError> {
        remove(&self.record(id))?;
        remove(&self.partial(id))?;
        sync_folder(&self.folder)
    }

    /// Removes contents that nobody uses.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be removed.
    pub fn remove_contents(&self, contents: &str) -> Result<(), FileError> {
        if is_contents(contents) { remove(&self.path(contents)) } else { Ok(()) }
    }

    /// Removes what is left of a fetch.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be removed.
    pub fn remove_partial(&self, id: ImageId) -> Result<(), FileError> {
        remove(&self.partial(id))
    }
}

/// Whether a file's name is that of contents.
fn is_contents(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// What is learnt of an image while it is copied.
struct Fetched {
    sha256: String,
    /// In the algorithm that was asked for.
    checksum: Option<String>,
    header: Vec<u8>,
    bytes: u64,
    wants_sha512: bool,
    wants_checksum: bool,
}

enum Problem {
    Read(io::Error),
    Write(io::Error),
    TooLarge,
    Cancelled,
}

impl Fetched {
    fn new(spec: &ImageSpec) -> Self {
        let checksum = spec.checksum.as_deref().unwrap_or_default();
        Self {
            sha256: String::new(),
            checksum: None,
            header: Vec::new(),
            bytes: 0,
            wants_sha512: checksum.starts_with("sha512:"),
            wants_checksum: !checksum.is_empty(),
        }
    }

    fn read(
        mut self,
        mut source: File,
        target: &mut File,
        most: u64,
        progress: &Progress,
    ) -> Result<Self, Problem> {
        let mut sha256 = Context::new(&SHA256);
        let mut sha512 = self.wants_sha512.then(|| Context::new(&SHA512));
        let mut buffer = vec![0; 1 << 20];
        loop {
            if progress.cancelled.load(Ordering::Relaxed) {
                return Err(Problem::Cancelled);
            }
            let read = match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Problem::Read(error)),
            };
            let chunk = &buffer[..read];
            self.bytes += u64::try_from(read).unwrap_or(u64::MAX);
            if self.bytes > most {
                return Err(Problem::TooLarge);
            }
            sha256.update(chunk);
            if let Some(sha512) = &mut sha512 {
                sha512.update(chunk);
            }
            let missing = HEADER_BYTES - self.header.len();
            self.header.extend_from_slice(&chunk[..missing.min(read)]);
            target.write_all(chunk).map_err(Problem::Write)?;
            progress.done.store(self.bytes, Ordering::Relaxed);
        }
        self.sha256 = crate::hex(sha256.finish().as_ref());
        self.checksum = self.wants_checksum.then(|| match sha512 {
            Some(sha512) => format!("sha512:{}", crate::hex(sha512.finish().as_ref())),
            None => format!("sha256:{}", self.sha256),
        });
        Ok(self)
    }
}
