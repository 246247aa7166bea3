//! Names of links and namespaces, and the marks that say they are ours.
//!
//! The names are OpenStack's, so that a host can be taken over and given back. A name alone proves
//! nothing: what we may change or delete carries a mark in its alias.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use smol_str::{SmolStr, format_smolstr};
use stackhand_kernel::netlink::MAX_LINK_NAME;
use stackhand_model::{NetworkId, ObjectRef, PortId, RouterId};
use uuid::Uuid;

/// The group that links we make are in until they carry their mark: a link of ours that a crash
/// left without one is known by it.
pub const UNFINISHED_GROUP: u32 = 0x5348_0001;

/// What an alias of ours says: what the link serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mark {
    /// A bridge, an uplink, or the loopback link of a DHCP namespace.
    Network(NetworkId),
    /// A port's tap, or either end of the pair that leads to its router.
    Port(PortId),
    /// Either end of the pair that leads to a network's DHCP server.
    Dhcp(NetworkId),
    /// The loopback link of a router's namespace.
    Router(RouterId),
}

/// Text that is not a mark of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMark;

impl Mark {
    /// The document that the link serves.
    #[must_use]
    pub fn object(self) -> ObjectRef {
        match self {
            Self::Network(id) | Self::Dhcp(id) => id.object(),
            Self::Port(id) => id.object(),
            Self::Router(id) => id.object(),
        }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(id) => write!(f, "stackhand:network:{id}"),
            Self::Port(id) => write!(f, "stackhand:port:{id}"),
            Self::Dhcp(id) => write!(f, "stackhand:dhcp:{id}"),
            Self::Router(id) => write!(f, "stackhand:router:{id}"),
        }
    }
}

impl FromStr for Mark {
    type Err = NoMark;

    fn from_str(text: &str) -> Result<Self, NoMark> {
        let mut parts = text.splitn(3, ':');
        let (Some("stackhand"), Some(kind), Some(id)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(NoMark);
        };
        let id = Uuid::parse_str(id).map_err(|_| NoMark)?;
        let mark = match kind {
            "network" => Self::Network(NetworkId(id)),
            "port" => Self::Port(PortId(id)),
            "dhcp" => Self::Dhcp(NetworkId(id)),
            "router" => Self::Router(RouterId(id)),
            _ => return Err(NoMark),
        };
        // Only what we would have written, letter by letter.
        if mark.to_string() == text { Ok(mark) } else { Err(NoMark) }
    }
}

/// A network's bridge.
#[must_use]
pub fn bridge(network: NetworkId) -> SmolStr {
    format_smolstr!("brq{}", network.short())
}

/// A port's tap, or the host's end of the pair to a DHCP server or router.
#[must_use]
pub fn tap(port: PortId) -> SmolStr {
    format_smolstr!("tap{}", port.short())
}

/// The link whose queue holds what a port's guest sends.
#[must_use]
pub fn ifb(port: PortId) -> SmolStr {
    format_smolstr!("ifb{}", port.short())
}

/// The DHCP server's end of its pair.
#[must_use]
pub fn dhcp_link(port: PortId) -> SmolStr {
    format_smolstr!("ns-{}", port.short())
}

/// The namespace of a network's DHCP server.
#[must_use]
pub fn dhcp_space(network: NetworkId) -> SmolStr {
    format_smolstr!("qdhcp-{network}")
}

/// The namespace of a router.
#[must_use]
pub fn router_space(router: RouterId) -> SmolStr {
    format_smolstr!("qrouter-{router}")
}

/// A router's link on an internal network.
#[must_use]
pub fn router_link(port: PortId) -> SmolStr {
    format_smolstr!("qr-{}", port.short())
}

/// A router's link on its external network.
#[must_use]
pub fn gateway_link(port: PortId) -> SmolStr {
    format_smolstr!("qg-{}", port.short())
}

/// The object whose namespace would have this name.
#[must_use]
pub fn object_of_space(name: &str) -> Option<ObjectRef> {
    let (kind, id) = name.split_once('-')?;
    let id = Uuid::parse_str(id).ok()?;
    let (object, made) = match kind {
        "qdhcp" => (NetworkId(id).object(), dhcp_space(NetworkId(id))),
        "qrouter" => (RouterId(id).object(), router_space(RouterId(id))),
        _ => return None,
    };
    (made == name).then_some(object)
}

