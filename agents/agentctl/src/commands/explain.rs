//! `agentctl explain`.
//!
//! The agents of both ports' hosts are asked for what they see at their end; here the halves are
//! joined, and what concerns both ends is compared. Where routers are on the way, the agent of each
//! tells how the packet leaves it, and documents tell who is next.

mod map;

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use stackhand_model::{Kind, PortId};

use super::Session;
use crate::console::{Output, tame};
use crate::exit::{Exit, Usage};
use crate::fleet::Filter;
use crate::objects::{self, Gathered, ObjectRow};

use map::{Holder, Map, PortAt, RouterAt};

/// A source port such as clients choose.
const CLIENT: u16 = 49152;

/// Routers on one way, at most: of more it is a loop.
const MOST_ROUTERS: usize = 8;

/// Tell whether one port reaches another, and which rule or fact allows or blocks it.
///
/// The packet is followed through routers: a port of another network is reached by its own address
/// where a router joins the two, and by its floating IP elsewhere. Exit status 3 when it does not
/// get there.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  agentctl explain web-1 db-1 --proto tcp --port 5432
  agentctl explain web-1 db-1                          an ICMP echo
  agentctl explain web-1 db-1 --ipv6 -o json")]
pub(crate) struct Explain {
    /// The port that begins, by name or id
    from: String,
    /// The port that is reached
    to: String,
    /// tcp, udp or icmp
    #[arg(long, value_parser = ["tcp", "udp", "icmp"], default_value = "icmp")]
    proto: String,
    /// The port number that is reached, for tcp and udp
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// From the IPv6 address of the one to that of the other
    #[arg(long)]
    ipv6: bool,
}

/// The whole answer.
#[derive(Serialize)]
struct Explanation {
    passes: bool,
    packet: Value,
    /// Ports that the packet leaves by and routers that it passes, in order; the port that it comes
    /// to is last.
    way: Vec<Leg>,
    /// What concerns both ends.
    between: Vec<Check>,
}

/// What one agent found of a port or a router.
#[derive(Serialize)]
struct Leg {
    /// `out of`, `through` or `into`.
    step: &'static str,
    name: String,
    host: String,
    checks: Vec<Check>,
}

#[derive(Serialize)]
struct Check {
    what: String,
    passes: bool,
    finding: String,
}

impl Check {
    fn new(what: &str, passes: bool, finding: impl Into<String>) -> Self {
        Self { what: what.to_owned(), passes, finding: finding.into() }
    }
}

pub(crate) async fn run(args: &Explain, session: &mut Session) -> Result<Exit> {
    let fleet = session.fleet().await?;
    let all = objects::gather(&fleet, &Filter::default(), |member| {
        (member.row.agent == Kind::Port.agent()).then_some(None)
    })
    .await?;
    let rows = objects::rows(&all.held);
    let map = Map::new(&rows);
    let port = |name: &str| {
        let row = objects::find(&rows, Kind::Port, name, fleet.cloud())?;
        map.port(PortId(row.id)).with_context(|| format!("{} is not a port", row.name))
    };
    let (from, to) = (port(&args.from)?, port(&args.to)?);
    let (source, own) = (address(from, args.ipv6)?, address(to, args.ipv6)?);
    let packet = packet(args, source, map.destination(from, to, own))?;
    let mut journey = Journey { all: &all, map: &map, way: Vec::new(), between: Vec::new() };
    journey.go(from, to, packet.clone()).await?;
    let Journey { way, between, .. } = journey;
    fleet.close().await;
    let passes = way.iter().flat_map(|leg| &leg.checks).chain(&between).all(|check| check.passes);
    let explanation = Explanation { passes, packet, way, between };
    match session.console.output() {
        Output::Table | Output::Wide => session.console.text(&text(&explanation))?,
        _ => session.console.print_tree(&explanation)?,
    }
    Ok(if passes { Exit::Well } else { Exit::NotWell })
}

/// A packet under way.
struct Journey<'a> {
    all: &'a Gathered,
    map: &'a Map<'a>,
    way: Vec<Leg>,
    between: Vec<Check>,
}

