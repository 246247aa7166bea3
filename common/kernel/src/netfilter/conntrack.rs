//! Connections that the kernel tracks: listing them, and forgetting one.
//!
//! Rules decide about the first packet of a flow alone. Who takes a rule away must make the
//! kernel forget the flows that it let through, or they go on.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::attribute::{self, Attributes};
use super::{Answer, Netfilter, refused};
use crate::KernelError;

const GET: u16 = 0x101;
const DELETE: u16 = 0x102;

const TUPLE_ORIGINAL: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const PROTOCOL_NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;

const INET: u8 = 2;
const INET6: u8 = 10;

/// One direction of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlowSide {
    /// Who sends.
    pub source: IpAddr,
    /// Who receives.
    pub destination: IpAddr,
    /// Protocol number.
    pub protocol: u8,
    /// The sender's port; 0 where the protocol has none.
    pub source_port: u16,
    /// The receiver's port; 0 where the protocol has none.
    pub destination_port: u16,
    /// Type and code of ICMP.
    pub icmp: Option<(u8, u8)>,
}

/// A flow. Where addresses are translated, `reply` is not the reverse of `original`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// As its first packet came.
    pub original: FlowSide,
    /// As answers come.
    pub reply: FlowSide,
    /// Its zone; flows of different zones never mix.
    pub zone: u16,
    id: Vec<u8>,
    tuple: Vec<u8>,
}

impl Netfilter {
    /// The flows that the namespace tracks, of both families.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn flows(&self) -> Result<Vec<Flow>, KernelError> {
        let mut flows = Vec::new();
        for family in [INET, INET6] {
            let some = self.dump(GET, family, &[], parse).await;
            flows.extend(some.map_err(|source| refused("list", "flows", source))?);
        }
        Ok(flows)
    }

    /// Makes the kernel forget a flow. One that is gone already is fine.
    ///
    /// # Errors
    ///
    /// Passes on the kernel's refusal.
    pub async fn forget(&self, flow: &Flow) -> Result<(), KernelError> {
        // Without a tuple the kernel would forget every flow there is.
        if flow.tuple.is_empty() {
            return Ok(());
        }
        let family = if flow.original.source.is_ipv4() { INET } else { INET6 };
        let mut attributes = Attributes::default().written(&flow.tuple).bytes(ID, &flow.id);
        if flow.zone != 0 {
            attributes = attributes.bytes(ZONE, &flow.zone.to_be_bytes());
        }
        match self.change(DELETE, family, attributes.into_bytes()).await {
            Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(()),
            result => result.map_err(|source| {
                let FlowSide { source: from, destination: to, .. } = flow.original;
                refused("forget", format!("flow from {from} to {to}"), source)
            }),
        }
    }
}

fn parse(answer: &Answer<'_>) -> Option<Flow> {
    let all = answer.attributes;
    let zone = attribute::find(all, ZONE).and_then(|value| value.first_chunk());
    Some(Flow {
        original: side(attribute::find(all, TUPLE_ORIGINAL)?)?,
        reply: side(attribute::find(all, TUPLE_REPLY)?)?,
        zone: zone.map_or(0, |bytes| u16::from_be_bytes(*bytes)),
        id: attribute::find(all, ID)?.to_vec(),
        tuple: attribute::keep(all, &[TUPLE_ORIGINAL]),
    })
}

fn side(tuple: &[u8]) -> Option<FlowSide> {
    let ip = attribute::find(tuple, TUPLE_IP)?;
    // Kinds 1 and 2 are IPv4's source and destination, 3 and 4 those of IPv6.
    let address = |v4, v6| {
        let four = attribute::find(ip, v4).and_then(|value| value.first_chunk::<4>());
        let six = attribute::find(ip, v6).and_then(|value| value.first_chunk::<16>());
        four.map(|bytes| IpAddr::V4(Ipv4Addr::from(*bytes)))
            .or_else(|| six.map(|bytes| IpAddr::V6(Ipv6Addr::from(*bytes))))
    };
    let protocol = attribute::find(tuple, TUPLE_PROTOCOL)?;
    let port = |kind| {
        let value = attribute::find(protocol, kind).and_then(|value| value.first_chunk());
        value.map_or(0, |bytes| u16::from_be_bytes(*bytes))
    };
    // Kinds 5 and 6 are type and code of ICMP, 8 and 9 those of ICMPv6.
    let byte = |v4, v6| {
        let value = attribute::find(protocol, v4).or_else(|| attribute::find(protocol, v6));
        value.and_then(|value| value.first().copied())
    };
    Some(FlowSide {
        source: address(1, 3)?,
        destination: address(2, 4)?,
        protocol: *attribute::find(protocol, PROTOCOL_NUMBER)?.first()?,
        source_port: port(SOURCE_PORT),
        destination_port: port(DESTINATION_PORT),
        icmp: byte(5, 8).zip(byte(6, 9)),
    })
}
