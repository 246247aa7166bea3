//! What instances use, told as metrics and, once in a while, as events for those who bill.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use serde::Serialize;
use uuid::Uuid;

use crate::hypervisor::{DiskUsage, KernelUsage, MemoryUsage, QemuUsage};

/// The last count of what instances use. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct UsageBoard {
    counts: Arc<Mutex<BTreeMap<Uuid, Counted>>>,
}

/// What was counted of an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// What the kernel counts.
    pub kernel: KernelUsage,
    /// What its QEMU said of its disks, and when; none if it was not asked yet.
    pub disks: Option<(DiskUsage, Instant)>,
    /// What its QEMU said of its memory, and when; none if it was not asked yet.
    pub memory: Option<(MemoryUsage, Instant)>,
}

/// The same as people are told.
#[derive(Clone, Debug, Serialize)]
pub struct Told<'a> {
    #[serde(flatten)]
    kernel: &'a KernelUsage,
    #[serde(flatten)]
    disks: Option<&'a DiskUsage>,
    /// Milliseconds since its QEMU told of its disks.
    disk_age_ms: Option<u64>,
    #[serde(flatten)]
    memory: Option<&'a MemoryUsage>,
    /// Milliseconds since its QEMU told of memory that is resident or not used.
    memory_age_ms: Option<u64>,
}

impl Counted {
    /// As people are told.
    #[must_use]
    pub fn told(&self) -> Told<'_> {
        let age = |at: &Instant| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX);
        Told {
            kernel: &self.kernel,
            disks: self.disks.as_ref().map(|(usage, _)| usage),
            disk_age_ms: self.disks.as_ref().map(|(_, at)| age(at)),
            memory: self.memory.as_ref().map(|(usage, _)| usage),
            memory_age_ms: self.memory.as_ref().map(|(_, at)| age(at)),
        }
    }
}

impl UsageBoard {
    /// Puts the kernel's new counts of all instances in the place of the last, and forgets
    /// instances that are not among them. What a QEMU said stands, unless the processor time shows
    /// that another took its place.
    pub fn post(&self, kernel: BTreeMap<Uuid, KernelUsage>) {
        let mut counts = self.counts();
        let mut before = std::mem::take(&mut *counts);
        let counted = |(id, kernel): (Uuid, KernelUsage)| {
            let same = |it: &Counted| it.kernel.cpu_nanoseconds <= kernel.cpu_nanoseconds;
            let before = before.remove(&id).filter(same).unwrap_or_default();
            (id, Counted { kernel, ..before })
        };
        *counts = kernel.into_iter().map(counted).collect();
    }

    /// Puts what a QEMU said in the place of what it said last, if its instance still runs.
    pub fn post_qemu(&self, id: Uuid, usage: QemuUsage) {
        if let Some(counted) = self.counts().get_mut(&id) {
            match usage {
                QemuUsage::Disks(usage) => counted.disks = Some((usage, Instant::now())),
                QemuUsage::Memory(usage) => counted.memory = Some((usage, Instant::now())),
            }
        }
    }

    /// The last counts.
    #[must_use]
    pub fn read(&self) -> BTreeMap<Uuid, Counted> {
        self.counts().clone()
    }

