//! The embedded ledger: one [`Book`] per event behind a mutex, for one replica.
//!
//! It answers exactly as the Redis ledger does, because it is the model that the other is compared with. What it lacks
//! is company: another replica does not see it, and it ends with the process.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::notice::write_personal;
use super::{
    FEED_LEN_MAX, FeedItem, Footing, Ledger, LedgerError, LedgerOptions, Presence, SILENT_MAX, Swept, TOLD_KEPT,
    TOLD_LEN_MAX, Told, Topic, ends,
};
use crate::domain::{
    AcceptOutcome, Announcement, AskOutcome, Availability, Book, ConfirmOutcome, End, EndReason, EventId, FleetStats,
    Instant, Lock, LockId, LockOutcome, LockRequest, LockStatus, Now, OrderId, OrderOutcome, OrderReport, Personal,
    ReleaseOutcome, Releaser, ReplicaId, ReplicaReport, RestoreOutcome, RestoreRequest, SessionId, Snapshot,
    SnapshotNumber, UserId, ValidateOutcome, ValidateRequest, whole_ms,
};

/// Where the embedded ledger reads the time. Tests step it; the service uses the system's clock.
pub type Clock = Arc<dyn Fn() -> Now + Send + Sync>;

/// See the module.
pub struct MemoryLedger {
    options: LedgerOptions,
    clock: Clock,
    state: Mutex<State>,
    feed: Mutex<Option<mpsc::Receiver<FeedItem>>>,
}

struct State {
    books: HashMap<EventId, Book>,
    presence: HashMap<UserId, Sessions>,
    topics: HashSet<Topic>,
    feed: mpsc::Sender<FeedItem>,
    /// The feed was full: say so as soon as there is room.
    missed: bool,
    last_now: Now,
    report: Option<ReplicaReport>,
}

#[derive(Default)]
struct Sessions {
    generation: u64,
    open: BTreeSet<SessionId>,
    events: BTreeSet<EventId>,
    /// As in `lua/tell.lua`.
    told: Vec<Told>,
}

impl Sessions {
    /// Notes what the user is told of an order. A repeat is as if it had not been told before.
    fn tell(&mut self, now: Instant, message: &Personal) {
        self.told.retain(|before| before.message != *message);
        self.told.push(Told { at: now, message: message.clone() });
        self.told.sort_by_cached_key(|told| (told.at, write_personal(&told.message)));
        let surplus = self.told.len().saturating_sub(TOLD_LEN_MAX);
        self.told.drain(..surplus);
    }

    /// What is still kept of it.
    fn kept(&self, now: Instant) -> impl Iterator<Item = &Told> {
        let since = before(now, TOLD_KEPT);
        self.told.iter().filter(move |told| told.at >= since)
    }
}

fn before(now: Instant, interval: Duration) -> Instant {
    Instant::from_ms(now.as_ms().saturating_sub(whole_ms(interval)))
}

impl MemoryLedger {
    /// An empty ledger on the system's clock.
    #[must_use]
    pub fn new(options: LedgerOptions) -> Self {
        Self::with_clock(options, Arc::new(system_now))
    }

    /// An empty ledger on a clock of the caller's.
    #[must_use]
    pub fn with_clock(options: LedgerOptions, clock: Clock) -> Self {
        let (sender, receiver) = mpsc::channel(FEED_LEN_MAX);
        Self {
            options,
            clock,
            state: Mutex::new(State {
                books: HashMap::new(),
                presence: HashMap::new(),
                topics: HashSet::new(),
                feed: sender,
                missed: false,
                last_now: Now(0),
                report: None,
            }),
            feed: Mutex::new(Some(receiver)),
        }
    }

    /// The state and the time. Time never steps back, whatever the system's clock does.
    fn enter_state(&self) -> (MutexGuard<'_, State>, Now) {
        // Nothing in a critical section panics half-way through a change; a poisoned mutex still holds whole books.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (self.clock)().max(state.last_now);
        state.last_now = now;
        (state, now)
    }

    /// One transition of one event's book, and its announcements.
    fn with_book<T>(&self, event: EventId, act: impl FnOnce(&mut Book, Now, &mut Vec<Announcement>) -> T) -> T {
        let (mut state, now) = self.enter_state();
        let mut out = Vec::new();
        let book = state
            .books
            .entry(event)
            .or_insert_with(|| Book::new(event, self.options.settle_timeout, self.options.expiry_warning));
        let answer = act(book, now, &mut out);
        ends::announced(book, now, &out).into_iter().for_each(ends::count);
        state.announce(out);
        answer
    }
}

