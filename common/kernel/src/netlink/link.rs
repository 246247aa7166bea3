//! Links: reading, creating, changing and deleting them.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use rtnetlink::packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, Nla};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, BridgeStpState, InfoBridge, InfoBridgePort, InfoData,
    InfoKind, InfoPortData, InfoPortKind, InfoTun, InfoVeth, InfoVxlan, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use stackhand_model::MacAddr;

use super::Links;
use crate::KernelError;
use crate::tun::{NewTap, VirtioHeader};

/// Longest name of a link in bytes.
pub const MAX_LINK_NAME: usize = 15;

/// A link as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: LinkKind,
    /// Free text, up to 255 bytes; where we put our mark.
    pub alias: Option<String>,
    /// Its Ethernet address.
    pub mac: Option<MacAddr>,
    /// Number of the bridge (or bond, …) it belongs to.
    pub master: Option<u32>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// Whether somebody wants it up.
    pub up: bool,
    /// Whether it can carry frames: for a tap, whether somebody has it open.
    pub carrier: bool,
    /// Its group; 0 unless somebody set another.
    pub group: u32,
    /// Number of the link beneath it or of its peer.
    pub parent: Option<u32>,
    /// Which namespace `parent` is in, if in another, by this namespace's numbering.
    pub parent_netns: Option<i32>,
    /// Whether IPv6 is turned off on it; `None` where the kernel has no IPv6.
    pub ipv6_off: Option<bool>,
    /// Its settings as a port of a bridge.
    pub port: Option<BridgePort>,
    /// How packets that come by it are routed and answered.
    pub routing: Routing,
}

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

/// How packets that come by a link are routed and answered; `sysctl net.ipv4.conf.<link>`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Routing {
    /// Whether IPv4 packets for others are forwarded.
    pub forwarding: bool,
    /// For which addresses ARP is answered: 0 any of the host's, 1 only the link's own.
    pub arp_ignore: i32,
    /// Which address ARP asks from: 0 any, 2 the best of the link's own.
    pub arp_announce: i32,
    /// Whether the way back must be by the same link: 0 no, 1 yes, 2 by any.
    pub rp_filter: i32,
    /// Whether senders are told of a shorter way.
    pub send_redirects: bool,
    /// The same for IPv6; `None` where the kernel has none.
    pub v6: Option<RoutingV6>,
}

/// How IPv6 packets that come by a link are routed; `sysctl net.ipv6.conf.<link>`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RoutingV6 {
    /// Whether packets for others are forwarded.
    pub forwarding: bool,
    /// Whether router advertisements are taken: 0 never, 1 unless forwarding, 2 always.
    pub accept_ra: i32,
    /// Whether a new address is held back until nobody else is found to have it.
    pub accept_dad: i32,
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

/// A link to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewLink {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: NewKind,
    /// Its group from the first moment on. Not for taps.
    pub group: u32,
    /// What else is set before anybody else can take the link for abandoned.
    pub change: LinkChange,
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

/// What is to change on a link. What is `None` stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkChange {
    /// Its alias; empty text takes it away.
    pub alias: Option<String>,
    /// Its Ethernet address.
    pub mac: Option<MacAddr>,
    /// The number of its bridge; `Some(None)` takes it out.
    pub master: Option<Option<u32>>,
    /// Largest packet in bytes.
    pub mtu: Option<u32>,
    /// Up or down.
    pub up: Option<bool>,
    /// Its group.
    pub group: Option<u32>,
}

