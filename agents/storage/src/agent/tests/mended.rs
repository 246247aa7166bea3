//! What a call that was cut off left behind, and what comes of it.

use super::*;

#[tokio::test]
async fn a_volume_that_was_cut_off_while_it_grew_grows_and_awakes_in_one_step() {
    let mut bench = Bench::new(true);
    bench.want([held(volume(1, json!({})))]);
    bench.settle().await;
    for (size, change) in [(1, "activate"), (2, "grow")] {
        bench.fake().host().observed.items.get_mut(&vol(1)).unwrap().presence = Presence::Inactive;
        bench.want([held(volume(1, json!({"size_gib": size})))]);
        let steps = bench.agent.plan(Arc::new(bench.desired.clone())).await.unwrap();
        assert_eq!(steps.len(), 1, "{steps:?}");
        assert!(steps[0].change.starts_with(change), "{steps:?}");
        let report = bench.settle().await;
        assert_eq!(report.writes, 0);
        let seen = bench.fake().host().observed.items[&vol(1)].clone();
        assert_eq!((seen.presence, seen.bytes), (Presence::Ready, size * GIB));
    }
}

#[tokio::test]
async fn what_was_to_be_done_to_a_volume_goes_with_it() {
    let mut bench = Bench::new(true);
    bench.want([held(volume(1, json!({})))]);
    bench.settle().await;
    let note = works::revert_note(VolumeId(vol(1).object().id));
    bench.agent.journal.put(&note, &snap(20).to_string()).await.unwrap();
    assert_eq!(bench.agent.works.reverts().len(), 1);
    bench.want([going(volume(1, json!({})))]);
    bench.settle().await;
    bench.pass().await;
    assert!(bench.agent.works.reverts().is_empty(), "another volume of that name is not set back");
}
