//! The `[storage]` section of the settings.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use stackhand_runtime::config::{AgentSection, Problems};

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
    /// Part of the file system that is never promised, in percent, 0 to 90. Default: 5.
    pub reserved_percent: u32,
}

/// How a backend keeps volumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    /// A sparse file per volume.
    #[default]
    File,
}

impl Default for StorageSection {
    fn default() -> Self {
        Self {
            default_backend: DEFAULT_BACKEND.to_owned(),
            concurrent_copies: 2,
            backends: BTreeMap::new(),
        }
    }
}

impl Default for BackendSection {
    fn default() -> Self {
        Self { kind: BackendKind::File, path: None, overcommit_percent: 100, reserved_percent: 5 }
    }
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
            match &backend.path {
                Some(path) if !path.is_absolute() => {
                    problems
                        .add(&key("path"), format!("{} is not an absolute path", path.display()));
                }
                None if name != DEFAULT_BACKEND => {
                    problems
                        .add(&key("path"), "is missing: name the folder of the volumes".to_owned());
                }
                _ => {}
            }
        }
    }
}
