//! What is wanted of the network agent. The words are Neutron's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Broken, broken, yes};
use crate::{MacAddr, Name, NetworkId, PortId, QosPolicyId, RouterId, SecurityGroupId};

/// A host as the network sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HostSpec {
    /// Address that other hosts send overlay packets to. Needed for VXLAN, GRE and Geneve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel_address: Option<IpAddr>,
    /// Physical network name → link of this host that leads to it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub bridge_mappings: BTreeMap<String, String>,
}

/// How a network's frames leave the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetworkType {
    /// They do not: ports on one host only.
    Local,
    /// Untagged on a physical network.
    Flat,
    /// Tagged on a physical network.
    Vlan,
    /// In UDP, RFC 7348.
    Vxlan,
    /// In GRE (gretap), RFC 2784.
    Gre,
    /// In UDP, RFC 8926.
    Geneve,
}

/// A broadcast domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// How its frames leave the host.
    #[serde(rename = "type")]
    pub network_type: NetworkType,
    /// Physical network, for flat and vlan; looked up in the host's bridge mappings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical_network: Option<String>,
    /// VLAN id, VNI or GRE key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segment: Option<u32>,
    /// Largest IP packet in bytes, 576 to 65535 (1280 and up for IPv6). Default: what the
    /// underlay leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Address ranges.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subnets: Vec<Subnet>,
    /// Whether routers may use it as their way out.
    #[serde(default)]
    pub external: bool,
    /// Domain under which the DNS server names its ports, for example `int1.example.org`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_domain: Option<String>,
    /// Hosts that serve DHCP for it. Empty: every host that has a port of it.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub dhcp_hosts: BTreeSet<String>,
}

/// An address range on a network.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Subnet {
    /// What ports and routers call it; unique within the network.
    pub name: Name,
    /// The range, for example `192.168.0.0/24`.
    #[schemars(with = "String")]
    pub cidr: IpNet,
    /// Next hop of its hosts. Absent: no gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Ranges that addresses are allocated from. Empty: the whole of it but the gateway.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pools: Vec<Pool>,
    /// Whether DHCP (IPv4) or `ipv6_mode` (IPv6) serves it.
    #[serde(default = "yes")]
    pub dhcp: bool,
    /// Address of the DHCP port on it. Absent: the lowest free one is taken by the controller,
    /// or the agent serves from the gateway's address if nobody else has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dhcp_address: Option<IpAddr>,
    /// DNS servers told to guests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns_servers: Vec<IpAddr>,
    /// Further routes told to guests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_routes: Vec<Route>,
    /// How IPv6 guests get their addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6_mode: Option<Ipv6Mode>,
}

/// A range of addresses, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// First address.
    pub start: IpAddr,
    /// Last address.
    pub end: IpAddr,
}

/// A route to a destination by a next hop.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Where to.
    #[schemars(with = "String")]
    pub destination: IpNet,
    /// By which neighbour.
    pub next_hop: IpAddr,
}

/// How IPv6 guests get their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Ipv6Mode {
    /// From router advertisements.
    Slaac,
    /// Addresses from router advertisements, other settings by DHCPv6.
    Dhcpv6Stateless,
    /// Addresses by DHCPv6.
    Dhcpv6Stateful,
}

/// An attachment point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// The network it is on.
    pub network: NetworkId,
    /// Its Ethernet address; no two ports of a network share one.
    pub mac: MacAddr,
    /// Its addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fixed_ips: Vec<FixedIp>,
    /// The host that has it.
    pub host: String,
    /// What is behind it.
    #[serde(default)]
    pub owner: PortOwner,
    /// The instance or router behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Uuid>,
    /// Groups whose rules allow its traffic. None: nothing is allowed but DHCP and ND.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub security_groups: BTreeSet<SecurityGroupId>,
    /// Whether the firewall and anti-spoofing apply.
    #[serde(default = "yes")]
    pub port_security: bool,
    /// Further addresses that it may send from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allowed_address_pairs: Vec<AddressPair>,
    /// Limits on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qos_policy: Option<QosPolicyId>,
    /// DHCP options told to it besides the subnet's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extra_dhcp_options: Vec<DhcpOption>,
    /// Its host name in the network's DNS domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_name: Option<String>,
    /// Whether its link is up.
    #[serde(default = "yes")]
    pub admin_up: bool,
    /// Queues of its tap, 1 to 256; more than one needs a multi-queue guest device.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub queues: u16,
}

fn one() -> u16 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_one(queues: &u16) -> bool {
    *queues == 1
}

/// An address of a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FixedIp {
    /// The subnet of the port's network it is on.
    pub subnet: Name,
    /// The address.
    pub address: IpAddr,
}

