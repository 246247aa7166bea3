//! Which namespaces changed since they were looked at.
//!
//! A host has hundreds of namespaces, and a pass mostly concerns one or none of them. What was seen
//! of a namespace holds as long as we listen to its changes and hear of none, and make none. The
//! timer's passes look at everything all the same: an event that was lost costs minutes, not days.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Numbers changes, and keeps the last number of each namespace that somebody listens to.
#[derive(Debug, Default)]
pub struct Freshness(Mutex<Numbers>);

#[derive(Debug, Default)]
struct Numbers {
    last: u64,
    by_space: BTreeMap<String, u64>,
}

impl Freshness {
    /// The number of the last change; take it before looking. `None`: look every time.
    #[must_use]
    pub fn number(&self, space: &str) -> Option<u64> {
        self.lock().by_space.get(space).copied()
    }

    /// Something changed, or may have.
    pub fn changed(&self, space: &str) {
        let mut numbers = self.lock();
        numbers.last += 1;
        let last = numbers.last;
        if let Some(number) = numbers.by_space.get_mut(space) {
            *number = last;
        }
    }

    /// Everything is to be looked at again.
    pub fn all_changed(&self) {
        let mut numbers = self.lock();
        numbers.last += 1;
        let last = numbers.last;
        numbers.by_space.values_mut().for_each(|number| *number = last);
    }

    /// Somebody listens to the namespace from now on.
    pub(crate) fn listening(&self, space: &str) {
        let mut numbers = self.lock();
        numbers.last += 1;
        let last = numbers.last;
        numbers.by_space.insert(space.to_owned(), last);
    }

    /// Nobody listens any more.
    pub(crate) fn deaf(&self, space: &str) {
        self.lock().by_space.remove(space);
    }

    fn lock(&self) -> MutexGuard<'_, Numbers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was seen of a namespace, and the number of its last change before that.
#[derive(Clone, Debug)]
pub struct Dated<T> {
    number: u64,
    what: T,
}

impl<T: Clone> Dated<T> {
    /// What was seen, with the number from before.
    #[must_use]
    pub fn new(number: u64, what: T) -> Self {
        Self { number, what }
    }

    /// What was seen, if it still holds.
    #[must_use]
    pub fn still(&self, number: Option<u64>) -> Option<T> {
        (number == Some(self.number)).then(|| self.what.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_holds_until_something_changes_or_nobody_listens() {
        let freshness = Freshness::default();
        assert_eq!(freshness.number("a"), None, "nobody listens yet");
        freshness.listening("a");
        let before = freshness.number("a").unwrap();
        let seen = Dated::new(before, "seen");
        assert_eq!(seen.still(freshness.number("a")), Some("seen"));
        freshness.changed("b");
        assert_eq!(seen.still(freshness.number("a")), Some("seen"));
        freshness.changed("a");
        assert_eq!(seen.still(freshness.number("a")), None);
        let seen = Dated::new(freshness.number("a").unwrap(), "seen");
        freshness.deaf("a");
        assert_eq!(seen.still(freshness.number("a")), None);
        freshness.listening("a");
        assert_eq!(seen.still(freshness.number("a")), None, "nobody listened meanwhile");
        let seen = Dated::new(freshness.number("a").unwrap(), "seen");
        freshness.all_changed();
        assert_eq!(seen.still(freshness.number("a")), None);
    }
}
