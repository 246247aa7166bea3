//! Who gets a volume: this host by a path, others by an export.

use serde_json::json;
use stackhand_model::{AttachmentId, AttachmentSpec, Connection, ObjectRef, VolumeId};
use stackhand_runtime::agent::Outcome;

use super::{Change, EXPORTS, Guests, Planner, Standing, Step, pending};
use crate::backend::{Item, Place, Presence};
use crate::desired::Wish;
use crate::export::{Admission, SeenTarget, Target, initiator_name, target_name};

/// The name under which an attachment's host logs in.
pub(super) fn initiator(spec: &AttachmentSpec) -> String {
    let connector = &spec.connector;
    connector.initiator.clone().unwrap_or_else(|| initiator_name(&connector.host))
}

impl Planner<'_> {
    /// Whether an attachment is of another host.
    pub(super) fn is_remote(&self, spec: &AttachmentSpec) -> bool {
        spec.connector.host != self.situation.host
    }

    /// The target of a volume, if there is one.
    pub(super) fn exported(&self, volume: VolumeId) -> Option<&SeenTarget> {
        self.situation.exports.as_ref()?.observed.as_ref().ok()?.get(&volume)
    }

    pub(super) fn attach(&mut self, id: AttachmentId, wish: &Wish<AttachmentSpec>) -> Outcome {
        let volume = Item::Volume(wish.spec.volume);
        let name = self.wanted.call(volume);
        let Some(volume_wish) = self.wanted.volumes.get(&wish.spec.volume) else {
            return pending(format!("waits for {name}: it is not known here"));
        };
        if volume_wish.deleting {
            return Outcome::failed(format!("{name} is being deleted"));
        }
        if let Some(refusal) = self.taken(id, wish, volume_wish.spec.multiattach) {
            return refusal;
        }
        if let Some((&other, _)) = self
            .situation
            .works
            .iter()
            .find(|(_, work)| work.kind.source() == Some(volume) && work.failure.is_none())
            && !wish.spec.read_only
        {
            let other = self.wanted.call(other);
            return pending(format!("waits for the copy from {name} to {other}"));
        }
        match self.stand(volume) {
            Standing::Waits(reason) | Standing::Failed(reason) => {
                pending(self.waits_for(volume, &reason))
            }
            Standing::Ready { backend, bytes } => {
                let observed = self.situation.backends.get(&backend).map(|view| &view.observed);
                let Some(Ok(observed)) = observed else {
                    return Outcome::failed(format!("backend {backend} is away"));
                };
                let connection = if self.is_remote(&wish.spec) {
                    match self.export(id, &wish.spec, &backend, bytes) {
                        Ok(connection) => connection,
                        Err(reason) => return Outcome::failed(reason),
                    }
                } else {
                    observed.place.connection(volume)
                };
                self.plan.relies_on.insert(id.object(), volume.object());
                let mut facts = json!({
                    "connection": connection,
                    "read_only": wish.spec.read_only,
                });
                if let Some(fixed) = self.stale_size(wish.spec.volume, bytes) {
                    facts["size_bytes"] = fixed.into();
                    facts["note"] = "it has grown; its host sees that once it logs in anew".into();
                }
                Outcome::Active { observed: facts.into() }
            }
        }
    }

    /// Who has the volume already, if that stands in the way.
    fn taken(
        &self,
        id: AttachmentId,
        wish: &Wish<AttachmentSpec>,
        multiattach: bool,
    ) -> Option<Outcome> {
        let mut others = self.wanted.attachments.iter().filter(|(other, it)| {
            **other < id && !it.deleting && it.spec.volume == wish.spec.volume
        });
        let name = self.wanted.call(Item::Volume(wish.spec.volume));
        if multiattach {
            let same = |it: &AttachmentSpec| {
                self.is_remote(it)
                    && self.is_remote(&wish.spec)
                    && initiator(it) == initiator(&wish.spec)
            };
            let (other, _) = others.find(|(_, it)| same(&it.spec))?;
            let host = &wish.spec.connector.host;
            let reason = format!(
                "{name} is attached to host {host} by {} under the same initiator name",
                other.object()
            );
            return Some(Outcome::failed(reason));
        }
        let (other, it) = others.next()?;
        Some(Outcome::failed(format!(
            "{name} is attached to host {} by {}, and multiattach is not set",
            it.spec.connector.host,
            other.object()
        )))
    }

    /// Lets another host have a volume; answers how it reaches it.
    fn export(
        &mut self,
        id: AttachmentId,
        spec: &AttachmentSpec,
        backend: &str,
        bytes: u64,
    ) -> Result<Connection, String> {
        let host = &spec.connector.host;
        let Some(exports) = &self.situation.exports else {
            return Err(format!(
                "host {host} is not this host ({}), and storage.export.type is none: set it to lio \
                 or tgt, or run the instance here",
                self.situation.host
            ));
        };
        if let Err(reason) = &exports.observed {
            return Err(reason.clone());
        }
        let (user, password) = (exports.key.user(id), exports.key.password(id));
        let initiator = initiator(spec);
        let admission =
            Admission { user: user.clone(), password: password.clone(), read_only: spec.read_only };
        let connection = Connection::Iscsi {
            portal: exports.portal.to_string(),
            iqn: target_name(spec.volume),
            lun: exports.lun,
            initiator: Some(initiator.clone()),
            client: spec.connector.client,
            username: Some(user),
            password: Some(password),
        };
        let guests = self.guests.entry(spec.volume).or_insert_with(|| Guests {
            backend: backend.to_owned(),
            bytes,
            admitted: [].into(),
            due: vec![],
        });
        guests.admitted.insert(initiator, admission);
        guests.due.push(id.object());
        Ok(connection)
    }

    /// The size that logged-in hosts see, where it is behind and cannot follow under them.
    fn stale_size(&self, volume: VolumeId, bytes: u64) -> Option<u64> {
        let seen = self.exported(volume).filter(|seen| !seen.sessions.is_empty())?;
        seen.fixed_bytes.filter(|&fixed| fixed < bytes)
    }

    /// Ends the exports that nobody is to have any more. Who is logged in keeps them.
    pub(super) fn withdraw(&mut self) {
        let Some(exports) = &self.situation.exports else { return };
        let Ok(observed) = &exports.observed else { return };
        for (&volume, seen) in observed {
            let mut leaving = Vec::new();
            let mut kept = false;
            for (&id, wish) in &self.wanted.attachments {
                if wish.spec.volume != volume || !self.is_remote(&wish.spec) {
                } else if wish.deleting
                    && self.plan.outcomes.get(&id.object()) == Some(&Outcome::Gone)
                {
                    leaving.push(id.object());
                } else {
                    kept = true;
                }
            }
            if kept || (leaving.is_empty() && !seen.sessions.is_empty()) {
                continue;
            }
            self.withdrawn.insert(volume);
            let mut objects = leaving.into_iter();
            self.plan.steps.push(Step {
                object: objects.next(),
                also: objects.collect(),
                needs: vec![],
                backend: EXPORTS.to_owned(),
                change: Change::Withdraw { volume },
            });
        }
    }

    /// Makes the exports as they are to be.
    pub(super) fn publish(&mut self) {
        let Some(exports) = &self.situation.exports else { return };
        let Ok(observed) = &exports.observed else { return };
        for (volume, mut guests) in std::mem::take(&mut self.guests) {
            let seen = observed.get(&volume);
            // Attachments whose turn it is not keep what they have.
            for (id, wish) in &self.wanted.attachments {
                let name = initiator(&wish.spec);
                let gone = self.plan.outcomes.get(&id.object()) == Some(&Outcome::Gone);
                if wish.spec.volume == volume
                    && self.is_remote(&wish.spec)
                    && !gone
                    && !guests.admitted.contains_key(&name)
                    && seen.is_some_and(|seen| seen.admitted.contains_key(&name))
                {
                    let admission = Admission {
                        user: exports.key.user(*id),
                        password: exports.key.password(*id),
                        read_only: wish.spec.read_only,
                    };
                    guests.admitted.insert(name, admission);
                }
            }
            let Some(view) = self.situation.backends.get(&guests.backend) else { continue };
            let Ok(backend) = &view.observed else { continue };
            let mut target = Target {
                volume,
                path: backend.place.path(Item::Volume(volume)),
                bytes: guests.bytes,
                is_device: matches!(backend.place, Place::Group(_)),
                admitted: guests.admitted,
            };
            if let Some(fixed) = self.stale_size(volume, target.bytes) {
                target.bytes = fixed;
            }
            if seen.is_some_and(|seen| target.is_met_by(seen)) {
                continue;
            }
            let leaving: Vec<ObjectRef> = self
                .wanted
                .attachments
                .iter()
                .filter(|(id, wish)| {
                    wish.spec.volume == volume
                        && self.plan.outcomes.get(&id.object()) == Some(&Outcome::Gone)
                })
                .map(|(id, _)| id.object())
                .collect();
            let mut objects = guests.due.into_iter().chain(leaving);
            self.plan.steps.push(Step {
                object: objects.next(),
                also: objects.collect(),
                needs: vec![Item::Volume(volume).object()],
                backend: EXPORTS.to_owned(),
                change: Change::Publish { target: Box::new(target) },
            });
        }
    }

    /// Whether an attachment may go, seen from the side of the host that has it.
    pub(super) fn detach(&self, id: AttachmentId, wish: &Wish<AttachmentSpec>) -> Outcome {
        let (volume, host) = (wish.spec.volume, &wish.spec.connector.host);
        let name = self.wanted.call(Item::Volume(volume));
        if self.is_remote(&wish.spec) {
            return match self.situation.exports.as_ref().map(|exports| &exports.observed) {
                Some(Err(reason)) => Outcome::failed(reason.clone()),
                Some(Ok(observed))
                    if observed
                        .get(&volume)
                        .is_some_and(|seen| seen.sessions.contains(&initiator(&wish.spec)))
                        && !self.situation.fenced.contains(&id) =>
                {
                    pending(format!(
                        "host {host} is logged in to {name}: detach it from the instance first; if \
                         the host is dead, let the action fence shut it out"
                    ))
                }
                _ => Outcome::Gone,
            };
        }
        let others = self.wanted.attachments.iter().any(|(&other, it)| {
            other != id && !it.deleting && it.spec.volume == volume && !self.is_remote(&it.spec)
        });
        // An exporter has devices open, too; what guests have open cannot be told apart then.
        let in_use = self.exported(volume).is_none()
            && self.holder(Item::Volume(volume)).is_some_and(|(_, seen)| {
                seen.presence == Presence::Ready && seen.usage != crate::backend::Usage::Free
            });
        if !others && in_use {
            return pending(format!(
                "a running guest of this host has {name} open: detach it from the instance first"
            ));
        }
        Outcome::Gone
    }
}
