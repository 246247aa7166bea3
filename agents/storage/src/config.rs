//! The `[storage]` section of the settings.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use stackhand_runtime::config::{AgentSection, Problems};

use crate::plan::Limits;

/// Name of the backend that exists where none is configured.
pub const DEFAULT_BACKEND: &str = "default";

/// `[storage]`: where volumes are kept.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct StorageSection {
    /// Backend of volumes that name none. Default: `default`.
    pub default_backend: String,
    /// Most volumes copied at once in the background, 1 to 64. Default: 2.
    pub concurrent_copies: u32,
    /// Largest image and largest disk in an image, in GiB, 1 to 65536. Default: 1024.
    pub max_image_gib: u64,
    /// Minutes that the conversion of an image may take, of time and of a processor, 1 to 1440.
    /// Default: 60.
    pub convert_timeout_minutes: u32,
    /// QEMU's image tool. Default: `/usr/bin/qemu-img`.
    pub qemu_img: PathBuf,
    /// How volumes are given to other hosts.
    pub export: ExportSection,
    /// Backends by name. Where there is none called `default`, one of type `file` in the agent's
    /// state folder is added.
    pub backends: BTreeMap<String, BackendSection>,
}

/// `[storage.backends.<name>]`: one place that keeps volumes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct BackendSection {
    /// How volumes are kept. Default: `file`.
    #[serde(rename = "type")]
    pub kind: BackendKind,
    /// Folder of the files. It must exist; only the one of the backend `default` is made.
    /// Default: `volumes` in the state folder, for the backend `default` alone.
    pub path: Option<PathBuf>,
    /// How much may be promised, in percent of what is free, 100 to 10000. At 100 every byte of
    /// every volume has its place, even if all are written full; at 200 half of them have.
    /// Default: 100.
    pub overcommit_percent: u32,
    /// Part of the whole that is never promised, in percent, 0 to 90. Default: 5.
    pub reserved_percent: u32,
    /// Volume group of the logical volumes, for the types `lvm` and `lvm-thin`.
    pub volume_group: Option<String>,
    /// Thin pool in that group, for the type `lvm-thin`. Default: the group's name and `-pool`.
    pub pool: Option<String>,
    /// Disks of that group: LVM then looks at no others. Default: all but those of attached
    /// volumes.
    pub devices: Vec<PathBuf>,
    /// Whether the space of deleted volumes is overwritten before others get it, for the type
    /// `lvm`. Thin pools and file systems give out zeroes anyway. Default: true.
    pub wipe: bool,
    /// Most MiB that are overwritten in a second, 1 to 100000. Default: 200.
    pub wipe_mib_per_second: u32,
    /// From how full a thin pool on the agent is not well, in percent, 1 to 100. Default: 80.
    pub warn_percent: u32,
    /// From how full a thin pool on nothing new is promised, in percent, 1 to 100. Default: 90.
    pub stop_percent: u32,
}

/// `[storage.export]`: how volumes are given to other hosts.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ExportSection {
    /// By what. Default: `none`.
    #[serde(rename = "type")]
    pub kind: ExportKind,
    /// `address:port` under which other hosts reach the volumes. The kernel's target listens on
    /// these; tgtd is to be started so that it does. The first is told to clients.
    pub portals: Vec<SocketAddr>,
    /// tgtd's management socket. Default: `/var/run/tgtd/socket.0`.
    pub tgt_socket: PathBuf,
}

/// How volumes are given to other hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportKind {
    /// Not at all.
    #[default]
    None,
    /// iSCSI by the kernel.
    Lio,
    /// iSCSI by tgtd.
    Tgt,
}

/// How a backend keeps volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    /// A sparse file per volume.
    #[default]
    File,
    /// A logical volume per volume, allocated whole.
    Lvm,
    /// A thin logical volume per volume, from a pool.
    LvmThin,
}

impl Default for StorageSection {
    fn default() -> Self {
        Self {
            default_backend: DEFAULT_BACKEND.to_owned(),
            concurrent_copies: 2,
            max_image_gib: 1024,
            convert_timeout_minutes: 60,
            qemu_img: "/usr/bin/qemu-img".into(),
            export: ExportSection::default(),
            backends: BTreeMap::new(),
        }
    }
}

impl Default for BackendSection {
    fn default() -> Self {
        Self {
            kind: BackendKind::File,
            path: None,
            overcommit_percent: 100,
            reserved_percent: 5,
            volume_group: None,
            pool: None,
            devices: vec![],
            wipe: true,
            wipe_mib_per_second: 200,
            warn_percent: 80,
            stop_percent: 90,
        }
    }
}

