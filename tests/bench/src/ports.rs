//! A host with 1,000 ports, and an overlay with 10,000 addresses on other hosts: against the same state made by
//! `ip -batch`, `bridge -batch`, `sysctl` and `nft -f`.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use serde_json::json;
use uuid::Uuid;

use crate::agents::{cpu_seconds, status_mib};
use crate::network::{Host, address, document, mac, milliseconds, on_hosts, port, port_id, tool};
use crate::table::Row;

/// Ports of the host.
const PORTS: u128 = 1000;

/// Addresses on other hosts.
const REMOTE: u128 = 10_000;

/// How long the agent is watched doing nothing.
const IDLE: Duration = Duration::from_secs(20);

pub(crate) async fn run() -> anyhow::Result<Vec<Row>> {
    let mut rows = on_hosts(ports).await?;
    rows.extend(on_hosts(addresses).await?);
    Ok(rows)
}

/// 1,000 ports: made, adopted after a restart, and held.
async fn ports() -> anyhow::Result<Vec<Row>> {
    let net = Uuid::from_u128(7 << 96);
    let mut documents = vec![document("Network", "net", net, &json!({"type": "local"}))?];
    for number in 0..PORTS {
        documents.push(document(
            "Port",
            &format!("p{number}"),
            port_id(number),
            &port(net, number, "one"),
        )?);
    }
    let host = Host::new()?;
    let agent = host.start();
    host.ready().await?;
    let begun = Instant::now();
    host.apply(&documents).await?;
    let cold = begun.elapsed();

    let memory = || status_mib(agent.pid(), "VmRSS:");
    let mut rows =
        vec![Row::told("1,000 ports: memory (RSS) in the same moment", memory()?, "MiB")];
    let before = cpu_seconds(agent.pid())?;
    let watched = Instant::now();
    tokio::time::sleep(IDLE).await;
    let share = (cpu_seconds(agent.pid())? - before) / watched.elapsed().as_secs_f64() * 100.0;
    rows.push(Row::at_most("1,000 ports: idle share of a core", share, "%", 0.2));
    rows.push(Row::at_most(
        "1,000 ports: memory (RSS) of the resting agent",
        memory()?,
        "MiB",
        40.0,
    ));

    let one_more = [document("Port", "more", port_id(PORTS), &port(net, PORTS, "one"))?];
    let begun = Instant::now();
    host.apply(&one_more).await?;
    rows.push(Row::told(
        "1,000 ports: one more, until active",
        milliseconds(begun.elapsed()),
        "ms",
    ));

    let rules = tool("nft", &["list", "ruleset"], "").await?;
    let (mut agent, restart, writes) = host.restart(agent).await?;
    rows.push(Row::at_most("1,000 ports: restart until in sync", restart, "s", 2.0));
    rows.push(Row::at_most("1,000 ports: writes of a restart", writes, "", 0.0));
    agent.kill();

    let floor = on_hosts(move || floor_of_ports(rules)).await?;
    let floor = floor.first().map_or(f64::NAN, Row::figure);
    rows.insert(
        0,
        Row::times_at_most(
            "1,000 ports: cold apply until active",
            milliseconds(cold),
            "ms",
            floor,
            1.5,
        ),
    );
    Ok(rows)
}

/// The same state by programs, in a network of its own.
async fn floor_of_ports(rules: String) -> anyhow::Result<Vec<Row>> {
    let (mut links, mut settings) = (String::new(), String::new());
    links.push_str("link add brq type bridge forward_delay 0 mcast_snooping 0\nlink set brq alias mark mtu 1500 up\n");
    for number in 0..PORTS {
        let name = format!("tap{number}");
        write!(
            links,
            "tuntap add dev {name} mode tap user root vnet_hdr\n\
             link set {name} alias stackhand:port:00000000-0000-0000-0000-000000000000 mtu 1500 master brq\n\
             link set {name} up\n"
        )?;
        writeln!(settings, "net.ipv6.conf.{name}.disable_ipv6=1")?;
    }
    let begun = Instant::now();
    tool("ip", &["-batch", "-"], &links).await?;
    tool("sysctl", &["-q", "-p", "-"], &settings).await?;
    // The agent's rules name the agent's links; to load them costs the same.
    tool("nft", &["-f", "-"], &rules).await?;
    Ok(vec![Row::told("floor", milliseconds(begun.elapsed()), "ms")])
}

