//! The image cache: what disks, kernels and RAM disks start from.
//!
//! ```text
//! <state>/images/<64 hex digits>       contents, read-only, shared by all images with these bytes
//!               <image id>.json        which contents an image has, and what it was asked for by
//!               <image id>.partial     being fetched
//!               <image id>.validator   by what a web server knows the rest of it
//!               <image id>.converted   being converted
//! ```
//!
//! The folder is the agent's own. Contents are hashed as they are copied and inspected before
//! they get their name, so a name in the cache means: complete, checked, harmless to open.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use stackhand_model::{FileFormat, ImageFormat, ImageId, ImageSpec};

use crate::fetch::{FetchError, Progress, Taken, copy_file};
use crate::files::{
    FileError, blocking, failed, make_passage, read_json, remove, sync_folder, write_json,
};
use crate::http;
use crate::inspect::{Refused, inspect};
use crate::tool::{ImageTool, ToolError, foreign_driver};

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
    /// Name of its contents: the SHA-256 of the source, or of its format and that if they were
    /// converted.
    pub contents: String,
    /// Format of the contents.
    pub disk: FileFormat,
    /// Bytes of the source.
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

/// The cache's folder. Calls block unless they are async.
#[derive(Clone, Debug)]
pub struct ImageCache {
    folder: PathBuf,
    most_bytes: u64,
    tool: ImageTool,
}

/// What is in the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheSeen {
    /// Images whose contents are there.
    pub images: BTreeMap<ImageId, CachedImage>,
    /// Contents, by name.
    pub contents: BTreeSet<String>,
    /// How large contents are, and for how many seconds nobody has begun or ended to use them.
    pub ages: BTreeMap<String, (u64, u64)>,
    /// What is left of fetches, running ones included.
    pub partials: BTreeSet<ImageId>,
}

