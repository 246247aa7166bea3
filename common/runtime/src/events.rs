//! What happened on this host lately: who asked, what changed, why it failed.
//!
//! Events are kept in memory in a ring of bounded size, numbered without gaps so that a reader who
//! was away can tell what it missed. Followers get each event as it happens; one *sink* per use
//! (the bus's event stream) gets them through a bounded queue that drops and counts when its
//! reader is slow. Nothing here ever waits: work on the host goes on whoever reads.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, mpsc};

/// Events that the ring holds by default.
pub const DEFAULT_CAPACITY: usize = 1000;

/// Longest message kept, in bytes; the rest is cut off.
const MESSAGE_BYTES: usize = 4096;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Number of the event since the process started, from 1, without gaps.
    pub sequence: u64,
    /// When.
    pub time: Timestamp,
    /// On which host.
    pub host: String,
    /// Which agent tells it.
    pub agent: String,
    /// The object that it is about, such as `Port/<id>`, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Reason code, for programs: `Applied`, `ReconcileFailed`, `BusDown`, …
    pub kind: String,
    /// The same for people.
    pub message: String,
    /// The request that caused it, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

/// What a part of the agent tells; the log adds number, time, host and agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewEvent {
    /// The object that it is about, if it is about one.
    pub object: Option<String>,
    /// Reason code.
    pub kind: String,
    /// Text for people.
    pub message: String,
    /// The request that caused it, if one did.
    pub request_id: Option<String>,
}

/// The answer to "what happened since?".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Since {
    /// The events, oldest first.
    pub events: Vec<Event>,
    /// Events after the asked number that fell out of the ring before they were read.
    pub missed: u64,
    /// Number to ask with next time.
    pub last: u64,
}

/// The event log of a process. Clones share one log.
#[derive(Clone, Debug)]
pub struct EventLog {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    host: String,
    agent: String,
    capacity: usize,
    ring: Mutex<Ring>,
    followers: broadcast::Sender<Event>,
    dropped: AtomicU64,
}

#[derive(Debug)]
struct Ring {
    last: u64,
    events: VecDeque<Event>,
    sinks: Vec<mpsc::Sender<Event>>,
}

impl EventLog {
    /// An empty log that holds [`DEFAULT_CAPACITY`] events.
    #[must_use]
    pub fn new(host: &str, agent: &str) -> Self {
        Self::with_capacity(host, agent, DEFAULT_CAPACITY)
    }

    /// An empty log that holds `capacity` events, at least 1.
    #[must_use]
    pub fn with_capacity(host: &str, agent: &str, capacity: usize) -> Self {
        let capacity = capacity.max(1);
        let (followers, _nobody_yet) = broadcast::channel(capacity.min(256));
        let ring = Ring { last: 0, events: VecDeque::new(), sinks: Vec::new() };
        Self {
            shared: Arc::new(Shared {
                host: host.to_owned(),
                agent: agent.to_owned(),
                capacity,
                ring: Mutex::new(ring),
                followers,
                dropped: AtomicU64::new(0),
            }),
        }
    }

    /// Adds an event; returns its number. Never waits.
    pub fn add(&self, mut new: NewEvent) -> u64 {
        cut(&mut new.message);
        let shared = &self.shared;
        let mut ring = shared.ring();
        ring.last += 1;
        let event = Event {
            sequence: ring.last,
            time: Timestamp::now(),
            host: shared.host.clone(),
            agent: shared.agent.clone(),
            object: new.object,
            kind: new.kind,
            message: new.message,
            request_id: new.request_id,
        };
        if ring.events.len() == shared.capacity {
            ring.events.pop_front();
        }
        ring.events.push_back(event.clone());
        ring.sinks.retain(|sink| match sink.try_send(event.clone()) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                shared.dropped.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        });
        let sequence = ring.last;
        // Under the lock, so that followers see events in order. Nobody listening is fine.
        let _ = shared.followers.send(event);
        sequence
    }

    /// The events after number `since`, at most `limit` of them; 0 asks from the start.
    ///
    /// A number larger than the last one (the process restarted in between) counts as 0.
    #[must_use]
    pub fn since(&self, since: u64, limit: usize) -> Since {
        let ring = self.shared.ring();
        let since = if since > ring.last { 0 } else { since };
        let oldest = ring.events.front().map_or(ring.last + 1, |event| event.sequence);
        let events: Vec<Event> = ring
            .events
            .iter()
            .filter(|event| event.sequence > since)
            .take(limit)
            .cloned()
            .collect();
        Since {
            missed: oldest.saturating_sub(since + 1),
            last: events.last().map_or(since.max(oldest - 1), |event| event.sequence),
            events,
        }
    }

    /// Follows the log from now on. A follower that falls behind gets
    /// [`broadcast::error::RecvError::Lagged`] and can catch up with [`EventLog::since`].
    #[must_use]
    pub fn follow(&self) -> broadcast::Receiver<Event> {
        self.shared.followers.subscribe()
    }

    /// Adds a sink: every event from now on is put into the returned queue of `capacity` places,
    /// and counted as dropped when the queue is full. Ends when the receiver is dropped.
    #[must_use]
    pub fn sink(&self, capacity: usize) -> mpsc::Receiver<Event> {
        let (sender, receiver) = mpsc::channel(capacity.max(1));
        self.shared.ring().sinks.push(sender);
        receiver
    }

    /// Number of the last event; 0 when there was none.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.shared.ring().last
    }

    /// Events that no longer are in the ring.
    #[must_use]
    pub fn fallen_out(&self) -> u64 {
        let ring = self.shared.ring();
        ring.last - u64::try_from(ring.events.len()).unwrap_or(ring.last)
    }

    /// Events that did not fit into a sink's queue, over all sinks.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }
}

