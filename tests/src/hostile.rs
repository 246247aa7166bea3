//! Every parser of bytes from outside, as a function that takes any bytes and must come back.
//!
//! The test `hostile_bytes` tries the inputs of `tests/fuzz/corpus`, whole, cut and damaged; the fuzzers go
//! on from there.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{StatusCode, Uri};
use axum::response::IntoResponse;
use ipnet::Ipv4Net;
use stackhand_bus::wire;
use stackhand_image::inspect::{HEADER_BYTES, Sample, TAIL_BYTES, inspect};
use stackhand_metadata::Guest;
use stackhand_model::{GuestData, ImageFormat, InstanceId, MacAddr, PortId};
use stackhand_network::services::{dhcp, dhcp6, dns, ra};
use stackhand_runtime::http::{Bounds, serve_connection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;

/// One of them.
pub type Parser = fn(&[u8]);

/// All of them, by the names of their corpora.
pub const PARSERS: [(&str, Parser); 8] = [
    ("dhcp4", dhcp4),
    ("dhcp6", dhcp6),
    ("dns", dns),
    ("envelope", envelope),
    ("http", http),
    ("image", image),
    ("extra_options", extra_options),
    ("solicitation", solicitation),
];

/// The guest that the servers know.
const MAC: MacAddr = MacAddr([0xfa, 0x16, 0x3e, 0, 0, 1]);
const PORT: PortId = PortId(Uuid::from_u128(1));

/// A DHCPv4 message of a guest.
///
/// # Panics
///
/// If the answer is not one.
pub fn dhcp4(bytes: &[u8]) {
    let server = Ipv4Addr::new(10, 0, 0, 2);
    let scope = dhcp::Scope {
        net: Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 24),
        server,
        router: Some(Ipv4Addr::new(10, 0, 0, 1)),
        dns: vec![server],
        routes: dhcp::routes([], Some(Ipv4Addr::new(10, 0, 0, 1)), Some(server)),
    };
    let client = dhcp::Client {
        port: PORT,
        address: Ipv4Addr::new(10, 0, 0, 10),
        scope: 0,
        host_name: "web".into(),
        options: BTreeMap::from([(67, b"boot.efi".to_vec())]),
        next_server: Some(server),
    };
    let table = dhcp::Table {
        mtu: 1450,
        domain: Some("example.org".into()),
        search: vec!["example.org".into()],
        ntp: vec![server],
        lease_seconds: 3600,
        scopes: vec![scope],
        clients: [(MAC, client)].into(),
    };
    if let Ok(answer) = dhcp::answer(&table, bytes) {
        assert!((300..=1422).contains(&answer.message.len()), "an answer fits a packet");
        let frame = answer.frame(MAC);
        assert!(frame.is_none_or(|frame| frame.len() == answer.message.len() + 42));
    }
}

/// A DHCPv6 message of a guest, or of a relay.
///
/// # Panics
///
/// If the answer is not one.
pub fn dhcp6(bytes: &[u8]) {
    let client = dhcp6::Client {
        port: PORT,
        addresses: vec![Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x10)],
        host_name: "web".into(),
        options: BTreeMap::from([(59, b"tftp://boot".to_vec())]),
    };
    let table = dhcp6::Table {
        server: dhcp6::Table::name_of(PORT),
        mtu: 1450,
        dns: vec![Ipv6Addr::LOCALHOST],
        search: vec!["example.org".into()],
        ntp: vec![Ipv6Addr::LOCALHOST],
        lease_seconds: 3600,
        clients: [(MAC, client)].into(),
    };
    if let Ok(answer) = dhcp6::answer(&table, MAC, bytes) {
        let most = 1402.max(bytes.len() * 2 + 300);
        assert!((4..=most).contains(&answer.message.len()), "an answer fits a packet");
    }
}

