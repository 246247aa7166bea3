//! How each object came out of a pass, from what is wanted, seen, left to do and failed.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};
use stackhand_model::{Document, ObjectRef, PortId, SecurityGroupId, Spec};
use stackhand_runtime::agent::{Desired, Held, Observed, Outcome, Work};

use crate::desired::{HostWish, Standing};
use crate::l2::{At, Owner, Plan, Seen, SeenKind};
use crate::names;

use super::sight::Saw;
use super::tasks::Task;

/// How the objects that were due came out.
pub(super) fn outcomes(
    work: &Work,
    saw: &Saw,
    left: &Plan,
    failed: &BTreeMap<ObjectRef, String>,
    undone: BTreeMap<ObjectRef, String>,
    unfiltered: Option<&str>,
    observed: &Observed,
) -> BTreeMap<ObjectRef, Outcome> {
    let Saw { wish, seen, .. } = saw;
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
    let host = Host { wish, left, failed, undone, marked, unfiltered, observed };
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
    left: &'a Plan,
    failed: &'a BTreeMap<ObjectRef, String>,
    undone: BTreeMap<ObjectRef, String>,
    marked: BTreeSet<ObjectRef>,
    /// Why the firewall is not as it should be.
    unfiltered: Option<&'a str>,
    /// What those are told who ask.
    observed: &'a Observed,
}

impl Host<'_> {
    fn outcome(&self, object: ObjectRef, held: &Held, desired: &Desired) -> Outcome {
        let observed = self.observed.clone();
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
                    || firewall.packets.contains_key(names::tap(port).as_str())
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
            (at.link.to_string(), facts)
        })
        .collect();
    Value::Object(facts)
}
