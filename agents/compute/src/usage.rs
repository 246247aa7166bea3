//! What instances use, told as metrics and, once in a while, as events for those who bill.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use uuid::Uuid;

use crate::hypervisor::Usage;

/// The last count of what instances use. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct UsageBoard {
    counts: Arc<Mutex<BTreeMap<Uuid, Usage>>>,
}

impl UsageBoard {
    /// Puts a new count in the place of the last.
    pub fn post(&self, counts: BTreeMap<Uuid, Usage>) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner) = counts;
    }

    fn read(&self) -> BTreeMap<Uuid, Usage> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A number of an instance: its name, what it is, whether it only grows, and how it is read.
type Number = (&'static str, &'static str, bool, fn(&Usage) -> u64);

const NUMBERS: [Number; 8] = [
    ("instance_cpu_nanoseconds", "Processor time", true, |it| it.cpu_nanoseconds),
    ("instance_memory_resident_kib", "Memory that the host spends on it", false, |it| {
        it.memory_resident_kib
    }),
    ("instance_disk_read_bytes", "Bytes read from disks", true, |it| it.disk_read_bytes),
    ("instance_disk_write_bytes", "Bytes written to disks", true, |it| it.disk_write_bytes),
    ("instance_disk_requests", "Requests to disks", true, |it| it.disk_requests),
    ("instance_network_receive_bytes", "Bytes received", true, |it| it.network_receive_bytes),
    ("instance_network_transmit_bytes", "Bytes sent", true, |it| it.network_transmit_bytes),
    ("instance_network_drops", "Packets dropped on the way in or out", true, |it| it.network_drops),
];

impl Collector for UsageBoard {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let counts = self.read();
        for (name, help, grows, number) in NUMBERS {
            let kind = if grows {
                ConstCounter::new(0_u64).metric_type()
            } else {
                ConstGauge::new(0_i64).metric_type()
            };
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (id, usage) in &counts {
                let labels = [("instance", id.to_string())];
                let one = family.encode_family(&labels)?;
                if grows {
                    ConstCounter::new(number(usage)).encode(one)?;
                } else {
                    ConstGauge::new(i64::try_from(number(usage)).unwrap_or(i64::MAX))
                        .encode(one)?;
                }
            }
        }
        Ok(())
    }
}

/// An instance's usage in words, for an event.
#[must_use]
pub fn words(usage: &Usage) -> String {
    let mut parts = Vec::new();
    for (name, _, _, number) in NUMBERS {
        let name = name.trim_start_matches("instance_");
        parts.push(format!("{name}={}", number(usage)));
    }
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn every_instance_has_its_numbers() {
        let board = UsageBoard::default();
        let usage = Usage { cpu_nanoseconds: 5, memory_resident_kib: 7, ..Usage::default() };
        board.post([(Uuid::from_u128(1), usage.clone())].into());
        let mut registry = Registry::default();
        registry.register_collector(Box::new(board));
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let id = "instance=\"00000000-0000-0000-0000-000000000001\"";
        assert!(text.contains(&format!("instance_cpu_nanoseconds_total{{{id}}} 5")), "{text}");
        assert!(text.contains(&format!("instance_memory_resident_kib{{{id}}} 7")), "{text}");
        assert!(words(&usage).starts_with("cpu_nanoseconds=5 memory_resident_kib=7 "));
    }
}
