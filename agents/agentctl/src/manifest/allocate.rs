//! Choosing what a manifest leaves open: addresses and segment numbers.
//!
//! Pure and deterministic: the same documents give the same choices on every controller. What is
//! taken is known from the documents that agents hold; the lowest free value is chosen.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use stackhand_model::{Ipv6Mode, MacAddr, NetworkType, Subnet};
use uuid::Uuid;

/// Most addresses that are looked at for a free one. Pools larger than this have one long before.
const MOST_LOOKED_AT: u128 = 1 << 20;

/// The Ethernet address of the port with this id: OpenStack's prefix and 24 bits of the id.
///
/// `attempt` gives further choices, for the rare case of two ids with the same 24 bits.
pub(crate) fn mac(id: Uuid, attempt: u8) -> MacAddr {
    // The last bytes of a version 5 id are hash bits without fixed ones among them.
    let bytes = id.as_bytes();
    MacAddr([0xfa, 0x16, 0x3e, bytes[13], bytes[14], bytes[15].wrapping_add(attempt)])
}

/// The lowest free address of a subnet's pools.
pub(crate) fn lowest_free(subnet: &Subnet, taken: &BTreeSet<IpAddr>) -> Option<IpAddr> {
    let pools: Vec<(u128, u128)> = if subnet.pools.is_empty() {
        vec![hosts(&subnet.cidr)]
    } else {
        subnet.pools.iter().map(|pool| (number(pool.start), number(pool.end))).collect()
    };
    pools.into_iter().find_map(|(start, end)| {
        (start..=end.min(start.saturating_add(MOST_LOOKED_AT)))
            .map(|candidate| address(&subnet.cidr, candidate))
            .find(|candidate| Some(*candidate) != subnet.gateway && !taken.contains(candidate))
    })
}

/// The address that a guest with this Ethernet address gives itself (RFC 4291, EUI-64).
pub(crate) fn eui64(cidr: &IpNet, mac: MacAddr) -> IpAddr {
    address(cidr, number(cidr.network()) | u128::from(mac.interface_id()))
}

/// Whether guests of this subnet choose their addresses themselves.
pub(crate) fn is_self_addressed(subnet: &Subnet) -> bool {
    matches!(subnet.ipv6_mode, Some(Ipv6Mode::Slaac | Ipv6Mode::Dhcpv6Stateless))
}

/// The largest segment number of a type of network; 0 where there is none.
pub(crate) fn largest_segment(network_type: NetworkType) -> u32 {
    match network_type {
        NetworkType::Local | NetworkType::Flat => 0,
        NetworkType::Vlan => 4094,
        NetworkType::Vxlan | NetworkType::Geneve => 0x00ff_ffff,
        NetworkType::Gre => u32::MAX,
    }
}

/// The lowest free segment number, from 1.
pub(crate) fn lowest_segment(network_type: NetworkType, taken: &BTreeSet<u32>) -> Option<u32> {
    (1..=largest_segment(network_type)).find(|segment| !taken.contains(segment))
}

