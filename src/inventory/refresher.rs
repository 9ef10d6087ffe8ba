//! The refresher: decides when the source is asked, and hands its answers to the ledger.
//!
//! One question per event is open at a time, whoever wants it: concurrent misses share it, refreshes asked for
//! meanwhile become one more question after it. The number of a question is drawn from the ledger before the source is
//! asked, so an answer that comes late never replaces the answer to a later question.

use std::collections::hash_map::{Entry, HashMap};
use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{SourceError, SourceErrorKind, StockSource};
use crate::domain::{
    AcceptOutcome, AskOutcome, Availability, EventId, LockOutcome, LockRequest, RestoreOutcome, RestoreRequest,
    Snapshot, SnapshotNumber,
};
use crate::ledger::{ErrorKind, Ledger, LedgerError};
use crate::metrics;

/// After a question its answer also answers everybody who comes within this time, and a refresh waits as long: it
/// bounds the questions about one event to ten per second and replica, however many orders are completed.
const LINGER: Duration = Duration::from_millis(100);
/// How long it is remembered that an event is one.
const KNOWN_TTL: Duration = Duration::from_mins(1);
/// How long an event that the source does not know is remembered.
const UNKNOWN_TTL: Duration = Duration::from_secs(5);
/// How long a failed question answers for the next one of the same event, so that nobody queues behind a dead source.
const FAILED_TTL: Duration = Duration::from_millis(500);
/// Remembered events of either sort: about 100 bytes each.
const REMEMBERED_MAX: usize = 10_000;
/// Open and lingering questions. Ten times what a replica asks in [`LINGER`] at a thousand questions per second.
const FLIGHTS_MAX: usize = 1024;
/// A miss that finds a snapshot this young does not ask: another replica just did.
const FRESH_ENOUGH: Duration = Duration::from_secs(1);
/// Counts of whatever age say that an event once was one.
const ANY_AGE: Duration = Duration::from_hours(24);
/// How often a failed refresh that nobody watches is tried again, with doubling pauses from [`RETRY_FIRST`]: 12.6 s.
const RETRIES_MAX: u32 = 6;
/// The pause before the first retry.
const RETRY_FIRST: Duration = Duration::from_millis(200);

/// When the source is asked and how old its answers may get.
#[derive(Debug, Clone, Copy)]
pub struct StockOptions {
    /// How often the stock of a watched event is asked for.
    pub refresh: Duration,
    /// Stock older than this makes a request wait for a fresh answer, if the source gives one.
    pub age_wanted: Duration,
    /// Stock is served up to this age when the source is gone.
    pub age_max: Duration,
    /// From a question to the source's answer.
    pub request_timeout: Duration,
    /// Questions open at once.
    pub concurrent_max: usize,
}

impl StockOptions {
    /// The usual ages for a refresh interval: a request waits for fresh stock after 2 intervals and serves known stock
    /// for 6. Two, because the interval is jittered by a tenth and may be skipped once when another replica asks.
    #[must_use]
    pub const fn new(refresh: Duration, request_timeout: Duration) -> Self {
        Self {
            refresh,
            age_wanted: refresh.saturating_mul(2),
            age_max: refresh.saturating_mul(6),
            request_timeout,
            concurrent_max: 16,
        }
    }
}

impl Default for StockOptions {
    fn default() -> Self {
        Self::new(Duration::from_secs(10), Duration::from_secs(1))
    }
}

/// Why a request that needs stock got no outcome.
#[derive(Debug, thiserror::Error)]
pub enum StockError {
    /// The source does not know the event.
    #[error("the events-service does not know the event")]
    EventNotFound,
    /// No stock young enough is known and the source gives none.
    #[error("no stock is known and none can be had: {0}")]
    Unavailable(#[source] SourceError),
    /// The ledger gave no answer: whether anything changed is unknown.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

impl StockError {
    /// The metric label.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::EventNotFound => "event_not_found",
            Self::Unavailable(why) => why.kind().as_str(),
            Self::Ledger(error) => error.kind().as_str(),
        }
    }

    /// Whether asking again, unchanged, can help. Repeating is safe for every kind.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        match self {
            Self::EventNotFound => false,
            Self::Unavailable(_) => true,
            Self::Ledger(error) => error.is_retryable(),
        }
    }
}

