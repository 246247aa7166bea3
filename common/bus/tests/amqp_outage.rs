//! The AMQP transport while its broker dies and comes back.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

#[cfg(test)]
mod slow {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use crate::support::*;
    use futures_util::StreamExt;
    use futures_util::future::join_all;
    use serde_json::json;
    use stackhand_bus::amqp::AmqpOptions;
    use stackhand_bus::{BusError, CallLimits, ReadFrom, Request, Stream, Transport};
    use stackhand_testkit::broker::{Broker, BrokerSettings};

    /// Callers at once.
    const CALLERS: usize = 8;

    /// What callers and servers saw of an outage.
    struct Load {
        answered: AtomicUsize,
        done: AtomicBool,
    }

    /// Calls without pause until told to stop. Every call must be answered: a broker that is away
    /// for less than the limit costs time, not answers.
    async fn keep_calling(
        client: &dyn Transport,
        server: &dyn Transport,
        topic: &str,
        caller: usize,
        load: &Load,
    ) {
        let limits = CallLimits::total(Duration::from_secs(90));
        let mut number = 0;
        while !load.done.load(Ordering::Relaxed) {
            let name = format!("{caller}-{number}");
            let request = Request::new(
                "effect",
                json!({"name": name, "ms": if caller.is_multiple_of(2) { 5 } else { 150 }}),
            );
            let answer = client.call(&target(topic), request, limits).await;
            let answer = answer.unwrap_or_else(|error| {
                panic!("{error}; the server's link: {:?}", *server.link().borrow())
            });
            assert_eq!(answer, json!({"done": name}));
            load.answered.fetch_add(1, Ordering::Relaxed);
            number += 1;
        }
    }

    /// Runs load on a topic while `outage` does its worst; then checks that every call was
    /// answered and its effect done once.
    async fn survives(
        url: &str,
        options: &AmqpOptions,
        topic: &str,
        outage: impl AsyncFn(&Serving, &dyn Transport),
    ) {
        let server = serve(url, options, topic, 16).await;
        let client = transport(url, options);
        up(&client, Duration::from_secs(20)).await;
        let load = Load { answered: AtomicUsize::new(0), done: AtomicBool::new(false) };
        let callers = join_all(
            (0..CALLERS).map(|n| keep_calling(&client, &server.transport, topic, n, &load)),
        );
        let outage = async {
            eventually("the load to run", Duration::from_secs(20), || {
                load.answered.load(Ordering::Relaxed) > 200
            })
            .await;
            outage(&server, &client).await;
            let so_far = load.answered.load(Ordering::Relaxed);
            eventually("the load to go on", Duration::from_secs(60), || {
                load.answered.load(Ordering::Relaxed) > so_far + 200
            })
            .await;
            load.done.store(true, Ordering::Relaxed);
        };
        tokio::join!(callers, outage);
        let answered = load.answered.into_inner();
        let effects = server.worker.all_effects();
        let twice: Vec<_> = effects.iter().filter(|(_, times)| **times != 1).collect();
        assert!(twice.is_empty(), "{topic}: effects done more than once: {twice:?}");
        assert_eq!(effects.len(), answered, "{topic}: every answer stands for an effect");
        let (ours, theirs) = (client.counters(), server.transport.counters());
        println!("{topic}: {answered} calls answered, client {ours:?}, server {theirs:?}");
    }

