//! Ports of a floating IP that lead inside, single or in ranges.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::spec::{Broken, broken};

/// External ports led to as many internal ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortForwarding {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Port of the floating IP, or a range such as `8000:8010`.
    pub external_port: PortRange,
    /// Address it leads to.
    pub internal_address: IpAddr,
    /// Port it leads to; for a range, a range of as many, the first led to the first.
    pub internal_port: PortRange,
}

impl PortForwarding {
    /// The protocol's IANA number.
    #[must_use]
    pub fn protocol_number(&self) -> u8 {
        if self.protocol == "udp" { 17 } else { 6 }
    }

    /// Each external port with the one it leads to.
    pub fn pairs(&self) -> impl Iterator<Item = (u16, u16)> {
        self.external_port.ports().zip(self.internal_port.ports())
    }

    /// What is wrong with one of a floating IP's, given those before it.
    pub(super) fn check(&self, before: &[Self]) -> Result<(), Broken> {
        if !matches!(self.protocol.as_str(), "tcp" | "udp") {
            return broken("protocol", "must be tcp or udp");
        }
        let (external, internal) = (self.external_port, self.internal_port);
        if external.len() != internal.len() {
            return broken(
                "internal_port",
                format!(
                    "{internal} has {} ports, external_port {external} has {}; give as many",
                    internal.len(),
                    external.len()
                ),
            );
        }
        let taken = before.iter().find(|other| {
            other.protocol == self.protocol && other.external_port.overlaps(external)
        });
        match taken {
            Some(other) if other.external_port == external => {
                broken("external_port", format!("{external} is listed twice"))
            }
            Some(other) => {
                broken("external_port", format!("{external} overlaps {}", other.external_port))
            }
            None => Ok(()),
        }
    }
}

/// A port, or ports that follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

/// What is not a port or a range of ports.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a port, 1 to 65535, nor a range of ports such as 8000:8010")]
pub struct InvalidPorts(String);

impl PortRange {
    /// Its ports, lowest first.
    pub fn ports(self) -> impl Iterator<Item = u16> {
        self.first..=self.last
    }

    /// How many they are.
    #[expect(clippy::len_without_is_empty, reason = "there is always one")]
    #[must_use]
    pub fn len(self) -> usize {
        usize::from(self.last - self.first) + 1
    }

    fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl FromStr for PortRange {
    type Err = InvalidPorts;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (first, last) = text.split_once(':').unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if 0 < first && first <= last => Ok(Self { first, last }),
            _ => Err(InvalidPorts(text.to_owned())),
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.len() {
            1 => self.first.fmt(f),
            _ => write!(f, "{}:{}", self.first, self.last),
        }
    }
}

impl Serialize for PortRange {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.len() {
            1 => serializer.serialize_u16(self.first),
            _ => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for PortRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Ports;

        impl Visitor<'_> for Ports {
            type Value = PortRange;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a port, 1 to 65535, or a range of ports such as 8000:8010")
            }

            fn visit_u64<E: de::Error>(self, port: u64) -> Result<PortRange, E> {
                self.visit_str(&port.to_string())
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<PortRange, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(Ports)
    }
}

impl JsonSchema for PortRange {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "PortRange".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [
            {"type": "integer", "minimum": 1, "maximum": 65535},
            {"type": "string", "pattern": "^[0-9]{1,5}(:[0-9]{1,5})?$"},
        ]})
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn forwarding(external: &Value, internal: &Value) -> Result<PortForwarding, String> {
        let value = json!({
            "protocol": "tcp", "external_port": external,
            "internal_address": "10.0.0.5", "internal_port": internal,
        });
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    #[test]
    fn a_port_is_a_number_and_a_range_is_text_both_ways() {
        for value in [json!(80), json!("8000:8010"), json!(65535)] {
            let range: PortRange = serde_json::from_value(value.clone()).unwrap();
            assert_eq!(serde_json::to_value(range).unwrap(), value);
        }
        let one: PortRange = serde_json::from_value(json!("80")).unwrap();
        assert_eq!(serde_json::to_value(one).unwrap(), json!(80));
        let last = forwarding(&json!("65534:65535"), &json!("1:2")).unwrap();
        assert_eq!(last.pairs().collect::<Vec<_>>(), [(65534, 1), (65535, 2)]);
    }

    #[test]
    fn what_is_no_port_is_refused_in_words() {
        for value in
            [json!(0), json!(65536), json!("0:5"), json!("9:8"), json!("a"), json!("1:2:3")]
        {
            let error = forwarding(&value, &json!(80)).unwrap_err();
            assert!(error.contains("a range of ports such as 8000:8010"), "{value}: {error}");
        }
        assert!(forwarding(&json!(-1), &json!(80)).is_err());
        assert!(forwarding(&json!(null), &json!(80)).is_err());
    }

    #[test]
    fn ranges_have_as_many_ports_on_both_sides_and_do_not_overlap() {
        let problem = |forwarding: &PortForwarding, before: &[PortForwarding]| {
            forwarding.check(before).unwrap_err()
        };
        let range = forwarding(&json!("8000:8010"), &json!("80:90")).unwrap();
        assert!(range.check(&[]).is_ok());
        let uneven = forwarding(&json!("8000:8010"), &json!(80)).unwrap();
        let (field, text) = problem(&uneven, &[]);
        assert_eq!(field, "internal_port");
        assert!(text.contains("80 has 1 ports, external_port 8000:8010 has 11"), "{text}");
        let inside = forwarding(&json!(8010), &json!(22)).unwrap();
        let (field, text) = problem(&inside, std::slice::from_ref(&range));
        assert_eq!((&*field, &*text), ("external_port", "8010 overlaps 8000:8010"));
        let udp = PortForwarding { protocol: "udp".into(), ..inside };
        assert!(udp.check(&[range]).is_ok(), "another protocol has its own ports");
    }
}
