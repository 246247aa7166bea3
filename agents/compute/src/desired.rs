//! What is wanted of this host, by kind, and what can never be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use stackhand_model::{
    Document, ErrorCode, ImageFormat, ImageId, ImageSpec, InstanceId, InstanceSpec, ObjectRef, Spec,
};
use stackhand_runtime::agent::{Desired, Refusal};

use crate::domain::domain_name;

/// Formats of images that a root disk can start from.
const DISKS: [ImageFormat; 7] = [
    ImageFormat::Raw,
    ImageFormat::Qcow2,
    ImageFormat::Vmdk,
    ImageFormat::Vhd,
    ImageFormat::Vhdx,
    ImageFormat::Vdi,
    ImageFormat::Ami,
];

/// The documents held, by kind.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Images.
    pub images: BTreeMap<ImageId, Wish<ImageSpec>>,
    /// Instances.
    pub instances: BTreeMap<InstanceId, Wish<InstanceSpec>>,
}

/// One document and whether its object is to go.
#[derive(Clone, Debug)]
pub struct Wish<S> {
    /// What is wanted.
    pub spec: S,
    /// A delete was accepted.
    pub deleting: bool,
    /// The document, for its name and generation.
    pub document: Arc<Document>,
}

impl Wanted {
    /// Sorts documents by kind.
    #[must_use]
    pub fn new(desired: &Desired) -> Self {
        let mut wanted = Self::default();
        for (object, held) in &desired.objects {
            let (deleting, document) = (held.deleting, Arc::clone(&held.document));
            match &held.document.spec {
                Spec::Image(spec) => {
                    let wish = Wish { spec: spec.clone(), deleting, document };
                    wanted.images.insert(ImageId(object.id), wish);
                }
                Spec::Instance(spec) => {
                    let wish = Wish { spec: spec.as_ref().clone(), deleting, document };
                    wanted.instances.insert(InstanceId(object.id), wish);
                }
                // Documents of other agents do not get here.
                _ => {}
            }
        }
        wanted
    }

    /// How an image is called in messages: its kind, name and id.
    #[must_use]
    pub fn call(&self, id: ImageId) -> String {
        match self.images.get(&id) {
            Some(wish) => format!("Image {} ({id})", wish.document.name),
            None => id.object().to_string(),
        }
    }

    /// The kernel, RAM disk and command line of an instance: its own, else its image's.
    #[must_use]
    pub fn boot(&self, spec: &InstanceSpec) -> (Option<ImageId>, Option<ImageId>, Option<String>) {
        if spec.kernel.is_some() {
            return (spec.kernel, spec.ramdisk, spec.command_line.clone());
        }
        match spec.image.and_then(|image| self.images.get(&image)) {
            Some(image) => {
                let command_line = spec.command_line.clone().or(image.spec.command_line.clone());
                (image.spec.kernel, image.spec.ramdisk, command_line)
            }
            None => (None, None, None),
        }
    }
}

/// Judges a change by documents alone.
///
/// # Errors
///
/// Refuses what can never work.
pub fn admit(host: &str, wanted: &Wanted, changed: &BTreeSet<ObjectRef>) -> Result<(), Refusal> {
    for (&id, wish) in wanted.images.iter().filter(|(_, wish)| !wish.deleting) {
        if changed.contains(&id.object()) {
            image(&wish.spec).map_err(|refusal| refusal.about(id.object()))?;
        }
    }
    let mut names: BTreeMap<String, InstanceId> = BTreeMap::new();
    for (&id, wish) in &wanted.instances {
        let other = names.insert(domain_name(id), id);
        if !changed.contains(&id.object()) || wish.deleting {
            continue;
        }
        instance(host, wanted, &wish.spec).map_err(|refusal| refusal.about(id.object()))?;
        if let Some(other) = other {
            let message = format!(
                "its domain would be called {} as that of {}: choose another id",
                domain_name(id),
                other.object()
            );
            return Err(Refusal::new(ErrorCode::Conflict, message).about(id.object()).at("id"));
        }
    }
    Ok(())
}

fn image(spec: &ImageSpec) -> Result<(), Refusal> {
    plain_text(spec.command_line.as_deref())
}

fn instance(host: &str, wanted: &Wanted, spec: &InstanceSpec) -> Result<(), Refusal> {
    if spec.host != host {
        let message = format!("spec.host is {}, this is {host}: send it there", spec.host);
        return Err(Refusal::new(ErrorCode::BadRequest, message).at("spec.host"));
    }
    let formats = |id: Option<ImageId>, good: &[ImageFormat], field: &str| match id
        .and_then(|id| wanted.images.get(&id))
    {
        Some(image) if !good.contains(&image.spec.format) => {
            let message = format!(
                "Image {} has format {:?}, which is not for this",
                image.document.name, image.spec.format
            );
            Err(Refusal::new(ErrorCode::BadRequest, message).at(field))
        }
        _ => Ok(()),
    };
    formats(spec.image, &DISKS, "spec.image")?;
    formats(spec.cdrom, &[ImageFormat::Iso], "spec.cdrom")?;
    formats(spec.kernel, &[ImageFormat::Kernel], "spec.kernel")?;
    formats(spec.ramdisk, &[ImageFormat::Ramdisk], "spec.ramdisk")?;
    if let Some(image) = spec.image.and_then(|id| wanted.images.get(&id))
        && spec.root_disk_gib != 0
        && spec.root_disk_gib < image.spec.min_disk_gib
    {
        let message = format!(
            "{} GiB are less than the {} that Image {} asks for",
            spec.root_disk_gib, image.spec.min_disk_gib, image.document.name
        );
        return Err(Refusal::new(ErrorCode::BadRequest, message).at("spec.root_disk_gib"));
    }
    if let Some(image) = spec.image.and_then(|id| wanted.images.get(&id))
        && image.spec.format == ImageFormat::Ami
        && wanted.boot(spec).0.is_none()
    {
        let message = format!(
            "Image {} has no boot loader (ami): give the image or the instance a kernel",
            image.document.name
        );
        return Err(Refusal::new(ErrorCode::BadRequest, message).at("spec.kernel"));
    }
    plain_text(spec.command_line.as_deref())
}

/// XML 1.0 has no way to write most control characters, and kernels take none.
fn plain_text(command_line: Option<&str>) -> Result<(), Refusal> {
    match command_line {
        Some(text)
            if text.len() > 2048 || text.chars().any(|c| c.is_control() || c >= '\u{fffe}') =>
        {
            let message = "must have at most 2,048 bytes and no control characters";
            Err(Refusal::new(ErrorCode::BadRequest, message).at("spec.command_line"))
        }
        _ => Ok(()),
    }
}
