//! Kinds and typed ids.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::suggest::nearest;

/// The kinds of document, in the order in which a controller applies them.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum Kind {
    /// A host as the network sees it: tunnel address and bridge mappings.
    Host,
    /// A limit on a port's bandwidth or packet rate, or a DSCP mark.
    QosPolicy,
    /// Allow rules shared by ports.
    SecurityGroup,
    /// A broadcast domain with its subnets.
    Network,
    /// An attachment point of an instance or router.
    Port,
    /// Joins subnets and leads to an external network.
    Router,
    /// An external address mapped onto a fixed one.
    FloatingIp,
    /// What a disk starts from.
    Image,
    /// A block device.
    Volume,
    /// A point-in-time copy of a volume.
    Snapshot,
    /// One volume given to one host.
    Attachment,
    /// A virtual machine.
    Instance,
}

/// A kind that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no kind {found:?}{}", .nearest.map(|kind| format!("; did you mean {kind}?")).unwrap_or_default())]
pub struct UnknownKind {
    /// What was written.
    pub found: String,
    /// The kind whose name is nearest, if one is near.
    pub nearest: Option<Kind>,
}

/// The agents, one per kind of host work.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum AgentKind {
    /// Instances, by libvirt.
    Compute,
    /// Ports, bridges, routers, DHCP, by netlink and nftables.
    Network,
    /// Volumes and exports, by LVM, files and iSCSI.
    Storage,
}

impl AgentKind {
    /// All agents.
    pub const ALL: [Self; 3] = [Self::Compute, Self::Network, Self::Storage];

    /// The short name: `compute`, `network`, `storage`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Network => "network",
            Self::Storage => "storage",
        }
    }

    /// The program's name: `compute-agent` and so on.
    #[must_use]
    pub fn binary(self) -> &'static str {
        match self {
            Self::Compute => "compute-agent",
            Self::Network => "network-agent",
            Self::Storage => "storage-agent",
        }
    }

    /// The bus topic of the agent's own API.
    #[must_use]
    pub fn topic(self) -> &'static str {
        match self {
            Self::Compute => "stackhand.compute",
            Self::Network => "stackhand.network",
            Self::Storage => "stackhand.storage",
        }
    }
}

impl fmt::Display for AgentKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for AgentKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|agent| agent.as_str() == text || agent.binary() == text)
            .ok_or_else(|| format!("there is no agent {text:?}; use compute, network or storage"))
    }
}

impl Kind {
    /// All kinds, in the order of application.
    pub const ALL: [Self; 12] = [
        Self::Host,
        Self::QosPolicy,
        Self::SecurityGroup,
        Self::Network,
        Self::Port,
        Self::Router,
        Self::FloatingIp,
        Self::Image,
        Self::Volume,
        Self::Snapshot,
        Self::Attachment,
        Self::Instance,
    ];

    /// The name as documents write it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Host => "Host",
            Self::QosPolicy => "QosPolicy",
            Self::SecurityGroup => "SecurityGroup",
            Self::Network => "Network",
            Self::Port => "Port",
            Self::Router => "Router",
            Self::FloatingIp => "FloatingIp",
            Self::Image => "Image",
            Self::Volume => "Volume",
            Self::Snapshot => "Snapshot",
            Self::Attachment => "Attachment",
            Self::Instance => "Instance",
        }
    }

    /// The agent that realises documents of this kind.
    #[must_use]
    pub fn agent(self) -> AgentKind {
        match self {
            Self::Host
            | Self::QosPolicy
            | Self::SecurityGroup
            | Self::Network
            | Self::Port
            | Self::Router
            | Self::FloatingIp => AgentKind::Network,
            Self::Image | Self::Instance => AgentKind::Compute,
            Self::Volume | Self::Snapshot | Self::Attachment => AgentKind::Storage,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = UnknownKind;

    /// Reads a kind; case and hyphens do not matter, and a plural `s` is allowed.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain: String =
            text.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase();
        let singular = plain.strip_suffix("ies").map(|stem| format!("{stem}y"));
        Self::ALL
            .into_iter()
            .find(|kind| {
                let name = kind.as_str().to_lowercase();
                plain == name
                    || plain.strip_suffix('s') == Some(&name)
                    || singular.as_deref() == Some(&name)
            })
            .ok_or_else(|| UnknownKind {
                found: text.to_owned(),
                nearest: nearest(text, Self::ALL.map(Self::as_str))
                    .and_then(|name| Self::ALL.into_iter().find(|kind| kind.as_str() == name)),
            })
    }
}

