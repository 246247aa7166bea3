//! 200 routers, each with a gateway, two networks and five floating IPs: against the same state made by
//! `ip -batch`, `sysctl` and `nft -f` in namespaces.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stackhand_model::Document;
use uuid::Uuid;

use crate::agents::{cpu_seconds, status_mib};
use crate::network::{Host, document, milliseconds, on_hosts, tool};
use crate::table::Row;

const ROUTERS: u128 = 200;
const FLOATING: u128 = 5;

/// How often one floating IP is made, to tell the middle of.
const TIMES: u128 = 21;

/// How long the agent is watched doing nothing: as often as it looks at everything without being asked.
const IDLE: Duration = Duration::from_secs(60);

pub(crate) async fn run() -> anyhow::Result<Vec<Row>> {
    on_hosts(routers).await
}

async fn routers() -> anyhow::Result<Vec<Row>> {
    tool("ip", &["link", "add", "eth1", "type", "veth", "peer", "name", "wire"], "").await?;
    let documents = documents()?;
    let host = Host::new()?;
    let agent = host.start();
    host.ready().await?;
    let begun = Instant::now();
    host.apply(&documents).await?;
    let cold = milliseconds(begun.elapsed());

    let mut rows =
        vec![Row::told("200 routers: memory (RSS)", status_mib(agent.pid(), "VmRSS:")?, "MiB")];
    // New addresses are announced until then.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let before = cpu_seconds(agent.pid())?;
    let watched = Instant::now();
    tokio::time::sleep(IDLE).await;
    let share = (cpu_seconds(agent.pid())? - before) / watched.elapsed().as_secs_f64() * 100.0;
    rows.push(Row::told(
        "200 routers: idle share of a core, a look at all of it included",
        share,
        "%",
    ));

    let mut took = Vec::new();
    for number in FLOATING..FLOATING + TIMES {
        let one = [floating(number, 0)?];
        let begun = Instant::now();
        host.apply(&one).await?;
        took.push(milliseconds(begun.elapsed()));
    }
    took.sort_by(f64::total_cmp);
    let middle = took[took.len() / 2];
    rows.push(Row::at_most("200 routers: one floating IP more, until active", middle, "ms", 20.0));

    let space = format!("qrouter-{}", id(7, 0));
    let rules = tool("ip", &["netns", "exec", &space, "nft", "list", "ruleset"], "").await?;
    let (mut agent, restart, writes) = host.restart(agent).await?;
    rows.push(Row::at_most("200 routers: restart until in sync", restart, "s", 5.0));
    rows.push(Row::at_most("200 routers: writes of a restart", writes, "", 0.0));
    agent.kill();

    let floor = on_hosts(move || floor(rules)).await?;
    let floor = floor.first().map_or(f64::NAN, Row::figure);
    let what = "200 routers: cold apply until active";
    rows.insert(0, Row::times_at_most(what, cold, "ms", floor, 2.0));
    Ok(rows)
}

/// Ids whose beginnings, which make names, differ by kind and number.
fn id(kind: u128, number: u128) -> Uuid {
    Uuid::from_u128(kind << 120 | number << 96)
}

fn documents() -> anyhow::Result<Vec<Document>> {
    let subnet = |cidr: &str, gateway: &str| json!([{"name": "main", "cidr": cidr, "gateway": gateway, "dhcp": false}]);
    let external = json!({
        "type": "flat", "physical_network": "public", "external": true,
        "subnets": subnet("203.0.0.0/16", "203.0.0.1"),
    });
    let mut documents = vec![
        document("Host", "one", id(9, 0), &json!({"bridge_mappings": {"public": "eth1"}}))?,
        document("Network", "external", id(9, 1), &external)?,
    ];
    for number in 0..ROUTERS {
        let nets = [(5, 2, "10.1.0"), (6, 3, "10.2.0")];
        for (net, port_kind, prefix) in nets {
            let subnets = subnet(&format!("{prefix}.0/24"), &format!("{prefix}.1"));
            let spec = json!({"type": "local", "mtu": 1500, "subnets": subnets});
            documents.push(document(
                "Network",
                &format!("n{net}-{number}"),
                id(net, number),
                &spec,
            )?);
            let address = [format!("{prefix}.1")];
            let spec = port(id(net, number), (port_kind, number), "router-interface", &address);
            documents.push(document(
                "Port",
                &format!("p{net}-{number}"),
                id(port_kind, number),
                &spec,
            )?);
        }
        let gateway = [format!("203.0.{}.1", number + 1)];
        let spec = port(id(9, 1), (1, number), "router-gateway", &gateway);
        documents.push(document("Port", &format!("gateway{number}"), id(1, number), &spec)?);
        // Its guest is on another host.
        let addresses: Vec<String> = (10..100).map(|last| format!("10.1.0.{last}")).collect();
        let mut guest = port(id(5, number), (4, number), "instance", &addresses);
        guest["host"] = json!("two");
        documents.push(document("Port", &format!("guest{number}"), id(4, number), &guest)?);
        let spec = json!({
            "host": "one", "gateway": {"port": id(1, number)},
            "interfaces": [id(2, number), id(3, number)],
        });
        documents.push(document("Router", &format!("router{number}"), id(7, number), &spec)?);
        for which in 0..FLOATING {
            documents.push(floating(which, number)?);
        }
    }
    Ok(documents)
}

