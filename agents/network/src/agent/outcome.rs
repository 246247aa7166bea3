//! How each object came out of a pass, from what is wanted, seen, left to do and failed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::{Map, Value, json};
use stackhand_model::{
    Document, FloatingIpSpec, NetworkId, ObjectRef, PortId, PortSpec, RouterId, RouterSpec,
    SecurityGroupId, Spec,
};
use stackhand_runtime::agent::{Desired, Held, Outcome, Work};

use crate::desired::{HostWish, Standing};
use crate::firewall::model::is_guarded;
use crate::l2::{At, Owner, Plan, Seen, SeenKind};
use crate::names;

use super::tasks::Task;

/// How the objects that were due came out.
pub(super) fn outcomes(
    work: &Work,
    wish: &HostWish,
    seen: &Seen,
    left: &Plan,
    failed: &BTreeMap<ObjectRef, String>,
    undone: BTreeMap<ObjectRef, String>,
    unfiltered: Option<&str>,
) -> BTreeMap<ObjectRef, Outcome> {
    let marked: BTreeSet<ObjectRef> = seen
        .links
        .values()
        .map(|link| &link.owner)
        .chain(seen.spaces.values())
        .filter_map(|owner| match owner {
            Owner::Ours(mark) => Some(mark.object()),
            _ => None,
        })
        .collect();
    // Links that somebody put into bridges of ours.
    let mut strangers: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (at, link) in seen.links.iter().take_while(|(at, _)| at.space.is_none()) {
        if let Some(bridge) = &link.bridge
            && !wish.l2.links.contains_key(at)
        {
            strangers.entry(bridge).or_default().push(&at.link);
        }
    }
    let host = Host { wish, seen, left, failed, undone, marked, strangers, unfiltered };
    let of = |object: &ObjectRef| {
        work.desired
            .objects
            .get(object)
            .map(|held| (*object, host.outcome(*object, held, &work.desired)))
    };
    work.due.iter().filter_map(of).collect()
}

/// What was to be done and still is, although every step said that it had worked.
pub(super) fn undone(tasks: &[Task]) -> BTreeMap<ObjectRef, String> {
    let mut undone = BTreeMap::new();
    for Task { object, deed } in tasks {
        if let Some(object) = object {
            undone.entry(*object).or_insert_with(|| format!("did not hold: {deed}"));
        }
    }
    undone
}

struct Host<'a> {
    wish: &'a HostWish,
    seen: &'a Seen,
    left: &'a Plan,
    failed: &'a BTreeMap<ObjectRef, String>,
    undone: BTreeMap<ObjectRef, String>,
    marked: BTreeSet<ObjectRef>,
    /// Links that are in a bridge and not ours, by the bridge's name.
    strangers: BTreeMap<&'a str, Vec<&'a str>>,
    /// Why the firewall is not as it should be.
    unfiltered: Option<&'a str>,
}