/// Names one object: its kind and id. Written `Port/<uuid>`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(deny_unknown_fields)]
pub struct ObjectRef {
    /// What it is.
    pub kind: Kind,
    /// Which one.
    pub id: Uuid,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.id)
    }
}

impl FromStr for ObjectRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, id) =
            text.split_once('/').ok_or_else(|| format!("{text:?} is not of the form Kind/id"))?;
        Ok(Self {
            kind: kind.parse().map_err(|error: UnknownKind| error.to_string())?,
            id: id.parse().map_err(|error| format!("{id:?} is not a UUID: {error}"))?,
        })
    }
}

/// Derives the id of an object from its cloud and name, the same on every controller: the
/// UUIDv5 of `stackhand:<cloud>/<kind>/<name>` in the URL namespace.
#[must_use]
pub fn id_from_name(cloud: &str, kind: Kind, name: &str) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_URL, format!("stackhand:{cloud}/{kind}/{name}").as_bytes())
}

macro_rules! resource_ids {
    ($($(#[$doc:meta])* $name:ident is $kind:ident;)+) => {$(
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
        )]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// The object this id names.
            #[must_use]
            pub fn object(self) -> ObjectRef {
                ObjectRef { kind: Kind::$kind, id: self.0 }
            }

            /// The first eleven characters of the id, as OpenStack puts them into link names.
            #[must_use]
            pub fn short(self) -> String {
                let mut short = self.0.to_string();
                short.truncate(11);
                short
            }

            /// The bytes that the first eleven characters show.
            #[must_use]
            pub fn beginning(self) -> [u8; 5] {
                let [a, b, c, d, e, ..] = self.0.into_bytes();
                [a, b, c, d, e]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    )+};
}

resource_ids! {
    /// Identifies a host document.
    HostId is Host;
    /// Identifies a network.
    NetworkId is Network;
    /// Identifies a port.
    PortId is Port;
    /// Identifies a security group.
    SecurityGroupId is SecurityGroup;
    /// Identifies a QoS policy.
    QosPolicyId is QosPolicy;
    /// Identifies a router.
    RouterId is Router;
    /// Identifies a floating IP.
    FloatingIpId is FloatingIp;
    /// Identifies an image.
    ImageId is Image;
    /// Identifies an instance.
    InstanceId is Instance;
    /// Identifies a volume.
    VolumeId is Volume;
    /// Identifies a snapshot.
    SnapshotId is Snapshot;
    /// Identifies an attachment.
    AttachmentId is Attachment;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_read_as_people_write_them() {
        for (text, kind) in [
            ("Port", Kind::Port),
            ("ports", Kind::Port),
            ("security-group", Kind::SecurityGroup),
            ("floatingips", Kind::FloatingIp),
            ("QosPolicies", Kind::QosPolicy),
        ] {
            assert_eq!(text.parse(), Ok(kind));
        }
    }

    #[test]
    fn a_misspelt_kind_gets_the_nearest_one_suggested() {
        let error = "Netwrok".parse::<Kind>().unwrap_err();
        assert_eq!(error.to_string(), "there is no kind \"Netwrok\"; did you mean Network?");
    }

    #[test]
    fn ids_from_names_are_stable_and_differ_by_cloud_kind_and_name() {
        let id = id_from_name("default", Kind::Port, "web");
        assert_eq!(id, id_from_name("default", Kind::Port, "web"));
        assert_eq!(id.to_string(), "3b61dab4-46b4-536e-acb6-84fb5c6309a9");
        assert_ne!(id, id_from_name("other", Kind::Port, "web"));
        assert_ne!(id, id_from_name("default", Kind::Network, "web"));
    }

    #[test]
    fn every_kind_is_listed_once_and_round_trips() {
        for kind in Kind::ALL {
            assert_eq!(kind.as_str().parse(), Ok(kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
    }
}
