//! `agentctl top`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use serde_json::Value;
use stackhand_model::{AgentKind, Kind, ObjectRef};
use uuid::Uuid;

use super::Session;
use crate::console::Output;
use crate::exit::{Exit, chain};
use crate::fleet::{Filter, Fleet, ask_all};
use crate::objects;
use crate::table::Cell;

/// Show what hosts and instances use, again and again.
///
/// CPU is in percent of one processor, over the time since the last round. Where many instances
/// run, agents ask for memory and disks by turns: DISK/S is over the time between the last two
/// times. What is not known yet is -. The line of a host is the sum of its instances.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl top
  agentctl top --host node1 --every 5
  agentctl top --once -o json")]
pub(crate) struct Top {
    #[command(flatten)]
    filter: Filter,
    /// Seconds between rounds
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    every: u64,
    /// Show one round and end
    #[arg(long)]
    once: bool,
}

/// One line: an instance, or a host with the sum of its instances.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Line {
    host: String,
    /// None: the host itself.
    instance: Option<String>,
    cpu_percent: f64,
    /// None: not known yet, as of disks.
    memory_mib: Option<u64>,
    disk_bytes_per_second: Option<u64>,
    network_bytes_per_second: u64,
    /// What the host has; of a host alone.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    size: Option<Size>,
}

/// What a host has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Size {
    host_instances: usize,
    host_cpus: u64,
    host_memory_mib: u64,
}

/// Two answers of a QEMU are not nearer than this.
const SAME: Duration = Duration::from_millis(500);

/// What was counted of each instance, and what each host has.
#[derive(Clone, Debug, Default)]
struct Counts {
    instances: BTreeMap<(String, Uuid), Instance>,
    hosts: BTreeMap<String, Size>,
}

/// What was counted of an instance.
#[derive(Clone, Debug)]
struct Instance {
    usage: Value,
    /// Bytes a second to and from disks, between the last two times that its QEMU told.
    disk_rate: Option<u64>,
}

impl Counts {
    /// Takes from the last counts what the new ones do not say: rates of disks.
    fn follow(&mut self, before: &Self, between: Duration) {
        for (key, now) in &mut self.instances {
            if let Some(before) = before.instances.get(key) {
                now.disk_rate = now.disk_rate_after(before, between);
            }
        }
    }
}

impl Instance {
    fn disk_rate_after(&self, before: &Self, between: Duration) -> Option<u64> {
        let age = |it: &Self| it.usage["disk_age_ms"].as_u64().map(Duration::from_millis);
        let between = (between + age(before)?).saturating_sub(age(self)?);
        // Ages are in whole milliseconds, and answers take some to arrive: what is this near is
        // the same answer.
        if between < SAME {
            return before.disk_rate;
        }
        let grown = self.grown(before, &["disk_read_bytes", "disk_write_bytes"]);
        Some(as_u64((as_f64(grown) / between.as_secs_f64()).round()))
    }

    /// By how much the sum of some counts grew. One that was started anew counts from zero.
    fn grown(&self, before: &Self, keys: &[&str]) -> u64 {
        let sum = |of: &Value| -> u64 {
            keys.iter().filter_map(|key| of[key].as_u64()).fold(0, u64::saturating_add)
        };
        sum(&self.usage).saturating_sub(sum(&before.usage))
    }
}

