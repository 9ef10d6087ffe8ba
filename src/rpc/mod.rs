//! RabbitMQ: a NestJS microservice on one durable queue, as the orders-service and the events-service know it.
//!
//! Owns the consumer, its connections and the replies. Every replica consumes the same queue and any of them can answer
//! any request. Knows no sockets of browsers and holds no lock state: what a message means is read in [`wire`], done in
//! [`dispatch`], and a message is acknowledged only after its reply is with the broker. So a replica that dies leaves
//! its unfinished messages to the others, and every handler may see the same message twice.

pub mod dispatch;
pub mod wire;

mod consumer;
mod link;
mod reply;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use self::consumer::{Consumer, State};
use self::dispatch::Dispatcher;
use self::wire::Pattern;
use crate::inventory::Stock;
use crate::ledger::{Ledger, LedgerError};
use crate::metrics;

/// How the service takes part in RabbitMQ.
#[derive(Clone)]
pub struct RpcOptions {
    /// Where the broker is, password included: never logged.
    pub url: String,
    /// The queue that all replicas consume.
    pub queue: String,
    /// How many messages may be in work at once, at least 2. Half of them at most are events that wait for the ledger
    /// to come back.
    pub prefetch: u16,
    /// Every request is answered within this, counted from its delivery.
    pub request_timeout: Duration,
    /// How long a validated lock lives at least.
    pub checkout_window: Duration,
}

/// What `get-realtime-stats` answers: the same as `/stats`.
#[async_trait]
pub trait StatsSource: Send + Sync + 'static {
    /// The statistics of the whole fleet.
    async fn stats(&self) -> Result<serde_json::Value, LedgerError>;
}

/// Why a text is not the URL of a broker. Never quotes the text, which may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Not a URL at all.
    #[error("not a URL")]
    NotAUrl,
    /// Another scheme.
    #[error("must begin with amqp:// or amqps://")]
    NotAmqp,
    /// Nowhere to connect to.
    #[error("names no host")]
    NoHost,
    /// A bad escape, or a parameter that is not what the client library knows.
    #[error("has a part that cannot be read")]
    BadPart,
}

/// Says whether [`start`] can use this URL, so that a mistake is found when the process starts.
///
/// # Errors
/// When it cannot.
pub fn check_url(url: &str) -> Result<(), UrlError> {
    link::parse_url(url).map(drop)
}

/// The running consumer.
#[derive(Clone)]
pub struct Rpc {
    state: Arc<State>,
    done: CancellationToken,
}

/// Starts to consume, and goes on until `stop`, whatever the broker does meanwhile. Must be called within a Tokio
/// runtime.
#[must_use]
pub fn start(
    options: RpcOptions,
    ledger: Arc<dyn Ledger>,
    stock: Arc<Stock>,
    stats: Arc<dyn StatsSource>,
    stop: CancellationToken,
) -> Rpc {
    for pattern in Pattern::ALL {
        for outcome in ["failed", "given_back"] {
            metrics::RPC_MESSAGES.show(&[pattern.as_str(), outcome]);
        }
    }
    let dispatcher = Dispatcher::new(ledger, stock, stats, options.checkout_window);
    let known = Arc::new(State::default());
    let done = CancellationToken::new();
    let consumer = Consumer::new(options, dispatcher, Arc::clone(&known), stop);
    // Also when the task panics, nobody waits for it in vain.
    let finished = done.clone().drop_guard();
    tokio::spawn(async move {
        consumer.run().await;
        drop(finished);
    });
    Rpc { state: known, done }
}

impl Rpc {
    /// True while the queue is being consumed.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.state.is_consuming()
    }

    /// True while the broker takes no replies because it lacks memory or disk.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.state.is_blocked()
    }

    /// Returns when, after `stop`, every message in work is answered and acknowledged, or given back to the queue. With
    /// a broker that answers this takes as long as the messages in work; with one that does not, at most the request
    /// timeout and eleven seconds.
    pub async fn drained(&self) {
        self.done.cancelled().await;
    }
}