/// A DNS query of a guest.
///
/// # Panics
///
/// If the answer is not one.
pub fn dns(bytes: &[u8]) {
    let mut zone = dns::Zone {
        domain: "example.org".into(),
        nets: [Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 0, 0), 24).into()].into(),
        forwarders: vec![IpAddr::V4(Ipv4Addr::new(192, 0, 2, 53))],
        ..dns::Zone::default()
    };
    zone.add("web", Ipv4Addr::new(10, 0, 0, 10).into());
    for by in [dns::Transport::Udp, dns::Transport::Tcp] {
        if let dns::Decision::Answer(answer) = dns::decide(&zone, bytes, by) {
            assert_eq!(answer.get(..2), bytes.get(..2), "an answer has its query's number");
            assert!(answer.len() >= 12);
        }
    }
}

/// A message on the bus: request, reply, notification, failure or record.
pub fn envelope(bytes: &[u8]) {
    drop(wire::decode_request(bytes));
    drop(wire::decode_reply(bytes));
    drop(wire::open_record(bytes));
    if let Ok(text) = std::str::from_utf8(bytes) {
        drop(wire::decode_failure(text));
    }
}

/// What a guest sends to the metadata service, connection and all.
///
/// # Panics
///
/// If there is no runtime to be had.
pub fn http(bytes: &[u8]) {
    const BOUNDS: Bounds = Bounds {
        head_bytes: 16 * 1024,
        headers: 64,
        head_limit: Duration::from_secs(1),
        connection_limit: Duration::from_secs(5),
    };
    let handler = |uri: Uri, body: Body| async move {
        // As much as of a password.
        if axum::body::to_bytes(body, 1020).await.is_err() {
            return Ok(StatusCode::BAD_REQUEST.into_response());
        }
        let guest = Guest {
            id: InstanceId(PORT.0),
            name: "web",
            data: &GuestData::default(),
            ports: &[],
            domain: Some("example.org"),
            seed: &[],
            password: None,
        };
        let page = stackhand_metadata::page(&guest, uri.path());
        let response = page.map_or_else(
            || StatusCode::NOT_FOUND.into_response(),
            |page| page.body.into_response(),
        );
        Ok::<_, Infallible>(response)
    };
    let router = Router::new().fallback(handler);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime can be built").block_on(async {
        let (mut guest, server) = tokio::io::duplex(64 << 10);
        let talk = async move {
            // A server that has heard enough closes its end.
            drop(guest.write_all(bytes).await);
            drop(guest.shutdown().await);
            drop(guest.read_to_end(&mut Vec::new()).await);
        };
        tokio::join!(serve_connection(server, router, BOUNDS), talk);
    });
}

/// The beginning and the end of an image from a stranger.
pub fn image(bytes: &[u8]) {
    use ImageFormat::{Ami, Iso, Kernel, Qcow2, Ramdisk, Raw, Vdi, Vhd, Vhdx, Vmdk};
    let sample = Sample {
        header: bytes[..bytes.len().min(HEADER_BYTES)].to_vec(),
        tail: bytes[bytes.len().saturating_sub(TAIL_BYTES)..].to_vec(),
        bytes: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
    };
    for format in [Raw, Qcow2, Vmdk, Vhd, Vhdx, Vdi, Iso, Ami, Kernel, Ramdisk] {
        drop(inspect(format, &sample, 1 << 40));
    }
}

/// Extra DHCP options as a tenant writes them: a name and a value on each line.
pub fn extra_options(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
        for ip_version in [Some(4), Some(6)] {
            let (name, value) = (name.to_owned(), value.to_owned());
            let option = [stackhand_model::DhcpOption { name, value, ip_version }];
            drop(dhcp::extra(&option));
            drop(dhcp6::extra(&option));
        }
    }
}

/// A router solicitation of a guest.
///
/// # Panics
///
/// If one that is cut is taken for one.
pub fn solicitation(bytes: &[u8]) {
    for source in [Ipv6Addr::UNSPECIFIED, Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9)] {
        assert!(!ra::is_solicitation(bytes, source, 255) || bytes.len() >= 8);
    }
}
