//! The `[network]` section of the settings.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stackhand_runtime::config::{AgentSection, Problems};

/// Settings of the network agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkSettings {
    /// User that may attach to taps besides the agent. Default: `libvirt-qemu` if the host has it,
    /// else `root`.
    pub tap_user: Option<String>,
    /// Group that may attach to taps. Default: none.
    pub tap_group: Option<String>,
    /// UDP port of VXLAN, the same on all hosts. Default: 4789, the one that IANA assigned.
    pub vxlan_port: u16,
    /// Address that other hosts send overlay packets to. Controllers make the Host document of this
    /// host from it and `bridge_mappings`, unless a manifest has one. Default: none.
    pub tunnel_address: Option<IpAddr>,
    /// Physical network name → link of this host that leads to it. Default: none.
    pub bridge_mappings: BTreeMap<String, String>,
    /// Seconds that a DHCP lease lasts, at least 60. Default: 86400, a day.
    pub dhcp_lease_seconds: u32,
    /// Domain of ports whose network names none. Default: `stackhand.internal`.
    pub dns_domain: String,
    /// DNS servers that are asked for what is no port's name; an empty list: none, such queries are
    /// refused. Default: those of `/etc/resolv.conf` when the agent starts.
    pub dns_forwarders: Option<Vec<IpAddr>>,
    /// Seconds that a link with our mark is left alone when no document speaks of it, so that a
    /// lost ledger does not cut off the guests at once. Default: 60.
    pub orphan_grace_seconds: u64,
    /// Whether links that OpenStack's Linux bridge agent left are adopted where they are what is
    /// wanted under their name, and its filter is removed once ours is in force. Default: no, such a
    /// link is an error on the object that wants its name.
    pub takeover: bool,
    /// What enforces security groups: `nftables`, `iptables`, or `auto`, which takes nftables' bridge
    /// family where the kernel has it, else iptables with physdev, ebtables and ipset. Default:
    /// `auto`.
    pub firewall: Renderer,
}

/// What is to enforce security groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Renderer {
    /// What the kernel can.
    #[default]
    Auto,
    /// nftables' bridge family and nothing else.
    Nftables,
    /// `iptables`, `ebtables` and `ipset`, even where nftables would do.
    Iptables,
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self {
            tap_user: None,
            tap_group: None,
            vxlan_port: 4789,
            tunnel_address: None,
            bridge_mappings: BTreeMap::new(),
            dhcp_lease_seconds: 86_400,
            dns_domain: "stackhand.internal".to_owned(),
            dns_forwarders: None,
            orphan_grace_seconds: 60,
            takeover: false,
            firewall: Renderer::Auto,
        }
    }
}

impl NetworkSettings {
    /// The spec of this host's Host document, as far as the settings say; told with the facts.
    #[must_use]
    pub fn host_spec(&self) -> Value {
        let mut spec = json!({});
        if let Some(address) = self.tunnel_address {
            spec["tunnel_address"] = json!(address);
        }
        if !self.bridge_mappings.is_empty() {
            spec["bridge_mappings"] = json!(self.bridge_mappings);
        }
        spec
    }
}

impl AgentSection for NetworkSettings {
    const AGENT: &'static str = "network";

    fn check(&self, problems: &mut Problems) {
        if self.vxlan_port == 0 {
            problems.add("network.vxlan_port", "must be 1 to 65535");
        }
        if self.dhcp_lease_seconds < 60 {
            problems.add("network.dhcp_lease_seconds", "must be at least 60");
        }
        for (physical, link) in &self.bridge_mappings {
            if link.is_empty() || link.len() > 15 || link.contains(['/', ' ']) {
                let key = format!("network.bridge_mappings.{physical}");
                problems.add(&key, "must be a link's name: 1 to 15 bytes, no blank, no slash");
            }
        }
        let good = |label: &str| {
            let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
            (1..=63).contains(&label.len()) && label.bytes().all(inner)
        };
        if !self.dns_domain.split('.').all(good) || self.dns_domain.len() > 200 {
            problems.add("network.dns_domain", "must be a domain such as stackhand.internal");
        }
        for (key, name) in [("tap_user", &self.tap_user), ("tap_group", &self.tap_group)] {
            if name.as_deref() == Some("") {
                problems.add(&format!("network.{key}"), "must not be empty; leave it out instead");
            }
        }
    }
}
