//! From a document and what was pinned for it to a blueprint.

use std::collections::{BTreeMap, BTreeSet};

use stackhand_attach::stable_path;
use stackhand_model::{Connection, InstanceId, InstanceSpec, InstanceVolume, VolumeId};

use super::{Fashion, Stop};
use crate::domain::{Blueprint, Disk, DiskSource, KernelBoot, Nic, Plugged, tap_name};
use crate::store::{Part, Pinned, Record};

/// What an instance's domain has to be. `command_line` is for its kernel, if it boots one.
pub(super) fn blueprint(
    fashion: &Fashion,
    id: InstanceId,
    spec: &InstanceSpec,
    record: &Record,
    command_line: Option<String>,
) -> Result<Blueprint, Stop> {
    let folder = fashion.instances.join(id.to_string());
    let contents = |pinned: &Pinned| fashion.images.join(&pinned.contents);
    let targets = Targets::new(spec, &record.targets, &BTreeMap::new());
    let mut disks = Vec::new();
    let own = |target: String, source: DiskSource, boot: Option<u32>| Disk {
        target,
        source,
        boot,
        serial: None,
        read_only: false,
    };
    // QEMU takes one boot order once; the first volume that asks for it gets it.
    let boots_from = spec.volumes.iter().find(|volume| volume.boot).map(|volume| volume.volume);
    let root = match &record.base {
        Some(base) if spec.image.is_some() => Some(DiskSource::Overlay {
            path: folder.join(Part::Root.file()),
            base: contents(&base.pinned),
            base_format: base.format,
        }),
        _ if has_blank_root(spec) => Some(DiskSource::File(folder.join(Part::Root.file()))),
        _ => None,
    };
    if let Some(source) = root {
        disks.push(own(targets.root, source, boots_from.is_none().then_some(1)));
    }
    let mut volumes = Vec::new();
    for volume in &spec.volumes {
        let connection = match stable_path(&volume.connection) {
            Some(path) => Connection::Block { path },
            None => volume.connection.clone(),
        };
        let boots = boots_from == Some(volume.volume);
        let disk = Disk {
            target: targets.volumes.get(&volume.volume).cloned().unwrap_or_default(),
            source: DiskSource::Volume(connection),
            boot: boots.then_some(1),
            serial: Some(volume.volume),
            read_only: volume.read_only,
        };
        if volume.boot { disks.push(disk) } else { volumes.push(disk) }
    }
    for (part, target) in [(Part::Ephemeral, targets.ephemeral), (Part::Swap, targets.swap)] {
        if !target.is_empty() {
            disks.push(own(target, DiskSource::File(folder.join(part.file())), None));
        }
    }
    let by_target = |disk: &Disk| (disk.target.len(), disk.target.clone());
    disks.sort_by_key(by_target);
    volumes.sort_by_key(by_target);
    if let Some(cd) = &record.cdrom {
        disks.push(own("sda".into(), DiskSource::Cd(contents(cd)), Some(2)));
    }
    if spec.config_drive {
        let path = folder.join(Part::ConfigDrive.file());
        disks.push(own("sdb".into(), DiskSource::VirtioCd(path), None));
    }
    Ok(Blueprint {
        id,
        engine: fashion.engine,
        machine: fashion.machine.clone(),
        vcpus: spec.vcpus,
        cpu: spec.cpu.clone(),
        memory_mib: spec.memory_mib,
        firmware: spec.firmware,
        kernel: record.kernel.as_ref().map(|kernel| KernelBoot {
            kernel: contents(kernel),
            ramdisk: record.ramdisk.as_ref().map(contents),
            command_line,
        }),
        disks,
        volumes,
        nics: spec
            .ports
            .iter()
            .map(|port| Nic {
                tap: tap_name(port.port),
                mac: port.mac,
                mtu: port.mtu,
                queues: port.queues,
            })
            .collect(),
        console_log: folder.join("console.log"),
        vnc: spec.vnc,
        watchdog: spec.watchdog,
        guest_agent: spec.guest_agent,
        disk_cache: fashion.disk_cache.clone(),
        spare_slots: fashion.hotplug_slots,
    })
}

/// Whether the root disk starts empty.
pub(super) fn has_blank_root(spec: &InstanceSpec) -> bool {
    spec.image.is_none() && spec.root_disk_gib > 0
}

/// The device that an instance's own root disk has in the guest.
pub(crate) fn root_target(spec: &InstanceSpec) -> String {
    Targets::new(spec, &BTreeMap::new(), &BTreeMap::new()).root
}

