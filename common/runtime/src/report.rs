//! What an agent tells about itself, and where: the records of the streams.
//!
//! | stream | record | when |
//! |---|---|---|
//! | [`HEARTBEATS`] | [`Report`] | every interval, and once more with `stopping` at the end |
//! | [`REGISTRY`] | [`Registration`] | at start, every hour, and when an operator sets something |
//! | [`EVENTS`] | [`Event`](crate::events::Event) | as it happens |
//!
//! A reader takes the newest record of each [`AgentId`]; one whose newest report is older than
//! three of its intervals, or says `stopping`, is down.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stackhand_bus::Stream;
use stackhand_model::{AgentKind, Kind, State};
use uuid::Uuid;

use crate::api::Control;

/// Identifies an agent on its host for as long as both keep their names.
pub type AgentId = Uuid;

/// Name of the stream of reports.
pub const HEARTBEATS: &str = "stackhand.heartbeats";

/// Name of the stream of registrations.
pub const REGISTRY: &str = "stackhand.registry";

/// Name of the stream of events.
pub const EVENTS: &str = "stackhand.events";

const HOUR: Duration = Duration::from_secs(3600);
const MIB: u64 = 1 << 20;

/// The stream of reports. An hour of them, about 200 KB an agent.
#[must_use]
pub fn heartbeats() -> Stream {
    Stream { name: HEARTBEATS.to_owned(), max_age: HOUR, max_bytes: 1024 * MIB }
}

/// The stream of registrations. A week of them, so that an agent that is gone is remembered.
#[must_use]
pub fn registry() -> Stream {
    Stream { name: REGISTRY.to_owned(), max_age: HOUR * 24 * 7, max_bytes: 512 * MIB }
}

/// The stream of events. A day of them.
#[must_use]
pub fn events() -> Stream {
    Stream { name: EVENTS.to_owned(), max_age: HOUR * 24, max_bytes: 1024 * MIB }
}

/// The id of the agent of a kind on a host: the UUIDv5 of `stackhand:<cloud>/<host>/<agent>` in
/// the URL namespace.
#[must_use]
pub fn agent_id(cloud: &str, host: &str, agent: AgentKind) -> AgentId {
    let name = format!("stackhand:{cloud}/{host}/{agent}");
    Uuid::new_v5(&Uuid::NAMESPACE_URL, name.as_bytes())
}

/// One heartbeat: who, since when, how it is and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Which agent on which host, as one id.
    pub id: AgentId,
    /// Which agent.
    pub agent: AgentKind,
    /// On which host.
    pub host: String,
    /// Availability zone of the host.
    pub zone: String,
    /// The cloud that it belongs to.
    pub cloud: String,
    /// Version of the agent.
    pub version: String,
    /// When its process began.
    pub started_at: Timestamp,
    /// When this was sent, by the host's clock.
    pub sent_at: Timestamp,
    /// Seconds until the next report.
    pub interval_seconds: u64,
    /// Number of the report since the process began, from 1.
    pub sequence: u64,
    /// The last word: the process ends in order.
    #[serde(default, skip_serializing_if = "is_false")]
    pub stopping: bool,
    /// What operators set.
    pub control: Control,
    /// Whether all is well. It says nothing about being reachable.
    pub healthy: bool,
    /// Why it is not healthy: short sentences with the remedy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
    /// Objects held, by kind and state.
    pub objects: BTreeMap<Kind, BTreeMap<State, u64>>,
    /// Whether commands over the broker must be signed; absent where there is no broker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signing: Option<bool>,
    /// Events that the broker did not get since the process began.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub events_dropped: u64,
}

/// Tells that an agent exists. Kept longer than reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Registration {
    /// Which agent on which host, as one id.
    pub id: AgentId,
    /// Which agent.
    pub agent: AgentKind,
    /// On which host.
    pub host: String,
    /// Availability zone of the host.
    pub zone: String,
    /// The cloud that it belongs to.
    pub cloud: String,
    /// Version of the agent.
    pub version: String,
    /// When its process began.
    pub started_at: Timestamp,
    /// When this was sent, by the host's clock.
    pub sent_at: Timestamp,
    /// Seconds between its reports.
    pub interval_seconds: u64,
    /// The last word: the process ended in order.
    #[serde(default, skip_serializing_if = "is_false")]
    pub stopping: bool,
    /// What operators set.
    pub control: Control,
}

impl Report {
    /// The registration that goes with this report.
    #[must_use]
    pub fn registration(&self) -> Registration {
        Registration {
            id: self.id,
            agent: self.agent,
            host: self.host.clone(),
            zone: self.zone.clone(),
            cloud: self.cloud.clone(),
            version: self.version.clone(),
            started_at: self.started_at,
            sent_at: self.sent_at,
            interval_seconds: self.interval_seconds,
            stopping: self.stopping,
            control: self.control.clone(),
        }
    }
}

fn is_false(value: &bool) -> bool {
    !*value
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report() -> Report {
        Report {
            id: agent_id("default", "compute1", AgentKind::Network),
            agent: AgentKind::Network,
            host: "compute1".into(),
            zone: "nova".into(),
            cloud: "default".into(),
            version: "0.1.0".into(),
            started_at: Timestamp::UNIX_EPOCH,
            sent_at: Timestamp::UNIX_EPOCH,
            interval_seconds: 10,
            sequence: 1,
            stopping: false,
            control: Control::default(),
            healthy: true,
            reasons: Vec::new(),
            objects: BTreeMap::from([(Kind::Port, BTreeMap::from([(State::Active, 3)]))]),
            signing: Some(true),
            events_dropped: 0,
        }
    }

    #[test]
    fn a_report_reads_back_as_written() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["objects"], json!({"Port": {"active": 3}}));
        assert_eq!(json["control"], json!({"enabled": true}));
        assert_eq!(json["id"], "3337f917-bf44-5047-9b8a-141f24bb2c4f");
        assert_eq!(serde_json::from_value::<Report>(json).unwrap(), report());
    }

    #[test]
    fn agents_of_one_host_and_hosts_of_one_name_in_two_clouds_differ() {
        let id = agent_id("default", "compute1", AgentKind::Network);
        assert_ne!(id, agent_id("default", "compute1", AgentKind::Compute));
        assert_ne!(id, agent_id("lab", "compute1", AgentKind::Network));
    }
}
