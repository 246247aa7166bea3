//! Links: reading, creating, changing and deleting them.

mod kind;

use std::fs::File;
use std::io;

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, BridgeStpState, InfoBridge, InfoBridgePort, InfoData,
    InfoKind, InfoPortData, InfoPortKind, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags,
    LinkInfo, LinkMessage,
};
use stackhand_model::MacAddr;

use super::Links;
use crate::KernelError;
use crate::tun::{NewTap, VirtioHeader};

pub use kind::{Bridge, BridgePort, Geneve, Gre, LinkKind, NewKind, Peer, Tap, Vxlan};
use kind::{bridge_data, describe, parse_info};

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
    /// The kernel's name for the kind of queue at its root.
    pub queue: String,
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
        self.find(query).await.map_err(|source| refused("read", name, source))
    }

    /// The link with this number, or `None`.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn numbered(&self, index: u32) -> Result<Option<Link>, KernelError> {
        let mut query = LinkMessage::default();
        query.header.index = index;
        self.find(query).await.map_err(|source| refused("read", &format!("number {index}"), source))
    }

    async fn find(&self, mut query: LinkMessage) -> io::Result<Option<Link>> {
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
            result => result.map(|()| found),
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
        if let NewKind::Vlan { parent, .. } = &new.kind {
            message.attributes.push(LinkAttribute::Link(*parent));
        }
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

    /// Turns on or off that a VXLAN link learns where addresses are from what it receives.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn set_learning(
        &self,
        index: u32,
        name: &str,
        learning: bool,
    ) -> Result<(), KernelError> {
        let data = InfoData::Vxlan(vec![InfoVxlan::Learning(learning)]);
        let info = vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(data)];
        self.change_info(index, name, info).await
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
            LinkAttribute::Qdisc(queue) => link.queue.clone_from(queue),
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
