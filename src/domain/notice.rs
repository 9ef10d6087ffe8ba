//! What a transition makes known to others.

use super::{Availability, Personal, Quantity, ReleaseReason, UserId};

/// A category's new counts and what led to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The counts after the change.
    pub availability: Availability,
    /// Lock changes since the version before; empty when only the stock changed.
    pub changes: Vec<Change>,
}

/// One user's tickets moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// What happened.
    pub kind: ChangeKind,
    /// To how many tickets.
    pub quantity: Quantity,
    /// Whose they were; that user is not told.
    pub user: UserId,
}

/// What happened to tickets, as far as others in the room are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChangeKind {
    /// Locked.
    Locked,
    /// Came back.
    Back(ReleaseReason),
}

/// One announcement of a transition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Announcement {
    /// To everyone who watches the event.
    Room(Notice),
    /// To every socket of one user.
    User(UserId, Personal),
}