    #[test]
    fn a_broker_that_is_killed_costs_no_answer_and_repeats_no_effect() {
        let mut broker = Broker::start();
        let url = broker.url();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let options = AmqpOptions::default();
            let durable = AmqpOptions { durable_queues: true, ..options.clone() };
            // A client that only waits sees the cut at once, and is back as soon as the broker is.
            let idle = Arc::new(transport(&url, &options));
            up(&*idle, Duration::from_secs(20)).await;
            let stream = Stream {
                name: "o-stream".into(),
                max_age: Duration::from_secs(3600),
                max_bytes: 1 << 24,
            };
            idle.publish(&stream, json!(1)).await.unwrap();
            tokio::task::block_in_place(|| broker.wait_until_streams_last(0));
            let refuse_fast = AmqpOptions { send_timeout_seconds: 0.5, ..options.clone() };
            let impatient = transport(&url, &refuse_fast);
            up(&impatient, Duration::from_secs(20)).await;

            let stopped = AtomicUsize::new(0);
            let resident_before = resident_kib();
            let (plain_hit, durable_hit) = (tokio::sync::Notify::new(), tokio::sync::Notify::new());
            let (plain_back, durable_back) =
                (tokio::sync::Notify::new(), tokio::sync::Notify::new());
            let plain = survives(&url, &options, "o-plain", async |server, client| {
                plain_hit.notify_one();
                plain_back.notified().await;
                for transport in [&server.transport as &dyn Transport, client] {
                    up_after(transport, 1, Duration::from_secs(30)).await;
                }
                stopped.fetch_add(1, Ordering::Relaxed);
            });
            let durable_queues = survives(&url, &durable, "o-durable", async |server, client| {
                durable_hit.notify_one();
                durable_back.notified().await;
                for transport in [&server.transport as &dyn Transport, client] {
                    up_after(transport, 1, Duration::from_secs(30)).await;
                }
                stopped.fetch_add(1, Ordering::Relaxed);
            });
            let outage = async {
                plain_hit.notified().await;
                durable_hit.notified().await;
                tokio::task::block_in_place(|| broker.kill(0));
                // What cannot wait is told why.
                let request = Request::new("note", json!({}));
                let cast = impatient.cast(&target("o-any"), request).await;
                assert!(matches!(cast, Err(BusError::Unreachable { .. })), "{cast:?}");
                tokio::task::block_in_place(|| {
                    broker.restart(0);
                    broker.wait_until_up(0);
                });
                let accepting = Instant::now();
                plain_back.notify_one();
                durable_back.notify_one();
                up_after(&*idle, 1, Duration::from_secs(30)).await;
                println!(
                    "an idle client is back {:?} after the broker accepts",
                    accepting.elapsed()
                );
            };
            tokio::join!(plain, durable_queues, outage);
            assert_eq!(stopped.into_inner(), 2);

            // Some moments pass before the stream has its leader again.
            idle.publish(&stream, json!(2)).await.unwrap();
            let records = idle.read(&stream, ReadFrom::First, false).await.unwrap();
            let bodies: Vec<_> = records.map(|record| record.unwrap().body).collect().await;
            assert_eq!(bodies, [json!(1), json!(2)]);
            let grown = resident_kib().saturating_sub(resident_before);
            println!("resident memory grew by {grown} KiB");
            assert!(grown < 40 * 1024, "resident memory grew by {grown} KiB");
        });
    }

    #[test]
    fn a_cluster_that_loses_a_node_costs_no_answer_and_repeats_no_effect() {
        let mut broker = Broker::start_with(&BrokerSettings { nodes: 3, tls: None });
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            // A call that waits in a queue of the lost node has to be sent again by a caller whose
            // own connection never broke.
            let plain = AmqpOptions { resend_silent_calls_seconds: 1.0, ..AmqpOptions::default() };
            let durable = AmqpOptions { durable_queues: true, ..plain.clone() };
            let quorum = AmqpOptions {
                quorum_queues: true,
                transient_quorum_queues: true,
                ..AmqpOptions::default()
            };
            let node = |number| format!("rabbit://guest:guest@127.0.0.1:{}/", broker.port(number));
            let others =
                format!("rabbit://127.0.0.1:{},127.0.0.1:{}/", broker.port(1), broker.port(2));
            // Classic queues live where they are made: on the node that will be lost.
            for (options, topic) in [(&plain, "c-plain"), (&durable, "c-durable")] {
                serve(&node(0), options, topic, 4)
                    .await
                    .handle
                    .shut_down(Duration::from_secs(5))
                    .await;
            }
            let durable_server = serve(&others, &durable, "c-durable", 4).await;
            let durable_client = transport(&others, &durable);
            call(&durable_client, "c-durable", "echo", json!({})).await.unwrap();
            let url = broker.url();
            let ready = tokio::sync::Semaphore::new(0);
            let lost = tokio::sync::Semaphore::new(0);
            let outage = async |_: &Serving, _: &dyn Transport| {
                ready.add_permits(1);
                lost.acquire().await.unwrap().forget();
            };
            let kill = async {
                ready.acquire_many(2).await.unwrap().forget();
                tokio::task::block_in_place(|| broker.kill(0));
                lost.add_permits(2);
            };
            tokio::join!(
                survives(&url, &quorum, "c-quorum", &outage),
                survives(&others, &plain, "c-plain", &outage),
                kill,
            );

            // RabbitMQ does not let anybody replace a durable classic queue whose node is away. Its
            // server says so, keeps the link for everything else, and serves when the node is back.
            let generation = up(&durable_server.transport, Duration::from_secs(30)).await;
            let outcome = call(&durable_client, "c-durable", "echo", json!({})).await;
            assert!(outcome.is_err_and(|error| error.is_transient()));
            tokio::task::block_in_place(|| broker.restart(0));
            let limit = Duration::from_secs(60);
            let begun = Instant::now();
            while let Err(error) = call(&durable_client, "c-durable", "echo", json!({})).await {
                assert!(error.is_transient() && begun.elapsed() < limit, "{error}");
            }
            assert_eq!(up(&durable_server.transport, Duration::ZERO).await, generation);
        });
    }
}
