//! What a guest is told about itself: by the metadata service, and on a config drive.
//!
//! One type for both, because the same guest may read either. The documents of an instance and of
//! its ports carry it, each for the agent that serves it: agents do not talk to one another.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::network::{Ipv6Mode, NetworkSpec, PortSpec, Route, Subnet};
use super::{Broken, broken};
use crate::Name;

/// Largest user data in bytes, before base64.
const MOST_USER_DATA: usize = 65_535;
/// Largest vendor data in bytes of JSON.
const MOST_VENDOR_DATA: usize = 65_535;
const MOST_KEYS: usize = 64;
const MOST_KEY_BYTES: usize = 16_384;
const MOST_ITEMS: usize = 128;

/// What a guest is told about itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestData {
    /// The instance's name. Absent: that of the document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Its host name, with a domain or without. Absent: made from its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// The project it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// The availability zone it runs in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub availability_zone: Option<String>,
    /// The name of its flavor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flavor: Option<String>,
    /// Its place among instances that were asked for together.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub launch_index: u32,
    /// Public keys, in OpenSSH's one-line form, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub keys: BTreeMap<String, String>,
    /// Data for cloud-init, base64 of at most 65,535 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// Free metadata.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// What the cloud's operator tells every guest, as an object.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub vendor_data: Map<String, Value>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// An address of a guest's interface, with what the guest needs to use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestAddress {
    /// The address and the length of its subnet's prefix, for example `192.168.0.7/24`.
    #[schemars(with = "String")]
    pub address: IpNet,
    /// How the guest gets it.
    pub by: AddressSource,
    /// Next hop of the subnet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// DNS servers of the subnet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns_servers: Vec<IpAddr>,
    /// Further routes of the subnet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
}

/// How a guest gets an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AddressSource {
    /// It sets the address itself, told by its metadata.
    Static,
    /// By DHCPv4.
    Dhcp,
    /// From router advertisements.
    Slaac,
    /// From router advertisements, other settings by DHCPv6.
    Dhcpv6Stateless,
    /// By DHCPv6.
    Dhcpv6Stateful,
}

impl Subnet {
    /// How a guest on this subnet gets its address.
    #[must_use]
    pub fn address_source(&self) -> AddressSource {
        match (self.cidr, self.dhcp, self.ipv6_mode) {
            (_, false, _) | (IpNet::V6(_), true, None) => AddressSource::Static,
            (IpNet::V4(_), true, _) => AddressSource::Dhcp,
            (IpNet::V6(_), true, Some(Ipv6Mode::Slaac)) => AddressSource::Slaac,
            (IpNet::V6(_), true, Some(Ipv6Mode::Dhcpv6Stateless)) => AddressSource::Dhcpv6Stateless,
            (IpNet::V6(_), true, Some(Ipv6Mode::Dhcpv6Stateful)) => AddressSource::Dhcpv6Stateful,
        }
    }
}

impl NetworkSpec {
    /// What a guest needs to use each address of its port. Addresses outside the network's subnets
    /// are left out.
    #[must_use]
    pub fn guest_addresses(&self, port: &PortSpec) -> Vec<GuestAddress> {
        let told = |fixed: &super::network::FixedIp| {
            let subnet = self.subnet(&fixed.subnet)?;
            Some(GuestAddress {
                address: IpNet::new(fixed.address, subnet.cidr.prefix_len()).ok()?,
                by: subnet.address_source(),
                gateway: subnet.gateway,
                dns_servers: subnet.dns_servers.clone(),
                routes: subnet.host_routes.clone(),
            })
        };
        port.fixed_ips.iter().filter_map(told).collect()
    }
}

impl GuestData {
    /// The user data as the guest gets it. `None` if there is none.
    #[must_use]
    pub fn user_data_bytes(&self) -> Option<Vec<u8>> {
        // The check of the document saw that it decodes.
        STANDARD.decode(self.user_data.as_deref()?).ok()
    }

    pub(crate) fn check(&self) -> Result<(), Broken> {
        if let Some(hostname) = &self.hostname
            && !is_domain_name(hostname)
        {
            return broken(
                "hostname",
                format!(
                    "{hostname:?} is not a host name (labels of letters, digits and hyphens, 1 to \
                     63 bytes each, joined by dots)"
                ),
            );
        }
        let words = [
            ("project", &self.project),
            ("availability_zone", &self.availability_zone),
            ("flavor", &self.flavor),
        ];
        for (field, word) in words {
            if let Some(word) = word
                && (!(1..=255).contains(&word.len()) || word.contains(char::is_control))
            {
                return broken(field, "must have 1 to 255 bytes and no control characters");
            }
        }
        self.check_keys()?;
        self.check_user_data()?;
        if self.metadata.len() > MOST_ITEMS {
            return broken("metadata", format!("has more than {MOST_ITEMS} items"));
        }
        for (key, value) in &self.metadata {
            if key.is_empty() || key.len() > 255 || value.len() > 255 {
                return broken(
                    format!("metadata.{key}"),
                    "a key has 1 to 255 bytes and a value at most 255",
                );
            }
        }
        if serde_json::to_vec(&self.vendor_data).map_or(0, |json| json.len()) > MOST_VENDOR_DATA {
            return broken("vendor_data", format!("is longer than {MOST_VENDOR_DATA} bytes"));
        }
        Ok(())
    }

