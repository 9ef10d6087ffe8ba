//! The one door to lock state.
//!
//! [`Ledger`] is the contract. [`RedisLedger`] keeps it for a fleet: TTL keys in Redis guarded by one Lua script per
//! transition. [`MemoryLedger`] is the model of [`crate::domain::Book`] behind a mutex: the embedded default for one
//! replica, and the oracle that the other is compared with. No replica holds lock state outside a ledger.

mod call;
mod driver;
mod ends;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod key;
mod lone;
mod memory;
mod notice;
mod recent;
mod redis;
mod reply;
mod script;
mod sweep;

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::domain::{
    AcceptOutcome, AskOutcome, Availability, ConfirmOutcome, EventId, FleetStats, Instant, Lock, LockId, LockOutcome,
    LockRequest, OrderId, OrderOutcome, OrderReport, Personal, ReleaseOutcome, Releaser, ReplicaId, ReplicaReport,
    RestoreOutcome, RestoreRequest, SessionId, Snapshot, SnapshotNumber, UserId, ValidateOutcome, ValidateRequest,
};

pub use self::redis::{RedisClock, RedisLedger, RedisOptions, RedisSettingError};
pub use crate::domain::{Change, ChangeKind, Notice};
pub use error::{ErrorKind, LedgerError};
pub use memory::{Clock, MemoryLedger};
pub use notice::{FeedItem, Topic};
pub use notice::{read_change, read_personal, write_personal};
pub use script::{Arity, Script};
pub use sweep::Sweeper;

/// Intervals that the ledger applies by itself, the same for both implementations.
#[derive(Debug, Clone, Copy)]
pub struct LedgerOptions {
    /// A confirmed lock whose order is not reported leaves `settling` after this, with a fresh snapshot.
    pub settle_timeout: Duration,
    /// How long before its deadline a lock's owner is warned.
    pub expiry_warning: Duration,
}

/// How many items may wait between the ledger and the fan-out. Beyond it the feed is cut and answers with a
/// [`FeedItem::Resync`]: 65,536 notices of about 150 bytes are 10 MiB.
pub const FEED_LEN_MAX: usize = 65_536;

/// How long what a user is told of an order is kept for who is between two connections, and how many such messages: the
/// latest. Nobody is away for longer who still waits, and nobody orders so often.
pub const TOLD_KEPT: Duration = Duration::from_mins(10);
/// See [`TOLD_KEPT`]; `lua/tell.lua` knows it too.
pub const TOLD_LEN_MAX: usize = 16;

/// How long a session may stand open whose client is gone, or whose replica cannot be reached: a missing pong is noticed
/// after 18 s, a lease that ran out after 7.
pub const SILENT_MAX: Duration = Duration::from_secs(20);

/// What one sweep of the due events did and found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Swept {
    /// Locks that were expired.
    pub expired: u64,
    /// Confirmed locks that left for the settle timeout.
    pub timed_out: u64,
    /// Events whose stock should be asked for, because something waits to be settled by a fresh snapshot.
    pub refresh: Vec<EventId>,
    /// Until something is due again, as far as is known now.
    pub next: Option<Duration>,
}

/// A user's presence after a session came or went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presence {
    /// Rises with every coming and going of the user's sessions.
    pub generation: u64,
    /// When, by the ledger's clock.
    pub now: Instant,
    /// The user's active locks, over all events.
    pub locks: Vec<Lock>,
    /// What the user was told of orders and may not have seen, in order.
    pub told: Vec<Told>,
    /// What was told up to then, another session of the user that is open has shown.
    pub seen_until: Instant,
}

/// A message for a user's sockets that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// When it was told last.
    pub at: Instant,
    /// What.
    pub message: Personal,
}

/// Whether what a replica entered into the ledger can still be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Footing {
    /// Nothing speaks against it.
    Firm,
    /// The ledger was out of reach, another replica may have ended our sessions, or data were lost: sessions are to be
    /// entered again, and remembered locks to be restored. All of that is harmless when nothing was lost.
    Doubtful,
}

