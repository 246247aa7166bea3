//! Reaching agents: over a broker, or over the sockets of this host.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures_util::StreamExt;
use futures_util::stream;
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use stackhand_bus::{Context, LockGuard, ReadFrom, Stream, Transport};
use stackhand_model::{AgentKind, nearest};
use stackhand_runtime::client::AgentClient;
use stackhand_runtime::report;

use crate::exit::{Usage, chain};
use crate::roster::{self, AgentRow, INTERVALS, Records};
use crate::settings::Settings;

/// Calls that are under way at once.
const AT_ONCE: usize = 64;

/// Most old reports that are read for the last words of agents that are gone.
const MOST_OLD_REPORTS: u64 = 20_000;

/// The way to the agents.
#[derive(Debug)]
pub(crate) enum Link {
    /// The sockets of this host, one transport per agent that has one.
    Local(Vec<(AgentKind, Arc<dyn Transport>)>),
    /// A broker.
    Bus(Arc<dyn Transport>),
}

/// The agents, and the way to them.
#[derive(Debug)]
pub(crate) struct Fleet {
    link: Link,
    cloud: String,
    limit: Duration,
    /// One request id for all that one command asks.
    context: Context,
}

/// One agent that can be asked.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) row: AgentRow,
    pub(crate) client: AgentClient,
}

impl Member {
    /// `network-agent on node1`.
    pub(crate) fn label(&self) -> String {
        format!("{} on {}", self.row.agent.binary(), self.row.host)
    }
}

/// Which agents a command is about.
#[derive(clap::Args, Clone, Debug, Default)]
pub(crate) struct Filter {
    /// Only agents on this host
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Option<String>,
    /// Only agents of this type: compute, network or storage
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) agent: Option<AgentKind>,
}

impl Filter {
    /// Whether an agent is meant.
    pub(crate) fn admits(&self, row: &AgentRow) -> bool {
        self.host.as_ref().is_none_or(|host| *host == row.host)
            && self.agent.is_none_or(|agent| agent == row.agent)
    }
}

impl Fleet {
    /// Connects as the settings say.
    ///
    /// # Errors
    ///
    /// A broker that cannot be reached or refuses, a key that cannot be read.
    pub(crate) async fn connect(settings: &Settings) -> Result<Self> {
        let link = match &settings.url.value {
            Some(url) => {
                let key = settings.key.value.as_deref();
                Link::Bus(crate::link::broker(url, key, settings.timeout.value).await?)
            }
            None => Link::Local(crate::link::sockets(&settings.run_dir.value)?),
        };
        Ok(Self::over(link, &settings.cloud.value, settings.timeout.value))
    }

    /// The agents behind a link.
    pub(crate) fn over(link: Link, cloud: &str, limit: Duration) -> Self {
        Self { link, cloud: cloud.to_owned(), limit, context: Context::fresh() }
    }

    /// Whether this host's sockets are used.
    pub(crate) fn is_local(&self) -> bool {
        matches!(self.link, Link::Local(_))
    }

    /// The cloud whose agents these are.
    pub(crate) fn cloud(&self) -> &str {
        &self.cloud
    }

    /// The broker's transport, if a broker is used.
    pub(crate) fn bus(&self) -> Option<&Arc<dyn Transport>> {
        match &self.link {
            Link::Bus(transport) => Some(transport),
            Link::Local(_) => None,
        }
    }

    /// Ends the connections in order.
    pub(crate) async fn close(&self) {
        if let Some(bus) = self.bus() {
            bus.close().await;
        }
    }

