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

const TWO_HOSTS: &str = "
kind: Host
name: node1
spec: {tunnel_address: 10.9.0.1}
---
kind: Host
name: node2
spec: {tunnel_address: 10.9.0.2}
---
kind: Host
name: node3
spec: {tunnel_address: 10.9.0.3}
---
kind: Network
name: shared
spec: {type: vxlan, subnets: [{name: s, cidr: 192.168.0.0/24}]}
---
kind: Network
name: alone
spec: {type: vxlan, subnets: [{name: s, cidr: 192.168.1.0/24}]}
---
kind: SecurityGroup
name: web
spec: {rules: [{direction: ingress, remote_group: db}]}
---
kind: SecurityGroup
name: db
spec: {}
---
kind: Port
name: a
spec: {network: shared, host: node1, security_groups: [web]}
---
kind: Port
name: b
spec: {network: shared, host: node2}
---
kind: Port
name: c
spec: {network: alone, host: node3}
";

#[test]
fn a_host_gets_what_it_needs_and_nothing_else() {
    let plan = planned(TWO_HOSTS, &cloud(&["node1", "node2", "node3"]), false);
    let at = |host: &str| -> Vec<String> {
        let theirs = plan.items.iter().filter(|it| it.place.host == host);
        theirs.map(|it| format!("{} {}", it.document.kind(), it.document.name)).collect()
    };
    let shared = [
        "Host node1",
        "Host node2",
        "SecurityGroup db",
        "SecurityGroup web",
        "Network shared",
        "Port a",
        "Port b",
    ];
    assert_eq!(at("node1"), shared);
    // Port a's groups come along: node2 may have rules about their members.
    assert_eq!(at("node2"), shared);
    assert_eq!(at("node3"), ["Host node3", "Network alone", "Port c"]);
}

#[test]
fn a_host_gets_the_members_that_its_rules_name_from_other_networks_too() {
    let manifest = TWO_HOSTS.replace("host: node3}", "host: node3, security_groups: [db]}");
    let plan = planned(&manifest, &cloud(&["node1", "node2", "node3"]), false);
    let gets = |host: &str, name: &str| {
        plan.items.iter().any(|it| it.place.host == host && it.document.name.as_str() == name)
    };
    assert!(gets("node1", "c"), "group web of port a allows members of db, of which c is one");
    assert!(!gets("node3", "a"), "nothing on node3 names web");
}

#[test]
fn documents_held_elsewhere_are_copied_where_they_become_needed() {
    let held = cloud(&["node1", "node2", "node3"]);
    let held = carried_out(&planned(TWO_HOSTS, &held, false), held);
    let more = "kind: Port\nname: d\nspec: {network: alone, host: node1}";
    let plan = planned(more, &held, false);
    assert_eq!(
        told(&plan),
        [
            // node3 now talks to node1 and the other way round.
            "copy Host node1 @ node3",
            "copy Host node3 @ node1",
            "copy Network alone @ node1",
            "copy Port c @ node1",
            "create Port d @ node1",
            "create Port d @ node3",
        ]
    );
    let after = carried_out(&plan, held);
    assert!(planned(more, &after, false).is_empty());
}

#[test]
fn what_nobody_needs_yet_is_kept_by_one_agent() {
    let text = "kind: Network\nname: net\nspec: {type: vxlan}\n---\nkind: Image\nname: i\nspec: {source: /i, format: raw}";
    let plan = planned(text, &cloud(&["node1", "node2"]), false);
    assert_eq!(
        told(&plan),
        ["create Host node1 @ node1", "create Network net @ node1", "create Image i @ node1"]
    );
}

