//! The model: everything the ledger knows about one event, and every transition of it.
//!
//! The book is the embedded ledger and the oracle that the Lua scripts are compared with. It favours the obvious over
//! the fast: each transition first ends what is due, then decides, then changes counts, then announces. It holds the
//! law of conservation: `available = stock - active - settling`, never below zero, and a grant never makes
//! `active + settling` exceed `stock`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use super::notice::{Announcement, Change, ChangeKind, Notice};
use super::{
    AcceptOutcome, AskOutcome, Availability, CategoryId, ConfirmOutcome, EventId, Grant, Instant, Kept, Lock, LockId,
    LockOutcome, LockRequest, LockStatus, OrderId, OrderOutcome, OrderReport, OrderResult, Personal, Quantity,
    RateLimit, ReleaseOutcome, ReleaseReason, Releaser, RequestId, RestoreOutcome, RestoreRequest, SessionId, Snapshot,
    SnapshotNumber, UserId, ValidateOutcome, ValidateRequest,
};

/// How long an expired or released lock, and a used request id after its lock, answer for themselves.
pub const TOMBSTONE: Duration = Duration::from_mins(10);

/// How long a confirmed lock and a reported order answer for themselves.
pub const CONFIRMED_TOMBSTONE: Duration = Duration::from_hours(24);

/// A reading of the ledger's clock in microseconds since 1970-01-01 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Now(pub u64);

impl Now {
    /// The same reading, in the milliseconds that deadlines are kept in.
    #[must_use]
    pub const fn instant(self) -> Instant {
        Instant::from_ms(self.0 / 1000)
    }

    fn after(self, interval: Duration) -> Instant {
        Instant::from_ms(self.instant().as_ms().saturating_add(whole_ms(interval)))
    }
}

/// Whole milliseconds of an interval, as scripts receive it.
#[must_use]
pub fn whole_ms(interval: Duration) -> u64 {
    u64::try_from(interval.as_millis()).unwrap_or(u64::MAX / 4)
}

/// One category's counts.
#[derive(Debug, Clone, Copy, Default)]
struct Row {
    total: u64,
    stock: u64,
    open: bool,
    active: u64,
    settling: u64,
    version: u64,
}

/// How an active lock is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    /// Its owner is, or may be, connected.
    Attended,
    /// Its owner has gone: the deadline was moved to the end of the grace.
    Abandoned,
    /// An order is in progress: no disconnect moves the deadline.
    Pinned,
}

/// Where a lock is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Active(Hold),
    Confirmed(Settlement),
    Released { by_owner: bool },
    Expired,
}

/// Where a confirmed lock's tickets are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Settlement {
    /// In `settling`, the order not reported yet, until this instant.
    Waiting(Instant),
    /// In `settling`, sold as of this mark: the first snapshot with a higher number shows it.
    Marked(u64),
    /// In no count of ours: the stock shows it.
    Done,
}

#[derive(Debug, Clone)]
struct Record {
    user: UserId,
    category: CategoryId,
    quantity: Quantity,
    created_at: Instant,
    deadline: Instant,
    /// The deadline it has while its owner is connected, until it is pinned.
    full_deadline: Instant,
    /// The owner's presence generation that this lock has seen.
    generation: u64,
    version: u64,
    session: Option<SessionId>,
    /// The order that confirmed it, where it was said.
    order: Option<OrderId>,
    state: State,
    /// Set when the lock ends: from then on it may be forgotten.
    forget_at: Option<Instant>,
}

/// What is remembered of a reported order.
#[derive(Debug, Clone, Copy)]
struct OrderRecord {
    result: OrderResult,
    category: CategoryId,
    user: UserId,
    /// Counted against the user's limit through the locks it was matched with.
    matched: u64,
    /// In `settling` under the order's own name, because no lock was found for it.
    unmatched: u64,
    forget_at: Instant,
}

/// Tickets of a reported order that no lock covers; counted in `settling` until a snapshot shows them.
#[derive(Debug, Clone, Copy)]
struct Loose {
    category: CategoryId,
    quantity: u64,
    mark: u64,
}

#[derive(Debug, Clone, Copy)]
struct RequestRecord {
    lock: LockId,
    category: CategoryId,
    quantity: Quantity,
    forget_at: Instant,
}

/// What a sweep of the book did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BookSweep {
    /// Locks ended because their deadline had passed.
    pub expired: u64,
    /// Something waits for a snapshot: ask the events-service.
    pub refresh: bool,
    /// When something is due next.
    pub next: Option<Instant>,
}

/// Counts of one event for the fleet's statistics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BookStats {
    /// Active locks.
    pub active: u64,
    /// Ended by deadline or grace, ever.
    pub expired: u64,
    /// Confirmed and not undone, ever.
    pub confirmed: u64,
    /// Given back, ever.
    pub released: u64,
    /// Users with an active lock.
    pub users: u64,
    /// Categories with an active lock.
    pub categories: u64,
}