impl State {
    fn announce(&mut self, announcements: Vec<Announcement>) {
        for announcement in announcements {
            let (topic, item) = match announcement {
                Announcement::Room(notice) => (Topic::Event(notice.availability.event), FeedItem::Changed(notice)),
                Announcement::User(user, message) => (Topic::User(user), FeedItem::Personal(user, message)),
            };
            if self.topics.contains(&topic) {
                self.offer(item);
            }
        }
    }

    fn offer(&mut self, item: FeedItem) {
        if self.missed {
            match self.feed.try_send(FeedItem::Resync) {
                Ok(()) => self.missed = false,
                Err(_) => return,
            }
        }
        if self.feed.try_send(item).is_err() {
            self.missed = true;
        }
    }
}

#[async_trait]
impl Ledger for MemoryLedger {
    async fn lock(&self, request: &LockRequest) -> Result<LockOutcome, LedgerError> {
        let outcome = self.with_book(request.event(), |book, now, out| book.lock(now, request, out));
        if matches!(outcome, LockOutcome::Granted(_)) {
            let (mut state, _) = self.enter_state();
            state.presence.entry(request.user).or_default().events.insert(request.event());
        }
        Ok(outcome)
    }

    async fn validate(&self, request: &ValidateRequest) -> Result<ValidateOutcome, LedgerError> {
        Ok(self.with_book(request.event, |book, now, out| book.validate(now, request, out)))
    }

    async fn restore(&self, request: &RestoreRequest) -> Result<RestoreOutcome, LedgerError> {
        let event = request.memento.lock.event();
        let outcome = self.with_book(event, |book, now, out| book.restore(now, request, out));
        if outcome == RestoreOutcome::Restored {
            let (mut state, _) = self.enter_state();
            state.presence.entry(request.user).or_default().events.insert(event);
        }
        Ok(outcome)
    }

    async fn confirm(
        &self,
        lock: LockId,
        user: Option<UserId>,
        order: Option<&OrderId>,
    ) -> Result<ConfirmOutcome, LedgerError> {
        Ok(self.with_book(lock.event(), |book, now, out| book.confirm(now, lock, user, order, out)))
    }

    async fn release(&self, lock: LockId, by: Releaser) -> Result<ReleaseOutcome, LedgerError> {
        Ok(self.with_book(lock.event(), |book, now, out| {
            let was_active = book.find(now, lock).is_some_and(|before| before.status == LockStatus::Active);
            let outcome = book.release(now, lock, by, out);
            if let (true, ReleaseOutcome::Released(released)) = (was_active, &outcome) {
                let held = ends::since(released.created_at, now.instant());
                ends::count(End { reason: EndReason::Released, held, late: None });
            }
            outcome
        }))
    }

    async fn find(&self, lock: LockId) -> Result<Option<Lock>, LedgerError> {
        Ok(self.with_book(lock.event(), |book, now, _| book.find(now, lock)))
    }

    async fn locks_in(&self, event: EventId, user: UserId) -> Result<Vec<Lock>, LedgerError> {
        Ok(self.with_book(event, |book, now, _| book.locks_of(now, user)))
    }

    async fn locks_of(&self, user: UserId) -> Result<Vec<Lock>, LedgerError> {
        let (mut guard, now) = self.enter_state();
        let state = &mut *guard;
        let Some(sessions) = state.presence.get_mut(&user) else {
            return Ok(Vec::new());
        };
        let mut locks = Vec::new();
        sessions.events.retain(|event| {
            let found = state.books.get(event).map(|book| book.locks_of(now, user)).unwrap_or_default();
            locks.extend_from_slice(&found);
            !found.is_empty()
        });
        Ok(locks)
    }

    async fn availability(&self, event: EventId, age_max: Duration) -> Result<Option<Vec<Availability>>, LedgerError> {
        Ok(self.with_book(event, |book, now, out| book.availability(now, age_max, out)))
    }

    async fn ask(&self, event: EventId, age_min: Duration) -> Result<AskOutcome, LedgerError> {
        Ok(self.with_book(event, |book, now, _| book.ask(now, age_min)))
    }

    async fn accept(
        &self,
        event: EventId,
        number: SnapshotNumber,
        snapshot: &Snapshot,
    ) -> Result<AcceptOutcome, LedgerError> {
        Ok(self.with_book(event, |book, now, out| book.accept(now, number, snapshot, out)))
    }

    async fn order(&self, report: &OrderReport) -> Result<OrderOutcome, LedgerError> {
        Ok(self.with_book(report.event, |book, now, out| book.order(now, report, out)))
    }

