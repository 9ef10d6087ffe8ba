//! What the answers prove about a lock and about the stock at the time of another request.

use std::collections::HashMap;
use std::time::Duration;

use seatlock::domain::{
    AcceptOutcome, AskOutcome, CategoryId, ConfirmOutcome, EventId, Grant, LockId, LockOutcome, LockRequest, OrderId,
    OrderOutcome, OrderReport, OrderResult, ReleaseOutcome, Releaser, Snapshot, UserId, ValidateOutcome,
};

use super::{Deed, When};

/// How long an expired or released lock must answer for itself.
pub const TOMBSTONE_MS: u64 = 600_000;

/// One lock: the request that asked for it, and everything that may have touched it.
pub struct Life<'a> {
    pub when: When,
    pub request: &'a LockRequest,
    /// `None` when the request went unanswered.
    pub grant: Option<&'a Grant>,
    pub confirms: Vec<(When, Option<&'a OrderId>, Option<ConfirmOutcome>)>,
    pub releases: Vec<(When, Releaser, Option<&'a ReleaseOutcome>)>,
}

impl Life<'_> {
    /// What it was first of all: granted, and over before this.
    pub fn granted_before(&self, when: &When) -> bool {
        self.grant.is_some() && self.when.before(when)
    }

    /// The earliest that it may have been given back, the ledger's clock; `None` when it was not, before `when`.
    pub fn maybe_released_ms(&self, when: &When) -> Option<u64> {
        let maybe = |answer: Option<&ReleaseOutcome>| matches!(answer, None | Some(ReleaseOutcome::Released(_)));
        let asked = self.releases.iter().filter(|(at, _, answer)| maybe(*answer) && at.maybe_before(when));
        asked.map(|(at, ..)| at.from_ms).min()
    }

    pub fn released(&self, when: &When) -> bool {
        let proof = |answer: Option<&ReleaseOutcome>| {
            matches!(answer, Some(ReleaseOutcome::Released(_) | ReleaseOutcome::AlreadyReleased(_)))
        };
        self.releases.iter().any(|(at, _, answer)| proof(*answer) && at.before(when))
    }

    pub fn confirmed(&self, when: &When) -> bool {
        let proof = |answer| matches!(answer, Some(ConfirmOutcome::Confirmed | ConfirmOutcome::AlreadyConfirmed));
        self.confirms.iter().any(|(at, _, answer)| proof(*answer) && at.before(when))
    }
}

type By<K, V> = HashMap<K, Vec<V>>;

/// A validate, the window that it asked for, and its answer.
type Validated = (When, Duration, Option<ValidateOutcome>);

/// An order's report and its answer.
type Reported<'a> = (When, &'a OrderReport, Option<OrderOutcome>);

/// A request under a name, and whether it is known to have been granted.
type Named<'a> = (When, &'a LockRequest, bool);

pub struct Facts<'a> {
    settle_ms: u64,
    pub lives: HashMap<LockId, Life<'a>>,
    pub of_category: HashMap<(EventId, CategoryId), Vec<LockId>>,
    pub of_holder: HashMap<(EventId, UserId), Vec<LockId>>,
    pub of_request: By<(EventId, UserId, String), Named<'a>>,
    validates: By<(EventId, UserId, CategoryId), Validated>,
    leaves: HashMap<UserId, Vec<(When, Duration)>>,
    reports: By<EventId, Reported<'a>>,
    asks: HashMap<EventId, Vec<(When, Option<AskOutcome>)>>,
    accepts: HashMap<EventId, Vec<(When, u64, &'a Snapshot, bool)>>,
}

pub fn ms(interval: Duration) -> u64 {
    u64::try_from(interval.as_millis()).expect("short")
}

impl<'a> Facts<'a> {
    pub fn of(deeds: &'a [(When, Deed)], settle: Duration) -> Self {
        let mut facts = Self {
            settle_ms: ms(settle),
            lives: HashMap::new(),
            of_category: HashMap::new(),
            of_holder: HashMap::new(),
            of_request: HashMap::new(),
            validates: HashMap::new(),
            leaves: HashMap::new(),
            reports: HashMap::new(),
            asks: HashMap::new(),
            accepts: HashMap::new(),
        };
        for (when, deed) in deeds {
            facts.learn(*when, deed);
        }
        // What touched a lock is told in any order, so the locks come first.
        for (when, deed) in deeds {
            if let Deed::Confirm { lock, order, answer, .. } = deed
                && let Some(life) = facts.lives.get_mut(lock)
            {
                life.confirms.push((*when, order.as_ref(), *answer));
            }
            if let Deed::Release { lock, by, answer } = deed
                && let Some(life) = facts.lives.get_mut(lock)
            {
                life.releases.push((*when, *by, answer.as_ref()));
            }
        }
        facts
    }