/// Everything the ledger knows about one event.
#[derive(Debug)]
pub struct Book {
    event: EventId,
    rows: BTreeMap<CategoryId, Row>,
    /// The categories of the last snapshot and when it was stored.
    snapshot: Option<(SnapshotNumber, Instant)>,
    /// The last number drawn.
    counter: u64,
    locks: HashMap<LockId, Record>,
    /// The user's latest unended-by-a-caller lock of each category; what makes `expired` different from `not found`.
    holders: HashMap<(UserId, CategoryId), LockId>,
    deadlines: BTreeSet<(Instant, LockId)>,
    /// Tickets held and confirmed, per user: what the per-event limit counts.
    held: HashMap<UserId, u64>,
    /// Confirmed locks whose order is not reported, oldest first.
    waiting: Vec<LockId>,
    loose: BTreeMap<OrderId, Loose>,
    orders: HashMap<OrderId, OrderRecord>,
    requests: HashMap<(UserId, RequestId), RequestRecord>,
    /// Theoretical arrival times of the rate limit, microseconds.
    rates: HashMap<UserId, u64>,
    /// Locks whose deadline is at or before this have been warned about.
    warned_until: Instant,
    ended: BookStats,
    settle_timeout: Duration,
    expiry_warning: Duration,
}

impl Book {
    /// An empty book.
    #[must_use]
    pub fn new(event: EventId, settle_timeout: Duration, expiry_warning: Duration) -> Self {
        Self {
            event,
            rows: BTreeMap::new(),
            snapshot: None,
            counter: 0,
            locks: HashMap::new(),
            holders: HashMap::new(),
            deadlines: BTreeSet::new(),
            held: HashMap::new(),
            waiting: Vec::new(),
            loose: BTreeMap::new(),
            orders: HashMap::new(),
            requests: HashMap::new(),
            rates: HashMap::new(),
            warned_until: Instant::from_ms(0),
            ended: BookStats::default(),
            settle_timeout,
            expiry_warning,
        }
    }

    /// Grants a lock, or says why not.
    pub fn lock(&mut self, now: Now, request: &LockRequest, out: &mut Vec<Announcement>) -> LockOutcome {
        self.expire_due(now, out);
        if let Some(answer) = self.repeated(now, request) {
            return answer;
        }
        if !self.stock_is_known(now, request.stock_age_max) {
            return LockOutcome::StockUnknown;
        }
        if let Some(rate) = request.rate
            && let Err(retry_after) = self.admit(now, request.user, rate)
        {
            return LockOutcome::RateLimited { retry_after };
        }
        let Some(&row) = self.rows.get(&request.category) else {
            return LockOutcome::CategoryNotFound;
        };
        if !row.open {
            return LockOutcome::Closed;
        }
        if let Some(lock) = self.active_lock(now, request.user, request.category) {
            return LockOutcome::AlreadyLocked { lock };
        }
        let held = self.held.get(&request.user).copied().unwrap_or(0);
        if let Some(max) = request.per_event_max
            && held + request.quantity.wide() > u64::from(max)
        {
            return LockOutcome::LimitExceeded { held };
        }
        let available = row.stock.saturating_sub(row.active + row.settling);
        if available < request.quantity.wide() {
            return if available == 0 && row.active + row.settling == 0 {
                LockOutcome::SoldOut
            } else {
                LockOutcome::Insufficient { available }
            };
        }
        LockOutcome::Granted(self.grant(now, request, out))
    }

    fn grant(&mut self, now: Now, request: &LockRequest, out: &mut Vec<Announcement>) -> Grant {
        let (id, user, category, quantity) = (request.lock, request.user, request.category, request.quantity);
        let deadline = now.after(request.ttl);
        let version = self.change(now, category, out, &[(ChangeKind::Locked, quantity, user)], |row| {
            row.active += quantity.wide();
        });
        self.locks.insert(
            id,
            Record {
                user,
                category,
                quantity,
                created_at: now.instant(),
                deadline,
                full_deadline: deadline,
                generation: request.generation,
                version,
                session: request.session,
                order: None,
                state: State::Active(Hold::Attended),
                forget_at: None,
            },
        );
        self.holders.insert((user, category), id);
        self.deadlines.insert((deadline, id));
        *self.held.entry(user).or_default() += quantity.wide();
        if let Some(name) = &request.request {
            let forget_at = now.after(request.ttl + TOMBSTONE);
            self.requests.insert((user, name.clone()), RequestRecord { lock: id, category, quantity, forget_at });
        }
        Grant { lock: id, deadline, available: self.available(category), version, now: now.instant() }
    }

