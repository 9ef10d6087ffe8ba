//! The task between the ledger's feed and the audience. It alone tells rooms, and it never waits for the ledger.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::sync::CancellationToken;

use super::tick::{Pulse, pause_after};
use super::{Audience, News, Shared, lock};
use crate::domain::{ChangeKind, EventId};
use crate::ledger::{FeedItem, Notice};
use crate::metrics;

/// Notices taken at once before rooms have their turn.
const BATCH_LEN: usize = 256;
/// After a gap in the feed every watched event is read within this time: soon, but not all in one instant.
const RESYNC_SPREAD: Duration = Duration::from_millis(500);
/// Rooms are told for so long before there is a pause, if a round does not end sooner.
const STRETCH_MAX: Duration = Duration::from_millis(100);
/// After so long nothing joins in any more: the round ends, and what was touched meanwhile has its turn.
const ROUND_MAX: Duration = Duration::from_secs(1);

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
        if is_overgrant(notice) {
            metrics::FANOUT_OVERGRANTS.count(&[]);
            tracing::error!(%event, availability = ?notice.availability, "a grant of tickets that were not free");
        }
        let mut board = lock(&slot.value.board);
        if board.take(notice) {
            metrics::FANOUT_NOTICES.count(&["news"]);
            let now = Instant::now();
            board.wait_since(now);
            self.pulse.plan(event, board.ready_at(now));
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

    /// Tells every room that is due. Between two portions of a room others have their turn, personal messages first. What
    /// becomes due of the same room meanwhile joins in.
    async fn round(&mut self) {
        let now = Instant::now();
        let (mut lap, mut took, mut rooms) = (Duration::ZERO, Duration::ZERO, 0_u64);
        while let Some(event) = self.pulse.take(now) {
            let mut room_took = Duration::ZERO;
            let mut laps = 1.0_f64;
            let mut begun = std::time::Instant::now();
            let mut telling = self.emit(event, now, |news| self.audience.gather(news)).flatten();
            loop {
                let goes_on = telling.as_mut().is_some_and(|telling| telling.go_on());
                room_took += begun.elapsed();
                took += begun.elapsed();
                self.drain();
                yield_now().await;
                let Some(telling) = telling.as_mut().filter(|_| goes_on) else { break };
                laps = laps.max(telling.laps());
                if took >= STRETCH_MAX {
                    self.breathe(pause_after(std::mem::take(&mut took))).await;
                }
                begun = std::time::Instant::now();
                if room_took < ROUND_MAX && telling.is_open() {
                    let now = Instant::now();
                    if self.pulse.take_again(event, now) {
                        self.emit(event, now, |news| telling.join_in(news));
                    }
                }
            }
            lap += room_took.div_f64(laps);
            rooms += 1;
        }
        metrics::LEDGER_FEED_LEN.set(&[], u32::try_from(self.feed.len()).map_or(f64::MAX, f64::from));
        if rooms > 0 {
            metrics::FANOUT_ROUND_SECONDS.observe(&[], lap);
            self.pulse.rest(Instant::now(), lap, took);
        }
    }

    /// A pause in the midst of a room, in which notices are taken.
    async fn breathe(&mut self, pause: Duration) {
        let end = Instant::now() + pause;
        while let Ok(Some(item)) = timeout_at(end, self.feed.recv()).await {
            self.take(item);
        }
        sleep_until(end).await;
    }

    /// Hands what is due of the event to `tell`.
    fn emit<T>(&self, event: EventId, now: Instant, tell: impl FnOnce(News) -> T) -> Option<T> {
        let slot = self.shared.events.find(event)?;
        // Held until it is known who is told: see `Room::board`.
        let mut board = lock(&slot.value.board);
        let emission = board.emit(now, self.pulse.strained(now));
        if emission.shed > 0 {
            metrics::FANOUT_SHED.add(&[], emission.shed);
        }
        if emission.changed.is_empty() && emission.summaries.is_empty() {
            return None;
        }
        metrics::FANOUT_LAG.observe(&[], emission.waited);
        metrics::FANOUT_UPDATES.add(&[], emission.changed.len() as u64);
        Some(tell(News { event, changed: emission.changed, summaries: emission.summaries }))
    }
}

/// Whether a grant took what was not free: `active + settling` may exceed a stock that fell, never because of a grant.
fn is_overgrant(notice: &Notice) -> bool {
    let counts = &notice.availability;
    counts.locked() > counts.stock && notice.changes.iter().any(|change| change.kind == ChangeKind::Locked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Availability, CategoryId, Change, Instant as Reading, Quantity, ReleaseReason, UserId};

    #[test]
    fn only_a_grant_beyond_the_stock_is_an_overgrant() {
        let notice = |stock, kind| {
            let (event, category) = (EventId::new(1).unwrap(), CategoryId::new(1).unwrap());
            let (open, version, at) = (true, 1, Reading::from_ms(1));
            let availability =
                Availability { event, category, total: 10, stock, active: 3, settling: 2, open, version, at };
            let (quantity, user) = (Quantity::new(1).unwrap(), UserId::new(1).unwrap());
            Notice { availability, changes: vec![Change { kind, quantity, user }] }
        };
        assert!(is_overgrant(&notice(4, ChangeKind::Locked)));
        assert!(!is_overgrant(&notice(5, ChangeKind::Locked)), "the last ticket");
        assert!(!is_overgrant(&notice(4, ChangeKind::Back(ReleaseReason::Expired))), "the stock fell");
    }
}
