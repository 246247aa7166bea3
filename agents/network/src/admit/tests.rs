use std::sync::Arc;

use serde_json::{Value, json};
use stackhand_model::Document;
use stackhand_runtime::agent::Held;
use uuid::Uuid;

use super::*;

fn put(desired: &mut Desired, kind: &str, id: u128, name: &str, spec: &Value) -> ObjectRef {
    let value = json!({"kind": kind, "id": Uuid::from_u128(id), "name": name, "spec": spec});
    let document = Arc::new(Document::from_value(&value).unwrap());
    let object = document.object();
    desired.objects.insert(object, Held { document, deleting: false });
    object
}

const NET: u128 = 1 << 100;
const PORT: u128 = 2 << 100;

fn world() -> Desired {
    let mut desired = Desired::default();
    let net = json!({"type": "vxlan", "segment": 7, "subnets": [
        {"name": "main", "cidr": "10.0.0.0/24", "dhcp_address": "10.0.0.2"}]});
    put(&mut desired, "Network", NET, "blue", &net);
    put(&mut desired, "Port", PORT, "web", &port("fa:16:3e:00:00:01", "main", "10.0.0.5"));
    desired
}

fn port(mac: &str, subnet: &str, address: &str) -> Value {
    json!({"network": Uuid::from_u128(NET), "host": "one", "mac": mac,
           "fixed_ips": [{"subnet": subnet, "address": address}]})
}

fn refusal(kind: &str, id: u128, spec: &Value) -> (String, Option<String>) {
    let mut desired = world();
    let object = put(&mut desired, kind, id, "new", spec);
    let refusal = admit(&desired, &[object].into()).unwrap_err();
    assert_eq!((refusal.code, refusal.object), (ErrorCode::Conflict, Some(object)));
    (refusal.message, refusal.field)
}

#[test]
fn a_good_world_is_admitted_and_so_is_a_port_whose_network_may_come() {
    let mut desired = world();
    let all: BTreeSet<ObjectRef> = desired.objects.keys().copied().collect();
    admit(&desired, &all).unwrap();
    let lonely = json!({"network": Uuid::from_u128(99), "host": "one", "mac": "fa:16:3e:00:00:09"});
    let object = put(&mut desired, "Port", 9 << 100, "lonely", &lonely);
    admit(&desired, &[object].into()).unwrap();
}

#[test]
fn contradictions_name_both_sides_and_the_field() {
    let other = 3 << 100;
    let (message, field) = refusal("Port", other, &port("fa:16:3e:00:00:01", "main", "10.0.0.6"));
    assert_eq!(message, "Port new: spec.mac: fa:16:3e:00:00:01 is that of Port web, too");
    assert_eq!(field.as_deref(), Some("spec.mac"));
    let (message, _) = refusal("Port", other, &port("fa:16:3e:00:00:02", "main", "10.0.0.5"));
    assert_eq!(message, "Port new: spec.fixed_ips[0].address: 10.0.0.5 is that of Port web, too");
    let (message, _) = refusal("Port", other, &port("fa:16:3e:00:00:02", "main", "10.0.1.5"));
    assert!(message.ends_with("10.0.1.5 is not in 10.0.0.0/24 of subnet main"), "{message}");
    let (message, _) = refusal("Port", other, &port("fa:16:3e:00:00:02", "side", "10.0.0.6"));
    assert!(message.ends_with("network blue has no subnet side; it has main"), "{message}");
    let (message, _) = refusal("Port", other, &port("fa:16:3e:00:00:02", "main", "10.0.0.2"));
    assert!(message.ends_with("10.0.0.2 is the dhcp_address of subnet main"), "{message}");
    let (message, _) = refusal("Port", PORT + 1, &port("fa:16:3e:00:00:02", "main", "10.0.0.6"));
    assert!(message.contains("id: the beginning \"00000020-00\""), "{message}");
    let (message, field) = refusal("Network", other, &json!({"type": "vxlan", "segment": 7}));
    assert_eq!(message, "Network new: spec.segment: segment 7 is that of Network blue, too");
    assert_eq!(field.as_deref(), Some("spec.segment"));
}

#[test]
fn a_subnet_cannot_be_pulled_from_under_a_port() {
    let mut desired = world();
    let net = json!({"type": "vxlan", "segment": 7, "subnets": [
        {"name": "main", "cidr": "10.9.0.0/24"}]});
    let network = put(&mut desired, "Network", NET, "blue", &net);
    let refusal = admit(&desired, &[network].into()).unwrap_err();
    assert!(refusal.message.contains("Port web: spec.fixed_ips[0].address"), "{}", refusal.message);
}

#[test]
fn what_is_to_go_stands_in_nobodys_way() {
    let mut desired = world();
    let old = PortId(Uuid::from_u128(PORT)).object();
    desired.objects.get_mut(&old).unwrap().deleting = true;
    let object =
        put(&mut desired, "Port", 3 << 100, "new", &port("fa:16:3e:00:00:01", "main", "10.0.0.5"));
    admit(&desired, &[object].into()).unwrap();
}

#[test]
fn a_floating_ip_is_on_its_routers_external_network_and_nobody_elses() {
    let floating = |router: u128, address: &str| {
        json!({"address": address, "router": Uuid::from_u128(router), "port_forwardings": [
            {"protocol": "tcp", "external_port": 80, "internal_address": "10.0.0.5",
             "internal_port": 80}]})
    };
    let (gateway, other_gateway) = (4 << 100, 5 << 100);
    let (router, other_router) = (6 << 100, 7 << 100);
    let mut desired = world();
    for (port_id, last, router) in [(gateway, 7, router), (other_gateway, 8, other_router)] {
        let mut spec =
            port(&format!("fa:16:3e:00:00:{last:02x}"), "main", &format!("10.0.0.{last}"));
        spec["owner"] = json!("router-gateway");
        put(&mut desired, "Port", port_id, &format!("gateway{last}"), &spec);
        let spec = json!({"host": "one", "gateway": {"port": Uuid::from_u128(port_id)}});
        put(&mut desired, "Router", router, &format!("router{last}"), &spec);
    }
    let first = put(&mut desired, "FloatingIp", 8 << 100, "first", &floating(router, "10.0.0.50"));
    admit(&desired, &[first].into()).unwrap();
    let mut refusal = |router: u128, address: &str| {
        let object = put(&mut desired, "FloatingIp", 9 << 100, "new", &floating(router, address));
        let refusal = admit(&desired, &[object].into()).unwrap_err();
        assert_eq!((refusal.code, refusal.object), (ErrorCode::Conflict, Some(object)));
        assert_eq!(refusal.field.as_deref(), Some("spec.address"));
        refusal.message
    };
    // Another router on the same external network is no other place for an address.
    let message = refusal(other_router, "10.0.0.50");
    assert_eq!(message, "FloatingIp new: spec.address: 10.0.0.50 is that of FloatingIp first, too");
    let message = refusal(router, "10.0.0.5");
    assert_eq!(message, "FloatingIp new: spec.address: 10.0.0.5 is that of Port web, too");
    let message = refusal(router, "10.9.0.5");
    assert!(
        message.ends_with("where its router's gateway is; take an address of 10.0.0.0/24"),
        "{message}"
    );
    // What is accepted already stays accepted, whatever comes beside it.
    let web = PortId(Uuid::from_u128(PORT)).object();
    admit(&desired, &[web].into()).unwrap();
}
