use stackhand_model::Document;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;

use super::*;
use crate::ledger::Admit;
use crate::ledger::fixtures::{group, object};
use crate::testing::{Bench, PACE, Seen, Toy};

struct Running {
    bench: Bench,
    toy: Arc<Toy>,
    seen: UnboundedReceiver<Seen>,
    passes: watch::Receiver<Passes>,
    task: JoinHandle<()>,
}

impl Running {
    /// A loop that begins with these documents.
    async fn begin(documents: Vec<Document>) -> Self {
        let bench = Bench::new();
        apply(&bench, documents).await;
        let (toy, seen) = Toy::new();
        let reconciler = Reconciler::new(Arc::clone(&toy), bench.with.clone(), PACE);
        let passes = reconciler.passes();
        Self { task: tokio::spawn(reconciler.run()), bench, toy, seen, passes }
    }

    async fn next(&mut self) -> Seen {
        self.seen.recv().await.unwrap()
    }

    async fn ended(&mut self, count: u64) {
        self.passes.wait_for(|passes| passes.ended >= count).await.unwrap();
    }

    fn state(&self, n: u128) -> Option<State> {
        self.bench.with.statuses.of(&object(n)).map(|status| status.state)
    }

    fn kinds(&self) -> Vec<String> {
        self.bench.with.events.since(0, 100).events.into_iter().map(|it| it.kind).collect()
    }

    async fn stop(self) {
        self.bench.with.shutdown.request("test");
        self.task.await.unwrap();
    }
}

async fn apply(bench: &Bench, documents: Vec<Document>) {
    let admit: Admit = Arc::new(|_, _| Ok(()));
    bench.with.ledger.apply(documents, "req-1", false, admit).await.unwrap();
}

async fn delete(bench: &Bench, n: u128) {
    let admit: Admit = Arc::new(|_, _| Ok(()));
    bench.with.ledger.delete(vec![object(n)], "req-2", admit).await.unwrap();
}

#[tokio::test]
async fn what_is_accepted_becomes_active_and_a_second_pass_changes_nothing() {
    let mut running = Running::begin(vec![group(1, "a", 3)]).await;
    assert_eq!(running.next().await.cause, Cause::Start);
    running.ended(1).await;
    let status = running.bench.with.statuses.of(&object(1)).unwrap();
    assert_eq!((status.state, status.generation, status.reason), (State::Active, 3, None));
    assert_eq!(status.observed["generation"], 3);

    running.bench.with.wake.host_changed();
    assert_eq!(running.next().await.cause, Cause::Host);
    running.ended(2).await;
    assert_eq!(running.bench.with.metrics.reconcile_writes.get(), 1, "made once");
    assert_eq!(running.kinds(), ["Adopted"]);
    running.stop().await;
}

#[tokio::test]
async fn a_change_is_pending_until_a_pass_was_about_it() {
    let mut running = Running::begin(vec![group(1, "a", 1)]).await;
    running.ended(1).await;
    running.toy.gate.forget_permits(tokio::sync::Semaphore::MAX_PERMITS);
    apply(&running.bench, vec![group(1, "b", 2), group(2, "waits", 1)]).await;
    assert_eq!(running.state(1), Some(State::Pending), "the old finding no longer counts");
    running.toy.gate.add_permits(1);
    running.ended(2).await;
    assert_eq!(running.state(1), Some(State::Active));
    let waits = running.bench.with.statuses.of(&object(2)).unwrap();
    assert_eq!((waits.state, waits.reason.as_deref()), (State::Pending, Some("waits for a tap")));
    let events = running.bench.with.events.since(0, 10).events;
    let last = events.iter().find(|event| event.kind == "Active").unwrap();
    assert_eq!(last.request_id.as_deref(), Some("req-1"));
    running.stop().await;
}

