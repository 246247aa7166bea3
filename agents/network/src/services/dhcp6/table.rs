//! What a DHCPv6 server tells to whom: one table per network, computed from its documents.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use stackhand_model::{DhcpOption, MacAddr, PortId};

use super::wire::labels;

/// Everything that the server of one network knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// The server's name for itself, which clients hand back.
    pub server: Vec<u8>,
    /// Largest IP packet in bytes.
    pub mtu: u32,
    /// DNS servers.
    pub dns: Vec<Ipv6Addr>,
    /// Domains that short names are looked up in; the first is the network's own.
    pub search: Vec<String>,
    /// Time servers.
    pub ntp: Vec<Ipv6Addr>,
    /// Seconds that a lease lasts.
    pub lease_seconds: u32,
    /// Who gets an answer. Nobody else does.
    pub clients: BTreeMap<MacAddr, Client>,
}

/// A port that is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// The port.
    pub port: PortId,
    /// The addresses that it is given; none where guests make them themselves.
    pub addresses: Vec<Ipv6Addr>,
    /// Its host name.
    pub host_name: String,
    /// Further options by number, as they go on the wire. They replace the network's.
    pub options: BTreeMap<u16, Vec<u8>>,
}

impl Table {
    /// The name of a server (RFC 6355): that of its port, so that it stays the same.
    #[must_use]
    pub fn name_of(port: PortId) -> Vec<u8> {
        [&[0, 4][..], port.0.as_bytes()].concat()
    }
}

/// Options that make the protocol work, or that only relays set.
const RESERVED: [u16; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 18, 25, 26];

/// How an option's value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Text,
    /// Each behind its length.
    Texts,
    Addresses,
    Domains,
    U32,
    /// Addresses of time servers, each in an option of its own inside.
    TimeServers,
    /// Addresses, bytes in hex with colons, else text.
    Guess,
}

/// Options by their names, which are dnsmasq's.
const NAMES: [(&str, u16, Form); 13] = [
    ("sip-server-domain", 21, Form::Domains),
    ("sip-server", 22, Form::Addresses),
    ("dns-server", 23, Form::Addresses),
    ("domain-search", 24, Form::Domains),
    ("nis-server", 27, Form::Addresses),
    ("nis+-server", 28, Form::Addresses),
    ("nis-domain", 29, Form::Domains),
    ("nis+-domain", 30, Form::Domains),
    ("sntp-server", 31, Form::Addresses),
    ("information-refresh-time", 32, Form::U32),
    ("ntp-server", 56, Form::TimeServers),
    ("bootfile-url", 59, Form::Text),
    ("bootfile-param", 60, Form::Texts),
];

/// Reads those of a port's extra options that are for DHCPv6.
///
/// # Errors
///
/// Names the option that is not known or whose value makes no sense.
pub fn extra(given: &[DhcpOption]) -> Result<BTreeMap<u16, Vec<u8>>, String> {
    let mut options = BTreeMap::new();
    for option in given.iter().filter(|option| option.ip_version == Some(6)) {
        let name = option.name.rsplit(',').next().unwrap_or_default().trim();
        let name = name.strip_prefix("option6:").unwrap_or(name);
        let value = option.value.lines().next().unwrap_or_default().trim();
        let code = match NAMES.iter().find(|(known, ..)| *known == name) {
            Some((_, code, _)) => *code,
            None => name.parse().map_err(|_| {
                format!("extra DHCPv6 option {name:?} is neither a known name nor a number")
            })?,
        };
        if code == 0 || RESERVED.contains(&code) {
            return Err(format!("extra DHCPv6 option {name} is the server's own to set"));
        }
        let known = NAMES.iter().find(|(_, known, _)| *known == code);
        let form = known.map_or(Form::Guess, |(.., form)| *form);
        let bytes = form.encode(value).ok_or_else(|| {
            let expected = form.expected();
            format!("extra DHCPv6 option {name}: {value:?} is not {expected}")
        })?;
        options.insert(code, bytes);
    }
    Ok(options)
}

