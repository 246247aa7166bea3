//! From what is wanted and what is seen to what is done. Pure: no clock, no I/O.
//!
//! Order: make room for what must be made anew; namespaces; bridges; what goes into them;
//! addresses; forwarding, additions first; and last what is not wanted any more, taps before
//! bridges, all in one request per namespace.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use smol_str::SmolStr;
use stackhand_kernel::netlink::{QueueKind, Routing, Shaper};
use stackhand_model::ObjectRef;

use super::{At, Change, Forwarding, Make, Owner, Seen, SeenKind, SeenLink, Set, Wanted, Wish};
use crate::names::{self, Mark};

/// One change, and the object it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The object; `None` for the sweeping of orphans.
    pub object: Option<ObjectRef>,
    /// The change.
    pub change: Change,
}

/// What to do, and what cannot be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In order.
    pub steps: Vec<Step>,
    /// What stands in an object's way until somebody else acts.
    pub problems: BTreeMap<ObjectRef, String>,
    /// Objects that wait for somebody else's link.
    pub waiting: BTreeMap<ObjectRef, String>,
    /// Links and namespaces (with an empty link name) that bear the mark of an object nobody knows.
    /// Those in the `sweep` given to [`plan()`] are deleted by its steps.
    pub orphans: BTreeSet<At>,
}

/// Compares what is wanted with what is seen. Orphans are deleted if they are in `sweep`.
#[must_use]
pub fn plan(wish: &Wish, seen: &Seen, sweep: &BTreeSet<At>) -> Plan {
    let mut planner = Planner {
        wish,
        seen,
        plan: Plan::default(),
        remade: BTreeSet::new(),
        barred: BTreeSet::new(),
    };
    let doomed = planner.unwanted(sweep);
    planner.make_room(sweep);
    planner.spaces();
    let is_bridge = |wanted: &Wanted| matches!(wanted.make, Make::Bridge);
    for (at, wanted) in wish.links.iter().filter(|(_, wanted)| is_bridge(wanted)) {
        planner.link(at, wanted);
    }
    // A pair's host end first: it makes the other.
    for own in [true, false] {
        for (at, wanted) in &wish.links {
            if !is_bridge(wanted) && at.space.is_none() == own {
                planner.link(at, wanted);
            }
        }
    }
    planner.forwarding();
    planner.neighbours();
    planner.release();
    planner.delete(doomed);
    planner.plan
}

struct Planner<'a> {
    wish: &'a Wish,
    seen: &'a Seen,
    plan: Plan,
    /// Links that are deleted first to be made anew.
    remade: BTreeSet<At>,
    /// Bridges under names of ours that are not ours: nothing is put into them.
    barred: BTreeSet<SmolStr>,
}

/// What is deleted last: by namespace, with the object each link served.
#[derive(Default)]
struct Doomed {
    links: BTreeMap<Option<SmolStr>, Vec<(At, Option<ObjectRef>)>>,
    spaces: BTreeMap<SmolStr, Option<ObjectRef>>,
}

impl<'a> Planner<'a> {
    fn step(&mut self, object: Option<ObjectRef>, change: Change) {
        self.plan.steps.push(Step { object, change });
    }

    fn problem(&mut self, object: ObjectRef, text: String) {
        self.plan.problems.entry(object).or_insert(text);
    }

