//! JSON Schema of documents.

use schemars::{Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Value, json};

use crate::{
    AttachmentSpec, FloatingIpSpec, HostSpec, ImageSpec, InstanceSpec, Kind, NetworkSpec, PortSpec,
    QosPolicySpec, RouterSpec, SecurityGroupSpec, SnapshotSpec, VolumeSpec,
};

/// The JSON Schema (draft 2020-12) of documents of `kind`.
#[must_use]
pub fn schema(kind: Kind) -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let spec = spec_schema(kind, &mut generator);
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind.as_str(),
        "type": "object",
        "additionalProperties": false,
        "required": ["kind", "id", "name", "spec"],
        "properties": {
            "kind": {"const": kind.as_str()},
            "id": {"type": "string", "format": "uuid"},
            "name": {"type": "string", "minLength": 1, "maxLength": 255},
            "generation": {"type": "integer", "minimum": 0, "default": 0},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "spec": spec,
        },
        "$defs": generator.take_definitions(true),
    })
}

fn spec_schema(kind: Kind, generator: &mut SchemaGenerator) -> Schema {
    match kind {
        Kind::Host => generator.subschema_for::<HostSpec>(),
        Kind::QosPolicy => generator.subschema_for::<QosPolicySpec>(),
        Kind::SecurityGroup => generator.subschema_for::<SecurityGroupSpec>(),
        Kind::Network => generator.subschema_for::<NetworkSpec>(),
        Kind::Port => generator.subschema_for::<PortSpec>(),
        Kind::Router => generator.subschema_for::<RouterSpec>(),
        Kind::FloatingIp => generator.subschema_for::<FloatingIpSpec>(),
        Kind::Image => generator.subschema_for::<ImageSpec>(),
        Kind::Volume => generator.subschema_for::<VolumeSpec>(),
        Kind::Snapshot => generator.subschema_for::<SnapshotSpec>(),
        Kind::Attachment => generator.subschema_for::<AttachmentSpec>(),
        Kind::Instance => generator.subschema_for::<InstanceSpec>(),
    }
}