    fn learn(&mut self, when: When, deed: &'a Deed) {
        match deed {
            Deed::Lock(request, answer) => self.learn_lock(when, request, answer.as_ref()),
            Deed::Validate(request, answer) => {
                let of = (request.event, request.user, request.category);
                self.validates.entry(of).or_default().push((when, request.window, *answer));
            }
            Deed::Leave { user, grace } => self.leaves.entry(*user).or_default().push((when, *grace)),
            Deed::Ask { event, answer } => self.asks.entry(*event).or_default().push((when, *answer)),
            Deed::Accept { event, number, snapshot, answer } => {
                if *answer != Some(AcceptOutcome::Older) {
                    let known = *answer == Some(AcceptOutcome::Accepted);
                    self.accepts.entry(*event).or_default().push((when, number.0, snapshot, known));
                }
            }
            Deed::Order(report, answer) => {
                self.reports.entry(report.event).or_default().push((when, report, *answer));
            }
            Deed::Confirm { .. }
            | Deed::Release { .. }
            | Deed::Availability(..)
            | Deed::Find(..)
            | Deed::Holds { .. } => {}
        }
    }

    fn learn_lock(&mut self, when: When, request: &'a LockRequest, answer: Option<&'a LockOutcome>) {
        let grant = match answer {
            Some(LockOutcome::Granted(grant)) => Some(grant),
            None => None,
            Some(_) => return,
        };
        let event = request.event();
        if let Some(name) = &request.request {
            let of = (event, request.user, name.to_string());
            self.of_request.entry(of).or_default().push((when, request, grant.is_some()));
        }
        self.of_category.entry((event, request.category)).or_default().push(request.lock);
        self.of_holder.entry((event, request.user)).or_default().push(request.lock);
        let life = Life { when, request, grant, confirms: Vec::new(), releases: Vec::new() };
        self.lives.insert(request.lock, life);
    }

    /// The lock's deadline is at least this, for whoever asks at `when`.
    pub fn deadline_min(&self, life: &Life, when: &When) -> u64 {
        let validated = self.validated(life);
        let pinned = validated.filter_map(|(at, _, answer)| match answer {
            Some(ValidateOutcome::Valid { lock, deadline }) if at.before(when) && *lock == life.request.lock => {
                Some(deadline.as_ms())
            }
            _ => None,
        });
        if let Some(pinned) = pinned.max() {
            return pinned;
        }
        let granted = life.grant.map_or(0, |grant| grant.deadline.as_ms());
        let left = (self.leaves.get(&life.request.user).into_iter().flatten())
            .filter(|(at, _)| at.maybe_before(when) && life.when.maybe_before(at))
            .map(|(at, grace)| at.from_ms + ms(*grace));
        left.fold(granted, u64::min)
    }

    /// The lock's deadline is at most this, for whoever asks at `when`.
    pub fn deadline_max(&self, life: &Life, when: &When) -> u64 {
        let asked = life.when.until_ms.saturating_add(ms(life.request.ttl));
        let granted = life.grant.map_or(asked, |grant| grant.deadline.as_ms());
        let moved = self.validated(life).filter(|(at, ..)| at.began != when.began && at.maybe_before(when));
        let moved = moved.filter_map(|(at, window, answer)| match answer {
            // Without an answer it may have moved the deadline as far as it can.
            None => Some(at.until_ms.saturating_add(ms(*window))),
            Some(ValidateOutcome::Valid { lock, deadline }) if *lock == life.request.lock => Some(deadline.as_ms()),
            Some(_) => None,
        });
        moved.fold(granted, u64::max)
    }

    fn validated(&self, life: &Life) -> impl Iterator<Item = &Validated> {
        let of = (life.request.event(), life.request.user, life.request.category);
        self.validates.get(&of).into_iter().flatten()
    }

    /// What may have confirmed it before `when`: a confirm, or an order's report. The earliest.
    pub fn maybe_confirmed(&self, life: &Life, when: &When) -> Option<When> {
        let maybe =
            |answer| matches!(answer, None | Some(ConfirmOutcome::Confirmed | ConfirmOutcome::AlreadyConfirmed));
        let asked = life.confirms.iter().filter(|(_, _, answer)| maybe(*answer)).map(|(at, ..)| *at);
        let completed = self.reports_about(life).filter(|(_, report, _)| report.result == OrderResult::Completed);
        let all = asked.chain(completed.map(|(at, ..)| *at));
        all.filter(|at| at.maybe_before(when)).min_by_key(|at| at.began)
    }

    /// A completed order of the holder was reported, or may have been, before `when`.
    pub fn maybe_reported(&self, life: &Life, when: &When) -> bool {
        let mut reports = self.reports_about(life);
        reports.any(|(at, report, _)| report.result == OrderResult::Completed && at.maybe_before(when))
    }

