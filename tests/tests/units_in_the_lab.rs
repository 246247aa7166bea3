//! The agents under their real units: systemd as process 1, own users, capabilities, call filters.
//!
//! What a unit file forbids is only seen where it is in force. The script does the work, inside a machine of
//! the lab; it prints what held, and what did not with the journal.

use std::path::Path;
use std::time::Duration;

use assert_cmd::Command;

/// Named `lab` because that is how the test tiers know it, see `.config/nextest.toml`.
mod lab {
    use super::*;

    #[test]
    fn the_agents_live_and_work_within_what_their_units_allow() {
        let agent = stackhand_testkit::bin("network-agent");
        let programs = agent.parent().expect("a program is in a folder");
        Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/units"))
            .arg(programs)
            .timeout(Duration::from_secs(330))
            .assert()
            .success();
    }
}
