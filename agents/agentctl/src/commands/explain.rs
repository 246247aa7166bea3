//! `agentctl explain`.
//!
//! The agents of both ports' hosts are asked for what they see at their end; here the halves are
//! joined, and what concerns both ends is compared.

use std::net::IpAddr;

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use stackhand_model::{Kind, PortSpec, Spec};

use super::Session;
use crate::console::{Output, tame};
use crate::exit::{Exit, Usage};
use crate::fleet::Filter;
use crate::objects::{self, Gathered, ObjectRow};

/// A source port such as clients choose.
const CLIENT: u16 = 49152;

/// Tell whether one port reaches another, and which rule or fact allows or blocks it.
///
/// Exit status 3 when it does not.
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
    from: End,
    to: End,
    /// What concerns both ends.
    between: Vec<Check>,
}

/// What one end's agent found.
#[derive(Serialize)]
struct End {
    port: String,
    host: String,
    checks: Vec<Check>,
}

#[derive(Serialize)]
struct Check {
    what: String,
    passes: bool,
    finding: String,
}

pub(crate) async fn run(args: &Explain, session: &mut Session) -> Result<Exit> {
    let packet = |from, to| packet(args, from, to);
    let fleet = session.fleet().await?;
    let all = objects::gather(&fleet, &Filter::default(), |member| {
        (member.row.agent == Kind::Port.agent()).then_some(Some(Kind::Port))
    })
    .await?;
    let rows = objects::rows(&all.held);
    let port = |name: &str| objects::find(&rows, Kind::Port, name, fleet.cloud());
    let (from, to) = (port(&args.from)?, port(&args.to)?);
    let (source, destination) = (address(from, args.ipv6)?, address(to, args.ipv6)?);
    let packet = packet(source, destination)?;
    let mut between = vec![same_network(from, to)];
    let (from_end, from_mtu) = half(&all, from, "egress", &packet, to).await?;
    let (to_end, to_mtu) = half(&all, to, "ingress", &packet, from).await?;
    between.push(mtus(from_mtu, to_mtu));
    fleet.close().await;
    let checks = || from_end.checks.iter().chain(&between).chain(&to_end.checks);
    let passes = checks().all(|check| check.passes);
    let explanation = Explanation { passes, packet, from: from_end, to: to_end, between };
    match session.console.output() {
        Output::Table | Output::Wide => session.console.text(&text(&explanation))?,
        _ => session.console.print_tree(&explanation)?,
    }
    Ok(if passes { Exit::Well } else { Exit::NotWell })
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

fn spec(row: &ObjectRow) -> Result<&PortSpec> {
    match &row.document.spec {
        Spec::Port(port) => Ok(port),
        _ => bail!("{} is not a port", row.name),
    }
}

fn address(row: &ObjectRow, six: bool) -> Result<IpAddr> {
    let family = if six { "IPv6" } else { "IPv4" };
    let mut addresses = spec(row)?.fixed_ips.iter().map(|fixed| fixed.address);
    addresses
        .find(|address| address.is_ipv6() == six)
        .with_context(|| format!("port {} has no {family} address", row.name))
}

/// Asks the agent of a port's host about its end.
async fn half(
    all: &Gathered,
    row: &ObjectRow,
    direction: &str,
    packet: &Value,
    peer: &ObjectRow,
) -> Result<(End, Option<u64>)> {
    let (own, other) = (spec(row)?, spec(peer)?);
    let host = own.host.clone();
    let port = row.name.clone();
    let member = all
        .members
        .iter()
        .find(|member| member.row.agent == Kind::Port.agent() && member.row.host == host);
    let Some(member) = member else {
        let finding = format!("no network-agent answers on {host}: what it sees is not known");
        let checks = vec![Check { what: "agent".to_owned(), passes: false, finding }];
        return Ok((End { port, host, checks }, None));
    };
    let asked = json!({
        "direction": direction,
        "packet": packet,
        "peer": {"mac": other.mac, "host": other.host},
    });
    let answer = member
        .client
        .act(row.document.object(), "explain", asked)
        .await
        .with_context(|| format!("cannot ask network-agent on {host} about port {port}"))?;
    let checks = answer["checks"].as_array().into_iter().flatten().map(|check| Check {
        what: check["what"].as_str().unwrap_or_default().to_owned(),
        passes: check["passes"] == true,
        finding: check["finding"].as_str().unwrap_or_default().to_owned(),
    });
    Ok((End { port, host, checks: checks.collect() }, answer["mtu"].as_u64()))
}

fn same_network(from: &ObjectRow, to: &ObjectRow) -> Check {
    let networks = spec(from).ok().zip(spec(to).ok()).map(|(a, b)| (a.network, b.network));
    let (passes, finding) = match networks {
        Some((one, other)) if one == other => (true, format!("both are on network {one}")),
        Some((one, other)) => (
            false,
            format!(
                "they are on networks {one} and {other}; ways through routers are not explained yet"
            ),
        ),
        None => (false, "one of them is not a port".to_owned()),
    };
    Check { what: "network".to_owned(), passes, finding }
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
    Check { what: "mtu".to_owned(), passes, finding }
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
    let End { port, host, checks } = &explanation.from;
    tell(format!("out of {port} on {host}"), checks);
    tell("between".to_owned(), &explanation.between);
    let End { port, host, checks } = &explanation.to;
    tell(format!("into {port} on {host}"), checks);
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
        let check = |passes| Check { what: "link".into(), passes, finding: "tap1 is down".into() };
        let end =
            |passes| End { port: "a".into(), host: "one".into(), checks: vec![check(passes)] };
        let explanation = Explanation {
            passes: false,
            packet: json!(null),
            from: end(true),
            to: end(false),
            between: vec![],
        };
        let text = text(&explanation);
        assert!(text.contains("  NO  link            tap1 is down\n"), "{text}");
        assert!(text.ends_with("It does not pass.\n"), "{text}");
        assert!(!mtus(Some(1450), Some(1500)).passes);
    }
}