impl<'a> Journey<'a> {
    /// Follows the packet from one port to the other, or as far as it gets.
    async fn go(&mut self, from: PortAt<'a>, to: PortAt<'a>, mut packet: Value) -> Result<()> {
        let ip = |field: &Value| field.as_str().and_then(|text| text.parse::<IpAddr>().ok());
        let mut here = from;
        let ends = ip(&packet["source"]).zip(ip(&packet["destination"]));
        let (source, destination) = ends.context("the packet has no addresses")?;
        let mut next = match self.map.first_hop(from, source, destination) {
            Ok(next) => next,
            Err(_) if from.spec.network == to.spec.network => destination,
            Err(reason) => return self.ends(to, from, &packet, &reason).await,
        };
        let mut first_mtu = None;
        for routers in 0..=MOST_ROUTERS {
            let network = here.spec.network;
            let (router, by) = match self.map.holder(network, next) {
                Some(Holder::Port(port)) if port.row.id == to.row.id => {
                    let mtu = self.half("out of", here, "egress", &packet, to).await?;
                    let own = self.half("into", to, "ingress", &packet, here).await?;
                    self.between.push(if routers == 0 {
                        Check::new("network", true, format!("both are on network {network}"))
                    } else {
                        let word = if routers == 1 { "router" } else { "routers" };
                        Check::new("network", true, format!("by way of {routers} {word}"))
                    });
                    if routers == 0 {
                        self.between.push(mtus(mtu, own));
                    } else if let Some(mtu) = first_mtu {
                        let text = format!("packets of up to {mtu} bytes leave the first port");
                        self.between.push(Check::new("mtu", true, text));
                    }
                    return Ok(());
                }
                Some(Holder::Router(router, by)) => (router, by),
                Some(Holder::Port(other)) => {
                    let text = format!("{next} is port {}, which forwards nothing", other.row.name);
                    return self.ends(to, here, &packet, &text).await;
                }
                None => {
                    let text = format!("nobody has {next} on network {network}");
                    return self.ends(to, here, &packet, &text).await;
                }
            };
            let mtu = self.half("out of", here, "egress", &packet, by).await?;
            first_mtu = first_mtu.or(mtu);
            let answer = self.passed(router, by, &packet).await?;
            let out: Option<(PortId, IpAddr)> =
                serde_json::from_value(answer["out"].clone()).unwrap_or_default();
            if answer["packet"].is_object() {
                packet = answer["packet"].clone();
            }
            let Some((port, onwards)) = out else {
                let text = format!("the packet ends in router {}", router.row.name);
                return self.ends(to, by, &packet, &text).await;
            };
            let Some(port) = self.map.port(port) else {
                let text = format!("no agent holds the document of port {port}");
                return self.ends(to, by, &packet, &text).await;
            };
            (here, next) = (port, onwards);
        }
        let text = format!("the packet passes more than {MOST_ROUTERS} routers: a loop");
        self.ends(to, here, &packet, &text).await
    }

    /// The packet does not get to `to`; whether it would be let in is told all the same.
    async fn ends(
        &mut self,
        to: PortAt<'a>,
        last: PortAt<'a>,
        packet: &Value,
        reason: &str,
    ) -> Result<()> {
        self.between.push(Check::new("network", false, reason));
        self.half("into", to, "ingress", packet, last).await.map(drop)
    }

    /// Asks the agent of a port's host about its end; returns the link's MTU.
    async fn half(
        &mut self,
        step: &'static str,
        port: PortAt<'a>,
        direction: &str,
        packet: &Value,
        peer: PortAt<'a>,
    ) -> Result<Option<u64>> {
        let asked = json!({
            "direction": direction,
            "packet": packet,
            "peer": {"mac": peer.spec.mac, "host": peer.spec.host},
        });
        let answer = self.ask(step, port.row, &port.spec.host, asked).await?;
        Ok(answer["mtu"].as_u64())
    }

    /// Asks the agent of a router's host what becomes of the packet in it.
    async fn passed(
        &mut self,
        router: RouterAt<'a>,
        by: PortAt<'a>,
        packet: &Value,
    ) -> Result<Value> {
        let asked = json!({"port": by.row.id, "packet": packet});
        self.ask("through", router.row, &router.spec.host, asked).await
    }

    async fn ask(
        &mut self,
        step: &'static str,
        row: &ObjectRow,
        host: &str,
        asked: Value,
    ) -> Result<Value> {
        let (name, host) = (row.name.clone(), host.to_owned());
        let is_there = |member: &&crate::fleet::Member| {
            member.row.agent == Kind::Port.agent() && member.row.host == host
        };
        let Some(member) = self.all.members.iter().find(is_there) else {
            let text = format!("no network-agent answers on {host}: what it sees is not known");
            let checks = vec![Check::new("agent", false, text)];
            self.way.push(Leg { step, name, host, checks });
            return Ok(Value::Null);
        };
        let answer = member
            .client
            .act(row.document.object(), "explain", asked)
            .await
            .with_context(|| format!("cannot ask network-agent on {host} about {name}"))?;
        let checks = answer["checks"].as_array().into_iter().flatten().map(|check| {
            let text = |key: &str| check[key].as_str().unwrap_or_default();
            Check::new(text("what"), check["passes"] == true, text("finding"))
        });
        let checks = checks.collect();
        self.way.push(Leg { step, name, host, checks });
        Ok(answer)
    }
}

