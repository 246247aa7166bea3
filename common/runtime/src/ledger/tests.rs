use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use redb::{Database, TableDefinition};
use serde_json::json;

use super::fixtures::{group, object};
use super::*;
use crate::api::Change;

fn admit_all() -> Admit {
    Arc::new(|_wanted, _changed| Ok(()))
}

fn open(dir: &Path) -> Ledger {
    Ledger::open(dir, AgentKind::Network, "compute1").unwrap()
}

fn refuses_to_open(dir: &Path) -> LedgerError {
    Ledger::open(dir, AgentKind::Network, "compute1").unwrap_err()
}

async fn apply(ledger: &Ledger, documents: Vec<Document>) -> Result<Applied, Refused> {
    ledger.apply(documents, "req-1", false, admit_all()).await
}

async fn delete(ledger: &Ledger, n: u128) -> Result<Deleted, Refused> {
    ledger.delete(vec![object(n)], "req-2", admit_all()).await
}

fn names(ledger: &Ledger) -> Vec<(String, u64, bool)> {
    let desired = ledger.desired();
    let one = |held: &crate::agent::Held| {
        (held.document.name.to_string(), held.document.generation, held.deleting)
    };
    desired.objects.values().map(one).collect()
}

#[tokio::test]
async fn what_was_answered_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let applied = apply(&ledger, vec![group(1, "a", 3), group(2, "b", 0)]).await.unwrap();
    assert_eq!((applied.revision, applied.objects[1].generation), (1, 1));
    delete(&ledger, 2).await.unwrap();
    let control = ledger.set_control(|it| it.enabled = false).await.unwrap();
    ledger.close().await;

    let ledger = open(dir.path());
    assert_eq!(names(&ledger), [("a".into(), 3, false), ("b".into(), 1, true)]);
    assert_eq!(*ledger.control().borrow(), control);
    assert_eq!(ledger.desired().revision, 2);
    let (first, second) = (ledger.entry(&object(1)).unwrap(), ledger.entry(&object(2)).unwrap());
    assert_eq!(&*first.accepted.request_id, "req-1");
    assert_eq!(&*second.accepted.request_id, "req-2");
    ledger.close().await;
    assert_eq!(
        apply(&ledger, vec![group(9, "i", 0)]).await.unwrap_err().code,
        ErrorCode::Unavailable
    );
}

#[tokio::test]
async fn one_refused_document_refuses_all_of_its_request() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    apply(&ledger, vec![group(1, "a", 5)]).await.unwrap();
    let refused = apply(&ledger, vec![group(2, "b", 1), group(1, "c", 4)]).await.unwrap_err();
    assert_eq!((refused.code, refused.object), (ErrorCode::Conflict, Some(object(1))));
    assert_eq!(names(&ledger), [("a".into(), 5, false)]);
}

#[tokio::test]
async fn the_agents_judgement_and_its_panics_refuse_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    apply(&ledger, vec![group(1, "a", 1)]).await.unwrap();
    let no: Admit = Arc::new(|wanted, changed| {
        assert_eq!((wanted.objects.len(), changed.len()), (2, 2), "panics on anything else");
        Err(Refusal::new(ErrorCode::Conflict, "no room").about(object(2)))
    });
    let request = vec![group(1, "a", 2), group(2, "b", 1)];
    let refused = ledger.apply(request, "req-1", false, Arc::clone(&no)).await.unwrap_err();
    assert_eq!(refused.message, "no room");
    let refused = ledger.delete(vec![object(1)], "req-1", no).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Internal);
    assert_eq!(names(&ledger), [("a".into(), 1, false)]);
    assert_eq!(apply(&ledger, vec![group(2, "b", 0)]).await.unwrap().revision, 2);
}

#[tokio::test]
async fn a_dry_run_answers_the_same_and_keeps_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let dry = ledger.apply(vec![group(1, "a", 0)], "req-1", true, admit_all()).await.unwrap();
    assert!(dry.dry_run);
    assert_eq!((dry.objects[0].change, dry.objects[0].generation), (Change::Created, 1));
    assert!(ledger.desired().objects.is_empty());
    let applied = apply(&ledger, vec![group(1, "a", 0)]).await.unwrap();
    assert_eq!(applied.objects, dry.objects);
}