impl Host<'_> {
    fn outcome(&self, object: ObjectRef, held: &Held, desired: &Desired) -> Outcome {
        let observed = self.observed(&held.document);
        let trouble = self.failed.get(&object).or_else(|| self.undone.get(&object)).cloned();
        if held.deleting {
            return match trouble {
                Some(reason) => Outcome::Failed { reason, observed },
                None if self.marked.contains(&object) => {
                    Outcome::Pending { reason: self.why_it_stays(object, desired), observed }
                }
                None => Outcome::Gone,
            };
        }
        let problem = self.left.problems.get(&object).cloned();
        let standing = self.wish.standing.get(&object);
        if let Some(Standing::Failed(reason)) = standing {
            return Outcome::Failed { reason: reason.clone(), observed };
        }
        if let Some(reason) = problem.or(trouble).or_else(|| self.not_filtered(&held.document)) {
            return Outcome::Failed { reason, observed };
        }
        let waits = match standing {
            Some(Standing::Pending(reason)) => Some(reason.clone()),
            _ => self.left.waiting.get(&object).cloned(),
        };
        if let Some(reason) = waits.or_else(|| self.waits_for_network(&held.document)) {
            return Outcome::Pending { reason, observed };
        }
        Outcome::Active { observed }
    }

    /// What the firewall failed at fails the ports and groups that need it.
    fn not_filtered(&self, document: &Document) -> Option<String> {
        let reason = self.unfiltered?;
        let firewall = &self.wish.firewall;
        let needs_it = match &document.spec {
            Spec::Port(_) => {
                let port = PortId(document.id);
                firewall.guards.contains_key(&port)
                    || firewall.packets.contains_key(&names::tap(port))
            }
            Spec::SecurityGroup(_) => firewall.groups.contains_key(&SecurityGroupId(document.id)),
            _ => false,
        };
        needs_it.then(|| format!("not filtered: {reason}"))
    }

    /// A port is not connected while its network's bridge has a problem.
    fn waits_for_network(&self, document: &Document) -> Option<String> {
        let Spec::Port(port) = &document.spec else { return None };
        let network = port.network.object();
        let problem = self.left.problems.get(&network).or_else(|| self.failed.get(&network))?;
        let tap = At::host(names::tap(PortId(document.id)));
        let is_here = self.wish.l2.links.contains_key(&tap);
        is_here.then(|| format!("waits for its network: {problem}"))
    }

    fn why_it_stays(&self, object: ObjectRef, desired: &Desired) -> String {
        let ports = desired.objects.values().filter(|held| match &held.document.spec {
            Spec::Port(port) => !held.deleting && port.network.object() == object,
            _ => false,
        });
        match ports.count() {
            0 => "its links are going".to_owned(),
            count => format!("waits for {count} ports of it to be deleted"),
        }
    }

    fn observed(&self, document: &Document) -> Value {
        match &document.spec {
            Spec::Port(port) => self.port(PortId(document.id), port),
            Spec::Network(_) => self.network(NetworkId(document.id)),
            Spec::Router(router) => self.router(RouterId(document.id), router),
            Spec::FloatingIp(floating) => self.floating_ip(floating),
            Spec::SecurityGroup(_) => self.group(SecurityGroupId(document.id)),
            _ => Value::Null,
        }
    }

    fn port(&self, id: PortId, port: &PortSpec) -> Value {
        let at = At::host(names::tap(id));
        let mut facts = Map::new();
        if let Some(link) = self.seen.links.get(&at) {
            facts.insert("link".into(), json!(at.link));
            facts.insert("mtu".into(), json!(link.mtu));
            facts.insert("up".into(), json!(link.up));
            facts.insert("carrier".into(), json!(link.carrier));
            facts.insert("bridge".into(), json!(link.bridge));
            if is_guarded(port) {
                let filtered =
                    self.wish.firewall.guards.contains_key(&id) && self.unfiltered.is_none();
                facts.insert("filtered".into(), json!(filtered));
            }
        } else {
            facts.insert("host".into(), json!(port.host));
        }
        Value::Object(facts)
    }

    fn router(&self, id: RouterId, router: &RouterSpec) -> Value {
        let Some(service) = self.wish.routers.get(&id) else {
            return json!({"host": router.host});
        };
        let links: Map<String, Value> = service
            .links
            .iter()
            .filter_map(|link| {
                let at = At::inside(service.space.clone(), link.link.clone());
                let seen = self.seen.links.get(&at)?;
                let addresses: Vec<String> =
                    seen.addresses.iter().map(ToString::to_string).collect();
                let facts = json!({
                    "port": link.port, "addresses": addresses, "mtu": seen.mtu, "up": seen.up,
                });
                Some((link.link.clone(), facts))
            })
            .collect();
        let nat = self.wish.l3.get(&service.space).map_or(0, |wanted| wanted.owners.len());
        json!({"namespace": service.space, "links": links, "floating_ips": nat})
    }

    fn floating_ip(&self, floating: &FloatingIpSpec) -> Value {
        let Some(service) = self.wish.routers.get(&floating.router) else { return Value::Null };
        let wanted = self.wish.l3.get(&service.space);
        let translations: Vec<String> = wanted
            .into_iter()
            .flat_map(|wanted| &wanted.nat)
            .filter(|entry| IpAddr::V4(entry.address()) == floating.address)
            .map(ToString::to_string)
            .collect();
        json!({"namespace": service.space, "translations": translations})
    }

    fn group(&self, id: SecurityGroupId) -> Value {
        let firewall = &self.wish.firewall;
        let here = firewall.guards.values().filter(|guard| guard.groups.contains(&id)).count();
        let mut facts = json!({"ports_here": here, "enforced": self.unfiltered.is_none()});
        if let Some(members) = firewall.members.get(&id) {
            facts["members"] = json!(members.len());
        }
        facts
    }

    fn network(&self, id: NetworkId) -> Value {
        let Some(wired) = self.wish.wired.get(&id) else { return json!({"wired": false}) };
        let mut facts = json!({
            "wired": true,
            "bridge": wired.bridge,
            "uplinks": wired.uplinks,
            "mtu": wired.mtu,
        });
        // Told, not touched.
        if let Some(guests) = self.strangers.get(wired.bridge.as_str()) {
            facts["foreign_ports"] = json!(guests);
        }
        let space = names::dhcp_space(id);
        let mut sites = self.wish.services.range(At::inside(space.clone(), "")..);
        if let Some((at, site)) = sites.next()
            && at.space.as_ref() == Some(&space)
        {
            facts["dhcp"] = site.facts(&space);
        }
        facts
    }
}

/// What is wrong with the host as a whole.
pub(super) fn troubles(left: &Plan, unfiltered: Option<&str>) -> Vec<String> {
    let mut troubles = Vec::new();
    if let Some(reason) = unfiltered {
        troubles.push(format!("security groups and anti-spoofing are not enforced: {reason}"));
    }
    if !left.orphans.is_empty() {
        let names: Vec<String> = left.orphans.iter().map(At::to_string).collect();
        troubles.push(format!(
            "no document speaks of {}; they are deleted after network.orphan_grace_seconds",
            names.join(", ")
        ));
    }
    troubles
}

/// The host's own links, for controllers.
pub(super) fn link_facts(seen: &Seen) -> Value {
    let is_hosts = |kind: &SeenKind| {
        matches!(kind, SeenKind::Other(_) | SeenKind::Pair | SeenKind::Vlan { .. })
    };
    let facts: Map<String, Value> = seen
        .links
        .iter()
        .filter(|(at, link)| {
            at.space.is_none() && is_hosts(&link.kind) && matches!(link.owner, Owner::Foreign(_))
        })
        .take(100)
        .map(|(at, link)| {
            let addresses: Vec<String> = link.addresses.iter().map(ToString::to_string).collect();
            let facts = json!({
                "mtu": link.mtu,
                "up": link.up,
                "address": link.mac.map(|mac| mac.to_string()),
                "addresses": addresses,
                "bridge": link.bridge,
            });
            (at.link.clone(), facts)
        })
        .collect();
    Value::Object(facts)
}
