//! Has SELinux or AppArmor denied something to an agent or to a guest's QEMU?
//!
//! Both tell in the audit log, or in the kernel's where no auditd runs. Only root may read them;
//! an agent in its unit passes over this, and `agentctl doctor` as root does not.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use super::Finding;

const NAME: &str = "security-module";

/// Where denials are told, below the root.
const LOGS: [&str; 3] = ["var/log/audit/audit.log", "var/log/kern.log", "var/log/messages"];

/// How much of the end of a log is looked at.
const TAIL: u64 = 1 << 20;

/// What a denial that matters here names: our programs, folders and guests.
const OURS: [&str; 5] =
    ["compute-agent", "network-agent", "storage-agent", "/stackhand", "libvirt-"];

pub(super) fn check(root: &Path) -> Vec<Finding> {
    let enforcing = std::fs::read_to_string(root.join("sys/fs/selinux/enforce"));
    let selinux = enforcing.is_ok_and(|text| text.trim() == "1");
    let apparmor = root.join("sys/kernel/security/apparmor").exists();
    let denial = LOGS.iter().filter_map(|log| tail(&root.join(log))).find_map(|text| {
        text.lines().rev().find(|line| is_denial(line)).map(|line| shorten(line).to_owned())
    });
    vec![match (denial, selinux, apparmor) {
        (Some(line), ..) if line.contains("apparmor=") => Finding::warning(
            NAME,
            format!("AppArmor denied something: {line}"),
            "allow it in the profile named there, and load it: apparmor_parser -r \
             /etc/apparmor.d/<profile>; journalctl -k -g apparmor shows the rest",
        ),
        (Some(line), ..) => Finding::warning(
            NAME,
            format!("SELinux denied something: {line}"),
            "if it is meant to be: ausearch -m avc -ts recent | audit2allow -M stackhand-local && \
             semodule -i stackhand-local.pp; folders moved by hand: restorecon -R /var/lib/stackhand",
        ),
        (None, true, _) => Finding::pass(NAME, "SELinux enforces; no denial of ours in the log"),
        (None, _, true) => Finding::pass(NAME, "AppArmor; no denial of ours in the log"),
        (None, ..) => Finding::pass(NAME, "none in the way"),
    }]
}

fn is_denial(line: &str) -> bool {
    let denied = line.contains("avc:  denied") || line.contains("apparmor=\"DENIED\"");
    denied && OURS.iter().any(|name| line.contains(name))
}

fn shorten(line: &str) -> &str {
    line.char_indices().nth(300).map_or(line, |(end, _)| &line[..end])
}

fn tail(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let size = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(TAIL))).ok()?;
    let mut bytes = Vec::new();
    file.take(TAIL).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;

    fn found(log: &str, text: &str) -> Finding {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(log);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        check(root.path()).remove(0)
    }

    #[test]
    fn a_denial_of_ours_is_told_with_its_remedy_and_others_are_not() {
        let selinux = "type=AVC msg=audit(1.2:3): avc:  denied  { write } for pid=7 comm=\"network-agent\" name=\"x\"\n";
        let told = found("var/log/audit/audit.log", selinux);
        assert_eq!(told.severity, Severity::Warning);
        assert!(told.remedy.unwrap().contains("audit2allow"));
        let apparmor = "kernel: audit: apparmor=\"DENIED\" operation=\"open\" profile=\"libvirt-1\" name=\"/srv/x\"\n";
        assert!(found("var/log/kern.log", apparmor).remedy.unwrap().contains("apparmor_parser"));
        let other = selinux.replace("network-agent", "httpd");
        assert_eq!(found("var/log/audit/audit.log", &other).severity, Severity::Pass);
    }
}
