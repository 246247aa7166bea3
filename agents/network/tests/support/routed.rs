//! A host with a router between two internal networks and an external one.
//!
//! ```text
//! web ─ a (10.7.0.0/24) ─┐
//!                        router ─ ext (203.0.113.0/24) ─ outside (.1, also 198.51.100.1)
//! db ── b (10.8.0.0/24) ─┘
//! ```

#![allow(dead_code, reason = "each test file uses its share")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};
use stackhand_kernel::Netns;
use stackhand_model::ObjectRef;
use uuid::Uuid;

use super::support::{Documents, Guest, mac, run};

/// What documents there are, by role.
#[derive(Clone, Debug)]
pub(crate) struct Routed {
    pub(crate) documents: Documents,
    pub(crate) ext: Uuid,
    pub(crate) a: Uuid,
    pub(crate) b: Uuid,
    pub(crate) gateway: Uuid,
    pub(crate) on_a: Uuid,
    pub(crate) on_b: Uuid,
    pub(crate) web: Uuid,
    pub(crate) db: Uuid,
    pub(crate) router: Uuid,
}

pub(crate) fn subnet(name: &str, cidr: &str, gateway: &str) -> Value {
    json!({"name": name, "cidr": cidr, "gateway": gateway, "dhcp": false})
}

pub(crate) fn port(network: Uuid, last: u8, owner: &str, addresses: &[(&str, &str)]) -> Value {
    let fixed: Vec<Value> = addresses
        .iter()
        .map(|(subnet, address)| json!({"subnet": subnet, "address": address}))
        .collect();
    json!({
        "network": network, "host": "one", "mac": mac(last), "owner": owner, "fixed_ips": fixed,
        "port_security": false,
    })
}

impl Routed {
    /// Documents of the whole, for host `one`; nothing is made of them yet.
    pub(crate) fn new() -> Self {
        let id = Uuid::new_v4;
        let mut routed = Self {
            documents: Documents::default(),
            ext: id(),
            a: id(),
            b: id(),
            gateway: id(),
            on_a: id(),
            on_b: id(),
            web: id(),
            db: id(),
            router: id(),
        };
        let Self { ext, a, b, gateway, on_a, on_b, web, db, .. } = routed;
        let documents = &mut routed.documents;
        documents.put(
            "Host",
            "one",
            Uuid::from_u128(1),
            json!({"bridge_mappings": {"public": "eth1"}}),
        );
        let subnets = |subnet: Value| json!({"type": "local", "subnets": [subnet]});
        let public = json!({
            "type": "flat", "physical_network": "public", "external": true,
            "subnets": [subnet("public", "203.0.113.0/24", "203.0.113.1")],
        });
        documents.put("Network", "ext", ext, public);
        documents.put("Network", "a", a, subnets(subnet("a", "10.7.0.0/24", "10.7.0.1")));
        documents.put("Network", "b", b, subnets(subnet("b", "10.8.0.0/24", "10.8.0.1")));
        let of_router = "router-interface";
        documents.put(
            "Port",
            "gw",
            gateway,
            port(ext, 1, "router-gateway", &[("public", "203.0.113.10")]),
        );
        documents.put("Port", "on-a", on_a, port(a, 2, of_router, &[("a", "10.7.0.1")]));
        documents.put("Port", "on-b", on_b, port(b, 3, of_router, &[("b", "10.8.0.1")]));
        documents.put("Port", "web", web, port(a, 10, "external", &[("a", "10.7.0.10")]));
        documents.put("Port", "db", db, port(b, 11, "external", &[("b", "10.8.0.11")]));
        routed.put_router(&json!({}));
        routed
    }

    /// Puts the router's document, with fields replaced.
    pub(crate) fn put_router(&mut self, more: &Value) -> ObjectRef {
        let mut spec = json!({
            "host": "one",
            "interfaces": [self.on_a, self.on_b],
            "gateway": {"port": self.gateway},
        });
        for (key, value) in more.as_object().unwrap() {
            spec[key] = value.clone();
        }
        self.documents.put("Router", "router", self.router, spec)
    }

    /// Puts a floating IP that leads to a port.
    pub(crate) fn float(&mut self, id: Uuid, address: &str, port: Uuid) -> ObjectRef {
        let spec = json!({"address": address, "router": self.router, "port": port});
        self.documents.put("FloatingIp", &format!("f{}", id.simple()), id, spec)
    }

    pub(crate) fn space(&self) -> String {
        format!("qrouter-{}", self.router)
    }

    /// Makes the outside, whose end of the wire to the host is `eth1` there.
    pub(crate) async fn outside(&self) {
        run("ip netns add outside").await;
        run("ip link add eth1 type veth peer name eth0 netns outside").await;
        for line in ["address add 203.0.113.1/24 dev eth0", "address add 198.51.100.1/32 dev lo"] {
            run(&format!("ip -n outside {line}")).await;
        }
        for link in ["eth0", "lo"] {
            run(&format!("ip -n outside link set {link} up")).await;
        }
    }

    /// Starts the two guests, whose way out is the router.
    pub(crate) async fn guests(&self) -> (Guest, Guest) {
        let web = guest("web", self.web, 10, "10.7.0.10/24", "10.7.0.1").await;
        let db = guest("db", self.db, 11, "10.8.0.11/24", "10.8.0.1").await;
        (web, db)
    }
}

/// A guest with an address and a way out.
pub(crate) async fn guest(name: &str, port: Uuid, last: u8, net: &str, gateway: &str) -> Guest {
    let guest = Guest::start(name, port, &mac(last)).await;
    run(&format!("ip -n {name} address add {net} dev eth0 nodad")).await;
    run(&format!("ip -n {name} route add default via {gateway}")).await;
    guest
}

/// A TCP server in a namespace that tells each client who it is, until it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) port: u16,
}

impl Server {
    pub(crate) async fn start(space: &str, port: u16) -> Self {
        let open = move || TcpListener::bind(("0.0.0.0", port));
        let listener = Netns::named(space).unwrap().inside("listen", open).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let Ok(mut client) = client else { return };
                std::thread::spawn(move || {
                    let from = client.peer_addr().unwrap().ip();
                    drop(client.write_all(format!("{from}\n").as_bytes()));
                    // Then an echo.
                    let mut bytes = [0; 4096];
                    while let Ok(count @ 1..) = client.read(&mut bytes) {
                        if client.write_all(&bytes[..count]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { port }
    }
}

/// Connects from a namespace; returns the stream and as whom the server saw it.
pub(crate) async fn connect(
    space: &str,
    to: &str,
    port: u16,
) -> Result<(TcpStream, IpAddr), String> {
    let to = SocketAddr::new(to.parse().unwrap(), port);
    let open = move || {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(3))?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        let mut told = Vec::new();
        let mut byte = [0];
        while stream.read(&mut byte)? == 1 && byte != *b"\n" {
            told.extend(byte);
        }
        Ok((stream, String::from_utf8(told).unwrap().parse().unwrap()))
    };
    let space = Netns::named(space).unwrap();
    space.inside("connect", open).await.map_err(|error| stackhand_kernel::Chain(&error).to_string())
}

/// Whether the stream still carries bytes both ways.
pub(crate) fn is_alive(stream: &mut TcpStream) -> bool {
    let mut bytes = [0; 5];
    stream.write_all(b"hello").is_ok()
        && stream.read_exact(&mut bytes).is_ok()
        && &bytes == b"hello"
}
