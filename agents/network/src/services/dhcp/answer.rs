//! What the server says to a message. Pure: a table and bytes in, bytes out.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use stackhand_model::{MacAddr, PortId};

use super::table::{Client, Scope, Table};
use super::wire::{Reply, Request, code};
use crate::frame::{self, Ends};

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const DECLINE: u8 = 4;
const ACK: u8 = 5;
const NAK: u8 = 6;
const RELEASE: u8 = 7;
const INFORM: u8 = 8;

/// IP and UDP headers.
const HEADERS: usize = 28;

const EVERYBODY: MacAddr = MacAddr([0xff; 6]);

/// A message to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The DHCP message.
    pub message: Vec<u8>,
    /// The address it comes from.
    pub server: Ipv4Addr,
    /// How it gets there.
    pub delivery: Delivery,
    /// The port it is for.
    pub port: PortId,
    /// Whether it refuses what was asked for.
    pub refusal: bool,
}

/// How an answer reaches its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// On the wire, without asking who has the address.
    Frame {
        /// Ethernet address.
        mac: MacAddr,
        /// IP address.
        address: Ipv4Addr,
    },
    /// By the relay that brought the request.
    Relay(Ipv4Addr),
}

/// Why a message gets no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ignored {
    /// It is not a client's DHCP message.
    Malformed,
    /// No port of the network has that Ethernet address, or none with an IPv4 address.
    UnknownClient,
    /// It is for another server.
    OtherServer,
    /// The client gives its address back; it stays its own all the same.
    Released,
    /// The client says that somebody else uses its address.
    Declined,
}

impl Ignored {
    /// All reasons.
    pub const ALL: [Self; 5] =
        [Self::Malformed, Self::UnknownClient, Self::OtherServer, Self::Released, Self::Declined];

    /// The reason's name in facts and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::UnknownClient => "unknown_client",
            Self::OtherServer => "other_server",
            Self::Released => "released",
            Self::Declined => "declined",
        }
    }
}

impl Answer {
    /// The answer as an Ethernet frame, or `None` if it goes by a relay.
    #[must_use]
    pub fn frame(&self, server_mac: MacAddr) -> Option<Vec<u8>> {
        match self.delivery {
            Delivery::Frame { mac, address } => {
                let ends = Ends { from: (server_mac, self.server, 67), to: (mac, address, 68) };
                Some(frame::udp4(ends, &self.message))
            }
            Delivery::Relay(_) => None,
        }
    }
}

/// Answers a message.
///
/// # Errors
///
/// Says why it gets no answer. Any bytes are fine.
pub fn answer(table: &Table, bytes: &[u8]) -> Result<Answer, Ignored> {
    let request = Request::read(bytes).ok_or(Ignored::Malformed)?;
    let kind = request.message_type().ok_or(Ignored::Malformed)?;
    let client = table.clients.get(&request.mac()).ok_or(Ignored::UnknownClient)?;
    let scope = table.scopes.get(client.scope).ok_or(Ignored::UnknownClient)?;
    let exchange = Exchange { table, request, client, scope };
    match kind {
        DISCOVER => Ok(exchange.grant(OFFER)),
        REQUEST => exchange.request(),
        INFORM => exchange.inform(),
        DECLINE => Err(Ignored::Declined),
        RELEASE => Err(Ignored::Released),
        _ => Err(Ignored::Malformed),
    }
}

struct Exchange<'a> {
    table: &'a Table,
    request: Request<'a>,
    client: &'a Client,
    scope: &'a Scope,
}