/// The refresher.
///
/// Its calls must be made inside a runtime. A request touches the ledger: do not drop it half-way.
pub struct Stock {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Stock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stock").field("options", &self.shared.options).finish_non_exhaustive()
    }
}

struct Shared {
    ledger: Arc<dyn Ledger>,
    source: Arc<dyn StockSource>,
    options: StockOptions,
    stop: CancellationToken,
    tasks: TaskTracker,
    permits: Semaphore,
    flights: Mutex<HashMap<EventId, Flight>>,
    memory: Mutex<Memory>,
    watched: Mutex<HashMap<EventId, Watched>>,
    retrying: Mutex<HashSet<EventId>>,
    failures: Mutex<HashMap<EventId, u64>>,
    source_failures: AtomicU64,
}

/// The open question of one event.
struct Flight {
    /// Where its answer appears.
    done: watch::Receiver<Option<Fetched>>,
    /// Set when another question is to follow it.
    next: Option<watch::Sender<Option<Fetched>>>,
}

struct Watched {
    count: usize,
    /// When its stock was last known to be fresh; at first, when it was first watched.
    fresh_at: Instant,
    stop: CancellationToken,
}

/// What became of a question.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fetched {
    /// The ledger holds the answer, or the answer to a later question.
    Stored,
    /// The ledger held a snapshot young enough: the source was not asked.
    Fresh,
    /// The source does not know the event.
    NotFound,
    /// The source does not know the event any more. The ledger holds it as closed.
    Gone,
    /// No answer.
    Failed(SourceError),
}

/// Answers that are not in the ledger, for a short while.
#[derive(Default)]
struct Memory {
    /// Events that had stock lately.
    known: Recent<()>,
    unknown: Recent<()>,
    failed: Recent<SourceError>,
}

/// A bounded map whose entries live equally long.
struct Recent<T> {
    entries: HashMap<EventId, (Instant, T)>,
    order: VecDeque<(Instant, EventId)>,
}

impl<T> Default for Recent<T> {
    fn default() -> Self {
        Self { entries: HashMap::new(), order: VecDeque::new() }
    }
}

impl<T> Recent<T> {
    fn put(&mut self, event: EventId, until: Instant, value: T, now: Instant) {
        self.entries.insert(event, (until, value));
        self.order.push_back((until, event));
        while let Some(&(end, oldest)) = self.order.front() {
            if end > now && self.order.len() <= REMEMBERED_MAX {
                break;
            }
            self.order.pop_front();
            // A newer entry of the same event has a later end and an order entry of its own.
            if self.entries.get(&oldest).is_some_and(|&(until, _)| until <= end) {
                self.entries.remove(&oldest);
            }
        }
    }

    fn find(&self, event: EventId, now: Instant) -> Option<&T> {
        self.entries.get(&event).filter(|(until, _)| *until > now).map(|(_, value)| value)
    }

    fn forget(&mut self, event: EventId) {
        self.entries.remove(&event);
    }
}

/// Whether a caller is content with the answer that just came or needs one to a question asked after its call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Any { age_min: Duration },
    Newer,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that runs under these mutexes panics half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `base` times a random factor in 0.9..1.1, so that replicas and events do not march in step.
pub(super) fn jitter(base: Duration) -> Duration {
    // Each `RandomState` is keyed differently; 10 bits are enough for a pause.
    let random = RandomState::new().hash_one(0_u8) % 1024;
    #[expect(clippy::cast_precision_loss, reason = "below 1024")]
    base.mul_f64(0.9 + random as f64 / 1023.0 * 0.2)
}

impl Stock {
    /// A refresher between a source and a ledger, until `stop`.
    #[must_use]
    pub fn new(
        ledger: Arc<dyn Ledger>,
        source: Arc<dyn StockSource>,
        options: StockOptions,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let failures = ErrorKind::ALL.map(ErrorKind::as_str).into_iter();
        for kind in failures.chain(SourceErrorKind::ALL.map(SourceErrorKind::as_str)) {
            metrics::LEDGER_LOCKS.show(&[kind]);
        }
        let permits = Semaphore::new(options.concurrent_max.max(1));
        Arc::new(Self {
            shared: Arc::new(Shared {
                ledger,
                source,
                options,
                stop,
                tasks: TaskTracker::new(),
                permits,
                flights: Mutex::default(),
                memory: Mutex::default(),
                watched: Mutex::default(),
                retrying: Mutex::default(),
                failures: Mutex::default(),
                source_failures: AtomicU64::new(0),
            }),
        })
    }

