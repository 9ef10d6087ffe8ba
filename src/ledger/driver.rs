//! The one place that knows the Redis client. A swap of it is a change of this file.
//!
//! What the client does not do by itself is done here: a limit for every wait, no replay of commands whose fate is
//! unknown, noticing a connection that is up but answers nothing, resubscribing, and noticing a subscription that is
//! up but delivers nothing.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fred::clients::Client;
use fred::error::{Error, ErrorKind};
use fred::interfaces::{ClientLike, EventInterface, LuaInterface, PubsubInterface};
use fred::types::config::{Config, ReconnectPolicy, TcpConfig, UnresponsiveConfig};
use fred::types::{Builder, ClusterHash, CustomCommand, RespVersion, Value};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::LedgerError;
use super::redis::RedisClock;
use super::script::{Script, SteppedScripts};
use crate::metrics;

/// An answer of Redis.
pub(super) type Reply = Value;

/// Unanswered commands in a row, and for how long, after which a connection that looks up is given up. A busy but
/// healthy Redis answers something within a second and a half.
const DEAF_COMMANDS: u32 = 3;
const DEAF_AFTER: Duration = Duration::from_millis(1500);

/// How often a replica tells itself that its subscription is alive, and how long it believes so without hearing it.
const PROBE_EVERY: Duration = Duration::from_millis(500);
const PROBE_LOST_AFTER: Duration = Duration::from_millis(2500);

/// What a subscription delivers.
pub(super) enum Delivery {
    /// A channel's message.
    Message { channel: String, text: String },
    /// Messages may have been missed.
    Gap,
}

/// Commands and scripts on one connection, subscriptions on another.
pub(super) struct Driver {
    commands: Client,
    subscriber: Client,
    channels: Arc<Mutex<HashSet<String>>>,
    timeout: Duration,
    /// The scripts' texts on [`RedisClock::Stepped`].
    stepped: Option<SteppedScripts>,
    started: Instant,
    /// Milliseconds since `started` of the last answer, and how many commands went unanswered since.
    answered_ms: AtomicU64,
    unanswered: AtomicU32,
    stop: CancellationToken,
}

/// The lower-case hexadecimal SHA-1 of a text.
pub(super) fn sha1(text: &str) -> String {
    fred::util::sha1_hash(text)
}

