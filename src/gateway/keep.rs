//! What this replica remembers of the locks of its own users, so that a ledger that lost its data can have them back.
//!
//! A copy, never an authority: nothing is decided by it. It is filled by answers and by the users' own messages, and
//! what it has missed does no harm, because the ledger takes back only what it does not know and has tickets for.

use std::collections::HashMap;
use std::sync::Mutex;

use super::lock;
use crate::domain::{Kept, Lock, LockId, LockStatus, Memento, Personal, UserId};

/// Locks remembered of one user. Nobody has so many; beyond it later ones are not remembered.
const PER_USER_MAX: usize = 256;

/// The latest ends that are known of one user's locks: a listing that was made before an end may come after it. Nobody ends
/// so many locks while a listing is on its way.
const ENDS_MAX: usize = 32;

/// What is remembered of one user.
#[derive(Debug, Default)]
struct Remembered {
    sessions: usize,
    locks: Vec<Memento>,
    ended: Vec<LockId>,
}

impl Remembered {
    fn find(&mut self, id: LockId) -> Option<&mut Memento> {
        self.locks.iter_mut().find(|known| known.lock == id)
    }

    /// Unless it has ended, or there are too many.
    fn add(&mut self, memento: Memento) {
        if self.locks.len() < PER_USER_MAX && !self.ended.contains(&memento.lock) {
            self.locks.push(memento);
        }
    }

    /// True when it was remembered until now.
    fn end(&mut self, id: LockId) -> bool {
        if !self.ended.contains(&id) {
            if self.ended.len() == ENDS_MAX {
                self.ended.remove(0);
            }
            self.ended.push(id);
        }
        let before = self.locks.len();
        self.locks.retain(|known| known.lock != id);
        self.locks.len() < before
    }
}

/// The remembered locks of users with a socket here. Of others nothing is remembered, whatever is told of them.
#[derive(Debug, Default)]
pub struct Keep {
    users: Mutex<HashMap<UserId, Remembered>>,
}

impl Keep {
    /// The user has a socket here, or one more.
    pub fn begin(&self, user: UserId) {
        lock(&self.users).entry(user).or_default().sessions += 1;
    }

    /// A socket of the user is gone. With the last one all is forgotten.
    pub fn forget(&self, user: UserId) {
        let mut users = lock(&self.users);
        let Some(remembered) = users.get_mut(&user) else { return };
        remembered.sessions = remembered.sessions.saturating_sub(1);
        if remembered.sessions == 0 {
            users.remove(&user);
        }
    }

    /// Remembers a lock just granted. Of one that was known before it learns what a listing does not say.
    pub fn granted(&self, user: UserId, memento: Memento) {
        let mut users = lock(&self.users);
        let Some(remembered) = users.get_mut(&user) else { return };
        match remembered.find(memento.lock) {
            Some(known) => {
                (known.deadline, known.request, known.session) = (memento.deadline, memento.request, memento.session);
            }
            None => remembered.add(memento),
        }
    }

    /// Remembers active locks that were listed, with their deadlines.
    pub fn listed(&self, user: UserId, listed: &[Lock]) {
        let mut users = lock(&self.users);
        let Some(remembered) = users.get_mut(&user) else { return };
        for active in listed.iter().filter(|active| active.status == LockStatus::Active) {
            let kept = if active.pinned { Kept::Pinned } else { Kept::Attended };
            match remembered.find(active.id) {
                Some(known) => {
                    known.deadline = active.deadline;
                    if known.kept == Kept::Attended {
                        known.kept = kept;
                    }
                }
                None => remembered.add(Memento {
                    lock: active.id,
                    category: active.category,
                    quantity: active.quantity,
                    created_at: active.created_at,
                    deadline: active.deadline,
                    kept,
                    request: None,
                    session: active.session,
                }),
            }
        }
    }

    /// Learns from a user's message.
    pub fn heard(&self, user: UserId, message: &Personal) {
        let mut users = lock(&self.users);
        let Some(remembered) = users.get_mut(&user) else { return };
        match message {
            Personal::Expired { lock, .. } | Personal::Released { lock, .. } => drop(remembered.end(*lock)),
            Personal::Pinned { lock, deadline } => {
                if let Some(known) = remembered.find(*lock) {
                    (known.kept, known.deadline) = (Kept::Pinned, *deadline);
                }
            }
            Personal::Confirmed { lock, order } => {
                if let Some(known) = remembered.find(*lock) {
                    known.kept = Kept::Confirmed { order: order.clone() };
                }
            }
            // The stock shows the sale from now on, and a cancelled one needs no tickets.
            Personal::Order { order: reported, event, category, .. } => {
                let is_of = |known: &&Memento| match &known.kept {
                    Kept::Confirmed { order: Some(order) } => order == reported,
                    Kept::Confirmed { order: None } => (known.lock.event(), known.category) == (*event, *category),
                    Kept::Attended | Kept::Pinned => false,
                };
                let over: Vec<LockId> = remembered.locks.iter().filter(is_of).map(|known| known.lock).collect();
                for id in over {
                    remembered.end(id);
                }
            }
            Personal::Expiring { .. } => {}
        }
    }

    /// A lock is gone; true when it was remembered until now.
    pub fn ended(&self, user: UserId, id: LockId) -> bool {
        lock(&self.users).get_mut(&user).is_some_and(|remembered| remembered.end(id))
    }

    /// Whether a lock is known to be gone.
    pub fn has_ended(&self, user: UserId, id: LockId) -> bool {
        lock(&self.users).get(&user).is_some_and(|remembered| remembered.ended.contains(&id))
    }

