//! What the kernel tells, as what the planner compares.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use smol_str::SmolStr;
use stackhand_kernel::KernelError;
use stackhand_kernel::netlink::{
    Address, Changed, FdbEntry, FdbTable, Link, LinkKind, Links, Neighbour, Queue,
};

use super::super::{At, Forwarding, Owner, Seen, SeenKind, SeenLink};
use super::FLOOD;
use crate::names::UNFINISHED_GROUP;
use crate::services::metadata::ADDRESS_V6;

/// Links that are read again one by one, at most; of more, all are.
const FEW: usize = 64;

/// What the host itself had when it was looked at. What nobody asked for yet is `None`.
#[derive(Debug, Default)]
pub(super) struct Here {
    pub(super) links: BTreeMap<u32, Link>,
    pub(super) addresses: Vec<Address>,
    forwarding: Option<Vec<FdbEntry>>,
    neighbours: Option<Vec<Neighbour>>,
    queues: Option<Vec<Queue>>,
    /// By link: where its received frames go first.
    redirects: BTreeMap<u32, Option<u32>>,
}

impl Here {
    /// Looks at all that is always looked at.
    pub(super) async fn look(host: &Links) -> Result<Self, KernelError> {
        let links = host.links().await?.into_iter().map(|link| (link.index, link)).collect();
        Ok(Self { links, addresses: host.addresses().await?, ..Self::default() })
    }

    /// Looks again at what changed.
    pub(super) async fn look_again(
        mut self,
        host: &Links,
        changed: Changed,
    ) -> Result<Self, KernelError> {
        if changed.all || changed.links.len() > FEW {
            return Self::look(host).await;
        }
        let mut gone = false;
        for index in &changed.links {
            match host.numbered(*index).await? {
                Some(link) => drop(self.links.insert(*index, link)),
                None => gone |= self.links.remove(index).is_some(),
            }
            self.redirects.remove(index);
        }
        if changed.addresses || gone {
            self.addresses = host.addresses().await?;
        }
        if changed.forwarding || gone {
            self.forwarding = None;
        }
        if changed.neighbours || gone {
            self.neighbours = None;
        }
        if changed.queues || gone {
            self.queues = None;
        }
        Ok(self)
    }

    /// What bridges and overlays of ours were told.
    pub(super) async fn forwarding(
        &mut self,
        host: &Links,
        seen: &mut Seen,
    ) -> Result<(), KernelError> {
        let ours: BTreeMap<u32, &Link> = self
            .links
            .values()
            .filter(|link| matches!(owner(link), Owner::Ours(_) | Owner::Unfinished))
            .map(|link| (link.index, link))
            .collect();
        let is_overlay = |link: &Link| {
            matches!(link.kind, LinkKind::Vxlan(_) | LinkKind::Gre(_) | LinkKind::Geneve(_))
        };
        if ours.values().any(|link| is_overlay(link)) {
            let entries = match self.forwarding.take() {
                Some(entries) => entries,
                None => host.forwarding().await?,
            };
            for entry in &entries {
                let Some(link) = ours.get(&entry.link).filter(|link| is_overlay(link)) else {
                    continue;
                };
                if !seen.forwarding.contains_key(link.name.as_str()) {
                    seen.forwarding.insert(link.name.as_str().into(), Forwarding::default());
                }
                let Some(table) = seen.forwarding.get_mut(link.name.as_str()) else { continue };
                match entry.table {
                    FdbTable::Bridge => drop(table.in_bridge.insert(entry.mac)),
                    FdbTable::Link { via } if entry.mac == FLOOD => drop(table.flood.insert(via)),
                    FdbTable::Link { via } => {
                        table.unicast.entry(entry.mac).or_default().insert(via);
                    }
                }
            }
            self.forwarding = Some(entries);
        }
        if ours.values().any(|link| matches!(link.kind, LinkKind::Bridge(_))) {
            let entries = match self.neighbours.take() {
                Some(entries) => entries,
                None => host.neighbours().await?,
            };
            for entry in &entries {
                let Some(link) = ours.get(&entry.link) else { continue };
                if matches!(link.kind, LinkKind::Bridge(_)) {
                    if !seen.neighbours.contains_key(link.name.as_str()) {
                        seen.neighbours.insert(link.name.as_str().into(), BTreeMap::new());
                    }
                    let known = seen.neighbours.get_mut(link.name.as_str());
                    known.map(|known| known.insert(entry.address, entry.mac));
                }
            }
            self.neighbours = Some(entries);
        }
        Ok(())
    }

