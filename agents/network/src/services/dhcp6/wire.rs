//! DHCPv6 on the wire (RFC 8415), and the frames that bring it.
//!
//! As with DHCPv4, requests are read in place and options stay bytes. The tests read our answers
//! with another implementation.

use std::net::Ipv6Addr;

use stackhand_model::MacAddr;

/// Message types.
pub(super) mod kind {
    pub(crate) const SOLICIT: u8 = 1;
    pub(crate) const ADVERTISE: u8 = 2;
    pub(crate) const REQUEST: u8 = 3;
    pub(crate) const CONFIRM: u8 = 4;
    pub(crate) const RENEW: u8 = 5;
    pub(crate) const REBIND: u8 = 6;
    pub(crate) const REPLY: u8 = 7;
    pub(crate) const RELEASE: u8 = 8;
    pub(crate) const DECLINE: u8 = 9;
    pub(crate) const INFORMATION: u8 = 11;
    pub(crate) const RELAY_FORWARD: u8 = 12;
    pub(crate) const RELAY_REPLY: u8 = 13;
}

/// Option numbers that the server looks at or sets by itself.
pub(super) mod code {
    pub(crate) const CLIENT_ID: u16 = 1;
    pub(crate) const SERVER_ID: u16 = 2;
    pub(crate) const IA_NA: u16 = 3;
    pub(crate) const IA_TA: u16 = 4;
    pub(crate) const ADDRESS: u16 = 5;
    pub(crate) const WANTED: u16 = 6;
    pub(crate) const RELAY_MESSAGE: u16 = 9;
    pub(crate) const STATUS: u16 = 13;
    pub(crate) const RAPID_COMMIT: u16 = 14;
    pub(crate) const INTERFACE: u16 = 18;
    pub(crate) const DNS: u16 = 23;
    pub(crate) const SEARCH: u16 = 24;
    pub(crate) const IA_PD: u16 = 25;
    pub(crate) const SNTP: u16 = 31;
    pub(crate) const REFRESH: u16 = 32;
    pub(crate) const FQDN: u16 = 39;
    pub(crate) const NTP: u16 = 56;
    /// What a relay says of its client's link-layer address (RFC 6939).
    pub(crate) const CLIENT_LINK: u16 = 79;
}

/// A list of options that is whole.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options<'a>(&'a [u8]);

impl<'a> Options<'a> {
    pub(super) fn read(bytes: &'a [u8]) -> Option<Self> {
        let options = Self(bytes);
        let whole: usize = options.iter().map(|(_, value)| 4 + value.len()).sum();
        (whole == bytes.len()).then_some(options)
    }

    /// All options, up to the first that is cut.
    pub(super) fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let [a, b, c, d, tail @ ..] = rest else { return None };
            let length = usize::from(u16::from_be_bytes([*c, *d]));
            let (value, tail) = tail.split_at_checked(length)?;
            rest = tail;
            Some((u16::from_be_bytes([*a, *b]), value))
        })
    }

    /// The first option of that number.
    pub(super) fn first(self, code: u16) -> Option<&'a [u8]> {
        self.iter().find_map(|(found, value)| (found == code).then_some(value))
    }
}

/// A client's message, read in place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request<'a> {
    pub(super) kind: u8,
    pub(super) transaction: [u8; 3],
    pub(super) options: Options<'a>,
}

impl<'a> Request<'a> {
    pub(super) fn read(bytes: &'a [u8]) -> Option<Self> {
        let [kind, a, b, c, options @ ..] = bytes else { return None };
        Some(Self { kind: *kind, transaction: [*a, *b, *c], options: Options::read(options)? })
    }

    /// The client's name for itself: 3 to 130 bytes.
    pub(super) fn client_id(&self) -> Option<&'a [u8]> {
        self.options.first(code::CLIENT_ID).filter(|id| (3..=130).contains(&id.len()))
    }

    /// The Ethernet address that is part of the client's name, for relays that do not tell it.
    pub(super) fn mac(&self) -> Option<MacAddr> {
        let hardware = match self.client_id()? {
            // By link layer and time, or by link layer alone; of Ethernet.
            [0, 1, 0, 1, _, _, _, _, mac @ ..] | [0, 3, 0, 1, mac @ ..] => mac,
            _ => return None,
        };
        hardware.try_into().ok().map(MacAddr)
    }

    /// The numbers of the options that the client asks for; nothing if it does not say.
    pub(super) fn wants(&self, code: u16) -> Option<bool> {
        let wanted = self.options.first(code::WANTED)?;
        Some(wanted.chunks_exact(2).any(|pair| pair == code.to_be_bytes()))
    }
}