    /// Writes down again a lock that a replica remembers, if there is nothing of it here and its tickets are free.
    pub fn restore(&mut self, now: Now, asked: &RestoreRequest, out: &mut Vec<Announcement>) -> RestoreOutcome {
        self.expire_due(now, out);
        let memento = &asked.memento;
        if self.locks.contains_key(&memento.lock) {
            return RestoreOutcome::Known;
        }
        let (id, user, category, quantity) = (memento.lock, asked.user, memento.category, memento.quantity);
        let (state, order) = match &memento.kept {
            Kept::Attended => (State::Active(Hold::Attended), None),
            Kept::Pinned => (State::Active(Hold::Pinned), None),
            Kept::Confirmed { order } => {
                (State::Confirmed(Settlement::Waiting(now.after(self.settle_timeout))), order.as_ref())
            }
        };
        let active = matches!(state, State::Active(_));
        if active && memento.deadline <= now.instant() {
            return RestoreOutcome::Expired;
        }
        if !self.stock_is_known(now, asked.stock_age_max) {
            return RestoreOutcome::StockUnknown;
        }
        // A closed category lets no new lock in, but keeps those that it had.
        let Some(row) = self.rows.get(&category) else { return RestoreOutcome::NoRoom };
        if row.stock.saturating_sub(row.active + row.settling) < quantity.wide() {
            return RestoreOutcome::NoRoom;
        }
        if active && self.active_lock(now, user, category).is_some() {
            return RestoreOutcome::NoRoom;
        }
        let version = self.change(now, category, out, &[], |row| {
            *(if active { &mut row.active } else { &mut row.settling }) += quantity.wide();
        });
        let record = Record {
            user,
            category,
            quantity,
            created_at: memento.created_at,
            deadline: memento.deadline,
            full_deadline: memento.deadline,
            generation: asked.generation,
            version,
            session: memento.session,
            order: order.cloned(),
            state,
            forget_at: (!active).then(|| now.after(CONFIRMED_TOMBSTONE)),
        };
        self.locks.insert(id, record);
        *self.held.entry(user).or_default() += quantity.wide();
        if active {
            self.holders.insert((user, category), id);
            self.deadlines.insert((memento.deadline, id));
            if let Some(name) = &memento.request {
                let forget_at = Instant::from_ms(memento.deadline.as_ms().saturating_add(whole_ms(TOMBSTONE)));
                self.requests.insert((user, name.clone()), RequestRecord { lock: id, category, quantity, forget_at });
            }
        } else {
            self.waiting.push(id);
            self.ended.confirmed += 1;
            if let Some(order) = order
                && let Some(record) = self.orders.get(order).copied()
                && (record.category, record.user) == (category, user)
            {
                self.match_order(now, order, user, category, None, record, out);
            }
        }
        RestoreOutcome::Restored
    }

    /// The answer to a request id seen before, if it was.
    fn repeated(&self, now: Now, request: &LockRequest) -> Option<LockOutcome> {
        let name = request.request.clone()?;
        let seen = self.requests.get(&(request.user, name)).filter(|seen| seen.forget_at > now.instant())?;
        if (seen.category, seen.quantity) != (request.category, request.quantity) {
            return Some(LockOutcome::RequestMismatch);
        }
        let record = self.locks.get(&seen.lock);
        Some(match record {
            Some(record) if matches!(record.state, State::Active(_)) => LockOutcome::GrantedBefore(Grant {
                lock: seen.lock,
                deadline: record.deadline,
                available: self.available(record.category),
                version: record.version,
                now: now.instant(),
            }),
            _ => LockOutcome::RequestEnded { lock: seen.lock },
        })
    }

    /// One more try of the user under GCRA; refused, how long to wait.
    fn admit(&mut self, now: Now, user: UserId, rate: RateLimit) -> Result<(), Duration> {
        let interval = u64::try_from(rate.interval.as_micros()).unwrap_or(u64::MAX / 4);
        let arrival = self.rates.get(&user).copied().unwrap_or(0).max(now.0) + interval;
        let tolerated = now.0 + interval * u64::from(rate.burst);
        if arrival > tolerated {
            return Err(Duration::from_micros(arrival - tolerated));
        }
        self.rates.insert(user, arrival);
        Ok(())
    }

    /// Pins the user's lock for an order.
    pub fn validate(&mut self, now: Now, request: &ValidateRequest, out: &mut Vec<Announcement>) -> ValidateOutcome {
        self.expire_due(now, out);
        let Some(&id) = self.holders.get(&(request.user, request.category)) else {
            return ValidateOutcome::NotFound;
        };
        let Some(record) = self.locks.get_mut(&id) else {
            return ValidateOutcome::NotFound;
        };
        if !matches!(record.state, State::Active(_)) {
            return ValidateOutcome::Expired;
        }
        if record.quantity < request.quantity {
            return ValidateOutcome::NotFound;
        }
        let deadline = record.deadline.max(now.after(request.window));
        self.deadlines.remove(&(record.deadline, id));
        self.deadlines.insert((deadline, id));
        record.deadline = deadline;
        record.state = State::Active(Hold::Pinned);
        out.push(Announcement::User(request.user, Personal::Pinned { lock: id, deadline }));
        ValidateOutcome::Valid { lock: id, deadline }
    }

