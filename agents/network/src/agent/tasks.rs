//! What a pass does, in order: steps of layer 2 and of layer 3 in one list.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use smol_str::SmolStr;
use stackhand_model::ObjectRef;

use crate::desired::HostWish;
use crate::l2::{At, Change, Owner, Plan, Seen};
use crate::l3;

/// One change to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Deed {
    /// A link, an address, forwarding, or a namespace.
    Link(Change),
    /// A route or a translation.
    Router(l3::Change),
}

/// One change, and the object it serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Task {
    /// The object; `None` for the sweeping of orphans.
    pub(super) object: Option<ObjectRef>,
    /// The change.
    pub(super) deed: Deed,
}

impl fmt::Display for Deed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(change) => change.fmt(f),
            Self::Router(change) => change.fmt(f),
        }
    }
}

impl Deed {
    /// Whether the two can be done at once.
    pub(super) fn goes_with(&self, next: &Self) -> bool {
        match (self, next) {
            (Self::Link(change), Self::Link(next)) => change.goes_with(next),
            _ => false,
        }
    }
}

/// Puts steps in order. Translations come between a namespace and its links, so that no flow
/// starts before they are there; routes come last.
pub(super) fn in_order(links: &Plan, routers: Vec<l3::Step>) -> Vec<Task> {
    let is_space = |step: &&crate::l2::Step| matches!(step.change, Change::MakeSpace { .. });
    let is_route = |step: &l3::Step| {
        matches!(step.change, l3::Change::SetRoute { .. } | l3::Change::RemoveRoute { .. })
    };
    let link = |step: &crate::l2::Step| Task {
        object: step.object,
        deed: Deed::Link(step.change.clone()),
    };
    let router =
        |step: l3::Step| Task { object: Some(step.object), deed: Deed::Router(step.change) };
    let (routes, translations): (Vec<_>, Vec<_>) = routers.into_iter().partition(is_route);
    let spaces = links.steps.iter().filter(is_space).map(link);
    let rest = links.steps.iter().filter(|step| !is_space(step)).map(link);
    spaces
        .chain(translations.into_iter().map(router))
        .chain(rest)
        .chain(routes.into_iter().map(router))
        .collect()
}

/// What is wanted of routers whose namespaces are ours or will be.
pub(super) fn reachable<'a>(
    wish: &'a HostWish,
    seen: &Seen,
) -> BTreeMap<&'a SmolStr, &'a l3::Wanted> {
    let ours = |space: &SmolStr| match seen.spaces.get(space) {
        None | Some(Owner::Unfinished) => true,
        Some(Owner::Ours(mark)) => wish.l2.spaces.get(space) == Some(mark),
        Some(Owner::Foreign(_)) => false,
    };
    wish.l3.iter().filter(|(space, _)| ours(space)).collect()
}

/// The addresses of routers' links that neighbours are to be told of after these deeds.
pub(super) fn news<'a>(done: impl Iterator<Item = &'a Deed>) -> BTreeMap<At, BTreeSet<IpAddr>> {
    let mut news: BTreeMap<At, BTreeSet<IpAddr>> = BTreeMap::new();
    for deed in done {
        if let Deed::Link(Change::AddAddress { at, net }) = deed {
            news.entry(at.clone()).or_default().insert(net.addr());
        }
    }
    news
}
