//! `agentctl` over a real RabbitMQ with thousands of agents' reports in its streams.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod broker {
    use std::collections::BTreeMap;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use assert_cmd::Command;
    use futures_util::{StreamExt, stream};
    use jiff::Timestamp;
    use stackhand_bus::Transport;
    use stackhand_bus::amqp::{AmqpOptions, AmqpTransport};
    use stackhand_model::{AgentKind, Kind, State};
    use stackhand_runtime::api::Control;
    use stackhand_runtime::report::{self, Report};
    use stackhand_testkit::broker::Broker;

    const AGENTS: usize = 5000;
    const DOWN: usize = 3;

    fn report(number: usize, age: i64) -> Report {
        let agent = AgentKind::ALL[number % 3];
        let host = format!("node{:04}", number / 3);
        let now = Timestamp::now().as_second();
        Report {
            id: report::agent_id("default", &host, agent),
            agent,
            host,
            zone: "nova".into(),
            cloud: "default".into(),
            version: "0.1.0".into(),
            started_at: Timestamp::from_second(now - 3600).unwrap(),
            sent_at: Timestamp::from_second(now - age).unwrap(),
            interval_seconds: 10,
            sequence: 7,
            stopping: false,
            control: Control::default(),
            healthy: true,
            reasons: Vec::new(),
            objects: BTreeMap::from([(Kind::Port, BTreeMap::from([(State::Active, 40)]))]),
            signing: Some(true),
            events_dropped: 0,
        }
    }

    /// A week's registration of everybody, and the reports of the last half minute.
    async fn fill(bus: Arc<dyn Transport>) {
        let (registry, heartbeats) = (report::registry(), report::heartbeats());
        let registrations = (0..AGENTS).map(|number| {
            let body = serde_json::to_value(report(number, 1200).registration()).unwrap();
            (registry.clone(), body)
        });
        let reports = [25, 15, 5].into_iter().flat_map(|age| {
            (0..AGENTS - DOWN).map(move |number| serde_json::to_value(report(number, age)).unwrap())
        });
        let reports = reports.map(|body| (heartbeats.clone(), body));
        stream::iter(registrations.chain(reports))
            .for_each_concurrent(256, |(stream, body)| {
                let bus = Arc::clone(&bus);
                async move { bus.publish(&stream, body).await.unwrap() }
            })
            .await;
    }

    fn agentctl(url: &str) -> Command {
        let mut command = Command::cargo_bin("agentctl").unwrap();
        command.env_clear().args(["--url", url]).timeout(Duration::from_secs(60));
        command
    }

    #[test]
    fn five_thousand_agents_are_listed_and_those_that_are_gone_are_down() {
        let broker = Broker::start();
        let url = broker.url();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let bus = runtime.block_on(async {
            let options = AmqpOptions::default();
            AmqpTransport::connect(url.parse().unwrap(), &options).unwrap()
        });
        let start = Instant::now();
        runtime.block_on(fill(Arc::new(bus)));
        eprintln!("published {} records in {:?}", AGENTS * 4 - DOWN * 3, start.elapsed());

        let mut took = Vec::new();
        for _ in 0..3 {
            let start = Instant::now();
            let output = agentctl(&url).args(["list", "-o", "json"]).output().unwrap();
            took.push(start.elapsed());
            assert_eq!(output.status.code(), Some(3), "{output:?}");
            let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(rows.len(), AGENTS);
            assert_eq!(rows.iter().filter(|row| row["alive"] == false).count(), DOWN);
        }
        eprintln!("agentctl list of {AGENTS} agents took {took:?}");
        // Unoptimised builds are some five times slower than what is shipped.
        let bar = if cfg!(debug_assertions) { 10 } else { 1 };
        let best = took.iter().min().unwrap();
        assert!(*best <= Duration::from_secs(bar), "took {best:?}, more than {bar} s");

        let down = agentctl(&url).args(["list", "--down"]).output().unwrap();
        let text = String::from_utf8(down.stdout).unwrap();
        assert_eq!(text.matches("xxx").count(), DOWN, "{text}");
        assert!(text.contains("no heartbeat since it registered"), "{text}");
    }

    #[test]
    fn a_broker_that_is_not_there_is_told_within_the_limit() {
        let port = stackhand_testkit::free_port();
        let url = format!("rabbit://guest:hunter2@127.0.0.1:{port}/");
        let start = Instant::now();
        let output = agentctl(&url).args(["--timeout", "2", "list"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.starts_with("agentctl: cannot reach the broker at "), "{told}");
        assert!(!told.contains("hunter2"), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
    }
}
