//! Names and brokers: do they resolve, does somebody answer.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use super::{Finding, Severity};
use crate::config::BrokerAddress;

/// Time for a name to resolve.
const RESOLVE_LIMIT: Duration = Duration::from_secs(4);

/// Time for a broker to take a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(4);

pub(super) async fn host_name(host: String) -> Vec<Finding> {
    let resolved = match timeout(RESOLVE_LIMIT, lookup_host((host.as_str(), 0))).await {
        Ok(Ok(addresses)) => Ok(addresses.map(|address| address.ip()).collect()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_elapsed) => Err("no answer from the resolver".to_owned()),
    };
    vec![judge_host_name(&host, resolved)]
}

pub(super) fn judge_host_name(host: &str, resolved: Result<Vec<IpAddr>, String>) -> Finding {
    const NAME: &str = "host-name";
    let to_hosts = format!("add a line `<address of this host> {host}` to /etc/hosts");
    if host == "localhost" || host.starts_with("localhost.") {
        return Finding::failure(
            NAME,
            format!("the host is called {host}; hosts of a cloud need names of their own"),
            "hostnamectl set-hostname <name>, or set `host` in stackhand.toml",
        );
    }
    match resolved {
        Err(why) => Finding::warning(NAME, format!("{host} does not resolve: {why}"), to_hosts),
        Ok(addresses) if addresses.iter().all(IpAddr::is_loopback) => {
            Finding::warning(NAME, format!("{host} resolves to loopback addresses only"), to_hosts)
        }
        Ok(addresses) => {
            let list: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
            Finding::pass(NAME, format!("{host} is {}", list.join(", ")))
        }
    }
}

pub(super) async fn brokers(brokers: Vec<BrokerAddress>) -> Vec<Finding> {
    let looks =
        brokers.iter().map(|broker| async move { judge_broker(broker, reach(broker).await) });
    let mut findings = futures_util::future::join_all(looks).await;
    // One broker that answers is enough to work; the others are what fail-over would need.
    if findings.iter().any(|finding| finding.severity == Severity::Pass) {
        for finding in &mut findings {
            finding.severity = finding.severity.min(Severity::Warning);
        }
    }
    findings
}

/// Why a broker cannot be reached.
#[derive(Debug)]
pub(super) enum Unreachable {
    Name(String),
    Refused,
    Silent,
    Other(io::Error),
}

async fn reach(broker: &BrokerAddress) -> Result<(), Unreachable> {
    let address = (broker.host.as_str(), broker.port);
    let resolved = match timeout(RESOLVE_LIMIT, lookup_host(address)).await {
        Ok(Ok(addresses)) => addresses.collect::<Vec<_>>(),
        Ok(Err(error)) => return Err(Unreachable::Name(error.to_string())),
        Err(_elapsed) => return Err(Unreachable::Name("no answer from the resolver".into())),
    };
    match timeout(CONNECT_LIMIT, TcpStream::connect(resolved.as_slice())).await {
        Ok(Ok(_stream)) => Ok(()),
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Err(Unreachable::Refused)
        }
        Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => Err(Unreachable::Silent),
        Ok(Err(error)) => Err(Unreachable::Other(error)),
        Err(_elapsed) => Err(Unreachable::Silent),
    }
}

pub(super) fn judge_broker(broker: &BrokerAddress, reached: Result<(), Unreachable>) -> Finding {
    const NAME: &str = "broker";
    let BrokerAddress { host, port } = broker;
    match reached {
        Ok(()) => Finding::pass(NAME, format!("{host}:{port} takes connections")),
        Err(Unreachable::Name(why)) => Finding::failure(
            NAME,
            format!("{host} does not resolve: {why}"),
            format!("correct bus.url, or test the resolver: getent ahosts {host}"),
        ),
        Err(Unreachable::Refused) => Finding::failure(
            NAME,
            format!("{host}:{port} refuses connections: no broker listens there"),
            format!("on {host}: systemctl start rabbitmq-server; rabbitmq-diagnostics listeners"),
        ),
        Err(Unreachable::Silent) => Finding::failure(
            NAME,
            format!("{host}:{port} does not answer: a firewall drops it, or the host is down"),
            format!("ping {host}; open TCP port {port} between this host and {host}"),
        ),
        Err(Unreachable::Other(error)) => Finding::failure(
            NAME,
            format!("cannot reach {host}:{port}: {error}"),
            format!("look at the route: ip route get {host}"),
        ),
    }
}
