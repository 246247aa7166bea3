//! Whole manifests against what agents hold, as pure data.

use std::collections::BTreeSet;

use jiff::Timestamp;
use proptest::prelude::*;
use serde_json::json;
use stackhand_model::{
    AgentKind, Connection, Document, Kind, ObjectRef, PortSpec, Spec, State, Status, id_from_name,
};
use stackhand_runtime::api::Entry;

use super::complete::{Completed, complete};
use super::held::{Held, Place, Seat};
use super::plan::{Action, Plan, Scope};
use super::source::{Values, parse};

mod hosts;
mod problems;

const CLOUD: &str = "default";

const FIRST_CLOUD: &str = "
kind: Network
name: ext1
spec:
  type: flat
  physical_network: extnet
  external: true
  subnets:
    - name: subext1
      cidr: 10.0.0.0/24
      gateway: 10.0.0.2
      dhcp: false
      pools: [{start: 10.0.0.210, end: 10.0.0.220}]
---
kind: Network
name: int1
spec:
  type: vxlan
  mtu: 1450
  subnets:
    - {name: subint1, cidr: 192.168.0.0/24, gateway: 192.168.0.254, dns_servers: [10.0.0.2]}
---
kind: SecurityGroup
name: basic
spec: {rules: [{direction: ingress, protocol: icmp}]}
---
kind: Router
name: router1
spec: {gateway: {network: ext1}, interfaces: [{network: int1}]}
---
kind: Port
name: web
spec: {network: int1, security_groups: [basic]}
---
kind: FloatingIp
name: web-fip
spec: {network: ext1, instance: demo}
---
kind: Image
name: tiny
spec: {source: /srv/tiny.qcow2, format: qcow2}
---
kind: Volume
name: data
spec: {size_gib: 1}
---
kind: Instance
name: demo
spec: {vcpus: 1, memory_mib: 128, image: tiny, ports: [web], volumes: [{volume: data, device: vdb}]}
";

/// Hosts that each have all three agents; the first has a link to the physical network.
fn cloud(hosts: &[&str]) -> Held {
    let mut held = Held::default();
    let told = json!({"bridge_mappings": {"extnet": "eth1"}});
    held.told = hosts.iter().take(1).map(|host| ((*host).to_owned(), told.clone())).collect();
    for host in hosts {
        for agent in AgentKind::ALL {
            let seat = Seat { alive: true, enabled: true, ..Seat::default() };
            held.seats.insert(Place::new(agent, host), seat);
            held.entries.insert(Place::new(agent, host), <_>::default());
        }
    }
    held
}

fn completed(text: &str, held: &Held) -> Result<Completed, Vec<String>> {
    complete(parse("m.yaml", text, &Values::new()).unwrap(), held, CLOUD)
}

fn plan(completed: &Completed, held: &Held, local: bool) -> Result<Plan, Vec<String>> {
    super::plan::plan(completed, held, &Scope { local, all_seen: true, prune: None })
}

fn planned(text: &str, held: &Held, local: bool) -> Plan {
    plan(&completed(text, held).unwrap(), held, local).unwrap()
}

/// What the agents would hold after a plan was carried out and all is active.
fn carried_out(plan: &Plan, mut held: Held) -> Held {
    for item in plan.items.iter().filter(|it| matches!(it.action, Action::Delete | Action::Drop)) {
        held.entries.get_mut(&item.place).unwrap().remove(&item.document.object());
    }
    for item in plan.items.iter().filter(|item| item.action.is_sent()) {
        let mut document = item.document.clone();
        let observed = json!({"connection": connection(&document)});
        if let Spec::Instance(instance) = &mut document.spec {
            for volume in &mut instance.volumes {
                volume.connection = Connection::Block { path: "/dev/vg/data".into() };
            }
        }
        let object = document.object();
        let status = Status {
            object,
            state: State::Active,
            reason: None,
            generation: document.generation,
            observed,
        };
        let entry =
            Entry { document, status, accepted: Timestamp::UNIX_EPOCH, request_id: "req-1".into() };
        held.entries.get_mut(&item.place).unwrap().insert(object, entry);
    }
    held
}

fn connection(_document: &Document) -> Connection {
    Connection::Block { path: "/dev/vg/data".into() }
}

