//! What documents say about the taps of this host, as sets and rules. Pure.
//!
//! A [`Guard`] is a tap that is filtered: what its guest may send from, and the groups whose rules
//! allow its traffic. A port with `port_security` off has none, nor has one of a router or of a
//! DHCP server, whose traffic is ours.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use stackhand_model::{Document, MacAddr, NetworkId, ObjectRef, PortId, SecurityGroupId, Spec};
use stackhand_model::{PortOwner, PortSpec, SecurityGroupSpec};
use stackhand_runtime::agent::Desired;

use crate::names;
use crate::qos::PacketRules;

/// The firewall that is wanted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Model {
    /// Filtered ports of this host.
    pub guards: BTreeMap<PortId, Guard>,
    /// Groups that a guard names and of which there is a document.
    pub groups: BTreeMap<SecurityGroupId, Group>,
    /// Addresses of the members of groups that rules name as the other side.
    pub members: BTreeMap<SecurityGroupId, BTreeSet<IpNet>>,
    /// By link: packet rates and marks, of ports that are filtered or not.
    pub packets: BTreeMap<String, PacketRules>,
    /// Bridges of networks that have guards here.
    pub bridges: BTreeMap<NetworkId, String>,
    /// Whether a bridge is there whose packets the IP layer is yet to be shown: until then rules of
    /// `iptables` hold nothing back.
    pub unshown: bool,
    /// Zones in which another agent tracked the flows of bridges that are ours now, by bridge.
    pub zones: BTreeMap<String, u16>,
    /// Taps that no document speaks of, but that are left alone for a while: so are their rules.
    pub spared: BTreeSet<String>,
    /// Why a port or group is not wholly enforced.
    pub lacking: BTreeMap<ObjectRef, String>,
}

/// The document of a security group, shared because it may be long.
#[derive(Clone, Debug)]
pub struct Group(Arc<Document>);

impl Group {
    /// The group, if the document is of one.
    #[must_use]
    pub fn of(document: &Arc<Document>) -> Option<Self> {
        matches!(document.spec, Spec::SecurityGroup(_)).then(|| Self(Arc::clone(document)))
    }

    /// What it allows.
    #[must_use]
    pub fn spec(&self) -> &SecurityGroupSpec {
        static NOTHING: SecurityGroupSpec = SecurityGroupSpec { stateful: true, rules: Vec::new() };
        match &self.0.spec {
            Spec::SecurityGroup(spec) => spec,
            _ => &NOTHING,
        }
    }
}

impl PartialEq for Group {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.spec() == other.spec()
    }
}

/// A filtered port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// Its tap.
    pub tap: String,
    /// Its network.
    pub network: NetworkId,
    /// Addresses that it may send from.
    pub sources: BTreeSet<(MacAddr, IpNet)>,
    /// Groups whose rules allow its traffic.
    pub groups: BTreeSet<SecurityGroupId>,
    /// Whether answers of allowed flows pass.
    pub stateful: bool,
    /// Whether anything passes at all; not if it is administratively down or about to go.
    pub open: bool,
}

impl Guard {
    /// Whether `address` is one that it may send from.
    #[must_use]
    pub fn has(&self, address: IpAddr) -> bool {
        self.sources.iter().any(|(_, net)| net.contains(&address))
    }

    /// Ethernet addresses that it may send from.
    #[must_use]
    pub fn macs(&self) -> BTreeSet<MacAddr> {
        self.sources.iter().map(|(mac, _)| *mac).collect()
    }
}

/// The ports and groups whose elements differ between two models.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Ports.
    pub guards: BTreeSet<PortId>,
    /// Groups whose members came or went.
    pub members: BTreeSet<SecurityGroupId>,
    /// Links whose rates or marks differ.
    pub packets: BTreeSet<String>,
}

/// What the host tells that documents do not.
pub struct Surroundings<'a> {
    /// The host's name.
    pub host: &'a str,
    /// Bridges of the networks that are wired here.
    pub bridges: BTreeMap<NetworkId, String>,
    /// Whether a link of this name is there.
    pub has_link: &'a dyn Fn(&str) -> bool,
    /// Taps with our mark of which no document speaks.
    pub orphans: BTreeSet<String>,
    /// Ports that have no link because another has one of that name.
    pub barred: BTreeSet<ObjectRef>,
}

impl std::fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Surroundings").field("host", &self.host).finish_non_exhaustive()
    }
}

/// Whether the firewall and anti-spoofing are for this port.
#[must_use]
pub fn is_guarded(port: &PortSpec) -> bool {
    port.port_security && matches!(port.owner, PortOwner::Instance | PortOwner::External)
}

impl Model {
    /// Computes the model from all documents.
    #[must_use]
    pub fn new(desired: &Desired, around: Surroundings<'_>) -> Self {
        let mut groups: BTreeMap<SecurityGroupId, Group> = BTreeMap::new();
        let mut ports: BTreeMap<PortId, (&PortSpec, bool)> = BTreeMap::new();
        for (object, held) in &desired.objects {
            match &held.document.spec {
                Spec::SecurityGroup(_) if !held.deleting => {
                    groups.extend(
                        Group::of(&held.document).map(|it| (SecurityGroupId(object.id), it)),
                    );
                }
                Spec::Port(port) => {
                    ports.insert(PortId(object.id), (port, held.deleting));
                }
                _ => {}
            }
        }
        let mut model = Self { spared: around.orphans, ..Self::default() };
        for (&id, &(port, deleting)) in &ports {
            let is_barred = around.barred.contains(&id.object());
            if port.host != around.host || !is_guarded(port) || is_barred {
                continue;
            }
            let tap = names::tap(id);
            // A port to go is shut until its link is gone.
            if deleting && !(around.has_link)(&tap) {
                continue;
            }
            if let Some(bridge) = around.bridges.get(&port.network) {
                model.bridges.insert(port.network, bridge.clone());
            }
            model.guard(id, port, tap.into(), deleting, &groups);
        }
        model.members(&ports, &groups);
        model
    }