    /// The locks remembered of a user.
    pub fn of(&self, user: UserId) -> Vec<Memento> {
        lock(&self.users).get(&user).map(|remembered| remembered.locks.clone()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{CategoryId, EventId, Instant, OrderId, OrderResult, Quantity, ReleaseReason};

    fn user() -> UserId {
        UserId::new(7).expect("an id")
    }

    fn memento(id: LockId) -> Memento {
        Memento {
            lock: id,
            category: CategoryId::new(4).expect("an id"),
            quantity: Quantity::new(2).expect("a quantity"),
            created_at: Instant::from_ms(1),
            deadline: Instant::from_ms(9),
            kept: Kept::Attended,
            request: None,
            session: None,
        }
    }

    /// With a socket of the user.
    fn keep() -> Keep {
        let keep = Keep::default();
        keep.begin(user());
        keep
    }

    /// As a listing tells of it.
    fn active(id: LockId) -> Lock {
        let Memento { category, quantity, created_at, deadline, session, .. } = memento(id);
        let (user, status) = (user(), LockStatus::Active);
        let (version, order, pinned) = (None, None, false);
        Lock { id, user, category, quantity, created_at, deadline, status, version, session, order, pinned }
    }

    #[test]
    fn a_lock_is_followed_until_its_end() {
        let (keep, id) = (keep(), LockId::generate(EventId::new(1).expect("an id")));
        keep.granted(user(), memento(id));
        keep.heard(user(), &Personal::Pinned { lock: id, deadline: Instant::from_ms(20) });
        assert_eq!((keep.of(user())[0].kept.clone(), keep.of(user())[0].deadline.as_ms()), (Kept::Pinned, 20));
        let order: OrderId = "A-1".parse().expect("an order id");
        keep.heard(user(), &Personal::Confirmed { lock: id, order: Some(order.clone()) });
        assert_eq!(keep.of(user())[0].kept, Kept::Confirmed { order: Some(order.clone()) });
        let report = |order| Personal::Order {
            result: OrderResult::Completed,
            order,
            order_is_number: false,
            event: id.event(),
            category: memento(id).category,
            quantity: memento(id).quantity,
        };
        keep.heard(user(), &report("B-2".parse().expect("an order id")));
        assert_eq!(keep.of(user()).len(), 1, "another order's report");
        keep.heard(user(), &report(order));
        assert_eq!(keep.of(user()), []);
    }

    #[test]
    fn a_pin_is_not_forgotten_and_is_learnt_from_a_listing() {
        let (keep, event) = (keep(), EventId::new(1).expect("an id"));
        let [pinned, listed] = [(); 2].map(|()| LockId::generate(event));
        keep.granted(user(), memento(pinned));
        keep.heard(user(), &Personal::Pinned { lock: pinned, deadline: Instant::from_ms(20) });
        let again = Memento { created_at: Instant::from_ms(1), ..memento(pinned) };
        keep.granted(user(), again);
        keep.listed(user(), &[active(pinned), Lock { pinned: true, ..active(listed) }]);
        let of = keep.of(user());
        assert_eq!((&of[0].kept, of[0].created_at), (&Kept::Pinned, memento(pinned).created_at));
        assert_eq!(of[1].kept, Kept::Pinned);
    }

    #[test]
    fn ended_locks_and_absent_users_are_forgotten() {
        let keep = keep();
        keep.begin(user());
        let event = EventId::new(1).expect("an id");
        let [first, second, third] = [(); 3].map(|()| LockId::generate(event));
        for id in [first, second, third] {
            keep.granted(user(), memento(id));
        }
        let (category, quantity) = (memento(first).category, memento(first).quantity);
        keep.heard(user(), &Personal::Expired { lock: first, category, quantity });
        let reason = ReleaseReason::Released;
        keep.heard(user(), &Personal::Released { lock: second, category, quantity, reason, by: None });
        assert_eq!(keep.of(user()), [memento(third)]);
        assert!(keep.ended(user(), third) && !keep.ended(user(), third), "once");
        let fourth = LockId::generate(event);
        keep.granted(user(), memento(fourth));
        keep.forget(user());
        assert_eq!(keep.of(user()), [memento(fourth)], "one socket is left");
        keep.forget(user());
        assert_eq!(keep.of(user()), []);
        keep.heard(user(), &Personal::Expired { lock: third, category, quantity });
        keep.granted(user(), memento(fourth));
        keep.listed(user(), &[active(fourth)]);
        assert!(!keep.ended(user(), fourth) && lock(&keep.users).is_empty(), "nothing brings back who is gone");
    }

    #[test]
    fn a_listing_that_comes_late_brings_no_lock_back() {
        let keep = keep();
        let [first, second, third] = [(); 3].map(|()| LockId::generate(EventId::new(1).expect("an id")));
        keep.listed(user(), &[active(first), active(second)]);
        assert_eq!(keep.of(user()), [memento(first), memento(second)]);
        keep.ended(user(), first);
        keep.ended(user(), third);
        keep.listed(user(), &[active(first), active(second), active(third)]);
        keep.granted(user(), memento(third));
        assert_eq!(keep.of(user()), [memento(second)]);
        assert!(keep.has_ended(user(), third) && !keep.has_ended(user(), second));
        for _ in 0..ENDS_MAX {
            keep.ended(user(), LockId::generate(first.event()));
        }
        assert!(!keep.has_ended(user(), first), "the oldest ends are forgotten");
    }

    #[test]
    fn no_user_can_fill_it() {
        let keep = keep();
        for _ in 0..PER_USER_MAX + 10 {
            keep.granted(user(), memento(LockId::generate(EventId::new(1).expect("an id"))));
        }
        assert_eq!(keep.of(user()).len(), PER_USER_MAX);
    }
}
