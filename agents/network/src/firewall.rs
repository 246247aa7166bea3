//! The firewall: security groups and anti-spoofing on the taps of this host; and, because they are
//! rules on the same taps, packet rates and marks.
//!
//! ```text
//! documents ──> Model ──> render ──> Ruleset ──┐
//!                 │                            ├─> plan (pure) ──> Plan ──> FirewallHost::apply
//!                 │             the host ──> Ruleset
//!                 └─> judge: may this packet pass, and by which rule?
//!                       ├─ flows that lost what allowed them are cut
//!                       └─ `agentctl explain`
//! ```
//!
//! [`Model`] is what the documents say, free of any kernel's words. [`render()`] turns it into one
//! table of nftables' bridge family: rules are per *group*, what is per *port* is an element of a
//! map or set keyed by the tap's name, so that another port of known groups costs a few elements.
//! [`Ruleset::plan`] compares two rulesets. [`FirewallHost`] is the seam.
//!
//! Kernels without nftables' bridge family get the same by [`xtables`], the second renderer; which of
//! them is used is found by a probe, and told ([`Means`]).
//!
//! Answers of allowed flows pass because the kernel tracks flows. Where it tracks them on bridges,
//! the rules ask it; where it does not, `br_netfilter` shows bridged packets to a small `inet` table
//! that tells what it knows by a mark on the packet ([`Tracking`], decision 9).
//!
//! A change of the model is compared where the two models differ, not in all tables: those are known to
//! be as the model before wanted them for as long as nobody else changed them.
//!
//! Invariants: what no rule allows is dropped; a tap is filtered before it can carry a frame; tables
//! of other names are never touched; a plan for what is there already is empty.

use std::collections::BTreeSet;
use std::fmt;
use std::future::Future;
use std::sync::Arc;

use serde::Serialize;
use stackhand_kernel::KernelError;
use stackhand_kernel::exec::ExecError;
use stackhand_kernel::netfilter::Flow;

mod clauses;
mod enforce;
#[cfg(any(test, feature = "fakes"))]
pub mod fake;
mod judge;
pub mod model;
pub mod netlink;
mod packets;
mod render;
mod ruleset;
#[cfg(test)]
mod tests;
pub(crate) mod xtables;

pub use enforce::{Done, Enforcer};
pub use judge::{Packet, Transport, Verdict};
pub use model::{Guard, Model, Touched};
pub use render::{Rendered, render, zones_of};
pub use ruleset::{
    Chain, Edit, Field, NAMES, Plan, Ruleset, Set, TableName, Target, XTABLES_NAMES,
};

/// Where the kernel tracks flows of bridged packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tracking {
    /// On the bridge itself (`nf_conntrack_bridge`).
    Bridge,
    /// In the IP layer, where `br_netfilter` shows it bridged packets.
    BrNetfilter,
}

impl fmt::Display for Tracking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bridge => "bridge",
            Self::BrNetfilter => "br-netfilter",
        })
    }
}

/// What enforces the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// nftables' bridge family.
    Nftables(Tracking),
    /// `iptables` with `physdev`, `ebtables` and `ipset`.
    Iptables,
}

impl Means {
    /// The renderer's name, as facts and settings have it.
    #[must_use]
    pub fn renderer(self) -> &'static str {
        match self {
            Self::Nftables(_) => "nftables",
            Self::Iptables => "iptables",
        }
    }

    /// Where flows are tracked.
    #[must_use]
    pub fn tracking(self) -> Tracking {
        match self {
            Self::Nftables(tracking) => tracking,
            Self::Iptables => Tracking::BrNetfilter,
        }
    }
}

impl fmt::Display for Means {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, flows tracked by {}", self.renderer(), self.tracking())
    }
}

/// Why the firewall could not be looked at or changed.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// `nft` could not load a script.
    #[error("nft did not take the rules")]
    Nft(#[source] Box<ExecError>),
    /// `iptables` or one of its kin could not list or load rules.
    #[error("the rules could not be listed or changed")]
    Xtables(#[source] Box<ExecError>),
    /// The kernel lacks something that no firewall can do without.
    #[error("{0}")]
    Unable(String),
}

impl From<ExecError> for FirewallError {
    fn from(error: ExecError) -> Self {
        Self::Xtables(Box::new(error))
    }
}

/// What the firewall needs of a host.
pub trait FirewallHost: Send + Sync {
    /// Reads the tables that bear our name. As long as nothing changed, it is the same value.
    fn observe(&self) -> impl Future<Output = Result<Arc<Ruleset>, FirewallError>> + Send;

    /// Whether `tables` are what was read or made last, and nothing tells that they changed since.
    /// Costs next to nothing, and so does not look at what makes no news.
    fn is_current(&self, tables: &Arc<Ruleset>) -> impl Future<Output = bool> + Send;

    /// Makes the changes of a plan. Each of its stages is one transaction. Returns the tables that
    /// came of it, which [`FirewallHost::observe`] returns from then on; `None` if somebody else
    /// changed something since they were read.
    fn apply(
        &self,
        plan: &Plan,
    ) -> impl Future<Output = Result<Option<Arc<Ruleset>>, FirewallError>> + Send;

    /// The flows of these zones.
    fn flows(
        &self,
        zones: &BTreeSet<u16>,
    ) -> impl Future<Output = Result<Vec<Flow>, FirewallError>> + Send;

    /// Cuts a flow: its next packet is judged anew.
    fn cut(&self, flow: &Flow) -> impl Future<Output = Result<(), FirewallError>> + Send;
}
