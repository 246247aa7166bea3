//! What the tests over a real broker share: a handler with observable effects.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use stackhand_bus::amqp::{AmqpOptions, AmqpTransport};
use stackhand_bus::{
    BusError, CallLimits, Delivered, Failure, Handler, LinkState, Request, ServerHandle, Service,
    Target, Transport, Version,
};

pub(crate) const EXCHANGE: &str = "stackhand";

/// Answers a few methods, and remembers how often each effect was done.
#[derive(Debug, Default)]
pub(crate) struct Worker {
    effects: Mutex<BTreeMap<String, u32>>,
    casts: Mutex<Vec<Value>>,
    running: Mutex<(usize, usize)>,
}

impl Worker {
    /// How often the effect called `name` was done.
    pub(crate) fn effects(&self, name: &str) -> u32 {
        self.effects.lock().unwrap().get(name).copied().unwrap_or(0)
    }

    pub(crate) fn all_effects(&self) -> BTreeMap<String, u32> {
        self.effects.lock().unwrap().clone()
    }

    pub(crate) fn casts(&self) -> Vec<Value> {
        self.casts.lock().unwrap().clone()
    }

    /// The most requests that ran at once.
    pub(crate) fn most_at_once(&self) -> usize {
        self.running.lock().unwrap().1
    }

    async fn serve(&self, delivered: Delivered) -> Result<Value, Failure> {
        let Request { method, args, context } = delivered.request;
        if !Version::new(1, 5).serves(delivered.version) {
            return Err(Failure::unsupported_version(&delivered.version.to_string(), &method));
        }
        match method.as_str() {
            "echo" => Ok(Value::Object(args)),
            "context" => Ok(Value::Object(context.0)),
            "effect" => {
                let name = args["name"].as_str().unwrap().to_owned();
                *self.effects.lock().unwrap().entry(name.clone()).or_default() += 1;
                tokio::time::sleep(millis(args.get("ms"))).await;
                Ok(json!({"done": name}))
            }
            "sleep" => {
                {
                    let mut running = self.running.lock().unwrap();
                    running.0 += 1;
                    running.1 = running.1.max(running.0);
                }
                tokio::time::sleep(millis(args.get("ms"))).await;
                self.running.lock().unwrap().0 -= 1;
                Ok(json!("woke"))
            }
            "note" => {
                self.casts.lock().unwrap().push(Value::Object(args));
                Ok(Value::Null)
            }
            "raise" => {
                let mut failure = Failure::new("VolumeNotFound", "Volume v1 could not be found");
                failure.module = "cinder.exception".into();
                failure.kwargs.insert("volume_id".into(), "v1".into());
                Err(failure)
            }
            "panic" => panic!("told to"),
            other => Err(Failure::no_such_method(other)),
        }
    }
}

fn millis(value: Option<&Value>) -> Duration {
    Duration::from_millis(value.and_then(Value::as_u64).unwrap_or(0))
}

impl Handler for Worker {
    fn handle(&self, delivered: Delivered) -> BoxFuture<'_, Result<Value, Failure>> {
        self.serve(delivered).boxed()
    }
}

pub(crate) fn transport(url: &str, options: &AmqpOptions) -> AmqpTransport {
    AmqpTransport::connect(url.parse().unwrap(), options).unwrap()
}

/// A server of `topic` with its worker, on a transport of its own.
pub(crate) struct Serving {
    pub(crate) transport: AmqpTransport,
    pub(crate) worker: Arc<Worker>,
    pub(crate) handle: ServerHandle,
}

pub(crate) async fn serve(
    url: &str,
    options: &AmqpOptions,
    topic: &str,
    concurrency: usize,
) -> Serving {
    let transport = transport(url, options);
    up(&transport, Duration::from_secs(20)).await;
    let worker = Arc::new(Worker::default());
    let service = service(topic, concurrency);
    let handle = transport.serve(service, Arc::clone(&worker) as Arc<dyn Handler>).await.unwrap();
    Serving { transport, worker, handle }
}

pub(crate) fn service(topic: &str, concurrency: usize) -> Service {
    Service { exchange: EXCHANGE.into(), topic: topic.into(), server: "h1".into(), concurrency }
}

pub(crate) fn target(topic: &str) -> Target {
    Target::topic(EXCHANGE, topic)
}

pub(crate) async fn call(
    transport: &dyn Transport,
    topic: &str,
    method: &str,
    args: Value,
) -> Result<Value, BusError> {
    let limits = CallLimits::total(Duration::from_secs(30));
    transport.call(&target(topic), Request::new(method, args), limits).await
}

/// Waits until the link is up, and returns its generation.
pub(crate) async fn up(transport: &dyn Transport, limit: Duration) -> u64 {
    up_after(transport, 0, limit).await
}

/// Waits until the link is up in a generation after `generation`.
pub(crate) async fn up_after(transport: &dyn Transport, generation: u64, limit: Duration) -> u64 {
    let mut link = transport.link();
    let seen = link
        .wait_for(|state| matches!(state, LinkState::Up { generation: now } if *now > generation));
    match tokio::time::timeout(limit, seen).await {
        Ok(state) => match *state.unwrap() {
            LinkState::Up { generation } => generation,
            LinkState::Down { .. } => unreachable!("waited for up"),
        },
        Err(_) => panic!("not up within {limit:?}: {:?}", *transport.link().borrow()),
    }
}

/// Waits for a condition that no notification tells of.
pub(crate) async fn eventually(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < end, "gave up waiting: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Resident memory of this process, in KiB.
pub(crate) fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
