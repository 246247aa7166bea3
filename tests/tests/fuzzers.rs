//! The fuzzers of `tests/fuzz`, each for a few seconds from the committed corpus on. `scripts/fuzz run` runs them for longer.

#![expect(clippy::disallowed_methods, reason = "the fuzzers limit their time")]

use std::path::Path;
use std::process::Command;

use stackhand_tests::hostile::PARSERS;

/// For each of them; libFuzzer ends itself after that.
const SECONDS: &str = "4";

/// What the fuzzer says of a figure, as `stat::name: 7` or `(7 inline 8-bit counters)`.
fn figure(told: &str, before: &str, after: &str) -> Option<u64> {
    let (_, rest) = told.split_once(before)?;
    rest.split(after).next()?.trim().parse().ok()
}

mod slow {
    use super::*;

    #[test]
    fn no_fuzzer_breaks_its_parser() {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for (name, _) in PARSERS {
            let built = top.join("target/fuzz/bin").join(name);
            assert!(built.exists(), "{} is not there: scripts/fuzz build", built.display());
            let output = Command::new(top.join("scripts/fuzz"))
                .args(["run", SECONDS, name])
                .output()
                .unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name}; put what broke it into the corpus:\n{told}");
            let counters = figure(&told, "modules   (", " inline 8-bit counters");
            assert!(counters > Some(0), "{name} does not see what it reaches:\n{told}");
            let tried = figure(&told, "stat::number_of_executed_units:", "\n");
            assert!(tried > Some(100), "{name} tried too little:\n{told}");
            println!("{name}: {} inputs", tried.unwrap_or_default());
        }
    }
}
