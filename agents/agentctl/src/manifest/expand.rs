//! Short forms of manifests, written out: what people leave out because it follows.
//!
//! * `ports: [web]` of an instance is `ports: [{port: web}]`; so with volumes.
//! * A volume of an instance without `connection` needs an attachment: one is made, called
//!   `<instance>-<volume>`.
//! * `interfaces: [{network: int1}]` and `gateway: {network: ext1}` of a router need a port each:
//!   one is made, called `<router>-<network>`.
//!
//! Documents that are made here carry the label `made-for`, so that they go with their owner.

use serde_json::{Map, Value, json};
use stackhand_model::{Kind, id_from_name};
use uuid::Uuid;

use super::source::Piece;

/// Names the object for whose sake agentctl made a document, as `Kind/id`.
pub(crate) const MADE_FOR: &str = "made-for";

/// Writes out the short forms. Documents that are too wrong to be understood stay as they are;
/// reading them tells why.
pub(crate) fn expand(pieces: Vec<Piece>, cloud: &str) -> Vec<Piece> {
    let mut out = Vec::with_capacity(pieces.len());
    for mut piece in pieces {
        let kind = piece.value["kind"].as_str().and_then(|kind| kind.parse::<Kind>().ok());
        if let (Some(kind), Value::Object(document)) = (kind, &mut piece.value) {
            document.insert("kind".into(), kind.as_str().into());
            let name = document.get("name").and_then(Value::as_str).map(str::to_owned);
            if let (Some(name), Some(Value::Object(spec))) = (name, document.get_mut("spec")) {
                let owner = Owner { cloud, kind, name: &name };
                let made = match kind {
                    Kind::Instance => owner.instance(spec),
                    Kind::Router => owner.router(spec),
                    _ => Vec::new(),
                };
                let place = &piece.place;
                out.extend(made.into_iter().map(|value| Piece { place: place.clone(), value }));
            }
        }
        out.push(piece);
    }
    out
}

struct Owner<'a> {
    cloud: &'a str,
    kind: Kind,
    name: &'a str,
}

impl Owner<'_> {
    fn make(&self, kind: Kind, name: &str, spec: &Value) -> Value {
        let id = id_from_name(self.cloud, self.kind, self.name);
        json!({
            "kind": kind.as_str(),
            "name": name,
            "labels": {MADE_FOR: format!("{}/{id}", self.kind)},
            "spec": spec,
        })
    }

    fn instance(&self, spec: &mut Map<String, Value>) -> Vec<Value> {
        long_form(spec, "ports", "port");
        long_form(spec, "volumes", "volume");
        let host = spec.get("host").cloned();
        let mut made = Vec::new();
        for volume in list(spec, "volumes") {
            let Some(name) = volume.get("volume").and_then(Value::as_str).map(str::to_owned) else {
                continue;
            };
            if volume.get("connection").is_some() {
                continue;
            }
            let mut connector = Map::new();
            if let Some(host) = &host {
                connector.insert("host".into(), host.clone());
            }
            made.push(self.make(
                Kind::Attachment,
                &attachment_name(self.name, &name),
                &json!({"volume": name, "connector": connector}),
            ));
        }
        made
    }

    fn router(&self, spec: &mut Map<String, Value>) -> Vec<Value> {
        let host = spec.get("host").cloned();
        let mut made = Vec::new();
        let mut port = |network: &str, end: &Map<String, Value>, owner: &str| {
            let name = format!("{}-{network}", self.name);
            let mut port = json!({"network": network, "owner": owner, "port_security": false});
            if let Some(host) = &host {
                port["host"] = host.clone();
            }
            match (end.get("subnet"), end.get("address")) {
                (None, None) => {}
                (subnet, address) => {
                    let mut fixed = Map::new();
                    let given = [("subnet", subnet), ("address", address)];
                    for (key, value) in given {
                        fixed.extend(value.map(|value| (key.to_owned(), value.clone())));
                    }
                    port["fixed_ips"] = json!([fixed]);
                }
            }
            made.push(self.make(Kind::Port, &name, &port));
            Value::String(name)
        };
        for end in list(spec, "interfaces") {
            if let Value::Object(fields) = &*end
                && let Some(network) = fields.get("network").and_then(Value::as_str)
            {
                *end = port(network, fields, "router-interface");
            }
        }
        if let Some(Value::Object(gateway)) = spec.get_mut("gateway")
            && let Some(network) = gateway.get("network").and_then(Value::as_str).map(str::to_owned)
        {
            let name = port(&network, gateway, "router-gateway");
            for used in ["network", "subnet", "address"] {
                gateway.remove(used);
            }
            gateway.insert("port".into(), name);
        }
        made
    }
}

