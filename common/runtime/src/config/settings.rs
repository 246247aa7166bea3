//! The settings that every agent has, with their defaults and limits.
//!
//! Units are in the names. Every key has a default, so an empty file is valid. The agent's own
//! section stands beside these, see [`AgentSection`](super::AgentSection).

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stackhand_bus::BusError;
use stackhand_bus::amqp::{AmqpOptions, AmqpUrl};

use super::{Problems, redact};

/// The part of the settings that all agents share.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default = "CommonSettings::nameless", deny_unknown_fields)]
pub struct CommonSettings {
    /// This host's name in the cloud. Default: the kernel's host name.
    pub host: String,
    /// Availability zone that the host belongs to. Default: `nova`.
    pub zone: String,
    /// The cloud that the host belongs to; ids derived from names depend on it.
    /// Default: `default`.
    pub cloud: String,
    /// Where the agent keeps its ledger. Default: `/var/lib/stackhand/<agent>`.
    pub state_dir: PathBuf,
    /// Where the local sockets are. Default: `/run/stackhand`.
    pub run_dir: PathBuf,
    /// The message bus.
    pub bus: BusSettings,
    /// Whose commands are obeyed.
    pub signing: SigningSettings,
    /// What is logged, and how.
    pub log: LogSettings,
    /// Metrics and health over HTTP.
    pub http: HttpSettings,
    /// Reports to the controllers.
    pub heartbeat: HeartbeatSettings,
    /// The loop that makes the host what it should be.
    pub reconcile: ReconcileSettings,
    /// How the agent stops.
    pub shutdown: ShutdownSettings,
}

/// `[bus]`: how controllers reach the agent.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct BusSettings {
    /// Broker to connect to, such as `rabbit://user:password@broker1:5672,broker2:5672/`.
    /// Default: none; the agent then listens on its local socket alone.
    pub url: Option<BusUrl>,
    /// Options of the AMQP transport, under our names or those of oslo.messaging; the query of
    /// the URL wins over them.
    pub amqp: AmqpOptions,
    /// Most requests handled at once, 1 to 1024. Default: 16.
    pub concurrency: u32,
    /// Seconds that an outgoing call may take, 1 to 3600. Default: 60.
    pub call_timeout_seconds: u32,
}

/// `[signing]`: which controllers may command this host over a broker.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct SigningSettings {
    /// Whether commands from a broker must be signed. Turn off only where the broker itself is
    /// out of reach for others; heartbeats then say so. Default: true.
    pub required: bool,
    /// Folder of the public keys that are trusted. Default: `/etc/stackhand/trusted_controllers`.
    pub trusted_controllers: PathBuf,
    /// Seconds that a command's time stamp may differ from this host's clock, 1 to 3600.
    /// Default: 60.
    pub window_seconds: u32,
}

/// `[log]`: what is logged, and how.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSettings {
    /// A level (`error`, `warn`, `info`, `debug`, `trace`) or a filter with levels by module,
    /// such as `info,stackhand_bus=debug`. Default: `info`.
    pub level: String,
    /// Form of the log. Default: `auto`.
    pub format: LogFormat,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// The journal when systemd started the agent, else text on standard error.
    #[default]
    Auto,
    /// The journal's own protocol, with fields.
    Journald,
    /// Lines for people on standard error.
    Human,
    /// One JSON object a line on standard error.
    Json,
}

/// `[http]`: metrics and health.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpSettings {
    /// Where to serve `/metrics`, `/healthz` and `/readyz`: `127.0.0.1:9469` or `unix:/path`.
    /// Default: nowhere.
    pub listen: Option<Listen>,
}

/// `[heartbeat]`: reports to the controllers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct HeartbeatSettings {
    /// Seconds between reports, 1 to 3600. Default: 10.
    pub interval_seconds: u32,
    /// Seconds between registrations, 10 to 86400. Default: 3600.
    pub register_interval_seconds: u32,
}

/// `[reconcile]`: the loop that makes the host what it should be.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReconcileSettings {
    /// Seconds between passes when nothing changed, 1 to 86400. Default: 60.
    pub resync_seconds: u32,
    /// Milliseconds before a failed object is tried again the first time, 10 to 60000; doubled
    /// with every failure. Default: 500.
    pub retry_min_milliseconds: u32,
    /// Most seconds between tries of a failed object, 1 to 3600. Default: 60.
    pub retry_max_seconds: u32,
}

/// `[shutdown]`: how the agent stops.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShutdownSettings {
    /// Seconds that running work may take to finish after a request to stop, 1 to 600.
    /// Default: 20.
    pub limit_seconds: u32,
}

impl CommonSettings {
    /// The defaults of the agent called `agent` on this host.
    #[must_use]
    pub fn for_agent(agent: &str) -> Self {
        Self {
            host: kernel_host_name(),
            state_dir: PathBuf::from("/var/lib/stackhand").join(agent),
            ..Self::nameless()
        }
    }