/// The link that carries a VNI between hosts.
#[must_use]
pub fn vxlan(vni: u32) -> SmolStr {
    format_smolstr!("vxlan-{vni}")
}

/// The link of one VLAN of another link: `eth0.7`. Where that would be too long for the kernel,
/// the other link's name is cut and told apart by its digest, as the Linux bridge agent does it.
#[must_use]
pub fn vlan(link: &str, id: u16) -> SmolStr {
    let name = format_smolstr!("{link}.{id}");
    if name.len() <= MAX_LINK_NAME {
        return name;
    }
    let start: String = link.chars().take(4).collect();
    let digest = sha1_smol::Sha1::from(link).digest().to_string();
    format_smolstr!("{start}{}.{id}", &digest[..6])
}

/// The link that carries a network to another host by GRE.
#[must_use]
pub fn gre(network: NetworkId, remote: IpAddr) -> SmolStr {
    format_smolstr!("gre-{}", toward(network, remote))
}

/// The link that carries a network to another host by Geneve.
#[must_use]
pub fn geneve(network: NetworkId, remote: IpAddr) -> SmolStr {
    format_smolstr!("gnv-{}", toward(network, remote))
}

/// Eleven characters for a network and another host.
fn toward(network: NetworkId, remote: IpAddr) -> String {
    let id = Uuid::new_v5(&network.0, remote.to_string().as_bytes());
    PortId(id).short()
}

/// Whether a link of this name is worth looking at: ours, or one that somebody brings for a port.
#[must_use]
pub fn may_matter(name: &str) -> bool {
    let starts = ["brq", "tap", "ifb", "vxlan-", "gre-", "gnv-", "ns-", "qr-", "qg-"];
    name.contains('.') || starts.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_fit_the_kernel_and_follow_openstack() {
        let id = Uuid::parse_str("6f0c8a8e-0d1b-4f0e-9a43-2f9a2f0c5a11").unwrap();
        assert_eq!(bridge(NetworkId(id)), "brq6f0c8a8e-0d");
        assert_eq!(tap(PortId(id)), "tap6f0c8a8e-0d");
        assert_eq!(dhcp_link(PortId(id)), "ns-6f0c8a8e-0d");
        assert!(vxlan(0x00ff_ffff).len() <= 15);
        assert_eq!(vlan("eth0", 4094), "eth0.4094");
        // What OpenStack's Linux bridge agent makes of such a name.
        assert_eq!(vlan("enp131s0f0np0", 100), "enp1179a39.100");
        for remote in ["192.0.2.2", "2001:db8::2"].map(|remote| remote.parse().unwrap()) {
            let names = [gre(NetworkId(id), remote), geneve(NetworkId(id), remote)];
            assert!(names.iter().all(|name| name.len() == 15 && may_matter(name)), "{names:?}");
        }
        assert_eq!(router_link(PortId(id)), "qr-6f0c8a8e-0d");
        assert_eq!(gateway_link(PortId(id)), "qg-6f0c8a8e-0d");
        assert_eq!(object_of_space(&dhcp_space(NetworkId(id))), Some(NetworkId(id).object()));
        assert_eq!(object_of_space(&router_space(RouterId(id))), Some(RouterId(id).object()));
        assert_eq!(object_of_space("qdhcp-6F0C8A8E-0D1B-4F0E-9A43-2F9A2F0C5A11"), None);
        assert_eq!(object_of_space("vm-6f0c8a8e-0d1b-4f0e-9a43-2f9a2f0c5a11"), None);
    }

    proptest! {
        #[test]
        fn a_mark_reads_back_and_nothing_else_is_one(bits: u128, noise in ".{0,60}") {
            let id = Uuid::from_u128(bits);
            let (network, port) = (NetworkId(id), PortId(id));
            for mark in [Mark::Network(network), Mark::Port(port), Mark::Dhcp(network), Mark::Router(RouterId(id))] {
                prop_assert_eq!(mark.to_string().parse(), Ok(mark));
            }
            prop_assert_eq!(noise.parse::<Mark>(), Err(NoMark));
            let upper = format!("stackhand:port:{}", id.to_string().to_uppercase());
            if upper != Mark::Port(PortId(id)).to_string() {
                prop_assert_eq!(upper.parse::<Mark>(), Err(NoMark));
            }
        }
    }
}
