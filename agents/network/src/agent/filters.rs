//! What OpenStack's Linux bridge agent left in packet filters.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use stackhand_kernel::Chain;
use stackhand_runtime::events::NewEvent;
use tracing::{info, warn};

use super::NetworkAgent;
use crate::takeover;

impl NetworkAgent {
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
