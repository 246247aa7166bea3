//! What the network agent needs of its host, looked at without changing anything.

mod owner;

use std::fs;
use std::path::Path;

use serde_json::Value;
use stackhand_kernel::netlink::WriteCount;
use stackhand_kernel::{Chain, sysctl};
use stackhand_runtime::config::Loaded;
use stackhand_runtime::preflight::{Check, Finding};

use crate::firewall::netlink::KernelFirewall;
use crate::probe;
use crate::settings::{NetworkSettings, Renderer};

/// Capabilities by number, and what each is for.
const CAPABILITIES: [(u8, &str, &str); 4] = [
    (10, "CAP_NET_BIND_SERVICE", "to serve DHCP"),
    (12, "CAP_NET_ADMIN", "to make links"),
    (13, "CAP_NET_RAW", "to answer guests that have no address yet"),
    (21, "CAP_SYS_ADMIN", "to make and enter network namespaces"),
];

/// The agent's own preflight checks.
#[must_use]
pub fn checks(loaded: &Loaded<NetworkSettings>) -> Vec<Check> {
    let settings = loaded.settings.agent.clone();
    let mappings = settings.bridge_mappings.clone();
    let renderer = settings.firewall;
    vec![
        Check::blocking("privileges", privileges),
        Check::blocking("tap-device", tap_device),
        Check::blocking("tap-user", move || tap_user(&settings)),
        Check::blocking("bridge-filter", bridge_filter),
        Check::blocking("link-owner", move || owner::check(&mappings, Path::new("/"))),
        Check::new("link-kinds", link_kinds),
        Check::new("firewall", move || firewall(renderer)),
    ]
}

fn privileges() -> Vec<Finding> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let held = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
        .unwrap_or(0);
    let missing = CAPABILITIES.iter().filter(|(number, ..)| held >> number & 1 == 0);
    let findings: Vec<Finding> = missing
        .map(|(_, name, purpose)| {
            Finding::failure(
                "privileges",
                format!("{name} is missing, which is needed {purpose}"),
                "start the agent by its unit, or as root",
            )
        })
        .collect();
    if findings.is_empty() {
        return vec![Finding::pass("privileges", "all capabilities that are needed are held")];
    }
    findings
}

fn tap_device() -> Vec<Finding> {
    const DEVICE: &str = "/dev/net/tun";
    vec![match fs::OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(_) => Finding::pass("tap-device", format!("{DEVICE} can be opened")),
        Err(error) => Finding::failure(
            "tap-device",
            format!("{DEVICE} cannot be opened: {error}"),
            "load the module tun, and let the agent's user open the device",
        ),
    }]
}

fn tap_user(settings: &NetworkSettings) -> Vec<Finding> {
    vec![match crate::agent::local("", settings) {
        Ok(local) => Finding::pass(
            "tap-user",
            format!("taps belong to user {}", local.tap_user.unwrap_or_default()),
        ),
        Err(error) => Finding::failure(
            "tap-user",
            error.to_string(),
            "create it, or name another in the settings",
        ),
    }]
}

async fn firewall(renderer: Renderer) -> Vec<Finding> {
    let means = match KernelFirewall::open(WriteCount::default(), renderer) {
        Ok(firewall) => firewall.probe().await,
        Err(error) => Err(error.into()),
    };
    vec![match means {
        Ok(means) => Finding::pass(
            "firewall",
            format!("security groups and anti-spoofing can be enforced: {means}"),
        ),
        Err(error) => Finding::failure(
            "firewall",
            format!("ports cannot be filtered, and so will not come up: {}", Chain(&error)),
            "install nftables 1.0.6 or later, and load the module nf_conntrack_bridge or br_netfilter; \
             or iptables, ebtables and ipset, and load br_netfilter",
        ),
    }]
}

/// With this on, the host's own packet filter judges frames between guests.
fn bridge_filter() -> Vec<Finding> {
    let on = |family: &str| {
        sysctl::read(&format!("net/bridge/bridge-nf-call-{family}")).is_ok_and(|value| value == "1")
    };
    let on: Vec<&str> = ["iptables", "ip6tables"].into_iter().filter(|family| on(family)).collect();
    if on.is_empty() {
        return vec![Finding::pass("bridge-filter", "bridged frames bypass the host's filter")];
    }
    vec![Finding::warning(
        "bridge-filter",
        format!("bridged frames go through the host's {}", on.join(" and ")),
        "make sure that its FORWARD chain does not drop them, or set \
         net.bridge.bridge-nf-call-iptables and -ip6tables to 0",
    )]
}

async fn link_kinds() -> Vec<Finding> {
    let abilities = probe::abilities().await;
    let needed = ["bridge", "veth", "vxlan"];
    let mut findings: Vec<Finding> = needed
        .into_iter()
        .filter_map(|kind| match &abilities[kind] {
            Value::Bool(true) => None,
            reason => Some(Finding::failure(
                "link-kinds",
                format!("the kernel cannot make a {kind} link: {reason}"),
                format!("load the module {kind}"),
            )),
        })
        .collect();
    if findings.is_empty() {
        findings.push(Finding::pass("link-kinds", "bridge, veth and vxlan links can be made"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use stackhand_runtime::preflight::Severity;

    use super::*;

    #[test]
    fn a_user_that_does_not_exist_is_named() {
        let settings =
            NetworkSettings { tap_user: Some("no-such-user".into()), ..NetworkSettings::default() };
        let findings = tap_user(&settings);
        assert_eq!(findings[0].severity, Severity::Failure);
        assert!(findings[0].finding.contains("no-such-user"), "{findings:?}");
        assert_eq!(tap_user(&NetworkSettings::default())[0].severity, Severity::Pass);
    }
}
