//! Actions: what is done once and is no wish.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use serde_json::{Value, json};
use stackhand_model::{AttachmentId, ErrorCode, SnapshotId, Spec, VolumeId, VolumeSpec};
use stackhand_runtime::agent::{Action, Refusal};
use stackhand_runtime::chain;

use super::{Configured, StorageAgent, blocking};
use crate::backend::{Item, Presence, Usage};
use crate::desired::Wanted;
use crate::works::revert_note;

fn fence_note(id: AttachmentId) -> String {
    format!("fence/{id}")
}

fn wrong_state(message: impl Into<String>) -> Refusal {
    Refusal::new(ErrorCode::WrongState, message)
}

impl StorageAgent {
    pub(super) async fn do_act(&self, action: Action) -> Result<Value, Refusal> {
        let object = action.object;
        let outcome = match (&action.document.spec, action.name.as_str()) {
            (Spec::Volume(spec), "adopt") => self.adopt(VolumeId(object.id), spec).await,
            (Spec::Volume(_), "revert") => {
                self.revert(VolumeId(object.id), action.params.get("snapshot")).await
            }
            (Spec::Attachment(_), "fence") => self.fence(AttachmentId(object.id)).await,
            (spec, name) => {
                let known = match spec {
                    Spec::Volume(_) => "adopt, revert",
                    Spec::Attachment(_) => "fence",
                    _ => "none",
                };
                let message = format!("{} has no action {name:?}; it has: {known}", object.kind);
                Err(Refusal::new(ErrorCode::Unsupported, message))
            }
        };
        outcome.map_err(|refusal| refusal.about(object))
    }

    pub(super) fn wanted(&self) -> Arc<Wanted> {
        Arc::clone(&self.last.lock().unwrap_or_else(PoisonError::into_inner).wanted)
    }

    /// Takes over what holds a volume's name.
    async fn adopt(&self, id: VolumeId, spec: &VolumeSpec) -> Result<Value, Refusal> {
        let item = Item::Volume(id);
        let name = spec.backend.as_deref().unwrap_or(&self.default_backend);
        let Some(Configured { backend, .. }) = self.backends.get(name) else {
            let message = format!("there is no backend {name:?}");
            return Err(Refusal::new(ErrorCode::NotFound, message));
        };
        let adopted = blocking(backend, move |backend| {
            let seen = backend.observe()?.items.remove(&item);
            if seen.is_some_and(|seen| seen.presence == Presence::Ready) {
                return Ok(false);
            }
            backend.adopt(item).map(|()| true)
        });
        let adopted = adopted.await.map_err(|error| wrong_state(chain(&error)))?;
        Ok(json!({ "adopted": adopted }))
    }

    /// Notes that a volume is to be set back; the next pass begins.
    async fn revert(&self, id: VolumeId, snapshot: Option<&Value>) -> Result<Value, Refusal> {
        let wanted = self.wanted();
        let volume = Item::Volume(id);
        let snapshot = snapshot
            .and_then(Value::as_str)
            .and_then(|text| text.strip_prefix("Snapshot/").unwrap_or(text).parse().ok())
            .map(SnapshotId)
            .ok_or_else(|| {
                let message = "params.snapshot must be the id of a snapshot of this volume";
                Refusal::new(ErrorCode::BadRequest, message).at("params.snapshot")
            })?;
        match wanted.snapshots.get(&snapshot) {
            Some(wish) if wish.spec.volume == id && !wish.deleting => {}
            Some(_) => {
                let message = format!("{} is no snapshot of it", snapshot.object());
                return Err(Refusal::new(ErrorCode::BadRequest, message).at("params.snapshot"));
            }
            None => {
                let message = format!("{} is not known here", snapshot.object());
                return Err(Refusal::new(ErrorCode::NotFound, message).at("params.snapshot"));
            }
        }
        if let Some((attachment, wish)) =
            wanted.attachments.iter().find(|(_, wish)| wish.spec.volume == id)
        {
            return Err(wrong_state(format!(
                "it is attached to host {} by {}: delete that first",
                wish.spec.connector.host,
                attachment.object()
            )));
        }
        let situation = self.observe().await;
        let seen = |item: Item| {
            let views = situation.backends.values().filter_map(|view| view.observed.as_ref().ok());
            views.filter_map(|observed| observed.items.get(&item)).next()
        };
        for item in [volume, Item::Snapshot(snapshot)] {
            if seen(item).is_none_or(|seen| seen.presence != Presence::Ready) {
                return Err(wrong_state(format!("{} is not ready", wanted.call(item))));
            }
        }
        if seen(volume).is_some_and(|seen| seen.usage != Usage::Free) {
            return Err(wrong_state("somebody has it open, such as a running guest"));
        }
        if situation.works.values().any(|work| work.failure.is_none()) {
            let busy = |item: &Item| *item == volume || wanted.source(*item) == Some(volume);
            if let Some(item) = situation.works.keys().find(|item| busy(item)) {
                return Err(wrong_state(format!("waits for the work on {}", wanted.call(*item))));
            }
        }
        let note = Item::Snapshot(snapshot).to_string();
        self.journal.put(&revert_note(id), &note).await?;
        self.works.wake_up(id.object());
        Ok(json!({"reverting_to": snapshot}))
    }

    /// Shuts the host of an attachment out, although it is logged in: it was declared dead.
    async fn fence(&self, id: AttachmentId) -> Result<Value, Refusal> {
        let wanted = self.wanted();
        match wanted.attachments.get(&id) {
            Some(wish) if wish.deleting => {}
            _ => {
                return Err(wrong_state(
                    "it is not being deleted: delete it first; fence is for a host that does not \
                     let go",
                ));
            }
        }
        self.journal.put(&fence_note(id), &true).await?;
        self.works.wake_up(id.object());
        Ok(json!({"fenced": true}))
    }

    /// Attachments whose hosts were declared dead.
    pub(super) fn fenced(&self) -> BTreeSet<AttachmentId> {
        let notes = self.journal.list("fence/");
        notes.iter().filter_map(|(key, _)| key.strip_prefix("fence/")?.parse().ok()).collect()
    }

    /// Drops the notes on objects that are gone: others of the same name may come.
    pub(super) async fn forget_notes(&self, wanted: &Wanted) {
        let fences = self.fenced();
        let fences = fences.iter().filter(|id| !wanted.attachments.contains_key(id));
        let reverts = self.works.reverts();
        let reverts = reverts.keys().filter(|id| !wanted.volumes.contains_key(id));
        let notes = fences.map(|&id| fence_note(id)).chain(reverts.map(|&id| revert_note(id)));
        for note in notes.collect::<Vec<_>>() {
            if let Err(error) = self.journal.remove(&note).await {
                tracing::warn!(note, %error, "cannot forget a note");
            }
        }
    }
}
