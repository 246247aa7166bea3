//! An exporter in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use stackhand_model::VolumeId;

use super::{ExportError, Exporter, SeenAdmission, SeenTarget, Target, target_name};

/// Exports that exist only in memory.
#[derive(Debug, Default)]
pub struct FakeExporter {
    state: Mutex<State>,
    portals: Vec<SocketAddr>,
}

/// What it exports and how it behaves.
#[derive(Debug, Default)]
pub struct State {
    /// What [`Exporter::observe`] answers.
    pub targets: BTreeMap<VolumeId, SeenTarget>,
    /// The exporter as a whole is away.
    pub away: bool,
    /// Volumes for which every change fails.
    pub broken: BTreeSet<VolumeId>,
}

impl FakeExporter {
    /// An exporter without targets.
    #[must_use]
    pub fn new() -> Self {
        Self { state: Mutex::default(), portals: vec![SocketAddr::from(([192, 0, 2, 1], 3260))] }
    }

    /// Looks into the exporter, or changes it behind the agent's back.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allow(&self, volume: VolumeId) -> Result<MutexGuard<'_, State>, ExportError> {
        let state = self.state();
        if state.broken.contains(&volume) {
            let (target, reason) = (target_name(volume), "the fake was told so".into());
            return Err(ExportError::Unable { target, reason });
        }
        Ok(state)
    }
}

impl Exporter for FakeExporter {
    fn observe(&self) -> Result<BTreeMap<VolumeId, SeenTarget>, ExportError> {
        let state = self.state();
        if state.away {
            return Err(ExportError::Away { reason: "told so".into() });
        }
        Ok(state.targets.clone())
    }

    fn publish(&self, target: &Target) -> Result<(), ExportError> {
        let mut state = self.allow(target.volume)?;
        let seen = state.targets.entry(target.volume).or_default();
        seen.path = Some(target.path.clone());
        seen.complete = true;
        seen.admitted = target
            .admitted
            .iter()
            .map(|(name, admission)| {
                let seen = SeenAdmission {
                    user: Some(admission.user.clone()),
                    password: Some(admission.password.clone()),
                    read_only: admission.read_only,
                };
                (name.clone(), seen)
            })
            .collect();
        let admitted = &target.admitted;
        seen.sessions.retain(|name| admitted.contains_key(name));
        Ok(())
    }

    fn withdraw(&self, volume: VolumeId) -> Result<(), ExportError> {
        self.allow(volume)?.targets.remove(&volume);
        Ok(())
    }

    fn lun(&self) -> u32 {
        0
    }

    fn portals(&self) -> &[SocketAddr] {
        &self.portals
    }
}
