//! What was written into an index a moment ago and need not be written again.
//!
//! The indexes by which locks are found drop nothing that was written within a minute, and the sweep looks again soon where
//! something was written within half a minute (`lua/plan.lua`, `lua/forget.lua`). So what this replica wrote a few seconds ago stands, and a script call is saved. Whoever doubts that Redis still has its
//! data forgets all of it.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a writing counts, at least and at most once and twice this: a third of the minute altogether, so that a call
/// that is slow is over in time, and clocks need not agree.
const AGE: Duration = Duration::from_secs(10);

/// Writings remembered of each age. Beyond it later ones are not, and are written again: 2 MiB.
const LEN_MAX: usize = 50_000;

/// Recent writings.
#[derive(Debug)]
pub(super) struct Recent<K> {
    state: Mutex<State<K>>,
}

#[derive(Debug)]
struct State<K> {
    young: HashSet<K>,
    old: HashSet<K>,
    turned: Instant,
    /// How often the connection had been made when the first of them were written.
    connections: u64,
}

impl<K: Eq + Hash> Recent<K> {
    pub(super) fn new() -> Self {
        let state = State { young: HashSet::new(), old: HashSet::new(), turned: Instant::now(), connections: 0 };
        Self { state: Mutex::new(state) }
    }

    fn with<T>(&self, now: Instant, connections: u64, act: impl FnOnce(&mut State<K>) -> T) -> T {
        // Nothing panics half-way through a change.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.connections != connections || now.duration_since(state.turned) >= 2 * AGE {
            (state.young, state.old) = (HashSet::new(), HashSet::new());
            (state.turned, state.connections) = (now, connections);
        } else if now.duration_since(state.turned) >= AGE {
            state.old = std::mem::take(&mut state.young);
            state.turned = now;
        }
        act(&mut state)
    }

    /// Whether it was written on this connection a moment ago.
    pub(super) fn has(&self, key: &K, now: Instant, connections: u64) -> bool {
        self.with(now, connections, |state| state.young.contains(key) || state.old.contains(key))
    }

    /// It was written at `now`, before which the connection had been made so often.
    pub(super) fn note(&self, key: K, now: Instant, connections: u64) {
        self.with(now, connections, |state| {
            if state.young.len() < LEN_MAX {
                state.young.insert(key);
            }
        });
    }

    /// Redis may have lost what was written.
    pub(super) fn forget(&self) {
        self.with(Instant::now(), u64::MAX, |_| {});
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writing_counts_for_ten_to_twenty_seconds_and_on_its_connection() {
        let (start, recent) = (Instant::now(), Recent::new());
        assert!(!recent.has(&1, start, 1));
        recent.note(1, start, 1);
        assert!(recent.has(&1, start + AGE / 2, 1));
        recent.note(2, start + AGE / 2, 1);
        assert!(recent.has(&1, start + AGE, 1), "old");
        assert!(!recent.has(&1, start + AGE * 2, 1) && !recent.has(&2, start + AGE * 2, 1), "too old");
        recent.note(3, start + AGE * 2, 1);
        assert!(!recent.has(&3, start + AGE * 2, 2), "another connection");
        recent.note(4, start + AGE * 2, 2);
        recent.forget();
        assert!(!recent.has(&4, start + AGE * 2, 2));
        recent.note(5, start + AGE * 2, 2);
        assert!(!recent.has(&5, start + AGE * 9, 2), "nobody asked for long");
    }

    #[test]
    fn it_is_bounded() {
        let (now, recent) = (Instant::now(), Recent::new());
        for key in 0..=LEN_MAX {
            recent.note(key, now, 1);
        }
        assert!(recent.has(&0, now, 1) && !recent.has(&LEN_MAX, now, 1));
    }
}
