//! The real [`RouterNet`]: routes by route netlink, translations by netfilter's.
//!
//! The rules are loaded by `nft` once, in a namespace that nobody sees, and read back: what the
//! kernel made of them is what every router's table is compared with and built from.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use smol_str::{SmolStr, format_smolstr};
use stackhand_kernel::exec::Program;
use stackhand_kernel::netfilter::{Netfilter, NftChange, Structure};
use stackhand_kernel::netlink::{self, RouteEntry, WriteCount, is_closed};
use stackhand_kernel::{KernelError, Netns, NetnsId, netns};
use tokio::sync::OnceCell;

use super::nat::{SCRIPT, SETS, table};
use super::{Change, Entry, Hop, RouterNet, Seen, SeenNat, SeenRoute, SeenRouter};
use crate::freshness::Dated;
use crate::l2::At;
use crate::l2::netlink::NetlinkHost;

/// Under which number we set routes: one that no routing daemon uses.
const PROTOCOL: u8 = 83;

/// What was seen of a namespace, and which one that was.
type Kept = Dated<(NetnsId, Arc<SeenRouter>)>;

/// This host's routers.
#[derive(Debug)]
pub struct KernelRouters {
    host: Arc<NetlinkHost>,
    sockets: Mutex<BTreeMap<String, (NetnsId, Netfilter)>>,
    rules: OnceCell<Structure>,
    /// What was seen of namespaces.
    kept: Mutex<BTreeMap<String, Kept>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KernelRouters {
    /// The routers of a host whose links are layer 2's.
    #[must_use]
    pub fn new(host: Arc<NetlinkHost>) -> Self {
        Self { host, sockets: Mutex::default(), rules: OnceCell::new(), kept: Mutex::default() }
    }

    /// Closes the sockets in namespaces that are to go.
    pub fn leave(&self, goes: impl Fn(&str) -> bool) {
        lock(&self.sockets).retain(|name, _| !goes(name));
        lock(&self.kept).retain(|name, _| !goes(name));
    }

    async fn netfilter(&self, name: &str) -> Result<Netfilter, KernelError> {
        let space = Netns::named(name)?;
        let id = space.id();
        if let Some((known, socket)) = lock(&self.sockets).get(name)
            && Some(*known) == id
        {
            return Ok(socket.clone());
        }
        let socket = Netfilter::open_in(&space, self.host.write_count()).await?;
        if let Some(id) = id {
            lock(&self.sockets).insert(name.to_owned(), (id, socket.clone()));
        }
        Ok(socket)
    }

    /// The rules as this kernel holds them.
    async fn rules(&self) -> Result<&Structure, KernelError> {
        self.rules.get_or_try_init(load_rules).await
    }

    async fn look(&self, spaces: &BTreeSet<SmolStr>) -> Result<Seen, KernelError> {
        let mut seen = Seen::new();
        for name in spaces {
            // As of the host's last look, from which the links' numbers are, too.
            let Some(id) = self.host.known_space(name) else { continue };
            seen.insert(name.clone(), self.router(name, id).await?);
        }
        Ok(seen)
    }

    /// What a router has: as seen before if nothing changed, or looked at.
    async fn router(&self, space: &str, id: NetnsId) -> Result<Arc<SeenRouter>, KernelError> {
        let number = self.host.freshness().number(space);
        let kept = lock(&self.kept).get(space).and_then(|kept| kept.still(number));
        if let Some((_, router)) = kept.filter(|(known, _)| *known == id) {
            return Ok(router);
        }
        let (routes, nat) = (self.routes(space).await?, self.nat(space).await?);
        let router = Arc::new(SeenRouter { routes, nat });
        if let Some(number) = number {
            let kept = Dated::new(number, (id, Arc::clone(&router)));
            lock(&self.kept).insert(space.to_owned(), kept);
        }
        Ok(router)
    }

    async fn routes(&self, space: &str) -> Result<BTreeMap<ipnet::IpNet, SeenRoute>, KernelError> {
        let routes = self.host.links_in(space).await?.routes().await?;
        let names = self.host.names_in(space);
        let hop = |hop: &netlink::Hop| {
            let link = names.get(&hop.link).cloned();
            Hop { via: hop.gateway, link: link.unwrap_or_else(|| format_smolstr!("{}", hop.link)) }
        };
        let route = |route: &RouteEntry| {
            let hops = route.hops.iter().map(hop).collect();
            (route.destination, SeenRoute { hops, ours: route.protocol == PROTOCOL })
        };
        Ok(routes.iter().map(route).collect())
    }

    async fn nat(&self, space: &str) -> Result<SeenNat, KernelError> {
        let netfilter = self.netfilter(space).await?;
        let table = table();
        match netfilter.structure(&table).await? {
            None => return Ok(SeenNat::Absent),
            Some(structure) if structure != *self.rules().await? => return Ok(SeenNat::Changed),
            Some(_) => {}
        }
        let mut entries = BTreeSet::new();
        for set in SETS {
            let elements = netfilter.elements(&table, set).await?;
            entries.extend(elements.iter().filter_map(|element| Entry::parse(set, element)));
        }
        Ok(SeenNat::Built(entries))
    }

    async fn entry(
        &self,
        space: &str,
        destination: ipnet::IpNet,
        hops: &BTreeSet<Hop>,
    ) -> Result<RouteEntry, KernelError> {
        let mut found = BTreeSet::new();
        for hop in hops {
            let at = At::inside(space, hop.link.clone());
            let link = self.host.index_of(&at).await?;
            found.insert(netlink::Hop { gateway: hop.via, link });
        }
        Ok(RouteEntry { destination, hops: found, protocol: PROTOCOL })
    }

    async fn cut(&self, space: &str, cuts: &BTreeSet<Entry>) -> Result<(), KernelError> {
        let netfilter = self.netfilter(space).await?;
        for flow in netfilter.flows().await? {
            if cuts.iter().any(|cut| cut.cuts(&flow.original, &flow.reply)) {
                netfilter.forget(&flow).await?;
            }
        }
        netfilter.commit(&table(), &changes(cuts, false)).await
    }
}

/// What `nft` makes of the rules on this kernel.
async fn load_rules() -> Result<Structure, KernelError> {
    let load = || {
        let nft = Program::new("/usr/sbin/nft").args(["-f", "-"]).stdin(SCRIPT);
        let nft = nft.limit(Duration::from_secs(10));
        // The program starts in the namespace of this thread, which is a fresh one.
        tokio::runtime::Handle::current().block_on(nft.run()).map_err(io::Error::other)?;
        Netfilter::connect(WriteCount::default())
    };
    let netfilter = netns::in_a_scratch_netns(load).await?;
    netfilter.structure(&table()).await?.ok_or_else(|| KernelError::Netlink {
        action: "read back",
        object: "the rules that nft loaded".to_owned(),
        source: io::ErrorKind::NotFound.into(),
    })
}

/// Additions or removals of entries, by set.
fn changes(entries: &BTreeSet<Entry>, add: bool) -> Vec<NftChange> {
    let mut by_set: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    for entry in entries {
        by_set.entry(entry.key().0).or_default().push(entry.element());
    }
    let change = |(set, elements): (&str, _)| {
        let set = set.to_owned();
        if add { NftChange::Add { set, elements } } else { NftChange::Remove { set, elements } }
    };
    by_set.into_iter().map(change).collect()
}

impl RouterNet for KernelRouters {
    async fn observe(&self, spaces: &BTreeSet<SmolStr>) -> Result<Seen, KernelError> {
        match self.look(spaces).await {
            // A socket that failed is of no more use: open new ones.
            Err(error) if is_closed(&error) => {
                lock(&self.sockets).clear();
                self.look(spaces).await
            }
            result => result,
        }
    }

    async fn apply(&self, change: &Change) -> Result<(), KernelError> {
        let result = self.perform(change).await;
        self.host.freshness().changed(change.space());
        result
    }
}

impl KernelRouters {
    async fn perform(&self, change: &Change) -> Result<(), KernelError> {
        match change {
            Change::Build { space, replace, entries } => {
                let mut batch = Vec::new();
                if *replace {
                    batch.push(NftChange::DeleteTable);
                }
                batch.push(NftChange::Build(self.rules().await?.clone()));
                batch.extend(changes(entries, true));
                self.netfilter(space).await?.commit(&table(), &batch).await
            }
            Change::Translate { space, remove, add } => {
                let mut batch = changes(remove, false);
                batch.extend(changes(add, true));
                self.netfilter(space).await?.commit(&table(), &batch).await
            }
            Change::Cut { space, cuts } => self.cut(space, cuts).await,
            Change::SetRoute { space, destination, hops } => {
                let route = self.entry(space, *destination, hops).await?;
                self.host.links_in(space).await?.set_route(&route).await
            }
            Change::RemoveRoute { space, destination } => {
                let route = self.entry(space, *destination, &BTreeSet::new()).await?;
                self.host.links_in(space).await?.remove_route(&route).await
            }
        }
    }
}
