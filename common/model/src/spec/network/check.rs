//! The rules of network documents that their types cannot express.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    Ethertype, FloatingIpSpec, HostSpec, NetworkSpec, NetworkType, PortOwner, PortSpec,
    QosPolicySpec, RouterSpec, SecurityGroupRule, SecurityGroupSpec, Subnet,
};
use crate::Name;
use crate::spec::guest::{check_domains, is_domain_name};
use crate::spec::{Broken, broken};

impl HostSpec {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        for (physical, link) in &self.bridge_mappings {
            if link.is_empty() || link.len() > 15 || link.contains(['/', ' ']) {
                return broken(
                    format!("bridge_mappings.{physical}"),
                    format!("{link:?} is not a link name (1 to 15 bytes, no blank, no slash)"),
                );
            }
        }
        Ok(())
    }
}

impl NetworkSpec {
    /// The subnet called `name`.
    #[must_use]
    pub fn subnet(&self, name: &Name) -> Option<&Subnet> {
        self.subnets.iter().find(|subnet| subnet.name == *name)
    }

    pub(crate) fn check(&self) -> Result<(), Broken> {
        use NetworkType::{Flat, Geneve, Gre, Local, Vlan, Vxlan};
        let kind = self.network_type;
        match (kind, &self.physical_network) {
            (Flat | Vlan, None) => {
                return broken("physical_network", "is needed for a flat or vlan network");
            }
            (Local | Vxlan | Gre | Geneve, Some(_)) => {
                return broken("physical_network", "is only for flat and vlan networks");
            }
            _ => {}
        }
        let max = match kind {
            Local | Flat => 0,
            Vlan => 4094,
            Vxlan | Geneve => 0x00ff_ffff,
            Gre => u32::MAX,
        };
        match self.segment {
            Some(_) if max == 0 => {
                return broken("segment", "is not for a local or flat network");
            }
            None if max > 0 => return broken("segment", format!("is needed: 1 to {max}")),
            Some(segment) if segment == 0 || segment > max => {
                return broken("segment", format!("{segment} is outside 1 to {max}"));
            }
            _ => {}
        }
        if let Some(mtu) = self.mtu
            && !(576..=65535).contains(&mtu)
        {
            return broken("mtu", format!("{mtu} is outside 576 to 65535"));
        }
        if let Some(domain) = &self.dns_domain
            && !is_domain_name(domain.trim_end_matches('.'))
        {
            return broken(
                "dns_domain",
                format!("{domain:?} is not a domain such as int1.example.org"),
            );
        }
        check_domains("search_domains", &self.search_domains)?;
        for (index, subnet) in self.subnets.iter().enumerate() {
            let at = |field: &str| format!("subnets[{index}].{field}");
            subnet.check().or_else(|(field, problem)| broken(at(&field), problem))?;
            for other in &self.subnets[..index] {
                if other.name == subnet.name {
                    return broken(at("name"), format!("{} is used twice", subnet.name));
                }
                if other.cidr.contains(&subnet.cidr) || subnet.cidr.contains(&other.cidr) {
                    return broken(
                        at("cidr"),
                        format!("{} overlaps {} of subnet {}", subnet.cidr, other.cidr, other.name),
                    );
                }
            }
        }
        Ok(())
    }
}

