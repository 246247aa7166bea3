//! Stackhand's network agent.

use std::process::ExitCode;

use stackhand_network::{NetworkAgent, checks};
use stackhand_runtime::run::Program;

fn main() -> ExitCode {
    Program::new(env!("CARGO_PKG_VERSION"), NetworkAgent::start).with_checks(checks::checks).main()
}