/// What is behind a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PortOwner {
    /// A guest; the agent makes its tap.
    #[default]
    Instance,
    /// A router's interface on an internal network.
    RouterInterface,
    /// A router's gateway on an external network.
    RouterGateway,
    /// The network's DHCP server.
    Dhcp,
    /// Something on the host that brings its own link under the tap's name.
    External,
}

/// Addresses that a port may send from besides its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AddressPair {
    /// Ethernet address; absent: the port's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// Address or range.
    #[schemars(with = "String")]
    pub address: IpNet,
}

/// A DHCP option, by its dnsmasq name (`bootfile-name`) or number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DhcpOption {
    /// Name or decimal number.
    pub name: String,
    /// Value as text.
    pub value: String,
    /// 4 or 6. Default: 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip_version: Option<u8>,
}

/// Allow rules shared by ports. What no rule allows is dropped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SecurityGroupSpec {
    /// Whether answers to allowed flows are allowed too.
    #[serde(default = "yes")]
    pub stateful: bool,
    /// What is allowed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<SecurityGroupRule>,
}

/// From the port's view: into the guest or out of it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the guest.
    Ingress,
    /// From the guest.
    Egress,
}

/// Address family of a rule.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum Ethertype {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

/// One thing that is allowed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SecurityGroupRule {
    /// Into the guest or out of it.
    pub direction: Direction,
    /// Address family. Default: IPv4.
    #[serde(default = "ipv4")]
    pub ethertype: Ethertype,
    /// `tcp`, `udp`, `icmp`, … or a decimal number 0 to 255. Absent: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// First port; for ICMP the type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_range_min: Option<u16>,
    /// Last port; for ICMP the code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port_range_max: Option<u16>,
    /// The other side's addresses. At most one of the three remotes may be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub remote_cidr: Option<IpNet>,
    /// The other side is a member of this group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote_group: Option<SecurityGroupId>,
    /// The other side is in this list.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    #[schemars(with = "Vec<String>")]
    pub remote_addresses: BTreeSet<IpNet>,
}

fn ipv4() -> Ethertype {
    Ethertype::IPv4
}

/// Limits and marks on a port's traffic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QosPolicySpec {
    /// Limits on bandwidth, one per direction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bandwidth: Vec<BandwidthLimit>,
    /// Limits on packet rate, one per direction.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packet_rate: Vec<PacketRateLimit>,
    /// DSCP mark of what the guest sends, 0 to 63.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dscp: Option<u8>,
}

/// A limit on bandwidth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BandwidthLimit {
    /// Into the guest or out of it.
    pub direction: Direction,
    /// Kilobits (1000 bits) a second, at least 1.
    pub max_kbps: u32,
    /// Burst in kilobits. Default: 80 % of one second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_burst_kbit: Option<u32>,
}

/// A limit on packet rate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PacketRateLimit {
    /// Into the guest or out of it.
    pub direction: Direction,
    /// Thousand packets a second, at least 1.
    pub max_kpps: u32,
}

/// Joins subnets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RouterSpec {
    /// The host that has it.
    pub host: String,
    /// Ports of it on internal networks.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub interfaces: BTreeSet<PortId>,
    /// Its way out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<RouterGateway>,
    /// Static routes. Several with one destination share the load.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// Whether it forwards.
    #[serde(default = "yes")]
    pub admin_up: bool,
}

/// A router's way out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RouterGateway {
    /// The port on the external network; its fixed IPs are the router's external addresses.
    pub port: PortId,
    /// Whether internal addresses are translated to the first external one.
    #[serde(default = "yes")]
    pub snat: bool,
}

/// An external address mapped onto a fixed one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FloatingIpSpec {
    /// The external address.
    pub address: IpAddr,
    /// The router that translates.
    pub router: RouterId,
    /// The port it leads to; absent with port forwardings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<PortId>,
    /// Which of the port's addresses. Default: its first of the same family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed_address: Option<IpAddr>,
    /// Single ports led to different places, when `port` is absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_forwardings: Vec<PortForwarding>,
}

/// One external port led to one internal port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortForwarding {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Port of the floating IP.
    pub external_port: u16,
    /// Address it leads to.
    pub internal_address: IpAddr,
    /// Port it leads to.
    pub internal_port: u16,
}

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
        Ok(())
    }
}

fn is_host_name(name: &str) -> bool {
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
        let name = self.protocol.as_deref()?;
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
                && name != "any"
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
        for (index, forward) in self.port_forwardings.iter().enumerate() {
            if !matches!(forward.protocol.as_str(), "tcp" | "udp") {
                return broken(format!("port_forwardings[{index}].protocol"), "must be tcp or udp");
            }
            if forward.external_port == 0 || forward.internal_port == 0 {
                return broken(format!("port_forwardings[{index}]"), "ports are 1 to 65535");
            }
        }
        Ok(())
    }
}
