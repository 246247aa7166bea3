//! An instance as libvirt's domain XML, by typed serialisation.
//!
//! Everything that decides what a domain is goes into a [`Blueprint`], which is plain data; the
//! XML follows from it alone, and its hash, the *definition*, stands in the domain's metadata
//! with the instance's id and generation. So a look at a domain tells whose it is and whether it
//! is as it should be, without comparing XML that libvirt has rearranged.

mod read;
#[cfg(test)]
mod tests;
mod xml;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use stackhand_model::{Connection, FileFormat, InstanceId, MacAddr, PortId, VolumeId};
use uuid::Uuid;

pub use read::{UnreadableDomain, read};

/// XML namespace of our mark.
pub const NAMESPACE: &str = "https://stackhand.org/xmlns/instance/1";

/// Everything that decides what a domain is.
#[derive(Clone, Debug, PartialEq)]
pub struct Blueprint {
    /// The instance.
    pub id: InstanceId,
    /// Who executes the guest's instructions.
    pub engine: Engine,
    /// QEMU's machine type.
    pub machine: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Kernel to boot directly.
    pub kernel: Option<KernelBoot>,
    /// Disks, in the order of their target devices.
    pub disks: Vec<Disk>,
    /// Network devices, in order.
    pub nics: Vec<Nic>,
    /// File that the serial console is logged to.
    pub console_log: PathBuf,
    /// Whether there is a VNC console on the host's loopback.
    pub vnc: bool,
    /// How disk images are cached, in libvirt's words.
    pub disk_cache: String,
}

/// Who executes a guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// The processor, by KVM.
    Kvm,
    /// QEMU's translator (TCG): slower by far, works everywhere.
    Qemu,
}

impl Engine {
    /// libvirt's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
        }
    }
}

/// A kernel that is booted without firmware and boot loader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelBoot {
    /// The kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub ramdisk: Option<PathBuf>,
    /// Command line.
    pub command_line: Option<String>,
}

/// A disk of a domain.
#[derive(Clone, Debug, PartialEq)]
pub struct Disk {
    /// Device in the guest, such as `vda`.
    pub target: String,
    /// Its bytes.
    pub source: DiskSource,
    /// Whether the guest boots from it.
    pub boot: bool,
    /// What the guest sees as the serial number.
    pub serial: Option<VolumeId>,
}

/// Where a disk's bytes are.
#[derive(Clone, Debug, PartialEq)]
pub enum DiskSource {
    /// A qcow2 overlay over a cached image.
    Overlay {
        /// The overlay.
        path: PathBuf,
        /// The image below.
        base: PathBuf,
        /// Format of the image below.
        base_format: FileFormat,
    },
    /// A volume, as the storage agent told.
    Volume(Connection),
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// The host's end, made by the network agent.
    pub tap: String,
    /// Ethernet address.
    pub mac: MacAddr,
    /// MTU told to the guest.
    pub mtu: Option<u32>,
}

/// Our mark in a domain's metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The instance.
    pub id: Uuid,
    /// Generation of the document it was defined from.
    pub generation: u64,
    /// Hash of what it was defined as.
    pub definition: String,
}

/// A domain as libvirt describes it, as far as it concerns us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// Our mark, if it has one.
    pub mark: Option<Mark>,
    /// Port of its VNC console, while it runs.
    pub vnc_port: Option<u16>,
}

/// Name of the tap that carries a port: the same on the network agent's side.
#[must_use]
pub fn tap_name(port: PortId) -> String {
    format!("tap{}", port.short())
}

/// Name of an instance's domain, as OpenStack forms it.
#[must_use]
pub fn domain_name(id: InstanceId) -> String {
    format!("instance-{}", &id.0.simple().to_string()[..8])
}

/// A blueprint that cannot become XML.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the domain XML of instance {id}")]
pub struct Unwritable {
    id: InstanceId,
    source: quick_xml::SeError,
}

impl Blueprint {
    /// Hash of the XML, the mark left out.
    ///
    /// # Errors
    ///
    /// As [`Blueprint::xml`].
    pub fn definition(&self) -> Result<String, Unwritable> {
        let text = self.write(&Mark { id: self.id.0, generation: 0, definition: String::new() })?;
        let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        Ok(stackhand_image::hex(digest.as_ref()))
    }

    /// The domain XML, marked as made from `generation` of the document.
    ///
    /// # Errors
    ///
    /// Fails only on a defect: every blueprint can be written.
    pub fn xml(&self, generation: u64) -> Result<String, Unwritable> {
        let definition = self.definition()?;
        self.write(&Mark { id: self.id.0, generation, definition })
    }

    fn write(&self, mark: &Mark) -> Result<String, Unwritable> {
        let mut text = String::new();
        let mut serializer = quick_xml::se::Serializer::new(&mut text);
        serializer.indent(' ', 2);
        xml::Domain::new(self, mark)
            .serialize(serializer)
            .map_err(|source| Unwritable { id: self.id, source })?;
        Ok(text)
    }
}
