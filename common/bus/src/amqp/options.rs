//! Settings of the AMQP transport.
//!
//! Names follow oslo.messaging's `oslo_messaging_rabbit` group, and its spellings are accepted
//! as aliases, so that an operator can carry a working section over. What both sides of a queue
//! must agree on has oslo's default; how fast we reconnect is our own choice.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::BusError;

/// Settings of the AMQP transport. Every field has a default; unknown ones are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AmqpOptions {
    /// Declare topic exchanges and queues durable. All programs of a topic must agree.
    #[serde(alias = "amqp_durable_queues")]
    pub durable_queues: bool,
    /// Delete topic exchanges and queues with their last user. All programs must agree.
    #[serde(alias = "amqp_auto_delete")]
    pub auto_delete: bool,
    /// Make topic queues quorum queues: durable and replicated. All programs must agree.
    #[serde(alias = "rabbit_quorum_queue")]
    pub quorum_queues: bool,
    /// Deliveries of one message before a quorum queue drops it; 0 is no limit.
    #[serde(alias = "rabbit_quorum_delivery_limit")]
    pub quorum_delivery_limit: u32,
    /// Messages a quorum queue keeps in memory; 0 is no limit.
    #[serde(alias = "rabbit_quorum_max_memory_length", alias = "rabbit_quroum_max_memory_length")]
    pub quorum_max_memory_length: u32,
    /// Bytes a quorum queue keeps in memory; 0 is no limit.
    #[serde(alias = "rabbit_quorum_max_memory_bytes", alias = "rabbit_quroum_max_memory_bytes")]
    pub quorum_max_memory_bytes: u32,
    /// Make reply and fanout queues quorum queues too. All programs must agree for fanouts.
    #[serde(alias = "rabbit_transient_quorum_queue")]
    pub transient_quorum_queues: bool,
    /// Seconds after which an unused reply or fanout queue is deleted; 0 is never.
    #[serde(alias = "rabbit_transient_queues_ttl")]
    pub transient_queues_ttl_seconds: u32,
    /// Fanouts through one stream a topic in place of a queue a server. All programs must agree.
    #[serde(alias = "rabbit_stream_fanout")]
    pub stream_fanout: bool,
    /// Send `x-ha-policy`, which RabbitMQ ignores since version 3 but compares.
    #[serde(alias = "rabbit_ha_queues")]
    pub ha_queues: bool,
    /// Messages a consumer holds unacknowledged; 0 takes the service's concurrency.
    #[serde(alias = "rabbit_qos_prefetch_count")]
    pub prefetch: u16,
    /// Seconds between heartbeats as offered to the broker; 0 turns them off.
    #[serde(alias = "heartbeat_timeout_threshold")]
    pub heartbeat_seconds: u16,
    /// Seconds for one broker to accept, greet and log us in.
    pub connect_timeout_seconds: f64,
    /// Seconds before the second attempt to reconnect; the first comes at once.
    #[serde(alias = "rabbit_retry_interval")]
    pub retry_interval_seconds: f64,
    /// Seconds added to the interval with every attempt.
    #[serde(alias = "rabbit_retry_backoff")]
    pub retry_backoff_seconds: f64,
    /// Longest interval between attempts, in seconds.
    #[serde(alias = "rabbit_interval_max")]
    pub retry_interval_max_seconds: f64,
    /// File with the certificates of the authorities we trust, PEM. Unset: the system's.
    #[serde(alias = "ssl_ca_file")]
    pub tls_ca_file: Option<String>,
    /// File with our own certificate and its chain, PEM, for brokers that ask for one.
    #[serde(alias = "ssl_cert_file")]
    pub tls_cert_file: Option<String>,
    /// File with the key of our certificate, PEM.
    #[serde(alias = "ssl_key_file")]
    pub tls_key_file: Option<String>,
    /// Speak TLS even where the URL says `rabbit://`.
    #[serde(alias = "ssl")]
    pub tls: bool,
    /// Whether the broker's certificate must be for the name we connect to.
    #[serde(alias = "ssl_enforce_hostname_verification")]
    pub tls_enforce_hostname_verification: bool,
    /// Seconds an answer is retried while its reply queue is missing.
    #[serde(alias = "kombu_missing_consumer_retry_timeout")]
    pub missing_consumer_retry_timeout_seconds: f64,
    /// Seconds a call is retried while its target has no queue, before it is undeliverable.
    /// Bridges the time a restarted broker needs to see its servers again.
    pub undeliverable_grace_seconds: f64,
    /// Send a call again after a reconnect even when the broker had confirmed it. Our servers
    /// recognise the copy and answer it without doing the work twice; a Python server does so
    /// only within its last 16 messages.
    pub resend_confirmed_calls: bool,
    /// Seconds after which a call without any answer is sent again on a link that stayed up, in
    /// case its queue was lost with a node; doubled every time, 0 is never. Follows
    /// `resend_confirmed_calls`, and leaves monitored calls alone.
    pub resend_silent_calls_seconds: f64,
    /// Seconds a cast, notification or stream record waits for the broker to be back.
    pub send_timeout_seconds: f64,
    /// Answer `oslo_rpc_server_ping`.
    pub rpc_ping_enabled: bool,
    /// Shown by the broker's tools; `<program>:<pid>` when unset.
    pub connection_name: Option<String>,
}

