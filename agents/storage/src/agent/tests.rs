use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;
use stackhand_image::{ImageCache, ImageTool};
use stackhand_model::{Connection, Document, ErrorCode, Kind};
use stackhand_runtime::agent::Held;
use stackhand_runtime::ledger::Ledger;
use stackhand_runtime::wake::Wake;
use tempfile::TempDir;
use uuid::Uuid;

use super::*;
use crate::backend::fake::FakeBackend;
use crate::backend::{Fill, Leftover, Presence, Seen, Usage};
use crate::desired::GIB;
use crate::export::fake::FakeExporter;
use crate::plan::Budget;
use crate::testing::{attachment, going, held, snapshot, volume};
use crate::works::Images;

const LIMITS: Limits =
    Limits { overcommit_percent: 100, reserved_percent: 0, warn_percent: 80, stop_percent: 90 };

mod exports;
mod mended;

/// An agent over fakes, and the documents it was given.
struct Bench {
    agent: StorageAgent,
    fakes: BTreeMap<String, Arc<FakeBackend>>,
    exporter: Arc<FakeExporter>,
    desired: Desired,
    _state: TempDir,
}

impl Bench {
    fn new(instant_copies: bool) -> Self {
        let fakes: BTreeMap<String, Arc<FakeBackend>> = ["default", "fast"]
            .map(|name| (name.to_owned(), Arc::new(FakeBackend::new(100 * GIB, instant_copies))))
            .into();
        let limits = LIMITS;
        let backends = fakes
            .iter()
            .map(|(name, fake)| {
                let backend: Arc<dyn Backend> = Arc::clone(fake) as Arc<dyn Backend>;
                (name.clone(), Configured { backend, kind: BackendKind::File, limits })
            })
            .collect();
        let state = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(state.path(), AgentKind::Storage, "here").unwrap();
        let tool = ImageTool::new(Path::new("/usr/bin/qemu-img"), 60);
        let cache = ImageCache::new(&state.path().join("images"), GIB, tool.clone());
        let works = Works::new(2, Images { cache, tool }, ledger.journal(), Wake::new());
        let exporter = Arc::new(FakeExporter::new());
        let exporting = Exporting {
            exporter: Arc::clone(&exporter) as Arc<dyn Exporter>,
            key: Arc::new(Key::from_bytes(&[1; 32])),
        };
        let (exporting, journal) = (Some(exporting), ledger.journal());
        let agent =
            StorageAgent::with_parts("here", "default", backends, exporting, works, journal);
        Self { agent, fakes, exporter, desired: Desired::default(), _state: state }
    }

    fn fake(&self) -> &FakeBackend {
        &self.fakes["default"]
    }

    fn want(&mut self, documents: impl IntoIterator<Item = Held>) {
        for held in documents {
            self.desired.objects.insert(held.document.object(), held);
        }
    }

    /// One pass over everything; what is gone is forgotten, as the runtime does.
    async fn pass(&mut self) -> PassReport {
        let due = self.desired.objects.keys().copied().collect();
        let desired = Arc::new(self.desired.clone());
        let report = self.agent.pass(Work { desired, due, cause: Cause::Change }).await;
        for (object, outcome) in &report.outcomes {
            if *outcome == Outcome::Gone {
                self.desired.objects.remove(object);
            }
        }
        report
    }

