//! Stackhand's storage agent.

use std::process::ExitCode;

use stackhand_runtime::run::{AgentContext, Program};
use stackhand_storage::agent::{StartError, StorageAgent};
use stackhand_storage::checks::checks;
use stackhand_storage::config::StorageSection;

fn main() -> ExitCode {
    Program::new(env!("CARGO_PKG_VERSION"), start).with_checks(checks).main()
}

async fn start(context: AgentContext<StorageSection>) -> Result<StorageAgent, StartError> {
    StorageAgent::new(context)
}
