//! DHCPv4 on the wire (RFC 2131, 2132, 3396).
//!
//! Requests are read in place, options stay bytes: what is echoed is echoed unchanged, and nothing
//! is allocated for a packet that turns out to be noise. The tests read our answers with another
//! implementation.

use std::net::Ipv4Addr;

use stackhand_model::MacAddr;

/// Bytes before the options, with the magic cookie.
const HEADER: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Old relays and clients drop shorter messages.
const SHORTEST: usize = 300;
const REQUEST: u8 = 1;
const REPLY: u8 = 2;
const ETHERNET: u8 = 1;
const END: u8 = 255;

/// Option numbers that the server looks at or sets by itself.
pub(super) mod code {
    pub(crate) const NETMASK: u8 = 1;
    pub(crate) const ROUTER: u8 = 3;
    pub(crate) const DNS: u8 = 6;
    pub(crate) const HOST_NAME: u8 = 12;
    pub(crate) const DOMAIN: u8 = 15;
    pub(crate) const MTU: u8 = 26;
    pub(crate) const BROADCAST: u8 = 28;
    pub(crate) const NTP: u8 = 42;
    pub(crate) const REQUESTED_ADDRESS: u8 = 50;
    pub(crate) const LEASE_TIME: u8 = 51;
    pub(crate) const MESSAGE_TYPE: u8 = 53;
    pub(crate) const SERVER: u8 = 54;
    pub(crate) const WANTED: u8 = 55;
    pub(crate) const MAX_SIZE: u8 = 57;
    pub(crate) const RENEWAL: u8 = 58;
    pub(crate) const REBINDING: u8 = 59;
    pub(crate) const CLIENT_ID: u8 = 61;
    pub(crate) const BOOT_FILE: u8 = 67;
    pub(crate) const RELAY: u8 = 82;
    pub(crate) const SEARCH: u8 = 119;
    pub(crate) const ROUTES: u8 = 121;
    /// What Windows asked for before 121 had a number.
    pub(crate) const ROUTES_MICROSOFT: u8 = 249;
}

/// A client's message, read in place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    bytes: &'a [u8],
}

impl<'a> Request<'a> {
    /// Takes `bytes` for a client's message if they can be one.
    pub(super) fn read(bytes: &'a [u8]) -> Option<Self> {
        let good = bytes.len() > HEADER
            && bytes[0] == REQUEST
            && bytes[1] == ETHERNET
            && bytes[2] == 6
            && bytes[HEADER - 4..HEADER] == COOKIE;
        let request = Self { bytes };
        (good && request.is_well_formed()).then_some(request)
    }

    /// Whether the options end properly, or with the message.
    fn is_well_formed(&self) -> bool {
        let mut rest = &self.bytes[HEADER..];
        loop {
            match rest {
                [] | [END, ..] => return true,
                [0, tail @ ..] => rest = tail,
                [_, length, tail @ ..] if tail.len() >= usize::from(*length) => {
                    rest = &tail[usize::from(*length)..];
                }
                _ => return false,
            }
        }
    }

    /// The first option of that number.
    pub(super) fn option(&self, code: u8) -> Option<&'a [u8]> {
        let mut rest = &self.bytes[HEADER..];
        loop {
            match rest {
                [] | [END, ..] => return None,
                [0, tail @ ..] => rest = tail,
                [found, length, tail @ ..] => {
                    let (value, tail) = tail.split_at_checked(usize::from(*length))?;
                    if *found == code {
                        return Some(value);
                    }
                    rest = tail;
                }
                _ => return None,
            }
        }
    }

    pub(super) fn address_option(&self, code: u8) -> Option<Ipv4Addr> {
        <[u8; 4]>::try_from(self.option(code)?).ok().map(Ipv4Addr::from)
    }

    pub(super) fn message_type(&self) -> Option<u8> {
        match self.option(code::MESSAGE_TYPE) {
            Some([kind]) => Some(*kind),
            _ => None,
        }
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut field = [0; N];
        field.copy_from_slice(&self.bytes[at..at + N]);
        field
    }

    pub(super) fn mac(&self) -> MacAddr {
        MacAddr(self.field(28))
    }

    pub(super) fn client_address(&self) -> Ipv4Addr {
        self.field::<4>(12).into()
    }

    pub(super) fn relay(&self) -> Ipv4Addr {
        self.field::<4>(24).into()
    }

    /// Whether the client cannot take a frame to an address that it does not have yet.
    pub(super) fn wants_broadcast(&self) -> bool {
        self.bytes[10] & 0x80 != 0
    }

    /// The largest message that the client takes, IP and UDP headers included.
    pub(super) fn max_size(&self) -> usize {
        match self.option(code::MAX_SIZE) {
            Some([high, low]) => usize::from(u16::from_be_bytes([*high, *low])).max(576),
            _ => 576,
        }
    }
}

/// A message to a client.
#[derive(Clone, Debug)]
pub(super) struct Reply {
    bytes: Vec<u8>,
    largest: usize,
}

impl Reply {
    /// An answer to `request` with the type given, of at most `largest` bytes.
    pub(super) fn to(request: &Request<'_>, kind: u8, largest: usize) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[0] = REPLY;
        bytes[1] = ETHERNET;
        bytes[2] = 6;
        bytes[4..8].copy_from_slice(&request.bytes[4..8]);
        bytes[10..12].copy_from_slice(&request.bytes[10..12]);
        bytes[24..28].copy_from_slice(&request.bytes[24..28]);
        bytes[28..44].copy_from_slice(&request.bytes[28..44]);
        bytes[HEADER - 4..].copy_from_slice(&COOKIE);
        let mut reply = Self { bytes, largest: largest.max(SHORTEST) };
        reply.add(code::MESSAGE_TYPE, &[kind]);
        reply
    }

    /// Says how the relay is to deliver it: to everybody.
    pub(super) fn set_broadcast(&mut self) {
        self.bytes[10] |= 0x80;
    }

    pub(super) fn set_client_address(&mut self, address: Ipv4Addr) {
        self.bytes[12..16].copy_from_slice(&address.octets());
    }

    pub(super) fn set_your_address(&mut self, address: Ipv4Addr) {
        self.bytes[16..20].copy_from_slice(&address.octets());
    }

    pub(super) fn set_next_server(&mut self, address: Ipv4Addr) {
        self.bytes[20..24].copy_from_slice(&address.octets());
    }

    /// Names the file to boot from in the header, for firmware that does not read options.
    pub(super) fn set_boot_file(&mut self, name: &[u8]) {
        if name.len() < 128 {
            self.bytes[108..108 + name.len()].copy_from_slice(name);
        }
    }

    /// Adds an option if there is room: one longer than 255 bytes in parts (RFC 3396).
    pub(super) fn add(&mut self, code: u8, value: &[u8]) {
        let parts = value.len().div_ceil(255).max(1);
        if self.bytes.len() + value.len() + 2 * parts + 1 > self.largest {
            return;
        }
        for part in value.chunks(255) {
            self.bytes.extend([code, u8::try_from(part.len()).unwrap_or(u8::MAX)]);
            self.bytes.extend_from_slice(part);
        }
        if value.is_empty() {
            self.bytes.extend([code, 0]);
        }
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.bytes.push(END);
        if self.bytes.len() < SHORTEST {
            self.bytes.resize(SHORTEST, 0);
        }
        self.bytes
    }
}
