//! What is wanted of the storage agent. The words are Cinder's.

use std::net::IpAddr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Broken, Secret, broken};
use crate::{ImageId, ImageSpec, SnapshotId, VolumeId};

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
    /// What the image in `source` is: the image document's spec, filled in by the controller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageSpec>,
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
    /// iSCSI initiator name, for a remote host. Absent: one made from the host's name, which a
    /// QEMU can take on; a host's kernel needs the name that it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initiator: Option<String>,
    /// Who speaks iSCSI there.
    #[serde(default, skip_serializing_if = "IscsiClient::is_qemu")]
    pub client: IscsiClient,
    /// Address it connects from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
}

/// Who speaks iSCSI on the side of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum IscsiClient {
    /// QEMU itself: the host needs no initiator and has no device that could go stale.
    #[default]
    Qemu,
    /// The host's kernel by open-iscsi: the guest is given a block device of the host.
    Host,
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
        /// Name under which the client must log in: the target lets in nobody else.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        initiator: Option<String>,
        /// Who speaks iSCSI.
        #[serde(default, skip_serializing_if = "IscsiClient::is_qemu")]
        client: IscsiClient,
        /// CHAP user.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        username: Option<String>,
        /// CHAP password. It goes to QEMU by a libvirt secret and to open-iscsi by its database,
        /// never by an argument or a log.
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

impl IscsiClient {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
    fn is_qemu(&self) -> bool {
        *self == Self::Qemu
    }
}

impl VolumeSpec {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        if self.host.is_empty() {
            return broken("host", "is empty");
        }
        if !(1..=1_048_576).contains(&self.size_gib) {
            return broken("size_gib", format!("{} is outside 1 to 1048576", self.size_gib));
        }
        match (&self.source, &self.image) {
            (VolumeSource::Image(_), Some(image)) => {
                image.check().map_err(|(field, problem)| (format!("image.{field}"), problem))
            }
            (
                VolumeSource::Blank | VolumeSource::Snapshot(_) | VolumeSource::Volume(_),
                Some(_),
            ) => broken("image", "belongs to a source that is an image"),
            // Which image it is, a controller knows; the agent asks for it.
            (_, None) => Ok(()),
        }
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
        let remedy = "see /etc/iscsi/initiatorname.iscsi of the host";
        match (&self.connector.initiator, self.connector.client) {
            (Some(name), _) if !is_iscsi_name(name) => broken(
                "connector.initiator",
                format!("{name:?} is not an iSCSI name of lower case; {remedy}"),
            ),
            (None, IscsiClient::Host) => broken(
                "connector.initiator",
                format!("is missing, and the client is the host's kernel; {remedy}"),
            ),
            _ => Ok(()),
        }
    }
}

/// Whether the text can name an initiator or a target: it becomes part of paths and commands.
#[must_use]
pub fn is_iscsi_name(text: &str) -> bool {
    let known = ["iqn.", "eui.", "naa."].iter().any(|prefix| text.starts_with(prefix));
    let plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-:".contains(&byte);
    known && (5..=223).contains(&text.len()) && text.bytes().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connector_of_a_kernel_needs_the_name_that_the_kernel_has() {
        let spec = |initiator: Option<&str>, client| AttachmentSpec {
            volume: VolumeId(uuid::Uuid::nil()),
            connector: Connector {
                host: "there".into(),
                initiator: initiator.map(str::to_owned),
                client,
                address: None,
            },
            read_only: false,
        };
        assert_eq!(spec(None, IscsiClient::Qemu).check(), Ok(()));
        let name = "iqn.1993-08.org.debian:01:abc";
        assert_eq!(spec(Some(name), IscsiClient::Host).check(), Ok(()));
        for bad in ["", "iqn.", "iqn.2026/../../x", "iqn.X", "debian", "iqn.a b"] {
            let (field, _) = spec(Some(bad), IscsiClient::Qemu).check().unwrap_err();
            assert_eq!(field, "connector.initiator", "{bad}");
        }
        let (_, problem) = spec(None, IscsiClient::Host).check().unwrap_err();
        assert!(problem.contains("initiatorname.iscsi"), "{problem}");
    }
}