impl Driver {
    /// Connects in the background: calls made before the connection stands wait for it, at most `timeout`.
    ///
    /// # Errors
    /// When the URL is not one, or the stepped clock's scripts cannot be read.
    pub(super) fn connect(url: &str, timeout: Duration, clock: RedisClock) -> Result<Arc<Self>, LedgerError> {
        // `unix:/path` is what operators write; the client's own scheme is longer.
        let url = url.strip_prefix("unix:").map_or_else(|| url.to_owned(), |path| format!("redis+unix://{path}"));
        let refused = |error: &Error| LedgerError::Refused { script: "connect", message: error.details().to_owned() };
        let unread = |error: std::io::Error| LedgerError::Refused { script: "connect", message: error.to_string() };
        let stepped = match clock {
            RedisClock::Server => None,
            RedisClock::Stepped { scripts } => Some(SteppedScripts::read(scripts).map_err(unread)?),
        };
        let mut config = Config::from_url(&url).map_err(|error| refused(&error))?;
        config.version = RespVersion::RESP3;
        let mut builder = Builder::from_config(config);
        builder.with_performance_config(|performance| {
            performance.default_command_timeout = timeout;
            performance.broadcast_channel_capacity = 16_384;
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
        builder.set_policy(ReconnectPolicy::new_exponential(0, 50, 1000, 2));
        let commands = builder.build().map_err(|error| refused(&error))?;
        let subscriber = builder.build().map_err(|error| refused(&error))?;
        let driver = Arc::new(Self {
            commands,
            subscriber,
            channels: Arc::default(),
            timeout,
            stepped,
            started: Instant::now(),
            answered_ms: AtomicU64::new(0),
            unanswered: AtomicU32::new(0),
            stop: CancellationToken::new(),
        });
        // The join handles end with the clients, in `close`.
        drop(driver.commands.connect());
        tokio::spawn(watch_connection(Arc::downgrade(&driver), driver.commands.clone()));
        Ok(driver)
    }

    /// Runs a script by its SHA; sends its text when Redis does not have it.
    pub(super) async fn eval(
        &self,
        script: &'static Script,
        keys: Vec<String>,
        args: Vec<String>,
    ) -> Result<Reply, LedgerError> {
        debug_assert!(script.keys.admits(keys.len()), "{}: {} keys", script.name, keys.len());
        debug_assert!(script.args.admits(args.len()), "{}: {} arguments", script.name, args.len());
        let started = Instant::now();
        let (sha, text) = self.stepped.as_ref().map_or((script.sha(), script.source), |stepped| stepped.named(script));
        let answer: Result<Reply, Error> = match self.commands.evalsha(sha, keys.clone(), args.clone()).await {
            Err(error) if error.details().starts_with("NOSCRIPT") => self.commands.eval(text, keys, args).await,
            answer => answer,
        };
        metrics::LEDGER_CALL.observe(&[script.name], started.elapsed());
        self.judge(script.name, answer)
    }

    /// All members of a sorted set, lowest score first, at most `limit`.
    pub(super) async fn members(&self, key: &str, limit: usize) -> Result<Vec<String>, LedgerError> {
        let command = CustomCommand::new_static("ZRANGE", ClusterHash::FirstKey, false);
        let last = limit.saturating_sub(1).to_string();
        let answer = self.commands.custom(command, vec![key.to_owned(), "0".to_owned(), last]).await;
        let reply: Reply = self.judge("members", answer)?;
        reply.convert().map_err(|error| LedgerError::Protocol { script: "members", reply: error.details().to_owned() })
    }

    /// Waits until so many Redis replicas have everything that this connection has written, at most `within`; how many
    /// have. Commands behind it on the connection wait too.
    pub(super) async fn replicated(&self, replicas: u32, within: Duration) -> Result<u32, LedgerError> {
        let command = CustomCommand::new_static("WAIT", ClusterHash::FirstKey, false);
        let args = vec![replicas.to_string(), within.as_millis().to_string()];
        let answer = self.commands.custom(command, args).await;
        let reply: Reply = self.judge("wait", answer)?;
        reply.convert().map_err(|error| LedgerError::Protocol { script: "wait", reply: error.details().to_owned() })
    }

    /// Tells a channel.
    pub(super) async fn publish(&self, channel: &str, text: &str) -> Result<(), LedgerError> {
        let answer: Result<Reply, Error> = self.commands.publish(channel, text).await;
        self.judge("publish", answer).map(drop)
    }

    /// One round trip.
    pub(super) async fn ping(&self) -> Result<(), LedgerError> {
        let answer: Result<Reply, Error> = self.commands.ping(None).await;
        self.judge("ping", answer).map(drop)
    }

    /// Starts to receive a channel; returns when Redis has said so.
    pub(super) async fn subscribe(&self, channel: String) -> Result<(), LedgerError> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner).insert(channel.clone());
        self.subscriber.subscribe(channel).await.map_err(|error| self.error("subscribe", &error))
    }

