//! Where requests come from: the local socket and the broker.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use serde_json::Value;
use stackhand_bus::amqp::{AmqpTransport, AmqpUrl};
use stackhand_bus::local::{LocalListener, LocalOptions};
use stackhand_bus::sign::{TrustedKeys, Verifier, VerifyingHandler};
use stackhand_bus::{BusError, Delivered, Failure, Handler, LinkState, ServerHandle, Transport};
use stackhand_model::ErrorCode;
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

/// Decides whose commands over the broker are obeyed.
#[derive(Clone, Debug)]
pub(super) struct Guard {
    keys: Arc<TrustedKeys>,
    verifier: Arc<Verifier>,
}

impl Guard {
    /// Reads the trusted keys. Where their folder cannot be read nobody is trusted, and the
    /// heartbeat says so: the local socket serves as ever.
    pub(super) fn new(common: &CommonSettings, ledger: &Ledger) -> Self {
        let signing = &common.signing;
        let keys = Arc::new(TrustedKeys::of(&signing.trusted_controllers));
        let verifier = Verifier::new(Arc::clone(&keys), Arc::new(ledger.nonces()))
            .with_window(signing.window());
        Self { keys, verifier: Arc::new(verifier) }
    }

    /// What operators should know: keys that cannot be read, and clocks that seem to differ.
    pub(super) fn troubles(&self) -> Vec<String> {
        let mut troubles = self.keys.problems();
        let refused = self.verifier.refused();
        let late: u64 = ["stale", "future"].iter().filter_map(|it| refused.get(it)).sum();
        if late > 0 {
            troubles.push(format!(
                "clock: {late} signed commands came too late or too early; compare the clocks of \
                 controllers and this host"
            ));
        }
        troubles
    }
}

/// Counts commands that were refused for their signature.
struct Counting {
    inner: VerifyingHandler,
    metrics: Metrics,
}

impl Handler for Counting {
    fn handle(&self, delivered: Delivered) -> BoxFuture<'_, Result<Value, Failure>> {
        Box::pin(async move {
            let result = self.inner.handle(delivered).await;
            if let Err(failure) = &result
                && failure.class == ErrorCode::Forbidden.class()
            {
                let reason = failure.kwargs.get("code").and_then(Value::as_str);
                let label = [("reason", reason.unwrap_or("unknown").to_owned())];
                self.metrics.refused_commands.get_or_create(&label).inc();
            }
            result
        })
    }
}

/// Serves the own API over the broker and reports to it, from now to the end.
pub(super) async fn broker<A: Agent>(
    transport: Arc<AmqpTransport>,
    common: &CommonSettings,
    api: Arc<Api<A>>,
    guard: Option<Guard>,
    reporter: Reporter,
    parts: Parts<'_>,
    shutdown: &Shutdown,
) -> Result<(), BusError> {
    let service = api.service();
    let handler: Arc<dyn Handler> = match guard {
        Some(guard) => {
            let inner = VerifyingHandler::new(api, service.clone(), guard.verifier);
            Arc::new(Counting { inner, metrics: parts.metrics.clone() })
        }
        None => {
            tracing::warn!("commands over the broker need no signature: signing.required is false");
            api
        }
    };
    let server = transport.serve(service, handler).await?;
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

#[cfg(test)]
mod tests {
    use stackhand_bus::{Origin, Request, Service, Version};
    use stackhand_model::AgentKind;

    use super::*;

    #[tokio::test]
    async fn without_a_folder_of_keys_nobody_is_obeyed_and_the_heartbeat_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let mut common = CommonSettings::for_agent("network");
        common.state_dir = dir.path().to_owned();
        common.signing.trusted_controllers = dir.path().join("trusted_controllers");
        let ledger = Ledger::open(dir.path(), AgentKind::Network, "compute1").unwrap();
        let guard = Guard::new(&common, &ledger);
        let troubles = guard.troubles();
        assert!(troubles[0].contains("trusted_controllers"), "{troubles:?}");

        let service = Service {
            exchange: "stackhand".into(),
            topic: "stackhand.network".into(),
            server: "compute1".into(),
            concurrency: 1,
        };
        let delivered = Delivered {
            request: Request::new("get", Value::Null),
            namespace: None,
            version: Version::V1_0,
            unique_id: "u1".into(),
            is_call: true,
            origin: Origin::Broker,
        };
        guard.verifier.verify(&service, &delivered).await.unwrap_err();
        assert_eq!(guard.verifier.refused()["unsigned"], 1);
    }
}
