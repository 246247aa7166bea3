//! What we need from a hypervisor: a narrow seam, so that everything else runs without one.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::path::Path;

use serde::Serialize;
use stackhand_model::{InstanceId, Secret, VolumeId};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::domain::{Devices, Mark};

pub mod fake;

/// A domain as it is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainSeen {
    /// Its UUID.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Whether it runs.
    pub power: Power,
    /// Our mark on what it will be at its next start. Without one it is foreign.
    pub mark: Option<Mark>,
    /// Our mark on what runs.
    pub running_mark: Option<Mark>,
    /// Port of its VNC console on the loopback, while it runs.
    pub vnc_port: Option<u16>,
    /// What is plugged in, while it runs.
    pub devices: Devices,
    /// Its memory is on disk: it goes on where it was when it is started.
    pub saved: bool,
}

/// Whether a domain runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Power {
    /// It runs.
    Running,
    /// It is in memory and does not run.
    Paused,
    /// The same, and nobody asked for it.
    Stalled(Stall),
    /// It is off.
    Off(OffReason),
}

impl Power {
    /// Whether it is off.
    #[must_use]
    pub fn is_off(self) -> bool {
        matches!(self, Self::Off(_))
    }

    /// Whether it came to grief in a way that is told once and then tried again.
    #[must_use]
    pub fn came_to_grief(self) -> bool {
        matches!(self, Self::Off(OffReason::Crashed) | Self::Stalled(Stall::Disk))
    }
}

/// Why a domain stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stall {
    /// A disk could not take what the guest wrote.
    Disk,
    /// Its guest did not feed the watchdog.
    Watchdog,
}

/// Why a domain is off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OffReason {
    /// Nobody knows: it was never started, could not be started, or the host was down.
    Unknown,
    /// The guest shut itself down, asked to or by its own will.
    Shutdown,
    /// Somebody pulled the plug.
    Destroyed,
    /// It crashed.
    Crashed,
}

/// One change to a domain. Each is harmless if its effect is in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainChange {
    /// Defines it, or defines it anew for its next start.
    Define {
        /// Its XML.
        xml: String,
    },
    /// Starts it.
    Start {
        /// Its processors stand still.
        paused: bool,
    },
    /// Stops its processors.
    Pause,
    /// Lets its processors go on.
    Resume,
    /// Asks the guest to shut itself down.
    Shutdown,
    /// Pulls the plug.
    Destroy,
    /// Puts its memory on disk and ends it; the next start goes on from there.
    Save,
    /// Forgets the memory that was put on disk.
    Discard,
    /// Plugs a device into the running domain.
    Attach {
        /// What it is, for people.
        what: String,
        /// Its XML.
        xml: String,
    },
    /// Asks the running guest to let go of a device. It may take its time, or not do it.
    Detach {
        /// What it is, for people.
        what: String,
        /// libvirt's name for it.
        alias: String,
    },
    /// Tells the running guest that a disk has grown.
    Resize {
        /// The disk's target.
        target: String,
        /// Its size.
        bytes: u64,
    },
    /// Gives libvirt the password of a volume, to be kept in memory.
    Keep {
        /// The volume.
        volume: VolumeId,
        /// The password.
        password: Secret,
    },
    /// Has libvirt forget the password of a volume.
    Release {
        /// The volume.
        volume: VolumeId,
    },
    /// Forgets its definition.
    Undefine,
}

impl fmt::Display for DomainChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Define { .. } => write!(f, "define the domain"),
            Self::Start { paused: false } => write!(f, "start the domain"),
            Self::Start { paused: true } => write!(f, "start the domain, paused"),
            Self::Pause => write!(f, "pause the domain"),
            Self::Resume => write!(f, "resume the domain"),
            Self::Shutdown => write!(f, "ask the guest to shut down"),
            Self::Destroy => write!(f, "power the domain off"),
            Self::Save => write!(f, "save the domain's memory and end it"),
            Self::Discard => write!(f, "discard the domain's saved memory"),
            Self::Attach { what, .. } => write!(f, "plug in {what}"),
            Self::Detach { what, .. } => write!(f, "ask the guest to let go of {what}"),
            Self::Resize { target, bytes } => {
                write!(f, "tell the guest that {target} has {bytes} bytes")
            }
            Self::Keep { volume, .. } => write!(f, "give libvirt the password of volume {volume}"),
            Self::Release { volume } => {
                write!(f, "have libvirt forget the password of volume {volume}")
            }
            Self::Undefine => write!(f, "undefine the domain"),
        }
    }
}

/// Facts about the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostFacts {
    /// Version of the hypervisor, such as `7.2.22`.
    pub hypervisor_version: String,
    /// Version of libvirt.
    pub libvirt_version: String,
    /// Processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Model of the processors, in libvirt's words.
    pub cpu_model: Option<String>,
    /// Architecture.
    pub architecture: String,
    /// Its NUMA cells.
    pub numa_cells: Vec<NumaCell>,
}

/// Memory and processors that are near to one another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NumaCell {
    /// Its number.
    pub id: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Its processors.
    pub cpus: Vec<u32>,
}

/// What an instance has used since it was started, as far as that is known without its QEMU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KernelUsage {
    /// Processor time of its QEMU, in nanoseconds.
    pub cpu_nanoseconds: u64,
    /// Memory that the guest has, in KiB.
    pub memory_kib: u64,
    /// Bytes received.
    pub network_receive_bytes: u64,
    /// Bytes sent.
    pub network_transmit_bytes: u64,
    /// Packets dropped on the way in or out.
    pub network_drops: u64,
}

