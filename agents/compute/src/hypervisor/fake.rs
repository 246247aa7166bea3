//! A hypervisor in memory: behaves like the real one, and can be told to fail.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stackhand_model::{InstanceId, VolumeId};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    DiskUsage, DomainChange, DomainSeen, HostFacts, Hypervisor, HypervisorError, KernelUsage,
    MemoryUsage, OffReason, Power, QemuAnswer, QemuUsage, Question, Screenshot,
};
use crate::domain::{Devices, domain_name, read, read_device};

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
    /// Guests that do not let go of devices.
    pub clinging: BTreeSet<Uuid>,
    /// KVM runs guests.
    pub kvm: bool,
    /// What was used, of each domain that is on; nothing if it is not here.
    pub used: BTreeMap<Uuid, (KernelUsage, DiskUsage, MemoryUsage)>,
    /// Domains whose QEMU does not answer.
    pub silent: BTreeSet<Uuid>,
    /// Domains with which something else is being done.
    pub busy: BTreeSet<Uuid>,
    /// How long QEMUs think about an answer.
    pub thinking: Duration,
    /// What QEMUs were asked, one after the other.
    pub asked: Vec<(Question, Uuid)>,
    /// Most QEMUs that were asked at once.
    pub asked_at_once: usize,
    /// Those that think about an answer.
    thinkers: usize,
    /// What each domain will have plugged in when it is started.
    defined: BTreeMap<Uuid, Devices>,
    /// Volumes whose password is known.
    passwords: BTreeSet<VolumeId>,
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
            let described = read(xml).map_err(|error| error.to_string())?;
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
                devices: Devices::default(),
                saved: false,
            });
            domain.mark = described.mark;
            self.defined.insert(id.0, with_aliases(described.devices));
            return Ok(());
        }
        match change {
            DomainChange::Keep { volume, .. } => {
                self.passwords.insert(*volume);
                return Ok(());
            }
            DomainChange::Release { volume } => {
                self.passwords.remove(volume);
                return Ok(());
            }
            _ => {}
        }
        let deaf = self.deaf.contains(&id.0);
        let clinging = self.clinging.contains(&id.0);
        let Some(domain) = self.domains.get_mut(&id.0) else {
            return match change {
                DomainChange::Undefine | DomainChange::Destroy => Ok(()),
                _ => Err("domain not found".into()),
            };
        };
        let off = |domain: &mut DomainSeen, reason| {
            domain.power = Power::Off(reason);
            domain.running_mark = None;
            domain.devices = Devices::default();
        };
        match (change, domain.power) {
            (DomainChange::Start { paused }, Power::Off(_)) => {
                domain.power = if *paused { Power::Paused } else { Power::Running };
                domain.running_mark = domain.mark.clone();
                domain.devices = self.defined.get(&id.0).cloned().unwrap_or_default();
                domain.saved = false;
            }
            (DomainChange::Pause, Power::Running) => domain.power = Power::Paused,
            (DomainChange::Resume, Power::Paused | Power::Stalled(_)) => {
                domain.power = Power::Running
            }
            (DomainChange::Shutdown, Power::Running) if !deaf => off(domain, OffReason::Shutdown),
            (DomainChange::Destroy, Power::Running | Power::Paused | Power::Stalled(_)) => {
                off(domain, OffReason::Destroyed);
            }
            (DomainChange::Save, Power::Running | Power::Paused | Power::Stalled(_)) => {
                off(domain, OffReason::Unknown);
                domain.saved = true;
            }
            (DomainChange::Discard, _) => domain.saved = false,
            (
                DomainChange::Attach { xml, .. },
                Power::Running | Power::Paused | Power::Stalled(_),
            ) => {
                let new = with_aliases(read_device(xml).map_err(|error| error.to_string())?);
                if new.volumes.keys().any(|volume| domain.devices.volumes.contains_key(volume))
                    || new.nics.keys().any(|tap| domain.devices.nics.contains_key(tap))
                {
                    return Err("it is plugged in already".into());
                }
                domain.devices.volumes.extend(new.volumes);
                domain.devices.nics.extend(new.nics);
            }
            (DomainChange::Detach { alias, .. }, Power::Running) if !clinging => {
                domain.devices.volumes.retain(|_, plugged| plugged.alias != *alias);
                domain.devices.nics.retain(|_, plugged| plugged.alias != *alias);
            }
            (
                DomainChange::Attach { .. }
                | DomainChange::Detach { .. }
                | DomainChange::Resize { .. }
                | DomainChange::Save,
                Power::Off(_),
            ) => return Err("domain is not running".into()),
            (DomainChange::Undefine, Power::Off(_)) => drop(self.domains.remove(&id.0)),
            // A running domain becomes one without a definition.
            (DomainChange::Undefine, _) => domain.mark = None,
            _ => {}
        }
        Ok(())
    }
}

