//! One change to one domain. Each is harmless if its effect is in place.

use std::path::Path;

use stackhand_model::{InstanceId, VolumeId};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use virt::secret::Secret;
use virt::sys;

use super::{calls, power};
use crate::domain::{secret_id, secret_xml};
use crate::hypervisor::{DomainChange, Power};

/// Whether a domain's QEMU is needed for a change, and may keep it waiting.
pub(super) fn is_by_qemu(change: &DomainChange) -> bool {
    match change {
        DomainChange::Start { .. }
        | DomainChange::Pause
        | DomainChange::Resume
        | DomainChange::Shutdown
        | DomainChange::Save
        | DomainChange::Attach { .. }
        | DomainChange::Detach { .. }
        | DomainChange::Resize { .. } => true,
        // It helps against one that does not answer.
        DomainChange::Destroy => false,
        DomainChange::Define { .. }
        | DomainChange::Discard
        | DomainChange::Keep { .. }
        | DomainChange::Release { .. }
        | DomainChange::Undefine => false,
    }
}

pub(super) fn perform(
    connect: &Connect,
    id: InstanceId,
    change: DomainChange,
) -> Result<(), Error> {
    match &change {
        DomainChange::Define { xml } => return Domain::define_xml(connect, xml).map(drop),
        DomainChange::Keep { volume, password } => {
            let secret = Secret::define_xml(connect, &secret_xml(*volume), 0)?;
            return secret.set_value(password.0.as_bytes(), 0);
        }
        DomainChange::Release { volume } => return release(connect, *volume),
        _ => {}
    }
    let domain = match Domain::lookup_by_uuid(connect, id.0) {
        Ok(domain) => domain,
        Err(error) if error.code() == ErrorNumber::NoDomain => {
            return match change {
                // What is not there is off and undefined.
                DomainChange::Undefine | DomainChange::Destroy | DomainChange::Discard => Ok(()),
                _ => Err(error),
            };
        }
        Err(error) => return Err(error),
    };
    let power = power(domain.get_state()?);
    let off = power.is_off();
    match change {
        DomainChange::Start { paused } if off => {
            let flags = if paused { sys::VIR_DOMAIN_START_PAUSED } else { 0 };
            domain.create_with_flags(flags).map(drop)
        }
        DomainChange::Pause if power == Power::Running => domain.suspend().map(drop),
        DomainChange::Resume if matches!(power, Power::Paused | Power::Stalled(_)) => {
            domain.resume().map(drop)
        }
        DomainChange::Shutdown if !off => domain.shutdown().map(drop),
        DomainChange::Destroy if !off => domain.destroy(),
        DomainChange::Save if !off => domain.managed_save(sys::VIR_DOMAIN_SAVE_RUNNING).map(drop),
        DomainChange::Discard if domain.has_managed_save(0)? => {
            domain.managed_save_remove(0).map(drop)
        }
        DomainChange::Attach { xml, .. } => {
            domain.attach_device_flags(&xml, sys::VIR_DOMAIN_AFFECT_LIVE).map(drop)
        }
        DomainChange::Detach { alias, .. } => match calls::detach(&domain, &alias) {
            // It has just gone, or was asked before and has not answered yet.
            Err(error) if error.code() == ErrorNumber::DeviceMissing => Ok(()),
            other => other,
        },
        DomainChange::Resize { target, bytes } => {
            if domain.get_block_info(&target, 0)?.capacity < bytes {
                domain.block_resize(&target, bytes, sys::VIR_DOMAIN_BLOCK_RESIZE_BYTES)?;
            }
            Ok(())
        }
        DomainChange::Undefine => domain.undefine_flags(
            sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                | sys::VIR_DOMAIN_UNDEFINE_NVRAM
                | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA,
        ),
        _ => Ok(()),
    }
}

fn release(connect: &Connect, volume: VolumeId) -> Result<(), Error> {
    match Secret::lookup_by_uuid(connect, secret_id(volume)) {
        Err(error) if error.code() == ErrorNumber::NoSecret => Ok(()),
        secret => secret?.undefine(),
    }
}

/// Copies one disk into a qcow2 image that is there already.
pub(super) fn backup_xml(disk: &str, target: &Path) -> String {
    let escape = |text: &str| quick_xml::escape::escape(text).into_owned();
    format!(
        "<domainbackup mode='push'><disks><disk name='{}' type='file' backup='yes'>\
         <target file='{}'/><driver type='qcow2'/></disk></disks></domainbackup>",
        escape(disk),
        escape(&target.to_string_lossy())
    )
}
