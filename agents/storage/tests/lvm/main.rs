//! Volume groups, the kernel's iSCSI target and open-iscsi, in machines with a full kernel: the
//! host's may lack all three. Each test of `lab` boots one machine, which runs a test of `inside`.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]
#![expect(clippy::print_stdout, reason = "what a machine says is shown when its test fails")]

mod lab {
    use std::path::Path;

    /// Runs a test of this program inside a machine.
    fn inside(test: &str) {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let program = std::env::current_exe().unwrap();
        #[expect(clippy::disallowed_methods, reason = "the machine keeps a time limit of its own")]
        let output = std::process::Command::new(here.join("../../tests/lab/run"))
            .args(["--memory", "6144", "--time-limit", "540"])
            .arg("--")
            .arg(here.join("tests/lvm/prepare"))
            .arg(program)
            .args(["--ignored", "--exact", "--nocapture", "--test-threads=1"])
            .arg(format!("inside::{test}"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        println!("{said}{}", String::from_utf8_lossy(&output.stderr));
        // A test that is not there would pass, too.
        assert!(output.status.success() && said.contains("1 passed"), "{test} failed inside");
    }

    #[test]
    fn thin_volumes_keep_their_bytes_through_snapshots_clones_growth_and_reverts() {
        inside("volumes::thin");
    }

    #[test]
    fn the_kernels_target_lets_in_whom_it_should_and_open_iscsi_finds_the_right_device() {
        inside("exports::lio");
    }

    #[test]
    fn an_agent_killed_before_and_after_each_command_of_lvm_finishes_what_it_had_begun() {
        inside("killed::agent");
    }
}

mod inside;
