//! The agent as the settings describe it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use stackhand_image::{ImageCache, ImageTool};
use stackhand_runtime::run::AgentContext;

use super::{Configured, Exporting, StorageAgent};
use crate::backend::Backend;
use crate::backend::file::FileBackend;
use crate::backend::lvm::{Allocation, LvmBackend, Options};
use crate::config::{BackendKind, BackendSection, DEFAULT_BACKEND, ExportKind, StorageSection};
use crate::export::Exporter;
use crate::export::chap::{Key, KeyError};
use crate::export::lio::{self, Lio};
use crate::export::tgt::Tgt;
use crate::works::{Images, Works};

/// Why the agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Without the key no attachment has its password.
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl StorageAgent {
    /// The agent that the settings describe. Must be called inside the runtime.
    ///
    /// # Errors
    ///
    /// Fails if volumes are to be exported and the host's key can be neither read nor made.
    pub fn new(context: AgentContext<StorageSection>) -> Result<Self, StartError> {
        let (section, state_dir) = (&context.settings.agent, &context.state_dir);
        let seconds = u64::from(section.convert_timeout_minutes) * 60;
        let tool = ImageTool::new(&section.qemu_img, seconds);
        let folder = state_dir.join("images");
        let cache = ImageCache::new(&folder, section.max_image_gib << 30, tool.clone());
        let images = Images { cache, tool };
        let works =
            Works::new(section.concurrent_copies, images, context.journal.clone(), context.wake);
        let exporting = exporting(section, state_dir)?;
        let backends = backends(section, state_dir);
        let default = &section.default_backend;
        Ok(Self::with_parts(&context.host, default, backends, exporting, works, context.journal))
    }
}

fn exporting(section: &StorageSection, state_dir: &Path) -> Result<Option<Exporting>, KeyError> {
    let export = &section.export;
    let portals = export.portals.clone();
    let exporter: Arc<dyn Exporter> = match export.kind {
        ExportKind::None => return Ok(None),
        ExportKind::Lio => Arc::new(Lio::new(Path::new(lio::ROOT), portals)),
        ExportKind::Tgt => Arc::new(Tgt::new(&export.tgt_socket, portals)),
    };
    Ok(Some(Exporting { exporter, key: Arc::new(Key::open(state_dir)?) }))
}

fn backends(section: &StorageSection, state_dir: &Path) -> BTreeMap<String, Configured> {
    // Backends of one volume group change it one after another.
    let mut turns: BTreeMap<String, Arc<Mutex<()>>> = BTreeMap::new();
    let mut lvm = |name: &str, settings: &BackendSection, allocation| {
        let group = settings.volume_group.clone().unwrap_or_default();
        let turn = Arc::clone(turns.entry(group.clone()).or_default());
        let options = Options {
            group,
            allocation,
            devices: settings.devices.clone(),
            wipe_rate: u64::from(settings.wipe_mib_per_second) << 20,
            wipe: settings.wipe,
            turn,
        };
        LvmBackend::new(name, state_dir, options)
    };
    let mut backends = BTreeMap::new();
    for (name, settings) in section.all_backends() {
        let backend: Arc<dyn Backend> = match settings.kind {
            BackendKind::File => {
                let default = || -> PathBuf { state_dir.join("volumes") };
                let folder = settings.path.clone().unwrap_or_else(default);
                let may_make = name == DEFAULT_BACKEND;
                Arc::new(FileBackend::new(&name, &folder, state_dir, may_make))
            }
            BackendKind::Lvm => Arc::new(lvm(&name, &settings, Allocation::Thick)),
            BackendKind::LvmThin => {
                let pool = settings.pool();
                Arc::new(lvm(&name, &settings, Allocation::Thin { pool }))
            }
        };
        let limits = settings.limits();
        backends.insert(name, Configured { backend, kind: settings.kind, limits });
    }
    backends
}