impl Form {
    fn expected(self) -> &'static str {
        match self {
            Self::Text | Self::Texts | Self::Guess => "1 to 512 bytes of text",
            Self::Addresses | Self::TimeServers => "a list of IPv6 addresses",
            Self::Domains => "a list of domain names",
            Self::U32 => "a number from 0 to 4294967295",
        }
    }

    fn encode(self, value: &str) -> Option<Vec<u8>> {
        let parts = || value.split([',', ' ']).filter(|part| !part.is_empty());
        // As in a URL: `[2001:db8::1]`.
        let address = |part: &str| -> Option<Ipv6Addr> {
            part.trim_start_matches('[').trim_end_matches(']').parse().ok()
        };
        let bytes: Vec<u8> = match self {
            Self::Text => value.as_bytes().to_vec(),
            Self::Texts => parts()
                .flat_map(|part| {
                    let length = u16::try_from(part.len()).unwrap_or(u16::MAX).to_be_bytes();
                    [&length[..], part.as_bytes()].concat()
                })
                .collect(),
            Self::Addresses => {
                let addresses: Option<Vec<Ipv6Addr>> = parts().map(address).collect();
                addresses?.iter().flat_map(Ipv6Addr::octets).collect()
            }
            Self::TimeServers => {
                let addresses: Option<Vec<Ipv6Addr>> = parts().map(address).collect();
                time_servers(&addresses?)
            }
            Self::Domains => parts().flat_map(labels).collect(),
            Self::U32 => value.parse::<u32>().ok()?.to_be_bytes().to_vec(),
            Self::Guess => {
                let hex = || {
                    let part =
                        |part: &str| u8::from_str_radix(part, 16).ok().filter(|_| part.len() <= 2);
                    let bytes: Option<Vec<u8>> = value.split(':').map(part).collect();
                    bytes.filter(|bytes| bytes.len() > 1)
                };
                Self::Addresses
                    .encode(value)
                    .or_else(hex)
                    .unwrap_or_else(|| value.as_bytes().to_vec())
            }
        };
        (1..=512).contains(&bytes.len()).then_some(bytes)
    }
}

/// Time servers as option 56 has them (RFC 5908).
pub(super) fn time_servers(addresses: &[Ipv6Addr]) -> Vec<u8> {
    addresses.iter().flat_map(|address| [&[0, 1, 0, 16][..], &address.octets()].concat()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(name: &str, value: &str) -> DhcpOption {
        DhcpOption { name: name.into(), value: value.into(), ip_version: Some(6) }
    }

    #[test]
    fn extra_options_are_read_by_name_and_number() {
        let mut given = [
            option("bootfile-url", "tftp://[2001:db8::1]/boot.efi"),
            option("23", "2001:db8::1,[2001:db8::2]"),
            option("option6:bootfile-param", "a bc"),
            option("ntp-server", "2001:db8::3"),
            option("200", "1:2:ff"),
            option("mtu", "for IPv4"),
        ];
        given[5].ip_version = None;
        let options = extra(&given).unwrap();
        assert_eq!(options.len(), 5);
        assert_eq!(options[&59], b"tftp://[2001:db8::1]/boot.efi");
        assert_eq!(options[&23].len(), 32);
        assert_eq!(options[&60], [0, 1, b'a', 0, 2, b'b', b'c']);
        assert_eq!(options[&56][..4], [0, 1, 0, 16]);
        assert_eq!(options[&200], [1, 2, 255]);
    }

    #[test]
    fn options_that_make_no_sense_are_named() {
        for (name, value, expected) in [
            (
                "bootfile",
                "x",
                "extra DHCPv6 option \"bootfile\" is neither a known name nor a number",
            ),
            (
                "23",
                "10.0.0.1",
                "extra DHCPv6 option 23: \"10.0.0.1\" is not a list of IPv6 addresses",
            ),
            ("2", "me", "extra DHCPv6 option 2 is the server's own to set"),
        ] {
            assert_eq!(extra(&[option(name, value)]).unwrap_err(), expected);
        }
    }
}
