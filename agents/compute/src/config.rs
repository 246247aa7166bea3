//! The `[compute]` section of the settings.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use stackhand_model::IscsiClient;
use stackhand_runtime::config::{AgentSection, Problems};

/// `[compute]`: how instances run.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ComputeSection {
    /// Where libvirt is. Default: `qemu:///system`.
    pub libvirt_uri: String,
    /// Who executes guests' instructions. Default: `auto`.
    pub virt_type: VirtType,
    /// QEMU's machine type for new definitions. Default: `q35`.
    pub machine: String,
    /// How the host caches disks: `none`, `writeback`, `writethrough`, `directsync` or `unsafe`.
    /// `none` needs a file system with direct I/O. Default: `none`.
    pub disk_cache: String,
    /// Largest image and largest disk in an image, in GiB, 1 to 65536. Default: 1024.
    pub max_image_gib: u64,
    /// Most images fetched at once, 1 to 64. Default: 2.
    pub concurrent_fetches: u32,
    /// Hours that images are kept which nobody uses, 0 to 8760. Default: 24.
    pub image_cache_hours: u32,
    /// Disk in GiB that images may take which nobody uses, 0 to 65536. Default: 50.
    pub image_cache_gib: u64,
    /// Minutes that the conversion of an image may take, of time and of a processor, 1 to 1440.
    /// Default: 60.
    pub convert_timeout_minutes: u32,
    /// Seconds that a guest gets to shut itself down before the plug is pulled, 1 to 3600.
    /// Default: 60.
    pub shutdown_timeout_seconds: u32,
    /// Devices that can be plugged into an instance while it runs, 0 to 24. Default: 8.
    pub hotplug_slots: u32,
    /// Virtual processors that may be given out, in percent of the host's, 1 to 6400.
    /// Default: 400.
    pub cpu_overcommit_percent: u32,
    /// Memory that may be given out, in percent of the host's, 1 to 1000. Default: 100.
    pub memory_overcommit_percent: u32,
    /// Disk that may be given out, in percent of the file system's, 1 to 10000. Default: 200.
    pub disk_overcommit_percent: u32,
    /// Processors that are kept for the host. Default: 0.
    pub reserved_cpus: u32,
    /// Memory in MiB that is kept for the host. Default: 512.
    pub reserved_memory_mib: u64,
    /// Disk in GiB that is kept for the host. Default: 0.
    pub reserved_disk_gib: u64,
    /// Seconds within which every QEMU is asked once what its instance used, 5 to 3600. What needs
    /// no QEMU is counted as often or more. Default: 30.
    pub usage_interval_seconds: u32,
    /// Minutes between two events that tell what instances use, for those who bill, 0 to 1440;
    /// 0: none. Default: 60.
    pub usage_event_minutes: u32,
    /// Who takes volumes in that come by iSCSI: QEMU itself (`qemu`), or this host's kernel
    /// (`host`), which needs open-iscsi and `compute-initiator.socket`. Default: `qemu`.
    pub iscsi_client: IscsiClient,
    /// QEMU's image tool. Default: `/usr/bin/qemu-img`.
    pub qemu_img: PathBuf,
}

/// Who executes guests' instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VirtType {
    /// KVM if a probe shows that it runs guests, else QEMU's translator.
    #[default]
    Auto,
    /// KVM.
    Kvm,
    /// QEMU's translator, which needs nothing of the processor and is slow.
    Qemu,
}

impl Default for ComputeSection {
    fn default() -> Self {
        Self {
            libvirt_uri: "qemu:///system".into(),
            virt_type: VirtType::Auto,
            machine: "q35".into(),
            disk_cache: "none".into(),
            max_image_gib: 1024,
            concurrent_fetches: 2,
            image_cache_hours: 24,
            image_cache_gib: 50,
            convert_timeout_minutes: 60,
            shutdown_timeout_seconds: 60,
            hotplug_slots: 8,
            cpu_overcommit_percent: 400,
            memory_overcommit_percent: 100,
            disk_overcommit_percent: 200,
            reserved_cpus: 0,
            reserved_memory_mib: 512,
            reserved_disk_gib: 0,
            usage_interval_seconds: 30,
            usage_event_minutes: 60,
            iscsi_client: IscsiClient::Qemu,
            qemu_img: "/usr/bin/qemu-img".into(),
        }
    }
}

impl AgentSection for ComputeSection {
    const AGENT: &'static str = "compute";

    fn check(&self, problems: &mut Problems) {
        problems.range("compute.max_image_gib", self.max_image_gib, 1..=65_536);
        problems.range("compute.concurrent_fetches", self.concurrent_fetches, 1..=64);
        problems.range("compute.image_cache_hours", self.image_cache_hours, 0..=8760);
        problems.range("compute.image_cache_gib", self.image_cache_gib, 0..=65_536);
        problems.range("compute.convert_timeout_minutes", self.convert_timeout_minutes, 1..=1440);
        problems.range("compute.shutdown_timeout_seconds", self.shutdown_timeout_seconds, 1..=3600);
        problems.range("compute.hotplug_slots", self.hotplug_slots, 0..=24);
        problems.range("compute.cpu_overcommit_percent", self.cpu_overcommit_percent, 1..=6400);
        problems.range(
            "compute.memory_overcommit_percent",
            self.memory_overcommit_percent,
            1..=1000,
        );
        problems.range("compute.disk_overcommit_percent", self.disk_overcommit_percent, 1..=10_000);
        problems.range("compute.usage_interval_seconds", self.usage_interval_seconds, 5..=3600);
        problems.range("compute.usage_event_minutes", self.usage_event_minutes, 0..=1440);
        problems.absolute("compute.qemu_img", &self.qemu_img);
        let caches = ["none", "writeback", "writethrough", "directsync", "unsafe"];
        if !caches.contains(&self.disk_cache.as_str()) {
            problems.add("compute.disk_cache", format!("must be one of {}", caches.join(", ")));
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        if self.machine.is_empty() || !self.machine.bytes().all(plain) {
            problems.add("compute.machine", "must be a machine type such as q35 or pc");
        }
        if self.libvirt_uri.is_empty() {
            problems.add("compute.libvirt_uri", "must be set");
        }
    }
}