    /// The link as seen, unless it is deleted first.
    fn present(&self, at: &At) -> Option<&'a SeenLink> {
        self.seen.links.get(at).filter(|_| !self.remade.contains(at))
    }

    /// Whether `link` is for us to change for the sake of `mark`.
    fn is_ours(link: &SeenLink, mark: Mark) -> bool {
        link.owner == Owner::Unfinished || link.owner == Owner::Ours(mark)
    }

    /// Finds what bears our mark and is not wanted.
    fn unwanted(&mut self, sweep: &BTreeSet<At>) -> Doomed {
        let mut doomed = Doomed::default();
        for (space, owner) in &self.seen.spaces {
            if self.wish.spaces.contains_key(space) {
                continue;
            }
            let Owner::Ours(mark) = owner else { continue };
            let held = self.wish.known.contains(&mark.object());
            let at = At::inside(space.clone(), "");
            if !held {
                self.plan.orphans.insert(at.clone());
            }
            if held || sweep.contains(&at) {
                doomed.spaces.insert(space.clone(), held.then(|| mark.object()));
            }
        }
        for (at, link) in &self.seen.links {
            let leaves_with_space =
                at.space.as_ref().is_some_and(|space| doomed.spaces.contains_key(space));
            if self.wish.links.contains_key(at)
                || link.kind == SeenKind::Loopback
                || leaves_with_space
            {
                continue;
            }
            let object = match &link.owner {
                Owner::Ours(mark) => Some(mark.object()),
                Owner::Unfinished if names::may_matter(&at.link) => None,
                Owner::Unfinished | Owner::Foreign(_) => continue,
            };
            let object = object.filter(|object| self.wish.known.contains(object));
            if object.is_none() {
                self.plan.orphans.insert(at.clone());
            }
            if object.is_some() || sweep.contains(at) {
                doomed.links.entry(at.space.clone()).or_default().push((at.clone(), object));
            }
        }
        doomed
    }

    /// Deletes links of ours that cannot be changed into what is wanted, or that served another
    /// object which does not want them any more.
    fn make_room(&mut self, sweep: &BTreeSet<At>) {
        let mut doomed: BTreeMap<Option<SmolStr>, (ObjectRef, Vec<At>)> = BTreeMap::new();
        for (at, wanted) in &self.wish.links {
            let Some(mark) = wanted.set.mark else { continue };
            let Some(link) = self.seen.links.get(at) else { continue };
            match &link.owner {
                Owner::Ours(other) if *other != mark => {
                    let other = other.object();
                    let known = self.wish.known.contains(&other);
                    if !known {
                        self.plan.orphans.insert(at.clone());
                    }
                    if self.is_contested(at, other) || !(known || sweep.contains(at)) {
                        continue;
                    }
                }
                Owner::Foreign(_) => continue,
                _ if self.fits(at, wanted, link) => continue,
                _ => {}
            }
            doomed
                .entry(at.space.clone())
                .or_insert((wanted.object, Vec::new()))
                .1
                .push(at.clone());
            self.remade.insert(at.clone());
            if let Make::Pair { peer, .. } = &wanted.make {
                self.remade.insert(peer.clone());
            }
        }
        for (_, (object, links)) in doomed {
            self.step(Some(object), Change::Delete { links });
        }
    }

    /// Whether another object wants the link, too, and so keeps it.
    fn is_contested(&self, at: &At, other: ObjectRef) -> bool {
        self.wish.contested.contains(&(at.clone(), other))
    }

    /// Whether the link is one that OpenStack's Linux bridge agent left, and ours to adopt: nobody's
    /// mark is on it, and under a name derived from this object it is what that object wants.
    fn is_left_behind(&self, at: &At, wanted: &Wanted, link: &SeenLink) -> bool {
        self.wish.takeover && link.owner == Owner::Foreign(None) && self.fits(at, wanted, link)
    }

    /// What the operator of a host of that agent has to know, if this could be one.
    fn how_to_adopt(&self, at: &At, wanted: &Wanted, link: &SeenLink) -> String {
        if link.owner != Owner::Foreign(None) {
            return String::new();
        }
        match (&wanted.make, &link.kind) {
            _ if self.fits(at, wanted, link) => {
                ", or, if OpenStack's Linux bridge agent left it, set network.takeover = true"
                    .to_owned()
            }
            (Make::Vxlan(want), SeenKind::Vxlan(is)) if want.port != is.port => format!(
                "; it uses UDP port {}, and this agent {}: network.vxlan_port must be the same to \
                 take it over",
                is.port, want.port
            ),
            _ => String::new(),
        }
    }

    /// Whether the link can become what is wanted by changing settings.
    fn fits(&self, at: &At, wanted: &Wanted, link: &SeenLink) -> bool {
        match (&wanted.make, &link.kind) {
            (Make::Bridge, SeenKind::Bridge(_))
            | (Make::Ifb, SeenKind::Ifb)
            | (Make::Brought, _)
            | (Make::PairEnd, SeenKind::Pair)
            | (Make::Loopback, SeenKind::Loopback) => true,
            // A tap in use is left as it is: the guest would lose its link. It is made anew
            // when the guest has let go of it.
            (Make::Tap(tap), SeenKind::Tap(is)) => {
                tap.multi_queue == is.multi_queue || link.carrier
            }
            // Whether it learns can be changed.
            (Make::Vxlan(want), SeenKind::Vxlan(is)) => {
                (want.vni, want.local, want.port) == (is.vni, is.local, is.port)
            }
            (Make::Vlan { parent, id }, SeenKind::Vlan { parent: on, id: is }) => {
                on.as_ref() == Some(parent) && id == is
            }
            (Make::Gre(gre), SeenKind::Gre(is)) => gre == is,
            (Make::Geneve(geneve), SeenKind::Geneve(is)) => geneve == is,
            (Make::Pair { peer, .. }, SeenKind::Pair) => {
                debug_assert!(at.space.is_none(), "pairs are made from the host's side");
                self.seen.links.get(peer).is_some_and(|end| end.kind == SeenKind::Pair)
            }
            _ => false,
        }
    }

    fn spaces(&mut self) {
        for (space, mark) in &self.wish.spaces {
            match self.seen.spaces.get(space) {
                Some(Owner::Ours(is)) if is == mark => continue,
                Some(Owner::Foreign(alias)) if alias.is_some() || !self.wish.takeover => {
                    let text = foreign(&format!("namespace {space}"), alias.as_deref());
                    self.problem(mark.object(), text);
                    continue;
                }
                Some(Owner::Ours(other)) => {
                    let text = format!("namespace {space} belongs to {}", other.object());
                    self.problem(mark.object(), text);
                    continue;
                }
                None | Some(Owner::Unfinished | Owner::Foreign(_)) => {}
            }
            let change = Change::MakeSpace { space: space.clone(), mark: *mark };
            self.step(Some(mark.object()), change);
        }
    }

    /// Whether the namespace cannot be used because it is not ours.
    fn is_barred(&self, space: &str) -> bool {
        let wanted = self.wish.spaces.get(space);
        match self.seen.spaces.get(space) {
            None | Some(Owner::Unfinished) => false,
            Some(Owner::Foreign(alias)) => alias.is_some() || !self.wish.takeover,
            Some(Owner::Ours(mark)) => Some(mark) != wanted,
        }
    }

    fn link(&mut self, at: &At, wanted: &Wanted) {
        let peer_space = match &wanted.make {
            Make::Pair { peer, .. } => peer.space.as_deref(),
            _ => at.space.as_deref(),
        };
        if peer_space.is_some_and(|space| self.is_barred(space)) {
            return;
        }
        if let Some(Some(bridge)) = &wanted.set.bridge
            && self.barred.contains(bridge)
        {
            return;
        }
        let Some(link) = self.present(at) else {
            return self.make(at, wanted);
        };
        if let Some(mark) = wanted.set.mark
            && !Self::is_ours(link, mark)
            && !self.is_left_behind(at, wanted, link)
        {
            let text = match &link.owner {
                Owner::Ours(other) if self.is_contested(at, other.object()) => format!(
                    "link {at} belongs to {}, which wants it, too; give one of the two another id \
                     or segment",
                    other.object()
                ),
                Owner::Ours(other) => format!(
                    "link {at} served {}, of which no document speaks; it is freed after \
                     network.orphan_grace_seconds",
                    other.object()
                ),
                Owner::Foreign(alias) => {
                    let text = foreign(&format!("link {at}"), alias.as_deref());
                    format!("{text}{}", self.how_to_adopt(at, wanted, link))
                }
                Owner::Unfinished => return,
            };
            if wanted.make == Make::Bridge {
                self.barred.insert(at.link.clone());
            }
            return self.problem(wanted.object, text);
        }
        let mut set = difference(&wanted.set, link);
        // The Linux bridge agent moves the host's own addresses to the bridge of a flat network: its
        // neighbours know it by this address.
        if wanted.make == Make::Bridge && link.addresses.iter().any(|net| net.addr().is_ipv4()) {
            (set.mac, set.ipv6_off) = (None, None);
        }
        if let (Some(Some(_)), Some(QueueKind::Other(kind))) = (set.shaper, &link.queue) {
            let text = format!(
                "link {at} has a {kind} queue that is not ours; delete it by `tc qdisc delete dev \
                 {} root`",
                at.link
            );
            return self.problem(wanted.object, text);
        }
        if wanted.set.mark.is_none() && self.is_in_foreign_bridge(wanted, link) {
            let bridge = link.bridge.as_deref().unwrap_or_default();
            let text = format!(
                "link {at} is a port of {bridge}, which is not ours; take it out, for instance by \
                 `ip link set {} nomaster`",
                at.link
            );
            return self.problem(wanted.object, text);
        }
        let has = &link.addresses;
        if !set.is_empty() {
            self.step(Some(wanted.object), Change::Set { at: at.clone(), set });
        }
        let Some(addresses) = &wanted.addresses else { return };
        for net in addresses.iter().filter(|net| !has.contains(net)) {
            let change = Change::AddAddress { at: at.clone(), net: *net };
            self.step(Some(wanted.object), change);
        }
        let unwanted = |net: &&IpNet| !addresses.contains(net) && !net.addr().is_loopback();
        for net in has.iter().filter(unwanted) {
            let change = Change::RemoveAddress { at: at.clone(), net: *net };
            self.step(Some(wanted.object), change);
        }
    }

    /// Whether a link that somebody else brought is in a bridge that we did not make.
    fn is_in_foreign_bridge(&self, wanted: &Wanted, link: &SeenLink) -> bool {
        let (Some(wanted), Some(bridge)) = (&wanted.set.bridge, &link.bridge) else { return false };
        if wanted.as_ref() == Some(bridge) {
            return false;
        }
        let master = self.seen.links.get(&At::host(bridge.clone()));
        !matches!(master.map(|master| &master.owner), Some(Owner::Ours(_) | Owner::Unfinished))
    }

    fn make(&mut self, at: &At, wanted: &Wanted) {
        match &wanted.make {
            Make::Brought => {
                let text = format!("waits for link {at}, which somebody else brings");
                self.plan.waiting.insert(wanted.object, text);
                return;
            }
            Make::PairEnd | Make::Loopback if self.plan.problems.contains_key(&wanted.object) => {
                return;
            }
            // Comes with the namespace, marked and up.
            Make::Loopback => {}
            // Made with the other end; what the other end's making leaves open is set here.
            Make::PairEnd => {
                let set = Set { mac: None, mtu: None, ..wanted.set.clone() };
                self.step(Some(wanted.object), Change::Set { at: at.clone(), set });
            }
            make => {
                if let Some((taken, by)) = self.rival(make) {
                    let text =
                        format!("{taken} is taken by link {by}; delete it or choose another");
                    return self.problem(wanted.object, text);
                }
                let change =
                    Change::Make { at: at.clone(), make: make.clone(), set: wanted.set.clone() };
                self.step(Some(wanted.object), change);
            }
        }
        for net in wanted.addresses.iter().flatten() {
            let change = Change::AddAddress { at: at.clone(), net: *net };
            self.step(Some(wanted.object), change);
        }
    }

    /// The link of another name that already has what only one link can have, and what that is.
    fn rival(&self, make: &Make) -> Option<(String, At)> {
        let others = self.seen.links.iter().filter(|(at, link)| {
            // Ours goes by itself, if it is not wanted any more.
            at.space.is_none()
                && !self.remade.contains(at)
                && matches!(link.owner, Owner::Foreign(_))
        });
        let family = |local: Option<std::net::IpAddr>| local.is_none_or(|local| local.is_ipv4());
        others.into_iter().find_map(|(at, link)| {
            let taken = match (make, &link.kind) {
                (Make::Vxlan(want), SeenKind::Vxlan(is))
                    if (want.vni, want.port) == (is.vni, is.port)
                        && family(want.local) == family(is.local) =>
                {
                    format!("VNI {} on UDP port {}", want.vni, want.port)
                }
                (Make::Vlan { parent, id }, SeenKind::Vlan { parent: Some(on), id: is })
                    if parent == on && id == is =>
                {
                    format!("VLAN {id} of link {parent}")
                }
                (Make::Gre(want), SeenKind::Gre(is)) if want == is => {
                    format!("GRE key {} to {}", want.key, want.remote)
                }
                (Make::Geneve(want), SeenKind::Geneve(is)) if want == is => {
                    format!("Geneve VNI {} to {}", want.vni, want.remote)
                }
                _ => return None,
            };
            Some((taken, at.clone()))
        })
    }

    /// Whether forwarding by this link is for us to set: it is ours, or will be made.
    fn object_of(&self, link: &str) -> Option<ObjectRef> {
        let wanted = self.wish.links.get(&At::host(link))?;
        (!self.plan.problems.contains_key(&wanted.object)).then_some(wanted.object)
    }

    fn forwarding(&mut self) {
        let none = Forwarding::default();
        let mut removals = Vec::new();
        for (name, want) in &self.wish.forwarding {
            let Some(object) = self.object_of(name) else { continue };
            let remade = self.remade.contains(&At::host(name.clone()));
            let has = self.seen.forwarding.get(name).filter(|_| !remade).unwrap_or(&none);
            let link = || name.clone();
            for (mac, vias) in &want.unicast {
                if has.unicast.get(mac) != Some(vias) {
                    for via in vias {
                        let change = Change::Forward { link: link(), mac: Some(*mac), via: *via };
                        self.step(Some(object), change);
                    }
                }
            }
            for via in want.flood.difference(&has.flood) {
                self.step(Some(object), Change::Forward { link: link(), mac: None, via: *via });
            }
            for mac in want.in_bridge.difference(&has.in_bridge) {
                self.step(Some(object), Change::Place { link: link(), mac: *mac });
            }
            for mac in has.in_bridge.difference(&want.in_bridge) {
                removals.push((object, Change::Unplace { link: link(), mac: *mac }));
            }
            for via in has.flood.difference(&want.flood) {
                removals.push((object, Change::Unforward { link: link(), mac: None, via: *via }));
            }
            for (mac, vias) in &has.unicast {
                if !want.unicast.contains_key(mac) {
                    removals.extend(vias.iter().map(|via| {
                        (object, Change::Unforward { link: link(), mac: Some(*mac), via: *via })
                    }));
                }
            }
        }
        for (object, change) in removals {
            self.step(Some(object), change);
        }
    }

    fn neighbours(&mut self) {
        let none = BTreeMap::new();
        for (bridge, want) in &self.wish.neighbours {
            let Some(object) = self.object_of(bridge) else { continue };
            let remade = self.remade.contains(&At::host(bridge.clone()));
            let has = self.seen.neighbours.get(bridge).filter(|_| !remade).unwrap_or(&none);
            for (&address, &mac) in want {
                if has.get(&address) != Some(&mac) {
                    let change = Change::Answer { bridge: bridge.clone(), address, mac };
                    self.step(Some(object), change);
                }
            }
            for (&address, &mac) in has {
                if !want.contains_key(&address) {
                    let change = Change::Unanswer { bridge: bridge.clone(), address, mac };
                    self.step(Some(object), change);
                }
            }
        }
    }

    /// Takes links that somebody else brought out of our bridges.
    fn release(&mut self) {
        for (at, object) in &self.wish.released {
            let Some(link) = self.seen.links.get(at) else { continue };
            let Some(bridge) = &link.bridge else { continue };
            let master = self.seen.links.get(&At::host(bridge.clone()));
            if matches!(master.map(|master| &master.owner), Some(Owner::Ours(_)))
                && matches!(link.owner, Owner::Foreign(_))
            {
                let set = Set { bridge: Some(None), ..Set::default() };
                self.step(Some(*object), Change::Set { at: at.clone(), set });
            }
        }
    }

    fn delete(&mut self, doomed: Doomed) {
        for (_, links) in doomed.links {
            // One request for all; it is told under the object only if they share one.
            let mut objects: BTreeSet<Option<ObjectRef>> =
                links.iter().map(|(_, object)| *object).collect();
            let object = if objects.len() == 1 { objects.pop_first().flatten() } else { None };
            let links = links.into_iter().map(|(at, _)| at).collect();
            self.step(object, Change::Delete { links });
        }
        for (space, object) in doomed.spaces {
            self.step(object, Change::DeleteSpace { space });
        }
    }
}

