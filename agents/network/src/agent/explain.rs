//! `agentctl explain`: one end of a connection, from documents and from the kernel's state.
//!
//! agentctl asks the agents of both ports' hosts and joins the halves. Each half tells what it
//! checked, in the order in which a packet meets it. Between them agentctl asks about each router on
//! the way, whose answer tells how the packet leaves it, and where to.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use smol_str::SmolStr;
use stackhand_kernel::Chain;
use stackhand_model::{Direction, ErrorCode, MacAddr, ObjectRef, PortId, RouterId, Spec};
use stackhand_runtime::agent::{Action, Desired, Refusal};

use super::{Look, NetworkAgent};
use crate::desired::{HostWish, Standing};
use crate::firewall::Packet;
use crate::l2::{At, Seen};
use crate::l3::SeenRouter;
use crate::l3::walk::{Check, walk};
use crate::names;

/// The action's name.
pub(super) const EXPLAIN: &str = "explain";

/// What is asked about one end.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    /// Whether the packet leaves the port or comes to it.
    direction: Direction,
    packet: Packet,
    peer: Peer,
}

/// The other end.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Peer {
    mac: MacAddr,
    host: String,
}

/// What was found at one end.
#[derive(Debug, Serialize)]
struct Half {
    host: String,
    direction: Direction,
    /// Largest packet of the port's link in bytes.
    mtu: Option<u32>,
    checks: Vec<Check>,
}

/// What is asked about a router.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Passage {
    /// The router's port by which the packet comes.
    port: PortId,
    packet: Packet,
}

/// What was found at a router.
#[derive(Debug, Serialize)]
struct Passed {
    host: String,
    checks: Vec<Check>,
    /// The packet as it leaves.
    packet: Packet,
    /// The router's port by which it leaves, and the neighbour it goes to.
    out: Option<(PortId, IpAddr)>,
}

impl NetworkAgent {
    /// Explains one end, for the action of that name.
    pub(super) async fn explain(&self, action: &Action) -> Result<Value, Refusal> {
        let refuse = |code, text: String| Refusal::new(code, text).about(action.object);
        let desired = super::lock(&self.desired).clone();
        let Some(desired) = desired else {
            let text = "the agent has not looked at the host yet; try again".to_owned();
            return Err(refuse(ErrorCode::Unavailable, text));
        };
        let elsewhere = |what, host: &str| {
            refuse(ErrorCode::BadRequest, format!("the {what} is on host {host}; ask there"))
        };
        let mistyped = |error: serde_json::Error| {
            refuse(ErrorCode::BadRequest, format!("explain: {error}; ask by `agentctl explain`"))
        };
        let internal = |reason| refuse(ErrorCode::Internal, reason);
        let answer = match &action.document.spec {
            Spec::Port(port) if port.host != self.local.host => {
                return Err(elsewhere("port", &port.host));
            }
            Spec::Router(router) if router.host != self.local.host => {
                return Err(elsewhere("router", &router.host));
            }
            Spec::Port(_) => {
                let question: Question =
                    serde_json::from_value(action.params.clone()).map_err(mistyped)?;
                let half = self.half(PortId(action.object.id), &question, &desired).await;
                serde_json::to_value(half.map_err(internal)?)
            }
            Spec::Router(_) => {
                let passage: Passage =
                    serde_json::from_value(action.params.clone()).map_err(mistyped)?;
                let passed = self.passed(RouterId(action.object.id), &passage, &desired).await;
                serde_json::to_value(passed.map_err(internal)?)
            }
            _ => {
                let text = "only ports and routers can be explained".to_owned();
                return Err(refuse(ErrorCode::Unsupported, text));
            }
        };
        answer.map_err(|error| refuse(ErrorCode::Internal, error.to_string()))
    }

    /// Follows a packet through a router of this host.
    async fn passed(
        &self,
        id: RouterId,
        asked: &Passage,
        desired: &Desired,
    ) -> Result<Passed, String> {
        let turn = self.turn.lock().await;
        let looked = self.look_and_plan(desired, None).await;
        drop(turn);
        let Look { wish, seen, routers, tasks, .. } =
            looked.map_err(|error| format!("cannot look at the host: {}", Chain(&error)))?;
        let mut passed = Passed {
            host: self.local.host.clone(),
            checks: vec![document(id.object(), "router", &wish)],
            packet: asked.packet,
            out: None,
        };
        let service = wish.routers.get(&id);
        let entered = service.and_then(|it| it.links.iter().find(|link| link.port == asked.port));
        let Some((service, entered)) = service.zip(entered) else {
            let text = format!("the router has no link for port {}", asked.port);
            passed.checks.push(Check::new("link in", false, text));
            return Ok(passed);
        };
        let left = tasks.iter().find(|task| task.object == Some(id.object()));
        passed.checks.push(match left {
            None => Check::new("in force", true, "the router is as the documents ask"),
            Some(task) => Check::new("in force", false, format!("to do: {}", task.deed)),
        });
        let nothing = SeenRouter::default();
        let router = routers.get(&service.space).map_or(&nothing, AsRef::as_ref);
        let walk = walk(&service.space, &entered.link, asked.packet, &seen, router);
        passed.checks.extend(walk.checks);
        passed.packet = walk.packet;
        passed.out = walk.out.and_then(|(link, next)| {
            let by = service.links.iter().find(|it| it.link == link)?;
            Some((by.port, next))
        });
        Ok(passed)
    }