impl ImageCache {
    /// The cache in `folder`, for images of at most `most_bytes`.
    #[must_use]
    pub fn new(folder: &Path, most_bytes: u64, tool: ImageTool) -> Self {
        Self { folder: folder.to_owned(), most_bytes, tool }
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

    fn converted(&self, id: ImageId) -> PathBuf {
        self.folder.join(format!("{id}.converted"))
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
                match read_json::<CachedImage>(&self.folder.join(&name)) {
                    Ok(image) => records.extend(image.map(|image| (ImageId(id), image))),
                    // It is written anew when the image is fetched again.
                    Err(error) => tracing::warn!(%error, "passing over a record of the cache"),
                }
            } else if let Some(id) = [".partial", ".validator", ".converted"]
                .iter()
                .find_map(|end| name.strip_suffix(end))
                .and_then(|id| id.parse().ok())
            {
                seen.partials.insert(ImageId(id));
            } else if is_contents(&name) {
                if let Ok(metadata) = fs::metadata(self.folder.join(&name)) {
                    let age = metadata.modified().ok().and_then(|time| time.elapsed().ok());
                    // On disk, not as it looks: holes cost nothing.
                    let bytes = metadata.blocks() * 512;
                    seen.ages.insert(name.clone(), (bytes, age.unwrap_or_default().as_secs()));
                }
                seen.contents.insert(name);
            }
        }
        seen.images = records
            .into_iter()
            .filter(|(_, image)| seen.contents.contains(&image.contents))
            .collect();
        Ok(seen)
    }

    /// Fetches an image: copies, hashes, checks, inspects, converts what QEMU cannot lay disks over
    /// safely, and only then gives it its name.
    ///
    /// # Errors
    ///
    /// Fails if the source cannot be read, is not what was asked for or is not let in. Nothing
    /// of it stays then.
    pub async fn fetch(
        &self,
        id: ImageId,
        spec: &ImageSpec,
        progress: &Arc<Progress>,
    ) -> Result<CachedImage, FetchError> {
        let image = self.fetch_contents(id, spec, progress).await;
        // What a web server has not given to the end is gone on with by the next attempt.
        if image.as_ref().is_err_and(|error| !matches!(error, FetchError::Http { .. })) {
            // If even that fails, the next look finds it.
            let cache = self.clone();
            let _left = blocking(move || cache.remove_partial(id)).await;
        }
        let image = image?;
        let (record, kept) = (self.record(id), image.clone());
        blocking(move || write_json(&record, &kept)).await?;
        Ok(image)
    }

    /// Gives an image what was fetched for another of the same source.
    ///
    /// # Errors
    ///
    /// Fails if its record cannot be written.
    pub async fn adopt(&self, id: ImageId, image: &CachedImage) -> Result<(), FileError> {
        let (record, kept) = (self.record(id), image.clone());
        blocking(move || write_json(&record, &kept)).await
    }

    async fn fetch_contents(
        &self,
        id: ImageId,
        spec: &ImageSpec,
        progress: &Arc<Progress>,
    ) -> Result<CachedImage, FetchError> {
        let cache = self.clone();
        let wish = spec.clone();
        let known = blocking(move || {
            make_passage(&cache.folder)?;
            cache.known(&wish)
        });
        if let Some(image) = known.await? {
            return Ok(image);
        }
        let partial = self.partial(id);
        let taken = self.take(&partial, spec, progress).await?;
        taken.check(spec)?;
        let source_name = || spec.source.clone();
        let inspected = inspect(spec.format, &taken.sample, self.most_bytes)
            .map_err(|reason| FetchError::Refused { source_name: source_name(), reason })?;
        let mut image = CachedImage {
            source: spec.source.clone(),
            checksum: spec.checksum.clone(),
            format: spec.format,
            contents: taken.sha256.clone(),
            disk: if spec.format == ImageFormat::Qcow2 {
                FileFormat::Qcow2
            } else {
                FileFormat::Raw
            },
            bytes: taken.sample.bytes,
            virtual_bytes: inspected.virtual_bytes.unwrap_or(taken.sample.bytes),
        };
        let complete = match foreign_driver(spec.format) {
            None if spec.format == ImageFormat::Qcow2 => {
                // A second opinion, from the parser that will open it.
                let info = self.tool.info(&partial, "qcow2").await;
                let info = info
                    .map_err(|source| FetchError::Convert { source_name: source_name(), source })?;
                image.virtual_bytes = info.virtual_bytes;
                partial
            }
            None => partial,
            Some(driver) => {
                image.virtual_bytes = self.convert(id, spec, driver, progress).await?;
                image.contents = converted_name(spec.format, &taken.sha256);
                self.converted(id)
            }
        };
        if image.virtual_bytes == 0 || image.virtual_bytes > self.most_bytes {
            let (bytes, most) = (image.virtual_bytes, self.most_bytes);
            let reason = Refused::TooLarge { bytes, most };
            return Err(FetchError::Refused { source_name: source_name(), reason });
        }
        let (contents, folder) = (self.path(&image.contents), self.folder.clone());
        let finish = move || {
            fs::set_permissions(&complete, fs::Permissions::from_mode(0o444))
                .map_err(failed("set the mode of", &complete))?;
            File::open(&complete)
                .and_then(|file| file.sync_all())
                .map_err(failed("sync", &complete))?;
            fs::rename(&complete, &contents).map_err(failed("rename to", &contents))?;
            sync_folder(&folder)
        };
        blocking(finish).await?;
        let partial = self.partial(id);
        blocking(move || remove(&partial)).await?;
        Ok(image)
    }

    /// What is in the cache already by the checksum that a document gives.
    fn known(&self, spec: &ImageSpec) -> Result<Option<CachedImage>, FileError> {
        if spec.checksum.is_none() {
            return Ok(None);
        }
        let same =
            |image: &CachedImage| image.checksum == spec.checksum && image.format == spec.format;
        let found = self.look()?.images.into_values().find(same);
        Ok(found.map(|image| CachedImage { source: spec.source.clone(), ..image }))
    }

    async fn take(
        &self,
        partial: &Path,
        spec: &ImageSpec,
        progress: &Arc<Progress>,
    ) -> Result<Taken, FetchError> {
        if spec.source.starts_with("http://") || spec.source.starts_with("https://") {
            return http::download(partial, spec, self.most_bytes, progress).await;
        }
        let source = match spec.source.strip_prefix("file://").unwrap_or(&spec.source) {
            path if path.starts_with('/') => Path::new(path).to_owned(),
            _ => {
                let source_name = spec.source.clone();
                return Err(FetchError::UnsupportedSource { source_name });
            }
        };
        let (partial, spec, most) = (partial.to_owned(), spec.clone(), self.most_bytes);
        let progress = Arc::clone(progress);
        let copy = tokio::task::spawn_blocking(move || {
            copy_file(&source, &partial, &spec, most, &progress)
        });
        copy.await.unwrap_or_else(|error| {
            Err(failed("copy to", &self.folder)(io::Error::other(error)).into())
        })
    }

    /// Converts what was fetched to plain bytes; gives the size of the disk.
    async fn convert(
        &self,
        id: ImageId,
        spec: &ImageSpec,
        driver: &str,
        progress: &Progress,
    ) -> Result<u64, FetchError> {
        let (partial, converted) = (self.partial(id), self.converted(id));
        let source_name = || spec.source.clone();
        progress.converting.store(true, Ordering::Relaxed);
        let target = converted.clone();
        blocking(move || remove(&target)).await?;
        let work = self.tool.to_raw(&partial, driver, &converted, false, self.most_bytes, progress);
        match work.await {
            Ok(info) => Ok(info.virtual_bytes),
            Err(ToolError::Cancelled { .. }) => {
                Err(FetchError::Cancelled { source_name: source_name() })
            }
            Err(source) => Err(FetchError::Convert { source_name: source_name(), source }),
        }
    }

    /// Forgets an image. Its contents stay for those who use them.
    ///
    /// # Errors
    ///
    /// Fails if its record cannot be removed.
    pub fn forget(&self, id: ImageId) -> Result<(), FileError> {
        if let Ok(Some(image)) = read_json::<CachedImage>(&self.record(id)) {
            self.touch([image.contents.as_str()]);
        }
        remove(&self.record(id))?;
        self.remove_partial(id)?;
        sync_folder(&self.folder)
    }

    /// Notes that somebody begins or ends to use contents: they age from now on.
    pub fn touch<'a>(&self, contents: impl IntoIterator<Item = &'a str>) {
        for contents in contents.into_iter().filter(|name| is_contents(name)) {
            let now = std::time::SystemTime::now();
            let touched = File::open(self.path(contents)).and_then(|file| file.set_modified(now));
            if let Err(error) = touched {
                tracing::debug!(contents, %error, "contents age on");
            }
        }
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
        let partial = self.partial(id);
        remove(&http::validator_path(&partial))?;
        remove(&partial).and(remove(&self.converted(id)))
    }
}

/// Whether a file's name is that of contents.
fn is_contents(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Name of contents that were converted: the same source in the same format has the same.
fn converted_name(format: ImageFormat, sha256: &str) -> String {
    let text = format!("{format:?} {sha256}");
    crate::hex(ring::digest::digest(&ring::digest::SHA256, text.as_bytes()).as_ref())
}
