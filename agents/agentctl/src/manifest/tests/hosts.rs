//! What goes to which of several hosts.

use super::*;

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
    let plan = super::super::plan::plan(&completed(&moved, &held).unwrap(), &held, &scope).unwrap();
    assert!(plan.dropped().is_empty());
}