impl Default for AmqpOptions {
    fn default() -> Self {
        Self {
            durable_queues: false,
            auto_delete: false,
            quorum_queues: false,
            quorum_delivery_limit: 0,
            quorum_max_memory_length: 0,
            quorum_max_memory_bytes: 0,
            transient_quorum_queues: false,
            transient_queues_ttl_seconds: 1800,
            stream_fanout: false,
            ha_queues: false,
            prefetch: 0,
            heartbeat_seconds: 60,
            connect_timeout_seconds: 10.0,
            retry_interval_seconds: 0.25,
            retry_backoff_seconds: 0.5,
            retry_interval_max_seconds: 3.0,
            tls_ca_file: None,
            tls_cert_file: None,
            tls_key_file: None,
            tls: false,
            tls_enforce_hostname_verification: true,
            missing_consumer_retry_timeout_seconds: 60.0,
            undeliverable_grace_seconds: 5.0,
            resend_confirmed_calls: true,
            resend_silent_calls_seconds: 10.0,
            send_timeout_seconds: 30.0,
            rpc_ping_enabled: false,
            connection_name: None,
        }
    }
}

impl AmqpOptions {
    /// Applies the options of a URL's query on top of these.
    ///
    /// # Errors
    ///
    /// [`BusError::Config`] for unknown names and values of the wrong type.
    pub fn with_query(&self, query: &[(String, String)]) -> Result<Self, BusError> {
        let mut merged = self.clone();
        for (key, text) in query {
            let value = match text.as_str() {
                "true" | "True" | "1" if is_switch(key) => Value::Bool(true),
                "false" | "False" | "0" if is_switch(key) => Value::Bool(false),
                other => serde_json::from_str(other)
                    .ok()
                    .filter(Value::is_number)
                    .unwrap_or_else(|| Value::String(other.to_owned())),
            };
            merged = merged.with_one(key, value)?;
        }
        Ok(merged)
    }

    fn with_one(&self, key: &str, value: Value) -> Result<Self, BusError> {
        let refused = |error: serde_json::Error| {
            BusError::Config(format!("transport URL: option {key}: {error}"))
        };
        let mut all = match serde_json::to_value(self).map_err(refused)? {
            Value::Object(all) => all,
            _ => Map::new(),
        };
        // An unknown key stays as it is and is refused below, by name.
        let name = field_of(key, &all).unwrap_or_else(|| key.to_owned());
        all.insert(name, value);
        serde_json::from_value(Value::Object(all)).map_err(refused)
    }

    /// Checks what types cannot.
    ///
    /// # Errors
    ///
    /// [`BusError::Config`] naming the option and the remedy.
    pub fn validate(&self) -> Result<(), BusError> {
        let wrong = |what: &str| Err(BusError::Config(what.to_owned()));
        if self.stream_fanout && !self.transient_quorum_queues {
            return wrong("stream_fanout needs transient_quorum_queues = true, in all programs");
        }
        if self.ha_queues && (self.quorum_queues || self.transient_quorum_queues) {
            return wrong("ha_queues and quorum queues exclude each other; unset ha_queues");
        }
        if self.tls_cert_file.is_some() != self.tls_key_file.is_some() {
            return wrong("tls_cert_file and tls_key_file need each other; set both or none");
        }
        for (name, seconds) in [
            ("connect_timeout_seconds", self.connect_timeout_seconds),
            ("retry_interval_seconds", self.retry_interval_seconds),
            ("retry_backoff_seconds", self.retry_backoff_seconds),
            ("retry_interval_max_seconds", self.retry_interval_max_seconds),
            ("missing_consumer_retry_timeout_seconds", self.missing_consumer_retry_timeout_seconds),
            ("undeliverable_grace_seconds", self.undeliverable_grace_seconds),
            ("send_timeout_seconds", self.send_timeout_seconds),
            ("resend_silent_calls_seconds", self.resend_silent_calls_seconds),
        ] {
            if !(0.0..=86_400.0).contains(&seconds) {
                let what = format!("{name} = {seconds} is not within 0..=86400 seconds");
                return Err(BusError::Config(what));
            }
        }
        if self.connect_timeout_seconds < 0.1 || self.retry_interval_max_seconds < 0.1 {
            return wrong(
                "connect_timeout_seconds and retry_interval_max_seconds must be at least 0.1",
            );
        }
        Ok(())
    }

