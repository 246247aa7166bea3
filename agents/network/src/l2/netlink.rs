//! The real [`HostNet`]: route netlink, taps, sysctls and namespaces.
//!
//! Only translation lives here: what is seen in `look`, what is done in `act`. What was seen of
//! links' numbers and of namespaces is kept, for as long as nobody changes them.

mod act;
mod look;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::stream::{self, StreamExt};
use smol_str::SmolStr;
use stackhand_kernel::netlink::{Address, Journal, Link, Links, WriteCount, is_closed};
use stackhand_kernel::{KernelError, Netns, NetnsId};

use super::{At, Change, HostNet, Make, Seen};
use crate::freshness::{Dated, Freshness};
use crate::names;

use look::Here;

/// Links that are made or set at once.
const AT_ONCE: usize = 16;

/// The Ethernet address under which a VXLAN link files its flood list.
const FLOOD: stackhand_model::MacAddr = stackhand_model::MacAddr([0; 6]);

/// This host's network, as the agent's own namespace and those of its networks.
#[derive(Debug, Default)]
pub struct NetlinkHost {
    writes: WriteCount,
    host: Mutex<Option<Links>>,
    journal: Mutex<Option<Journal>>,
    /// What was seen of the host itself.
    here: Mutex<Option<Here>>,
    /// Links that we changed by other means than netlink, of which the kernel may tell nobody.
    touched: Mutex<BTreeSet<u32>>,
    spaces: Mutex<BTreeMap<String, (NetnsId, Links)>>,
    freshness: Arc<Freshness>,
    /// What was seen of namespaces.
    kept: Mutex<BTreeMap<String, Dated<Arc<Inside>>>>,
    /// What was seen of all together, and of which namespaces.
    whole: Mutex<Option<(Insides, Arc<Seen>)>>,
    /// Numbers of links, as last seen or made.
    indices: Mutex<BTreeMap<At, u32>>,
    /// Groups that some link is in, as last seen.
    groups: Mutex<BTreeSet<u32>>,
    doomed: AtomicU32,
}

/// What namespaces had, by name.
type Insides = BTreeMap<SmolStr, Arc<Inside>>;

/// What a namespace had when it was looked at.
#[derive(Debug)]
struct Inside {
    id: NetnsId,
    links: Vec<Link>,
    addresses: Vec<Address>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what a namespace has.
fn remove_inside<T>(all: &mut BTreeMap<At, T>, space: &str) {
    let inside = all.range(At::inside(space, "")..).map(|(at, _)| at);
    let inside = inside.take_while(|at| at.space.as_deref() == Some(space));
    for at in inside.cloned().collect::<Vec<_>>() {
        all.remove(&at);
    }
}

impl NetlinkHost {
    /// The network that the calling thread sees. Sockets are opened when they are needed first,
    /// by the thread that needs them.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Nothing of what was seen holds any more.
    pub fn look_anew(&self) {
        *lock(&self.here) = None;
        self.freshness.all_changed();
    }

    /// Which namespaces have changed; who listens to them tells it here.
    #[must_use]
    pub fn freshness(&self) -> Arc<Freshness> {
        Arc::clone(&self.freshness)
    }

    /// Changes made to the kernel so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes.get()
    }

    /// The counter behind [`NetlinkHost::writes`].
    #[must_use]
    pub fn write_count(&self) -> WriteCount {
        self.writes.clone()
    }

    /// The number of a link, as last seen.
    #[must_use]
    pub fn known_index(&self, at: &At) -> Option<u32> {
        lock(&self.indices).get(at).copied()
    }

    /// Which namespace a name stood for in the last look; `None` if for none.
    #[must_use]
    pub fn known_space(&self, name: &str) -> Option<NetnsId> {
        let whole = lock(&self.whole);
        whole.as_ref().and_then(|(insides, _)| insides.get(name)).map(|inside| inside.id)
    }

    /// Route netlink of a namespace.
    ///
    /// # Errors
    ///
    /// Fails if there is no such namespace.
    pub async fn links_in(&self, space: &str) -> Result<Links, KernelError> {
        self.space_links(space).await
    }