/// The name of the attachment of a volume to an instance.
pub(crate) fn attachment_name(instance: &str, volume: &str) -> String {
    // A volume given by its id makes a long name; its first part is enough beside the instance.
    match volume.parse::<Uuid>() {
        Ok(id) => format!("{instance}-{}", &id.to_string()[..8]),
        Err(_) => format!("{instance}-{volume}"),
    }
}

/// Turns texts in a list into objects with that text under `key`.
fn long_form(spec: &mut Map<String, Value>, field: &str, key: &str) {
    for item in list(spec, field) {
        if item.is_string() {
            let text = item.take();
            *item = Value::Object(Map::from_iter([(key.to_owned(), text)]));
        }
    }
}

fn list<'a>(
    spec: &'a mut Map<String, Value>,
    field: &str,
) -> impl Iterator<Item = &'a mut Value> + use<'a> {
    spec.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(value: Value) -> Vec<Value> {
        let piece = Piece { place: "m".into(), value };
        expand(vec![piece], "default").into_iter().map(|piece| piece.value).collect()
    }

    #[test]
    fn names_in_place_of_objects_are_written_out_and_attachments_made() {
        let made = expanded(json!({
            "kind": "instance", "name": "demo",
            "spec": {"host": "n1", "ports": ["web"], "volumes": ["v1", {"volume": "v2", "device": "vdc"}]},
        }));
        assert_eq!(made.len(), 3);
        assert_eq!(made[0]["name"], "demo-v1");
        assert_eq!(made[0]["spec"], json!({"volume": "v1", "connector": {"host": "n1"}}));
        let owner = id_from_name("default", Kind::Instance, "demo");
        assert_eq!(made[1]["labels"][MADE_FOR], format!("Instance/{owner}"));
        assert_eq!(made[2]["kind"], "Instance");
        assert_eq!(made[2]["spec"]["ports"], json!([{"port": "web"}]));
        assert_eq!(
            made[2]["spec"]["volumes"],
            json!([{"volume": "v1"}, {"volume": "v2", "device": "vdc"}])
        );
    }

    #[test]
    fn a_connection_that_is_given_needs_no_attachment() {
        let made = expanded(json!({
            "kind": "Instance", "name": "demo",
            "spec": {"volumes": [{"volume": "v1", "connection": {"type": "block", "path": "/dev/x"}}]},
        }));
        assert_eq!(made.len(), 1);
    }

    #[test]
    fn a_router_gets_a_port_on_every_network_it_names() {
        let made = expanded(json!({
            "kind": "Router", "name": "r1",
            "spec": {
                "host": "n1",
                "interfaces": ["own-port", {"network": "int1", "address": "192.168.0.1"}],
                "gateway": {"network": "ext1", "snat": false},
            },
        }));
        assert_eq!(made[0]["name"], "r1-int1");
        assert_eq!(made[0]["spec"]["fixed_ips"], json!([{"address": "192.168.0.1"}]));
        assert_eq!(made[1]["name"], "r1-ext1");
        assert_eq!(made[1]["spec"]["owner"], "router-gateway");
        assert_eq!(made[2]["spec"]["interfaces"], json!(["own-port", "r1-int1"]));
        assert_eq!(made[2]["spec"]["gateway"], json!({"snat": false, "port": "r1-ext1"}));
    }

    #[test]
    fn what_cannot_be_understood_stays_as_it_is() {
        for value in [
            json!(7),
            json!({"kind": "Instnace", "name": "x", "spec": {"ports": ["a"]}}),
            json!({"kind": "Instance", "spec": {"ports": ["a"]}}),
            json!({"kind": "Instance", "name": "x", "spec": "none"}),
            json!({"kind": "Router", "name": "x", "spec": {"interfaces": 7, "gateway": []}}),
        ] {
            assert_eq!(expanded(value.clone()), [value]);
        }
    }
}
