//! `/stats`: counts over the whole fleet in the shape that existing callers read, and a few fields of our own.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::sync::Mutex;

use super::SERVICE;
use crate::{
    domain::{FleetStats, ReplicaId},
    ledger::{Ledger, LedgerError, Script},
};

/// For how long one reading answers everybody. Counting visits every event, so that its cost must not depend on how
/// often it is asked for.
const KEPT: Duration = Duration::from_secs(1);

/// The last reading and where the next comes from.
pub struct Stats {
    ledger: Arc<dyn Ledger>,
    replica: ReplicaId,
    started: Instant,
    last: Mutex<Option<(Instant, Result<FleetStats, LedgerError>)>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Wire {
    service: &'static str,
    status: &'static str,
    connected_users: u64,
    ticket_locks: TicketLocks,
    connected_sockets: u64,
    replica: String,
    replicas: u64,
    /// Of this replica, in whole seconds.
    uptime: u64,
    version: &'static str,
    /// The SHA-1 of every script that this version runs in Redis, to tell versions apart during a rollout.
    scripts: BTreeMap<&'static str, &'static str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct TicketLocks {
    total_locks: u64,
    active_locks: u64,
    users_with_locks: u64,
    categories_with_locks: u64,
    locks_by_status: LocksByStatus,
}

#[derive(Serialize)]
struct LocksByStatus {
    active: u64,
    expired: u64,
    confirmed: u64,
    released: u64,
}

impl Stats {
    /// Counts of `ledger`'s fleet, as told by `replica`, which starts now.
    #[must_use]
    pub fn new(ledger: Arc<dyn Ledger>, replica: ReplicaId) -> Arc<Self> {
        Arc::new(Self { ledger, replica, started: Instant::now(), last: Mutex::new(None) })
    }

    /// The answer, at most a second old.
    ///
    /// # Errors
    /// When the ledger gave none; it is not asked again within the second either.
    pub async fn json(self: &Arc<Self>) -> Result<serde_json::Value, LedgerError> {
        let this = Arc::clone(self);
        // A task of its own: whoever asked may go away, the question to the ledger is not dropped half-way.
        let read = tokio::spawn(async move { this.read().await }).await;
        let fleet = read.unwrap_or_else(|broken| Err(LedgerError::Disconnected(broken.to_string())))?;
        let wire = self.wire(&fleet);
        serde_json::to_value(wire).map_err(|error| LedgerError::Disconnected(error.to_string()))
    }

    async fn read(&self) -> Result<FleetStats, LedgerError> {
        let mut last = self.last.lock().await;
        if let Some((at, reading)) = &*last
            && at.elapsed() < KEPT
        {
            return reading.clone();
        }
        let reading = self.ledger.stats().await;
        *last = Some((Instant::now(), reading.clone()));
        reading
    }

    fn wire(&self, fleet: &FleetStats) -> Wire {
        Wire {
            service: SERVICE,
            status: "active",
            connected_users: fleet.users,
            ticket_locks: TicketLocks {
                total_locks: fleet.active + fleet.expired + fleet.confirmed + fleet.released,
                active_locks: fleet.active,
                users_with_locks: fleet.users_with_locks,
                categories_with_locks: fleet.categories_with_locks,
                locks_by_status: LocksByStatus {
                    active: fleet.active,
                    expired: fleet.expired,
                    confirmed: fleet.confirmed,
                    released: fleet.released,
                },
            },
            connected_sockets: fleet.sockets,
            replica: self.replica.to_string(),
            replicas: fleet.replicas,
            uptime: self.started.elapsed().as_secs(),
            version: env!("CARGO_PKG_VERSION"),
            scripts: Script::ALL.iter().map(|script| (script.name, script.sha())).collect(),
        }
    }
}
