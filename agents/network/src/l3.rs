//! Layer 3: what a router has besides its links and addresses: routes and address translation.
//!
//! ```text
//! documents ──> Wish ──┐
//!                      ├─> plan (pure) ──> Step … ──> RouterNet::apply
//! namespaces ─> Seen ──┘
//! ```
//!
//! A router is a namespace. Its links, their addresses and settings are layer 2's to make
//! ([`crate::l2`]); here are the routes of the namespace, and its table `inet stackhand`. The
//! table's rules are the same for every router ([`nat`]): what differs are elements of its maps,
//! and one floating IP more or less is a transaction of two elements.
//!
//! Invariants: routes that somebody else set to other destinations stay; translations change in
//! transactions, so that no packet sees half of one; flows of an address are cut when it goes or
//! leads elsewhere, also if the agent was killed in between.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::IpNet;
use smol_str::SmolStr;
use stackhand_kernel::KernelError;
use stackhand_model::ObjectRef;

pub use nat::Entry;
pub use plan::{Step, plan};

pub mod announce;
#[cfg(any(test, feature = "fakes"))]
pub mod fake;
pub mod nat;
pub mod netlink;
mod plan;
#[cfg(test)]
mod tests;
pub mod walk;

/// Entries that a change is told with: a range of forwarded ports has thousands.
const MOST_TOLD: usize = 20;

/// A way to a destination.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hop {
    /// The neighbour; `None`: the destination is on the link itself.
    pub via: Option<IpAddr>,
    /// The link's name.
    pub link: SmolStr,
}

/// What is wanted of a router besides its links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The router.
    pub object: ObjectRef,
    /// Ways by destination.
    pub routes: BTreeMap<IpNet, BTreeSet<Hop>>,
    /// Translations.
    pub nat: BTreeSet<Entry>,
    /// Whose an external address is, also of floating IPs that are to go. Others are the router's.
    pub owners: BTreeMap<Ipv4Addr, ObjectRef>,
}

/// What is wanted of this host's routers, by namespace.
pub type Wish = BTreeMap<SmolStr, Wanted>;

/// A route that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenRoute {
    /// Its ways.
    pub hops: BTreeSet<Hop>,
    /// Whether we set it.
    pub ours: bool,
}

/// A router's table of translations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SeenNat {
    /// There is none.
    #[default]
    Absent,
    /// Somebody changed its rules.
    Changed,
    /// Its rules are as they should be; what its maps hold.
    Built(BTreeSet<Entry>),
}

/// A router's namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeenRouter {
    /// Routes that somebody set.
    pub routes: BTreeMap<IpNet, SeenRoute>,
    /// Translations.
    pub nat: SeenNat,
}

/// What the namespaces of routers have.
pub type Seen = BTreeMap<SmolStr, Arc<SeenRouter>>;

/// One change to a router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Builds the table anew, with these elements.
    Build {
        /// The namespace.
        space: SmolStr,
        /// Whether there is one to be deleted first.
        replace: bool,
        /// What its maps hold.
        entries: BTreeSet<Entry>,
    },
    /// Changes elements, all at once.
    Translate {
        /// The namespace.
        space: SmolStr,
        /// Elements that go.
        remove: BTreeSet<Entry>,
        /// Elements that come.
        add: BTreeSet<Entry>,
    },
    /// Makes the kernel forget the flows that the entries name, and then removes these.
    Cut {
        /// The namespace.
        space: SmolStr,
        /// Entries of the kind [`Entry::Cut`].
        cuts: BTreeSet<Entry>,
    },
    /// Sets a route, in place of any other to the destination.
    SetRoute {
        /// The namespace.
        space: SmolStr,
        /// Where to.
        destination: IpNet,
        /// By which ways.
        hops: BTreeSet<Hop>,
    },
    /// Removes a route of ours.
    RemoveRoute {
        /// The namespace.
        space: SmolStr,
        /// Where to.
        destination: IpNet,
    },
}

/// The two things that layer 3 needs of a host.
pub trait RouterNet: Send + Sync {
    /// Looks at the routes and translations of those of `spaces` that exist.
    fn observe(
        &self,
        spaces: &BTreeSet<SmolStr>,
    ) -> impl Future<Output = Result<Seen, KernelError>> + Send;

    /// Makes one change. Repeating one whose effect is there succeeds or says that it exists.
    fn apply(&self, change: &Change) -> impl Future<Output = Result<(), KernelError>> + Send;
}

impl Change {
    /// The namespace that it is in.
    #[must_use]
    pub fn space(&self) -> &str {
        match self {
            Self::Build { space, .. }
            | Self::Translate { space, .. }
            | Self::Cut { space, .. }
            | Self::SetRoute { space, .. }
            | Self::RemoveRoute { space, .. } => space,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |entries: &BTreeSet<Entry>| {
            let mut texts: Vec<String> =
                entries.iter().take(MOST_TOLD).map(Entry::to_string).collect();
            let more = entries.len() - texts.len();
            if more > 0 {
                texts.push(format!("and {more} more"));
            }
            texts.join(", ")
        };
        match self {
            Self::Build { space, entries, .. } => {
                write!(f, "build nft table inet stackhand in {space}: {}", list(entries))
            }
            Self::Translate { space, remove, add } => {
                write!(f, "change nft maps in {space}:")?;
                let parts = [("remove", remove), ("add", add)];
                let parts = parts.iter().filter(|(_, entries)| !entries.is_empty());
                let parts: Vec<String> =
                    parts.map(|(word, entries)| format!(" {word} {}", list(entries))).collect();
                f.write_str(&parts.join(";"))
            }
            Self::Cut { space, cuts } => write!(f, "cut flows in {space}: {}", list(cuts)),
            Self::SetRoute { space, destination, hops } => {
                write!(f, "set route to {destination} in {space}:")?;
                hops.iter().try_for_each(|hop| match hop.via {
                    Some(via) => write!(f, " via {via} dev {}", hop.link),
                    None => write!(f, " dev {}", hop.link),
                })
            }
            Self::RemoveRoute { space, destination } => {
                write!(f, "remove route to {destination} in {space}")
            }
        }
    }
}
