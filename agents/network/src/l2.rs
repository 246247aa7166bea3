//! Layer 2: bridges, taps, overlays, and the pairs that lead to DHCP servers and routers.
//!
//! ```text
//! documents ──> Wish ──┐
//!                      ├─> plan (pure) ──> Step … ──> HostNet::apply
//! the host ──> Seen ───┘
//! ```
//!
//! [`Wish`] is what the documents ask of this host, [`Seen`] what the host has. [`plan()`] compares
//! them without touching anything. [`HostNet`] is the seam to the kernel: it looks, and it
//! makes one change at a time. [`Change`] is the vocabulary that planner, kernel, fake, status and
//! `agentctl plan` share.
//!
//! Invariants: nothing without our mark is ever deleted; a link that holds a name of ours without
//! our mark is an error on the object that wants the name; a plan for what is already there is empty.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use smol_str::SmolStr;
use stackhand_kernel::KernelError;
use stackhand_kernel::netlink::{
    Bridge, BridgePort, Geneve, Gre, QueueKind, Routing, RoutingV6, Shaper, Tap, Vxlan,
};
use stackhand_model::{MacAddr, ObjectRef};

use crate::names::Mark;

pub use plan::{Plan, Step, plan};

#[cfg(any(test, feature = "fakes"))]
pub mod fake;
pub mod netlink;
mod plan;
#[cfg(test)]
mod tests;
mod words;
#[cfg(test)]
mod worlds;

/// Where a link is: in a namespace, or on the host itself; and its name there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct At {
    /// The namespace; `None`: the agent's own.
    pub space: Option<SmolStr>,
    /// The link's name.
    pub link: SmolStr,
}

impl At {
    /// A link of the host itself.
    #[must_use]
    pub fn host(link: impl Into<SmolStr>) -> Self {
        Self { space: None, link: link.into() }
    }

    /// A link of a namespace.
    #[must_use]
    pub fn inside(space: impl Into<SmolStr>, link: impl Into<SmolStr>) -> Self {
        Self { space: Some(space.into()), link: link.into() }
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.space {
            Some(space) => write!(f, "{} in {space}", self.link),
            None => f.write_str(&self.link),
        }
    }
}

/// What kind of link is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Make {
    /// A bridge.
    Bridge,
    /// A tap. Owner and group are set when it is made and not compared later.
    Tap(Tap),
    /// The host's end of a pair; the other end is wanted beside it.
    Pair {
        /// Where the other end is.
        peer: At,
        /// The other end's Ethernet address.
        peer_mac: MacAddr,
    },
    /// The end of a pair that is made with the other one.
    PairEnd,
    /// The loopback link, which comes with its namespace.
    Loopback,
    /// An overlay to many hosts.
    Vxlan(Vxlan),
    /// One VLAN of a link of the host.
    Vlan {
        /// The link.
        parent: String,
        /// The VLAN.
        id: u16,
    },
    /// An overlay to one host.
    Gre(Gre),
    /// An overlay to one host.
    Geneve(Geneve),
    /// A queue for what another link receives.
    Ifb,
    /// A link that somebody else brings and takes away; we only wire it.
    Brought,
}

/// The settings of a bridge of ours: no spanning tree, no waiting, five minutes for addresses that
/// were learned, multicast goes everywhere.
pub const BRIDGE: Bridge = Bridge {
    stp: false,
    forward_delay: 0,
    ageing_time: 30_000,
    multicast_snooping: false,
    netfilter: false,
};

/// The settings of a router's links: packets are forwarded, ARP speaks of the link's own addresses
/// alone, answers may come by another link (several routes share the load), nobody's
/// advertisements are believed, and addresses work from the first moment on: the controller gives
/// each to one port.
pub const ROUTING: Routing = Routing {
    forwarding: true,
    arp_ignore: 1,
    arp_announce: 2,
    rp_filter: 0,
    send_redirects: false,
    v6: Some(RoutingV6 { forwarding: true, accept_ra: 0, accept_dad: 0 }),
};

/// The settings of a link that serves guests by IPv6 and routes nothing.
pub const SERVING: Routing = Routing {
    forwarding: false,
    v6: Some(RoutingV6 { forwarding: false, accept_ra: 0, accept_dad: 0 }),
    ..ROUTING
};

