//! Bringing the host to what the model says, and cutting flows that lost what allowed them.

use std::sync::Arc;

use stackhand_kernel::netfilter::{Flow, FlowSide};
use stackhand_model::{Direction, NetworkId, ObjectRef};
use tracing::warn;

use super::judge::{Packet, Transport};
use super::model::{ByAddress, Model, Touched};
use super::packets;
use super::render::{Rendered, render, zones_of};
use super::ruleset::{Edit, Plan, Ruleset, TableName, group_of};
use super::{FirewallError, FirewallHost, Means, xtables};

/// Changes of one kind to one set that are told one by one.
const MOST_TOLD: usize = 20;

/// Keeps a host's firewall as a model says.
#[derive(Debug)]
pub struct Enforcer<H> {
    host: H,
    means: Means,
    rendered: Rendered,
    /// What was enforced last, and the tables that are so since; `None`: somebody else may have
    /// changed them meanwhile.
    last: Option<(Model, Arc<Ruleset>)>,
}

/// What enforcing took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// The changes, in words, each with the object that it serves.
    pub changes: Vec<(Option<ObjectRef>, String)>,
    /// Flows that were cut.
    pub cut: usize,
}

impl<H: FirewallHost> Enforcer<H> {
    /// One that has not looked yet.
    pub fn new(host: H, means: Means) -> Self {
        Self { host, means, rendered: Rendered::default(), last: None }
    }

    /// The host.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// Gives the host back.
    pub fn into_host(self) -> H {
        self.host
    }

    /// What enforces the rules.
    pub fn means(&self) -> Means {
        self.means
    }

    /// Whether the tables are those that were enforced last.
    pub async fn is_current(&self) -> bool {
        let Some((_, tables)) = &self.last else { return false };
        self.host.is_current(tables).await
    }

    /// What enforcing `model` would change now, in words.
    ///
    /// # Errors
    ///
    /// Fails if the tables cannot be read.
    pub async fn plan(
        &mut self,
        model: &Model,
    ) -> Result<Vec<(Option<ObjectRef>, String)>, FirewallError> {
        let seen = self.host.observe().await?;
        Ok(self.compare(model, &seen).map(|plan| tell(&plan, model)).unwrap_or_default())
    }

    /// Makes the host's firewall that of `model`.
    ///
    /// # Errors
    ///
    /// Fails if the tables cannot be read or changed; then they are as they were, or between two
    /// stages of the plan, in none of which more passes than before or after.
    pub async fn enforce(&mut self, model: &Model) -> Result<Done, FirewallError> {
        let mut done = Done::default();
        let seen = self.host.observe().await?;
        let Some(plan) = self.compare(model, &seen) else { return Ok(done) };
        if plan.is_empty() {
            self.last = Some((model.clone(), seen));
            return Ok(done);
        }
        // Nobody else holds the tables now, so that they are changed in place.
        drop(seen);
        let before = self.last.take().map(|(model, _)| model);
        let tables = self.host.apply(&plan).await?;
        self.last = tables.map(|tables| (model.clone(), tables));
        done.changes = tell(&plan, model);
        if plan.narrows() {
            done.cut = self.cut(&before.unwrap_or_default(), model).await;
        }
        Ok(done)
    }

    /// The plan; `None` if neither model nor tables changed since the last time.
    fn compare(&mut self, model: &Model, seen: &Arc<Ruleset>) -> Option<Plan> {
        // Nothing is known but that taps of ours are there: what filters them stays as it is.
        if model.guards.is_empty() && !model.spared.is_empty() {
            return Some(Plan::default());
        }
        let mut tables =
            |model: &Model, touched| self.means.tables(model, seen, &mut self.rendered, touched);
        let last = self.last.as_ref().filter(|(_, tables)| Arc::ptr_eq(tables, seen));
        Some(match last {
            Some((last, _)) if last == model => return None,
            // The tables are what `last` wanted, and nothing else.
            Some((last, _)) if last.spared.is_empty() && model.spared.is_empty() => {
                let touched = model.touched(last);
                let there = tables(last, Some(&touched));
                tables(model, Some(&touched)).plan(&there, &model.spared)
            }
            _ => tables(model, None).plan(seen, &model.spared),
        })
    }

    /// Cuts the flows that the model does not allow any more. Others are not touched.
    async fn cut(&self, before: &Model, model: &Model) -> usize {
        let Ok(seen) = self.host.observe().await else { return 0 };
        let zones = zones_of(model, &seen);
        let networks: Vec<(u16, NetworkId)> = model
            .bridges
            .iter()
            .filter_map(|(network, bridge)| Some((*zones.get(bridge)?, *network)))
            .collect();
        let flows = match self.host.flows(&networks.iter().map(|(zone, _)| *zone).collect()).await {
            Ok(flows) => flows,
            Err(error) => {
                warn!(%error, "cannot list flows; those that lost their rule go on");
                return 0;
            }
        };
        let (was, is) = (before.by_address(), model.by_address());
        let mut cut = 0;
        for flow in flows {
            let network = networks.iter().find(|(zone, _)| *zone == flow.zone);
            let Some((_, network)) = network else { continue };
            if is_allowed(&was, &is, model, *network, &flow) {
                continue;
            }
            match self.host.cut(&flow).await {
                Ok(()) => cut += 1,
                Err(error) => warn!(%error, "cannot cut a flow that lost its rule"),
            }
        }
        cut
    }
}