fn object(kind: Kind, name: &str) -> ObjectRef {
    ObjectRef { kind, id: id_from_name(CLOUD, kind, name) }
}

fn port<'a>(completed: &'a Completed, name: &str) -> &'a PortSpec {
    match &completed.documents[&object(Kind::Port, name)].spec {
        Spec::Port(port) => port,
        other => panic!("{other:?}"),
    }
}

fn addresses(port: &PortSpec) -> Vec<String> {
    port.fixed_ips.iter().map(|it| format!("{}={}", it.subnet, it.address)).collect()
}

/// `action Kind name @ host` of every item.
fn told(plan: &Plan) -> Vec<String> {
    plan.items
        .iter()
        .map(|it| {
            let (action, kind) = (it.action.as_str(), it.document.kind());
            format!("{action} {kind} {} @ {}", it.document.name, it.place.host)
        })
        .collect()
}

#[test]
fn the_first_cloud_is_completed_on_one_host() {
    let completed = completed(FIRST_CLOUD, &cloud(&["node1"])).unwrap();
    let web = port(&completed, "web");
    assert_eq!(web.host, "node1");
    assert_eq!(web.device, Some(id_from_name(CLOUD, Kind::Instance, "demo")));
    // .1 serves DHCP.
    assert_eq!(addresses(web), ["subint1=192.168.0.2"]);
    assert_eq!(addresses(port(&completed, "router1-int1")), ["subint1=192.168.0.254"]);
    assert_eq!(addresses(port(&completed, "router1-ext1")), ["subext1=10.0.0.210"]);
    let Spec::Network(network) = &completed.documents[&object(Kind::Network, "int1")].spec else {
        panic!()
    };
    assert_eq!(network.segment, Some(1));
    assert_eq!(network.subnets[0].dhcp_address.unwrap().to_string(), "192.168.0.1");
    let floating = &completed.documents[&object(Kind::FloatingIp, "web-fip")].spec;
    let Spec::FloatingIp(floating) = floating else { panic!() };
    assert_eq!(floating.address.to_string(), "10.0.0.211");
    let instance = &completed.documents[&object(Kind::Instance, "demo")].spec;
    let Spec::Instance(instance) = instance else { panic!() };
    assert_eq!(instance.ports[0].mac, web.mac);
    assert_eq!(instance.ports[0].mtu, Some(1450));
    let attachment = object(Kind::Attachment, "demo-data");
    assert_eq!(completed.awaited[&object(Kind::Instance, "demo")][&0], attachment);
    let attachment = &completed.documents[&attachment];
    assert_eq!(attachment.to_value()["spec"]["connector"], json!({"host": "node1"}));
    assert!(completed.documents.values().all(|it| it.generation == 1));
    assert!(completed.documents.values().all(|it| it.labels["cloud"] == CLOUD));
}

#[test]
fn storage_comes_before_compute() {
    let held = cloud(&["node1"]);
    let plan = planned(FIRST_CLOUD, &held, true);
    let [first, second] = plan.stages();
    let kinds = |stage: &std::collections::BTreeMap<Place, Vec<&super::plan::Item>>| {
        stage.values().flatten().map(|it| it.document.kind()).collect::<BTreeSet<_>>()
    };
    assert!(kinds(&first).contains(&Kind::Attachment) && kinds(&first).contains(&Kind::Image));
    assert_eq!(kinds(&second), BTreeSet::from([Kind::Instance]));
    // Within an agent, in the order of application.
    let network = &first[&Place::new(AgentKind::Network, "node1")];
    let order: Vec<Kind> = network.iter().map(|it| it.document.kind()).collect();
    assert!(order.is_sorted(), "{order:?}");
}

#[test]
fn applying_twice_changes_nothing() {
    for (hosts, local) in [(&["node1"][..], true), (&["node1", "node2"][..], false)] {
        let first = planned(FIRST_CLOUD, &cloud(hosts), local);
        let held = carried_out(&first, cloud(hosts));
        let second = planned(FIRST_CLOUD, &held, local);
        assert!(second.is_empty(), "{:#?}", told(&second));
        assert!(second.awaited.is_empty());
        assert_eq!(first.items.len(), second.items.len());
    }
}

