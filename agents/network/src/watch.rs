//! Hearing of changes that somebody else made, within milliseconds.
//!
//! Events of links, addresses, neighbours, routes and rules that could concern us wake the runtime, which makes a
//! pass; the pass looks at everything, so an event needs no more meaning than that. Our own changes
//! cause events, too: a pass clears the flag before it looks ([`Watcher::about_to_look`]), and what
//! was heard by then costs no further pass.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stackhand_kernel::netfilter::NftMonitor;
use stackhand_kernel::netlink::{Event, Monitor};
use stackhand_kernel::{KernelError, Netns, NetnsId};
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use crate::firewall::{NAMES, XTABLES_NAMES};
use crate::freshness::Freshness;
use crate::names;

/// How long events are collected before they wake the runtime.
const GATHER: Duration = Duration::from_millis(10);

/// Time between attempts to listen again after the socket failed.
const REOPEN: Duration = Duration::from_secs(1);

/// Asks for a pass.
pub(crate) type Wake = Arc<dyn Fn() + Send + Sync>;

/// Listens to the host and to the namespaces of its networks.
pub(crate) struct Watcher {
    signal: Arc<Signal>,
    freshness: Arc<Freshness>,
    host: JoinHandle<()>,
    nft: JoinHandle<()>,
    spaces: Mutex<BTreeMap<String, (NetnsId, JoinHandle<()>)>>,
}

struct Signal {
    dirty: AtomicBool,
    /// Changes of nftables are our own just now.
    ignores_nft: AtomicBool,
    /// Our rules are in tables of `iptables`.
    heeds_xtables: AtomicBool,
    /// Numbers of the host's links whose neighbours are ours to set.
    answering: Mutex<BTreeSet<u32>>,
    wake: Wake,
}

impl Signal {
    /// Wakes the runtime, once for all that is heard within a short time.
    fn heard(self: &Arc<Self>) {
        if self.dirty.swap(true, Ordering::AcqRel) {
            return;
        }
        let signal = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(GATHER).await;
            if signal.dirty.swap(false, Ordering::AcqRel) {
                (signal.wake)();
            }
        });
    }
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watcher")
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.host.abort();
        self.nft.abort();
        let spaces = std::mem::take(self.spaces.get_mut().unwrap_or_else(PoisonError::into_inner));
        spaces.into_values().for_each(|(_, task)| task.abort());
    }
}

