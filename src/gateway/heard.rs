//! What one socket has been told that it may be told again: orders, and warnings before a deadline.
//!
//! They are told once, by pub/sub, and again at the next entry of a session that may have missed them. Both ways meet
//! here: whatever comes first is sent.

use std::sync::Mutex;

use super::lock;
use crate::domain::{CategoryId, EventId, Instant, LockId, OrderId, OrderResult, Personal};

/// Of so many, the latest, it is known that they were told: more than the ledger keeps of orders, and more locks than
/// anybody has at a time.
const HEARD_MAX: usize = 256;

/// What makes two messages the same to whoever reads them.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fact {
    Order(OrderResult, OrderId, EventId, CategoryId),
    Warning(LockId, Instant),
}

/// What a socket has been told.
#[derive(Debug, Default)]
pub struct Heard {
    facts: Mutex<Vec<Fact>>,
}

impl Heard {
    /// Whether a message is to be sent, which is noted: false when it was before. Messages that are never told again
    /// always are.
    pub fn is_news(&self, message: &Personal) -> bool {
        let fact = match message {
            Personal::Order { result, order, event, category, .. } => {
                Fact::Order(*result, order.clone(), *event, *category)
            }
            Personal::Expiring { lock, deadline, .. } => Fact::Warning(*lock, *deadline),
            Personal::Expired { .. }
            | Personal::Released { .. }
            | Personal::Pinned { .. }
            | Personal::Confirmed { .. } => return true,
        };
        let mut facts = lock(&self.facts);
        if facts.contains(&fact) {
            return false;
        }
        if facts.len() == HEARD_MAX {
            facts.remove(0);
        }
        facts.push(fact);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::Quantity;

    fn warning(lock: LockId, deadline: u64, remaining: u64) -> Personal {
        Personal::Expiring { lock, deadline: Instant::from_ms(deadline), remaining: Duration::from_millis(remaining) }
    }

    fn order(result: OrderResult, name: &str, category: u64) -> Personal {
        Personal::Order {
            result,
            order: name.parse().expect("an order id"),
            order_is_number: true,
            event: EventId::new(1).expect("an id"),
            category: CategoryId::new(category).expect("an id"),
            quantity: Quantity::new(1).expect("a quantity"),
        }
    }

    fn lock_id() -> LockId {
        LockId::generate(EventId::new(1).expect("an id"))
    }

    #[test]
    fn a_lock_is_warned_about_once_for_each_deadline() {
        let (heard, lock) = (Heard::default(), lock_id());
        assert!(heard.is_news(&warning(lock, 100, 60)));
        assert!(!heard.is_news(&warning(lock, 100, 50)), "the same, told later");
        assert!(heard.is_news(&warning(lock, 200, 60)), "pinned meanwhile");
        assert!(heard.is_news(&warning(lock_id(), 100, 60)), "another lock");
    }

    #[test]
    fn an_order_is_told_once_for_each_result_and_category() {
        let heard = Heard::default();
        for message in [
            order(OrderResult::Completed, "5", 1),
            order(OrderResult::Cancelled, "5", 1),
            order(OrderResult::Completed, "5", 2),
            order(OrderResult::Completed, "6", 1),
        ] {
            assert!(heard.is_news(&message) && !heard.is_news(&message), "{message:?}");
        }
    }

    #[test]
    fn what_ends_a_lock_is_always_told_and_nobody_can_fill_it() {
        let (heard, lock) = (Heard::default(), lock_id());
        let pinned = Personal::Pinned { lock, deadline: Instant::from_ms(1) };
        assert!(heard.is_news(&pinned) && heard.is_news(&pinned));
        for deadline in 0..1000 {
            heard.is_news(&warning(lock, deadline, 1));
        }
        assert_eq!(super::lock(&heard.facts).len(), HEARD_MAX);
        assert!(!heard.is_news(&warning(lock, 999, 1)), "the latest are remembered");
    }
}