impl Links {
    /// Every link of the namespace, by number.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn links(&self) -> Result<Vec<Link>, KernelError> {
        let mut query = LinkMessage::default();
        query.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let mut links = self
            .dump(RouteNetlinkMessage::GetLink(query), |answer| match answer {
                RouteNetlinkMessage::NewLink(message) => Some(parse(&message)),
                _ => None,
            })
            .await
            .map_err(|source| refused("list", "links", source))?;
        links.sort_by_key(|link| link.index);
        links.dedup_by_key(|link| link.index);
        Ok(links)
    }

    /// The link called `name`, or `None`.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, KernelError> {
        check_name(name)?;
        let mut query = LinkMessage::default();
        query.attributes.push(LinkAttribute::IfName(name.to_owned()));
        query.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let mut found = None;
        let result = self
            .get(RouteNetlinkMessage::GetLink(query), |answer| {
                if let RouteNetlinkMessage::NewLink(message) = answer {
                    found = Some(parse(&message));
                }
            })
            .await;
        match result {
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => Ok(None),
            Err(source) => Err(refused("read", name, source)),
            Ok(()) => Ok(found),
        }
    }

    /// The number of the link called `name`.
    ///
    /// # Errors
    ///
    /// Fails with [`KernelError::NoSuchLink`] if there is none.
    pub async fn index(&self, name: &str) -> Result<u32, KernelError> {
        let link = self.link(name).await?;
        link.map(|link| link.index).ok_or_else(|| KernelError::NoSuchLink { link: name.to_owned() })
    }

    /// Makes a link. A tap is made in the namespace of the calling thread, which must be this
    /// handle's; the other end of a pair goes to `peer_namespace`.
    ///
    /// A link that netlink makes is in the group given from its first moment on; its alias
    /// follows in a second request. A tap has its alias before it persists.
    ///
    /// # Errors
    ///
    /// Fails if a link of that name exists, or if the kernel lacks the kind.
    pub async fn create(
        &self,
        new: &NewLink,
        peer_namespace: Option<&File>,
    ) -> Result<(), KernelError> {
        check_name(&new.name)?;
        if let NewKind::Tap(tap) = &new.kind {
            return self.create_tap(&new.name, *tap, &new.change).await;
        }
        let (kind, data) = describe(&new.kind, peer_namespace)?;
        let mut info = vec![LinkInfo::Kind(kind)];
        info.extend(data.map(LinkInfo::Data));
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(new.name.clone()));
        message.attributes.push(LinkAttribute::LinkInfo(info));
        message.attributes.push(LinkAttribute::Group(new.group));
        if let Some(mtu) = new.change.mtu {
            message.attributes.push(LinkAttribute::Mtu(mtu));
        }
        self.write(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
            .await
            .map_err(|source| refused("create", &new.name, source))?;
        if new.change == LinkChange::default() {
            return Ok(());
        }
        let index = self.index(&new.name).await?;
        self.change(index, &new.name, &new.change).await
    }

    async fn create_tap(
        &self,
        name: &str,
        tap: Tap,
        change: &LinkChange,
    ) -> Result<(), KernelError> {
        if self.link(name).await?.is_some() {
            let exists = io::Error::from_raw_os_error(nix::libc::EEXIST);
            return Err(refused("create", name, exists));
        }
        let new = NewTap::open(name, tap.multi_queue, VirtioHeader::With)?;
        self.writes().add();
        new.own(tap.user, tap.group)?;
        let index = self.index(name).await?;
        self.change(index, name, change).await?;
        if tap.persist {
            new.persist()?;
            self.writes().add();
        }
        Ok(())
    }

    /// Changes a link in one request. `name` is for the error alone.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal; what was changed before it stays.
    pub async fn change(
        &self,
        index: u32,
        name: &str,
        change: &LinkChange,
    ) -> Result<(), KernelError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let attributes = &mut message.attributes;
        if let Some(alias) = &change.alias {
            attributes.push(LinkAttribute::IfAlias(alias.clone()));
        }
        if let Some(mac) = change.mac {
            attributes.push(LinkAttribute::Address(mac.0.to_vec()));
        }
        if let Some(master) = change.master {
            attributes.push(LinkAttribute::Controller(master.unwrap_or(0)));
        }
        if let Some(mtu) = change.mtu {
            attributes.push(LinkAttribute::Mtu(mtu));
        }
        if let Some(group) = change.group {
            attributes.push(LinkAttribute::Group(group));
        }
        if let Some(up) = change.up {
            message.header.change_mask = LinkFlags::Up;
            message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        }
        self.write(RouteNetlinkMessage::SetLink(message), 0)
            .await
            .map_err(|source| refused("change", name, source))
    }

    /// Changes a bridge's settings.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn change_bridge(
        &self,
        index: u32,
        name: &str,
        bridge: Bridge,
    ) -> Result<(), KernelError> {
        let info =
            |data| vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(InfoData::Bridge(data))];
        // The kernel takes attributes in its own order, and no delay of zero while the protocol
        // runs.
        if !bridge.stp {
            let off = vec![InfoBridge::StpState(BridgeStpState::Disabled)];
            self.change_info(index, name, info(off)).await?;
        }
        self.change_info(index, name, info(bridge_data(bridge))).await
    }

    /// Changes a link's settings as the port of a bridge, which it must be.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn change_port(
        &self,
        index: u32,
        name: &str,
        port: BridgePort,
    ) -> Result<(), KernelError> {
        let data = vec![
            InfoBridgePort::HairpinMode(port.hairpin),
            InfoBridgePort::NeighSupress(port.neighbour_suppression),
            InfoBridgePort::Isolated(port.isolated),
        ];
        let info = vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(data)),
        ];
        self.change_info(index, name, info).await
    }

    async fn change_info(
        &self,
        index: u32,
        name: &str,
        info: Vec<LinkInfo>,
    ) -> Result<(), KernelError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::LinkInfo(info));
        self.write(RouteNetlinkMessage::NewLink(message), 0)
            .await
            .map_err(|source| refused("change", name, source))
    }

    /// Deletes links by number, all at once: the kernel waits for its readers once per request,
    /// some 17 ms, and not once per link.
    ///
    /// `group` must be a group that no other link is in. Links that are gone already are fine.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal, for instance for a link of a kind that cannot be deleted.
    pub async fn delete(&self, links: &[(u32, String)], group: u32) -> Result<(), KernelError> {
        let mut doomed = 0;
        for (index, name) in links {
            let change = LinkChange { group: Some(group), ..LinkChange::default() };
            match self.change(*index, name, &change).await {
                Err(error) if error.is_absent() => {}
                result => {
                    result?;
                    doomed += 1;
                }
            }
        }
        if doomed == 0 {
            return Ok(());
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(group));
        match self.write(RouteNetlinkMessage::DelLink(message), 0).await {
            // One end of a pair that went with the other.
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => Ok(()),
            result => result.map_err(|source| {
                let names: Vec<&str> = links.iter().map(|(_, name)| name.as_str()).collect();
                refused("delete", &names.join(", "), source)
            }),
        }
    }
}

