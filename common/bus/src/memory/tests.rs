use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::StreamExt;
use serde_json::json;

use super::*;
use crate::Priority;

/// Answers with its own name and the arguments; `sleep` takes the seconds it is told.
struct Named {
    name: &'static str,
    running: AtomicUsize,
    most: AtomicUsize,
    told: AtomicUsize,
}

impl Named {
    fn new(name: &'static str) -> Arc<Self> {
        let zero = AtomicUsize::default;
        Arc::new(Self { name, running: zero(), most: zero(), told: zero() })
    }
}

impl Handler for Named {
    fn handle(&self, delivered: Delivered) -> BoxFuture<'_, Result<Value, Failure>> {
        async move {
            self.told.fetch_add(1, Ordering::SeqCst);
            let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(running, Ordering::SeqCst);
            let method = delivered.request.method.as_str();
            assert_ne!(method, "panic", "on purpose");
            if method == "sleep" {
                let seconds = delivered.request.args["seconds"].as_u64().unwrap();
                tokio::time::sleep(Duration::from_secs(seconds)).await;
            }
            self.running.fetch_sub(1, Ordering::SeqCst);
            match method {
                "fail" => Err(Failure::new("Broken", "it is broken")),
                _ => Ok(json!(self.name)),
            }
        }
        .boxed()
    }
}

fn service(server: &str, concurrency: usize) -> Service {
    Service { exchange: "x".into(), topic: "t".into(), server: server.into(), concurrency }
}

async fn serve_on(broker: &MemoryBroker, handler: &Arc<Named>, concurrency: usize) -> ServerHandle {
    let handler: Arc<Named> = Arc::clone(handler);
    let service = service(handler.name, concurrency);
    broker.transport().serve(service, handler).await.unwrap()
}

fn topic() -> Target {
    Target::topic("x", "t")
}

fn request(method: &str) -> Request {
    Request::new(method, json!({}))
}

fn sleep(seconds: u64) -> Request {
    Request::new("sleep", json!({ "seconds": seconds }))
}

#[tokio::test(start_paused = true)]
async fn servers_of_a_topic_take_turns_and_a_named_one_is_met() {
    let broker = MemoryBroker::new();
    let (a, b) = (Named::new("a"), Named::new("b"));
    let _a = serve_on(&broker, &a, 4).await;
    let _b = serve_on(&broker, &b, 4).await;
    let client = broker.transport();
    for _ in 0..10 {
        client.call(&topic(), request("who"), CallLimits::default()).await.unwrap();
        let to_b = topic().on_server("b");
        let answer = client.call(&to_b, request("who"), CallLimits::default()).await.unwrap();
        assert_eq!(answer, json!("b"));
    }
    assert!(a.told.load(Ordering::SeqCst) >= 3, "a had its turns");
    client.cast(&topic().to_all(), request("hear")).await.unwrap();
    client.cast(&topic().to_all(), request("hear")).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let told = a.told.load(Ordering::SeqCst) + b.told.load(Ordering::SeqCst);
    assert_eq!(told, 24);
}