    /// How long to wait before attempt `attempt` (the first retry is 0), without jitter.
    #[must_use]
    pub fn retry_delay(&self, attempt: u32) -> Duration {
        let grown = self.retry_interval_seconds + self.retry_backoff_seconds * f64::from(attempt);
        seconds(grown.min(self.retry_interval_max_seconds))
    }
}

/// A checked option as a duration.
pub(super) fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::ZERO)
}

fn is_switch(key: &str) -> bool {
    let alone = |value: Value| {
        let alone = Map::from_iter([(key.to_owned(), value)]);
        serde_json::from_value::<AmqpOptions>(Value::Object(alone)).is_ok()
    };
    alone(Value::Bool(true))
}

/// The field that `key` names, by its own name or by an alias.
fn field_of(key: &str, all: &Map<String, Value>) -> Option<String> {
    if all.contains_key(key) {
        return Some(key.to_owned());
    }
    // serde knows the aliases: a field beside its own alias is a duplicate.
    let is_alias_of = |(name, value): &(&String, &Value)| {
        let both = [((*name).clone(), (*value).clone()), (key.to_owned(), (*value).clone())];
        serde_json::from_value::<AmqpOptions>(Value::Object(Map::from_iter(both)))
            .is_err_and(|error| error.to_string().contains("duplicate field"))
    };
    all.iter().find(is_alias_of).map(|(name, _)| name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(pairs: &[(&str, &str)]) -> Result<AmqpOptions, BusError> {
        let pairs: Vec<_> = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        AmqpOptions::default().with_query(&pairs)
    }

    #[test]
    fn the_query_of_a_url_overrides_options_under_either_name() {
        let options = query(&[
            ("rabbit_quorum_queue", "true"),
            ("durable_queues", "1"),
            ("heartbeat_timeout_threshold", "20"),
            ("rabbit_retry_interval", "0.5"),
            ("rabbit_quroum_max_memory_bytes", "7"),
            ("ssl_ca_file", "/etc/ca.pem"),
            ("ssl_enforce_hostname_verification", "False"),
        ])
        .unwrap();
        assert!(options.quorum_queues && options.durable_queues);
        assert!(!options.tls_enforce_hostname_verification);
        assert_eq!((options.heartbeat_seconds, options.quorum_max_memory_bytes), (20, 7));
        assert_eq!(options.tls_ca_file.as_deref(), Some("/etc/ca.pem"));
    }

    #[test]
    fn an_alias_can_set_a_field_back_to_its_default() {
        let durable = AmqpOptions { durable_queues: true, ..AmqpOptions::default() };
        let back = durable.with_query(&[("amqp_durable_queues".into(), "false".into())]).unwrap();
        assert!(!back.durable_queues);
    }

    #[test]
    fn an_unknown_or_ill_typed_option_is_refused_by_name() {
        for (key, value) in [("durable_queue", "1"), ("prefetch", "many"), ("prefetch", "70000")] {
            let said = query(&[(key, value)]).unwrap_err().to_string();
            assert!(said.contains(key), "{said}");
        }
    }

    #[test]
    fn combinations_that_cannot_work_are_refused() {
        let defaults = AmqpOptions::default();
        assert!(defaults.validate().is_ok());
        for wrong in [
            AmqpOptions { stream_fanout: true, ..defaults.clone() },
            AmqpOptions { ha_queues: true, quorum_queues: true, ..defaults.clone() },
            AmqpOptions { tls_cert_file: Some("c".into()), ..defaults.clone() },
            AmqpOptions { retry_interval_seconds: -1.0, ..defaults.clone() },
            AmqpOptions { send_timeout_seconds: f64::NAN, ..defaults },
        ] {
            assert!(matches!(wrong.validate(), Err(BusError::Config(_))), "{wrong:?}");
        }
    }

    #[test]
    fn the_delay_grows_to_its_cap() {
        let options = AmqpOptions::default();
        let delays: Vec<_> = [0, 1, 2, 100].map(|n| options.retry_delay(n).as_millis()).to_vec();
        assert_eq!(delays, [250, 750, 1250, 3000]);
    }
}