impl NewEvent {
    /// An event about the agent as a whole.
    #[must_use]
    pub fn new(kind: &str, message: impl Into<String>) -> Self {
        Self { kind: kind.to_owned(), message: message.into(), ..Self::default() }
    }

    /// The same, about one object.
    #[must_use]
    pub fn about(mut self, object: impl Into<String>) -> Self {
        self.object = Some(object.into());
        self
    }

    /// The same, caused by a request.
    #[must_use]
    pub fn caused_by(mut self, request_id: impl Into<String>) -> Self {
        self.request_id = Some(request_id.into());
        self
    }
}

impl Shared {
    fn ring(&self) -> std::sync::MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cuts a message at [`MESSAGE_BYTES`], between characters.
fn cut(message: &mut String) {
    if message.len() > MESSAGE_BYTES {
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES));
        message.push('…');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(capacity: usize) -> EventLog {
        EventLog::with_capacity("compute1", "network", capacity)
    }

    fn sequences(since: &Since) -> Vec<u64> {
        since.events.iter().map(|event| event.sequence).collect()
    }

    #[test]
    fn a_reader_who_was_away_learns_what_fell_out() {
        let log = log(3);
        for n in 1..=5 {
            assert_eq!(log.add(NewEvent::new("Applied", "ok")), n);
        }
        let since = log.since(1, 100);
        assert_eq!(sequences(&since), [3, 4, 5]);
        assert_eq!((since.missed, since.last), (1, 5));
        assert_eq!(log.fallen_out(), 2);

        let since = log.since(5, 100);
        assert_eq!((sequences(&since), since.missed, since.last), (vec![], 0, 5));
    }

    #[test]
    fn a_limited_answer_goes_on_where_it_ended() {
        let log = log(10);
        for _ in 0..5 {
            log.add(NewEvent::new("Applied", "ok"));
        }
        let first = log.since(0, 2);
        assert_eq!(sequences(&first), [1, 2]);
        assert_eq!(sequences(&log.since(first.last, 10)), [3, 4, 5]);
    }

    #[test]
    fn a_number_from_before_a_restart_starts_over() {
        let log = log(10);
        log.add(NewEvent::new("Started", "hello"));
        assert_eq!(sequences(&log.since(4000, 10)), [1]);
        assert_eq!(self::log(1).since(7, 10), Since { events: vec![], missed: 0, last: 0 });
    }

    #[test]
    fn a_slow_sink_drops_and_counts_and_never_holds_up_the_log() {
        let log = log(10);
        let mut sink = log.sink(2);
        for _ in 0..5 {
            log.add(NewEvent::new("Applied", "ok"));
        }
        assert_eq!(log.dropped(), 3);
        assert_eq!(sink.try_recv().unwrap().sequence, 1);
        drop(sink);
        log.add(NewEvent::new("Applied", "ok"));
        assert_eq!(log.dropped(), 3, "a sink without a reader is gone, not full");
    }

    #[tokio::test]
    async fn followers_get_events_in_order() {
        let log = log(10);
        let mut follower = log.follow();
        log.add(NewEvent::new("Applied", "ok").about("Port/p1").caused_by("req-1"));
        log.add(NewEvent::new("Applied", "ok"));
        let first = follower.recv().await.unwrap();
        assert_eq!(first.object.as_deref(), Some("Port/p1"));
        assert_eq!(first.request_id.as_deref(), Some("req-1"));
        assert_eq!(follower.recv().await.unwrap().sequence, 2);
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let log = log(1);
        log.add(NewEvent::new("Failed", "é".repeat(3000)));
        let message = &log.since(0, 1).events[0].message;
        assert_eq!(message.chars().count(), MESSAGE_BYTES / 2 + 1);
    }

    #[test]
    fn events_travel_as_json() {
        let log = log(1);
        log.add(NewEvent::new("Started", "hello"));
        let event = log.since(0, 1).events.remove(0);
        let json = serde_json::to_value(&event).unwrap();
        assert!(json.get("object").is_none());
        assert_eq!(serde_json::from_value::<Event>(json).unwrap(), event);
    }
}
