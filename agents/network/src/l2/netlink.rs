//! The real [`HostNet`]: route netlink, taps, sysctls and namespaces.
//!
//! Only translation lives here. A link is set up before it is set up *up*: mark, bridge, MTU, IPv6
//! and port settings are in place when its first frame may pass.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use stackhand_kernel::netlink::{
    Address, BridgePort, FdbEntry, FdbTable, Link, LinkChange, LinkKind, Links, Neighbour, NewKind,
    NewLink, Peer, Routing, WriteCount, is_closed,
};
use stackhand_kernel::{KernelError, Netns, NetnsId, sysctl};
use stackhand_model::MacAddr;

use super::{At, BRIDGE, Change, HostNet, Make, Owner, ROUTING, Seen, SeenKind, SeenLink, Set};
use crate::freshness::{Dated, Freshness};
use crate::names::{self, Mark, UNFINISHED_GROUP};
use crate::services::metadata::ADDRESS_V6;

/// The Ethernet address under which a VXLAN link files its flood list.
const FLOOD: MacAddr = MacAddr([0; 6]);

/// First of the groups that links are put into to be deleted together.
const DOOMED_GROUPS: u32 = 0x5348_1000;

/// This host's network, as the agent's own namespace and those of its networks.
#[derive(Debug, Default)]
pub struct NetlinkHost {
    writes: WriteCount,
    host: Mutex<Option<Links>>,
    spaces: Mutex<BTreeMap<String, (NetnsId, Links)>>,
    freshness: Arc<Freshness>,
    /// What was seen of namespaces.
    kept: Mutex<BTreeMap<String, Dated<Arc<Inside>>>>,
    /// Numbers of links, as last seen or made.
    indices: Mutex<BTreeMap<At, u32>>,
    /// Groups that some link is in, as last seen.
    groups: Mutex<BTreeSet<u32>>,
    doomed: AtomicU32,
}

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