/// Devices in the guest. Those of the instance's own disks follow from the document alone, so that
/// they stay when volumes come and go; a volume keeps what it was given, until it is out.
#[derive(Debug, Default)]
pub(super) struct Targets {
    root: String,
    ephemeral: String,
    swap: String,
    /// Those of volumes.
    pub(super) volumes: BTreeMap<VolumeId, String>,
}

impl Targets {
    /// Gives every disk of `spec` its device. `before` is what volumes had; what is `plugged` in
    /// and not wanted any more keeps its own.
    pub(super) fn new(
        spec: &InstanceSpec,
        before: &BTreeMap<VolumeId, String>,
        plugged: &BTreeMap<VolumeId, Plugged>,
    ) -> Self {
        let mut taken: BTreeSet<String> =
            spec.volumes.iter().filter_map(|volume| volume.device.clone()).collect();
        let next = |taken: &mut BTreeSet<String>| {
            let free = (0..).map(device_name).find(|name| !taken.contains(name));
            let free = free.unwrap_or_default();
            taken.insert(free.clone());
            free
        };
        let mut targets = Self::default();
        if spec.image.is_some() || has_blank_root(spec) {
            targets.root = next(&mut taken);
        }
        let (boot, data): (Vec<_>, Vec<_>) = spec.volumes.iter().partition(|volume| volume.boot);
        for (index, volumes) in [boot, data].into_iter().enumerate() {
            if index == 1 {
                if spec.ephemeral_gib > 0 {
                    targets.ephemeral = next(&mut taken);
                }
                if spec.swap_mib > 0 {
                    targets.swap = next(&mut taken);
                }
                let leaving = plugged
                    .keys()
                    .filter(|&volume| !spec.volumes.iter().any(|wanted| wanted.volume == *volume));
                for volume in leaving {
                    if let Some(target) = before.get(volume) {
                        taken.insert(target.clone());
                        targets.volumes.insert(*volume, target.clone());
                    }
                }
            }
            let keeps = |volume: &InstanceVolume| {
                volume.device.clone().or_else(|| before.get(&volume.volume).cloned())
            };
            // What is kept first, so that a new one does not take it.
            let mut new = Vec::new();
            for volume in volumes {
                match keeps(volume) {
                    Some(target) if volume.device.is_some() || taken.insert(target.clone()) => {
                        targets.volumes.insert(volume.volume, target);
                    }
                    _ => new.push(volume.volume),
                }
            }
            for volume in new {
                targets.volumes.insert(volume, next(&mut taken));
            }
        }
        targets
    }
}

/// `vda`, `vdb`, …, `vdz`, `vdaa`, …
fn device_name(index: u32) -> String {
    let mut letters = Vec::new();
    let mut left = index + 1;
    while left > 0 {
        left -= 1;
        letters.push(char::from(b'a' + u8::try_from(left % 26).unwrap_or(0)));
        left /= 26;
    }
    letters.push('d');
    letters.push('v');
    letters.into_iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use stackhand_model::{Document, Spec};

    use super::*;

    #[test]
    fn the_root_disk_gives_way_to_a_volume_that_asks_for_its_device() {
        let root = |volumes: serde_json::Value| {
            let spec = json!({
                "host": "h", "vcpus": 1, "memory_mib": 64, "root_disk_gib": 1,
                "kernel": uuid::Uuid::nil(), "volumes": volumes,
            });
            let id = uuid::Uuid::nil();
            let document = json!({"kind": "Instance", "id": id, "name": "i", "spec": spec});
            match Document::from_value(&document).unwrap().spec {
                Spec::Instance(spec) => root_target(&spec),
                _ => unreachable!(),
            }
        };
        let connection = json!({"type": "file", "path": "/v", "format": "raw"});
        let volume = json!({"volume": uuid::Uuid::from_u128(7), "connection": connection});
        assert_eq!(root(json!([volume])), "vda");
        let mut first = volume;
        first["device"] = "vda".into();
        assert_eq!(root(json!([first])), "vdb");
    }

    #[test]
    fn devices_are_named_as_the_kernel_names_them() {
        let names: Vec<_> = [0, 1, 25, 26, 27, 701, 702].map(device_name).into();
        assert_eq!(names, ["vda", "vdb", "vdz", "vdaa", "vdab", "vdzz", "vdaaa"]);
    }
}
