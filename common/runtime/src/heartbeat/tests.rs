use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use stackhand_bus::ReadFrom;
use stackhand_bus::memory::MemoryBroker;
use tokio::task::JoinHandle;

use super::*;
use crate::events::NewEvent;
use crate::report::Registration;
use crate::testing::Bench;

struct Beating {
    bench: Bench,
    broker: MemoryBroker,
    transport: Arc<dyn Transport>,
    task: JoinHandle<()>,
}

fn beat(broker: MemoryBroker, interval: Duration) -> Beating {
    let bench = Bench::new();
    let with = &bench.with;
    let identity = Identity {
        agent: AgentKind::Network,
        host: "compute1".into(),
        zone: "nova".into(),
        cloud: "default".into(),
        version: "0.1.0".into(),
        started_at: Timestamp::now(),
    };
    let reporter = Reporter::new(
        identity,
        interval,
        Some(true),
        (with.ledger.clone(), with.statuses.clone(), with.events.clone(), with.health.clone()),
        Arc::new(|| vec!["x".repeat(1000)]),
    );
    let transport: Arc<dyn Transport> = Arc::new(broker.transport());
    let register = Duration::from_secs(3600);
    let task = tokio::spawn(run(Arc::clone(&transport), reporter, register, with.shutdown.clone()));
    Beating { bench, broker, transport, task }
}

impl Beating {
    async fn read<T: DeserializeOwned>(&self, stream: &Stream, count: usize) -> Vec<T> {
        let records = self.transport.read(stream, ReadFrom::First, true).await.unwrap();
        let records =
            records.take(count).map(|it| serde_json::from_value(it.unwrap().body).unwrap());
        timeout(Duration::from_secs(10), records.collect()).await.expect("too few records")
    }

    async fn all<T: DeserializeOwned>(&self, stream: &Stream) -> Vec<T> {
        let records = self.transport.read(stream, ReadFrom::First, false).await.unwrap();
        records.map(|it| serde_json::from_value(it.unwrap().body).unwrap()).collect().await
    }
}

#[tokio::test]
async fn reports_go_out_at_once_then_each_interval_and_a_last_word_at_the_end() {
    let beating = beat(MemoryBroker::new(), Duration::from_millis(50));
    let reports: Vec<Report> = beating.read(&report::heartbeats(), 3).await;
    let numbers: Vec<_> = reports.iter().map(|it| it.sequence).collect();
    assert_eq!(numbers, [1, 2, 3]);
    assert!(!reports[0].healthy && !reports[0].stopping);
    assert!(reports[0].reasons[0].len() < 310, "long reasons are cut");
    let registrations: Vec<Registration> = beating.all(&report::registry()).await;
    assert_eq!(registrations.len(), 1, "not with each report");
    assert_eq!(registrations[0].id, reports[0].id);

    beating.bench.with.shutdown.request("test");
    beating.bench.with.shutdown.closing().cancel();
    timeout(Duration::from_secs(5), beating.task).await.unwrap().unwrap();
    let transport = beating.broker.transport();
    let records = transport.read(&report::heartbeats(), ReadFrom::First, false).await.unwrap();
    let last = records.collect::<Vec<_>>().await.pop().unwrap().unwrap().body;
    assert_eq!(last["stopping"], true);
}

#[tokio::test]
async fn what_an_operator_sets_is_registered_at_once() {
    let beating = beat(MemoryBroker::new(), Duration::from_secs(60));
    let first: Vec<Registration> = beating.read(&report::registry(), 1).await;
    assert!(first[0].control.enabled);
    let ledger = &beating.bench.with.ledger;
    ledger.set_control(|it| it.enabled = false).await.unwrap();
    let both: Vec<Registration> = beating.read(&report::registry(), 2).await;
    assert!(!both[1].control.enabled);
}

#[tokio::test]
async fn a_broker_that_is_away_costs_nothing_and_hears_at_once_when_it_is_back() {
    let broker = MemoryBroker::new();
    broker.take_down("gone for lunch");
    let beating = beat(broker.clone(), Duration::from_secs(60));
    for n in 0..5 {
        beating.bench.with.events.add(NewEvent::new("Tick", n.to_string()));
        tokio::task::yield_now().await;
    }
    broker.bring_up(2);
    let reports: Vec<Report> = beating.read(&report::heartbeats(), 1).await;
    assert_eq!(reports[0].sequence, 1, "nothing was made while it was away");
    let registrations: Vec<Registration> = beating.read(&report::registry(), 1).await;
    assert_eq!(registrations[0].host, "compute1");
}

#[tokio::test]
async fn events_wait_for_the_broker_and_come_in_order() {
    let broker = MemoryBroker::new();
    let beating = beat(broker.clone(), Duration::from_secs(60));
    let _: Vec<Report> = beating.read(&report::heartbeats(), 1).await;
    broker.take_down("restart");
    let log = &beating.bench.with.events;
    for n in 0..EVENT_QUEUE + 10 {
        log.add(NewEvent::new("Tick", n.to_string()));
    }
    assert!((9..=10).contains(&log.dropped()), "{} dropped", log.dropped());
    broker.bring_up(2);
    let events: Vec<Event> = beating.read(&report::events(), 1000).await;
    assert!(events.is_sorted_by_key(|event| event.sequence));
    assert_eq!(events[0].sequence, 1);
    let stopped = beating.bench.with.shutdown.closing();
    stopped.cancel();
    timeout(Duration::from_secs(5), beating.task).await.unwrap().unwrap();
}

#[test]
fn a_clock_that_is_set_is_told_for_a_minute() {
    let mut clock = Clock::now();
    let (at, shown) = (clock.at, clock.shown);
    let later = |seconds| (at + Duration::from_secs(seconds), shown + Duration::from_secs(seconds));
    assert_eq!(clock.look(later(10).0, later(10).1), None);
    let told = clock.look(later(20).0, later(140).1).unwrap();
    assert!(told.contains("forward by 120 s"), "{told}");
    assert!(clock.look(later(30).0, later(150).1).is_some());
    assert_eq!(clock.look(later(90).0, later(210).1), None);
    assert!(clock.look(later(100).0, later(0).1).unwrap().contains("back by 220 s"));
}
