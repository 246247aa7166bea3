//! QEMU's image tool, run within limits of memory, processor time, time and size.
//!
//! It parses what strangers wrote, so it is a process of its own that the kernel holds to its
//! limits, at the lowest priority, and it is always told a format: what it would guess is the
//! stranger's choice.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::Deserialize;
use stackhand_kernel::exec::{ExecError, Program};
use stackhand_model::{FileFormat, ImageFormat};

use crate::Progress;

/// Memory that it may use, in bytes.
const MEMORY: u64 = 1 << 30;

/// Processor seconds for work on headers alone.
const HEADER_SECONDS: u64 = 60;

/// What it may print about an image.
const MOST_OUTPUT: usize = 1 << 20;

/// QEMU's image tool at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageTool {
    path: PathBuf,
    /// Longest conversion, in seconds of processor and of time.
    convert_seconds: u64,
}

/// What the tool tells of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Size of the disk that it holds.
    pub virtual_bytes: u64,
}

/// Why the tool did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It failed, or reached a limit.
    #[error(transparent)]
    Program(Box<ExecError>),
    /// It answered something unknown.
    #[error("cannot understand what {} says about {}", .tool.display(), .image.display())]
    Answer {
        /// The tool.
        tool: PathBuf,
        /// The image.
        image: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The image refers to another file.
    #[error("{} refers to another file ({what}), which could be any file of this host", .image.display())]
    Refers {
        /// The image.
        image: PathBuf,
        /// By what.
        what: &'static str,
    },
    /// The image's disk is larger than it may be.
    #[error("{} has a disk of {bytes} bytes and the limit is {most}", .image.display())]
    TooLarge {
        /// The image.
        image: PathBuf,
        /// Size of its disk.
        bytes: u64,
        /// The limit.
        most: u64,
    },
    /// The conversion was called off.
    #[error("converting {} was called off", .image.display())]
    Cancelled {
        /// The image.
        image: PathBuf,
    },
}

/// What `qemu-img info --output=json` prints, as far as it concerns us.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Answer {
    virtual_size: u64,
    #[serde(default)]
    backing_filename: Option<String>,
    #[serde(default)]
    format_specific: Option<Specific>,
}

#[derive(Debug, Deserialize)]
struct Specific {
    #[serde(default)]
    data: SpecificData,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SpecificData {
    #[serde(default)]
    data_file: Option<String>,
    #[serde(default)]
    extents: Vec<Extent>,
}

#[derive(Debug, Deserialize)]
struct Extent {
    #[serde(default)]
    filename: String,
}

impl From<ExecError> for ToolError {
    fn from(error: ExecError) -> Self {
        Self::Program(Box::new(error))
    }
}

impl ImageTool {
    /// The tool at a path; conversions may take `convert_seconds`.
    #[must_use]
    pub fn new(path: &Path, convert_seconds: u64) -> Self {
        Self { path: path.to_owned(), convert_seconds }
    }

    /// The tool, to be run for at most `seconds`, writing files of at most `most_bytes`.
    fn limited(&self, seconds: u64, most_bytes: Option<u64>) -> Program {
        let mut program = Program::new("/usr/bin/prlimit")
            .arg(format!("--as={MEMORY}"))
            .arg(format!("--cpu={seconds}"))
            .arg("--core=0")
            .limit(Duration::from_secs(seconds))
            .most_output(MOST_OUTPUT);
        if let Some(most) = most_bytes {
            program = program.arg(format!("--fsize={most}"));
        }
        program.args(["/usr/bin/nice", "-n", "10"]).arg(self.path.display().to_string())
    }

    /// Looks at an image of a format that the caller knows.
    ///
    /// # Errors
    ///
    /// Fails if the tool does, or if the image refers to another file.
    pub async fn info(&self, image: &Path, format: &str) -> Result<Info, ToolError> {
        let answer = self.look(image, format).await?;
        let path = image.display().to_string();
        let refers = |what| Err(ToolError::Refers { image: image.to_owned(), what });
        if answer.backing_filename.is_some() {
            return refers("a backing file");
        }
        if let Some(Specific { data }) = answer.format_specific {
            if data.data_file.is_some() {
                return refers("an external data file");
            }
            if data.extents.iter().any(|extent| extent.filename != path) {
                return refers("an extent");
            }
        }
        Ok(Info { virtual_bytes: answer.virtual_size })
    }

    async fn look(&self, image: &Path, format: &str) -> Result<Answer, ToolError> {
        let output = self
            .limited(HEADER_SECONDS, None)
            // The image may be open elsewhere; a look does no harm.
            .args(["info", "--output=json", "-U", "-f", format])
            .arg(image.display().to_string())
            .run()
            .await?;
        serde_json::from_slice(&output.stdout).map_err(|source| ToolError::Answer {
            tool: self.path.clone(),
            image: image.to_owned(),
            source,
        })
    }

