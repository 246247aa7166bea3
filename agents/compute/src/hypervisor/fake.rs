//! A hypervisor in memory: behaves like the real one, and can be told to fail.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use stackhand_model::InstanceId;
use uuid::Uuid;

use super::{DomainChange, DomainSeen, HostFacts, Hypervisor, HypervisorError, OffReason, Power};
use crate::domain::{domain_name, read};

/// Domains that exist only in memory.
#[derive(Debug, Default)]
pub struct FakeHypervisor {
    host: Mutex<Host>,
}

/// What the hypervisor holds and how it behaves.
#[derive(Debug, Default)]
pub struct Host {
    /// Its domains.
    pub domains: BTreeMap<Uuid, DomainSeen>,
    /// It cannot be reached.
    pub away: bool,
    /// Instances for which every change is refused.
    pub broken: BTreeSet<Uuid>,
    /// Guests that pass over a request to shut down.
    pub deaf: BTreeSet<Uuid>,
    /// KVM runs guests.
    pub kvm: bool,
}

impl FakeHypervisor {
    /// Looks into the hypervisor, or changes it behind the agent's back.
    pub fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Host {
    fn reach(&self) -> Result<(), HypervisorError> {
        let away = || HypervisorError::Away { uri: "fake".into(), reason: "told so".into() };
        if self.away { Err(away()) } else { Ok(()) }
    }

    /// Performs a change exactly as the real one would.
    ///
    /// # Errors
    ///
    /// Refuses what libvirt refuses.
    pub fn change(&mut self, id: InstanceId, change: &DomainChange) -> Result<(), String> {
        if self.broken.contains(&id.0) {
            return Err("the fake was told so".into());
        }
        if let DomainChange::Define { xml } = change {
            let mark = read(xml).map_err(|error| error.to_string())?.mark;
            let name = domain_name(id);
            if self.domains.values().any(|other| other.name == name && other.uuid != id.0) {
                return Err(format!("domain '{name}' already exists"));
            }
            let domain = self.domains.entry(id.0).or_insert(DomainSeen {
                uuid: id.0,
                name,
                power: Power::Off(OffReason::Unknown),
                mark: None,
                running_mark: None,
                vnc_port: None,
            });
            domain.mark = mark;
            return Ok(());
        }
        let deaf = self.deaf.contains(&id.0);
        let Some(domain) = self.domains.get_mut(&id.0) else {
            return match change {
                DomainChange::Undefine | DomainChange::Destroy => Ok(()),
                _ => Err("domain not found".into()),
            };
        };
        let off = |domain: &mut DomainSeen, reason| {
            domain.power = Power::Off(reason);
            domain.running_mark = None;
        };
        match (change, domain.power) {
            (DomainChange::Start { paused }, Power::Off(_)) => {
                domain.power = if *paused { Power::Paused } else { Power::Running };
                domain.running_mark = domain.mark.clone();
            }
            (DomainChange::Pause, Power::Running) => domain.power = Power::Paused,
            (DomainChange::Resume, Power::Paused) => domain.power = Power::Running,
            (DomainChange::Shutdown, Power::Running) if !deaf => off(domain, OffReason::Shutdown),
            (DomainChange::Destroy, Power::Running | Power::Paused) => {
                off(domain, OffReason::Destroyed);
            }
            (DomainChange::Undefine, Power::Off(_)) => drop(self.domains.remove(&id.0)),
            // A running domain becomes one without a definition.
            (DomainChange::Undefine, _) => domain.mark = None,
            _ => {}
        }
        Ok(())
    }
}

impl Hypervisor for FakeHypervisor {
    async fn domains(&self) -> Result<Vec<DomainSeen>, HypervisorError> {
        let host = self.host();
        host.reach()?;
        Ok(host.domains.values().cloned().collect())
    }

    async fn perform(&self, id: InstanceId, change: DomainChange) -> Result<(), HypervisorError> {
        let mut host = self.host();
        host.reach()?;
        host.change(id, &change)
            .map_err(|reason| HypervisorError::Refused { action: format!("{change:?}"), reason })
    }

    async fn host(&self) -> Result<HostFacts, HypervisorError> {
        FakeHypervisor::host(self).reach()?;
        Ok(HostFacts {
            hypervisor_version: "1.2.3".into(),
            libvirt_version: "1.2.3".into(),
            cpus: 2,
            memory_mib: 4096,
        })
    }

    async fn probe_kvm(&self, _folder: &Path) -> Result<(), HypervisorError> {
        let host = FakeHypervisor::host(self);
        host.reach()?;
        let refused = || HypervisorError::Refused {
            action: "run a guest on KVM".into(),
            reason: "the fake has none".into(),
        };
        if host.kvm { Ok(()) } else { Err(refused()) }
    }
}