    /// Turns an active lock into a sale.
    pub fn confirm(
        &mut self,
        now: Now,
        id: LockId,
        user: Option<UserId>,
        order: Option<&OrderId>,
        out: &mut Vec<Announcement>,
    ) -> ConfirmOutcome {
        self.expire_due(now, out);
        let Some(record) = self.locks.get_mut(&id) else {
            return ConfirmOutcome::NotFound;
        };
        if user.is_some_and(|user| user != record.user) {
            return ConfirmOutcome::WrongUser;
        }
        let until = now.after(self.settle_timeout);
        match &mut record.state {
            State::Active(_) => {}
            State::Confirmed(_) if matches!((&record.order, order), (Some(known), Some(order)) if known != order) => {
                return ConfirmOutcome::OtherOrder;
            }
            // Whoever asks again is still at work on the order.
            State::Confirmed(Settlement::Waiting(end)) => {
                *end = until;
                return ConfirmOutcome::AlreadyConfirmed;
            }
            State::Confirmed(_) => return ConfirmOutcome::AlreadyConfirmed,
            State::Released { .. } => return ConfirmOutcome::Released,
            State::Expired => return ConfirmOutcome::Expired,
        }
        record.state = State::Confirmed(Settlement::Waiting(until));
        record.order = order.cloned();
        record.forget_at = Some(now.after(CONFIRMED_TOMBSTONE));
        let (user, category, quantity) = (record.user, record.category, record.quantity.wide());
        self.deadlines.remove(&(record.deadline, id));
        self.holders.remove(&(user, category));
        self.waiting.push(id);
        self.ended.confirmed += 1;
        self.change(now, category, out, &[], |row| {
            row.active -= quantity;
            row.settling += quantity;
        });
        out.push(Announcement::User(user, Personal::Confirmed { lock: id, order: order.cloned() }));
        // The order was reported before its lock was confirmed: now there is a lock to match it with.
        if let Some(order) = order
            && let Some(record) = self.orders.get(order).copied()
            && (record.category, record.user) == (category, user)
        {
            self.match_order(now, order, user, category, None, record, out);
        }
        ConfirmOutcome::Confirmed
    }

    /// Ends a lock before its deadline.
    pub fn release(&mut self, now: Now, id: LockId, by: Releaser, out: &mut Vec<Announcement>) -> ReleaseOutcome {
        self.expire_due(now, out);
        let Some(record) = self.locks.get_mut(&id) else {
            return ReleaseOutcome::NotFound;
        };
        let (said, session, by_owner) = match by {
            Releaser::Owner { user, session } => (Some(user), session, true),
            Releaser::Orders { user } => (user, None, false),
        };
        if said.is_some_and(|user| user != record.user) {
            return ReleaseOutcome::WrongUser;
        }
        let (user, category, quantity) = (record.user, record.category, record.quantity);
        let was_active = match &record.state {
            State::Active(_) => true,
            State::Confirmed(Settlement::Waiting(_)) if !by_owner => false,
            State::Confirmed(_) => return ReleaseOutcome::Confirmed,
            State::Released { by_owner: before } if *before == by_owner => {
                return ReleaseOutcome::AlreadyReleased(Self::view(id, record));
            }
            State::Released { .. } => return ReleaseOutcome::ReleasedByOther,
            State::Expired => return ReleaseOutcome::Expired,
        };
        record.state = State::Released { by_owner };
        record.forget_at = Some(now.after(TOMBSTONE));
        let answer = ReleaseOutcome::Released(Self::view(id, record));
        if was_active {
            self.deadlines.remove(&(record.deadline, id));
            self.holders.remove(&(user, category));
        } else {
            self.waiting.retain(|waiting| *waiting != id);
            self.ended.confirmed -= 1;
        }
        self.ended.released += 1;
        self.unhold(user, quantity.wide());
        let reason = ReleaseReason::Released;
        self.change(now, category, out, &[(ChangeKind::Back(reason), quantity, user)], |row| {
            if was_active {
                row.active -= quantity.wide();
            } else {
                row.settling -= quantity.wide();
            }
        });
        out.push(Announcement::User(user, Personal::Released { lock: id, category, quantity, reason, by: session }));
        answer
    }

    /// One lock as it stands.
    #[must_use]
    pub fn find(&self, now: Now, id: LockId) -> Option<Lock> {
        let record = self.locks.get(&id)?;
        let mut lock = Lock { version: Some(record.version), pinned: false, ..Self::view(id, record) };
        if lock.status == LockStatus::Active && lock.deadline <= now.instant() {
            lock.status = LockStatus::Expired;
        }
        Some(lock)
    }

