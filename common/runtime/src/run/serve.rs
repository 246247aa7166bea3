//! Where requests come from: the local socket and the broker.

use std::sync::Arc;

use stackhand_bus::amqp::{AmqpTransport, AmqpUrl};
use stackhand_bus::local::{LocalListener, LocalOptions};
use stackhand_bus::{BusError, LinkState, ServerHandle, Transport};
use tokio::sync::watch;

use crate::agent::Agent;
use crate::config::CommonSettings;
use crate::events::{EventLog, NewEvent};
use crate::health::Health;
use crate::heartbeat::{self, Reporter};
use crate::ledger::Ledger;
use crate::lifecycle::Shutdown;
use crate::metrics::Metrics;
use crate::service::Api;

/// Who hears about the link.
pub(super) struct Parts<'a> {
    pub(super) health: &'a Health,
    pub(super) metrics: &'a Metrics,
    pub(super) events: &'a EventLog,
}

/// Serves the own API on the agent's socket.
pub(super) async fn local<A: Agent>(
    common: &CommonSettings,
    api: Arc<Api<A>>,
    shutdown: &Shutdown,
) -> Result<(), BusError> {
    // systemd-tmpfiles makes the folder on a host; by hand the agent does. If it cannot, binding
    // says what is wrong.
    let _ = std::fs::create_dir_all(&common.run_dir);
    let socket = common.socket(A::KIND.as_str());
    let listener = LocalListener::bind(&socket, LocalOptions::default()).await?;
    let server = listener.serve(api.service(), api)?;
    stop_in_time(server, "requests from the local socket", common, shutdown);
    Ok(())
}

/// Begins to connect, where a broker is configured.
pub(super) fn connect(common: &CommonSettings) -> Result<Option<Arc<AmqpTransport>>, BusError> {
    let Some(url) = &common.bus.url else { return Ok(None) };
    let url: AmqpUrl = url.expose().parse()?;
    AmqpTransport::connect(url, &common.bus.amqp).map(|transport| Some(Arc::new(transport)))
}

/// Serves the own API over the broker and reports to it, from now to the end.
pub(super) async fn broker<A: Agent>(
    transport: Arc<AmqpTransport>,
    common: &CommonSettings,
    api: Arc<Api<A>>,
    _ledger: &Ledger,
    reporter: Reporter,
    parts: Parts<'_>,
    shutdown: &Shutdown,
) -> Result<(), BusError> {
    let service = api.service();
    let server = transport.serve(service, api).await?;
    stop_in_time(server, "requests from the broker", common, shutdown);
    tokio::spawn(watch_link(
        transport.link(),
        parts.health.clone(),
        parts.metrics.clone(),
        parts.events.clone(),
    ));
    let closer = shutdown.closer("the broker's link");
    let register = common.heartbeat.register_interval();
    let stop = shutdown.clone();
    tokio::spawn(async move {
        let shared: Arc<dyn Transport> = Arc::clone(&transport) as _;
        heartbeat::run(shared, reporter, register, stop).await;
        transport.close().await;
        drop(closer);
    });
    Ok(())
}

/// Lets running requests finish once the process stops.
fn stop_in_time(
    server: ServerHandle,
    what: &'static str,
    common: &CommonSettings,
    shutdown: &Shutdown,
) {
    let stopping = shutdown.stopping();
    let busy = shutdown.begin(what);
    let limit = common.shutdown.limit();
    tokio::spawn(async move {
        stopping.cancelled().await;
        server.shut_down(limit).await;
        drop(busy);
    });
}

/// Tells health, metrics and events how the link is.
async fn watch_link(
    mut link: watch::Receiver<LinkState>,
    health: Health,
    metrics: Metrics,
    events: EventLog,
) {
    let mut was_up = None;
    loop {
        let state = link.borrow_and_update().clone();
        match state {
            LinkState::Up { generation } => {
                health.ready("bus");
                metrics.bus_connected.set(1);
                if was_up != Some(true) {
                    tracing::info!(generation, "the broker is connected");
                    events.add(NewEvent::new("BusUp", "the broker is connected"));
                }
                was_up = Some(true);
            }
            LinkState::Down { reason } => {
                metrics.bus_connected.set(0);
                if was_up == Some(true) {
                    tracing::warn!(reason, "the broker is away");
                    events.add(NewEvent::new("BusDown", reason.clone()));
                }
                health.not_ready("bus", reason);
                was_up = Some(false);
            }
        }
        if link.changed().await.is_err() {
            return;
        }
    }
}
