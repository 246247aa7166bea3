//! Which requests a server has seen, and what it answered: the ground for sending again.
//!
//! Ids of finished requests are kept for a window far beyond oslo.messaging's 16; their answers
//! are kept for as long as their bytes fit a bound, so that memory stays flat.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;

/// Finished requests remembered.
const WINDOW: usize = 4096;

/// Bytes of answers remembered.
const ANSWER_BYTES: usize = 16 * 1024 * 1024;

/// What to do with a request that arrived.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Not seen before: it counts as running from now on.
    Fresh,
    /// A copy of one that runs; its answer goes to the same caller.
    Running,
    /// A copy of one that is done, with its answer if that is still held.
    Done(Option<Bytes>),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Memory {
    running: BTreeSet<String>,
    done: BTreeMap<String, Option<Bytes>>,
    /// Finished ids, oldest first.
    order: VecDeque<String>,
    /// Ids whose answers are held, oldest first. May name ids whose answer went already.
    answered: VecDeque<String>,
    bytes: usize,
}

impl Memory {
    /// Looks at a request that arrived. An empty id is never a copy.
    pub(super) fn admit(&mut self, id: &str) -> Admission {
        if id.is_empty() {
            return Admission::Fresh;
        }
        if let Some(answer) = self.done.get(id) {
            return Admission::Done(answer.clone());
        }
        if self.running.insert(id.to_owned()) { Admission::Fresh } else { Admission::Running }
    }

    /// The request was not taken after all.
    pub(super) fn forget(&mut self, id: &str) {
        self.running.remove(id);
    }

    /// The request is done; `answer` is what its caller was sent.
    pub(super) fn finish(&mut self, id: &str, answer: Option<Bytes>) {
        if !self.running.remove(id) {
            return;
        }
        let answer = answer.filter(|answer| answer.len() <= ANSWER_BYTES);
        if let Some(answer) = &answer {
            self.bytes += answer.len();
            self.answered.push_back(id.to_owned());
        }
        self.done.insert(id.to_owned(), answer);
        self.order.push_back(id.to_owned());
        while self.order.len() > WINDOW
            && let Some(oldest) = self.order.pop_front()
        {
            if let Some(Some(answer)) = self.done.remove(&oldest) {
                self.bytes -= answer.len();
            }
        }
        while self.bytes > ANSWER_BYTES || self.answered.len() > WINDOW {
            let Some(oldest) = self.answered.pop_front() else { break };
            if let Some(answer) = self.done.get_mut(&oldest).and_then(Option::take) {
                self.bytes -= answer.len();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn finished(memory: &mut Memory, id: &str, answer: &'static [u8]) {
        assert_eq!(memory.admit(id), Admission::Fresh);
        memory.finish(id, Some(Bytes::from_static(answer)));
    }

    #[test]
    fn a_copy_is_recognised_while_running_and_after() {
        let mut memory = Memory::default();
        assert_eq!(memory.admit("a"), Admission::Fresh);
        assert_eq!(memory.admit("a"), Admission::Running);
        memory.finish("a", Some(Bytes::from_static(b"x")));
        assert_eq!(memory.admit("a"), Admission::Done(Some(Bytes::from_static(b"x"))));
    }

    #[test]
    fn a_request_that_was_not_taken_is_fresh_again() {
        let mut memory = Memory::default();
        assert_eq!(memory.admit("a"), Admission::Fresh);
        memory.forget("a");
        assert_eq!(memory.admit("a"), Admission::Fresh);
    }

    #[test]
    fn a_request_without_an_id_is_never_a_copy() {
        let mut memory = Memory::default();
        assert_eq!(memory.admit(""), Admission::Fresh);
        memory.finish("", None);
        assert_eq!(memory.admit(""), Admission::Fresh);
    }

    #[test]
    fn the_window_forgets_the_oldest_finished_but_never_a_running_one() {
        let mut memory = Memory::default();
        assert_eq!(memory.admit("long"), Admission::Fresh);
        for number in 0..=WINDOW {
            finished(&mut memory, &number.to_string(), b"x");
        }
        assert_eq!(memory.admit("long"), Admission::Running);
        assert_eq!(memory.admit("1"), Admission::Done(Some(Bytes::from_static(b"x"))));
        assert_eq!(memory.admit("0"), Admission::Fresh);
    }

    proptest! {
        #[test]
        fn the_answers_held_stay_within_their_bound(
            sizes in prop::collection::vec(0usize..6 * 1024 * 1024, 1..20),
        ) {
            let mut memory = Memory::default();
            for (number, size) in sizes.iter().enumerate() {
                let id = number.to_string();
                memory.admit(&id);
                memory.finish(&id, Some(Bytes::from(vec![0; *size])));
                let held: usize = memory.done.values().flatten().map(Bytes::len).sum();
                prop_assert_eq!(held, memory.bytes);
                prop_assert!(held <= ANSWER_BYTES);
            }
        }
    }
}