    /// The user's active locks, by category.
    #[must_use]
    pub fn locks_of(&self, now: Now, user: UserId) -> Vec<Lock> {
        let of_user = |category| self.active_lock(now, user, category);
        self.rows.keys().filter_map(|&category| of_user(category)).map(|id| Self::view(id, &self.locks[&id])).collect()
    }

    /// The counts of every category, or `None` when no young enough snapshot is known.
    pub fn availability(
        &mut self,
        now: Now,
        age_max: Duration,
        out: &mut Vec<Announcement>,
    ) -> Option<Vec<Availability>> {
        self.expire_due(now, out);
        self.stock_is_known(now, age_max)
            .then(|| self.rows.iter().map(|(&category, row)| self.reading(now, category, *row)).collect())
    }

    /// Draws a number for a question to the events-service. Confirmed locks whose order was never reported are marked
    /// first, so that the answer takes them out of `settling`.
    pub fn ask(&mut self, now: Now, age_min: Duration) -> AskOutcome {
        let overdue: Vec<LockId> = (self.waiting.iter().copied())
            .filter(|id| matches!(self.settlement(*id), Some(Settlement::Waiting(until)) if until <= now.instant()))
            .collect();
        for id in overdue {
            self.mark(now, id);
        }
        if self.stock_is_known(now, age_min) && !age_min.is_zero() && !self.has_marks() {
            return AskOutcome::Fresh;
        }
        AskOutcome::Ask(SnapshotNumber(self.draw(now)))
    }

    /// Stores a snapshot unless a later one is stored, and in the same step takes out of `settling` what it shows.
    pub fn accept(
        &mut self,
        now: Now,
        number: SnapshotNumber,
        snapshot: &Snapshot,
        out: &mut Vec<Announcement>,
    ) -> AcceptOutcome {
        if self.snapshot.is_some_and(|(stored, _)| number <= stored) {
            return AcceptOutcome::Older;
        }
        let mut settled: BTreeMap<CategoryId, u64> = BTreeMap::new();
        for record in self.locks.values_mut() {
            if let State::Confirmed(settlement) = &mut record.state
                && matches!(settlement, Settlement::Marked(mark) if *mark < number.0)
            {
                *settlement = Settlement::Done;
                *settled.entry(record.category).or_default() += record.quantity.wide();
            }
        }
        self.loose.retain(|_, loose| {
            let shown = loose.mark < number.0;
            if shown {
                *settled.entry(loose.category).or_default() += loose.quantity;
            }
            !shown
        });
        let told: BTreeMap<CategoryId, _> = snapshot.categories.iter().map(|told| (told.category, *told)).collect();
        let categories: BTreeSet<CategoryId> = self.rows.keys().chain(told.keys()).copied().collect();
        for category in categories {
            let known = self.rows.contains_key(&category);
            let before = self.rows.entry(category).or_default();
            let mut after = *before;
            after.settling -= settled.get(&category).copied().unwrap_or(0);
            // A category that the events-service no longer names is closed and has nothing to sell.
            (after.total, after.stock, after.open) =
                told.get(&category).map_or((0, 0, false), |told| (told.total, told.stock, told.open && snapshot.open));
            let same = (after.total, after.stock, after.open, after.settling)
                == (before.total, before.stock, before.open, before.settling);
            if !known || !same {
                self.change(now, category, out, &[], |row| *row = Row { version: row.version, ..after });
            }
        }
        self.snapshot = Some((number, now.instant()));
        AcceptOutcome::Accepted
    }

    /// Counts a completed or cancelled order.
    pub fn order(&mut self, now: Now, report: &OrderReport, out: &mut Vec<Announcement>) -> OrderOutcome {
        self.expire_due(now, out);
        self.claim(now, report, out);
        let known = self.orders.get(&report.order).copied().filter(|known| known.forget_at > now.instant());
        let (category, user) = (report.category, report.user);
        match (known, report.result) {
            (Some(known), _) if (known.category, known.user) != (category, user) => OrderOutcome::Repeated,
            (Some(known), OrderResult::Completed) => {
                if known.result == OrderResult::Cancelled {
                    self.mark_candidates(now, report, false);
                    return OrderOutcome::AfterCancel;
                }
                self.match_order(now, &report.order, report.user, report.category, report.lock, known, out);
                OrderOutcome::Repeated
            }
            (Some(OrderRecord { result: OrderResult::Cancelled, .. }), OrderResult::Cancelled) => {
                OrderOutcome::Repeated
            }
            (None, OrderResult::Completed) => {
                let matched = self.mark_candidates(now, report, true);
                let unmatched = report.quantity.wide().saturating_sub(matched);
                let forget_at = now.after(CONFIRMED_TOMBSTONE);
                let record =
                    OrderRecord { result: OrderResult::Completed, category, user, matched, unmatched, forget_at };
                self.orders.insert(report.order.clone(), record);
                if unmatched > 0 && self.rows.contains_key(&report.category) {
                    let loose = Loose { category: report.category, quantity: unmatched, mark: self.draw(now) };
                    self.loose.insert(report.order.clone(), loose);
                    self.change(now, report.category, out, &[], |row| row.settling += unmatched);
                }
                OrderOutcome::Noted
            }
            (known, OrderResult::Cancelled) => {
                let matched = if known.is_some() { 0 } else { self.mark_candidates(now, report, true) };
                let undone = matched + known.map_or(0, |known| known.matched);
                let sold = known.is_some();
                self.unhold(report.user, undone);
                let forget_at = now.after(CONFIRMED_TOMBSTONE);
                let record =
                    OrderRecord { result: OrderResult::Cancelled, category, user, matched: 0, unmatched: 0, forget_at };
                self.orders.insert(report.order.clone(), record);
                if (sold || matched > 0) && self.rows.contains_key(&report.category) {
                    let change = (ChangeKind::Back(ReleaseReason::Cancelled), report.quantity, report.user);
                    self.change(now, report.category, out, &[change], |_| {});
                }
                OrderOutcome::Noted
            }
        }
    }

