//! Address translation of a router: rules that never change, and the elements of their maps.
//!
//! In the order of a packet:
//!
//! * Into the router: what is sent to a floating IP goes to its fixed address; what is sent to a
//!   forwarded port goes to that port's address and port. So it is for the router's own packets.
//! * Out of it: what came from outside keeps its source, and so does what goes from one internal
//!   network to another. All else (what goes out, and what was turned back inside because it was
//!   sent to a floating IP) gets the sender's floating IP as its source, or else the address that
//!   the link it leaves by is masked with: the router's own external address. Without it the
//!   answer to what was turned back would not pass the router again.
//!
//! The metadata service answers in the namespace on a link-local address, which is never forwarded
//! and not to be reached from outside.

use std::fmt;
use std::net::Ipv4Addr;

use stackhand_kernel::netfilter::{Element, Family, FlowSide, Table};

/// The rules, in `nft`'s words.
pub const SCRIPT: &str = r#"
table inet stackhand {
	map floating {
		type ipv4_addr : ipv4_addr
	}
	map fixed {
		type ipv4_addr : ipv4_addr
	}
	map masked {
		type ifname : ipv4_addr
	}
	map forwarded {
		type inet_proto . ipv4_addr . inet_service : ipv4_addr . inet_service
	}
	set cut {
		type inet_proto . ipv4_addr . inet_service
	}
	chain arrive {
		type nat hook prerouting priority dstnat; policy accept;
		dnat ip to ip daddr map @floating
		dnat ip to meta l4proto . ip daddr . th dport map @forwarded
	}
	chain own {
		type nat hook output priority -100; policy accept;
		dnat ip to ip daddr map @floating
		dnat ip to meta l4proto . ip daddr . th dport map @forwarded
	}
	chain depart {
		type nat hook postrouting priority srcnat; policy accept;
		iifname != "qr-*" accept
		oifname != "qg-*" ct status & dnat != dnat accept
		snat ip to ip saddr map @fixed
		snat ip to oifname map @masked fully-random
	}
	chain input {
		type filter hook input priority filter; policy accept;
		iifname "qg-*" ip daddr 169.254.0.0/16 drop
		iifname "qg-*" ip6 daddr fe80::a9fe:a9fe drop
	}
	chain forward {
		type filter hook forward priority filter; policy accept;
		ip daddr 169.254.0.0/16 drop
	}
}
"#;

/// The sets and maps of the rules.
pub const SETS: [&str; 5] = ["floating", "fixed", "masked", "forwarded", "cut"];

/// Bytes of a link's name in an element.
const LINK_NAME: usize = 16;

/// An element of a router's maps.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Entry {
    /// What is sent to `address` goes to `fixed`.
    Floating {
        /// The floating IP.
        address: Ipv4Addr,
        /// Where it leads.
        fixed: Ipv4Addr,
    },
    /// What `fixed` sends comes from `address`.
    Fixed {
        /// The sender.
        fixed: Ipv4Addr,
        /// Its floating IP.
        address: Ipv4Addr,
    },
    /// What leaves by `link` comes from `address`.
    Masked {
        /// The link.
        link: String,
        /// The router's external address.
        address: Ipv4Addr,
    },
    /// What is sent to a port of `address` goes to a port of another.
    Forwarded {
        /// Protocol number.
        protocol: u8,
        /// The floating IP.
        address: Ipv4Addr,
        /// Its port.
        port: u16,
        /// Where it leads.
        to: Ipv4Addr,
        /// The port there.
        to_port: u16,
    },
    /// A note that flows are still to be cut: those of `address`, or of one of its ports. It is
    /// written together with the change that makes them stale, and outlives a crash.
    Cut {
        /// Protocol number; 0: all flows of the address.
        protocol: u8,
        /// The external address.
        address: Ipv4Addr,
        /// Its port.
        port: u16,
    },
}

/// The table of every router.
#[must_use]
pub fn table() -> Table {
    Table { family: Family::Inet, name: "stackhand".to_owned() }
}