    /// The number of a link: as last seen, or asked for.
    ///
    /// # Errors
    ///
    /// Fails if there is no such link.
    pub async fn index_of(&self, at: &At) -> Result<u32, KernelError> {
        let links = self.links(at.space.as_deref()).await?;
        self.index(&links, at).await
    }

    /// Names of a namespace's links by number, as last seen.
    #[must_use]
    pub fn names_in(&self, space: &str) -> BTreeMap<u32, SmolStr> {
        let indices = lock(&self.indices);
        let first = At::inside(space, "");
        let inside =
            indices.range(first..).take_while(|(at, _)| at.space.as_deref() == Some(space));
        inside.map(|(at, index)| (*index, at.link.clone())).collect()
    }

    fn host_links(&self) -> Result<Links, KernelError> {
        let mut host = lock(&self.host);
        if let Some(links) = host.as_ref() {
            return Ok(links.clone());
        }
        let links = Links::open(self.writes.clone())?;
        *host = Some(links.clone());
        Ok(links)
    }

    async fn space_links(&self, name: &str) -> Result<Links, KernelError> {
        let space = Netns::named(name)?;
        let id = space.id();
        if let Some((known, links)) = lock(&self.spaces).get(name)
            && Some(*known) == id
        {
            return Ok(links.clone());
        }
        let links = Links::open_in(&space, self.writes.clone()).await?;
        if let Some(id) = id {
            lock(&self.spaces).insert(name.to_owned(), (id, links.clone()));
        }
        Ok(links)
    }

    async fn links(&self, space: Option<&str>) -> Result<Links, KernelError> {
        match space {
            None => self.host_links(),
            Some(name) => self.space_links(name).await,
        }
    }

    /// The number of a link: as last seen, or asked for.
    async fn index(&self, links: &Links, at: &At) -> Result<u32, KernelError> {
        if let Some(index) = self.known_index(at) {
            return Ok(index);
        }
        let index = links.index(&at.link).await?;
        lock(&self.indices).insert(at.clone(), index);
        Ok(index)
    }

    async fn look(&self) -> Result<Arc<Seen>, KernelError> {
        let host = self.host_links()?;
        let (mut here, same) = self.here(&host).await?;
        let insides = self.insides().await?;
        // Taken, not lent: a look that fails leaves nothing behind.
        let kept = lock(&self.whole).take();
        let (had, mut seen) = match kept.filter(|_| same) {
            Some(whole) => whole,
            None => (Insides::new(), Arc::new(self.gather(&host, &mut here).await?)),
        };
        self.renew(&mut seen, &had, &insides);
        let groups = here.links.values().map(|link| link.group);
        let inside = insides.values().flat_map(|inside| &inside.links).map(|link| link.group);
        *lock(&self.groups) = groups.chain(inside).collect();
        *lock(&self.here) = Some(here);
        *lock(&self.whole) = Some((insides, Arc::clone(&seen)));
        Ok(seen)
    }

    /// Puts together what the host has, without its namespaces.
    async fn gather(&self, host: &Links, here: &mut Here) -> Result<Seen, KernelError> {
        let mut seen = Seen::default();
        let mut indices = BTreeMap::new();
        look::take(&mut seen, &mut indices, None, here.links.values(), &here.addresses);
        here.forwarding(host, &mut seen).await?;
        here.queues(host, &mut seen).await?;
        *lock(&self.indices) = indices;
        Ok(seen)
    }

    /// Takes over in what namespaces differ from what they had when all was put together.
    fn renew(&self, seen: &mut Arc<Seen>, had: &Insides, have: &Insides) {
        let differs = |one: &Arc<Inside>, other: Option<&Arc<Inside>>| {
            other.is_none_or(|other| !Arc::ptr_eq(one, other))
        };
        let mut old = had.iter().filter(|(name, it)| differs(it, have.get(*name))).peekable();
        let mut new = have.iter().filter(|(name, it)| differs(it, had.get(*name))).peekable();
        if old.peek().is_none() && new.peek().is_none() {
            return;
        }
        // Copies only what somebody still looks at.
        let seen = Arc::make_mut(seen);
        let mut indices = lock(&self.indices);
        for (name, _) in old {
            seen.spaces.remove(name);
            remove_inside(&mut seen.links, name);
            remove_inside(&mut indices, name);
        }
        for (name, inside) in new {
            let links = inside.links.iter();
            look::take(seen, &mut indices, Some(name), links, &inside.addresses);
            seen.spaces.insert(name.clone(), look::owner_of_space(&inside.links));
        }
    }