    /// The age from which on a request waits for fresh stock: what [`LockRequest::stock_age_max`] is usually set to.
    #[must_use]
    pub fn age_wanted(&self) -> Duration {
        self.shared.options.age_wanted
    }

    /// Asks the ledger for a lock, and the source for stock if the ledger has none young enough.
    ///
    /// Never answers [`LockOutcome::StockUnknown`].
    ///
    /// # Errors
    /// [`StockError`], when there is no outcome.
    pub async fn lock(&self, request: LockRequest) -> Result<LockOutcome, StockError> {
        let (event, age) = (request.event(), request.stock_age_max);
        let ledger = &self.shared.ledger;
        let answer = async {
            self.shared.ensure_known(event, age).await?;
            let lock = |age| {
                let request = LockRequest { stock_age_max: age, ..request.clone() };
                async move {
                    let outcome = ledger.lock(&request).await?;
                    Ok(if outcome == LockOutcome::StockUnknown { None } else { Some(outcome) })
                }
            };
            self.shared.with_stock(event, age, lock).await
        }
        .await;
        metrics::LEDGER_LOCKS.count(&[answer.as_ref().map_or_else(StockError::kind, LockOutcome::as_str)]);
        answer
    }

    /// Asks the ledger to take back a lock that it may have lost, and the source for stock if the ledger has none.
    ///
    /// Never answers [`RestoreOutcome::StockUnknown`].
    ///
    /// # Errors
    /// [`StockError`], when there is no outcome.
    pub async fn restore(&self, request: RestoreRequest) -> Result<RestoreOutcome, StockError> {
        let (event, age) = (request.memento.lock.event(), request.stock_age_max);
        let ledger = &self.shared.ledger;
        self.shared
            .with_stock(event, age, |age| {
                let request = RestoreRequest { stock_age_max: age, ..request.clone() };
                async move {
                    let outcome = ledger.restore(&request).await?;
                    Ok(if outcome == RestoreOutcome::StockUnknown { None } else { Some(outcome) })
                }
            })
            .await
    }

    /// The counts of every category of an event, by ascending category id.
    ///
    /// # Errors
    /// [`StockError`], when there are none to show.
    pub async fn availability(&self, event: EventId) -> Result<Vec<Availability>, StockError> {
        self.shared.availability(event, self.shared.options.age_wanted).await
    }

    /// Asks for an event's stock soon, because it changed. Never blocks; calls close together become one question, and
    /// one made while a question is open leads to another question after it. A failed one is tried again a few times.
    pub fn refresh(&self, event: EventId) {
        lock(&self.shared.memory).unknown.forget(event);
        lock(&self.shared.memory).failed.forget(event);
        let shared = Arc::clone(&self.shared);
        if let Some(answer) = Shared::join(&shared, event, Wanted::Newer) {
            Shared::retry_if_failed(shared, event, answer);
        } else {
            metrics::INVENTORY_QUESTIONS.count(&["busy"]);
        }
    }

    /// Counts a watcher of an event. From the first on its stock is asked for every [`StockOptions::refresh`], unless
    /// another replica did.
    pub fn watch(&self, event: EventId) {
        if self.shared.stop.is_cancelled() {
            return;
        }
        let mut watched = lock(&self.shared.watched);
        match watched.entry(event) {
            Entry::Occupied(mut entry) => entry.get_mut().count += 1,
            Entry::Vacant(entry) => {
                let stop = self.shared.stop.child_token();
                entry.insert(Watched { count: 1, fresh_at: Instant::now(), stop: stop.clone() });
                self.shared.tasks.spawn(Shared::keep_fresh(Arc::clone(&self.shared), event, stop));
            }
        }
        gauge(watched.len());
    }

    /// Counts a watcher off.
    pub fn unwatch(&self, event: EventId) {
        let mut watched = lock(&self.shared.watched);
        if let Entry::Occupied(mut entry) = watched.entry(event) {
            entry.get_mut().count -= 1;
            if entry.get().count == 0 {
                entry.remove().stop.cancel();
            }
        }
        gauge(watched.len());
    }

