//! What is wrong with a manifest is told before anything is sent.

use super::*;

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
fn a_pool_that_is_used_up_fails_whoever_comes_too_late() {
    let held = cloud(&["node1"]);
    let mut text = "
kind: Network
name: small
spec:
  type: local
  subnets:
    - {name: s, cidr: 10.9.0.0/24, dhcp: false, pools: [{start: 10.9.0.2, end: 10.9.0.3}]}
"
    .to_owned();
    for port in ["a", "b", "c"] {
        text += &format!("---\nkind: Port\nname: {port}\nspec: {{network: small, host: node1}}\n");
    }
    let problems = completed(&text, &held).unwrap_err();
    let [problem] = &problems[..] else { panic!("{problems:?}") };
    assert!(problem.contains(": Port "), "{problem}");
    assert!(problem.ends_with("spec.fixed_ips: subnet s has no free address"), "{problem}");
    // One external address, which the router takes.
    let text = FIRST_CLOUD.replace("end: 10.0.0.220", "end: 10.0.0.210");
    let problems = completed(&text, &held).unwrap_err();
    let problem = "FloatingIp web-fip: spec.address: the external network has no free address";
    assert!(problems.iter().any(|it| it.ends_with(problem)), "{problems:?}");
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
