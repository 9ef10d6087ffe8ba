//! One server that has keys: the only one, Sentinel's choice, or a master of a cluster.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fred::clients::Client;
use fred::error::{Error, ErrorKind};
use fred::interfaces::{ClientLike, EventInterface, PubsubInterface};
use fred::types::Builder;
use fred::types::config::{Config, ReconnectPolicy, Server, ServerConfig, TcpConfig, UnresponsiveConfig};
use futures_util::future::try_join_all;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

use super::{Delivery, Driver, LedgerError, Reply, custom};
use crate::metrics;

/// Unanswered commands in a row, and for how long, after which a connection that looks up is given up. A busy but
/// healthy Redis answers something within a second and a half.
const DEAF_COMMANDS: u32 = 3;
const DEAF_AFTER: Duration = Duration::from_millis(1500);

/// How often a replica tells itself that its subscription is alive, and how long it believes so without hearing it.
const PROBE_EVERY: Duration = Duration::from_millis(500);
const PROBE_LOST_AFTER: Duration = Duration::from_millis(2500);
/// The same when no probe can be sent either.
const SILENT_AT_MOST: Duration = Duration::from_secs(10);

/// Messages of Redis's that may wait for this process to take them: those of a wave of ten thousand deadlines.
const MESSAGES_MAX: usize = 16_384;
/// The same of what a client tells of itself, connections lost and made. It keeps several such queues, and their places
/// are taken from the beginning: 11 MiB of 16,384 each.
const EVENTS_MAX: usize = 256;

/// How many channels are subscribed at once.
const PORTION: usize = 500;

/// Commands and scripts on one connection, subscriptions on another.
pub(super) struct Link {
    /// The address of a cluster's master; `None` where there is no cluster.
    pub(super) server: Option<Server>,
    pub(super) commands: Client,
    subscriber: Client,
    timeout: Duration,
    /// Whether the connection for commands stands.
    pub(super) is_up: AtomicBool,
    /// Asks for every channel to be subscribed again.
    pub(super) renew: Notify,
    started: Instant,
    /// Milliseconds since `started` of the last answer, and how many commands went unanswered since.
    answered_ms: AtomicU64,
    unanswered: AtomicU32,
    waits: Mutex<Waits>,
    stop: CancellationToken,
}

/// Who waits for Redis replicas. A `WAIT` holds up everything behind it on its connection, so there is one at a time,
/// for all whose writes are before it: while Redis replicas are missing, each on its own would stop the connection.
#[derive(Default)]
struct Waits {
    is_running: bool,
    next: Vec<oneshot::Sender<Result<Reply, Error>>>,
}

/// The builder of clients for one server: `None` is the one that the URL names.
pub(super) fn builder(config: &Config, server: Option<&Server>, timeout: Duration) -> Builder {
    let mut config = config.clone();
    if let Some(server) = server {
        config.server = ServerConfig::Centralized { server: server.clone() };
    }
    let mut builder = Builder::from_config(config);
    builder.with_performance_config(|performance| {
        performance.default_command_timeout = timeout;
        performance.broadcast_channel_capacity = EVENTS_MAX;
    });
    builder.with_connection_config(|connection| {
        connection.connection_timeout = Duration::from_secs(1);
        connection.internal_command_timeout = Duration::from_secs(1);
        // A replayed script may run twice; who asked decides whether to ask again.
        connection.max_command_attempts = 1;
        connection.max_command_buffer_len = 10_000;
        connection.unresponsive =
            UnresponsiveConfig { max_timeout: Some(DEAF_AFTER), interval: Duration::from_millis(250) };
        connection.tcp =
            TcpConfig { nodelay: Some(true), user_timeout: Some(Duration::from_secs(3)), ..TcpConfig::default() };
    });
    builder
}

impl Link {
    /// Connects in the background.
    pub(super) fn start(driver: &Arc<Driver>, server: Option<Server>) -> Result<Arc<Self>, Error> {
        let mut builder = builder(&driver.config, server.as_ref(), driver.timeout);
        builder.set_policy(ReconnectPolicy::new_exponential(0, 50, 500, 2));
        let commands = builder.build()?;
        builder.with_performance_config(|performance| performance.broadcast_channel_capacity = MESSAGES_MAX);
        let link = Arc::new(Self {
            server,
            commands,
            subscriber: builder.build()?,
            timeout: driver.timeout,
            is_up: AtomicBool::new(false),
            renew: Notify::new(),
            started: Instant::now(),
            answered_ms: AtomicU64::new(0),
            unanswered: AtomicU32::new(0),
            waits: Mutex::default(),
            stop: driver.stop.child_token(),
        });
        // Listened to before it connects, so that no connection goes uncounted.
        let (lost, back) = (link.commands.error_rx(), link.commands.reconnect_rx());
        tokio::spawn(watch_connection(Arc::clone(driver), Arc::clone(&link), lost, back));
        // The join handles end with the clients, in `close`.
        drop(link.commands.connect());
        tokio::spawn(deliver(Arc::clone(driver), Arc::clone(&link)));
        Ok(link)
    }