fn port(net: Uuid, (kind, number): (u128, u128), owner: &str, addresses: &[String]) -> Value {
    let [.., high, low] = number.to_be_bytes();
    let fixed: Vec<Value> =
        addresses.iter().map(|address| json!({"subnet": "main", "address": address})).collect();
    json!({
        "network": net, "host": "one", "owner": owner, "port_security": false, "fixed_ips": fixed,
        "mac": format!("fa:16:3e:{kind:02x}:{high:02x}:{low:02x}"),
    })
}

fn floating(which: u128, router: u128) -> anyhow::Result<Document> {
    let spec = json!({
        "address": format!("203.0.{}.{}", router + 1, which + 10),
        "router": id(7, router), "port": id(4, router),
        "fixed_address": format!("10.1.0.{}", which + 10),
    });
    document("FloatingIp", &format!("f{router}-{which}"), id(8, router << 8 | which), &spec)
}

/// The same state by programs, in a network of its own.
async fn floor(rules: String) -> anyhow::Result<Vec<Row>> {
    tool("ip", &["link", "add", "eth1", "type", "veth", "peer", "name", "wire"], "").await?;
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let alias = "alias stackhand:port:00000000-0000-0000-0000-000000000000";
    let bridge = |name: &str| {
        format!(
            "link add {name} type bridge forward_delay 0 mcast_snooping 0\n\
             link set {name} {alias} mtu 1500 up\n"
        )
    };
    let mut links = bridge("external") + "link set eth1 master external up\n";
    let mut script = format!("set -e\nip -batch {0}/links\n", folder.path().display());
    for number in 0..ROUTERS {
        let space = format!("router{number}");
        writeln!(links, "netns add {space}")?;
        let mut inside = format!("link set lo {alias} up\naddress add 169.254.169.254/32 dev lo\n");
        for (end, master, net) in [
            ("qg", "external".to_owned(), format!("203.0.{}.1/16", number + 1)),
            ("qa", format!("a{number}"), "10.1.0.1/24".to_owned()),
            ("qb", format!("b{number}"), "10.2.0.1/24".to_owned()),
        ] {
            if end != "qg" {
                links += &bridge(&master);
            }
            let tap = format!("{end}{number}");
            writeln!(links, "link add {tap} type veth peer name {end} netns {space}")?;
            writeln!(links, "link set {tap} {alias} mtu 1500 master {master} up")?;
            writeln!(inside, "link set {end} {alias} mtu 1500 up\naddress add {net} dev {end}")?;
        }
        for which in 0..FLOATING {
            writeln!(inside, "address add 203.0.{}.{}/32 dev qg", number + 1, which + 10)?;
        }
        writeln!(inside, "route add default via 203.0.0.1 dev qg")?;
        std::fs::write(at(&space), inside)?;
        let file = at(&space).display().to_string();
        let (settings, rules) =
            (at("settings").display().to_string(), at("rules").display().to_string());
        writeln!(script, "ip -n {space} -batch {file}")?;
        writeln!(script, "ip netns exec {space} sh -c 'sysctl -q -p {settings}; nft -f {rules}'")?;
    }
    let mut settings = "net.ipv4.ip_forward=1\n".to_owned();
    for link in ["qg", "qa", "qb"] {
        for (key, value) in
            [("arp_ignore", 1), ("arp_announce", 2), ("rp_filter", 0), ("send_redirects", 0)]
        {
            writeln!(settings, "net.ipv4.conf.{link}.{key}={value}")?;
        }
        writeln!(settings, "net.ipv6.conf.{link}.disable_ipv6=1")?;
    }
    std::fs::write(at("links"), links)?;
    std::fs::write(at("settings"), settings)?;
    std::fs::write(at("rules"), rules)?;
    let begun = Instant::now();
    tool("sh", &["-c", &script], "").await?;
    Ok(vec![Row::told("floor", milliseconds(begun.elapsed()), "ms")])
}
