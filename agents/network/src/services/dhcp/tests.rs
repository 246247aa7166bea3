//! Answers read by another implementation than the one that wrote them.

use dhcproto::v4::{DhcpOption, Flags, Message, MessageType, OptionCode, UnknownOption, relay};
use dhcproto::{Decodable, Decoder, Encodable};
use proptest::prelude::*;
use stackhand_model::{MacAddr, PortId};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use uuid::Uuid;

use super::*;

const MAC: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 0, 1];
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 10);

fn table() -> Table {
    let scope = Scope {
        net: "10.0.0.0/24".parse().unwrap(),
        server: SERVER,
        router: Some(Ipv4Addr::new(10, 0, 0, 1)),
        dns: vec![Ipv4Addr::new(192, 0, 2, 53)],
        routes: routes([], Some(Ipv4Addr::new(10, 0, 0, 1)), Some(SERVER)),
    };
    let client = Client {
        port: PortId(Uuid::from_u128(1)),
        address: ADDRESS,
        scope: 0,
        host_name: "web".into(),
        options: BTreeMap::new(),
        next_server: None,
    };
    Table {
        mtu: 1450,
        domain: Some("int.example.org".into()),
        search: vec!["int.example.org".into(), "example.org".into()],
        ntp: vec![Ipv4Addr::new(192, 0, 2, 123)],
        lease_seconds: 3600,
        scopes: vec![scope],
        clients: [(MacAddr(MAC), client)].into(),
    }
}

fn request(kind: MessageType, fill: impl FnOnce(&mut Message)) -> Vec<u8> {
    let none = Ipv4Addr::UNSPECIFIED;
    let mut message = Message::new_with_id(7, none, none, none, none, &MAC);
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    fill(&mut message);
    message.to_vec().unwrap()
}

fn read(answer: &Answer) -> Message {
    Message::decode(&mut Decoder::new(&answer.message)).unwrap()
}

fn ask(kind: MessageType, fill: impl FnOnce(&mut Message)) -> Result<Answer, Ignored> {
    answer(&table(), &request(kind, fill))
}

fn kind(answer: &Answer) -> MessageType {
    read(answer).opts().msg_type().unwrap()
}

#[test]
fn a_discover_is_offered_the_ports_address_with_everything_a_guest_needs() {
    let offer = ask(MessageType::Discover, |_| {}).unwrap();
    let message = read(&offer);
    assert_eq!(kind(&offer), MessageType::Offer);
    assert_eq!((message.yiaddr(), message.xid(), message.chaddr()), (ADDRESS, 7, &MAC[..]));
    let option = |code| message.opts().get(code).cloned();
    assert_eq!(option(OptionCode::ServerIdentifier), Some(DhcpOption::ServerIdentifier(SERVER)));
    assert_eq!(option(OptionCode::AddressLeaseTime), Some(DhcpOption::AddressLeaseTime(3600)));
    assert_eq!(option(OptionCode::Renewal), Some(DhcpOption::Renewal(1800)));
    assert_eq!(option(OptionCode::Rebinding), Some(DhcpOption::Rebinding(3150)));
    assert_eq!(option(OptionCode::InterfaceMtu), Some(DhcpOption::InterfaceMtu(1450)));
    assert_eq!(
        option(OptionCode::DomainName),
        Some(DhcpOption::DomainName("int.example.org".into()))
    );
    assert_eq!(option(OptionCode::ClasslessStaticRoute), None, "nobody asked");
    let unicast = Delivery::Frame { mac: MacAddr(MAC), address: ADDRESS };
    assert_eq!(offer.delivery, unicast);
    assert!(offer.message.len() >= 300);
}

#[test]
fn only_what_is_asked_for_is_told_besides_the_necessary() {
    let wanted = vec![OptionCode::ClasslessStaticRoute, OptionCode::Hostname];
    let offer = ask(MessageType::Discover, |message| {
        message.opts_mut().insert(DhcpOption::ParameterRequestList(wanted));
    });
    let message = read(&offer.unwrap());
    assert!(message.opts().contains(OptionCode::ClasslessStaticRoute));
    assert_eq!(message.opts().get(OptionCode::Hostname), Some(&DhcpOption::Hostname("web".into())));
    assert!(message.opts().contains(OptionCode::SubnetMask));
    assert!(!message.opts().contains(OptionCode::DomainNameServer));
}