impl Subnet {
    fn check(&self) -> Result<(), Broken> {
        if self.cidr.trunc() != self.cidr {
            return broken(
                "cidr",
                format!("has host bits set; did you mean {}?", self.cidr.trunc()),
            );
        }
        let inside = |field: String, address: IpAddr| {
            if self.cidr.contains(&address) {
                return Ok(());
            }
            broken(field, format!("{address} is not in {}", self.cidr))
        };
        if let Some(gateway) = self.gateway
            // An IPv6 gateway is often link-local.
            && !matches!(gateway, IpAddr::V6(v6) if v6.is_unicast_link_local())
        {
            inside("gateway".into(), gateway)?;
        }
        if let Some(address) = self.dhcp_address {
            inside("dhcp_address".into(), address)?;
        }
        for (index, pool) in self.pools.iter().enumerate() {
            inside(format!("pools[{index}].start"), pool.start)?;
            inside(format!("pools[{index}].end"), pool.end)?;
            if pool.start > pool.end {
                return broken(
                    format!("pools[{index}]"),
                    format!("{} is after {}", pool.start, pool.end),
                );
            }
        }
        if self.ipv6_mode.is_some() && matches!(self.cidr, IpNet::V4(_)) {
            return broken("ipv6_mode", "is only for IPv6 subnets");
        }
        for (index, route) in self.host_routes.iter().enumerate() {
            if matches!(route.destination, IpNet::V4(_)) != route.next_hop.is_ipv4() {
                return broken(
                    format!("host_routes[{index}].next_hop"),
                    "is of another address family than the destination",
                );
            }
        }
        Ok(())
    }
}

impl PortSpec {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        if self.mac.is_multicast() || self.mac.0 == [0; 6] {
            return broken("mac", format!("{} cannot be a port's own address", self.mac));
        }
        if self.host.is_empty() {
            return broken("host", "is empty");
        }
        if !(1..=256).contains(&self.queues) {
            return broken("queues", format!("{} is outside 1 to 256", self.queues));
        }
        if let Some(name) = &self.dns_name
            && !is_host_name(name)
        {
            return broken(
                "dns_name",
                format!("{name:?} is not a host name (letters, digits and hyphens, 1 to 63 bytes)"),
            );
        }
        let mut seen = BTreeSet::new();
        for (index, fixed) in self.fixed_ips.iter().enumerate() {
            if !seen.insert(fixed.address) {
                return broken(format!("fixed_ips[{index}].address"), "is listed twice");
            }
        }
        for (index, option) in self.extra_dhcp_options.iter().enumerate() {
            if !matches!(option.ip_version, None | Some(4 | 6)) {
                return broken(format!("extra_dhcp_options[{index}].ip_version"), "must be 4 or 6");
            }
        }
        if let Some(guest) = &self.guest {
            if self.owner != PortOwner::Instance && self.owner != PortOwner::External {
                return broken("guest", "is only for ports that a guest is behind");
            }
            guest.check().or_else(|(field, problem)| broken(format!("guest.{field}"), problem))?;
        }
        Ok(())
    }
}

pub(crate) fn is_host_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// IANA numbers of the protocols that OpenStack knows by name.
const PROTOCOLS: [(&str, u8); 24] = [
    ("ah", 51),
    ("dccp", 33),
    ("egp", 8),
    ("esp", 50),
    ("gre", 47),
    ("hopopt", 0),
    ("icmp", 1),
    ("icmpv6", 58),
    ("igmp", 2),
    ("ipip", 4),
    ("ipv6-encap", 41),
    ("ipv6-frag", 44),
    ("ipv6-icmp", 58),
    ("ipv6-nonxt", 59),
    ("ipv6-opts", 60),
    ("ipv6-route", 43),
    ("ospf", 89),
    ("pgm", 113),
    ("rsvp", 46),
    ("sctp", 132),
    ("tcp", 6),
    ("udp", 17),
    ("udplite", 136),
    ("vrrp", 112),
];

impl SecurityGroupRule {
    /// The protocol's IANA number, or `None` for any. In an IPv6 rule `icmp` means ICMPv6.
    #[must_use]
    pub fn protocol_number(&self) -> Option<u8> {
        let name = self.protocol.as_deref()?.to_ascii_lowercase();
        if name == "icmp" && self.ethertype == Ethertype::IPv6 {
            return Some(58);
        }
        PROTOCOLS
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, number)| *number)
            .or_else(|| name.parse().ok())
    }
}

