//! What passes do besides links and the firewall: packet rates and marks, and what OpenStack's Linux
//! bridge agent left in packet filters.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use stackhand_kernel::Chain;
use stackhand_model::ObjectRef;
use stackhand_runtime::agent::Cause;
use stackhand_runtime::events::NewEvent;
use tracing::{info, warn};

use super::NetworkAgent;
use crate::desired::HostWish;
use crate::takeover;

impl NetworkAgent {
    /// Makes packet rates and marks what is wanted. Ports whose rules cannot be had are `failed`.
    pub(super) async fn mark_packets(
        &self,
        wish: &HostWish,
        cause: Cause,
        failed: &mut BTreeMap<ObjectRef, String>,
    ) {
        self.watcher.ignore_nft();
        let applied = self.packets.apply(&wish.packets, &self.host.write_count()).await;
        self.watcher.heed_nft().await;
        match applied {
            Ok(None) => {}
            Ok(Some(change)) => {
                info!(change, "done");
                if matches!(cause, Cause::Host | Cause::Timer) {
                    self.events.add(NewEvent::new("DriftRepaired", change));
                }
            }
            Err(error) => {
                let reason = format!("cannot limit packets or mark them: {}", Chain(&error));
                warn!("{reason}");
                for rules in wish.packets.values() {
                    failed.entry(rules.object).or_insert_with(|| reason.clone());
                }
            }
        }
    }

    /// The zones in which OpenStack's Linux bridge agent has flows tracked, until its filter is gone.
    pub(super) async fn zones_left(&self) -> BTreeMap<String, u16> {
        if !self.local.takeover || self.cleared.load(Ordering::Acquire) {
            return BTreeMap::new();
        }
        takeover::zones().await.unwrap_or_else(|error| {
            warn!("cannot tell in which zones flows are tracked: {}", Chain(&error));
            BTreeMap::new()
        })
    }

    /// Removes what OpenStack's Linux bridge agent left in packet filters, once for each start of
    /// this agent. To be called when our firewall is in force. Returns why it could not.
    pub(super) async fn remove_leftovers(&self) -> Option<String> {
        if !self.local.takeover || self.cleared.load(Ordering::Acquire) {
            return None;
        }
        match takeover::remove_filters(&self.host.write_count()).await {
            Ok(done) => {
                self.cleared.store(true, Ordering::Release);
                for message in done {
                    info!("{message}");
                    self.events.add(NewEvent::new("TakenOver", message));
                }
                None
            }
            Err(error) => {
                let reason = format!(
                    "cannot remove the filter of OpenStack's Linux bridge agent: {}",
                    Chain(&error)
                );
                warn!("{reason}");
                Some(reason)
            }
        }
    }
}