    /// Defaults that need no name of an agent; the loader's first layer fills in the rest.
    fn nameless() -> Self {
        Self {
            host: String::new(),
            zone: "nova".into(),
            cloud: "default".into(),
            state_dir: PathBuf::new(),
            run_dir: "/run/stackhand".into(),
            bus: BusSettings::default(),
            signing: SigningSettings::default(),
            log: LogSettings::default(),
            http: HttpSettings::default(),
            heartbeat: HeartbeatSettings::default(),
            reconcile: ReconcileSettings::default(),
            shutdown: ShutdownSettings::default(),
        }
    }

    /// The local socket of the agent called `agent`: `<run_dir>/<agent>.sock`.
    #[must_use]
    pub fn socket(&self, agent: &str) -> PathBuf {
        self.run_dir.join(format!("{agent}.sock"))
    }

    /// Reports every value that is outside its limits.
    pub(super) fn check(&self, problems: &mut Problems) {
        check_name(problems, "host", &self.host, ".-_");
        check_name(problems, "zone", &self.zone, ".-_:");
        check_name(problems, "cloud", &self.cloud, ".-_");
        problems.absolute("state_dir", &self.state_dir);
        problems.absolute("run_dir", &self.run_dir);
        problems.absolute("signing.trusted_controllers", &self.signing.trusted_controllers);
        self.bus.check(problems);
        problems.range("bus.concurrency", self.bus.concurrency, 1..=1024);
        problems.range("bus.call_timeout_seconds", self.bus.call_timeout_seconds, 1..=3600);
        problems.range("signing.window_seconds", self.signing.window_seconds, 1..=3600);
        problems.range("heartbeat.interval_seconds", self.heartbeat.interval_seconds, 1..=3600);
        problems.range(
            "heartbeat.register_interval_seconds",
            self.heartbeat.register_interval_seconds,
            10..=86_400,
        );
        let reconcile = &self.reconcile;
        problems.range("reconcile.resync_seconds", reconcile.resync_seconds, 1..=86_400);
        problems.range(
            "reconcile.retry_min_milliseconds",
            reconcile.retry_min_milliseconds,
            10..=60_000,
        );
        problems.range("reconcile.retry_max_seconds", reconcile.retry_max_seconds, 1..=3600);
        if reconcile.retry_min() > reconcile.retry_max() {
            problems.add(
                "reconcile.retry_max_seconds",
                "must not be shorter than `reconcile.retry_min_milliseconds`",
            );
        }
        problems.range("shutdown.limit_seconds", self.shutdown.limit_seconds, 1..=600);
        if let Err(why) = crate::telemetry::check_filter(&self.log.level) {
            problems.add("log.level", format!("is not a level or filter: {why}"));
        }
    }
}

/// Names go into queue names, file names and metric labels.
fn check_name(problems: &mut Problems, key: &str, name: &str, extra: &str) {
    if name.is_empty() {
        problems.add(key, "must not be empty");
    } else if name.len() > 255 {
        problems.add(key, "must not be longer than 255 bytes");
    } else if let Some(bad) =
        name.chars().find(|&c| !c.is_ascii_alphanumeric() && !extra.contains(c))
    {
        problems.add(key, format!("must not hold {bad:?}; use letters, digits and `{extra}`"));
    }
}

/// The host name that the kernel holds; empty if it is not UTF-8.
fn kernel_host_name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default()
}

impl BusSettings {
    /// Reports what the transport would refuse.
    fn check(&self, problems: &mut Problems) {
        if let Err(error) = self.amqp.validate() {
            problems.add("bus.amqp", format!("cannot be used: {error}"));
        }
        let Some(url) = &self.url else { return };
        let text = |error: BusError| error.to_string();
        let merged = url
            .expose()
            .parse::<AmqpUrl>()
            .map_err(text)
            .and_then(|url| self.amqp.with_query(&url.query).map_err(text))
            .and_then(|options| options.validate().map_err(text));
        if let Err(error) = merged {
            problems.add("bus.url", format!("cannot be used: {error}"));
        }
    }

    /// How long an outgoing call may take.
    #[must_use]
    pub fn call_timeout(&self) -> Duration {
        Duration::from_secs(self.call_timeout_seconds.into())
    }
}

impl SigningSettings {
    /// How far a command's time stamp may be from this host's clock.
    #[must_use]
    pub fn window(&self) -> Duration {
        Duration::from_secs(self.window_seconds.into())
    }
}

impl HeartbeatSettings {
    /// Time between reports.
    #[must_use]
    pub fn interval(&self) -> Duration {
        Duration::from_secs(self.interval_seconds.into())
    }

    /// Time between registrations.
    #[must_use]
    pub fn register_interval(&self) -> Duration {
        Duration::from_secs(self.register_interval_seconds.into())
    }
}

impl ReconcileSettings {
    /// Time between passes when nothing changed.
    #[must_use]
    pub fn resync(&self) -> Duration {
        Duration::from_secs(self.resync_seconds.into())
    }

    /// Time before the first new try of a failed object.
    #[must_use]
    pub fn retry_min(&self) -> Duration {
        Duration::from_millis(self.retry_min_milliseconds.into())
    }

    /// Most time between tries of a failed object.
    #[must_use]
    pub fn retry_max(&self) -> Duration {
        Duration::from_secs(self.retry_max_seconds.into())
    }
}

