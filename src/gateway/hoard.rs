//! How the locks that were granted here end: whether users buy what they keep from others.
//!
//! Owns a count for each user, on this replica only: a count for the fleet would cost a call of Redis in every lock, and
//! sticky sessions bring a user back to the same replica. It decides nothing but, where that is configured, how long the
//! next lock of a user stands who let one after the other lapse.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use super::lock;
use crate::domain::{LockId, LockStatus, Personal, UserId};
use crate::metrics;

/// Locks whose end is awaited; later ones are not followed. As many as a replica has sockets, twice over.
const PENDING_MAX: usize = 100_000;

/// Users with a count; later ones have none.
const USERS_MAX: usize = 65_536;

/// A user none of whose locks has ended for so long has no count any more.
const FORGET_AFTER: Duration = Duration::from_hours(1);

/// An end that nobody told us of is asked for so long after it was due; the ledger remembers it for ten minutes.
const LATE: Duration = Duration::from_secs(5);

/// Asked for in one round: with a round in five seconds, fifty a second.
pub const ROUND_LEN_MAX: usize = 256;

/// Locks in a row that anybody may let lapse: changing one's mind is no abuse.
const IN_A_ROW_FREE: u32 = 2;

/// How a lock ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// Its user bought.
    Confirmed,
    /// Its user, or the orders-service, gave it back.
    Released,
    /// Its time ran out, or its user left.
    Abandoned,
}

#[derive(Debug, Default, Clone, Copy)]
struct Record {
    confirmed: u32,
    abandoned: u32,
    /// Abandoned since the last one that was bought.
    in_a_row: u32,
    last: Option<Instant>,
}

impl Record {
    /// The label of the share of locks that were abandoned, of those that were abandoned or bought.
    const fn share(&self) -> &'static str {
        match (self.abandoned, self.confirmed) {
            (abandoned, confirmed) if abandoned.saturating_add(confirmed) < 3 => "few",
            (0, _) => "none",
            (_, 0) => "all",
            (abandoned, confirmed) if abandoned < confirmed => "below_half",
            _ => "half_or_more",
        }
    }
}

const SHARES: [&str; 5] = ["few", "none", "below_half", "half_or_more", "all"];

#[derive(Debug, Default)]
struct State {
    pending: HashMap<LockId, (UserId, Instant)>,
    users: HashMap<UserId, Record>,
}

/// The locks and users of this replica.
#[derive(Debug, Default)]
pub struct Hoard {
    state: Mutex<State>,
}

impl Hoard {
    /// A lock was granted that stands so long if nothing else happens.
    pub fn granted(&self, user: UserId, id: LockId, life: Duration) {
        let mut state = lock(&self.state);
        if state.pending.len() < PENDING_MAX {
            state.pending.insert(id, (user, Instant::now() + life + LATE));
        }
    }

    /// Learns from a user's message.
    pub fn heard(&self, message: &Personal) {
        match message {
            Personal::Expired { lock, .. } => self.ended(*lock, Ending::Abandoned),
            Personal::Released { lock, .. } => self.ended(*lock, Ending::Released),
            Personal::Confirmed { lock, .. } => self.ended(*lock, Ending::Confirmed),
            Personal::Expiring { .. } | Personal::Pinned { .. } | Personal::Order { .. } => {}
        }
    }

    /// Its owner gave a lock back.
    pub fn given_back(&self, id: LockId) {
        self.ended(id, Ending::Released);
    }

    fn ended(&self, id: LockId, ending: Ending) {
        let mut state = lock(&self.state);
        let Some((user, _)) = state.pending.remove(&id) else { return };
        let known = state.users.contains_key(&user);
        let label = match ending {
            Ending::Confirmed => "confirmed",
            Ending::Released => "released",
            Ending::Abandoned => "abandoned",
        };
        metrics::GATEWAY_LOCK_ENDINGS.count(&[label]);
        if !known && state.users.len() >= USERS_MAX {
            return;
        }
        let record = state.users.entry(user).or_default();
        record.last = Some(Instant::now());
        match ending {
            Ending::Confirmed => (record.confirmed, record.in_a_row) = (record.confirmed.saturating_add(1), 0),
            Ending::Abandoned => {
                record.abandoned = record.abandoned.saturating_add(1);
                record.in_a_row = record.in_a_row.saturating_add(1);
            }
            Ending::Released => {}
        }
    }

    /// How long the next lock of a user stands: `normal`, halved for each lock in a row beyond [`IN_A_ROW_FREE`] that the
    /// user let lapse, down to `least`.
    pub fn life(&self, user: UserId, normal: Duration, least: Option<Duration>) -> Duration {
        let Some(least) = least else { return normal };
        let in_a_row = lock(&self.state).users.get(&user).map_or(0, |record| record.in_a_row);
        let halved = in_a_row.saturating_sub(IN_A_ROW_FREE).min(16);
        (normal / (1 << halved)).max(least.min(normal))
    }

