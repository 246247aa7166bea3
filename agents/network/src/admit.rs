//! What can never work is refused before it is accepted. Pure: looks at documents alone.
//!
//! Refused are contradictions between documents: two ports with one address, two networks on one
//! segment, an address outside its subnet, a floating IP that somebody else has, two ids that would
//! give one link name. A port whose network is not known yet is accepted: it may come.

use std::collections::{BTreeMap, BTreeSet};

use stackhand_model::{
    ErrorCode, FloatingIpId, Name, NetworkId, ObjectRef, PortId, RouterId, Spec,
};
use stackhand_model::{FloatingIpSpec, NetworkSpec, NetworkType, PortOwner, PortSpec, RouterSpec};
use stackhand_runtime::agent::{Desired, Refusal};

mod floating;
#[cfg(test)]
mod tests;

/// Judges a change; `changed` are the objects it is about.
///
/// # Errors
///
/// Names the object, the field and the other object that it contradicts.
pub fn admit(wanted: &Desired, changed: &BTreeSet<ObjectRef>) -> Result<(), Refusal> {
    let mut networks: BTreeMap<NetworkId, (&Name, &NetworkSpec)> = BTreeMap::new();
    let mut ports: BTreeMap<PortId, (&Name, &PortSpec)> = BTreeMap::new();
    let mut routers = BTreeMap::new();
    let mut floating = BTreeMap::new();
    for (object, held) in wanted.objects.iter().filter(|(_, held)| !held.deleting) {
        match &held.document.spec {
            Spec::Network(spec) => {
                networks.insert(NetworkId(object.id), (&held.document.name, spec));
            }
            Spec::Port(spec) => {
                ports.insert(PortId(object.id), (&held.document.name, spec));
            }
            Spec::Router(spec) => drop(routers.insert(RouterId(object.id), spec)),
            Spec::FloatingIp(spec) => {
                floating.insert(FloatingIpId(object.id), (&held.document.name, spec));
            }
            _ => {}
        }
    }
    let judge = Judge { networks, ports, routers, floating, changed };
    judge.network_pairs()?;
    judge.port_pairs()?;
    judge.ports_on_networks()?;
    judge.floating_ips()
}

struct Judge<'a> {
    networks: BTreeMap<NetworkId, (&'a Name, &'a NetworkSpec)>,
    ports: BTreeMap<PortId, (&'a Name, &'a PortSpec)>,
    routers: BTreeMap<RouterId, &'a RouterSpec>,
    floating: BTreeMap<FloatingIpId, (&'a Name, &'a FloatingIpSpec)>,
    changed: &'a BTreeSet<ObjectRef>,
}

