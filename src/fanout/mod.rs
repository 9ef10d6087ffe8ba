//! Fan-out: from the ledger's notices to whoever watches here.
//!
//! Owns the subscriptions of this replica (one per watched event, one per user with a socket), the latest value of every
//! category of a watched event, and the tick: a room gets at most one update per category and tick, however many changes
//! there were, and always the last one. Notices are hints that may be lost, doubled or late; every watched event is read
//! again every few seconds, so what was lost comes after all. Knows no sockets and no protocol: it speaks to an
//! [`Audience`].

mod agenda;
mod heal;
mod pump;
mod standing;
mod tick;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::agenda::Agenda;
use self::standing::Standing;
use self::tick::Board;
use crate::domain::{Availability, CategoryId, ChangeKind, EventId, Personal, UserId};
use crate::inventory::Stock;
use crate::ledger::{Ledger, LedgerError, Topic};
use crate::metrics;

/// Who watches and listens on this replica. Called by one task. A call must not wait and must not call the fan-out.
pub trait Audience: Send + Sync + 'static {
    /// Those who are in the event's room at this moment, to be told the news, however long that takes; nobody who joins
    /// later. None when nobody is there.
    fn gather(&self, news: News) -> Option<Box<dyn Telling>>;

    /// A message for every local socket of the user, in the order in which they were sent.
    fn personal(&self, user: UserId, message: &Personal);

    /// Messages for users may have been missed; rooms are read again without the audience's help. Nothing by itself.
    fn missed(&self) {}
}

/// A room that is being told its news, one socket after the other.
pub trait Telling: Send {
    /// Tells some of it, for about a millisecond; false when all are told.
    fn go_on(&mut self) -> bool;

    /// Whether later news of the event can join in while these are told.
    fn is_open(&self) -> bool;

    /// Later news of the event: from here on everybody is told them too, and at last, from the first one on, those who
    /// have been told the former. So nobody waits longer than once round, however the news come.
    fn join_in(&mut self, news: News);

    /// How many times round it has gone.
    fn laps(&self) -> f64;
}

/// What a room is told at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// Whose room.
    pub event: EventId,
    /// For everyone: each category at most once, by ascending id.
    pub changed: Vec<Availability>,
    /// What others did in the event since the last time, for everyone but those who did it.
    pub summaries: Vec<Summary>,
}

impl News {
    /// What somebody is told who is told these and later ones of the same event at once.
    #[must_use]
    pub fn and(&self, later: &Self) -> Self {
        let changed = self.changed.iter().chain(&later.changed).map(|counts| (counts.category, *counts));
        let changed: BTreeMap<CategoryId, Availability> = changed.collect();
        let mut sums = Sums::default();
        for summary in self.summaries.iter().chain(&later.summaries) {
            for &(user, amount) in &summary.by_user {
                *sums.entry((summary.category, summary.kind)).or_default().entry(user).or_default() += amount;
            }
        }
        Self { event: self.event, changed: changed.into_values().collect(), summaries: tick::summaries(sums) }
    }
}

/// How many tickets of a category were moved in one way, by user.
type Sums = HashMap<(CategoryId, ChangeKind), BTreeMap<UserId, u64>>;

/// Lock changes of one kind in one category, summed over a tick.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Where.
    pub category: CategoryId,
    /// What happened.
    pub kind: ChangeKind,
    /// To how many tickets, everybody together.
    pub total: u64,
    /// How many of them each user moved, by ascending user: who moved some is told of the others' only.
    pub by_user: Vec<(UserId, u64)>,
}

impl Summary {
    /// What `user` is told: the tickets that others moved.
    #[must_use]
    pub fn without(&self, user: UserId) -> u64 {
        let own = self.by_user.binary_search_by_key(&user, |&(user, _)| user).map_or(0, |at| self.by_user[at].1);
        self.total.saturating_sub(own)
    }
}

/// How often.
#[derive(Debug, Clone, Copy)]
pub struct FanoutOptions {
    /// A room gets at most one update per category in this time.
    pub tick: Duration,
    /// Every watched event is read again after this time.
    pub heal_every: Duration,
}

impl Default for FanoutOptions {
    fn default() -> Self {
        // Healing within 5 s is promised: 4 s and the reading and a stretched tick.
        Self { tick: Duration::from_millis(50), heal_every: Duration::from_secs(4) }
    }
}

/// The fan-out of one replica.
pub struct Fanout {
    shared: Arc<Shared>,
}

impl fmt::Debug for Fanout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fanout").finish_non_exhaustive()
    }
}

/// What the tasks and the callers share.
struct Shared {
    ledger: Arc<dyn Ledger>,
    stock: Arc<Stock>,
    options: FanoutOptions,
    events: Arc<Standing<EventId, Room>>,
    users: Arc<Standing<UserId, ()>>,
    /// Watched events whose boards have something to emit. At most one entry per watched event.
    touched: Mutex<HashSet<EventId>>,
    touch: Notify,
    /// When watched events are read again.
    readings: Mutex<Agenda<EventId>>,
    reading: Notify,
    /// Watched events in which more tickets are active and settling than exist: of how many categories. None, if the
    /// ledger keeps its law.
    oversold: Mutex<HashMap<EventId, usize>>,
}