    /// Locks whose end should have been heard of by now.
    pub fn overdue(&self) -> Vec<LockId> {
        let (state, now) = (lock(&self.state), Instant::now());
        state.pending.iter().filter(|(_, (_, due))| *due <= now).map(|(id, _)| *id).take(ROUND_LEN_MAX).collect()
    }

    /// What the ledger says of a lock that was overdue; `None` when it knows it no more.
    pub fn found(&self, id: LockId, status: Option<LockStatus>) {
        match status {
            Some(LockStatus::Confirmed) => self.ended(id, Ending::Confirmed),
            Some(LockStatus::Released) => self.ended(id, Ending::Released),
            Some(LockStatus::Expired) => self.ended(id, Ending::Abandoned),
            // Pinned: an order is in progress.
            Some(LockStatus::Active) => {
                if let Some((_, due)) = lock(&self.state).pending.get_mut(&id) {
                    *due = Instant::now() + LATE;
                }
            }
            None => drop(lock(&self.state).pending.remove(&id)),
        }
    }

    /// Forgets users of long ago and shows how many there are with each share of abandoned locks.
    #[expect(clippy::cast_precision_loss, reason = "counts of users are far below 2^52")]
    pub fn show(&self) {
        let mut state = lock(&self.state);
        state.users.retain(|_, record| record.last.is_some_and(|last| last.elapsed() < FORGET_AFTER));
        for share in SHARES {
            let users = state.users.values().filter(|record| record.share() == share).count();
            metrics::GATEWAY_ABANDONERS.set(&[share], users as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::EventId;

    fn user(id: u64) -> UserId {
        UserId::new(id).unwrap()
    }

    fn end(hoard: &Hoard, user: UserId, status: LockStatus) {
        let id = LockId::generate(EventId::new(1).unwrap());
        hoard.granted(user, id, Duration::from_secs(9));
        hoard.found(id, Some(status));
        hoard.found(id, Some(status));
    }

    #[tokio::test]
    async fn who_lets_locks_lapse_has_them_for_a_shorter_time_until_one_is_bought() {
        let (hoard, normal, least) = (Hoard::default(), Duration::from_secs(160), Duration::from_secs(30));
        let life = || hoard.life(user(7), normal, Some(least)).as_secs();
        let mut seen = Vec::new();
        for _ in 0..6 {
            seen.push(life());
            end(&hoard, user(7), LockStatus::Expired);
        }
        assert_eq!(seen, [160, 160, 160, 80, 40, 30]);
        end(&hoard, user(7), LockStatus::Released);
        assert_eq!(life(), 30, "giving one back changes nothing");
        assert_eq!(hoard.life(user(7), normal, None), normal, "off");
        assert_eq!(hoard.life(user(8), normal, Some(least)), normal, "somebody else");
        assert_eq!(hoard.life(user(7), Duration::from_secs(10), Some(least)).as_secs(), 10, "never longer");
        end(&hoard, user(7), LockStatus::Confirmed);
        assert_eq!(life(), 160);
        assert!(lock(&hoard.state).pending.is_empty());
    }

    #[tokio::test]
    async fn shares_are_told_apart() {
        let hoard = Hoard::default();
        for (id, confirmed, abandoned, share) in
            [(1, 1, 1, "few"), (2, 3, 0, "none"), (3, 3, 1, "below_half"), (4, 1, 2, "half_or_more"), (5, 0, 3, "all")]
        {
            (0..confirmed).for_each(|_| end(&hoard, user(id), LockStatus::Confirmed));
            (0..abandoned).for_each(|_| end(&hoard, user(id), LockStatus::Expired));
            assert_eq!(lock(&hoard.state).users[&user(id)].share(), share);
            assert!(SHARES.contains(&share));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_that_was_not_heard_of_is_asked_for_and_users_are_forgotten() {
        let hoard = Hoard::default();
        let id = LockId::generate(EventId::new(1).unwrap());
        hoard.granted(user(7), id, Duration::from_secs(10));
        assert!(hoard.overdue().is_empty());
        tokio::time::advance(Duration::from_secs(15)).await;
        assert_eq!(hoard.overdue(), [id]);
        hoard.found(id, Some(LockStatus::Active));
        assert!(hoard.overdue().is_empty(), "later");
        tokio::time::advance(LATE).await;
        assert_eq!(hoard.overdue(), [id]);
        hoard.found(id, None);
        assert!(hoard.overdue().is_empty() && lock(&hoard.state).users.is_empty());
        end(&hoard, user(7), LockStatus::Expired);
        tokio::time::advance(FORGET_AFTER).await;
        hoard.show();
        assert!(lock(&hoard.state).users.is_empty());
    }

    #[tokio::test]
    async fn it_is_bounded() {
        let hoard = Hoard::default();
        for _ in 0..PENDING_MAX + 10 {
            hoard.granted(user(7), LockId::generate(EventId::new(1).unwrap()), Duration::from_secs(1));
        }
        assert_eq!(lock(&hoard.state).pending.len(), PENDING_MAX);
    }
}
