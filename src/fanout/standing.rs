//! Standing subscriptions: counted, made by the first who comes, ended by the last who goes.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::lock;
use crate::ledger::{Ledger, LedgerError, Topic};
use crate::metrics::Metric;

/// Pauses between attempts to end a subscription.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// The subscriptions of one sort, with a value of each.
pub(super) struct Standing<K, V> {
    ledger: Arc<dyn Ledger>,
    topic: fn(K) -> Topic,
    gauge: &'static Metric,
    entries: Mutex<HashMap<K, Entry<V>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

struct Entry<V> {
    /// Who wants it. Zero while it is being ended.
    count: usize,
    slot: Arc<Slot<V>>,
}

/// One subscription.
pub(super) struct Slot<V> {
    /// Whether it stands. Held while that changes, so that a subscribe and an unsubscribe never cross.
    stands: tokio::sync::Mutex<bool>,
    pub(super) value: V,
}

impl<K, V> Standing<K, V>
where
    K: Copy + Eq + Hash + Send + Sync + 'static,
    V: Send + Sync + 'static,
{
    pub(super) fn new(
        ledger: Arc<dyn Ledger>,
        topic: fn(K) -> Topic,
        gauge: &'static Metric,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self { ledger, topic, gauge, entries: Mutex::default(), tasks, stop })
    }

    /// Counts one and returns when the subscription stands. The first one's `make` makes the value.
    pub(super) async fn add(self: &Arc<Self>, key: K, make: impl FnOnce() -> V) -> Result<(), LedgerError> {
        let slot = {
            let mut entries = lock(&self.entries);
            let entry = entries.entry(key).or_insert_with(|| Entry {
                count: 0,
                slot: Arc::new(Slot { stands: tokio::sync::Mutex::new(false), value: make() }),
            });
            entry.count += 1;
            let slot = Arc::clone(&entry.slot);
            self.show(entries.len());
            slot
        };
        let mut counted = Counted { standing: self, key, kept: false };
        let mut stands = slot.stands.lock().await;
        if !*stands {
            self.ledger.subscribe((self.topic)(key)).await?;
            *stands = true;
        }
        counted.kept = true;
        Ok(())
    }

    /// Counts one off; the last one ends the subscription in the background.
    pub(super) fn remove(self: &Arc<Self>, key: K) {
        let mut entries = lock(&self.entries);
        if let Some(entry) = entries.get_mut(&key)
            && entry.count > 0
        {
            entry.count -= 1;
            if entry.count == 0 {
                self.tasks.spawn(Arc::clone(self).end(key));
            }
        }
    }

    /// The subscription of a key that somebody wants.
    pub(super) fn find(&self, key: K) -> Option<Arc<Slot<V>>> {
        lock(&self.entries).get(&key).filter(|entry| entry.count > 0).map(|entry| Arc::clone(&entry.slot))
    }

    /// All keys that somebody wants.
    pub(super) fn keys(&self) -> Vec<K> {
        lock(&self.entries).iter().filter(|(_, entry)| entry.count > 0).map(|(&key, _)| key).collect()
    }

    /// The slot of a key that nobody wants any more.
    fn unwanted(&self, key: K) -> Option<Arc<Slot<V>>> {
        lock(&self.entries).get(&key).filter(|entry| entry.count == 0).map(|entry| Arc::clone(&entry.slot))
    }

    /// Unsubscribes, unless somebody comes back. Tries until it succeeds: a forgotten subscription costs for ever.
    async fn end(self: Arc<Self>, key: K) {
        let mut pause = BACKOFF.0;
        while let Some(slot) = self.unwanted(key) {
            let mut stands = slot.stands.lock().await;
            if self.unwanted(key).is_none() {
                return;
            }
            // After an error too: whether it stands is unknown then, and subscribing twice does no harm.
            *stands = false;
            if self.ledger.unsubscribe((self.topic)(key)).await.is_ok() {
                let mut entries = lock(&self.entries);
                if let MapEntry::Occupied(entry) = entries.entry(key)
                    && entry.get().count == 0
                {
                    entry.remove();
                }
                self.show(entries.len());
                return;
            }
            drop(stands);
            tokio::select! {
                () = sleep(pause) => pause = (pause * 2).min(BACKOFF.1),
                () = self.stop.cancelled() => return,
            }
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a count of topics is far below 2^52")]
    fn show(&self, len: usize) {
        self.gauge.set(&[], len as f64);
    }
}

/// Counts off what did not come to stand, also when the caller gave up waiting.
struct Counted<'a, K, V>
where
    K: Copy + Eq + Hash + Send + Sync + 'static,
    V: Send + Sync + 'static,
{
    standing: &'a Arc<Standing<K, V>>,
    key: K,
    kept: bool,
}

impl<K, V> Drop for Counted<'_, K, V>
where
    K: Copy + Eq + Hash + Send + Sync + 'static,
    V: Send + Sync + 'static,
{
    fn drop(&mut self) {
        if !self.kept {
            self.standing.remove(self.key);
        }
    }
}
