use std::collections::BTreeSet;

use serde_json::json;
use stackhand_bus::memory::MemoryBroker;
use stackhand_bus::sign::NonceStore;
use stackhand_bus::{BusError, CallLimits, Request, ServerHandle, Target, Transport};
use stackhand_model::{Kind, State};
use tokio::task::JoinHandle;

use super::*;
use crate::api::{self, Condition};
use crate::client::{AgentClient, ClientError};
use crate::heartbeat::Identity;
use crate::ledger::fixtures::{group, id, object, other_agents_document};
use crate::reconcile::Reconciler;
use crate::testing::{Bench, PACE, Toy};

/// An agent with everything but its process, and a caller.
struct Alive {
    client: AgentClient,
    broker: MemoryBroker,
    bench: Bench,
    toy: Arc<Toy>,
    _server: ServerHandle,
    reconciler: JoinHandle<()>,
}

async fn alive() -> Alive {
    let bench = Bench::new();
    let with = bench.with.clone();
    let (toy, _passes) = Toy::new();
    let identity = Identity {
        agent: AgentKind::Network,
        host: "compute1".into(),
        zone: "nova".into(),
        cloud: "default".into(),
        version: "0.1.0".into(),
        started_at: Timestamp::now(),
    };
    let troubles = Arc::clone(&toy);
    let parts = Parts {
        ledger: with.ledger.clone(),
        statuses: with.statuses.clone(),
        events: with.events.clone(),
        reporter: Reporter::new(
            identity,
            Duration::from_secs(10),
            Some(true),
            (with.ledger.clone(), with.statuses.clone(), with.events.clone(), with.health.clone()),
            Arc::new(move || troubles.troubles()),
        ),
        checks: vec![Check::new("toy", || async { vec![preflight::Finding::pass("toy", "ok")] })],
        wake: with.wake.clone(),
        shutdown: with.shutdown.clone(),
        concurrency: 2,
    };
    let api = Arc::new(Api::new(Arc::clone(&toy), parts));
    let broker = MemoryBroker::new();
    let transport: Arc<dyn Transport> = Arc::new(broker.transport());
    let server = transport.serve(api.service(), api).await.unwrap();
    let reconciler = tokio::spawn(Reconciler::new(Arc::clone(&toy), with, PACE).run());
    let client = AgentClient::new(transport, AgentKind::Network, "compute1")
        .with_limit(Duration::from_secs(20));
    Alive { client, broker, bench, toy, _server: server, reconciler }
}

impl Alive {
    async fn raw(&self, method: &str, args: Value) -> Result<Value, BusError> {
        self.send(&api::target(AgentKind::Network, "compute1"), method, args).await
    }

    async fn send(&self, target: &Target, method: &str, args: Value) -> Result<Value, BusError> {
        let limits = CallLimits::total(Duration::from_secs(20));
        self.broker.transport().call(target, Request::new(method, args), limits).await
    }

    async fn refused(&self, method: &str, args: Value) -> Refused {
        match self.raw(method, args).await {
            Err(BusError::Remote(failure)) => {
                let refused = Refused::from_failure(&failure).expect("not of the own API");
                assert_eq!(failure.class, refused.code.class());
                refused
            }
            other => panic!("{method} was not refused: {other:?}"),
        }
    }
}

fn refusal<T: fmt::Debug>(answer: Result<T, ClientError>) -> Refused {
    answer.unwrap_err().refused().expect("not refused by the agent").clone()
}

const SOON: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_document_goes_from_apply_to_active_to_gone() {
    let alive = alive().await;
    let client = &alive.client;
    let both = [object(1), object(2)];
    let applied = client.apply(&[group(1, "web", 0), group(2, "db", 4)]).await.unwrap();
    assert!(applied.objects.iter().all(|it| it.change == Change::Created));
    let settled = client.wait(&both, Condition::Active, SOON).await.unwrap();
    assert!(settled.iter().all(|it| it.status.as_ref().unwrap().state == State::Active));

    let entries = client.get(Some(Kind::SecurityGroup), None).await.unwrap();
    let got: Vec<_> =
        entries.iter().map(|it| (it.document.name.as_str(), it.document.generation)).collect();
    assert_eq!(got, [("web", 1), ("db", 4)]);
    assert!(entries[0].request_id.starts_with("req-"));
    assert_eq!(client.get(None, Some(&[id(2), id(7)])).await.unwrap().len(), 1);
    assert_eq!(client.get(Some(Kind::Port), None).await.unwrap(), []);

    let again = client.apply(&[group(1, "web", 0)]).await.unwrap();
    assert_eq!(again.objects[0].change, Change::Unchanged);
    let report = client.report().await.unwrap();
    assert_eq!(report.objects[&Kind::SecurityGroup][&State::Active], 2);
    assert!(report.healthy, "{:?}", report.reasons);

    client.delete(&both).await.unwrap();
    client.wait(&both, Condition::Gone, SOON).await.unwrap();
    assert_eq!(client.get(None, None).await.unwrap(), []);
    assert!(alive.toy.host.lock().unwrap().is_empty());
    let report = client.report().await.unwrap();
    assert_eq!(report.reasons, ["the toy is bored"]);
}