    async fn half(&self, id: PortId, asked: &Question, desired: &Desired) -> Result<Half, String> {
        let turn = self.turn.lock().await;
        let looked = self.look_and_plan(desired, None).await;
        let Look { wish, seen, .. } =
            looked.map_err(|error| format!("cannot look at the host: {}", Chain(&error)))?;
        let drift = self.guarding.plan(&wish.firewall).await;
        drop(turn);
        let tap = At::host(names::tap(id));
        let mut checks = vec![document(id.object(), "port", &wish), link(&tap, &wish, &seen)];
        let verdict = wish.firewall.judge(id, asked.direction, &asked.packet);
        let (what, groups) = match asked.direction {
            Direction::Egress => ("rules out", "the packet"),
            Direction::Ingress => ("rules in", "the packet"),
        };
        checks.push(Check {
            what,
            passes: verdict.passes(),
            finding: format!("{groups} {verdict}"),
        });
        if wish.firewall.guards.contains_key(&id) {
            checks.push(in_force(drift));
        }
        if asked.direction == Direction::Egress {
            checks.push(way(&tap, asked, &self.local.host, &wish, &seen));
        }
        let mtu = seen.links.get(&tap).map(|link| link.mtu);
        Ok(Half { host: self.local.host.clone(), direction: asked.direction, mtu, checks })
    }
}

/// What documents alone say.
fn document(object: ObjectRef, word: &str, wish: &HostWish) -> Check {
    let (passes, finding) = match wish.standing.get(&object) {
        None => (true, format!("the {word}'s documents are complete")),
        Some(Standing::Pending(reason) | Standing::Failed(reason)) => (false, reason.clone()),
    };
    Check { what: "documents", passes, finding }
}

fn link(tap: &At, wish: &HostWish, seen: &Seen) -> Check {
    let check = |passes, finding| Check { what: "link", passes, finding };
    let Some(link) = seen.links.get(tap) else {
        return check(false, format!("there is no link {tap}"));
    };
    let wanted = wish.l2.links.get(tap).and_then(|wanted| wanted.set.bridge.clone()).flatten();
    match &link.bridge {
        None => return check(false, format!("{tap} is in no bridge")),
        Some(bridge) if wanted.as_ref().is_some_and(|wanted| wanted != bridge) => {
            return check(false, format!("{tap} is in {bridge}, and not in its network's bridge"));
        }
        Some(_) if !link.up => return check(false, format!("{tap} is down")),
        Some(_) if !link.carrier => {
            return check(false, format!("{tap} has no carrier: no guest has it open"));
        }
        Some(_) => {}
    }
    let bridge = link.bridge.as_deref().unwrap_or_default();
    check(true, format!("{tap} is up, in {bridge}, with MTU {}", link.mtu))
}

/// Whether the kernel's rules are those that the documents ask for.
fn in_force(drift: Result<Vec<(Option<ObjectRef>, String)>, String>) -> Check {
    let (passes, finding) = match drift {
        Ok(steps) => match steps.first() {
            None => (true, "the kernel's rules are those of the documents".to_owned()),
            Some((_, step)) => {
                let more = steps.len() - 1;
                (false, format!("the kernel's rules differ; to do: {step}, and {more} more"))
            }
        },
        Err(reason) => (false, reason),
    };
    Check { what: "rules in force", passes, finding }
}

/// How frames for the peer leave: the bridge itself, or the overlay's forwarding entry.
fn way(tap: &At, asked: &Question, host: &str, wish: &HostWish, seen: &Seen) -> Check {
    let check = |passes, finding| Check { what: "way", passes, finding };
    if asked.peer.host == host {
        return check(true, "both ports are on this host, in the same bridge".to_owned());
    }
    let bridge = seen.links.get(tap).and_then(|link| link.bridge.clone()).unwrap_or_default();
    let wired = wish.wired.values().find(|wired| wired.bridge == bridge);
    let (mac, peer) = (asked.peer.mac, &asked.peer.host);
    // Of links that each lead to one host, the one behind which the bridge was told the address is.
    let told = |uplink: &&SmolStr| {
        seen.forwarding.get(uplink.as_str()).is_some_and(|table| table.in_bridge.contains(&mac))
    };
    let uplinks = wired.map(|wired| &wired.uplinks).into_iter().flatten();
    let Some(uplink) = uplinks.clone().find(told).or_else(|| uplinks.clone().next()) else {
        return check(false, format!("bridge {bridge} has no link to other hosts"));
    };
    let neighbour = seen
        .neighbours
        .get(&bridge)
        .and_then(|known: &BTreeMap<_, _>| known.get(&asked.packet.destination));
    let answered = match neighbour {
        Some(known) if *known == mac => "; the bridge answers for its address",
        Some(_) => {
            return check(false, format!("bridge {bridge} answers another Ethernet address"));
        }
        None => "; the peer answers for its address itself",
    };
    let Some(table) = seen.forwarding.get(uplink) else {
        return check(true, format!("frames leave by {uplink}, which learns where addresses are"));
    };
    match table.unicast.get(&mac).and_then(|hosts| hosts.first()) {
        Some(via) => check(true, format!("{mac} is behind {via} by {uplink}{answered}")),
        None if told(&uplink) && table.flood.is_empty() => {
            check(true, format!("{mac} is behind the tunnel {uplink}{answered}"))
        }
        None => check(false, format!("{uplink} has no entry for {mac} of host {peer}")),
    }
}
