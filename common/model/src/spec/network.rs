//! What is wanted of the network agent. The words are Neutron's.

pub(crate) mod check;
mod forwarding;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::guest::GuestData;
use super::yes;
use crate::{MacAddr, Name, NetworkId, PortId, QosPolicyId, RouterId, SecurityGroupId};

pub use forwarding::{InvalidPorts, PortForwarding, PortRange};

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
    /// Domains that guests look up short names in, besides `dns_domain`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search_domains: Vec<String>,
    /// Time servers told to guests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ntp_servers: Vec<IpAddr>,
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
    /// Address of the DHCP port on it. Absent: the lowest free one is taken by the controller. Where
    /// guests make their own IPv6 addresses, or no controller did, the agent takes that of the
    /// network's port of owner `dhcp`; else the gateway's on IPv4, if nobody else has it, and on IPv6
    /// one made from the server's Ethernet address, if the prefix has 64 bits.
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
    /// What the metadata service tells the guest behind it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<Arc<GuestData>>,
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
    /// Ports led to different places, when `port` is absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_forwardings: Vec<PortForwarding>,
}