#[tokio::test]
async fn a_plan_tells_documents_and_steps_and_changes_nothing() {
    let alive = alive().await;
    let client = &alive.client;
    client.apply(&[group(1, "web", 1), group(2, "db", 1)]).await.unwrap();
    client.wait(&[object(1), object(2)], Condition::Active, SOON).await.unwrap();
    assert_eq!(client.plan(&[], &[]).await.unwrap(), Planned { documents: vec![], steps: vec![] });

    let planned =
        client.plan(&[group(1, "www", 0), group(3, "new", 0)], &[object(2)]).await.unwrap();
    let changes: Vec<_> = planned.documents.iter().map(|it| it.change).collect();
    assert_eq!(changes, [Change::Updated, Change::Created, Change::Deleting]);
    let fields: Vec<_> =
        planned.documents[0].fields.iter().map(|it| (it.field.as_str(), &it.to)).collect();
    assert_eq!(fields, [("generation", &json!(2)), ("name", &json!("www"))]);
    let steps: Vec<_> = planned.steps.iter().map(|it| it.change.as_str()).collect();
    assert_eq!(steps, ["make", "take away", "make"]);
    assert!(client.dry_run(&[group(1, "www", 0)]).await.unwrap().dry_run);
    assert_eq!(client.get(None, None).await.unwrap()[0].document.name.as_str(), "web");

    let refused = refusal(client.plan(&[group(1, "www", 1)], &[]).await);
    assert_eq!(refused.code, ErrorCode::Conflict);
}

#[tokio::test]
async fn refusals_name_code_object_field_and_remedy() {
    let alive = alive().await;
    let client = &alive.client;
    client.apply(&[group(1, "web", 5)]).await.unwrap();
    let refused = refusal(client.apply(&[group(1, "web", 4), other_agents_document(2)]).await);
    assert_eq!((refused.code, refused.object), (ErrorCode::Conflict, Some(object(1))));
    assert_eq!(refused.field.as_deref(), Some("generation"));
    assert_eq!(refused.problems.len(), 2);
    assert!(refused.message.ends_with("(and one more problem)"), "{refused}");
    let refused = refusal(client.apply(&[group(3, "never", 1)]).await);
    assert_eq!((refused.code, refused.object), (ErrorCode::Unsupported, Some(object(3))));
}

#[tokio::test]
async fn wrong_arguments_are_named_with_the_nearest_known_one() {
    let alive = alive().await;
    for (method, args, field, words) in [
        ("apply", json!({"resorces": []}), "resorces", "did you mean `resources`"),
        ("apply", json!({}), "", "missing field `resources`"),
        ("apply", json!({"resources": 7}), "resources", "invalid type"),
        ("ping", json!({"x": 1}), "x", "it takes none"),
        ("wait", json!({"refs": [], "condition": "ready", "timeout": 1}), "condition", "`settled`"),
        ("wait", json!({"refs": [], "condition": "gone", "timeout": -1}), "timeout", "0 to 3600"),
        ("wait", json!({"refs": [], "condition": "gone", "timeout": 1e9}), "timeout", "0 to 3600"),
        ("delete", json!({"refs": [{"kind": "Prot", "id": id(1)}]}), "refs[0].kind", "Port"),
        ("delete", json!({"refs": [{"kind": "Volume", "id": id(1)}]}), "kind", "storage agent"),
        ("events", json!({"wait_seconds": 61}), "wait_seconds", "0 to 60"),
        ("set_admin", json!({"enabled": false, "reason": "a\nb"}), "reason", "one line"),
    ] {
        let refused = alive.refused(method, args.clone()).await;
        assert_eq!(refused.code, ErrorCode::BadRequest, "{method} {args}");
        assert_eq!(refused.field.unwrap_or_default(), field, "{method} {args}");
        assert!(refused.message.contains(words), "{method} {args}: {}", refused.message);
    }
    let document = json!({"kind": "SecurityGroup", "id": id(1), "name": "a", "spec": {"rule": []}});
    let refused = alive.refused("apply", json!({"resources": [document]})).await;
    assert_eq!(refused.document.as_deref(), Some("SecurityGroup a"));
    assert!(refused.message.contains("did you mean `rules`"), "{refused}");
    let many = vec![json!(null); MOST_RESOURCES + 1];
    let refused = alive.refused("apply", json!({"resources": many})).await;
    assert!(refused.message.contains("the most is 20000"), "{refused}");
}

