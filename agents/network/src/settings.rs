//! The `[network]` section of the settings.

use serde::{Deserialize, Serialize};
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
    /// Seconds that a DHCP lease lasts, at least 60. Default: 86400, a day.
    pub dhcp_lease_seconds: u32,
    /// Seconds that a link with our mark is left alone when no document speaks of it, so that a
    /// lost ledger does not cut off the guests at once. Default: 60.
    pub orphan_grace_seconds: u64,
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self {
            tap_user: None,
            tap_group: None,
            vxlan_port: 4789,
            dhcp_lease_seconds: 86_400,
            orphan_grace_seconds: 60,
        }
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
        for (key, name) in [("tap_user", &self.tap_user), ("tap_group", &self.tap_group)] {
            if name.as_deref() == Some("") {
                problems.add(&format!("network.{key}"), "must not be empty; leave it out instead");
            }
        }
    }
}