impl Exchange<'_> {
    /// RFC 2131, 4.3.2: which of its four states the client is in shows in what it fills in.
    fn request(&self) -> Result<Answer, Ignored> {
        let asked = self.request.address_option(code::REQUESTED_ADDRESS);
        let holds = self.request.client_address();
        let wanted = match (self.request.address_option(code::SERVER), asked) {
            // Selecting one of several offers.
            (Some(server), _) if server != self.scope.server => return Err(Ignored::OtherServer),
            (Some(_), Some(asked)) => asked,
            // Rebooted: does it still have this address?
            (None, Some(asked)) if holds.is_unspecified() => asked,
            // Renewing or rebinding.
            (None, _) if !holds.is_unspecified() => holds,
            _ => return Err(Ignored::Malformed),
        };
        if wanted == self.client.address { Ok(self.grant(ACK)) } else { Ok(self.refuse()) }
    }

    fn grant(&self, kind: u8) -> Answer {
        let mut reply = self.reply(kind);
        reply.set_your_address(self.client.address);
        if kind == ACK {
            reply.set_client_address(self.request.client_address());
        }
        let lease = self.table.lease_seconds;
        self.times(&mut reply, lease);
        self.settings(&mut reply);
        let address = match self.request.client_address() {
            held if !held.is_unspecified() => held,
            _ => self.client.address,
        };
        self.send(reply, address, false)
    }

    fn times(&self, reply: &mut Reply, lease: u32) {
        let given = |code| {
            let bytes = self.client.options.get(&code)?;
            <[u8; 4]>::try_from(bytes.as_slice()).ok().map(u32::from_be_bytes)
        };
        let lease = given(code::LEASE_TIME).unwrap_or(lease);
        let renewal = given(code::RENEWAL).unwrap_or(lease / 2);
        let rebinding = given(code::REBINDING).unwrap_or(lease / 8 * 7);
        reply.add(code::LEASE_TIME, &lease.to_be_bytes());
        reply.add(code::RENEWAL, &renewal.to_be_bytes());
        reply.add(code::REBINDING, &rebinding.to_be_bytes());
    }

    /// A client with an address of its own asks for everything else.
    fn inform(&self) -> Result<Answer, Ignored> {
        let address = self.request.client_address();
        if !self.scope.net.contains(&address) {
            return Err(Ignored::Malformed);
        }
        let mut reply = self.reply(ACK);
        reply.set_client_address(address);
        self.settings(&mut reply);
        Ok(self.send(reply, address, false))
    }

    fn refuse(&self) -> Answer {
        let mut reply = self.reply(NAK);
        if !self.request.relay().is_unspecified() {
            reply.set_broadcast();
        }
        self.send(reply, Ipv4Addr::BROADCAST, true)
    }

    fn reply(&self, kind: u8) -> Reply {
        let link = usize::try_from(self.table.mtu).unwrap_or(usize::MAX).max(576);
        let largest = self.request.max_size().min(link) - HEADERS;
        let mut reply = Reply::to(&self.request, kind, largest);
        reply.add(code::SERVER, &self.scope.server.octets());
        if let Some(id) = self.request.option(code::CLIENT_ID) {
            reply.add(code::CLIENT_ID, id);
        }
        reply
    }

    /// Everything but addresses and times: what the client asked for, in its most useful order.
    fn settings(&self, reply: &mut Reply) {
        let mut options = scope_options(self.table, self.scope, self.client);
        for (code, value) in &self.client.options {
            options.insert(*code, value.clone());
        }
        let wanted = self.request.option(code::WANTED);
        let asked = |code: u8| match wanted {
            Some(wanted) => wanted.contains(&code),
            // A client that knows nothing of these would take the routes for noise.
            None => code != code::ROUTES && code != code::ROUTES_MICROSOFT,
        };
        // Without these the guest is not on the network, asked for or not.
        let first = [code::NETMASK, code::ROUTER, code::MTU];
        for code in first {
            if let Some(value) = options.get(&code) {
                reply.add(code, value);
            }
        }
        let times = [code::LEASE_TIME, code::RENEWAL, code::REBINDING];
        for (code, value) in &options {
            if asked(*code) && !first.contains(code) && !times.contains(code) {
                reply.add(*code, value);
            }
        }
        if let Some(server) = self.client.next_server {
            reply.set_next_server(server);
        }
        if let Some(file) = options.get(&code::BOOT_FILE) {
            reply.set_boot_file(file);
        }
    }

    fn send(&self, mut reply: Reply, address: Ipv4Addr, refusal: bool) -> Answer {
        // What the relay added comes back to it, last.
        if let Some(information) = self.request.option(code::RELAY) {
            reply.add(code::RELAY, information);
        }
        let relay = self.request.relay();
        let has_address = !self.request.client_address().is_unspecified();
        let delivery = if !relay.is_unspecified() {
            Delivery::Relay(relay)
        } else if refusal || (self.request.wants_broadcast() && !has_address) {
            Delivery::Frame { mac: EVERYBODY, address: Ipv4Addr::BROADCAST }
        } else {
            Delivery::Frame { mac: self.request.mac(), address }
        };
        Answer {
            message: reply.finish(),
            server: self.scope.server,
            delivery,
            port: self.client.port,
            refusal,
        }
    }
}

fn scope_options(table: &Table, scope: &Scope, client: &Client) -> BTreeMap<u8, Vec<u8>> {
    let mut options = BTreeMap::new();
    options.insert(code::NETMASK, scope.net.netmask().octets().to_vec());
    options.insert(code::BROADCAST, scope.net.broadcast().octets().to_vec());
    options.insert(code::HOST_NAME, client.host_name.clone().into_bytes());
    if let Some(router) = scope.router {
        options.insert(code::ROUTER, router.octets().to_vec());
    }
    if !scope.dns.is_empty() {
        options.insert(code::DNS, scope.dns.iter().flat_map(Ipv4Addr::octets).collect());
    }
    if let Some(domain) = &table.domain {
        options.insert(code::DOMAIN, domain.clone().into_bytes());
    }
    if !table.search.is_empty() {
        options.insert(code::SEARCH, table.search.iter().flat_map(|name| labels(name)).collect());
    }
    if !table.ntp.is_empty() {
        options.insert(code::NTP, table.ntp.iter().flat_map(Ipv4Addr::octets).collect());
    }
    if let Ok(mtu) = u16::try_from(table.mtu) {
        options.insert(code::MTU, mtu.to_be_bytes().to_vec());
    }
    if !scope.routes.is_empty() {
        let bytes = classless(scope);
        options.insert(code::ROUTES, bytes.clone());
        options.insert(code::ROUTES_MICROSOFT, bytes);
    }
    options
}

/// RFC 3397: a name's labels, each behind its length, without compression.
fn labels(name: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(name.len() + 2);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).unwrap_or(63));
        bytes.extend(label.bytes().take(63));
    }
    bytes.push(0);
    bytes
}

/// RFC 3442: prefix length, the prefix's bytes, next hop.
fn classless(scope: &Scope) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (net, by) in &scope.routes {
        bytes.push(net.prefix_len());
        let significant = usize::from(net.prefix_len().div_ceil(8));
        bytes.extend_from_slice(&net.network().octets()[..significant]);
        bytes.extend(by.octets());
    }
    bytes
}
