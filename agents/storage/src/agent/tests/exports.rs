//! Exports, seen through the agent.

use super::*;
use crate::export::{initiator_name, target_name};

#[tokio::test]
async fn a_remote_host_gets_a_target_of_its_own_and_loses_it_when_it_has_let_go() {
    let mut bench = Bench::new(true);
    let link = attachment(30, 1, "there");
    bench.want([held(volume(1, json!({}))), held(link.clone())]);
    let report = bench.pass().await;
    assert_eq!(report.writes, 2, "the volume and its target");
    let Outcome::Active { observed } = &report.outcomes[&object(&link)] else {
        panic!("{report:?}")
    };
    let facts = observed.facts(&object(&link));
    let connection: Connection = serde_json::from_value(facts["connection"].clone()).unwrap();
    let Connection::Iscsi { iqn, initiator, username, password, .. } = connection else {
        panic!("{connection:?}")
    };
    let volume_id = VolumeId(Uuid::from_u128(1));
    assert_eq!(iqn, target_name(volume_id));
    let name = initiator_name("there");
    assert_eq!(initiator.as_ref(), Some(&name));
    {
        let mut state = bench.exporter.state();
        let seen = state.targets.get_mut(&volume_id).unwrap();
        assert_eq!(seen.admitted[&name].user, username);
        assert_eq!(seen.admitted[&name].password, password);
        seen.sessions.insert(name.clone());
    }
    assert_eq!(bench.pass().await.writes, 0, "a second pass changes nothing");

    bench.want([going(link.clone()), going(volume(1, json!({})))]);
    let report = bench.pass().await;
    assert!(reason(&report, object(&link)).starts_with("host there is logged in"), "{report:?}");
    assert_eq!(report.writes, 0, "who is logged in keeps the target");
    bench.exporter.state().targets.get_mut(&volume_id).unwrap().sessions.clear();
    bench.settle().await;
    assert!(bench.exporter.state().targets.is_empty());
    assert!(bench.desired.objects.is_empty() && bench.contents().is_empty());
}

#[tokio::test]
async fn a_dead_host_is_shut_out_by_its_fence_and_the_note_is_dropped() {
    let mut bench = Bench::new(true);
    let link = attachment(30, 1, "there");
    bench.want([held(volume(1, json!({}))), held(link.clone())]);
    bench.settle().await;
    let volume_id = VolumeId(Uuid::from_u128(1));
    let fence = || Action {
        object: link.object(),
        document: Arc::new(link.clone()),
        name: "fence".into(),
        request_id: "req-1".into(),
        params: json!({}),
    };
    let refused = bench.agent.act(fence()).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::WrongState, "it is in use: {refused}");
    let name = initiator_name("there");
    bench.exporter.state().targets.get_mut(&volume_id).unwrap().sessions.insert(name);
    bench.want([going(link.clone())]);
    bench.pass().await;
    bench.agent.act(fence()).await.unwrap();
    let report = bench.pass().await;
    assert_eq!(report.outcomes[&object(&link)], Outcome::Gone);
    assert!(bench.exporter.state().targets.is_empty());
    bench.pass().await;
    assert!(bench.agent.fenced().is_empty());
}

#[tokio::test]
async fn two_hosts_share_a_target_and_one_of_them_leaves() {
    let mut bench = Bench::new(true);
    let links = [attachment(30, 1, "there"), attachment(31, 1, "yonder")];
    bench.want([held(volume(1, json!({"multiattach": true})))]);
    bench.want(links.clone().map(held));
    bench.settle().await;
    let volume_id = VolumeId(Uuid::from_u128(1));
    let admitted = |bench: &Bench| -> Vec<String> {
        bench.exporter.state().targets[&volume_id].admitted.keys().cloned().collect()
    };
    assert_eq!(admitted(&bench), [initiator_name("there"), initiator_name("yonder")]);
    bench.want([going(links[0].clone())]);
    let report = bench.pass().await;
    assert_eq!(report.outcomes[&object(&links[0])], Outcome::Gone);
    assert_eq!(admitted(&bench), [initiator_name("yonder")]);
    assert_eq!(bench.pass().await.writes, 0);
}

#[tokio::test]
async fn an_export_that_fails_is_its_attachments_failure_alone() {
    let mut bench = Bench::new(true);
    let (bad, good) = (attachment(30, 1, "there"), attachment(31, 2, "there"));
    bench.want([held(volume(1, json!({}))), held(volume(2, json!({})))]);
    bench.want([held(bad.clone()), held(good.clone())]);
    bench.exporter.state().broken.insert(VolumeId(Uuid::from_u128(1)));
    let report = bench.pass().await;
    assert!(matches!(report.outcomes[&object(&bad)], Outcome::Failed { .. }), "{report:?}");
    assert!(matches!(report.outcomes[&object(&good)], Outcome::Active { .. }));
    assert!(matches!(report.outcomes[&vol(1).object()], Outcome::Active { .. }));

    bench.exporter.state().broken.clear();
    bench.exporter.state().away = true;
    let report = bench.pass().await;
    assert!(reason(&report, object(&bad)).contains("told so"));
    assert!(bench.agent.troubles()[0].contains("cannot export volumes"));
}

#[tokio::test]
async fn a_target_nobody_asks_for_goes_unless_somebody_is_logged_in() {
    let mut bench = Bench::new(true);
    let [idle, busy] = [7, 8].map(|id| VolumeId(Uuid::from_u128(id)));
    {
        let mut state = bench.exporter.state();
        state.targets.insert(idle, Default::default());
        let seen = state.targets.entry(busy).or_default();
        seen.sessions.insert("iqn.x:somebody".into());
    }
    bench.settle().await;
    let left: Vec<VolumeId> = bench.exporter.state().targets.keys().copied().collect();
    assert_eq!(left, [busy]);
    assert!(bench.agent.troubles()[0].contains("has no attachment"));
}
