//! The lock: the record that keeps tickets for a user until its deadline.

use std::time::Duration;

use super::{CategoryId, EventId, LockId, OrderId, Quantity, SessionId, UserId};

/// A reading of the ledger's clock, milliseconds since 1970-01-01 UTC.
///
/// The ledger's clock is `TIME` of the Redis server (or, embedded, this process's own). No other clock decides anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// From milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub const fn from_ms(ms: u64) -> Self {
        Self(ms)
    }

    /// Milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub const fn as_ms(self) -> u64 {
        self.0
    }
}

/// How a lock stands. From `Active` it goes to exactly one of the others, once. (A `Confirmed` lock whose order failed
/// before it was reported complete may still become `Released`; its tickets then return.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LockStatus {
    /// Counts as active until its deadline.
    Active,
    /// A sale: counts as settling until a stock snapshot shows it.
    Confirmed,
    /// Given back by its owner or by the orders-service.
    Released,
    /// Its deadline passed, or its owner's grace did.
    Expired,
}

impl LockStatus {
    /// The word used on every wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Confirmed => "confirmed",
            Self::Released => "released",
            Self::Expired => "expired",
        }
    }
}

/// Why tickets came back, as the room is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ReleaseReason {
    /// The owner or the orders-service gave them back.
    Released,
    /// The lock's deadline passed.
    Expired,
    /// The owner had disconnected and the grace passed.
    Abandoned,
    /// A completed order was cancelled.
    Cancelled,
}

impl ReleaseReason {
    /// The word used on every wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Released => "released",
            Self::Expired => "expired",
            Self::Abandoned => "abandoned",
            Self::Cancelled => "cancelled",
        }
    }
}

/// How a lock stopped being active. It does so once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EndReason {
    /// It became a sale.
    Confirmed,
    /// The owner or the orders-service gave it back.
    Released,
    /// Its deadline passed.
    Expired,
    /// The owner had disconnected and the grace passed.
    Abandoned,
}

impl EndReason {
    /// The metric label, and the scripts' word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Confirmed => "confirmed",
            Self::Released => "released",
            Self::Expired => "expired",
            Self::Abandoned => "abandoned",
        }
    }
}

/// The end of an active lock, for the statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// How.
    pub reason: EndReason,
    /// For how long it was active; of one that reached its deadline, until that.
    pub held: Duration,
    /// How long after its deadline it was ended; `None` where it did not reach it.
    pub late: Option<Duration>,
}

/// A lock as the ledger knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lock {
    /// Its id, which also names its event.
    pub id: LockId,
    /// Whose tickets these are.
    pub user: UserId,
    /// The class of tickets.
    pub category: CategoryId,
    /// How many.
    pub quantity: Quantity,
    /// When it was granted.
    pub created_at: Instant,
    /// Its deadline while active; afterwards the last deadline it had.
    pub deadline: Instant,
    /// How it stands.
    pub status: LockStatus,
    /// The category's version at the grant: the fencing token. `None` in listings, which do not read it.
    pub version: Option<u64>,
    /// The session that asked for it, where known.
    pub session: Option<SessionId>,
    /// The order that confirmed it, where the orders-service said so.
    pub order: Option<OrderId>,
    /// An order of it is in progress: no disconnect ends it. Read in listings only.
    pub pinned: bool,
}

impl Lock {
    /// The event it belongs to.
    #[must_use]
    pub const fn event(&self) -> EventId {
        self.id.event()
    }
}
