//! Answers read back by the library, and bytes that make no sense.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use proptest::prelude::*;

use super::*;

fn zone() -> Zone {
    let mut zone = Zone {
        domain: "int.example.org".into(),
        servers: ["10.0.0.2".parse().unwrap()].into(),
        nets: ["10.0.0.0/24".parse().unwrap(), "2001:db8::/64".parse().unwrap()].into(),
        forwarders: vec!["192.0.2.53".parse().unwrap()],
        ..Zone::default()
    };
    zone.add("Web", "10.0.0.7".parse().unwrap());
    zone.add("web", "2001:db8::7".parse().unwrap());
    for last in 100..200 {
        zone.add("many", IpAddr::from([10, 0, 0, last]));
    }
    zone
}

fn query(name: &str, kind: RecordType, fill: impl FnOnce(&mut Message)) -> Vec<u8> {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    fill(&mut message);
    message.to_vec().unwrap()
}

fn ask_by(name: &str, kind: RecordType, by: Transport, fill: impl FnOnce(&mut Message)) -> Message {
    match decide(&zone(), &query(name, kind, fill), by) {
        Decision::Answer(bytes) => Message::from_vec(&bytes).unwrap(),
        other => panic!("{name}: {other:?}"),
    }
}

fn ask(name: &str, kind: RecordType) -> Message {
    ask_by(name, kind, Transport::Udp, |_| {})
}

fn told(message: &Message) -> Vec<String> {
    message.answers.iter().map(|record| record.data.to_string()).collect()
}

#[test]
fn names_of_ports_are_answered_whatever_their_case() {
    let answer = ask("wEb.Int.Example.Org.", RecordType::A);
    assert_eq!(told(&answer), ["10.0.0.7"]);
    assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
    assert_eq!(answer.metadata.id, 77);
    assert_eq!(told(&ask("web.int.example.org.", RecordType::AAAA)), ["2001:db8::7"]);
    assert_eq!(told(&ask("web.", RecordType::A)), ["10.0.0.7"], "a bare host name does, too");
}

#[test]
fn addresses_of_ports_have_reverse_names() {
    assert_eq!(told(&ask("7.0.0.10.in-addr.arpa.", RecordType::PTR)), ["web.int.example.org."]);
    let six = Name::from("2001:db8::7".parse::<std::net::Ipv6Addr>().unwrap()).to_string();
    assert_eq!(told(&ask(&six, RecordType::PTR)), ["web.int.example.org."]);
    let free = ask("8.0.0.10.in-addr.arpa.", RecordType::PTR);
    assert_eq!(free.metadata.response_code, ResponseCode::NXDomain, "ours, but nobody's");
}

#[test]
fn what_is_ours_and_not_there_is_denied_with_the_time_to_keep_that() {
    for (name, kind, code) in [
        ("nobody.int.example.org.", RecordType::A, ResponseCode::NXDomain),
        ("a.web.int.example.org.", RecordType::A, ResponseCode::NXDomain),
        ("web.int.example.org.", RecordType::MX, ResponseCode::NoError),
        ("int.example.org.", RecordType::A, ResponseCode::NoError),
    ] {
        let answer = ask(name, kind);
        assert_eq!(answer.metadata.response_code, code, "{name}");
        assert_eq!(answer.answers, [], "{name}");
        assert!(matches!(answer.authorities[0].data, RData::SOA(_)), "{name}");
    }
    assert_eq!(ask("int.example.org.", RecordType::SOA).answers.len(), 1);
    assert_eq!(ask("int.example.org.", RecordType::NS).answers.len(), 1);
    assert!(matches!(
        ask("web.int.example.org.", RecordType::ANY).answers[0].data,
        RData::HINFO(_)
    ));
}

