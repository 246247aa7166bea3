//! What one process serves: 1,000 networks with DHCP, DNS and metadata, DHCP exchanges over 100 networks, metadata for
//! 1,000 guests.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use stackhand_kernel::Netns;
use stackhand_kernel::tun::{NewTap, VirtioHeader};
use stackhand_model::Document;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::task::JoinSet;
use tokio::time::timeout;
use uuid::Uuid;

use crate::agents::status_mib;
use crate::network::{Host, document, milliseconds, on_hosts, tool};
use crate::table::Row;

const NETWORKS: u128 = 1000;
/// Networks whose guests ask for leases.
const BUSY: u128 = 100;
const BUSY_FOR: Duration = Duration::from_secs(5);
/// Guests of one network that read metadata, how many at once, and how often each.
const GUESTS: u128 = 1000;
const READERS: usize = 8;
const READS: usize = 4;

pub(crate) async fn run() -> anyhow::Result<Vec<Row>> {
    let mut rows = on_hosts(networks).await?;
    rows.extend(on_hosts(leases).await?);
    rows.extend(on_hosts(storm).await?);
    rows.extend(on_hosts(metadata).await?);
    Ok(rows)
}

/// Ids whose beginnings, which make names, differ by kind and number.
fn id(kind: u128, number: u128) -> Uuid {
    Uuid::from_u128(kind << 120 | number << 96)
}

fn mac(number: u128) -> [u8; 6] {
    let [.., high, low] = number.to_be_bytes();
    [0xfa, 0x16, 0x3e, 0, high, low]
}

fn port(net: Uuid, number: u128, address: Ipv4Addr, host: &str) -> Value {
    let mac = mac(number).map(|byte| format!("{byte:02x}")).join(":");
    json!({
        "network": net, "host": host, "mac": mac, "port_security": false,
        "fixed_ips": [{"subnet": "main", "address": address}],
        "guest": {"hostname": format!("guest{number}"), "user_data": "IyEvYmluL3NoCg=="},
    })
}

/// Networks of one guest each.
fn one_guest_each(networks: u128) -> anyhow::Result<Vec<Document>> {
    let mut documents = Vec::new();
    for number in 0..networks {
        let subnets = json!([{
            "name": "main", "cidr": "10.7.0.0/24", "gateway": "10.7.0.1", "dhcp_address": "10.7.0.2",
        }]);
        let spec = json!({"type": "local", "subnets": subnets});
        documents.push(document("Network", &format!("n{number}"), id(1, number), &spec)?);
        let spec = port(id(1, number), number, Ipv4Addr::new(10, 7, 0, 10), "one");
        documents.push(document("Port", &format!("p{number}"), id(2, number), &spec)?);
    }
    Ok(documents)
}

async fn networks() -> anyhow::Result<Vec<Row>> {
    let documents = one_guest_each(NETWORKS)?;
    let host = Host::new()?;
    let begun = Instant::now();
    let agent = host.start();
    host.ready().await?;
    host.apply(&documents).await?;
    let ready = begun.elapsed().as_secs_f64();
    let memory = status_mib(agent.pid(), "VmRSS:")?;
    let facts = host.client().facts().await?;
    for service in ["dhcp", "dns", "metadata"] {
        let key = if service == "metadata" { "sites" } else { "networks" };
        ensure!(facts[service][key] == json!(NETWORKS), "{service}: {}", facts[service]);
    }
    let (mut agent, restart, _writes) = host.restart(agent).await?;
    agent.kill();
    Ok(vec![
        Row::at_most("1,000 networks with services: cold until ready", ready, "s", 10.0),
        Row::at_most("1,000 networks with services: memory (RSS)", memory, "MiB", 150.0),
        Row::told("1,000 networks with services: restart until ready", restart, "s"),
    ])
}

/// Guests that do nothing but ask for leases, each as soon as it was answered.
async fn leases() -> anyhow::Result<Vec<Row>> {
    let documents = one_guest_each(BUSY)?;
    let host = Host::new()?;
    let mut agent = host.start();
    host.ready().await?;
    host.apply(&documents).await?;
    let mut guests = JoinSet::new();
    let end = tokio::time::Instant::now() + BUSY_FOR;
    for number in 0..BUSY {
        let mut tap = Tap::new(open_tap(number)?)?;
        guests.spawn(async move {
            let mut exchanges = 0_u32;
            while tokio::time::Instant::now() < end {
                exchanges += u32::from(exchange(&mut tap, mac(number)).await);
            }
            exchanges
        });
    }
    let exchanges: u32 = guests.join_all().await.iter().sum();
    agent.kill();
    let rate = f64::from(exchanges) / BUSY_FOR.as_secs_f64();
    Ok(vec![Row::at_least("100 networks: DHCP exchanges (four messages each)", rate, "/s", 5000.0)])
}

