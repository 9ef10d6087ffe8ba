//! The auditor refuses what it must: each forged history breaks one law, and the same history told truly breaks none.

use std::time::Duration;

use seatlock::domain::{
    AcceptOutcome, AskOutcome, Availability, ConfirmOutcome, Grant, Instant, Lock, LockId, LockOutcome, LockRequest,
    LockStatus, OrderOutcome, OrderResult, ReleaseOutcome, Releaser, SnapshotNumber, ValidateOutcome, ValidateRequest,
};

use super::{Auditor, Deed, When};
use crate::support::ledger::{category, event, order_id, quantity, report, request, snapshot, user};

const START_MS: u64 = 1_000_000;
const TTL: Duration = Duration::from_secs(5);
const GRACE: Duration = Duration::from_secs(2);

/// A history of one category, told one deed after the other.
struct Forge {
    auditor: Auditor,
    ticks: u64,
    now_ms: u64,
    version: u64,
    number: u64,
}

impl Forge {
    /// The stock is five.
    fn new() -> Self {
        let auditor = Auditor::new(Duration::from_secs(30));
        let mut forge = Self { auditor, ticks: 0, now_ms: START_MS, version: 7000, number: 0 };
        forge.stock(5);
        forge
    }

    fn when(&mut self) -> When {
        self.ticks += 2;
        When { began: self.ticks - 1, ended: self.ticks, from_ms: self.now_ms, until_ms: self.now_ms }
    }

    fn note(&mut self, deed: Deed) -> &mut Self {
        let when = self.when();
        self.auditor.note(when, deed);
        self
    }

    fn pass(&mut self, interval: Duration) -> &mut Self {
        self.now_ms += u64::try_from(interval.as_millis()).unwrap();
        self
    }

    fn stock(&mut self, stock: u64) -> &mut Self {
        self.number += 1;
        let number = SnapshotNumber(self.number);
        self.note(Deed::Ask { event: event(1), answer: Some(AskOutcome::Ask(number)) });
        let snapshot = snapshot(&[(1, 9, stock)]);
        self.note(Deed::Accept { event: event(1), number, snapshot, answer: Some(AcceptOutcome::Accepted) })
    }

    fn wanted(user: u64, n: u64) -> LockRequest {
        LockRequest { ttl: TTL, ..request(event(1), 1, user, n) }
    }

    fn answered(&mut self, wanted: &LockRequest, answer: LockOutcome) -> &mut Self {
        self.note(Deed::Lock(wanted.clone(), Some(answer)))
    }

    fn grant(&mut self, wanted: &LockRequest) -> Grant {
        self.version += 1;
        let now = Instant::from_ms(self.now_ms);
        let deadline = Instant::from_ms(self.now_ms + u64::try_from(wanted.ttl.as_millis()).unwrap());
        Grant { lock: wanted.lock, deadline, available: 0, version: self.version, now }
    }

    fn lock(&mut self, user: u64, n: u64) -> LockId {
        let wanted = Self::wanted(user, n);
        let grant = self.grant(&wanted);
        self.answered(&wanted, LockOutcome::Granted(grant));
        wanted.lock
    }

    fn confirm(&mut self, lock: LockId, by: Option<u64>, order: &str, answer: ConfirmOutcome) -> &mut Self {
        let order = (!order.is_empty()).then(|| order_id(order));
        self.note(Deed::Confirm { lock, user: by.map(user), order, answer: Some(answer) })
    }

    fn lost_confirm(&mut self, lock: LockId) -> &mut Self {
        self.note(Deed::Confirm { lock, user: None, order: None, answer: None })
    }

    fn release(&mut self, lock: LockId, owner: u64, answer: ReleaseOutcome) -> &mut Self {
        let by = Releaser::Owner { user: user(owner), session: None };
        self.note(Deed::Release { lock, by, answer: Some(answer) })
    }

    fn released(lock: LockId, owner: u64, n: u64) -> Lock {
        Lock {
            id: lock,
            user: user(owner),
            category: category(1),
            quantity: quantity(n),
            created_at: Instant::from_ms(START_MS),
            deadline: Instant::from_ms(START_MS + 5000),
            status: LockStatus::Released,
            version: None,
            session: None,
            order: None,
            pinned: false,
        }
    }