#[tokio::test]
async fn a_deletion_is_asked_for_as_often_as_one_likes_and_forgotten_once_gone() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    apply(&ledger, vec![group(1, "a", 4), group(2, "b", 1)]).await.unwrap();
    for _ in 0..2 {
        let deleted = delete(&ledger, 1).await.unwrap();
        assert_eq!((deleted.objects[0].change, deleted.revision), (Change::Deleting, 2));
    }
    assert_eq!(delete(&ledger, 7).await.unwrap().objects[0].change, Change::Absent);
    let refused = apply(&ledger, vec![group(1, "a", 5)]).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict);

    ledger.forget(vec![object(1), object(2)]).await.unwrap();
    assert_eq!(names(&ledger), [("b".into(), 1, false)], "what is not to go is not forgotten");
    assert_eq!(apply(&ledger, vec![group(1, "a", 1)]).await.unwrap().objects[0].generation, 1);
}

#[tokio::test]
async fn callers_at_the_same_time_share_commits_and_all_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let callers: Vec<_> = (0..200)
        .map(|n| {
            let ledger = ledger.clone();
            tokio::spawn(async move { apply(&ledger, vec![group(n, "g", 0)]).await.unwrap() })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap();
    }
    ledger.close().await;
    assert_eq!(open(dir.path()).desired().objects.len(), 200);
}

#[tokio::test]
async fn notes_of_long_operations_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let journal = open(dir.path()).journal();
    journal.put("volume/1/copy", &json!({"done": 10})).await.unwrap();
    journal.put("volume/1/copy", &json!({"done": 20})).await.unwrap();
    journal.put("volume/2/copy", &json!({"done": 5})).await.unwrap();
    journal.put("w", &json!(null)).await.unwrap();
    journal.remove("volume/2/copy").await.unwrap();
    journal.remove("never there").await.unwrap();
    assert_eq!(journal.put("", &1).await.unwrap_err().code, ErrorCode::Internal);
    drop(journal);

    let deadline = Instant::now() + Duration::from_secs(5);
    // The writer ends by itself once nobody can ask it.
    let ledger = loop {
        match Ledger::open(dir.path(), AgentKind::Network, "compute1") {
            Err(LedgerError::Held { .. }) if Instant::now() < deadline => std::thread::yield_now(),
            other => break other.unwrap(),
        }
    };
    let journal = ledger.journal();
    assert_eq!(journal.list("volume/"), [("volume/1/copy".into(), json!({"done": 20}))]);
    assert_eq!(journal.get::<BTreeMap<String, u32>>("volume/1/copy").unwrap().unwrap()["done"], 20);
    assert!(journal.get::<u8>("volume/1/copy").is_err());
    assert_eq!(journal.get::<u8>("nothing").unwrap(), None);
}

#[tokio::test]
async fn a_second_process_is_told_who_holds_the_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let error = refuses_to_open(dir.path()).to_string();
    let holder = format!("held by process {}", std::process::id());
    assert!(error.contains(&holder), "{error}");
    ledger.close().await;
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a child that holds a file and ends by itself")]
fn a_lock_that_a_dying_child_still_holds_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let lock = std::fs::File::create(dir.path().join("ledger.lock")).unwrap();
    lock.lock().unwrap();
    let child = std::process::Command::new("sleep").arg("0.2").stdin(lock).spawn();
    drop(open(dir.path()));
    child.unwrap().wait().unwrap();
}

#[tokio::test]
async fn a_ledger_that_vanished_or_was_emptied_is_not_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let path = ledger.path().to_owned();
    ledger.close().await;
    std::fs::write(&path, b"").unwrap();
    let error = refuses_to_open(dir.path());
    assert!(matches!(error, LedgerError::Lost { .. }), "{error}");
    std::fs::remove_file(&path).unwrap();
    let error = refuses_to_open(dir.path()).to_string();
    assert!(error.contains("put it back from a backup"), "{error}");
    assert!(error.contains("ledger.marker"), "{error}");

    std::fs::remove_file(dir.path().join("ledger.marker")).unwrap();
    assert!(open(dir.path()).desired().objects.is_empty());
}

#[tokio::test]
async fn a_start_that_broke_off_in_the_making_begins_again() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("ledger.redb.new"), b"half a file").unwrap();
    let ledger = open(dir.path());
    apply(&ledger, vec![group(1, "a", 0)]).await.unwrap();
    ledger.close().await;
}

