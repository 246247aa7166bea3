//! Brokers that are wrong, silent, full or rude.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use serde_json::json;
use stackhand_bus::amqp::{AmqpOptions, AmqpTransport};
use stackhand_bus::{BusError, CallLimits, LinkState, Request, Stream, Transport};
use stackhand_testkit::broker::Broker;

use crate::support::*;
use crate::{LIMIT, raw};

pub(crate) async fn wrong_credentials_and_vhosts_are_told(url: &str) {
    for (wrong, remedy) in [
        (url.replace("guest:guest", "guest:wr0ng"), "password"),
        (format!("{url}nowhere"), "vhost"),
    ] {
        let client = transport(&wrong, &AmqpOptions::default());
        let mut link = client.link();
        let told = link.wait_for(
            |state| matches!(state, LinkState::Down { reason } if reason.contains(remedy)),
        );
        tokio::time::timeout(LIMIT, told).await.unwrap().unwrap();
        let begun = Instant::now();
        let outcome = call(&client, "t-any", "echo", json!({})).await;
        let Err(error @ BusError::Refused { .. }) = outcome else { panic!("{outcome:?}") };
        assert!(error.to_string().contains(remedy) && !error.to_string().contains("wr0ng"));
        assert!(begun.elapsed() < LIMIT, "refusals are told without waiting for the call's limit");
    }
}

/// A peer that accepts and says nothing.
pub(crate) async fn a_silent_peer_is_given_up_in_time() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("rabbit://127.0.0.1:{}/", listener.local_addr().unwrap().port());
    let silent = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok(accepted) = listener.accept().await {
            held.push(accepted);
        }
    });
    let options = AmqpOptions { connect_timeout_seconds: 0.3, ..AmqpOptions::default() };
    let client = transport(&url, &options);
    let mut link = client.link();
    let told = link.wait_for(
        |state| matches!(state, LinkState::Down { reason } if reason.contains("greeting")),
    );
    tokio::time::timeout(LIMIT, told).await.unwrap().unwrap();
    let begun = Instant::now();
    let limits = CallLimits::total(Duration::from_millis(300));
    let outcome = client.call(&target("t-any"), Request::new("echo", json!({})), limits).await;
    assert!(matches!(outcome, Err(BusError::Unreachable { .. })), "{outcome:?}");
    assert!(begun.elapsed() < LIMIT);
    silent.abort();
}

/// Threads of this process that carry a connection.
fn connection_threads() -> usize {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .filter(|name| name.starts_with("lapin"))
        .count()
}

/// A load balancer without a backend: it accepts, and closes at once.
pub(crate) async fn a_peer_that_accepts_and_closes_does_not_wedge_us(url: &str) {
    let broker = url.rsplit_once(':').unwrap().1.trim_end_matches('/').to_owned();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let front = listener.local_addr().unwrap().port();
    let open = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let gate = Arc::clone(&open);
    tokio::spawn(async move {
        while let Ok((mut inward, _)) = listener.accept().await {
            if !gate.load(std::sync::atomic::Ordering::Relaxed) {
                continue;
            }
            let address = format!("127.0.0.1:{broker}");
            tokio::spawn(async move {
                let mut outward = tokio::net::TcpStream::connect(address).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut inward, &mut outward).await;
            });
        }
    });
    let client =
        transport(&format!("rabbit://guest:guest@127.0.0.1:{front}/"), &AmqpOptions::default());
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(matches!(*client.link().borrow(), LinkState::Down { .. }));
    open.store(true, std::sync::atomic::Ordering::Relaxed);
    up(&client, LIMIT).await;
}

pub(crate) async fn connections_closed_by_the_broker_come_back(broker: &Broker, url: &str) {
    let server = serve(url, &AmqpOptions::default(), "t-closed", 8).await;
    let client = transport(url, &AmqpOptions::default());
    let generation = up(&client, LIMIT).await;
    let done = std::sync::atomic::AtomicBool::new(false);
    let calling = async {
        let mut number = 0;
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            let batch = (number..number + 8).map(|n| {
                call(&client, "t-closed", "effect", json!({"name": format!("c{n}"), "ms": 20}))
            });
            for outcome in futures_util::future::join_all(batch).await {
                outcome.unwrap();
            }
            number += 8;
        }
        number
    };
    let closing = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        tokio::task::block_in_place(|| broker.close_all_connections(0));
        let closed = Instant::now();
        for transport in [&client as &AmqpTransport, &server.transport] {
            up_after(transport, generation, Duration::from_secs(5)).await;
        }
        println!("back {:?} after the broker closed all connections", closed.elapsed());
        tokio::time::sleep(Duration::from_millis(500)).await;
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    };
    let (number, ()) = tokio::join!(calling, closing);
    let effects = server.worker.all_effects();
    assert_eq!(effects.len(), number, "every call was answered and done");
    assert!(effects.values().all(|times| *times == 1), "{effects:?}");
    // Every connection of the cases before, made or failed, has ended with its thread.
    eventually("old connections to end", LIMIT, || connection_threads() == 2).await;
}

