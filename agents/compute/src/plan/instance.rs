//! What one instance needs.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};
use stackhand_model::{Connection, ImageFormat, ImageId, InstanceId, InstanceSpec, PowerState};
use stackhand_runtime::agent::Outcome;

use super::{Fashion, Situation, Step, pending, progress};
use crate::desired::{Wanted, Wish};
use crate::domain::{Blueprint, Disk, DiskSource, KernelBoot, Nic, domain_name, tap_name};
use crate::hypervisor::{DomainChange, DomainSeen, OffReason, Power};
use crate::store::{Base, Pinned, PowerOverride, Record};

const GIB: u64 = 1 << 30;

/// Why an instance cannot go on.
enum Stop {
    Waits(String),
    Fails(String),
}

pub(super) fn plan(
    wanted: &Wanted,
    situation: &Situation,
    id: InstanceId,
    wish: &Wish<InstanceSpec>,
    steps: &mut Vec<Step>,
    awaited: &mut BTreeSet<String>,
) -> Outcome {
    if situation.busy.contains(&id) {
        return pending("an action is under way");
    }
    let domains = match &situation.domains {
        Ok(domains) => domains,
        Err(reason) => return pending(reason.clone()),
    };
    let domain = domains.get(&id.0);
    let ours = domain.is_some_and(|domain| is_ours(domain, id));
    if wish.deleting {
        return remove(situation, id, domain.filter(|_| ours), steps);
    }
    let in_the_way = domain.filter(|_| !ours).or_else(|| {
        let name = domain_name(id);
        domains.values().find(|domain| domain.name == name && domain.uuid != id.0)
    });
    if let Some(other) = in_the_way {
        return Outcome::failed(format!(
            "domain {} ({}) was not made by this agent and holds the instance's name or id: rename \
             or undefine it",
            other.name, other.uuid
        ));
    }
    match make(wanted, situation, id, wish, domain, steps, awaited) {
        Ok(outcome) => outcome,
        Err(Stop::Waits(reason)) => Outcome::Pending {
            reason,
            observed: domain.map_or(Value::Null, |domain| facts(domain, None)),
        },
        Err(Stop::Fails(reason)) => Outcome::Failed {
            reason,
            observed: domain.map_or(Value::Null, |domain| facts(domain, None)),
        },
    }
}

/// Whether a domain carries our mark for this instance.
pub(crate) fn is_ours(domain: &DomainSeen, id: InstanceId) -> bool {
    [&domain.mark, &domain.running_mark].into_iter().flatten().any(|mark| mark.id == id.0)
}

fn remove(
    situation: &Situation,
    id: InstanceId,
    domain: Option<&DomainSeen>,
    steps: &mut Vec<Step>,
) -> Outcome {
    if let Some(domain) = domain {
        if !matches!(domain.power, Power::Off(_)) {
            steps.push(Step::Domain(DomainChange::Destroy));
        }
        steps.push(Step::Domain(DomainChange::Undefine));
    }
    if situation.store.folders.contains_key(&id) {
        steps.push(Step::RemoveFiles(id));
    }
    Outcome::Gone
}

