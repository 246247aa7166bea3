//! What a DHCP server tells to whom: one table per network, computed from its documents.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use stackhand_model::DhcpOption;
use stackhand_model::{MacAddr, PortId};

use crate::services::metadata::ADDRESS_V4 as METADATA;

/// Everything that the server of one network knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Largest IP packet in bytes.
    pub mtu: u32,
    /// The network's DNS domain.
    pub domain: Option<String>,
    /// Domains that short names are looked up in.
    pub search: Vec<String>,
    /// Time servers.
    pub ntp: Vec<Ipv4Addr>,
    /// Seconds that a lease lasts.
    pub lease_seconds: u32,
    /// The IPv4 subnets that are served.
    pub scopes: Vec<Scope>,
    /// Who gets an address. Nobody else does.
    pub clients: BTreeMap<MacAddr, Client>,
}

/// An IPv4 subnet that is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The range.
    pub net: Ipv4Net,
    /// The server's own address.
    pub server: Ipv4Addr,
    /// The way out.
    pub router: Option<Ipv4Addr>,
    /// DNS servers.
    pub dns: Vec<Ipv4Addr>,
    /// Routes besides the one to the range itself. Clients that take these pass over `router`,
    /// so the default route is among them.
    pub routes: Vec<(Ipv4Net, Ipv4Addr)>,
}

/// A port that gets an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// The port.
    pub port: PortId,
    /// Its address.
    pub address: Ipv4Addr,
    /// Which of the table's scopes the address is in.
    pub scope: usize,
    /// Its host name.
    pub host_name: String,
    /// Further options by number, as they go on the wire. They replace the scope's.
    pub options: BTreeMap<u8, Vec<u8>>,
    /// The server to boot from.
    pub next_server: Option<Ipv4Addr>,
}

/// The routes told to clients of a subnet: the given ones, the metadata service, the default.
#[must_use]
pub fn routes(
    given: impl IntoIterator<Item = (IpNet, IpAddr)>,
    router: Option<Ipv4Addr>,
    metadata_by: Option<Ipv4Addr>,
) -> Vec<(Ipv4Net, Ipv4Addr)> {
    let mut routes: Vec<(Ipv4Net, Ipv4Addr)> = given
        .into_iter()
        .filter_map(|(destination, by)| match (destination, by) {
            (IpNet::V4(net), IpAddr::V4(by)) => Some((net, by)),
            _ => None,
        })
        .collect();
    if let Some(by) = metadata_by {
        let metadata = Ipv4Net::from(METADATA);
        if !routes.iter().any(|(net, _)| *net == metadata) {
            routes.push((metadata, by));
        }
    }
    let has_default = routes.iter().any(|(net, _)| net.prefix_len() == 0);
    if let Some(router) = router
        && !has_default
        && !routes.is_empty()
    {
        routes.push((Ipv4Net::default(), router));
    }
    routes
}

/// What a port's extra options come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extra {
    /// Options by number, as they go on the wire.
    pub options: BTreeMap<u8, Vec<u8>>,
    /// The server to boot from.
    pub next_server: Option<Ipv4Addr>,
}

/// Reads a port's extra options. Names are dnsmasq's.
///
/// # Errors
///
/// Names the option that is not known or whose value makes no sense.
pub fn extra(given: &[DhcpOption]) -> Result<Extra, String> {
    let mut extra = Extra::default();
    for option in given.iter().filter(|option| option.ip_version != Some(6)) {
        // Neutron lets a name begin with a tag, and takes a value's first line alone.
        let name = option.name.rsplit(',').next().unwrap_or_default().trim();
        let value = option.value.lines().next().unwrap_or_default().trim();
        let wrong =
            |expected: &str| format!("extra DHCP option {name}: {value:?} is not {expected}");
        if name == "server-ip-address" {
            extra.next_server = Some(value.parse().map_err(|_| wrong("an IPv4 address"))?);
            continue;
        }
        let known = NAMES.iter().find(|(known, ..)| *known == name).copied();
        let (code, form) = match known {
            Some((_, code, form)) => (code, form),
            None => {
                let code: u8 =
                    name.parse().ok().filter(|code| (1..=254).contains(code)).ok_or_else(|| {
                        format!("extra DHCP option {name:?} is neither a known name nor 1 to 254")
                    })?;
                let form =
                    NAMES.iter().find(|(_, known, _)| *known == code).map(|(.., form)| *form);
                (code, form.unwrap_or(Form::Guess))
            }
        };
        if RESERVED.contains(&code) {
            return Err(format!("extra DHCP option {name} is the server's own to set"));
        }
        let bytes = form.encode(value).ok_or_else(|| wrong(form.expected()))?;
        extra.options.insert(code, bytes);
    }
    Ok(extra)
}

/// Options that make the protocol work: overload, message type, server id and their kin.
const RESERVED: [u8; 8] = [50, 52, 53, 54, 55, 57, 61, 82];

/// How an option's value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Text,
    Addresses,
    U8,
    U16,
    U32,
    /// As dnsmasq guesses: addresses, a number, bytes in hex with colons, else text.
    Guess,
}

