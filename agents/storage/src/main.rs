//! Stackhand's storage agent.

use std::process::ExitCode;

use stackhand_runtime::run::{AgentContext, Program};
use stackhand_storage::agent::{StartError, StorageAgent};
use stackhand_storage::attach;
use stackhand_storage::checks::checks;
use stackhand_storage::config::StorageSection;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(code) = attach::run(&arguments) {
        return code;
    }
    Program::new(env!("CARGO_PKG_VERSION"), start).with_checks(checks).main()
}

async fn start(context: AgentContext<StorageSection>) -> Result<StorageAgent, StartError> {
    StorageAgent::new(context)
}