impl Judge<'_> {
    /// Of two that contradict each other the changed one is refused; an old quarrel is not.
    fn clash(
        &self,
        (one, one_name): (ObjectRef, &Name),
        (other, other_name): (ObjectRef, &Name),
        field: &str,
        what: &str,
    ) -> Result<(), Refusal> {
        let ((to_blame, name), (holder, holders_name)) = if self.changed.contains(&one) {
            ((one, one_name), (other, other_name))
        } else if self.changed.contains(&other) {
            ((other, other_name), (one, one_name))
        } else {
            return Ok(());
        };
        let (kind, holders_kind) = (to_blame.kind, holder.kind);
        let message =
            format!("{kind} {name}: {field}: {what} is that of {holders_kind} {holders_name}, too");
        Err(Refusal::new(ErrorCode::Conflict, message).about(to_blame).at(field))
    }

    fn network_pairs(&self) -> Result<(), Refusal> {
        let mut segments = BTreeMap::new();
        let mut names = BTreeMap::new();
        for (&id, &(name, spec)) in &self.networks {
            let this = (id.object(), name);
            let segment =
                (kind_number(spec.network_type), spec.physical_network.as_deref(), spec.segment);
            if spec.network_type != NetworkType::Local
                && let Some(other) = segments.insert(segment, this)
            {
                let (field, what) = match (spec.segment, &spec.physical_network) {
                    (Some(segment), _) => ("spec.segment", format!("segment {segment}")),
                    (None, Some(physical)) => {
                        ("spec.physical_network", format!("physical network {physical}"))
                    }
                    (None, None) => ("spec.type", "this type".to_owned()),
                };
                self.clash(this, other, field, &what)?;
            }
            if let Some(other) = names.insert(id.short(), this) {
                self.clash(this, other, "id", &format!("the beginning {:?}", id.short()))?;
            }
        }
        Ok(())
    }

    fn port_pairs(&self) -> Result<(), Refusal> {
        // What nobody who changed claims is nobody's quarrel now.
        let changed = self.ports.iter().filter(|(id, _)| self.changed.contains(&id.object()));
        let (mut macs, mut addresses, mut names) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (id, (_, spec)) in changed {
            macs.insert((spec.network, spec.mac), None);
            names.insert(id.beginning(), None);
            addresses
                .extend(spec.fixed_ips.iter().map(|fixed| ((spec.network, fixed.address), None)));
        }
        for (&id, &(name, spec)) in &self.ports {
            let this = (id.object(), name);
            if let Some(other) = claim(&mut macs, &(spec.network, spec.mac), this) {
                self.clash(this, other, "spec.mac", &spec.mac.to_string())?;
            }
            for (index, fixed) in spec.fixed_ips.iter().enumerate() {
                if let Some(other) = claim(&mut addresses, &(spec.network, fixed.address), this) {
                    let field = format!("spec.fixed_ips[{index}].address");
                    self.clash(this, other, &field, &fixed.address.to_string())?;
                }
            }
            if let Some(other) = claim(&mut names, &id.beginning(), this) {
                self.clash(this, other, "id", &format!("the beginning {:?}", id.short()))?;
            }
        }
        Ok(())
    }

    fn ports_on_networks(&self) -> Result<(), Refusal> {
        for (&id, &(name, spec)) in &self.ports {
            let network_changed = self.changed.contains(&spec.network.object());
            if !network_changed && !self.changed.contains(&id.object()) {
                continue;
            }
            let Some((network_name, network)) = self.networks.get(&spec.network) else { continue };
            for (index, fixed) in spec.fixed_ips.iter().enumerate() {
                let at = |field: &str| format!("spec.fixed_ips[{index}].{field}");
                let refuse = |field: &str, text: String| {
                    let message = format!("Port {name}: {}: {text}", at(field));
                    Err(Refusal::new(ErrorCode::Conflict, message)
                        .about(id.object())
                        .at(&at(field)))
                };
                let Some(subnet) = network.subnet(&fixed.subnet) else {
                    let known: Vec<String> =
                        network.subnets.iter().map(|subnet| subnet.name.to_string()).collect();
                    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
                    return refuse(
                        "subnet",
                        format!(
                            "network {network_name} has no subnet {}; it has {known}",
                            fixed.subnet
                        ),
                    );
                };
                if !subnet.cidr.contains(&fixed.address) {
                    return refuse(
                        "address",
                        format!(
                            "{} is not in {} of subnet {}",
                            fixed.address, subnet.cidr, subnet.name
                        ),
                    );
                }
                if subnet.dhcp_address == Some(fixed.address) && spec.owner != PortOwner::Dhcp {
                    return refuse(
                        "address",
                        format!("{} is the dhcp_address of subnet {}", fixed.address, subnet.name),
                    );
                }
            }
        }
        Ok(())
    }
}

/// Notes who has what is claimed; returns who had it before.
fn claim<'a, K: Ord>(
    claims: &mut BTreeMap<K, Option<(ObjectRef, &'a Name)>>,
    what: &K,
    by: (ObjectRef, &'a Name),
) -> Option<(ObjectRef, &'a Name)> {
    claims.get_mut(what)?.replace(by)
}

fn kind_number(kind: NetworkType) -> u8 {
    match kind {
        NetworkType::Local => 0,
        NetworkType::Flat => 1,
        NetworkType::Vlan => 2,
        NetworkType::Vxlan => 3,
        NetworkType::Gre => 4,
        NetworkType::Geneve => 5,
    }
}
