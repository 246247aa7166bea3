//! Stackhand's compute agent.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stackhand_compute::agent::ComputeAgent;
use stackhand_compute::checks::checks;
use stackhand_compute::config::ComputeSection;
use stackhand_compute::hypervisor::{Hypervisor, HypervisorError};
use stackhand_compute::libvirt::Libvirt;
use stackhand_compute::usage::{UsageBoard, words};
use stackhand_model::InstanceId;
use stackhand_runtime::events::{EventLog, NewEvent};
use stackhand_runtime::run::{AgentContext, Program};

fn main() -> ExitCode {
    // Not the agent: the helper that attaches volumes for it, see decision 16.
    if std::env::args().nth(1).as_deref() == Some("initiator") {
        return match stackhand_attach::helper::serve(std::io::stdin(), std::io::stdout()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_hung_up) => ExitCode::FAILURE,
        };
    }
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
    let watcher = libvirt.clone();
    let board = UsageBoard::default();
    context.metrics.register({
        let board = board.clone();
        move |registry| registry.register_collector(Box::new(board))
    });
    tokio::spawn(count(watcher, board, section.clone(), context.events.clone()));
    Ok(ComputeAgent::new(&context.host, &context.state_dir, section, libvirt, context.wake))
}

/// Counts what instances use, for as long as the agent runs.
async fn count(libvirt: Libvirt, board: UsageBoard, section: ComputeSection, events: EventLog) {
    let every = Duration::from_secs(u64::from(section.usage_interval_seconds));
    let telling = Duration::from_secs(u64::from(section.usage_event_minutes) * 60);
    let mut told = Instant::now();
    loop {
        tokio::time::sleep(every).await;
        // While libvirt is away, the last count stands; that it is away is told elsewhere.
        let Ok(usage) = libvirt.usage().await else { continue };
        if !telling.is_zero() && told.elapsed() >= telling {
            told = Instant::now();
            for (&id, usage) in &usage {
                let event = NewEvent::new("instance.usage", words(usage));
                events.add(event.about(InstanceId(id).object().to_string()));
            }
        }
        board.post(usage);
    }
}
