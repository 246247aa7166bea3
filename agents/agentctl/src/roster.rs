//! Who is there: heartbeats and registrations become one row per agent.
//!
//! Pure: takes the records and the time, says who is alive and why not.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;
use stackhand_model::{AgentKind, Kind, State};
use stackhand_runtime::api::Control;
use stackhand_runtime::report::{AgentId, Registration, Report};

use crate::table::{Cell, Table, Tone};

/// An agent is down when it was silent for this many of its intervals.
pub(crate) const INTERVALS: u64 = 3;

/// One agent, as `agentctl list` shows it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct AgentRow {
    pub(crate) id: AgentId,
    #[serde(rename = "type")]
    pub(crate) agent: AgentKind,
    pub(crate) host: String,
    pub(crate) zone: String,
    /// Heard of within three of its intervals, and it did not say good-bye.
    pub(crate) alive: bool,
    /// Its last word was that it ends; what it then said about itself still holds.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) stopped: bool,
    /// Nothing is wrong with it, as far as it said.
    pub(crate) healthy: bool,
    /// Whether controllers choose it for new objects.
    pub(crate) enabled: bool,
    /// Why it makes no passes, if it was told to make none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) paused: Option<String>,
    pub(crate) version: String,
    pub(crate) started_at: Option<Timestamp>,
    /// When its last word was sent, by its own clock.
    pub(crate) last_heartbeat: Option<Timestamp>,
    pub(crate) age_seconds: Option<i64>,
    pub(crate) interval_seconds: u64,
    /// Why it is down, disabled or not well; its last word where it is gone.
    pub(crate) reasons: Vec<String>,
    /// Objects held, by kind and state, as last reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) objects: Option<BTreeMap<Kind, BTreeMap<State, u64>>>,
    /// Whether commands over the broker must be signed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) signing: Option<bool>,
}

/// The newest records of each agent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Records {
    reports: BTreeMap<AgentId, Report>,
    registrations: BTreeMap<AgentId, Registration>,
}

impl Records {
    /// Takes in a registration, unless a newer one is known.
    pub(crate) fn registered(&mut self, registration: Registration) {
        let known = self.registrations.get(&registration.id);
        if known.is_none_or(|known| known.sent_at <= registration.sent_at) {
            self.registrations.insert(registration.id, registration);
        }
    }

    /// Takes in a report, unless a newer one is known.
    pub(crate) fn reported(&mut self, report: Report) {
        let known = self.reports.get(&report.id);
        if known.is_none_or(|known| known.sent_at <= report.sent_at) {
            self.reports.insert(report.id, report);
        }
    }

    /// Agents that registered and of which no report is known.
    pub(crate) fn silent(&self) -> usize {
        self.registrations.keys().filter(|id| !self.reports.contains_key(id)).count()
    }

    /// Agents known.
    pub(crate) fn len(&self) -> usize {
        self.reports.len() + self.silent()
    }

    /// The longest interval between reports that anybody announced, in seconds.
    pub(crate) fn longest_interval(&self) -> Option<u64> {
        let registered = self.registrations.values().filter(|it| !it.stopping);
        registered.map(|it| it.interval_seconds).max()
    }

    /// One row per agent of `cloud`, by host and then by type.
    pub(crate) fn rows(&self, cloud: &str, now: Timestamp) -> Vec<AgentRow> {
        let mut rows: Vec<AgentRow> = self
            .reports
            .values()
            .filter(|report| report.cloud == cloud)
            .map(|report| match self.registrations.get(&report.id) {
                // What an operator set since the last report counts at once.
                Some(newer) if newer.sent_at > report.sent_at => {
                    let mut report = report.clone();
                    report.control = newer.control.clone();
                    report.stopping = newer.stopping;
                    report.sent_at = newer.sent_at;
                    AgentRow::from_report(&report, now)
                }
                _ => AgentRow::from_report(report, now),
            })
            .collect();
        rows.extend(
            self.registrations
                .values()
                .filter(|it| it.cloud == cloud && !self.reports.contains_key(&it.id))
                .map(|registration| AgentRow::from_registration(registration, now)),
        );
        sort(&mut rows);
        rows
    }
}

/// The order in which rows are shown.
pub(crate) fn sort(rows: &mut [AgentRow]) {
    rows.sort_by(|a, b| (&a.host, a.agent, a.id).cmp(&(&b.host, b.agent, b.id)));
}

impl AgentRow {
    /// The row of an agent whose last report is known.
    pub(crate) fn from_report(report: &Report, now: Timestamp) -> Self {
        let age = now.as_second() - report.sent_at.as_second();
        let silent = age > limit(report.interval_seconds);
        let alive = !report.stopping && !silent;
        let mut reasons = Vec::new();
        if report.stopping {
            reasons.push("stopped in order".to_owned());
        } else if silent {
            reasons.push(format!("no heartbeat for {}", duration(age)));
        } else if -age > limit(report.interval_seconds) {
            reasons.push(format!("its clock is {} ahead of this one", duration(-age)));
        }
        reasons.extend(control_reasons(&report.control));
        if alive || report.reasons.is_empty() {
            reasons.extend(report.reasons.iter().cloned());
        } else {
            reasons.push(format!("last word: {}", report.reasons.join("; ")));
        }
        Self {
            id: report.id,
            agent: report.agent,
            host: report.host.clone(),
            zone: report.zone.clone(),
            alive,
            stopped: report.stopping,
            healthy: report.healthy,
            enabled: report.control.enabled,
            paused: report.control.paused.clone(),
            version: report.version.clone(),
            started_at: Some(report.started_at),
            last_heartbeat: Some(report.sent_at),
            age_seconds: Some(age),
            interval_seconds: report.interval_seconds,
            reasons,
            objects: Some(report.objects.clone()),
            signing: report.signing,
        }
    }

