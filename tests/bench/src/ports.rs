//! A host with 1,000 ports, and an overlay with 10,000 addresses on other hosts: against the same state made by
//! `ip -batch`, `bridge -batch`, `sysctl` and `nft -f`.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use stackhand_bus::local::LocalTransport;
use stackhand_kernel::exec::Program;
use stackhand_model::{AgentKind, Document, ObjectRef};
use stackhand_runtime::api::Condition;
use stackhand_runtime::client::AgentClient;
use stackhand_testkit::{Spawned, bin, on_a_host};
use uuid::Uuid;

use crate::agents::{cpu_seconds, status_mib};
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

/// Runs a measurement on a thread whose network and `/run` are its own.
async fn on_hosts(
    measure: impl AsyncFnOnce() -> anyhow::Result<Vec<Row>> + Send + 'static,
) -> anyhow::Result<Vec<Row>> {
    let found = Arc::new(Mutex::new(None));
    let result = Arc::clone(&found);
    let measured = tokio::task::spawn_blocking(move || {
        on_a_host(|| async move {
            let rows = measure().await;
            *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(rows);
        });
    });
    measured.await?;
    let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
    found.take().context("namespaces cannot be made; be root")?
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
    let mut agent = host.start();
    host.ready().await?;
    let begun = Instant::now();
    host.apply(&documents).await?;
    let cold = begun.elapsed();

    let mut rows = vec![Row::at_most(
        "1,000 ports: memory (RSS)",
        status_mib(agent.pid(), "VmRSS:")?,
        "MiB",
        40.0,
    )];
    let before = cpu_seconds(agent.pid())?;
    let watched = Instant::now();
    tokio::time::sleep(IDLE).await;
    let share = (cpu_seconds(agent.pid())? - before) / watched.elapsed().as_secs_f64() * 100.0;
    rows.push(Row::at_most("1,000 ports: idle share of a core", share, "%", 0.2));

    let one_more = [document("Port", "more", port_id(PORTS), &port(net, PORTS, "one"))?];
    let begun = Instant::now();
    host.apply(&one_more).await?;
    rows.push(Row::told(
        "1,000 ports: one more, until active",
        milliseconds(begun.elapsed()),
        "ms",
    ));

    let rules = tool("nft", &["list", "ruleset"], "").await?;
    agent.kill();
    let begun = Instant::now();
    agent = host.start();
    host.ready().await?;
    // Answered after the first pass, and looks by itself.
    let left = host.client().plan(&[], &[]).await?;
    let restart = begun.elapsed();
    ensure!(left.steps.is_empty(), "the restarted agent would do {} things", left.steps.len());
    let writes = host.client().facts().await?["writes"].as_f64().unwrap_or(f64::NAN);
    rows.push(Row::at_most("1,000 ports: restart until in sync", restart.as_secs_f64(), "s", 2.0));
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

/// A host's folders and settings; they outlive its agent.
struct Host {
    folder: tempfile::TempDir,
}

impl Host {
    fn new() -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("shb-").tempdir()?;
        let at = |name: &str| folder.path().join(name);
        for name in ["etc", "state", "run"] {
            std::fs::create_dir(at(name))?;
        }
        let settings =
            format!("host = \"one\"\nstate_dir = {:?}\nrun_dir = {:?}\n", at("state"), at("run"));
        std::fs::write(at("etc/network.toml"), settings)?;
        Ok(Self { folder })
    }

    /// Starts the agent in the calling thread's namespaces.
    fn start(&self) -> Spawned {
        let etc = self.folder.path().join("etc");
        Spawned::start(bin(AgentKind::Network.binary()), [Path::new("--config-dir"), &etc])
    }

    fn client(&self) -> AgentClient {
        let transport = LocalTransport::connect(self.folder.path().join("run/network.sock"));
        let client = AgentClient::new(Arc::new(transport), AgentKind::Network, "one");
        client.with_limit(Duration::from_secs(120))
    }

    async fn ready(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while let Err(error) = self.client().ping().await {
            ensure!(
                begun.elapsed() < Duration::from_secs(30),
                "the agent does not answer: {error}"
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    async fn apply(&self, documents: &[Document]) -> anyhow::Result<()> {
        self.client().apply(documents).await?;
        self.active(documents).await
    }

    async fn active(&self, documents: &[Document]) -> anyhow::Result<()> {
        let objects: Vec<ObjectRef> = documents.iter().map(Document::object).collect();
        self.client().wait(&objects, Condition::Active, Duration::from_secs(100)).await?;
        Ok(())
    }
}

fn document(kind: &str, name: &str, id: Uuid, spec: &Value) -> anyhow::Result<Document> {
    let value = json!({"kind": kind, "id": id, "name": name, "generation": 1, "spec": spec});
    Ok(Document::from_value(&value)?)
}

fn port(net: Uuid, number: u128, host: &str) -> Value {
    json!({"network": net, "host": host, "mac": mac(number), "port_security": false})
}

/// The eleven characters that make names differ are the first of the id.
fn port_id(number: u128) -> Uuid {
    Uuid::from_u128(number << 96 | 0xaa << 120)
}

fn mac(number: u128) -> String {
    let [.., a, b] = number.to_be_bytes();
    format!("fa:16:3e:00:{a:02x}:{b:02x}")
}

fn address(number: u128) -> String {
    let [.., a, b] = number.to_be_bytes();
    format!("10.7.{a}.{b}")
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

async fn tool(name: &str, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    let path = ["/usr/sbin", "/sbin", "/usr/bin"].map(|folder| Path::new(folder).join(name));
    let path = path.into_iter().find(|path| path.exists()).context(format!("no program {name}"))?;
    let program = Program::new(path).args(arguments.iter().copied()).stdin(input);
    Ok(program.limit(Duration::from_secs(120)).run().await?.text())
}
