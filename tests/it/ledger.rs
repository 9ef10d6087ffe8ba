//! One test body for both ledgers: whatever the model answers, the scripts answer.

use std::iter;
use std::time::Duration;

use seatlock::domain::{
    AcceptOutcome, AskOutcome, ConfirmOutcome, Instant, Kept, Lock, LockId, LockOutcome, LockStatus, Memento,
    OrderOutcome, OrderResult, Personal, RateLimit, ReleaseOutcome, ReleaseReason, Releaser, RestoreOutcome,
    RestoreRequest, SessionId, SnapshotNumber, ValidateOutcome, ValidateRequest,
};
use seatlock::ledger::{ChangeKind, FeedItem, Presence, SILENT_MAX, TOLD_KEPT, Topic};

use crate::support::ledger::{
    SETTLE, START_US, Stepped, TTL, WARNING, category, completed, event, order_id, quantity, report, request, snapshot,
    user,
};

const MS: Duration = Duration::from_millis(1);
const GRACE: Duration = Duration::from_secs(15);

/// Runs one body on the model and on Redis.
macro_rules! on_both {
    ($($(#[$doc:meta])* async fn $name:ident($on:ident: &Stepped) $body:block)*) => {
        $(
            mod $name {
                use super::*;

                async fn body($on: &Stepped) $body

                $(#[$doc])*
                #[tokio::test]
                async fn memory() {
                    body(&Stepped::memory()).await;
                }

                $(#[$doc])*
                #[tokio::test]
                async fn redis() {
                    body(&Stepped::redis().await).await;
                }
            }
        )*
    };
}

fn validate(user_id: u64, category_id: u64, n: u64) -> ValidateRequest {
    ValidateRequest {
        event: event(1),
        category: category(category_id),
        user: user(user_id),
        quantity: quantity(n),
        window: Duration::from_mins(1),
    }
}

fn name_of(message: &Personal) -> String {
    let Personal::Order { order, .. } = message else { panic!("of an order: {message:?}") };
    order.to_string()
}

fn owner(user_id: u64) -> Releaser {
    Releaser::Owner { user: user(user_id), session: None }
}

/// A lock as a replica would remember it, granted now.
fn lost(on: &Stepped, user_id: u64, n: u64, kept: Kept) -> RestoreRequest {
    let created_at = Instant::from_ms(on.now_us() / 1000);
    let memento = Memento {
        lock: LockId::generate(event(1)),
        category: category(1),
        quantity: quantity(n),
        created_at,
        deadline: Instant::from_ms(created_at.as_ms() + u64::try_from(TTL.as_millis()).expect("short")),
        kept,
        request: Some("try-1".parse().expect("a request id")),
        session: Some(SessionId::generate()),
    };
    RestoreRequest { user: user(user_id), memento, generation: 0, stock_age_max: Duration::from_mins(10) }
}

const ORDERS: Releaser = Releaser::Orders { user: None };

/// 1,501 owners, the last of whom locked so much later than the others: each is warned, once.
async fn warned_after(on: &Stepped, gap: Duration) {
    on.stock(event(1), &[(1, 1600, 1600)]).await;
    futures_util::future::join_all((100..1600).map(|user| on.grant(event(1), 1, user, 1))).await;
    on.step(gap).await;
    on.grant(event(1), 1, 7, 1).await;
    let mut feed = on.ledger.feed().expect("taken once");
    let owners = || iter::once(7).chain(100..1600).map(user);
    for owner in owners() {
        on.ledger.subscribe(Topic::User(owner)).await.unwrap();
    }
    on.step(TTL - WARNING - gap).await;
    for _ in 0..3 {
        on.ledger.sweep().await.unwrap();
        on.step(MS).await;
    }
    let mut warned = Vec::new();
    while let Ok(item) = tokio::time::timeout(Duration::from_millis(500), feed.recv()).await {
        match item {
            Some(FeedItem::Personal(who, Personal::Expiring { .. })) => warned.push(who),
            Some(FeedItem::Resync) => {}
            other => panic!("{other:?}"),
        }
    }
    warned.sort_unstable();
    assert!(warned.iter().copied().eq(owners()), "{} warnings: {warned:?}", warned.len());
}

on_both! {
    /// Stock that was never told, or too long ago, decides nothing.
    async fn unknown_stock_grants_nothing(on: &Stepped) {
        let wanted = request(event(1), 1, 7, 1);
        assert_eq!(on.ledger.lock(&wanted).await.unwrap(), LockOutcome::StockUnknown);
        assert_eq!(on.ledger.availability(event(1), TTL).await.unwrap(), None);
        on.stock(event(1), &[(1, 10, 10)]).await;
        on.step(Duration::from_mins(10)).await;
        assert!(matches!(on.ledger.lock(&wanted).await.unwrap(), LockOutcome::Granted(_)));
        assert!(on.ledger.availability(event(1), Duration::from_mins(10)).await.unwrap().is_some());
        assert_eq!(on.ledger.availability(event(1), Duration::from_mins(10) - MS).await.unwrap(), None);
        on.step(MS).await;
        assert_eq!(on.ledger.lock(&request(event(1), 1, 8, 1)).await.unwrap(), LockOutcome::StockUnknown);
    }

    /// Locks take what is free, never more, and say what is left.
    async fn grants_never_exceed_the_stock(on: &Stepped) {
        on.stock(event(1), &[(1, 5, 5), (2, 4, 0)]).await;
        let LockOutcome::Granted(grant) = on.ledger.lock(&request(event(1), 1, 7, 3)).await.unwrap() else {
            panic!("three of five are free");
        };
        assert_eq!((grant.available, grant.deadline.as_ms() - grant.now.as_ms()), (2, 300_000));
        assert_eq!(grant.lock.event(), event(1));
        assert_eq!(on.counts(event(1), 1).await, (2, 3, 0));
        let refused = on.ledger.lock(&request(event(1), 1, 8, 3)).await.unwrap();
        assert_eq!(refused, LockOutcome::Insufficient { available: 2 });
        on.grant(event(1), 1, 8, 2).await;
        assert_eq!(
            on.ledger.lock(&request(event(1), 1, 9, 1)).await.unwrap(),
            LockOutcome::Insufficient { available: 0 },
            "nothing is free but something may come back"
        );
        assert_eq!(on.ledger.lock(&request(event(1), 2, 9, 1)).await.unwrap(), LockOutcome::SoldOut);
        assert_eq!(on.ledger.lock(&request(event(1), 3, 9, 1)).await.unwrap(), LockOutcome::CategoryNotFound);
        let again = on.ledger.lock(&request(event(1), 1, 7, 1)).await.unwrap();
        assert_eq!(again, LockOutcome::AlreadyLocked { lock: grant.lock });
    }

    /// A closed event or category refuses and offers nothing.
    async fn closed_categories_refuse(on: &Stepped) {
        let mut told = snapshot(&[(1, 5, 5), (2, 5, 5)]);
        told.categories[0].open = false;
        on.ledger.ask(event(1), Duration::ZERO).await.unwrap();
        on.ledger.accept(event(1), SnapshotNumber(1), &told).await.unwrap();
        assert_eq!(on.ledger.lock(&request(event(1), 1, 7, 1)).await.unwrap(), LockOutcome::Closed);
        assert_eq!(on.counts(event(1), 1).await.0, 0);
        let mut wanted = request(event(1), 2, 9, 1);
        wanted.request = Some("try-1".parse().unwrap());
        assert!(matches!(on.ledger.lock(&wanted).await.unwrap(), LockOutcome::Granted(grant) if grant.available == 4));
        told.open = false;
        on.ledger.accept(event(1), SnapshotNumber(2), &told).await.unwrap();
        let LockOutcome::GrantedBefore(again) = on.ledger.lock(&wanted).await.unwrap() else { panic!("a repeat") };
        assert_eq!(again.available, 0, "what is closed is not available");
        assert_eq!(on.ledger.lock(&request(event(1), 2, 7, 1)).await.unwrap(), LockOutcome::Closed);
    }

    /// The deadline itself is too late, a millisecond before is not; nobody has swept.
    async fn a_deadline_is_exact_without_a_sweep(on: &Stepped) {
        on.stock(event(1), &[(1, 1, 1)]).await;
        let lock = on.grant(event(1), 1, 7, 1).await;
        on.step(TTL - MS).await;
        assert_eq!(on.ledger.find(lock).await.unwrap().unwrap().status, LockStatus::Active);
        assert_eq!(on.counts(event(1), 1).await, (0, 1, 0));
        on.step(MS).await;
        assert_eq!(on.ledger.find(lock).await.unwrap().unwrap().status, LockStatus::Expired);
        assert_eq!(on.ledger.confirm(lock, None, None).await.unwrap(), ConfirmOutcome::Expired);
        assert_eq!(on.ledger.validate(&validate(7, 1, 1)).await.unwrap(), ValidateOutcome::Expired);
        assert_eq!(on.ledger.release(lock, ORDERS).await.unwrap(), ReleaseOutcome::Expired);
        on.grant(event(1), 1, 8, 1).await;
        assert_eq!(on.ledger.locks_of(user(7)).await.unwrap(), []);
    }

    /// The same request id gives the same lock, until it ended; for something else it is refused.
    async fn a_repeated_request_gives_the_same_lock(on: &Stepped) {
        on.stock(event(1), &[(1, 5, 5), (2, 5, 5)]).await;
        let mut wanted = request(event(1), 1, 7, 2);
        wanted.request = Some("try-1".parse().unwrap());
        let LockOutcome::Granted(first) = on.ledger.lock(&wanted).await.unwrap() else { panic!("free") };
        on.step(MS).await;
        wanted.lock = LockId::generate(event(1));
        let LockOutcome::GrantedBefore(second) = on.ledger.lock(&wanted).await.unwrap() else { panic!("a repeat") };
        assert_eq!((second.lock, second.deadline, second.version), (first.lock, first.deadline, first.version));
        assert_eq!(on.counts(event(1), 1).await, (3, 2, 0));
        wanted.quantity = quantity(1);
        assert_eq!(on.ledger.lock(&wanted).await.unwrap(), LockOutcome::RequestMismatch);
        wanted.quantity = quantity(2);
        on.ledger.release(first.lock, owner(7)).await.unwrap();
        assert_eq!(on.ledger.lock(&wanted).await.unwrap(), LockOutcome::RequestEnded { lock: first.lock });
        wanted.user = user(8);
        assert!(matches!(on.ledger.lock(&wanted).await.unwrap(), LockOutcome::Granted(_)), "another user's id is another id");
    }

    /// Held and confirmed count together against the limit per event; what was given back does not.
    async fn the_limit_per_event_counts_held_and_confirmed(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9), (2, 9, 9)]).await;
        let limited = |category_id, n| {
            let mut wanted = request(event(1), category_id, 7, n);
            wanted.per_event_max = Some(4);
            wanted
        };
        let LockOutcome::Granted(first) = on.ledger.lock(&limited(1, 3)).await.unwrap() else { panic!("three of four") };
        assert_eq!(on.ledger.lock(&limited(2, 2)).await.unwrap(), LockOutcome::LimitExceeded { held: 3 });
        on.ledger.confirm(first.lock, None, None).await.unwrap();
        assert_eq!(on.ledger.lock(&limited(1, 2)).await.unwrap(), LockOutcome::LimitExceeded { held: 3 });
        let LockOutcome::Granted(second) = on.ledger.lock(&limited(2, 1)).await.unwrap() else { panic!("four of four") };
        on.ledger.release(second.lock, owner(7)).await.unwrap();
        on.ledger.release(first.lock, ORDERS).await.unwrap();
        assert!(matches!(on.ledger.lock(&limited(1, 4)).await.unwrap(), LockOutcome::Granted(_)));
    }

    /// What runs out leaves the limit, what was confirmed stays in it.
    async fn an_expired_lock_leaves_the_limit_and_a_sale_does_not(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9), (2, 9, 9)]).await;
        let sold = on.grant(event(1), 1, 7, 3).await;
        on.ledger.confirm(sold, None, None).await.unwrap();
        on.grant(event(1), 2, 7, 1).await;
        on.step(TTL).await;
        let mut wanted = request(event(1), 2, 7, 2);
        wanted.per_event_max = Some(4);
        assert_eq!(on.ledger.lock(&wanted).await.unwrap(), LockOutcome::LimitExceeded { held: 3 });
        wanted.quantity = quantity(1);
        assert!(matches!(on.ledger.lock(&wanted).await.unwrap(), LockOutcome::Granted(_)));
    }

    /// Two sales of one user wait for their orders; what becomes of one leaves the other waiting.
    async fn two_sales_wait_for_their_orders(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let mut sold = Vec::new();
        for n in 1..=3 {
            let lock = on.grant(event(1), 1, 7, n).await;
            on.ledger.confirm(lock, None, None).await.unwrap();
            sold.push(lock);
        }
        assert_eq!(on.counts(event(1), 1).await, (3, 0, 6));
        assert!(matches!(on.ledger.release(sold[0], ORDERS).await.unwrap(), ReleaseOutcome::Released(_)));
        assert_eq!(on.counts(event(1), 1).await, (4, 0, 5));
        on.ledger.order(&report(event(1), "A", 1, 7, 3, OrderResult::Completed)).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (4, 0, 5), "the lock of three was the order's");
        on.stock(event(1), &[(1, 9, 6)]).await;
        assert_eq!(on.counts(event(1), 1).await, (4, 0, 2));
        on.ledger.order(&report(event(1), "B", 1, 7, 2, OrderResult::Completed)).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (4, 0, 2));
        on.stock(event(1), &[(1, 9, 4)]).await;
        assert_eq!(on.counts(event(1), 1).await, (4, 0, 0));
    }

    /// More locks run out at once than one call ends: whose lock is the last of them can lock again all the same.
    async fn a_backlog_of_expired_locks_stands_in_nobodys_way(on: &Stepped) {
        on.stock(event(1), &[(1, 1503, 1503)]).await;
        let others = (100..1600).map(|user| on.grant(event(1), 1, user, 1));
        futures_util::future::join_all(others).await;
        on.step(MS).await;
        let limited = || {
            let mut wanted = request(event(1), 1, 7, 3);
            wanted.per_event_max = Some(3);
            wanted
        };
        assert!(matches!(on.ledger.lock(&limited()).await.unwrap(), LockOutcome::Granted(_)));
        on.step(TTL).await;
        let LockOutcome::Granted(grant) = on.ledger.lock(&limited()).await.unwrap() else { panic!("nothing is held") };
        on.ledger.release(grant.lock, owner(7)).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (1503, 0, 0));
        // A sweep that has not ended all of them says that the next is due now.
        let others = (100..1600).map(|user| on.grant(event(1), 1, user, 1));
        futures_util::future::join_all(others).await;
        on.step(TTL).await;
        let mut expired = 0;
        while expired < 1500 {
            let swept = on.ledger.sweep().await.unwrap();
            expired += swept.expired;
            assert!(swept.expired > 0, "{swept:?}");
            assert_eq!(swept.next == Some(Duration::ZERO), expired < 1500, "{swept:?}");
        }
        assert_eq!(on.counts(event(1), 1).await, (1503, 0, 0));
        // What their users held follows.
        let mut sweeps = 0;
        while on.ledger.stats().await.unwrap().users_with_locks > 0 {
            assert_eq!((on.ledger.sweep().await.unwrap().expired, sweeps < 3), (0, true));
            sweeps += 1;
        }
    }

    /// GCRA: a burst, then one per interval; a refusal costs nothing and says when to come back.
    async fn the_rate_limit_says_when_to_come_back(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 0)]).await;
        let mut wanted = request(event(1), 1, 7, 1);
        wanted.rate = Some(RateLimit { interval: Duration::from_millis(100), burst: 3 });
        for _ in 0..3 {
            assert_eq!(on.ledger.lock(&wanted).await.unwrap(), LockOutcome::SoldOut);
        }
        let after = |ms| LockOutcome::RateLimited { retry_after: Duration::from_millis(ms) };
        assert_eq!(on.ledger.lock(&wanted).await.unwrap(), after(100));
        on.step(Duration::from_millis(60)).await;
        assert_eq!(on.ledger.lock(&wanted).await.unwrap(), after(40));
        on.step(Duration::from_millis(40)).await;
        assert_eq!(on.ledger.lock(&wanted).await.unwrap(), LockOutcome::SoldOut);
        assert_eq!(on.ledger.lock(&wanted).await.unwrap(), after(100));
        wanted.user = user(8);
        assert_eq!(on.ledger.lock(&wanted).await.unwrap(), LockOutcome::SoldOut, "another user has another rate");
    }

    /// A valid lock is pinned: it lives at least the window more, and no disconnect ends it.
    async fn validate_pins(on: &Stepped) {
        on.stock(event(1), &[(1, 5, 5)]).await;
        assert_eq!(on.ledger.validate(&validate(7, 1, 1)).await.unwrap(), ValidateOutcome::NotFound);
        let session = SessionId::generate();
        on.ledger.enter(user(7), session).await.unwrap();
        let lock = on.grant(event(1), 1, 7, 2).await;
        assert_eq!(on.ledger.validate(&validate(7, 1, 3)).await.unwrap(), ValidateOutcome::NotFound, "holds only two");
        on.step(TTL - Duration::from_secs(10)).await;
        let ValidateOutcome::Valid { lock: found, deadline } = on.ledger.validate(&validate(7, 1, 2)).await.unwrap() else {
            panic!("held");
        };
        assert_eq!(found, lock);
        let created = on.ledger.find(lock).await.unwrap().unwrap().created_at;
        assert_eq!(deadline.as_ms() - created.as_ms(), 290_000 + 60_000);
        on.ledger.leave(user(7), session, GRACE).await.unwrap();
        on.step(Duration::from_mins(1) - MS).await;
        assert_eq!(on.ledger.confirm(lock, Some(user(7)), None).await.unwrap(), ConfirmOutcome::Confirmed);
    }

    /// A lock is confirmed once, for one user and one order; repeating says the same.
    async fn a_confirm_happens_once(on: &Stepped) {
        on.stock(event(1), &[(1, 5, 5)]).await;
        let lock = on.grant(event(1), 1, 7, 2).await;
        let (a, b) = (order_id("A"), order_id("B"));
        assert_eq!(on.ledger.confirm(lock, Some(user(8)), None).await.unwrap(), ConfirmOutcome::WrongUser);
        assert_eq!(on.ledger.confirm(LockId::generate(event(1)), None, None).await.unwrap(), ConfirmOutcome::NotFound);
        assert_eq!(on.ledger.confirm(lock, Some(user(7)), Some(&a)).await.unwrap(), ConfirmOutcome::Confirmed);
        assert_eq!(on.counts(event(1), 1).await, (3, 0, 2));
        assert_eq!(on.ledger.confirm(lock, None, None).await.unwrap(), ConfirmOutcome::AlreadyConfirmed);
        assert_eq!(on.ledger.confirm(lock, None, Some(&a)).await.unwrap(), ConfirmOutcome::AlreadyConfirmed);
        assert_eq!(on.ledger.confirm(lock, None, Some(&b)).await.unwrap(), ConfirmOutcome::OtherOrder);
        assert_eq!(on.ledger.release(lock, owner(7)).await.unwrap(), ReleaseOutcome::Confirmed, "a sale is not unlocked");
        let found = on.ledger.find(lock).await.unwrap().unwrap();
        assert_eq!((found.status, found.order), (LockStatus::Confirmed, Some(a)));
        assert!(found.version.is_some());
        assert_eq!(on.ledger.locks_of(user(7)).await.unwrap(), []);
        on.grant(event(1), 1, 7, 1).await;
    }

    /// A release gives the tickets back once; the owner and the orders-service are told apart.
    async fn a_release_happens_once(on: &Stepped) {
        on.stock(event(1), &[(1, 5, 5)]).await;
        let lock = on.grant(event(1), 1, 7, 2).await;
        assert_eq!(on.ledger.release(lock, owner(8)).await.unwrap(), ReleaseOutcome::WrongUser);
        assert_eq!(on.ledger.release(LockId::generate(event(1)), ORDERS).await.unwrap(), ReleaseOutcome::NotFound);
        let ReleaseOutcome::Released(released) = on.ledger.release(lock, owner(7)).await.unwrap() else { panic!("held") };
        assert_eq!((released.id, released.quantity, released.status), (lock, quantity(2), LockStatus::Released));
        assert!(matches!(on.ledger.release(lock, owner(7)).await.unwrap(), ReleaseOutcome::AlreadyReleased(_)));
        assert_eq!(on.ledger.release(lock, ORDERS).await.unwrap(), ReleaseOutcome::ReleasedByOther);
        assert_eq!(on.ledger.confirm(lock, None, None).await.unwrap(), ConfirmOutcome::Released);
        assert_eq!(on.counts(event(1), 1).await, (5, 0, 0));
        // The order failed after its lock was confirmed: the tickets come back too.
        let lock = on.grant(event(1), 1, 7, 2).await;
        on.ledger.confirm(lock, None, None).await.unwrap();
        assert!(matches!(on.ledger.release(lock, ORDERS).await.unwrap(), ReleaseOutcome::Released(_)));
        assert_eq!(on.counts(event(1), 1).await, (5, 0, 0));
    }

    /// The last session's end starts the grace; a return anywhere gives the deadline back.
    async fn abandonment_and_return(on: &Stepped) {
        on.stock(event(1), &[(1, 5, 5)]).await;
        let (tab, phone) = (SessionId::generate(), SessionId::generate());
        on.ledger.enter(user(7), tab).await.unwrap();
        on.ledger.enter(user(7), phone).await.unwrap();
        let lock = on.grant(event(1), 1, 7, 2).await;
        let full = on.ledger.find(lock).await.unwrap().unwrap().deadline;
        on.ledger.leave(user(7), tab, GRACE).await.unwrap();
        on.step(GRACE + MS).await;
        assert_eq!(on.ledger.find(lock).await.unwrap().unwrap().deadline, full, "the phone is still there");
        on.ledger.leave(user(7), phone, GRACE).await.unwrap();
        let shortened = on.ledger.find(lock).await.unwrap().unwrap().deadline;
        assert_eq!(full.as_ms() - shortened.as_ms(), 300_000 - 15_001 - 15_000);
        on.step(GRACE - MS).await;
        let back = SessionId::generate();
        let presence = on.ledger.enter(user(7), back).await.unwrap();
        assert_eq!(presence.locks.iter().map(|lock| (lock.id, lock.deadline)).collect::<Vec<_>>(), [(lock, full)]);
        on.ledger.leave(user(7), back, GRACE).await.unwrap();
        on.step(GRACE).await;
        assert_eq!(on.counts(event(1), 1).await, (5, 0, 0));
        assert_eq!(on.ledger.find(lock).await.unwrap().unwrap().status, LockStatus::Expired);
    }

    /// A category that the events-service no longer names is closed and has nothing.
    async fn a_category_no_longer_named_is_closed(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9), (2, 9, 9)]).await;
        on.stock(event(1), &[(1, 9, 9)]).await;
        let rows = on.ledger.availability(event(1), TTL).await.unwrap().expect("known");
        assert_eq!(rows.iter().map(|row| (row.total, row.stock, row.open)).collect::<Vec<_>>(), [(9, 9, true), (0, 0, false)]);
        assert_eq!(on.ledger.lock(&request(event(1), 2, 7, 1)).await.unwrap(), LockOutcome::Closed);
        on.stock(event(1), &[(1, 9, 9), (2, 9, 8)]).await;
        assert_eq!(on.counts(event(1), 2).await, (8, 0, 0));
    }

    /// Each owner is warned once, however often is swept; who locks later is warned later.
    async fn owners_are_warned_once(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let mut feed = on.ledger.feed().expect("taken once");
        for who in [7, 8] {
            on.ledger.subscribe(Topic::User(user(who))).await.unwrap();
        }
        on.grant(event(1), 1, 7, 1).await;
        on.step(Duration::from_secs(10)).await;
        on.grant(event(1), 1, 8, 1).await;
        on.step(TTL - WARNING - Duration::from_secs(10) - MS).await;
        for step in [Duration::ZERO, MS, MS, Duration::from_secs(1), Duration::from_millis(8999), WARNING / 2] {
            on.step(step).await;
            on.ledger.sweep().await.unwrap();
            on.ledger.sweep().await.unwrap();
        }
        // Whoever locks for less than the warning is not warned: it would come with the grant.
        on.ledger.subscribe(Topic::User(user(9))).await.unwrap();
        let mut short = request(event(1), 1, 9, 1);
        short.ttl = WARNING * 2 / 3;
        on.ledger.lock(&short).await.unwrap();
        on.ledger.sweep().await.unwrap();
        // What is told last shows that nothing more comes.
        let (lock, category, quantity) = (LockId::generate(event(1)), category(1), quantity(1));
        on.ledger.tell(user(8), &Personal::Expired { lock, category, quantity }).await.unwrap();
        let mut told = Vec::new();
        loop {
            match tokio::time::timeout(Duration::from_secs(5), feed.recv()).await.expect("told in time") {
                Some(FeedItem::Personal(who, Personal::Expiring { remaining, .. })) => told.push((who, remaining)),
                Some(FeedItem::Personal(..)) => break,
                Some(FeedItem::Resync) => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(told, [(user(7), WARNING), (user(8), WARNING)]);
    }

    /// What a user is told of an order is kept for who missed it: for ten minutes, until a session that was open has shown
    /// it and the last one has left.
    async fn what_is_told_of_orders_is_kept_for_who_missed_it(on: &Stepped) {
        let [first, second, third] = [(); 3].map(|()| SessionId::generate());
        let names = |presence: &Presence| -> Vec<String> { presence.told.iter().map(|told| name_of(&told.message)).collect() };
        let enter = async |session| on.ledger.enter(user(7), session).await.unwrap();
        let mut feed = on.ledger.feed().expect("taken once");
        on.ledger.subscribe(Topic::User(user(7))).await.unwrap();
        on.ledger.tell(user(7), &completed("A", 1)).await.unwrap();
        let told = async { while feed.recv().await != Some(FeedItem::Personal(user(7), completed("A", 1))) {} };
        tokio::time::timeout(Duration::from_secs(5), told).await.expect("told at once, too");
        on.step(MS).await;
        let presence = enter(first).await;
        assert_eq!((names(&presence), presence.seen_until), (vec!["A".to_owned()], Instant::from_ms(0)), "nobody was there");
        assert_eq!(presence.told[0].at.as_ms(), presence.now.as_ms() - 1);
        assert_eq!(enter(first).await.seen_until, Instant::from_ms(0), "it is no other session");
        let presence = enter(second).await;
        assert_eq!(presence.now.as_ms() - presence.seen_until.as_ms(), 20_000, "the first has shown what is older");
        assert_eq!(names(&presence), ["A"], "and may want it when it enters again");
        let nothing = (Vec::<String>::new(), Instant::from_ms(0));
        let other = on.ledger.enter(user(8), third).await.unwrap();
        assert_eq!((names(&other), other.seen_until), nothing, "another user");

        on.ledger.leave(user(7), second, GRACE).await.unwrap();
        on.step(SILENT_MAX - MS).await;
        on.ledger.tell(user(7), &completed("B", 1)).await.unwrap();
        on.ledger.leave(user(7), first, GRACE).await.unwrap();
        on.ledger.tell(user(7), &completed("C", 1)).await.unwrap();
        on.step(SILENT_MAX).await;
        on.ledger.leave(user(7), first, GRACE).await.unwrap();
        let presence = enter(third).await;
        assert_eq!(names(&presence), ["B", "C"], "A was shown; a repeat says nothing of the others");
        for order in ["C", "B"] {
            on.ledger.tell(user(7), &completed(order, 1)).await.unwrap();
        }
        assert_eq!(names(&enter(first).await), ["B", "C"], "in one millisecond their texts decide");
        on.step(MS).await;
        on.ledger.tell(user(7), &completed("B", 1)).await.unwrap();
        assert_eq!(names(&enter(first).await), ["C", "B"], "once, where it was told last");
        on.step(TOLD_KEPT).await;
        on.ledger.sweep().await.unwrap();
        assert_eq!(names(&enter(first).await), ["B"]);
        on.step(MS).await;
        let late = enter(first).await;
        assert_eq!((names(&late), late.seen_until), nothing);

        let all: Vec<String> = (100..120).map(|order| order.to_string()).collect();
        for order in &all {
            on.ledger.tell(user(9), &completed(order, 1)).await.unwrap();
        }
        let latest = on.ledger.enter(user(9), first).await.unwrap();
        assert_eq!(names(&latest), all[4..], "the latest sixteen");
        let lock = LockId::generate(event(1));
        on.ledger.tell(user(9), &Personal::Pinned { lock, deadline: Instant::from_ms(1) }).await.unwrap();
        let again = on.ledger.enter(user(9), first).await.unwrap();
        assert_eq!(names(&again), all[4..], "and nothing but orders");
    }

    /// A snapshot that was asked for earlier never replaces a later one.
    async fn a_late_snapshot_is_ignored(on: &Stepped) {
        let AskOutcome::Ask(early) = on.ledger.ask(event(1), Duration::ZERO).await.unwrap() else { panic!("draws") };
        let AskOutcome::Ask(late) = on.ledger.ask(event(1), Duration::ZERO).await.unwrap() else { panic!("draws") };
        assert!(late > early);
        assert_eq!(on.ledger.accept(event(1), late, &snapshot(&[(1, 5, 3)])).await.unwrap(), AcceptOutcome::Accepted);
        assert_eq!(on.ledger.accept(event(1), early, &snapshot(&[(1, 5, 5)])).await.unwrap(), AcceptOutcome::Older);
        assert_eq!(on.ledger.accept(event(1), late, &snapshot(&[(1, 5, 5)])).await.unwrap(), AcceptOutcome::Older);
        assert_eq!(on.counts(event(1), 1).await.0, 3);
        assert_eq!(on.ledger.ask(event(1), Duration::from_secs(10)).await.unwrap(), AskOutcome::Fresh);
        on.step(Duration::from_secs(10) + MS).await;
        assert!(matches!(on.ledger.ask(event(1), Duration::from_secs(10)).await.unwrap(), AskOutcome::Ask(_)));
    }

    /// Confirm, then reserve: availability never shows the sold tickets free, and is exact at the end.
    async fn settlement_does_not_flicker(on: &Stepped) {
        on.stock(event(1), &[(1, 5, 5)]).await;
        let lock = on.grant(event(1), 1, 7, 2).await;
        let AskOutcome::Ask(before_sale) = on.ledger.ask(event(1), Duration::ZERO).await.unwrap() else { panic!("draws") };
        on.ledger.confirm(lock, None, None).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (3, 0, 2));
        // A question from before the sale is answered now: it shows five, and the two still count.
        on.ledger.accept(event(1), before_sale, &snapshot(&[(1, 5, 5)])).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (3, 0, 2));
        let AskOutcome::Ask(meanwhile) = on.ledger.ask(event(1), Duration::ZERO).await.unwrap() else { panic!("draws") };
        let completed = report(event(1), "55", 1, 7, 2, OrderResult::Completed);
        assert_eq!(on.ledger.order(&completed).await.unwrap(), OrderOutcome::Noted);
        assert_eq!(on.counts(event(1), 1).await, (3, 0, 2));
        assert_eq!(on.ledger.release(lock, ORDERS).await.unwrap(), ReleaseOutcome::Confirmed, "reported is final");
        // Asked before the report: it may not show the sale yet, so the two still count.
        on.ledger.accept(event(1), meanwhile, &snapshot(&[(1, 5, 5)])).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (3, 0, 2));
        // Asked after the report: shows the sale, and in the same step the two leave.
        on.stock(event(1), &[(1, 5, 3)]).await;
        assert_eq!(on.counts(event(1), 1).await, (3, 0, 0));
        assert_eq!(on.ledger.order(&completed).await.unwrap(), OrderOutcome::Repeated);
        assert_eq!(on.counts(event(1), 1).await, (3, 0, 0));
    }

    /// Validate, reserve, confirm: a snapshot between the steps may show the sale early, which counts it twice for a
    /// moment (fewer are offered than are free) and never too little.
    async fn a_sale_seen_before_its_confirm_is_never_counted_too_little(on: &Stepped) {
        on.stock(event(1), &[(1, 5, 5)]).await;
        let lock = on.grant(event(1), 1, 7, 2).await;
        on.ledger.validate(&validate(7, 1, 2)).await.unwrap();
        on.stock(event(1), &[(1, 5, 3)]).await;
        assert_eq!(on.counts(event(1), 1).await, (1, 2, 0));
        on.ledger.confirm(lock, None, None).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (1, 0, 2));
        on.ledger.order(&report(event(1), "55", 1, 7, 2, OrderResult::Completed)).await.unwrap();
        on.stock(event(1), &[(1, 5, 3)]).await;
        assert_eq!(on.counts(event(1), 1).await, (3, 0, 0));
    }

    /// An order without a lock, and one of more tickets than its lock, are counted until the stock shows them.
    async fn orders_beyond_their_locks_are_counted(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        on.ledger.order(&report(event(1), "1", 1, 7, 2, OrderResult::Completed)).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (7, 0, 2));
        let lock = on.grant(event(1), 1, 8, 1).await;
        on.ledger.confirm(lock, None, None).await.unwrap();
        on.ledger.order(&report(event(1), "2", 1, 8, 3, OrderResult::Completed)).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (4, 0, 5));
        on.stock(event(1), &[(1, 9, 4)]).await;
        assert_eq!(on.counts(event(1), 1).await, (4, 0, 0));
        assert_eq!(
            on.ledger.order(&report(event(1), "1", 1, 7, 2, OrderResult::Completed)).await.unwrap(),
            OrderOutcome::Repeated
        );
        assert_eq!(on.counts(event(1), 1).await, (4, 0, 0));
    }

    /// The report comes before the confirm: a pinned lock is the order's, and the late confirm says yes.
    async fn a_report_before_the_confirm_claims_the_pinned_lock(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let lock = on.grant(event(1), 1, 7, 2).await;
        on.ledger.validate(&validate(7, 1, 2)).await.unwrap();
        on.ledger.order(&report(event(1), "5", 1, 7, 2, OrderResult::Completed)).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (7, 0, 2));
        assert_eq!(on.ledger.confirm(lock, None, Some(&order_id("5"))).await.unwrap(), ConfirmOutcome::AlreadyConfirmed);
        on.stock(event(1), &[(1, 9, 7)]).await;
        assert_eq!(on.counts(event(1), 1).await, (7, 0, 0));
    }

    /// A report that names no lock is about the buyer's oldest sales, so many as cover it.
    async fn a_report_takes_the_oldest_sales_that_cover_it(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        for _ in 0..4 {
            let lock = on.grant(event(1), 1, 7, 1).await;
            on.ledger.confirm(lock, None, None).await.unwrap();
        }
        on.ledger.order(&report(event(1), "5", 1, 7, 2, OrderResult::Completed)).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (5, 0, 4));
        on.stock(event(1), &[(1, 9, 7)]).await;
        assert_eq!(on.counts(event(1), 1).await, (5, 0, 2), "the third and the fourth wait for their order");
    }

    /// A sale that fits is the report's, though a lock is pinned too: that one is another order's.
    async fn a_report_prefers_a_sale_to_a_pinned_lock(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let sold = on.grant(event(1), 1, 7, 1).await;
        on.ledger.confirm(sold, None, None).await.unwrap();
        let pinned = on.grant(event(1), 1, 7, 2).await;
        on.ledger.validate(&validate(7, 1, 2)).await.unwrap();
        on.ledger.order(&report(event(1), "5", 1, 7, 1, OrderResult::Completed)).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (6, 2, 1));
        assert_eq!(on.ledger.find(pinned).await.unwrap().unwrap().status, LockStatus::Active);
        on.stock(event(1), &[(1, 9, 8)]).await;
        assert_eq!(on.counts(event(1), 1).await, (6, 2, 0));
    }

    /// Two locks are confirmed for an order that was reported before: the second moves what the first left.
    async fn confirms_after_the_report_share_its_tickets(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        on.ledger.order(&report(event(1), "5", 1, 7, 3, OrderResult::Completed)).await.unwrap();
        for (active, sold) in [(2, 3), (2, 4)] {
            let lock = on.grant(event(1), 1, 7, 2).await;
            assert_eq!(on.counts(event(1), 1).await.1, active);
            on.ledger.confirm(lock, None, Some(&order_id("5"))).await.unwrap();
            assert_eq!(on.counts(event(1), 1).await, (9 - sold, 0, sold));
        }
        on.stock(event(1), &[(1, 9, 5)]).await;
        assert_eq!(on.counts(event(1), 1).await, (5, 0, 0));
    }

    /// Two locks are confirmed for an order whose report speaks of a lock that nobody knows: both are the order's.
    async fn a_report_of_an_unknown_lock_meets_all_that_was_confirmed_for_it(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let one = on.grant(event(1), 1, 7, 1).await;
        on.ledger.confirm(one, None, Some(&order_id("5"))).await.unwrap();
        let mut told = report(event(1), "5", 1, 7, 2, OrderResult::Completed);
        told.lock = Some(LockId::generate(event(1)));
        on.ledger.order(&told).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (6, 0, 3));
        let other = on.grant(event(1), 1, 7, 1).await;
        on.ledger.confirm(other, None, Some(&order_id("5"))).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (7, 0, 2));
    }

    /// The report comes before the confirm of a lock that is not pinned: the confirm names the order and they meet.
    async fn a_confirm_after_the_report_meets_its_order(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let lock = on.grant(event(1), 1, 7, 3).await;
        on.ledger.order(&report(event(1), "5", 1, 7, 2, OrderResult::Completed)).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (4, 3, 2), "both count until it is known that they are one");
        on.ledger.confirm(lock, None, Some(&order_id("5"))).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (6, 0, 3));
        on.stock(event(1), &[(1, 9, 7)]).await;
        assert_eq!(on.counts(event(1), 1).await, (7, 0, 0));
    }

    /// The same with an order of more tickets than the lock: the rest goes on counting until the stock shows it.
    async fn a_confirm_after_the_report_meets_a_part_of_its_order(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let lock = on.grant(event(1), 1, 7, 1).await;
        on.ledger.order(&report(event(1), "5", 1, 7, 3, OrderResult::Completed)).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (5, 1, 3));
        on.ledger.confirm(lock, None, Some(&order_id("5"))).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (6, 0, 3));
        let other = on.grant(event(1), 1, 8, 4).await;
        on.ledger.confirm(other, None, None).await.unwrap();
        on.stock(event(1), &[(1, 9, 6)]).await;
        assert_eq!(on.counts(event(1), 1).await, (2, 0, 4), "the other sale waits for its order");
    }

    /// A cancelled sale is told to the room, though the counts change only with the next stock.
    async fn a_cancelled_sale_is_announced(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        on.ledger.order(&report(event(1), "6", 1, 7, 2, OrderResult::Completed)).await.unwrap();
        let mut feed = on.ledger.feed().expect("taken once");
        on.ledger.subscribe(Topic::Event(event(1))).await.unwrap();
        on.ledger.order(&report(event(1), "6", 1, 7, 2, OrderResult::Cancelled)).await.unwrap();
        loop {
            match tokio::time::timeout(Duration::from_secs(5), feed.recv()).await.expect("told in time") {
                Some(FeedItem::Changed(notice)) => {
                    let [change] = notice.changes[..] else { panic!("one change: {notice:?}") };
                    let told = (change.kind, change.quantity, change.user);
                    assert_eq!(told, (ChangeKind::Back(ReleaseReason::Cancelled), quantity(2), user(7)));
                    break;
                }
                Some(FeedItem::Resync) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// The same for a single ticket whose order was never completed.
    async fn a_cancelled_order_of_one_ticket_is_announced(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let lock = on.grant(event(1), 1, 7, 1).await;
        on.ledger.confirm(lock, None, None).await.unwrap();
        let version = async || on.ledger.availability(event(1), TTL).await.unwrap().expect("known")[0].version;
        let before = version().await;
        on.ledger.order(&report(event(1), "6", 1, 7, 1, OrderResult::Cancelled)).await.unwrap();
        assert_eq!(version().await, before + 1);
    }

    /// More owners are to be warned at once than one sweep warns: the last of them is warned too.
    async fn the_last_of_many_owners_is_warned(on: &Stepped) {
        warned_after(on, MS).await;
    }

    /// Also when all of them have one deadline, and nobody twice.
    async fn many_owners_of_one_deadline_are_warned(on: &Stepped) {
        warned_after(on, Duration::ZERO).await;
    }

    /// A listing says which locks an order is in progress of.
    async fn listings_tell_of_pins(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9), (2, 9, 9)]).await;
        on.grant(event(1), 1, 7, 1).await;
        on.grant(event(1), 2, 7, 1).await;
        on.ledger.validate(&validate(7, 2, 1)).await.unwrap();
        let pins = |locks: Vec<Lock>| locks.iter().map(|lock| (lock.category.value(), lock.pinned)).collect::<Vec<_>>();
        let expected = [(1, false), (2, true)];
        assert_eq!(pins(on.ledger.locks_in(event(1), user(7)).await.unwrap()), expected);
        let session = SessionId::generate();
        assert_eq!(pins(on.ledger.enter(user(7), session).await.unwrap().locks), expected);
        on.ledger.leave(user(7), session, GRACE).await.unwrap();
        assert_eq!(pins(on.ledger.locks_in(event(1), user(7)).await.unwrap()), expected, "abandoned, and not pinned");
    }

    /// An order that is reported again does not take the lock that its buyer has made since.
    async fn a_repeated_report_claims_nothing(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let completed = report(event(1), "5", 1, 7, 2, OrderResult::Completed);
        on.ledger.order(&completed).await.unwrap();
        let next = on.grant(event(1), 1, 7, 2).await;
        on.ledger.validate(&validate(7, 1, 2)).await.unwrap();
        assert_eq!(on.ledger.order(&completed).await.unwrap(), OrderOutcome::Repeated);
        assert_eq!(on.ledger.find(next).await.unwrap().unwrap().status, LockStatus::Active);
    }

    /// Cancelled orders: never completed, completed and undone, and completed after cancelled.
    async fn cancelled_orders_give_back(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let lock = on.grant(event(1), 1, 7, 2).await;
        on.ledger.confirm(lock, None, None).await.unwrap();
        let cancelled = report(event(1), "5", 1, 7, 2, OrderResult::Cancelled);
        assert_eq!(on.ledger.order(&cancelled).await.unwrap(), OrderOutcome::Noted);
        assert_eq!(on.ledger.order(&cancelled).await.unwrap(), OrderOutcome::Repeated);
        let completed = report(event(1), "5", 1, 7, 2, OrderResult::Completed);
        assert_eq!(on.ledger.order(&completed).await.unwrap(), OrderOutcome::AfterCancel);
        on.stock(event(1), &[(1, 9, 9)]).await;
        assert_eq!(on.counts(event(1), 1).await, (9, 0, 0));
        on.ledger.order(&report(event(1), "6", 1, 7, 2, OrderResult::Completed)).await.unwrap();
        on.ledger.order(&report(event(1), "6", 1, 7, 2, OrderResult::Cancelled)).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (7, 0, 2));
        on.stock(event(1), &[(1, 9, 9)]).await;
        assert_eq!(on.counts(event(1), 1).await, (9, 0, 0));
        // A single ticket, and a stock that stays as it was.
        let lock = on.grant(event(1), 1, 7, 1).await;
        on.ledger.confirm(lock, None, None).await.unwrap();
        on.ledger.order(&report(event(1), "7", 1, 7, 1, OrderResult::Cancelled)).await.unwrap();
        on.stock(event(1), &[(1, 9, 9)]).await;
        assert_eq!(on.counts(event(1), 1).await, (9, 0, 0));
        // Cancelled before its lock was confirmed, and completed after all.
        on.ledger.order(&report(event(1), "8", 1, 7, 3, OrderResult::Cancelled)).await.unwrap();
        let lock = on.grant(event(1), 1, 7, 3).await;
        on.ledger.confirm(lock, None, Some(&order_id("8"))).await.unwrap();
        on.ledger.order(&report(event(1), "8", 1, 7, 3, OrderResult::Completed)).await.unwrap();
        on.stock(event(1), &[(1, 9, 9)]).await;
        assert_eq!(on.counts(event(1), 1).await, (9, 0, 0));
    }

    /// Owners are told of a release, and whose it was.
    async fn owners_are_told_of_releases(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let mut feed = on.ledger.feed().expect("taken once");
        on.ledger.subscribe(Topic::User(user(7))).await.unwrap();
        for session in [Some(SessionId::generate()), None] {
            let given_back = on.grant(event(1), 1, 7, 2).await;
            let by = if session.is_some() { Releaser::Owner { user: user(7), session } } else { ORDERS };
            on.ledger.release(given_back, by).await.unwrap();
            loop {
                match tokio::time::timeout(Duration::from_secs(5), feed.recv()).await.expect("told in time") {
                    Some(FeedItem::Personal(whose, Personal::Released { lock, quantity: n, by, .. })) => {
                        assert_eq!((whose, lock, n, by), (user(7), given_back, quantity(2), session));
                        break;
                    }
                    Some(FeedItem::Resync) => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    /// Replicas hear of a pin and of a sale, to remember them.
    async fn pins_and_sales_are_told(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let mut feed = on.ledger.feed().expect("taken once");
        on.ledger.subscribe(Topic::User(user(7))).await.unwrap();
        let lock = on.grant(event(1), 1, 7, 2).await;
        let ValidateOutcome::Valid { deadline, .. } = on.ledger.validate(&validate(7, 1, 2)).await.unwrap() else {
            panic!("it is active");
        };
        let order = Some(order_id("5"));
        on.ledger.confirm(lock, None, order.as_ref()).await.unwrap();
        for told in [Personal::Pinned { lock, deadline }, Personal::Confirmed { lock, order }] {
            let heard = async {
                loop {
                    match feed.recv().await {
                        Some(FeedItem::Resync) => {}
                        other => return other,
                    }
                }
            };
            let heard = tokio::time::timeout(Duration::from_secs(5), heard).await.expect("told in time");
            assert_eq!(heard, Some(FeedItem::Personal(user(7), told)));
        }
    }

    /// A confirmed lock whose order is never reported leaves with the first snapshot after the settle timeout.
    async fn an_unreported_sale_times_out_with_a_fresh_snapshot(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let lock = on.grant(event(1), 1, 7, 2).await;
        on.ledger.confirm(lock, None, None).await.unwrap();
        on.step(SETTLE - MS).await;
        assert_eq!(on.ledger.sweep().await.unwrap().refresh, []);
        on.stock(event(1), &[(1, 9, 7)]).await;
        assert_eq!(on.counts(event(1), 1).await, (5, 0, 2), "not yet: the order may still be on its way");
        on.step(MS).await;
        assert_eq!(on.ledger.sweep().await.unwrap().refresh, [event(1)]);
        on.stock(event(1), &[(1, 9, 7)]).await;
        assert_eq!(on.counts(event(1), 1).await, (7, 0, 0));
        on.step(Duration::from_secs(5)).await;
        assert_eq!(on.ledger.sweep().await.unwrap().refresh, []);
    }

    /// Who confirms again has not had the answer and is still to sell: the time limit begins anew, but not after it.
    async fn a_repeated_confirm_has_the_whole_time_to_report(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let lock = on.grant(event(1), 1, 7, 2).await;
        let order = order_id("A");
        let confirm = async || on.ledger.confirm(lock, None, Some(&order)).await.unwrap();
        assert_eq!(confirm().await, ConfirmOutcome::Confirmed);
        on.step(SETTLE - MS).await;
        let other = on.ledger.confirm(lock, None, Some(&order_id("B"))).await.unwrap();
        assert_eq!((confirm().await, other), (ConfirmOutcome::AlreadyConfirmed, ConfirmOutcome::OtherOrder));
        on.step(SETTLE - MS).await;
        on.stock(event(1), &[(1, 9, 9)]).await;
        assert_eq!(on.counts(event(1), 1).await, (7, 0, 2), "it waits for its order");
        on.ledger.confirm(lock, None, Some(&order_id("B"))).await.unwrap();
        on.step(MS).await;
        on.stock(event(1), &[(1, 9, 9)]).await;
        assert_eq!(on.counts(event(1), 1).await, (9, 0, 0), "another order's confirm is no word of this one");
        assert_eq!(confirm().await, ConfirmOutcome::AlreadyConfirmed);
        assert_eq!(on.counts(event(1), 1).await, (9, 0, 0));
        // Reported, it is as good as sold: the first snapshot shows it.
        let lock = on.grant(event(1), 1, 8, 2).await;
        let sold = order_id("C");
        on.ledger.confirm(lock, None, Some(&sold)).await.unwrap();
        on.ledger.order(&report(event(1), "C", 1, 8, 2, OrderResult::Completed)).await.unwrap();
        on.ledger.confirm(lock, None, Some(&sold)).await.unwrap();
        on.stock(event(1), &[(1, 9, 7)]).await;
        assert_eq!(on.counts(event(1), 1).await, (7, 0, 0));
    }

    /// Changes and their announcements are one step; owners are told of their own locks' ends.
    async fn every_change_is_announced(on: &Stepped) {
        let mut feed = on.ledger.feed().expect("taken once");
        assert!(on.ledger.feed().is_none());
        on.ledger.subscribe(Topic::Event(event(1))).await.unwrap();
        on.ledger.subscribe(Topic::User(user(7))).await.unwrap();
        let mut next = async || loop {
            let item = tokio::time::timeout(Duration::from_secs(5), feed.recv()).await.expect("told in time");
            // A subscription that has just begun says that something may have been missed before.
            if item != Some(FeedItem::Resync) {
                return item.expect("the feed lives");
            }
        };
        on.stock(event(1), &[(1, 9, 9)]).await;
        let FeedItem::Changed(stocked) = next().await else { panic!("the new stock") };
        assert_eq!((stocked.availability.stock, stocked.changes.len()), (9, 0));
        let lock = on.grant(event(1), 1, 7, 2).await;
        let FeedItem::Changed(locked) = next().await else { panic!("the lock") };
        assert_eq!((locked.availability.active, locked.availability.available()), (2, 7));
        assert_eq!(stocked.availability.version, START_US, "the time in microseconds");
        assert_eq!(locked.availability.version, START_US + 1, "or one more than the version before");
        assert_eq!((locked.changes[0].kind, locked.changes[0].user), (ChangeKind::Locked, user(7)));
        on.step(TTL - WARNING).await;
        on.ledger.sweep().await.unwrap();
        let FeedItem::Personal(whose, Personal::Expiring { remaining, .. }) = next().await else { panic!("the warning") };
        assert_eq!((whose, remaining), (user(7), WARNING));
        on.step(WARNING).await;
        assert_eq!(on.ledger.sweep().await.unwrap().expired, 1);
        let mut told = [next().await, next().await];
        told.sort_by_key(|item| matches!(item, FeedItem::Changed(_)));
        let [FeedItem::Personal(_, Personal::Expired { lock: expired, .. }), FeedItem::Changed(back)] = told else {
            panic!("the owner and the room: {told:?}");
        };
        assert_eq!(expired, lock);
        assert_eq!(back.changes[0].kind, ChangeKind::Back(ReleaseReason::Expired));
        assert_eq!(back.availability.version, START_US + u64::try_from(TTL.as_micros()).unwrap());
        on.ledger.tell(user(7), &Personal::Expired { lock, category: category(1), quantity: quantity(2) }).await.unwrap();
        assert!(matches!(next().await, FeedItem::Personal(_, Personal::Expired { .. })));
    }

    /// A lock that the ledger does not know is taken back once, while its tickets are free; then it is like any other.
    async fn lost_locks_are_taken_back(on: &Stepped) {
        let lost = lost(on, 7, 2, Kept::Attended);
        let restore = async |asked: &RestoreRequest| on.ledger.restore(asked).await.unwrap();
        assert_eq!(restore(&lost).await, RestoreOutcome::StockUnknown);
        on.stock(event(1), &[(1, 9, 4)]).await;
        let other = on.grant(event(1), 1, 8, 2).await;
        assert_eq!(restore(&RestoreRequest { memento: Memento { quantity: quantity(3), ..lost.memento.clone() }, ..lost.clone() }).await, RestoreOutcome::NoRoom);
        assert_eq!(restore(&RestoreRequest { user: user(8), ..lost.clone() }).await, RestoreOutcome::NoRoom, "has one");
        assert_eq!(restore(&RestoreRequest { memento: Memento { category: category(2), ..lost.memento.clone() }, ..lost.clone() }).await, RestoreOutcome::NoRoom);
        assert_eq!(restore(&lost).await, RestoreOutcome::Restored);
        assert_eq!(restore(&lost).await, RestoreOutcome::Known, "a repeat");
        assert_eq!(on.counts(event(1), 1).await, (0, 4, 0));
        let (found, others) =
            (on.ledger.find(lost.memento.lock).await.unwrap().unwrap(), on.ledger.find(other).await.unwrap().unwrap());
        assert_eq!((found.created_at, found.deadline, found.session), (lost.memento.created_at, lost.memento.deadline, lost.memento.session));
        assert!(found.version > others.version, "a higher fencing token");
        assert_eq!(on.ledger.locks_of(user(7)).await.unwrap().len(), 1, "found again by its user");
        let mut again = request(event(1), 1, 7, 2);
        again.request = lost.memento.request.clone();
        let repeated = on.ledger.lock(&again).await.unwrap();
        assert!(matches!(repeated, LockOutcome::GrantedBefore(grant) if grant.lock == lost.memento.lock), "{repeated:?}");
        assert!(matches!(on.ledger.release(other, owner(8)).await.unwrap(), ReleaseOutcome::Released(_)));
        assert_eq!(restore(&RestoreRequest { memento: Memento { lock: other, ..lost.memento.clone() }, ..lost.clone() }).await, RestoreOutcome::Known, "it ended");
        on.step(TTL).await;
        assert_eq!(on.ledger.sweep().await.unwrap().expired, 1);
        assert_eq!(on.counts(event(1), 1).await, (4, 0, 0));
        let late = RestoreRequest { memento: Memento { lock: LockId::generate(event(1)), ..lost.memento }, ..lost };
        assert_eq!(restore(&late).await, RestoreOutcome::Expired);
        on.grant(event(1), 1, 8, 4).await;
        on.step(TTL).await;
        assert_eq!(restore(&super::lost(on, 7, 4, Kept::Attended)).await, RestoreOutcome::Restored, "what is due is ended first");
    }

    /// A pinned lock comes back pinned, and a sale that no snapshot shows yet comes back as one.
    async fn lost_pins_and_sales_are_taken_back(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let pinned = lost(on, 7, 2, Kept::Pinned);
        assert_eq!(on.ledger.restore(&pinned).await.unwrap(), RestoreOutcome::Restored);
        let session = SessionId::generate();
        on.ledger.enter(user(7), session).await.unwrap();
        on.ledger.leave(user(7), session, GRACE).await.unwrap();
        assert_eq!(on.ledger.find(pinned.memento.lock).await.unwrap().unwrap().deadline, pinned.memento.deadline);

        let order = order_id("A");
        let sold = lost(on, 8, 3, Kept::Confirmed { order: Some(order.clone()) });
        assert_eq!(on.ledger.restore(&sold).await.unwrap(), RestoreOutcome::Restored);
        assert_eq!(on.counts(event(1), 1).await, (4, 2, 3));
        let found = on.ledger.find(sold.memento.lock).await.unwrap().unwrap();
        assert_eq!((found.user, found.category, found.quantity), (sold.user, sold.memento.category, sold.memento.quantity));
        assert_eq!((found.created_at, found.deadline, found.session), (sold.memento.created_at, sold.memento.deadline, sold.memento.session));
        assert_eq!((found.status, found.order, found.version), (LockStatus::Confirmed, Some(order.clone()), Some(START_US + 2)));
        let much = lost(on, 9, 5, Kept::Attended);
        assert_eq!(on.ledger.restore(&much).await.unwrap(), RestoreOutcome::NoRoom, "what is sold is not free");
        let confirm = async |order| on.ledger.confirm(sold.memento.lock, None, Some(&order)).await.unwrap();
        assert_eq!(confirm(order).await, ConfirmOutcome::AlreadyConfirmed);
        assert_eq!(confirm(order_id("B")).await, ConfirmOutcome::OtherOrder);
        on.ledger.order(&report(event(1), "A", 1, 8, 3, OrderResult::Completed)).await.unwrap();
        on.stock(event(1), &[(1, 9, 6)]).await;
        assert_eq!(on.counts(event(1), 1).await, (4, 2, 0), "the snapshot shows it");

        on.ledger.order(&report(event(1), "C", 1, 9, 1, OrderResult::Completed)).await.unwrap();
        assert_eq!(on.counts(event(1), 1).await, (3, 2, 1), "reported, and no lock known");
        let late = lost(on, 9, 1, Kept::Confirmed { order: Some(order_id("C")) });
        assert_eq!(on.ledger.restore(&late).await.unwrap(), RestoreOutcome::Restored);
        assert_eq!(on.counts(event(1), 1).await, (3, 2, 1), "counted once");
    }

    /// An abandoned lock that runs out is told as abandoned.
    async fn abandoned_locks_are_told_as_such(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9)]).await;
        let session = SessionId::generate();
        on.ledger.enter(user(7), session).await.unwrap();
        on.stock(event(1), &[(1, 9, 9), (2, 9, 9)]).await;
        on.grant(event(1), 1, 7, 2).await;
        on.grant(event(1), 2, 7, 2).await;
        let mut feed = on.ledger.feed().expect("taken once");
        on.ledger.subscribe(Topic::Event(event(1))).await.unwrap();
        on.ledger.leave(user(7), session, GRACE).await.unwrap();
        on.step(GRACE).await;
        assert_eq!(on.ledger.sweep().await.unwrap().expired, 2);
        let mut told = 0;
        while told < 2 {
            match tokio::time::timeout(Duration::from_secs(5), feed.recv()).await.expect("told in time") {
                Some(FeedItem::Changed(notice)) => {
                    assert_eq!(notice.changes[0].kind, ChangeKind::Back(ReleaseReason::Abandoned));
                    told += 1;
                }
                Some(FeedItem::Resync) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// The statistics count what is there.
    async fn statistics_count(on: &Stepped) {
        on.stock(event(1), &[(1, 9, 9), (2, 9, 9)]).await;
        on.stock(event(2), &[(1, 9, 9)]).await;
        let confirmed = on.grant(event(1), 1, 7, 1).await;
        on.ledger.confirm(confirmed, None, None).await.unwrap();
        on.grant(event(1), 2, 7, 1).await;
        on.grant(event(1), 2, 8, 1).await;
        let released = on.grant(event(2), 1, 9, 1).await;
        on.ledger.release(released, owner(9)).await.unwrap();
        on.step(Duration::from_secs(1)).await;
        let fleet = on.ledger.stats().await.unwrap();
        assert_eq!((fleet.active, fleet.confirmed, fleet.released, fleet.expired), (2, 1, 1, 0));
        assert_eq!((fleet.users_with_locks, fleet.categories_with_locks), (2, 1));
        on.step(TTL).await;
        on.ledger.sweep().await.unwrap();
        let fleet = on.ledger.stats().await.unwrap();
        assert_eq!((fleet.active, fleet.expired, fleet.users_with_locks), (0, 2, 0));
    }
}
