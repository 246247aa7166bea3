//! Tests that need a full kernel, in the lab: `tests/lab/run`.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use crate::Spawned;

/// Seconds that the machine may take, for itself and for its tests.
const LIMIT: u64 = 300;

/// Runs the calling test binary's own ignored tests whose names contain `filter` in a machine with
/// a full kernel, all in one: a machine costs some ten seconds.
///
/// Such tests are marked `#[ignore = "runs in the lab"]`; a test beside them calls this function.
///
/// # Panics
///
/// When one of them fails, or when none has such a name; the message shows what they printed.
pub fn in_the_lab(filter: &str) {
    let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/lab/run");
    let test = std::env::current_exe().expect("the running test has a path");
    let mut arguments: Vec<OsString> = ["--memory", "2048", "--time-limit"].map(Into::into).into();
    arguments.push(LIMIT.to_string().into());
    // Without udev nobody makes /dev/net/tun before its module is there. What is missing there is
    // a failure.
    let prepare = "modprobe tun && STACKHAND_REQUIRE=1 exec \"$@\"";
    arguments.extend(["--", "sh", "-c", prepare, "sh"].map(Into::into));
    arguments.push(test.into());
    arguments.extend(["--ignored", "--nocapture", "--test-threads=1", filter].map(Into::into));
    let mut machine = Spawned::start(run, arguments);
    let status = machine.wait(Duration::from_secs(LIMIT + 30));
    let output = machine.output();
    assert!(status.success(), "in the lab, {status}:\n{output}");
    assert!(!output.contains("ok. 0 passed"), "no test of the lab is called {filter}:\n{output}");
    #[expect(clippy::print_stdout, reason = "what was seen there belongs to the test's output")]
    {
        println!("{output}");
    }
}
