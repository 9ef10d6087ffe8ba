//! Whether this replica can serve, decided once a second so that probes cost nothing.
//!
//! A replica serves when it is not draining and its ledger answered lately. A new one is given a moment to reach
//! RabbitMQ too; after that RabbitMQ is reported and never decides: without it sockets work on, and taking every replica
//! out of service for it would end them all.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    ledger::Ledger,
    metrics,
    shutdown::{Phase, Shutdown},
};

/// How often the ledger is asked.
const PING_EVERY: Duration = Duration::from_secs(1);

/// Without an answer for so long the replica is not ready. Three pings: one lost packet takes nobody out of service.
const SILENCE_MAX: Duration = Duration::from_secs(3);

/// For so long a new replica is not ready before it has reached RabbitMQ.
const RPC_START_MAX: Duration = Duration::from_secs(5);

/// Tells whether RPC is connected.
pub type RpcProbe = Box<dyn Fn() -> bool + Send + Sync>;

/// The state of the checks.
pub struct Health {
    ledger: Arc<dyn Ledger>,
    shutdown: Shutdown,
    rpc: Mutex<Option<RpcProbe>>,
    answered: Mutex<Option<Instant>>,
    started: Instant,
    rpc_reached: AtomicBool,
    was_ready: AtomicBool,
}

/// What the checks say now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// The process is on its way out.
    pub draining: bool,
    /// The ledger answered lately.
    pub ledger: bool,
    /// RPC is connected; `None` when it is off.
    pub rpc: Option<bool>,
    /// The process has just started and is still to reach RabbitMQ.
    pub starting: bool,
}

impl Verdict {
    /// Whether new clients are welcome.
    #[must_use]
    pub const fn is_ready(&self) -> bool {
        !self.draining && self.ledger && !self.starting
    }
}

impl Health {
    /// Not ready until the ledger has answered once.
    #[must_use]
    pub fn new(ledger: Arc<dyn Ledger>, shutdown: Shutdown) -> Arc<Self> {
        Arc::new(Self {
            ledger,
            shutdown,
            rpc: Mutex::new(None),
            answered: Mutex::new(None),
            started: Instant::now(),
            rpc_reached: AtomicBool::new(false),
            was_ready: AtomicBool::new(false),
        })
    }

    /// RPC is on, and this tells whether it is connected.
    pub fn watch_rpc(&self, probe: RpcProbe) {
        *self.rpc.lock().unwrap_or_else(PoisonError::into_inner) = Some(probe);
    }

    /// What the checks say now.
    pub fn verdict(&self) -> Verdict {
        let answered = *self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        let rpc = self.rpc.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|probe| probe());
        if rpc == Some(true) {
            self.rpc_reached.store(true, Ordering::Relaxed);
        }
        let reached = self.rpc_reached.load(Ordering::Relaxed) || self.started.elapsed() >= RPC_START_MAX;
        Verdict {
            draining: self.shutdown.phase() != Phase::Serving,
            ledger: answered.is_some_and(|at| at.elapsed() < SILENCE_MAX),
            rpc,
            starting: rpc.is_some() && !reached,
        }
    }

    /// Asks the ledger again and again until `stop`, and says when readiness changes. Pings have the ledger's own
    /// timeout; verdicts do not wait for them.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let pings = {
            let health = Arc::clone(&self);
            async move {
                let mut ticks = interval(PING_EVERY);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    ticks.tick().await;
                    if health.ledger.ping().await.is_ok() {
                        *health.answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                        health.note();
                    }
                }
            }
        };
        let edges = async {
            let mut ticks = interval(PING_EVERY);
            loop {
                ticks.tick().await;
                self.note();
            }
        };
        tokio::select! {
            () = pings => {}
            () = edges => {}
            () = stop.cancelled() => {}
        }
    }

    /// Notes in the log and in the metrics if readiness has changed. Done every second, and to be done when the drain
    /// begins.
    pub fn note(&self) {
        let verdict = self.verdict();
        let ready = verdict.is_ready();
        metrics::HTTP_READY.set(&[], f64::from(u8::from(ready)));
        if self.was_ready.swap(ready, Ordering::Relaxed) == ready {
            return;
        }
        if ready {
            tracing::info!("ready");
        } else if verdict.draining {
            tracing::info!("not ready: draining");
        } else if verdict.ledger {
            tracing::info!("not ready: starting");
        } else {
            tracing::warn!("not ready: the ledger does not answer");
        }
    }
}
