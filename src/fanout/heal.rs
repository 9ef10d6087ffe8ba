//! The healer: reads every watched event again, now and then and whenever notices may have been missed.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::{Shared, lock, part_of};
use crate::domain::{Availability, EventId};
use crate::inventory::StockError;
use crate::metrics;

/// Readings open at once.
const READINGS_MAX: usize = 16;
/// A failed reading is repeated after this time and before twice this time.
const RETRY: Duration = Duration::from_millis(400);
/// The healer looks for changed counts, not for fresh stock: a snapshot of any age will do.
const ANY_AGE: Duration = Duration::from_hours(24);

/// Reads what is due, until `stop`; then waits for what is being read.
pub(super) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let mut open = JoinSet::new();
    loop {
        let next = shared.start_readings(&mut open);
        tokio::select! {
            () = stop.cancelled() => break,
            () = shared.reading.notified() => {}
            Some(_) = open.join_next() => {}
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
        }
    }
    // The ledger's calls end by themselves and are not to be dropped half-way.
    while open.join_next().await.is_some() {}
}

impl Shared {
    /// Starts the readings that are due. When the next one is, unless as many as allowed are open.
    fn start_readings(self: &Arc<Self>, open: &mut JoinSet<()>) -> Option<Instant> {
        let now = Instant::now();
        while open.len() < READINGS_MAX {
            // The mutex is not held while the subscriptions are looked at: they plan readings under their own.
            let due = lock(&self.readings).take(now);
            let Some(event) = due else { return lock(&self.readings).next() };
            if self.events.find(event).is_some() {
                lock(&self.readings).plan(event, now + self.options.heal_every);
                open.spawn(Arc::clone(self).reread(event));
            }
        }
        None
    }

    async fn reread(self: Arc<Self>, event: EventId) {
        match self.read(event).await {
            Ok(read) => {
                let Some(slot) = self.events.find(event) else { return };
                self.weigh(event, &read);
                let healed = lock(&slot.value.board).heal(&read);
                if healed > 0 {
                    metrics::FANOUT_HEALED.add(&[], healed);
                    self.touch(event);
                }
            }
            // The event is read again anyway; until then there is nothing to tell.
            Err(StockError::EventNotFound) => {}
            Err(error) => {
                metrics::FANOUT_READ_ERRORS.count(&[]);
                tracing::debug!(%event, %error, "a watched event could not be read");
                lock(&self.readings).plan(event, Instant::now() + RETRY + part_of(RETRY));
                self.reading.notify_one();
            }
        }
    }

    /// Notes of how many categories of an event more tickets are in hands than exist.
    fn weigh(&self, event: EventId, read: &[Availability]) {
        let mut oversold = lock(&self.oversold);
        oversold.retain(|&other, _| other != event && self.events.find(other).is_some());
        // Of a category that the events-service no longer names nobody knows how many tickets it had: the locks that it
        // has were granted when it was known.
        let named = read.iter().filter(|counts| counts.open || counts.total > 0);
        let here = named.filter(|counts| counts.locked() > counts.total).count();
        if here > 0 {
            tracing::error!(%event, categories = here, "more tickets are active and settling than exist");
            oversold.insert(event, here);
        }
        let all: usize = oversold.values().sum();
        metrics::FANOUT_OVERSOLD.set(&[], u32::try_from(all).map_or(f64::MAX, f64::from));
    }

    /// The counts as the ledger has them. When it has none (its data was lost), as the source of stock gives them.
    async fn read(&self, event: EventId) -> Result<Vec<Availability>, StockError> {
        match self.ledger.availability(event, ANY_AGE).await? {
            Some(read) => Ok(read),
            None => self.stock.availability(event).await,
        }
    }
}
