//! What OpenStack's Linux bridge agent leaves in packet filters, found in their own listings. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// Chains of that agent: its program's name, cut.
const CHAINS: &str = "neutron-linuxbri-";

/// A chain that agents share; it goes with the last that uses it.
const SHARED: &str = "neutron-filter-top";

/// Chains of that agent in ebtables: one of each for a tap.
const BRIDGE_CHAINS: [&str; 2] = ["neutronMAC-", "neutronARP-"];

/// What `iptables-restore --noflush` has to do so that nothing of that agent is left of what
/// `iptables-save` printed; each table in one transaction. `None`: there is nothing.
#[must_use]
pub fn iptables_script(saved: &str) -> Option<String> {
    let mut script = String::new();
    let mut table = Table::default();
    for line in saved.lines() {
        match line.chars().next() {
            Some('*') => table = Table { name: &line[1..], ..Table::default() },
            Some(':') => table.chains.extend(line[1..].split(' ').next()),
            Some('-') => table.rules.extend(line.strip_prefix("-A ")),
            _ if line == "COMMIT" => table.clear(&mut script),
            _ => {}
        }
    }
    (!script.is_empty()).then_some(script)
}

/// The zones in which that agent has the flows of its bridges tracked, by bridge, from what
/// `iptables-save` printed. A rule for each port names its bridge as the link that packets come by.
#[must_use]
pub(super) fn zones(saved: &str) -> BTreeMap<String, u16> {
    let after = |words: &[&str], option: &str| {
        let at = words.iter().position(|word| *word == option)?;
        words.get(at + 1).map(|word| (*word).to_owned())
    };
    let zone = |line: &str| {
        let rule = line.strip_prefix("-A ").filter(|rule| rule.starts_with(CHAINS))?;
        let words: Vec<&str> = rule.split(' ').collect();
        let link = after(&words, "-i").or_else(|| after(&words, "--physdev-in"))?;
        let zone = after(&words, "--zone")?.parse().ok()?;
        link.starts_with("brq").then_some((link, zone))
    };
    saved.lines().filter_map(zone).collect()
}

/// One table of a listing.
#[derive(Default)]
struct Table<'a> {
    name: &'a str,
    chains: Vec<&'a str>,
    /// Without the `-A`: chain first.
    rules: Vec<&'a str>,
}

impl<'a> Table<'a> {
    fn clear(&self, script: &mut String) {
        let mut doomed: BTreeSet<&str> =
            self.chains.iter().copied().filter(|chain| chain.starts_with(CHAINS)).collect();
        if doomed.is_empty() {
            return;
        }
        let stays = |rule: &&str| {
            chain_of(rule) == SHARED
                && target_of(rule).is_none_or(|target| !doomed.contains(target))
        };
        if self.chains.contains(&SHARED) && !self.rules.iter().any(stays) {
            doomed.insert(SHARED);
        }
        let leads_there = |rule: &&&'a str| {
            !doomed.contains(chain_of(rule))
                && target_of(rule).is_some_and(|target| doomed.contains(target))
        };
        // Writing to a string does not fail.
        let _ = writeln!(script, "*{}", self.name);
        for rule in self.rules.iter().filter(leads_there) {
            let _ = writeln!(script, "-D {rule}");
        }
        for command in ["-F", "-X"] {
            for chain in &doomed {
                let _ = writeln!(script, "{command} {chain}");
            }
        }
        script.push_str("COMMIT\n");
    }
}

fn chain_of(rule: &str) -> &str {
    rule.split(' ').next().unwrap_or_default()
}

/// Where a rule jumps to. A comment before it may hold the same letters, but not as its own last
/// word: jumps of that agent have nothing after them.
fn target_of(rule: &str) -> Option<&str> {
    let (before, target) = rule.rsplit_once(' ')?;
    before.ends_with(" -j").then_some(target)
}

/// Calls of `ebtables` so that nothing of that agent is left of what `ebtables-save` printed.
#[must_use]
pub fn ebtables_commands(saved: &str) -> Vec<Vec<String>> {
    let is_theirs = |chain: &str| BRIDGE_CHAINS.iter().any(|start| chain.starts_with(start));
    let mut table = "";
    let (mut jumps, mut flushes, mut deletions) = (Vec::new(), Vec::new(), Vec::new());
    let command = |table: &str, words: &str| -> Vec<String> {
        let all = format!("--concurrent -t {table} {words}");
        all.split(' ').map(str::to_owned).collect()
    };
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = line.strip_prefix(':').and_then(|rest| rest.split(' ').next()) {
            if is_theirs(chain) {
                flushes.push(command(table, &format!("-F {chain}")));
                deletions.push(command(table, &format!("-X {chain}")));
            }
        } else if let Some(rule) = line.strip_prefix("-A ")
            && !is_theirs(chain_of(rule))
            && target_of(rule).is_some_and(is_theirs)
        {
            jumps.push(command(table, &format!("-D {rule}")));
        }
    }
    jumps.into_iter().chain(flushes).chain(deletions).collect()
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