    /// Ends both connections; pending calls fail.
    pub(super) fn close(&self) {
        self.stop.cancel();
        let (commands, subscriber) = (self.commands.clone(), self.subscriber.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                // Nothing waits for these answers: the process or the test ends, or the server has gone.
                commands.quit().await.ok();
                subscriber.quit().await.ok();
            });
        }
    }

    /// Gives both connections up for new ones.
    pub(super) fn reconnect(&self) {
        reconnect(&self.commands);
        reconnect(&self.subscriber);
    }

    /// Starts to receive channels; returns when Redis has said so.
    pub(super) async fn subscribe(&self, driver: &Driver, channels: &[String]) -> Result<(), Error> {
        let (sharded, plain): (Vec<String>, Vec<String>) =
            channels.iter().cloned().partition(|channel| driver.is_sharded(channel));
        if !plain.is_empty() {
            self.subscriber.subscribe(plain).await?;
            // The client answers for Redis as soon as it has sent this command; behind it, Redis speaks for itself.
            custom(self.subscriber.clone(), "PING", Vec::new()).await?;
        }
        // One for each: those of different slots must not share a command, and of several answers the client takes one.
        try_join_all(sharded.into_iter().map(|channel| self.subscriber.ssubscribe(channel))).await.map(drop)
    }

    /// Stops receiving a channel.
    pub(super) async fn unsubscribe(&self, driver: &Driver, channel: String) -> Result<(), Error> {
        if driver.is_sharded(&channel) {
            self.subscriber.sunsubscribe(channel).await
        } else {
            self.subscriber.unsubscribe(channel).await
        }
    }

    /// Waits until so many Redis replicas have everything that was written on this connection before, at most `within`.
    pub(super) async fn wait(self: &Arc<Self>, replicas: u32, within: Duration) -> Result<Reply, Error> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut waits = lock(&self.waits);
            waits.next.push(sender);
            if !waits.is_running {
                waits.is_running = true;
                // In a task of its own: whoever asked first may lose interest.
                tokio::spawn(Arc::clone(self).wait_for_all(replicas, within));
            }
        }
        receiver.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Canceled, "nobody waits any more")))
    }

    async fn wait_for_all(self: Arc<Self>, replicas: u32, within: Duration) {
        loop {
            let waiting = {
                let mut waits = lock(&self.waits);
                waits.is_running = !waits.next.is_empty();
                std::mem::take(&mut waits.next)
            };
            if waiting.is_empty() {
                return;
            }
            let args = vec![replicas.to_string(), within.as_millis().to_string()];
            let answer = custom(self.commands.clone(), "WAIT", args).await;
            for one in waiting {
                // Fails when whoever asked has lost interest.
                one.send(answer.clone()).ok();
            }
        }
    }

    /// Keeps count of what goes unanswered, and gives up a connection that is deaf or leads to a replica.
    pub(super) fn judge(
        &self,
        driver: &Driver,
        script: &'static str,
        answer: Result<Reply, Error>,
    ) -> Result<Reply, LedgerError> {
        let now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let error = match answer {
            Ok(reply) => {
                self.answered_ms.store(now_ms, Ordering::Relaxed);
                self.unanswered.store(0, Ordering::Relaxed);
                return Ok(reply);
            }
            Err(error) => error,
        };
        let is_demoted = is_demoted(&error);
        let error = self.error(script, &error);
        metrics::LEDGER_ERRORS.count(&[script, error.kind().as_str()]);
        if matches!(error, LedgerError::Timeout(_) | LedgerError::Disconnected(_)) {
            driver.doubt.notify_one();
        }
        if is_demoted {
            tracing::warn!("Redis is a replica now; looking for the master");
            reconnect(&self.commands);
        }
        if matches!(error, LedgerError::Timeout(_)) {
            let unanswered = self.unanswered.fetch_add(1, Ordering::Relaxed) + 1;
            let silent = now_ms.saturating_sub(self.answered_ms.load(Ordering::Relaxed));
            if unanswered >= DEAF_COMMANDS && u128::from(silent) >= DEAF_AFTER.as_millis() {
                self.answered_ms.store(now_ms, Ordering::Relaxed);
                self.unanswered.store(0, Ordering::Relaxed);
                tracing::warn!(silent_ms = silent, "Redis does not answer; connecting anew");
                reconnect(&self.commands);
            }
        }
        Err(error)
    }

    pub(super) fn error(&self, script: &'static str, error: &Error) -> LedgerError {
        classify(script, self.timeout, error)
    }
}

