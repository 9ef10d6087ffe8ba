//! How the process ends: Serving, then Draining, then Stopped; never back.
//!
//! The first SIGTERM or SIGINT begins the drain, the second ends it at once. What a drain does is the business of
//! [`crate::app`]; that it has begun is known here, before anything else acts on it, so that readiness falls first.

use std::io;

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

/// Where the process stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It takes requests.
    Serving,
    /// It finishes what it has and hands its clients over.
    Draining,
    /// Nothing is waited for any more.
    Stopped,
}

/// The one holder of the phase.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Sender<Phase>);

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// Serving.
    #[must_use]
    pub fn new() -> Self {
        Self(watch::Sender::new(Phase::Serving))
    }

    /// Where the process stands now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Goes on to the next phase, and says which; from the last one nowhere.
    #[expect(clippy::must_use_candidate, reason = "the step is the point, the answer a convenience")]
    pub fn advance(&self) -> Phase {
        self.0.send_modify(|phase| {
            *phase = match phase {
                Phase::Serving => Phase::Draining,
                Phase::Draining | Phase::Stopped => Phase::Stopped,
            }
        });
        self.phase()
    }

    /// Returns when the process is in `phase` or past it.
    pub async fn reached(&self, phase: Phase) {
        // The sender lives in `self`, so that the wait cannot fail.
        let _ = self.0.subscribe().wait_for(|&now| now >= phase).await;
    }
}

/// The signals that end a process.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Takes the signals over from the system's default, which is to die at once.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn take() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Advances `shutdown` at each signal, until it is stopped.
    pub async fn drive(mut self, shutdown: Shutdown) {
        while shutdown.phase() != Phase::Stopped {
            let name = tokio::select! {
                _ = self.terminate.recv() => "SIGTERM",
                _ = self.interrupt.recv() => "SIGINT",
            };
            match shutdown.advance() {
                Phase::Serving | Phase::Draining => {
                    tracing::info!(signal = name, "draining; a second signal stops at once");
                }
                Phase::Stopped => tracing::warn!(signal = name, "stopping before the drain has ended"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn phases_only_go_forward_and_wake_who_waits() {
        let shutdown = Shutdown::new();
        shutdown.reached(Phase::Serving).await;
        let waiting = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.reached(Phase::Draining).await }
        });
        assert_eq!(shutdown.advance(), Phase::Draining);
        waiting.await.expect("the wait ends");
        assert_eq!(shutdown.advance(), Phase::Stopped);
        assert_eq!(shutdown.advance(), Phase::Stopped);
        shutdown.reached(Phase::Draining).await;
    }
}
