//! What the server says to a message. Pure: a table and bytes in, bytes out.

use std::net::Ipv6Addr;

use stackhand_model::{MacAddr, PortId};

use super::table::{Client, Table, time_servers};
use super::wire::{Association, Relay, Request, code, kind, labels, put};

/// Relays that a message may come by (RFC 8415, 7.6).
const MOST_RELAYS: usize = 8;
/// Associations of one message that are looked at.
const MOST_ASSOCIATIONS: usize = 8;
/// IPv6 and UDP headers.
const HEADERS: usize = 48;
/// The largest packet that every link takes.
const EVERY_LINK: usize = 1280;
/// The shortest time after which a client may be told to ask for settings again.
const SOONEST_REFRESH: u32 = 600;

mod status {
    pub(super) const SUCCESS: u16 = 0;
    pub(super) const NO_ADDRESS: u16 = 2;
    pub(super) const NO_BINDING: u16 = 3;
    pub(super) const NOT_ON_LINK: u16 = 4;
    pub(super) const NO_PREFIX: u16 = 6;
}

/// A message to be sent to where the request came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The DHCPv6 message.
    pub message: Vec<u8>,
    /// Whether it is for a relay.
    pub by_relay: bool,
    /// The port it is for.
    pub port: PortId,
    /// Whether the client says that somebody else uses an address of its.
    pub declined: bool,
}

/// Why a message gets no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ignored {
    /// It is not a client's DHCPv6 message.
    Malformed,
    /// No port of the network has that Ethernet address, or none that DHCPv6 serves.
    UnknownClient,
    /// It is for another server.
    OtherServer,
}

impl Ignored {
    /// All reasons.
    pub const ALL: [Self; 3] = [Self::Malformed, Self::UnknownClient, Self::OtherServer];

    /// The reason's name in facts.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::UnknownClient => "unknown_client",
            Self::OtherServer => "other_server",
        }
    }
}

/// Answers a message that came in a frame of `sender`.
///
/// # Errors
///
/// Says why it gets no answer. Any bytes are fine.
pub fn answer(table: &Table, sender: MacAddr, bytes: &[u8]) -> Result<Answer, Ignored> {
    let mut relays = Vec::new();
    let mut inner = bytes;
    while inner.first() == Some(&kind::RELAY_FORWARD) {
        let relay = Relay::read(inner).filter(|_| relays.len() < MOST_RELAYS);
        let relay = relay.ok_or(Ignored::Malformed)?;
        inner = relay.message;
        relays.push(relay);
    }
    let request = Request::read(inner).ok_or(Ignored::Malformed)?;
    let mac = match relays.last() {
        None => Some(sender),
        Some(relay) => relay.client.or_else(|| request.mac()),
    };
    let client = mac.and_then(|mac| table.clients.get(&mac)).ok_or(Ignored::UnknownClient)?;
    let exchange = Exchange { table, request, client };
    exchange.check()?;
    let message = exchange.reply()?;
    Ok(Answer {
        message: relays.iter().rev().fold(message, |message, relay| relay.wrap(&message)),
        by_relay: !relays.is_empty(),
        port: client.port,
        declined: request.kind == kind::DECLINE,
    })
}

struct Exchange<'a> {
    table: &'a Table,
    request: Request<'a>,
    client: &'a Client,
}

impl<'a> Exchange<'a> {
    /// RFC 8415, 16: what each kind of message has to have.
    fn check(&self) -> Result<(), Ignored> {
        let options = self.request.options;
        let server = options.first(code::SERVER_ID);
        let is_named = self.request.client_id().is_some();
        let good = match self.request.kind {
            kind::SOLICIT | kind::CONFIRM | kind::REBIND => is_named && server.is_none(),
            kind::REQUEST | kind::RENEW | kind::RELEASE | kind::DECLINE => {
                is_named && server.is_some()
            }
            kind::INFORMATION => [code::IA_NA, code::IA_TA, code::IA_PD]
                .iter()
                .all(|ia| options.first(*ia).is_none()),
            _ => false,
        };
        if !good {
            return Err(Ignored::Malformed);
        }
        match server {
            Some(server) if server != self.table.server => Err(Ignored::OtherServer),
            _ => Ok(()),
        }
    }

    fn reply(&self) -> Result<Vec<u8>, Ignored> {
        let options = self.request.options;
        let rapid = options.first(code::RAPID_COMMIT).is_some();
        let is_offer = self.request.kind == kind::SOLICIT && !rapid;
        let mut reply = vec![if is_offer { kind::ADVERTISE } else { kind::REPLY }];
        reply.extend(self.request.transaction);
        put(&mut reply, code::SERVER_ID, &self.table.server);
        if let Some(id) = self.request.client_id() {
            put(&mut reply, code::CLIENT_ID, id);
        }
        match self.request.kind {
            kind::SOLICIT | kind::REQUEST => {
                if self.request.kind == kind::SOLICIT && rapid {
                    put(&mut reply, code::RAPID_COMMIT, &[]);
                }
                self.grant(&mut reply);
            }
            kind::RENEW | kind::REBIND => self.extend(&mut reply),
            kind::CONFIRM => {
                let mut named = self.associations().flat_map(Association::addresses).peekable();
                if named.peek().is_none() {
                    return Err(Ignored::Malformed);
                }
                let all_own = named.all(|address| self.client.addresses.contains(&address));
                let told = if all_own { status::SUCCESS } else { status::NOT_ON_LINK };
                put(&mut reply, code::STATUS, &told.to_be_bytes());
                return Ok(reply);
            }
            // It stays the port's own all the same.
            kind::RELEASE | kind::DECLINE => {
                put(&mut reply, code::STATUS, &status::SUCCESS.to_be_bytes());
                return Ok(reply);
            }
            _ => {}
        }
        self.settings(&mut reply);
        Ok(reply)
    }

