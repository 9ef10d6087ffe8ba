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

/// The remembered locks of users with a socket here.
#[derive(Debug, Default)]
pub struct Keep {
    users: Mutex<HashMap<UserId, Vec<Memento>>>,
}

impl Keep {
    /// Remembers a lock just granted, or knows more of it now.
    pub fn granted(&self, user: UserId, memento: Memento) {
        let mut users = lock(&self.users);
        let locks = users.entry(user).or_default();
        if let Some(known) = locks.iter_mut().find(|known| known.lock == memento.lock) {
            *known = memento;
        } else if locks.len() < PER_USER_MAX {
            locks.push(memento);
        }
    }

    /// Remembers active locks that were listed, with their deadlines.
    pub fn listed(&self, user: UserId, listed: &[Lock]) {
        if listed.is_empty() {
            return;
        }
        let mut users = lock(&self.users);
        let locks = users.entry(user).or_default();
        for active in listed.iter().filter(|active| active.status == LockStatus::Active) {
            if let Some(known) = locks.iter_mut().find(|known| known.lock == active.id) {
                known.deadline = active.deadline;
            } else if locks.len() < PER_USER_MAX {
                locks.push(Memento {
                    lock: active.id,
                    category: active.category,
                    quantity: active.quantity,
                    created_at: active.created_at,
                    deadline: active.deadline,
                    kept: Kept::Attended,
                    request: None,
                    session: active.session,
                });
            }
        }
    }

    /// Learns from a user's message.
    pub fn heard(&self, user: UserId, message: &Personal) {
        let mut users = lock(&self.users);
        let Some(locks) = users.get_mut(&user) else { return };
        match message {
            Personal::Expired { lock, .. } | Personal::Released { lock, .. } => {
                locks.retain(|known| known.lock != *lock);
            }
            Personal::Pinned { lock, deadline } => {
                if let Some(known) = locks.iter_mut().find(|known| known.lock == *lock) {
                    (known.kept, known.deadline) = (Kept::Pinned, *deadline);
                }
            }
            Personal::Confirmed { lock, order } => {
                if let Some(known) = locks.iter_mut().find(|known| known.lock == *lock) {
                    known.kept = Kept::Confirmed { order: order.clone() };
                }
            }
            // The stock shows the sale from now on, and a cancelled one needs no tickets.
            Personal::Order { order: reported, event, category, .. } => locks.retain(|known| {
                let sold = match &known.kept {
                    Kept::Confirmed { order: Some(order) } => order == reported,
                    Kept::Confirmed { order: None } => (known.lock.event(), known.category) == (*event, *category),
                    Kept::Attended | Kept::Pinned => false,
                };
                !sold
            }),
            Personal::Expiring { .. } => {}
        }
    }

    /// A lock is gone; true when it was remembered until now.
    pub fn ended(&self, user: UserId, id: LockId) -> bool {
        let mut users = lock(&self.users);
        let Some(locks) = users.get_mut(&user) else { return false };
        let before = locks.len();
        locks.retain(|known| known.lock != id);
        locks.len() < before
    }

    /// The user's last socket here is gone.
    pub fn forget(&self, user: UserId) {
        lock(&self.users).remove(&user);
    }

    /// Whether anything is remembered of a user.
    pub fn knows(&self, user: UserId) -> bool {
        lock(&self.users).get(&user).is_some_and(|locks| !locks.is_empty())
    }

    /// What is remembered of a user.
    pub fn of(&self, user: UserId) -> Vec<Memento> {
        lock(&self.users).get(&user).cloned().unwrap_or_default()
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

    #[test]
    fn a_lock_is_followed_until_its_end() {
        let (keep, id) = (Keep::default(), LockId::generate(EventId::new(1).expect("an id")));
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
    fn ended_locks_and_absent_users_are_forgotten() {
        let keep = Keep::default();
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
        keep.granted(user(), memento(third));
        keep.forget(user());
        assert_eq!(keep.of(user()), []);
        keep.heard(user(), &Personal::Expired { lock: third, category, quantity });
        assert!(lock(&keep.users).is_empty(), "a message brings nobody back");
    }

    #[test]
    fn no_user_can_fill_it() {
        let keep = Keep::default();
        for _ in 0..PER_USER_MAX + 10 {
            keep.granted(user(), memento(LockId::generate(EventId::new(1).expect("an id"))));
        }
        assert_eq!(keep.of(user()).len(), PER_USER_MAX);
    }
}