    /// How long ago the stock of watched events was known to be fresh, of the event for which that is longest; zero when
    /// none is watched.
    #[must_use]
    pub fn age(&self) -> Duration {
        let watched = lock(&self.shared.watched);
        watched.values().map(|watched| watched.fresh_at.elapsed()).max().unwrap_or_default()
    }

    /// Returns when, after `stop`, the last open question has ended. Bounded by the timeouts of source and ledger.
    pub async fn drained(&self) {
        self.shared.stop.cancelled().await;
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

#[expect(clippy::cast_precision_loss, reason = "a count of events is far below 2^52")]
fn gauge(events: usize) {
    metrics::INVENTORY_WATCHED.set(&[], events as f64);
}

impl Shared {
    async fn availability(self: &Arc<Self>, event: EventId, age: Duration) -> Result<Vec<Availability>, StockError> {
        let counts = self.with_stock(event, age, |age| self.ledger.availability(event, age)).await?;
        let (mut memory, now) = (lock(&self.memory), Instant::now());
        if memory.known.find(event, now).is_none() {
            memory.known.put(event, now + KNOWN_TTL, (), now);
        }
        Ok(counts)
    }

    /// Returns when the event has had stock lately: for one that somebody invented, the ledger would write down when to look
    /// at it and for whom.
    async fn ensure_known(self: &Arc<Self>, event: EventId, age: Duration) -> Result<(), StockError> {
        let known = lock(&self.memory).known.find(event, Instant::now()).is_some();
        if known { Ok(()) } else { self.availability(event, age).await.map(drop) }
    }

    /// Asks the ledger; if it has no stock young enough, the source and then the ledger again. A ledger that answers
    /// `None` wants stock.
    async fn with_stock<T, F>(
        self: &Arc<Self>,
        event: EventId,
        age: Duration,
        ask: impl Fn(Duration) -> F,
    ) -> Result<T, StockError>
    where
        F: Future<Output = Result<Option<T>, LedgerError>>,
    {
        if let Some(answer) = ask(age).await? {
            return Ok(answer);
        }
        for wanted in [Wanted::Any { age_min: age.min(FRESH_ENOUGH) }, Wanted::Newer] {
            match self.fetch(event, wanted).await {
                Fetched::Stored | Fetched::Fresh | Fetched::Gone => {
                    if let Some(answer) = ask(age).await? {
                        return Ok(answer);
                    }
                }
                Fetched::NotFound => return Err(StockError::EventNotFound),
                Fetched::Failed(why) => {
                    let known = ask(age.max(self.options.age_max)).await?;
                    return known.ok_or(StockError::Unavailable(why));
                }
            }
        }
        Err(StockError::Unavailable(SourceError::Ledger))
    }

    /// The answer to a question about the event: the open one's, or a new one's.
    async fn fetch(self: &Arc<Self>, event: EventId, wanted: Wanted) -> Fetched {
        if let Wanted::Any { .. } = wanted
            && let Some(known) = self.remembered(event)
        {
            return known;
        }
        let Some(mut answer) = Self::join(self, event, wanted) else {
            metrics::INVENTORY_QUESTIONS.count(&["busy"]);
            return Fetched::Failed(SourceError::Busy);
        };
        landed(&mut answer).await
    }

    fn remembered(&self, event: EventId) -> Option<Fetched> {
        let memory = lock(&self.memory);
        let now = Instant::now();
        if memory.unknown.find(event, now).is_some() {
            return Some(Fetched::NotFound);
        }
        memory.failed.find(event, now).cloned().map(Fetched::Failed)
    }

    /// Joins the open question of the event or opens one. `None` when too many are open or the process is stopping.
    fn join(shared: &Arc<Self>, event: EventId, wanted: Wanted) -> Option<watch::Receiver<Option<Fetched>>> {
        let mut flights = lock(&shared.flights);
        if let Some(flight) = flights.get_mut(&event) {
            return Some(match wanted {
                Wanted::Any { .. } => flight.done.clone(),
                Wanted::Newer => flight.next.get_or_insert_with(|| watch::channel(None).0).subscribe(),
            });
        }
        if flights.len() >= FLIGHTS_MAX || shared.stop.is_cancelled() {
            return None;
        }
        let (sender, done) = watch::channel(None);
        flights.insert(event, Flight { done: done.clone(), next: None });
        let age_min = match wanted {
            Wanted::Any { age_min } => age_min,
            Wanted::Newer => Duration::ZERO,
        };
        shared.tasks.spawn(Self::fly(Arc::clone(shared), event, age_min, sender));
        Some(done)
    }

    /// Asks until nobody wants another answer. Leaves the map of flights in the step that finds nobody.
    async fn fly(self: Arc<Self>, event: EventId, mut age_min: Duration, mut answer: watch::Sender<Option<Fetched>>) {
        let _landing = Landing { shared: &self, event };
        loop {
            let fetched = self.question(event, age_min).await;
            self.note(event, &fetched);
            answer.send_replace(Some(fetched));
            tokio::select! {
                () = sleep(LINGER) => {}
                () = self.stop.cancelled() => return,
            }
            let mut flights = lock(&self.flights);
            let Some(flight) = flights.get_mut(&event) else { return };
            let Some(next) = flight.next.take() else {
                flights.remove(&event);
                return;
            };
            flight.done = next.subscribe();
            answer = next;
            age_min = Duration::ZERO;
        }
    }

    /// One question: number, source, ledger.
    async fn question(&self, event: EventId, age_min: Duration) -> Fetched {
        let limit = self.options.request_timeout;
        let Ok(Ok(_permit)) = timeout(limit, self.permits.acquire()).await else {
            return Fetched::Failed(SourceError::Busy);
        };
        let number = match self.ledger.ask(event, age_min).await {
            Ok(AskOutcome::Ask(number)) => number,
            Ok(AskOutcome::Fresh) => return Fetched::Fresh,
            Err(error) => return ledger_failed(event, &error),
        };
        let started = Instant::now();
        let answer = timeout(limit, self.source.snapshot(event)).await.unwrap_or(Err(SourceError::Timeout(limit)));
        metrics::INVENTORY_QUESTION_SECONDS.observe(&[], started.elapsed());
        match answer {
            Ok(snapshot) => self.store(event, number, &snapshot, Fetched::Stored).await,
            Err(SourceError::EventNotFound) => self.missing(event, number).await,
            Err(why) => Fetched::Failed(why),
        }
    }

    async fn store(&self, event: EventId, number: SnapshotNumber, snapshot: &Snapshot, stored: Fetched) -> Fetched {
        match self.ledger.accept(event, number, snapshot).await {
            Ok(AcceptOutcome::Accepted) => stored,
            Ok(AcceptOutcome::Older) => {
                metrics::INVENTORY_OLDER.count(&[]);
                stored
            }
            Err(error) => ledger_failed(event, &error),
        }
    }

    /// The source does not know the event. If it did, the event is closed: nothing of what its room sees could be locked
    /// for long. Of events that somebody invented nothing is written down.
    async fn missing(&self, event: EventId, number: SnapshotNumber) -> Fetched {
        let counts = match self.ledger.availability(event, ANY_AGE).await {
            Ok(Some(counts)) => counts,
            Ok(None) => return Fetched::NotFound,
            Err(error) => return ledger_failed(event, &error),
        };
        if counts.iter().any(|category| category.open) {
            tracing::warn!(%event, "the events-service does not know an event any more; its sale is closed");
        }
        self.store(event, number, &Snapshot { open: false, categories: Vec::new() }, Fetched::Gone).await
    }

    /// Remembers, counts and logs what became of a question; of a streak of failures only the first and the end.
    fn note(&self, event: EventId, fetched: &Fetched) {
        let now = Instant::now();
        if matches!(fetched, Fetched::Stored | Fetched::Fresh | Fetched::Gone)
            && let Some(watched) = lock(&self.watched).get_mut(&event)
        {
            watched.fresh_at = now;
        }
        let outcome = match fetched {
            Fetched::Stored => {
                self.answered(event);
                "stored"
            }
            Fetched::Fresh => "fresh",
            Fetched::NotFound => {
                self.answered(event);
                lock(&self.memory).unknown.put(event, now + UNKNOWN_TTL, (), now);
                "event_not_found"
            }
            Fetched::Gone => {
                self.answered(event);
                "event_not_found"
            }
            Fetched::Failed(why) => {
                self.failed(event, why);
                lock(&self.memory).failed.put(event, now + FAILED_TTL, why.clone(), now);
                why.kind().as_str()
            }
        };
        metrics::INVENTORY_QUESTIONS.count(&[outcome]);
    }

    fn failed(&self, event: EventId, why: &SourceError) {
        if why.is_of_event() {
            let mut failures = lock(&self.failures);
            let room = failures.len() < REMEMBERED_MAX;
            match failures.entry(event) {
                Entry::Occupied(mut entry) => *entry.get_mut() += 1,
                Entry::Vacant(entry) if room => {
                    entry.insert(1);
                    tracing::warn!(%event, error = %why, "no stock for an event");
                }
                Entry::Vacant(_) => {}
            }
        } else if self.source_failures.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!(%event, error = %why, "the source of stock does not answer");
        }
    }

    fn answered(&self, event: EventId) {
        lock(&self.memory).failed.forget(event);
        let failures = self.source_failures.swap(0, Ordering::Relaxed);
        if failures > 0 {
            tracing::info!(failures, "the source of stock answers again");
        }
        if let Some(failures) = lock(&self.failures).remove(&event) {
            tracing::info!(%event, failures, "stock for the event again");
        }
    }

    /// Waits for a refresh and, if it failed, asks a few times more. One such task per event.
    fn retry_if_failed(shared: Arc<Self>, event: EventId, mut answer: watch::Receiver<Option<Fetched>>) {
        {
            let mut retrying = lock(&shared.retrying);
            if retrying.len() >= FLIGHTS_MAX || !retrying.insert(event) {
                return;
            }
        }
        let tasks = shared.tasks.clone();
        tasks.spawn(async move {
            let _retry = Retry { shared: &shared, event };
            for attempt in 0..RETRIES_MAX {
                match landed(&mut answer).await {
                    Fetched::Failed(why) if why.is_retryable() => {}
                    Fetched::Stored | Fetched::Fresh | Fetched::NotFound | Fetched::Gone | Fetched::Failed(_) => return,
                }
                tokio::select! {
                    () = sleep(jitter(RETRY_FIRST * 2_u32.pow(attempt))) => {}
                    () = shared.stop.cancelled() => return,
                }
                match Self::join(&shared, event, Wanted::Newer) {
                    Some(next) => answer = next,
                    None => return,
                }
            }
        });
    }

    /// Asks for a watched event's stock every `refresh`, sooner after a failure, until `stop`.
    async fn keep_fresh(self: Arc<Self>, event: EventId, stop: CancellationToken) {
        let refresh = self.options.refresh;
        let mut failures = 0_u32;
        loop {
            // Half an interval: whoever asked within it spares us a question, and stock gets at most 1.6 intervals old.
            let fetched = self.fetch(event, Wanted::Any { age_min: refresh / 2 }).await;
            failures = match fetched {
                Fetched::Stored | Fetched::Fresh | Fetched::Gone => 0,
                Fetched::NotFound | Fetched::Failed(_) => failures.saturating_add(1),
            };
            let pause = match failures {
                0 => refresh,
                // From a sixteenth of the interval up to the interval.
                n => (refresh / 16 * 2_u32.pow(n.min(5) - 1)).clamp(FAILED_TTL, refresh.max(FAILED_TTL)),
            };
            tokio::select! {
                () = sleep(jitter(pause)) => {}
                () = stop.cancelled() => return,
            }
        }
    }
}

/// Removes a flight that ends in any way.
struct Landing<'a> {
    shared: &'a Shared,
    event: EventId,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        // A flight that ended by itself is gone, and a new one may have taken its place; only a broken one is ours.
        if std::thread::panicking() || self.shared.stop.is_cancelled() {
            lock(&self.shared.flights).remove(&self.event);
        }
    }
}

/// Allows the next retry task of an event.
struct Retry<'a> {
    shared: &'a Shared,
    event: EventId,
}

impl Drop for Retry<'_> {
    fn drop(&mut self) {
        lock(&self.shared.retrying).remove(&self.event);
    }
}

/// The answer of a flight.
async fn landed(answer: &mut watch::Receiver<Option<Fetched>>) -> Fetched {
    let stopping = || Fetched::Failed(SourceError::Stopping);
    match answer.wait_for(Option::is_some).await {
        Ok(fetched) => fetched.clone().unwrap_or_else(stopping),
        Err(_) => stopping(),
    }
}

fn ledger_failed(event: EventId, error: &LedgerError) -> Fetched {
    tracing::debug!(%event, %error, "the ledger took no stock");
    Fetched::Failed(SourceError::Ledger)
}