    fn counts(&self) -> MutexGuard<'_, BTreeMap<Uuid, Counted>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A number of an instance: its name, what it is, whether it only grows, and how it is read; none
/// while its QEMU has not said it.
type Number = (&'static str, &'static str, bool, fn(&Counted) -> Option<u64>);

const NUMBERS: [Number; 8] = [
    ("instance_cpu_nanoseconds", "Processor time", true, |it| Some(it.kernel.cpu_nanoseconds)),
    ("instance_memory_resident_kib", "Memory that the host spends on it", false, |it| {
        it.memory.as_ref().map(|(it, _)| it.memory_resident_kib)
    }),
    ("instance_disk_read_bytes", "Bytes read from disks", true, |it| {
        it.disks.as_ref().map(|(it, _)| it.disk_read_bytes)
    }),
    ("instance_disk_write_bytes", "Bytes written to disks", true, |it| {
        it.disks.as_ref().map(|(it, _)| it.disk_write_bytes)
    }),
    ("instance_disk_requests", "Requests to disks", true, |it| {
        it.disks.as_ref().map(|(it, _)| it.disk_requests)
    }),
    ("instance_network_receive_bytes", "Bytes received", true, |it| {
        Some(it.kernel.network_receive_bytes)
    }),
    ("instance_network_transmit_bytes", "Bytes sent", true, |it| {
        Some(it.kernel.network_transmit_bytes)
    }),
    ("instance_network_drops", "Packets dropped on the way in or out", true, |it| {
        Some(it.kernel.network_drops)
    }),
];

/// How old what a QEMU said is.
const AGES: [Number; 2] = [
    ("instance_disk_age_seconds", "Seconds since its QEMU told of its disks", false, |it| {
        it.disks.as_ref().map(|(_, at)| at.elapsed().as_secs())
    }),
    ("instance_memory_age_seconds", "Seconds since its QEMU told of its memory", false, |it| {
        it.memory.as_ref().map(|(_, at)| at.elapsed().as_secs())
    }),
];

impl Collector for UsageBoard {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let counts = self.read();
        for (name, help, grows, number) in NUMBERS.into_iter().chain(AGES) {
            let kind = if grows {
                ConstCounter::new(0_u64).metric_type()
            } else {
                ConstGauge::new(0_i64).metric_type()
            };
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (id, counted) in &counts {
                let Some(number) = number(counted) else { continue };
                let labels = [("instance", id.to_string())];
                let one = family.encode_family(&labels)?;
                if grows {
                    ConstCounter::new(number).encode(one)?;
                } else {
                    ConstGauge::new(i64::try_from(number).unwrap_or(i64::MAX)).encode(one)?;
                }
            }
        }
        Ok(())
    }
}

/// An instance's usage in words, for an event.
#[must_use]
pub fn words(counted: &Counted) -> String {
    let mut parts = Vec::new();
    for (name, _, _, number) in NUMBERS {
        let Some(number) = number(counted) else { continue };
        parts.push(format!("{}={number}", name.trim_start_matches("instance_")));
    }
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    const ID: Uuid = Uuid::from_u128(1);

    fn kernel(cpu_nanoseconds: u64) -> BTreeMap<Uuid, KernelUsage> {
        [(ID, KernelUsage { cpu_nanoseconds, ..KernelUsage::default() })].into()
    }

    #[test]
    fn every_instance_has_its_numbers_as_soon_as_they_are_known() {
        let board = UsageBoard::default();
        let mut registry = Registry::default();
        registry.register_collector(Box::new(board.clone()));
        let text = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text
        };
        let id = "instance=\"00000000-0000-0000-0000-000000000001\"";
        board.post(kernel(5));
        assert!(
            text().contains(&format!("instance_cpu_nanoseconds_total{{{id}}} 5")),
            "{}",
            text()
        );
        assert!(!text().contains("instance_memory_resident_kib{"), "{}", text());
        assert!(words(&board.read()[&ID]).starts_with("cpu_nanoseconds=5 network_receive_bytes=0"));

        let usage = MemoryUsage { memory_resident_kib: 7, memory_unused_kib: None };
        board.post_qemu(ID, QemuUsage::Memory(usage));
        assert!(text().contains(&format!("instance_memory_resident_kib{{{id}}} 7")), "{}", text());
        assert!(text().contains(&format!("instance_memory_age_seconds{{{id}}} 0")), "{}", text());
        let counted = &board.read()[&ID];
        assert!(words(counted).starts_with("cpu_nanoseconds=5 memory_resident_kib=7 "));
        let told = serde_json::to_value(counted.told()).unwrap();
        assert_eq!(
            (&told["cpu_nanoseconds"], &told["memory_resident_kib"]),
            (&5.into(), &7.into())
        );
        assert!(told["memory_age_ms"].is_u64() && told["disk_age_ms"].is_null(), "{told}");
    }

    #[test]
    fn what_a_qemu_said_stands_until_another_is_there() {
        let board = UsageBoard::default();
        let disks =
            |disk_requests| QemuUsage::Disks(DiskUsage { disk_requests, ..DiskUsage::default() });
        board.post_qemu(ID, disks(1));
        assert!(board.read().is_empty(), "it does not run");
        board.post(kernel(5));
        board.post_qemu(ID, disks(3));
        board.post_qemu(ID, QemuUsage::Memory(MemoryUsage::default()));
        board.post(kernel(5));
        let told = || {
            let counted = board.read().remove(&ID).unwrap();
            (counted.disks.map(|(usage, _)| usage.disk_requests), counted.memory.is_some())
        };
        assert_eq!(told(), (Some(3), true));
        board.post(kernel(4));
        assert_eq!(told(), (None, false), "it was started anew");
        board.post(BTreeMap::new());
        assert!(board.read().is_empty());
    }
}