/// Another program holds the lock under which streams are made, for longer than we wait.
pub(crate) async fn a_stream_that_another_program_makes_is_not_there_yet(
    broker: &Broker,
    url: &str,
) {
    // The lock is a queue, and so the vhost's own.
    tokio::task::block_in_place(|| {
        broker.ctl(0, &["add_vhost", "locked"]);
        broker.ctl(0, &["set_permissions", "-p", "locked", "guest", ".*", ".*", ".*"]);
    });
    let url = format!("{url}locked");
    let holder = raw(&url).await;
    let exclusive = QueueDeclareOptions {
        exclusive: true,
        auto_delete: true,
        ..QueueDeclareOptions::default()
    };
    let lock = "stackhand.lock.streams".into();
    let channel = holder.create_channel().await.unwrap();
    channel.queue_declare(lock, exclusive, FieldTable::default()).await.unwrap();

    let options = AmqpOptions { send_timeout_seconds: 6.0, ..AmqpOptions::default() };
    let client = transport(&url, &options);
    let stream =
        Stream { name: "t-locked".into(), max_age: Duration::from_secs(60), max_bytes: 1 << 20 };
    let outcome = client.publish(&stream, json!({})).await;
    let Err(BusError::Unreachable { reason, .. }) = outcome else { panic!("{outcome:?}") };
    assert!(reason.contains("another program makes a stream"), "{reason}");
    holder.close(200, "OK".into()).await.unwrap();
    client.publish(&stream, json!({})).await.unwrap();
}

/// What a server read from the stream of fanouts before its connection broke is not read again.
pub(crate) async fn fanouts_by_a_stream_go_on_after_a_reconnect(broker: &Broker, url: &str) {
    let options = AmqpOptions {
        transient_quorum_queues: true,
        stream_fanout: true,
        ..AmqpOptions::default()
    };
    let server = serve(url, &options, "t-stream-again", 8).await;
    let client = transport(url, &options);
    let cast = async |n: u32| {
        let request = Request::new("note", json!({"n": n}));
        client.cast(&target("t-stream-again").to_all(), request).await.unwrap();
    };
    cast(1).await;
    eventually("the first", LIMIT, || server.worker.casts() == [json!({"n": 1})]).await;
    let generation = up(&server.transport, LIMIT).await;
    tokio::task::block_in_place(|| broker.close_all_connections(0));
    cast(2).await;
    up_after(&server.transport, generation, LIMIT).await;
    let both = [json!({"n": 1}), json!({"n": 2})];
    eventually("the second, once", LIMIT, || server.worker.casts() == both).await;
}

pub(crate) async fn a_memory_alarm_holds_messages_back_and_loses_none(broker: &Broker, url: &str) {
    let server = serve(url, &AmqpOptions::default(), "t-alarm", 8).await;
    let client = transport(url, &AmqpOptions::default());
    call(&client, "t-alarm", "echo", json!({})).await.unwrap();
    let generation = up(&client, LIMIT).await;
    let hasty =
        transport(url, &AmqpOptions { send_timeout_seconds: 1.0, ..AmqpOptions::default() });
    up(&hasty, LIMIT).await;
    let watermark = |value: &[&str]| {
        let command = [&["set_vm_memory_high_watermark"], value].concat();
        tokio::task::block_in_place(|| broker.ctl(0, &command));
    };
    watermark(&["absolute", "1MiB"]);

    let args = json!({"name": "held", "ms": 0});
    let mut held = std::pin::pin!(call(&client, "t-alarm", "effect", args));
    // The broker tells a connection with its next message, which is the one that is held.
    let told = async {
        loop {
            let request = Request::new("note", json!({}));
            match hasty.cast(&target("t-alarm-nobody"), request).await {
                Err(BusError::Unreachable { reason, .. }) if reason.contains("memory") => return,
                Err(BusError::Unreachable { .. }) | Ok(()) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    let early = tokio::time::timeout(LIMIT, async {
        tokio::select! {
            outcome = &mut held => panic!("answered in spite of the alarm: {outcome:?}"),
            () = told => {}
        }
    });
    early.await.expect("nobody was told of the alarm");
    assert_eq!(server.worker.effects("held"), 0);

    watermark(&["0.4"]);
    held.await.unwrap();
    assert_eq!(server.worker.effects("held"), 1);
    assert_eq!(up(&client, LIMIT).await, generation, "an alarm is no reason to connect anew");
}