/// The contract of lock state. Every method answers within the ledger's own timeout; after an error whose
/// [`LedgerError::is_retryable`] holds it is *unknown* whether anything changed, and repeating is safe.
#[async_trait]
pub trait Ledger: Send + Sync + 'static {
    /// Grants tickets, or says why not. One step.
    async fn lock(&self, request: &LockRequest) -> Result<LockOutcome, LedgerError>;

    /// Finds the user's active lock of a category for an order and pins it.
    async fn validate(&self, request: &ValidateRequest) -> Result<ValidateOutcome, LedgerError>;

    /// Writes down again a lock that a replica remembers and that the ledger may have lost.
    async fn restore(&self, request: &RestoreRequest) -> Result<RestoreOutcome, LedgerError>;

    /// Turns an active lock into a sale. `user` and `order` are checked when given.
    async fn confirm(
        &self,
        lock: LockId,
        user: Option<UserId>,
        order: Option<&OrderId>,
    ) -> Result<ConfirmOutcome, LedgerError>;

    /// Ends a lock before its deadline.
    async fn release(&self, lock: LockId, by: Releaser) -> Result<ReleaseOutcome, LedgerError>;

    /// One lock with its final status, `None` if it never existed or ended longer ago than tombstones live.
    async fn find(&self, lock: LockId) -> Result<Option<Lock>, LedgerError>;

    /// The user's active locks in one event.
    async fn locks_in(&self, event: EventId, user: UserId) -> Result<Vec<Lock>, LedgerError>;

    /// The user's active locks over all events.
    async fn locks_of(&self, user: UserId) -> Result<Vec<Lock>, LedgerError>;

    /// The counts of every category of an event, by ascending category id; `None` when no snapshot of it younger than
    /// `age_max` is stored.
    async fn availability(&self, event: EventId, age_max: Duration) -> Result<Option<Vec<Availability>>, LedgerError>;

    /// Draws the number under which the answer of the events-service will be handed in, unless a snapshot younger than
    /// `age_min` is stored. Zero always draws.
    async fn ask(&self, event: EventId, age_min: Duration) -> Result<AskOutcome, LedgerError>;

    /// Stores a snapshot if none with a higher number is stored, and takes out of `settling` what it shows.
    async fn accept(
        &self,
        event: EventId,
        number: SnapshotNumber,
        snapshot: &Snapshot,
    ) -> Result<AcceptOutcome, LedgerError>;

    /// Counts a completed or cancelled order.
    async fn order(&self, report: &OrderReport) -> Result<OrderOutcome, LedgerError>;

    /// A session of the user began, or is still there: the user's abandoned locks are the user's again.
    async fn enter(&self, user: UserId, session: SessionId) -> Result<Presence, LedgerError>;

    /// A session of the user ended. If it was the last, each of the user's unpinned locks lives `grace` more at most.
    async fn leave(&self, user: UserId, session: SessionId, grace: Duration) -> Result<(), LedgerError>;

    /// Tells every socket of a user, on whichever replica. Of orders they learn at their next entry what they missed.
    async fn tell(&self, user: UserId, message: &Personal) -> Result<(), LedgerError>;

    /// Expires what is due, warns owners, times settlements out. Bounded work; call it again while `next` is zero.
    async fn sweep(&self) -> Result<Swept, LedgerError>;

    /// Renews this replica's lease, says how it does, and learns whether what it entered can still be there.
    async fn beat(&self, report: &ReplicaReport) -> Result<Footing, LedgerError>;

    /// Ends the sessions of replicas whose lease ran out, as [`Ledger::leave`] would have. Bounded work, shared by all
    /// replicas that call it; of how many users.
    async fn reap(&self, grace: Duration) -> Result<u64, LedgerError>;

    /// Gives the lease back at the end of a drain. Sessions that have not left by then are reaped.
    async fn farewell(&self, replica: ReplicaId) -> Result<(), LedgerError>;

    /// Counts over the whole fleet.
    async fn stats(&self) -> Result<FleetStats, LedgerError>;

    /// One cheap round trip: can the ledger be reached now?
    async fn ping(&self) -> Result<(), LedgerError>;

    /// Starts to receive a topic's notices through the feed. Idempotent. Returns when the subscription stands, so that
    /// a reading made afterwards misses nothing.
    async fn subscribe(&self, topic: Topic) -> Result<(), LedgerError>;

    /// Stops receiving a topic. Idempotent.
    async fn unsubscribe(&self, topic: Topic) -> Result<(), LedgerError>;

    /// Says which session is the only one of its user on this replica, if one is. It has the answer to what it did itself,
    /// so messages that say the same need not come. A hint: they may.
    fn alone(&self, _user: UserId, _session: Option<SessionId>) {}

    /// The one receiver of everything subscribed, bounded by [`FEED_LEN_MAX`]. `None` after the first call.
    fn feed(&self) -> Option<mpsc::Receiver<FeedItem>>;
}
