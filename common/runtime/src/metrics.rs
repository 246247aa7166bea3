//! Numbers for Prometheus: what every agent counts, and a place for what each adds.
//!
//! The counters live here rather than in the parts that count, so that names and meanings are the
//! same in all agents. Parts that keep their own numbers (bus, ledger) hand in a closure that is
//! asked at each scrape.

mod process;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// Every name starts with this.
const PREFIX: &str = "stackhand";

/// The metrics of a process. Clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    /// Passes of the reconcile loop.
    pub reconcile_passes: Counter,
    /// Changes made to the host.
    pub reconcile_writes: Counter,
    /// Objects that could not be made what they should be, by kind.
    pub reconcile_failures: Family<[(&'static str, String); 1], Counter>,
    /// How long passes took, in seconds.
    pub reconcile_seconds: Histogram,
    /// Documents in the ledger.
    pub ledger_documents: Gauge,
    /// Messages dropped because they were malformed.
    pub malformed_messages: Counter,
    /// Commands refused, by reason: `unsigned`, `replayed`, `stale`, `unknown_key`, …
    pub refused_commands: Family<[(&'static str, String); 1], Counter>,
    /// 1 while the broker is connected.
    pub bus_connected: Gauge,
    /// Log lines dropped because standard error was not read.
    pub log_lines_dropped: Counter<u64, AtomicU64>,
}

/// A number that a part of the agent keeps itself, read at each scrape.
pub struct Reading {
    name: &'static str,
    help: &'static str,
    kind: ReadingKind,
    read: Box<dyn Fn() -> u64 + Send + Sync>,
}

#[derive(Clone, Copy, Debug)]
enum ReadingKind {
    Counter,
    Gauge,
}

impl Metrics {
    /// The metrics that every agent has, all at zero.
    #[must_use]
    pub fn new(agent: &'static str, version: &'static str) -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let metrics = Self {
            registry: Arc::default(),
            reconcile_passes: Counter::default(),
            reconcile_writes: Counter::default(),
            reconcile_failures: Family::default(),
            reconcile_seconds: Histogram::new([
                0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0,
            ]),
            ledger_documents: Gauge::default(),
            malformed_messages: Counter::default(),
            refused_commands: Family::default(),
            bus_connected: Gauge::default(),
            log_lines_dropped: Counter::default(),
        };
        registry.register(
            "build",
            "What runs here",
            Info::new(vec![("agent", agent), ("version", version)]),
        );
        registry.register(
            "reconcile_passes",
            "Passes of the reconcile loop",
            metrics.reconcile_passes.clone(),
        );
        registry.register(
            "reconcile_writes",
            "Changes made to the host",
            metrics.reconcile_writes.clone(),
        );
        registry.register(
            "reconcile_failures",
            "Objects that could not be made what they should be",
            metrics.reconcile_failures.clone(),
        );
        registry.register_with_unit(
            "reconcile_pass_duration",
            "How long passes took",
            Unit::Seconds,
            metrics.reconcile_seconds.clone(),
        );
        registry.register(
            "ledger_documents",
            "Documents in the ledger",
            metrics.ledger_documents.clone(),
        );
        registry.register(
            "malformed_messages",
            "Messages dropped because they were malformed",
            metrics.malformed_messages.clone(),
        );
        registry.register(
            "refused_commands",
            "Commands refused: unsigned, replayed, stale, from an unknown key",
            metrics.refused_commands.clone(),
        );
        registry.register(
            "bus_connected",
            "1 while the broker is connected",
            metrics.bus_connected.clone(),
        );
        registry.register(
            "log_lines_dropped",
            "Log lines dropped because standard error was not read",
            metrics.log_lines_dropped.clone(),
        );
        registry.register_collector(Box::new(process::ProcessNumbers));
        *metrics.registry() = registry;
        metrics
    }

    /// Counts an object of `kind` that could not be made what it should be.
    pub fn count_failure(&self, kind: &str) {
        self.reconcile_failures.get_or_create(&[("kind", kind.to_owned())]).inc();
    }

    /// Counts a command that was refused. `reason` is one of a fixed set of words, never text from
    /// outside: each makes a series.
    pub fn count_refusal(&self, reason: &'static str) {
        self.refused_commands.get_or_create(&[("reason", reason.to_owned())]).inc();
    }

    /// Adds an agent's own metrics. Names get the prefix `stackhand_`.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry());
    }

    /// Adds numbers that a part keeps itself; they are read at each scrape, so reading must be
    /// quick and must not wait.
    pub fn register_readings(&self, readings: Vec<Reading>) {
        self.registry().register_collector(Box::new(Readings(readings)));
    }

    /// All metrics in OpenMetrics text.
    ///
    /// # Errors
    ///
    /// Fails if a registered collector does.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::with_capacity(8192);
        prometheus_client::encoding::text::encode(&mut text, &self.registry())?;
        Ok(text)
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reading {
    /// A number that only grows. `name` is without `stackhand_` and `_total`.
    pub fn counter(
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Self {
        Self { name, help, kind: ReadingKind::Counter, read: Box::new(read) }
    }

    /// A number that goes up and down. `name` is without `stackhand_`.
    pub fn gauge(
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Self {
        Self { name, help, kind: ReadingKind::Gauge, read: Box::new(read) }
    }
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reading")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Readings(Vec<Reading>);

impl Collector for Readings {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for reading in &self.0 {
            let value = (reading.read)();
            match reading.kind {
                ReadingKind::Counter => {
                    let metric = ConstCounter::new(value);
                    write(&mut encoder, reading.name, reading.help, None, &metric)?;
                }
                ReadingKind::Gauge => {
                    let metric = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
                    write(&mut encoder, reading.name, reading.help, None, &metric)?;
                }
            }
        }
        Ok(())
    }
}

fn write(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    metric: &impl EncodeMetric,
) -> fmt::Result {
    // The encoder puts the registry's prefix before the name.
    metric.encode(encoder.encode_descriptor(name, help, unit, metric.metric_type())?)
}