impl Watcher {
    /// Listens to the namespace of the calling thread. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub(crate) fn start(wake: Wake, freshness: Arc<Freshness>) -> Result<Self, KernelError> {
        let signal = Arc::new(Signal {
            dirty: AtomicBool::new(false),
            ignores_nft: AtomicBool::new(false),
            heeds_xtables: AtomicBool::new(false),
            answering: Mutex::default(),
            wake,
        });
        let monitor = Monitor::open()?;
        let host = tokio::spawn(listen(monitor, Arc::clone(&signal), None));
        let nft = tokio::spawn(listen_to_nft(NftMonitor::open()?, Arc::clone(&signal)));
        Ok(Self { signal, freshness, host, nft, spaces: Mutex::default() })
    }

    /// The caller changes nftables now: what is heard of it is no news.
    pub(crate) fn ignore_nft(&self) {
        self.signal.ignores_nft.store(true, Ordering::Release);
    }

    /// Changes of the tables of `iptables` concern the caller, or do not.
    pub(crate) fn heed_xtables(&self, heeds: bool) {
        self.signal.heeds_xtables.store(heeds, Ordering::Release);
    }

    /// The caller has done so. What others changed meanwhile is for the caller to find out.
    pub(crate) async fn heed_nft(&self) {
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
        self.signal.ignores_nft.store(false, Ordering::Release);
    }

    /// Forgets what was heard so far: the caller looks at the host now.
    pub(crate) async fn about_to_look(&self) {
        // Lets the listening tasks take what the kernel has told already.
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
        self.signal.dirty.store(false, Ordering::Release);
    }

    /// Minds neighbours that go from these links of the host and no others. The kernel tells of each
    /// that goes, and not who set it.
    pub(crate) fn mind_neighbours(&self, links: BTreeSet<u32>) {
        *self.signal.answering.lock().unwrap_or_else(PoisonError::into_inner) = links;
    }

    /// Listens to these namespaces and no others. `id` tells which one a name stands for; one of
    /// which that is not known is left as it is.
    pub(crate) async fn follow(
        &self,
        names: &BTreeSet<&str>,
        id: impl Fn(&str) -> Option<NetnsId>,
    ) {
        self.leave(|name| !names.contains(name));
        for name in names {
            let Some(id) = id(name) else { continue };
            let known = self.lock().get(*name).map(|(known, _)| *known);
            if known == Some(id) {
                continue;
            }
            let Ok(space) = Netns::named(name) else { continue };
            let open = || Ok::<_, KernelError>((Monitor::open()?, NftMonitor::open()?));
            let open = move || open().map_err(std::io::Error::other);
            match space.inside("listen", open).await {
                Ok((monitor, rules)) => {
                    self.freshness.listening(name);
                    let (freshness, space) = (Arc::clone(&self.freshness), (*name).to_owned());
                    let place = Place { freshness, space };
                    let links = listen(monitor, Arc::clone(&self.signal), Some(place.clone()));
                    let rules = listen_to_rules(rules, Arc::clone(&self.signal), place);
                    let task = tokio::spawn(async {
                        let ((), ()) = tokio::join!(links, rules);
                    });
                    if let Some((_, old)) = self.lock().insert((*name).to_owned(), (id, task)) {
                        old.abort();
                    }
                }
                // The timer's passes still look.
                Err(error) => warn!(space = name, %error, "cannot listen to changes"),
            }
        }
    }

    /// Stops listening to namespaces, so that they can go.
    pub(crate) fn leave(&self, goes: impl Fn(&str) -> bool) {
        self.lock().retain(|name, (_, task)| {
            let stays = !goes(name);
            if !stays {
                task.abort();
                self.freshness.deaf(name);
            }
            stays
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, (NetnsId, JoinHandle<()>)>> {
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A namespace that is listened to.
#[derive(Clone)]
struct Place {
    freshness: Arc<Freshness>,
    space: String,
}

/// Listens to the host, or to one of its namespaces.
async fn listen(mut monitor: Monitor, signal: Arc<Signal>, inside: Option<Place>) {
    loop {
        while let Some(event) = monitor.next().await {
            if let Some(place) = &inside {
                place.freshness.changed(&place.space);
            }
            if !matters(&event, inside.is_some(), &signal) {
                continue;
            }
            debug!(?event, "the host changed");
            signal.heard();
        }
        if let Some(place) = inside {
            return place.freshness.deaf(&place.space);
        }
        warn!("lost the socket that tells of changes; opening another");
        monitor = loop {
            tokio::time::sleep(REOPEN).await;
            if let Ok(monitor) = Monitor::open() {
                break monitor;
            }
        };
        (signal.wake)();
    }
}

async fn listen_to_rules(mut monitor: NftMonitor, signal: Arc<Signal>, place: Place) {
    while monitor.next().await.is_some() {
        place.freshness.changed(&place.space);
        signal.heard();
    }
    place.freshness.deaf(&place.space);
}

/// Listens to changes of the tables that bear our name, and of those in which `iptables` keeps rules.
async fn listen_to_nft(mut monitor: NftMonitor, signal: Arc<Signal>) {
    let names: Vec<&str> = NAMES.into_iter().chain(XTABLES_NAMES).collect();
    loop {
        while let Some(table) = monitor.next_of(&names).await {
            let of_ours = NAMES.contains(&table) || signal.heeds_xtables.load(Ordering::Acquire);
            if of_ours && !signal.ignores_nft.load(Ordering::Acquire) {
                debug!("somebody changed the firewall");
                signal.heard();
            }
        }
        warn!("lost the socket that tells of changes to nftables; opening another");
        monitor = loop {
            tokio::time::sleep(REOPEN).await;
            if let Ok(monitor) = NftMonitor::open() {
                break monitor;
            }
        };
        (signal.wake)();
    }
}

/// Whether an event could concern what we made or wait for. Uplinks have any name, so a link that
/// belongs to a bridge counts, and one that appears or goes. Routes are ours in namespaces alone.
fn matters(event: &Event, inside: bool, signal: &Signal) -> bool {
    match event {
        Event::Link(link) => {
            names::may_matter(&link.name)
                || link.alias.as_deref().is_some_and(|alias| alias.starts_with("stackhand:"))
                || link.port.is_some()
                || link.master.is_none()
        }
        Event::LinkGone(_)
        | Event::Address(_)
        | Event::AddressGone(_)
        | Event::Neighbour(_)
        | Event::Traffic(_)
        | Event::Lost => true,
        Event::NeighbourGone(link) => {
            let answering = signal.answering.lock().unwrap_or_else(PoisonError::into_inner);
            !inside && answering.contains(link)
        }
        Event::Route => inside,
    }
}
