//! Numbers and addresses of networks that have narrower ranges than their Rust carriers.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// An Ethernet address, written `fa:16:3e:00:00:01`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

/// Text that is not an Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address such as fa:16:3e:00:00:01")]
pub struct InvalidMac(pub String);

impl MacAddr {
    /// Whether the address names a group of stations, which no port may have as its own.
    #[must_use]
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 == 1
    }

    /// The lower half of the IPv6 addresses that its owner gives itself (RFC 4291, appendix A).
    #[must_use]
    pub fn interface_id(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f])
    }

    /// The link-local address that its owner gives itself.
    #[must_use]
    pub fn link_local(self) -> Ipv6Addr {
        Ipv6Addr::from(0xfe80 << 112 | u128::from(self.interface_id()))
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for MacAddr {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidMac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(invalid)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        if parts.next().is_some() {
            return Err(invalid());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for MacAddr {
    type Error = InvalidMac;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl JsonSchema for MacAddr {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "MacAddr".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": "^([0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}$"})
    }
}

macro_rules! bounded {
    ($(#[$doc:meta])* $name:ident, $invalid:ident, $carrier:ty, $max:expr, $what:literal) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
        )]
        #[serde(try_from = "u32", into = "u32")]
        #[schemars(with = "u32", extend("minimum" = 1, "maximum" = $max))]
        pub struct $name($carrier);

        #[doc = concat!("A number that is not a ", $what, ".")]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
        #[error("{} {} is outside 1..={}", $what, .0, $max)]
        pub struct $invalid(pub u32);

        impl TryFrom<u32> for $name {
            type Error = $invalid;

            fn try_from(raw: u32) -> Result<Self, Self::Error> {
                if raw == 0 || raw > $max {
                    return Err($invalid(raw));
                }
                <$carrier>::try_from(raw).map(Self).map_err(|_| $invalid(raw))
            }
        }

        impl From<$name> for u32 {
            fn from(number: $name) -> Self {
                Self::from(number.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

bounded! {
    /// A VXLAN or Geneve network identifier: 24 bits, zero reserved.
    Vni, InvalidVni, u32, 0x00ff_ffff_u32, "VNI"
}
bounded! {
    /// An IEEE 802.1Q VLAN id: 1 to 4094.
    VlanId, InvalidVlan, u16, 4094_u32, "VLAN id"
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_link_local_address_follows_from_the_ethernet_address() {
        let mac = MacAddr([0xfa, 0x16, 0x3e, 0x12, 0x34, 0x56]);
        assert_eq!(mac.link_local().to_string(), "fe80::f816:3eff:fe12:3456");
    }

    #[test]
    fn text_that_is_not_a_mac_is_refused() {
        for text in [
            "",
            "fa:16:3e:00:00",
            "fa:16:3e:00:00:01:02",
            "fa:16:3e:0:0:1",
            "xx:16:3e:00:00:01",
            "+a:16:3e:00:00:01x",
        ] {
            assert!(text.parse::<MacAddr>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn numbers_outside_the_range_are_refused() {
        assert_eq!(Vni::try_from(0), Err(InvalidVni(0)));
        assert_eq!(Vni::try_from(0x0100_0000), Err(InvalidVni(0x0100_0000)));
        assert_eq!(
            VlanId::try_from(4095).unwrap_err().to_string(),
            "VLAN id 4095 is outside 1..=4094"
        );
        assert_eq!(u32::from(VlanId::try_from(4094).unwrap()), 4094);
    }

    proptest! {
        #[test]
        fn a_mac_round_trips_through_text(bytes: [u8; 6]) {
            prop_assert_eq!(MacAddr(bytes).to_string().parse(), Ok(MacAddr(bytes)));
        }

        #[test]
        fn any_text_is_a_mac_or_an_error(text in "\\PC{0,20}") {
            let _parsed = text.parse::<MacAddr>();
        }
    }
}
