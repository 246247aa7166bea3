//! Numbers about the process, read from `/proc` at each scrape.

use std::fmt;

use procfs::WithCurrentSystemInfo;
use procfs::process::Process;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use super::write;

/// Memory, processor time, threads, files and age of this process.
#[derive(Debug)]
pub(super) struct ProcessNumbers;

/// One look at `/proc/self`.
struct Look {
    resident_bytes: u64,
    cpu_seconds: f64,
    threads: i64,
    open_files: u64,
    start_seconds: f64,
    uptime_seconds: f64,
}

#[expect(clippy::cast_precision_loss, reason = "seconds and ticks are far below 2^52")]
fn look() -> Option<Look> {
    let process = Process::myself().ok()?;
    let stat = process.stat().ok()?;
    let ticks = procfs::ticks_per_second() as f64;
    let booted = procfs::boot_time_secs().ok()? as f64;
    let since_boot = procfs::Uptime::current_seconds()?;
    let started_after_boot = stat.starttime as f64 / ticks;
    Some(Look {
        resident_bytes: stat.rss_bytes().get(),
        cpu_seconds: (stat.utime + stat.stime) as f64 / ticks,
        threads: stat.num_threads,
        open_files: u64::try_from(process.fd_count().ok()?).ok()?,
        start_seconds: booted + started_after_boot,
        uptime_seconds: (since_boot - started_after_boot).max(0.0),
    })
}

trait CurrentSeconds {
    fn current_seconds() -> Option<f64>;
}

impl CurrentSeconds for procfs::Uptime {
    fn current_seconds() -> Option<f64> {
        use procfs::Current;
        procfs::Uptime::current().ok().map(|uptime| uptime.uptime)
    }
}

impl Collector for ProcessNumbers {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        // Without /proc there is nothing to tell.
        let Some(look) = look() else { return Ok(()) };
        let signed = |number: u64| ConstGauge::new(i64::try_from(number).unwrap_or(i64::MAX));
        let e = &mut encoder;
        write(
            e,
            "process_resident_memory",
            "Resident memory",
            Some(&Unit::Bytes),
            &signed(look.resident_bytes),
        )?;
        write(
            e,
            "process_cpu",
            "Processor time used, user and system",
            Some(&Unit::Seconds),
            &ConstCounter::new(look.cpu_seconds),
        )?;
        write(e, "process_threads", "Threads", None, &ConstGauge::new(look.threads))?;
        write(e, "process_open_files", "Open file descriptors", None, &signed(look.open_files))?;
        write(
            e,
            "process_start_time",
            "Start of the process, seconds of the Unix epoch",
            Some(&Unit::Seconds),
            &ConstGauge::new(look.start_seconds),
        )?;
        write(
            e,
            "process_uptime",
            "Age of the process",
            Some(&Unit::Seconds),
            &ConstGauge::new(look.uptime_seconds),
        )
    }
}
