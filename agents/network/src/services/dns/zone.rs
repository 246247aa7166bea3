//! The names of a network's ports: one zone per network, computed from its documents.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

/// What the DNS server of one network knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Zone {
    /// The domain of its ports, in lower case, without a final dot.
    pub domain: String,
    /// Addresses that the server listens on.
    pub servers: BTreeSet<IpAddr>,
    /// Ranges whose guests are answered, and whose reverse names are ours.
    pub nets: BTreeSet<IpNet>,
    /// Host name, in lower case → its addresses.
    pub names: BTreeMap<String, BTreeSet<IpAddr>>,
    /// Address → host name.
    pub addresses: BTreeMap<IpAddr, String>,
    /// Who is asked for everything else; none: such queries are refused.
    pub forwarders: Vec<IpAddr>,
}

impl Zone {
    /// Adds a port's address under its host name.
    pub fn add(&mut self, host: &str, address: IpAddr) {
        let host = host.to_ascii_lowercase();
        self.names.entry(host.clone()).or_default().insert(address);
        self.addresses.entry(address).or_insert(host);
    }

    /// Whether a client may ask at all: its address is on the network.
    #[must_use]
    pub fn serves(&self, client: IpAddr) -> bool {
        let link_local = matches!(client, IpAddr::V6(v6) if v6.is_unicast_link_local());
        link_local || self.nets.iter().any(|net| net.contains(&client))
    }
}

/// A host name for an address whose port has none: `host-10-0-0-5`, `host-2001-db8--5`.
#[must_use]
pub fn host_name_of(address: IpAddr) -> String {
    let text = address.to_string().replace(['.', ':'], "-");
    // `::1` would end or begin with what a name may not.
    format!("host-{}", text.trim_end_matches('-'))
}
