//! Resource documents: what controllers ask of agents, and what agents answer.
//!
//! A [`Document`] is a wish for one object: a network, a port, an instance, a volume. Agents
//! keep the documents they accepted and answer with a [`Status`] for each. This crate holds the
//! types, their validation and their JSON Schema; it does no I/O and knows nothing of time.
//!
//! Ids are typed, so that a port's id cannot be passed where a network's belongs. What arrives
//! from outside is parsed once, by [`Document::from_value`] or [`parse()`], and trusted from then on.

mod document;
mod error;
mod ids;
mod net;
mod parse;
mod references;
mod schema;
mod spec;
mod status;
mod suggest;

pub use document::{Document, InvalidName, Labels, Name, Spec};
pub use error::{DocumentError, ErrorCode};
pub use ids::{
    AgentKind, AttachmentId, FloatingIpId, HostId, ImageId, InstanceId, Kind, NetworkId, ObjectRef,
    PortId, QosPolicyId, RouterId, SecurityGroupId, SnapshotId, UnknownKind, VolumeId,
    id_from_name,
};
pub use net::{InvalidMac, InvalidVlan, InvalidVni, MacAddr, VlanId, Vni};
pub use parse::{parse, parse_json, parse_values};
pub use references::resolve_names;
pub use schema::schema;
pub use spec::compute;
pub use spec::guest;
pub use spec::network;
pub use spec::storage;
pub use spec::{Secret, compute::*, guest::*, network::*, storage::*};
pub use status::{State, Status};
pub use suggest::nearest;
