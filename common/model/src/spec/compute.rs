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
    /// Size of the root disk in GiB; 0 with `image` means the image's own size, and without one no
    /// root disk.
    #[serde(default)]
    pub root_disk_gib: u64,
    /// Size of a second disk in GiB, empty and formatted as ext4; 0: none. It goes with the
    /// instance.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ephemeral_gib: u64,
    /// Size of a swap disk in MiB; 0: none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub swap_mib: u64,
    /// Image of the root disk. Either this, a kernel, or a bootable volume is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageId>,
    /// A CD in its drive, an image of format `iso`. It boots from that while its disks are empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cdrom: Option<ImageId>,
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
    /// How the config drive is laid out.
    #[serde(default, skip_serializing_if = "is_default")]
    pub config_drive_layout: ConfigDriveLayout,
    /// Whether it runs.
    #[serde(default)]
    pub power_state: PowerState,
    /// Whether it has a VNC console, on the host's loopback.
    #[serde(default = "yes")]
    pub vnc: bool,
    /// Its processors.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cpu: CpuSpec,
    /// What boots it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub firmware: Firmware,
    /// What happens when the guest stops feeding its watchdog. Absent: it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watchdog: Option<WatchdogAction>,
    /// Whether it has a channel for the QEMU guest agent.
    #[serde(default, skip_serializing_if = "is_default")]
    pub guest_agent: bool,
}

/// How a config drive is laid out; guests find it by its label.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ConfigDriveLayout {
    /// OpenStack's and EC2's, label `config-2`.
    #[default]
    OpenStack,
    /// cloud-init's own, label `cidata`.
    NoCloud,
}

/// Processors of an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuSpec {
    /// How they are chosen.
    #[serde(default)]
    pub mode: CpuMode,
    /// The model, in libvirt's words, such as `Haswell-noTSX`; for mode `custom`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
}

/// How an instance's processors are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CpuMode {
    /// The host's model where KVM runs, else all that QEMU can do.
    #[default]
    Default,
    /// The named model that is nearest to the host's; moves between like hosts.
    HostModel,
    /// The host's processor as it is.
    HostPassthrough,
    /// All that QEMU or KVM can do here.
    Maximum,
    /// The model that `model` names.
    Custom,
}

/// What boots an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// The old way.
    #[default]
    Bios,
    /// UEFI, without secure boot.
    Uefi,
}

/// What happens to an instance whose watchdog is not fed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WatchdogAction {
    /// It is reset.
    Reset,
    /// It is powered off.
    Poweroff,
    /// Its processors are stopped.
    Pause,
    /// Nothing but an event.
    None,
}

impl CpuMode {
    /// The name as written in JSON, which is libvirt's but for `default`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::HostModel => "host-model",
            Self::HostPassthrough => "host-passthrough",
            Self::Maximum => "maximum",
            Self::Custom => "custom",
        }
    }
}

impl WatchdogAction {
    /// The name as written in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Poweroff => "poweroff",
            Self::Pause => "pause",
            Self::None => "none",
        }
    }
}

impl PowerState {
    /// The name as written in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Shutoff => "shutoff",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
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
    /// Its memory is on disk; it goes on where it was when it runs again.
    Suspended,
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
    /// Queues of the guest's device, 1 to 256: more than one if the port's tap has as many.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub queues: u16,
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
    /// Size in GiB that the guest is to see, the volume's own. A running guest is told when it
    /// grows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_gib: Option<u64>,
    /// Whether the guest may not write to it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub read_only: bool,
}

fn one() -> u16 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_one(queues: &u16) -> bool {
    *queues == 1
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

impl CpuSpec {
    fn check(&self) -> Result<(), Broken> {
        match (&self.model, self.mode) {
            (None, CpuMode::Custom) => broken("cpu.model", "is missing, and cpu.mode is custom"),
            (Some(_), mode) if mode != CpuMode::Custom => {
                broken("cpu.model", "is for cpu.mode custom alone")
            }
            (Some(model), _)
                if model.is_empty()
                    || model.len() > 64
                    || !model
                        .bytes()
                        .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) =>
            {
                broken("cpu.model", "must be a model's name, such as Haswell-noTSX")
            }
            _ => Ok(()),
        }
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
        if self.image.is_none()
            && self.kernel.is_none()
            && self.cdrom.is_none()
            && !boots_from_volume
        {
            return broken(
                "image",
                "nothing to boot: give an image, a kernel, a cdrom or a volume with boot: true",
            );
        }
        if self.ephemeral_gib > 65_536 {
            return broken("ephemeral_gib", format!("{} is above 65536", self.ephemeral_gib));
        }
        if self.swap_mib > 1_048_576 {
            return broken("swap_mib", format!("{} is above 1048576", self.swap_mib));
        }
        self.cpu.check()?;
        if self.firmware == Firmware::Uefi && self.kernel.is_some() {
            return broken("firmware", "uefi and a kernel exclude each other");
        }
        if self.ramdisk.is_some() && self.kernel.is_none() {
            return broken("ramdisk", "needs a kernel");
        }
        let mut ports = BTreeSet::new();
        for (index, port) in self.ports.iter().enumerate() {
            if !ports.insert(port.port) {
                return broken(format!("ports[{index}].port"), "is listed twice");
            }
            if !(1..=256).contains(&port.queues) {
                let problem = format!("{} is outside 1 to 256", port.queues);
                return broken(format!("ports[{index}].queues"), problem);
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