fn make(
    wanted: &Wanted,
    situation: &Situation,
    id: InstanceId,
    wish: &Wish<InstanceSpec>,
    domain: Option<&DomainSeen>,
    steps: &mut Vec<Step>,
    awaited: &mut BTreeSet<String>,
) -> Result<Outcome, Stop> {
    let (spec, generation) = (&wish.spec, wish.document.generation);
    let fashion = situation.fashion.as_ref().map_err(|reason| Stop::Waits(reason.clone()))?;
    let folder = situation.store.folders.get(&id);
    let before = folder.and_then(|folder| folder.record.clone());
    let mut record = before.clone().unwrap_or_default();
    let has_disk = folder.is_some_and(|folder| folder.disk);

    // What it is made from.
    if record.power.is_some_and(|power| power.generation != generation) {
        record.power = None;
    }
    let disk_bytes = root_disk(wanted, situation, spec, has_disk, &mut record)?;
    let (kernel, ramdisk, command_line) = wanted.boot(spec);
    record.kernel = pin(wanted, situation, kernel, record.kernel.take())?;
    record.ramdisk = pin(wanted, situation, ramdisk, record.ramdisk.take())?;
    let blueprint = blueprint(fashion, id, spec, &record, command_line)?;
    let definition = blueprint.definition().map_err(|error| Stop::Fails(crate::chain(&error)))?;
    let definition = definition.as_str();

    // Whether it runs.
    let power = domain.map_or(Power::Off(OffReason::Unknown), |domain| domain.power);
    let asked = record.power.map_or(spec.power_state, |power| power.state);
    if power == Power::Off(OffReason::Shutdown)
        && asked == PowerState::Running
        && record.seen_running == Some(generation)
    {
        let state = PowerState::Shutoff;
        record.power = Some(PowerOverride { generation, state, by_guest: true });
    }
    let want = record.power.map_or(spec.power_state, |power| power.state);
    if want == PowerState::Shutoff {
        // What we ask for is not the guest's own doing.
        record.seen_running = None;
    }

    if before.as_ref() != Some(&record) {
        steps.push(Step::Prepare(Box::new(record.clone())));
    }
    if let (Some(base), Some(bytes)) = (&record.base, disk_bytes) {
        let (contents, format) = (base.pinned.contents.clone(), base.format);
        steps.push(Step::MakeDisk { contents, format, bytes });
    }
    let defined = domain.and_then(|domain| domain.mark.as_ref());
    if defined.is_none_or(|mark| mark.definition != definition) {
        let xml = blueprint.xml(generation).map_err(|error| Stop::Fails(crate::chain(&error)))?;
        steps.push(Step::Domain(DomainChange::Define { xml }));
    }
    let runs_other = domain
        .and_then(|domain| domain.running_mark.as_ref())
        .is_some_and(|mark| mark.definition != definition);

    let change = match (want, power) {
        (PowerState::Running, Power::Running)
        | (PowerState::Paused, Power::Paused)
        | (PowerState::Shutoff, Power::Off(_)) => None,
        (PowerState::Running | PowerState::Paused, Power::Off(reason)) => {
            if reason == OffReason::Crashed && !situation.crashed.contains(&id) {
                return Err(Stop::Fails("the guest crashed; it will be started again".into()));
            }
            ready_to_start(situation, spec, awaited)?;
            Some(DomainChange::Start { paused: want == PowerState::Paused })
        }
        (PowerState::Running, Power::Paused) => Some(DomainChange::Resume),
        (PowerState::Paused, Power::Running) => Some(DomainChange::Pause),
        // A guest that stands still cannot shut itself down.
        (PowerState::Shutoff, Power::Paused) => Some(DomainChange::Destroy),
        (PowerState::Shutoff, Power::Running) => match situation.stopping.get(&id) {
            None => {
                steps.push(Step::Domain(DomainChange::Shutdown));
                return Err(Stop::Waits("the guest was asked to shut down".into()));
            }
            Some(false) => return Err(Stop::Waits("waits for the guest to shut down".into())),
            Some(true) => Some(DomainChange::Destroy),
        },
    };
    let runs = want == PowerState::Running;
    steps.extend(change.map(Step::Domain));
    if runs && record.seen_running != Some(generation) {
        let record = Record { seen_running: Some(generation), ..record.clone() };
        // One that is written for nothing else waits until it is true.
        if let Some(Step::Prepare(_)) = steps.last() {
            steps.pop();
        }
        steps.push(Step::Prepare(Box::new(record)));
    }

    let power_state = match want {
        PowerState::Running => "running",
        PowerState::Paused => "paused",
        PowerState::Shutoff => "shutoff",
    };
    let mut observed = match domain {
        Some(domain) => facts(domain, Some(power_state)),
        None => json!({"power_state": power_state, "domain": domain_name(id)}),
    };
    if record.power.is_some_and(|power| power.by_guest) {
        observed["power_reason"] =
            "the guest shut itself down; start it with the action start".into();
    } else if record.power.is_some() {
        observed["power_reason"] = "by an action, until the document changes".into();
    }
    if runs_other && power_state != "shutoff" {
        let reason = "it runs as it was before the change: reboot it hard to apply it".to_owned();
        return Ok(Outcome::Pending { reason, observed });
    }
    Ok(Outcome::Active { observed })
}