    /// Stops receiving a channel.
    pub(super) async fn unsubscribe(&self, channel: String) -> Result<(), LedgerError> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner).remove(&channel);
        self.subscriber.unsubscribe(channel).await.map_err(|error| self.error("unsubscribe", &error))
    }

    /// Connects the subscriber and hands on what it receives. `probe` is this replica's own channel.
    pub(super) fn deliveries(self: &Arc<Self>, probe: String) -> mpsc::Receiver<Delivery> {
        let (sender, receiver) = mpsc::channel(16_384);
        self.channels.lock().unwrap_or_else(PoisonError::into_inner).insert(probe.clone());
        tokio::spawn(deliver(Arc::clone(self), sender, probe));
        receiver
    }

    /// Ends both connections; pending calls fail.
    pub(super) fn close(&self) {
        self.stop.cancel();
        let (commands, subscriber) = (self.commands.clone(), self.subscriber.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                // Nothing waits for these answers: the process or the test ends.
                commands.quit().await.ok();
                subscriber.quit().await.ok();
            });
        }
    }

    /// Keeps count of what goes unanswered, and gives a deaf connection up.
    fn judge(&self, script: &'static str, answer: Result<Reply, Error>) -> Result<Reply, LedgerError> {
        let now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        match answer {
            Ok(reply) => {
                self.answered_ms.store(now_ms, Ordering::Relaxed);
                self.unanswered.store(0, Ordering::Relaxed);
                Ok(reply)
            }
            Err(error) => {
                let error = self.error(script, &error);
                metrics::LEDGER_ERRORS.count(&[script, error.kind().as_str()]);
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
        }
    }

    fn error(&self, script: &'static str, error: &Error) -> LedgerError {
        match error.kind() {
            ErrorKind::Timeout => LedgerError::Timeout(self.timeout),
            ErrorKind::IO
            | ErrorKind::Canceled
            | ErrorKind::Backpressure
            | ErrorKind::Cluster
            | ErrorKind::Sentinel
            | ErrorKind::Routing
            | ErrorKind::Tls => LedgerError::Disconnected(error.details().to_owned()),
            ErrorKind::Config
            | ErrorKind::Auth
            | ErrorKind::InvalidCommand
            | ErrorKind::InvalidArgument
            | ErrorKind::Url
            | ErrorKind::Protocol
            | ErrorKind::Unknown
            | ErrorKind::Parse
            | ErrorKind::NotFound => LedgerError::Refused { script, message: error.details().to_owned() },
        }
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
async fn watch_connection(driver: std::sync::Weak<Driver>, client: Client) {
    let (mut lost, mut back) = (client.error_rx(), client.reconnect_rx());
    let mut up = None;
    loop {
        let now_up = tokio::select! {
            error = lost.recv() => match error {
                Ok((error, _)) => {
                    if up != Some(false) {
                        tracing::warn!(error = %error.details(), "Redis is not reachable");
                    }
                    false
                }
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return,
            },
            server = back.recv() => match server {
                Ok(server) => {
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
        metrics::LEDGER_UP.set(&[], if now_up { 1.0 } else { 0.0 });
        if driver.strong_count() == 0 {
            return;
        }
    }
}

/// The subscriber's life: connect, subscribe everything wanted after each (re)connection, hand messages on, and connect
/// anew when the replica's own probe does not come back.
async fn deliver(driver: Arc<Driver>, sender: mpsc::Sender<Delivery>, probe: String) {
    let client = driver.subscriber.clone();
    let mut messages = client.message_rx();
    let mut connected = client.reconnect_rx();
    drop(client.connect());
    let mut tick = tokio::time::interval(PROBE_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    let mut subscribed = false;
    let mut gap = false;
    loop {
        tokio::select! {
            () = driver.stop.cancelled() => return,
            message = messages.recv() => match message {
                Ok(message) if *message.channel == *probe => heard = Instant::now(),
                Ok(message) => {
                    let text = message.value.into_string().unwrap_or_default();
                    let delivery = Delivery::Message { channel: message.channel.to_string(), text };
                    gap |= sender.try_send(delivery).is_err();
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
                subscribed = resubscribe(&driver).await;
                gap = true;
                heard = Instant::now();
            }
            _ = tick.tick() => {
                if !subscribed && client.is_connected() {
                    subscribed = resubscribe(&driver).await;
                    gap = true;
                    heard = Instant::now();
                } else if subscribed && heard.elapsed() > PROBE_LOST_AFTER {
                    tracing::warn!("the subscription delivers nothing; connecting anew");
                    metrics::LEDGER_PROBES_LOST.count(&[]);
                    subscribed = false;
                    heard = Instant::now();
                    reconnect(&client);
                }
                let driver = Arc::clone(&driver);
                let probe = probe.clone();
                // In a task of its own: a Redis that does not answer must not keep this loop from delivering.
                tokio::spawn(async move { driver.publish(&probe, "").await.ok() });
            }
        }
        if gap && sender.try_send(Delivery::Gap).is_ok() {
            gap = false;
        }
    }
}

/// Subscribes every wanted channel again, in bounded portions. False when it has to be tried again.
async fn resubscribe(driver: &Driver) -> bool {
    let channels: Vec<String> =
        driver.channels.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
    for portion in channels.chunks(500) {
        if let Err(error) = driver.subscriber.subscribe(portion.to_vec()).await {
            tracing::warn!(error = %error.details(), "could not subscribe; will try again");
            return false;
        }
    }
    true
}