    fn reports_about(&self, life: &Life) -> impl Iterator<Item = &Reported<'a>> {
        let (user, category) = (life.request.user, life.request.category);
        let all = self.reports.get(&life.request.event()).into_iter().flatten();
        all.filter(move |(_, report, _)| (report.user, report.category) == (user, category))
    }

    /// The stock may show its sale: a snapshot asked for after its order was reported or given up may be stored.
    fn maybe_settled(&self, life: &Life, when: &When) -> bool {
        let Some(confirm) = self.maybe_confirmed(life, when) else { return false };
        let event = life.request.event();
        let accepted = self.accepts.get(&event).into_iter().flatten().filter(|(at, ..)| at.maybe_before(when));
        let mut numbers = accepted.map(|(_, number, ..)| *number);
        let asks = self.asks.get(&event);
        numbers.any(|number| {
            let drew = |answer: &Option<AskOutcome>| matches!(answer, Some(AskOutcome::Ask(n)) if n.0 == number);
            let Some((asked, _)) = asks.into_iter().flatten().find(|(_, answer)| drew(answer)) else { return true };
            confirm.maybe_before(asked)
                && (asked.until_ms >= confirm.from_ms + self.settle_ms
                    || self.reports_about(life).any(|(at, ..)| at.maybe_before(asked)))
        })
    }

    /// Active, whatever the unanswered did: nobody else can have its tickets at `when`.
    pub fn active(&self, life: &Life, when: &When) -> bool {
        life.granted_before(when)
            && when.until_ms < self.deadline_min(life, when)
            && life.maybe_released_ms(when).is_none()
            && self.maybe_confirmed(life, when).is_none()
    }

    /// Active or settling, whatever the unanswered did, for a grant made later at `at_ms`.
    pub fn counts(&self, life: &Life, when: &When, at_ms: u64) -> bool {
        life.maybe_released_ms(when).is_none()
            && (at_ms < self.deadline_min(life, when) || life.confirmed(when))
            && !self.maybe_settled(life, when)
    }

    /// Counted against its owner's limit, whatever the unanswered did: as [`Facts::counts`], and no order that may have
    /// been the lock's was given up.
    pub fn charged(&self, life: &Life, when: &When, at_ms: u64) -> bool {
        let undone = |(at, report, _): &Reported| report.result == OrderResult::Cancelled && at.maybe_before(when);
        let sold = self.maybe_confirmed(life, when).is_some();
        self.counts(life, when, at_ms) && !(sold && self.reports_about(life).any(undone))
    }

    /// Confirmed and not yet shown by any snapshot.
    pub fn settling(&self, life: &Life, when: &When) -> bool {
        life.confirmed(when) && life.maybe_released_ms(when).is_none() && !self.maybe_settled(life, when)
    }

    /// Not active any more, whatever the unanswered did.
    pub fn ended(&self, life: &Life, when: &When) -> bool {
        life.released(when) || life.confirmed(when) || when.from_ms >= self.deadline_max(life, when)
    }

    /// The most that may be taken of a category at `when`: every lock not surely gone, every order without one.
    pub fn taken_max(&self, event: EventId, category: CategoryId, when: &When) -> u64 {
        let lives = self.of_category.get(&(event, category)).into_iter().flatten().map(|lock| &self.lives[lock]);
        let locks = lives.filter(|life| life.when.maybe_before(when)).filter(|life| {
            let late = when.from_ms >= self.deadline_max(life, when);
            !(life.released(when) || late && self.maybe_confirmed(life, when).is_none())
        });
        let reports = self.reports.get(&event).into_iter().flatten();
        let orders = reports.filter(|(at, report, _)| {
            report.category == category && report.result == OrderResult::Completed && at.maybe_before(when)
        });
        let locked: u64 = locks.map(|life| life.request.quantity.wide()).sum();
        locked + orders.map(|(_, report, _)| report.quantity.wide()).sum::<u64>()
    }

    /// The snapshots that may be in force at `when`, with the latest time at which each may have been stored.
    pub fn snapshots(&self, event: EventId, when: &When) -> Vec<(u64, &Snapshot)> {
        let all = || self.accepts.get(&event).into_iter().flatten();
        let surely = all().filter(|(at, _, _, known)| *known && at.before(when)).map(|(_, number, ..)| *number).max();
        all()
            .filter(|(at, number, ..)| at.maybe_before(when) && *number >= surely.unwrap_or(0))
            .map(|(at, _, snapshot, _)| (at.until_ms, *snapshot))
            .collect()
    }

    /// A snapshot stored surely before `when`: the earliest time at which the latest of them was stored.
    pub fn stored_ms(&self, event: EventId, when: &When) -> Option<u64> {
        let all = self.accepts.get(&event).into_iter().flatten();
        all.filter(|(at, _, _, known)| *known && at.before(when)).map(|(at, ..)| at.from_ms).max()
    }
}
