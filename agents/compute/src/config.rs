//! The `[compute]` section of the settings.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
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
    /// Minutes that the conversion of an image may take, of time and of a processor, 1 to 1440.
    /// Default: 60.
    pub convert_timeout_minutes: u32,
    /// Seconds that a guest gets to shut itself down before the plug is pulled, 1 to 3600.
    /// Default: 60.
    pub shutdown_timeout_seconds: u32,
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
            convert_timeout_minutes: 60,
            shutdown_timeout_seconds: 60,
            qemu_img: "/usr/bin/qemu-img".into(),
        }
    }
}

impl AgentSection for ComputeSection {
    const AGENT: &'static str = "compute";

    fn check(&self, problems: &mut Problems) {
        problems.range("compute.max_image_gib", self.max_image_gib, 1..=65_536);
        problems.range("compute.concurrent_fetches", self.concurrent_fetches, 1..=64);
        problems.range("compute.convert_timeout_minutes", self.convert_timeout_minutes, 1..=1440);
        problems.range("compute.shutdown_timeout_seconds", self.shutdown_timeout_seconds, 1..=3600);
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
