//! Do links that lead to physical networks belong to somebody else: NetworkManager would take them
//! out of our bridges.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use stackhand_runtime::preflight::Finding;

const NAME: &str = "link-owner";

/// Looks at what NetworkManager keeps of the links, below `root`.
pub(super) fn check(bridge_mappings: &BTreeMap<String, String>, root: &Path) -> Vec<Finding> {
    let owned = bridge_mappings.iter().filter(|(_, link)| is_managed(link, root));
    let mut findings: Vec<Finding> = owned
        .map(|(physical, link)| {
            Finding::failure(
                NAME,
                format!(
                    "NetworkManager owns {link}, which leads to {physical}: it takes it out of \
                     the bridge that the agent puts it into"
                ),
                format!(
                    "nmcli device set {link} managed no; to keep it so, write [keyfile] and \
                     unmanaged-devices+=interface-name:{link} into \
                     /etc/NetworkManager/conf.d/91-{link}.conf"
                ),
            )
        })
        .collect();
    if findings.is_empty() {
        let count = bridge_mappings.len();
        findings.push(Finding::pass(NAME, format!("{count} links to physical networks are free")));
    }
    findings
}

/// NetworkManager keeps a file for each link that it knows, by the link's number.
fn is_managed(link: &str, root: &Path) -> bool {
    let number = fs::read_to_string(root.join("sys/class/net").join(link).join("ifindex"));
    let Ok(number) = number else { return false };
    let device = root.join("run/NetworkManager/devices").join(number.trim());
    let Ok(text) = fs::read_to_string(device) else { return false };
    text.lines().any(|line| matches!(line.trim(), "managed=true" | "managed=yes"))
}

#[cfg(test)]
mod tests {
    use stackhand_runtime::preflight::Severity;

    use super::*;

    #[test]
    fn a_link_that_network_manager_owns_is_told_with_the_command_that_frees_it() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("sys/class/net/eth1/ifindex", "7\n");
        write("sys/class/net/eth2/ifindex", "8\n");
        write("run/NetworkManager/devices/7", "[device]\nmanaged=true\n");
        write("run/NetworkManager/devices/8", "[device]\nmanaged=false\n");
        let mappings = |link: &str| BTreeMap::from([("extnet".to_owned(), link.to_owned())]);
        let owned = check(&mappings("eth1"), root.path());
        assert_eq!(owned[0].severity, Severity::Failure);
        assert!(
            owned[0].remedy.as_deref().unwrap().starts_with("nmcli device set eth1 managed no")
        );
        for link in ["eth2", "eth3"] {
            assert_eq!(check(&mappings(link), root.path())[0].severity, Severity::Pass, "{link}");
        }
    }
}
