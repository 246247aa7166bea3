//! Answers read by another implementation than the one that wrote them.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use dhcproto::v6::{
    DhcpOption, DhcpOptions, IAAddr, IANA, IAPD, Message, MessageType, NtpSuboption, ORO,
    OptionCode, Status, StatusCode,
};
use dhcproto::{Decodable, Decoder, Encodable};
use proptest::prelude::*;
use stackhand_model::{MacAddr, PortId};
use uuid::Uuid;

use super::wire::{Options, datagram};
use super::*;
use crate::frame::{Ends, udp6};

const MAC: MacAddr = MacAddr([0xfa, 0x16, 0x3e, 0, 0, 1]);
const LAZY: MacAddr = MacAddr([0xfa, 0x16, 0x3e, 0, 0, 2]);
const ID: [u8; 10] = [0, 3, 0, 1, 0xfa, 0x16, 0x3e, 0, 0, 1];

fn own() -> Ipv6Addr {
    "2001:db8::10".parse().unwrap()
}

fn table() -> Table {
    let client = |addresses: Vec<Ipv6Addr>| Client {
        port: PortId(Uuid::from_u128(1)),
        addresses,
        host_name: "web".into(),
        options: BTreeMap::from([(59, b"tftp://boot".to_vec())]),
    };
    Table {
        server: Table::name_of(PortId(Uuid::from_u128(9))),
        mtu: 1450,
        dns: vec!["2001:db8::53".parse().unwrap()],
        search: vec!["int.example.org".into(), "example.org".into()],
        ntp: vec!["2001:db8::123".parse().unwrap()],
        lease_seconds: 3600,
        clients: [(MAC, client(vec![own()])), (LAZY, client(Vec::new()))].into(),
    }
}

fn request(kind: MessageType, fill: impl FnOnce(&mut DhcpOptions)) -> Vec<u8> {
    let mut message = Message::new_with_id(kind, [1, 2, 3]);
    message.opts_mut().insert(DhcpOption::ClientId(ID.to_vec()));
    fill(message.opts_mut());
    message.to_vec().unwrap()
}

fn association(id: u32, addresses: &[Ipv6Addr]) -> DhcpOption {
    let mut opts = DhcpOptions::new();
    for addr in addresses {
        let none = DhcpOptions::new();
        let address = IAAddr { addr: *addr, preferred_life: 1, valid_life: 1, opts: none };
        opts.insert(DhcpOption::IAAddr(address));
    }
    DhcpOption::IANA(IANA { id, t1: 0, t2: 0, opts })
}

fn to_us(options: &mut DhcpOptions) {
    options.insert(DhcpOption::ServerId(table().server));
}

fn ask(kind: MessageType, fill: impl FnOnce(&mut DhcpOptions)) -> Result<Message, Ignored> {
    let answer = answer(&table(), MAC, &request(kind, fill))?;
    Ok(read(&answer.message))
}

fn read(bytes: &[u8]) -> Message {
    let message = Message::decode(&mut Decoder::new(bytes)).unwrap();
    assert_eq!(message.xid(), [1, 2, 3]);
    message
}

/// An association's id, addresses with their seconds, and what is said of it.
type Leased = (u32, Vec<(Ipv6Addr, u32)>, Option<Status>);

fn leased(message: &Message) -> Vec<Leased> {
    let all = message.opts().get_all(OptionCode::IANA).unwrap_or_default();
    let read = |option: &DhcpOption| {
        let DhcpOption::IANA(ia) = option else { unreachable!() };
        let mut has = Vec::new();
        let mut told = None;
        for option in ia.opts.iter() {
            match option {
                DhcpOption::IAAddr(address) => has.push((address.addr, address.valid_life)),
                DhcpOption::StatusCode(StatusCode { status, .. }) => told = Some(*status),
                other => panic!("{other:?}"),
            }
        }
        (ia.id, has, told)
    };
    all.iter().map(read).collect()
}

fn status(message: &Message) -> Option<Status> {
    match message.opts().get(OptionCode::StatusCode) {
        Some(DhcpOption::StatusCode(code)) => Some(code.status),
        _ => None,
    }
}

