//! What is asked of the ledger and what it may answer. Refusals are outcomes, not errors.

use std::time::Duration;

use super::{
    CategoryId, EventId, Instant, Lock, LockId, OrderId, Quantity, ReleaseReason, ReplicaId, RequestId, SessionId,
    UserId,
};

/// A request to lock tickets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockRequest {
    /// The id that the lock gets if granted; it names the event.
    pub lock: LockId,
    /// Who asks.
    pub user: UserId,
    /// The class of tickets.
    pub category: CategoryId,
    /// How many.
    pub quantity: Quantity,
    /// The client's name for this attempt. The same id from the same user answers with the same lock.
    pub request: Option<RequestId>,
    /// The session that asks, where there is one.
    pub session: Option<SessionId>,
    /// The user's presence generation at that session's start: an abandonment older than it does not touch the lock.
    pub generation: u64,
    /// From grant to deadline.
    pub ttl: Duration,
    /// The oldest stock snapshot that may decide.
    pub stock_age_max: Duration,
    /// Tickets that a user may hold and have confirmed in one event, together. At least one.
    pub per_event_max: Option<u32>,
    /// How often a user may try in one event.
    pub rate: Option<RateLimit>,
}

impl LockRequest {
    /// The event asked about.
    #[must_use]
    pub const fn event(&self) -> EventId {
        self.lock.event()
    }
}

/// How a lock stood when a replica last heard of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// Held by its owner.
    Attended,
    /// Pinned for an order.
    Pinned,
    /// A sale.
    Confirmed {
        /// The order that confirmed it, where it was said.
        order: Option<OrderId>,
    },
}

/// A lock as a replica remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memento {
    /// Which lock; names its event.
    pub lock: LockId,
    /// The class of tickets.
    pub category: CategoryId,
    /// How many.
    pub quantity: Quantity,
    /// When it was granted.
    pub created_at: Instant,
    /// Its deadline.
    pub deadline: Instant,
    /// How it stood.
    pub kept: Kept,
    /// The client's name for the request that it was granted to, where that is known.
    pub request: Option<RequestId>,
    /// The session that asked for it, where that is known.
    pub session: Option<SessionId>,
}

/// A remembered lock, for a ledger that may have lost it with its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreRequest {
    /// Whose.
    pub user: UserId,
    /// What is remembered.
    pub memento: Memento,
    /// The user's presence generation now.
    pub generation: u64,
    /// The oldest stock snapshot that may decide.
    pub stock_age_max: Duration,
}

/// The answer to [`RestoreRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestoreOutcome {
    /// It is there again, under a new and higher fencing token.
    Restored,
    /// It was never lost, or the ledger knows how it ended.
    Known,
    /// Its deadline has passed.
    Expired,
    /// Its tickets, or its place, are somebody else's by now.
    NoRoom,
    /// No snapshot of the event's stock is young enough; fetch one and ask again.
    StockUnknown,
}

impl RestoreOutcome {
    /// The metric label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Restored => "restored",
            Self::Known => "known",
            Self::Expired => "expired",
            Self::NoRoom => "no_room",
            Self::StockUnknown => "stock_unknown",
        }
    }
}

/// A rate: on average one per `interval`, `burst` at once (GCRA, the generic cell rate algorithm).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    /// Between two at the steady rate. At least one microsecond.
    pub interval: Duration,
    /// How many may come at once. At least one.
    pub burst: u32,
}

/// A granted lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Which lock.
    pub lock: LockId,
    /// Until when it stands if nothing else happens.
    pub deadline: Instant,
    /// What others can still lock.
    pub available: u64,
    /// The fencing token: the category's version at the grant.
    pub version: u64,
    /// The ledger's time of the answer.
    pub now: Instant,
}

/// The answer to [`LockRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LockOutcome {
    /// The tickets are the user's until the deadline.
    Granted(Grant),
    /// This request was granted before and its lock is active: the same lock.
    GrantedBefore(Grant),
    /// This request was granted before and its lock has ended.
    RequestEnded {
        /// The lock it was.
        lock: LockId,
    },
    /// This request id was used for another category or quantity.
    RequestMismatch,
    /// No snapshot of the event's stock is young enough; fetch one and ask again.
    StockUnknown,
    /// The event or the category is closed for sale.
    Closed,
    /// The event has no such category.
    CategoryNotFound,
    /// The user has an active lock in this category.
    AlreadyLocked {
        /// Which.
        lock: LockId,
    },
    /// The user would hold more of this event than allowed.
    LimitExceeded {
        /// Held and confirmed now.
        held: u64,
    },
    /// Too many tries.
    RateLimited {
        /// When the next try is allowed.
        retry_after: Duration,
    },
    /// Fewer are free than asked for; some are locked and may come back, or fewer are left than asked for.
    Insufficient {
        /// What could be locked now.
        available: u64,
    },
    /// Nothing is free and nothing is locked.
    SoldOut,
}