impl SecurityGroupSpec {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        for (index, rule) in self.rules.iter().enumerate() {
            let at = |field: &str| format!("rules[{index}].{field}");
            if let Some(name) = &rule.protocol
                && rule.protocol_number().is_none()
                && !name.eq_ignore_ascii_case("any")
            {
                let hint = crate::nearest(name, PROTOCOLS.map(|(known, _)| known))
                    .map(|near| format!("; did you mean {near}?"))
                    .unwrap_or_default();
                return broken(
                    at("protocol"),
                    format!("{name:?} is neither a known protocol nor a number 0 to 255{hint}"),
                );
            }
            let number = rule.protocol_number();
            let icmp = matches!(number, Some(1 | 58));
            let has_ports = matches!(number, Some(6 | 17 | 33 | 132 | 136));
            match (rule.port_range_min, rule.port_range_max) {
                (None, None) => {}
                (Some(_), _) | (_, Some(_)) if !icmp && !has_ports => {
                    return broken(at("port_range_min"), "needs a protocol that has ports");
                }
                (None, Some(_)) => {
                    return broken(at("port_range_min"), "is needed beside port_range_max");
                }
                (Some(kind), code) if icmp => {
                    if kind > 255 || code.is_some_and(|code| code > 255) {
                        return broken(at("port_range_min"), "ICMP types and codes are 0 to 255");
                    }
                }
                (Some(_), None) => {
                    return broken(at("port_range_max"), "is needed beside port_range_min");
                }
                (Some(min), Some(max)) if min > max || min == 0 => {
                    return broken(
                        at("port_range_min"),
                        format!("{min} to {max} is not a range of ports"),
                    );
                }
                (Some(_), Some(_)) => {}
            }
            let remotes = usize::from(rule.remote_cidr.is_some())
                + usize::from(rule.remote_group.is_some())
                + usize::from(!rule.remote_addresses.is_empty());
            if remotes > 1 {
                return broken(
                    at("remote_cidr"),
                    "only one of remote_cidr, remote_group and remote_addresses may be given",
                );
            }
            let wants_v4 = rule.ethertype == Ethertype::IPv4;
            for net in rule.remote_cidr.iter().chain(&rule.remote_addresses) {
                if matches!(net, IpNet::V4(_)) != wants_v4 {
                    return broken(
                        at("remote_cidr"),
                        format!("{net} is of another family than the rule's ethertype"),
                    );
                }
            }
        }
        Ok(())
    }
}

impl QosPolicySpec {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        for (index, limit) in self.bandwidth.iter().enumerate() {
            if limit.max_kbps == 0 {
                return broken(format!("bandwidth[{index}].max_kbps"), "must be at least 1");
            }
            if self.bandwidth[..index].iter().any(|other| other.direction == limit.direction) {
                return broken(format!("bandwidth[{index}].direction"), "is listed twice");
            }
        }
        for (index, limit) in self.packet_rate.iter().enumerate() {
            if limit.max_kpps == 0 {
                return broken(format!("packet_rate[{index}].max_kpps"), "must be at least 1");
            }
            if self.packet_rate[..index].iter().any(|other| other.direction == limit.direction) {
                return broken(format!("packet_rate[{index}].direction"), "is listed twice");
            }
        }
        if self.dscp.is_some_and(|dscp| dscp > 63) {
            return broken("dscp", "must be 0 to 63");
        }
        Ok(())
    }
}

impl RouterSpec {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        if self.host.is_empty() {
            return broken("host", "is empty: a router needs the host that has it");
        }
        for (index, route) in self.routes.iter().enumerate() {
            if matches!(route.destination, IpNet::V4(_)) != route.next_hop.is_ipv4() {
                return broken(
                    format!("routes[{index}].next_hop"),
                    "is of another address family than the destination",
                );
            }
        }
        Ok(())
    }
}

impl FloatingIpSpec {
    pub(crate) fn check(&self) -> Result<(), Broken> {
        if self.port.is_some() && !self.port_forwardings.is_empty() {
            return broken("port_forwardings", "cannot be given together with port");
        }
        for (index, forwarding) in self.port_forwardings.iter().enumerate() {
            let at = |field: String| format!("port_forwardings[{index}].{field}");
            forwarding
                .check(&self.port_forwardings[..index])
                .or_else(|(field, problem)| broken(at(field), problem))?;
        }
        Ok(())
    }
}
