//! The words of the service and the rules between them: pure types and the model of one event.
//!
//! Nothing here is asynchronous, reads a clock, does I/O or is ever serialised. Time is an argument, always the
//! ledger's own ([`Instant`]). The wire formats of the outside world live in the `wire` modules of their transports.

mod availability;
mod book;
mod id;
mod lock;
mod notice;
mod outcome;
mod quantity;

pub use availability::{Availability, Status};
pub use book::{Book, BookStats, BookSweep, CONFIRMED_TOMBSTONE, Now, TOMBSTONE, whole_ms};
pub use id::{CategoryId, EventId, IdError, LockId, OrderId, ReplicaId, RequestId, SessionId, UserId};
pub use lock::{End, EndReason, Instant, Lock, LockStatus, ReleaseReason};
pub use notice::{Announcement, Change, ChangeKind, Notice};
pub use outcome::{
    AcceptOutcome, AskOutcome, CategoryStock, ConfirmOutcome, FleetStats, Grant, Kept, LockOutcome, LockRequest,
    Memento, OrderOutcome, OrderReport, OrderResult, Personal, RateLimit, ReleaseOutcome, Releaser, ReplicaReport,
    RestoreOutcome, RestoreRequest, Snapshot, SnapshotNumber, ValidateOutcome, ValidateRequest,
};
pub use quantity::{Quantity, QuantityError};