fn facts(domain: &DomainSeen, power_state: Option<&str>) -> Value {
    let seen = match domain.power {
        Power::Running => "running",
        Power::Paused => "paused",
        Power::Off(_) => "shutoff",
    };
    let mut facts = json!({
        "power_state": power_state.unwrap_or(seen),
        "domain": domain.name,
    });
    if let Some(port) = domain.vnc_port {
        facts["vnc"] = format!("127.0.0.1:{port}").into();
    }
    facts
}

/// Pins the contents of the root image; gives the size of the disk if it is to be made.
fn root_disk(
    wanted: &Wanted,
    situation: &Situation,
    spec: &InstanceSpec,
    has_disk: bool,
    record: &mut Record,
) -> Result<Option<u64>, Stop> {
    let Some(image) = spec.image else { return Ok(None) };
    if has_disk {
        return match &record.base {
            Some(_) => Ok(None),
            None => Err(Stop::Fails("its root disk is there without a record of its image".into())),
        };
    }
    let cached = resolve(wanted, situation, image)?;
    if matches!(cached.format, ImageFormat::Kernel | ImageFormat::Ramdisk) {
        let format = cached.format;
        let reason = format!("{} has format {format:?}, which is no disk", wanted.call(image));
        return Err(Stop::Fails(reason));
    }
    let least = wanted.images.get(&image).map_or(0, |image| image.spec.min_disk_gib) * GIB;
    let least = least.max(cached.virtual_bytes);
    let bytes = if spec.root_disk_gib == 0 { least } else { spec.root_disk_gib * GIB };
    if bytes < least {
        return Err(Stop::Fails(format!(
            "{} needs a root disk of {} GiB and root_disk_gib is {}",
            wanted.call(image),
            least.div_ceil(GIB),
            spec.root_disk_gib
        )));
    }
    let pinned = Pinned { image, contents: cached.contents.clone() };
    record.base = Some(Base { pinned, format: cached.disk });
    Ok(Some(bytes.next_multiple_of(512)))
}

/// Contents of a kernel or RAM disk: those taken before, as long as it is the same image.
fn pin(
    wanted: &Wanted,
    situation: &Situation,
    image: Option<ImageId>,
    before: Option<Pinned>,
) -> Result<Option<Pinned>, Stop> {
    let Some(image) = image else { return Ok(None) };
    if let Some(pinned) = before.filter(|pinned| pinned.image == image)
        && situation.cache.contents.contains(&pinned.contents)
    {
        return Ok(Some(pinned));
    }
    let cached = resolve(wanted, situation, image)?;
    Ok(Some(Pinned { image, contents: cached.contents.clone() }))
}

fn resolve<'a>(
    wanted: &Wanted,
    situation: &'a Situation,
    image: ImageId,
) -> Result<&'a stackhand_image::CachedImage, Stop> {
    let name = wanted.call(image);
    let Some(wish) = wanted.images.get(&image).filter(|wish| !wish.deleting) else {
        return Err(Stop::Waits(format!("waits for {name}: it is not known here")));
    };
    if let Some(cached) = situation.cache.images.get(&image)
        && cached.is_of(&wish.spec)
    {
        return Ok(cached);
    }
    Err(Stop::Waits(match situation.fetches.get(&image) {
        Some(fetch) => match &fetch.failure {
            Some(failure) => format!("waits for {name}, which failed: {failure}"),
            None => format!("waits for {name}: {}", progress(fetch)),
        },
        None => format!("waits for {name}: it is not in the cache"),
    }))
}

