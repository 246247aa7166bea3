//! Kinds of link: their settings, in our words and in netlink's.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use rtnetlink::packet_core::{DefaultNla, Nla};
use rtnetlink::packet_route::link::{
    BridgeStpState, GreIOFlags, InfoBridge, InfoBridgePort, InfoData, InfoGeneve, InfoGre,
    InfoGre6, InfoKind, InfoPortData, InfoTun, InfoVeth, InfoVlan, InfoVxlan, LinkAttribute,
    LinkInfo, LinkMessage,
};
use stackhand_model::MacAddr;

use super::{Link, check_name};
use crate::KernelError;

/// What a link is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum LinkKind {
    /// A link that a driver made: an Ethernet card, loopback.
    #[default]
    Hardware,
    /// A bridge.
    Bridge(Bridge),
    /// One end of a pair.
    Veth,
    /// Ethernet in UDP.
    Vxlan(Vxlan),
    /// One VLAN of another link, [`Link::parent`].
    Vlan(u16),
    /// Ethernet in GRE, to one other host.
    Gre(Gre),
    /// Ethernet in UDP as RFC 8926 has it, to one other host.
    Geneve(Geneve),
    /// What is redirected to it by a filter comes out of its queue.
    Ifb,
    /// A link whose other end is a file.
    Tap(Tap),
    /// Anything else, by the kernel's name for it.
    Other(String),
}

/// Settings of a bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bridge {
    /// Whether the kernel or a program runs the spanning tree protocol.
    pub stp: bool,
    /// Hundredths of a second that a new port waits before it forwards.
    pub forward_delay: u32,
    /// Hundredths of a second that an address is remembered after its last frame.
    pub ageing_time: u32,
    /// Whether multicast goes only to ports that asked for it.
    pub multicast_snooping: bool,
    /// Whether `br_netfilter` shows its packets to the IP layer's hooks, whatever the host's
    /// sysctls say.
    pub netfilter: bool,
}

/// Settings of a VXLAN link.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vxlan {
    /// Network identifier.
    pub vni: u32,
    /// Address that it sends from and listens on.
    pub local: Option<IpAddr>,
    /// UDP port.
    pub port: u16,
    /// Whether it learns where addresses are from the frames it receives.
    pub learning: bool,
}

/// Settings of a GRE tunnel that carries Ethernet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gre {
    /// The key that tells its packets from those of other tunnels between the two hosts.
    pub key: u32,
    /// Address that it sends from.
    pub local: IpAddr,
    /// Address that it sends to, of the same family.
    pub remote: IpAddr,
}

/// Settings of a Geneve tunnel.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Geneve {
    /// Network identifier.
    pub vni: u32,
    /// Address that it sends to.
    pub remote: IpAddr,
    /// UDP port.
    pub port: u16,
}

/// Settings of a tap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tap {
    /// User that may attach to it.
    pub user: Option<u32>,
    /// Group that may attach to it.
    pub group: Option<u32>,
    /// Whether it has several queues.
    pub multi_queue: bool,
    /// Whether it stays when nobody has it open.
    pub persist: bool,
}

/// Settings of a bridge's port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct BridgePort {
    /// Whether it exchanges no frames with other isolated ports.
    pub isolated: bool,
    /// Whether the bridge answers ARP and ND for addresses behind it, instead of flooding.
    pub neighbour_suppression: bool,
    /// Whether a frame may leave where it came from.
    pub hairpin: bool,
}

/// What kind of link is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewKind {
    /// A bridge.
    Bridge(Bridge),
    /// A pair; the other end goes to another namespace.
    Veth(Peer),
    /// Ethernet in UDP.
    Vxlan(Vxlan),
    /// One VLAN of another link.
    Vlan {
        /// Number of the other link.
        parent: u32,
        /// The VLAN.
        id: u16,
    },
    /// Ethernet in GRE.
    Gre(Gre),
    /// Ethernet in UDP as RFC 8926 has it.
    Geneve(Geneve),
    /// A queue for what a filter redirects to it.
    Ifb,
    /// A tap that persists.
    Tap(Tap),
    /// Any other kind with the kernel's defaults, to try whether the kernel knows it.
    Plain(String),
}

