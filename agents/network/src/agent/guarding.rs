//! The firewall's part of a pass.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use stackhand_kernel::Chain;
use stackhand_model::ObjectRef;
use tokio::sync::Mutex;

use crate::firewall::netlink::KernelFirewall;
use crate::firewall::{Done, Enforcer, FirewallError, FirewallHost, Model, Tracking};
use crate::l2::{Make, Wish};

/// The firewall, and what is known of the kernel's abilities.
#[derive(Debug)]
pub(super) struct Guarding(Mutex<State>);

#[derive(Debug)]
enum State {
    /// Nothing needed it yet, or the kernel could not: tried again when something needs it.
    Untried(Option<KernelFirewall>),
    Ready(Box<Enforcer<KernelFirewall>>),
}

impl Guarding {
    pub(super) fn new(host: KernelFirewall) -> Self {
        Self(Mutex::new(State::Untried(Some(host))))
    }

    /// Where the kernel tracks flows of bridged packets, or why it cannot.
    pub(super) async fn tracking(&self) -> Result<Tracking, String> {
        let mut state = self.0.lock().await;
        ready(&mut state).await.map(|enforcer| enforcer.tracking())
    }

    /// Makes the firewall that of `model`.
    pub(super) async fn enforce(&self, model: &Model) -> Result<Done, String> {
        let mut state = self.0.lock().await;
        if !needs(&state, model).await? {
            return Ok(Done::default());
        }
        let enforcer = ready(&mut state).await?;
        enforcer.enforce(model).await.map_err(|error| Chain(&error).to_string())
    }

    /// Whether nobody changed the tables since they were enforced.
    pub(super) async fn is_current(&self) -> bool {
        match &*self.0.lock().await {
            State::Untried(_) => true,
            State::Ready(enforcer) => enforcer.is_current().await,
        }
    }

    /// What enforcing `model` would change.
    pub(super) async fn plan(
        &self,
        model: &Model,
    ) -> Result<Vec<(Option<ObjectRef>, String)>, String> {
        let mut state = self.0.lock().await;
        if !needs(&state, model).await? {
            return Ok(Vec::new());
        }
        let enforcer = ready(&mut state).await?;
        enforcer.plan(model).await.map_err(|error| Chain(&error).to_string())
    }

    /// What it is, for controllers.
    pub(super) async fn facts(&self) -> Value {
        match self.tracking().await {
            Ok(tracking) => json!({"enforced": true, "tracking": tracking}),
            Err(reason) => json!({"enforced": false, "reason": reason}),
        }
    }
}

/// Whether there is anything to filter, or tables of ours are left from a time when there was.
async fn needs(state: &State, model: &Model) -> Result<bool, String> {
    let State::Untried(Some(host)) = state else { return Ok(true) };
    if !model.guards.is_empty() {
        return Ok(true);
    }
    let seen = host.observe().await.map_err(|error| Chain(&error).to_string())?;
    Ok(!seen.tables.is_empty())
}

async fn ready(state: &mut State) -> Result<&mut Enforcer<KernelFirewall>, String> {
    if let State::Untried(host) = state {
        let tracking = match host {
            Some(host) => host.probe().await,
            None => Err(FirewallError::Unable("the firewall is gone".to_owned())),
        };
        let tracking = tracking.map_err(|error| Chain(&error).to_string())?;
        tracing::info!(%tracking, "the firewall can be enforced");
        if let Some(host) = host.take() {
            *state = State::Ready(Box::new(Enforcer::new(host, tracking)));
        }
    }
    match state {
        State::Ready(enforcer) => Ok(enforcer.as_mut()),
        State::Untried(_) => Err("the firewall is gone".to_owned()),
    }
}

/// Has the bridges of filtered networks show their packets to the IP layer, where flows are tracked
/// there; and no others.
pub(super) fn show_to_ip(l2: &mut Wish, model: &Model, tracking: Tracking) {
    let bridges: BTreeSet<&str> = model.bridges.values().map(String::as_str).collect();
    for (at, wanted) in &mut l2.links {
        if at.space.is_none()
            && matches!(wanted.make, Make::Bridge)
            && let Some(bridge) = &mut wanted.set.as_bridge
        {
            let filtered = bridges.contains(at.link.as_str());
            bridge.netfilter = filtered && tracking == Tracking::BrNetfilter;
        }
    }
}
