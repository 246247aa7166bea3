//! What is wanted of the storage agent. The words are Cinder's.

use std::net::IpAddr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Broken, Secret, broken};
use crate::{ImageId, SnapshotId, VolumeId};

/// A block device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeSpec {
    /// The storage host that keeps it.
    pub host: String,
    /// Size in GiB (2^30 bytes), 1 to 1048576. It only grows.
    pub size_gib: u64,
    /// Backend by its name in the agent's configuration. Absent: the agent's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// What it starts from. Used once, when it is made.
    #[serde(default)]
    pub source: VolumeSource,
    /// Whether more than one host may attach it at once.
    #[serde(default)]
    pub multiattach: bool,
}

/// What a volume starts from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum VolumeSource {
    /// Zeroes.
    #[default]
    Blank,
    /// An image's contents.
    Image(ImageId),
    /// A snapshot's contents.
    Snapshot(SnapshotId),
    /// Another volume's contents at this moment.
    Volume(VolumeId),
}

/// A point-in-time copy of a volume, kept where the volume is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotSpec {
    /// The volume.
    pub volume: VolumeId,
}

/// One volume given to one host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachmentSpec {
    /// The volume.
    pub volume: VolumeId,
    /// Who gets it.
    pub connector: Connector,
    /// Whether writes are refused.
    #[serde(default)]
    pub read_only: bool,
}

/// Facts a host gives so that a volume can be exported to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Connector {
    /// Host name. The volume's own host gets a local path.
    pub host: String,
    /// iSCSI initiator name, for a remote host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initiator: Option<String>,
    /// Address it connects from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
}

/// How a host reaches an attached volume: the storage agent's answer, which goes into the
/// instance document as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum Connection {
    /// A file on the same host.
    File {
        /// Absolute path.
        path: PathBuf,
        /// Format of the file.
        format: FileFormat,
    },
    /// A block device on the same host.
    Block {
        /// Absolute path.
        path: PathBuf,
    },
    /// A LUN of an iSCSI target.
    Iscsi {
        /// `address:port` of the target; IPv6 addresses in brackets.
        portal: String,
        /// The target's name.
        iqn: String,
        /// The volume's number at the target.
        lun: u32,
        /// CHAP user.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        username: Option<String>,
        /// CHAP password.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        password: Option<Secret>,
    },
}

/// Format of a disk in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FileFormat {
    /// The plain bytes.
    Raw,
    /// QEMU's format.
    Qcow2,
}

impl VolumeSpec {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        if self.host.is_empty() {
            return broken("host", "is empty");
        }
        if !(1..=1_048_576).contains(&self.size_gib) {
            return broken("size_gib", format!("{} is outside 1 to 1048576", self.size_gib));
        }
        Ok(())
    }
}

impl SnapshotSpec {
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "every spec has a check")]
    pub(crate) fn check(&self) -> Result<(), Broken> {
        Ok(())
    }
}

impl AttachmentSpec {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        if self.connector.host.is_empty() {
            return broken("connector.host", "is empty");
        }
        if let Some(name) = &self.connector.initiator
            && !["iqn.", "eui.", "naa."].iter().any(|prefix| name.starts_with(prefix))
        {
            return broken(
                "connector.initiator",
                format!("{name:?} is not an iSCSI name; see /etc/iscsi/initiatorname.iscsi"),
            );
        }
        Ok(())
    }
}