/// What is known of a watched event.
struct Room {
    /// Held while the room's news and those who are to be told them are taken, so that whoever is told an update has
    /// joined with nothing newer.
    board: Mutex<Board>,
    _kept_fresh: KeptFresh,
}

/// Keeps the event's stock fresh as long as it lives.
struct KeptFresh {
    stock: Arc<Stock>,
    event: EventId,
}

impl Drop for KeptFresh {
    fn drop(&mut self) {
        self.stock.unwatch(self.event);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that runs under these mutexes panics half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A random part of an interval, so that events and replicas do not march in step.
fn part_of(interval: Duration) -> Duration {
    use std::hash::{BuildHasher, RandomState};
    // Each `RandomState` is keyed differently; 10 bits are enough for a pause.
    let random = u32::try_from(RandomState::new().hash_one(0_u8) % 1024).unwrap_or(0);
    interval * random / 1024
}

impl Fanout {
    /// Starts the fan-out, until `stop`. Takes the ledger's feed: there is one fan-out per ledger. Must be called inside
    /// a runtime.
    #[must_use]
    pub fn start(
        ledger: Arc<dyn Ledger>,
        stock: Arc<Stock>,
        audience: Arc<dyn Audience>,
        options: FanoutOptions,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let tasks = TaskTracker::new();
        let events =
            Standing::new(Arc::clone(&ledger), Topic::Event, &metrics::FANOUT_WATCHED, tasks.clone(), stop.clone());
        let users =
            Standing::new(Arc::clone(&ledger), Topic::User, &metrics::FANOUT_LISTENING, tasks.clone(), stop.clone());
        let feed = ledger.feed();
        let shared = Arc::new(Shared {
            ledger,
            stock,
            options,
            events,
            users,
            touched: Mutex::default(),
            touch: Notify::new(),
            readings: Mutex::default(),
            reading: Notify::new(),
            oversold: Mutex::default(),
        });
        tasks.spawn(pump::run(Arc::clone(&shared), audience, feed, stop.clone()));
        tasks.spawn(heal::run(Arc::clone(&shared), stop));
        Arc::new(Self { shared })
    }

    /// Counts a watcher of an event and returns when its notices arrive, so that a reading made afterwards misses
    /// nothing. On an error the watcher is not counted.
    ///
    /// A joiner sees versions in order if these steps are taken: `watch`; read the availability; [`Fanout::observe`] it;
    /// send it to the socket; let the socket into the room; `observe` it once more, because an update between the first
    /// `observe` and the room is the joiner's too.
    ///
    /// # Errors
    /// When the ledger cannot subscribe.
    pub async fn watch(&self, event: EventId) -> Result<(), LedgerError> {
        let shared = &self.shared;
        let room = || {
            shared.stock.watch(event);
            shared.read_within(event, shared.options.heal_every);
            Room {
                board: Mutex::new(Board::new(shared.options.tick)),
                _kept_fresh: KeptFresh { stock: Arc::clone(&shared.stock), event },
            }
        };
        shared.events.add(event, room).await
    }

    /// Counts a watcher off. The last one ends the subscription.
    pub fn unwatch(&self, event: EventId) {
        self.shared.events.remove(event);
    }

    /// Counts a listener of a user and returns when the user's messages arrive. On an error it is not counted.
    ///
    /// # Errors
    /// When the ledger cannot subscribe.
    pub async fn listen(&self, user: UserId) -> Result<(), LedgerError> {
        self.shared.users.add(user, || ()).await
    }

    /// Counts a listener off. The last one ends the subscription.
    pub fn unlisten(&self, user: UserId) {
        self.shared.users.remove(user);
    }

    /// Notes a reading that somebody in the room is given: nothing older is emitted after this returns. If others may
    /// have something older, or the room was told something newer meanwhile, the newest goes to the room with the next
    /// tick. Readings of events that nobody watches are ignored.
    pub fn observe(&self, read: &[Availability]) {
        let shared = &self.shared;
        for group in read.chunk_by(|one, other| one.event == other.event) {
            let event = group[0].event;
            if let Some(slot) = shared.events.find(event)
                && lock(&slot.value.board).observe(group)
            {
                shared.touch(event);
            }
        }
    }
}

impl Shared {
    /// The event's board has something to emit.
    fn touch(&self, event: EventId) {
        lock(&self.touched).insert(event);
        self.touch.notify_one();
    }

    /// The event is to be read again at a random time within `spread`, or sooner if that was planned.
    fn read_within(&self, event: EventId, spread: Duration) {
        lock(&self.readings).plan(event, Instant::now() + part_of(spread));
        self.reading.notify_one();
    }
}