    fn validate(&mut self, owner: u64, n: u64, answer: ValidateOutcome) -> &mut Self {
        let wanted = ValidateRequest {
            event: event(1),
            category: category(1),
            user: user(owner),
            quantity: quantity(n),
            window: Duration::from_secs(3),
        };
        self.note(Deed::Validate(wanted, Some(answer)))
    }

    fn counts(&mut self, stock: u64, active: u64, settling: u64, version: u64) -> &mut Self {
        let at = Instant::from_ms(self.now_ms);
        let (event, category) = (event(1), category(1));
        let row = Availability { event, category, total: 9, stock, active, settling, open: true, version, at };
        self.note(Deed::Availability(event, vec![row]))
    }

    #[track_caller]
    fn is_refused(&self, law: &str) {
        let complaints = self.auditor.complaints();
        assert!(complaints.iter().any(|complaint| complaint.starts_with(law)), "{law:?} is not in {complaints:#?}");
    }

    #[track_caller]
    fn is_lawful(&self) {
        assert_eq!(self.auditor.complaints(), [""; 0]);
    }
}

/// A whole life of two locks and a sale, as a ledger that keeps the laws tells it.
#[test]
fn a_true_history_has_no_complaints() {
    let mut on = Forge::new();
    let first = on.lock(1, 2);
    let second = on.lock(2, 3);
    on.counts(5, 5, 0, on.version);
    on.answered(&Forge::wanted(3, 1), LockOutcome::Insufficient { available: 0 });
    on.answered(&Forge::wanted(1, 1), LockOutcome::AlreadyLocked { lock: first });
    on.validate(1, 2, ValidateOutcome::Valid { lock: first, deadline: Instant::from_ms(START_MS + 5000) });
    on.confirm(first, Some(2), "", ConfirmOutcome::WrongUser);
    on.confirm(first, Some(1), "A", ConfirmOutcome::Confirmed);
    on.confirm(first, None, "A", ConfirmOutcome::AlreadyConfirmed);
    on.confirm(first, None, "B", ConfirmOutcome::OtherOrder);
    on.release(first, 1, ReleaseOutcome::Confirmed);
    on.release(second, 2, ReleaseOutcome::Released(Forge::released(second, 2, 3)));
    on.release(second, 2, ReleaseOutcome::AlreadyReleased(Forge::released(second, 2, 3)));
    on.confirm(second, None, "", ConfirmOutcome::Released);
    on.counts(5, 0, 2, on.version + 9);
    on.version += 9;
    let third = on.lock(3, 3);
    on.note(Deed::Order(report(event(1), "A", 1, 1, 2, OrderResult::Completed), Some(OrderOutcome::Noted)));
    on.stock(3);
    on.pass(TTL);
    on.confirm(third, None, "", ConfirmOutcome::Expired);
    on.lock(4, 3);
    on.is_lawful();
}

#[test]
fn overselling_is_seen() {
    let mut on = Forge::new();
    on.lock(1, 3);
    on.lock(2, 3);
    on.is_refused("sold twice");

    // A sale that no snapshot shows yet counts, however long ago the lock was.
    let mut on = Forge::new();
    let sold = on.lock(1, 3);
    on.confirm(sold, None, "", ConfirmOutcome::Confirmed).pass(TTL * 2);
    on.lock(2, 3);
    on.is_refused("sold twice");

    // A snapshot asked for before the sale was reported cannot show it.
    let mut on = Forge::new();
    let sold = on.lock(1, 3);
    on.confirm(sold, None, "", ConfirmOutcome::Confirmed).stock(5);
    on.lock(2, 3);
    on.is_refused("sold twice");

    // A smaller stock counts from the answer on.
    let mut on = Forge::new();
    on.stock(2);
    on.lock(1, 3);
    on.is_refused("sold twice");

    // Of two that overlap, the later fencing token was one too many.
    let mut on = Forge::new();
    for buyer in 1..=2 {
        let wanted = Forge::wanted(buyer, 3);
        let grant = on.grant(&wanted);
        let when = When { began: 100, ended: 200, from_ms: START_MS, until_ms: START_MS };
        on.auditor.note(when, Deed::Lock(wanted, Some(LockOutcome::Granted(grant))));
    }
    on.is_refused("sold twice");
}