/// Settings of a link that can be changed in place. What is `None` is nobody's business.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    /// The mark to write.
    pub mark: Option<Mark>,
    /// Ethernet address.
    pub mac: Option<MacAddr>,
    /// Largest packet in bytes.
    pub mtu: Option<u32>,
    /// The bridge it belongs to; `Some(None)`: none.
    pub bridge: Option<Option<SmolStr>>,
    /// Up or down.
    pub up: Option<bool>,
    /// Whether IPv6 is off: nothing on a bridge of tenants may reach the host by it.
    pub ipv6_off: Option<bool>,
    /// Settings as a bridge's port.
    pub port: Option<BridgePort>,
    /// Settings as a bridge.
    pub as_bridge: Option<Bridge>,
    /// Whether a VXLAN link learns where addresses are.
    pub learning: Option<bool>,
    /// What holds it to a rate; `Some(None)`: nothing of ours.
    pub shaper: Option<Option<Shaper>>,
    /// The link of the host that its received frames go to first; `Some(None)`: none.
    pub redirect: Option<Option<SmolStr>>,
    /// How packets that come by it are routed. Without IPv6 its part of that is nobody's business.
    pub routing: Option<Routing>,
}

/// A link that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The object it serves.
    pub object: ObjectRef,
    /// What it is.
    pub make: Make,
    /// How it is set. Holds the mark, except for what somebody else brings.
    pub set: Set,
    /// Its addresses, exactly; `None`: nobody's business.
    pub addresses: Option<BTreeSet<IpNet>>,
}

/// Where an overlay's link sends what. Only VXLAN has more than the bridge's part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarding {
    /// The host behind which each address lives. More than one only when observed.
    pub unicast: BTreeMap<MacAddr, BTreeSet<IpAddr>>,
    /// Hosts that receive broadcast, multicast and unknown frames.
    pub flood: BTreeSet<IpAddr>,
    /// Addresses that the bridge knows to be behind this link.
    pub in_bridge: BTreeSet<MacAddr>,
}

/// Everything that is wanted of this host at layer 2.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Namespaces, with the mark of their loopback link.
    pub spaces: BTreeMap<SmolStr, Mark>,
    /// Links.
    pub links: BTreeMap<At, Wanted>,
    /// By link of an overlay.
    pub forwarding: BTreeMap<SmolStr, Forwarding>,
    /// By bridge: the neighbours that it answers for.
    pub neighbours: BTreeMap<SmolStr, BTreeMap<IpAddr, MacAddr>>,
    /// Objects whose documents are held, wanted here or not. A marked link of another object is an
    /// orphan.
    pub known: BTreeSet<ObjectRef>,
    /// Links that another object wants, too: who has one keeps it.
    pub contested: BTreeSet<(At, ObjectRef)>,
    /// Links that somebody else brought for ports that are to go: taken out of their bridge.
    pub released: BTreeMap<At, ObjectRef>,
    /// Whether links without any mark are adopted where they are what is wanted under their name.
    pub takeover: bool,
}

/// Whose a link is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Ours, by its mark.
    Ours(Mark),
    /// Ours, made and not marked yet when we were stopped.
    Unfinished,
    /// Anybody else's, with its alias.
    Foreign(Option<String>),
}

/// What kind of link is seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SeenKind {
    /// A bridge.
    Bridge(Bridge),
    /// A tap.
    Tap(Tap),
    /// One end of a pair.
    Pair,
    /// An overlay to many hosts.
    Vxlan(Vxlan),
    /// One VLAN of another link.
    Vlan {
        /// The other link; `None`: in another namespace.
        parent: Option<String>,
        /// The VLAN.
        id: u16,
    },
    /// An overlay to one host.
    Gre(Gre),
    /// An overlay to one host.
    Geneve(Geneve),
    /// A queue for what another link receives.
    Ifb,
    /// The loopback link.
    Loopback,
    /// Anything else.
    Other(String),
}

/// A link that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenLink {
    /// What it is.
    pub kind: SeenKind,
    /// Whose it is.
    pub owner: Owner,
    /// Its Ethernet address.
    pub mac: Option<MacAddr>,
    /// Largest packet in bytes.
    pub mtu: u32,
    /// The bridge it belongs to.
    pub bridge: Option<SmolStr>,
    /// Whether it is up.
    pub up: bool,
    /// Whether it can carry frames; for a tap, whether a guest has it open.
    pub carrier: bool,
    /// Whether IPv6 is off; also where the kernel has none.
    pub ipv6_off: bool,
    /// Settings as a bridge's port.
    pub port: BridgePort,
    /// Its addresses, without link-local ones that the kernel makes by itself.
    pub addresses: BTreeSet<IpNet>,
    /// The queue at its root, where somebody set one.
    pub queue: Option<QueueKind>,
    /// The link that its received frames go to first, by a redirect of ours; empty: one that is
    /// gone. Looked at only for links whose `ifb…` is there.
    pub redirect: Option<SmolStr>,
    /// How packets that come by it are routed.
    pub routing: Routing,
}

