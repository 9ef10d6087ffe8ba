//! The sweep: makes expiry prompt and announced. Correctness never depends on it, because every script first ends what
//! is due in its event.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Ledger;
use crate::domain::EventId;

/// Between two sweeps when the first ended as much as one may: a wave of expiries is told as fast as it can be. Redis
/// answers everybody else between any two calls.
const PAUSE_WAVE: Duration = Duration::from_millis(1);

/// Between two sweeps when something is due at once: room for everybody else.
const PAUSE_MIN: Duration = Duration::from_millis(5);

/// Between two sweeps when nothing is due. An abandonment by another replica shortens deadlines without telling us, so
/// this bounds how late its expiry can be noticed; 40 polls a second cost Redis well below one per cent of a core.
const PAUSE_MAX: Duration = Duration::from_millis(25);

/// After an error.
const PAUSE_ERROR: Duration = Duration::from_millis(250);

/// Runs sweeps for as long as the replica lives.
pub struct Sweeper {
    ledger: Arc<dyn Ledger>,
    refresh: Box<dyn Fn(EventId) + Send + Sync>,
}

impl Sweeper {
    /// `refresh` is called, and must return at once, for each event whose stock should be asked for.
    pub fn new(ledger: Arc<dyn Ledger>, refresh: impl Fn(EventId) + Send + Sync + 'static) -> Self {
        Self { ledger, refresh: Box::new(refresh) }
    }

    /// Sweeps until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut failing = false;
        loop {
            let pause = match self.ledger.sweep().await {
                Ok(swept) => {
                    if failing {
                        tracing::info!("sweep works again");
                        failing = false;
                    }
                    for event in swept.refresh {
                        (self.refresh)(event);
                    }
                    let least = if swept.expired > 0 { PAUSE_WAVE } else { PAUSE_MIN };
                    swept.next.unwrap_or(PAUSE_MAX).clamp(least, PAUSE_MAX)
                }
                Err(error) => {
                    if !failing {
                        tracing::warn!(%error, "sweep found no ledger; expiry is still exact, only told later");
                        failing = true;
                    }
                    PAUSE_ERROR
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}
