//! Frames made by hand, and a wire to put them on.

use std::io::Read;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use socket2::Socket;
use stackhand_kernel::Netns;
use stackhand_kernel::packet::{Receive, frames};

/// How long a frame may take from one guest to another, on a machine that is busy.
const ARRIVES: Duration = Duration::from_secs(10);

/// The end of a guest's wire, by which frames go past its kernel.
pub(crate) struct Wire(Socket);

impl Wire {
    /// The wire of `eth0` in the namespace `guest`.
    pub(crate) async fn of(guest: &str) -> Self {
        let open = || {
            let index = nix::net::if_::if_nametoindex("eth0")?;
            frames(index, Receive::All)
        };
        Self(Netns::named(guest).unwrap().inside("open a wire", open).await.unwrap())
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        let sent = self.0.send(frame).unwrap();
        assert_eq!(sent, frame.len());
    }

    /// Takes frames until `last` has arrived; returns those before it.
    pub(crate) async fn until(&self, last: &[u8]) -> Vec<Vec<u8>> {
        let begin = Instant::now();
        let mut before = Vec::new();
        loop {
            let mut buffer = vec![0; 2048];
            match (&self.0).read(&mut buffer) {
                Ok(length) => {
                    buffer.truncate(length);
                    if buffer == last {
                        return before;
                    }
                    before.push(buffer);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    assert!(begin.elapsed() < ARRIVES, "a frame that is allowed did not arrive");
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// Whether `frame` gets from one wire to another. `allowed` is one that does, sent behind it: once
/// that has arrived, the other has or never will.
pub(crate) async fn passes(from: &Wire, to: &Wire, frame: &[u8], allowed: &[u8]) -> bool {
    from.send(frame);
    from.send(allowed);
    // The receiving kernel takes a tag off before it shows the frame.
    let mut bare = frame.to_vec();
    if frame[12..14] == [0x81, 0] {
        bare.drain(12..16);
    }
    to.until(allowed).await.contains(&bare)
}

pub(crate) fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [to, from].concat();
    frame.extend(kind.to_be_bytes());
    // Not padded: the kernel cuts off what is behind an IP packet.
    frame.extend(payload);
    frame
}

pub(crate) const BROADCAST: [u8; 6] = [0xff; 6];

/// The Ethernet address of the guest `last`.
pub(crate) fn mac_of(last: u8) -> [u8; 6] {
    [0xfa, 0x16, 0x3e, 0, 0, last]
}

/// An IP packet of either family.
pub(crate) fn ip(from: &str, to: &str, protocol: u8, payload: &[u8]) -> (u16, Vec<u8>) {
    let length = u16::try_from(payload.len()).unwrap();
    match (from.parse().unwrap(), to.parse().unwrap()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut header = vec![0x45, 0];
            header.extend((20 + length).to_be_bytes());
            header.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
            header.extend(from.octets());
            header.extend(to.octets());
            let sum = checksum(&header).to_be_bytes();
            header[10..12].copy_from_slice(&sum);
            (0x0800, [&header, payload].concat())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend(length.to_be_bytes());
            header.extend([protocol, 255]);
            header.extend(from.octets());
            header.extend(to.octets());
            (0x86dd, [&header, payload].concat())
        }
        other => panic!("{other:?}"),
    }
}

/// The sum over a packet with its pseudo header.
fn transport_sum(from: &str, to: &str, protocol: u8, payload: &[u8]) -> [u8; 2] {
    let bytes = |text: &str| match text.parse().unwrap() {
        IpAddr::V4(it) => it.octets().to_vec(),
        IpAddr::V6(it) => it.octets().to_vec(),
    };
    let mut all = [bytes(from), bytes(to)].concat();
    all.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    all.extend([0, 0, 0, protocol]);
    all.extend(payload);
    checksum(&all).to_be_bytes()
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// A guest's address and Ethernet address at either end of a frame.
pub(crate) struct Ends<'a> {
    pub(crate) from_mac: [u8; 6],
    pub(crate) to_mac: [u8; 6],
    pub(crate) from: &'a str,
    pub(crate) to: &'a str,
}

impl Ends<'_> {
    fn packet(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let (kind, packet) = ip(self.from, self.to, protocol, payload);
        ethernet(self.to_mac, self.from_mac, kind, &packet)
    }

    pub(crate) fn udp(&self, from: u16, to: u16, text: &str) -> Vec<u8> {
        let mut datagram = [from.to_be_bytes(), to.to_be_bytes()].concat();
        datagram.extend(u16::try_from(8 + text.len()).unwrap().to_be_bytes());
        datagram.extend([0, 0]);
        datagram.extend(text.bytes());
        let sum = transport_sum(self.from, self.to, 17, &datagram);
        datagram[6..8].copy_from_slice(&sum);
        self.packet(17, &datagram)
    }

    /// The first packet of a TCP connection.
    pub(crate) fn syn(&self, from: u16, to: u16) -> Vec<u8> {
        let mut segment = [from.to_be_bytes(), to.to_be_bytes()].concat();
        segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0x20, 0, 0, 0, 0, 0]);
        let sum = transport_sum(self.from, self.to, 6, &segment);
        segment[16..18].copy_from_slice(&sum);
        self.packet(6, &segment)
    }

    pub(crate) fn other(&self, protocol: u8) -> Vec<u8> {
        self.packet(protocol, b"0123456789")
    }

    pub(crate) fn icmp(&self, kind: u8, code: u8, rest: &[u8]) -> Vec<u8> {
        let mut message = vec![kind, code, 0, 0];
        message.extend(rest);
        let six = self.from.contains(':');
        let sum = if six {
            transport_sum(self.from, self.to, 58, &message)
        } else {
            checksum(&message).to_be_bytes()
        };
        message[2..4].copy_from_slice(&sum);
        self.packet(if six { 58 } else { 1 }, &message)
    }
}

/// An ARP message. `from` is the sender that it tells of.
pub(crate) fn arp(frame_from: [u8; 6], reply: bool, from: ([u8; 6], &str), to: &str) -> Vec<u8> {
    let four = |text: &str| text.parse::<std::net::Ipv4Addr>().unwrap().octets();
    let mut message = vec![0, 1, 8, 0, 6, 4, 0, if reply { 2 } else { 1 }];
    message.extend(from.0);
    message.extend(four(from.1));
    message.extend([0; 6]);
    message.extend(four(to));
    ethernet(BROADCAST, frame_from, 0x0806, &message)
}
