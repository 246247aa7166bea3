//! An in-memory [`HostNet`]: behaves like the kernel, and can be told to fail.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stackhand_kernel::KernelError;
use stackhand_kernel::netlink::{BridgePort, QueueKind, Routing};

use super::{At, BRIDGE, Change, HostNet, Make, Owner, Seen, SeenKind, SeenLink, Set};
use crate::names::object_of_space;

/// A host that exists only in memory.
#[derive(Debug, Default)]
pub struct FakeHost {
    state: Mutex<Seen>,
    broken: Mutex<Vec<Change>>,
    writes: Mutex<u64>,
}

impl FakeHost {
    /// A host that has `seen`.
    #[must_use]
    pub fn new(seen: Seen) -> Self {
        Self { state: Mutex::new(seen), ..Self::default() }
    }

    /// What it has.
    #[must_use]
    pub fn seen(&self) -> Seen {
        lock(&self.state).clone()
    }

    /// Changes it behind the agent's back.
    pub fn meddle(&self, meddle: impl FnOnce(&mut Seen)) {
        meddle(&mut lock(&self.state));
    }

    /// Changes that fail with `EIO` from now on.
    pub fn set_broken(&self, changes: Vec<Change>) {
        *lock(&self.broken) = changes;
    }

    /// Changes made so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        *lock(&self.writes)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HostNet for FakeHost {
    async fn observe(&self) -> Result<Arc<Seen>, KernelError> {
        Ok(Arc::new(self.seen()))
    }

    async fn apply(&self, change: &Change) -> Result<(), KernelError> {
        if lock(&self.broken).contains(change) {
            return Err(refused("be told to", nix::libc::EIO));
        }
        lock(&self.state).perform(change)?;
        *lock(&self.writes) += 1;
        Ok(())
    }
}

fn refused(action: &'static str, errno: i32) -> KernelError {
    let source = io::Error::from_raw_os_error(errno);
    KernelError::Netlink { action, object: "the fake".to_owned(), source }
}

/// A link as the kernel makes it when nothing is asked for.
#[must_use]
pub fn bare(kind: SeenKind, owner: Owner) -> SeenLink {
    SeenLink {
        kind,
        owner,
        mac: None,
        mtu: 1500,
        bridge: None,
        up: false,
        carrier: false,
        ipv6_off: false,
        port: BridgePort::default(),
        addresses: BTreeSet::new(),
        queue: None,
        redirect: None,
        routing: Routing::default(),
    }
}

impl Seen {
    /// Performs `change` as the kernel would.
    ///
    /// # Errors
    ///
    /// Refuses what the kernel would refuse.
    pub fn perform(&mut self, change: &Change) -> Result<(), KernelError> {
        match change {
            Change::MakeSpace { space, mark } => {
                self.spaces.insert(space.clone(), Owner::Ours(*mark));
                let mut lo = bare(SeenKind::Loopback, Owner::Ours(*mark));
                lo.up = true;
                lo.mtu = 65536;
                self.links.insert(At::inside(space.clone(), "lo"), lo);
            }
            Change::DeleteSpace { space } => {
                self.spaces.remove(space);
                let inside: Vec<At> = self
                    .links
                    .keys()
                    .filter(|at| at.space.as_ref() == Some(space))
                    .cloned()
                    .collect();
                for at in inside {
                    self.remove(&at);
                }
            }
            Change::Make { at, make, set } => {
                if self.links.contains_key(at) {
                    return Err(refused("create", nix::libc::EEXIST));
                }
                let kind = match make {
                    Make::Bridge => SeenKind::Bridge(BRIDGE),
                    Make::Tap(tap) => SeenKind::Tap(*tap),
                    Make::Vxlan(vxlan) => SeenKind::Vxlan(vxlan.clone()),
                    Make::Vlan { parent, id } => {
                        self.link(&At::host(parent.clone()))?;
                        SeenKind::Vlan { parent: Some(parent.clone()), id: *id }
                    }
                    Make::Gre(gre) => SeenKind::Gre(gre.clone()),
                    Make::Geneve(geneve) => SeenKind::Geneve(geneve.clone()),
                    Make::Ifb => SeenKind::Ifb,
                    Make::Pair { peer, peer_mac } => {
                        if peer.space.as_ref().is_some_and(|space| !self.spaces.contains_key(space))
                        {
                            return Err(refused("create", nix::libc::ENOENT));
                        }
                        let mut end = bare(SeenKind::Pair, Owner::Unfinished);
                        end.mac = Some(*peer_mac);
                        end.mtu = set.mtu.unwrap_or(1500);
                        self.links.insert(peer.clone(), end);
                        SeenKind::Pair
                    }
                    Make::PairEnd | Make::Loopback | Make::Brought => {
                        return Err(refused("create", nix::libc::EOPNOTSUPP));
                    }
                };
                self.links.insert(at.clone(), bare(kind, Owner::Unfinished));
                self.set(at, set)?;
            }
            Change::Set { at, set } => self.set(at, set)?,
            Change::Delete { links } => links.iter().for_each(|at| self.remove(at)),
            Change::AddAddress { at, net } => drop(self.link(at)?.addresses.insert(*net)),
            Change::RemoveAddress { at, net } => drop(self.link(at)?.addresses.remove(net)),
            Change::Forward { link, mac, via } => {
                self.link(&At::host(link.clone()))?;
                let table = self.forwarding.entry(link.clone()).or_default();
                match mac {
                    Some(mac) => drop(table.unicast.insert(*mac, BTreeSet::from([*via]))),
                    None => drop(table.flood.insert(*via)),
                }
            }
            Change::Unforward { link, mac, via } => {
                let table = self.forwarding.entry(link.clone()).or_default();
                match mac {
                    Some(mac) => {
                        if let Some(vias) = table.unicast.get_mut(mac) {
                            vias.remove(via);
                            if vias.is_empty() {
                                table.unicast.remove(mac);
                            }
                        }
                    }
                    None => drop(table.flood.remove(via)),
                }
            }
            Change::Place { link, mac } => {
                if self.link(&At::host(link.clone()))?.bridge.is_none() {
                    return Err(refused("place", nix::libc::EOPNOTSUPP));
                }
                self.forwarding.entry(link.clone()).or_default().in_bridge.insert(*mac);
            }
            Change::Unplace { link, mac } => {
                self.forwarding.entry(link.clone()).or_default().in_bridge.remove(mac);
            }
            Change::Answer { bridge, address, mac } => {
                self.link(&At::host(bridge.clone()))?;
                self.neighbours.entry(bridge.clone()).or_default().insert(*address, *mac);
            }
            Change::Unanswer { bridge, address, .. } => {
                self.neighbours.entry(bridge.clone()).or_default().remove(address);
            }
        }
        self.forwarding.retain(|link, table| {
            *table != super::Forwarding::default()
                && self.links.contains_key(&At::host(link.clone()))
        });
        self.neighbours.retain(|bridge, entries| {
            !entries.is_empty() && self.links.contains_key(&At::host(bridge.clone()))
        });
        Ok(())
    }