/// What the host has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Namespaces that bear a name of ours, with the owner of their loopback link.
    pub spaces: BTreeMap<SmolStr, Owner>,
    /// All links of the host and of those namespaces.
    pub links: BTreeMap<At, SeenLink>,
    /// By link of an overlay that is marked as ours.
    pub forwarding: BTreeMap<SmolStr, Forwarding>,
    /// By bridge that is marked as ours.
    pub neighbours: BTreeMap<SmolStr, BTreeMap<IpAddr, MacAddr>>,
}

impl Seen {
    /// The links of the host itself, without those of namespaces.
    pub fn host(&self) -> impl Iterator<Item = (&At, &SeenLink)> {
        self.links.iter().take_while(|(at, _)| at.space.is_none())
    }
}

/// One change to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Makes a namespace, marks it, and sets its loopback link up. One that exists is marked.
    MakeSpace {
        /// Its name.
        space: SmolStr,
        /// Its mark.
        mark: Mark,
    },
    /// Deletes a namespace with all links in it.
    DeleteSpace {
        /// Its name.
        space: SmolStr,
    },
    /// Makes a link, set as wanted.
    Make {
        /// Where.
        at: At,
        /// What.
        make: Make,
        /// How it is set.
        set: Set,
    },
    /// Changes a link's settings.
    Set {
        /// Where.
        at: At,
        /// The settings that differ.
        set: Set,
    },
    /// Deletes links, all at once.
    Delete {
        /// Links of one namespace.
        links: Vec<At>,
    },
    /// Gives a link an address.
    AddAddress {
        /// Where.
        at: At,
        /// The address.
        net: IpNet,
    },
    /// Takes an address from a link.
    RemoveAddress {
        /// Where.
        at: At,
        /// The address.
        net: IpNet,
    },
    /// Points an address at a host, or adds a host to the flood list (`mac` absent).
    Forward {
        /// The VXLAN link.
        link: SmolStr,
        /// The address.
        mac: Option<MacAddr>,
        /// The host.
        via: IpAddr,
    },
    /// The reverse.
    Unforward {
        /// The VXLAN link.
        link: SmolStr,
        /// The address.
        mac: Option<MacAddr>,
        /// The host.
        via: IpAddr,
    },
    /// Tells the bridge that an address is behind the overlay's link.
    Place {
        /// The link.
        link: SmolStr,
        /// The address.
        mac: MacAddr,
    },
    /// The reverse.
    Unplace {
        /// The link.
        link: SmolStr,
        /// The address.
        mac: MacAddr,
    },
    /// Lets the bridge answer for an address.
    Answer {
        /// The bridge.
        bridge: SmolStr,
        /// The IP address.
        address: IpAddr,
        /// Its Ethernet address.
        mac: MacAddr,
    },
    /// The reverse.
    Unanswer {
        /// The bridge.
        bridge: SmolStr,
        /// The IP address.
        address: IpAddr,
        /// Its Ethernet address.
        mac: MacAddr,
    },
}

/// The two things that layer 2 needs of a host.
pub trait HostNet: Send + Sync {
    /// Looks at everything: the host's links and those of the namespaces that bear our names. As long
    /// as nothing changed, it is the same value.
    fn observe(&self) -> impl Future<Output = Result<Arc<Seen>, KernelError>> + Send;

    /// Makes one change. Repeating a change whose effect is there succeeds or says that it
    /// exists; the host may have moved since it was observed.
    fn apply(&self, change: &Change) -> impl Future<Output = Result<(), KernelError>> + Send;

    /// Makes changes that go together ([`Change::goes_with`]) and tells how each came out. One that
    /// fails stops no other.
    fn apply_all(
        &self,
        changes: &[&Change],
    ) -> impl Future<Output = Vec<Result<(), KernelError>>> + Send {
        async move {
            let mut results = Vec::with_capacity(changes.len());
            for change in changes {
                results.push(self.apply(change).await);
            }
            results
        }
    }
}

impl Change {
    /// Whether it is about one entry of a forwarding or neighbour table.
    #[must_use]
    pub fn is_entry(&self) -> bool {
        matches!(
            self,
            Self::Forward { .. }
                | Self::Unforward { .. }
                | Self::Place { .. }
                | Self::Unplace { .. }
                | Self::Answer { .. }
                | Self::Unanswer { .. }
        )
    }

    /// Whether the two can be made at once: both are entries, which the kernel takes in order, or
    /// both make taps, none of which needs another.
    #[must_use]
    pub fn goes_with(&self, next: &Self) -> bool {
        let is_tap = |change: &Self| matches!(change, Self::Make { make: Make::Tap(_), .. });
        self.is_entry() && next.is_entry() || is_tap(self) && is_tap(next)
    }
}

impl Set {
    /// Whether nothing is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