fn blueprint(
    fashion: &Fashion,
    id: InstanceId,
    spec: &InstanceSpec,
    record: &Record,
    command_line: Option<String>,
) -> Result<Blueprint, Stop> {
    let folder = fashion.instances.join(id.to_string());
    let contents = |pinned: &Pinned| fashion.images.join(&pinned.contents);
    let mut targets: BTreeSet<String> =
        spec.volumes.iter().filter_map(|volume| volume.device.clone()).collect();
    let mut next_target = || {
        let free = (0..).map(device_name).find(|name| !targets.contains(name)).unwrap_or_default();
        targets.insert(free.clone());
        free
    };
    let boots_from_volume = spec.volumes.iter().any(|volume| volume.boot);
    let mut disks = Vec::new();
    if let (Some(_), Some(base)) = (spec.image, &record.base) {
        disks.push(Disk {
            target: next_target(),
            source: DiskSource::Overlay {
                path: folder.join("disk"),
                base: contents(&base.pinned),
                base_format: base.format,
            },
            boot: !boots_from_volume,
            serial: None,
        });
    }
    // QEMU takes one boot order once; the first volume that asks for it gets it.
    let mut bootable = true;
    for volume in &spec.volumes {
        if let Connection::Iscsi { .. } = volume.connection {
            return Err(Stop::Fails("volumes over iSCSI are not supported yet".into()));
        }
        let boot = volume.boot && std::mem::take(&mut bootable);
        disks.push(Disk {
            target: volume.device.clone().unwrap_or_else(&mut next_target),
            source: DiskSource::Volume(volume.connection.clone()),
            boot,
            serial: Some(volume.volume),
        });
    }
    disks.sort_by_key(|disk| (disk.target.len(), disk.target.clone()));
    Ok(Blueprint {
        id,
        engine: fashion.engine,
        machine: fashion.machine.clone(),
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        kernel: record.kernel.as_ref().map(|kernel| KernelBoot {
            kernel: contents(kernel),
            ramdisk: record.ramdisk.as_ref().map(contents),
            command_line,
        }),
        disks,
        nics: spec
            .ports
            .iter()
            .map(|port| Nic { tap: tap_name(port.port), mac: port.mac, mtu: port.mtu })
            .collect(),
        console_log: folder.join("console.log"),
        vnc: spec.vnc,
        disk_cache: fashion.disk_cache.clone(),
    })
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

/// Taps and volumes must be there before QEMU opens them.
fn ready_to_start(
    situation: &Situation,
    spec: &InstanceSpec,
    awaited: &mut BTreeSet<String>,
) -> Result<(), Stop> {
    let missing: Vec<String> = spec
        .ports
        .iter()
        .map(|port| tap_name(port.port))
        .filter(|tap| !situation.links.contains(tap))
        .collect();
    if !missing.is_empty() {
        let reason = format!("waits for tap {}, which the network agent makes", missing.join(", "));
        awaited.extend(missing);
        return Err(Stop::Waits(reason));
    }
    for volume in &spec.volumes {
        if let Some(path) = local_path(&volume.connection)
            && !situation.volumes.contains(path)
        {
            return Err(Stop::Waits(format!(
                "waits for volume {}: there is no {}",
                volume.volume,
                path.display()
            )));
        }
    }
    Ok(())
}

/// The path on this host by which a volume is reached, if it is reached by one.
pub(crate) fn local_path(connection: &Connection) -> Option<&Path> {
    match connection {
        Connection::File { path, .. } | Connection::Block { path } => Some(path),
        Connection::Iscsi { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_the_kernel_names_them() {
        let names: Vec<_> = [0, 1, 25, 26, 27, 701, 702].map(device_name).into();
        assert_eq!(names, ["vda", "vdb", "vdz", "vdaa", "vdab", "vdzz", "vdaaa"]);
    }
}
