//! Streams of the memory broker: bounded logs that many may follow.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{BoxStream, unfold};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Shared;
use crate::{BusError, ReadFrom, Record, Stream};

/// The records of one stream, oldest first.
pub(super) struct Log {
    kept: VecDeque<Kept>,
    bytes: u64,
    /// The offset the next record gets; readers wait for it to grow.
    next: watch::Sender<u64>,
}

struct Kept {
    record: Record,
    at: Instant,
    bytes: u64,
}

impl Default for Log {
    fn default() -> Self {
        Self { kept: VecDeque::new(), bytes: 0, next: watch::channel(0).0 }
    }
}

impl Log {
    pub(super) fn append(&mut self, stream: &Stream, body: Value) {
        let bytes = u64::try_from(body.to_string().len()).unwrap_or(u64::MAX);
        let offset = *self.next.borrow();
        self.kept.push_back(Kept { record: Record { offset, body }, at: Instant::now(), bytes });
        self.bytes = self.bytes.saturating_add(bytes);
        self.forget(stream);
        self.next.send_replace(offset + 1);
    }

    fn forget(&mut self, stream: &Stream) {
        while let Some(oldest) = self.kept.front()
            && (oldest.at.elapsed() > stream.max_age
                || self.bytes > stream.max_bytes && self.kept.len() > 1)
        {
            self.bytes = self.bytes.saturating_sub(oldest.bytes);
            self.kept.pop_front();
        }
    }

    fn start(&self, from: ReadFrom) -> u64 {
        let next = *self.next.borrow();
        let recent = |age: Duration| {
            let recent = self.kept.iter().find(|kept| kept.at.elapsed() <= age);
            recent.map_or(next, |kept| kept.record.offset)
        };
        match from {
            ReadFrom::First => self.kept.front().map_or(next, |kept| kept.record.offset),
            ReadFrom::Age(age) => recent(age),
            ReadFrom::Next => next,
        }
    }

    fn at_or_after(&self, offset: u64) -> Option<Record> {
        let at = self.kept.partition_point(|kept| kept.record.offset < offset);
        self.kept.get(at).map(|kept| kept.record.clone())
    }
}

/// Reads the log called like `stream` on from a point.
pub(super) fn read(
    shared: &Arc<Shared>,
    stream: &Stream,
    from: ReadFrom,
    follow: bool,
) -> BoxStream<'static, Result<Record, BusError>> {
    let (offset, grown) = {
        let mut state = shared.lock();
        let log = state.streams.entry(stream.name.clone()).or_default();
        log.forget(stream);
        (log.start(from), log.next.subscribe())
    };
    let end = if follow { u64::MAX } else { *grown.borrow() };
    let state = (Arc::clone(shared), stream.name.clone(), offset, grown);
    unfold(state, move |(shared, name, offset, mut grown)| async move {
        if offset >= end {
            return None;
        }
        loop {
            grown.borrow_and_update();
            let found = shared.lock().streams.get(&name).and_then(|log| log.at_or_after(offset));
            match found {
                Some(record) if record.offset < end => {
                    let next = record.offset + 1;
                    return Some((Ok(record), (shared, name, next, grown)));
                }
                Some(_) => return None,
                None if !follow => return None,
                None => grown.changed().await.ok()?,
            }
        }
    })
    .boxed()
}
