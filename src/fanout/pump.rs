//! The task between the ledger's feed and the audience. It alone tells rooms, and it never waits for the ledger.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::tick::Pulse;
use super::{Audience, News, Shared, Telling, lock};
use crate::domain::EventId;
use crate::ledger::{FeedItem, Notice};
use crate::metrics;

/// Notices taken at once before rooms have their turn.
const BATCH_LEN: usize = 256;
/// After a gap in the feed every watched event is read within this time: soon, but not all in one instant.
const RESYNC_SPREAD: Duration = Duration::from_millis(500);

/// Takes notices and tells rooms, until `stop`.
pub(super) async fn run(
    shared: Arc<Shared>,
    audience: Arc<dyn Audience>,
    feed: Option<mpsc::Receiver<FeedItem>>,
    stop: CancellationToken,
) {
    let feed = feed.unwrap_or_else(|| {
        tracing::error!("the ledger's feed was taken before: rooms are told only what the healer finds");
        mpsc::channel(1).1
    });
    let mut pump = Pump { shared, audience, feed, pulse: Pulse::default(), open: true };
    while !stop.is_cancelled() {
        pump.wait(&stop).await;
        pump.plan_touched();
        pump.round().await;
    }
}

struct Pump {
    shared: Arc<Shared>,
    audience: Arc<dyn Audience>,
    feed: mpsc::Receiver<FeedItem>,
    pulse: Pulse,
    /// False when the feed has ended; the healer goes on.
    open: bool,
}

impl Pump {
    /// Until something is to be done. Takes a batch of notices.
    async fn wait(&mut self, stop: &CancellationToken) {
        let next = self.pulse.next();
        tokio::select! {
            () = stop.cancelled() => {}
            item = self.feed.recv(), if self.open => match item {
                Some(item) => {
                    self.take(item);
                    self.drain();
                }
                None => self.open = false,
            },
            () = self.shared.touch.notified() => {}
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
        }
    }

    /// Takes what waits in the feed, up to a batch.
    fn drain(&mut self) {
        for _ in 0..BATCH_LEN {
            let Ok(item) = self.feed.try_recv() else { return };
            self.take(item);
        }
    }

    fn take(&mut self, item: FeedItem) {
        match item {
            FeedItem::Changed(notice) => self.changed(&notice),
            FeedItem::Personal(user, message) => {
                metrics::FANOUT_PERSONAL.count(&[]);
                self.audience.personal(user, &message);
            }
            FeedItem::Resync => {
                let events = self.shared.events.keys();
                metrics::FANOUT_RESYNCS.count(&[]);
                tracing::info!(events = events.len(), "notices may have been missed: reading what is watched");
                for event in events {
                    self.shared.read_within(event, RESYNC_SPREAD);
                }
                self.audience.missed();
            }
        }
    }

    fn changed(&mut self, notice: &Notice) {
        let event = notice.availability.event;
        let Some(slot) = self.shared.events.find(event) else {
            metrics::FANOUT_NOTICES.count(&["unwatched"]);
            return;
        };
        let mut board = lock(&slot.value.board);
        if board.take(notice) {
            metrics::FANOUT_NOTICES.count(&["news"]);
            self.pulse.plan(event, board.ready_at(Instant::now()));
        } else {
            metrics::FANOUT_NOTICES.count(&["stale"]);
        }
    }

    /// Plans the rooms that readings gave something to tell.
    fn plan_touched(&mut self) {
        let touched = std::mem::take(&mut *lock(&self.shared.touched));
        for event in touched {
            if let Some(slot) = self.shared.events.find(event) {
                let at = lock(&slot.value.board).ready_at(Instant::now());
                self.pulse.plan(event, at);
            }
        }
    }

    /// Tells every room that is due. Between two portions of a room others have their turn, personal messages first.
    async fn round(&mut self) {
        let now = Instant::now();
        let strained = self.pulse.strained();
        let mut took = Duration::ZERO;
        let mut rooms = 0_u64;
        while let Some(event) = self.pulse.take(now) {
            let mut begun = std::time::Instant::now();
            if let Some(mut telling) = self.gather(event, now, strained) {
                while telling.go_on() {
                    took += begun.elapsed();
                    self.drain();
                    yield_now().await;
                    begun = std::time::Instant::now();
                }
            }
            took += begun.elapsed();
            rooms += 1;
            self.drain();
            yield_now().await;
        }
        if rooms > 0 {
            metrics::FANOUT_ROUND_SECONDS.observe(&[], took);
            self.pulse.rest(Instant::now(), took);
        }
    }

    fn gather(&self, event: EventId, now: Instant, strained: bool) -> Option<Box<dyn Telling>> {
        let slot = self.shared.events.find(event)?;
        // Held until it is known who is told: see `Room::board`.
        let mut board = lock(&slot.value.board);
        let emission = board.emit(now, strained);
        if emission.shed > 0 {
            metrics::FANOUT_SHED.add(&[], emission.shed);
        }
        if emission.changed.is_empty() && emission.summaries.is_empty() {
            return None;
        }
        metrics::FANOUT_UPDATES.add(&[], emission.changed.len() as u64);
        self.audience.gather(News { event, changed: emission.changed, summaries: emission.summaries })
    }
}
