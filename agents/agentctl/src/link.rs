//! Opening transports: a broker, or the sockets of this host.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use stackhand_bus::amqp::{AmqpOptions, AmqpTransport, AmqpUrl};
use stackhand_bus::local::LocalTransport;
use stackhand_bus::sign::{Signer, SigningKey, SigningTransport};
use stackhand_bus::{LinkState, Transport};
use stackhand_model::AgentKind;
use stackhand_runtime::api::EXCHANGE;
use stackhand_runtime::config::BusUrl;

/// Connects to a broker, and waits until that has worked.
///
/// # Errors
///
/// No broker can be reached within `limit`, or it refuses us; the key cannot be read.
pub(crate) async fn broker(
    url: &BusUrl,
    key: Option<&Path>,
    limit: Duration,
) -> Result<Arc<dyn Transport>> {
    let signer = match key {
        Some(path) => {
            let key = SigningKey::load(path).context("cannot use the key that signs commands")?;
            Some(Arc::new(Signer::new(key)))
        }
        None => None,
    };
    let parsed: AmqpUrl = url.expose().parse()?;
    let transport = AmqpTransport::connect(parsed, &AmqpOptions::default())?;
    let mut link = transport.link();
    let up = link.wait_for(|state| matches!(state, LinkState::Up { .. }));
    let reached = matches!(tokio::time::timeout(limit, up).await, Ok(Ok(_)));
    if !reached {
        let reason = match &*link.borrow() {
            LinkState::Down { reason } => reason.clone(),
            LinkState::Up { .. } => String::new(),
        };
        bail!("cannot reach the broker at {url}: {reason}");
    }
    let transport: Arc<dyn Transport> = Arc::new(transport);
    Ok(match signer {
        Some(signer) => Arc::new(SigningTransport::new(transport, signer, EXCHANGE)),
        None => transport,
    })
}

/// Opens the sockets of the agents in `run_dir`. Connecting comes with the first question.
///
/// # Errors
///
/// The folder is there and cannot be read.
pub(crate) fn sockets(run_dir: &Path) -> Result<Vec<(AgentKind, Arc<dyn Transport>)>> {
    let mut found: Vec<(AgentKind, Arc<dyn Transport>)> = Vec::new();
    for agent in AgentKind::ALL {
        let path = run_dir.join(format!("{agent}.sock"));
        let there =
            path.try_exists().with_context(|| format!("cannot look for {}", path.display()))?;
        if there {
            found.push((agent, Arc::new(LocalTransport::connect(path))));
        }
    }
    Ok(found)
}