/// An association that a client asks addresses for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Association<'a> {
    pub(super) id: [u8; 4],
    options: Options<'a>,
}

impl<'a> Association<'a> {
    /// Reads an option of the kind `IA_NA`.
    pub(super) fn read(value: &'a [u8]) -> Option<Self> {
        // Behind the id come the times that the client would like.
        let (head, options) = value.split_at_checked(12)?;
        let id = head[..4].try_into().ok()?;
        Some(Self { id, options: Options::read(options)? })
    }

    /// The addresses that the client names.
    pub(super) fn addresses(self) -> impl Iterator<Item = Ipv6Addr> + use<'a> {
        let named = self.options.iter().filter(|(found, _)| *found == code::ADDRESS);
        named.filter_map(|(_, value)| address(value.get(..16)?))
    }
}

/// What a relay put around a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Relay<'a> {
    /// Hop count, link address and peer address, which go back as they came.
    head: &'a [u8],
    interface: Option<&'a [u8]>,
    pub(super) client: Option<MacAddr>,
    pub(super) message: &'a [u8],
}

impl<'a> Relay<'a> {
    /// Reads what a relay sent, if it is whole.
    pub(super) fn read(bytes: &'a [u8]) -> Option<Self> {
        let (head, options) = bytes.split_at_checked(34)?;
        let options = Options::read(options)?;
        let client = match options.first(code::CLIENT_LINK) {
            Some([0, 1, mac @ ..]) => mac.try_into().ok().map(MacAddr),
            _ => None,
        };
        Some(Self {
            head: &head[1..],
            interface: options.first(code::INTERFACE),
            client,
            message: options.first(code::RELAY_MESSAGE)?,
        })
    }

    /// The answer for the relay to take apart.
    pub(super) fn wrap(&self, message: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind::RELAY_REPLY];
        bytes.extend_from_slice(self.head);
        if let Some(interface) = self.interface {
            put(&mut bytes, code::INTERFACE, interface);
        }
        put(&mut bytes, code::RELAY_MESSAGE, message);
        bytes
    }
}

pub(super) fn address(bytes: &[u8]) -> Option<Ipv6Addr> {
    <[u8; 16]>::try_from(bytes).ok().map(Ipv6Addr::from)
}

/// Appends an option. Values come from documents or from packets, so all are short enough.
pub(super) fn put(bytes: &mut Vec<u8>, code: u16, value: &[u8]) {
    let Ok(length) = u16::try_from(value.len()) else { return };
    bytes.extend(code.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend_from_slice(value);
}

/// A name's labels, each behind its length, without compression (RFC 8415, 10).
pub(super) fn labels(name: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(name.len() + 2);
    for label in name.split('.').filter(|label| (1..=63).contains(&label.len())) {
        bytes.push(u8::try_from(label.len()).unwrap_or(63));
        bytes.extend(label.bytes());
    }
    bytes.push(0);
    bytes
}

/// A datagram to a server: from whom, with the port, and to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Datagram<'a> {
    pub(super) from: (MacAddr, Ipv6Addr, u16),
    pub(super) to: (MacAddr, Ipv6Addr),
    pub(super) message: &'a [u8],
}

/// Takes a frame apart. Its checksum is not looked at: the kernel leaves it to be filled in by
/// hardware where a frame never sees any.
pub(super) fn datagram(frame: &[u8]) -> Option<Datagram<'_>> {
    let (ethernet, rest) = frame.split_at_checked(14)?;
    let (ip, rest) = rest.split_at_checked(40)?;
    let (udp, rest) = rest.split_at_checked(8)?;
    let length = usize::from(u16::from_be_bytes([udp[4], udp[5]])).checked_sub(8)?;
    let expected = ethernet[12..] == [0x86, 0xdd] && ip[0] >> 4 == 6 && ip[6] == 17;
    if !expected || udp[2..4] != 547_u16.to_be_bytes() {
        return None;
    }
    Some(Datagram {
        from: (
            MacAddr(ethernet[6..12].try_into().ok()?),
            address(&ip[8..24])?,
            u16::from_be_bytes([udp[0], udp[1]]),
        ),
        to: (MacAddr(ethernet[..6].try_into().ok()?), address(&ip[24..40])?),
        message: rest.get(..length)?,
    })
}
