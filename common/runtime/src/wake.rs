//! How an agent's ears tell the reconcile loop that the host changed.
//!
//! Many events become one pass: what arrives while a pass runs, or within a few milliseconds,
//! is taken together.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use stackhand_model::ObjectRef;
use tokio::sync::Notify;

/// Wakes the reconcile loop. Clones wake the same one. Never waits.
#[derive(Clone, Debug, Default)]
pub struct Wake {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    woken: Mutex<Woken>,
    notify: Notify,
}

/// What was heard since the loop last asked.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Woken {
    /// Whether anything was.
    pub(crate) any: bool,
    /// The objects that were named.
    pub(crate) objects: BTreeSet<ObjectRef>,
}

impl Wake {
    /// A wake without a loop yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The host changed, one cannot say where. Objects that failed go on waiting for their retry.
    pub fn host_changed(&self) {
        self.add([]);
    }

    /// The host changed where this object is. If it failed lately its retry comes forward, though
    /// never nearer to the last one than the shortest back-off.
    pub fn object_changed(&self, object: ObjectRef) {
        self.add([object]);
    }

    /// The same for several objects.
    pub fn objects_changed(&self, objects: impl IntoIterator<Item = ObjectRef>) {
        self.add(objects);
    }

    fn add(&self, objects: impl IntoIterator<Item = ObjectRef>) {
        let mut woken = self.shared.woken.lock().unwrap_or_else(PoisonError::into_inner);
        woken.any = true;
        woken.objects.extend(objects);
        drop(woken);
        self.shared.notify.notify_one();
    }

    /// What was heard since the last call.
    pub(crate) fn take(&self) -> Woken {
        std::mem::take(&mut *self.shared.woken.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns when something was heard; at once if that was before.
    pub(crate) async fn heard(&self) {
        self.shared.notify.notified().await;
    }
}
