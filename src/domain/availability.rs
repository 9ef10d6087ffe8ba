//! What a buyer is told about a category.

use super::{CategoryId, EventId, Instant};

/// The counts of one category at one version, exactly as the ledger has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Availability {
    /// The event.
    pub event: EventId,
    /// The category.
    pub category: CategoryId,
    /// All tickets of the category, sold ones included, as the events-service says.
    pub total: u64,
    /// Unsold tickets in the last accepted snapshot.
    pub stock: u64,
    /// Tickets in active locks.
    pub active: u64,
    /// Tickets in confirmed locks whose sale the snapshot does not show yet.
    pub settling: u64,
    /// False when the event or the category is closed for sale.
    pub open: bool,
    /// Rises with every change of the category and never falls.
    pub version: u64,
    /// The ledger's time of this reading.
    pub at: Instant,
}

/// What `availableTickets` means in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Something can be locked now.
    Available,
    /// Nothing is free, but something is locked and may come back.
    TemporarilyUnavailable,
    /// Nothing is free and nothing is locked.
    SoldOut,
}

impl Status {
    /// The word used on every wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Available => "available",
            Self::TemporarilyUnavailable => "temporarily-unavailable",
            Self::SoldOut => "sold-out",
        }
    }
}

impl Availability {
    /// What a user could lock now: the law of conservation. Zero when closed.
    #[must_use]
    pub const fn available(&self) -> u64 {
        if self.open { self.stock.saturating_sub(self.locked()) } else { 0 }
    }

    /// Active and confirmed-but-unsettled tickets together.
    #[must_use]
    pub const fn locked(&self) -> u64 {
        self.active.saturating_add(self.settling)
    }

    /// The word for it.
    #[must_use]
    pub const fn status(&self) -> Status {
        if self.available() > 0 {
            Status::Available
        } else if self.locked() > 0 {
            Status::TemporarilyUnavailable
        } else {
            Status::SoldOut
        }
    }
}
