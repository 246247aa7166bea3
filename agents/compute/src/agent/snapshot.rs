//! Pictures of an instance: of its disk, as an image, and of its screen.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use stackhand_image::ImageTool;
use stackhand_image::files::{failed, make_passage, remove, sync_folder};
use stackhand_model::{ErrorCode, FileFormat, InstanceId, Spec};
use stackhand_runtime::agent::{Action, Refusal};

use super::ComputeAgent;
use super::actions::unavailable;
use crate::hypervisor::{Hypervisor, Screenshot};
use crate::plan::root_target;
use crate::store::Part;

/// How long an action waits for a copy; it goes on after that.
const WAIT: Duration = Duration::from_secs(45);

/// Most bytes of a screenshot that go into an answer.
const MOST_PICTURE: usize = 8 << 20;

impl<H: Hypervisor> ComputeAgent<H> {
    /// Copies the root disk to an image of its own, running or not.
    pub(super) async fn snapshot(&self, id: InstanceId, action: &Action) -> Result<Value, Refusal> {
        let bad = |message: &str| Refusal::new(ErrorCode::BadRequest, message);
        let name = match &action.params["name"] {
            Value::Null => format!("{id}-{}", uuid::Uuid::new_v4().simple()),
            Value::String(name) => name.clone(),
            _ => return Err(bad("name must be a text")),
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if name.is_empty() || name.len() > 128 || name.starts_with('.') || !name.bytes().all(plain)
        {
            return Err(bad("name must have letters, digits, hyphens, dots and underscores"));
        }
        let Spec::Instance(spec) = &action.document.spec else {
            return Err(bad("only instances have snapshots"));
        };
        let format = match (&spec.image, spec.root_disk_gib) {
            (Some(_), _) => FileFormat::Qcow2,
            (None, size) if size > 0 => FileFormat::Raw,
            _ => {
                let message = "it has no root disk of its own: make a Snapshot of its volume";
                return Err(Refusal::new(ErrorCode::WrongState, message));
            }
        };
        let target = self.snapshots.join(format!("{name}.qcow2"));
        if target.exists() {
            let message = format!("{} is there already: choose another name", target.display());
            return Err(Refusal::new(ErrorCode::Conflict, message));
        }
        let guard = self.lock_of(id).lock_owned().await;
        let runs = !self.domain(id).await?.power.is_off();
        // A crash from here on is found by the next pass, which ends the copy.
        self.change_record(id, |record| record.snapshot = true).await?;
        let copying = Copying {
            hypervisor: Arc::clone(&self.hypervisor),
            tool: self.tool.clone(),
            id,
            runs,
            device: root_target(spec),
            disk: self.store.part(id, Part::Root),
            format,
            copy: self.store.copy(id),
            target: target.clone(),
        };
        let (store, wake) = (self.store.clone(), self.wake.clone());
        let mut work = tokio::spawn(async move {
            let done = copying.run().await;
            let clear = crate::blocking(move || {
                let mut record = store.read(id)?.unwrap_or_default();
                record.snapshot = false;
                store.prepare(id, &record)
            });
            if let Err(error) = clear.await {
                tracing::warn!(instance = %id, error = crate::chain(&error), "after a snapshot");
            }
            drop(guard);
            wake.object_changed(id.object());
            done
        });
        match tokio::time::timeout(WAIT, &mut work).await {
            Ok(Ok(done)) => done,
            Ok(Err(error)) => Err(Refusal::new(ErrorCode::Internal, error.to_string())),
            Err(_) => Ok(json!({"path": target, "under_way": true})),
        }
    }

    /// A PNG of its screen.
    pub(super) async fn screenshot(&self, id: InstanceId) -> Result<Value, Refusal> {
        if self.domain(id).await?.power.is_off() {
            let message = "it is shut off: there is nothing to see";
            return Err(Refusal::new(ErrorCode::WrongState, message));
        }
        let picture = self.hypervisor.screenshot(id).await.map_err(unavailable)?;
        let png = png_of(picture).map_err(|reason| {
            let message = format!("cannot understand the picture that libvirt gave: {reason}");
            Refusal::new(ErrorCode::Internal, message)
        })?;
        if png.len() > MOST_PICTURE {
            let message = format!("the picture has {} bytes, more than an answer takes", png.len());
            return Err(Refusal::new(ErrorCode::Unsupported, message));
        }
        Ok(json!({"mime": "image/png", "png": STANDARD.encode(&png)}))
    }
}

/// A copy of a root disk that is being made.
struct Copying<H> {
    hypervisor: Arc<H>,
    tool: ImageTool,
    id: InstanceId,
    runs: bool,
    /// The root disk's device in the guest.
    device: String,
    disk: PathBuf,
    format: FileFormat,
    copy: PathBuf,
    target: PathBuf,
}

impl<H: Hypervisor> Copying<H> {
    async fn run(&self) -> Result<Value, Refusal> {
        let made = self.make().await;
        if made.is_err() {
            let copy = self.copy.clone();
            let _left = crate::blocking(move || remove(&copy)).await;
        }
        made
    }

