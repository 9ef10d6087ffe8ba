//! The auditor: from requests, answers and the times of both it says whether the laws were kept.
//!
//! It knows nothing of how a ledger works: not the model, not the scripts. What an answer does not prove it does not
//! claim: a request without an answer may or may not have happened, and two that overlap may have happened in either
//! order. What the answers do prove, it holds against every other answer.

mod facts;
mod forged;
mod laws;
pub mod outside;

use std::time::Duration;

use seatlock::domain::{
    AcceptOutcome, AskOutcome, Availability, ConfirmOutcome, EventId, Lock, LockId, LockOutcome, LockRequest, OrderId,
    OrderOutcome, OrderReport, ReleaseOutcome, Releaser, Snapshot, SnapshotNumber, UserId, ValidateOutcome,
    ValidateRequest,
};

/// When a request was made and answered. The request took effect, if at all, at one instant between the two.
#[derive(Debug, Clone, Copy)]
pub struct When {
    /// In the order of everything the auditor is told. `u64::MAX` ends a request that may still take effect.
    pub began: u64,
    pub ended: u64,
    /// The ledger's clock, milliseconds, at the earliest and at the latest.
    pub from_ms: u64,
    pub until_ms: u64,
}

impl When {
    /// This was over when the other began.
    pub const fn before(&self, other: &Self) -> bool {
        self.ended < other.began
    }

    /// This may have taken effect before the other did.
    pub const fn maybe_before(&self, other: &Self) -> bool {
        self.began < other.ended
    }
}

/// A request and its answer; `None` when the answer is not known.
#[derive(Debug, Clone)]
pub enum Deed {
    Lock(LockRequest, Option<LockOutcome>),
    Validate(ValidateRequest, Option<ValidateOutcome>),
    Confirm {
        lock: LockId,
        user: Option<UserId>,
        order: Option<OrderId>,
        answer: Option<ConfirmOutcome>,
    },
    Release {
        lock: LockId,
        by: Releaser,
        answer: Option<ReleaseOutcome>,
    },
    /// The user's last session ended, or may have.
    Leave {
        user: UserId,
        grace: Duration,
    },
    Ask {
        event: EventId,
        answer: Option<AskOutcome>,
    },
    Accept {
        event: EventId,
        number: SnapshotNumber,
        snapshot: Snapshot,
        answer: Option<AcceptOutcome>,
    },
    Order(OrderReport, Option<OrderOutcome>),
    Availability(EventId, Vec<Availability>),
    Find(LockId, Option<Lock>),
    Holds {
        event: EventId,
        user: UserId,
        locks: Vec<Lock>,
    },
}

/// Everything that happened, as far as those who asked can know.
pub struct Auditor {
    settle: Duration,
    deeds: Vec<(When, Deed)>,
}

impl Auditor {
    /// `settle`: how long a confirmed lock waits for its order.
    pub const fn new(settle: Duration) -> Self {
        Self { settle, deeds: Vec::new() }
    }

    pub fn note(&mut self, when: When, deed: Deed) {
        self.deeds.push((when, deed));
    }

    /// Every law that the answers prove broken; empty when there is none.
    pub fn complaints(&self) -> Vec<String> {
        let facts = facts::Facts::of(&self.deeds, self.settle);
        let mut complaints = laws::versions(&self.deeds);
        for (when, deed) in &self.deeds {
            for complaint in laws::of(&facts, when, deed) {
                complaints.push(format!("{complaint}: {deed:?} at {when:?}"));
            }
        }
        complaints
    }
}
