//! What a volume group holds, told as items, leftovers and troubles.

use std::collections::{BTreeMap, BTreeSet};

use super::report::{Group, Volume};
use super::revert::of_revert;
use super::{FOREIGN, LvmBackend, TAG, TO_WIPE, UNFINISHED, item_of};
use crate::backend::{BackendError, Instant, Leftover, Observed, Presence, Seen, Usage};

impl LvmBackend {
    /// What the group holds that concerns this backend.
    pub(super) fn look(&self, group: &Group) -> Result<Observed, BackendError> {
        let pool = self.pool(group)?;
        let (total_bytes, free_bytes) = match pool {
            Some(pool) => {
                let used = u128::from(pool.bytes) * u128::from(pool.fill.data) / 10_000;
                (pool.bytes, pool.bytes.saturating_sub(u64::try_from(used).unwrap_or(u64::MAX)))
            }
            None => (group.bytes, group.free_bytes),
        };
        let origins = group.volumes.iter().filter_map(|volume| volume.origin.as_deref()).collect();
        let mut items = BTreeMap::new();
        let mut leftovers = BTreeSet::new();
        for volume in &group.volumes {
            if let Some(item) = item_of(&volume.name) {
                // Another backend of the same group keeps the others.
                let mine = volume.pool.is_some() == self.is_thin();
                if mine || !volume.tags.contains(TAG) {
                    items.insert(item, Self::look_at(volume, &origins));
                }
            } else if volume.tags.contains(TAG) && volume.pool.is_some() == self.is_thin() {
                let (name, item) = (volume.name.clone(), of_revert(&volume.name));
                let to_wipe = !self.is_thin() && name.starts_with(TO_WIPE);
                if to_wipe || item.is_some() {
                    leftovers.insert(Leftover { name, item, to_wipe });
                }
            }
        }
        let finished = self.roll.items()?;
        for (&item, seen) in &items {
            // Made by a call that was cut off before it could note it.
            if seen.presence == Presence::Ready && !finished.contains(&item) {
                self.roll.add(item)?;
            }
        }
        for item in finished {
            let lost = Seen {
                presence: Presence::Lost,
                bytes: 0,
                allocated_bytes: 0,
                shared: false,
                usage: Usage::Free,
            };
            items.entry(item).or_insert(lost);
        }
        Ok(Observed {
            total_bytes,
            free_bytes,
            instant: Instant { snapshots: true, clones: self.is_thin() },
            thick: !self.is_thin(),
            fill: pool.map(|pool| pool.fill),
            troubles: self.troubles(group, pool),
            place: self.place(),
            items,
            leftovers,
        })
    }

    /// What is known of one logical volume of ours, or with a name of ours.
    fn look_at(volume: &Volume, origins: &BTreeSet<&str>) -> Seen {
        let presence = if !volume.tags.contains(TAG) {
            Presence::Foreign { what: FOREIGN.into() }
        } else if volume.tags.contains(UNFINISHED) {
            Presence::Partial
        } else if volume.state == 'I' {
            let what = "its space for changes is full, so it lost its contents: delete it";
            Presence::Broken { what: what.into() }
        } else if volume.health.contains("partial") {
            let what = "a disk under its volume group is missing: connect it, see `pvs`";
            Presence::Broken { what: what.into() }
        } else if !volume.active {
            Presence::Inactive
        } else {
            Presence::Ready
        };
        let allocated = match volume.kind {
            'V' => u128::from(volume.bytes) * u128::from(volume.fill.data) / 10_000,
            _ => u128::from(volume.room),
        };
        Seen {
            presence,
            bytes: volume.bytes,
            allocated_bytes: u64::try_from(allocated).unwrap_or(volume.bytes),
            shared: volume.kind == 'V'
                && (volume.origin.is_some() || origins.contains(volume.name.as_str())),
            usage: if volume.open { Usage::Written } else { Usage::Free },
        }
    }

    fn troubles(&self, group: &Group, pool: Option<&Volume>) -> Vec<String> {
        let name = &self.options.group;
        let mut troubles = Vec::new();
        if group.missing_disks > 0 {
            troubles.push(format!(
                "{} disks of volume group {name} are missing: connect them, see `pvs`",
                group.missing_disks
            ));
        }
        if let Some(pool) = pool.filter(|pool| !pool.health.is_empty()) {
            troubles.push(format!(
                "thin pool {name}/{} is not well ({}): extend it with `lvextend`, or mend it with \
                 `lvconvert --repair` while nothing uses it",
                pool.name, pool.health
            ));
        }
        troubles
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Fill;

    fn volume(tags: &[&str], attributes: &str) -> Volume {
        Volume {
            name: "volume-1".into(),
            bytes: 1000,
            room: 1000,
            tags: tags.iter().map(|&tag| tag.to_owned()).collect(),
            kind: attributes.chars().next().unwrap(),
            writable: true,
            state: attributes.chars().nth(4).unwrap(),
            origin: None,
            pool: None,
            fill: Fill { data: 2500, metadata: 0 },
            health: String::new(),
            active: true,
            open: false,
        }
    }

    #[test]
    fn tags_and_health_tell_what_a_volume_is() {
        let look = |volume: Volume| LvmBackend::look_at(&volume, &BTreeSet::new());
        let thin = look(volume(&[TAG], "Vwi-a-tz--"));
        assert_eq!((thin.presence, thin.allocated_bytes), (Presence::Ready, 250));
        assert_eq!(look(volume(&[TAG], "-wi-a-----")).allocated_bytes, 1000);
        let foreign = look(volume(&[], "Vwi-a-tz--"));
        assert!(matches!(foreign.presence, Presence::Foreign { .. }));
        assert_eq!(look(volume(&[TAG, UNFINISHED], "Vwi-a-tz--")).presence, Presence::Partial);
        let full = look(volume(&[TAG], "swi-I-s---"));
        assert!(matches!(full.presence, Presence::Broken { .. }));
        let mut lost = volume(&[TAG], "-wi-a---p-");
        lost.health = "partial".into();
        assert!(matches!(look(lost).presence, Presence::Broken { .. }));
        let mut asleep = volume(&[TAG], "-wi-------");
        asleep.active = false;
        assert_eq!(look(asleep).presence, Presence::Inactive);
    }
}
