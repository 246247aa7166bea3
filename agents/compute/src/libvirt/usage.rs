//! What domains use: processors and interfaces of all in one call, disks and memory in turns.
//!
//! For the former libvirt reads what the kernel counts. For the latter it puts some five questions to each QEMU, one
//! after another, which takes 5 ms a domain: 200 guests would keep libvirt busy for a second at each count. So a count
//! asks as many as fit into its share of time, those first that were asked longest ago; of the others it tells what they
//! said last. A domain that was never asked does not wait: a counter that starts at zero would be a lie.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use stackhand_model::InstanceId;
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use super::calls;

/// How long a count goes on asking.
const SHARE: Duration = Duration::from_millis(60);

/// Domains asked in one call.
const AT_ONCE: usize = 4;

const BY_KERNEL: u32 = sys::VIR_DOMAIN_STATS_CPU_TOTAL | sys::VIR_DOMAIN_STATS_INTERFACE;
const BY_QEMU: u32 = sys::VIR_DOMAIN_STATS_BALLOON | sys::VIR_DOMAIN_STATS_BLOCK;

/// Numbers by libvirt's names.
pub(super) type Numbers = BTreeMap<String, u64>;

/// What each domain said when it was asked last.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<BTreeMap<Uuid, Turn>>);

#[derive(Debug)]
struct Turn {
    /// libvirt's number of the run: another start has another.
    run: Option<u32>,
    asked: Instant,
    said: Numbers,
}

impl Turns {
    /// Numbers of our domains that are on. Those of `closely` are all as of now.
    pub(super) fn count(
        &self,
        connect: &Connect,
        closely: Option<InstanceId>,
    ) -> Result<BTreeMap<Uuid, Numbers>, Error> {
        let begun = Instant::now();
        let ours = calls::ours(connect)?;
        let mut all = calls::stats(ours.values(), BY_KERNEL)?;
        // One count at a time: another would ask the same.
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|uuid, turn| ours.get(uuid).is_some_and(|it| it.get_id() == turn.run));
        let mut queue: Vec<(&Uuid, &Domain)> = ours.iter().collect();
        queue.sort_by_cached_key(|(uuid, _)| {
            let waited = turns.get(uuid).map(|turn| turn.asked);
            (Reverse(closely == Some(InstanceId(**uuid))), waited)
        });
        for some in queue.chunks(AT_ONCE) {
            let can_wait = |uuid: &Uuid| {
                turns.contains_key(uuid) && closely.is_none_or(|closely| closely.0 != *uuid)
            };
            if begun.elapsed() >= SHARE && some.iter().all(|(uuid, _)| can_wait(uuid)) {
                break;
            }
            let mut said = calls::stats(some.iter().map(|(_, domain)| *domain), BY_QEMU)?;
            for (uuid, domain) in some {
                let said = said.remove(uuid).unwrap_or_default();
                let (run, asked) = (domain.get_id(), Instant::now());
                let turn = turns.entry(**uuid).or_insert(Turn { run, asked, said: Numbers::new() });
                turn.asked = asked;
                // One that is busy says which disks it has, and no more.
                if is_whole(&said) || turn.said.is_empty() {
                    turn.said = said;
                }
            }
        }
        for (uuid, numbers) in &mut all {
            let said = turns.get(uuid).map(|turn| turn.said.clone());
            numbers.extend(said.unwrap_or_default());
        }
        Ok(all)
    }
}

fn is_whole(said: &Numbers) -> bool {
    said.get("block.count") == Some(&0) || said.keys().any(|name| name.ends_with(".rd.bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_domain_that_only_names_its_disks_does_not_take_the_place_of_what_it_said_before() {
        let said = |numbers: &[(&str, u64)]| {
            is_whole(&numbers.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect())
        };
        assert!(said(&[("block.count", 1), ("block.0.rd.bytes", 7)]));
        assert!(said(&[("block.count", 0)]));
        assert!(!said(&[("block.count", 1)]));
        assert!(!said(&[]));
    }
}