impl LockOutcome {
    /// The metric label.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Granted(_) => "granted",
            Self::GrantedBefore(_) => "granted_before",
            Self::RequestEnded { .. } => "request_ended",
            Self::RequestMismatch => "request_mismatch",
            Self::StockUnknown => "stock_unknown",
            Self::Closed => "closed",
            Self::CategoryNotFound => "category_not_found",
            Self::AlreadyLocked { .. } => "already_locked",
            Self::LimitExceeded { .. } => "limit_exceeded",
            Self::RateLimited { .. } => "rate_limited",
            Self::Insufficient { .. } => "insufficient",
            Self::SoldOut => "sold_out",
        }
    }
}

/// The orders-service asks whether a user holds what an order needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ValidateRequest {
    /// Which event.
    pub event: EventId,
    /// Which category.
    pub category: CategoryId,
    /// Whose lock.
    pub user: UserId,
    /// At least how many tickets it must hold.
    pub quantity: Quantity,
    /// The lock lives at least so long from now if valid.
    pub window: Duration,
}

/// The answer to [`ValidateRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValidateOutcome {
    /// Held, and pinned: no disconnect ends it any more.
    Valid {
        /// The lock.
        lock: LockId,
        /// Its deadline, at least the checkout window from now.
        deadline: Instant,
    },
    /// No lock of that user and category, or one of fewer tickets.
    NotFound,
    /// There was one; its deadline has passed.
    Expired,
}

impl ValidateOutcome {
    /// The metric label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Valid { .. } => "valid",
            Self::NotFound => "not_found",
            Self::Expired => "expired",
        }
    }
}

/// The answer to a confirm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfirmOutcome {
    /// The lock is a sale now.
    Confirmed,
    /// It was confirmed before, for the same order as far as both said one.
    AlreadyConfirmed,
    /// It was confirmed for another order.
    OtherOrder,
    /// It is another user's.
    WrongUser,
    /// Its deadline has passed.
    Expired,
    /// It was given back.
    Released,
    /// Never existed, or ended longer ago than tombstones live.
    NotFound,
}

impl ConfirmOutcome {
    /// The metric label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Confirmed => "confirmed",
            Self::AlreadyConfirmed => "already_confirmed",
            Self::OtherOrder => "other_order",
            Self::WrongUser => "wrong_user",
            Self::Expired => "expired",
            Self::Released => "released",
            Self::NotFound => "not_found",
        }
    }
}

/// Who gives a lock back. They have different rights, and a repeat is told apart from somebody else's release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Releaser {
    /// The owner, over a socket: ends active locks only.
    Owner {
        /// The owner, checked.
        user: UserId,
        /// The socket that asked; the owner's other sockets are told.
        session: Option<SessionId>,
    },
    /// The orders-service: also ends a confirmed lock whose sale was not reported.
    Orders {
        /// Checked when given.
        user: Option<UserId>,
    },
}

/// The answer to a release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReleaseOutcome {
    /// Given back now.
    Released(Lock),
    /// Given back before by the same kind of releaser: a repeat.
    AlreadyReleased(Lock),
    /// Given back before by the other kind of releaser.
    ReleasedByOther,
    /// A sale that this releaser cannot undo.
    Confirmed,
    /// It is another user's.
    WrongUser,
    /// Its deadline has passed.
    Expired,
    /// Never existed, or ended longer ago than tombstones live.
    NotFound,
}

impl ReleaseOutcome {
    /// The metric label.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Released(_) => "released",
            Self::AlreadyReleased(_) => "already_released",
            Self::ReleasedByOther => "released_by_other",
            Self::Confirmed => "confirmed",
            Self::WrongUser => "wrong_user",
            Self::Expired => "expired",
            Self::NotFound => "not_found",
        }
    }
}

/// One category in a stock snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CategoryStock {
    /// Which.
    pub category: CategoryId,
    /// All tickets, sold ones included.
    pub total: u64,
    /// Unsold ones.
    pub stock: u64,
    /// False when the category is closed for sale.
    pub open: bool,
}

/// What the events-service said about one event. Holds at most [`Snapshot::CATEGORIES_MAX`] categories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// False when the whole event is closed for sale.
    pub open: bool,
    /// Its categories, each once.
    pub categories: Vec<CategoryStock>,
}

impl Snapshot {
    /// More categories than any venue has; more than that in an answer is refused as garbage.
    pub const CATEGORIES_MAX: usize = 500;
}

