//! The network agent as the runtime sees it: admit, plan, pass, facts.
//!
//! A pass: look; compute what is wanted; plan; do the steps of objects that are due; look again if
//! anything was done, because only what is seen counts; hand new tables to the DHCP servers; announce
//! addresses of routers; tell how each object came out.

mod explain;
mod filters;
mod guarding;
mod outcome;
mod passwords;
mod sight;
mod tasks;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde_json::{Value, json};
use smol_str::SmolStr;
use stackhand_kernel::{Chain, KernelError};
use stackhand_model::{AgentKind, ErrorCode, MacAddr, ObjectRef, PortId};
use stackhand_runtime::agent::{
    Action, Agent, Cause, Desired, Observed, Outcome, PassReport, PlannedStep, Refusal, Work,
};
use stackhand_runtime::events::{EventLog, NewEvent};
use stackhand_runtime::ledger::Journal;
use stackhand_runtime::metrics::Reading;
use stackhand_runtime::run::{AgentContext, StartError};
use tracing::{debug, info, warn};

use crate::desired::{HostWish, Local, host_wish};
use crate::firewall::netlink::KernelFirewall;
use crate::l2::netlink::NetlinkHost;
use crate::l2::{At, HostNet, Plan, Seen, plan};
use crate::l3::announce::{Announced, Announcer};
use crate::l3::netlink::KernelRouters;
use crate::l3::{self, RouterNet};
use crate::services::Services;
use crate::services::metadata::Passwords;
use crate::settings::NetworkSettings;
use crate::watch::Watcher;
use crate::{admit, probe};

use guarding::Guarding;
use sight::{LastSeen, Saw};
use tasks::{Deed, Task};

/// Changes that one pass tells one by one.
const MOST_TOLD: usize = 50;

/// How often a pass plans anew when its own changes made more to do.
const ROUNDS: usize = 3;

/// Asks for a pass, and for another try at objects that stand in somebody's way.
pub type Wake = Arc<dyn Fn(&BTreeSet<ObjectRef>) + Send + Sync>;

/// The network agent.
pub struct NetworkAgent {
    local: Local,
    grace: Duration,
    host: Arc<NetlinkHost>,
    guarding: Guarding,
    routers: KernelRouters,
    /// Whether nothing of another agent's filter is left.
    cleared: AtomicBool,
    announcer: Announcer,
    /// Whether all addresses of routers were announced since the agent started.
    announced: AtomicBool,
    watcher: Watcher,
    wake: Wake,
    events: EventLog,
    services: tokio::sync::Mutex<Services>,
    /// Held while looking and while changing: what a look remembers must not be older than a
    /// change.
    turn: tokio::sync::Mutex<()>,
    /// When each orphan was seen first.
    orphans: Mutex<BTreeMap<At, Instant>>,
    /// Objects that an event may help, as of the last pass.
    stuck: Arc<Mutex<BTreeSet<ObjectRef>>>,
    /// What the last pass saw, for those who ask how objects are.
    sight: Arc<LastSeen>,
    /// What the last pass found wrong with the host as a whole.
    troubles: Mutex<Vec<String>>,
    abilities: tokio::sync::OnceCell<Value>,
    /// What was wanted in the last pass, for questions.
    desired: Mutex<Option<Arc<Desired>>>,
    /// What controllers make this host's Host document from.
    host_spec: Value,
}

