//! The lab itself: machines with a full kernel, for what the host's kernel lacks (`tests/lab/run`).
//!
//! Other tests lean on it, so its own promises are proved here: the command's output and exit status come
//! back, the host is not written to, and a machine that hangs or dies is told from a command that failed.

use std::path::Path;
use std::time::Duration;

use assert_cmd::Command;

/// `tests/lab/run`, with a limit well above the one it keeps itself.
fn run() -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/run"));
    command.timeout(Duration::from_secs(300));
    command
}

/// Named `lab` because that is how the test tiers know it, see `.config/nextest.toml`.
mod lab {
    use super::*;

    #[test]
    fn a_full_kernel_has_the_modules_that_the_hosts_may_lack() {
        let script = r#"
            set -e
            modprobe -a loop 8021q ip_gre geneve dummy vrf sch_netem act_police wireguard
            modprobe -a nf_conntrack_bridge br_netfilter dm_thin_pool target_core_mod iscsi_target_mod nvmet-tcp
            ip link add br0 type bridge vlan_filtering 1
            ip link add d0 type dummy
            ip link add link d0 name d0.7 type vlan id 7
            nft add table bridge t
            nft add chain bridge t c '{ type filter hook forward priority 0; }'
            nft add rule bridge t c ct state established accept
            nft list table bridge t
            truncate -s 64M /tmp/disk
            vgcreate -qq lab "$(losetup --find --show /tmp/disk)"
            vgs --noheadings -o vg_name
        "#;
        let assert = run().args(["--", "sh", "-c", script]).assert().success();
        let out = String::from_utf8_lossy(&assert.get_output().stdout);
        assert!(out.contains("ct state established accept"), "{out}");
        assert!(out.ends_with("  lab\n"), "{out}");
    }

    #[test]
    fn output_and_status_come_back_and_folders_are_shared() {
        let share = tempfile::tempdir().unwrap();
        let results = tempfile::tempdir().unwrap();
        std::fs::write(share.path().join("word"), "from the host").unwrap();
        let marker = format!("/etc/stackhand-lab-{}", std::process::id());
        let script = r#"
            cat /lab/share/word > /lab/results/word
            touch /lab/share/new 2>/dev/null && echo "the share is writable"
            touch "$1" && test -e "$1" && echo "wrote $1"
            seq 20000
            exit 7
        "#;
        let assert = run()
            .arg("--share")
            .arg(share.path())
            .arg("--results")
            .arg(results.path())
            .args(["--", "sh", "-c", script, "it's \"quoted\" $HOME", &marker])
            .assert()
            .code(7);
        let numbers: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
        let out = String::from_utf8(assert.get_output().stdout.clone()).unwrap();
        assert_eq!(out, format!("wrote {marker}\n{numbers}"));
        let word = std::fs::read_to_string(results.path().join("word")).unwrap();
        assert_eq!(word, "from the host");
        assert!(!Path::new(&marker).exists(), "the machine wrote to the host's root");
    }

    #[test]
    fn a_command_that_hangs_is_ended_at_the_time_limit() {
        run().args(["--time-limit", "15", "--", "sleep", "1000"]).assert().code(124);
    }

    #[test]
    fn a_machine_that_dies_is_not_taken_for_a_command_that_failed() {
        let assert =
            run().args(["--", "sh", "-c", "echo c > /proc/sysrq-trigger"]).assert().code(125);
        let err = String::from_utf8_lossy(&assert.get_output().stderr);
        // How much of the end of the console is shown varies; every part of it names the panic.
        assert!(err.contains("panic"), "{err}");
    }
}
