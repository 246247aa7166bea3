//! Whether KVM is used where the settings leave it open: asked once per boot of the host.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::domain::Engine;
use crate::files::{read_json, write_json};
use crate::hypervisor::{Hypervisor, HypervisorError};

/// What a probe found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Probed {
    /// The boot of the host in which it was made.
    boot_id: String,
    /// Who executes guests' instructions.
    pub(super) engine: Engine,
    /// Why.
    pub(super) why: String,
}

/// A probe to be made.
#[derive(Debug)]
pub(super) struct Probe<H> {
    pub(super) hypervisor: Arc<H>,
    /// Takes the probe guest's files.
    pub(super) folder: PathBuf,
    /// Keeps the answer.
    pub(super) note: PathBuf,
}

impl<H: Hypervisor> Probe<H> {
    /// What was found in this boot, or is found now; `None` if the hypervisor went away.
    pub(super) async fn run(self) -> Option<Probed> {
        let boot_id = tokio::fs::read_to_string("/proc/sys/kernel/random/boot_id").await;
        let boot_id = boot_id.map(|id| id.trim().to_owned()).unwrap_or_default();
        let note = self.note.clone();
        match crate::blocking(move || read_json::<Probed>(&note)).await {
            Ok(Some(probed)) if probed.boot_id == boot_id && !boot_id.is_empty() => {
                return Some(probed);
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(error = crate::chain(&error), "probing KVM anew"),
        }
        let (engine, why) = match self.hypervisor.probe_kvm(&self.folder).await {
            Ok(()) => (Engine::Kvm, "a probe guest ran on KVM".to_owned()),
            Err(HypervisorError::Away { .. }) => return None,
            Err(error) => {
                let again = self.note.display();
                (Engine::Qemu, format!("{error} (remove {again} to try again)"))
            }
        };
        tracing::info!(engine = engine.as_str(), why, "guests' instructions are executed");
        let probed = Probed { boot_id, engine, why };
        let (kept, note) = (probed.clone(), self.note);
        if let Err(error) = crate::blocking(move || write_json(&note, &kept)).await {
            tracing::warn!(error = crate::chain(&error), "KVM will be probed at the next start");
        }
        Some(probed)
    }
}
