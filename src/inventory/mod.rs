//! Where the stock comes from: the events-service or a catalogue, and how its answers reach the ledger.
//!
//! Owns the question "how many tickets are unsold?": whom it is asked of ([`StockSource`]), when, how often and how
//! many at once ([`Stock`]). Knows nothing of sockets, rooms or orders. Holds no stock itself: every answer goes into
//! the ledger under the number drawn before the question, so a late answer never replaces a newer one.

mod catalogue;
mod frame;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod nest;
mod nest_rmq;
mod nest_tcp;
mod refresher;
mod reply;
mod source;
mod wire;

use async_trait::async_trait;

use crate::domain::{EventId, Snapshot};

pub use catalogue::{Catalogue, CatalogueError, ListedCategory, ListedEvent};
pub use frame::{FRAME_BYTES_MAX, Frame, FrameError, Frames};
pub use nest_rmq::NestRmq;
pub use nest_tcp::NestTcp;
pub use refresher::{Stock, StockError, StockOptions};
pub use reply::Reply;
pub use source::{Source, SourceError, SourceErrorKind, SourceOptions, SourceUrl, SourceUrlError, connect};

/// Somebody who knows the unsold tickets of events: the events-service over TCP or RabbitMQ, or a [`Catalogue`].
#[async_trait]
pub trait StockSource: Send + Sync + 'static {
    /// What it says about one event now. Reads only, so the future may be dropped at any time.
    async fn snapshot(&self, event: EventId) -> Result<Snapshot, SourceError>;
}
