//! Which host takes a new object: one in its zone, that reaches its networks, has room for it and
//! none of its anti-affinity group; among those the one with the most free memory, then with the
//! fewest of its kind, then by name.
//!
//! Pure: what agents told and hold goes in, a host or the reason why there is none comes out.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use stackhand_model::{Kind, ObjectRef, Spec};

use super::draft::{Draft, Drafts};
use super::expand::ANTI_AFFINITY;
use super::held::{Held, Place};
use super::hosts::host_of;

/// What of a host is taken or wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) vcpus: u64,
    pub(crate) memory_mib: u64,
}

/// What a host must have for a new object.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) kind: Kind,
    pub(crate) zone: Option<String>,
    pub(crate) size: Size,
    pub(crate) group: Option<String>,
    /// Physical networks that it must reach.
    pub(crate) physical: BTreeSet<String>,
}

/// What there is on every host.
pub(crate) struct Room<'a> {
    held: &'a Held,
    counts: BTreeMap<(Kind, String), usize>,
    taken: BTreeMap<String, Size>,
    groups: BTreeMap<String, BTreeSet<String>>,
    reached: BTreeMap<String, BTreeSet<String>>,
}

impl<'a> Room<'a> {
    /// What there is before anything of a manifest is placed.
    pub(crate) fn of(drafts: &Drafts, held: &'a Held) -> Self {
        let mut room = Self {
            held,
            counts: BTreeMap::new(),
            taken: BTreeMap::new(),
            groups: BTreeMap::new(),
            reached: reached(drafts, held),
        };
        for kind in [Kind::Instance, Kind::Router, Kind::Volume] {
            for document in held.of_kind(kind).values() {
                if let Some(host) = host_of(document)
                    && !drafts.contains_key(&document.object())
                {
                    let size = match &document.spec {
                        Spec::Instance(instance) => {
                            Size { vcpus: instance.vcpus.into(), memory_mib: instance.memory_mib }
                        }
                        _ => Size::default(),
                    };
                    let group = document.labels.get(ANTI_AFFINITY).map(String::as_str);
                    room.add(kind, host, size, group);
                }
            }
        }
        room
    }

    /// Places an object.
    pub(crate) fn add(&mut self, kind: Kind, host: &str, size: Size, group: Option<&str>) {
        *self.counts.entry((kind, host.to_owned())).or_default() += 1;
        let taken = self.taken.entry(host.to_owned()).or_default();
        taken.vcpus += size.vcpus;
        taken.memory_mib += size.memory_mib;
        if let Some(group) = group {
            self.groups.entry(group.to_owned()).or_default().insert(host.to_owned());
        }
    }

    /// Chooses a host.
    ///
    /// # Errors
    ///
    /// The first thing that no host has.
    pub(crate) fn choose(&self, wish: &Wish) -> Result<String, String> {
        let agent = wish.kind.agent();
        let mut hosts = self.held.open_hosts(agent);
        if hosts.is_empty() {
            return Err(nobody(wish.kind, self.held));
        }
        if let Some(zone) = &wish.zone {
            let zone_of =
                |host: &str| self.held.seats.get(&Place::new(agent, host)).map(|it| &it.zone);
            let zones: BTreeSet<&str> =
                hosts.iter().filter_map(|host| zone_of(host)).map(String::as_str).collect();
            let zones = zones.into_iter().collect::<Vec<_>>().join(", ");
            hosts.retain(|host| zone_of(host) == Some(zone));
            none_left(&hosts, || format!("no host is in zone {zone:?}; zones are {zones}"))?;
        }
        for physical in &wish.physical {
            let reaches =
                |host: &&str| self.reached.get(*host).is_some_and(|it| it.contains(physical));
            hosts.retain(reaches);
            none_left(&hosts, || {
                format!(
                    "no host reaches physical network {physical:?}: name its link under \
                     bridge_mappings of one, in the network agent's settings or its Host document"
                )
            })?;
        }
        if let Some(group) = &wish.group {
            let used = self.groups.get(group);
            hosts.retain(|host| !used.is_some_and(|used| used.contains(*host)));
            none_left(&hosts, || {
                format!("every host has one of the anti-affinity group {group:?} already")
            })?;
        }
        let told = hosts.iter().map(|host| self.tell(host)).collect::<Vec<_>>().join(", ");
        hosts.retain(|host| self.has_room(host, wish.size));
        none_left(&hosts, || {
            let Size { vcpus, memory_mib } = wish.size;
            format!("no host has {vcpus} vcpus and {memory_mib} MiB free: {told}")
        })?;
        let free = |host: &str| self.free(host).map_or(0, |free| free.memory_mib);
        let count =
            |host: &str| self.counts.get(&(wish.kind, host.to_owned())).copied().unwrap_or(0);
        // Memory decides about instances alone.
        let weight = |host: &str| if wish.kind == Kind::Instance { free(host) } else { 0 };
        let best = hosts.into_iter().min_by_key(|host| (Reverse(weight(host)), count(host), *host));
        best.map(str::to_owned).ok_or_else(|| nobody(wish.kind, self.held))
    }

    /// What is free on a host; unknown where its agent does not tell what it has.
    fn free(&self, host: &str) -> Option<Size> {
        let all = self.held.capacity.get(host)?;
        let taken = self.taken.get(host).copied().unwrap_or_default();
        Some(Size {
            vcpus: all.vcpus.saturating_sub(taken.vcpus),
            memory_mib: all.memory_mib.saturating_sub(taken.memory_mib),
        })
    }

