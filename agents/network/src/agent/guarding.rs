//! The firewall's part of a pass.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use stackhand_kernel::Chain;
use stackhand_model::ObjectRef;
use tokio::sync::Mutex;

use crate::firewall::netlink::KernelFirewall;
use crate::firewall::{Done, Enforcer, FirewallError, FirewallHost, Means, Model, Tracking};
use crate::l2::{Make, Seen, SeenKind, Wish};
use crate::settings::Renderer;

/// What is told where the second renderer is used and nobody asked for it.
const BY_IPTABLES: &str = "security groups are enforced by iptables, for nftables' bridge family does \
    not work here: each filtered port makes packets cost more; load nf_tables, or set network.firewall \
    = \"iptables\" if that is as it should be";

/// The firewall, and what is known of the kernel's abilities.
#[derive(Debug)]
pub(super) struct Guarding(Mutex<State>);

#[derive(Debug)]
enum State {
    /// Nothing needed it yet, or the kernel could not: tried again when something needs it.
    Untried(Option<KernelFirewall>),
    Ready(Box<Ready>),
}

#[derive(Debug)]
struct Ready {
    enforcer: Enforcer<KernelFirewall>,
    /// Whether packets can be limited and marked, once that was wanted; or why not, as of the last try.
    limits: Option<Result<(), String>>,
}

impl Ready {
    /// What of `model` this kernel can do: all, or all but limits and marks of packets.
    async fn possible<'m>(&mut self, model: &'m Model) -> Cow<'m, Model> {
        if !model.packets.is_empty() && self.limits != Some(Ok(())) {
            let limits = self.enforcer.host().probe_packets().await;
            self.limits = Some(limits.map_err(|error| Chain(&error).to_string()));
        }
        match self.limits {
            Some(Err(_)) if !model.packets.is_empty() => {
                Cow::Owned(Model { packets: BTreeMap::new(), ..model.clone() })
            }
            _ => Cow::Borrowed(model),
        }
    }
}

impl Guarding {
    pub(super) fn new(host: KernelFirewall) -> Self {
        Self(Mutex::new(State::Untried(Some(host))))
    }

    /// What enforces the rules, or why nothing can.
    pub(super) async fn means(&self) -> Result<Means, String> {
        let mut state = self.0.lock().await;
        ready(&mut state).await.map(|ready| ready.enforcer.means())
    }

    /// Makes the firewall that of `model`.
    pub(super) async fn enforce(&self, model: &Model) -> Result<Done, String> {
        let mut state = self.0.lock().await;
        if !needs(&state, model).await? {
            return Ok(Done::default());
        }
        let ready = ready(&mut state).await?;
        let model = ready.possible(model).await;
        ready.enforcer.enforce(&model).await.map_err(|error| Chain(&error).to_string())
    }

    /// Whether the rules are in tables of `iptables`.
    pub(super) async fn uses_iptables(&self) -> bool {
        match &*self.0.lock().await {
            State::Untried(_) => false,
            State::Ready(ready) => ready.enforcer.means() == Means::Iptables,
        }
    }

    /// What is not well with it, for the heartbeat.
    pub(super) async fn trouble(&self, wanted: Renderer) -> Option<String> {
        let unasked = wanted == Renderer::Auto && self.uses_iptables().await;
        unasked.then(|| BY_IPTABLES.to_owned())
    }

    /// Whether nobody changed the tables since they were enforced.
    pub(super) async fn is_current(&self) -> bool {
        match &*self.0.lock().await {
            State::Untried(_) => true,
            State::Ready(ready) => ready.enforcer.is_current().await,
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
        let ready = ready(&mut state).await?;
        let model = ready.possible(model).await;
        ready.enforcer.plan(&model).await.map_err(|error| Chain(&error).to_string())
    }

    /// Why packets cannot be limited or marked, if that was wanted and is so.
    pub(super) async fn why_unlimited(&self) -> Option<String> {
        match &*self.0.lock().await {
            State::Ready(ready) => ready.limits.clone()?.err(),
            State::Untried(_) => None,
        }
    }

    /// What it is, for controllers.
    pub(super) async fn facts(&self) -> Value {
        match self.means().await {
            Ok(means) => json!({
                "enforced": true,
                "renderer": means.renderer(),
                "tracking": means.tracking(),
            }),
            Err(reason) => json!({"enforced": false, "reason": reason}),
        }
    }
}

/// Whether there is anything to filter, or tables of ours are left from a time when there was.
async fn needs(state: &State, model: &Model) -> Result<bool, String> {
    let State::Untried(Some(host)) = state else { return Ok(true) };
    if !model.guards.is_empty() || !model.packets.is_empty() {
        return Ok(true);
    }
    let seen = host.observe().await.map_err(|error| Chain(&error).to_string())?;
    Ok(!seen.tables.is_empty())
}

async fn ready(state: &mut State) -> Result<&mut Ready, String> {
    if let State::Untried(host) = state {
        let means = match host {
            Some(host) => host.probe().await,
            None => Err(FirewallError::Unable("the firewall is gone".to_owned())),
        };
        let means = means.map_err(|error| Chain(&error).to_string())?;
        tracing::info!(%means, "the firewall can be enforced");
        if let Some(host) = host.take() {
            let enforcer = Enforcer::new(host, means);
            *state = State::Ready(Box::new(Ready { enforcer, limits: None }));
        }
    }
    match state {
        State::Ready(ready) => Ok(ready.as_mut()),
        State::Untried(_) => Err("the firewall is gone".to_owned()),
    }
}

/// Has the bridges of filtered networks show their packets to the IP layer, where flows are tracked
/// there, and no others. Notes whether one that is there does not yet.
pub(super) fn show_to_ip(l2: &mut Wish, seen: &Seen, model: &mut Model, means: Means) {
    let bridges: BTreeSet<&str> = model.bridges.values().map(String::as_str).collect();
    let mut unshown = false;
    for (at, wanted) in &mut l2.links {
        if at.space.is_none()
            && matches!(wanted.make, Make::Bridge)
            && let Some(bridge) = &mut wanted.set.as_bridge
        {
            let filtered = bridges.contains(at.link.as_str());
            bridge.netfilter = filtered && means.tracking() == Tracking::BrNetfilter;
            let is = seen.links.get(at).map(|link| &link.kind);
            unshown |=
                matches!(is, Some(SeenKind::Bridge(is)) if bridge.netfilter && !is.netfilter);
        }
    }
    model.unshown = unshown;
}
