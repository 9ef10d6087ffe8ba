//! What only the model shows: that it forgets in time, says when to look again, and holds to presence generations. What
//! it shares with the scripts is in `ledger` and `histories`.

use std::time::Duration;

use seatlock::domain::{
    Announcement, AskOutcome, Book, Instant, Kept, LockId, LockOutcome, LockRequest, Memento, Now, OrderResult,
    RateLimit, Releaser, RestoreRequest, SessionId,
};

use crate::support::ledger::{
    SETTLE, START_US, TTL, WARNING, category, event, order_id, quantity, report, request, snapshot, user,
};

const MS: Duration = Duration::from_millis(1);
const GRACE: Duration = Duration::from_secs(15);
const TEN_MINUTES: Duration = Duration::from_mins(10);
const DAY: Duration = Duration::from_hours(24);

/// A book and its clock.
struct Desk {
    book: Book,
    now: Now,
    out: Vec<Announcement>,
}

impl Desk {
    /// Ten tickets of category 1.
    fn new() -> Self {
        let book = Book::new(event(1), SETTLE, WARNING);
        let mut desk = Self { book, now: Now(START_US), out: Vec::new() };
        desk.restock(10);
        desk
    }

    fn restock(&mut self, stock: u64) {
        let AskOutcome::Ask(number) = self.book.ask(self.now, Duration::ZERO) else { panic!("zero always draws") };
        self.book.accept(self.now, number, &snapshot(&[(1, 10, stock)]), &mut self.out);
    }

    fn pass(&mut self, interval: Duration) {
        self.now.0 += u64::try_from(interval.as_micros()).expect("short");
    }

    fn grant(&mut self, request: &LockRequest) -> LockId {
        let answer = self.book.lock(self.now, request, &mut self.out);
        let LockOutcome::Granted(grant) = answer else { panic!("free: {answer:?}") };
        grant.lock
    }

    /// From now until something is due.
    fn next(&mut self) -> Option<Duration> {
        let next = self.book.sweep(self.now, &mut self.out).next?;
        Some(Duration::from_millis(next.as_ms().checked_sub(self.now.instant().as_ms()).expect("not in the past")))
    }

    /// Whether the lock, or how it ended, is known after a sweep.
    fn knows(&mut self, lock: LockId) -> bool {
        self.book.sweep(self.now, &mut self.out);
        self.book.find(self.now, lock).is_some()
    }

    fn deadline(&self, lock: LockId) -> Instant {
        self.book.find(self.now, lock).expect("known").deadline
    }

    fn memento(&self, kept: Kept) -> Memento {
        Memento {
            lock: LockId::generate(event(1)),
            category: category(1),
            quantity: quantity(2),
            created_at: self.now.instant(),
            deadline: Instant::from_ms(self.now.instant().as_ms() + 60_000),
            kept,
            request: None,
            session: Some(SessionId::generate()),
        }
    }

    fn restore(&mut self, memento: Memento) -> LockId {
        let lock = memento.lock;
        let asked = RestoreRequest { user: user(9), memento, generation: 0, stock_age_max: TEN_MINUTES };
        self.book.restore(self.now, &asked, &mut self.out);
        lock
    }
}

/// Expired and released locks answer for ten minutes, confirmed ones for a day, to the millisecond.
#[test]
fn ends_are_remembered_for_their_time_only() {
    let mut desk = Desk::new();
    let expired = desk.grant(&request(event(1), 1, 1, 1));
    let released = desk.grant(&request(event(1), 1, 2, 1));
    let confirmed = desk.grant(&request(event(1), 1, 3, 1));
    let restored = desk.memento(Kept::Confirmed { order: Some(order_id("7")) });
    let restored = desk.restore(restored);
    let Desk { book, now, out } = &mut desk;
    book.release(*now, released, Releaser::Orders { user: None }, out);
    book.confirm(*now, confirmed, None, None, out);
    desk.pass(TEN_MINUTES - MS);
    assert!(desk.knows(released) && desk.knows(expired) && desk.knows(confirmed));
    desk.pass(MS);
    assert!(!desk.knows(released) && desk.knows(expired) && desk.knows(confirmed));
    desk.pass(TTL - MS);
    assert!(desk.knows(expired));
    desk.pass(MS);
    assert!(!desk.knows(expired));
    desk.pass(DAY - TEN_MINUTES - TTL - MS);
    assert!(desk.knows(confirmed) && desk.knows(restored));
    desk.pass(MS);
    assert!(!desk.knows(confirmed) && !desk.knows(restored));
}

/// A day and the tombstones after everything, nothing is left but what users have bought, and that is theirs by number.
#[test]
fn everything_is_forgotten_in_the_end() {
    let mut desk = Desk::new();
    let rate = Some(RateLimit { interval: Duration::from_secs(1), burst: 5 });
    let named = |who| LockRequest {
        request: Some("try-1".parse().expect("a request id")),
        rate,
        ..request(event(1), 1, who, 1)
    };
    let locks: Vec<LockId> = (1..=4).map(|who| desk.grant(&named(who))).collect();
    let Desk { book, now, out } = &mut desk;
    book.confirm(*now, locks[0], None, Some(&order_id("1")), out);
    book.order(*now, &report(event(1), "1", 1, 1, 1, OrderResult::Completed), out);
    book.confirm(*now, locks[1], None, Some(&order_id("2")), out);
    book.order(*now, &report(event(1), "2", 1, 2, 1, OrderResult::Cancelled), out);
    book.order(*now, &report(event(1), "3", 1, 5, 2, OrderResult::Completed), out);
    book.release(*now, locks[2], Releaser::Orders { user: None }, out);
    let waiting = desk.grant(&request(event(1), 1, 6, 1));
    let Desk { book, now, out } = &mut desk;
    book.confirm(*now, waiting, None, None, out);
    desk.pass(SETTLE);
    desk.restock(6);
    desk.pass(DAY + TTL + TEN_MINUTES);
    desk.restock(6);
    desk.book.sweep(desk.now, &mut desk.out);
    let left = format!("{:?}", desk.book);
    for empty in ["locks: {}", "holders: {}", "deadlines: {}", "waiting: []", "loose: {}", "orders: {}", "requests: {}"]
    {
        assert!(left.contains(empty), "{empty}: {left}");
    }
    assert!(left.contains("rates: {}"), "{left}");
    assert!(left.contains("held: {UserId(1): 1, UserId(6): 1}") || left.contains("held: {UserId(6): 1, UserId(1): 1}"));
    assert!(!desk.book.is_idle(desk.now), "the snapshot is fresh");
    desk.pass(TEN_MINUTES + MS);
    assert!(desk.book.is_idle(desk.now));
}

