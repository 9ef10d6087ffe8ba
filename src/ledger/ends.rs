//! Counts how locks end. A ledger hands over each end once, so that the sum over the fleet is what happened.

use std::time::Duration;

use super::LedgerError;
use super::reply::Parts;
use crate::domain::{Announcement, Book, ChangeKind, End, EndReason, Instant, Now, Personal, ReleaseReason, UserId};
use crate::metrics;

/// Counts one end.
pub(super) fn count(end: End) {
    let reason = [end.reason.as_str()];
    metrics::LEDGER_ENDS.count(&reason);
    metrics::LEDGER_HELD.observe(&reason, end.held);
    if let Some(late) = end.late {
        metrics::LEDGER_EXPIRY_LAG.observe(&[], late);
    }
}

/// An outcome whose end is counted, if it was one.
pub(super) fn counted<T>((outcome, end): (T, Option<End>)) -> T {
    end.into_iter().for_each(count);
    outcome
}

/// An end that a caller's call was, unless the lock had ended before (`held_ms` below zero).
pub(super) fn called(reason: EndReason, held_ms: i64) -> Option<End> {
    let held = Duration::from_millis(u64::try_from(held_ms).ok()?);
    Some(End { reason, held, late: None })
}

/// Reads `reason:held_ms:late_ms ...`, as `sweep` tells the ends of locks that reached their deadline.
pub(super) fn read(text: &str, parts: &Parts) -> Result<Vec<End>, LedgerError> {
    text.split_ascii_whitespace().map(|one| read_one(one).ok_or_else(|| parts.unexpected())).collect()
}

fn read_one(text: &str) -> Option<End> {
    let mut words = text.split(':');
    let reason = match words.next()? {
        "expired" => EndReason::Expired,
        "abandoned" => EndReason::Abandoned,
        _ => return None,
    };
    // A deadline that another lock's took the place of, behind a long queue of expiries, may seem to be before the grant.
    let held = Duration::from_millis(u64::try_from(words.next()?.parse::<i64>().ok()?).unwrap_or(0));
    let late = Duration::from_millis(words.next()?.parse().ok()?);
    words.next().is_none().then_some(End { reason, held, late: Some(late) })
}

/// The ends that one transition of the model announced, but for releases, which the model does not tell from those of
/// confirmed locks.
pub(super) fn announced(book: &Book, now: Now, out: &[Announcement]) -> Vec<End> {
    let end = |announcement: &Announcement| {
        let Announcement::User(user, message) = announcement else { return None };
        let (lock, reason) = match message {
            Personal::Confirmed { lock, .. } => (*lock, EndReason::Confirmed),
            Personal::Expired { lock, .. } if was_abandoned(out, *user, message) => (*lock, EndReason::Abandoned),
            Personal::Expired { lock, .. } => (*lock, EndReason::Expired),
            Personal::Expiring { .. }
            | Personal::Released { .. }
            | Personal::Pinned { .. }
            | Personal::Order { .. } => return None,
        };
        let lock = book.find(now, lock)?;
        let late = (reason != EndReason::Confirmed).then(|| since(lock.deadline, now.instant()));
        let until = if late.is_some() { lock.deadline } else { now.instant() };
        Some(End { reason, held: since(lock.created_at, until), late })
    };
    out.iter().filter_map(end).collect()
}

fn was_abandoned(out: &[Announcement], user: UserId, message: &Personal) -> bool {
    let Personal::Expired { category, quantity, .. } = message else { return false };
    let back = ChangeKind::Back(ReleaseReason::Abandoned);
    out.iter().any(|announcement| {
        matches!(announcement, Announcement::Room(notice) if notice.availability.category == *category
            && notice.changes.iter().any(|change| (change.kind, change.quantity, change.user) == (back, *quantity, user)))
    })
}

/// From one instant of the ledger to a later one.
pub(super) fn since(from: Instant, to: Instant) -> Duration {
    Duration::from_millis(to.as_ms().saturating_sub(from.as_ms()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_read_as_the_scripts_write_them() {
        let (held, late) = (Duration::from_mins(5), Some(Duration::from_millis(7)));
        assert_eq!(read_one("expired:300000:7"), Some(End { reason: EndReason::Expired, held, late }));
        let abandoned = End { reason: EndReason::Abandoned, held: Duration::ZERO, late };
        assert_eq!(read_one("abandoned:-5:7"), Some(abandoned));
        for text in ["", "expired", "expired:1", "lost:1:1", "expired:x:1", "expired:1:-1", "expired:1:1:1"] {
            assert_eq!(read_one(text), None, "{text}");
        }
        assert_eq!(called(EndReason::Released, -1), None, "it had been confirmed");
        assert_eq!(called(EndReason::Confirmed, 0).map(|end| end.held), Some(Duration::ZERO));
    }
}