    fn link(&mut self, at: &At) -> Result<&mut SeenLink, KernelError> {
        self.links.get_mut(at).ok_or_else(|| KernelError::NoSuchLink { link: at.to_string() })
    }

    fn set(&mut self, at: &At, set: &Set) -> Result<(), KernelError> {
        for other in [&set.bridge, &set.redirect].into_iter().flatten().flatten() {
            self.link(&At::host(other.clone()))?;
        }
        let link = self.link(at)?;
        if let Some(mark) = set.mark {
            link.owner = Owner::Ours(mark);
        }
        link.mac = set.mac.or(link.mac);
        link.mtu = set.mtu.unwrap_or(link.mtu);
        link.up = set.up.unwrap_or(link.up);
        link.ipv6_off = set.ipv6_off.unwrap_or(link.ipv6_off);
        link.routing = set.routing.unwrap_or(link.routing);
        if let Some(bridge) = &set.bridge {
            link.bridge.clone_from(bridge);
            link.port = BridgePort::default();
        }
        if let Some(port) = set.port {
            if link.bridge.is_none() && port != BridgePort::default() {
                return Err(refused("change", nix::libc::EOPNOTSUPP));
            }
            link.port = port;
        }
        if let (Some(want), SeenKind::Vxlan(vxlan)) = (set.learning, &mut link.kind) {
            vxlan.learning = want;
        }
        if let Some(shaper) = set.shaper {
            link.queue = shaper.map(QueueKind::Shaper);
        }
        if let Some(redirect) = &set.redirect {
            link.redirect.clone_from(redirect);
        }
        if let (Some(want), SeenKind::Bridge(bridge)) = (set.as_bridge, &mut link.kind) {
            *bridge = want;
        }
        // What the bridge knows of a link goes when the link leaves it.
        if set.bridge.is_some()
            && at.space.is_none()
            && let Some(table) = self.forwarding.get_mut(&at.link)
        {
            table.in_bridge.clear();
        }
        Ok(())
    }

    fn remove(&mut self, at: &At) {
        let Some(link) = self.links.remove(at) else { return };
        // VLANs go with the link that they are of.
        let is_on = |link: &SeenLink| matches!(&link.kind, SeenKind::Vlan { parent: Some(parent), .. } if *parent == at.link);
        if at.space.is_none() {
            self.links.retain(|_, link| !is_on(link));
        }
        match link.kind {
            // Nobody looks at a redirect whose target is gone.
            SeenKind::Ifb => {
                for link in self.links.values_mut() {
                    link.redirect = link.redirect.take().filter(|to| *to != at.link);
                }
            }
            SeenKind::Bridge(_) => {
                for port in self.links.values_mut() {
                    if port.bridge.as_ref() == Some(&at.link) {
                        port.bridge = None;
                        port.port = BridgePort::default();
                    }
                }
                let links = &self.links;
                for (link, table) in &mut self.forwarding {
                    if links.get(&At::host(link.clone())).is_none_or(|link| link.bridge.is_none()) {
                        table.in_bridge.clear();
                    }
                }
            }
            // Pairs of ours share the last eleven characters and their mark.
            SeenKind::Pair => {
                let other: Vec<At> = self
                    .links
                    .iter()
                    .filter(|(other, end)| {
                        end.kind == SeenKind::Pair
                            && other.space.is_some() != at.space.is_some()
                            && other.link.chars().rev().take(11).eq(at.link.chars().rev().take(11))
                            && [other.space.as_deref(), at.space.as_deref()]
                                .into_iter()
                                .flatten()
                                .all(|space| object_of_space(space).is_some())
                    })
                    .map(|(other, _)| other.clone())
                    .collect();
                for other in other {
                    self.links.remove(&other);
                }
            }
            _ => {}
        }
    }
}
