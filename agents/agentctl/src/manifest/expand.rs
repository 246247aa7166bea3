//! Short forms of manifests, written out: what people leave out because it follows.
//!
//! * `flavor: a.nano` and `key_pairs: [me]` of an instance are what the manifest says of them;
//!   these two, `user_data` and `metadata` are told to its guest, in `guest`.
//! * `ports: [web]` of an instance is `ports: [{port: web}]`; so with volumes.
//! * `networks: [int1]` of an instance needs a port on each: one is made, called
//!   `<instance>-<network>`, with the instance's `security_groups`.
//! * A volume of an instance without `connection` needs an attachment: one is made, called
//!   `<instance>-<volume>`.
//! * `user_data: {text: …}` of an instance is encoded.
//! * `anti_affinity: web` is a label, by which the instances of the group are known later.
//! * `interfaces: [{network: int1}]` and `gateway: {network: ext1}` of a router need a port each:
//!   one is made, called `<router>-<network>`, or `<router>-<network>-<subnet>` where the subnet
//!   is named.
//!
//! Documents that are made here carry the label `made-for`, so that they go with their owner.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use stackhand_model::{Kind, id_from_name};
use uuid::Uuid;

use super::shelf::Shelf;
use super::source::Piece;
use super::spots::Origin;

/// Names the object for whose sake agentctl made a document, as `Kind/id`.
pub(crate) const MADE_FOR: &str = "made-for";

/// Names a group of instances that are kept on different hosts.
pub(crate) const ANTI_AFFINITY: &str = "anti-affinity";

/// Writes out the short forms. Documents that are too wrong to be understood stay as they are;
/// reading them tells why.
///
/// # Errors
///
/// Flavors and key pairs that are wrong, and names of ones that are not there.
pub(crate) fn expand(mut pieces: Vec<Piece>, cloud: &str) -> Result<Vec<Piece>, Vec<String>> {
    let shelf = Shelf::take(&mut pieces)?;
    let mut out = Vec::with_capacity(pieces.len());
    let mut problems = Vec::new();
    for mut piece in pieces {
        let kind = piece.value["kind"].as_str().and_then(|kind| kind.parse::<Kind>().ok());
        if let (Some(kind), Value::Object(document)) = (kind, &mut piece.value) {
            document.insert("kind".into(), kind.as_str().into());
            let name = document.get("name").and_then(Value::as_str).map(str::to_owned);
            let mut labels = Map::new();
            if let (Some(name), Some(Value::Object(spec))) = (name, document.get_mut("spec")) {
                let mut owner =
                    Owner { cloud, kind, name: &name, origin: &piece.origin, made: Vec::new() };
                match kind {
                    Kind::Instance => {
                        if let Err((field, problem)) = shelf.fill(spec) {
                            let at = piece.origin.of(&field);
                            problems.push(format!("{at}: {kind} {name}: {field}: {problem}"));
                        }
                        owner.instance(spec);
                        if let Some(group) = spec.remove("anti_affinity") {
                            labels.insert(ANTI_AFFINITY.into(), group);
                        }
                    }
                    Kind::Router => owner.router(spec),
                    _ => {}
                }
                out.extend(owner.made);
            }
            if !labels.is_empty()
                && let Value::Object(given) =
                    document.entry("labels").or_insert_with(|| Map::new().into())
            {
                given.extend(labels);
            }
        }
        out.push(piece);
    }
    if problems.is_empty() { Ok(out) } else { Err(problems) }
}

struct Owner<'a> {
    cloud: &'a str,
    kind: Kind,
    name: &'a str,
    origin: &'a Origin,
    made: Vec<Piece>,
}