#[test]
fn what_is_unknown_is_not_claimed() {
    // An unanswered release may have happened, an unanswered lock may not.
    let mut on = Forge::new();
    let lock = on.lock(1, 3);
    on.note(Deed::Release { lock, by: Releaser::Orders { user: None }, answer: None });
    on.note(Deed::Lock(Forge::wanted(2, 5), None));
    on.lock(3, 5);
    on.is_lawful();

    // The user left, so the lock may have ended with the grace; no earlier.
    let mut on = Forge::new();
    on.lock(1, 3);
    on.note(Deed::Leave { user: user(1), grace: GRACE }).pass(GRACE);
    on.lock(3, 5);
    on.is_lawful();
    let mut on = Forge::new();
    on.lock(1, 3);
    on.note(Deed::Leave { user: user(1), grace: GRACE }).pass(GRACE - Duration::from_millis(1));
    on.lock(3, 5);
    on.is_refused("sold twice");

    // An unanswered confirm may have won; then the lock's own deadline frees nothing, but nobody can prove it.
    let mut on = Forge::new();
    let lock = on.lock(1, 3);
    on.lost_confirm(lock).confirm(lock, None, "", ConfirmOutcome::AlreadyConfirmed);
    on.is_lawful();
}

#[test]
fn a_second_end_is_seen() {
    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.confirm(lock, None, "", ConfirmOutcome::Confirmed).confirm(lock, None, "", ConfirmOutcome::Confirmed);
    on.is_refused("a lock was confirmed twice");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    let released = ReleaseOutcome::Released(Forge::released(lock, 1, 2));
    on.release(lock, 1, released.clone()).release(lock, 1, released.clone());
    on.is_refused("a lock was released twice");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.release(lock, 1, released.clone()).confirm(lock, None, "", ConfirmOutcome::Confirmed);
    on.is_refused("confirmed after it had been given back");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.confirm(lock, None, "", ConfirmOutcome::Confirmed).release(lock, 1, released);
    on.is_refused("its owner took a sale back");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.confirm(lock, None, "", ConfirmOutcome::AlreadyConfirmed);
    on.is_refused("called confirmed though nobody confirmed it");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.release(lock, 1, ReleaseOutcome::AlreadyReleased(Forge::released(lock, 1, 2)));
    on.is_refused("a repeat of no release");
}

#[test]
fn the_deadline_is_held() {
    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.pass(TTL).confirm(lock, None, "", ConfirmOutcome::Confirmed);
    on.is_refused("confirmed after its deadline");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.pass(TTL).validate(1, 2, ValidateOutcome::Valid { lock, deadline: Instant::from_ms(START_MS + 8000) });
    on.is_refused("valid though the lock has ended");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.pass(TTL).release(lock, 1, ReleaseOutcome::Released(Forge::released(lock, 1, 2)));
    on.is_refused("released after its deadline");

    // A millisecond before, it is the owner's.
    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.pass(TTL - Duration::from_millis(1)).confirm(lock, None, "", ConfirmOutcome::Expired);
    on.is_refused("a lock is lost: called expired");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.validate(1, 2, ValidateOutcome::Valid { lock, deadline: Instant::from_ms(START_MS + 2000) });
    on.is_refused("valid for less than the window");
}

#[test]
fn a_lost_lock_is_seen() {
    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.confirm(lock, None, "", ConfirmOutcome::NotFound);
    on.is_refused("a lock is lost: not found");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.pass(TTL).note(Deed::Find(lock, None));
    on.is_refused("a lock is lost: not found");

    let mut on = Forge::new();
    on.lock(1, 2);
    on.validate(1, 2, ValidateOutcome::NotFound);
    on.is_refused("a lock is lost: not valid");

    let mut on = Forge::new();
    on.lock(1, 2);
    on.note(Deed::Holds { event: event(1), user: user(1), locks: Vec::new() });
    on.is_refused("a lock is lost: not listed");

    let mut on = Forge::new();
    on.lock(1, 2);
    on.counts(5, 0, 0, on.version + 1);
    on.is_refused("active locks are missing from the count");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.confirm(lock, None, "", ConfirmOutcome::Confirmed).counts(5, 0, 0, 7002);
    on.is_refused("sales are missing from the count");

    let mut on = Forge::new();
    on.lock(1, 2);
    on.pass(TTL).counts(5, 2, 0, 7002);
    on.is_refused("ended locks are in the count");

    let mut on = Forge::new();
    on.counts(6, 0, 0, on.version + 1);
    on.is_refused("a stock that no snapshot has");

    // Tickets that nobody holds are not given to anybody.
    let mut on = Forge::new();
    on.lock(1, 2);
    on.pass(TTL).answered(&Forge::wanted(2, 5), LockOutcome::Insufficient { available: 3 });
    on.is_refused("refused though enough is free");
    let mut on = Forge::new();
    on.answered(&Forge::wanted(2, 5), LockOutcome::SoldOut);
    on.is_refused("sold out though something is free");
    let mut on = Forge::new();
    on.answered(&Forge::wanted(2, 5), LockOutcome::StockUnknown);
    on.is_refused("a young snapshot is not known");
}

