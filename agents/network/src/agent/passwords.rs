//! Passwords that guests left, as the statuses of their ports tell them and owners forget them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::{Value, json};
use stackhand_model::{Document, ErrorCode, InstanceId, Kind, ObjectRef, PortId, Spec};
use stackhand_runtime::agent::{Action, Desired, Outcome, Refusal};

use super::NetworkAgent;
use crate::desired::guest_id;
use crate::services::metadata::Passwords;

/// The action of that name.
pub(super) const FORGET_PASSWORD: &str = "forget-password";

/// The guest behind a port.
fn guest(document: &Document) -> Option<InstanceId> {
    let Spec::Port(spec) = &document.spec else { return None };
    spec.guest.as_ref().map(|_| guest_id(PortId(document.id), spec))
}

impl NetworkAgent {
    async fn passwords(&self) -> Option<Arc<Passwords>> {
        self.services.lock().await.passwords()
    }

    /// Puts passwords into what was observed of ports, and forgets those of guests that went.
    pub(super) async fn tell_passwords(
        &self,
        desired: &Desired,
        outcomes: &mut BTreeMap<ObjectRef, Outcome>,
    ) {
        let Some(passwords) = self.passwords().await.filter(|it| !it.is_empty()) else { return };
        let held = desired.objects.values().filter(|held| !held.deleting);
        let guests = held.filter_map(|held| guest(&held.document)).collect();
        passwords.keep_only(&guests).await;
        for (object, outcome) in outcomes {
            let observed = match outcome {
                Outcome::Active { observed }
                | Outcome::Pending { observed, .. }
                | Outcome::Failed { observed, .. } => observed,
                Outcome::Gone => continue,
            };
            let id = desired.objects.get(object).and_then(|held| guest(&held.document));
            if let Some(password) = id.and_then(|id| passwords.of(id))
                && let Value::Object(facts) = observed
            {
                facts.insert("password".into(), json!(password));
            }
        }
    }

    /// The action `forget-password` of a port.
    pub(super) async fn forget_password(&self, action: &Action) -> Result<Value, Refusal> {
        let refuse = |code, text: &str| {
            let message = format!("{} {text}", action.object);
            Err(Refusal::new(code, message).about(action.object))
        };
        if action.object.kind != Kind::Port {
            return refuse(ErrorCode::Unsupported, "leaves no password; name its guest's port");
        }
        let (Some(guest), Some(passwords)) = (guest(&action.document), self.passwords().await)
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