#[tokio::test]
async fn damaged_files_are_refused_with_the_remedy_whatever_the_damage() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let path = ledger.path().to_owned();
    apply(&ledger, (0..300).map(|n| group(n, "a", 1)).collect()).await.unwrap();
    ledger.close().await;
    let whole = std::fs::read(&path).unwrap();

    let cut = |at: usize| whole[..at].to_vec();
    let noise = vec![0xa5; 8192];
    let mut damages =
        vec![cut(1), cut(4096), cut(whole.len() / 2), noise, b"not a ledger".to_vec()];
    // Every page of the store, one at a time, turned to zeroes: the store opens or is refused,
    // but what it shows is what was written.
    let pages = whole.len() / 4096;
    damages.extend((0..pages).map(|page| {
        let mut damaged = whole.clone();
        damaged[page * 4096..(page + 1) * 4096].fill(0);
        damaged
    }));
    let mut refused = 0;
    for (n, damaged) in damages.into_iter().enumerate() {
        std::fs::write(&path, damaged).unwrap();
        match Ledger::open(dir.path(), AgentKind::Network, "compute1") {
            Err(error) => {
                refused += 1;
                let text = error.to_string();
                assert!(text.contains("is damaged"), "damage {n}: {text}");
                assert!(text.contains("mv ") && text.contains("backup"), "damage {n}: {text}");
            }
            Ok(ledger) => {
                assert_eq!(ledger.desired().objects.len(), 300, "damage {n} lost documents");
                ledger.close().await;
            }
        }
    }
    assert!(refused >= 8, "only {refused} damages were noticed");
    std::fs::write(&path, whole).unwrap();
    assert_eq!(open(dir.path()).desired().objects.len(), 300);
}

#[tokio::test]
async fn a_row_that_is_no_document_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let path = ledger.path().to_owned();
    ledger.close().await;
    let key = object(1).to_string();
    let row = json!({
        "document": {"kind": "SecurityGroup", "id": object(1).id, "name": "a", "spec": {"x": 1}},
        "deleting": false, "accepted": "1970-01-01T00:00:00Z", "request_id": "",
    });
    insert(&path, "documents", &key, row.to_string().as_bytes());
    let error = refuses_to_open(dir.path()).to_string();
    assert!(error.contains(&key) && error.contains("unknown field `x`"), "{error}");
}

fn insert(path: &Path, table: &str, key: &str, value: &[u8]) {
    let database = Database::open(path).unwrap();
    let transaction = database.begin_write().unwrap();
    let table = TableDefinition::<&str, &[u8]>::new(table);
    transaction.open_table(table).unwrap().insert(key, value).unwrap();
    transaction.commit().unwrap();
}

#[tokio::test]
async fn a_newer_or_another_agents_ledger_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let path = ledger.path().to_owned();
    ledger.close().await;
    let error = Ledger::open(dir.path(), AgentKind::Storage, "compute1").unwrap_err().to_string();
    assert!(error.contains("belongs to the network agent"), "{error}");
    insert(&path, "meta", "schema", b"9");
    let error = refuses_to_open(dir.path()).to_string();
    assert!(error.contains("schema 9") && error.contains("install the version"), "{error}");
}

/// Schema 2 of the test: every name in upper case.
const UPPER_CASE: &[Migration] = &[Migration {
    from: 1,
    step: |transaction| {
        use redb::ReadableTable;
        let mut table = transaction.open_table(file::DOCUMENTS)?;
        let mut rows = Vec::new();
        for entry in table.iter()? {
            let (key, value) = entry?;
            let mut row: Value = serde_json::from_slice(value.value()).unwrap();
            let name = row["document"]["name"].as_str().unwrap().to_uppercase();
            row["document"]["name"] = name.into();
            rows.push((key.value().to_owned(), row.to_string()));
        }
        for (key, row) in rows {
            table.insert(key.as_str(), row.as_bytes())?;
        }
        Ok(())
    },
}];

