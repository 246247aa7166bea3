//! Ethernet frames that the agent sends by itself, to neighbours who cannot be asked for yet: ARP,
//! neighbour advertisements, answers to clients without an address.

use std::net::{Ipv4Addr, Ipv6Addr};

use stackhand_model::MacAddr;

const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
const HOP_LIMIT: u8 = 64;

/// Both ends of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ends<Address> {
    /// Ethernet address, IP address and port of the sender.
    pub(crate) from: (MacAddr, Address, u16),
    /// The same of the receiver.
    pub(crate) to: (MacAddr, Address, u16),
}

/// The header of a frame.
pub(crate) fn ethernet(from: MacAddr, to: MacAddr, kind: u16) -> Vec<u8> {
    [&to.0[..], &from.0[..], &kind.to_be_bytes()[..]].concat()
}

/// An IPv4 datagram of UDP in a frame, with all checksums.
pub(crate) fn udp4(ends: Ends<Ipv4Addr>, payload: &[u8]) -> Vec<u8> {
    const IP_HEADER: usize = 20;
    let mut ip = [0; IP_HEADER];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&length(IP_HEADER + UDP_HEADER + payload.len()));
    ip[8] = HOP_LIMIT;
    ip[9] = UDP;
    ip[12..16].copy_from_slice(&ends.from.1.octets());
    ip[16..20].copy_from_slice(&ends.to.1.octets());
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let [high, low] = length(UDP_HEADER + payload.len());
    let pseudo = [&ip[12..20], &[0, UDP, high, low]].concat();
    let udp = udp(ends.from.2, ends.to.2, &pseudo, payload);
    [&ethernet(ends.from.0, ends.to.0, 0x0800), &ip[..], &udp, payload].concat()
}

/// The same for IPv6.
pub(crate) fn udp6(ends: Ends<Ipv6Addr>, payload: &[u8]) -> Vec<u8> {
    let [high, low] = length(UDP_HEADER + payload.len());
    let mut ip = vec![0x60, 0, 0, 0, high, low, UDP, HOP_LIMIT];
    ip.extend(ends.from.1.octets());
    ip.extend(ends.to.1.octets());
    let pseudo = pseudo6(ends.from.1, ends.to.1, UDP, UDP_HEADER + payload.len());
    let udp = udp(ends.from.2, ends.to.2, &pseudo, payload);
    [&ethernet(ends.from.0, ends.to.0, 0x86dd), &ip[..], &udp, payload].concat()
}

/// What of an IPv6 header goes into checksums (RFC 8200, 8.1).
pub(crate) fn pseudo6(from: Ipv6Addr, to: Ipv6Addr, next: u8, length: usize) -> Vec<u8> {
    let length = u32::try_from(length).unwrap_or(u32::MAX);
    [&from.octets()[..], &to.octets(), &length.to_be_bytes(), &[0, 0, 0, next]].concat()
}

fn udp(from: u16, to: u16, pseudo: &[u8], payload: &[u8]) -> [u8; UDP_HEADER] {
    let mut udp = [0; UDP_HEADER];
    udp[..2].copy_from_slice(&from.to_be_bytes());
    udp[2..4].copy_from_slice(&to.to_be_bytes());
    udp[4..6].copy_from_slice(&length(UDP_HEADER + payload.len()));
    let sum = match checksum(&[pseudo, &udp, payload]) {
        // Zero says that there is none.
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    udp
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes()
}

/// The Internet checksum over parts, of which only the last may have an odd length.
pub(crate) fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum: u64 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u64::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
    const B: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);

    #[test]
    fn checksums_over_what_has_its_checksum_in_place_are_zero() {
        let ends = Ends {
            from: (A, Ipv4Addr::new(10, 0, 0, 2), 67),
            to: (B, Ipv4Addr::new(10, 0, 0, 9), 68),
        };
        let frame = udp4(ends, b"odd");
        assert_eq!(frame.len(), 14 + 20 + 8 + 3);
        assert_eq!(checksum(&[&frame[14..34]]), 0);
        assert_eq!(checksum(&[&frame[26..34], &[0, 17, 0, 11], &frame[34..]]), 0);

        let [from, to] = ["fe80::1", "fe80::2"].map(|text| text.parse().unwrap());
        let frame = udp6(Ends { from: (A, from, 547), to: (B, to, 546) }, b"odd");
        assert_eq!(frame.len(), 14 + 40 + 8 + 3);
        assert_eq!(checksum(&[&pseudo6(from, to, 17, 11), &frame[54..]]), 0);
    }
}