const NAMES: [(&str, u8, Form); 32] = [
    ("netmask", 1, Form::Addresses),
    ("time-offset", 2, Form::U32),
    ("router", 3, Form::Addresses),
    ("time-server", 4, Form::Addresses),
    ("dns-server", 6, Form::Addresses),
    ("log-server", 7, Form::Addresses),
    ("lpr-server", 9, Form::Addresses),
    ("hostname", 12, Form::Text),
    ("boot-file-size", 13, Form::U16),
    ("domain-name", 15, Form::Text),
    ("swap-server", 16, Form::Addresses),
    ("root-path", 17, Form::Text),
    ("extension-path", 18, Form::Text),
    ("default-ttl", 23, Form::U8),
    ("mtu", 26, Form::U16),
    ("broadcast", 28, Form::Addresses),
    ("nis-domain", 40, Form::Text),
    ("nis-server", 41, Form::Addresses),
    ("ntp-server", 42, Form::Addresses),
    ("vendor-encap", 43, Form::Guess),
    ("netbios-ns", 44, Form::Addresses),
    ("netbios-nodetype", 46, Form::U8),
    ("lease-time", 51, Form::U32),
    ("T1", 58, Form::U32),
    ("T2", 59, Form::U32),
    ("vendor-class", 60, Form::Text),
    ("tftp-server", 66, Form::Text),
    ("bootfile-name", 67, Form::Text),
    ("smtp-server", 69, Form::Addresses),
    ("tftp-server-address", 150, Form::Addresses),
    ("config-file", 209, Form::Text),
    ("path-prefix", 210, Form::Text),
];

impl Form {
    fn expected(self) -> &'static str {
        match self {
            Self::Text | Self::Guess => "1 to 255 bytes of text",
            Self::Addresses => "a list of IPv4 addresses",
            Self::U8 => "a number from 0 to 255",
            Self::U16 => "a number from 0 to 65535",
            Self::U32 => "a number from 0 to 4294967295",
        }
    }

    fn encode(self, value: &str) -> Option<Vec<u8>> {
        match self {
            Self::Text => (1..=255).contains(&value.len()).then(|| value.as_bytes().to_vec()),
            Self::Addresses => {
                let parts = value.split([',', ' ']).filter(|part| !part.is_empty());
                let addresses: Option<Vec<Ipv4Addr>> =
                    parts.map(|part| part.parse().ok()).collect();
                let bytes: Vec<u8> = addresses?.iter().flat_map(Ipv4Addr::octets).collect();
                (1..=252).contains(&bytes.len()).then_some(bytes)
            }
            Self::U8 => value.parse::<u8>().ok().map(|number| vec![number]),
            Self::U16 => value.parse::<u16>().ok().map(|number| number.to_be_bytes().to_vec()),
            Self::U32 => value.parse::<u32>().ok().map(|number| number.to_be_bytes().to_vec()),
            Self::Guess => {
                let number = value.parse::<u32>().ok().map(|number| match number {
                    0..=0xff => vec![number.to_be_bytes()[3]],
                    0x100..=0xffff => number.to_be_bytes()[2..].to_vec(),
                    _ => number.to_be_bytes().to_vec(),
                });
                let hex = || {
                    let bytes: Option<Vec<u8>> = value
                        .split(':')
                        .map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() <= 2))
                        .collect();
                    bytes.filter(|bytes| (2..=255).contains(&bytes.len()))
                };
                Self::Addresses
                    .encode(value)
                    .or(number)
                    .or_else(hex)
                    .or_else(|| Self::Text.encode(value))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(name: &str, value: &str) -> DhcpOption {
        DhcpOption { name: name.into(), value: value.into(), ip_version: None }
    }

    #[test]
    fn extra_options_are_read_by_name_and_number() {
        let given = [
            option("bootfile-name", "pxelinux.0"),
            option("tag:ipxe,67", "http://boot/x"),
            option("42", "10.0.0.1,10.0.0.2"),
            option("server-ip-address", "10.0.0.9"),
            option("224", "1:2:ff"),
            option("225", "300"),
        ];
        let extra = extra(&given).unwrap();
        assert_eq!(extra.next_server, Some(Ipv4Addr::new(10, 0, 0, 9)));
        assert_eq!(extra.options[&67], b"http://boot/x");
        assert_eq!(extra.options[&42], [10, 0, 0, 1, 10, 0, 0, 2]);
        assert_eq!(extra.options[&224], [1, 2, 255]);
        assert_eq!(extra.options[&225], [1, 44]);
    }

    #[test]
    fn options_that_make_no_sense_are_named() {
        for (name, value, expected) in [
            (
                "bootfile",
                "x",
                "extra DHCP option \"bootfile\" is neither a known name nor 1 to 254",
            ),
            ("mtu", "big", "extra DHCP option mtu: \"big\" is not a number from 0 to 65535"),
            ("54", "10.0.0.1", "extra DHCP option 54 is the server's own to set"),
        ] {
            assert_eq!(extra(&[option(name, value)]).unwrap_err(), expected);
        }
    }

    #[test]
    fn the_default_route_goes_with_classless_routes_and_only_with_them() {
        let router = Some(Ipv4Addr::new(10, 0, 0, 1));
        assert_eq!(routes([], router, None), []);
        let with = routes([], router, Some(Ipv4Addr::new(10, 0, 0, 2)));
        assert_eq!(with[0].0.to_string(), "169.254.169.254/32");
        assert_eq!(with[1], (Ipv4Net::default(), Ipv4Addr::new(10, 0, 0, 1)));
    }
}