/// 10,000 addresses on ten other hosts: where each is, for the overlay, the bridge and ARP.
async fn addresses() -> anyhow::Result<Vec<Row>> {
    tool("ip", &["link", "add", "under", "type", "veth", "peer", "name", "wire"], "").await?;
    tool("ip", &["address", "add", "192.0.2.1/24", "dev", "under"], "").await?;
    let net = Uuid::from_u128(7 << 96);
    let subnet = json!({"name": "main", "cidr": "10.7.0.0/16", "dhcp": false});
    let overlay = json!({"type": "vxlan", "segment": 7, "subnets": [subnet]});
    let mut documents = vec![
        document("Network", "net", net, &overlay)?,
        document("Port", "here", port_id(0), &port(net, 0, "one"))?,
    ];
    for number in 0..=10 {
        let name = if number == 0 { "one".to_owned() } else { format!("host{number}") };
        let spec = json!({"tunnel_address": format!("192.0.2.{}", number + 1)});
        documents.push(document("Host", &name, Uuid::from_u128(number + 1), &spec)?);
    }
    let host = Host::new()?;
    let mut agent = host.start();
    host.ready().await?;
    host.apply(&documents).await?;
    let mut remote = Vec::new();
    for number in 1..=REMOTE {
        let mut spec = port(net, number, &format!("host{}", number % 10 + 1));
        spec["fixed_ips"] = json!([{"subnet": "main", "address": address(number)}]);
        remote.push(document("Port", &format!("p{number}"), port_id(number), &spec)?);
    }
    let begun = Instant::now();
    host.client().apply(&remote).await?;
    let accepted = begun.elapsed();
    let begun = Instant::now();
    host.active(&remote).await?;
    let wired = milliseconds(begun.elapsed());
    agent.kill();
    let floor = on_hosts(floor_of_addresses).await?;
    let floor = floor.first().map_or(f64::NAN, Row::figure);
    Ok(vec![
        Row::told("10,000 remote ports: accepted and on disk", milliseconds(accepted), "ms"),
        Row::times_at_most("10,000 remote ports: wired after that", wired, "ms", floor, 2.0),
    ])
}

async fn floor_of_addresses() -> anyhow::Result<Vec<Row>> {
    let links = "link add brq type bridge\nlink set brq up\n\
                 link add under type veth peer name wire\naddress add 192.0.2.1/24 dev under\n\
                 link add vxlan-7 type vxlan id 7 local 192.0.2.1 dstport 4789 nolearning\n\
                 link set vxlan-7 master brq up\n";
    tool("ip", &["-batch", "-"], links).await?;
    let (mut forwarding, mut neighbours) = (String::new(), String::new());
    for number in 1..=REMOTE {
        let mac = mac(number);
        writeln!(forwarding, "fdb replace {mac} dev vxlan-7 dst 192.0.2.{} self", number % 10 + 2)?;
        writeln!(forwarding, "fdb replace {mac} dev vxlan-7 master static")?;
        writeln!(
            neighbours,
            "neighbour replace {} lladdr {mac} dev brq nud permanent",
            address(number)
        )?;
    }
    let begun = Instant::now();
    tool("bridge", &["-batch", "-"], &forwarding).await?;
    tool("ip", &["-batch", "-"], &neighbours).await?;
    Ok(vec![Row::told("floor", milliseconds(begun.elapsed()), "ms")])
}
