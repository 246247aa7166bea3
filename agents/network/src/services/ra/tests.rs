use std::net::Ipv6Addr;

use proptest::prelude::*;
use stackhand_model::MacAddr;

use super::*;

const GUEST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9);

#[test]
fn an_advertisement_has_its_parts_where_the_standard_wants_them() {
    let advert = Advert {
        mtu: 1450,
        managed: false,
        other: true,
        prefixes: vec![Prefix { net: "2001:db8::/64".parse().unwrap(), autonomous: true }],
        dns: vec!["2001:db8::53".parse().unwrap()],
        search: vec!["int.example.org".into()],
        routes: vec!["fe80::a9fe:a9fe/128".parse().unwrap()],
    };
    let bytes = advert.bytes(MacAddr([2, 0, 0, 0, 0, 1]));
    assert_eq!((bytes[0], bytes[5]), (134, 0x40));
    let mut options = Vec::new();
    let mut rest = &bytes[16..];
    while let [kind, units, ..] = rest {
        options.push((*kind, usize::from(*units) * 8));
        rest = &rest[usize::from(*units) * 8..];
    }
    assert_eq!(options, [(1, 8), (5, 8), (3, 32), (24, 24), (25, 24), (31, 32)]);
    assert_eq!(bytes[16..24], [1, 1, 2, 0, 0, 0, 0, 1]);
    assert_eq!(bytes[34..36], [64, 0xc0], "on the link, addresses are made of it");
    let bare = Advert::default().bytes(MacAddr([2, 0, 0, 0, 0, 1]));
    assert_eq!(bare.len(), 24, "no option without a value");
}

#[test]
fn a_solicitation_comes_from_the_link_and_is_whole() {
    let with_source = [133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0, 9];
    assert!(is_solicitation(&with_source, GUEST, 255));
    assert!(is_solicitation(&with_source[..8], Ipv6Addr::UNSPECIFIED, 255));
    assert!(!is_solicitation(&with_source, Ipv6Addr::UNSPECIFIED, 255), "no address, no link");
    assert!(!is_solicitation(&with_source, GUEST, 64), "it was forwarded");
    assert!(!is_solicitation(&with_source[..12], GUEST, 255), "an option is cut");
    let endless = [133, 0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0, 9];
    assert!(!is_solicitation(&endless, GUEST, 255), "an option of no length");
    let advert = Advert::default().bytes(MacAddr([2; 6]));
    assert!(!is_solicitation(&advert, GUEST, 255));
}

proptest! {
    #[test]
    fn any_bytes_are_a_solicitation_or_not(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = bytes;
        if let Some(first) = bytes.first_mut() {
            *first = 133;
        }
        prop_assert!(!is_solicitation(&bytes, GUEST, 255) || bytes.len() >= 8);
    }
}
