//! Whether KVM runs guests here, found out by running one.
//!
//! A device file says little: where this host is itself a guest, KVM may be there and hang as soon
//! as a guest turns on paging. The probe guest (`probe/guest.S`) is a boot sector that does what
//! kernels do first and says so on its serial console. It has some seconds; where KVM works it
//! needs well under one.

use std::path::Path;
use std::time::{Duration, Instant};

use stackhand_model::{CpuSpec, Firmware, InstanceId};
use uuid::Uuid;
use virt::domain::Domain;
use virt::sys;

use super::Libvirt;
use crate::domain::{Blueprint, Disk, DiskSource, Engine};
use crate::files::{FileError, failed, make_passage, make_readable, remove};
use crate::hypervisor::{DomainChange, Hypervisor, HypervisorError};

/// The boot sector.
const GUEST: &[u8; 512] = include_bytes!("probe/guest.bin");

/// What it says.
const RAN: &str = "stackhand probe guest ran";

/// How long it may take.
const LIMIT: Duration = Duration::from_secs(10);

/// How often its console is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Runs the probe guest on KVM.
pub(super) async fn kvm(libvirt: &Libvirt, folder: &Path) -> Result<(), HypervisorError> {
    if !Path::new("/dev/kvm").exists() {
        return Err(refused("this host has no /dev/kvm"));
    }
    run(libvirt, folder, Engine::Kvm).await
}

/// Runs the probe guest on an engine.
pub(super) async fn run(
    libvirt: &Libvirt,
    folder: &Path,
    engine: Engine,
) -> Result<(), HypervisorError> {
    let (disk, log) = (folder.join("probe.img"), folder.join("probe.log"));
    let prepare = {
        let (folder, disk, log) = (folder.to_owned(), disk.clone(), log.clone());
        move || {
            make_passage(&folder)?;
            remove(&log)?;
            make_readable(&log)?;
            let mut image = GUEST.to_vec();
            image.resize(1 << 20, 0);
            std::fs::write(&disk, image).map_err(failed("write", &disk))
        }
    };
    let told = |error: FileError| refused(&crate::chain(&error));
    crate::blocking(prepare).await.map_err(told)?;
    let outcome = boot(libvirt, engine, &disk, &log).await;
    let tidy = move || {
        remove(&disk)?;
        remove(&log)
    };
    crate::blocking(tidy).await.map_err(told)?;
    outcome
}

async fn boot(
    libvirt: &Libvirt,
    engine: Engine,
    disk: &Path,
    log: &Path,
) -> Result<(), HypervisorError> {
    let id = InstanceId(Uuid::new_v4());
    let blueprint = Blueprint {
        id,
        engine,
        machine: "q35".into(),
        vcpus: 1,
        cpu: CpuSpec::default(),
        memory_mib: 64,
        firmware: Firmware::Bios,
        kernel: None,
        disks: vec![Disk {
            target: "vda".into(),
            source: DiskSource::File(disk.to_owned()),
            boot: Some(1),
            serial: None,
            read_only: false,
        }],
        volumes: vec![],
        nics: vec![],
        console_log: log.to_owned(),
        vnc: false,
        watchdog: None,
        guest_agent: false,
        disk_cache: "writeback".into(),
        spare_slots: 0,
    };
    let xml = blueprint.xml(0).map_err(|error| refused(&crate::chain(&error)))?;
    let begin = Instant::now();
    // It goes when the connection does, so a killed agent leaves nothing behind.
    let started = libvirt.call("start the probe guest".into(), move |connect| {
        Domain::create_xml(connect, &xml, sys::VIR_DOMAIN_START_AUTODESTROY).map(drop)
    });
    started.await.map_err(|error| match error {
        HypervisorError::Refused { reason, .. } => refused(&reason),
        away @ HypervisorError::Away { .. } => away,
    })?;
    let ran = loop {
        let said = tokio::fs::read_to_string(log).await.unwrap_or_default();
        if said.contains(RAN) {
            break true;
        }
        if begin.elapsed() > LIMIT {
            break false;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    libvirt.perform(id, DomainChange::Destroy).await?;
    if ran { Ok(()) } else { Err(refused(&format!("it did not come up within {LIMIT:?}"))) }
}

fn refused(reason: &str) -> HypervisorError {
    // QEMU's complaints may be long; the first line tells.
    let reason: String = reason.lines().next().unwrap_or_default().chars().take(200).collect();
    HypervisorError::Refused { action: "run a probe guest on KVM".into(), reason }
}