#[test]
fn a_solicitation_is_offered_the_ports_addresses_with_everything_a_guest_needs() {
    let offer = ask(MessageType::Solicit, |options| {
        // The library puts the later one before the other.
        options.insert(association(8, &[]));
        options.insert(association(7, &[]));
        options.insert(DhcpOption::IAPD(IAPD { id: 9, t1: 0, t2: 0, opts: DhcpOptions::new() }));
    })
    .unwrap();
    assert_eq!(offer.msg_type(), MessageType::Advertise);
    assert_eq!(
        leased(&offer),
        [(7, vec![(own(), 3600)], None), (8, vec![], Some(Status::NoAddrsAvail))]
    );
    let Some(DhcpOption::IAPD(prefix)) = offer.opts().get(OptionCode::IAPD) else { unreachable!() };
    assert!(matches!(
        prefix.opts.get(OptionCode::StatusCode),
        Some(DhcpOption::StatusCode(StatusCode { status: Status::NoPrefixAvail, .. }))
    ));
    let option = |code| offer.opts().get(code).cloned();
    assert_eq!(option(OptionCode::ClientId), Some(DhcpOption::ClientId(ID.to_vec())));
    assert_eq!(option(OptionCode::ServerId), Some(DhcpOption::ServerId(table().server)));
    assert_eq!(
        option(OptionCode::DomainNameServers),
        Some(DhcpOption::DomainNameServers(table().dns))
    );
    let Some(DhcpOption::DomainSearchList(search)) = option(OptionCode::DomainSearchList) else {
        unreachable!()
    };
    let search: Vec<String> = search.iter().map(ToString::to_string).collect();
    assert_eq!(search, ["int.example.org.", "example.org."]);
    let Some(DhcpOption::NtpServer(servers)) = option(OptionCode::NtpServer) else {
        unreachable!()
    };
    assert_eq!(servers, [NtpSuboption::ServerAddress(table().ntp[0])]);
}

#[test]
fn a_client_in_a_hurry_is_given_its_address_at_once() {
    let reply = ask(MessageType::Solicit, |options| {
        options.insert(association(7, &[]));
        options.insert(DhcpOption::RapidCommit);
    });
    let reply = reply.unwrap();
    assert_eq!(reply.msg_type(), MessageType::Reply);
    assert!(reply.opts().get(OptionCode::RapidCommit).is_some());
    assert_eq!(leased(&reply), [(7, vec![(own(), 3600)], None)]);
}

#[test]
fn an_address_is_extended_and_one_that_is_over_ends() {
    let old: Ipv6Addr = "2001:db8::99".parse().unwrap();
    for kind in [MessageType::Renew, MessageType::Rebind] {
        let reply = ask(kind, |options| {
            options.insert(association(7, &[own(), old]));
            if kind == MessageType::Renew {
                to_us(options);
            }
        });
        let reply = reply.unwrap();
        assert_eq!(leased(&reply), [(7, vec![(own(), 3600), (old, 0)], None)]);
    }
    let confirm = |address| {
        let reply = ask(MessageType::Confirm, |options| options.insert(association(7, &[address])));
        status(&reply.unwrap())
    };
    assert_eq!(confirm(own()), Some(Status::Success));
    assert_eq!(confirm(old), Some(Status::NotOnLink));
    for kind in [MessageType::Release, MessageType::Decline] {
        let reply = ask(kind, |options| {
            options.insert(association(7, &[own()]));
            to_us(options);
        });
        assert_eq!(status(&reply.unwrap()), Some(Status::Success));
    }
}

#[test]
fn who_makes_its_own_addresses_is_told_settings_alone() {
    let asked = |options: &mut DhcpOptions| {
        let opts =
            vec![OptionCode::DomainNameServers, OptionCode::InfMaxRt, OptionCode::OptBootfileUrl];
        options.insert(DhcpOption::ORO(ORO { opts }));
    };
    let bytes = request(MessageType::InformationRequest, asked);
    let reply = read(&answer(&table(), LAZY, &bytes).unwrap().message);
    assert_eq!(reply.msg_type(), MessageType::Reply);
    let codes: Vec<u16> = reply.opts().iter().map(|it| OptionCode::from(it).into()).collect();
    assert_eq!(codes, [1, 2, 23, 59], "no more than it asked for, besides who is who");
    let bytes = request(MessageType::Solicit, |options| options.insert(association(7, &[])));
    let reply = read(&answer(&table(), LAZY, &bytes).unwrap().message);
    assert_eq!(leased(&reply), [(7, vec![], Some(Status::NoAddrsAvail))]);
}

