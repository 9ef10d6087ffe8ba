//! What is due when: each key at most once. Pure.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;

use tokio::time::Instant;

/// Keys by the time at which they are due.
#[derive(Debug)]
pub(super) struct Agenda<K> {
    by_time: BTreeSet<(Instant, K)>,
    by_key: HashMap<K, Instant>,
}

impl<K> Default for Agenda<K> {
    fn default() -> Self {
        Self { by_time: BTreeSet::new(), by_key: HashMap::new() }
    }
}

impl<K: Copy + Ord + Hash> Agenda<K> {
    /// Makes the key due at `at`, or leaves it where it is if that is sooner.
    pub(super) fn plan(&mut self, key: K, at: Instant) {
        if let Some(&planned) = self.by_key.get(&key) {
            if planned <= at {
                return;
            }
            self.by_time.remove(&(planned, key));
        }
        self.by_key.insert(key, at);
        self.by_time.insert((at, key));
    }

    /// When something is due next.
    pub(super) fn next(&self) -> Option<Instant> {
        self.by_time.first().map(|&(at, _)| at)
    }

    /// What is due next.
    pub(super) fn first(&self) -> Option<K> {
        self.by_time.first().map(|&(_, key)| key)
    }

    /// Takes what is due first, if it is due by `now`.
    pub(super) fn take(&mut self, now: Instant) -> Option<K> {
        let &(at, key) = self.by_time.first().filter(|(at, _)| *at <= now)?;
        self.by_time.remove(&(at, key));
        self.by_key.remove(&key);
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_key_is_due_once_at_the_earliest_time_planned() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut agenda = Agenda::default();
        agenda.plan('a', at(30));
        agenda.plan('b', at(20));
        agenda.plan('a', at(10));
        agenda.plan('a', at(40));
        assert_eq!(agenda.next(), Some(at(10)));
        assert_eq!(agenda.take(at(9)), None);
        assert_eq!(agenda.take(at(25)), Some('a'));
        assert_eq!(agenda.take(at(25)), Some('b'));
        assert_eq!((agenda.take(at(99)), agenda.next()), (None, None));
    }
}