/// The packet that is asked about, as agents read it.
fn packet(args: &Explain, source: IpAddr, destination: IpAddr) -> Result<Value> {
    let (protocol, transport) = match (&*args.proto, args.port) {
        ("icmp", None) if args.ipv6 => (58, json!({"icmp": [128, 0]})),
        ("icmp", None) => (1, json!({"icmp": [8, 0]})),
        ("icmp", Some(_)) => bail!(Usage::new("--port is for tcp and udp".to_owned())),
        (_, None) => bail!(Usage::new(format!("--proto {} needs --port", args.proto))),
        ("tcp", Some(port)) => (6, json!({"ports": [CLIENT, port]})),
        (_, Some(port)) => (17, json!({"ports": [CLIENT, port]})),
    };
    Ok(json!({
        "source": source, "destination": destination, "protocol": protocol, "transport": transport,
    }))
}

fn address(port: PortAt<'_>, six: bool) -> Result<IpAddr> {
    let family = if six { "IPv6" } else { "IPv4" };
    let mut addresses = port.spec.fixed_ips.iter().map(|fixed| fixed.address);
    addresses
        .find(|address| address.is_ipv6() == six)
        .with_context(|| format!("port {} has no {family} address", port.row.name))
}

/// Links of different MTUs lose big packets in silence: a bridge tells nobody.
fn mtus(from: Option<u64>, to: Option<u64>) -> Check {
    let (passes, finding) = match (from, to) {
        (Some(one), Some(other)) if one != other => {
            (false, format!("the links' MTUs differ: {one} and {other}; larger packets are lost"))
        }
        (Some(mtu), Some(_)) => (true, format!("packets of up to {mtu} bytes fit")),
        _ => (true, "the MTU of one end is not known".to_owned()),
    };
    Check::new("mtu", passes, finding)
}

/// The answer for people.
fn text(explanation: &Explanation) -> String {
    let mut lines = Vec::new();
    let mut tell = |title: String, checks: &[Check]| {
        lines.push(title);
        for Check { what, passes, finding } in checks {
            let mark = if *passes { "ok" } else { "NO" };
            lines.push(format!("  {mark}  {:<15} {}", tame(what), tame(finding)));
        }
    };
    for Leg { step, name, host, checks } in &explanation.way {
        tell(format!("{step} {} on {}", tame(name), tame(host)), checks);
    }
    tell("between".to_owned(), &explanation.between);
    let word = if explanation.passes { "It passes." } else { "It does not pass." };
    lines.push(word.to_owned());
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(proto: &str, port: Option<u16>, ipv6: bool) -> Explain {
        Explain { from: "a".into(), to: "b".into(), proto: proto.into(), port, ipv6 }
    }

    #[test]
    fn a_packet_is_made_of_what_was_typed() {
        let four: IpAddr = "10.0.0.1".parse().unwrap();
        let made = packet(&asked("tcp", Some(22), false), four, four).unwrap();
        assert_eq!((&made["protocol"], &made["transport"]["ports"][1]), (&json!(6), &json!(22)));
        let made = packet(&asked("icmp", None, true), four, four).unwrap();
        assert_eq!(made["transport"], json!({"icmp": [128, 0]}));
        assert!(packet(&asked("udp", None, false), four, four).is_err());
        assert!(packet(&asked("icmp", Some(1), false), four, four).is_err());
    }

    #[test]
    fn what_stands_in_the_way_is_marked_for_people() {
        let leg = |step, passes| Leg {
            step,
            name: "a".into(),
            host: "one".into(),
            checks: vec![Check::new("link", passes, "tap1 is down")],
        };
        let explanation = Explanation {
            passes: false,
            packet: json!(null),
            way: vec![leg("out of", true), leg("into", false)],
            between: vec![],
        };
        let text = text(&explanation);
        assert!(text.contains("  NO  link            tap1 is down\n"), "{text}");
        assert!(text.ends_with("It does not pass.\n"), "{text}");
        assert!(!mtus(Some(1450), Some(1500)).passes);
    }
}
