//! Deliveries: their bodies, unpacked where their senders packed them, their places in a stream,
//! and how they are acknowledged.

use std::borrow::Cow;

use futures_util::FutureExt;
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::BasicAckOptions;
use lapin::types::AMQPValue;

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