impl ShutdownSettings {
    /// How long running work may take to finish.
    #[must_use]
    pub fn limit(&self) -> Duration {
        Duration::from_secs(self.limit_seconds.into())
    }
}

impl Default for BusSettings {
    fn default() -> Self {
        Self { url: None, amqp: AmqpOptions::default(), concurrency: 16, call_timeout_seconds: 60 }
    }
}

impl Default for SigningSettings {
    fn default() -> Self {
        Self {
            required: true,
            trusted_controllers: "/etc/stackhand/trusted_controllers".into(),
            window_seconds: 60,
        }
    }
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Auto }
    }
}

impl Default for HeartbeatSettings {
    fn default() -> Self {
        Self { interval_seconds: 10, register_interval_seconds: 3600 }
    }
}

impl Default for ReconcileSettings {
    fn default() -> Self {
        Self { resync_seconds: 60, retry_min_milliseconds: 500, retry_max_seconds: 60 }
    }
}

impl Default for ShutdownSettings {
    fn default() -> Self {
        Self { limit_seconds: 20 }
    }
}

/// Address of a broker. Its password is never shown: `Debug`, `Display` and serialisation
/// write `***` in its place.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct BusUrl(String);

/// Why a text is not a [`BusUrl`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBusUrl {
    /// No scheme, or one that no transport serves.
    #[error("must start with rabbit://, rabbits://, amqp:// or amqps://")]
    Scheme,
    /// A host is missing or a port is not a number from 1 to 65535.
    #[error("must name a host[:port], or several with commas, after the optional user:password@")]
    Host,
}

/// A host of a [`BusUrl`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokerAddress {
    /// Name or address; without brackets when it is IPv6.
    pub host: String,
    /// TCP port; 5672, or 5671 with TLS, where the URL names none.
    pub port: u16,
}

impl BusUrl {
    /// The URL with its password, for the transport.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether the URL holds a password.
    #[must_use]
    pub fn has_password(&self) -> bool {
        redact::text(&self.0).is_some()
    }

    /// The brokers, in the URL's order. Never empty.
    #[must_use]
    pub fn brokers(&self) -> Vec<BrokerAddress> {
        parse_brokers(&self.0).unwrap_or_default()
    }
}

fn parse_brokers(url: &str) -> Result<Vec<BrokerAddress>, InvalidBusUrl> {
    let (scheme, rest) = url.split_once("://").ok_or(InvalidBusUrl::Scheme)?;
    let standard_port = match scheme {
        "rabbit" | "amqp" => 5672,
        "rabbits" | "amqps" => 5671,
        _ => return Err(InvalidBusUrl::Scheme),
    };
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let mut brokers = Vec::new();
    for part in authority.split(',') {
        let address = part.rsplit_once('@').map_or(part, |(_user, address)| address);
        let (host, port) = match address.strip_prefix('[') {
            Some(v6) => v6.split_once(']').ok_or(InvalidBusUrl::Host)?,
            None => address.find(':').map_or((address, ""), |colon| address.split_at(colon)),
        };
        let port = match port.strip_prefix(':') {
            Some(number) => {
                number.parse().ok().filter(|&port| port > 0).ok_or(InvalidBusUrl::Host)?
            }
            None if port.is_empty() => standard_port,
            None => return Err(InvalidBusUrl::Host),
        };
        if host.is_empty() || host.contains(char::is_whitespace) {
            return Err(InvalidBusUrl::Host);
        }
        brokers.push(BrokerAddress { host: host.to_owned(), port });
    }
    Ok(brokers)
}

impl TryFrom<String> for BusUrl {
    type Error = InvalidBusUrl;

    fn try_from(text: String) -> Result<Self, InvalidBusUrl> {
        parse_brokers(&text).map(|_brokers| Self(text))
    }
}

impl FromStr for BusUrl {
    type Err = InvalidBusUrl;

    fn from_str(text: &str) -> Result<Self, InvalidBusUrl> {
        Self::try_from(text.to_owned())
    }
}

impl fmt::Display for BusUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match redact::text(&self.0) {
            Some(redacted) => f.write_str(&redacted),
            None => f.write_str(&self.0),
        }
    }
}

impl fmt::Debug for BusUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BusUrl({self})")
    }
}

impl Serialize for BusUrl {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where an HTTP server listens.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Listen {
    /// An address and port; port 0 lets the kernel choose.
    Tcp(SocketAddr),
    /// A Unix socket, by absolute path.
    Unix(PathBuf),
}

/// The text is neither `address:port` nor `unix:/path`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be an address and port, such as 127.0.0.1:9469 or [::1]:9469, or unix:/path")]
pub struct InvalidListen;

impl TryFrom<String> for Listen {
    type Error = InvalidListen;

    fn try_from(text: String) -> Result<Self, InvalidListen> {
        text.parse()
    }
}

impl FromStr for Listen {
    type Err = InvalidListen;

    fn from_str(text: &str) -> Result<Self, InvalidListen> {
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(_relative) => Err(InvalidListen),
            None => text.parse().map(Self::Tcp).map_err(|_| InvalidListen),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Serialize for Listen {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
