//! Passwords that guests left, and how their owners have them forgotten.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Value, json};
use stackhand_model::{ErrorCode, InstanceId, PortId, PortSpec, Spec};
use stackhand_runtime::agent::{Action, Desired, Refusal};

use super::NetworkAgent;
use crate::desired::guest_id;
use crate::services::metadata::Passwords;

/// The action of that name.
pub(super) const FORGET_PASSWORD: &str = "forget-password";

/// The guest behind a port.
pub(super) fn guest(id: PortId, port: &PortSpec) -> Option<InstanceId> {
    port.guest.as_ref().map(|_| guest_id(id, port))
}

impl NetworkAgent {
    async fn passwords(&self) -> Option<Arc<Passwords>> {
        self.services.lock().await.passwords()
    }

    /// Forgets passwords of guests that went. Returns where those of the others are, if there are any.
    pub(super) async fn passwords_of(&self, desired: &Desired) -> Option<Arc<Passwords>> {
        let passwords = self.passwords().await.filter(|it| !it.is_empty())?;
        let held = desired.objects.iter().filter(|(_, held)| !held.deleting);
        let guests = held.filter_map(|(object, held)| match &held.document.spec {
            Spec::Port(port) => guest(PortId(object.id), port),
            _ => None,
        });
        passwords.keep_only(&guests.collect()).await;
        Some(passwords)
    }

    /// The action `forget-password` of a port.
    pub(super) async fn forget_password(&self, action: &Action) -> Result<Value, Refusal> {
        let refuse = |code, text: &str| {
            let message = format!("{} {text}", action.object);
            Err(Refusal::new(code, message).about(action.object))
        };
        let Spec::Port(port) = &action.document.spec else {
            return refuse(ErrorCode::Unsupported, "leaves no password; name its guest's port");
        };
        let (Some(guest), Some(passwords)) =
            (guest(PortId(action.object.id), port), self.passwords().await)
        else {
            return refuse(ErrorCode::NotFound, "has no guest here that could leave a password");
        };
        if passwords.forget(guest).await? {
            (self.wake)(&BTreeSet::from([action.object]));
            return Ok(json!("forgotten; the guest may leave another"));
        }
        refuse(ErrorCode::NotFound, "has no password: its guest left none")
    }
}