#[test]
fn everything_else_goes_to_others_or_is_refused() {
    let foreign = query("www.example.com.", RecordType::A, |_| {});
    let Decision::Forward { failure } = decide(&zone(), &foreign, Transport::Udp) else {
        panic!("not forwarded")
    };
    let failure = Message::from_vec(&failure).unwrap();
    assert_eq!(failure.metadata.response_code, ResponseCode::ServFail);
    let alone = Zone { forwarders: Vec::new(), ..zone() };
    let Decision::Answer(refused) = decide(&alone, &foreign, Transport::Udp) else {
        panic!("nobody to ask")
    };
    let refused = Message::from_vec(&refused).unwrap();
    assert_eq!(refused.metadata.response_code, ResponseCode::Refused);
    for name in ["9.0.0.11.in-addr.arpa.", "other."] {
        let query = query(name, RecordType::PTR, |_| {});
        assert!(matches!(decide(&zone(), &query, Transport::Udp), Decision::Forward { .. }));
    }
}

#[test]
fn an_answer_that_does_not_fit_is_cut_and_whole_by_tcp() {
    let cut = ask("many.int.example.org.", RecordType::A);
    assert!(cut.metadata.truncation && cut.answers.is_empty());
    let whole = ask_by("many.int.example.org.", RecordType::A, Transport::Tcp, |_| {});
    assert_eq!((whole.answers.len(), whole.metadata.truncation), (100, false));
    let with_edns = |message: &mut Message| {
        let mut edns = Edns::new();
        edns.set_max_payload(65_535);
        message.set_edns(edns);
    };
    let larger = ask_by("web.int.example.org.", RecordType::A, Transport::Udp, with_edns);
    assert_eq!(larger.edns.unwrap().max_payload(), 1232, "we say what we send at most");
}

#[test]
fn what_makes_no_sense_is_refused_or_dropped() {
    let versioned = ask_by("web.", RecordType::A, Transport::Udp, |message| {
        let mut edns = Edns::new();
        edns.set_version(1);
        message.set_edns(edns);
    });
    let high = versioned.edns.as_ref().unwrap().rcode_high();
    assert_eq!(high, 1, "BADVERS is 16");
    let update = ask_by("web.", RecordType::A, Transport::Udp, |message| {
        message.metadata.op_code = OpCode::Notify;
    });
    assert_eq!(update.metadata.response_code, ResponseCode::NotImp);
    let two = ask_by("web.", RecordType::A, Transport::Udp, |message| {
        message.add_query(Query::query(Name::root(), RecordType::A));
    });
    assert_eq!(two.metadata.response_code, ResponseCode::FormErr);
    assert_eq!(
        ask("int.example.org.", RecordType::AXFR).metadata.response_code,
        ResponseCode::Refused
    );
    let mut response = query("web.", RecordType::A, |_| {});
    response[2] |= 0x80;
    assert_eq!(decide(&zone(), &response, Transport::Udp), Decision::Drop, "no ping-pong");
    assert_eq!(decide(&zone(), &[1, 2, 3], Transport::Udp), Decision::Drop);
}

#[test]
fn only_clients_of_the_network_are_served() {
    let zone = zone();
    for (client, served) in [
        ("10.0.0.9", true),
        ("2001:db8::1:2", true),
        ("fe80::1", true),
        ("10.0.1.9", false),
        ("2001:db8:1::2", false),
    ] {
        assert_eq!(zone.serves(client.parse().unwrap()), served, "{client}");
    }
    assert_eq!(host_name_of("2001:db8::5".parse().unwrap()), "host-2001-db8--5");
    assert_eq!(host_name_of("2001:db8::".parse().unwrap()), "host-2001-db8");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_bytes_are_decided(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        drop(decide(&zone(), &bytes, Transport::Udp));
    }

    #[test]
    fn a_damaged_query_is_decided_and_its_answer_can_be_read(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        name in prop::sample::select(vec!["web.int.example.org.", "7.0.0.10.in-addr.arpa.", "."]),
        kind in any::<u16>(),
    ) {
        let mut bytes = query(name, RecordType::from(kind), |_| {});
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Decision::Answer(answer) = decide(&zone(), &bytes, Transport::Udp) {
            prop_assert!(answer.len() <= 1232);
            prop_assert!(Message::from_vec(&answer).is_ok());
        }
    }
}
