//! What the last pass saw, as facts about objects for whoever asks how they are.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, OnceLock};

use serde_json::{Map, Value, json};
use smol_str::SmolStr;
use stackhand_model::{
    Document, FloatingIpSpec, NetworkId, ObjectRef, PortId, PortSpec, RouterId, RouterSpec,
    SecurityGroupId, Spec,
};
use stackhand_runtime::agent::{Desired, Sight};

use crate::desired::HostWish;
use crate::firewall::model::is_guarded;
use crate::l2::{At, Seen};
use crate::names;
use crate::services::metadata::Passwords;

use super::passwords::guest;

/// What the last pass saw.
#[derive(Default)]
pub(super) struct LastSeen(Mutex<Option<Arc<Saw>>>);

/// What a pass saw, with what was wanted then.
pub(super) struct Saw {
    pub(super) desired: Arc<Desired>,
    pub(super) wish: Arc<HostWish>,
    pub(super) seen: Arc<Seen>,
    /// Whether the firewall is not as it should be.
    pub(super) unfiltered: bool,
    /// Where guests' passwords are, if any left one.
    pub(super) passwords: Option<Arc<Passwords>>,
    /// Links that somebody put into bridges of ours, by the bridge's name: found when first asked for.
    pub(super) strangers: OnceLock<BTreeMap<SmolStr, Vec<SmolStr>>>,
}

impl LastSeen {
    pub(super) fn set(&self, saw: Saw) {
        let before = super::lock(&self.0).replace(Arc::new(saw));
        // Thousands of objects: freed when nobody who asks waits for the lock any more.
        drop(before);
    }
}

impl Sight for LastSeen {
    fn facts(&self, object: &ObjectRef) -> Value {
        let saw = super::lock(&self.0).clone();
        let facts = saw.and_then(|saw| {
            let held = saw.desired.objects.get(object)?;
            Some(saw.of(&held.document))
        });
        facts.unwrap_or_default()
    }
}

impl Saw {
    fn of(&self, document: &Document) -> Value {
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
        let guest = guest(id, port).zip(self.passwords.as_ref());
        if let Some(password) = guest.and_then(|(guest, passwords)| passwords.of(guest)) {
            facts.insert("password".into(), json!(password));
        }
        if let Some(link) = self.seen.links.get(&at) {
            facts.insert("link".into(), json!(at.link));
            facts.insert("mtu".into(), json!(link.mtu));
            facts.insert("up".into(), json!(link.up));
            facts.insert("carrier".into(), json!(link.carrier));
            facts.insert("bridge".into(), json!(link.bridge));
            if is_guarded(port) {
                let filtered = self.wish.firewall.guards.contains_key(&id) && !self.unfiltered;
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
                Some((link.link.to_string(), facts))
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
        let mut facts = json!({"ports_here": here, "enforced": !self.unfiltered});
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
        if let Some(strangers) = self.strangers.get_or_init(|| self.strangers()).get(&wired.bridge)
        {
            facts["foreign_ports"] = json!(strangers);
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

    fn strangers(&self) -> BTreeMap<SmolStr, Vec<SmolStr>> {
        let mut strangers: BTreeMap<SmolStr, Vec<SmolStr>> = BTreeMap::new();
        for (at, link) in self.seen.host() {
            if let Some(bridge) = &link.bridge
                && !self.wish.l2.links.contains_key(at)
            {
                strangers.entry(bridge.clone()).or_default().push(at.link.clone());
            }
        }
        strangers
    }
}