    /// Passes until one changes nothing and no copy runs.
    async fn settle(&mut self) -> PassReport {
        for _ in 0..50 {
            let works = self.agent.works.states();
            let report = self.pass().await;
            if report.writes == 0 && works.is_empty() {
                return report;
            }
            while self.agent.works.states().values().any(|copy| copy.failure.is_none()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        panic!("does not come to rest: {:?}", self.agent);
    }

    fn contents(&self) -> BTreeMap<Item, (u64, String)> {
        let host = self.fake().host();
        host.contents
            .iter()
            .map(|(&item, contents)| (item, (host.observed.items[&item].bytes, contents.clone())))
            .collect()
    }
}

fn vol(id: u128) -> Item {
    Item::Volume(VolumeId(Uuid::from_u128(id)))
}

fn snap(id: u128) -> Item {
    Item::Snapshot(stackhand_model::SnapshotId(Uuid::from_u128(id)))
}

fn object(document: &Document) -> ObjectRef {
    document.object()
}

fn reason(report: &PassReport, object: ObjectRef) -> &str {
    match &report.outcomes[&object] {
        Outcome::Pending { reason, .. } | Outcome::Failed { reason, .. } => reason,
        other => panic!("{object} came out as {other:?}"),
    }
}

#[tokio::test]
async fn a_volume_is_made_attached_and_a_second_pass_writes_nothing() {
    let mut bench = Bench::new(true);
    let attachment = attachment(30, 1, "here");
    bench.want([held(volume(1, json!({"size_gib": 2}))), held(attachment.clone())]);
    let report = bench.pass().await;
    assert_eq!(report.writes, 1);
    assert_eq!(bench.contents()[&vol(1)], (2 * GIB, "zeroes".into()));
    let Outcome::Active { observed } = &report.outcomes[&object(&attachment)] else {
        panic!("{report:?}")
    };
    let connection: Connection =
        serde_json::from_value(observed.facts(&object(&attachment))["connection"].clone()).unwrap();
    assert_eq!(connection, fake_place(&bench).connection(vol(1)));

    let again = bench.pass().await;
    assert_eq!(again.writes, 0);
    assert_eq!(again.outcomes[&object(&attachment)], report.outcomes[&object(&attachment)]);
    assert!(matches!(again.outcomes[&vol(1).object()], Outcome::Active { .. }));
}

fn fake_place(bench: &Bench) -> crate::backend::Place {
    bench.fake().host().observed.place.clone()
}

#[tokio::test]
async fn a_chain_of_sources_is_made_in_order_in_one_pass_where_clones_are_instant() {
    let mut bench = Bench::new(true);
    bench.want([
        held(volume(1, json!({"size_gib": 2, "source": {"snapshot": Uuid::from_u128(20)}}))),
        held(snapshot(20, 2)),
        held(volume(2, json!({}))),
    ]);
    let report = bench.pass().await;
    assert_eq!(report.writes, 3);
    assert!(report.outcomes.values().all(|outcome| matches!(outcome, Outcome::Active { .. })));
    assert_eq!(bench.contents()[&vol(1)], (2 * GIB, "zeroes".into()));
    assert_eq!(bench.contents()[&snap(20)], (GIB, "zeroes".into()));
    assert_eq!(bench.pass().await.writes, 0);
}

#[tokio::test]
async fn without_instant_clones_a_copy_goes_on_in_the_background() {
    let mut bench = Bench::new(false);
    let clone = volume(2, json!({"source": {"volume": Uuid::from_u128(1)}}));
    bench.want([held(volume(1, json!({})))]);
    bench.settle().await;
    bench.fake().host().contents.insert(vol(1), "letters".into());
    bench.want([held(clone.clone())]);
    let report = bench.pass().await;
    assert_eq!(reason(&report, object(&clone)), "copying has begun");
    let report = bench.settle().await;
    assert!(matches!(report.outcomes[&object(&clone)], Outcome::Active { .. }));
    assert_eq!(bench.contents()[&vol(2)], (GIB, "letters".into()));
}

#[tokio::test]
async fn a_copy_does_not_begin_while_a_guest_writes_to_its_source() {
    let mut bench = Bench::new(false);
    bench.want([held(volume(1, json!({})))]);
    bench.settle().await;
    bench.fake().host().observed.items.get_mut(&vol(1)).unwrap().usage = Usage::Written;
    let document = snapshot(20, 1);
    bench.want([held(document.clone())]);
    let report = bench.pass().await;
    assert!(
        reason(&report, object(&document)).starts_with("a running guest writes to Volume volume1")
    );
    assert_eq!(report.writes, 0);
}

#[tokio::test]
async fn a_failed_copy_is_told_and_then_tried_again() {
    let mut bench = Bench::new(false);
    bench.want([held(volume(1, json!({})))]);
    bench.settle().await;
    bench.fake().host().broken.insert(snap(20));
    let document = snapshot(20, 1);
    bench.want([held(document.clone())]);
    bench.pass().await;
    while bench.agent.works.states().values().any(|copy| copy.failure.is_none()) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let report = bench.pass().await;
    assert!(matches!(report.outcomes[&object(&document)], Outcome::Failed { .. }), "{report:?}");
    assert_eq!(report.writes, 0);
    bench.fake().host().broken.clear();
    let report = bench.settle().await;
    assert!(matches!(report.outcomes[&object(&document)], Outcome::Active { .. }), "{report:?}");
}

#[tokio::test]
async fn what_is_in_use_is_not_deleted_and_the_reason_says_by_whom() {
    let mut bench = Bench::new(true);
    let (disk, link) = (volume(1, json!({})), attachment(30, 1, "here"));
    bench.want([held(disk.clone()), held(link.clone()), held(snapshot(20, 1))]);
    bench.settle().await;

    bench.want([going(disk.clone())]);
    let report = bench.pass().await;
    let told = reason(&report, object(&disk));
    assert!(told.contains("attached to host here by Attachment/"), "{told}");
    assert!(told.contains("Snapshot snapshot20"), "{told}");
    assert!(matches!(report.outcomes[&object(&disk)], Outcome::Failed { .. }));

    // The attachment goes, but a guest still has the file open.
    bench.fake().host().observed.items.get_mut(&vol(1)).unwrap().usage = Usage::Written;
    bench.want([going(link.clone()), going(snapshot(20, 1))]);
    let report = bench.pass().await;
    assert!(reason(&report, object(&link)).starts_with("a running guest of this host has"));
    assert!(reason(&report, object(&disk)).starts_with("waits for Attachment/"));
    assert_eq!(report.outcomes[&object(&snapshot(20, 1))], Outcome::Gone);

    bench.fake().host().observed.items.get_mut(&vol(1)).unwrap().usage = Usage::Free;
    let report = bench.pass().await;
    assert_eq!(report.outcomes[&object(&link)], Outcome::Gone);
    assert_eq!(report.outcomes[&object(&disk)], Outcome::Gone);
    assert!(bench.contents().is_empty());
}

#[tokio::test]
async fn a_failed_deletion_keeps_the_object_and_does_not_stop_others() {
    let mut bench = Bench::new(true);
    bench.want([held(volume(1, json!({}))), held(volume(2, json!({})))]);
    bench.settle().await;
    bench.fake().host().broken.insert(vol(1));
    bench.want([going(volume(1, json!({}))), going(volume(2, json!({})))]);
    let report = bench.pass().await;
    assert!(matches!(report.outcomes[&vol(1).object()], Outcome::Failed { .. }));
    assert_eq!(report.outcomes[&vol(2).object()], Outcome::Gone);
}

#[tokio::test]
async fn an_attachment_waits_for_a_volume_that_could_not_be_made() {
    let mut bench = Bench::new(true);
    bench.fake().host().broken.insert(vol(1));
    let link = attachment(30, 1, "here");
    bench.want([held(volume(1, json!({}))), held(link.clone())]);
    let report = bench.pass().await;
    assert!(matches!(report.outcomes[&vol(1).object()], Outcome::Failed { .. }));
    assert!(reason(&report, object(&link)).starts_with("waits for Volume/"), "{report:?}");
}

#[tokio::test]
async fn a_volume_is_set_back_once_and_is_not_attached_meanwhile() {
    let mut bench = Bench::new(true);
    bench.want([held(volume(1, json!({}))), held(snapshot(20, 1))]);
    bench.settle().await;
    bench.fake().host().contents.insert(vol(1), "letters".into());
    let act = |params| Action {
        object: vol(1).object(),
        document: Arc::new(volume(1, json!({}))),
        name: "revert".into(),
        request_id: "req-1".into(),
        params,
    };
    for bad in [json!({}), json!({"snapshot": "x"}), json!({"snapshot": Uuid::from_u128(21)})] {
        let refused = bench.agent.act(act(bad)).await.unwrap_err();
        assert_eq!(refused.field.as_deref(), Some("params.snapshot"));
    }
    bench.agent.act(act(json!({"snapshot": Uuid::from_u128(20)}))).await.unwrap();
    let link = attachment(30, 1, "here");
    bench.want([held(link.clone())]);
    let report = bench.pass().await;
    assert!(reason(&report, object(&link)).contains("set back to Snapshot"), "{report:?}");
    bench.settle().await;
    assert_eq!(bench.contents()[&vol(1)].1, "zeroes");
    assert!(bench.agent.works.reverts().is_empty());
    let refused = bench.agent.act(act(json!({"snapshot": Uuid::from_u128(20)}))).await;
    assert!(refused.unwrap_err().message.starts_with("it is attached to host here"));
}

#[tokio::test]
async fn a_pool_that_gets_full_warns_and_then_takes_nothing_more() {
    let mut bench = Bench::new(true);
    bench.fake().host().observed.fill = Some(Fill { data: 8_000, metadata: 100 });
    bench.want([held(volume(1, json!({})))]);
    bench.settle().await;
    assert!(bench.agent.troubles()[0].contains("80.00 % of the pool's data space is used"));
    bench.fake().host().observed.fill = Some(Fill { data: 8_000, metadata: 9_000 });
    bench.want([held(volume(2, json!({})))]);
    let report = bench.pass().await;
    let told = reason(&report, vol(2).object());
    assert!(told.contains("takes nothing more: 90.00 % of the pool's metadata"), "{told}");
    assert_eq!(bench.agent.facts().await["backends"]["default"]["promisable_bytes"], 0);
    assert!(matches!(report.outcomes[&vol(1).object()], Outcome::Active { .. }));
}

#[tokio::test]
async fn what_is_to_be_wiped_is_wiped_in_the_background() {
    let mut bench = Bench::new(true);
    let leftover = Leftover { name: "old".into(), item: None, to_wipe: true };
    bench.fake().host().observed.leftovers.insert(leftover);
    bench.settle().await;
    assert!(bench.fake().host().observed.leftovers.is_empty());
}

#[tokio::test]
async fn another_name_for_a_volume_changes_nothing_on_the_host() {
    let mut bench = Bench::new(true);
    bench.want([held(volume(1, json!({})))]);
    bench.settle().await;
    let mut renamed = volume(1, json!({}));
    renamed.name = "other".parse().unwrap();
    bench.want([held(renamed)]);
    assert_eq!(bench.pass().await.writes, 0);
}

#[tokio::test]
async fn promises_beyond_the_free_space_are_not_made() {
    let mut bench = Bench::new(true);
    bench
        .want([held(volume(1, json!({"size_gib": 60}))), held(volume(2, json!({"size_gib": 60})))]);
    let report = bench.pass().await;
    assert!(matches!(report.outcomes[&vol(1).object()], Outcome::Active { .. }));
    let told = reason(&report, vol(2).object());
    assert!(told.contains(&format!("can promise {} more", 40 * GIB)), "{told}");

    bench.want([held(volume(2, json!({"size_gib": 40})))]);
    bench.settle().await;
    bench.want([held(volume(1, json!({"size_gib": 61})))]);
    let report = bench.pass().await;
    assert!(reason(&report, vol(1).object()).starts_with("cannot grow:"), "{report:?}");
    assert_eq!(bench.contents()[&vol(1)].0, 60 * GIB);
}

#[tokio::test]
async fn a_clone_of_a_full_volume_needs_room_for_both_to_be_overwritten() {
    let mut bench = Bench::new(true);
    bench.want([held(volume(1, json!({"size_gib": 60})))]);
    bench.settle().await;
    {
        let mut host = bench.fake().host();
        host.observed.free_bytes = 40 * GIB;
        host.observed.items.get_mut(&vol(1)).unwrap().allocated_bytes = 60 * GIB;
    }
    let document = snapshot(20, 1);
    bench.want([held(document.clone())]);
    let report = bench.pass().await;
    assert!(reason(&report, object(&document)).contains("do not fit"), "{report:?}");
}

#[tokio::test]
async fn a_lost_or_foreign_file_is_told_and_never_replaced() {
    let mut bench = Bench::new(true);
    let put = |presence| Seen {
        presence,
        bytes: 5,
        allocated_bytes: 0,
        shared: false,
        usage: Usage::Free,
    };
    {
        let mut host = bench.fake().host();
        host.observed.items.insert(vol(1), put(Presence::Lost));
        host.observed.items.insert(vol(2), put(Presence::Foreign { what: "a folder".into() }));
    }
    bench.want([held(volume(1, json!({}))), held(volume(2, json!({})))]);
    let report = bench.pass().await;
    assert_eq!(report.writes, 0);
    assert!(reason(&report, vol(1).object()).contains("was there and is gone"));
    assert!(reason(&report, vol(2).object()).contains("is a folder; move it away"));

    bench.want([going(volume(1, json!({}))), going(volume(2, json!({})))]);
    bench.settle().await;
    assert!(bench.desired.objects.is_empty());
    let host = bench.fake().host();
    let left: Vec<_> = host.observed.items.keys().collect();
    assert_eq!(left, [&vol(2)], "what is foreign survives the object");
}

#[tokio::test]
async fn unfinished_items_are_begun_again_and_leftovers_swept() {
    let mut bench = Bench::new(true);
    {
        let mut host = bench.fake().host();
        let partial = Seen {
            presence: Presence::Partial,
            bytes: 5,
            allocated_bytes: 0,
            shared: false,
            usage: Usage::Free,
        };
        host.observed.items.insert(vol(1), partial);
        host.observed.leftovers.insert(Leftover {
            name: "x.deleted".into(),
            item: Some(vol(7)),
            to_wipe: false,
        });
    }
    bench.want([held(volume(1, json!({})))]);
    let report = bench.pass().await;
    assert_eq!(report.writes, 3, "discard, make, sweep");
    assert_eq!(bench.contents()[&vol(1)], (GIB, "zeroes".into()));
    assert_eq!(bench.pass().await.writes, 0);
}

#[tokio::test]
async fn a_backend_that_is_away_fails_its_objects_and_no_others() {
    let mut bench = Bench::new(true);
    bench.want([held(volume(1, json!({}))), held(volume(2, json!({"backend": "fast"})))]);
    bench.settle().await;
    bench.fake().host().away = true;
    bench.want([going(volume(1, json!({})))]);
    let report = bench.pass().await;
    assert!(reason(&report, vol(1).object()).contains("backend default is away"));
    assert!(matches!(report.outcomes[&vol(2).object()], Outcome::Active { .. }));
    assert_eq!(bench.agent.troubles(), ["storage backend default is away: told so"]);
    assert_eq!(bench.agent.facts().await["backends"]["default"]["state"], "down");
}

#[tokio::test]
async fn a_volume_asked_for_on_another_backend_stays_where_it_is() {
    let mut bench = Bench::new(true);
    bench.want([held(volume(1, json!({})))]);
    bench.settle().await;
    bench.want([held(volume(1, json!({"backend": "fast"})))]);
    let report = bench.pass().await;
    assert!(reason(&report, vol(1).object()).contains("it is on backend default"), "{report:?}");
    assert_eq!(report.writes, 0);
}

#[tokio::test]
async fn what_is_new_is_placed_without_a_look_and_nothing_else_is() {
    let mut bench = Bench::new(true);
    bench.want([held(volume(1, json!({})))]);
    bench.settle().await;
    let looks = |bench: &Bench| bench.fake().host().looks;

    let before = looks(&bench);
    bench.want([held(volume(2, json!({}))), held(attachment(9, 2, "there"))]);
    assert!(bench.pass().await.writes >= 2);
    assert_eq!(looks(&bench), before);
    bench.pass().await;
    assert_eq!(looks(&bench), before + 1, "nothing is new");

    bench.want([held(volume(1, json!({"size_gib": 2}))), held(volume(3, json!({})))]);
    bench.pass().await;
    assert_eq!(looks(&bench), before + 2, "one is changed beside the new");
    bench.want([going(volume(3, json!({}))), held(volume(4, json!({})))]);
    bench.pass().await;
    assert_eq!(looks(&bench), before + 3, "one goes beside the new");

    bench.want([held(volume(5, json!({})))]);
    bench.pass().await;
    assert_eq!(looks(&bench), before + 3, "that the other is gone is no news");
    bench.desired.objects.remove(&vol(5).object());
    bench.want([held(volume(6, json!({})))]);
    bench.pass().await;
    assert_eq!(looks(&bench), before + 4, "one was let go of");

    bench.fake().host().observed.fill = Some(Fill { data: 4400, metadata: 100 });
    bench.want([held(volume(7, json!({})))]);
    bench.pass().await;
    assert_eq!(looks(&bench), before + 4, "there is room");
    bench.fake().host().observed.fill = Some(Fill { data: 4500, metadata: 100 });
    bench.want([held(volume(8, json!({})))]);
    bench.pass().await;
    assert_eq!(looks(&bench), before + 5, "half of what may be used is");
}

#[tokio::test]
async fn items_without_a_document_are_kept_and_told() {
    let mut bench = Bench::new(true);
    bench.want([held(volume(1, json!({})))]);
    bench.settle().await;
    bench.desired.objects.clear();
    let report = bench.pass().await;
    assert_eq!(report.writes, 0);
    assert_eq!(bench.contents().len(), 1);
    assert!(bench.agent.troubles()[0].starts_with("1 items without a document are kept"));
}

#[tokio::test]
async fn what_is_not_due_is_left_alone() {
    let bench = Bench::new(true);
    let document = held(volume(1, json!({})));
    let desired = Desired { objects: [(document.document.object(), document)].into(), revision: 1 };
    let report = bench
        .agent
        .pass(Work { desired: Arc::new(desired), due: BTreeSet::new(), cause: Cause::Timer })
        .await;
    assert_eq!(report, PassReport::default());
}

/// A small world of volumes 1–4 and snapshots 20–22 that refer to one another, some going.
fn any_documents() -> impl Strategy<Value = Vec<Held>> {
    let source = prop_oneof![
        2 => Just(json!("blank")),
        1 => (20u128..23).prop_map(|id| json!({"snapshot": Uuid::from_u128(id)})),
        1 => (1u128..5).prop_map(|id| json!({"volume": Uuid::from_u128(id)})),
    ];
    let volumes = proptest::collection::vec((1u128..5, 1u64..40, source, any::<bool>()), 0..6);
    let snapshots = proptest::collection::vec((20u128..23, 1u128..5, any::<bool>()), 0..4);
    let attachments = proptest::collection::vec((30u128..33, 1u128..5, any::<bool>()), 0..3);
    (volumes, snapshots, attachments).prop_map(|(volumes, snapshots, attachments)| {
        let deleting =
            |document: Document, deleting| Held { document: Arc::new(document), deleting };
        let volumes = volumes.into_iter().map(|(id, size, source, gone)| {
            deleting(volume(id, json!({"size_gib": size, "source": source})), gone)
        });
        let snapshots =
            snapshots.into_iter().map(|(id, of, gone)| deleting(snapshot(id, of), gone));
        let attachments = attachments
            .into_iter()
            .map(|(id, of, gone)| deleting(attachment(id, of, "here"), gone));
        volumes.chain(snapshots).chain(attachments).collect()
    })
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 50, ..ProptestConfig::default() })]

    #[test]
    fn any_wish_comes_to_rest_within_the_promise_and_what_is_active_is_there(
        first in any_documents(), second in any_documents(), instant in any::<bool>(),
    ) {
        run(async move {
            let mut bench = Bench::new(instant);
            for wishes in [first, second] {
                bench.want(wishes);
                let report = bench.settle().await;
                let observed = bench.fake().observe().unwrap();
                let budget = Budget::new(&observed, &LIMITS);
                prop_assert!(budget.claims <= budget.limit, "{:?}", budget);
                for (object, outcome) in &report.outcomes {
                    let item = match object.kind {
                        Kind::Volume => Item::Volume(VolumeId(object.id)),
                        Kind::Snapshot => Item::Snapshot(stackhand_model::SnapshotId(object.id)),
                        _ => continue,
                    };
                    if matches!(outcome, Outcome::Active { .. }) {
                        prop_assert!(observed.items.contains_key(&item), "{} is not there", item);
                    }
                }
                // Whatever is there has a document: nothing is made that was not asked for.
                for item in observed.items.keys() {
                    prop_assert!(bench.desired.objects.contains_key(&item.object()), "{}", item);
                }
            }
            Ok(())
        })?;
    }
}