#[test]
fn choices_made_earlier_are_kept_when_the_manifest_grows() {
    let held = cloud(&["node1"]);
    let held = carried_out(&planned(FIRST_CLOUD, &held, true), held);
    let grown = format!(
        "kind: Port\nname: aaa\nspec: {{network: int1, host: node1}}\n---\n\
         kind: Network\nname: aaa\nspec: {{type: vxlan}}\n---\n{FIRST_CLOUD}"
    );
    let after = completed(&grown, &held).unwrap();
    assert_eq!(addresses(port(&after, "web")), ["subint1=192.168.0.2"]);
    assert_eq!(addresses(port(&after, "aaa")), ["subint1=192.168.0.3"]);
    let Spec::Network(network) = &after.documents[&object(Kind::Network, "aaa")].spec else {
        panic!()
    };
    assert_eq!(network.segment, Some(2));
    let plan = plan(&after, &held, true).unwrap();
    let changed: Vec<String> =
        told(&plan).into_iter().filter(|it| !it.starts_with("unchanged")).collect();
    assert_eq!(changed, ["create Network aaa @ node1", "create Port aaa @ node1"]);
}

#[test]
fn a_change_raises_the_generation_of_that_document_alone() {
    let held = cloud(&["node1"]);
    let held = carried_out(&planned(FIRST_CLOUD, &held, true), held);
    let changed = FIRST_CLOUD.replace("memory_mib: 128", "memory_mib: 256");
    let plan = planned(&changed, &held, true);
    let [item] =
        &plan.items.iter().filter(|it| it.action != Action::Unchanged).collect::<Vec<_>>()[..]
    else {
        panic!("{:?}", told(&plan))
    };
    assert_eq!((item.document.kind(), item.document.generation), (Kind::Instance, 2));
    assert_eq!(item.action, Action::Update);
}

#[test]
fn ports_take_fixed_ips_in_every_form() {
    let text = "
kind: Network
name: net
spec:
  type: vxlan
  subnets:
    - {name: v4, cidr: 10.1.0.0/24, gateway: 10.1.0.1, dhcp: false}
    - {name: v6, cidr: 'fd00::/64', gateway: 'fd00::1', ipv6_mode: slaac}
---
kind: Port
name: plain
spec: {network: net, host: node1, mac: 'fa:16:3e:00:00:01'}
---
kind: Port
name: chosen
spec: {network: net, host: node1, fixed_ips: [10.1.0.2, {subnet: v4}, {subnet: v4, address: 10.1.0.9}]}
---
kind: Port
name: none
spec: {network: net, host: node1, fixed_ips: []}
";
    let completed = completed(text, &cloud(&["node1"])).unwrap();
    // Addresses that are asked for are never given to others, whatever the order.
    assert_eq!(
        addresses(port(&completed, "chosen")),
        ["v4=10.1.0.2", "v4=10.1.0.3", "v4=10.1.0.9"]
    );
    assert_eq!(addresses(port(&completed, "plain")), ["v4=10.1.0.4", "v6=fd00::f816:3eff:fe00:1"]);
    assert_eq!(addresses(port(&completed, "none")), Vec::<String>::new());
    let wrong = text.replace("fixed_ips: []", "fixed_ips: [10.2.0.1, {subnet: v5}]");
    let problems =
        complete(parse("m.yaml", &wrong, &Values::new()).unwrap(), &cloud(&["node1"]), CLOUD)
            .unwrap_err();
    assert!(
        problems[0].ends_with("spec.fixed_ips[0]: 10.2.0.1 is in no subnet of the port's network"),
        "{problems:?}"
    );
    assert!(
        problems[1].ends_with("spec.fixed_ips[1]: the network has no subnet \"v5\"; it has v4, v6"),
        "{problems:?}"
    );
}