/// What the disks of an instance did since it was started, all together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DiskUsage {
    /// Bytes read from disks.
    pub disk_read_bytes: u64,
    /// Bytes written to disks.
    pub disk_write_bytes: u64,
    /// Requests to disks.
    pub disk_requests: u64,
}

/// How the memory of an instance is used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryUsage {
    /// Memory that the host spends on it, in KiB.
    pub memory_resident_kib: u64,
    /// Memory that the guest does not use, in KiB, if its balloon tells.
    pub memory_unused_kib: Option<u64>,
}

/// What only a QEMU knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Question {
    /// What its disks did.
    Disks,
    /// How its memory is used.
    Memory,
}

/// What a QEMU told, as it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QemuUsage {
    /// What its disks did.
    Disks(DiskUsage),
    /// How its memory is used.
    Memory(MemoryUsage),
}

/// What helps where a QEMU does not answer.
pub const SILENT_QEMU_REMEDY: &str = "look whether its storage is there, or reboot it with --hard";

/// What came of asking a QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QemuAnswer {
    /// It told.
    Told(QemuUsage),
    /// Something else is being done with it: another time.
    Busy,
    /// It does not answer. A storage that is away can stop a QEMU like that.
    Silent,
}

/// A picture of an instance's screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Screenshot {
    /// MIME type, as the hypervisor gave it.
    pub mime: String,
    /// The picture.
    pub bytes: Vec<u8>,
}

/// Why the hypervisor did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HypervisorError {
    /// It cannot be reached now.
    #[error("libvirt at {uri} is away: {reason}")]
    Away {
        /// Where it should be.
        uri: String,
        /// Why it cannot be reached.
        reason: String,
    },
    /// It refused.
    #[error("cannot {action}: {reason}")]
    Refused {
        /// What was tried, on which domain.
        action: String,
        /// What it said.
        reason: String,
    },
}

/// Runs domains.
pub trait Hypervisor: Send + Sync + 'static {
    /// Every domain there is, foreign ones included.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away; nothing may be concluded about domains then.
    fn domains(&self) -> impl Future<Output = Result<Vec<DomainSeen>, HypervisorError>> + Send;

    /// Makes one change.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away or refuses.
    fn perform(
        &self,
        id: InstanceId,
        change: DomainChange,
    ) -> impl Future<Output = Result<(), HypervisorError>> + Send;

    /// Facts about the host.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away.
    fn host(&self) -> impl Future<Output = Result<HostFacts, HypervisorError>> + Send;

    /// Whether KVM really runs a guest here, by running one for some seconds. `folder` takes its
    /// files.
    ///
    /// # Errors
    ///
    /// Tells why KVM is of no use; [`HypervisorError::Away`] if that cannot be known now.
    fn probe_kvm(&self, folder: &Path) -> impl Future<Output = Result<(), HypervisorError>> + Send;

    /// What domains of ours that are on have used, all in one question. No QEMU is asked, so that
    /// none can hold this up.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away.
    fn kernel_usage(
        &self,
    ) -> impl Future<Output = Result<BTreeMap<Uuid, KernelUsage>, HypervisorError>> + Send;

    /// Asks a domain's QEMU one question. Never waits for longer than a few seconds.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away, has no such domain, or too many QEMUs owe an answer.
    fn qemu_usage(
        &self,
        id: InstanceId,
        question: Question,
    ) -> impl Future<Output = Result<QemuAnswer, HypervisorError>> + Send;

    /// The XML of a domain as it runs, or as it will.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away or has no such domain.
    fn xml(&self, id: InstanceId) -> impl Future<Output = Result<String, HypervisorError>> + Send;

    /// Reads a log that only the hypervisor may read: at most `most` bytes from `start` on, or the
    /// end of it. Gives where they start, too.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away or has no such file.
    fn read_log(
        &self,
        path: &Path,
        start: Option<u64>,
        most: u64,
    ) -> impl Future<Output = Result<(u64, Vec<u8>), HypervisorError>> + Send;

    /// A picture of the instance's screen.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away or the domain has no screen.
    fn screenshot(
        &self,
        id: InstanceId,
    ) -> impl Future<Output = Result<Screenshot, HypervisorError>> + Send;

    /// Opens the serial console. What comes from the guest goes to `output`; what is sent to the
    /// returned sender goes to the guest. Dropping either end closes it.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away or the domain is off.
    fn open_console(
        &self,
        id: InstanceId,
        output: mpsc::Sender<Vec<u8>>,
    ) -> impl Future<Output = Result<mpsc::Sender<Vec<u8>>, HypervisorError>> + Send;

    /// Copies a running domain's root disk, as it is at this moment, into an empty qcow2 image
    /// that is there already.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away, the domain is off, or the copy breaks off.
    fn copy_disk(
        &self,
        id: InstanceId,
        disk: &str,
        target: &Path,
    ) -> impl Future<Output = Result<(), HypervisorError>> + Send;

    /// Ends a copy that is under way, if one is.
    ///
    /// # Errors
    ///
    /// Fails if the hypervisor is away.
    fn abort_copy(
        &self,
        id: InstanceId,
    ) -> impl Future<Output = Result<(), HypervisorError>> + Send;

    /// Whether it can be reached, as far as is known without asking.
    fn trouble(&self) -> Option<String> {
        None
    }
}
