//! What OpenStack's Linux bridge agent leaves in packet filters, found in their own listings. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::firewall::xtables::saved::{Saved, saved, target_of, zone_of};

/// Chains of that agent: its program's name, cut.
const CHAINS: &str = "neutron-linuxbri-";

/// A chain that agents share; it goes with the last that uses it.
const SHARED: &str = "neutron-filter-top";

/// Chains of that agent in ebtables: one of each for a tap.
const BRIDGE_CHAINS: [&str; 2] = ["neutronMAC-", "neutronARP-"];

/// What `iptables-restore --noflush` has to do so that nothing of that agent is left of what
/// `iptables-save` printed; each table in one transaction. `None`: there is nothing.
#[must_use]
pub fn iptables_script(text: &str) -> Option<String> {
    let script: String = saved(text).iter().filter_map(cleared).collect();
    (!script.is_empty()).then_some(script)
}

/// The zones in which that agent has the flows of its bridges tracked, by bridge, from what
/// `iptables-save` printed. A rule for each port names its bridge as the link that packets come by.
#[must_use]
pub(super) fn zones(text: &str) -> BTreeMap<String, u16> {
    let tables = saved(text);
    let rules = tables.iter().flat_map(|table| &table.rules);
    let theirs = rules.filter(|(chain, _)| chain.starts_with(CHAINS));
    let zones = theirs.filter_map(|(_, rule)| zone_of(rule));
    zones.filter(|(link, _)| link.starts_with("brq")).collect()
}

fn cleared(table: &Saved) -> Option<String> {
    let chains = table.chains.iter().map(String::as_str);
    let mut doomed: BTreeSet<&str> = chains.filter(|chain| chain.starts_with(CHAINS)).collect();
    if doomed.is_empty() {
        return None;
    }
    let stays = |(chain, rule): &(String, String)| {
        chain == SHARED && target_of(rule).is_none_or(|target| !doomed.contains(target))
    };
    if table.chains.iter().any(|chain| chain == SHARED) && !table.rules.iter().any(stays) {
        doomed.insert(SHARED);
    }
    let mut script = format!("*{}\n", table.name);
    table.clear(&doomed, &mut script);
    script.push_str("COMMIT\n");
    Some(script)
}

/// Calls of `ebtables` so that nothing of that agent is left of what `ebtables-save` printed.
#[must_use]
pub fn ebtables_commands(text: &str) -> Vec<Vec<String>> {
    let is_theirs = |chain: &str| BRIDGE_CHAINS.iter().any(|start| chain.starts_with(start));
    let (mut jumps, mut rest) = (Vec::new(), Vec::new());
    for table in saved(text) {
        let chains = table.chains.iter().map(String::as_str);
        let doomed: BTreeSet<&str> = chains.filter(|chain| is_theirs(chain)).collect();
        let mut script = String::new();
        table.clear(&doomed, &mut script);
        for line in script.lines() {
            let words = format!("--concurrent -t {} {line}", table.name);
            let of = if line.starts_with("-D") { &mut jumps } else { &mut rest };
            of.push(words.split(' ').map(str::to_owned).collect());
        }
    }
    jumps.append(&mut rest);
    jumps
}

