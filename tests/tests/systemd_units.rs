//! The unit files, as systemd itself reads them, and the users and folders that they count on.
//!
//! The checks are scripts, so that a packager can run them without a compiler. Both need the package
//! systemd, though not as the running init; a host without it fails these tests.

#![expect(clippy::unwrap_used, reason = "a helper of tests may fail as a test does")]

use std::path::Path;
use std::time::Duration;

use assert_cmd::Command;

fn script(name: &str) -> Command {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut command = Command::new(top.join("scripts").join(name));
    command.timeout(Duration::from_secs(60));
    command
}

#[test]
fn units_are_valid_and_hardened_and_leave_the_network_agent_in_the_hosts_mount_namespace() {
    script("check-units").assert().success();
}

#[test]
fn each_user_may_do_what_it_must_and_no_more() {
    script("check-unit-permissions").assert().success();
}