    fn check_keys(&self) -> Result<(), Broken> {
        if self.keys.len() > MOST_KEYS {
            return broken("keys", format!("has more than {MOST_KEYS} keys"));
        }
        for (name, key) in &self.keys {
            let at = format!("keys.{name}");
            if !(1..=255).contains(&name.len()) || name.contains(char::is_control) {
                return broken(at, "a name has 1 to 255 bytes and no control characters");
            }
            if key.len() > MOST_KEY_BYTES {
                return broken(at, format!("is longer than {MOST_KEY_BYTES} bytes"));
            }
            if key.contains("PRIVATE KEY") {
                return broken(
                    at,
                    "is a private key; give the public one (the file that ends .pub)",
                );
            }
            let one_line = !key.trim_end().contains(char::is_control);
            if !one_line || key.split_whitespace().count() < 2 {
                return broken(
                    at,
                    "is not a public key in OpenSSH's form: one line such as `ssh-ed25519 AAAA… me`",
                );
            }
        }
        Ok(())
    }

    fn check_user_data(&self) -> Result<(), Broken> {
        let Some(data) = &self.user_data else { return Ok(()) };
        if data.len() > MOST_USER_DATA.div_ceil(3) * 4 {
            return broken("user_data", format!("is longer than {MOST_USER_DATA} bytes"));
        }
        match STANDARD.decode(data) {
            Ok(bytes) if bytes.len() > MOST_USER_DATA => {
                broken("user_data", format!("is longer than {MOST_USER_DATA} bytes"))
            }
            Ok(_) => Ok(()),
            Err(error) => broken("user_data", format!("is not base64 in one line: {error}")),
        }
    }
}

/// Whether `name` is one or more host names joined by dots.
pub(crate) fn is_domain_name(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(super::network::check::is_host_name)
}

/// Domains that a search list may name, in order, each once.
pub(crate) fn check_domains(field: &str, domains: &[String]) -> Result<(), Broken> {
    let mut seen = BTreeSet::new();
    for (index, domain) in domains.iter().enumerate() {
        let at = format!("{field}[{index}]");
        if !is_domain_name(domain) {
            return broken(at, format!("{domain:?} is not a domain such as int1.example.org"));
        }
        if !seen.insert(domain.to_ascii_lowercase()) {
            return broken(at, format!("{domain} is listed twice"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(data: &GuestData) -> String {
        let (field, problem) = data.check().unwrap_err();
        format!("{field}: {problem}")
    }

    #[test]
    fn good_data_is_taken_and_user_data_decoded() {
        let data = GuestData {
            hostname: Some("web-1.example.org".into()),
            keys: [("me".into(), "ssh-ed25519 AAAAC3 me@here".into())].into(),
            user_data: Some(STANDARD.encode("#!/bin/sh\n")),
            ..GuestData::default()
        };
        data.check().unwrap();
        assert_eq!(data.user_data_bytes().unwrap(), b"#!/bin/sh\n");
        assert_eq!(GuestData::default().user_data_bytes(), None);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let bad = GuestData { hostname: Some("a..b".into()), ..GuestData::default() };
        assert!(problem(&bad).starts_with("hostname: \"a..b\" is not a host name"));
        let bad = GuestData { user_data: Some("#!/bin/sh".into()), ..GuestData::default() };
        assert!(problem(&bad).starts_with("user_data: is not base64"));
        let long = STANDARD.encode(vec![b'x'; 65_536]);
        let bad = GuestData { user_data: Some(long), ..GuestData::default() };
        assert_eq!(problem(&bad), "user_data: is longer than 65535 bytes");
        for (key, expected) in [
            ("-----BEGIN OPENSSH PRIVATE KEY-----", "is a private key"),
            ("ssh-rsa AAAA\nssh-rsa BBBB", "is not a public key"),
            ("AAAA", "is not a public key"),
        ] {
            let keys = [("k".to_owned(), key.to_owned())].into();
            let bad = GuestData { keys, ..GuestData::default() };
            assert!(problem(&bad).contains(expected), "{}", problem(&bad));
        }
    }
}