impl Means {
    /// The tables that enforce `model` on a host that has `seen`. With `touched`, elements of other
    /// ports and groups may be left out: for who compares the tables of two models.
    #[must_use]
    pub fn tables(
        self,
        model: &Model,
        seen: &Ruleset,
        rendered: &mut Rendered,
        touched: Option<&Touched>,
    ) -> Ruleset {
        let zones = zones_of(model, seen);
        match self {
            Self::Nftables(tracking) => render(model, tracking, &zones, rendered, touched),
            Self::Iptables => {
                let mut tables = xtables::render(model, &zones, &xtables::kept(model, seen));
                let packets = packets::table(&model.packets, touched);
                tables.tables.extend(packets.map(|table| (TableName::Packets, table)));
                // What nftables holds stays until the new rules hold, too.
                let before = [TableName::Bridge, TableName::Inet].into_iter();
                let before = before.filter(|_| model.unshown);
                tables.tables.extend(
                    before.filter_map(|name| {
                        seen.tables.get(&name).map(|table| (name, table.clone()))
                    }),
                );
                tables
            }
        }
    }
}

/// Whether a flow may go on: both of its ends that are filtered here allow it, and neither is a port
/// that has gone or lost the address.
fn is_allowed(
    was: &ByAddress,
    is: &ByAddress,
    model: &Model,
    network: NetworkId,
    flow: &Flow,
) -> bool {
    let packet = packet(&flow.original);
    let end = |direction, address| match is.find(network, address) {
        Some(port) => model.judge(port, direction, &packet).passes(),
        None => was.find(network, address).is_none(),
    };
    // A client without an address sends from none: nobody's.
    let from = packet.source.is_unspecified() || end(Direction::Egress, packet.source);
    from && end(Direction::Ingress, packet.destination)
}

fn packet(side: &FlowSide) -> Packet {
    let transport = match (side.icmp, side.source_port, side.destination_port) {
        (Some((kind, code)), _, _) => Transport::Icmp(kind, code),
        (None, 0, 0) => Transport::None,
        (None, from, to) => Transport::Ports(from, to),
    };
    Packet {
        source: side.source,
        destination: side.destination,
        protocol: side.protocol,
        transport,
    }
}

/// A plan in words: what is done to which chain, set or tap, and for which object.
fn tell(plan: &Plan, model: &Model) -> Vec<(Option<ObjectRef>, String)> {
    let object_of_link = |link: &str| {
        let port = model.guards.iter().find(|(_, guard)| guard.tap == link);
        let network = || model.bridges.iter().find(|(_, bridge)| *bridge == link);
        let limited = || model.packets.get(link).map(|rules| rules.object);
        let port = port.map(|(id, _)| id.object());
        port.or_else(limited).or_else(|| network().map(|(id, _)| id.object()))
    };
    let mut told = Vec::new();
    for edit in plan.edits() {
        let whole = |text: String, name: &str| {
            let object = || object_of_link(packets::link_of(name)?);
            let object = || object().or_else(|| xtables::object_of(name, model));
            (group_of(name).or_else(object), format!("firewall: {text}"))
        };
        match edit {
            Edit::DropTable(table) => told.push(whole(format!("delete table {table}"), "")),
            Edit::MakeTable(table) => told.push(whole(format!("create table {table}"), "")),
            Edit::MakeSet(table, set, _) => {
                told.push(whole(format!("create set {set} of {table}"), set));
            }
            Edit::MakeChain(table, chain, _) => {
                told.push(whole(format!("create chain {chain} of {table}"), chain));
            }
            Edit::Fill(table, chain, rules) => {
                let text = format!("set the {} rules of chain {chain} of {table}", rules.len());
                told.push(whole(text, chain));
            }
            Edit::DropChain(table, chain) => {
                told.push(whole(format!("delete chain {chain} of {table}"), chain));
            }
            Edit::DropSet(table, set, _) => {
                told.push(whole(format!("delete set {set} of {table}"), set));
            }
            Edit::Add(table, set, shape, elements) | Edit::Remove(table, set, shape, elements) => {
                let word = if matches!(edit, Edit::Add(..)) { "add to" } else { "remove from" };
                for element in elements.iter().take(MOST_TOLD) {
                    let link = shape.link(element);
                    let object = link.as_deref().and_then(object_of_link).or_else(|| group_of(set));
                    let element = shape.tell(element);
                    told.push((object, format!("firewall: {word} {set} of {table}: {element}")));
                }
                if elements.len() > MOST_TOLD {
                    let more = elements.len() - MOST_TOLD;
                    told.push(whole(format!("{word} {set} of {table}: {more} elements more"), set));
                }
            }
        }
    }
    told
}