#[test]
fn instances_spread_over_hosts_and_ports_follow_them() {
    let mut text = "kind: Image\nname: i\nspec: {source: /i, format: raw}\n---\nkind: Network\nname: net\nspec: {type: vxlan, subnets: [{name: s, cidr: 10.1.0.0/24}]}\n".to_owned();
    for number in 0..4 {
        text.push_str(&format!(
            "---\nkind: Port\nname: p{number}\nspec: {{network: net}}\n---\nkind: Instance\nname: i{number}\nspec: {{vcpus: 1, memory_mib: 64, image: i, ports: [p{number}]}}\n"
        ));
    }
    let mut held = cloud(&["node1", "node2", "node3"]);
    held.seats.get_mut(&Place::new(AgentKind::Compute, "node3")).unwrap().enabled = false;
    let completed = completed(&text, &held).unwrap();
    let mut hosts = Vec::new();
    for number in 0..4 {
        let Spec::Instance(instance) =
            &completed.documents[&object(Kind::Instance, &format!("i{number}"))].spec
        else {
            panic!()
        };
        assert_eq!(port(&completed, &format!("p{number}")).host, instance.host);
        hosts.push(instance.host.clone());
    }
    hosts.sort();
    assert_eq!(hosts, ["node1", "node1", "node2", "node2"]);
}

#[test]
fn a_remote_volume_is_attached_by_the_initiator_of_the_instances_host() {
    let mut held = cloud(&["node1"]);
    held.seats.remove(&Place::new(AgentKind::Compute, "node1"));
    let seat = Seat { alive: true, enabled: true, ..Seat::default() };
    held.seats.insert(Place::new(AgentKind::Compute, "node2"), seat);
    held.entries.insert(Place::new(AgentKind::Compute, "node2"), <_>::default());
    let connector = serde_json::from_value(
        json!({"host": "node2", "initiator": "iqn.2026-11.org.x:node2", "address": "10.9.0.2"}),
    );
    held.connectors.insert("node2".into(), connector.unwrap());
    let text = "kind: Volume\nname: v\nspec: {size_gib: 1}\n---\nkind: Instance\nname: i\nspec: {vcpus: 1, memory_mib: 64, volumes: [{volume: v, boot: true}]}";
    let completed = completed(text, &held).unwrap();
    let attachment = completed.documents[&object(Kind::Attachment, "i-v")].to_value();
    assert_eq!(attachment["spec"]["connector"]["initiator"], "iqn.2026-11.org.x:node2");
    let plan = plan(&completed, &held, false).unwrap();
    assert_eq!(
        told(&plan),
        [
            "create Host node1 @ node1",
            "create Volume v @ node1",
            "create Attachment i-v @ node1",
            "create Instance i @ node2"
        ]
    );
}

#[test]
fn every_problem_of_the_manifest_is_told_at_once_with_its_place() {
    let held = cloud(&["node1", "node2"]);
    let text = "
kind: Port
name: lost
spec: {network: int1}
---
kind: Volume
name: v
spec: {host: nod1, size_gib: 1}
---
kind: Instance
name: i
spec: {vcpus: 0, memory_mib: 64, image: x}
";
    let problems = completed(text, &held).unwrap_err();
    let expected = [
        "m.yaml:4:1: Port lost: spec.host: is needed: nothing that has a host uses it; hosts are node1, node2",
        "m.yaml:8:14: Volume v: spec.host: no storage-agent is known on \"nod1\"; did you mean node1?",
        "m.yaml:12:15: Instance i: spec.vcpus: 0 is outside 1 to 512",
    ];
    for expected in expected {
        assert!(problems.iter().any(|it| it == expected), "{expected}: {problems:#?}");
    }
}

#[test]
fn a_reference_that_leads_nowhere_is_told_by_its_name() {
    let held = cloud(&["node1"]);
    let text = FIRST_CLOUD.replace("security_groups: [basic]", "security_groups: [basik]");
    assert_eq!(
        completed(&text, &held).unwrap_err(),
        [
            "m.yaml:33:41: Port web: spec.security_groups[0]: there is no SecurityGroup \"basik\" in the manifest or at the agents; did you mean \"basic\"?"
        ]
    );
}

#[test]
fn an_address_is_not_given_out_twice() {
    let held = cloud(&["node1"]);
    let held = carried_out(&planned(FIRST_CLOUD, &held, true), held);
    let text =
        "kind: Port\nname: thief\nspec: {network: int1, host: node1, fixed_ips: [192.168.0.2]}";
    assert_eq!(
        completed(text, &held).unwrap_err(),
        [
            "m.yaml:3:48: Port thief: spec.fixed_ips[0].address: 192.168.0.2 is already that of Port web"
        ]
    );
}

