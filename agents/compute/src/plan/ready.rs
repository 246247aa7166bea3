//! Whether what a guest needs of others is there: taps and volumes, before QEMU opens them.

use std::collections::BTreeSet;
use std::path::Path;

use stackhand_model::{Connection, InstanceSpec, InstanceVolume};

use super::{Situation, Stop};
use crate::domain::tap_name;
use crate::initiator::by_host;

/// Whether an instance can be started.
pub(super) fn to_start(
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
        let reason = waits_for_taps(&missing);
        awaited.extend(missing);
        return Err(Stop::Waits(reason));
    }
    spec.volumes.iter().try_for_each(|wanted| volume(situation, wanted)).map_err(Stop::Waits)
}

/// Whether a volume can be opened; if not, what is waited for.
pub(super) fn volume(situation: &Situation, volume: &InstanceVolume) -> Result<(), String> {
    if by_host(&volume.connection).is_some() {
        let waits = |why: &str| Err(format!("waits for volume {}: {why}", volume.volume));
        return match situation.attached.get(&volume.volume) {
            Some(Ok(true)) => Ok(()),
            Some(Err(reason)) => waits(reason),
            Some(Ok(false)) | None => waits("this host logs in to its target"),
        };
    }
    match local_path(&volume.connection) {
        Some(path) if !situation.volumes.contains(path) => {
            Err(format!("waits for volume {}: there is no {}", volume.volume, path.display()))
        }
        _ => Ok(()),
    }
}

pub(super) fn waits_for_taps(taps: &[String]) -> String {
    format!("waits for tap {}, which the network agent makes", taps.join(", "))
}

/// The path on this host by which a volume is reached, if it is reached by one.
pub(crate) fn local_path(connection: &Connection) -> Option<&Path> {
    match connection {
        Connection::File { path, .. } | Connection::Block { path } => Some(path),
        Connection::Iscsi { .. } => None,
    }
}
