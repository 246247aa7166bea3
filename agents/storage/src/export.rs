//! Giving volumes to other hosts, behind one narrow trait.
//!
//! A target belongs to one volume and its name follows from the volume's id, so what is exported
//! can be told, adopted and taken back by whoever knows the id: nothing about exports is kept in
//! memory or on disk. Initiators are admitted one by one, each with a password of its own, which
//! follows from the attachment's id and the host's key ([`chap`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use stackhand_model::{Secret, VolumeId};

pub mod chap;
pub mod fake;
pub mod lio;
pub mod tgt;

/// How the names of our targets begin. Nothing else is ours.
pub const PREFIX: &str = "iqn.2026-11.org.stackhand:volume-";

/// Name of a volume's target.
#[must_use]
pub fn target_name(volume: VolumeId) -> String {
    format!("{PREFIX}{volume}")
}

/// The volume that a target is of, if it is one of ours.
#[must_use]
pub fn volume_of(target: &str) -> Option<VolumeId> {
    let id = target.strip_prefix(PREFIX)?.parse().ok()?;
    (target_name(id) == target).then_some(id)
}

/// Initiator name for a host that tells none. QEMU takes on any.
#[must_use]
pub fn initiator_name(host: &str) -> String {
    let plain = |letter: char| match letter.to_ascii_lowercase() {
        letter @ ('a'..='z' | '0'..='9' | '.' | '-') => letter,
        _ => '-',
    };
    format!("iqn.2026-11.org.stackhand:host-{}", host.chars().map(plain).collect::<String>())
}

/// A volume as it is to be exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The volume.
    pub volume: VolumeId,
    /// Where its bytes are.
    pub path: PathBuf,
    /// How many there are.
    pub bytes: u64,
    /// Whether the path is a block device.
    pub is_device: bool,
    /// Who may log in, by initiator name.
    pub admitted: BTreeMap<String, Admission>,
}

/// One initiator's right to a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// CHAP user.
    pub user: String,
    /// CHAP password.
    pub password: Secret,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// A target of ours as it is found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeenTarget {
    /// The bytes that it gives away; absent while it gives none.
    pub path: Option<PathBuf>,
    /// Its size as initiators see it, where the exporter fixes it.
    pub fixed_bytes: Option<u64>,
    /// Who may log in, with the user's name and whether writes are refused.
    pub admitted: BTreeMap<String, SeenAdmission>,
    /// CHAP users of all initiators together, where they are not kept by initiator.
    pub users: Option<BTreeSet<String>>,
    /// Initiators that are logged in.
    pub sessions: BTreeSet<String>,
    /// Whether it lacks nothing that all targets have: portals, enabled, attributes.
    pub complete: bool,
}

/// One initiator's right as it is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenAdmission {
    /// CHAP user, where it belongs to this initiator alone.
    pub user: Option<String>,
    /// CHAP password, where it can be read back. Users' names follow from passwords' keys, so a
    /// password that cannot be read is told by its user.
    pub password: Option<Secret>,
    /// Whether writes are refused.
    pub read_only: bool,
}

impl Target {
    /// Users of all initiators, in order.
    fn users(&self) -> BTreeSet<&String> {
        self.admitted.values().map(|admission| &admission.user).collect()
    }

    /// Whether a target that is found does all that this one asks for, and no more.
    #[must_use]
    pub fn is_met_by(&self, seen: &SeenTarget) -> bool {
        seen.complete
            && seen.path.as_ref() == Some(&self.path)
            && seen.fixed_bytes.is_none_or(|bytes| bytes >= self.bytes)
            && seen.users.as_ref().is_none_or(|users| {
                users.iter().eq(self.users()) && users.len() == self.admitted.len()
            })
            && self.admitted.len() == seen.admitted.len()
            && self.admitted.iter().all(|(name, wanted)| {
                seen.admitted.get(name).is_some_and(|found| wanted.is_met_by(found))
            })
    }
}

impl Admission {
    /// Whether a right that is found is this one.
    #[must_use]
    pub fn is_met_by(&self, seen: &SeenAdmission) -> bool {
        seen.user.as_ref().is_none_or(|user| *user == self.user)
            && seen.read_only == self.read_only
            && seen.password.as_ref().is_none_or(|password| *password == self.password)
    }
}

/// Why an export could not be made or taken back.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The exporter as a whole cannot be used.
    #[error("cannot export volumes: {reason}")]
    Away {
        /// What is wrong and what helps.
        reason: String,
    },
    /// A call to the kernel failed.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Something that we did not make is in the way, or the wish cannot be met.
    #[error("cannot export {target}: {reason}")]
    Unable {
        /// The target.
        target: String,
        /// Why not, and what helps.
        reason: String,
    },
}

/// Exports volumes. All calls block.
pub trait Exporter: Send + Sync + fmt::Debug {
    /// Our targets, by volume. Changes nothing.
    ///
    /// # Errors
    ///
    /// Fails if the exporter as a whole cannot be used.
    fn observe(&self) -> Result<BTreeMap<VolumeId, SeenTarget>, ExportError>;

    /// Makes a target, or makes the one that is there be as wanted. Who stays admitted keeps its
    /// session; who is no longer admitted loses it.
    ///
    /// # Errors
    ///
    /// Fails if it cannot; nothing half-made can be reached.
    fn publish(&self, target: &Target) -> Result<(), ExportError>;

    /// Takes a target back, with the sessions that it has. One that is not there is taken back
    /// already.
    ///
    /// # Errors
    ///
    /// Fails if it cannot.
    fn withdraw(&self, volume: VolumeId) -> Result<(), ExportError>;

    /// Where others reach the targets; the first is told to them.
    fn portals(&self) -> &[SocketAddr];

    /// Number of the volume at its target.
    fn lun(&self) -> u32;
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn targets_are_told_from_ids_and_back() {
        let volume = VolumeId(Uuid::from_u128(5));
        assert_eq!(volume_of(&target_name(volume)), Some(volume));
        for name in [
            "iqn.2010-10.org.openstack:volume-00000000-0000-0000-0000-000000000005",
            "iqn.2026-11.org.stackhand:volume-5",
            "iqn.2026-11.org.stackhand:volume-{00000000-0000-0000-0000-000000000005}",
        ] {
            assert_eq!(volume_of(name), None, "{name}");
        }
    }

    #[test]
    fn initiator_names_hold_only_what_names_may_hold() {
        assert_eq!(initiator_name("Node_1.lan"), "iqn.2026-11.org.stackhand:host-node-1.lan");
    }
}
