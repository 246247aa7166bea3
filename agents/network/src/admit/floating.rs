//! Floating IPs against all that has an address on the network that they are from.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use stackhand_model::{ErrorCode, Kind, NetworkId, RouterId};
use stackhand_runtime::agent::Refusal;

use super::{Judge, claim};

impl Judge<'_> {
    /// The network that a router's gateway is on, as far as documents tell.
    fn external(&self, router: RouterId) -> Option<NetworkId> {
        let port = self.routers.get(&router)?.gateway.as_ref()?.port;
        self.ports.get(&port).map(|(_, port)| port.network)
    }

    pub(super) fn floating_ips(&self) -> Result<(), Refusal> {
        if self.floating.is_empty() {
            return Ok(());
        }
        // What nobody who changed claims is nobody's quarrel now.
        let ports = self.ports.iter().filter(|(id, _)| self.changed.contains(&id.object()));
        let floating = self.floating.iter().filter(|(id, _)| self.changed.contains(&id.object()));
        let floating =
            floating.filter_map(|(_, (_, spec))| Some((self.external(spec.router)?, spec.address)));
        let ports = ports.flat_map(|(_, (_, port))| {
            port.fixed_ips.iter().map(|fixed| (port.network, fixed.address))
        });
        let claimed = ports.chain(floating);
        let mut holders: BTreeMap<(NetworkId, IpAddr), _> =
            claimed.map(|address| (address, None)).collect();
        let networks: BTreeSet<NetworkId> = holders.keys().map(|(network, _)| *network).collect();
        let ports = self.ports.iter().filter(|(_, (_, port))| networks.contains(&port.network));
        for (id, (name, port)) in ports {
            for fixed in &port.fixed_ips {
                claim(&mut holders, &(port.network, fixed.address), (id.object(), *name));
            }
        }
        for (&id, &(name, spec)) in &self.floating {
            let Some(external) = self.external(spec.router) else { continue };
            let this = (id.object(), name);
            if let Some(other) = claim(&mut holders, &(external, spec.address), this) {
                let blames_port = other.0.kind == Kind::Port && !self.changed.contains(&this.0);
                let field = if blames_port { "spec.fixed_ips" } else { "spec.address" };
                self.clash(this, other, field, &spec.address.to_string())?;
            }
            let judged = [id.object(), spec.router.object(), external.object()];
            let Some((network_name, network)) = self.networks.get(&external) else { continue };
            let inside = network.subnets.iter().any(|subnet| subnet.cidr.contains(&spec.address));
            if !inside && judged.iter().any(|object| self.changed.contains(object)) {
                let ranges: Vec<String> =
                    network.subnets.iter().map(|subnet| subnet.cidr.to_string()).collect();
                let message = format!(
                    "FloatingIp {name}: spec.address: {} is on no subnet of network {network_name}, \
                     where its router's gateway is; take an address of {}",
                    spec.address,
                    ranges.join(" or ")
                );
                return Err(Refusal::new(ErrorCode::Conflict, message)
                    .about(id.object())
                    .at("spec.address"));
            }
        }
        Ok(())
    }
}
