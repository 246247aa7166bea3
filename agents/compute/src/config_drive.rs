//! The config drive: what a guest is told about itself, on a CD.
//!
//! Two layouts are known to guests, and each is found by the CD's label: OpenStack's (`config-2`)
//! and NoCloud's (`cidata`). What is on it comes from [`stackhand_metadata`], which serves the same
//! over the network.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::sync::Arc;

use hadris_iso::read::PathSeparator;
use hadris_iso::write::options::{CreationFeatures, IsoFormatOptions};
use hadris_iso::write::{File, InputFiles, IsoImageWriter};
use ring::rand::{SecureRandom, SystemRandom};
use stackhand_metadata::{Guest, SEED_BYTES, config_drive_files, nocloud_files};
use stackhand_model::{ConfigDriveLayout, InstanceId, InstanceSpec};

/// Bytes of a sector of a CD.
const SECTOR: usize = 2048;

/// A config drive cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the config drive: {reason}")]
pub struct Unwritable {
    reason: String,
}

/// Hash of what an instance's config drive tells, but for what is random.
#[must_use]
pub fn digest(id: InstanceId, name: &str, spec: &InstanceSpec) -> String {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    context.update(label(spec.config_drive_layout).as_bytes());
    for (path, bytes) in files(id, name, spec, &[]) {
        for part in [path.as_bytes(), &bytes] {
            context.update(&part.len().to_le_bytes());
            context.update(part);
        }
    }
    stackhand_image::hex(context.finish().as_ref())
}

/// The image of an instance's config drive, with a fresh random seed.
///
/// # Errors
///
/// Fails if the system has no random bytes, or on a defect.
pub fn image(id: InstanceId, name: &str, spec: &InstanceSpec) -> Result<Vec<u8>, Unwritable> {
    let mut seed = vec![0; SEED_BYTES];
    SystemRandom::new()
        .fill(&mut seed)
        .map_err(|_| Unwritable { reason: "the system gives no random bytes".into() })?;
    write(label(spec.config_drive_layout), files(id, name, spec, &seed))
}

fn label(layout: ConfigDriveLayout) -> &'static str {
    match layout {
        ConfigDriveLayout::OpenStack => "config-2",
        ConfigDriveLayout::NoCloud => "cidata",
    }
}

fn files(
    id: InstanceId,
    name: &str,
    spec: &InstanceSpec,
    seed: &[u8],
) -> BTreeMap<String, Vec<u8>> {
    let guest = Guest {
        id,
        name,
        data: &spec.guest,
        ports: &spec.ports,
        domain: None,
        seed,
        password: None,
    };
    match spec.config_drive_layout {
        ConfigDriveLayout::OpenStack => config_drive_files(&guest),
        ConfigDriveLayout::NoCloud => nocloud_files(&guest),
    }
}

/// Writes files to the image of a CD with a label.
fn write(label: &str, files: BTreeMap<String, Vec<u8>>) -> Result<Vec<u8>, Unwritable> {
    // Room for the files in whole sectors, and for folders and tables of three name spaces.
    let sectors = |bytes: usize| bytes.div_ceil(SECTOR) * SECTOR;
    let room: usize = files.values().map(|bytes| sectors(bytes.len()) + 4 * SECTOR).sum();
    let input = InputFiles { path_separator: PathSeparator::ForwardSlash, files: tree(files) };
    let options = IsoFormatOptions {
        volume_name: label.to_owned(),
        system_id: None,
        volume_set_id: None,
        publisher_id: None,
        preparer_id: None,
        application_id: None,
        sector_size: SECTOR,
        path_separator: PathSeparator::ForwardSlash,
        features: CreationFeatures::extensions(),
        strict_charset: false,
    };
    let mut image = Cursor::new(vec![0; room + (1 << 20)]);
    IsoImageWriter::create(&mut image, input, options)
        .map_err(|error| Unwritable { reason: error.to_string() })?;
    let mut image = image.into_inner();
    // What was too much is zeroes; the tables say how long the CD is.
    let used = image.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    image.truncate(sectors(used).max(volume_bytes(&image)));
    Ok(image)
}

/// How long the primary volume descriptor says that the CD is.
fn volume_bytes(image: &[u8]) -> usize {
    let at = 16 * SECTOR + 80;
    let sectors = image.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    let sectors = sectors.map_or(0, u32::from_le_bytes);
    (usize::try_from(sectors).unwrap_or(0) * SECTOR).min(image.len())
}

/// Files by path as a tree of folders.
fn tree(files: BTreeMap<String, Vec<u8>>) -> Vec<File> {
    let mut here = Vec::new();
    let mut below: BTreeMap<String, BTreeMap<String, Vec<u8>>> = BTreeMap::new();
    for (path, contents) in files {
        match path.trim_start_matches('/').split_once('/') {
            Some((folder, rest)) => {
                below.entry(folder.to_owned()).or_default().insert(rest.to_owned(), contents);
            }
            None => here.push(File::File { name: Arc::new(path), contents }),
        }
    }
    here.extend(below.into_iter().map(|(name, children)| File::Directory {
        name: Arc::new(name),
        children: tree(children),
    }));
    here
}
