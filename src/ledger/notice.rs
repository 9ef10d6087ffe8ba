//! Notices: what replicas tell each other over pub/sub, and the texts they travel as.
//!
//! Scripts publish them in the step that makes the change, as space-separated words. A notice is a hint that may be
//! lost, doubled or late; its version says whether it is news. A text that does not read as a notice is dropped.

use std::time::Duration;

use super::reply::{Row, Words};
use crate::domain::{
    Change, ChangeKind, EventId, Instant, LockId, Notice, OrderResult, Personal, Quantity, ReleaseReason, SessionId,
    UserId,
};

/// What a replica can listen to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Topic {
    /// Changes of an event's categories.
    Event(EventId),
    /// Messages for a user's sockets.
    User(UserId),
}

/// One thing from the feed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedItem {
    /// A category changed.
    Changed(Notice),
    /// A message for a user's sockets.
    Personal(UserId, Personal),
    /// Notices may have been missed (reconnect, overflow, silent subscription): read everything watched again.
    Resync,
}

/// Reads `category stock total open active settling version now_ms kind:quantity:user ...`.
#[must_use]
pub fn read_change(event: EventId, text: &str) -> Option<Notice> {
    let mut words = Words::of(text);
    let (category, row) = (words.read()?, Row::read(&mut words)?);
    let availability = row.at(event, category, Instant::from_ms(words.read()?));
    let changes: Option<Vec<Change>> = words.rest().unwrap_or("").split_terminator(' ').map(read_one_change).collect();
    Some(Notice { availability, changes: changes? })
}

fn read_one_change(text: &str) -> Option<Change> {
    let mut parts = text.split(':');
    let kind = match parts.next()? {
        "locked" => ChangeKind::Locked,
        reason => ChangeKind::Back(read_reason(reason)?),
    };
    let quantity = read_quantity(parts.next()?)?;
    let user = parts.next()?.parse().ok()?;
    parts.next().is_none().then_some(Change { kind, quantity, user })
}

fn read_reason(text: &str) -> Option<ReleaseReason> {
    let reasons = [ReleaseReason::Released, ReleaseReason::Expired, ReleaseReason::Abandoned, ReleaseReason::Cancelled];
    reasons.into_iter().find(|reason| reason.as_str() == text)
}

fn read_quantity(text: &str) -> Option<Quantity> {
    Quantity::new(text.parse().ok()?).ok()
}

/// Reads which locks have reached their deadline, `lock|category|quantity|user ...`: messages for their owners.
#[must_use]
pub fn read_expired(text: &str) -> Option<Vec<(UserId, Personal)>> {
    let read = |member: &str| {
        let mut parts = member.split('|');
        let (lock, category, quantity) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?);
        let user = parts.next()?.parse().ok()?;
        if parts.next().is_some() {
            return None;
        }
        Some((user, Personal::Expired { lock, category, quantity: read_quantity(quantity)? }))
    };
    text.split(' ').map(read).collect()
}

/// Reads a message for a user's sockets; the words are those of [`write_personal`] and of the scripts.
#[must_use]
pub fn read_personal(text: &str) -> Option<Personal> {
    let words: Vec<&str> = text.split(' ').collect();
    match words.as_slice() {
        ["expired", lock, category, quantity] => Some(Personal::Expired {
            lock: lock.parse().ok()?,
            category: category.parse().ok()?,
            quantity: read_quantity(quantity)?,
        }),
        ["expiring", lock, deadline, remaining] => Some(Personal::Expiring {
            lock: lock.parse::<LockId>().ok()?,
            deadline: Instant::from_ms(deadline.parse().ok()?),
            remaining: Duration::from_millis(remaining.parse().ok()?),
        }),
        ["released", lock, category, quantity, reason, by] => Some(Personal::Released {
            lock: lock.parse().ok()?,
            category: category.parse().ok()?,
            quantity: read_quantity(quantity)?,
            reason: read_reason(reason)?,
            by: if *by == "-" { None } else { Some(by.parse().ok()?) },
        }),
        ["pinned", lock, deadline] => {
            Some(Personal::Pinned { lock: lock.parse().ok()?, deadline: Instant::from_ms(deadline.parse().ok()?) })
        }
        ["confirmed", lock] => Some(Personal::Confirmed { lock: lock.parse().ok()?, order: None }),
        ["confirmed", lock, order] => {
            Some(Personal::Confirmed { lock: lock.parse().ok()?, order: Some(order.parse().ok()?) })
        }
        ["order", result, order, kind, event, category, quantity] => Some(Personal::Order {
            result: match *result {
                "completed" => OrderResult::Completed,
                "cancelled" => OrderResult::Cancelled,
                _ => return None,
            },
            order: order.parse().ok()?,
            order_is_number: match *kind {
                "number" => true,
                "text" => false,
                _ => return None,
            },
            event: event.parse().ok()?,
            category: category.parse().ok()?,
            quantity: read_quantity(quantity)?,
        }),
        _ => None,
    }
}

/// The session that did what a message for a user's sockets says, and has its own answer.
pub(super) fn author(text: &str) -> Option<SessionId> {
    text.strip_prefix("released ")?.rsplit(' ').next()?.parse().ok()
}

