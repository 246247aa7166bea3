//! What the host may give to guests.

use std::path::Path;

use super::ComputeAgent;
use crate::hypervisor::{HostFacts, Hypervisor};
use crate::plan::Capacity;

impl<H: Hypervisor> ComputeAgent<H> {
    /// What the host may give to guests in all; `None` as long as libvirt was never there to tell.
    pub(super) async fn capacity(&self) -> Option<Capacity> {
        let facts = self.host_facts().await?;
        let (section, instances) = (self.section.clone(), self.instances.clone());
        let disk = tokio::task::spawn_blocking(move || disk_gib(&instances)).await.ok().flatten();
        let percent = |amount: u64, percent: u32| amount.saturating_mul(u64::from(percent)) / 100;
        let memory = facts.memory_mib.saturating_sub(section.reserved_memory_mib);
        let cpus = u64::from(facts.cpus.saturating_sub(section.reserved_cpus));
        let disk = disk.unwrap_or(u64::MAX / 200).saturating_sub(section.reserved_disk_gib);
        Some(Capacity {
            vcpus: percent(cpus, section.cpu_overcommit_percent),
            memory_mib: percent(memory, section.memory_overcommit_percent),
            disk_gib: percent(disk, section.disk_overcommit_percent),
        })
    }

    /// Facts of the host, asked once.
    async fn host_facts(&self) -> Option<HostFacts> {
        if let Some(facts) = self.memory().facts.clone() {
            return Some(facts);
        }
        let facts = self.hypervisor.host().await.ok()?;
        self.memory().facts = Some(facts.clone());
        Some(facts)
    }
}

/// Size of the file system that a folder is on, or will be.
fn disk_gib(folder: &Path) -> Option<u64> {
    let there = folder.ancestors().find(|path| path.exists())?;
    let found = nix::sys::statvfs::statvfs(there).ok()?;
    Some((found.blocks().saturating_mul(found.fragment_size())) >> 30)
}