/// A request id is its lock's until the lock's tombstone would be gone, to the millisecond.
#[test]
fn request_ids_are_remembered_for_their_time_only() {
    let mut desk = Desk::new();
    let named = |n| LockRequest { request: Some("try-1".parse().expect("a request id")), ..request(event(1), 1, 1, n) };
    let lock = desk.grant(&named(1));
    desk.pass(TTL + TEN_MINUTES - MS);
    desk.restock(10);
    let answer = desk.book.lock(desk.now, &named(1), &mut desk.out);
    assert_eq!(answer, LockOutcome::RequestEnded { lock });
    desk.pass(MS);
    desk.grant(&named(2));
}

/// A rate is remembered while it could still refuse somebody.
#[test]
fn rates_are_remembered_while_they_matter() {
    let mut desk = Desk::new();
    let rate = Some(RateLimit { interval: Duration::from_secs(1), burst: 1 });
    desk.grant(&LockRequest { rate, ..request(event(1), 1, 1, 1) });
    desk.pass(Duration::from_secs(1) - Duration::from_micros(1));
    desk.book.sweep(desk.now, &mut desk.out);
    assert!(format!("{:?}", desk.book).contains("rates: {UserId(1)"));
    desk.pass(Duration::from_micros(1));
    desk.book.sweep(desk.now, &mut desk.out);
    assert!(format!("{:?}", desk.book).contains("rates: {}"));
}

/// The next look is at the first warning, deadline or time limit of a sale, and never when there is none.
#[test]
fn a_sweep_says_when_to_come_again() {
    let mut desk = Desk::new();
    assert_eq!(desk.next(), None);
    desk.grant(&request(event(1), 1, 1, 1));
    desk.pass(Duration::from_secs(1));
    let sold = desk.grant(&request(event(1), 1, 2, 1));
    assert_eq!(desk.next(), Some(TTL - WARNING - Duration::from_secs(1)), "the first to be warned");
    desk.pass(TTL - WARNING - Duration::from_secs(1));
    assert_eq!(desk.next(), Some(Duration::from_secs(1)), "the second to be warned");
    let Desk { book, now, out } = &mut desk;
    book.confirm(*now, sold, None, None, out);
    assert_eq!(desk.next(), Some(SETTLE), "the order's time limit is before the deadline");
    desk.pass(Duration::from_secs(1));
    let other = desk.grant(&request(event(1), 1, 3, 1));
    let Desk { book, now, out } = &mut desk;
    book.confirm(*now, other, None, None, out);
    assert_eq!(desk.next(), Some(SETTLE - Duration::from_secs(1)), "the first of two");
    desk.pass(SETTLE - Duration::from_secs(1));
    assert_eq!(desk.next(), Some(Duration::ZERO), "it is overdue until the stock is asked");
    desk.restock(10);
    desk.pass(Duration::from_secs(1));
    desk.restock(10);
    assert_eq!(desk.next(), Some(WARNING - SETTLE - Duration::from_secs(1)), "the deadline");
    desk.grant(&LockRequest { ttl: WARNING, ..request(event(1), 1, 4, 1) });
    assert_eq!(desk.next(), Some(WARNING - SETTLE - Duration::from_secs(1)), "the first of two deadlines");
}

/// An abandonment or an adoption of an earlier presence touches nothing that a later one has seen.
#[test]
fn presence_goes_by_generations() {
    let mut desk = Desk::new();
    let lock = desk.grant(&LockRequest { generation: 2, ..request(event(1), 1, 1, 1) });
    let full = desk.deadline(lock);
    let Desk { book, now, .. } = &mut desk;
    assert_eq!(book.abandon(*now, user(1), 1, GRACE), 0, "by an earlier presence");
    assert_eq!(book.abandon(*now, user(1), 2, GRACE), 1, "by the presence that has it");
    assert_eq!(book.abandon(*now, user(1), 2, GRACE), 0, "once");
    let short = desk.deadline(lock);
    assert_eq!(short.as_ms(), desk.now.instant().as_ms() + 15_000);
    let Desk { book, now, .. } = &mut desk;
    book.adopt(*now, user(1), 2);
    assert_eq!(desk.deadline(lock), short, "not by the presence that left");
    desk.book.adopt(desk.now, user(1), 4);
    assert_eq!(desk.deadline(lock), full);
    assert_eq!(desk.book.abandon(desk.now, user(1), 3, GRACE), 0, "before the adoption, told after it");
    assert_eq!(desk.deadline(lock), full);
    assert_eq!(desk.book.abandon(desk.now, user(1), 6, GRACE), 1);
    desk.book.adopt(desk.now, user(1), 5);
    assert_eq!(desk.deadline(lock), short, "before the abandonment, told after it");
}
