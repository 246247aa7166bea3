//! How an agent's ears tell the reconcile loop that the host changed.
//!
//! Many events become one pass: what arrives while a pass runs, or within a few milliseconds,
//! is taken together.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stackhand_model::ObjectRef;
use tokio::sync::{Notify, watch};

/// Wakes the reconcile loop. Clones wake the same one. Never waits.
#[derive(Clone, Debug, Default)]
pub struct Wake {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    heard: Mutex<Heard>,
    notify: Notify,
    /// Counts passes that have dealt with what was heard.
    dealt_with: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Heard {
    /// What no pass has begun with.
    woken: Woken,
    /// The objects of the pass that runs.
    looked_at: BTreeSet<ObjectRef>,
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
        let mut heard = self.heard_so_far();
        heard.woken.any = true;
        heard.woken.objects.extend(objects);
        drop(heard);
        self.shared.notify.notify_one();
    }

    /// What was heard since the last call, for a pass that begins.
    pub(crate) fn take(&self) -> Woken {
        let mut heard = self.heard_so_far();
        let woken = std::mem::take(&mut heard.woken);
        heard.looked_at.clone_from(&woken.objects);
        woken
    }

    /// The pass has ended, and what it found is recorded.
    pub(crate) fn pass_ended(&self) {
        self.heard_so_far().looked_at.clear();
        self.shared.dealt_with.send_modify(|passes| *passes += 1);
    }

    /// Whether there is news of an object that no pass has dealt with: what was found out about it
    /// may be out of date.
    pub(crate) fn is_news(&self, object: &ObjectRef) -> bool {
        let heard = self.heard_so_far();
        heard.woken.objects.contains(object) || heard.looked_at.contains(object)
    }

    /// Changes whenever a pass has dealt with news.
    pub(crate) fn dealt_with(&self) -> watch::Receiver<u64> {
        self.shared.dealt_with.subscribe()
    }

    /// Returns when something was heard; at once if that was before.
    pub(crate) async fn heard(&self) {
        self.shared.notify.notified().await;
    }

    fn heard_so_far(&self) -> MutexGuard<'_, Heard> {
        self.shared.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