    fn associations(&self) -> impl Iterator<Item = Association<'a>> + use<'a> {
        let all = self.request.options.iter().filter(|(found, _)| *found == code::IA_NA);
        all.filter_map(|(_, value)| Association::read(value)).take(MOST_ASSOCIATIONS)
    }

    /// The first association is given all of the port's addresses; there are none for others.
    fn grant(&self, reply: &mut Vec<u8>) {
        for (index, association) in self.associations().enumerate() {
            if index == 0 && !self.client.addresses.is_empty() {
                self.lease(reply, association, &[]);
            } else {
                deny(reply, code::IA_NA, &association.id, status::NO_ADDRESS);
            }
        }
        for (kind, told) in [(code::IA_TA, status::NO_ADDRESS), (code::IA_PD, status::NO_PREFIX)] {
            let asked = self.request.options.iter().filter(|(found, _)| *found == kind);
            for id in asked.filter_map(|(_, value)| value.get(..4)).take(MOST_ASSOCIATIONS) {
                deny(reply, kind, id, told);
            }
        }
    }

    /// What a client still has is its for longer; what is not its any more ends now.
    fn extend(&self, reply: &mut Vec<u8>) {
        for (index, association) in self.associations().enumerate() {
            if index == 0 && !self.client.addresses.is_empty() {
                let named = association.addresses();
                let over: Vec<Ipv6Addr> =
                    named.filter(|address| !self.client.addresses.contains(address)).collect();
                self.lease(reply, association, &over);
            } else {
                deny(reply, code::IA_NA, &association.id, status::NO_BINDING);
            }
        }
    }

    fn lease(&self, reply: &mut Vec<u8>, association: Association<'_>, over: &[Ipv6Addr]) {
        let lease = self.table.lease_seconds;
        let mut value = association.id.to_vec();
        value.extend((lease / 2).to_be_bytes());
        value.extend((lease / 8 * 7).to_be_bytes());
        let has = self.client.addresses.iter().map(|address| (address, lease));
        for (address, seconds) in has.chain(over.iter().map(|address| (address, 0))) {
            let times = [seconds.to_be_bytes(); 2].concat();
            put(&mut value, code::ADDRESS, &[&address.octets()[..], &times].concat());
        }
        put(reply, code::IA_NA, &value);
    }

    /// Everything but addresses, as far as there is room: what the client asks for, or all.
    fn settings(&self, reply: &mut Vec<u8>) {
        let link = usize::try_from(self.table.mtu).unwrap_or(EVERY_LINK).max(EVERY_LINK);
        let octets = |list: &[Ipv6Addr]| list.iter().flat_map(Ipv6Addr::octets).collect();
        let table = self.table;
        let search: Vec<u8> = table.search.iter().flat_map(|name| labels(name)).collect();
        let mut options = std::collections::BTreeMap::from([
            (code::DNS, octets(&table.dns)),
            (code::SEARCH, search),
            (code::SNTP, octets(&table.ntp)),
            (code::NTP, time_servers(&table.ntp)),
        ]);
        let named = self.request.options.first(code::FQDN).is_some();
        if named || self.request.wants(code::FQDN) == Some(true) {
            options.insert(code::FQDN, self.name());
        }
        if self.request.kind == kind::INFORMATION {
            let refresh = table.lease_seconds.max(SOONEST_REFRESH);
            options.insert(code::REFRESH, refresh.to_be_bytes().to_vec());
        }
        options.extend(self.client.options.iter().map(|(code, value)| (*code, value.clone())));
        for (number, value) in options {
            let asked =
                self.request.wants(number).unwrap_or(true) || (number == code::FQDN && named);
            let fits = reply.len() + 4 + value.len() + HEADERS <= link;
            if asked && fits && !value.is_empty() {
                put(reply, number, &value);
            }
        }
    }

    /// The guest's full name; the server sees to its being found (RFC 4704).
    fn name(&self) -> Vec<u8> {
        const SERVER_UPDATES: u8 = 1;
        const OVERRIDDEN: u8 = 2;
        let asked = self.request.options.first(code::FQDN).and_then(|value| value.first());
        let flags = match asked {
            Some(flags) if flags & SERVER_UPDATES == 0 => SERVER_UPDATES | OVERRIDDEN,
            _ => SERVER_UPDATES,
        };
        let name = match self.table.search.first() {
            Some(domain) => format!("{}.{domain}", self.client.host_name),
            None => self.client.host_name.clone(),
        };
        [&[flags][..], &labels(&name)].concat()
    }
}

/// Says why an association gets nothing.
fn deny(reply: &mut Vec<u8>, kind: u16, id: &[u8], told: u16) {
    let mut value = id.to_vec();
    if kind != code::IA_TA {
        // The times of an association without addresses.
        value.extend([0; 8]);
    }
    put(&mut value, code::STATUS, &told.to_be_bytes());
    put(reply, kind, &value);
}
