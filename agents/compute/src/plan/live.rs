//! What is plugged into a running domain, and what should be.
//!
//! A guest is asked to let go of a device and may take its time; until it has, the device counts
//! as plugged in, and whoever serves it must go on. What is plugged in counts once it is seen.

use std::collections::{BTreeMap, BTreeSet};

use stackhand_model::{
    Connection, InstanceId, InstanceSpec, InstanceVolume, IscsiClient, VolumeId,
};

use super::{Situation, Step, Stop, ready};
use crate::domain::{Blueprint, Unwritable};
use crate::hypervisor::{DomainChange, DomainSeen};
use crate::initiator::{Question, by_host, without_password};

/// A running domain and what it should be.
pub(super) struct Plug<'a> {
    pub(super) situation: &'a Situation,
    pub(super) id: InstanceId,
    pub(super) spec: &'a InstanceSpec,
    pub(super) domain: &'a DomainSeen,
    pub(super) blueprint: &'a Blueprint,
}

impl Plug<'_> {
    /// Plugs in and out; gives what is waited for.
    pub(super) fn plan(
        &self,
        sizes: &mut BTreeMap<VolumeId, u64>,
        steps: &mut Vec<Step>,
        awaited: &mut BTreeSet<String>,
    ) -> Result<Vec<String>, Stop> {
        let mut waits = self.plug_out(steps);
        self.plug_volumes(sizes, steps, &mut waits)?;
        self.plug_nics(steps, &mut waits, awaited)?;
        Ok(waits)
    }

    /// Asks the guest to let go of what is not wanted.
    fn plug_out(&self, steps: &mut Vec<Step>) -> Vec<String> {
        let mut unwanted: Vec<(String, &str)> = Vec::new();
        for (volume, plugged) in &self.domain.devices.volumes {
            if !self.spec.volumes.iter().any(|wanted| wanted.volume == *volume) {
                unwanted.push((format!("volume {volume}"), &plugged.alias));
            }
        }
        for (tap, plugged) in &self.domain.devices.nics {
            let wanted = self.blueprint.nics.iter().find(|nic| nic.tap == *tap);
            if wanted.is_none_or(|nic| !nic.mac.to_string().eq_ignore_ascii_case(&plugged.guest)) {
                unwanted.push((tap.clone(), &plugged.alias));
            }
        }
        let mut waits = Vec::new();
        for (what, alias) in unwanted {
            waits.push(format!("waits for the guest to let go of {what}"));
            let asked = self.situation.detaching.get(&(self.id, alias.to_owned()));
            if asked.is_none_or(|&again| again) {
                let alias = alias.to_owned();
                steps.push(Step::Domain(DomainChange::Detach { what, alias }));
            }
        }
        waits
    }

    fn plug_volumes(
        &self,
        sizes: &mut BTreeMap<VolumeId, u64>,
        steps: &mut Vec<Step>,
        waits: &mut Vec<String>,
    ) -> Result<(), Stop> {
        for disk in &self.blueprint.volumes {
            let wanted = |volume: &&InstanceVolume| disk.serial == Some(volume.volume);
            let Some(volume) = self.spec.volumes.iter().find(wanted) else { continue };
            let told = volume.size_gib.and_then(|size| sizes.insert(volume.volume, size));
            match self.domain.devices.volumes.get(&volume.volume) {
                None => match ready::volume(self.situation, volume) {
                    Ok(()) => {
                        steps.extend(keep_password(volume));
                        let what = format!("volume {} as {}", volume.volume, disk.target);
                        let xml = self.blueprint.volume_xml(disk).map_err(defect)?;
                        waits.push(format!("plugs in {what}"));
                        steps.push(Step::Domain(DomainChange::Attach { what, xml }));
                    }
                    Err(reason) => waits.push(reason),
                },
                Some(plugged) => {
                    if let Some(size) = volume.size_gib
                        && told.is_none_or(|told| told < size)
                    {
                        steps.extend(rescan(volume));
                        let (target, bytes) = (plugged.guest.clone(), size << 30);
                        steps.push(Step::Domain(DomainChange::Resize { target, bytes }));
                    }
                }
            }
        }
        Ok(())
    }

    fn plug_nics(
        &self,
        steps: &mut Vec<Step>,
        waits: &mut Vec<String>,
        awaited: &mut BTreeSet<String>,
    ) -> Result<(), Stop> {
        for nic in &self.blueprint.nics {
            if self.domain.devices.nics.contains_key(&nic.tap) {
                continue;
            }
            if self.situation.links.contains(&nic.tap) {
                let xml = self.blueprint.nic_xml(nic).map_err(defect)?;
                waits.push(format!("plugs in {}", nic.tap));
                steps.push(Step::Domain(DomainChange::Attach { what: nic.tap.clone(), xml }));
            } else {
                waits.push(ready::waits_for_taps(std::slice::from_ref(&nic.tap)));
                awaited.insert(nic.tap.clone());
            }
        }
        Ok(())
    }
}

#[expect(clippy::needless_pass_by_value, reason = "used as a function of map_err")]
fn defect(error: Unwritable) -> Stop {
    Stop::Fails(crate::chain(&error))
}

/// The step that makes a volume's password known before it is opened.
pub(super) fn keep_password(volume: &InstanceVolume) -> Option<Step> {
    match &volume.connection {
        Connection::Iscsi { password: Some(password), client: IscsiClient::Qemu, .. } => {
            let (volume, password) = (volume.volume, password.clone());
            Some(Step::Domain(DomainChange::Keep { volume, password }))
        }
        _ => None,
    }
}

/// The step that has this host see how large a volume is that it took in by itself.
pub(super) fn rescan(volume: &InstanceVolume) -> Option<Step> {
    let connection = without_password(by_host(&volume.connection)?);
    Some(Step::Initiator(Question::Rescan { volume: volume.volume, connection }))
}
