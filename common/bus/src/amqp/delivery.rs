//! Deliveries: their bodies, unpacked where their senders packed them, their places in a stream,
//! and how they are acknowledged.

use std::borrow::Cow;
use std::time::Duration;

use futures_util::FutureExt;
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::BasicAckOptions;
use lapin::types::{AMQPValue, DeliveryTag};
use tokio::time::{Instant, sleep_until};

use crate::{BusError, wire};

/// The body as its sender wrote it.
pub(super) fn body(delivery: &Delivery) -> Result<Cow<'_, [u8]>, BusError> {
    let headers = delivery.properties.headers().as_ref();
    let method = match headers.and_then(|headers| headers.inner().get("compression")) {
        None | Some(AMQPValue::Void) => return Ok(Cow::Borrowed(&delivery.data)),
        Some(AMQPValue::LongString(method)) => String::from_utf8_lossy(method.as_bytes()),
        Some(AMQPValue::ShortString(method)) => Cow::Borrowed(method.as_str()),
        Some(_) => Cow::Borrowed("a method without a name"),
    };
    wire::unpack(&method, &delivery.data).map(Cow::Owned)
}

/// Where in its stream a delivery stands; `None` for one from another kind of queue.
pub(super) fn offset_of(delivery: &Delivery) -> Option<u64> {
    let headers = delivery.properties.headers().as_ref()?;
    match headers.inner().get("x-stream-offset")? {
        AMQPValue::LongLongInt(offset) => u64::try_from(*offset).ok(),
        AMQPValue::LongInt(offset) => u64::try_from(*offset).ok(),
        AMQPValue::LongUInt(offset) => Some(u64::from(*offset)),
        _ => None,
    }
}

/// Acknowledges a delivery of the channel: hands that to the connection, and waits for nobody, for
/// that the bytes were written says little more. Returns whether the channel took it.
pub(super) fn ack(channel: &Channel, delivery: &Delivery) -> bool {
    let acking = channel.basic_ack(delivery.delivery_tag, BasicAckOptions::default());
    !matches!(acking.now_or_never(), Some(Err(_)))
}

/// How long a delivery waits for others to be acknowledged with.
const TOGETHER_WITHIN: Duration = Duration::from_millis(100);

/// Deliveries of a channel that were taken and are acknowledged together: with one frame for many,
/// nobody who waits for the next is kept by it.
#[derive(Debug)]
pub(super) struct Taken {
    most: u16,
    count: u16,
    last: DeliveryTag,
    due: Option<Instant>,
}

impl Taken {
    /// Holds fewer than `most`, which is to be less than the channel has delivered at a time.
    pub(super) fn at_most(most: u16) -> Self {
        Self { most, count: 0, last: 0, due: None }
    }

    /// Adds the next delivery; acknowledges all if they are many.
    pub(super) fn add(&mut self, channel: &Channel, delivery: &Delivery) {
        self.last = delivery.delivery_tag;
        self.count += 1;
        self.due.get_or_insert_with(|| Instant::now() + TOGETHER_WITHIN);
        if self.count >= self.most {
            self.acknowledge(channel);
        }
    }

    /// Acknowledges all. A lost acknowledgement means that they are delivered again.
    pub(super) fn acknowledge(&mut self, channel: &Channel) {
        let all = BasicAckOptions { multiple: true };
        let _ = channel.basic_ack(self.last, all).now_or_never();
        (self.count, self.due) = (0, None);
    }

    /// Waits until those that are held should be acknowledged; for ever if there are none.
    pub(super) async fn due(&self) {
        match self.due {
            Some(due) => sleep_until(due).await,
            None => std::future::pending().await,
        }
    }
}