/// One network's guest asks for a lease again and again; first alone, then while another network's sends
/// 10,000 messages a second.
async fn storm() -> anyhow::Result<Vec<Row>> {
    let documents = one_guest_each(2)?;
    let host = Host::new()?;
    let mut agent = host.start();
    host.ready().await?;
    host.apply(&documents).await?;
    let mut quiet = Tap::new(open_tap(1)?)?;
    // A bridge passes nothing on for a moment after a port's link comes up.
    let begun = Instant::now();
    while !exchange(&mut quiet, mac(1)).await {
        ensure!(begun.elapsed() < Duration::from_secs(20), "the guest gets no lease");
    }
    let alone = slowest_exchange(&mut quiet).await?;
    let mut loud = open_tap(0)?;
    let over = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&over);
    let storm = tokio::task::spawn_blocking(move || -> anyhow::Result<f64> {
        // Of no guest: the worst case, as each is read and looked for.
        let frame = request([2, 0, 0, 0, 0, 9], &[53, 1, 1]);
        let (begun, mut sent) = (Instant::now(), 0_u32);
        while !told.load(Ordering::Relaxed) {
            let due = begun.elapsed().as_secs_f64() * 10_000.0;
            while f64::from(sent) < due {
                loud.write_all(&frame)?;
                sent += 1;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(f64::from(sent) / begun.elapsed().as_secs_f64())
    });
    let beside = slowest_exchange(&mut quiet).await;
    over.store(true, Ordering::Relaxed);
    let rate = storm.await??;
    agent.kill();
    Ok(vec![
        Row::told("DHCP exchange of a guest alone: p99", alone, "ms"),
        Row::at_least("another network's storm: messages", rate, "/s", 9500.0),
        Row::at_most("DHCP exchange beside that storm: p99", beside?, "ms", 20.0),
    ])
}

/// The 99th percentile of what exchanges take in a while, in milliseconds.
async fn slowest_exchange(tap: &mut Tap) -> anyhow::Result<f64> {
    let end = tokio::time::Instant::now() + BUSY_FOR;
    let mut took = Vec::new();
    while tokio::time::Instant::now() < end {
        let begun = Instant::now();
        // One that is not answered counts with the time that was waited for it.
        exchange(tap, mac(1)).await;
        took.push(milliseconds(begun.elapsed()));
        // Slower than the server is willing to answer.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    took.sort_by(f64::total_cmp);
    took.get(took.len() * 99 / 100).copied().context("no exchange was made")
}

/// The tap that the agent made for a guest, as a hypervisor opens it.
fn open_tap(number: u128) -> anyhow::Result<File> {
    let text = id(2, number).to_string();
    let tap = NewTap::open(&format!("tap{}", &text[..11]), false, VirtioHeader::Without)?;
    Ok(File::from(tap.into_fd()))
}

/// A guest's end of a tap, which is read and written as a pipe is.
struct Tap {
    from: pipe::Receiver,
    to: pipe::Sender,
}

impl Tap {
    fn new(tap: File) -> io::Result<Self> {
        let from = pipe::Receiver::from_file_unchecked(tap.try_clone()?)?;
        Ok(Self { from, to: pipe::Sender::from_file_unchecked(tap)? })
    }

    /// Returns when a message of that type has come.
    async fn answered(&mut self, kind: u8) -> io::Result<()> {
        /// Ethernet, IPv4, UDP and DHCP up to its options.
        const OPTIONS: usize = 14 + 20 + 8 + 240;
        let mut frame = [0; 2048];
        loop {
            let length = self.from.read(&mut frame).await?;
            // The message's type is the first option.
            if length > OPTIONS + 2 && frame[OPTIONS..OPTIONS + 3] == [53, 1, kind] {
                return Ok(());
            }
        }
    }
}

/// From DISCOVER to ACK; whether it came to an end.
async fn exchange(tap: &mut Tap, mac: [u8; 6]) -> bool {
    let address = [&[50, 4, 10, 7, 0, 10][..], &[54, 4, 10, 7, 0, 2]].concat();
    for (options, answer) in [(vec![53, 1, 1], 2), ([&[53, 1, 3][..], &address].concat(), 5)] {
        // What cannot be sent or is not answered is begun anew.
        let asked = tap.to.write(&request(mac, &options)).await;
        let heard = timeout(Duration::from_secs(1), tap.answered(answer)).await;
        if asked.is_err() || !matches!(heard, Ok(Ok(()))) {
            return false;
        }
    }
    true
}

/// A client's message in a frame.
fn request(mac: [u8; 6], options: &[u8]) -> Vec<u8> {
    let mut dhcp = vec![0; 300];
    dhcp[..4].copy_from_slice(&[1, 1, 6, 0]);
    dhcp[28..34].copy_from_slice(&mac);
    dhcp[236..240].copy_from_slice(&[99, 130, 83, 99]);
    dhcp[240..240 + options.len()].copy_from_slice(options);
    dhcp[240 + options.len()] = 255;
    let mut ip = vec![0x45, 0, 1, 72, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255];
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let [_, _, high, low] = (!((sum & 0xffff) + (sum >> 16))).to_be_bytes();
    ip[10..12].copy_from_slice(&[high, low]);
    let ethernet = [&[0xff; 6][..], &mac, &[8, 0]].concat();
    // UDP without a checksum, which IPv4 allows.
    [ethernet, ip, vec![0, 68, 0, 67, 1, 52, 0, 0], dhcp].concat()
}

/// Guests of one network, whose addresses are all in one namespace.
async fn metadata() -> anyhow::Result<Vec<Row>> {
    let guest = |number: u128| {
        let [.., high, low] = (number + 10).to_be_bytes();
        Ipv4Addr::new(10, 7, high, low)
    };
    let subnets = json!([{"name": "main", "cidr": "10.7.0.0/16", "dhcp_address": "10.7.0.2"}]);
    let spec = json!({"type": "local", "subnets": subnets});
    let mut documents = vec![document("Network", "net", id(1, 0), &spec)?];
    let mut addresses = "link set eth0 up\n".to_owned();
    for number in 0..GUESTS {
        let mut spec =
            port(id(1, 0), number, guest(number), if number == 0 { "one" } else { "two" });
        if number == 0 {
            spec["owner"] = json!("external");
        }
        documents.push(document("Port", &format!("p{number}"), id(2, number), &spec)?);
        addresses += &format!("address add {}/16 dev eth0\n", guest(number));
    }
    addresses += "route add 169.254.169.254 via 10.7.0.2\n";
    let text = id(2, 0).to_string();
    let tap = format!("tap{}", &text[..11]);
    tool("ip", &["netns", "add", "guests"], "").await?;
    let pair = ["link", "add", &tap, "type", "veth", "peer", "name", "eth0", "netns", "guests"];
    tool("ip", &pair, "").await?;
    let host = Host::new()?;
    let mut agent = host.start();
    host.ready().await?;
    host.client().apply(&documents).await?;
    host.active(&documents[..2]).await?;
    tool("ip", &["-n", "guests", "-batch", "-"], &addresses).await?;
    let sources: Vec<Ipv4Addr> = (0..GUESTS).map(guest).collect();
    let read = move || {
        let parts = sources.chunks(sources.len().div_ceil(READERS));
        std::thread::scope(|scope| {
            let readers: Vec<_> = parts.map(|part| scope.spawn(|| read_all(part))).collect();
            let ended = readers.into_iter().map(|reader| {
                reader.join().unwrap_or_else(|_panic| Err(io::Error::other("a reader panicked")))
            });
            ended.collect::<io::Result<Vec<_>>>()
        })
    };
    let took = Netns::named("guests")?.inside("read metadata", read).await?;
    let mut took: Vec<f64> = took.concat().into_iter().map(milliseconds).collect();
    agent.kill();
    took.sort_by(f64::total_cmp);
    let slowest = took.get(took.len() * 99 / 100).copied().context("nothing was read")?;
    let what = "metadata for 1,000 guests: connection, request and answer, p99";
    Ok(vec![
        Row::told("metadata for 1,000 guests: the same, middle", took[took.len() / 2], "ms"),
        Row::at_most(what, slowest, "ms", 10.0),
    ])
}

/// Reads a page for each of some guests, some times.
fn read_all(guests: &[Ipv4Addr]) -> io::Result<Vec<Duration>> {
    let mut took = Vec::new();
    for _ in 0..READS {
        for guest in guests {
            let begun = Instant::now();
            let mut socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            socket.bind(&SocketAddr::from((*guest, 0)).into())?;
            socket.connect(&SocketAddr::from(([169, 254, 169, 254], 80)).into())?;
            socket.write_all(
                b"GET /openstack/latest/meta_data.json HTTP/1.1\r\nHost: it\r\nConnection: close\r\n\r\n",
            )?;
            let mut page = String::new();
            socket.read_to_string(&mut page)?;
            took.push(begun.elapsed());
            if !page.starts_with("HTTP/1.1 200") {
                return Err(io::Error::other(page));
            }
        }
    }
    Ok(took)
}