pub(crate) async fn run(args: &Top, session: &mut Session) -> Result<Exit> {
    let filter = Filter { agent: Some(AgentKind::Compute), ..args.filter.clone() };
    let fleet = session.fleet().await?;
    let kinds = |_: &_| Some(Some(Kind::Instance));
    let held = objects::gather(&fleet, &filter, kinds).await?;
    let names = objects::names(&objects::rows(&held.held));
    let mut before = count(&fleet, &filter, session).await?;
    let mut since = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_secs(args.every)).await;
        let mut now = count(&fleet, &filter, session).await?;
        let between = since.elapsed();
        since = Instant::now();
        now.follow(&before, between);
        let lines = lines(&before, &now, between, &names);
        before = now;
        let for_people = matches!(session.console.output(), Output::Table | Output::Wide);
        if !args.once && for_people && session.console.is_live() {
            // From the top left corner of an empty screen.
            session.console.text("\u{1b}[H\u{1b}[2J")?;
        }
        session.console.print(&lines, |table| {
            table.headers(&["HOST", "INSTANCE", "CPU%", "MIB", "DISK/S", "NET/S"]);
            for line in &lines {
                let cpu = format!("{:.1}", line.cpu_percent);
                let mib = line.memory_mib.map_or("-".into(), |mib| mib.to_string());
                let (instance, cpu, mib) = match (&line.instance, line.size) {
                    (None, Some(size)) => (
                        format!("({} instances)", size.host_instances),
                        format!("{cpu} of {}", size.host_cpus * 100),
                        format!("{mib} of {}", size.host_memory_mib),
                    ),
                    (instance, _) => (instance.clone().unwrap_or_default(), cpu, mib),
                };
                table.row([
                    Cell::from(line.host.as_str()),
                    instance.into(),
                    cpu.into(),
                    mib.into(),
                    line.disk_bytes_per_second.map_or("-".into(), short).into(),
                    short(line.network_bytes_per_second).into(),
                ]);
            }
        })?;
        if args.once {
            fleet.close().await;
            return Ok(Exit::Well);
        }
    }
}

/// Asks every compute agent what its instances have used.
async fn count(fleet: &Fleet, filter: &Filter, session: &mut Session) -> Result<Counts> {
    let (living, _) = fleet.living(filter).await?;
    let mut counts = Counts::default();
    for (member, answer) in ask_all(&living, |it| async move { it.client.facts().await }).await {
        match answer {
            Ok(facts) => {
                let host = &member.row.host;
                let usage = facts["usage"].as_object().into_iter().flatten();
                let usage: Vec<_> = usage
                    .filter_map(|(id, usage)| {
                        let instance = Instance { usage: usage.clone(), disk_rate: None };
                        Some(((host.clone(), id.parse().ok()?), instance))
                    })
                    .collect();
                let size = Size {
                    host_instances: usage.len(),
                    host_cpus: facts["cpus"].as_u64().unwrap_or(0),
                    host_memory_mib: facts["memory_mib"].as_u64().unwrap_or(0),
                };
                counts.hosts.insert(host.clone(), size);
                counts.instances.extend(usage);
            }
            Err(error) => {
                let line = format!("agentctl: {}: {}", member.label(), chain(&error.into()));
                session.console.note(&line);
            }
        }
    }
    Ok(counts)
}

/// What was used between two counts: hosts by name, each with its instances, the busiest first.
fn lines(
    before: &Counts,
    now: &Counts,
    between: Duration,
    names: &BTreeMap<ObjectRef, String>,
) -> Vec<Line> {
    let seconds = between.as_secs_f64().max(0.001);
    let mut lines: Vec<Line> = now
        .instances
        .iter()
        .map(|((host, id), instance)| {
            let earlier = before.instances.get(&(host.clone(), *id)).unwrap_or(instance);
            let grown = |keys: &[&str]| as_f64(instance.grown(earlier, keys));
            let network = grown(&["network_receive_bytes", "network_transmit_bytes"]) / seconds;
            let object = ObjectRef { kind: Kind::Instance, id: *id };
            Line {
                host: host.clone(),
                instance: Some(names.get(&object).cloned().unwrap_or_else(|| id.to_string())),
                cpu_percent: grown(&["cpu_nanoseconds"]) / 1e7 / seconds,
                memory_mib: instance.usage["memory_resident_kib"].as_u64().map(|kib| kib / 1024),
                disk_bytes_per_second: instance.disk_rate,
                network_bytes_per_second: as_u64(network.round()),
                size: None,
            }
        })
        .collect();
    let sums = now.hosts.iter().map(|(host, size)| {
        let line = Line { host: host.clone(), size: Some(*size), ..Line::default() };
        lines.iter().filter(|it| it.host == *host).fold(line, |mut sum, it| {
            sum.cpu_percent += it.cpu_percent;
            sum.memory_mib = known(sum.memory_mib, it.memory_mib);
            sum.disk_bytes_per_second = known(sum.disk_bytes_per_second, it.disk_bytes_per_second);
            sum.network_bytes_per_second += it.network_bytes_per_second;
            sum
        })
    });
    let sums: Vec<Line> = sums.collect();
    lines.extend(sums);
    lines.sort_by(|a, b| {
        let by_host = a.host.cmp(&b.host).then_with(|| a.size.is_none().cmp(&b.size.is_none()));
        let by_use = || b.cpu_percent.total_cmp(&a.cpu_percent);
        by_host.then_with(by_use).then_with(|| a.instance.cmp(&b.instance))
    });
    lines
}