#[test]
fn search_list_and_time_servers_are_told_to_who_asks() {
    let wanted = vec![OptionCode::DomainSearch, OptionCode::NtpServers];
    let offer = ask(MessageType::Discover, |message| {
        message.opts_mut().insert(DhcpOption::ParameterRequestList(wanted));
    });
    let message = read(&offer.unwrap());
    let Some(DhcpOption::DomainSearch(search)) = message.opts().get(OptionCode::DomainSearch)
    else {
        panic!("{message}")
    };
    let search: Vec<String> = search.iter().map(ToString::to_string).collect();
    assert_eq!(search, ["int.example.org.", "example.org."]);
    assert_eq!(
        message.opts().get(OptionCode::NtpServers),
        Some(&DhcpOption::NtpServers(vec![Ipv4Addr::new(192, 0, 2, 123)]))
    );
}

#[test]
fn every_state_of_a_client_gets_its_answer() {
    let selecting = |asked: Ipv4Addr| {
        ask(MessageType::Request, |message| {
            message.opts_mut().insert(DhcpOption::ServerIdentifier(SERVER));
            message.opts_mut().insert(DhcpOption::RequestedIpAddress(asked));
        })
    };
    let rebooted = |asked: Ipv4Addr| {
        ask(MessageType::Request, |message| {
            message.opts_mut().insert(DhcpOption::RequestedIpAddress(asked));
        })
    };
    let renewing = |held: Ipv4Addr| {
        ask(MessageType::Request, |message| {
            message.set_ciaddr(held);
        })
    };
    let other = Ipv4Addr::new(10, 0, 0, 99);
    for (answer, expected) in [
        (selecting(ADDRESS), MessageType::Ack),
        (selecting(other), MessageType::Nak),
        (rebooted(ADDRESS), MessageType::Ack),
        (rebooted(other), MessageType::Nak),
        (renewing(ADDRESS), MessageType::Ack),
        (renewing(other), MessageType::Nak),
    ] {
        let answer = answer.unwrap();
        assert_eq!(kind(&answer), expected);
        assert_eq!(answer.refusal, expected == MessageType::Nak);
        if answer.refusal {
            let everybody =
                Delivery::Frame { mac: MacAddr([0xff; 6]), address: Ipv4Addr::BROADCAST };
            assert_eq!(
                (answer.delivery, read(&answer).yiaddr()),
                (everybody, Ipv4Addr::UNSPECIFIED)
            );
        }
    }
    assert_eq!(ask(MessageType::Request, |_| {}), Err(Ignored::Malformed));
    let elsewhere = ask(MessageType::Request, |message| {
        message.opts_mut().insert(DhcpOption::ServerIdentifier(other));
        message.opts_mut().insert(DhcpOption::RequestedIpAddress(ADDRESS));
    });
    assert_eq!(elsewhere, Err(Ignored::OtherServer));
    assert_eq!(ask(MessageType::Decline, |_| {}), Err(Ignored::Declined));
    assert_eq!(ask(MessageType::Release, |_| {}), Err(Ignored::Released));
    assert_eq!(ask(MessageType::Offer, |_| {}), Err(Ignored::Malformed));
}

#[test]
fn an_inform_gets_settings_and_no_lease() {
    let ack = ask(MessageType::Inform, |message| {
        message.set_ciaddr(Ipv4Addr::new(10, 0, 0, 77));
    });
    let message = read(&ack.unwrap());
    assert_eq!(message.yiaddr(), Ipv4Addr::UNSPECIFIED);
    assert!(message.opts().contains(OptionCode::Router));
    assert!(!message.opts().contains(OptionCode::AddressLeaseTime));
}

#[test]
fn an_unknown_client_and_a_server_get_no_answer() {
    let mut stranger = request(MessageType::Discover, |_| {});
    stranger[33] = 9;
    assert_eq!(answer(&table(), &stranger), Err(Ignored::UnknownClient));
    let mut reply = request(MessageType::Discover, |_| {});
    reply[0] = 2;
    assert_eq!(answer(&table(), &reply), Err(Ignored::Malformed));
}