    async fn enter(&self, user: UserId, session: SessionId) -> Result<Presence, LedgerError> {
        let (mut guard, now) = self.enter_state();
        let state = &mut *guard;
        let sessions = state.presence.entry(user).or_default();
        let told: Vec<Told> = sessions.kept(now.instant()).cloned().collect();
        let shown = !told.is_empty() && sessions.open.iter().any(|open| *open != session);
        let seen_until = if shown { before(now.instant(), SILENT_MAX) } else { Instant::from_ms(0) };
        sessions.open.insert(session);
        sessions.generation = now.0.max(sessions.generation + 1);
        let generation = sessions.generation;
        let mut locks = Vec::new();
        for event in &sessions.events {
            if let Some(book) = state.books.get_mut(event) {
                locks.append(&mut book.adopt(now, user, generation));
            }
        }
        Ok(Presence { generation, now: now.instant(), locks, told, seen_until })
    }

    async fn leave(&self, user: UserId, session: SessionId, grace: Duration) -> Result<(), LedgerError> {
        let (mut guard, now) = self.enter_state();
        let state = &mut *guard;
        let sessions = state.presence.entry(user).or_default();
        let ended = sessions.open.remove(&session);
        sessions.generation = now.0.max(sessions.generation + 1);
        if ended && sessions.open.is_empty() {
            let shown = before(now.instant(), SILENT_MAX);
            sessions.told.retain(|told| told.at > shown);
        }
        if sessions.open.is_empty() {
            let generation = sessions.generation;
            sessions.events.retain(|event| {
                let Some(book) = state.books.get_mut(event) else { return false };
                book.abandon(now, user, generation, grace);
                !book.locks_of(now, user).is_empty()
            });
        }
        Ok(())
    }

    async fn tell(&self, user: UserId, message: &Personal) -> Result<(), LedgerError> {
        let (mut state, now) = self.enter_state();
        if let Personal::Order { .. } = message {
            state.presence.entry(user).or_default().tell(now.instant(), message);
        }
        state.announce(vec![Announcement::User(user, message.clone())]);
        Ok(())
    }

    async fn sweep(&self) -> Result<Swept, LedgerError> {
        let (mut guard, now) = self.enter_state();
        let state = &mut *guard;
        let mut swept = Swept::default();
        let mut out = Vec::new();
        let mut next = None;
        for (event, book) in &mut state.books {
            let mut announced = Vec::new();
            let report = book.sweep(now, &mut announced);
            ends::announced(book, now, &announced).into_iter().for_each(ends::count);
            out.append(&mut announced);
            swept.expired += report.expired;
            if report.refresh {
                swept.refresh.push(*event);
            }
            next = [next, report.next].into_iter().flatten().min();
        }
        swept.next = next.map(|at: Instant| Duration::from_millis(at.as_ms().saturating_sub(now.instant().as_ms())));
        state.announce(out);
        let State { books, presence, topics, .. } = state;
        books.retain(|event, book| !book.is_idle(now) || topics.contains(&Topic::Event(*event)));
        presence.retain(|_, sessions| {
            sessions.events.retain(|event| books.contains_key(event));
            let keeps = sessions.kept(now.instant()).next().is_some();
            keeps || !sessions.open.is_empty() || !sessions.events.is_empty()
        });
        Ok(swept)
    }

    async fn beat(&self, report: &ReplicaReport) -> Result<Footing, LedgerError> {
        let (mut state, _) = self.enter_state();
        state.report = Some(*report);
        Ok(Footing::Firm)
    }

    async fn reap(&self, _grace: Duration) -> Result<u64, LedgerError> {
        Ok(0)
    }

    async fn farewell(&self, _replica: ReplicaId) -> Result<(), LedgerError> {
        let (mut state, _) = self.enter_state();
        state.report = None;
        Ok(())
    }

    async fn stats(&self) -> Result<FleetStats, LedgerError> {
        let (state, _) = self.enter_state();
        let mut fleet = FleetStats { replicas: u64::from(state.report.is_some()), ..FleetStats::default() };
        if let Some(report) = &state.report {
            (fleet.users, fleet.sockets) = (report.users, report.sockets);
        }
        for book in state.books.values() {
            fleet.add(book.stats());
        }
        Ok(fleet)
    }

    async fn ping(&self) -> Result<(), LedgerError> {
        Ok(())
    }

    async fn subscribe(&self, topic: Topic) -> Result<(), LedgerError> {
        let (mut state, _) = self.enter_state();
        state.topics.insert(topic);
        Ok(())
    }

    async fn unsubscribe(&self, topic: Topic) -> Result<(), LedgerError> {
        let (mut state, _) = self.enter_state();
        state.topics.remove(&topic);
        Ok(())
    }

    fn feed(&self) -> Option<mpsc::Receiver<FeedItem>> {
        self.feed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn system_now() -> Now {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now(u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX))
}
