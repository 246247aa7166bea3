use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{Kind, NetworkType, Spec, id_from_name, schema};

const TWO: &str = "\
kind: Network
name: int1
spec:
  type: vxlan
  segment: 42
  subnets:
    - name: subint1
      cidr: 192.168.0.0/24
      gateway: 192.168.0.254
      dns_servers: [10.0.0.2]
---
kind: Port
name: web
labels: {tier: front}
spec:
  network: int1
  mac: fa:16:3e:00:00:01
  host: node1
  fixed_ips: [{subnet: subint1, address: 192.168.0.5}]
";

fn problems(text: &str) -> Vec<String> {
    parse("m.yaml", text, "default").unwrap_err().iter().map(ToString::to_string).collect()
}

#[test]
fn several_yaml_documents_are_read_and_their_names_resolved() {
    let documents = parse("m.yaml", TWO, "default").unwrap();
    assert_eq!(documents[0].id, id_from_name("default", Kind::Network, "int1"));
    let Spec::Network(network) = &documents[0].spec else { panic!("{documents:?}") };
    assert_eq!((network.network_type, network.segment), (NetworkType::Vxlan, Some(42)));
    let Spec::Port(port) = &documents[1].spec else { panic!("{documents:?}") };
    assert_eq!(port.network.0, documents[0].id);
    assert!(port.port_security && port.admin_up);
}

#[test]
fn a_name_that_old_yaml_takes_for_a_boolean_is_a_name() {
    for name in ["no", "y", "on", "Off"] {
        let text = TWO.replacen("name: int1", &format!("name: {name}"), 1);
        assert_eq!(parse("m.yaml", &text, "default").unwrap()[0].name.as_str(), name);
    }
}

#[test]
fn a_document_survives_json_and_back() {
    for document in parse("m.yaml", TWO, "default").unwrap() {
        assert_eq!(Document::from_value(&document.to_value()).unwrap(), document);
        let text = serde_json::to_string(&document).unwrap();
        assert_eq!(serde_json::from_str::<Document>(&text).unwrap(), document);
    }
}

#[test]
fn an_unknown_field_is_refused_with_the_nearest_name() {
    let text = TWO.replace("fixed_ips", "fixed_ip");
    let [problem] = &problems(&text)[..] else { panic!() };
    assert!(
        problem
            .starts_with("m.yaml, document 2: Port web: spec.fixed_ip: unknown field `fixed_ip`"),
        "{problem}"
    );
    assert!(problem.ends_with("did you mean `fixed_ips`?"), "{problem}");
}

#[test]
fn every_wrong_document_is_told_with_its_field() {
    let text = TWO.replace("segment: 42", "segment: 0").replace("00:00:01", "00:00:zz");
    let problems = problems(&text);
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert_eq!(
        problems[0],
        "m.yaml, document 1: Network int1: spec.segment: 0 is outside 1 to 16777215"
    );
    assert!(
        problems[1].contains("spec.mac: \"fa:16:3e:00:00:zz\" is not a MAC address"),
        "{problems:?}"
    );
}

#[test]
fn rules_between_fields_are_told_with_the_field() {
    for (from, to, expected) in [
        ("192.168.0.254", "10.9.9.9", "spec.subnets[0].gateway: 10.9.9.9 is not in 192.168.0.0/24"),
        (
            "192.168.0.0/24",
            "192.168.0.1/24",
            "spec.subnets[0].cidr: has host bits set; did you mean 192.168.0.0/24?",
        ),
        (
            "type: vxlan",
            "type: vlan",
            "spec.physical_network: is needed for a flat or vlan network",
        ),
        ("type: vxlan", "type: vxlna", "did you mean `vxlan`?"),
        (
            "kind: Network",
            "kind: Netwrok",
            "kind: there is no kind \"Netwrok\"; did you mean Network?",
        ),
        ("name: int1", "name: a/b", "name \"a/b\" contains a slash"),
    ] {
        let problems = problems(&TWO.replacen(from, to, 1));
        assert!(
            problems.iter().any(|problem| problem.contains(expected)),
            "{expected}: {problems:?}"
        );
    }
}

#[test]
fn routers_and_floating_ips_are_told_what_they_lack() {
    const ROUTER: &str = "
kind: Router
name: r
spec:
  host: node1
  routes: [{destination: 172.16.0.0/12, next_hop: 10.0.0.9}]
---
kind: FloatingIp
name: f
spec:
  address: 203.0.113.5
  router: r
  port_forwardings:
    - {protocol: tcp, external_port: 22:25, internal_address: 10.0.0.5, internal_port: 2022:2025}
    - {protocol: tcp, external_port: 80, internal_address: 10.0.0.5, internal_port: 8080}
";
    assert!(parse("m.yaml", ROUTER, "default").is_ok());
    for (from, to, expected) in [
        ("host: node1", "host: ''", "spec.host: is empty: a router needs the host that has it"),
        ("  host: node1\n", "", "spec: missing field `host`"),
        ("10.0.0.9", "fd00::9", "spec.routes[0].next_hop: is of another address family"),
        (
            "protocol: tcp",
            "protocol: icmp",
            "spec.port_forwardings[0].protocol: must be tcp or udp",
        ),
        ("external_port: 80,", "external_port: 24,", "[1].external_port: 24 overlaps 22:25"),
        ("external_port: 80,", "external_port: 0,", "[1].external_port: \"0\" is neither a port"),
        ("2022:2025", "2022:2026", "[0].internal_port: 2022:2026 has 5 ports, external_port 22:25"),
    ] {
        let problems = problems(&ROUTER.replacen(from, to, 1));
        assert!(
            problems.iter().any(|problem| problem.contains(expected)),
            "{expected}: {problems:?}"
        );
    }
}

#[test]
fn text_that_is_neither_yaml_nor_json_is_an_error_with_its_place() {
    for text in ["{\"kind\": }", "kind: [", "a: b: c", "\u{0}"] {
        let error = parse("m.yaml", text, "default").unwrap_err();
        assert!(error[0].to_string().starts_with("m.yaml"), "{error:?}");
    }
    let deep = "[".repeat(100_000);
    assert!(parse("deep", &deep, "default").is_err());
    assert!(parse("deep", &format!("a: {deep}"), "default").is_err());
}

#[test]
fn every_kind_has_a_schema_that_refuses_unknown_fields() {
    for kind in Kind::ALL {
        let schema = schema(kind);
        assert_eq!(schema["properties"]["kind"]["const"], kind.as_str());
        let definition = schema["$defs"][format!("{kind}Spec")].clone();
        assert_eq!(definition["additionalProperties"], json!(false), "{schema}");
    }
}

proptest! {
    #[test]
    fn any_text_is_documents_or_errors(text in "\\PC{0,200}") {
        let _outcome = parse("any", &text, "default");
    }

    #[test]
    fn any_change_of_one_byte_is_documents_or_errors(at in 0..TWO.len(), byte in 0x20u8..0x7f) {
        let mut bytes = TWO.as_bytes().to_vec();
        bytes[at] = byte;
        let text = String::from_utf8(bytes).unwrap();
        let _outcome = parse("any", &text, "default");
    }
}