/// What has to be set so that `link` is as wanted.
fn difference(wanted: &Set, link: &SeenLink) -> Set {
    let as_bridge = match &link.kind {
        SeenKind::Bridge(bridge) => wanted.as_bridge.filter(|want| want != bridge),
        _ => None,
    };
    let bridge = wanted.bridge.clone().filter(|bridge| *bridge != link.bridge);
    // A link that enters a bridge starts with the kernel's defaults.
    let port = if bridge.is_some() { Default::default() } else { link.port };
    Set {
        mark: wanted.mark.filter(|mark| link.owner != Owner::Ours(*mark)),
        mac: wanted.mac.filter(|mac| Some(*mac) != link.mac),
        mtu: wanted.mtu.filter(|mtu| *mtu != link.mtu),
        bridge,
        up: wanted.up.filter(|up| *up != link.up),
        ipv6_off: wanted.ipv6_off.filter(|off| *off != link.ipv6_off),
        port: wanted.port.filter(|want| *want != port),
        as_bridge,
        learning: match &link.kind {
            SeenKind::Vxlan(is) => wanted.learning.filter(|want| *want != is.learning),
            _ => None,
        },
        shaper: wanted.shaper.filter(|want| !is_shaped(want.as_ref(), link.queue.as_ref())),
        redirect: wanted.redirect.clone().filter(|want| *want != link.redirect),
        routing: wanted.routing.filter(|want| {
            let v6 = link.routing.v6.and(want.v6);
            Routing { v6, ..*want } != link.routing
        }),
    }
}

/// Whether a link's queue is what is wanted of it. Other people's queues stay where none of ours is
/// wanted.
fn is_shaped(want: Option<&Shaper>, is: Option<&QueueKind>) -> bool {
    match (want, is) {
        (Some(want), Some(QueueKind::Shaper(is))) => want.is_about(is),
        (Some(_), _) | (None, Some(QueueKind::Shaper(_))) => false,
        (None, _) => true,
    }
}

fn foreign(what: &str, alias: Option<&str>) -> String {
    let alias = alias.map(|alias| format!(" (its alias is {alias:?})")).unwrap_or_default();
    format!("{what} exists and is not ours{alias}; delete or rename it")
}
