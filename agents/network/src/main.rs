//! Stackhand's network agent.

use std::process::ExitCode;

use stackhand_network::{NetworkAgent, checks, takeover};
use stackhand_runtime::run::Program;

fn main() -> ExitCode {
    Program::new(env!("CARGO_PKG_VERSION"), NetworkAgent::start)
        .with_checks(checks::checks)
        .with_release(takeover::release_and_tell)
        .main()
}
