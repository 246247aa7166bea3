use stackhand_runtime::report::agent_id;

use super::*;

const NOW: i64 = 1_800_000_000;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn report(host: &str, agent: AgentKind, age: i64) -> Report {
    Report {
        id: agent_id("default", host, agent),
        agent,
        host: host.into(),
        zone: "nova".into(),
        cloud: "default".into(),
        version: "0.1.0".into(),
        started_at: at(NOW - 86_400),
        sent_at: at(NOW - age),
        interval_seconds: 10,
        sequence: 5,
        stopping: false,
        control: Control::default(),
        healthy: true,
        reasons: Vec::new(),
        objects: BTreeMap::from([(Kind::Port, BTreeMap::from([(State::Active, 3)]))]),
        signing: Some(true),
        events_dropped: 0,
    }
}

fn rows(reports: Vec<Report>, registrations: Vec<Registration>) -> Vec<AgentRow> {
    let mut records = Records::default();
    reports.into_iter().for_each(|it| records.reported(it));
    registrations.into_iter().for_each(|it| records.registered(it));
    records.rows("default", at(NOW))
}

#[test]
fn an_agent_is_alive_within_three_of_its_own_intervals() {
    for (age, interval, alive) in
        [(30, 10, true), (31, 10, false), (31, 60, true), (181, 60, false)]
    {
        let mut it = report("node1", AgentKind::Network, age);
        it.interval_seconds = interval;
        assert_eq!(rows(vec![it], vec![])[0].alive, alive, "age {age}, interval {interval}");
    }
}

#[test]
fn only_the_newest_record_of_an_agent_counts() {
    let old = report("node1", AgentKind::Network, 25);
    let mut new = report("node1", AgentKind::Network, 5);
    new.healthy = false;
    new.reasons = vec!["broker reconnecting".into()];
    let rows = rows(vec![new, old], vec![]);
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].age_seconds, Some(5));
    assert_eq!(rows[0].reasons, ["broker reconnecting"]);
    assert!(rows[0].alive && !rows[0].is_well());
}

#[test]
fn an_agent_that_is_gone_is_listed_with_its_last_word() {
    let mut silent = report("node1", AgentKind::Network, 95);
    silent.reasons = vec!["libvirt gone".into()];
    let mut stopped = report("node2", AgentKind::Network, 5);
    stopped.stopping = true;
    let forgotten = report("node3", AgentKind::Network, 7200).registration();
    let rows = rows(vec![silent, stopped], vec![forgotten]);
    let reasons: Vec<&[String]> = rows.iter().map(|row| &row.reasons[..]).collect();
    assert!(rows.iter().all(|row| !row.alive));
    assert_eq!(reasons[0], ["no heartbeat for 1m35s", "last word: libvirt gone"]);
    assert_eq!(reasons[1], ["stopped in order"]);
    assert_eq!(reasons[2], ["no heartbeat since it registered"]);
}

#[test]
fn what_an_operator_set_since_the_last_report_is_shown_at_once() {
    let old = report("node1", AgentKind::Compute, 8);
    let mut set = old.registration();
    set.sent_at = at(NOW - 1);
    set.control = Control { enabled: false, reason: Some("new fan".into()), paused: None };
    let rows = rows(vec![old], vec![set]);
    assert!(rows[0].alive && !rows[0].enabled);
    assert_eq!(rows[0].reasons, ["disabled: new fan"]);
}

#[test]
fn agents_of_other_clouds_are_left_out_and_the_order_is_stable() {
    let mut other = report("node0", AgentKind::Network, 1);
    other.cloud = "lab".into();
    let rows = rows(
        vec![
            other,
            report("node2", AgentKind::Compute, 1),
            report("node1", AgentKind::Storage, 1),
            report("node1", AgentKind::Compute, 1),
        ],
        vec![],
    );
    let order: Vec<(&str, AgentKind)> = rows.iter().map(|it| (&*it.host, it.agent)).collect();
    assert_eq!(
        order,
        [
            ("node1", AgentKind::Compute),
            ("node1", AgentKind::Storage),
            ("node2", AgentKind::Compute)
        ]
    );
}

#[test]
fn the_table_reads_as_it_always_did() {
    let mut down = report("node2", AgentKind::Network, 43);
    down.control.enabled = false;
    let rows = rows(vec![report("node1", AgentKind::Network, 4), down], vec![]);
    let mut narrow = Table::new(false);
    table(&rows, &mut narrow);
    let expected = "\
ID                                    TYPE     HOST   ZONE  ALIVE  ADMIN     VERSION  HEARTBEAT  REASON
ce9ac2c0-9f0c-5b6a-8ee6-4c2d6d9a2a5e  network  node1  nova  :-)    enabled   0.1.0    4s
1d1c9b1e-0000-5000-8000-000000000000  network  node2  nova  xxx    disabled  0.1.0    43s        no heartbeat for 43s; disabled
";
    let expected = expected
        .replace("ce9ac2c0-9f0c-5b6a-8ee6-4c2d6d9a2a5e", &rows[0].id.to_string())
        .replace("1d1c9b1e-0000-5000-8000-000000000000", &rows[1].id.to_string());
    assert_eq!(narrow.render(false), expected);
    let mut wide = Table::new(true);
    table(&rows, &mut wide);
    assert!(wide.render(false).contains("STARTED               ACTIVE  PENDING  ERROR  SIGNED"));
}

#[test]
fn json_has_the_same_facts() {
    let rows = rows(vec![report("node1", AgentKind::Network, 4)], vec![]);
    let json = serde_json::to_value(&rows).unwrap();
    assert_eq!(json[0]["type"], "network");
    assert_eq!(json[0]["alive"], true);
    assert_eq!(json[0]["objects"]["Port"]["active"], 3);
    assert_eq!(json[0]["last_heartbeat"], "2027-01-15T07:59:56Z");
}

#[test]
fn spans_of_time_are_told_in_two_units() {
    for (seconds, text) in
        [(0, "0s"), (59, "59s"), (60, "1m"), (125, "2m5s"), (12_000, "3h20m"), (349_200, "4d1h")]
    {
        assert_eq!(duration(seconds), text);
    }
}