    /// The queues of the host's links. Costs nothing where nobody limits anything: a list of links
    /// names kinds of queues, and a redirect of ours leads to a link of ours.
    pub(super) async fn queues(
        &mut self,
        host: &Links,
        seen: &mut Seen,
    ) -> Result<(), KernelError> {
        let shaped = |link: &Link| link.queue == "tbf" || link.name.starts_with("tap");
        if self.links.values().any(|link| shaped(link) && !is_default(&link.queue)) {
            let queues = match self.queues.take() {
                Some(queues) => queues,
                None => host.queues().await?,
            };
            for queue in &queues {
                let Some(link) = self.links.get(&queue.link) else { continue };
                if let Some(link) = seen.links.get_mut(&At::host(link.name.clone())) {
                    link.queue = Some(queue.kind.clone());
                }
            }
            self.queues = Some(queues);
        }
        let taps: BTreeMap<&str, u32> = self
            .links
            .values()
            .filter_map(|link| Some((link.name.strip_prefix("tap")?, link.index)))
            .collect();
        for link in self.links.values().filter(|link| link.kind == LinkKind::Ifb) {
            let port = link.name.strip_prefix("ifb");
            let Some((port, &index)) = port.and_then(|port| taps.get_key_value(port)) else {
                continue;
            };
            let tap = At::host(format!("tap{port}"));
            let to = match self.redirects.get(&index) {
                Some(to) => *to,
                None => host.redirect(index, &tap.link).await?,
            };
            self.redirects.insert(index, to);
            if let Some(seen) = seen.links.get_mut(&tap) {
                let name = |to| self.links.get(&to).map(|link| SmolStr::from(&link.name));
                seen.redirect = to.map(|to| name(to).unwrap_or_default());
            }
        }
        Ok(())
    }
}

/// Kinds of queues that the kernel gives a link by itself.
fn is_default(kind: &str) -> bool {
    ["", "noop", "noqueue", "pfifo_fast", "fq_codel", "fq", "mq"].contains(&kind)
}

/// Files the links of one namespace under their names.
pub(super) fn take<'a>(
    seen: &mut Seen,
    indices: &mut BTreeMap<At, u32>,
    space: Option<&SmolStr>,
    links: impl Iterator<Item = &'a Link> + Clone,
    addresses: &[Address],
) {
    let names: BTreeMap<u32, &str> =
        links.clone().map(|link| (link.index, link.name.as_str())).collect();
    let mut by_link: BTreeMap<u32, BTreeSet<IpNet>> = BTreeMap::new();
    for address in addresses.iter().filter(|address| !is_the_kernels(address.net.addr())) {
        by_link.entry(address.link).or_default().insert(address.net);
    }
    for link in links {
        let at = At { space: space.cloned(), link: link.name.as_str().into() };
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
        let bridge = link.master.and_then(|index| names.get(&index)).map(SmolStr::new);
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

fn owner(link: &Link) -> Owner {
    match link.alias.as_deref().map(str::parse) {
        Some(Ok(mark)) => Owner::Ours(mark),
        None if link.group == UNFINISHED_GROUP => Owner::Unfinished,
        _ => Owner::Foreign(link.alias.clone()),
    }
}

/// Whose a namespace is, by its loopback link. One that is as empty as a new one and has no mark
/// is what a crash left.
pub(super) fn owner_of_space(links: &[Link]) -> Owner {
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