/// Answers of a server that is not, or not yet, or no longer the one to ask. The last two are the client's: a command was on
/// its way when the connection was given up.
const NOT_NOW: &[&str] = &[
    "LOADING",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "MOVED",
    "ASK",
    "TRYAGAIN",
    "UNBLOCKED",
    "Too many failed write attempts",
    "Failed to route command",
];

/// A script says so in the middle of its error on Redis 6.
fn is_demoted(error: &Error) -> bool {
    error.details().contains("READONLY You can't write")
}

fn classify(script: &'static str, timeout: Duration, error: &Error) -> LedgerError {
    let details = error.details();
    if is_demoted(error) || NOT_NOW.iter().any(|word| details.starts_with(word)) {
        return LedgerError::Disconnected(details.to_owned());
    }
    match error.kind() {
        ErrorKind::Timeout => LedgerError::Timeout(timeout),
        ErrorKind::IO
        | ErrorKind::Canceled
        | ErrorKind::Backpressure
        | ErrorKind::Cluster
        | ErrorKind::Sentinel
        | ErrorKind::Routing
        | ErrorKind::Tls => LedgerError::Disconnected(details.to_owned()),
        ErrorKind::Config
        | ErrorKind::Auth
        | ErrorKind::InvalidCommand
        | ErrorKind::InvalidArgument
        | ErrorKind::Url
        | ErrorKind::Protocol
        | ErrorKind::Unknown
        | ErrorKind::Parse
        | ErrorKind::NotFound => LedgerError::Refused { script, message: details.to_owned() },
    }
}

/// Gives a connection up for a new one. In a task of its own, because the client waits until the new one stands.
fn reconnect(client: &Client) {
    // One that knows it is down is trying already, and a second request would cut what the first has brought.
    if !client.is_connected() {
        return;
    }
    let client = client.clone();
    // Fails only when the client was closed.
    tokio::spawn(async move { client.force_reconnection().await.ok() });
}

/// Says when the connection for commands comes and goes, once each.
async fn watch_connection(
    driver: Arc<Driver>,
    link: Arc<Link>,
    mut lost: broadcast::Receiver<(Error, Option<Server>)>,
    mut back: broadcast::Receiver<Server>,
) {
    let mut up = None;
    loop {
        let now_up = tokio::select! {
            () = link.stop.cancelled() => return,
            error = lost.recv() => match error {
                Ok((error, _)) => {
                    if up == Some(true) {
                        metrics::LEDGER_DISCONNECTS.count(&[]);
                    }
                    if up != Some(false) {
                        tracing::warn!(error = %error.details(), "Redis is not reachable");
                    }
                    driver.doubt.notify_one();
                    false
                }
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return,
            },
            server = back.recv() => match server {
                Ok(server) => {
                    driver.connections.fetch_add(1, Ordering::Relaxed);
                    if up != Some(true) {
                        tracing::info!(server = %server, "connected to Redis");
                    }
                    true
                }
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return,
            },
        };
        up = Some(now_up);
        link.is_up.store(now_up, Ordering::Relaxed);
        let all_up = driver.route.borrow().links.iter().all(|link| link.is_up.load(Ordering::Relaxed));
        metrics::LEDGER_UP.set(&[], if all_up { 1.0 } else { 0.0 });
    }
}

/// Since something was heard from the subscription.
struct Silence {
    since: Instant,
    /// When Redis took the first probe since then. One that still waits to be sent is no sign of silence: under a storm of
    /// requests connecting anew, with thousands of channels, would make all of it worse.
    probed: Option<Instant>,
}

impl Silence {
    fn new() -> Self {
        Self { since: Instant::now(), probed: None }
    }

