//! What can break between the service and its ledger. Refusals are outcomes, never errors.

use std::time::Duration;

/// Why the ledger gave no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LedgerError {
    /// No answer in time: whether anything changed is unknown.
    #[error("no answer from Redis within {0:?}")]
    Timeout(Duration),
    /// The connection is down, broke, or leads to a server that is not the one to ask now (a replica, one that still
    /// loads, a part of a broken cluster): whether anything changed is unknown.
    #[error("Redis cannot be reached: {0}")]
    Disconnected(String),
    /// Redis answered with an error of its own (out of memory, no permission).
    #[error("Redis refused {script}: {message}")]
    Refused {
        /// What was being done.
        script: &'static str,
        /// Redis' own words.
        message: String,
    },
    /// Fewer Redis replicas than asked for had the grant in time; it was undone.
    #[error("only {got} of {wanted} Redis replicas had the lock within {within:?}; it was undone")]
    NotReplicated {
        /// How many should have it.
        wanted: u32,
        /// How many said so.
        got: u32,
        /// How long they had.
        within: Duration,
    },
    /// Redis has just come back, perhaps without its data: those who had locks come first. Nothing changed.
    #[error("Redis has just come back; locks are being restored")]
    Restoring,
    /// Redis answered something that the script never says: a foreign script, a foreign key or a defect.
    #[error("{script} answered {reply}, which it never does")]
    Protocol {
        /// What was being done.
        script: &'static str,
        /// The beginning of the answer.
        reply: String,
    },
}

/// The closed set of kinds, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// [`LedgerError::Timeout`].
    Timeout,
    /// [`LedgerError::Disconnected`].
    Disconnected,
    /// [`LedgerError::Refused`].
    Refused,
    /// [`LedgerError::NotReplicated`].
    NotReplicated,
    /// [`LedgerError::Restoring`].
    Restoring,
    /// [`LedgerError::Protocol`].
    Protocol,
}

impl ErrorKind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Timeout, Self::Disconnected, Self::Refused, Self::NotReplicated, Self::Restoring, Self::Protocol];

    /// The metric label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Disconnected => "disconnected",
            Self::Refused => "refused",
            Self::NotReplicated => "not_replicated",
            Self::Restoring => "restoring",
            Self::Protocol => "protocol",
        }
    }
}

impl LedgerError {
    /// Which kind it is.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Timeout(_) => ErrorKind::Timeout,
            Self::Disconnected(_) => ErrorKind::Disconnected,
            Self::Refused { .. } => ErrorKind::Refused,
            Self::NotReplicated { .. } => ErrorKind::NotReplicated,
            Self::Restoring => ErrorKind::Restoring,
            Self::Protocol { .. } => ErrorKind::Protocol,
        }
    }

    /// Whether asking again, unchanged, can help. Repeating is safe for every kind.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        match self {
            Self::Timeout(_)
            | Self::Disconnected(_)
            | Self::Refused { .. }
            | Self::NotReplicated { .. }
            | Self::Restoring => true,
            Self::Protocol { .. } => false,
        }
    }
}