#[tokio::test]
async fn unknown_methods_versions_and_namespaces_get_the_dispatchers_failures() {
    let alive = alive().await;
    let target = api::target(AgentKind::Network, "compute1");
    let newer = target.clone().at_version(Version::new(1, 1));
    let spaced = target.clone().in_namespace("baseapi");
    for (target, method, class) in [
        (&target, "reboot", "NoSuchMethod"),
        (&newer, "ping", "UnsupportedVersion"),
        (&spaced, "ping", "UnsupportedVersion"),
    ] {
        match alive.send(target, method, json!({})).await {
            Err(BusError::Remote(failure)) => {
                assert_eq!(failure.class, class);
                assert_eq!(failure.module, "oslo_messaging.rpc.dispatcher");
            }
            other => panic!("{method}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_wait_in_vain_lists_what_is_not_there_and_why() {
    let alive = alive().await;
    let client = &alive.client;
    client.apply(&[group(1, "ok", 0), group(2, "waits", 0), group(3, "fails", 0)]).await.unwrap();
    let all = [object(1), object(2), object(3), object(4)];
    let short = Duration::from_millis(300);
    let refused = refusal(client.wait(&all, Condition::Active, short).await);
    assert_eq!(refused.code, ErrorCode::Timeout);
    let waiting: Vec<_> =
        refused.waiting.iter().map(|it| (it.object, it.state, it.reason.as_str())).collect();
    let expected = [
        (object(2), Some(State::Pending), "waits for a tap"),
        (object(3), Some(State::Error), "the toy does not want to"),
        (object(4), None, "it is not held here"),
    ];
    assert_eq!(waiting, expected);
    let settled = client.wait(&[object(1), object(3)], Condition::Settled, SOON).await.unwrap();
    assert_eq!(settled[1].status.as_ref().unwrap().state, State::Error);
}

#[tokio::test]
async fn what_an_action_began_is_not_done_before_a_pass_has_looked_at_it() {
    let alive = alive().await;
    let client = &alive.client;
    client.apply(&[group(1, "ok", 0)]).await.unwrap();
    client.wait(&[object(1)], Condition::Done, SOON).await.unwrap();
    // No pass ends until it may.
    alive.toy.gate.forget_permits(Semaphore::MAX_PERMITS);
    alive.bench.with.wake.object_changed(object(1));
    let short = Duration::from_millis(200);
    let refused = refusal(client.wait(&[object(1)], Condition::Done, short).await);
    assert_eq!(refused.waiting[0].reason, "the agent is to look at it");
    client.wait(&[object(1)], Condition::Active, SOON).await.unwrap();
    let waits = {
        let client = client.clone();
        tokio::spawn(async move { client.wait(&[object(1)], Condition::Done, SOON).await })
    };
    alive.toy.gate.add_permits(1);
    waits.await.unwrap().unwrap();
}

#[tokio::test]
async fn waiting_requests_keep_nobody_out() {
    let alive = alive().await;
    let waits: Vec<_> = (0..WAITERS + 1)
        .map(|_| {
            let client = alive.client.clone();
            tokio::spawn(async move { client.wait(&[object(9)], Condition::Active, SOON).await })
        })
        .collect();
    let (first, _, others) = futures_util::future::select_all(waits).await;
    assert_eq!(refusal(first.unwrap()).code, ErrorCode::Exhausted, "one too many");
    alive.client.ping().await.unwrap();
    alive.client.apply(&[group(9, "late", 0)]).await.unwrap();
    for wait in others {
        wait.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn actions_reach_the_agent_for_objects_that_are_held() {
    let alive = alive().await;
    let client = &alive.client;
    let refused = refusal(client.act(object(1), "poke", Value::Null).await);
    assert_eq!(refused.code, ErrorCode::NotFound);
    client.apply(&[group(1, "fails", 0)]).await.unwrap();
    let answer = client.act(object(1), "poke", json!({"hard": true})).await.unwrap();
    assert_eq!(answer["hard"], true);
    let refused = refusal(client.act(object(1), "kick", Value::Null).await);
    assert_eq!(refused.code, ErrorCode::Unsupported);
    assert!(refused.message.contains("there is: poke"));
    client.delete(&[object(1)]).await.unwrap();
    let refused = refusal(client.act(object(1), "poke", Value::Null).await);
    assert_eq!(refused.code, ErrorCode::WrongState);
}

#[tokio::test]
async fn an_action_waits_until_the_nonce_that_it_came_with_is_on_disk() {
    let alive = alive().await;
    let client = &alive.client;
    client.apply(&[group(1, "fails", 0)]).await.unwrap();
    // The writer is held up in the agent's judgement of another request.
    let (go, held) = std::sync::mpsc::channel::<()>();
    let (began, judging) = tokio::sync::oneshot::channel();
    let turn = std::sync::Mutex::new(Some((began, held)));
    let admit: Admit = Arc::new(move |_, _| {
        if let Some((began, held)) = turn.lock().unwrap().take() {
            began.send(()).unwrap();
            held.recv().unwrap();
        }
        Ok(())
    });
    let ledger = alive.bench.with.ledger.clone();
    let other = tokio::spawn({
        let ledger = ledger.clone();
        async move { ledger.apply(vec![group(2, "ok", 0)], "req-1", false, admit).await }
    });
    judging.await.unwrap();
    assert!(ledger.nonces().remember("n1", Timestamp::MAX).await.unwrap());
    let mut acting = std::pin::pin!(client.act(object(1), "poke", Value::Null));
    let early = tokio::time::timeout(Duration::from_millis(100), &mut acting).await;
    assert!(early.is_err(), "acted with the nonce not on disk: {early:?}");
    go.send(()).unwrap();
    acting.await.unwrap();
    other.await.unwrap().unwrap();
}

#[tokio::test]
async fn events_are_told_at_once_to_those_who_wait_for_them() {
    let alive = alive().await;
    let client = alive.client.clone();
    assert_eq!(client.events(0, 10, Duration::ZERO).await.unwrap().events, []);
    let waiting = tokio::spawn(async move { client.events(0, 10, SOON).await.unwrap() });
    alive.client.set_admin(false, Some("disk swap")).await.unwrap();
    let since = waiting.await.unwrap();
    assert_eq!(since.events[0].kind, "Disabled");
    assert!(since.events[0].request_id.as_deref().unwrap().starts_with("req-"));
}

#[tokio::test]
async fn what_operators_set_is_kept_and_reported() {
    let alive = alive().await;
    let client = &alive.client;
    let control = client.set_admin(false, Some("disk swap")).await.unwrap();
    assert_eq!((control.enabled, control.reason.as_deref()), (false, Some("disk swap")));
    client.pause(Some("hands in the rack")).await.unwrap();
    let report = client.report().await.unwrap();
    assert!(report.reasons[0].contains("hands in the rack"), "{:?}", report.reasons);
    assert!(!report.control.enabled);
    client.apply(&[group(1, "a", 0)]).await.unwrap();
    let short = Duration::from_millis(50);
    let refused = refusal(client.wait(&[object(1)], Condition::Active, short).await);
    assert!(refused.message.contains("paused"), "{refused}");
    client.resume().await.unwrap();
    client.wait(&[object(1)], Condition::Active, SOON).await.unwrap();
    assert_eq!(client.set_admin(true, None).await.unwrap(), api::Control::default());
}

#[tokio::test]
async fn an_agent_that_stops_refuses_changes_and_lets_waiters_go() {
    let alive = alive().await;
    let client = alive.client.clone();
    let waiting =
        tokio::spawn(async move { client.wait(&[object(1)], Condition::Active, SOON).await });
    // Its place is taken once ping, sent later, is answered.
    alive.client.ping().await.unwrap();
    alive.bench.with.shutdown.request("test");
    assert_eq!(refusal(waiting.await.unwrap()).code, ErrorCode::Unavailable);
    let refused = refusal(alive.client.apply(&[group(1, "a", 0)]).await);
    assert_eq!(refused.code, ErrorCode::Unavailable);
    alive.reconciler.await.unwrap();
}

#[tokio::test]
async fn facts_preflight_and_ping_answer() {
    let alive = alive().await;
    assert_eq!(alive.client.facts().await.unwrap(), json!({"toy": true}));
    assert!(alive.client.preflight().await.unwrap().is_fit());
    let pong = alive.client.ping().await.unwrap();
    assert_eq!((pong.agent, pong.host.as_str()), (AgentKind::Network, "compute1"));
}

#[test]
fn the_table_of_methods_names_each_once() {
    let names: BTreeSet<_> = args::METHODS.iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), args::METHODS.len());
}