impl NetlinkHost {
    /// The network that the calling thread sees. Sockets are opened when they are needed first,
    /// by the thread that needs them.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
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
    pub fn names_in(&self, space: &str) -> BTreeMap<u32, String> {
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

    async fn look(&self) -> Result<Seen, KernelError> {
        let mut seen = Seen::default();
        let mut indices = BTreeMap::new();
        let mut groups = BTreeSet::new();
        let host = self.host_links()?;
        let links = host.links().await?;
        groups.extend(links.iter().map(|link| link.group));
        let addresses = host.addresses().await?;
        take(&mut seen, &mut indices, None, &links, &addresses);
        self.look_at_forwarding(&host, &links, &mut seen).await?;
        look_at_queues(&host, &links, &mut seen).await?;

        let names: Vec<String> = Netns::list()?
            .into_iter()
            .filter(|name| names::object_of_space(name).is_some())
            .collect();
        lock(&self.spaces).retain(|name, _| names.binary_search(name).is_ok());
        lock(&self.kept).retain(|name, _| names.binary_search(name).is_ok());
        for name in names {
            // A file without a namespace behind it is what a crash left: as good as none.
            let Some(id) = Netns::named(&name)?.id() else { continue };
            let inside = self.inside(&name, id).await?;
            groups.extend(inside.links.iter().map(|link| link.group));
            take(&mut seen, &mut indices, Some(&name), &inside.links, &inside.addresses);
            seen.spaces.insert(name, owner_of_space(&inside.links));
        }
        *lock(&self.indices) = indices;
        *lock(&self.groups) = groups;
        Ok(seen)
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

    /// Reads what bridges and overlays of ours were told.
    async fn look_at_forwarding(
        &self,
        host: &Links,
        links: &[Link],
        seen: &mut Seen,
    ) -> Result<(), KernelError> {
        let ours: BTreeMap<u32, &Link> = links
            .iter()
            .filter(|link| matches!(owner(link), Owner::Ours(_) | Owner::Unfinished))
            .map(|link| (link.index, link))
            .collect();
        let is_overlay = |link: &Link| {
            matches!(link.kind, LinkKind::Vxlan(_) | LinkKind::Gre(_) | LinkKind::Geneve(_))
        };
        if ours.values().any(|link| is_overlay(link)) {
            for entry in host.forwarding().await? {
                let Some(link) = ours.get(&entry.link).filter(|link| is_overlay(link)) else {
                    continue;
                };
                let table = seen.forwarding.entry(link.name.clone()).or_default();
                match entry.table {
                    FdbTable::Bridge => drop(table.in_bridge.insert(entry.mac)),
                    FdbTable::Link { via } if entry.mac == FLOOD => drop(table.flood.insert(via)),
                    FdbTable::Link { via } => {
                        table.unicast.entry(entry.mac).or_default().insert(via);
                    }
                }
            }
        }
        if ours.values().any(|link| matches!(link.kind, LinkKind::Bridge(_))) {
            for entry in host.neighbours().await? {
                let Some(link) = ours.get(&entry.link) else { continue };
                if matches!(link.kind, LinkKind::Bridge(_)) {
                    seen.neighbours
                        .entry(link.name.clone())
                        .or_default()
                        .insert(entry.address, entry.mac);
                }
            }
        }
        Ok(())
    }

    async fn make(&self, at: &At, make: &Make, set: &Set) -> Result<(), KernelError> {
        let links = self.links(at.space.as_deref()).await?;
        let mut change = LinkChange {
            alias: set.mark.map(|mark| mark.to_string()),
            mac: set.mac,
            mtu: set.mtu,
            master: self.master(&links, set).await?,
            up: None,
            group: None,
        };
        let mut peer_space = None;
        let kind = match make {
            Make::Bridge => NewKind::Bridge(set.as_bridge.unwrap_or(BRIDGE)),
            Make::Tap(tap) => {
                change.group = Some(UNFINISHED_GROUP);
                NewKind::Tap(*tap)
            }
            Make::Vxlan(vxlan) => NewKind::Vxlan(vxlan.clone()),
            Make::Vlan { parent, id } => {
                let parent = self.index(&links, &At::host(parent.clone())).await?;
                NewKind::Vlan { parent, id: *id }
            }
            Make::Gre(gre) => NewKind::Gre(gre.clone()),
            Make::Geneve(geneve) => NewKind::Geneve(geneve.clone()),
            Make::Ifb => NewKind::Ifb,
            Make::Pair { peer, peer_mac } => {
                if let Some(space) = &peer.space {
                    peer_space = Some(Netns::named(space)?.open()?);
                }
                NewKind::Veth(Peer {
                    name: peer.link.clone(),
                    mac: Some(*peer_mac),
                    mtu: set.mtu,
                    group: UNFINISHED_GROUP,
                })
            }
            Make::PairEnd | Make::Loopback | Make::Brought => {
                return Err(KernelError::NoSuchLink { link: at.to_string() });
            }
        };
        lock(&self.indices).remove(at);
        let new = NewLink { name: at.link.clone(), kind, group: UNFINISHED_GROUP, change };
        links.create(&new, peer_space.as_ref()).await?;
        let rest = Set {
            mark: None,
            mac: None,
            mtu: None,
            bridge: None,
            as_bridge: None,
            learning: None,
            ..set.clone()
        };
        let port = rest.port.filter(|port| *port != BridgePort::default());
        self.set(at, &Set { port, ..rest }).await
    }

    async fn master(&self, links: &Links, set: &Set) -> Result<Option<Option<u32>>, KernelError> {
        match &set.bridge {
            None => Ok(None),
            Some(None) => Ok(Some(None)),
            Some(Some(bridge)) => {
                self.index(links, &At::host(bridge.clone())).await.map(|index| Some(Some(index)))
            }
        }
    }

    async fn set(&self, at: &At, set: &Set) -> Result<(), KernelError> {
        let links = self.links(at.space.as_deref()).await?;
        let index = self.index(&links, at).await?;
        let first = LinkChange {
            alias: set.mark.map(|mark| mark.to_string()),
            mac: set.mac,
            mtu: set.mtu,
            master: self.master(&links, set).await?,
            up: set.up.filter(|up| !up),
            group: None,
        };
        if first != LinkChange::default() {
            links.change(index, &at.link, &first).await?;
        }
        if let Some(bridge) = set.as_bridge {
            links.change_bridge(index, &at.link, bridge).await?;
        }
        if let Some(learning) = set.learning {
            links.set_learning(index, &at.link, learning).await?;
        }
        if let Some(off) = set.ipv6_off {
            self.set_ipv6(at, off).await?;
        }
        if let Some(routing) = set.routing {
            self.set_routing(at, routing).await?;
        }
        if let Some(port) = set.port {
            links.change_port(index, &at.link, port).await?;
        }
        if set.up == Some(true) {
            let up = LinkChange { up: Some(true), ..LinkChange::default() };
            links.change(index, &at.link, &up).await?;
        }
        // Last: a kernel that cannot limit a port can connect it.
        match set.shaper {
            Some(Some(shaper)) => links.set_shaper(index, &at.link, shaper).await?,
            Some(None) => links.remove_shaper(index, &at.link).await?,
            None => {}
        }
        match &set.redirect {
            Some(Some(to)) => {
                let to = self.index(&links, &At::host(to.clone())).await?;
                links.set_redirect(index, &at.link, to).await?;
            }
            Some(None) => links.remove_redirect(index, &at.link).await?,
            None => {}
        }
        Ok(())
    }

    async fn set_routing(&self, at: &At, routing: Routing) -> Result<(), KernelError> {
        let link = at.link.clone();
        let write = move || write_routing(&link, routing).map_err(std::io::Error::other);
        let space = at.space.as_deref().unwrap_or_default();
        Netns::named(space)?.inside("set how it routes", write).await?;
        self.writes.add();
        Ok(())
    }

    async fn set_ipv6(&self, at: &At, off: bool) -> Result<(), KernelError> {
        let key = format!("net/ipv6/conf/{}/disable_ipv6", at.link);
        let value = if off { "1" } else { "0" };
        match &at.space {
            None => sysctl::write(&key, value)?,
            Some(space) => {
                let write = move || sysctl::write(&key, value).map_err(std::io::Error::other);
                Netns::named(space)?.inside("turn IPv6 off", write).await?;
            }
        }
        self.writes.add();
        Ok(())
    }

    async fn delete(&self, doomed: &[At]) -> Result<(), KernelError> {
        let Some(first) = doomed.first() else { return Ok(()) };
        let links = self.links(first.space.as_deref()).await?;
        let mut numbered = Vec::new();
        for at in doomed {
            match self.index(&links, at).await {
                Err(error) if error.is_absent() => {}
                index => numbered.push((index?, at.link.clone())),
            }
        }
        let group = loop {
            let next = self.doomed.fetch_add(1, Ordering::Relaxed) & 0xffff;
            let group = DOOMED_GROUPS.wrapping_add(next);
            if group != UNFINISHED_GROUP && !lock(&self.groups).contains(&group) {
                break group;
            }
        };
        links.delete(&numbered, group).await?;
        let mut indices = lock(&self.indices);
        for at in doomed {
            indices.remove(at);
        }
        Ok(())
    }

    async fn make_space(&self, name: &str, mark: Mark) -> Result<(), KernelError> {
        let space = Netns::named(name)?;
        if space.id().is_none() {
            space.create().await?;
            self.writes.add();
        }
        if matches!(mark, Mark::Router(_)) {
            let write = || write_router_defaults().map_err(std::io::Error::other);
            space.inside("set how it routes", write).await?;
            self.writes.add();
        }
        let links = self.space_links(name).await?;
        let lo = links.index("lo").await?;
        let change =
            LinkChange { alias: Some(mark.to_string()), up: Some(true), ..LinkChange::default() };
        links.change(lo, "lo", &change).await
    }

    fn delete_space(&self, name: &str) -> Result<(), KernelError> {
        lock(&self.spaces).remove(name);
        lock(&self.indices).retain(|at, _| at.space.as_deref() != Some(name));
        Netns::named(name)?.delete()?;
        self.writes.add();
        Ok(())
    }

    async fn fdb(
        &self,
        link: &str,
        mac: Option<MacAddr>,
        via: Option<IpAddr>,
    ) -> Result<(Links, FdbEntry), KernelError> {
        let links = self.host_links()?;
        let index = self.index(&links, &At::host(link)).await?;
        let table = via.map_or(FdbTable::Bridge, |via| FdbTable::Link { via });
        Ok((links, FdbEntry { link: index, mac: mac.unwrap_or(FLOOD), table }))
    }

    async fn neighbour(
        &self,
        bridge: &str,
        address: IpAddr,
        mac: MacAddr,
    ) -> Result<(Links, Neighbour), KernelError> {
        let links = self.host_links()?;
        let link = self.index(&links, &At::host(bridge)).await?;
        Ok((links, Neighbour { link, address, mac }))
    }
}

impl HostNet for NetlinkHost {
    async fn observe(&self) -> Result<Seen, KernelError> {
        match self.look().await {
            // A socket's task ends only when the socket fails: open new ones.
            Err(error) if is_closed(&error) => {
                *lock(&self.host) = None;
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
}

impl NetlinkHost {
    async fn perform(&self, change: &Change) -> Result<(), KernelError> {
        match change {
            Change::MakeSpace { space, mark } => self.make_space(space, *mark).await,
            Change::DeleteSpace { space } => self.delete_space(space),
            Change::Make { at, make, set } => self.make(at, make, set).await,
            Change::Set { at, set } => self.set(at, set).await,
            Change::Delete { links } => self.delete(links).await,
            Change::AddAddress { at, net } => {
                let links = self.links(at.space.as_deref()).await?;
                let link = self.index(&links, at).await?;
                links.add_address(Address { link, net: *net }).await
            }
            Change::RemoveAddress { at, net } => {
                let links = self.links(at.space.as_deref()).await?;
                let link = self.index(&links, at).await?;
                links.remove_address(Address { link, net: *net }).await
            }
            Change::Forward { link, mac, via } => {
                let (links, entry) = self.fdb(link, *mac, Some(*via)).await?;
                links.set_forwarding(entry).await
            }
            Change::Unforward { link, mac, via } => {
                let (links, entry) = self.fdb(link, *mac, Some(*via)).await?;
                links.remove_forwarding(entry).await
            }
            Change::Place { link, mac } => {
                let (links, entry) = self.fdb(link, Some(*mac), None).await?;
                links.set_forwarding(entry).await
            }
            Change::Unplace { link, mac } => {
                let (links, entry) = self.fdb(link, Some(*mac), None).await?;
                links.remove_forwarding(entry).await
            }
            Change::Answer { bridge, address, mac } => {
                let (links, entry) = self.neighbour(bridge, *address, *mac).await?;
                links.set_neighbour(entry).await
            }
            Change::Unanswer { bridge, address, mac } => {
                let (links, entry) = self.neighbour(bridge, *address, *mac).await?;
                links.remove_neighbour(entry).await
            }
        }
    }
}

/// Reads the queues of the host's links. Costs nothing where nobody limits anything: a list of links
/// names kinds of queues, and a redirect of ours leads to a link of ours.
async fn look_at_queues(host: &Links, links: &[Link], seen: &mut Seen) -> Result<(), KernelError> {
    let names: BTreeMap<u32, &str> =
        links.iter().map(|link| (link.index, link.name.as_str())).collect();
    let shaped = |link: &Link| link.queue == "tbf" || link.name.starts_with("tap");
    if links.iter().any(|link| shaped(link) && !is_default(&link.queue)) {
        for queue in host.queues().await? {
            let Some(name) = names.get(&queue.link) else { continue };
            if let Some(link) = seen.links.get_mut(&At::host(*name)) {
                link.queue = Some(queue.kind);
            }
        }
    }
    for link in links.iter().filter(|link| link.kind == LinkKind::Ifb) {
        let Some(port) = link.name.strip_prefix("ifb") else { continue };
        let tap = At::host(format!("tap{port}"));
        let Some(index) = links.iter().find(|link| link.name == tap.link) else { continue };
        let to = host.redirect(index.index, &tap.link).await?;
        if let Some(seen) = seen.links.get_mut(&tap) {
            seen.redirect = to.map(|to| names.get(&to).copied().unwrap_or_default().to_owned());
        }
    }
    Ok(())
}

/// Kinds of queues that the kernel gives a link by itself.
fn is_default(kind: &str) -> bool {
    ["", "noop", "noqueue", "pfifo_fast", "fq_codel", "fq", "mq"].contains(&kind)
}

/// Files the links of one namespace under their names.
fn take(
    seen: &mut Seen,
    indices: &mut BTreeMap<At, u32>,
    space: Option<&str>,
    links: &[Link],
    addresses: &[Address],
) {
    let names: BTreeMap<u32, &str> =
        links.iter().map(|link| (link.index, link.name.as_str())).collect();
    let mut by_link: BTreeMap<u32, BTreeSet<IpNet>> = BTreeMap::new();
    for address in addresses.iter().filter(|address| !is_the_kernels(address.net.addr())) {
        by_link.entry(address.link).or_default().insert(address.net);
    }
    for link in links {
        let at = At { space: space.map(str::to_owned), link: link.name.clone() };
        indices.insert(at.clone(), link.index);
        let kind = match &link.kind {
            LinkKind::Bridge(bridge) => SeenKind::Bridge(*bridge),
            LinkKind::Tap(tap) => SeenKind::Tap(*tap),
            LinkKind::Veth => SeenKind::Pair,
            LinkKind::Vxlan(vxlan) => SeenKind::Vxlan(vxlan.clone()),
            LinkKind::Vlan(id) => {
                let here = link.parent.filter(|_| link.parent_netns.is_none());
                let parent = here.and_then(|index| names.get(&index));
                SeenKind::Vlan { parent: parent.map(|name| (*name).to_owned()), id: *id }
            }
            LinkKind::Gre(gre) => SeenKind::Gre(gre.clone()),
            LinkKind::Geneve(geneve) => SeenKind::Geneve(geneve.clone()),
            LinkKind::Hardware if link.name == "lo" => SeenKind::Loopback,
            LinkKind::Hardware => SeenKind::Other("hardware".to_owned()),
            LinkKind::Ifb => SeenKind::Ifb,
            LinkKind::Other(kind) => SeenKind::Other(kind.clone()),
        };
        let bridge = link.master.and_then(|index| names.get(&index)).map(|name| (*name).to_owned());
        let link = SeenLink {
            kind,
            owner: owner(link),
            mac: link.mac,
            mtu: link.mtu,
            bridge,
            up: link.up,
            carrier: link.carrier,
            ipv6_off: link.ipv6_off.unwrap_or(true),
            port: link.port.unwrap_or_default(),
            addresses: by_link.remove(&link.index).unwrap_or_default(),
            queue: None,
            redirect: None,
            routing: link.routing,
        };
        seen.links.insert(at, link);
    }
}

/// Whether the kernel gave an address by itself.
fn is_the_kernels(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local() && v6 != ADDRESS_V6)
}

/// Settings that a router's namespace has as a whole, and that its links start with.
fn write_router_defaults() -> Result<(), KernelError> {
    sysctl::write("net/ipv4/ip_forward", "1")?;
    for which in ["all", "default"] {
        write_routing(which, ROUTING)?;
    }
    Ok(())
}

fn write_routing(link: &str, routing: Routing) -> Result<(), KernelError> {
    let v4 = [
        ("forwarding", i32::from(routing.forwarding)),
        ("arp_ignore", routing.arp_ignore),
        ("arp_announce", routing.arp_announce),
        ("rp_filter", routing.rp_filter),
        ("send_redirects", i32::from(routing.send_redirects)),
    ];
    for (key, value) in v4 {
        sysctl::write(&format!("net/ipv4/conf/{link}/{key}"), &value.to_string())?;
    }
    let Some(v6) = routing.v6 else { return Ok(()) };
    let v6 = [
        ("forwarding", i32::from(v6.forwarding)),
        ("accept_ra", v6.accept_ra),
        ("accept_dad", v6.accept_dad),
    ];
    for (key, value) in v6 {
        match sysctl::write(&format!("net/ipv6/conf/{link}/{key}"), &value.to_string()) {
            // A kernel without IPv6.
            Err(error) if error.is_absent() => return Ok(()),
            result => result?,
        }
    }
    Ok(())
}

fn owner(link: &Link) -> Owner {
    match link.alias.as_deref().map(str::parse) {
        Some(Ok(mark)) => Owner::Ours(mark),
        None if link.group == UNFINISHED_GROUP => Owner::Unfinished,
        _ => Owner::Foreign(link.alias.clone()),
    }
}

/// Whose a namespace is, by its loopback link. One that is as empty as a new one and has no mark
/// is what a crash left.
fn owner_of_space(links: &[Link]) -> Owner {
    let lo = links.iter().find(|link| link.name == "lo");
    match lo.map(owner) {
        Some(Owner::Foreign(None)) => {
            let empty = links.iter().all(|link| link.name == "lo" || !link.up);
            let new = lo.is_some_and(|lo| !lo.up) && empty;
            if new { Owner::Unfinished } else { Owner::Foreign(None) }
        }
        Some(owner) => owner,
        None => Owner::Foreign(None),
    }
}