    /// The row of an agent that registered and sent no report that is still known.
    fn from_registration(registration: &Registration, now: Timestamp) -> Self {
        let age = now.as_second() - registration.sent_at.as_second();
        // One that has just started may have had no time for its first report.
        let alive = !registration.stopping && age <= limit(registration.interval_seconds);
        let mut reasons = vec![match (registration.stopping, alive) {
            (true, _) => "stopped in order".to_owned(),
            (false, true) => "has just registered".to_owned(),
            (false, false) => "no heartbeat since it registered".to_owned(),
        }];
        reasons.extend(control_reasons(&registration.control));
        Self {
            id: registration.id,
            agent: registration.agent,
            host: registration.host.clone(),
            zone: registration.zone.clone(),
            alive,
            stopped: registration.stopping,
            healthy: alive,
            enabled: registration.control.enabled,
            paused: registration.control.paused.clone(),
            version: registration.version.clone(),
            started_at: Some(registration.started_at),
            last_heartbeat: Some(registration.sent_at),
            age_seconds: Some(age),
            interval_seconds: registration.interval_seconds,
            reasons,
            objects: None,
            signing: None,
        }
    }

    /// The row of an agent of this host that does not answer on its socket.
    pub(crate) fn unreachable(id: AgentId, agent: AgentKind, host: &str, reason: String) -> Self {
        Self {
            id,
            agent,
            host: host.to_owned(),
            zone: String::new(),
            alive: false,
            stopped: false,
            healthy: false,
            enabled: true,
            paused: None,
            version: String::new(),
            started_at: None,
            last_heartbeat: None,
            age_seconds: None,
            interval_seconds: 0,
            reasons: vec![reason],
            objects: None,
            signing: None,
        }
    }

    /// Whether there is nothing to look after.
    pub(crate) fn is_well(&self) -> bool {
        self.alive && self.healthy
    }

    /// Objects in a state, over all kinds.
    fn count(&self, state: State) -> Option<u64> {
        let objects = self.objects.as_ref()?;
        Some(objects.values().filter_map(|states| states.get(&state)).sum())
    }
}

/// Fills the table of `agentctl list`.
pub(crate) fn table(rows: &[AgentRow], table: &mut Table) {
    table.headers(&[
        "ID",
        "TYPE",
        "HOST",
        "ZONE",
        "ALIVE",
        "ADMIN",
        "VERSION",
        "HEARTBEAT",
        "+STARTED",
        "+ACTIVE",
        "+PENDING",
        "+ERROR",
        "+SIGNED",
        "REASON",
    ]);
    for row in rows {
        let alive = match (row.alive, row.healthy) {
            (true, true) => Cell::toned(":-)", Tone::Good),
            (true, false) => Cell::toned(":-)", Tone::Warning),
            (false, _) => Cell::toned("xxx", Tone::Bad),
        };
        let age = row.age_seconds.map_or_else(|| "-".to_owned(), |age| duration(age.max(0)));
        let started = row.started_at.map(|time| time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        let count = |state| {
            Cell::from(row.count(state).map_or_else(|| "-".to_owned(), |it| it.to_string()))
        };
        let signed = row.signing.map_or("", |signing| if signing { "yes" } else { "no" });
        table.row([
            Cell::from(row.id.to_string()),
            Cell::from(row.agent.as_str()),
            Cell::from(row.host.as_str()),
            Cell::from(row.zone.as_str()),
            alive,
            admin(row.enabled, row.paused.is_some()),
            Cell::from(row.version.as_str()),
            Cell::from(age),
            Cell::from(started.unwrap_or_default()),
            count(State::Active),
            count(State::Pending),
            count(State::Error),
            Cell::from(signed),
            Cell::from(row.reasons.join("; ")),
        ]);
    }
}

/// What operators set, in a word; the reasons tell the rest.
pub(crate) fn admin(enabled: bool, paused: bool) -> Cell {
    match (paused, enabled) {
        (true, _) => Cell::toned("paused", Tone::Warning),
        (false, true) => Cell::from("enabled"),
        (false, false) => Cell::toned("disabled", Tone::Warning),
    }
}

fn control_reasons(control: &Control) -> impl Iterator<Item = String> {
    let disabled = (!control.enabled).then(|| match &control.reason {
        Some(reason) => format!("disabled: {reason}"),
        None => "disabled".to_owned(),
    });
    let paused = control.paused.as_ref().map(|reason| format!("paused: {reason}"));
    disabled.into_iter().chain(paused)
}

fn limit(interval_seconds: u64) -> i64 {
    i64::try_from(interval_seconds.saturating_mul(INTERVALS)).unwrap_or(i64::MAX)
}

/// A span of time in its two largest units: `43s`, `2m5s`, `3h20m`, `4d1h`.
pub(crate) fn duration(seconds: i64) -> String {
    let two = |large: i64, unit: &str, small: i64, below: &str| match small {
        0 => format!("{large}{unit}"),
        _ => format!("{large}{unit}{small}{below}"),
    };
    match seconds {
        ..60 => format!("{seconds}s"),
        60..3600 => two(seconds / 60, "m", seconds % 60, "s"),
        3600..86_400 => two(seconds / 3600, "h", seconds % 3600 / 60, "m"),
        _ => two(seconds / 86_400, "d", seconds % 86_400 / 3600, "h"),
    }
}

#[cfg(test)]
mod tests;
