//! One change, as the kernel is told.
//!
//! A link is set up before it is set up *up*: mark, bridge, MTU, IPv6 and port settings are in place
//! when its first frame may pass.

use std::net::IpAddr;
use std::sync::atomic::Ordering;

use smol_str::SmolStr;
use stackhand_kernel::netlink::{
    Address, BridgePort, EntryChange, FdbEntry, FdbTable, LinkChange, Links, Neighbour, NewKind,
    NewLink, Peer, Routing,
};
use stackhand_kernel::{KernelError, Netns, sysctl};
use stackhand_model::MacAddr;

use super::super::{At, BRIDGE, Change, Make, ROUTING, Set};
use super::{FLOOD, NetlinkHost, lock};
use crate::names::{Mark, UNFINISHED_GROUP};

/// First of the groups that links are put into to be deleted together.
const DOOMED_GROUPS: u32 = 0x5348_1000;

impl NetlinkHost {
    pub(super) async fn perform(&self, change: &Change) -> Result<(), KernelError> {
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
            Change::Forward { .. }
            | Change::Unforward { .. }
            | Change::Place { .. }
            | Change::Unplace { .. }
            | Change::Answer { .. }
            | Change::Unanswer { .. } => {
                self.change_entries(&[change]).await.pop().unwrap_or(Ok(()))
            }
        }
    }

    /// Changes entries of forwarding and neighbour tables, in order.
    pub(super) async fn change_entries(&self, changes: &[&Change]) -> Vec<Result<(), KernelError>> {
        let mut entries = Vec::with_capacity(changes.len());
        for change in changes {
            entries.push(self.entry(change).await);
        }
        let good: Vec<EntryChange> = entries.iter().flatten().copied().collect();
        let mut answers = match self.host_links() {
            Ok(links) => links.change_entries(&good).await,
            Err(_) => Vec::new(),
        }
        .into_iter();
        let of_entry = |entry: Result<EntryChange, KernelError>| match entry {
            Ok(_) => answers.next().unwrap_or_else(|| self.host_links().map(drop)),
            Err(error) => Err(error),
        };
        entries.into_iter().map(of_entry).collect()
    }

    /// A change of an entry as the kernel is told.
    async fn entry(&self, change: &Change) -> Result<EntryChange, KernelError> {
        let links = self.host_links()?;
        let index = async |link: &SmolStr| self.index(&links, &At::host(link.clone())).await;
        let behind = |link, mac: &Option<MacAddr>, via: &IpAddr| FdbEntry {
            link,
            mac: mac.unwrap_or(FLOOD),
            table: FdbTable::Link { via: *via },
        };
        let placed = |link, mac: &MacAddr| FdbEntry { link, mac: *mac, table: FdbTable::Bridge };
        Ok(match change {
            Change::Forward { link, mac, via } => {
                EntryChange::Forward(behind(index(link).await?, mac, via))
            }
            Change::Unforward { link, mac, via } => {
                EntryChange::Unforward(behind(index(link).await?, mac, via))
            }
            Change::Place { link, mac } => EntryChange::Forward(placed(index(link).await?, mac)),
            Change::Unplace { link, mac } => {
                EntryChange::Unforward(placed(index(link).await?, mac))
            }
            Change::Answer { bridge, address, mac } => {
                let link = index(bridge).await?;
                EntryChange::Know(Neighbour { link, address: *address, mac: *mac })
            }
            Change::Unanswer { bridge, address, mac } => {
                let link = index(bridge).await?;
                EntryChange::Forget(Neighbour { link, address: *address, mac: *mac })
            }
            other => return Err(KernelError::NoSuchLink { link: other.to_string() }),
        })
    }
}

impl NetlinkHost {
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
                    name: peer.link.to_string(),
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
        let new = NewLink { name: at.link.to_string(), kind, group: UNFINISHED_GROUP, change };
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
            None => {
                sysctl::write(&key, value)?;
                lock(&self.touched).extend(self.known_index(at));
            }
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
                index => numbered.push((index?, at.link.to_string())),
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
