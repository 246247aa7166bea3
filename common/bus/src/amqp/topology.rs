//! Names, flags and arguments of exchanges and queues: the part of the wire that every program
//! of a topic must agree on. Pure; [`super::session`] declares what is described here.

use std::time::Duration;

use lapin::types::{AMQPValue, FieldTable, LongString};

use crate::amqp::AmqpOptions;
use crate::{Service, Stream, Target};

/// An exchange to declare. Equal ones are declared once per session.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Exchange {
    pub(super) name: String,
    pub(super) fanout: bool,
    pub(super) durable: bool,
    pub(super) auto_delete: bool,
}

/// A queue to declare, with where it is bound.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Queue {
    pub(super) name: String,
    pub(super) durable: bool,
    pub(super) auto_delete: bool,
    pub(super) exclusive: bool,
    pub(super) arguments: FieldTable,
    /// Exchange and routing key; `None` for queues reached through the default exchange.
    pub(super) binding: Option<(Exchange, String)>,
}

/// The exchange of topic calls, casts and notifications.
pub(super) fn topic_exchange(name: &str, options: &AmqpOptions) -> Exchange {
    Exchange {
        name: name.to_owned(),
        fanout: false,
        durable: options.durable_queues || options.quorum_queues,
        auto_delete: options.auto_delete,
    }
}

/// The exchange that reaches every server of a topic.
pub(super) fn fanout_exchange(topic: &str, options: &AmqpOptions) -> Exchange {
    Exchange {
        name: format!("{topic}_fanout"),
        fanout: true,
        durable: options.transient_quorum_queues,
        auto_delete: true,
    }
}

/// The three queues of a server: shared by the topic, its own, and its part of the fanout.
pub(super) fn service_queues(
    service: &Service,
    fanout_id: &str,
    options: &AmqpOptions,
) -> [Queue; 3] {
    let Service { exchange, topic, server, .. } = service;
    let fanout = fanout_exchange(topic, options);
    [
        topic_queue(exchange, topic.clone(), options),
        topic_queue(exchange, format!("{topic}.{server}"), options),
        Queue {
            binding: Some((fanout, topic.clone())),
            ..match options.stream_fanout {
                true => fanout_stream(topic, options),
                false => transient_queue(format!("{topic}_fanout_{fanout_id}"), options),
            }
        },
    ]
}

/// The stream that all servers of a topic read their fanouts from.
fn fanout_stream(topic: &str, options: &AmqpOptions) -> Queue {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("stream"));
    let kept = Duration::from_secs(options.transient_queues_ttl_seconds.into());
    if !kept.is_zero() {
        arguments.insert("x-max-age".into(), text(&interval(kept)));
    }
    Queue {
        name: format!("{topic}_fanout"),
        durable: true,
        auto_delete: false,
        exclusive: false,
        arguments,
        binding: None,
    }
}

/// A queue of the topic exchange, bound under its own name.
pub(super) fn topic_queue(exchange: &str, name: String, options: &AmqpOptions) -> Queue {
    let mut arguments = FieldTable::default();
    if options.ha_queues {
        arguments.insert("x-ha-policy".into(), text("all"));
    }
    if options.quorum_queues {
        arguments.insert("x-queue-type".into(), text("quorum"));
        for (argument, limit) in [
            ("x-delivery-limit", options.quorum_delivery_limit),
            ("x-max-in-memory-length", options.quorum_max_memory_length),
            ("x-max-in-memory-bytes", options.quorum_max_memory_bytes),
        ] {
            if limit > 0 {
                arguments.insert(argument.into(), AMQPValue::LongLongInt(i64::from(limit)));
            }
        }
    }
    let exchange = topic_exchange(exchange, options);
    Queue {
        durable: exchange.durable,
        auto_delete: options.auto_delete,
        exclusive: false,
        arguments,
        binding: Some((exchange, name.clone())),
        name,
    }
}

/// A reply or fanout queue: it outlives a short disconnect and then goes away by itself.
pub(super) fn transient_queue(name: String, options: &AmqpOptions) -> Queue {
    let mut arguments = FieldTable::default();
    if options.transient_queues_ttl_seconds > 0 {
        let milliseconds = i64::from(options.transient_queues_ttl_seconds) * 1000;
        arguments.insert("x-expires".into(), AMQPValue::LongLongInt(milliseconds));
    }
    if options.ha_queues {
        arguments.insert("x-ha-policy".into(), text("all"));
    }
    if options.transient_quorum_queues {
        arguments.insert("x-queue-type".into(), text("quorum"));
    }
    Queue {
        name,
        durable: options.transient_quorum_queues,
        auto_delete: false,
        exclusive: false,
        arguments,
        binding: None,
    }
}

