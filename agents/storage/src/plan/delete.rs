//! What goes: deletions, and who stands in their way.

use stackhand_model::ObjectRef;
use stackhand_runtime::agent::Outcome;

use super::{Change, Planner, pending};
use crate::backend::{Item, Presence, Usage};

impl Planner<'_> {
    pub(super) fn delete(&mut self) {
        let wanted = self.wanted;
        for (&id, wish) in wanted.attachments.iter().filter(|(_, wish)| wish.deleting) {
            if self.due.contains(&id.object()) {
                let outcome = self.detach(id, wish);
                self.plan.outcomes.insert(id.object(), outcome);
            }
        }
        self.withdraw();
        let snapshots = wanted.snapshots.iter().filter(|(_, wish)| wish.deleting);
        let volumes = wanted.volumes.iter().filter(|(_, wish)| wish.deleting);
        let items: Vec<Item> = snapshots
            .map(|(&id, _)| Item::Snapshot(id))
            .chain(volumes.map(|(&id, _)| Item::Volume(id)))
            .collect();
        for item in items {
            if self.due.contains(&item.object()) {
                let outcome = self.remove(item);
                self.plan.outcomes.insert(item.object(), outcome);
            }
        }
    }

    fn remove(&mut self, item: Item) -> Outcome {
        let object = item.object();
        let mut needs = Vec::new();
        match self.obstacles(item, &mut needs) {
            Some(obstacle) => return obstacle,
            None if self.running(item).is_some() => {
                let backend = self.running(item).map_or("", |work| &work.backend);
                self.step(Some(object), vec![], backend, Change::CallOff { item });
                return pending("waits for the work on it to end".into());
            }
            None => {}
        }
        // Only a look at every backend can tell that it is gone.
        for (name, view) in &self.situation.backends {
            if let Err(reason) = &view.observed {
                let may_hold = match item {
                    Item::Volume(id) => self.wanted.volumes.get(&id),
                    Item::Snapshot(id) => {
                        let volume = self.wanted.snapshots.get(&id).map(|wish| wish.spec.volume);
                        volume.and_then(|volume| self.wanted.volumes.get(&volume))
                    }
                }
                .is_none_or(|wish| self.backend_of(wish) == name);
                if may_hold {
                    return Outcome::failed(format!("backend {name} is away: {reason}"));
                }
            }
        }
        for name in self.situation.backends.keys() {
            let Some(seen) = self.seen(name, item) else { continue };
            match &seen.presence {
                // Never ours, so it stays when our object goes.
                Presence::Foreign { .. } => {}
                Presence::Ready if seen.usage != Usage::Free && !self.is_withdrawn(item) => {
                    return pending("somebody has it open, such as a running guest".into());
                }
                Presence::Partial => {
                    self.step(Some(object), needs.clone(), name, Change::Discard { item });
                }
                Presence::Ready | Presence::Inactive | Presence::Lost | Presence::Broken { .. } => {
                    self.step(Some(object), needs.clone(), name, Change::Delete { item });
                }
            }
        }
        Outcome::Gone
    }

    /// Whether the item is exported no longer once the steps before are done: then nobody has it
    /// open, and the backend looks again.
    fn is_withdrawn(&self, item: Item) -> bool {
        matches!(item, Item::Volume(id) if self.withdrawn.contains(&id))
    }

    /// Who still needs the item. Deletions that come first in this pass go to `needs`.
    fn obstacles(&self, item: Item, needs: &mut Vec<ObjectRef>) -> Option<Outcome> {
        let mut going = Vec::new();
        let mut staying = Vec::new();
        if let Item::Volume(id) = item {
            for (&attachment, wish) in &self.wanted.attachments {
                if wish.spec.volume != id {
                } else if !wish.deleting {
                    staying.push(format!(
                        "attached to host {} by {}",
                        wish.spec.connector.host,
                        attachment.object()
                    ));
                } else if self.plan.outcomes.get(&attachment.object()) == Some(&Outcome::Gone) {
                    needs.push(attachment.object());
                } else {
                    going.push(attachment.object().to_string());
                }
            }
            for (&snapshot, wish) in &self.wanted.snapshots {
                let name = self.wanted.call(Item::Snapshot(snapshot));
                if wish.spec.volume != id {
                } else if !wish.deleting {
                    staying.push(format!("{name} is kept of it"));
                } else if self.plan.outcomes.get(&snapshot.object()) == Some(&Outcome::Gone) {
                    needs.push(snapshot.object());
                } else {
                    going.push(name);
                }
            }
        }
        for (&volume, wish) in &self.wanted.volumes {
            let other = Item::Volume(volume);
            let made =
                || self.holder(other).is_some_and(|(_, seen)| seen.presence != Presence::Partial);
            if !wish.deleting && self.wanted.source(other) == Some(item) && !made() {
                going.push(format!("{} to be made from it", self.wanted.call(other)));
            }
        }
        for (&other, work) in &self.situation.works {
            if work.kind.source() == Some(item)
                && work.failure.is_none()
                && !going.iter().any(|name| name.contains(&other.object().id.to_string()))
            {
                going.push(format!("the work on {}", self.wanted.call(other)));
            }
        }
        if !staying.is_empty() {
            return Some(Outcome::failed(format!("{}; delete that first", staying.join(", "))));
        }
        (!going.is_empty()).then(|| pending(format!("waits for {}", going.join(", "))))
    }
}