impl Entry {
    /// The external address that it is about.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        match self {
            Self::Floating { address, .. }
            | Self::Fixed { address, .. }
            | Self::Masked { address, .. }
            | Self::Forwarded { address, .. }
            | Self::Cut { address, .. } => *address,
        }
    }

    /// The set or map that it belongs to, and its key there; no two of a map share one.
    #[must_use]
    pub fn key(&self) -> (&'static str, Vec<u8>) {
        match self {
            Self::Floating { address, .. } => ("floating", address.octets().to_vec()),
            Self::Fixed { fixed, .. } => ("fixed", fixed.octets().to_vec()),
            Self::Masked { link, .. } => {
                let mut name = link.as_bytes().to_vec();
                name.resize(LINK_NAME, 0);
                ("masked", name)
            }
            Self::Forwarded { protocol, address, port, .. } => {
                ("forwarded", door(Some(*protocol), *address, *port))
            }
            Self::Cut { protocol, address, port } => {
                ("cut", door(Some(*protocol), *address, *port))
            }
        }
    }

    /// As the kernel holds it.
    #[must_use]
    pub fn element(&self) -> Element {
        let (_, key) = self.key();
        match self {
            Self::Floating { fixed, .. } => Element::pair(key, fixed.octets()),
            Self::Fixed { address, .. } | Self::Masked { address, .. } => {
                Element::pair(key, address.octets())
            }
            Self::Forwarded { to, to_port, .. } => Element::pair(key, door(None, *to, *to_port)),
            Self::Cut { .. } => Element::new(key),
        }
    }

    /// The entry that the kernel holds as `element` of `set`; `None` if it is none of ours.
    #[must_use]
    pub fn parse(set: &str, element: &Element) -> Option<Self> {
        let data = element.value().unwrap_or_default();
        let address = |bytes: &[u8]| bytes.first_chunk::<4>().map(|it| Ipv4Addr::from(*it));
        let port = |bytes: &[u8]| bytes.first_chunk::<2>().map(|it| u16::from_be_bytes(*it));
        let key = element.key.as_slice();
        let entry = match set {
            "floating" => Self::Floating { address: address(key)?, fixed: address(data)? },
            "fixed" => Self::Fixed { fixed: address(key)?, address: address(data)? },
            "masked" => {
                let name = key.split(|byte| *byte == 0).next()?;
                let link = std::str::from_utf8(name).ok()?.to_owned();
                Self::Masked { link, address: address(data)? }
            }
            "forwarded" => Self::Forwarded {
                protocol: *key.first()?,
                address: address(key.get(4..)?)?,
                port: port(key.get(8..)?)?,
                to: address(data)?,
                to_port: port(data.get(4..)?)?,
            },
            "cut" => Self::Cut {
                protocol: *key.first()?,
                address: address(key.get(4..)?)?,
                port: port(key.get(8..)?)?,
            },
            _ => return None,
        };
        Some(entry)
    }

    /// What has to be cut when this goes or leads elsewhere.
    #[must_use]
    pub fn cut(&self) -> Option<Self> {
        match self {
            Self::Floating { address, .. } => {
                Some(Self::Cut { protocol: 0, address: *address, port: 0 })
            }
            // Flows between internal networks that were turned back go with their link.
            Self::Masked { link, address } if link.starts_with("qg-") => {
                Some(Self::Cut { protocol: 0, address: *address, port: 0 })
            }
            Self::Forwarded { protocol, address, port, .. } => {
                Some(Self::Cut { protocol: *protocol, address: *address, port: *port })
            }
            Self::Masked { .. } | Self::Fixed { .. } | Self::Cut { .. } => None,
        }
    }

    /// Whether this names a flow as one to be cut.
    #[must_use]
    pub fn cuts(&self, original: &FlowSide, reply: &FlowSide) -> bool {
        let Self::Cut { protocol, address, port } = self else { return false };
        let to = original.destination == *address;
        if *protocol == 0 {
            // Translated on the way in, or on the way out.
            return to || reply.destination == *address;
        }
        to && original.protocol == *protocol && original.destination_port == *port
    }
}

/// Protocol, address and port as a key; address and port as what a map leads to.
fn door(protocol: Option<u8>, address: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(12);
    bytes.extend(protocol.into_iter().flat_map(|number| [number, 0, 0, 0]));
    bytes.extend(address.octets());
    bytes.extend(port.to_be_bytes());
    bytes.extend([0, 0]);
    bytes
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Floating { address, fixed } => write!(f, "{address} leads to {fixed}"),
            Self::Fixed { fixed, address } => write!(f, "{fixed} sends as {address}"),
            Self::Masked { link, address } => write!(f, "{link} sends as {address}"),
            Self::Forwarded { protocol, address, port, to, to_port } => {
                write!(f, "{} {address}:{port} leads to {to}:{to_port}", protocol_name(*protocol))
            }
            Self::Cut { protocol: 0, address, .. } => write!(f, "cut {address}"),
            Self::Cut { protocol, address, port } => {
                write!(f, "cut {} {address}:{port}", protocol_name(*protocol))
            }
        }
    }
}

fn protocol_name(number: u8) -> String {
    match number {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        other => format!("protocol {other}"),
    }
}
