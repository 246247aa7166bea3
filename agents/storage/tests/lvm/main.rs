//! Volume groups, the kernel's iSCSI target and open-iscsi, in machines with a full kernel: the
//! host's may lack all three. Each test of `lab` boots one machine, which runs a test of `inside`.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]
#![expect(clippy::print_stdout, reason = "what a machine says is shown when its test fails")]

mod lab {
    use std::path::Path;
    use std::time::Duration;

    use stackhand_testkit::{Spawned, free_port};

    use crate::guests;

    /// Seconds that a machine may take. Its own watch counts slower on a busy host.
    const LIMIT: u64 = 450;

    /// A machine that runs a test of this program.
    fn machine(options: &[&str], test: &str) -> Spawned {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let (prepare, program) = (here.join("tests/lvm/prepare"), std::env::current_exe().unwrap());
        let (limit, test) = (LIMIT.to_string(), format!("inside::{test}"));
        let arguments = ["--memory", "6144", "--time-limit", &limit]
            .into_iter()
            .chain(options.iter().copied())
            .chain(["--", prepare.to_str().unwrap(), program.to_str().unwrap()])
            .chain(["--ignored", "--exact", "--nocapture", "--test-threads=1", &test]);
        Spawned::start(here.join("../../tests/lab/run"), arguments)
    }

    fn finish(mut machine: Spawned) {
        let status = machine.wait(Duration::from_secs(LIMIT + 130));
        let said = machine.output();
        println!("{said}");
        // A test that is not there would pass, too.
        assert!(status.success() && said.contains("1 passed"), "the test inside failed");
    }

    #[test]
    fn volumes_of_a_group_keep_their_bytes_and_nobody_reads_anothers() {
        finish(machine(&[], "volumes::thin_then_thick"));
    }

    #[test]
    fn exports_find_the_right_device_and_a_pool_keeps_what_it_promises() {
        finish(machine(&[], "exports::exports_then_pool"));
    }

    #[test]
    fn an_agent_killed_at_each_of_lvms_changes_finishes_what_it_had_begun() {
        finish(machine(&[], "killed::agent"));
    }

    #[test]
    fn the_unit_with_its_drop_in_may_drive_lvm_and_the_kernels_target() {
        finish(machine(&["--systemd"], "unit::drop_in"));
    }

    #[test]
    fn guests_have_demo_v1_as_vdb_and_find_in_it_what_others_wrote() {
        let (port, shared) = (free_port().to_string(), tempfile::tempdir().unwrap());
        let folder = shared.path();
        std::fs::write(folder.join("port"), &port).unwrap();
        let options = ["--forward", &port, "--results", folder.to_str().unwrap()];
        let mut machine = machine(&options, "textbook::demo_v1");
        guests::serve(&mut machine, folder);
        finish(machine);
    }
}

mod guests;
#[path = "../support/machine.rs"]
mod machine;

mod inside;
