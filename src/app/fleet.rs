//! This replica among the others: it says that it lives, and ends what those left undone that no longer do.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    domain::{ReplicaId, ReplicaReport},
    gateway::Gateway,
    ledger::{Footing, Ledger},
};

/// How often this replica tells the fleet that it lives. A fifth of its lease.
const BEAT_EVERY: Duration = Duration::from_secs(1);

/// How often it looks for replicas that are gone. With the lease this bounds how late their users' grace begins.
const REAP_EVERY: Duration = Duration::from_secs(1);

/// Tells the fleet every second that this replica lives, until `stop`. When the ledger may have lost what this replica
/// entered, its sessions enter again.
pub(super) async fn beat(ledger: Arc<dyn Ledger>, replica: ReplicaId, gateway: Gateway, stop: CancellationToken) {
    let mut ticks = interval(BEAT_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        let (users, sockets) = gateway.counts();
        let wide = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let report = ReplicaReport { replica, users: wide(users), sockets: wide(sockets) };
        match ledger.beat(&report).await {
            Ok(footing) => {
                failing = false;
                if footing == Footing::Doubtful {
                    tracing::info!(sockets, "the ledger was out of reach: sessions are entered again");
                    gateway.reassure();
                }
            }
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "the lease could not be renewed");
                }
                failing = true;
            }
        }
    }
}

/// Ends the sessions of replicas that are gone, so that their users have the same grace as others, until `stop`.
pub(super) async fn reap(ledger: Arc<dyn Ledger>, grace: Duration, stop: CancellationToken) {
    let mut ticks = interval(REAP_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = ledger.reap(grace).await {
            // The claim runs out, and the next look goes on where this one ended.
            tracing::debug!(%error, "replicas that are gone could not be looked after");
        }
    }
}