#[test]
fn the_broadcast_flag_the_client_id_and_a_relay_are_honoured() {
    let flagged = ask(MessageType::Discover, |message| {
        message.set_flags(Flags::default().set_broadcast());
        message.opts_mut().insert(DhcpOption::ClientIdentifier(vec![1, 2, 3]));
    })
    .unwrap();
    let everybody = Delivery::Frame { mac: MacAddr([0xff; 6]), address: Ipv4Addr::BROADCAST };
    assert_eq!(flagged.delivery, everybody);
    let echoed = read(&flagged);
    assert_eq!(
        echoed.opts().get(OptionCode::ClientIdentifier),
        Some(&DhcpOption::ClientIdentifier(vec![1, 2, 3]))
    );
    let relay = Ipv4Addr::new(10, 0, 0, 250);
    let relayed = ask(MessageType::Discover, |message| {
        message.set_giaddr(relay);
        let mut information = relay::RelayAgentInformation::default();
        information.insert(relay::RelayInfo::AgentCircuitId(vec![9, 9]));
        message.opts_mut().insert(DhcpOption::RelayAgentInformation(information));
    })
    .unwrap();
    assert_eq!(relayed.delivery, Delivery::Relay(relay));
    assert!(read(&relayed).opts().contains(OptionCode::RelayAgentInformation));
    assert_eq!(relayed.frame(MacAddr(MAC)), None);
}

#[test]
fn extra_options_replace_the_subnets_and_name_the_boot_server() {
    let mut table = table();
    let client = table.clients.get_mut(&MacAddr(MAC)).unwrap();
    client.options =
        [(6, vec![8, 8, 8, 8]), (67, b"boot.efi".to_vec()), (51, 60_u32.to_be_bytes().to_vec())]
            .into();
    client.next_server = Some(Ipv4Addr::new(10, 0, 0, 9));
    let offer = answer(&table, &request(MessageType::Discover, |_| {})).unwrap();
    let message = read(&offer);
    assert_eq!(message.siaddr(), Ipv4Addr::new(10, 0, 0, 9));
    assert_eq!(message.fname_str().unwrap().unwrap().trim_end_matches('\0'), "boot.efi");
    let option = |code| message.opts().get(code).cloned();
    assert_eq!(
        option(OptionCode::DomainNameServer),
        Some(DhcpOption::DomainNameServer(vec![Ipv4Addr::new(8, 8, 8, 8)]))
    );
    assert_eq!(option(OptionCode::AddressLeaseTime), Some(DhcpOption::AddressLeaseTime(60)));
    assert_eq!(option(OptionCode::Renewal), Some(DhcpOption::Renewal(30)));
}

#[test]
fn an_answer_fits_what_the_client_takes() {
    let mut table = table();
    table.clients.get_mut(&MacAddr(MAC)).unwrap().options =
        (200..220).map(|code| (code, vec![7; 200])).collect();
    let small = answer(&table, &request(MessageType::Discover, |_| {})).unwrap();
    assert!(small.message.len() <= 548, "{}", small.message.len());
    let large = request(MessageType::Discover, |message| {
        message.opts_mut().insert(DhcpOption::MaxMessageSize(9000));
    });
    let large = answer(&table, &large).unwrap();
    assert!((1000..=1422).contains(&large.message.len()), "{}", large.message.len());
    assert!(read(&large).opts().contains(OptionCode::AddressLeaseTime));
}

#[test]
fn frames_have_right_checksums() {
    let offer = ask(MessageType::Discover, |_| {}).unwrap();
    let frame = offer.frame(MacAddr([2, 0, 0, 0, 0, 1])).unwrap();
    assert_eq!((&frame[..6], &frame[6..12]), (&MAC[..], &[2, 0, 0, 0, 0, 1][..]));
    let (ip, udp) = frame[14..].split_at(20);
    assert_eq!(ones(ip, 0), 0xffff);
    let length = u32::try_from(udp.len()).unwrap();
    assert_eq!(ones(udp, ones(&ip[12..20], 0) + 17 + length), 0xffff);
    assert_eq!(&udp[8..], offer.message);
}

fn ones(bytes: &[u8], start: u32) -> u32 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_are_answered_or_ignored(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        drop(answer(&table(), &bytes));
    }

    #[test]
    fn a_damaged_request_is_answered_well_or_ignored(
        kind in 1_u8..=8,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
        extra in prop::collection::vec((1_u8..255, prop::collection::vec(any::<u8>(), 0..40)), 0..6),
    ) {
        let mut bytes = request(MessageType::from(kind), |message| {
            for (code, value) in extra {
                message.opts_mut().insert(DhcpOption::Unknown(UnknownOption::new(code.into(), value)));
            }
            message.opts_mut().insert(DhcpOption::MessageType(MessageType::from(kind)));
        });
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        for bytes in [&bytes[..], &bytes[..cut.index(bytes.len())]] {
            if let Ok(answer) = answer(&table(), bytes) {
                let message = read(&answer);
                prop_assert!(answer.message.len() <= 1422);
                prop_assert!([ADDRESS, Ipv4Addr::UNSPECIFIED].contains(&message.yiaddr()));
                drop(answer.frame(MacAddr(MAC)));
            }
        }
    }
}
