//! An instance as libvirt's domain XML, by typed serialisation.
//!
//! Everything that decides what a domain is goes into a [`Blueprint`], which is plain data; the
//! XML follows from it alone, and its hash, the *definition*, stands in the domain's metadata
//! with the instance's id and generation. So a look at a domain tells whose it is and whether it
//! is as it should be, without comparing XML that libvirt has rearranged. What can be plugged in
//! and out of a running domain is left out of a second hash, the *core*, and compared by device.

mod devices;
mod read;
#[cfg(test)]
mod tests;
mod xml;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use stackhand_model::{
    Connection, CpuSpec, FileFormat, Firmware, InstanceId, MacAddr, PortId, VolumeId,
    WatchdogAction,
};
use uuid::Uuid;

pub use read::{UnreadableDomain, read, read_device};

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
    /// What the processors are.
    pub cpu: CpuSpec,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// What boots it.
    pub firmware: Firmware,
    /// Kernel to boot directly.
    pub kernel: Option<KernelBoot>,
    /// Disks that come and go with the domain alone.
    pub disks: Vec<Disk>,
    /// Volumes, in the order of their target devices.
    pub volumes: Vec<Disk>,
    /// Network devices, in order.
    pub nics: Vec<Nic>,
    /// File that the serial console is logged to.
    pub console_log: PathBuf,
    /// Whether there is a VNC console on the host's loopback.
    pub vnc: bool,
    /// What happens when the watchdog is not fed.
    pub watchdog: Option<WatchdogAction>,
    /// Whether there is a channel for the guest agent.
    pub guest_agent: bool,
    /// How disk images are cached, in libvirt's words.
    pub disk_cache: String,
    /// Devices that can be plugged in while it runs.
    pub spare_slots: u32,
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
    /// Device in the guest, such as `vda`; `sd…` for a CD.
    pub target: String,
    /// Its bytes.
    pub source: DiskSource,
    /// Its place among what the guest boots from.
    pub boot: Option<u32>,
    /// What the guest sees as the serial number.
    pub serial: Option<VolumeId>,
    /// Whether the guest may not write to it.
    pub read_only: bool,
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
    /// A file of the instance's own, of plain bytes.
    File(PathBuf),
    /// A CD in a drive on the bus that installers know.
    Cd(PathBuf),
    /// A CD in a drive on virtio, which kernels for clouds know.
    VirtioCd(PathBuf),
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
    /// Queues, as many as the tap allows.
    pub queues: u16,
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
    /// Hash of the same without what can be plugged in and out while it runs.
    pub core: String,
}

/// A domain as libvirt describes it, as far as it concerns us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Described {
    /// Our mark, if it has one.
    pub mark: Option<Mark>,
    /// Port of its VNC console, while it runs.
    pub vnc_port: Option<u16>,
    /// What can be plugged in and out.
    pub devices: Devices,
}

/// Devices of a domain that can be plugged in and out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// Volumes.
    pub volumes: BTreeMap<VolumeId, Plugged>,
    /// Network devices, by tap.
    pub nics: BTreeMap<String, Plugged>,
}

/// A device that is plugged in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plugged {
    /// libvirt's name for it.
    pub alias: String,
    /// The guest's: a disk's target or an Ethernet address.
    pub guest: String,
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

/// UUID of the libvirt secret that holds a volume's password.
#[must_use]
pub fn secret_id(volume: VolumeId) -> Uuid {
    Uuid::new_v5(&volume.0, b"stackhand:secret")
}

/// XML of a libvirt secret that lives in memory and is never told to anybody but QEMU.
#[must_use]
pub fn secret_xml(volume: VolumeId) -> String {
    // Nothing in it needs escaping.
    format!(
        "<secret ephemeral='yes' private='yes'><uuid>{}</uuid><description>stackhand volume {volume}\
         </description><usage type='iscsi'><target>stackhand-{volume}</target></usage></secret>",
        secret_id(volume)
    )
}

impl Blueprint {
    /// Hash of the XML, the mark left out.
    ///
    /// # Errors
    ///
    /// As [`Blueprint::xml`].
    pub fn definition(&self) -> Result<String, Unwritable> {
        let nobody =
            Mark { id: self.id.0, generation: 0, definition: String::new(), core: String::new() };
        let text = self.write(&xml::Domain::new(self, &nobody))?;
        let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        Ok(stackhand_image::hex(digest.as_ref()))
    }

    /// The same without what can be plugged in and out while it runs.
    ///
    /// # Errors
    ///
    /// As [`Blueprint::xml`].
    pub fn core(&self) -> Result<String, Unwritable> {
        Self { volumes: Vec::new(), nics: Vec::new(), ..self.clone() }.definition()
    }

    /// The domain XML, marked as made from `generation` of the document.
    ///
    /// # Errors
    ///
    /// Fails only on a defect: every blueprint can be written.
    pub fn xml(&self, generation: u64) -> Result<String, Unwritable> {
        let (definition, core) = (self.definition()?, self.core()?);
        let mark = Mark { id: self.id.0, generation, definition, core };
        self.write(&xml::Domain::new(self, &mark))
    }

    /// The XML of one of its volumes, to plug it in.
    ///
    /// # Errors
    ///
    /// As [`Blueprint::xml`].
    pub fn volume_xml(&self, disk: &Disk) -> Result<String, Unwritable> {
        self.write(&devices::DiskElement::new(disk, self))
    }

    /// The XML of one of its network devices, to plug it in.
    ///
    /// # Errors
    ///
    /// As [`Blueprint::xml`].
    pub fn nic_xml(&self, nic: &Nic) -> Result<String, Unwritable> {
        self.write(&devices::Interface::new(nic))
    }

    fn write(&self, element: &impl Serialize) -> Result<String, Unwritable> {
        let mut text = String::new();
        let mut serializer = quick_xml::se::Serializer::new(&mut text);
        serializer.indent(' ', 2);
        element.serialize(serializer).map_err(|source| Unwritable { id: self.id, source })?;
        Ok(text)
    }
}