    /// Converts an image that was inspected to plain bytes. With `existing` the target is there
    /// already, a device or a file of at least the image's size; otherwise a sparse file is made.
    /// `progress` is told how far it is, and may call it off.
    ///
    /// # Errors
    ///
    /// Fails if the tool does, if the image refers to another file, if its disk has more than
    /// `most` bytes, or if it was called off.
    pub async fn to_raw(
        &self,
        image: &Path,
        format: &str,
        target: &Path,
        existing: bool,
        most: u64,
        progress: &Progress,
    ) -> Result<Info, ToolError> {
        progress.done.store(0, Ordering::Relaxed);
        let info = self.info(image, format).await?;
        if info.virtual_bytes > most {
            let (image, bytes) = (image.to_owned(), info.virtual_bytes);
            return Err(ToolError::TooLarge { image, bytes, most });
        }
        let mut program = self
            // A disk's last cluster may be written whole.
            .limited(self.convert_seconds, Some(info.virtual_bytes.next_multiple_of(1 << 21)))
            .args(["convert", "-p", "-U", "-f", format, "-O", "raw"]);
        if existing {
            program = program.arg("-n");
        }
        let program = program.arg(image.display().to_string()).arg(target.display().to_string());
        progress.total.store(info.virtual_bytes, Ordering::Relaxed);
        let conversion = program.run_heard(|said| {
            if let Some(percent) = percent(said) {
                progress
                    .done
                    .store(info.virtual_bytes.saturating_mul(percent) / 100, Ordering::Relaxed);
            }
        });
        tokio::select! {
            done = conversion => done.map(|_| info).map_err(ToolError::from),
            () = progress.called_off() => Err(ToolError::Cancelled { image: image.to_owned() }),
        }
    }

    /// Copies a disk of our own, with what it lies over, to one compact image.
    ///
    /// # Errors
    ///
    /// Fails if the tool does.
    pub async fn flatten(
        &self,
        disk: &Path,
        format: FileFormat,
        target: &Path,
        target_format: FileFormat,
    ) -> Result<(), ToolError> {
        self.limited(self.convert_seconds, None)
            .args(["convert", "-q", "-U", "-f", driver(format), "-O", driver(target_format)])
            .arg(disk.display().to_string())
            .arg(target.display().to_string())
            .run()
            .await?;
        Ok(())
    }

    /// Size of the disk in a file of our own, which may be open.
    ///
    /// # Errors
    ///
    /// Fails if the tool does.
    pub async fn size(&self, disk: &Path, format: FileFormat) -> Result<u64, ToolError> {
        Ok(self.look(disk, driver(format)).await?.virtual_size)
    }

    /// Makes an empty qcow2 image.
    ///
    /// # Errors
    ///
    /// Fails if the tool does.
    pub async fn make_empty(&self, image: &Path, bytes: u64) -> Result<(), ToolError> {
        self.limited(HEADER_SECONDS, None)
            .args(["create", "-q", "-f", "qcow2"])
            .arg(image.display().to_string())
            .arg(bytes.to_string())
            .run()
            .await?;
        Ok(())
    }

    /// Makes a qcow2 overlay of `bytes` over a base that was inspected.
    ///
    /// # Errors
    ///
    /// Fails if the tool does.
    pub async fn make_overlay(
        &self,
        overlay: &Path,
        base: &Path,
        format: FileFormat,
        bytes: u64,
    ) -> Result<(), ToolError> {
        // -u: it need not open the base, whose format is given.
        self.limited(HEADER_SECONDS, None)
            .args(["create", "-q", "-u", "-f", "qcow2", "-F", driver(format), "-b"])
            .arg(base.display().to_string())
            .arg(overlay.display().to_string())
            .arg(bytes.to_string())
            .run()
            .await?;
        Ok(())
    }
}

/// The last percentage in a piece of what the tool prints, which is `    (12.34/100%)\r` again and
/// again. One that is cut in two is passed over.
fn percent(said: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(said);
    let before = &text[..text.rfind("/100%)")?];
    let number: f64 = before[before.rfind('(')? + 1..].parse().ok()?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "0 to 100, and what is not is cut to that"
    )]
    Some(number.clamp(0.0, 100.0) as u64)
}

/// QEMU's name of a file format.
#[must_use]
pub fn driver(format: FileFormat) -> &'static str {
    match format {
        FileFormat::Raw => "raw",
        FileFormat::Qcow2 => "qcow2",
    }
}

/// QEMU's name of the format that an image of this kind has to be converted from; `None` if it is
/// used as it is.
#[must_use]
pub(crate) fn foreign_driver(format: ImageFormat) -> Option<&'static str> {
    match format {
        ImageFormat::Vmdk => Some("vmdk"),
        ImageFormat::Vhd => Some("vpc"),
        ImageFormat::Vhdx => Some("vhdx"),
        ImageFormat::Vdi => Some("vdi"),
        ImageFormat::Raw
        | ImageFormat::Qcow2
        | ImageFormat::Iso
        | ImageFormat::Ami
        | ImageFormat::Kernel
        | ImageFormat::Ramdisk => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_whole_percentage_counts_and_nonsense_does_not() {
        assert_eq!(percent(b"    (0.00/100%)\r    (12.96/100%)\r"), Some(12));
        assert_eq!(percent(b"    (99.00/100%)\r    (100.00/10"), Some(99));
        assert_eq!(percent(b"2.96/100%)\r"), None);
        for nonsense in [&b""[..], b"(/100%)", b"(x/100%)", b"\xff(1\xff/100%)", b"/100%)("] {
            assert_eq!(percent(nonsense), None, "{nonsense:?}");
        }
        assert_eq!(percent(b"(1e300/100%)"), Some(100));
        assert_eq!(percent(b"(NaN/100%)"), Some(0));
    }
}