    /// A completed order proves the sale of a lock whose confirm is late or lost: the lock it names, or else, when no
    /// confirmed lock fits, the user's pinned one.
    fn claim(&mut self, now: Now, report: &OrderReport, out: &mut Vec<Announcement>) {
        if report.result != OrderResult::Completed || self.orders.contains_key(&report.order) {
            return;
        }
        let Some(id) = self.active_lock(now, report.user, report.category) else {
            return;
        };
        let named = report.lock == Some(id);
        let pinned = self.locks.get(&id).is_some_and(|record| record.state == State::Active(Hold::Pinned));
        let none_confirmed = report.lock.is_none() && self.candidates(report, true).is_empty();
        if named || (pinned && none_confirmed) {
            self.confirm(now, id, Some(report.user), Some(&report.order), out);
        }
    }

    /// Confirmed locks whose order is not reported and that this report may be about, best first: the named lock; else
    /// those confirmed for this very order; else, on the first report, the oldest of exactly this quantity; else the
    /// oldest ones until the quantity is covered.
    fn candidates(&self, report: &OrderReport, first: bool) -> Vec<LockId> {
        let of_buyer: Vec<(LockId, &Record)> = (self.waiting.iter())
            .filter_map(|id| Some((*id, self.locks.get(id)?)))
            .filter(|(_, record)| (record.user, record.category) == (report.user, report.category))
            .collect();
        if let Some(named) = report.lock {
            return of_buyer.iter().filter(|(id, _)| *id == named).map(|(id, _)| *id).collect();
        }
        let same_order: Vec<LockId> =
            of_buyer.iter().filter(|(_, r)| r.order.as_ref() == Some(&report.order)).map(|(id, _)| *id).collect();
        if !same_order.is_empty() || !first {
            return same_order;
        }
        let open: Vec<&(LockId, &Record)> = of_buyer.iter().filter(|(_, record)| record.order.is_none()).collect();
        if let Some((id, _)) = open.iter().find(|(_, record)| record.quantity == report.quantity) {
            return vec![*id];
        }
        let mut covered = 0;
        open.iter()
            .take_while(|(_, record)| {
                let wanted = covered < report.quantity.wide();
                covered += record.quantity.wide();
                wanted
            })
            .map(|(id, _)| *id)
            .collect()
    }

    /// Marks what the report is about as sold; how many tickets that were.
    fn mark_candidates(&mut self, now: Now, report: &OrderReport, first: bool) -> u64 {
        self.candidates(report, first).into_iter().map(|id| self.mark(now, id)).sum()
    }

    /// A repeated report, or a confirm that came after it: moves tickets from the order's own entry to the lock.
    #[expect(clippy::too_many_arguments, reason = "the parts of a report without the parts that only the first uses")]
    fn match_order(
        &mut self,
        now: Now,
        order: &OrderId,
        user: UserId,
        category: CategoryId,
        lock: Option<LockId>,
        mut record: OrderRecord,
        out: &mut Vec<Announcement>,
    ) {
        let report = OrderReport {
            order: order.clone(),
            event: self.event,
            category,
            quantity: Quantity::new(1).expect("one is a quantity"),
            user,
            lock,
            result: record.result,
        };
        let matched = self.mark_candidates(now, &report, false);
        // A cancelled order's tickets are in no count under its own name.
        if matched == 0 || record.result == OrderResult::Cancelled {
            return;
        }
        let moved = matched.min(record.unmatched);
        record.matched += matched;
        record.unmatched -= moved;
        self.orders.insert(order.clone(), record);
        if let Some(loose) = self.loose.get_mut(order) {
            loose.quantity -= moved;
            if loose.quantity == 0 {
                self.loose.remove(order);
            }
            self.change(now, category, out, &[], |row| row.settling -= moved);
        }
    }