#[test]
fn any_document_of_the_wrong_shape_is_an_error_and_never_a_panic() {
    let held = cloud(&["node1"]);
    for value in [
        "7",
        "kind: Port",
        "kind: Port\nname: x\nspec: 7",
        "kind: Instance\nname: x\nspec: {ports: 7, volumes: {}}",
        "kind: Router\nname: x\nspec: {interfaces: {}, gateway: 3}",
        "kind: Network\nname: x\nspec: {type: vxlan, subnets: [3]}",
        "kind: Attachment\nname: x\nspec: {volume: v, connector: 3}",
        "name: x",
        "kind: FloatingIp\nname: x\nspec: {}",
        "kind: Port\nname: x\nlabels: 3\nspec: {network: net}",
    ] {
        assert!(completed(value, &held).is_err(), "{value}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_two_ports_of_a_network_share_an_address_and_a_second_apply_is_empty(
        counts in proptest::collection::vec(1_usize..12, 1..4),
        fixed in proptest::collection::vec(2_u8..30, 0..6),
    ) {
        let mut text = String::new();
        for (network, count) in counts.iter().enumerate() {
            text.push_str(&format!(
                "---\nkind: Network\nname: n{network}\nspec: {{type: vxlan, subnets: [{{name: s, cidr: 10.{network}.0.0/27, gateway: 10.{network}.0.1}}]}}\n"
            ));
            for port in 0..*count {
                text.push_str(&format!("---\nkind: Port\nname: p{network}-{port}\nspec: {{network: n{network}, host: node1}}\n"));
            }
        }
        let fixed: BTreeSet<u8> = fixed.into_iter().collect();
        for address in &fixed {
            text.push_str(&format!("---\nkind: Port\nname: f{address}\nspec: {{network: n0, host: node2, fixed_ips: [10.0.0.{address}]}}\n"));
        }
        let held = cloud(&["node1", "node2"]);
        let completed = completed(&text, &held).unwrap();
        let mut seen = BTreeSet::new();
        for document in completed.documents.values() {
            if let Spec::Port(port) = &document.spec {
                prop_assert_eq!(port.fixed_ips.len(), 1);
                for fixed in &port.fixed_ips {
                    prop_assert!(seen.insert((port.network, fixed.address)), "{} twice", fixed.address);
                }
            }
            if let Spec::Network(network) = &document.spec {
                for subnet in &network.subnets {
                    let id = stackhand_model::NetworkId(document.id);
                    prop_assert!(seen.insert((id, subnet.dhcp_address.unwrap())));
                }
            }
        }
        let first = plan(&completed, &held, false).unwrap();
        let held = carried_out(&first, held);
        let second = planned(&text, &held, false);
        prop_assert!(second.is_empty());
    }
}

#[test]
fn what_agentctl_made_goes_when_it_is_no_longer_made() {
    let held = cloud(&["node1"]);
    let held = carried_out(&planned(FIRST_CLOUD, &held, true), held);
    let text = FIRST_CLOUD.replace(", volumes: [{volume: data, device: vdb}]", "");
    let plan = planned(&text, &held, true);
    let changed: Vec<String> =
        told(&plan).into_iter().filter(|it| !it.starts_with("unchanged")).collect();
    assert_eq!(changed, ["delete Attachment demo-data @ node1", "update Instance demo @ node1"]);
    let after = carried_out(&plan, held);
    assert!(planned(&text, &after, true).is_empty());
}

#[test]
fn pruning_takes_what_the_manifest_does_not_name_of_this_cloud_alone() {
    let held = cloud(&["node1"]);
    let mut held = carried_out(&planned(FIRST_CLOUD, &held, true), held);
    let entries = held.entries.get_mut(&Place::new(AgentKind::Storage, "node1")).unwrap();
    let foreign = object(Kind::Volume, "data");
    entries.get_mut(&foreign).unwrap().document.labels.insert("cloud".into(), "other".into());
    let prune = |text: &str| {
        let scope = Scope { local: true, all_seen: true, prune: Some(CLOUD.into()) };
        super::plan::plan(&completed(text, &held).unwrap(), &held, &scope)
    };
    let text = "kind: Image\nname: tiny\nspec: {source: /srv/tiny.qcow2, format: qcow2}";
    let plan = prune(text).unwrap();
    let gone = plan.deleted();
    assert_eq!(gone.len(), 10, "{gone:?}");
    assert!(!gone.contains_key(&foreign) && gone.keys().all(|it| it.kind != Kind::Image));
    let text = "kind: Port\nname: web\nspec: {network: int1}";
    assert_eq!(
        prune(text).unwrap_err(),
        ["Port web: spec.network: Network int1 would be deleted: name it in the manifest"]
    );
}

#[test]
fn an_instance_stays_on_its_host() {
    let held = cloud(&["node1", "node2"]);
    let text = "kind: Image\nname: i\nspec: {source: /i, format: raw}\n---\nkind: Instance\nname: one\nspec: {host: node1, vcpus: 1, memory_mib: 64, image: i}";
    let held = carried_out(&planned(text, &held, false), held);
    assert_eq!(
        completed(&text.replace("node1", "node2"), &held).unwrap_err(),
        [
            "m.yaml:7:14: Instance one: spec.host: it is on node1 and cannot be moved by a manifest; delete it first, or write node1"
        ]
    );
}

#[test]
fn a_volume_is_told_what_the_image_is_that_it_starts_from() {
    let text = "kind: Image\nname: i\nspec: {source: /i, format: raw}\n---\nkind: Volume\nname: v\nspec: {size_gib: 1, source: {image: i}}";
    let completed = completed(text, &cloud(&["node1"])).unwrap();
    let volume = completed.documents[&object(Kind::Volume, "v")].to_value();
    assert_eq!(volume["spec"]["image"]["source"], "/i");
}

#[test]
fn a_guest_is_told_the_same_by_its_ports_and_on_its_config_drive() {
    let text = format!(
        "kind: Flavor\nname: tiny\nspec: {{vcpus: 1, memory_mib: 64}}\n---{}",
        FIRST_CLOUD.replace("{vcpus: 1, memory_mib: 128", "{flavor: tiny, metadata: {role: web}")
    );
    let mut held = cloud(&["node1"]);
    for seat in held.seats.values_mut() {
        seat.zone = "north".into();
    }
    let completed = completed(&text, &held).unwrap();
    let guest =
        json!({"availability_zone": "north", "flavor": "tiny", "metadata": {"role": "web"}});
    let instance = completed.documents[&object(Kind::Instance, "demo")].to_value();
    assert_eq!(instance["spec"]["guest"], guest);
    let plug = &instance["spec"]["ports"][0];
    assert_eq!(plug["addresses"][0]["address"], "192.168.0.2/24");
    let port = completed.documents[&object(Kind::Port, "web")].to_value();
    assert_eq!(port["spec"]["guest"]["name"], "demo");
    assert_eq!(port["spec"]["guest"]["metadata"], guest["metadata"]);
    assert_eq!(port["spec"]["dns_name"], "demo");
    // Applied alone, the port tells what it told before.
    let held = carried_out(&planned(&text, &held, true), held);
    let alone = "kind: Port\nname: web\nspec: {network: int1, security_groups: [basic]}";
    let changed: Vec<String> = told(&planned(alone, &held, true));
    assert_eq!(changed, ["unchanged Host node1 @ node1", "unchanged Port web @ node1"]);
}

#[test]
fn every_example_can_be_applied_and_a_second_time_changes_nothing() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let given = [
        ("GUEST", "/guest"),
        ("KEY", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample me"),
        ("IMAGE", "https://images.example.org/debian.qcow2"),
        ("VLAN", "120"),
        ("HOST", "node1"),
    ];
    let values: Values =
        given.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let mut tried = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.ends_with(".values.yaml") {
            let read = super::source::values(std::slice::from_ref(&path), &[]).unwrap();
            assert!(read.keys().all(|key| values.contains_key(key)), "{name}: {read:?}");
            continue;
        }
        let pieces = super::source::read(std::slice::from_ref(&path), &values).unwrap();
        let held = cloud(&["node1", "node2"]);
        // A port that nothing draws anywhere needs to be told its host, unless there is only one.
        let local = !["two-hosts.yaml", "first-cloud.yaml"].contains(&&*name);
        let held = if local { cloud(&["node1"]) } else { held };
        let done = complete(pieces.clone(), &held, CLOUD).unwrap_or_else(|it| panic!("{it:#?}"));
        let first = plan(&done, &held, local).unwrap();
        let after = carried_out(&first, held);
        let again = complete(pieces, &after, CLOUD).unwrap();
        let again = plan(&again, &after, local).unwrap();
        assert!(again.is_empty(), "{name}: {:?}", told(&again));
        if name == "two-hosts.yaml" {
            let hosts: BTreeSet<&str> = first
                .items
                .iter()
                .filter(|it| it.document.kind() == Kind::Instance)
                .map(|it| &*it.place.host)
                .collect();
            assert_eq!(hosts.len(), 2, "{hosts:?}");
        }
        tried += 1;
    }
    assert!(tried >= 5, "{tried}");
}