#[test]
fn what_is_for_others_or_makes_no_sense_gets_no_answer() {
    let stranger = MacAddr([2; 6]);
    let solicit = request(MessageType::Solicit, |_| {});
    assert_eq!(answer(&table(), stranger, &solicit), Err(Ignored::UnknownClient));
    let elsewhere = ask(MessageType::Request, |options| {
        options.insert(DhcpOption::ServerId(vec![0, 4, 1]));
    });
    assert_eq!(elsewhere, Err(Ignored::OtherServer));
    assert_eq!(ask(MessageType::Renew, |_| {}), Err(Ignored::Malformed), "to no server");
    assert_eq!(ask(MessageType::Solicit, to_us), Err(Ignored::Malformed), "to one server");
    assert_eq!(ask(MessageType::Confirm, |_| {}), Err(Ignored::Malformed), "of no address");
    assert_eq!(ask(MessageType::Advertise, |_| {}), Err(Ignored::Malformed));
    let cut = &solicit[..solicit.len() - 1];
    assert_eq!(answer(&table(), MAC, cut), Err(Ignored::Malformed));
}

#[test]
fn a_relays_client_is_known_by_what_the_relay_says_and_the_answer_goes_back_the_same_way() {
    let solicit = request(MessageType::Solicit, |options| options.insert(association(7, &[])));
    let wrap = |inner: &[u8], options: &[(u16, &[u8])]| {
        let mut bytes = vec![12, 0];
        bytes.extend([0xfe; 32]);
        for (code, value) in options.iter().chain([&(9, inner)]) {
            wire::put(&mut bytes, *code, value);
        }
        bytes
    };
    let link = [&[0, 1][..], &MAC.0].concat();
    let first = wrap(&solicit, &[(79, &link), (18, b"eth7")]);
    let told = answer(&table(), LAZY, &wrap(&first, &[])).unwrap();
    assert!(told.by_relay);
    let inner = |bytes: &[u8]| {
        assert_eq!(bytes[0], 13);
        let options = Options::read(&bytes[34..]).unwrap();
        (options.first(18).map(<[u8]>::to_vec), options.first(9).unwrap().to_vec())
    };
    let (none, first) = inner(&told.message);
    let (interface, message) = inner(&first);
    assert_eq!((none, interface.as_deref()), (None, Some(&b"eth7"[..])));
    assert_eq!(leased(&read(&message))[0].1, [(own(), 3600)]);
    // A relay that says nothing of its client: the client's own name may.
    assert!(answer(&table(), LAZY, &wrap(&solicit, &[])).is_ok());
    let endless = (0..9).fold(solicit, |inner, _| wrap(&inner, &[]));
    assert_eq!(answer(&table(), MAC, &endless), Err(Ignored::Malformed));
}

#[test]
fn an_answer_fits_the_link() {
    let mut table = table();
    table.clients.get_mut(&MAC).unwrap().options =
        (200..220).map(|code| (code, vec![7; 200])).collect();
    let told = answer(&table, MAC, &request(MessageType::Solicit, |_| {})).unwrap();
    assert!((1000..=1402).contains(&told.message.len()), "{}", told.message.len());
}

#[test]
fn a_frame_is_taken_apart_and_the_answer_put_together() {
    let [from, to] = ["fe80::1", "ff02::1:2"].map(|text| text.parse().unwrap());
    let ends = Ends { from: (MAC, from, 546), to: (LAZY, to, 547) };
    let frame = udp6(ends, b"message");
    let heard = datagram(&frame).unwrap();
    assert_eq!((heard.from, heard.to), ((MAC, from, 546), (LAZY, to)));
    assert_eq!(heard.message, b"message");
    // A guest pads its frames.
    assert_eq!(datagram(&[&frame[..], &[0; 9]].concat()).unwrap().message, b"message");
    assert_eq!(datagram(&frame[..frame.len() - 1]), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_frame_is_a_datagram_or_not(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        drop(datagram(&bytes).map(|heard| answer(&table(), heard.from.0, heard.message)));
    }

    #[test]
    fn a_damaged_request_is_answered_well_or_ignored(
        kind in 1_u8..=13,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
        extra in prop::collection::vec((1_u16..100, prop::collection::vec(any::<u8>(), 0..40)), 0..6),
        us in any::<bool>(),
    ) {
        let mut bytes = request(MessageType::Solicit, |options| {
            options.insert(association(7, &[own()]));
            if us {
                to_us(options);
            }
        });
        bytes[0] = kind;
        for (code, value) in extra {
            wire::put(&mut bytes, code, &value);
        }
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        for bytes in [&bytes[..], &bytes[..cut.index(bytes.len())]] {
            if let Ok(answer) = answer(&table(), MAC, bytes)
                && !answer.by_relay
            {
                prop_assert!(answer.message.len() <= 1402);
                prop_assert!(Options::read(&answer.message[4..]).is_some());
            }
        }
    }
}