/// The other end of a new veth pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: Option<MacAddr>,
    /// Its largest packet in bytes.
    pub mtu: Option<u32>,
    /// Its group.
    pub group: u32,
}

/// The kind of a new link in netlink's words.
pub(super) fn describe(
    kind: &NewKind,
    peer_namespace: Option<&File>,
) -> Result<(InfoKind, Option<InfoData>), KernelError> {
    Ok(match kind {
        NewKind::Bridge(bridge) => (InfoKind::Bridge, Some(InfoData::Bridge(bridge_data(*bridge)))),
        NewKind::Veth(peer) => {
            check_name(&peer.name)?;
            let mut other = LinkMessage::default();
            other.attributes.push(LinkAttribute::IfName(peer.name.clone()));
            other.attributes.push(LinkAttribute::Group(peer.group));
            other.attributes.extend(peer.mac.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
            other.attributes.extend(peer.mtu.map(LinkAttribute::Mtu));
            other
                .attributes
                .extend(peer_namespace.map(|file| LinkAttribute::NetNsFd(file.as_raw_fd())));
            (InfoKind::Veth, Some(InfoData::Veth(InfoVeth::Peer(other))))
        }
        NewKind::Vxlan(vxlan) => {
            let mut data = vec![InfoVxlan::Id(vxlan.vni), InfoVxlan::Learning(vxlan.learning)];
            data.push(InfoVxlan::Port(vxlan.port));
            match vxlan.local {
                Some(IpAddr::V4(local)) => data.push(InfoVxlan::Local(local)),
                Some(IpAddr::V6(local)) => {
                    data.push(InfoVxlan::Local6(local));
                    // Without these the kernel drops what other hosts send without a checksum.
                    data.push(InfoVxlan::UDPZeroCsumRX(true));
                }
                None => {}
            }
            (InfoKind::Vxlan, Some(InfoData::Vxlan(data)))
        }
        // The other link is an attribute of the message itself.
        NewKind::Vlan { id, .. } => (InfoKind::Vlan, Some(InfoData::Vlan(vec![InfoVlan::Id(*id)]))),
        NewKind::Gre(gre) => describe_gre(gre)?,
        NewKind::Geneve(geneve) => {
            let mut data = vec![InfoGeneve::Id(geneve.vni), InfoGeneve::Port(geneve.port)];
            match geneve.remote {
                IpAddr::V4(remote) => data.push(InfoGeneve::Remote(remote)),
                IpAddr::V6(remote) => {
                    data.push(InfoGeneve::Remote6(remote));
                    // As for VXLAN: other hosts may send without a checksum.
                    data.push(InfoGeneve::UdpZeroCsum6Rx(true));
                }
            }
            (InfoKind::Geneve, Some(InfoData::Geneve(data)))
        }
        NewKind::Ifb => (InfoKind::Ifb, None),
        NewKind::Plain(kind) => (InfoKind::Other(kind.clone()), None),
        NewKind::Tap(_) => {
            return Err(KernelError::BadName { name: "tap".to_owned(), what: "netlink kind" });
        }
    })
}

/// A GRE tunnel in netlink's words. The kernel has one kind for each family beneath.
fn describe_gre(gre: &Gre) -> Result<(InfoKind, Option<InfoData>), KernelError> {
    /// No header of its own for the depth of nesting, which takes room that the MTU counts on.
    const IGNORE_ENCAP_LIMIT: (u16, u32) = (13, 1);
    match (gre.local, gre.remote) {
        (IpAddr::V4(local), IpAddr::V4(remote)) => {
            let data = vec![
                InfoGre::IFlags(GreIOFlags::Key),
                InfoGre::OFlags(GreIOFlags::Key),
                InfoGre::IKey(gre.key),
                InfoGre::OKey(gre.key),
                InfoGre::Local(local),
                InfoGre::Remote(remote),
                InfoGre::PathMTUDiscovery(true),
            ];
            Ok((InfoKind::GreTap, Some(InfoData::GreTap(data))))
        }
        (IpAddr::V6(local), IpAddr::V6(remote)) => {
            let (kind, flag) = IGNORE_ENCAP_LIMIT;
            let data = vec![
                InfoGre6::IFlags(GreIOFlags::Key),
                InfoGre6::OFlags(GreIOFlags::Key),
                InfoGre6::IKey(gre.key),
                InfoGre6::OKey(gre.key),
                InfoGre6::Local(local),
                InfoGre6::Remote(remote),
                InfoGre6::Ttl(64),
                InfoGre6::Other(DefaultNla::new(kind, flag.to_ne_bytes().to_vec())),
            ];
            Ok((InfoKind::GreTap6, Some(InfoData::GreTap6(data))))
        }
        _ => Err(KernelError::BadName {
            name: format!("{} to {}", gre.local, gre.remote),
            what: "pair of addresses of one family",
        }),
    }
}

pub(super) fn bridge_data(bridge: Bridge) -> Vec<InfoBridge> {
    let stp = if bridge.stp { BridgeStpState::KernelStp } else { BridgeStpState::Disabled };
    vec![
        InfoBridge::ForwardDelay(bridge.forward_delay),
        InfoBridge::AgeingTime(bridge.ageing_time),
        InfoBridge::StpState(stp),
        InfoBridge::MulticastSnooping(bridge.multicast_snooping),
        InfoBridge::NfCallIpTables(bridge.netfilter),
        InfoBridge::NfCallIp6Tables(bridge.netfilter),
    ]
}

pub(super) fn parse_info(link: &mut Link, info: &[LinkInfo]) {
    let mut data = None;
    for part in info {
        match part {
            LinkInfo::Kind(InfoKind::Veth) => link.kind = LinkKind::Veth,
            LinkInfo::Kind(InfoKind::Ifb) => link.kind = LinkKind::Ifb,
            LinkInfo::Kind(kind) => link.kind = LinkKind::Other(kind.to_string()),
            LinkInfo::Data(given) => data = Some(given),
            LinkInfo::PortData(InfoPortData::BridgePort(settings)) => {
                let mut port = BridgePort::default();
                for setting in settings {
                    match setting {
                        InfoBridgePort::Isolated(on) => port.isolated = *on,
                        InfoBridgePort::NeighSupress(on) => port.neighbour_suppression = *on,
                        InfoBridgePort::HairpinMode(on) => port.hairpin = *on,
                        _ => {}
                    }
                }
                link.port = Some(port);
            }
            _ => {}
        }
    }
    match data {
        Some(InfoData::Bridge(settings)) => link.kind = LinkKind::Bridge(parse_bridge(settings)),
        Some(InfoData::Vxlan(settings)) => link.kind = LinkKind::Vxlan(parse_vxlan(settings)),
        Some(InfoData::Vlan(settings)) => {
            if let Some(id) = parse_vlan(settings) {
                link.kind = LinkKind::Vlan(id);
            }
        }
        Some(InfoData::GreTap(settings)) => {
            if let Some(gre) = parse_gre(settings) {
                link.kind = LinkKind::Gre(gre);
            }
        }
        Some(InfoData::GreTap6(settings)) => {
            if let Some(gre) = parse_gre6(settings) {
                link.kind = LinkKind::Gre(gre);
            }
        }
        Some(InfoData::Geneve(settings)) => {
            if let Some(geneve) = parse_geneve(settings) {
                link.kind = LinkKind::Geneve(geneve);
            }
        }
        Some(InfoData::Tun(settings)) => {
            if let Some(tap) = parse_tap(settings) {
                link.kind = LinkKind::Tap(tap);
            }
        }
        _ => {}
    }
}

fn parse_bridge(settings: &[InfoBridge]) -> Bridge {
    let mut bridge = Bridge {
        stp: false,
        forward_delay: 0,
        ageing_time: 0,
        multicast_snooping: false,
        netfilter: false,
    };
    for setting in settings {
        match setting {
            InfoBridge::StpState(state) => bridge.stp = *state != BridgeStpState::Disabled,
            InfoBridge::ForwardDelay(delay) => bridge.forward_delay = *delay,
            InfoBridge::AgeingTime(time) => bridge.ageing_time = *time,
            InfoBridge::MulticastSnooping(on) => bridge.multicast_snooping = *on,
            // They are set together.
            InfoBridge::NfCallIpTables(on) | InfoBridge::NfCallIp6Tables(on) => {
                bridge.netfilter |= *on;
            }
            _ => {}
        }
    }
    bridge
}

fn parse_vxlan(settings: &[InfoVxlan]) -> Vxlan {
    let mut vxlan = Vxlan { vni: 0, local: None, port: 0, learning: false };
    for setting in settings {
        match setting {
            InfoVxlan::Id(vni) => vxlan.vni = *vni,
            InfoVxlan::Local(local) => vxlan.local = Some(IpAddr::V4(*local)),
            InfoVxlan::Local6(local) => vxlan.local = Some(IpAddr::V6(*local)),
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::Learning(on) => vxlan.learning = *on,
            _ => {}
        }
    }
    vxlan
}

fn parse_vlan(settings: &[InfoVlan]) -> Option<u16> {
    settings.iter().find_map(|setting| match setting {
        InfoVlan::Id(id) => Some(*id),
        _ => None,
    })
}

/// A tunnel between two hosts with a key; other forms are not ours to understand.
fn parse_gre(settings: &[InfoGre]) -> Option<Gre> {
    let (mut key, mut local, mut remote) = (None, None, None);
    for setting in settings {
        match setting {
            InfoGre::OKey(is) => key = Some(*is),
            InfoGre::Local(is) if !is.is_unspecified() => local = Some(IpAddr::V4(*is)),
            InfoGre::Remote(is) if !is.is_unspecified() => remote = Some(IpAddr::V4(*is)),
            _ => {}
        }
    }
    Some(Gre { key: key?, local: local?, remote: remote? })
}

fn parse_gre6(settings: &[InfoGre6]) -> Option<Gre> {
    let (mut key, mut local, mut remote) = (None, None, None);
    for setting in settings {
        match setting {
            InfoGre6::OKey(is) => key = Some(*is),
            InfoGre6::Local(is) if !is.is_unspecified() => local = Some(IpAddr::V6(*is)),
            InfoGre6::Remote(is) if !is.is_unspecified() => remote = Some(IpAddr::V6(*is)),
            _ => {}
        }
    }
    Some(Gre { key: key?, local: local?, remote: remote? })
}

/// A tunnel to one host; `None` for one that takes its target from each packet.
fn parse_geneve(settings: &[InfoGeneve]) -> Option<Geneve> {
    let (mut vni, mut remote, mut port) = (None, None, 0);
    for setting in settings {
        match setting {
            InfoGeneve::Id(is) => vni = Some(*is),
            InfoGeneve::Remote(is) => remote = Some(IpAddr::V4(*is)),
            InfoGeneve::Remote6(is) => remote = Some(IpAddr::V6(*is)),
            InfoGeneve::Port(is) => port = *is,
            _ => {}
        }
    }
    Some(Geneve { vni: vni?, remote: remote?, port })
}

/// The tap's settings, or `None` for a tun, which carries IP packets.
fn parse_tap(settings: &[InfoTun]) -> Option<Tap> {
    const OWNER: u16 = 1;
    const GROUP: u16 = 2;
    const TYPE: u16 = 3;
    const PERSIST: u16 = 6;
    const MULTI_QUEUE: u16 = 7;
    const TYPE_TAP: u8 = 2;
    let mut tap = Tap::default();
    let mut is_tap = false;
    for setting in settings {
        let InfoTun::Other(setting) = setting else { continue };
        let bytes = value(setting);
        let number = || bytes.as_slice().try_into().ok().map(u32::from_ne_bytes);
        let byte = bytes.first().copied().unwrap_or(0);
        match setting.kind() {
            OWNER => tap.user = number(),
            GROUP => tap.group = number(),
            TYPE => is_tap = byte == TYPE_TAP,
            PERSIST => tap.persist = byte != 0,
            MULTI_QUEUE => tap.multi_queue = byte != 0,
            _ => {}
        }
    }
    is_tap.then_some(tap)
}

fn value(setting: &DefaultNla) -> Vec<u8> {
    let mut bytes = vec![0; setting.value_len()];
    setting.emit_value(&mut bytes);
    bytes
}
