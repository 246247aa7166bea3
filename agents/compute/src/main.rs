//! Stackhand's compute agent.

use std::process::ExitCode;
use std::sync::Arc;

use stackhand_compute::agent::ComputeAgent;
use stackhand_compute::checks::checks;
use stackhand_compute::config::ComputeSection;
use stackhand_compute::hypervisor::HypervisorError;
use stackhand_compute::libvirt::Libvirt;
use stackhand_model::InstanceId;
use stackhand_runtime::run::{AgentContext, Program};

fn main() -> ExitCode {
    Program::new(env!("CARGO_PKG_VERSION"), start).with_checks(checks).main()
}

async fn start(
    context: AgentContext<ComputeSection>,
) -> Result<ComputeAgent<Libvirt>, HypervisorError> {
    let section = &context.settings.agent;
    let wake = context.wake.clone();
    let notice = Arc::new(move |domain: Option<uuid::Uuid>| match domain {
        Some(uuid) => wake.object_changed(InstanceId(uuid).object()),
        None => wake.host_changed(),
    });
    let libvirt = Libvirt::new(&section.libvirt_uri, notice)?;
    Ok(ComputeAgent::new(&context.host, &context.state_dir, section, libvirt, context.wake))
}
