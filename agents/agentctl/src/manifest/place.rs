//! Who needs which document.
//!
//! An agent gets what is to be on its host and all that this refers to. A network that lives on a
//! host brings the ports it has elsewhere, from which the host fills its forwarding tables and
//! the members of security groups, and the documents of the hosts that have them.
//!
//! Pure: the documents of the whole cloud go in, the needs of each agent come out.

use std::collections::{BTreeMap, BTreeSet};

use stackhand_model::{AgentKind, Document, Kind, ObjectRef, PortSpec, RouterId, Spec};
use uuid::Uuid;

use super::check::references;
use super::held::Place;

/// The documents that each agent needs.
pub(crate) type Needs = BTreeMap<Place, BTreeSet<ObjectRef>>;

/// Works out the needs of all agents. `places` are the agents that exist; in a cloud of one host
/// (`--local`) they get everything.
pub(crate) fn needs(
    world: &BTreeMap<ObjectRef, Document>,
    places: &BTreeSet<Place>,
    local: bool,
) -> Needs {
    let mut needs = Needs::new();
    if local {
        for place in places {
            let theirs = world.keys().filter(|object| object.kind.agent() == place.agent);
            needs.insert(place.clone(), theirs.copied().collect());
        }
        return needs;
    }
    let world = World::of(world);
    world.network(&mut needs);
    world.compute(&mut needs);
    world.storage(&mut needs);
    world.keep(&mut needs, places);
    needs
}

struct World<'a> {
    documents: &'a BTreeMap<ObjectRef, Document>,
    ports: BTreeMap<Uuid, &'a PortSpec>,
    ports_of_network: BTreeMap<Uuid, Vec<Uuid>>,
    ports_of_group: BTreeMap<Uuid, Vec<Uuid>>,
}

impl<'a> World<'a> {
    fn of(documents: &'a BTreeMap<ObjectRef, Document>) -> Self {
        let mut ports = BTreeMap::new();
        let mut ports_of_network: BTreeMap<Uuid, Vec<Uuid>> = BTreeMap::new();
        let mut ports_of_group: BTreeMap<Uuid, Vec<Uuid>> = BTreeMap::new();
        for document in documents.values() {
            if let Spec::Port(port) = &document.spec {
                ports.insert(document.id, port);
                ports_of_network.entry(port.network.0).or_default().push(document.id);
                for group in &port.security_groups {
                    ports_of_group.entry(group.0).or_default().push(document.id);
                }
            }
        }
        Self { documents, ports, ports_of_network, ports_of_group }
    }

    fn specs(&self) -> impl Iterator<Item = (ObjectRef, &'a Spec)> + use<'a> {
        self.documents.iter().map(|(object, document)| (*object, &document.spec))
    }

    /// Networks by the hosts that they live on.
    fn networks_by_host(&self) -> BTreeMap<&'a str, BTreeSet<Uuid>> {
        let mut found: BTreeMap<&str, BTreeSet<Uuid>> = BTreeMap::new();
        for (object, spec) in self.specs() {
            match spec {
                Spec::Port(port) => {
                    found.entry(&port.host).or_default().insert(port.network.0);
                }
                Spec::Network(network) => {
                    for host in &network.dhcp_hosts {
                        found.entry(host).or_default().insert(object.id);
                    }
                }
                _ => {}
            }
        }
        found
    }