#[tokio::test]
async fn an_older_ledger_is_migrated_once_and_a_copy_kept() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let copy = ledger.path().with_extension("redb.v1");
    apply(&ledger, vec![group(1, "a", 7)]).await.unwrap();
    ledger.close().await;

    for _ in 0..2 {
        let ledger =
            Ledger::open_with(dir.path(), AgentKind::Network, "compute1", UPPER_CASE).unwrap();
        assert_eq!(names(&ledger), [("A".into(), 7, false)]);
        ledger.close().await;
    }
    assert!(copy.exists());
    let error = refuses_to_open(dir.path());
    assert!(matches!(error, LedgerError::Newer { found: 2, newest: 1, .. }), "{error}");
    std::fs::rename(&copy, dir.path().join("ledger.redb")).unwrap();
    assert_eq!(names(&open(dir.path())), [("a".into(), 7, false)]);
}

#[tokio::test]
async fn an_export_holds_everything_but_nonces() {
    let dir = tempfile::tempdir().unwrap();
    let error = export(dir.path(), AgentKind::Network, "compute1").unwrap_err();
    assert!(matches!(error, LedgerError::Io { .. }), "{error}");
    assert!(!dir.path().join("ledger.redb").exists(), "exporting makes no ledger");

    let ledger = open(dir.path());
    apply(&ledger, vec![group(1, "a", 7)]).await.unwrap();
    ledger.journal().put("k", &1).await.unwrap();
    let error = export(dir.path(), AgentKind::Network, "compute1").unwrap_err();
    assert!(matches!(error, LedgerError::Held { .. }), "{error}");
    ledger.close().await;
    let json = export(dir.path(), AgentKind::Network, "compute1").unwrap();
    assert_eq!(json["documents"][0]["document"], group(1, "a", 7).to_value());
    assert_eq!(json["documents"][0]["request_id"], "req-1");
    assert_eq!(json["journal"], json!({"k": 1}));
}

/// What one may do to a ledger.
#[derive(Clone, Debug)]
enum Step {
    Apply(Vec<(u128, u8, u64)>),
    Delete(u128),
    Forget(u128),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let document = (0..6_u128, 0..3_u8, 0..5_u64);
    prop_oneof![
        5 => prop::collection::vec(document, 1..4).prop_map(Step::Apply),
        2 => (0..6_u128).prop_map(Step::Delete),
        2 => (0..6_u128).prop_map(Step::Forget),
        1 => Just(Step::Restart),
    ]
}

/// The same rules, told another way: object → (name, generation, deleting).
type Model = BTreeMap<u128, (String, u64, bool)>;

fn model_apply(model: &Model, documents: &[(u128, u8, u64)]) -> Option<Model> {
    let mut next = model.clone();
    for (index, &(n, name, generation)) in documents.iter().enumerate() {
        if documents[..index].iter().any(|&(earlier, ..)| earlier == n) {
            return None;
        }
        let name = format!("name{name}");
        let generation = match model.get(&n) {
            None => generation.max(1),
            Some((.., true)) => return None,
            Some((held, newest, _)) => match generation {
                0 if *held == name => *newest,
                0 => newest + 1,
                older if older < *newest => return None,
                same if same == *newest && *held != name => return None,
                newer => newer,
            },
        };
        next.insert(n, (name, generation, false));
    }
    Some(next)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_asked_the_ledger_holds_what_the_model_holds(
        steps in prop::collection::vec(step(), 1..25)
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let mut ledger = open(dir.path());
            let mut model = Model::new();
            let mut revision = 0;
            for step in steps {
                match step {
                    Step::Apply(documents) => {
                        let request = documents
                            .iter()
                            .map(|&(n, name, generation)| group(n, &format!("name{name}"), generation))
                            .collect();
                        let answer = apply(&ledger, request).await;
                        let expected = model_apply(&model, &documents);
                        assert_eq!(answer.is_ok(), expected.is_some(), "{documents:?} {answer:?}");
                        model = expected.unwrap_or(model);
                    }
                    Step::Delete(n) => {
                        delete(&ledger, n).await.unwrap();
                        if let Some(held) = model.get_mut(&n) {
                            held.2 = true;
                        }
                    }
                    Step::Forget(n) => {
                        ledger.forget(vec![object(n)]).await.unwrap();
                        if model.get(&n).is_some_and(|held| held.2) {
                            model.remove(&n);
                        }
                    }
                    Step::Restart => {
                        ledger.close().await;
                        ledger = open(dir.path());
                    }
                }
                let expected: Vec<_> = model.values().cloned().collect();
                assert_eq!(names(&ledger), expected);
                let now = ledger.desired().revision;
                assert!(now >= revision, "revisions never fall");
                revision = now;
            }
            ledger.close().await;
        });
    }
}
