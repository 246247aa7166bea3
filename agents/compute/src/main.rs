//! Stackhand's compute agent.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stackhand_compute::agent::ComputeAgent;
use stackhand_compute::checks::checks;
use stackhand_compute::config::ComputeSection;
use stackhand_compute::hypervisor::HypervisorError;
use stackhand_compute::libvirt::Libvirt;
use stackhand_compute::meter::Meter;
use stackhand_compute::usage::words;
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
    let agent =
        ComputeAgent::new(&context.host, &context.state_dir, section, libvirt, context.wake);
    let board = agent.meter().board().clone();
    context.metrics.register(move |registry| registry.register_collector(Box::new(board)));
    tokio::spawn(count(Arc::clone(agent.meter()), section.clone(), context.events.clone()));
    Ok(agent)
}

/// Counts what instances use, for as long as the agent runs.
async fn count(meter: Arc<Meter<Libvirt>>, section: ComputeSection, events: EventLog) {
    let interval = Duration::from_secs(u64::from(section.usage_interval_seconds));
    let telling = Duration::from_secs(u64::from(section.usage_event_minutes) * 60);
    let mut told = Instant::now();
    let mut pause = interval;
    loop {
        tokio::time::sleep(pause).await;
        // While libvirt is away, the last count stands; that it is away is told elsewhere.
        let Ok(asked) = meter.pass().await else { continue };
        pause = asked.pause(interval);
        if !telling.is_zero() && told.elapsed() >= telling {
            told = Instant::now();
            for (id, counted) in meter.board().read() {
                let event = NewEvent::new("instance.usage", words(&counted));
                events.add(event.about(InstanceId(id).object().to_string()));
            }
        }
    }
}
