//! What is remembered of a volume group between looks, for a look costs half as much as a change.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::report::Group;

/// How old what is remembered may be: a little more than the time from one resync to the next.
const KEPT: Duration = Duration::from_secs(75);

/// How old a look may be that stands for another: about as old as one gets that takes its time.
const RECENT: Duration = Duration::from_secs(2);

/// The last look, with what was changed since. Nothing, if that is not known.
#[derive(Debug, Default)]
pub(super) struct Memory(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Counts beginnings and ends of changes: what a look saw across one of them is not kept.
    turns: u64,
    seen: Option<Seen>,
}

#[derive(Debug)]
struct Seen {
    when: Instant,
    group: Group,
}

/// A look that has begun.
#[derive(Debug)]
pub(super) struct Look {
    when: Instant,
    turns: u64,
}

/// A change that has begun. Dropped, it leaves nothing to be remembered.
#[derive(Debug)]
pub(super) struct Change<'a> {
    memory: &'a Memory,
    turns: u64,
    before: Option<Seen>,
}

impl Memory {
    /// What is remembered, if it is not too old.
    pub(super) fn recall(&self) -> Option<Group> {
        self.seen_within(KEPT, Instant::now())
    }

    /// What was seen a moment ago.
    pub(super) fn recent(&self) -> Option<Group> {
        self.seen_within(RECENT, Instant::now())
    }

    fn seen_within(&self, age: Duration, now: Instant) -> Option<Group> {
        let state = self.state();
        let seen = state.seen.as_ref().filter(|seen| now.duration_since(seen.when) < age)?;
        Some(seen.group.clone())
    }

    /// To be called before the group is looked at.
    pub(super) fn look(&self) -> Look {
        Look { when: Instant::now(), turns: self.state().turns }
    }

    /// Remembers what the look saw, unless a change began or ended meanwhile.
    pub(super) fn keep(&self, look: &Look, group: Group) {
        let mut state = self.state();
        if state.turns == look.turns {
            state.seen = Some(Seen { when: look.when, group });
        }
    }

    /// To be called before the group is changed, and held until that is done.
    pub(super) fn change(&self) -> Change<'_> {
        let mut state = self.state();
        state.turns += 1;
        Change { memory: self, turns: state.turns, before: state.seen.take() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Change<'_> {
    /// The change is done, and nothing but `effect` differs from before.
    pub(super) fn remember(mut self, effect: impl FnOnce(&mut Group)) {
        let Some(mut seen) = self.before.take() else { return };
        effect(&mut seen.group);
        let mut state = self.memory.state();
        if state.turns == self.turns {
            state.turns += 1;
            state.seen = Some(seen);
            // The end of this change is told.
            self.turns = 0;
        }
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        if self.turns != 0 {
            let mut state = self.memory.state();
            state.turns += 1;
            state.seen = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(free_bytes: u64) -> Group {
        Group { uuid: "g".into(), bytes: 9, free_bytes, missing_disks: 0, volumes: vec![] }
    }

    fn looked(memory: &Memory, free_bytes: u64) {
        let look = memory.look();
        memory.keep(&look, group(free_bytes));
    }

    #[test]
    fn a_look_is_remembered_for_a_while_and_until_a_change() {
        let memory = Memory::default();
        assert_eq!(memory.recall(), None);
        looked(&memory, 5);
        assert_eq!(memory.recall(), Some(group(5)));
        assert_eq!(memory.seen_within(KEPT, Instant::now() + KEPT), None);
        let change = memory.change();
        assert_eq!(memory.recall(), None);
        drop(change);
        assert_eq!(memory.recall(), None);
    }

    #[test]
    fn a_change_whose_effect_is_known_is_remembered() {
        let memory = Memory::default();
        memory.change().remember(|_| panic!("nothing is known that it could change"));
        looked(&memory, 5);
        memory.change().remember(|group| group.free_bytes = 4);
        memory.change().remember(|group| group.free_bytes -= 1);
        assert_eq!(memory.recall(), Some(group(3)));
    }

    #[test]
    fn what_overlaps_a_change_is_not_remembered() {
        let memory = Memory::default();
        let look = memory.look();
        drop(memory.change());
        memory.keep(&look, group(5));
        assert_eq!(memory.recall(), None, "a change began and ended while it looked");

        let change = memory.change();
        let look = memory.look();
        drop(change);
        memory.keep(&look, group(5));
        assert_eq!(memory.recall(), None, "a change ended while it looked");

        looked(&memory, 5);
        let first = memory.change();
        let second = memory.change();
        first.remember(|group| group.free_bytes = 4);
        second.remember(|group| group.free_bytes = 3);
        assert_eq!(memory.recall(), None, "two changes at once");

        looked(&memory, 5);
        let change = memory.change();
        looked(&memory, 4);
        change.remember(|group| group.free_bytes = 3);
        assert_eq!(memory.recall(), Some(group(3)), "what was seen during a change is older");
    }
}
