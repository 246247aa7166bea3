//! What is wanted of the compute agent. The words are Nova's and Glance's.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::guest::{GuestAddress, GuestData};
use super::storage::Connection;
use super::{Broken, broken, yes};
use crate::{ImageId, MacAddr, NetworkId, PortId, VolumeId};

/// What a disk starts from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// Where it comes from: an absolute path, `file://`, `http://` or `https://`.
    pub source: String,
    /// `sha256:<hex>` or `sha512:<hex>` of the source as fetched. Without it the bytes are
    /// trusted as they come; the agent then warns for `http://`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// Format of the source. It is checked against what the bytes say.
    pub format: ImageFormat,
    /// Smallest root disk in GiB that can start from it.
    #[serde(default)]
    pub min_disk_gib: u64,
    /// Kernel to boot it with, an image of format `kernel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<ImageId>,
    /// Initial RAM disk, an image of format `ramdisk`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ramdisk: Option<ImageId>,
    /// Kernel command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_line: Option<String>,
}

/// Format of an image's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The plain bytes of a disk.
    Raw,
    /// QEMU's format.
    Qcow2,
    /// VMware's format.
    Vmdk,
    /// Hyper-V's older format.
    Vhd,
    /// Hyper-V's newer format.
    Vhdx,
    /// VirtualBox's format.
    Vdi,
    /// A bootable CD.
    Iso,
    /// A root file system without a partition table, booted by a kernel image.
    Ami,
    /// A Linux kernel.
    Kernel,
    /// An initial RAM disk.
    Ramdisk,
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InstanceSpec {
    /// The host that runs it.
    pub host: String,
    /// Virtual processors, 1 to 512.
    pub vcpus: u32,
    /// Memory in MiB, 16 to 16777216.
    pub memory_mib: u64,
    /// Size of the root disk in GiB; 0 with `image` means the image's own size.
    #[serde(default)]
    pub root_disk_gib: u64,
    /// Image of the root disk. Either this, a kernel, or a bootable volume is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageId>,
    /// Kernel to boot directly, without a root disk or with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<ImageId>,
    /// Initial RAM disk for `kernel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ramdisk: Option<ImageId>,
    /// Kernel command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_line: Option<String>,
    /// Its ports, in the order of its network devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<InstancePort>,
    /// Its volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<InstanceVolume>,
    /// What its guest is told about itself: keys, user data, metadata.
    #[serde(default)]
    pub guest: GuestData,
    /// Whether the guest is told on a config drive too.
    #[serde(default)]
    pub config_drive: bool,
    /// Whether it runs.
    #[serde(default)]
    pub power_state: PowerState,
    /// Whether it has a VNC console, on the host's loopback.
    #[serde(default = "yes")]
    pub vnc: bool,
}

/// Whether an instance runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PowerState {
    /// It runs.
    #[default]
    Running,
    /// It is shut off; its disks stay.
    Shutoff,
    /// It is in memory but does not run.
    Paused,
}

/// A port given to an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InstancePort {
    /// The port; its tap's name follows from it.
    pub port: PortId,
    /// The port's Ethernet address.
    pub mac: MacAddr,
    /// The network's MTU in bytes, told to the guest's device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The port's network. Controllers fill this and the addresses in for the config drive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkId>,
    /// The port's addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<GuestAddress>,
}

/// A volume given to an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InstanceVolume {
    /// The volume; the guest sees its id as the disk's serial number.
    pub volume: VolumeId,
    /// Guest device, for example `vdb`. Absent: the next free one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// How the host reaches it: the storage agent's answer to the attachment.
    pub connection: Connection,
    /// Whether the guest boots from it.
    #[serde(default)]
    pub boot: bool,
}

impl ImageSpec {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        let known = ["/", "file:///", "http://", "https://"];
        if !known.iter().any(|prefix| self.source.starts_with(prefix)) {
            return broken(
                "source",
                format!(
                    "{:?} is neither an absolute path nor a file, http or https URL",
                    self.source
                ),
            );
        }
        if let Some(checksum) = &self.checksum {
            let hex = |digits: &str, length: usize| {
                digits.len() == length && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
            };
            let good = checksum.strip_prefix("sha256:").is_some_and(|digits| hex(digits, 64))
                || checksum.strip_prefix("sha512:").is_some_and(|digits| hex(digits, 128));
            if !good {
                return broken(
                    "checksum",
                    "must be sha256:<64 hex digits> or sha512:<128 hex digits>",
                );
            }
        }
        Ok(())
    }
}

impl InstanceSpec {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        if self.host.is_empty() {
            return broken("host", "is empty");
        }
        if !(1..=512).contains(&self.vcpus) {
            return broken("vcpus", format!("{} is outside 1 to 512", self.vcpus));
        }
        if !(16..=16_777_216).contains(&self.memory_mib) {
            return broken("memory_mib", format!("{} is outside 16 to 16777216", self.memory_mib));
        }
        let boots_from_volume = self.volumes.iter().any(|volume| volume.boot);
        if self.image.is_none() && self.kernel.is_none() && !boots_from_volume {
            return broken(
                "image",
                "nothing to boot: give an image, a kernel or a volume with boot: true",
            );
        }
        if self.ramdisk.is_some() && self.kernel.is_none() {
            return broken("ramdisk", "needs a kernel");
        }
        let mut ports = BTreeSet::new();
        for (index, port) in self.ports.iter().enumerate() {
            if !ports.insert(port.port) {
                return broken(format!("ports[{index}].port"), "is listed twice");
            }
        }
        let mut volumes = BTreeSet::new();
        let mut devices = BTreeSet::new();
        for (index, volume) in self.volumes.iter().enumerate() {
            if !volumes.insert(volume.volume) {
                return broken(format!("volumes[{index}].volume"), "is listed twice");
            }
            if let Some(device) = &volume.device {
                let good = device.len() <= 5
                    && device.strip_prefix("vd").is_some_and(|letters| {
                        !letters.is_empty() && letters.bytes().all(|byte| byte.is_ascii_lowercase())
                    });
                if !good {
                    return broken(
                        format!("volumes[{index}].device"),
                        format!("{device:?} is not a guest device such as vdb"),
                    );
                }
                if !devices.insert(device) {
                    return broken(
                        format!("volumes[{index}].device"),
                        format!("{device} is used twice"),
                    );
                }
            }
        }
        self.guest.check().or_else(|(field, problem)| broken(format!("guest.{field}"), problem))
    }
}
