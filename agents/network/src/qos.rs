//! Quality of service: what a policy's limits mean for a port's link.
//!
//! Bandwidth is held by token buckets. What goes to the guest is what the port's tap sends: a bucket
//! at the tap's root. What comes from the guest is what the tap receives, which has no queue; it is
//! led through a second link, `ifb…`, whose root has one, and then goes on as received by the tap.
//! Both directions are shaped, not cut: a guest's TCP settles just below the limit.
//!
//! Buckets and redirects are settings of links like any other: layer 2 wishes, compares and sets
//! them ([`crate::l2::Set`]). Packet rates and DSCP marks are rules of the firewall's kind
//! ([`PacketRules`]).

use stackhand_kernel::netlink::Shaper;
use stackhand_model::{BandwidthLimit, Direction, ObjectRef, QosPolicySpec};

/// How long a packet waits at most in a full queue.
const LATENCY_MS: u64 = 50;

/// Room that a queue has at least, in packets of the largest size.
const LEAST_PACKETS: u64 = 16;

/// The bucket of a policy in one direction, on a link with this MTU.
#[must_use]
pub fn shaper(policy: &QosPolicySpec, direction: Direction, mtu: u32) -> Option<Shaper> {
    let limit = policy.bandwidth.iter().find(|limit| limit.direction == direction)?;
    Some(bucket(limit, mtu))
}

fn bucket(limit: &BandwidthLimit, mtu: u32) -> Shaper {
    // A kilobit is 125 bytes.
    let rate = u64::from(limit.max_kbps) * 125;
    // An Ethernet header and a VLAN's.
    let packet = u64::from(mtu) + 18;
    let wanted = limit.max_burst_kbit.map_or(rate * 4 / 5, |burst| u64::from(burst) * 125);
    // What is larger than the bucket would never pass.
    let burst = wanted.max(packet * 2);
    let waiting = (rate * LATENCY_MS / 1000).max(packet * LEAST_PACKETS);
    let fit = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
    Shaper { rate, burst: fit(burst), limit: fit(waiting) }
}

/// What is done to the packets of one port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketRules {
    /// The port.
    pub object: ObjectRef,
    /// Most packets a second to the guest.
    pub to_guest: Option<u32>,
    /// Most packets a second from the guest.
    pub from_guest: Option<u32>,
    /// The mark on what the guest sends.
    pub dscp: Option<u8>,
}

impl PacketRules {
    /// The rules of a policy; `None` if it has none.
    #[must_use]
    pub fn of(object: ObjectRef, policy: &QosPolicySpec) -> Option<Self> {
        let rate = |direction| {
            let limit = policy.packet_rate.iter().find(|limit| limit.direction == direction)?;
            Some(limit.max_kpps.saturating_mul(1000))
        };
        let rules = Self {
            object,
            to_guest: rate(Direction::Ingress),
            from_guest: rate(Direction::Egress),
            dscp: policy.dscp,
        };
        let any = rules.to_guest.is_some() || rules.from_guest.is_some() || rules.dscp.is_some();
        any.then_some(rules)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(max_kbps: u32, max_burst_kbit: Option<u32>) -> QosPolicySpec {
        QosPolicySpec {
            bandwidth: vec![BandwidthLimit {
                direction: Direction::Egress,
                max_kbps,
                max_burst_kbit,
            }],
            packet_rate: Vec::new(),
            dscp: None,
        }
    }

    #[test]
    fn a_limit_holds_in_its_own_direction_alone() {
        let policy = policy(8000, Some(800));
        let shaper = shaper(&policy, Direction::Egress, 1500).unwrap();
        assert_eq!(shaper, Shaper { rate: 1_000_000, burst: 100_000, limit: 50_000 });
        assert_eq!(super::shaper(&policy, Direction::Ingress, 1500), None);
    }

    #[test]
    fn the_default_burst_is_four_fifths_of_a_second() {
        let shaper = shaper(&policy(8000, None), Direction::Egress, 1500).unwrap();
        assert_eq!(shaper.burst, 800_000);
    }

    proptest! {
        #[test]
        fn a_packet_of_the_full_size_fits_any_bucket(
            kbps in 1..=u32::MAX, burst in prop::option::of(any::<u32>()), mtu in 576..=65535_u32,
        ) {
            let shaper = shaper(&policy(kbps, burst), Direction::Egress, mtu).unwrap();
            prop_assert!(shaper.rate > 0);
            prop_assert!(shaper.burst > mtu + 18 && shaper.limit > mtu + 18);
        }
    }
}