impl std::fmt::Debug for NetworkAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NetworkAgent").field("local", &self.local).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why an agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartProblem {
    /// A user or group of the settings does not exist.
    #[error("network.{key}: this host has no {what} {name:?}")]
    NoSuchName {
        /// The setting.
        key: &'static str,
        /// User or group.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The kernel does not let us listen.
    #[error("cannot listen to changes of the network")]
    Listen(#[source] KernelError),
}

impl NetworkAgent {
    /// Starts the agent with what the runtime gives it.
    ///
    /// # Errors
    ///
    /// Fails if a user or group of the settings does not exist, or if netlink is out of reach.
    pub async fn start(context: AgentContext<NetworkSettings>) -> Result<Self, StartError> {
        let local = local(&context.host, &context.settings.agent)?;
        let grace = Duration::from_secs(context.settings.agent.orphan_grace_seconds);
        let wake = context.wake;
        let ask = move |stuck: &BTreeSet<ObjectRef>| wake.objects_changed(stuck.iter().copied());
        let mut agent = Self::new(local, grace, Arc::new(ask), context.events)?;
        agent.host_spec = context.settings.agent.host_spec();
        agent.keep_passwords(context.journal);
        context.metrics.register_readings(agent.readings());
        Ok(agent)
    }

    /// An agent for the network that the calling thread sees. Must be called inside a tokio
    /// runtime. Orphans are swept once they were seen for `grace`.
    ///
    /// # Errors
    ///
    /// Fails if netlink is out of reach.
    pub fn new(
        local: Local,
        grace: Duration,
        wake: Wake,
        events: EventLog,
    ) -> Result<Self, StartProblem> {
        let stuck: Arc<Mutex<BTreeSet<ObjectRef>>> = Arc::default();
        let (ask, helped) = (Arc::clone(&wake), Arc::clone(&stuck));
        let heard = move || {
            let stuck = lock(&helped).clone();
            ask(&stuck);
        };
        let host = Arc::new(NetlinkHost::new());
        let watcher = Watcher::start(Arc::new(heard), host.freshness());
        let watcher = watcher.map_err(StartProblem::Listen)?;
        let firewall = KernelFirewall::open(host.write_count(), local.firewall);
        Ok(Self {
            local,
            grace,
            guarding: Guarding::new(firewall.map_err(StartProblem::Listen)?),
            routers: KernelRouters::new(Arc::clone(&host)),
            host,
            cleared: AtomicBool::new(false),
            announcer: Announcer::default(),
            announced: AtomicBool::new(false),
            watcher,
            wake,
            events,
            services: tokio::sync::Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            orphans: Mutex::default(),
            stuck,
            sight: Arc::default(),
            troubles: Mutex::default(),
            abilities: tokio::sync::OnceCell::new(),
            desired: Mutex::default(),
            host_spec: json!({}),
        })
    }

    /// Takes passwords of guests from now on, and keeps them in the agent's notes.
    pub fn keep_passwords(&mut self, journal: Journal) {
        let passwords = Passwords::new(journal, Arc::clone(&self.wake));
        self.services.get_mut().keep_passwords(passwords);
    }

    /// Numbers for `/metrics`.
    fn readings(&mut self) -> Vec<Reading> {
        let writes = self.host.write_count();
        let mut readings = self.services.get_mut().readings();
        readings.push(Reading::counter(
            "network_kernel_writes",
            "Changes made to the kernel; none while nothing is asked for",
            move || writes.get(),
        ));
        readings
    }

    /// Orphans whose time is up. Remembers those that are new and asks for a pass when theirs is.
    fn sweepable(&self, orphans: &BTreeSet<At>) -> BTreeSet<At> {
        let now = Instant::now();
        let mut known = lock(&self.orphans);
        known.retain(|at, _| orphans.contains(at));
        for at in orphans {
            if !known.contains_key(at) {
                known.insert(at.clone(), now);
                info!(link = %at, grace = ?self.grace, "found what nobody wants any more");
                let (wake, grace) = (Arc::clone(&self.wake), self.grace);
                tokio::spawn(async move {
                    tokio::time::sleep(grace).await;
                    wake(&BTreeSet::new());
                });
            }
        }
        let due = |since: &Instant| now.duration_since(*since) >= self.grace;
        known.iter().filter(|(_, since)| due(since)).map(|(at, _)| at.clone()).collect()
    }

    async fn perform(
        &self,
        tasks: &[Task],
        due: &BTreeSet<ObjectRef>,
        cause: Cause,
        news: &mut BTreeMap<At, BTreeSet<IpAddr>>,
    ) -> (usize, BTreeMap<ObjectRef, String>) {
        let mut failed: BTreeMap<ObjectRef, String> = BTreeMap::new();
        let mut done = Vec::new();
        let is_due = |task: &&Task| task.object.is_none_or(|object| due.contains(&object));
        let tasks: Vec<&Task> = tasks.iter().filter(is_due).collect();
        for run in tasks.chunk_by(|task, next| task.deed.goes_with(&next.deed)) {
            for (Task { object, deed }, result) in run.iter().zip(self.make(run).await) {
                match result {
                    Ok(()) => {
                        debug!(object = object.map(tracing::field::display), %deed, "done");
                        done.push((*object, deed));
                    }
                    Err(error) => {
                        let remedy = match deed {
                            Deed::Link(change) => change.remedy(&error).unwrap_or_default(),
                            Deed::Router(_) => String::new(),
                        };
                        let reason = format!("cannot {deed}: {}{remedy}", Chain(&error));
                        warn!(object = object.map(tracing::field::display), "{reason}");
                        if let Some(object) = object {
                            failed.entry(*object).or_insert(reason);
                        }
                    }
                }
            }
        }
        let told: Vec<_> = done.iter().map(|(object, deed)| (*object, deed.to_string())).collect();
        self.tell(&told, cause, true);
        news.extend(tasks::news(done.iter().map(|(_, deed)| *deed)));
        (tasks.len(), failed)
    }

    /// Does what goes together, or the one thing that does not.
    async fn make(&self, run: &[&Task]) -> Vec<Result<(), KernelError>> {
        match run {
            [Task { deed: Deed::Router(change), .. }] => vec![self.routers.apply(change).await],
            _ => {
                let links = run.iter().filter_map(|task| match &task.deed {
                    Deed::Link(change) => Some(change),
                    Deed::Router(_) => None,
                });
                self.host.apply_all(&links.collect::<Vec<_>>()).await
            }
        }
    }

    /// Tells what was done that no document asked for just now: repairs and sweeping. What served
    /// no object was swept if `sweeping`.
    fn tell(&self, done: &[(Option<ObjectRef>, String)], cause: Cause, sweeping: bool) {
        let repairs = matches!(cause, Cause::Host | Cause::Timer);
        let sweeps = |object: &Option<ObjectRef>| object.is_none() && sweeping;
        let told: Vec<_> = done.iter().filter(|(object, _)| repairs || sweeps(object)).collect();
        for (object, change) in told.iter().take(MOST_TOLD) {
            let kind = if sweeps(object) { "OrphanSwept" } else { "DriftRepaired" };
            info!(object = object.map(tracing::field::display), %change, kind);
            self.events.add(NewEvent {
                object: object.map(|object| object.to_string()),
                kind: kind.to_owned(),
                message: change.clone(),
                request_id: None,
            });
        }
        if told.len() > MOST_TOLD {
            self.events.add(NewEvent {
                kind: "DriftRepaired".to_owned(),
                message: format!("and {} changes more", told.len() - MOST_TOLD),
                ..NewEvent::default()
            });
        }
    }

    /// Makes the firewall as wanted. Returns why it is not, if it is not.
    async fn guard(&self, wish: &HostWish, cause: Cause) -> Option<String> {
        self.watcher.ignore_nft();
        let enforced = self.guarding.enforce(&wish.firewall).await;
        self.watcher.heed_xtables(self.guarding.uses_iptables().await);
        self.watcher.heed_nft().await;
        match enforced {
            Ok(done) => {
                // What somebody changed in the moment before is looked at anew.
                if !self.guarding.is_current().await {
                    (self.wake)(&BTreeSet::new());
                }
                if done.cut > 0 {
                    info!(flows = done.cut, "cut flows that nothing allows any more");
                }
                self.tell(&done.changes, cause, false);
                None
            }
            Err(reason) => {
                warn!("the firewall is not as it should be: {reason}");
                Some(reason)
            }
        }
    }

    /// Lets go of namespaces that are to be deleted: a socket in one would keep it.
    async fn let_go(&self, wish: &HostWish) {
        let goes = |space: &str| !wish.l2.spaces.contains_key(space);
        self.watcher.leave(goes);
        self.routers.leave(goes);
        self.announcer.leave(goes);
        self.services.lock().await.retain(&wish.services);
    }

    /// Hands the servers their tables and starts those that do not run.
    async fn serve(
        &self,
        wish: &HostWish,
        seen: &Seen,
        troubled: &mut BTreeMap<ObjectRef, String>,
    ) {
        let find = |at: &At| {
            // A loopback link has no address to speak of.
            let mac = seen.links.get(at)?.mac.unwrap_or(MacAddr([0; 6]));
            let space = self.host.known_space(at.space.as_deref()?)?;
            Some((space, self.host.known_index(at)?, mac))
        };
        let mut services = self.services.lock().await;
        for (object, reason) in services.serve(&wish.services, find).await {
            troubled.entry(object).or_insert(reason);
        }
        let names = wish.l2.spaces.keys().map(SmolStr::as_str).collect();
        self.watcher.follow(&names, |name| self.host.known_space(name)).await;
        let bridges = wish.l2.neighbours.keys();
        let bridges = bridges.filter_map(|name| self.host.known_index(&At::host(name.clone())));
        self.watcher.mind_neighbours(bridges.collect());
    }

    /// Tells neighbours of new addresses; in the first pass of all, because nobody knows what was
    /// told before the agent started.
    fn announce(&self, wish: &HostWish, seen: &Seen, mut news: BTreeMap<At, BTreeSet<IpAddr>>) {
        let first = !self.announced.swap(true, Ordering::Relaxed);
        let spaces: BTreeSet<_> = news.keys().filter_map(|at| at.space.clone()).collect();
        let routers = wish.routers.values();
        let routers = routers.filter(|router| first || spaces.contains(&router.space));
        let links = routers.flat_map(|router| {
            router.links.iter().map(|link| At::inside(router.space.clone(), link.link.clone()))
        });
        for at in links {
            let new = news.remove(&at).unwrap_or_default();
            let Some(link) = seen.links.get(&at) else { continue };
            let has: BTreeSet<IpAddr> = link.addresses.iter().map(IpNet::addr).collect();
            let addresses: BTreeSet<IpAddr> =
                if first { has } else { new.intersection(&has).copied().collect() };
            let found = link.mac.zip(self.host.known_index(&at)).zip(at.space);
            if let Some(((mac, index), space)) = found.filter(|_| !addresses.is_empty()) {
                self.announcer.announce(Announced { space, index, mac, addresses });
            }
        }
    }

    /// Looks, and computes what is wanted and to be done. What was wanted in a look before, by the
    /// same documents, still is if the host itself is as it was.
    async fn look_and_plan(
        &self,
        desired: &Desired,
        before: Option<&Look>,
    ) -> Result<Look, KernelError> {
        let seen = self.host.observe().await?;
        let zones = self.zones_left().await;
        let same =
            |look: &&Look| look.wish.firewall.zones == zones && look.seen.host().eq(seen.host());
        let wish = match before.filter(same) {
            Some(look) => Arc::clone(&look.wish),
            None => Arc::new(self.wish(desired, &seen, zones).await),
        };
        let mut made = plan(&wish.l2, &seen, &BTreeSet::new());
        let sweep = self.sweepable(&made.orphans);
        if !sweep.is_empty() {
            made = plan(&wish.l2, &seen, &sweep);
        }
        let reachable = tasks::reachable(&wish, &seen);
        let spaces = reachable.keys().map(|space| (*space).clone()).collect();
        let routers = self.routers.observe(&spaces).await?;
        let tasks = tasks::in_order(&made, l3::plan(reachable, &routers));
        Ok(Look { wish, seen, routers, plan: made, tasks })
    }

    async fn wish(&self, desired: &Desired, seen: &Seen, zones: BTreeMap<String, u16>) -> HostWish {
        let mut wish = host_wish(desired, &self.local, seen);
        wish.firewall.zones = zones;
        if !wish.firewall.guards.is_empty()
            && let Ok(means) = self.guarding.means().await
        {
            guarding::show_to_ip(&mut wish.l2, seen, &mut wish.firewall, means);
        }
        wish
    }
}

/// What a look at the host found, and what follows from it.
struct Look {
    wish: Arc<HostWish>,
    seen: Arc<Seen>,
    routers: l3::Seen,
    plan: Plan,
    /// All that is to be done, in order.
    tasks: Vec<Task>,
}

impl Agent for NetworkAgent {
    const KIND: AgentKind = AgentKind::Network;

    fn admit(&self, wanted: &Desired, changed: &BTreeSet<ObjectRef>) -> Result<(), Refusal> {
        admit::admit(wanted, changed)
    }

    async fn plan(&self, wanted: Arc<Desired>) -> Result<Vec<PlannedStep>, Refusal> {
        let _turn = self.turn.lock().await;
        let cannot_look = |reason: String| {
            Refusal::new(ErrorCode::Internal, format!("cannot look at the host: {reason}"))
        };
        let look = self
            .look_and_plan(&wanted, None)
            .await
            .map_err(|error| cannot_look(Chain(&error).to_string()))?;
        let rules = self.guarding.plan(&look.wish.firewall).await.map_err(cannot_look)?;
        let rules = rules.into_iter().map(|(object, change)| PlannedStep { object, change });
        let planned =
            |task: Task| PlannedStep { object: task.object, change: task.deed.to_string() };
        let mut steps: Vec<PlannedStep> = rules.collect();
        steps.extend(look.tasks.into_iter().map(planned));
        Ok(steps)
    }

    async fn pass(&self, work: Work) -> PassReport {
        let _turn = self.turn.lock().await;
        *lock(&self.desired) = Some(Arc::clone(&work.desired));
        let before = self.host.writes();
        if work.cause == Cause::Timer {
            self.host.look_anew();
        }
        self.watcher.about_to_look().await;
        let mut look = match self.look_and_plan(&work.desired, None).await {
            Ok(looked) => looked,
            Err(error) => {
                let reason = format!("cannot look at the host's network: {}", Chain(&error));
                *lock(&self.troubles) = vec![reason.clone()];
                let failed = |object: &ObjectRef| (*object, Outcome::failed(reason.clone()));
                return PassReport { outcomes: work.due.iter().map(failed).collect(), writes: 0 };
            }
        };
        let mut news = BTreeMap::new();
        let mut failed = BTreeMap::new();
        let mut unfiltered;
        // One round does, unless a change brings something with it: a link whose MTU grows gets
        // IPv6 back.
        for _ in 0..ROUNDS {
            self.let_go(&look.wish).await;
            // A tap is filtered before it can carry a frame, or it does not come up.
            unfiltered = self.guard(&look.wish, work.cause).await;
            let mut due = work.due.clone();
            if unfiltered.is_some() {
                let is_open = |object: &ObjectRef| {
                    let guard = look.wish.firewall.guards.get(&PortId(object.id));
                    guard.is_some_and(|guard| guard.open)
                };
                due.retain(|object| !is_open(object));
            }
            let tried;
            (tried, failed) = self.perform(&look.tasks, &due, work.cause, &mut news).await;
            if tried == 0 {
                break;
            }
            self.watcher.about_to_look().await;
            let again = match self.look_and_plan(&work.desired, Some(&look)).await {
                Ok(looked) => looked,
                Err(error) => {
                    warn!(error = %Chain(&error), "cannot look at the host after changing it");
                    break;
                }
            };
            let same = again.tasks == look.tasks;
            look = again;
            if same || look.tasks.is_empty() {
                break;
            }
        }
        let Look { wish, seen, plan: left, tasks, .. } = look;
        // And what filtered taps that are gone now goes after them.
        unfiltered = self.guard(&wish, work.cause).await;
        let unfiltered = unfiltered.as_deref();
        if let Some(reason) = self.guarding.why_unlimited().await {
            for rules in wish.firewall.packets.values() {
                let reason = format!("cannot limit packets or mark them: {reason}");
                failed.entry(rules.object).or_insert(reason);
            }
        }
        self.serve(&wish, &seen, &mut failed).await;
        self.announce(&wish, &seen, news);
        let undone = outcome::undone(&tasks);
        let saw = Saw {
            passwords: self.passwords_of(&work.desired).await,
            desired: Arc::clone(&work.desired),
            unfiltered: unfiltered.is_some(),
            strangers: OnceLock::new(),
            wish,
            seen,
        };
        let observed = Observed::Sight(Arc::<LastSeen>::clone(&self.sight));
        let outcomes =
            outcome::outcomes(&work, &saw, &left, &failed, undone, unfiltered, &observed);
        self.sight.set(saw);
        let is_stuck =
            |outcome: &Outcome| matches!(outcome, Outcome::Failed { .. } | Outcome::Pending { .. });
        let stuck = outcomes.iter().filter(|(_, outcome)| is_stuck(outcome));
        let stuck: BTreeSet<ObjectRef> = stuck.map(|(object, _)| *object).collect();
        {
            let mut known = lock(&self.stuck);
            known.retain(|object| !work.due.contains(object));
            known.extend(stuck);
        }
        let mut troubles = outcome::troubles(&left, unfiltered);
        troubles.extend(self.guarding.trouble(self.local.firewall).await);
        // A guest must not be open between that agent's filter and ours.
        if unfiltered.is_none() {
            troubles.extend(self.remove_leftovers().await);
        }
        *lock(&self.troubles) = troubles;
        PassReport { outcomes, writes: self.host.writes() - before }
    }

    async fn act(&self, action: Action) -> Result<Value, Refusal> {
        match action.name.as_str() {
            explain::EXPLAIN => return self.explain(&action).await,
            passwords::FORGET_PASSWORD => return self.forget_password(&action).await,
            _ => {}
        }
        let message = format!(
            "{} has no action {:?}; the network agent explains ports and routers, forgets passwords \
             of ports' guests, and repairs by itself",
            action.object, action.name
        );
        Err(Refusal::new(ErrorCode::Unsupported, message).about(action.object))
    }

    async fn facts(&self) -> Value {
        let abilities = self.abilities.get_or_init(probe::abilities).await.clone();
        let turn = self.turn.lock().await;
        let seen = self.host.observe().await;
        drop(turn);
        let links = match seen {
            Ok(seen) => outcome::link_facts(&seen),
            Err(error) => json!({"error": Chain(&error).to_string()}),
        };
        let mut facts = self.services.lock().await.facts();
        let own = json!({
            "kernel": probe::kernel(),
            "network_types": probe::network_types(&abilities),
            "abilities": abilities,
            "firewall": self.guarding.facts().await,
            "links": links,
            "vxlan_port": self.local.vxlan_port,
            "host": self.host_spec,
            "writes": self.host.writes(),
        });
        if let (Value::Object(facts), Value::Object(own)) = (&mut facts, own) {
            facts.extend(own);
        }
        facts
    }

    fn troubles(&self) -> Vec<String> {
        lock(&self.troubles).clone()
    }
}

/// The user that libvirt runs guests as where nobody changed that.
const GUESTS: &str = "libvirt-qemu";

pub(crate) fn local(host: &str, settings: &NetworkSettings) -> Result<Local, StartProblem> {
    let user = |name: &str| {
        nix::unistd::User::from_name(name).ok().flatten().map(|user| user.uid.as_raw())
    };
    let tap_user = match &settings.tap_user {
        Some(name) => user(name).ok_or_else(|| StartProblem::NoSuchName {
            key: "tap_user",
            what: "user",
            name: name.clone(),
        })?,
        // Root, not nobody in particular: a tap without an owner is everybody's.
        None => user(GUESTS).unwrap_or(0),
    };
    let group = |name: &String| {
        let found = nix::unistd::Group::from_name(name).ok().flatten();
        found.map(|group| group.gid.as_raw()).ok_or_else(|| StartProblem::NoSuchName {
            key: "tap_group",
            what: "group",
            name: name.clone(),
        })
    };
    Ok(Local {
        host: host.to_owned(),
        tap_user: Some(tap_user),
        tap_group: settings.tap_group.as_ref().map(group).transpose()?,
        vxlan_port: settings.vxlan_port,
        lease_seconds: settings.dhcp_lease_seconds,
        dns_domain: settings.dns_domain.clone(),
        dns_forwarders: match &settings.dns_forwarders {
            Some(given) => given.clone(),
            None => resolv_conf(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default()),
        },
        takeover: settings.takeover,
        firewall: settings.firewall,
    })
}

/// The servers that a resolver's configuration names.
fn resolv_conf(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next()?.parse().ok()).flatten()
    };
    text.lines().filter_map(server).collect()
}