    fn is_suspicious(&self) -> bool {
        self.probed.is_some_and(|probed| probed.elapsed() > PROBE_LOST_AFTER) || self.since.elapsed() > SILENT_AT_MOST
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The subscriber's life: connect, subscribe everything wanted after each (re)connection, hand messages on, and connect
/// anew when the replica's own probe does not come back. Each master of a cluster has a probe of its own.
async fn deliver(driver: Arc<Driver>, link: Arc<Link>) {
    let client = &link.subscriber;
    let mut messages = client.message_rx();
    let mut connected = client.reconnect_rx();
    drop(client.connect());
    let mut tick = tokio::time::interval(PROBE_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let probe = link.server.as_ref().map_or(driver.probe.clone(), |server| format!("{}:{server}", driver.probe));
    let silence = Arc::new(Mutex::new(Silence::new()));
    // When the oldest probe that was not heard yet was sent.
    let mut sent: Option<Instant> = None;
    let mut subscribed = false;
    let mut gap = false;
    loop {
        tokio::select! {
            () = link.stop.cancelled() => return,
            message = messages.recv() => match message {
                Ok(message) => {
                    *lock(&silence) = Silence::new();
                    // A slot that has moved may leave a subscription behind.
                    if *message.channel == *probe {
                        if let Some(sent) = sent.take() {
                            metrics::LEDGER_DELIVERY.observe(&[], sent.elapsed());
                        }
                    } else if link.has(&driver, &message.channel) {
                        let text = message.value.into_string().unwrap_or_default();
                        let delivery = Delivery::Message { channel: message.channel.to_string(), text };
                        gap |= driver.deliveries.try_send(delivery).is_err();
                    }
                }
                Err(RecvError::Lagged(missed)) => {
                    metrics::LEDGER_NOTICES_LOST.add(&[], missed);
                    gap = true;
                }
                Err(RecvError::Closed) => return,
            },
            server = connected.recv() => {
                if matches!(server, Err(RecvError::Closed)) {
                    return;
                }
                sent = None;
                subscribed = link.resubscribe(&driver, &probe).await;
                gap = true;
                *lock(&silence) = Silence::new();
            }
            () = link.renew.notified() => {
                subscribed = client.is_connected() && link.resubscribe(&driver, &probe).await;
                gap = true;
            }
            _ = tick.tick() => {
                if !subscribed && client.is_connected() {
                    subscribed = link.resubscribe(&driver, &probe).await;
                    gap = true;
                    *lock(&silence) = Silence::new();
                } else if subscribed && lock(&silence).is_suspicious() {
                    tracing::warn!("the subscription delivers nothing; connecting anew");
                    metrics::LEDGER_PROBES_LOST.count(&[]);
                    subscribed = false;
                    *lock(&silence) = Silence::new();
                    reconnect(client);
                }
                if subscribed {
                    sent.get_or_insert_with(Instant::now);
                }
                // In a task of its own: a Redis that does not answer must not keep this loop from delivering.
                let (commands, probe, silence) = (link.commands.clone(), probe.clone(), Arc::clone(&silence));
                tokio::spawn(async move {
                    if commands.publish::<Reply, _, _>(probe, "").await.is_ok() {
                        lock(&silence).probed.get_or_insert_with(Instant::now);
                    }
                });
            }
        }
        if gap && driver.deliveries.try_send(Delivery::Gap).is_ok() {
            gap = false;
        }
    }
}

impl Link {
    /// Whether a channel is received here.
    fn has(self: &Arc<Self>, driver: &Driver, channel: &str) -> bool {
        self.server.is_none() || driver.route.borrow().link(channel).is_some_and(|link| Arc::ptr_eq(link, self))
    }

    /// Subscribes every wanted channel of this server again, in bounded portions. False when it has to be tried again.
    async fn resubscribe(self: &Arc<Self>, driver: &Driver, probe: &str) -> bool {
        let mut channels: Vec<String> = driver.channels().iter().cloned().collect();
        channels.retain(|channel| self.has(driver, channel));
        channels.push(probe.to_owned());
        for portion in channels.chunks(PORTION) {
            if let Err(error) = self.subscribe(driver, portion).await {
                tracing::warn!(error = %error.details(), "could not subscribe; will try again");
                driver.doubt.notify_one();
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts that Redis 6.2 and 7.0 say, and the client's own.
    #[test]
    fn a_server_that_is_not_the_one_to_ask_now_is_no_refusal() {
        let readonly_6 = "ERR Error running script (call to f_0a): @user_script:1: @user_script: 1: -READONLY You can't \
                          write against a read only replica.";
        for text in [
            "READONLY You can't write against a read only replica. script: 0a, on @user_script:1.",
            readonly_6,
            "LOADING Redis is loading the dataset in memory",
            "CLUSTERDOWN Hash slot not served",
            "TRYAGAIN Multiple keys request during rehashing of slot",
            "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
            "Failed to route command.",
        ] {
            let error = classify("lock", Duration::ZERO, &Error::new(ErrorKind::Unknown, text));
            assert!(matches!(error, LedgerError::Disconnected(_)), "{error:?}");
        }
        for text in ["OOM command not allowed when used memory > 'maxmemory'.", "NOPERM no permissions", "ERR LOADING"]
        {
            let error = classify("lock", Duration::ZERO, &Error::new(ErrorKind::Unknown, text));
            assert!(matches!(error, LedgerError::Refused { .. }), "{error:?}");
        }
    }
}