#[test]
fn strangers_are_seen() {
    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.confirm(lock, Some(2), "", ConfirmOutcome::Confirmed);
    on.is_refused("another user's lock was ended");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.release(lock, 2, ReleaseOutcome::Released(Forge::released(lock, 1, 2)));
    on.is_refused("another user's lock was ended");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.confirm(lock, Some(1), "", ConfirmOutcome::WrongUser);
    on.is_refused("its own user was refused");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.confirm(lock, None, "A", ConfirmOutcome::Confirmed).confirm(lock, None, "B", ConfirmOutcome::AlreadyConfirmed);
    on.is_refused("a second order's confirm was not refused");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.confirm(lock, None, "A", ConfirmOutcome::Confirmed).confirm(lock, None, "A", ConfirmOutcome::OtherOrder);
    on.is_refused("the order that confirmed it was refused");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.validate(2, 2, ValidateOutcome::Valid { lock, deadline: Instant::from_ms(START_MS + 5000) });
    on.is_refused("valid by another's lock");

    let mut on = Forge::new();
    let lock = on.lock(1, 2);
    on.answered(&Forge::wanted(2, 1), LockOutcome::AlreadyLocked { lock });
    on.is_refused("locked already by another's lock");
}

#[test]
fn a_repeat_that_answers_otherwise_is_seen() {
    let named = |user, n| LockRequest { request: Some("try".parse().unwrap()), ..Forge::wanted(user, n) };
    let mut on = Forge::new();
    let (first, second) = (named(1, 2), named(1, 2));
    let grant = on.grant(&first);
    on.answered(&first, LockOutcome::Granted(grant));
    let again = on.grant(&second);
    on.answered(&second, LockOutcome::Granted(again));
    on.is_refused("granted a request twice");
    on.is_refused("granted a second lock of the category");

    let mut on = Forge::new();
    let grant = on.grant(&first);
    on.answered(&first, LockOutcome::Granted(grant));
    on.answered(&second, LockOutcome::GrantedBefore(Grant { version: 1, ..grant }));
    on.is_refused("a repeat answered with another fencing token");
    on.answered(&named(2, 2), LockOutcome::GrantedBefore(grant));
    on.is_refused("a repeat answered with another request's lock");
    on.answered(&second, LockOutcome::RequestEnded { lock: grant.lock });
    on.is_refused("an active lock called ended");
    on.answered(&second, LockOutcome::RequestMismatch);
    on.is_refused("a mismatch with nothing");

    let mut on = Forge::new();
    let grant = on.grant(&first);
    on.answered(&first, LockOutcome::Granted(grant)).pass(TTL);
    on.answered(&second, LockOutcome::GrantedBefore(grant));
    on.is_refused("a repeat answered with an ended lock");
}

#[test]
fn versions_that_do_not_rise_are_seen() {
    let mut on = Forge::new();
    on.lock(1, 2);
    on.counts(5, 2, 0, on.version - 1);
    on.is_refused("the version does not rise");

    let mut on = Forge::new();
    on.lock(1, 2);
    on.version -= 1;
    on.lock(2, 2);
    on.is_refused("two grants have the fencing token");

    let mut on = Forge::new();
    let version = on.version;
    on.counts(5, 0, 0, version).counts(5, 1, 0, version);
    on.is_refused("two counts have the version");
}