    /// The limit on one call.
    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }

    fn client(&self, transport: Arc<dyn Transport>, agent: AgentKind, host: &str) -> AgentClient {
        AgentClient::new(transport, agent, host)
            .with_limit(self.limit)
            .with_context(self.context.clone())
    }

    /// Every agent known, by host and type, those that are down included.
    ///
    /// # Errors
    ///
    /// The broker cannot be read.
    pub(crate) async fn members(&self) -> Result<Vec<Member>> {
        let rows = match &self.link {
            Link::Local(sockets) => {
                let mut members = Vec::new();
                for (agent, transport) in sockets {
                    members.push(self.local_member(*agent, transport).await);
                }
                members.sort_by_key(|member| member.row.agent);
                self.name_host(&mut members);
                return Ok(members);
            }
            Link::Bus(transport) => read_roster(transport.as_ref(), &self.cloud).await?,
        };
        let Link::Bus(transport) = &self.link else { return Ok(Vec::new()) };
        Ok(rows
            .into_iter()
            .map(|row| Member {
                client: self.client(Arc::clone(transport), row.agent, &row.host),
                row,
            })
            .collect())
    }

    /// All agents of a host have its name; those that do not answer get it from one that does.
    fn name_host(&self, members: &mut [Member]) {
        let Some(host) = members.iter().find(|it| it.row.alive).map(|it| it.row.host.clone())
        else {
            return;
        };
        for row in members.iter_mut().map(|it| &mut it.row).filter(|row| !row.alive) {
            row.host.clone_from(&host);
            row.id = report::agent_id(&self.cloud, &host, row.agent);
        }
    }

    async fn local_member(&self, agent: AgentKind, transport: &Arc<dyn Transport>) -> Member {
        let host = this_host();
        // The socket leads to one agent, whatever its host is called.
        let client = self.client(Arc::clone(transport), agent, &host);
        let asking = client.clone().with_limit(self.limit.min(Duration::from_secs(5)));
        let row = match asking.report().await {
            Ok(report) => AgentRow::from_report(&report, Timestamp::now()),
            Err(error) => {
                let id = report::agent_id(&self.cloud, &host, agent);
                AgentRow::unreachable(id, agent, &host, chain(&error.into()))
            }
        };
        Member { row, client }
    }

    /// Takes the lock that keeps controllers of the cloud apart.
    ///
    /// # Errors
    ///
    /// Another controller holds it for longer than a call may take; nobody is there.
    pub(crate) async fn lock(&self) -> Result<LockGuard> {
        let transport = match &self.link {
            Link::Bus(transport) => transport,
            Link::Local(sockets) => match sockets.first() {
                Some((_, transport)) => transport,
                None => bail!("{}", self.nobody(&[])),
            },
        };
        let name = format!("stackhand.apply.{}", self.cloud);
        transport.lock(&name, self.limit).await.with_context(|| {
            format!("cannot take the lock of cloud {:?}: is another apply running?", self.cloud)
        })
    }

    /// The agents that a filter admits; a host that nobody knows is an error.
    ///
    /// # Errors
    ///
    /// As [`Self::members`]; an unknown host, with the nearest known one.
    pub(crate) async fn select(&self, filter: &Filter) -> Result<Vec<Member>> {
        let members = self.members().await?;
        if let Some(host) = &filter.host
            && !members.iter().any(|member| member.row.host == *host)
        {
            let hint = nearest(host, members.iter().map(|member| &*member.row.host))
                .map(|near| format!("; did you mean {near}?"))
                .unwrap_or_default();
            bail!(Usage::new(format!("no agent is known on host {host:?}{hint}")));
        }
        Ok(members.into_iter().filter(|member| filter.admits(&member.row)).collect())
    }

    /// The living agents that a filter admits.
    ///
    /// # Errors
    ///
    /// As [`Self::select`]; nobody is there.
    pub(crate) async fn living(&self, filter: &Filter) -> Result<(Vec<Member>, Vec<Member>)> {
        let (living, down): (Vec<_>, Vec<_>) =
            self.select(filter).await?.into_iter().partition(|member| member.row.alive);
        if living.is_empty() {
            bail!("{}", self.nobody(&down));
        }
        Ok((living, down))
    }

    /// Why there is nobody to ask, with what to do about it.
    pub(crate) fn nobody(&self, down: &[Member]) -> String {
        match (down.first(), self.is_local()) {
            (Some(member), _) => format!(
                "no agent answers; {}: {} (start it: systemctl start {})",
                member.label(),
                member.row.reasons.join("; "),
                member.row.agent.binary()
            ),
            (None, true) => "no agent has a socket here: is one running (systemctl start \
                             stackhand.target), and does --run-dir name its folder?"
                .to_owned(),
            (None, false) => format!(
                "no agent of cloud {:?} has reported to this broker: check `bus.url` and `cloud` \
                 in the agents' settings",
                self.cloud
            ),
        }
    }

    /// One agent by `host/type` or by its id, whole or its beginning.
    ///
    /// # Errors
    ///
    /// As [`Self::members`]; no agent or more than one is meant.
    pub(crate) async fn one(&self, name: &str) -> Result<Member> {
        let members = self.members().await?;
        let by_place = name.rsplit_once('/').and_then(|(host, agent)| {
            agent.parse::<AgentKind>().ok().map(|agent| (host.to_owned(), agent))
        });
        let found: Vec<&Member> = members
            .iter()
            .filter(|member| match &by_place {
                Some((host, agent)) => member.row.host == *host && member.row.agent == *agent,
                None => {
                    (name.len() >= 4 && member.row.id.to_string().starts_with(name))
                        || (self.is_local() && member.row.agent.as_str() == name)
                }
            })
            .collect();
        match found[..] {
            [member] => Ok(member.clone()),
            [] => bail!(Usage::new(format!(
                "no agent {name:?} is known; name it by host/type, such as node1/network, or by \
                 the id that `agentctl list` shows"
            ))),
            _ => bail!(Usage::new(format!(
                "{name:?} fits {} agents; write more of the id",
                found.len()
            ))),
        }
    }
}

