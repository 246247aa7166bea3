//! The second renderer: `iptables` with `physdev`, `ebtables` and `ipset`, for kernels without
//! nftables' bridge family.
//!
//! The same model, as chains of these programs' tables. A frame of a filtered tap passes them in this
//! order, and each has to let it:
//!
//! ```text
//! from a guest   ebtables nat PREROUTING    its Ethernet address, the kind of frame, ARP
//!                ip[6]tables raw PREROUTING its IP address, neighbour claims; the zone of its bridge
//! to the host    ip[6]tables filter INPUT   what its groups let out
//! to elsewhere   ebtables filter FORWARD    the kind of frame, at the tap that it goes to
//!                ip[6]tables filter FORWARD what the sender's groups let out, the receiver's in
//! ```
//!
//! Chains and sets of ours begin with [`PREFIX`]; of others' chains we change one line, the jump to
//! ours, which stays the first. A rule of `iptables` carries its digest as a comment, as rules of
//! nftables do; `ebtables` keeps none, so that its rules are compared as it lists them.
//!
//! What a chain or set of a port (by its tap) or group (by its id's first digits) is for, its name says in two letters:
//!
//! ```text
//! is, ma, cl  who a guest is: its own addresses, Ethernet addresses, neighbours that it may claim
//! po, pi      what goes out of a port and into it: leads to
//! so, si      what goes out and in by a set of groups, as all ports that have them share: leads to
//! go, gi      what goes out and in by one group
//! m4, m6      the addresses of a group's members
//! ```
//!
//! What this way does not give (decision 17): maps, so that a packet passes one line for each
//! filtered port; news of changes, where the programs are the old ones; one transaction for all
//! tables, though none of the steps between lets pass what neither of both states does.

mod host;
mod render;
pub(crate) mod saved;
#[cfg(test)]
mod tests;
mod words;

pub(super) use host::Xtables;
pub(super) use render::{kept, render, zones};

use stackhand_model::{ObjectRef, PortId, SecurityGroupId};

use super::model::Model;

/// What the names of our chains and sets begin with. Others' that begin so are taken for ours.
const PREFIX: &str = "stackhand-";

/// Digits of an id that a name has room for: `iptables` takes 28 bytes.
const DIGITS: usize = 15;

/// What a chain or set is about, by its name: a port, by its tap, or a group.
pub(super) fn object_of(name: &str, model: &Model) -> Option<ObjectRef> {
    let (kind, rest) = name.strip_prefix(PREFIX)?.split_once('-')?;
    match kind {
        "is" | "cl" | "ma" | "po" | "pi" => {
            let (id, _): (&PortId, _) = model.guards.iter().find(|(_, it)| it.tap == rest)?;
            Some(id.object())
        }
        "go" | "gi" | "m4" | "m6" => {
            let names = render::group_names(model);
            let (id, _): (&SecurityGroupId, _) = names.iter().find(|(_, name)| *name == rest)?;
            Some(id.object())
        }
        _ => None,
    }
}