    /// The user's session began: abandoned locks get their deadline back. Returns the user's active locks.
    pub fn adopt(&mut self, now: Now, user: UserId, generation: u64) -> Vec<Lock> {
        for lock in self.locks_of(now, user) {
            let Some(record) = self.locks.get_mut(&lock.id).filter(|record| record.generation < generation) else {
                continue;
            };
            record.generation = generation;
            if record.state == State::Active(Hold::Abandoned) {
                record.state = State::Active(Hold::Attended);
                self.deadlines.remove(&(record.deadline, lock.id));
                record.deadline = record.full_deadline;
                self.deadlines.insert((record.deadline, lock.id));
            }
        }
        self.locks_of(now, user)
    }

    /// The user's last session ended: each unpinned lock lives `grace` more at most. How many were moved.
    pub fn abandon(&mut self, now: Now, user: UserId, generation: u64, grace: Duration) -> u64 {
        let mut moved = 0;
        for lock in self.locks_of(now, user) {
            let Some(record) = self.locks.get_mut(&lock.id).filter(|record| record.generation <= generation) else {
                continue;
            };
            if record.state != State::Active(Hold::Attended) {
                continue;
            }
            record.generation = generation;
            record.state = State::Active(Hold::Abandoned);
            self.deadlines.remove(&(record.deadline, lock.id));
            record.deadline = record.deadline.min(now.after(grace));
            self.deadlines.insert((record.deadline, lock.id));
            moved += 1;
        }
        moved
    }

    /// Ends what is due, warns owners, forgets old tombstones.
    pub fn sweep(&mut self, now: Now, out: &mut Vec<Announcement>) -> BookSweep {
        let expired = self.expire_due(now, out);
        let horizon = now.after(self.expiry_warning);
        let near: Vec<(Instant, LockId)> = (self.deadlines.iter().copied())
            .filter(|(deadline, _)| *deadline > self.warned_until && *deadline <= horizon)
            .collect();
        for (deadline, lock) in near {
            let remaining = Duration::from_millis(deadline.as_ms() - now.instant().as_ms());
            let user = self.locks[&lock].user;
            out.push(Announcement::User(user, Personal::Expiring { lock, deadline, remaining }));
        }
        self.warned_until = self.warned_until.max(horizon);
        self.forget(now);
        BookSweep { expired, refresh: self.wants_refresh(now), next: self.next_due() }
    }

    fn wants_refresh(&self, now: Now) -> bool {
        let overdue = |id: &LockId| matches!(self.settlement(*id), Some(Settlement::Waiting(t)) if t <= now.instant());
        self.has_marks() || self.waiting.iter().any(overdue)
    }

    fn next_due(&self) -> Option<Instant> {
        let warning = whole_ms(self.expiry_warning);
        let first = self.deadlines.first().map(|(deadline, _)| *deadline);
        let to_warn = (self.deadlines.iter().map(|(deadline, _)| *deadline))
            .find(|deadline| *deadline > self.warned_until)
            .map(|deadline| Instant::from_ms(deadline.as_ms().saturating_sub(warning)));
        let settle = (self.waiting.iter())
            .filter_map(|id| match self.settlement(*id) {
                Some(Settlement::Waiting(until)) => Some(until),
                Some(Settlement::Marked(_) | Settlement::Done) | None => None,
            })
            .min();
        [first, to_warn, settle].into_iter().flatten().min()
    }

    /// Counts for the statistics.
    #[must_use]
    pub fn stats(&self) -> BookStats {
        let mut users: Vec<UserId> = self.deadlines.iter().map(|(_, id)| self.locks[id].user).collect();
        users.sort_unstable();
        users.dedup();
        BookStats {
            active: self.deadlines.len() as u64,
            users: users.len() as u64,
            categories: self.rows.values().filter(|row| row.active > 0).count() as u64,
            ..self.ended
        }
    }

    /// True when nothing in it would be missed: no lock, no tombstone, no order, no settlement, no recent snapshot.
    #[must_use]
    pub fn is_idle(&self, now: Now) -> bool {
        self.locks.is_empty() && self.orders.is_empty() && self.loose.is_empty() && !self.stock_is_known(now, TOMBSTONE)
    }

    fn expire_due(&mut self, now: Now, out: &mut Vec<Announcement>) -> u64 {
        let mut back: BTreeMap<CategoryId, Vec<(ChangeKind, Quantity, UserId)>> = BTreeMap::new();
        let mut expired = 0;
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now.instant()
        {
            self.deadlines.pop_first();
            let record = self.locks.get_mut(&id).expect("a deadline belongs to a lock");
            let reason = if record.state == State::Active(Hold::Abandoned) {
                ReleaseReason::Abandoned
            } else {
                ReleaseReason::Expired
            };
            record.state = State::Expired;
            record.forget_at = Some(Instant::from_ms(deadline.as_ms() + whole_ms(TOMBSTONE)));
            let (user, category, quantity) = (record.user, record.category, record.quantity);
            back.entry(category).or_default().push((ChangeKind::Back(reason), quantity, user));
            out.push(Announcement::User(user, Personal::Expired { lock: id, category, quantity }));
            self.unhold(user, quantity.wide());
            expired += 1;
        }
        for (category, changes) in back {
            let sum: u64 = changes.iter().map(|(_, quantity, _)| quantity.wide()).sum();
            self.change(now, category, out, &changes, |row| row.active -= sum);
        }
        self.ended.expired += expired;
        expired
    }