/// Names devices as libvirt does when it plugs them in.
fn with_aliases(mut devices: Devices) -> Devices {
    for (volume, plugged) in &mut devices.volumes {
        plugged.alias = format!("disk-{volume}");
    }
    for (tap, plugged) in &mut devices.nics {
        plugged.alias = format!("net-{tap}");
    }
    devices
}

impl FakeHypervisor {
    fn running(&self, id: InstanceId, action: &str) -> Result<(), HypervisorError> {
        let host = self.host();
        host.reach()?;
        match host.domains.get(&id.0).map(|domain| domain.power) {
            Some(power) if !power.is_off() => Ok(()),
            _ => Err(HypervisorError::Refused {
                action: action.into(),
                reason: "domain is not running".into(),
            }),
        }
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
            cpu_model: Some("Fake".into()),
            architecture: "x86_64".into(),
            numa_cells: Vec::new(),
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

    async fn kernel_usage(&self) -> Result<BTreeMap<Uuid, KernelUsage>, HypervisorError> {
        let host = FakeHypervisor::host(self);
        host.reach()?;
        let on = host.domains.values().filter(|domain| !matches!(domain.power, Power::Off(_)));
        let used = |uuid| host.used.get(&uuid).cloned().unwrap_or_default().0;
        Ok(on.map(|domain| (domain.uuid, used(domain.uuid))).collect())
    }

    async fn qemu_usage(
        &self,
        id: InstanceId,
        question: Question,
    ) -> Result<QemuAnswer, HypervisorError> {
        let thinking = {
            let mut host = FakeHypervisor::host(self);
            host.reach()?;
            host.asked.push((question, id.0));
            host.thinkers += 1;
            host.asked_at_once = host.asked_at_once.max(host.thinkers);
            host.thinking
        };
        tokio::time::sleep(thinking).await;
        let mut host = FakeHypervisor::host(self);
        host.thinkers -= 1;
        if host.silent.contains(&id.0) {
            return Ok(QemuAnswer::Silent);
        }
        if host.busy.contains(&id.0) {
            return Ok(QemuAnswer::Busy);
        }
        let (_, disks, memory) = host.used.get(&id.0).cloned().unwrap_or_default();
        Ok(QemuAnswer::Told(match question {
            Question::Disks => QemuUsage::Disks(disks),
            Question::Memory => QemuUsage::Memory(memory),
        }))
    }

    async fn xml(&self, _id: InstanceId) -> Result<String, HypervisorError> {
        FakeHypervisor::host(self).reach()?;
        Ok("<domain/>\n".into())
    }

    async fn read_log(
        &self,
        path: &Path,
        _start: Option<u64>,
        _most: u64,
    ) -> Result<(u64, Vec<u8>), HypervisorError> {
        let bytes = std::fs::read(path).map_err(|error| HypervisorError::Refused {
            action: format!("read {}", path.display()),
            reason: error.to_string(),
        })?;
        Ok((0, bytes))
    }

    async fn screenshot(&self, id: InstanceId) -> Result<Screenshot, HypervisorError> {
        self.running(id, "take a picture")?;
        let bytes = b"P6\n1 1\n255\n\x01\x02\x03".to_vec();
        Ok(Screenshot { mime: "image/x-portable-pixmap".into(), bytes })
    }

    /// Echoes what is typed.
    async fn open_console(
        &self,
        id: InstanceId,
        output: mpsc::Sender<Vec<u8>>,
    ) -> Result<mpsc::Sender<Vec<u8>>, HypervisorError> {
        self.running(id, "open the console")?;
        let (sender, mut typed) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Some(bytes) = typed.recv().await {
                if output.send(bytes).await.is_err() {
                    return;
                }
            }
        });
        Ok(sender)
    }

    async fn copy_disk(
        &self,
        id: InstanceId,
        _disk: &str,
        target: &Path,
    ) -> Result<(), HypervisorError> {
        self.running(id, "copy the disk")?;
        std::fs::write(target, "a copy").map_err(|error| HypervisorError::Refused {
            action: "copy the disk".into(),
            reason: error.to_string(),
        })
    }

    async fn abort_copy(&self, _id: InstanceId) -> Result<(), HypervisorError> {
        FakeHypervisor::host(self).reach()
    }
}