/// Asks many agents the same, some at once; answers come in the agents' order.
pub(crate) async fn ask_all<T, F: Future<Output = T>>(
    members: &[Member],
    ask: impl Fn(Member) -> F,
) -> Vec<(Member, T)> {
    stream::iter(members.iter().cloned())
        .map(|member| {
            let answer = ask(member.clone());
            async move { (member, answer.await) }
        })
        .buffered(AT_ONCE)
        .collect()
        .await
}

/// Reads who is there from the streams of a broker.
///
/// Registrations tell who exists and how often each reports; then only as many reports are read
/// as tell who is alive. Older reports are read where agents are missing and their number is
/// small enough, for the last words.
async fn read_roster(transport: &dyn Transport, cloud: &str) -> Result<Vec<AgentRow>> {
    let mut records = Records::default();
    each(transport, &report::registry(), ReadFrom::First, |it| records.registered(it)).await?;
    let heartbeats = report::heartbeats();
    let longest = heartbeats.max_age.as_secs();
    // Without a registration nothing is known about intervals; ten seconds is the default.
    let interval = records.longest_interval().unwrap_or(10).max(1);
    let recent = (interval.saturating_mul(INTERVALS) + 5).min(longest);
    let from = ReadFrom::Age(Duration::from_secs(recent));
    each(transport, &heartbeats, from, |it| records.reported(it)).await?;
    if records.silent() > 0 {
        let agents = u64::try_from(records.len()).unwrap_or(u64::MAX).max(1);
        let affordable = MOST_OLD_REPORTS.saturating_mul(interval) / agents;
        // Worth another look only where it reaches much further back.
        if affordable > 2 * recent {
            let from = ReadFrom::Age(Duration::from_secs(affordable.min(longest)));
            each(transport, &heartbeats, from, |it| records.reported(it)).await?;
        }
    }
    Ok(records.rows(cloud, Timestamp::now()))
}

/// Gives every record of a stream that reads as a `T` to `take`. Others are from newer or
/// foreign programs and passed over.
async fn each<T: DeserializeOwned>(
    transport: &dyn Transport,
    stream: &Stream,
    from: ReadFrom,
    mut take: impl FnMut(T),
) -> Result<()> {
    let reading = || format!("cannot read stream {}", stream.name);
    let mut records = transport.read(stream, from, false).await.with_context(reading)?;
    while let Some(record) = records.next().await {
        if let Ok(read) = serde_json::from_value(record.with_context(reading)?.body) {
            take(read);
        }
    }
    Ok(())
}

/// What agents of this host call it, unless their settings say otherwise.
pub(crate) fn this_host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "localhost".to_owned(), |name| name.trim().to_owned())
}

/// Sorts rows as they are listed.
pub(crate) fn rows_of(members: &[Member]) -> Vec<AgentRow> {
    let mut rows: Vec<AgentRow> = members.iter().map(|member| member.row.clone()).collect();
    roster::sort(&mut rows);
    rows
}
