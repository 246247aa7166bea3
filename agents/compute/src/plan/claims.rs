//! What instances take of the host, and whether there is room for one more.

use std::collections::BTreeSet;

use serde::Serialize;
use stackhand_model::{InstanceId, InstanceSpec};

use super::{Situation, Stop};
use crate::desired::Wanted;

const GIB: u64 = 1 << 30;

/// What the host may give to guests in all: overcommit multiplied in, the reserve taken off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Capacity {
    /// Virtual processors.
    pub vcpus: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Disks in GiB.
    pub disk_gib: u64,
}

/// What is taken, and by whom taps are awaited, as a plan is made.
#[derive(Debug, Default)]
pub(super) struct Claims {
    taken: Capacity,
    /// Taps that instances wait for.
    pub(super) awaited: BTreeSet<String>,
}

impl Claims {
    /// What the instances that are there have taken.
    pub(super) fn new(wanted: &Wanted, situation: &Situation) -> Self {
        let mut claims = Self::default();
        let is_there = |id: &InstanceId| {
            let defined =
                situation.domains.as_ref().is_ok_and(|domains| domains.contains_key(&id.0));
            defined || situation.store.folders.contains_key(id)
        };
        for (_, wish) in wanted.instances.iter().filter(|(id, _)| is_there(id)) {
            claims.taken = claims.with(&wish.spec, 0);
        }
        claims
    }

    fn with(&self, spec: &InstanceSpec, root_bytes: u64) -> Capacity {
        let root = spec.root_disk_gib.max(root_bytes.div_ceil(GIB));
        let swap = spec.swap_mib.div_ceil(1024);
        Capacity {
            vcpus: self.taken.vcpus + u64::from(spec.vcpus),
            memory_mib: self.taken.memory_mib + spec.memory_mib,
            disk_gib: self.taken.disk_gib + root + spec.ephemeral_gib + swap,
        }
    }

    /// Takes what a new instance needs, if it is there.
    pub(super) fn take(
        &mut self,
        situation: &Situation,
        spec: &InstanceSpec,
        root_bytes: u64,
    ) -> Result<(), Stop> {
        let after = self.with(spec, root_bytes);
        if let Some(most) = situation.capacity {
            for (what, needed, most, taken) in [
                ("virtual processors", after.vcpus, most.vcpus, self.taken.vcpus),
                ("MiB of memory", after.memory_mib, most.memory_mib, self.taken.memory_mib),
                ("GiB of disk", after.disk_gib, most.disk_gib, self.taken.disk_gib),
            ] {
                if needed > most {
                    return Err(Stop::Fails(format!(
                        "it needs {} {what}, and this host has {} left of {most}: choose another \
                         host, or see the overcommit settings",
                        needed - taken,
                        most.saturating_sub(taken)
                    )));
                }
            }
        }
        self.taken = after;
        Ok(())
    }
}
