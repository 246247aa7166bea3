//! What one instance needs.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use stackhand_model::{
    Connection, ImageFormat, ImageId, InstanceId, InstanceSpec, PowerState, VolumeId,
};
use stackhand_runtime::agent::Outcome;

use super::blueprint::{Targets, blueprint, has_blank_root};
use super::claims::Claims;
use super::live::{Plug, keep_password, rescan};
use super::{Situation, Step, Stop, pending, progress, ready};
use crate::desired::{Wanted, Wish};
use crate::domain::{Blueprint, Devices, DiskSource, domain_name};
use crate::hypervisor::{DomainChange, DomainSeen, OffReason, Power, Stall};
use crate::initiator::{Question, by_host, without_password};
use crate::store::{Base, Part, Pinned, PowerOverride, Record};

const GIB: u64 = 1 << 30;

pub(super) fn plan(
    wanted: &Wanted,
    situation: &Situation,
    id: InstanceId,
    wish: &Wish<InstanceSpec>,
    steps: &mut Vec<Step>,
    claims: &mut Claims,
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
        return remove(situation, id, &wish.spec, domain.filter(|_| ours), steps);
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
    match make(wanted, situation, id, wish, domain, steps, claims) {
        Ok(outcome) => outcome,
        Err(Stop::Waits(reason)) => Outcome::Pending {
            reason,
            observed: domain.map_or(Value::Null, |domain| facts(domain, None)).into(),
        },
        Err(Stop::Fails(reason)) => Outcome::Failed {
            reason,
            observed: domain.map_or(Value::Null, |domain| facts(domain, None)).into(),
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
    spec: &InstanceSpec,
    domain: Option<&DomainSeen>,
    steps: &mut Vec<Step>,
) -> Outcome {
    if let Some(domain) = domain {
        if !domain.power.is_off() {
            steps.push(Step::Domain(DomainChange::Destroy));
        }
        steps.push(Step::Domain(DomainChange::Undefine));
        for volume in &spec.volumes {
            if keep_password(volume).is_some() {
                let volume = volume.volume;
                steps.push(Step::Domain(DomainChange::Release { volume }));
            }
        }
    }
    if let Some(folder) = situation.store.folders.get(&id) {
        // The record goes last: it knows what this host took in.
        let attached = folder.record.iter().flat_map(|record| &record.attached);
        steps.extend(attached.map(|(&volume, connection)| detach(volume, connection)));
        steps.push(Step::RemoveFiles(id));
    }
    Outcome::Gone
}

fn detach(volume: VolumeId, connection: &Connection) -> Step {
    Step::Initiator(Question::Detach { volume, connection: connection.clone() })
}

/// Notes what this host's initiator is to take in, and gives what it is to let go of: what neither
/// the document nor the guest has any more.
fn by_initiator(spec: &InstanceSpec, record: &mut Record, kept: &Devices) -> Vec<VolumeId> {
    let wanted = spec.volumes.iter();
    let wanted: BTreeMap<VolumeId, Connection> = wanted
        .filter_map(|it| Some((it.volume, without_password(by_host(&it.connection)?))))
        .collect();
    let left = record.attached.keys().copied();
    let left = left.filter(|it| !wanted.contains_key(it) && !kept.volumes.contains_key(it));
    let left = left.collect();
    record.attached.extend(wanted);
    left
}

fn make(
    wanted: &Wanted,
    situation: &Situation,
    id: InstanceId,
    wish: &Wish<InstanceSpec>,
    domain: Option<&DomainSeen>,
    steps: &mut Vec<Step>,
    claims: &mut Claims,
) -> Result<Outcome, Stop> {
    let (spec, generation) = (&wish.spec, wish.document.generation);
    let fashion = situation.fashion.as_ref().map_err(|reason| Stop::Waits(reason.clone()))?;
    let folder = situation.store.folders.get(&id);
    let before = folder.and_then(|folder| folder.record.clone());
    let mut record = before.clone().unwrap_or_default();
    let parts = folder.map(|folder| folder.parts.clone()).unwrap_or_default();
    let mut power = domain.map_or(Power::Off(OffReason::Unknown), |domain| domain.power);
    let saved = domain.is_some_and(|domain| domain.saved);

    // What a crash left half done.
    if record.power.is_some_and(|power| power.generation != generation) {
        record.power = None;
    }
    if record.snapshot {
        steps.push(Step::EndSnapshot);
        record.snapshot = false;
    }

    // What it is made from.
    let rebuild = record.rebuild;
    let has_root = parts.contains(&Part::Root) && !rebuild;
    let root_bytes = root_disk(wanted, situation, spec, has_root, &mut record)?;
    let (kernel, ramdisk, command_line) = wanted.boot(spec);
    record.kernel = pin(wanted, situation, kernel, record.kernel.take())?;
    record.ramdisk = pin(wanted, situation, ramdisk, record.ramdisk.take())?;
    record.cdrom = pin(wanted, situation, spec.cdrom, record.cdrom.take())?;
    let nothing = Devices::default();
    let devices = domain.map_or(&nothing, |domain| &domain.devices);
    let gone: Vec<VolumeId> = record.targets.keys().copied().collect();
    record.targets = Targets::new(spec, &record.targets, &devices.volumes).volumes;
    let gone = gone.into_iter().filter(|volume| !record.targets.contains_key(volume));
    let gone: Vec<VolumeId> = gone.collect();
    record.sizes.retain(|volume, _| record.targets.contains_key(volume));
    let mut let_go = by_initiator(spec, &mut record, devices);
    if saved {
        // The memory that was put on disk goes on with what it had.
        let_go.clear();
    }
    let blueprint = blueprint(fashion, id, spec, &record, command_line)?;
    let written = |error: crate::domain::Unwritable| Stop::Fails(crate::chain(&error));
    let definition = blueprint.definition().map_err(written)?;
    let core = blueprint.core().map_err(written)?;
    if domain.is_none() && before.is_none() {
        claims.take(situation, spec, root_bytes.unwrap_or(0))?;
    }

    // Whether it runs.
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
    if rebuild {
        if !power.is_off() {
            steps.push(Step::Domain(DomainChange::Destroy));
            power = Power::Off(OffReason::Destroyed);
        }
        if saved {
            steps.push(Step::Domain(DomainChange::Discard));
        }
        steps.push(Step::RemovePart(Part::Root));
    }
    let runs = domain.filter(|_| !power.is_off());
    let tells = spec
        .config_drive
        .then(|| crate::config_drive::digest(id, wish.document.name.as_str(), spec));
    // A CD that a running guest has open stays as it is.
    let writes_drive = tells.is_some()
        && (!parts.contains(&Part::ConfigDrive)
            || (runs.is_none() && record.config_drive != tells)
            || rebuild);
    if writes_drive {
        if parts.contains(&Part::ConfigDrive) {
            // So that the record never tells of a newer one than there is.
            steps.push(Step::RemovePart(Part::ConfigDrive));
        }
        record.config_drive = tells;
    }
    let core_runs = runs.and_then(|domain| domain.running_mark.as_ref()).map(|mark| &mark.core);
    let stays = matches!(want, PowerState::Running | PowerState::Paused);
    let (mut changes, mut sizes) = (Vec::new(), record.sizes.clone());
    let mut waits = match runs {
        Some(domain) if stays && core_runs == Some(&core) => {
            let plug = Plug { situation, id, spec, domain, blueprint: &blueprint };
            plug.plan(&mut sizes, &mut changes, &mut claims.awaited)?
        }
        _ => Vec::new(),
    };

    if before.as_ref() != Some(&record) {
        steps.push(Step::Prepare(Box::new(record.clone())));
    }
    if stays {
        let missing = spec.volumes.iter().filter(|volume| {
            by_host(&volume.connection).is_some()
                && matches!(situation.attached.get(&volume.volume), None | Some(Ok(false)))
        });
        steps.extend(missing.map(|volume| {
            let connection = volume.connection.clone();
            Step::Initiator(Question::Attach { volume: volume.volume, connection })
        }));
    }
    match (&record.base, root_bytes) {
        (Some(base), Some(bytes)) if spec.image.is_some() => {
            let (contents, format) = (base.pinned.contents.clone(), base.format);
            steps.push(Step::MakeDisk { contents, format, bytes });
        }
        (_, Some(bytes)) => steps.push(Step::MakeBlank { part: Part::Root, bytes }),
        _ => {}
    }
    let blanks = [(Part::Ephemeral, spec.ephemeral_gib << 30), (Part::Swap, spec.swap_mib << 20)];
    for (part, bytes) in blanks {
        if bytes > 0 && !parts.contains(&part) {
            steps.push(Step::MakeBlank { part, bytes });
        }
    }
    if writes_drive {
        steps.push(Step::WriteConfigDrive);
    }
    let defined = domain.and_then(|domain| domain.mark.as_ref());
    if defined.is_none_or(|mark| mark.definition != definition) {
        let xml = blueprint.xml(generation).map_err(written)?;
        steps.push(Step::Domain(DomainChange::Define { xml }));
    }
    steps.extend(changes);
    let released = |volume| Step::Domain(DomainChange::Release { volume });
    steps.extend(gone.into_iter().map(released));

    let change = match (want, power) {
        (PowerState::Running, Power::Running)
        | (PowerState::Paused, Power::Paused | Power::Stalled(_)) => None,
        (PowerState::Shutoff, Power::Off(_)) => saved.then_some(DomainChange::Discard),
        (PowerState::Suspended, Power::Off(_)) => None,
        (PowerState::Suspended, Power::Running | Power::Paused | Power::Stalled(_)) => {
            Some(DomainChange::Save)
        }
        (PowerState::Running | PowerState::Paused, Power::Off(reason)) => {
            if reason == OffReason::Crashed && !situation.crashed.contains(&id) {
                return Err(Stop::Fails("the guest crashed; it will be started again".into()));
            }
            ready::to_start(situation, spec, &mut claims.awaited)?;
            steps.extend(spec.volumes.iter().filter_map(keep_password));
            steps.extend(spec.volumes.iter().filter_map(rescan));
            sizes = spec
                .volumes
                .iter()
                .filter_map(|volume| Some((volume.volume, volume.size_gib?)))
                .collect();
            Some(DomainChange::Start { paused: want == PowerState::Paused })
        }
        (PowerState::Running, Power::Paused) => Some(DomainChange::Resume),
        (PowerState::Running, Power::Stalled(Stall::Disk)) => {
            if !situation.crashed.contains(&id) {
                let reason = "it stands still since a disk took no more of what it wrote: make room \
                              on the host; it is tried again";
                return Err(Stop::Fails(reason.into()));
            }
            Some(DomainChange::Resume)
        }
        // Whoever asked for this wants to look at it.
        (PowerState::Running, Power::Stalled(Stall::Watchdog)) => {
            let reason = "it stands still since it did not feed its watchdog: unpause it, or reboot \
                          it hard";
            return Err(Stop::Fails(reason.into()));
        }
        (PowerState::Paused, Power::Running) => Some(DomainChange::Pause),
        // A guest that stands still cannot shut itself down.
        (PowerState::Shutoff, Power::Paused | Power::Stalled(_)) => Some(DomainChange::Destroy),
        (PowerState::Shutoff, Power::Running) => match situation.stopping.get(&id) {
            None => {
                steps.push(Step::Domain(DomainChange::Shutdown));
                return Err(Stop::Waits("the guest was asked to shut down".into()));
            }
            Some(false) => return Err(Stop::Waits("waits for the guest to shut down".into())),
            Some(true) => Some(DomainChange::Destroy),
        },
    };
    if let Some(DomainChange::Start { .. }) = change {
        steps.push(Step::BeginLog);
    }
    steps.extend(change.map(Step::Domain));
    // What is true once all that is done, and not before.
    let mut after = Record { rebuild: false, sizes, ..record.clone() };
    for volume in let_go {
        let connection = after.attached.remove(&volume);
        steps.extend(connection.map(|connection| detach(volume, &connection)));
    }
    if want == PowerState::Running {
        after.seen_running = Some(generation);
    }
    if after != record {
        // One that is written for nothing else waits until it is true.
        if let Some(Step::Prepare(_)) = steps.last() {
            steps.pop();
        }
        steps.push(Step::Prepare(Box::new(after)));
    }

    let mut observed = match domain {
        Some(domain) => facts(domain, Some(want.as_str())),
        None => json!({"power_state": want.as_str(), "domain": domain_name(id)}),
    };
    observed["disks"] = json!(disks(&blueprint));
    if record.power.is_some_and(|power| power.by_guest) {
        observed["power_reason"] =
            "the guest shut itself down; start it with the action start".into();
    } else if record.power.is_some() {
        observed["power_reason"] = "by an action, until the document changes".into();
    }
    if runs.is_some() && core_runs != Some(&core) && want != PowerState::Shutoff {
        waits.push("it runs as it was before the change: reboot it hard to apply it".to_owned());
    }
    if !waits.is_empty() {
        return Ok(Outcome::Pending { reason: waits.join("; "), observed: observed.into() });
    }
    Ok(Outcome::Active { observed: observed.into() })
}

/// What the disks are that come and go with the instance, by the devices they have in the guest.
fn disks(blueprint: &Blueprint) -> BTreeMap<&str, &'static str> {
    let what = |source: &DiskSource| match source {
        DiskSource::Overlay { .. } => Some(Part::Root.name()),
        DiskSource::File(path) => {
            let is = |part: &&Part| path.ends_with(part.file());
            Part::ALL.iter().find(is).map(|part| part.name())
        }
        DiskSource::Cd(_) => Some("CD"),
        DiskSource::VirtioCd(_) => Some(Part::ConfigDrive.name()),
        DiskSource::Volume(_) => None,
    };
    let disks = blueprint.disks.iter();
    disks.filter_map(|disk| Some((disk.target.as_str(), what(&disk.source)?))).collect()
}

fn facts(domain: &DomainSeen, power_state: Option<&str>) -> Value {
    let seen = match domain.power {
        Power::Running => "running",
        Power::Paused | Power::Stalled(_) => "paused",
        Power::Off(_) => "shutoff",
    };
    let mut facts = json!({
        "power_state": power_state.unwrap_or(seen),
        "domain": domain.name,
    });
    if let Some(port) = domain.vnc_port {
        facts["vnc"] = format!("127.0.0.1:{port}").into();
    }
    let devices = &domain.devices;
    if !devices.volumes.is_empty() {
        let targets = devices.volumes.iter().map(|(volume, it)| (volume.to_string(), &it.guest));
        facts["volumes"] = json!(targets.collect::<BTreeMap<_, _>>());
    }
    if !devices.nics.is_empty() {
        let macs = devices.nics.iter().map(|(tap, it)| (tap, &it.guest));
        facts["taps"] = json!(macs.collect::<BTreeMap<_, _>>());
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
    let Some(image) = spec.image else {
        return Ok((has_blank_root(spec) && !has_disk).then_some(spec.root_disk_gib * GIB));
    };
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