    /// What the host itself has, and whether that is what it had before: as seen before where the
    /// journal tells of no change, or looked at.
    async fn here(&self, host: &Links) -> Result<(Here, bool), KernelError> {
        let (journal, kept) = (lock(&self.journal).take(), lock(&self.here).take());
        let journal = match journal {
            Some(journal) => journal,
            None => Journal::open()?,
        };
        let mut changed = journal.read();
        *lock(&self.journal) = Some(journal);
        changed.links.append(&mut lock(&self.touched));
        Ok(match kept {
            Some(kept) if changed.is_nothing() => (kept, true),
            Some(kept) => (kept.look_again(host, changed).await?, false),
            None => (Here::look(host).await?, false),
        })
    }

    /// What the namespaces that bear our names have.
    async fn insides(&self) -> Result<Insides, KernelError> {
        let mut spaces = Netns::ids()?;
        spaces.retain(|name, _| names::object_of_space(name).is_some());
        lock(&self.spaces).retain(|name, _| spaces.contains_key(name));
        lock(&self.kept).retain(|name, _| spaces.contains_key(name));
        let mut insides = Insides::new();
        for (name, id) in spaces {
            let inside = self.inside(&name, id).await?;
            insides.insert(name.into(), inside);
        }
        Ok(insides)
    }

    /// What a namespace has: as seen before if nothing changed, or looked at.
    async fn inside(&self, name: &str, id: NetnsId) -> Result<Arc<Inside>, KernelError> {
        let number = self.freshness.number(name);
        let kept = lock(&self.kept).get(name).and_then(|kept| kept.still(number));
        if let Some(inside) = kept.filter(|inside| inside.id == id) {
            return Ok(inside);
        }
        let links = self.space_links(name).await?;
        let (links, addresses) = (links.links().await?, links.addresses().await?);
        let inside = Arc::new(Inside { id, links, addresses });
        if let Some(number) = number {
            let kept = Dated::new(number, Arc::clone(&inside));
            lock(&self.kept).insert(name.to_owned(), kept);
        }
        Ok(inside)
    }

    /// Says which namespaces a change of ours was in.
    fn changed(&self, change: &Change) {
        match change {
            Change::MakeSpace { space, .. } | Change::DeleteSpace { space } => {
                self.freshness.changed(space);
            }
            Change::Make { at, make, .. } => {
                let peer = match make {
                    Make::Pair { peer, .. } => peer.space.as_deref(),
                    _ => None,
                };
                [at.space.as_deref(), peer].into_iter().flatten().for_each(|space| {
                    self.freshness.changed(space);
                });
            }
            Change::Set { at, .. }
            | Change::AddAddress { at, .. }
            | Change::RemoveAddress { at, .. } => {
                if let Some(space) = &at.space {
                    self.freshness.changed(space);
                }
            }
            // The other ends of pairs go with them, wherever they are.
            Change::Delete { .. } => self.freshness.all_changed(),
            _ => {}
        }
    }
}

impl HostNet for NetlinkHost {
    async fn observe(&self) -> Result<Arc<Seen>, KernelError> {
        match self.look().await {
            // A socket's task ends only when the socket fails: open new ones.
            Err(error) if is_closed(&error) => {
                *lock(&self.host) = None;
                *lock(&self.here) = None;
                lock(&self.spaces).clear();
                self.look().await
            }
            result => result,
        }
    }

    async fn apply(&self, change: &Change) -> Result<(), KernelError> {
        let result = self.perform(change).await;
        self.changed(change);
        result
    }

    async fn apply_all(&self, changes: &[&Change]) -> Vec<Result<(), KernelError>> {
        if changes.iter().all(|change| change.is_entry()) {
            return self.change_entries(changes).await;
        }
        // The kernel makes them one after another all the same; what goes on at once is all else.
        let mut made = Vec::with_capacity(changes.len());
        for change in changes {
            made.push(self.apply(change));
        }
        stream::iter(made).buffered(AT_ONCE).collect().await
    }
}