/// First and last address that a host may have.
fn hosts(cidr: &IpNet) -> (u128, u128) {
    let (first, last) = (number(cidr.network()), number(cidr.broadcast()));
    match cidr {
        // Point-to-point and single-host ranges have no network or broadcast address.
        IpNet::V4(net) if net.prefix_len() >= 31 => (first, last),
        IpNet::V4(_) => (first + 1, last - 1),
        // The first is the routers' anycast address.
        IpNet::V6(net) if net.prefix_len() >= 127 => (first, last),
        IpNet::V6(_) => (first + 1, last),
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn address(cidr: &IpNet, number: u128) -> IpAddr {
    match cidr {
        // Pools and ranges of an IPv4 subnet never leave 32 bits.
        IpNet::V4(_) => Ipv4Addr::from_bits(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        IpNet::V6(_) => Ipv6Addr::from_bits(number).into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use stackhand_model::Pool;

    use super::*;

    fn subnet(cidr: &str, gateway: Option<&str>, pools: &[(&str, &str)]) -> Subnet {
        Subnet {
            name: "s".parse().unwrap(),
            cidr: cidr.parse().unwrap(),
            gateway: gateway.map(|it| it.parse().unwrap()),
            pools: pools
                .iter()
                .map(|(start, end)| Pool {
                    start: start.parse().unwrap(),
                    end: end.parse().unwrap(),
                })
                .collect(),
            dhcp: true,
            dhcp_address: None,
            dns_servers: vec![],
            host_routes: vec![],
            ipv6_mode: None,
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_lowest_free_address_is_taken_and_never_the_gateway() {
        let whole = subnet("192.168.0.0/29", Some("192.168.0.1"), &[]);
        let mut taken = BTreeSet::new();
        let mut given = Vec::new();
        while let Some(address) = lowest_free(&whole, &taken) {
            given.push(address.to_string());
            taken.insert(address);
        }
        let expected = ["192.168.0.2", "192.168.0.3", "192.168.0.4", "192.168.0.5", "192.168.0.6"];
        assert_eq!(given, expected);
    }

    #[test]
    fn pools_are_used_in_their_order() {
        let pools = [("10.0.0.210", "10.0.0.211"), ("10.0.0.5", "10.0.0.5")];
        let pooled = subnet("10.0.0.0/24", None, &pools);
        let mut taken = BTreeSet::from([ip("10.0.0.210")]);
        assert_eq!(lowest_free(&pooled, &taken), Some(ip("10.0.0.211")));
        taken.insert(ip("10.0.0.211"));
        assert_eq!(lowest_free(&pooled, &taken), Some(ip("10.0.0.5")));
        taken.insert(ip("10.0.0.5"));
        assert_eq!(lowest_free(&pooled, &taken), None);
    }

    #[test]
    fn ipv6_subnets_are_looked_at_within_bounds() {
        let wide = subnet("fd00::/64", Some("fd00::1"), &[]);
        assert_eq!(lowest_free(&wide, &BTreeSet::new()), Some(ip("fd00::2")));
        let mac: MacAddr = "fa:16:3e:00:00:01".parse().unwrap();
        assert_eq!(eui64(&wide.cidr, mac), ip("fd00::f816:3eff:fe00:1"));
        let single = subnet("10.0.0.7/32", None, &[]);
        assert_eq!(lowest_free(&single, &BTreeSet::new()), Some(ip("10.0.0.7")));
    }

    #[test]
    fn segments_start_at_one_and_end_where_the_type_does() {
        let taken = BTreeSet::from([1, 2, 4]);
        assert_eq!(lowest_segment(NetworkType::Vxlan, &taken), Some(3));
        assert_eq!(lowest_segment(NetworkType::Vlan, &(1..=4094).collect()), None);
        assert_eq!(lowest_segment(NetworkType::Flat, &BTreeSet::new()), None);
    }

    proptest! {
        #[test]
        fn an_address_chosen_is_in_the_subnet_and_free(
            base: u32, length in 8_u8..=32, taken in proptest::collection::btree_set(0_u32..64, 0..64),
        ) {
            let net = ipnet::Ipv4Net::new(base.into(), length).unwrap().trunc();
            let taken: BTreeSet<IpAddr> = taken
                .into_iter()
                .map(|offset| Ipv4Addr::from_bits(net.network().to_bits().wrapping_add(offset)).into())
                .collect();
            let cidr = net.to_string();
            let gateway = net.hosts().next().unwrap().to_string();
            let subnet = subnet(&cidr, Some(&gateway), &[]);
            if let Some(chosen) = lowest_free(&subnet, &taken) {
                prop_assert!(subnet.cidr.contains(&chosen));
                prop_assert!(!taken.contains(&chosen));
                prop_assert_ne!(Some(chosen), subnet.gateway);
                // Nothing lower was free.
                for lower in net.hosts().take_while(|it| IpAddr::from(*it) < chosen) {
                    prop_assert!(taken.contains(&lower.into()) || subnet.gateway == Some(lower.into()));
                }
            } else {
                let free = net.hosts().find(|it| {
                    !taken.contains(&IpAddr::from(*it)) && subnet.gateway != Some((*it).into())
                });
                prop_assert_eq!(free, None);
            }
        }

        #[test]
        fn a_mac_is_unicast_and_follows_from_the_id(id: u128, attempt: u8) {
            let chosen = mac(Uuid::from_u128(id), attempt);
            prop_assert!(!chosen.is_multicast());
            prop_assert_eq!(chosen, mac(Uuid::from_u128(id), attempt));
            prop_assert_eq!(&chosen.0[..3], &[0xfa, 0x16, 0x3e]);
        }

        #[test]
        fn a_segment_chosen_is_free_and_lowest(taken in proptest::collection::btree_set(1_u32..50, 0..50)) {
            let chosen = lowest_segment(NetworkType::Vxlan, &taken).unwrap();
            prop_assert!(!taken.contains(&chosen));
            prop_assert!((1..chosen).all(|lower| taken.contains(&lower)));
        }
    }
}