    fn network(&self, needs: &mut Needs) {
        let hosts: BTreeMap<&str, ObjectRef> = self
            .documents
            .values()
            .filter(|document| document.kind() == Kind::Host)
            .map(|document| (document.name.as_str(), document.object()))
            .collect();
        let routers: Vec<(RouterId, &str)> = self
            .specs()
            .filter_map(|(object, spec)| match spec {
                Spec::Router(router) => Some((RouterId(object.id), &*router.host)),
                _ => None,
            })
            .collect();
        let mut wanted: BTreeMap<&str, BTreeSet<ObjectRef>> = BTreeMap::new();
        for (host, networks) in self.networks_by_host() {
            let wanted = wanted.entry(host).or_default();
            for network in networks {
                wanted.insert(ObjectRef { kind: Kind::Network, id: network });
                for port in self.ports_of_network.get(&network).into_iter().flatten() {
                    wanted.insert(ObjectRef { kind: Kind::Port, id: *port });
                    if let Some(port) = self.ports.get(port) {
                        wanted.extend(hosts.get(&*port.host));
                    }
                }
            }
        }
        for (router, host) in routers {
            let wanted = wanted.entry(host).or_default();
            wanted.insert(router.object());
            wanted.extend(self.specs().filter_map(|(object, spec)| match spec {
                Spec::FloatingIp(floating) if floating.router == router => Some(object),
                _ => None,
            }));
        }
        for (name, object) in &hosts {
            wanted.entry(name).or_default().insert(*object);
        }
        for (host, mut objects) in wanted {
            self.close(&mut objects);
            needs.entry(Place::new(AgentKind::Network, host)).or_default().extend(objects);
        }
    }

    fn compute(&self, needs: &mut Needs) {
        for (object, spec) in self.specs() {
            let Spec::Instance(instance) = spec else { continue };
            let mut objects = BTreeSet::from([object]);
            self.close(&mut objects);
            objects.retain(|object| object.kind.agent() == AgentKind::Compute);
            needs
                .entry(Place::new(AgentKind::Compute, &instance.host))
                .or_default()
                .extend(objects);
        }
    }

    fn storage(&self, needs: &mut Needs) {
        for (object, _) in self.specs() {
            if object.kind.agent() != AgentKind::Storage {
                continue;
            }
            if let Some(host) = self.storage_host(object) {
                needs.entry(Place::new(AgentKind::Storage, host)).or_default().insert(object);
            }
        }
    }

    /// The host of a volume, or of the volume that something is about.
    fn storage_host(&self, object: ObjectRef) -> Option<&'a str> {
        match &self.documents.get(&object)?.spec {
            Spec::Volume(volume) => Some(&volume.host),
            Spec::Snapshot(snapshot) => self.storage_host(snapshot.volume.object()),
            Spec::Attachment(attachment) => self.storage_host(attachment.volume.object()),
            _ => None,
        }
    }

    /// Gives documents that nobody needs yet to one agent that keeps them, so that they are not
    /// lost before something refers to them: the first host's, by name.
    fn keep(&self, needs: &mut Needs, places: &BTreeSet<Place>) {
        let needed: BTreeSet<ObjectRef> = needs.values().flatten().copied().collect();
        for object in self.documents.keys().filter(|object| !needed.contains(object)) {
            let keeper = places.iter().find(|place| place.agent == object.kind.agent());
            if let Some(keeper) = keeper {
                needs.entry(keeper.clone()).or_default().insert(*object);
            }
        }
    }

    /// Members of the groups that a security group's rules name, on whatever network.
    fn members(&self, spec: &Spec) -> impl Iterator<Item = ObjectRef> + use<'_> {
        let rules = match spec {
            Spec::SecurityGroup(group) => &*group.rules,
            _ => &[],
        };
        let groups: BTreeSet<Uuid> =
            rules.iter().filter_map(|rule| rule.remote_group).map(|group| group.0).collect();
        groups
            .into_iter()
            .filter_map(|group| self.ports_of_group.get(&group))
            .flatten()
            .map(|port| ObjectRef { kind: Kind::Port, id: *port })
    }

    /// Adds everything that the objects refer to, and what that refers to.
    fn close(&self, objects: &mut BTreeSet<ObjectRef>) {
        let mut open: Vec<ObjectRef> = objects.iter().copied().collect();
        while let Some(object) = open.pop() {
            let Some(document) = self.documents.get(&object) else { continue };
            let referred = references(document).into_iter().map(|(_, to)| to);
            for to in referred.chain(self.members(&document.spec)) {
                if self.documents.contains_key(&to) && objects.insert(to) {
                    open.push(to);
                }
            }
        }
    }
}