    fn guard(
        &mut self,
        id: PortId,
        port: &PortSpec,
        tap: String,
        deleting: bool,
        groups: &BTreeMap<SecurityGroupId, Group>,
    ) {
        let mut known = BTreeSet::new();
        for group in &port.security_groups {
            if let Some(spec) = groups.get(group) {
                known.insert(*group);
                self.groups.entry(*group).or_insert_with(|| spec.clone());
            } else if !deleting {
                self.lacking.entry(id.object()).or_insert_with(|| {
                    format!(
                        "spec.security_groups: waits for the document of SecurityGroup {group}; \
                         until it comes, the group allows nothing"
                    )
                });
            }
        }
        let stateful = known.is_empty() || known.iter().any(|group| groups[group].spec().stateful);
        let open = port.admin_up && !deleting;
        let sources = sources(port);
        let network = port.network;
        self.guards.insert(id, Guard { tap, network, sources, groups: known, stateful, open });
    }

    /// Members of the groups that rules name, wherever they are.
    fn members(
        &mut self,
        ports: &BTreeMap<PortId, (&PortSpec, bool)>,
        groups: &BTreeMap<SecurityGroupId, Group>,
    ) {
        for (&id, group) in &self.groups {
            for (index, rule) in group.spec().rules.iter().enumerate() {
                let Some(remote) = rule.remote_group else { continue };
                self.members.entry(remote).or_default();
                if !groups.contains_key(&remote) {
                    self.lacking.entry(id.object()).or_insert_with(|| {
                        format!(
                            "spec.rules[{index}].remote_group: no document of SecurityGroup \
                             {remote} is here; the rule allows only ports that name it"
                        )
                    });
                }
            }
        }
        for (port, _) in ports.values().filter(|(_, deleting)| !deleting) {
            for group in &port.security_groups {
                if let Some(members) = self.members.get_mut(group) {
                    members.extend(port.fixed_ips.iter().map(|fixed| IpNet::from(fixed.address)));
                    members
                        .extend(port.allowed_address_pairs.iter().map(|pair| pair.address.trunc()));
                }
            }
        }
    }

    /// Where elements differ from those of `before`.
    #[must_use]
    pub fn touched(&self, before: &Self) -> Touched {
        // Where nobody is filtered there is no table, and so nobody is a member.
        let nobody = BTreeMap::new();
        let [now, was] =
            [self, before].map(|it| if it.guards.is_empty() { &nobody } else { &it.members });
        Touched {
            guards: differing(&self.guards, &before.guards),
            members: differing(now, was),
            packets: differing(&self.packets, &before.packets),
        }
    }

    /// The guards by what they may send from, to find those of many addresses.
    #[must_use]
    pub fn by_address(&self) -> ByAddress {
        let mut found = ByAddress::default();
        for (&id, guard) in &self.guards {
            for (_, net) in &guard.sources {
                if net.prefix_len() == net.max_prefix_len() {
                    found.single.entry((guard.network, net.addr())).or_insert(id);
                } else {
                    found.ranges.push((guard.network, *net, id));
                }
            }
        }
        found
    }
}

/// Guards by what they may send from.
#[derive(Clone, Debug, Default)]
pub struct ByAddress {
    single: BTreeMap<(NetworkId, IpAddr), PortId>,
    ranges: Vec<(NetworkId, IpNet, PortId)>,
}

impl ByAddress {
    /// The port that has `address` on a network.
    #[must_use]
    pub fn find(&self, network: NetworkId, address: IpAddr) -> Option<PortId> {
        let of_range = || {
            let range = |(on, net, _): &&(NetworkId, IpNet, PortId)| {
                *on == network && IpNet::contains(net, &address)
            };
            self.ranges.iter().find(range).map(|(_, _, port)| *port)
        };
        self.single.get(&(network, address)).copied().or_else(of_range)
    }
}

/// The keys under which two maps hold something else.
fn differing<K: Ord + Clone, V: PartialEq>(
    one: &BTreeMap<K, V>,
    other: &BTreeMap<K, V>,
) -> BTreeSet<K> {
    let changed = one.iter().filter(|(key, value)| other.get(key) != Some(value));
    let gone = other.keys().filter(|key| !one.contains_key(key));
    changed.map(|(key, _)| key).chain(gone).cloned().collect()
}

/// What a port may send from: its own addresses, its pairs, and the link-local address that each
/// of its Ethernet addresses gives.
fn sources(port: &PortSpec) -> BTreeSet<(MacAddr, IpNet)> {
    let own = port.fixed_ips.iter().map(|fixed| (port.mac, IpNet::from(fixed.address)));
    let pairs = port
        .allowed_address_pairs
        .iter()
        .map(|pair| (pair.mac.unwrap_or(port.mac), pair.address.trunc()));
    let mut sources: BTreeSet<(MacAddr, IpNet)> = own.chain(pairs).collect();
    let macs: BTreeSet<MacAddr> = sources.iter().map(|(mac, _)| *mac).chain([port.mac]).collect();
    sources.extend(macs.into_iter().map(|mac| (mac, IpNet::from(IpAddr::V6(mac.link_local())))));
    sources
}