impl Owner<'_> {
    /// Makes a document because of a field of the owner's.
    fn make(&mut self, field: &str, kind: Kind, name: &str, spec: &Value) {
        let id = id_from_name(self.cloud, self.kind, self.name);
        let value = json!({
            "kind": kind.as_str(),
            "name": name,
            "labels": {MADE_FOR: format!("{}/{id}", self.kind)},
            "spec": spec,
        });
        self.made.push(Piece { origin: self.origin.within(&format!("spec.{field}")), value });
    }

    fn instance(&mut self, spec: &mut Map<String, Value>) {
        long_form(spec, "ports", "port");
        long_form(spec, "volumes", "volume");
        self.networks(spec);
        if let Some(Value::Object(guest)) = spec.get_mut("guest")
            && let Some(Value::Object(data)) = guest.get("user_data")
            && let (1, Some(text)) = (data.len(), data.get("text").and_then(Value::as_str))
        {
            let encoded = STANDARD.encode(text);
            guest.insert("user_data".into(), encoded.into());
        }
        let host = spec.get("host").cloned();
        for (index, volume) in list(spec, "volumes").enumerate() {
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
            self.make(
                &format!("volumes[{index}]"),
                Kind::Attachment,
                &attachment_name(self.name, &name),
                &json!({"volume": name, "connector": connector}),
            );
        }
    }

    /// Makes a port on each of an instance's networks.
    fn networks(&mut self, spec: &mut Map<String, Value>) {
        long_form(spec, "networks", "network");
        let whole = spec.get("networks").and_then(Value::as_array).is_some_and(|networks| {
            networks.iter().all(|it| it.get("network").is_some_and(Value::is_string))
        });
        // What is not understood stays, and is refused as an unknown field or a wrong type.
        if !whole {
            return;
        }
        let Some(Value::Array(networks)) = spec.remove("networks") else { return };
        let groups = spec.remove("security_groups");
        let host = spec.get("host").cloned();
        let mut ports = Vec::new();
        for (index, network) in networks.into_iter().enumerate() {
            let Value::Object(mut port) = network else { continue };
            let name = port.get("network").and_then(Value::as_str).unwrap_or_default();
            let name = format!("{}-{name}", self.name);
            let fixed: Map<String, Value> = ["subnet", "address"]
                .into_iter()
                .filter_map(|key| port.remove_entry(key))
                .collect();
            if !fixed.is_empty() {
                port.entry("fixed_ips").or_insert_with(|| json!([fixed]));
            }
            let followed = [("security_groups", &groups), ("host", &host)];
            for (key, value) in followed {
                if let Some(value) = value {
                    port.entry(key).or_insert_with(|| value.clone());
                }
            }
            ports.push(json!({"port": name}));
            self.make(&format!("networks[{index}]"), Kind::Port, &name, &port.into());
        }
        if let Value::Array(given) = spec.entry("ports").or_insert_with(|| json!([])) {
            given.extend(ports);
        }
    }

    fn router(&mut self, spec: &mut Map<String, Value>) {
        let host = spec.get("host").cloned();
        for (index, end) in list(spec, "interfaces").enumerate() {
            if let Value::Object(fields) = &*end
                && fields.get("network").is_some_and(Value::is_string)
            {
                let field = format!("interfaces[{index}]");
                *end = self.router_port(&field, fields, host.as_ref(), "router-interface");
            }
        }
        if let Some(Value::Object(gateway)) = spec.get_mut("gateway")
            && gateway.get("network").is_some_and(Value::is_string)
        {
            let name = self.router_port("gateway", gateway, host.as_ref(), "router-gateway");
            for used in ["network", "subnet", "address"] {
                gateway.remove(used);
            }
            gateway.insert("port".into(), name);
        }
    }

    /// Makes the port at one end of a router. Returns its name.
    fn router_port(
        &mut self,
        field: &str,
        end: &Map<String, Value>,
        host: Option<&Value>,
        owner: &str,
    ) -> Value {
        let text = |key: &str| end.get(key).and_then(Value::as_str);
        let network = text("network").unwrap_or_default();
        let mut name = format!("{}-{network}", self.name);
        if let Some(subnet) = text("subnet") {
            name = format!("{name}-{subnet}");
        }
        let mut port = json!({"network": network, "owner": owner, "port_security": false});
        if let Some(host) = host {
            port["host"] = host.clone();
        }
        let fixed: Map<String, Value> = ["subnet", "address"]
            .into_iter()
            .filter_map(|key| end.get(key).map(|value| (key.to_owned(), value.clone())))
            .collect();
        if !fixed.is_empty() {
            port["fixed_ips"] = json!([fixed]);
        }
        self.make(field, Kind::Port, &name, &port);
        name.into()
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
        let origin = Origin::of_text("m", "", 1).remove(0);
        let made = expand(vec![Piece { origin, value }], "default").unwrap();
        made.into_iter().map(|piece| piece.value).collect()
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
    fn an_instance_gets_a_port_on_every_network_it_names() {
        let made = expanded(json!({
            "kind": "Instance", "name": "demo",
            "spec": {
                "ports": ["own"],
                "networks": ["int1", {"network": "int2", "address": "10.0.0.9", "security_groups": []}],
                "security_groups": ["web"],
                "anti_affinity": "web",
                "user_data": {"text": "#!/bin/sh"},
            },
        }));
        assert_eq!(made[0]["name"], "demo-int1");
        assert_eq!(made[0]["spec"], json!({"network": "int1", "security_groups": ["web"]}));
        let fixed = json!([{"address": "10.0.0.9"}]);
        assert_eq!(
            made[1]["spec"],
            json!({"network": "int2", "fixed_ips": fixed, "security_groups": []})
        );
        let ports = json!([{"port": "own"}, {"port": "demo-int1"}, {"port": "demo-int2"}]);
        assert_eq!(
            made[2]["spec"],
            json!({"ports": ports, "guest": {"user_data": "IyEvYmluL3No"}})
        );
        assert_eq!(made[2]["labels"], json!({ANTI_AFFINITY: "web"}));
    }

    #[test]
    fn what_cannot_be_understood_stays_as_it_is() {
        for value in [
            json!(7),
            json!({"kind": "Instnace", "name": "x", "spec": {"ports": ["a"]}}),
            json!({"kind": "Instance", "spec": {"ports": ["a"]}}),
            json!({"kind": "Instance", "name": "x", "spec": "none"}),
            json!({"kind": "Router", "name": "x", "spec": {"interfaces": 7, "gateway": []}}),
            json!({"kind": "Instance", "name": "x", "spec": {"networks": [7], "guest": 3}}),
        ] {
            assert_eq!(expanded(value.clone()), [value]);
        }
    }
}