/// The kind of a new link in netlink's words.
fn describe(
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
        NewKind::Plain(kind) => (InfoKind::Other(kind.clone()), None),
        NewKind::Tap(_) => {
            return Err(KernelError::BadName { name: "tap".to_owned(), what: "netlink kind" });
        }
    })
}

fn bridge_data(bridge: Bridge) -> Vec<InfoBridge> {
    let stp = if bridge.stp { BridgeStpState::KernelStp } else { BridgeStpState::Disabled };
    vec![
        InfoBridge::ForwardDelay(bridge.forward_delay),
        InfoBridge::StpState(stp),
        InfoBridge::MulticastSnooping(bridge.multicast_snooping),
        InfoBridge::NfCallIpTables(bridge.netfilter),
        InfoBridge::NfCallIp6Tables(bridge.netfilter),
    ]
}

pub(super) fn parse(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Address(bytes) => {
                link.mac = bytes.as_slice().try_into().ok().map(MacAddr);
            }
            LinkAttribute::Controller(master) => link.master = Some(*master).filter(|at| *at != 0),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Group(group) => link.group = *group,
            LinkAttribute::Link(parent) => link.parent = Some(*parent).filter(|at| *at != 0),
            LinkAttribute::LinkNetNsId(id) => link.parent_netns = Some(*id),
            LinkAttribute::AfSpecUnspec(families) => parse_families(&mut link, families),
            LinkAttribute::LinkInfo(info) => parse_info(&mut link, info),
            _ => {}
        }
    }
    link
}

fn parse_families(link: &mut Link, families: &[AfSpecUnspec]) {
    for family in families {
        match family {
            AfSpecUnspec::Inet(settings) => {
                for setting in settings {
                    let AfSpecInet::DevConf(conf) = setting else { continue };
                    link.routing.forwarding = conf.forwarding != 0;
                    link.routing.arp_ignore = conf.arp_ignore;
                    link.routing.arp_announce = conf.arp_announce;
                    link.routing.rp_filter = conf.rp_filter;
                    link.routing.send_redirects = conf.send_redirects != 0;
                }
            }
            AfSpecUnspec::Inet6(settings) => {
                for setting in settings {
                    let AfSpecInet6::DevConf(conf) = setting else { continue };
                    link.ipv6_off = Some(conf.disable_ipv6 != 0);
                    link.routing.v6 = Some(RoutingV6 {
                        forwarding: conf.forwarding != 0,
                        accept_ra: conf.accept_ra,
                        accept_dad: conf.accept_dad,
                    });
                }
            }
            _ => {}
        }
    }
}

fn parse_info(link: &mut Link, info: &[LinkInfo]) {
    let mut data = None;
    for part in info {
        match part {
            LinkInfo::Kind(InfoKind::Veth) => link.kind = LinkKind::Veth,
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
        Some(InfoData::Tun(settings)) => {
            if let Some(tap) = parse_tap(settings) {
                link.kind = LinkKind::Tap(tap);
            }
        }
        _ => {}
    }
}

fn parse_bridge(settings: &[InfoBridge]) -> Bridge {
    let mut bridge =
        Bridge { stp: false, forward_delay: 0, multicast_snooping: false, netfilter: false };
    for setting in settings {
        match setting {
            InfoBridge::StpState(state) => bridge.stp = *state != BridgeStpState::Disabled,
            InfoBridge::ForwardDelay(delay) => bridge.forward_delay = *delay,
            InfoBridge::MulticastSnooping(on) => bridge.multicast_snooping = *on,
            // They are set together.
            InfoBridge::NfCallIpTables(on) => bridge.netfilter |= *on,
            InfoBridge::NfCallIp6Tables(on) => bridge.netfilter |= *on,
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

fn check_name(name: &str) -> Result<(), KernelError> {
    let good = (1..=MAX_LINK_NAME).contains(&name.len())
        && !matches!(name, "." | "..")
        && !name.contains(|c: char| c.is_whitespace() || c.is_control() || "/:%".contains(c));
    if good {
        return Ok(());
    }
    Err(KernelError::BadName { name: name.to_owned(), what: "link name" })
}

fn refused(action: &'static str, name: &str, source: io::Error) -> KernelError {
    let object = if name == "links" { name.to_owned() } else { format!("link {name}") };
    KernelError::Netlink { action, object, source }
}