#[test]
fn the_same_object_twice_is_an_error() {
    let text = "kind: Network\nname: net\nspec: {type: local}\n---\nkind: networks\nname: net\nspec: {type: local}";
    assert_eq!(
        completed(text, &cloud(&["node1"])).unwrap_err(),
        ["m.yaml:6:7: Network net: name: is already used at m.yaml:2:7"]
    );
}

#[test]
fn an_agent_that_is_needed_and_down_is_told_before_anything_is_sent() {
    let mut held = cloud(&["node1", "node2"]);
    let place = Place::new(AgentKind::Network, "node2");
    held.entries.remove(&place);
    held.seats.insert(
        place,
        Seat {
            alive: false,
            enabled: true,
            reason: "no heartbeat for 1m".into(),
            holds: Some(<_>::default()),
            ..Seat::default()
        },
    );
    let text = "kind: Network\nname: net\nspec: {type: vxlan}\n---\nkind: Port\nname: p\nspec: {network: net, host: node2}";
    let problems = plan(&completed(text, &held).unwrap(), &held, false).unwrap_err();
    assert_eq!(
        problems,
        ["network-agent on node2 is down (no heartbeat for 1m): needed for Network net, Port p"]
    );
    // Others are not kept from theirs.
    let text = text.replace("host: node2", "host: node1");
    assert!(plan(&completed(&text, &held).unwrap(), &held, false).is_ok());
}

#[test]
fn what_may_be_out_of_sight_is_not_made_a_second_time() {
    let mut held = cloud(&["node1", "node2"]);
    let text = "kind: Volume\nname: v\nspec: {size_gib: 1}\n---\nkind: Network\nname: net\nspec: {type: vxlan}";
    let mut down = |agent: AgentKind, holds: Option<std::collections::BTreeMap<Kind, u64>>| {
        let place = Place::new(agent, "node2");
        held.entries.remove(&place);
        let seat =
            Seat { alive: false, enabled: true, reason: "gone".into(), holds, ..Seat::default() };
        held.seats.insert(place, seat);
        completed(text, &held).map(|_| ())
    };
    // It said that it holds nothing of the kind: no harm.
    let nothing = Some([(Kind::Snapshot, 3)].into());
    assert_eq!(down(AgentKind::Storage, nothing), Ok(()));
    let volume = "m.yaml:3:1: Volume v: spec.host: cannot be chosen while storage-agent on node2 is down, which may hold it; write the host, or give --assume-lost node2 if it will not come back";
    let some = Some([(Kind::Volume, 1)].into());
    assert_eq!(down(AgentKind::Storage, some), Err(vec![volume.to_owned()]));
    let network = "m.yaml:7:1: Network net: spec.segment: cannot be chosen while network-agent on node2 is down, which may hold networks; write the number, or give --assume-lost node2 if it will not come back";
    assert_eq!(down(AgentKind::Network, None), Err(vec![volume.to_owned(), network.to_owned()]));
    held.assume_lost(&["node2".to_owned()]);
    assert!(completed(text, &held).is_ok());
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
fn copies_leave_agents_that_need_them_no_more() {
    let hosts = ["node1", "node2", "node3"];
    let held = carried_out(&planned(TWO_HOSTS, &cloud(&hosts), false), cloud(&hosts));
    let moved = TWO_HOSTS.replace(
        "name: b\nspec: {network: shared, host: node2}",
        "name: b\nspec: {network: shared, host: node1}",
    );
    let plan = planned(&moved, &held, false);
    let dropped: Vec<String> =
        told(&plan).into_iter().filter(|it| it.starts_with("drop")).collect();
    assert_eq!(
        dropped,
        [
            "drop Host node1 @ node2",
            "drop Host node2 @ node1",
            "drop SecurityGroup db @ node2",
            "drop SecurityGroup web @ node2",
            "drop Network shared @ node2",
            "drop Port a @ node2",
            "drop Port b @ node2",
        ]
    );
    let after = carried_out(&plan, held.clone());
    assert!(planned(&moved, &after, false).is_empty());
    // While an agent does not answer, nobody knows what it needs.
    let scope = Scope { local: false, all_seen: false, prune: None };
    let plan = super::plan::plan(&completed(&moved, &held).unwrap(), &held, &scope).unwrap();
    assert!(plan.dropped().is_empty());
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