/// Whether an address set bears the name that the agent gives to those of security groups: `N`, the
/// family, and the group's id as far as it fits.
#[must_use]
pub fn is_address_set(name: &str) -> bool {
    let id = name.strip_prefix("NIPv4").or_else(|| name.strip_prefix("NIPv6"));
    id.is_some_and(|id| {
        id.len() >= 20
            && id.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-' || byte == b'n')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "\
# made by a program
*raw
:PREROUTING ACCEPT [0:0]
:neutron-linuxbri-PREROUTING - [0:0]
-A PREROUTING -j neutron-linuxbri-PREROUTING
-A neutron-linuxbri-PREROUTING -i brq1 -m comment --comment \"zone\" -j CT --zone 4097
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [12:800]
:mine - [0:0]
:neutron-filter-top - [0:0]
:neutron-linuxbri-FORWARD - [0:0]
:neutron-linuxbri-local - [0:0]
-A FORWARD -j neutron-filter-top
-A FORWARD -j neutron-linuxbri-FORWARD
-A FORWARD -m comment --comment \"not -j neutron-linuxbri-FORWARD\" -j mine
-A mine -j ACCEPT
-A neutron-filter-top -j neutron-linuxbri-local
-A neutron-linuxbri-FORWARD -m physdev --physdev-in tap1 -j neutron-linuxbri-local
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:docker - [0:0]
-A PREROUTING -j docker
COMMIT
";

    #[test]
    fn zones_are_found_by_the_bridge_and_nobody_elses_are() {
        let saved = "*raw\n:neutron-linuxbri-PREROUTING - [0:0]\n\
            -A PREROUTING -i brqother-0000 -j CT --zone 9\n\
            -A neutron-linuxbri-PREROUTING -m physdev --physdev-in brq6f0c8a8e-0d -m comment \
            --comment \"Set zone for 1234567890\" -j CT --zone 4098\n\
            -A neutron-linuxbri-PREROUTING -i brq6f0c8a8e-0d -m comment --comment \"Set zone for \
            1234567890\" -j CT --zone 4098\n\
            -A neutron-linuxbri-PREROUTING -m physdev --physdev-in tap12345678-90 -m comment \
            --comment \"Set zone for 1234567890\" -j CT --zone 4098\nCOMMIT\n";
        assert_eq!(zones(saved), BTreeMap::from([("brq6f0c8a8e-0d".to_owned(), 4098)]));
        assert!(
            zones("-A neutron-linuxbri-PREROUTING -i brqx -j CT --zone\n-i\n--zone 7").is_empty()
        );
    }

    #[test]
    fn chains_go_with_all_that_leads_to_them_and_nothing_else_does() {
        let script = iptables_script(SAVED).unwrap();
        let wanted = "\
*raw
-D PREROUTING -j neutron-linuxbri-PREROUTING
-F neutron-linuxbri-PREROUTING
-X neutron-linuxbri-PREROUTING
COMMIT
*filter
-D FORWARD -j neutron-filter-top
-D FORWARD -j neutron-linuxbri-FORWARD
-F neutron-filter-top
-F neutron-linuxbri-FORWARD
-F neutron-linuxbri-local
-X neutron-filter-top
-X neutron-linuxbri-FORWARD
-X neutron-linuxbri-local
COMMIT
";
        assert_eq!(script, wanted);
    }

    #[test]
    fn a_chain_that_another_agent_uses_too_stays() {
        let shared = SAVED.replace(
            "-A neutron-filter-top -j neutron-linuxbri-local",
            "-A neutron-filter-top -j neutron-linuxbri-local\n-A neutron-filter-top -j neutron-meter-local",
        );
        let script = iptables_script(&shared).unwrap();
        assert!(!script.contains("-X neutron-filter-top"), "{script}");
        assert!(script.contains("-D neutron-filter-top -j neutron-linuxbri-local"), "{script}");
    }

    #[test]
    fn a_host_without_that_agent_needs_nothing() {
        assert_eq!(iptables_script("*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n"), None);
        assert_eq!(ebtables_commands("*nat\n:PREROUTING ACCEPT\n"), Vec::<Vec<String>>::new());
        for name in ["", "mine", "NIPv4", "NIPv4short", "NIPv4docker-and-other-things"] {
            assert!(!is_address_set(name), "{name}");
        }
        assert!(is_address_set("NIPv459bf5cdc-6fa5-4c6c-9264-"));
    }

    #[test]
    fn chains_of_ebtables_are_let_go_of_before_they_are_deleted() {
        let saved = "*nat\n:PREROUTING ACCEPT\n:neutronMAC-tap1 DROP\n:mine ACCEPT\n\
                     -A PREROUTING -i tap1 -j neutronMAC-tap1\n-A PREROUTING -j mine\n\
                     -A neutronMAC-tap1 -i tap1 --among-src fa:16:3e:0:0:1 -j RETURN\n";
        let commands: Vec<String> =
            ebtables_commands(saved).iter().map(|words| words.join(" ")).collect();
        assert_eq!(
            commands,
            [
                "--concurrent -t nat -D PREROUTING -i tap1 -j neutronMAC-tap1",
                "--concurrent -t nat -F neutronMAC-tap1",
                "--concurrent -t nat -X neutronMAC-tap1",
            ]
        );
    }
}