/// The text of a message for a user's sockets.
#[must_use]
pub fn write_personal(message: &Personal) -> String {
    match message {
        Personal::Expired { lock, category, quantity } => format!("expired {lock} {category} {quantity}"),
        Personal::Expiring { lock, deadline, remaining } => {
            format!("expiring {lock} {} {}", deadline.as_ms(), remaining.as_millis())
        }
        Personal::Released { lock, category, quantity, reason, by } => {
            let by = by.map_or_else(|| "-".to_owned(), |session| session.to_string());
            format!("released {lock} {category} {quantity} {} {by}", reason.as_str())
        }
        Personal::Pinned { lock, deadline } => format!("pinned {lock} {}", deadline.as_ms()),
        Personal::Confirmed { lock, order: None } => format!("confirmed {lock}"),
        Personal::Confirmed { lock, order: Some(order) } => format!("confirmed {lock} {order}"),
        Personal::Order { result, order, order_is_number, event, category, quantity } => {
            let result = match result {
                OrderResult::Completed => "completed",
                OrderResult::Cancelled => "cancelled",
            };
            let kind = if *order_is_number { "number" } else { "text" };
            format!("order {result} {order} {kind} {event} {category} {quantity}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{CategoryId, OrderId};

    fn event() -> EventId {
        EventId::new(7).expect("an id")
    }

    #[test]
    fn a_change_reads_with_and_without_lock_changes() {
        let bare = read_change(event(), "3 10 12 1 2 1 1763840000000001 1763840000000").expect("a notice");
        let row = bare.availability;
        assert_eq!((row.stock, row.total, row.open, row.active, row.settling), (10, 12, true, 2, 1));
        assert_eq!((row.version, row.at.as_ms()), (1_763_840_000_000_001, 1_763_840_000_000));
        assert!(bare.changes.is_empty());
        let full = read_change(event(), "3 10 12 1 2 1 5 6 locked:2:123 abandoned:1:9").expect("a notice");
        let kinds: Vec<_> =
            full.changes.iter().map(|change| (change.kind, change.quantity.value(), change.user.value())).collect();
        assert_eq!(kinds, [(ChangeKind::Locked, 2, 123), (ChangeKind::Back(ReleaseReason::Abandoned), 1, 9)]);
    }

    #[test]
    fn garbage_is_no_change() {
        let bad = [
            "",
            " ",
            "3",
            "3 10 12 1 2 1 5",
            "3 10 12 2 2 1 5 6",
            "x 10 12 1 2 1 5 6",
            "3 10 12 1 2 1 5 6 locked:0:1",
            "3 10 12 1 2 1 5 6 stolen:1:1",
            "3 10 12 1 2 1 5 6 locked:1:1:1",
            "3 -1 12 1 2 1 5 6",
            "3 10 12 1 2 1 5 6 locked:1",
        ];
        for text in bad {
            assert_eq!(read_change(event(), text), None, "{text}");
        }
    }

    #[test]
    fn expired_locks_are_read_all_or_none() {
        let (one, two) = (LockId::generate(event()), LockId::generate(event()));
        let (category, quantity) = (CategoryId::new(4).expect("an id"), Quantity::new(2).expect("a quantity"));
        let told = read_expired(&format!("{one}|4|2|7 {two}|4|2|8")).expect("two locks");
        let owner = |id| UserId::new(id).expect("an id");
        let message = |lock| Personal::Expired { lock, category, quantity };
        assert_eq!(told, [(owner(7), message(one)), (owner(8), message(two))]);
        let whole = format!("{one}|4|2|7");
        for text in
            ["", "x", &format!("{one}|4|2"), &format!("{one}|4|0|7"), &format!("{whole} {two}"), &format!("{whole}|1")]
        {
            assert_eq!(read_expired(text), None, "{text}");
        }
    }

    #[test]
    fn personal_messages_survive_the_wire() {
        let lock = LockId::generate(event());
        let (category, quantity) = (CategoryId::new(4).expect("an id"), Quantity::new(2).expect("a quantity"));
        let order: OrderId = "A-55".parse().expect("an order id");
        let reason = ReleaseReason::Released;
        let messages = [
            Personal::Expired { lock, category, quantity },
            Personal::Expiring { lock, deadline: Instant::from_ms(99), remaining: Duration::from_millis(5) },
            Personal::Released { lock, category, quantity, reason, by: None },
            Personal::Released { lock, category, quantity, reason, by: Some(SessionId::generate()) },
            Personal::Pinned { lock, deadline: Instant::from_ms(99) },
            Personal::Confirmed { lock, order: None },
            Personal::Confirmed { lock, order: Some(order.clone()) },
            Personal::Order {
                result: OrderResult::Cancelled,
                order,
                order_is_number: false,
                event: event(),
                category,
                quantity,
            },
        ];
        for message in messages {
            assert_eq!(read_personal(&write_personal(&message)), Some(message));
        }
        for text in ["", "expired", "expired x 1 1", "order lost 1 number 1 1 1", "released a b c d e f"] {
            assert_eq!(read_personal(text), None, "{text}");
        }
    }
}