impl Default for ExportSection {
    fn default() -> Self {
        Self {
            kind: ExportKind::None,
            portals: vec![],
            tgt_socket: "/var/run/tgtd/socket.0".into(),
        }
    }
}

impl BackendSection {
    /// How much may be promised.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            overcommit_percent: self.overcommit_percent,
            reserved_percent: self.reserved_percent,
            warn_percent: self.warn_percent,
            stop_percent: self.stop_percent,
        }
    }

    /// The thin pool's name.
    #[must_use]
    pub fn pool(&self) -> String {
        let group = self.volume_group.as_deref().unwrap_or_default();
        self.pool.clone().unwrap_or_else(|| format!("{group}-pool"))
    }

    fn check_place(&self, name: &str, problems: &mut Problems) {
        let key = |field: &str| format!("storage.backends.{name}.{field}");
        let is_file = self.kind == BackendKind::File;
        match &self.path {
            Some(path) if is_file && !path.is_absolute() => {
                problems.add(&key("path"), format!("{} is not an absolute path", path.display()));
            }
            Some(_) if !is_file => {
                problems.add(&key("path"), "belongs to the type file".to_owned());
            }
            None if is_file && name != DEFAULT_BACKEND => {
                problems.add(&key("path"), "is missing: name the folder of the volumes".to_owned());
            }
            _ => {}
        }
        let names = [("volume_group", &self.volume_group), ("pool", &self.pool)];
        for (field, value) in names {
            if let Some(value) = value
                && !is_lvm_name(value)
            {
                problems.add(&key(field), format!("{value:?} is not a name that LVM takes"));
            }
        }
        match &self.volume_group {
            None if !is_file => {
                problems.add(&key("volume_group"), "is missing: name the volume group".to_owned());
            }
            Some(_) if is_file => {
                problems.add(&key("volume_group"), "belongs to the types of LVM".to_owned());
            }
            _ => {}
        }
        for device in self.devices.iter().filter(|device| !device.starts_with("/dev")) {
            problems.add(&key("devices"), format!("{} is not under /dev", device.display()));
        }
    }
}

/// Whether LVM takes the text as a name; above all it is no option and no path.
fn is_lvm_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"+_.-".contains(&byte);
    (1..=100).contains(&text.len()) && !text.starts_with(['-', '.']) && text.bytes().all(plain)
}

impl StorageSection {
    /// The backends with the one that always exists.
    #[must_use]
    pub fn all_backends(&self) -> BTreeMap<String, BackendSection> {
        let mut backends = self.backends.clone();
        backends.entry(DEFAULT_BACKEND.to_owned()).or_default();
        backends
    }
}

impl AgentSection for StorageSection {
    const AGENT: &'static str = "storage";

    fn check(&self, problems: &mut Problems) {
        if !(1..=64).contains(&self.concurrent_copies) {
            problems.add(
                "storage.concurrent_copies",
                format!("{} is outside 1 to 64", self.concurrent_copies),
            );
        }
        problems.range("storage.max_image_gib", self.max_image_gib, 1..=65_536);
        let minutes = self.convert_timeout_minutes;
        problems.range("storage.convert_timeout_minutes", minutes, 1..=1440);
        if self.export.kind != ExportKind::None && self.export.portals.is_empty() {
            problems.add(
                "storage.export.portals",
                "is missing: name the address and port under which other hosts reach this one"
                    .to_owned(),
            );
        }
        if let Some(portal) = self.export.portals.iter().find(|it| it.ip().is_unspecified()) {
            problems.add(
                "storage.export.portals",
                format!("{portal} is no address that another host could connect to"),
            );
        }
        let backends = self.all_backends();
        if !backends.contains_key(&self.default_backend) {
            let known: Vec<&str> = backends.keys().map(String::as_str).collect();
            problems.add(
                "storage.default_backend",
                format!(
                    "there is no backend {:?}; there are: {}",
                    self.default_backend,
                    known.join(", ")
                ),
            );
        }
        for (name, backend) in &self.backends {
            let key = |field: &str| format!("storage.backends.{name}.{field}");
            if !(100..=10_000).contains(&backend.overcommit_percent) {
                problems.add(
                    &key("overcommit_percent"),
                    format!("{} is outside 100 to 10000", backend.overcommit_percent),
                );
            }
            if backend.reserved_percent > 90 {
                problems.add(
                    &key("reserved_percent"),
                    format!("{} is outside 0 to 90", backend.reserved_percent),
                );
            }
            for (field, value, range) in [
                ("wipe_mib_per_second", backend.wipe_mib_per_second, 1..=100_000),
                ("warn_percent", backend.warn_percent, 1..=100),
                ("stop_percent", backend.stop_percent, 1..=100),
            ] {
                problems.range(&key(field), value, range);
            }
            backend.check_place(name, problems);
        }
    }
}