    fn forget(&mut self, now: Now) {
        let instant = now.instant();
        let old = |forget_at: Instant| forget_at <= instant;
        self.locks.retain(|_, record| !record.forget_at.is_some_and(old));
        self.holders.retain(|_, id| self.locks.contains_key(id));
        self.waiting.retain(|id| self.locks.contains_key(id));
        self.orders.retain(|_, record| !old(record.forget_at));
        self.requests.retain(|_, record| !old(record.forget_at));
        self.rates.retain(|_, arrival| *arrival > now.0);
    }

    /// Changes a category's counts, gives it its next version and announces both. Every change goes through here.
    fn change(
        &mut self,
        now: Now,
        category: CategoryId,
        out: &mut Vec<Announcement>,
        changes: &[(ChangeKind, Quantity, UserId)],
        apply: impl FnOnce(&mut Row),
    ) -> u64 {
        let row = self.rows.entry(category).or_default();
        apply(row);
        row.version = now.0.max(row.version + 1);
        let row = *row;
        let availability = self.reading(now, category, row);
        let changes = changes.iter().map(|&(kind, quantity, user)| Change { kind, quantity, user }).collect();
        out.push(Announcement::Room(Notice { availability, changes }));
        row.version
    }

    fn reading(&self, now: Now, category: CategoryId, row: Row) -> Availability {
        Availability {
            event: self.event,
            category,
            total: row.total,
            stock: row.stock,
            active: row.active,
            settling: row.settling,
            open: row.open,
            version: row.version,
            at: now.instant(),
        }
    }

    fn available(&self, category: CategoryId) -> u64 {
        self.rows
            .get(&category)
            .filter(|row| row.open)
            .map_or(0, |row| row.stock.saturating_sub(row.active + row.settling))
    }

    fn stock_is_known(&self, now: Now, age_max: Duration) -> bool {
        self.snapshot.is_some_and(|(_, at)| now.instant().as_ms().saturating_sub(at.as_ms()) <= whole_ms(age_max))
    }

    fn active_lock(&self, now: Now, user: UserId, category: CategoryId) -> Option<LockId> {
        let id = *self.holders.get(&(user, category))?;
        let record = self.locks.get(&id)?;
        (matches!(record.state, State::Active(_)) && record.deadline > now.instant()).then_some(id)
    }

    fn settlement(&self, id: LockId) -> Option<Settlement> {
        match self.locks.get(&id)?.state {
            State::Confirmed(settlement) => Some(settlement),
            State::Active(_) | State::Released { .. } | State::Expired => None,
        }
    }

    /// Draws a number for a question or a sale: higher than every one before, also than those of before a loss of all data.
    fn draw(&mut self, now: Now) -> u64 {
        self.counter = now.0.max(self.counter + 1);
        self.counter
    }

    /// Marks a waiting lock as sold now; how many tickets it holds.
    fn mark(&mut self, now: Now, id: LockId) -> u64 {
        let number = self.draw(now);
        self.waiting.retain(|waiting| *waiting != id);
        let Some(record) = self.locks.get_mut(&id) else { return 0 };
        if let State::Confirmed(settlement) = &mut record.state {
            *settlement = Settlement::Marked(number);
        }
        record.quantity.wide()
    }

    fn has_marks(&self) -> bool {
        let marked = |record: &Record| matches!(record.state, State::Confirmed(Settlement::Marked(_)));
        !self.loose.is_empty() || self.locks.values().any(marked)
    }

    fn unhold(&mut self, user: UserId, quantity: u64) {
        if let Some(held) = self.held.get_mut(&user) {
            *held = held.saturating_sub(quantity);
            if *held == 0 {
                self.held.remove(&user);
            }
        }
    }

    fn view(id: LockId, record: &Record) -> Lock {
        let status = match &record.state {
            State::Active(_) => LockStatus::Active,
            State::Confirmed(_) => LockStatus::Confirmed,
            State::Released { .. } => LockStatus::Released,
            State::Expired => LockStatus::Expired,
        };
        Lock {
            id,
            user: record.user,
            category: record.category,
            quantity: record.quantity,
            created_at: record.created_at,
            deadline: record.deadline,
            status,
            version: None,
            session: record.session,
            order: record.order.clone(),
            pinned: record.state == State::Active(Hold::Pinned),
        }
    }
}