    async fn make(&self) -> Result<Value, Refusal> {
        let broken = |error: &dyn std::error::Error| {
            Refusal::new(ErrorCode::Unavailable, crate::chain(error))
        };
        let copy = self.copy.clone();
        crate::blocking(move || remove(&copy)).await.map_err(|error| broken(&error))?;
        if self.runs {
            // libvirt gives the file to QEMU's user and then to root; it stays readable to us.
            let size = self.tool.size(&self.disk, self.format).await;
            let size = size.map_err(|error| broken(&error))?;
            let made = self.tool.make_empty(&self.copy, size).await;
            made.map_err(|error| broken(&error))?;
            let copied = self.hypervisor.copy_disk(self.id, &self.device, &self.copy).await;
            copied.map_err(unavailable)?;
        } else {
            let (disk, copy) = (&self.disk, &self.copy);
            let done = self.tool.flatten(disk, self.format, copy, FileFormat::Qcow2).await;
            done.map_err(|error| broken(&error))?;
        }
        let (copy, target) = (self.copy.clone(), self.target.clone());
        let finish = move || {
            let sha256 = stackhand_image::sha256_of(&copy)?;
            let bytes = std::fs::metadata(&copy).map_err(failed("look at", &copy))?.len();
            let folder = target.parent().unwrap_or(Path::new("/"));
            make_passage(folder)?;
            std::fs::rename(&copy, &target).map_err(failed("rename to", &target))?;
            sync_folder(folder)?;
            Ok((sha256, bytes))
        };
        let (sha256, bytes) = crate::blocking(finish).await.map_err(|error| broken(&error))?;
        Ok(json!({
            "path": self.target,
            "format": "qcow2",
            "bytes": bytes,
            "checksum": format!("sha256:{sha256}"),
        }))
    }
}

/// A picture as PNG, from the formats that QEMU gives.
fn png_of(picture: Screenshot) -> Result<Vec<u8>, String> {
    if picture.mime == "image/png" {
        return Ok(picture.bytes);
    }
    let (width, height, points) = ppm(&picture.bytes)?;
    let mut png = Vec::new();
    let mut encoder = png::Encoder::new(&mut png, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(|error| error.to_string())?;
    writer.write_image_data(points).map_err(|error| error.to_string())?;
    writer.finish().map_err(|error| error.to_string())?;
    Ok(png)
}

/// Reads a portable pixmap of eight bits: width, height and points.
fn ppm(bytes: &[u8]) -> Result<(u32, u32, &[u8]), String> {
    let mut rest = bytes.strip_prefix(b"P6").ok_or("it is no pixmap")?;
    let mut numbers = [0_u32; 3];
    for number in &mut numbers {
        rest = rest.trim_ascii_start();
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let text = std::str::from_utf8(&rest[..digits]).unwrap_or_default();
        *number = text.parse().map_err(|_| "its header makes no sense")?;
        rest = &rest[digits..];
    }
    let [width, height, depth] = numbers;
    let points = rest.get(1..).unwrap_or_default();
    let expected = (u64::from(width) * u64::from(height)).checked_mul(3).filter(|&it| it > 0);
    if depth != 255 || expected.is_none() || u64::try_from(points.len()).ok() != expected {
        return Err("its size makes no sense".into());
    }
    Ok((width, height, points))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pixmap_becomes_a_png_and_what_makes_no_sense_an_error() {
        let picture = |bytes: &[u8]| {
            let mime = "image/x-portable-pixmap".into();
            png_of(Screenshot { mime, bytes: bytes.to_vec() })
        };
        let png = picture(b"P6\n2 1\n255\n\x01\x02\x03\x04\x05\x06").unwrap();
        assert!(png.starts_with(b"\x89PNG"));
        for bad in [
            &b""[..],
            b"P5\n1 1\n255\nx",
            b"P6\n1 1\n255\n",
            b"P6\n1 1\n65535\n\x01\x02\x03",
            b"P6\n4000000000 4000000000\n255\nx",
            b"P6\n99999999999 1\n255\nx",
        ] {
            assert!(picture(bad).is_err(), "{bad:?}");
        }
    }
}
