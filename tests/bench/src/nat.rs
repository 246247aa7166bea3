//! Bytes through a router's translation: against rules that do the same and were made by hand.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use stackhand_kernel::Netns;
use uuid::Uuid;

use crate::network::{Host, document, on_hosts, tool};
use crate::table::Row;

/// How long each stream runs, and how many there are of each kind, in turn.
const STREAM: Duration = Duration::from_secs(3);
const TURNS: usize = 3;

pub(crate) async fn run() -> anyhow::Result<Vec<Row>> {
    let mut ours = Vec::new();
    let mut by_hand = Vec::new();
    for _ in 0..TURNS {
        ours.extend(on_hosts(ours_once).await?.first().map(Row::figure));
        by_hand.extend(on_hosts(by_hand_once).await?.first().map(Row::figure));
    }
    let middle = |mut figures: Vec<f64>| {
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let what = "source translation: one TCP stream, against rules made by hand";
    Ok(vec![Row::times(what, middle(ours), "MiB/s", middle(by_hand), 0.95)])
}

/// The wire outside, with somebody on it.
const OUTSIDE: &str =
    "netns add outside\nlink add eth1 type veth peer name eth0 netns outside\nlink set eth1 up\n";

async fn ours_once() -> anyhow::Result<Vec<Row>> {
    let id = |number: u128| Uuid::from_u128(number << 96);
    let subnet = |cidr: &str, gateway: &str| json!([{"name": "main", "cidr": cidr, "gateway": gateway, "dhcp": false}]);
    let port = |net: u128, last: u8, owner: &str, address: &str| {
        json!({
            "network": id(net), "host": "one", "mac": format!("fa:16:3e:00:00:{last:02x}"),
            "owner": owner, "fixed_ips": [{"subnet": "main", "address": address}],
            "port_security": false,
        })
    };
    let public = json!({
        "type": "flat", "physical_network": "public", "external": true,
        "subnets": subnet("203.0.113.0/24", "203.0.113.1"),
    });
    let inside =
        json!({"type": "local", "mtu": 1500, "subnets": subnet("10.7.0.0/24", "10.7.0.1")});
    let router = json!({"host": "one", "interfaces": [id(4)], "gateway": {"port": id(3)}});
    let documents = [
        document("Host", "one", id(9), &json!({"bridge_mappings": {"public": "eth1"}}))?,
        document("Network", "public", id(1), &public)?,
        document("Network", "inside", id(2), &inside)?,
        document("Port", "gateway", id(3), &port(1, 3, "router-gateway", "203.0.113.10"))?,
        document("Port", "interface", id(4), &port(2, 4, "router-interface", "10.7.0.1"))?,
        document("Port", "guest", id(5), &port(2, 5, "external", "10.7.0.10"))?,
        document("Router", "router", id(6), &router)?,
    ];
    let text = id(5).to_string();
    let tap = &text[..11];
    tool("ip", &["-batch", "-"], OUTSIDE).await?;
    let guest = format!(
        "netns add guest\nlink add tap{tap} type veth peer name eth0 address fa:16:3e:00:00:05 netns guest\n"
    );
    tool("ip", &["-batch", "-"], &guest).await?;
    let host = Host::new()?;
    let mut agent = host.start();
    host.ready().await?;
    host.apply(&documents).await?;
    let row = stream().await;
    agent.kill();
    row
}

async fn by_hand_once() -> anyhow::Result<Vec<Row>> {
    tool("ip", &["-batch", "-"], OUTSIDE).await?;
    let links = "netns add guest\nnetns add router\n\
                 link add brq1 type bridge forward_delay 0\nlink set brq1 up\nlink set eth1 master brq1\n\
                 link add brq2 type bridge forward_delay 0\nlink set brq2 up\n\
                 link add tap1 type veth peer name qg netns router\nlink set tap1 master brq1 up\n\
                 link add tap2 type veth peer name qr netns router\nlink set tap2 master brq2 up\n\
                 link add tap3 type veth peer name eth0 netns guest\nlink set tap3 master brq2 up\n";
    tool("ip", &["-batch", "-"], links).await?;
    let router = "link set lo up\nlink set qg up\nlink set qr up\naddress add 203.0.113.10/24 dev qg\n\
                  address add 10.7.0.1/24 dev qr\n";
    tool("ip", &["-n", "router", "-batch", "-"], router).await?;
    let forward = ["netns", "exec", "router", "sysctl", "-q", "net.ipv4.ip_forward=1"];
    tool("ip", &forward, "").await?;
    let rules = "table ip nat {\n chain post {\n  type nat hook postrouting priority srcnat;\n  \
                 oifname qg masquerade\n }\n}\n";
    tool("ip", &["netns", "exec", "router", "nft", "-f", "-"], rules).await?;
    stream().await
}

/// Sends from the guest to the outside as fast as it goes.
async fn stream() -> anyhow::Result<Vec<Row>> {
    let guest =
        "link set eth0 up\naddress add 10.7.0.10/24 dev eth0\nroute add default via 10.7.0.1\n";
    tool("ip", &["-n", "guest", "-batch", "-"], guest).await?;
    let outside = "link set eth0 up\naddress add 203.0.113.1/24 dev eth0\n";
    tool("ip", &["-n", "outside", "-batch", "-"], outside).await?;
    let listen = || TcpListener::bind("0.0.0.0:5001");
    let listener = Netns::named("outside")?.inside("listen", listen).await?;
    let reader = std::thread::spawn(move || -> std::io::Result<f64> {
        let (mut stream, peer) = listener.accept()?;
        if peer.ip().to_string() != "203.0.113.10" {
            return Err(std::io::Error::other(format!("nobody translated {peer}")));
        }
        let mut buffer = vec![0; 1 << 18];
        let (begun, mut bytes) = (Instant::now(), 0.0);
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok(bytes / f64::from(1 << 20) / begun.elapsed().as_secs_f64()),
                read => bytes += f64::from(u32::try_from(read).unwrap_or(u32::MAX)),
            }
        }
    });
    let send = || {
        let outside = SocketAddr::from(([203, 0, 113, 1], 5001));
        let mut stream = TcpStream::connect_timeout(&outside, Duration::from_secs(20))?;
        let buffer = vec![7; 1 << 18];
        let begun = Instant::now();
        while begun.elapsed() < STREAM {
            stream.write_all(&buffer)?;
        }
        Ok(())
    };
    Netns::named("guest")?.inside("send", send).await?;
    let rate = tokio::task::spawn_blocking(move || reader.join()).await?;
    let rate = rate.ok().context("the reader panicked")??;
    Ok(vec![Row::told("rate", rate, "MiB/s")])
}