/// A stream queue. Its log is kept in segments, and only whole segments are dropped, so the
/// segment size follows the bytes to keep.
pub(super) fn stream_queue(stream: &Stream) -> Queue {
    const MIB: u64 = 1024 * 1024;
    let max_bytes = stream.max_bytes.max(MIB);
    let segment = (max_bytes / 8).clamp(MIB / 2, 256 * MIB);
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("stream"));
    arguments.insert("x-max-age".into(), text(&interval(stream.max_age)));
    arguments.insert("x-max-length-bytes".into(), long(max_bytes));
    arguments.insert("x-stream-max-segment-size-bytes".into(), long(segment));
    Queue {
        name: stream.name.clone(),
        durable: true,
        auto_delete: false,
        exclusive: false,
        arguments,
        binding: None,
    }
}

/// The queue whose owner holds the lock `name`.
pub(super) fn lock_queue(name: &str) -> Queue {
    Queue {
        name: format!("stackhand.lock.{name}"),
        durable: false,
        auto_delete: true,
        exclusive: true,
        arguments: FieldTable::default(),
        binding: None,
    }
}

/// A duration as RabbitMQ reads intervals; at least a second.
pub(super) fn interval(duration: Duration) -> String {
    format!("{}s", duration.as_secs().max(1))
}

/// Where a request is published: its exchange and routing key.
pub(super) fn address(target: &Target, options: &AmqpOptions) -> (Exchange, String) {
    if target.fanout {
        return (fanout_exchange(&target.topic, options), String::new());
    }
    let key = match &target.server {
        Some(server) => format!("{}.{server}", target.topic),
        None => target.topic.clone(),
    };
    (topic_exchange(&target.exchange, options), key)
}

pub(super) fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(text))
}

fn long(number: u64) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(number).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> Service {
        let (exchange, topic) = ("nova".to_owned(), "compute".to_owned());
        Service { exchange, topic, server: "h1".into(), concurrency: 4 }
    }

    #[test]
    fn a_server_has_the_three_queues_python_expects() {
        let [shared, own, fanout] = service_queues(&service(), "f00", &AmqpOptions::default());
        assert_eq!(
            [shared.name.as_str(), own.name.as_str(), fanout.name.as_str()],
            ["compute", "compute.h1", "compute_fanout_f00"]
        );
        let (exchange, key) = own.binding.unwrap();
        assert_eq!((exchange.name.as_str(), key.as_str()), ("nova", "compute.h1"));
        assert!(!own.durable && own.arguments.inner().is_empty());
        let (exchange, key) = fanout.binding.unwrap();
        assert_eq!((exchange.name.as_str(), key.as_str()), ("compute_fanout", "compute"));
        assert!(exchange.fanout && exchange.auto_delete && !exchange.durable);
        assert_eq!(
            fanout.arguments.inner().get("x-expires"),
            Some(&AMQPValue::LongLongInt(1_800_000))
        );
    }

    #[test]
    fn quorum_queues_are_durable_and_keep_their_limits() {
        let options = AmqpOptions {
            quorum_queues: true,
            quorum_delivery_limit: 3,
            transient_quorum_queues: true,
            transient_queues_ttl_seconds: 0,
            ..AmqpOptions::default()
        };
        let [shared, _, fanout] = service_queues(&service(), "f", &options);
        let (exchange, _) = shared.binding.unwrap();
        assert!(shared.durable && exchange.durable && fanout.durable);
        let arguments = shared.arguments.inner();
        assert_eq!(arguments.get("x-queue-type"), Some(&text("quorum")));
        assert_eq!(arguments.get("x-delivery-limit"), Some(&AMQPValue::LongLongInt(3)));
        assert_eq!(fanout.arguments.inner().get("x-expires"), None);
    }

    #[test]
    fn a_stream_of_fanouts_is_shared_and_kept_for_a_while() {
        let options = AmqpOptions {
            transient_quorum_queues: true,
            stream_fanout: true,
            ..AmqpOptions::default()
        };
        let [_, _, fanout] = service_queues(&service(), "f", &options);
        assert_eq!(fanout.name, "compute_fanout");
        let arguments = fanout.arguments.inner();
        assert_eq!(arguments.get("x-max-age"), Some(&text("1800s")));
        assert_eq!((arguments.len(), fanout.durable), (2, true));
        assert!(fanout.binding.unwrap().0.durable);
    }

    #[test]
    fn a_target_becomes_an_exchange_and_a_key() {
        let options = AmqpOptions::default();
        let target = Target::topic("nova", "compute");
        for (target, exchange, key) in [
            (target.clone(), "nova", "compute"),
            (target.clone().on_server("h1"), "nova", "compute.h1"),
            (target.to_all(), "compute_fanout", ""),
        ] {
            let (found, routing_key) = address(&target, &options);
            assert_eq!((found.name.as_str(), routing_key.as_str()), (exchange, key));
        }
    }
}