    fn has_room(&self, host: &str, size: Size) -> bool {
        self.free(host)
            .is_none_or(|free| free.vcpus >= size.vcpus && free.memory_mib >= size.memory_mib)
    }

    fn tell(&self, host: &str) -> String {
        match self.free(host) {
            Some(Size { vcpus, memory_mib }) => {
                format!("{host} has {vcpus} vcpus and {memory_mib} MiB")
            }
            None => host.to_owned(),
        }
    }
}

fn none_left(hosts: &BTreeSet<&str>, why: impl FnOnce() -> String) -> Result<(), String> {
    if hosts.is_empty() { Err(why()) } else { Ok(()) }
}

/// Why no host can be chosen at all.
fn nobody(kind: Kind, held: &Held) -> String {
    let agent = kind.agent();
    let hosts: Vec<&str> = held.hosts(agent).into_iter().collect();
    if hosts.is_empty() {
        return format!("no host has a {}; start one, see `agentctl list`", agent.binary());
    }
    format!("no {} is up and enabled; hosts are {}", agent.binary(), hosts.join(", "))
}

/// The physical networks that each host has a link to, by its Host document.
fn reached(drafts: &Drafts, held: &Held) -> BTreeMap<String, BTreeSet<String>> {
    let mut reached: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for document in held.of_kind(Kind::Host).values() {
        if let Spec::Host(host) = &document.spec {
            let names = host.bridge_mappings.keys().cloned().collect();
            reached.insert(document.name.to_string(), names);
        }
    }
    for (_, draft) in drafts.iter().filter(|(object, _)| object.kind == Kind::Host) {
        let mappings = draft.field("bridge_mappings").and_then(|it| it.as_object());
        let names = mappings.into_iter().flat_map(|it| it.keys().cloned()).collect();
        reached.insert(draft.name().to_owned(), names);
    }
    reached
}

/// The physical network that a network is on.
pub(crate) fn physical_network(id: uuid::Uuid, drafts: &Drafts, held: &Held) -> Option<String> {
    let object = ObjectRef { kind: Kind::Network, id };
    match drafts.get(&object) {
        Some(draft) => draft.text("physical_network").map(str::to_owned),
        None => match &held.newest(object)?.spec {
            Spec::Network(network) => network.physical_network.clone(),
            _ => None,
        },
    }
}

/// The size of an instance that is being placed.
pub(crate) fn size_of(draft: &Draft) -> Size {
    let number = |field: &str| draft.field(field).and_then(serde_json::Value::as_u64).unwrap_or(0);
    Size { vcpus: number("vcpus"), memory_mib: number("memory_mib") }
}

#[cfg(test)]
mod tests {
    use super::super::held::Seat;
    use super::*;

    fn held(hosts: &[(&str, &str)]) -> Held {
        let mut held = Held::default();
        for (host, zone) in hosts {
            let zone = (*zone).to_owned();
            let seat = Seat { alive: true, enabled: true, zone, ..Seat::default() };
            held.seats.insert(Place::new(Kind::Instance.agent(), host), seat);
        }
        held
    }

    fn wish(memory_mib: u64) -> Wish {
        Wish {
            kind: Kind::Instance,
            zone: None,
            size: Size { vcpus: 1, memory_mib },
            group: None,
            physical: BTreeSet::new(),
        }
    }

    #[test]
    fn the_host_with_the_most_free_memory_is_chosen_and_a_full_one_is_not() {
        let mut held = held(&[("a", "z"), ("b", "z")]);
        for (host, memory_mib) in [("a", 1000), ("b", 900)] {
            held.capacity.insert(host.to_owned(), Size { vcpus: 4, memory_mib });
        }
        let mut room = Room::of(&Drafts::new(), &held);
        let mut chosen = Vec::new();
        for _ in 0..3 {
            let host = room.choose(&wish(600)).unwrap_or_else(|problem| problem);
            room.add(Kind::Instance, &host, wish(600).size, None);
            chosen.push(host);
        }
        let full = "no host has 1 vcpus and 600 MiB free: a has 3 vcpus and 400 MiB, b has 3 vcpus and 300 MiB";
        assert_eq!(chosen, ["a", "b", full]);
    }

    #[test]
    fn a_zone_a_group_and_a_physical_network_narrow_the_choice_or_say_why_not() {
        let held = held(&[("a", "north"), ("b", "south")]);
        let mut room = Room::of(&Drafts::new(), &held);
        let south = Wish { zone: Some("south".into()), ..wish(1) };
        assert_eq!(room.choose(&south), Ok("b".into()));
        let east = Wish { zone: Some("east".into()), ..wish(1) };
        let problem = "no host is in zone \"east\"; zones are north, south";
        assert_eq!(room.choose(&east), Err(problem.into()));

        let group = Wish { group: Some("web".into()), ..wish(1) };
        for expected in ["a", "b"] {
            assert_eq!(room.choose(&group), Ok(expected.into()));
            room.add(Kind::Instance, expected, Size::default(), Some("web"));
        }
        assert!(room.choose(&group).unwrap_err().contains("anti-affinity group \"web\""));

        let outside = Wish { physical: ["ext".to_owned()].into(), ..wish(1) };
        assert!(room.choose(&outside).unwrap_err().contains("physical network \"ext\""));
        room.reached.insert("b".into(), ["ext".to_owned()].into());
        assert_eq!(room.choose(&outside), Ok("b".into()));
    }
}
