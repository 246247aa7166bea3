//! A cloud of two machines from packages: set up by the README's lines, used, killed, upgraded, without
//! power, removed.
//!
//! The script does the work, in two machines of the lab that share a wire; it prints what held and when.

use std::path::{Path, PathBuf};
use std::time::Duration;

use assert_cmd::Command;

/// Named `lab` because that is how the test tiers know it, see `.config/nextest.toml`.
mod lab {
    use super::*;

    #[test]
    fn a_cloud_of_two_machines_from_packages_outlives_what_befalls_it() {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests is in the tree");
        let made = Command::new(top.join("scripts/packages"))
            .arg("--unoptimised")
            .timeout(Duration::from_secs(240))
            .assert()
            .success();
        let folder = String::from_utf8_lossy(&made.get_output().stdout).into_owned();
        let folder = PathBuf::from(folder.lines().last().unwrap_or_default());
        Command::new(top.join("tests/lab/two-nodes"))
            .arg(folder)
            .timeout(Duration::from_secs(1900))
            .assert()
            .success();
    }
}