/// The sum of what is known.
fn known(sum: Option<u64>, one: Option<u64>) -> Option<u64> {
    sum.into_iter().chain(one).reduce(u64::saturating_add)
}

#[expect(clippy::cast_precision_loss, reason = "shown to people")]
fn as_f64(number: u64) -> f64 {
    number as f64
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is positive")]
fn as_u64(number: f64) -> u64 {
    number as u64
}

/// A number of bytes in few characters.
fn short(bytes: u64) -> String {
    let mut amount = as_f64(bytes);
    for unit in ["", "K", "M", "G"] {
        if amount < 1024.0 {
            return if unit.is_empty() { bytes.to_string() } else { format!("{amount:.1}{unit}") };
        }
        amount /= 1024.0;
    }
    format!("{amount:.1}T")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rates_are_what_grew_and_a_restart_is_no_rate() {
        let key = |id: u128| ("node1".to_owned(), Uuid::from_u128(id));
        let size = Size { host_instances: 3, host_cpus: 4, host_memory_mib: 512 };
        let counts = |instances| Counts { instances, hosts: [("node1".to_owned(), size)].into() };
        let before =
            counts([(key(1), instance(0, 0, 0)), (key(2), instance(9_000_000_000, 5, 0))].into());
        let mut now = counts(
            [
                (key(1), instance(1_000_000_000, 4096, 0)),
                (key(2), instance(1, 0, 0)),
                (key(3), instance(7, 7, 0)),
            ]
            .into(),
        );
        now.follow(&before, Duration::from_secs(2));
        let lines = lines(&before, &now, Duration::from_secs(2), &BTreeMap::new());
        assert_eq!(lines.len(), 4);
        // The host first, with the sum.
        assert_eq!((lines[0].size, &lines[0].instance), (Some(size), &None));
        assert_eq!((lines[0].disk_bytes_per_second, lines[0].memory_mib), (Some(2048), Some(6)));
        assert!((lines[1].cpu_percent - 50.0).abs() < 0.1, "{lines:?}");
        assert_eq!((lines[1].disk_bytes_per_second, lines[1].memory_mib), (Some(2048), Some(2)));
        assert!(lines[2..].iter().all(|line| line.cpu_percent == 0.0), "{lines:?}");
        // Nobody knows what the new one did before it was seen.
        let rates: Vec<_> = lines[2..].iter().map(|line| line.disk_bytes_per_second).collect();
        assert!(rates.contains(&Some(0)) && rates.contains(&None), "{lines:?}");
        assert_eq!([0, 1023, 1536, 5 << 30].map(short), ["0", "1023", "1.5K", "5.0G"]);
    }

    #[test]
    fn rates_of_disks_are_over_the_time_between_the_answers() {
        let second = Duration::from_secs(1);
        // Told 4 s before the first look; by the second look, 2 s later, nothing new was told.
        let first = instance(0, 1000, 4000);
        let mut second_look = instance(0, 1000, 6004);
        assert_eq!(second_look.disk_rate_after(&first, 2 * second), None);
        second_look.disk_rate = Some(7);
        let third = instance(0, 1000, 8001);
        assert_eq!(third.disk_rate_after(&second_look, 2 * second), Some(7), "the last one stands");
        // Told 1 s before the fourth look, that is 9 s after the first answer.
        let fourth = instance(0, 10_000, 1000);
        assert_eq!(fourth.disk_rate_after(&third, 2 * second), Some(1000));
        // An agent that does not know yet.
        let unknown = Instance { usage: json!({"cpu_nanoseconds": 1}), disk_rate: None };
        assert_eq!(fourth.disk_rate_after(&unknown, second), None);
        assert_eq!(unknown.disk_rate_after(&fourth, second), None);
    }

    fn instance(cpu: u64, disk: u64, age: u64) -> Instance {
        let usage = json!({
            "cpu_nanoseconds": cpu, "disk_read_bytes": disk, "memory_resident_kib": 2048,
            "disk_age_ms": age,
        });
        Instance { usage, disk_rate: None }
    }
}