/// The number drawn before the events-service was asked: a later question has a higher number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotNumber(pub u64);

/// The answer to "may I ask the events-service?".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AskOutcome {
    /// Ask, and hand the answer in under this number.
    Ask(SnapshotNumber),
    /// A snapshot younger than the wanted age is stored, and nothing waits for a newer one.
    Fresh,
}

/// The answer to a snapshot handed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AcceptOutcome {
    /// Stored.
    Accepted,
    /// An answer to a later question is stored already; this one changed nothing.
    Older,
}

/// `order-completed` or `order-cancelled`, as the orders-service reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderReport {
    /// The order.
    pub order: OrderId,
    /// Which event.
    pub event: EventId,
    /// Which category.
    pub category: CategoryId,
    /// How many tickets the order has.
    pub quantity: Quantity,
    /// Who bought.
    pub user: UserId,
    /// The lock it used, where the orders-service says so.
    pub lock: Option<LockId>,
    /// What became of it.
    pub result: OrderResult,
}

/// What became of an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OrderResult {
    /// Sold: the events-service's stock shows it from now on.
    Completed,
    /// Not sold, or sold and undone.
    Cancelled,
}

impl OrderResult {
    /// The metric label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// The answer to an [`OrderReport`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrderOutcome {
    /// Counted; ask the events-service for its stock now.
    Noted,
    /// Told before with the same result: nothing changed.
    Repeated,
    /// A cancelled order was reported complete afterwards (reordered messages): nothing changed.
    AfterCancel,
}

impl OrderOutcome {
    /// The metric label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Noted => "noted",
            Self::Repeated => "repeated",
            Self::AfterCancel => "after_cancel",
        }
    }
}

/// A message for every socket of one user, wherever they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Personal {
    /// A lock's deadline passed.
    Expired {
        /// Which lock.
        lock: LockId,
        /// Its category.
        category: CategoryId,
        /// How many tickets it held.
        quantity: Quantity,
    },
    /// A lock's deadline is near.
    Expiring {
        /// Which lock.
        lock: LockId,
        /// Its deadline.
        deadline: Instant,
        /// What is left of it, by the ledger's clock.
        remaining: Duration,
    },
    /// A lock was given back.
    Released {
        /// Which lock.
        lock: LockId,
        /// Its category.
        category: CategoryId,
        /// How many tickets it held.
        quantity: Quantity,
        /// Why.
        reason: ReleaseReason,
        /// The session that did it and has its own answer.
        by: Option<SessionId>,
    },
    /// A lock was pinned for an order. For replicas, which remember it; clients are not told.
    Pinned {
        /// Which lock.
        lock: LockId,
        /// Its deadline now.
        deadline: Instant,
    },
    /// A lock became a sale. For replicas, which remember it; clients are not told.
    Confirmed {
        /// Which lock.
        lock: LockId,
        /// The order that did it, where it was said.
        order: Option<OrderId>,
    },
    /// An order of the user was completed or cancelled.
    Order {
        /// What became of it.
        result: OrderResult,
        /// The order.
        order: OrderId,
        /// True when the orders-service writes its order ids as numbers.
        order_is_number: bool,
        /// Its event.
        event: EventId,
        /// Its category.
        category: CategoryId,
        /// Its number of tickets.
        quantity: Quantity,
    },
}

/// What one replica tells the fleet about itself, every second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplicaReport {
    /// Who.
    pub replica: ReplicaId,
    /// Users with at least one socket here.
    pub users: u64,
    /// Open sockets here.
    pub sockets: u64,
}

/// Counts over the whole fleet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FleetStats {
    /// Replicas whose lease is alive.
    pub replicas: u64,
    /// Sum of users over them (a user on two replicas counts twice).
    pub users: u64,
    /// Sum of sockets over them.
    pub sockets: u64,
    /// Active locks.
    pub active: u64,
    /// Locks that ended by expiry, over the events whose keys still live.
    pub expired: u64,
    /// Locks that were confirmed and not undone, over the same events.
    pub confirmed: u64,
    /// Locks that were given back, over the same events.
    pub released: u64,
    /// Users with at least one active lock.
    pub users_with_locks: u64,
    /// Categories with at least one active lock.
    pub categories_with_locks: u64,
}

impl FleetStats {
    /// Adds one event's counts. (A user with locks in two events counts twice.)
    pub const fn add(&mut self, event: super::BookStats) {
        self.active += event.active;
        self.expired += event.expired;
        self.confirmed += event.confirmed;
        self.released += event.released;
        self.users_with_locks += event.users;
        self.categories_with_locks += event.categories;
    }
}