#[tokio::test]
async fn what_is_gone_is_forgotten_without_another_pass() {
    let mut running = Running::begin(vec![group(1, "a", 1), group(2, "b", 1)]).await;
    running.ended(1).await;
    delete(&running.bench, 1).await;
    running.ended(2).await;
    assert_eq!(running.state(1), None);
    assert!(running.bench.with.ledger.entry(&object(1)).is_none());
    assert!(running.toy.host.lock().unwrap().keys().eq([&object(2)]));
    let gone = running.bench.with.events.since(0, 10).events.pop().unwrap();
    assert_eq!((gone.kind.as_str(), gone.request_id.as_deref()), ("Gone", Some("req-2")));
    running.bench.with.wake.host_changed();
    running.ended(3).await;
    let causes = [running.next().await, running.next().await, running.next().await];
    let causes = causes.map(|it| it.cause);
    assert_eq!(causes, [Cause::Start, Cause::Change, Cause::Host], "forgetting is no change");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_object_that_fails_waits_alone_and_longer_each_time() {
    let mut running = Running::begin(vec![group(1, "a", 1), group(2, "fails", 1)]).await;
    let first = running.next().await;
    assert_eq!(first.due.len(), 2);
    let mut before = first.at;
    for full in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0] {
        let pass = running.next().await;
        assert_eq!(pass.cause, Cause::Retry);
        let waited = (pass.at - before).as_secs_f64();
        assert!((full * 0.8 - 0.01..full + 0.01).contains(&waited), "{waited} s, not {full} s");
        assert!(pass.due.contains(&object(2)));
        before = pass.at;
    }
    assert_eq!(running.state(2), Some(State::Error));
    assert_eq!(running.kinds().iter().filter(|kind| *kind == "Failed").count(), 1, "told once");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn while_one_object_waits_passes_for_others_leave_it_out() {
    let mut running = Running::begin(vec![group(1, "a", 1), group(2, "fails", 1)]).await;
    running.ended(1).await;
    running.next().await;
    running.bench.with.wake.host_changed();
    let pass = running.next().await;
    assert_eq!((pass.cause, pass.due), (Cause::Host, BTreeSet::from([object(1)])));
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_object_that_the_host_names_is_tried_soon_and_not_at_once() {
    let mut running = Running::begin(vec![group(2, "fails", 1)]).await;
    let mut last = running.next().await;
    for _ in 0..4 {
        last = running.next().await;
    }
    running.ended(5).await;
    // Now it waits 13 to 16 s. Events of its own making must not make it hot.
    running.bench.with.wake.object_changed(object(2));
    let pass = running.next().await;
    assert!(pass.due.is_empty(), "not before the shortest back-off");
    let pass = running.next().await;
    assert_eq!((pass.cause, pass.at - last.at), (Cause::Retry, PACE.retry_min));

    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_pass_that_panics_fails_its_objects_and_the_loop_goes_on() {
    let mut running = Running::begin(vec![group(1, "panics", 1)]).await;
    running.ended(1).await;
    let status = running.bench.with.statuses.of(&object(1)).unwrap();
    assert_eq!(status.state, State::Error);
    assert!(status.reason.unwrap().contains("toy panic"));
    apply(&running.bench, vec![group(1, "behaves", 2)]).await;
    running.passes.wait_for(|passes| passes.revision == 2).await.unwrap();
    assert_eq!(running.state(1), Some(State::Active));
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn without_news_a_pass_undoes_drift_now_and_then() {
    let mut running = Running::begin(vec![group(1, "a", 1)]).await;
    let first = running.next().await;
    running.ended(1).await;
    running.toy.host.lock().unwrap().clear();
    let second = running.next().await;
    assert_eq!((second.cause, second.at - first.at), (Cause::Timer, PACE.resync));
    running.ended(2).await;
    assert!(running.toy.host.lock().unwrap().contains_key(&object(1)));
    running.stop().await;
}

#[tokio::test]
async fn a_paused_agent_makes_no_pass_and_says_why() {
    let mut running = Running::begin(vec![]).await;
    running.ended(1).await;
    let ledger = running.bench.with.ledger.clone();
    ledger.set_control(|it| it.paused = Some("disk swap".into())).await.unwrap();
    apply(&running.bench, vec![group(1, "a", 1)]).await;
    let status = running.bench.with.statuses.of(&object(1)).unwrap();
    assert_eq!(status.state, State::Pending);
    assert!(status.reason.unwrap().contains("paused: disk swap"));
    ledger.set_control(|it| it.paused = None).await.unwrap();
    running.passes.wait_for(|passes| passes.revision == 1).await.unwrap();
    assert_eq!(running.state(1), Some(State::Active));
    running.stop().await;
}

#[tokio::test]
async fn a_stop_lets_the_running_pass_finish() {
    let mut running = Running::begin(vec![]).await;
    running.ended(1).await;
    running.toy.gate.forget_permits(tokio::sync::Semaphore::MAX_PERMITS);
    running.next().await;
    apply(&running.bench, vec![group(1, "a", 1)]).await;
    running.next().await;
    running.bench.with.shutdown.request("test");
    running.toy.gate.add_permits(1);
    running.task.await.unwrap();
    assert_eq!(running.bench.with.statuses.of(&object(1)).unwrap().state, State::Active);
}