#[tokio::test(start_paused = true)]
async fn failures_and_panics_are_answers() {
    let broker = MemoryBroker::new();
    let _server = serve_on(&broker, &Named::new("a"), 1).await;
    let client = broker.transport();
    let error = client.call(&topic(), request("fail"), CallLimits::default()).await.unwrap_err();
    assert!(matches!(error, BusError::Remote(failure) if failure.class == "Broken"));
    let error = client.call(&topic(), request("panic"), CallLimits::default()).await.unwrap_err();
    assert!(error.to_string().contains("on purpose"), "{error}");
    client.call(&topic(), request("who"), CallLimits::default()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_call_ends_at_its_limit_and_a_call_to_nobody_at_once() {
    let broker = MemoryBroker::new();
    let client = broker.transport();
    let error = client.call(&topic(), request("who"), CallLimits::default()).await.unwrap_err();
    assert!(matches!(error, BusError::Undeliverable { .. }), "{error}");
    let _server = serve_on(&broker, &Named::new("a"), 1).await;
    let limits = CallLimits::total(Duration::from_secs(5));
    let error = client.call(&topic(), sleep(60), limits).await.unwrap_err();
    assert!(matches!(error, BusError::Timeout { seconds: 5, .. }), "{error}");
    let error = client.call(&topic().to_all(), request("who"), limits).await.unwrap_err();
    assert!(matches!(error, BusError::Config(_)), "{error}");
}

#[tokio::test(start_paused = true)]
async fn no_more_run_at_once_than_the_service_takes_on() {
    let broker = MemoryBroker::new();
    let named = Named::new("a");
    let _server = serve_on(&broker, &named, 3).await;
    let client = broker.transport();
    let target = topic();
    let calls = (0..20).map(|_| client.call(&target, sleep(1), CallLimits::default()));
    for answer in futures_util::future::join_all(calls).await {
        answer.unwrap();
    }
    assert_eq!(named.most.load(Ordering::SeqCst), 3);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_shuts_down_finishes_what_runs_and_passes_the_rest_on() {
    let broker = MemoryBroker::new();
    let (a, b) = (Named::new("a"), Named::new("b"));
    let leaving = serve_on(&broker, &a, 1).await;
    let client = Arc::new(broker.transport());
    let ask = |request| {
        let client = Arc::clone(&client);
        tokio::spawn(async move { client.call(&topic(), request, CallLimits::default()).await })
    };
    let (first, second) = (ask(sleep(3)), ask(sleep(1)));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let _b = serve_on(&broker, &b, 1).await;
    leaving.shut_down(Duration::from_secs(10)).await;
    assert_eq!(first.await.unwrap().unwrap(), json!("a"));
    assert_eq!(second.await.unwrap().unwrap(), json!("b"));
}

#[tokio::test(start_paused = true)]
async fn streams_are_read_from_any_point_and_forget_by_age_and_size() {
    let broker = MemoryBroker::new();
    let bus = broker.transport();
    let stream =
        Stream { name: "s".into(), max_age: Duration::from_secs(60), max_bytes: 1_000_000 };
    for number in 0..3 {
        bus.publish(&stream, json!(number)).await.unwrap();
        tokio::time::sleep(Duration::from_secs(25)).await;
    }
    let all = async |stream: &Stream, from| {
        let read = bus.read(stream, from, false).await.unwrap();
        read.map(|record| record.unwrap().offset).collect::<Vec<_>>().await
    };
    assert_eq!(all(&stream, ReadFrom::First).await, [1, 2]);
    assert_eq!(all(&stream, ReadFrom::Age(Duration::from_secs(30))).await, [2]);
    assert_eq!(all(&stream, ReadFrom::Next).await, [0; 0]);

    let mut tail = bus.read(&stream, ReadFrom::Next, true).await.unwrap();
    let other = broker.transport();
    other.publish(&stream, json!("new")).await.unwrap();
    assert_eq!(tail.next().await.unwrap().unwrap(), Record { offset: 3, body: json!("new") });

    let small = Stream { max_bytes: 10, ..stream };
    for _ in 0..10 {
        bus.publish(&small, json!("12345")).await.unwrap();
    }
    assert_eq!(all(&small, ReadFrom::First).await, [13]);
}

#[tokio::test(start_paused = true)]
async fn a_lock_excludes_until_it_is_dropped() {
    let broker = MemoryBroker::new();
    let (one, two) = (broker.transport(), broker.transport());
    let held = one.lock("apply", Duration::ZERO).await.unwrap();
    let error = two.lock("apply", Duration::from_secs(1)).await.unwrap_err();
    assert!(matches!(error, BusError::Timeout { .. }), "{error}");
    drop(held);
    two.lock("apply", Duration::ZERO).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_is_away_says_so_and_notifications_reach_listeners() {
    let broker = MemoryBroker::new();
    let bus = broker.transport();
    let mut heard = broker.notifications();
    let notification = Notification {
        exchange: "x".into(),
        topic: "notifications".into(),
        publisher_id: "compute.h1".into(),
        event_type: "a.b".into(),
        priority: Priority::Info,
        payload: json!({}),
        context: crate::Context::fresh(),
    };
    broker.take_down("maintenance");
    let error = bus.notify(notification.clone()).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot reach memory: maintenance");
    assert!(matches!(&*bus.link().borrow(), LinkState::Down { .. }));
    broker.bring_up(2);
    bus.notify(notification.clone()).await.unwrap();
    assert_eq!(heard.recv().await.unwrap(), notification);
    bus.close().await;
    assert!(bus.cast(&topic(), request("who")).await.is_err());
}
