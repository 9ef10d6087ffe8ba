//! One server that has keys: the only one, Sentinel's choice, or a master of a cluster.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::address::{Address, Place, Server};
use super::client::{Client, Told};
use super::command::Command;
use super::connection::Failure;
use super::reply::Value;
use super::{Delivery, Driver, LedgerError, Reply};
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

/// Messages of Redis's that may wait for this process to take them: those of a wave of ten thousand deadlines. How many
/// bytes they may have together is [`super::MESSAGES_BYTES_MAX`].
const MESSAGES_MAX: usize = 16_384;

/// The longest message that is taken, in bytes. The longest that is sent tells of a thousand locks that reached their
/// deadline, in eighty bytes each.
const MESSAGE_BYTES_MAX: usize = 256 * 1024;

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
    pub(super) is_up: Arc<AtomicBool>,
    /// Asks for every channel to be subscribed again.
    pub(super) renew: Arc<Notify>,
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
    next: Vec<oneshot::Sender<Result<Reply, Failure>>>,
}

/// A message of a channel.
struct Message {
    channel: String,
    text: String,
    room: OwnedSemaphorePermit,
}

impl Link {
    /// Connects in the background.
    pub(super) fn start(driver: &Arc<Driver>, server: Option<Server>) -> Arc<Self> {
        let address = match &server {
            Some(server) => Arc::new(Address { place: Place::Server(server.clone()), ..(*driver.address).clone() }),
            None => Arc::clone(&driver.address),
        };
        let stop = driver.stop.child_token();
        let is_up = Arc::new(AtomicBool::new(false));
        let told = connection_log(Arc::clone(driver), Arc::clone(&is_up));
        let commands = Client::start(Arc::clone(&address), driver.timeout, None, told, stop.clone());
        let (sender, messages) = mpsc::channel(MESSAGES_MAX);
        let (lost, renew) = (Arc::new(AtomicU64::new(0)), Arc::new(Notify::new()));
        let pushed = hand_on(Arc::clone(driver), sender, Arc::clone(&lost), Arc::clone(&renew));
        let subscriber = Client::start(address, driver.timeout, Some(Arc::new(pushed)), |_| {}, stop.clone());
        let link = Arc::new(Self {
            server,
            commands,
            subscriber,
            timeout: driver.timeout,
            is_up,
            renew,
            started: Instant::now(),
            answered_ms: AtomicU64::new(0),
            unanswered: AtomicU32::new(0),
            waits: Mutex::default(),
            stop,
        });
        tokio::spawn(deliver(Arc::clone(driver), Arc::clone(&link), messages, lost));
        link
    }

    /// Ends both connections; pending calls fail.
    pub(super) fn close(&self) {
        self.stop.cancel();
    }

    /// Gives both connections up for new ones.
    pub(super) fn reconnect(&self) {
        self.commands.reconnect();
        self.subscriber.reconnect();
    }

    /// Starts to receive channels; returns when Redis has said so for each. Each has a command of its own: those of
    /// different slots must not share one, and an answer for each is what shows that it belongs to the question.
    pub(super) async fn subscribe(&self, driver: &Driver, channels: &[String]) -> Result<(), Failure> {
        let verb = |channel: &str| if driver.is_sharded(channel) { "SSUBSCRIBE" } else { "SUBSCRIBE" };
        let all = channels.iter().map(|channel| self.subscriber.channel(verb(channel), channel));
        try_join_all(all).await.map(drop)
    }

    /// Stops receiving a channel.
    pub(super) async fn unsubscribe(&self, driver: &Driver, channel: &str) -> Result<(), Failure> {
        let verb = if driver.is_sharded(channel) { "SUNSUBSCRIBE" } else { "UNSUBSCRIBE" };
        self.subscriber.channel(verb, channel).await
    }

    /// Waits until so many Redis replicas have everything that was written on this connection before, at most `within`.
    pub(super) async fn wait(self: &Arc<Self>, replicas: u32, within: Duration) -> Result<Reply, Failure> {
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
        receiver.await.unwrap_or_else(|_| Err(Failure::Lost("nobody waits any more".to_owned())))
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
            let command = Command::new("WAIT", &[&replicas.to_string(), &within.as_millis().to_string()]);
            let answer = self.commands.ask(command).await;
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
        answer: Result<Reply, Failure>,
    ) -> Result<Reply, LedgerError> {
        let now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        if matches!(answer, Ok(_) | Err(Failure::Refused(_))) {
            self.answered_ms.store(now_ms, Ordering::Relaxed);
            self.unanswered.store(0, Ordering::Relaxed);
        }
        let failure = match answer {
            Ok(reply) => return Ok(reply),
            Err(failure) => failure,
        };
        let is_demoted = is_demoted(failure.text());
        let error = self.error(script, &failure);
        metrics::LEDGER_ERRORS.count(&[script, error.kind().as_str()]);
        if matches!(error, LedgerError::Timeout(_) | LedgerError::Disconnected(_)) {
            driver.doubt.notify_one();
        }
        if is_demoted {
            tracing::warn!("Redis is a replica now; looking for the master");
            self.commands.reconnect();
        }
        // What waited for a connection says nothing about the one that it did not have.
        if failure == Failure::Late {
            let unanswered = self.unanswered.fetch_add(1, Ordering::Relaxed) + 1;
            let silent = now_ms.saturating_sub(self.answered_ms.load(Ordering::Relaxed));
            if unanswered >= DEAF_COMMANDS && u128::from(silent) >= DEAF_AFTER.as_millis() {
                self.answered_ms.store(now_ms, Ordering::Relaxed);
                self.unanswered.store(0, Ordering::Relaxed);
                tracing::warn!(silent_ms = silent, "Redis does not answer; connecting anew");
                self.commands.reconnect();
            }
        }
        Err(error)
    }

    pub(super) fn error(&self, script: &'static str, failure: &Failure) -> LedgerError {
        classify(script, self.timeout, failure)
    }
}

/// Answers of a server that is not, or not yet, or no longer the one to ask.
const NOT_NOW: &[&str] = &["LOADING", "MASTERDOWN", "CLUSTERDOWN", "MOVED", "ASK", "TRYAGAIN", "UNBLOCKED"];

/// A script says so in the middle of its error on Redis 6.
fn is_demoted(text: &str) -> bool {
    text.contains("READONLY You can't write")
}

fn classify(script: &'static str, timeout: Duration, failure: &Failure) -> LedgerError {
    match failure {
        Failure::Unconnected | Failure::Late => LedgerError::Timeout(timeout),
        Failure::Lost(text) => LedgerError::Disconnected(text.clone()),
        Failure::Refused(text) if is_demoted(text) || NOT_NOW.iter().any(|word| text.starts_with(word)) => {
            LedgerError::Disconnected(text.clone())
        }
        Failure::Refused(text) => LedgerError::Refused { script, message: text.clone() },
    }
}

/// Counts connections for commands, and says when they come and go, once each.
fn connection_log(driver: Arc<Driver>, is_up: Arc<AtomicBool>) -> impl FnMut(Told<'_>) + Send {
    let mut up = None;
    move |told| {
        match told {
            Told::Up(server) => {
                driver.connections.fetch_add(1, Ordering::Relaxed);
                if up != Some(true) {
                    tracing::info!(server = server.map(tracing::field::display), "connected to Redis");
                }
                up = Some(true);
            }
            Told::Down(failure) => {
                if up == Some(true) {
                    metrics::LEDGER_DISCONNECTS.count(&[]);
                }
                if up != Some(false) {
                    tracing::warn!(error = failure.text(), "Redis is not reachable");
                }
                driver.doubt.notify_one();
                up = Some(false);
            }
        }
        is_up.store(up == Some(true), Ordering::Relaxed);
        let all_up = driver.route.borrow().links.iter().all(|link| link.is_up.load(Ordering::Relaxed));
        metrics::LEDGER_UP.set(&[], if all_up { 1.0 } else { 0.0 });
    }
}

/// Takes what Redis sends unasked: messages, of which what finds no room is counted, and ends of subscriptions.
fn hand_on(
    driver: Arc<Driver>,
    messages: mpsc::Sender<Message>,
    lost: Arc<AtomicU64>,
    renew: Arc<Notify>,
) -> impl Fn(&Reply) + Send + Sync {
    move |pushed| {
        let Value::Push(mut told) = pushed.value() else { return };
        let mut text = || told.next().and_then(Value::text);
        let (Some(kind), Some(channel)) = (text(), text()) else { return };
        if kind == "message" || kind == "smessage" {
            let Some(text) = text() else { return };
            if (driver.is_known)(channel, text) {
                return;
            }
            let sent = room(&driver, channel.len() + text.len()).is_some_and(|room| {
                messages.try_send(Message { channel: channel.to_owned(), text: text.to_owned(), room }).is_ok()
            });
            if !sent {
                lost.fetch_add(1, Ordering::Relaxed);
            }
        } else if kind == "sunsubscribe" && driver.wants(channel) {
            // The slot has left this master, and is perhaps back before anybody has looked.
            driver.doubt.notify_one();
            renew.notify_one();
        }
    }
}

/// Room for a message of so many bytes.
fn room(driver: &Driver, bytes: usize) -> Option<OwnedSemaphorePermit> {
    let bytes = u32::try_from(bytes).ok().filter(|_| bytes <= MESSAGE_BYTES_MAX)?;
    Arc::clone(&driver.room).try_acquire_many_owned(bytes).ok()
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
async fn deliver(driver: Arc<Driver>, link: Arc<Link>, mut messages: mpsc::Receiver<Message>, lost: Arc<AtomicU64>) {
    let client = &link.subscriber;
    let mut connections = client.watch();
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
            message = messages.recv() => {
                // Whoever sends is dropped with the client, which is stopped together with this.
                let Some(message) = message else { return };
                *lock(&silence) = Silence::new();
                if message.channel == probe {
                    if let Some(sent) = sent.take() {
                        metrics::LEDGER_DELIVERY.observe(&[], sent.elapsed());
                    }
                } else if link.has(&driver, &message.channel) {
                    // A slot that has moved may leave a subscription behind.
                    let Message { channel, text, room } = message;
                    gap |= driver.deliveries.try_send(Delivery::Message { channel, text, room }).is_err();
                }
            }
            changed = connections.changed() => {
                if changed.is_err() {
                    return;
                }
                sent = None;
                subscribed = connections.borrow_and_update().is_some() && link.resubscribe(&driver, &probe).await;
                gap = true;
                *lock(&silence) = Silence::new();
            }
            () = link.renew.notified() => {
                subscribed = client.number().is_some() && link.resubscribe(&driver, &probe).await;
                gap = true;
            }
            _ = tick.tick() => {
                if !subscribed && client.number().is_some() {
                    subscribed = link.resubscribe(&driver, &probe).await;
                    gap = true;
                    *lock(&silence) = Silence::new();
                } else if subscribed && lock(&silence).is_suspicious() {
                    tracing::warn!("the subscription delivers nothing; connecting anew");
                    metrics::LEDGER_PROBES_LOST.count(&[]);
                    subscribed = false;
                    *lock(&silence) = Silence::new();
                    client.reconnect();
                }
                if subscribed {
                    sent.get_or_insert_with(Instant::now);
                }
                // In a task of its own: a Redis that does not answer must not keep this loop from delivering.
                let (link, publish, silence) = (Arc::clone(&link), Command::new("PUBLISH", &[&probe, ""]), Arc::clone(&silence));
                tokio::spawn(async move {
                    if link.commands.ask(publish).await.is_ok() {
                        lock(&silence).probed.get_or_insert_with(Instant::now);
                    }
                });
            }
        }
        let missed = lost.swap(0, Ordering::Relaxed);
        if missed > 0 {
            metrics::LEDGER_NOTICES_LOST.add(&[], missed);
            gap = true;
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
            if let Err(failure) = self.subscribe(driver, portion).await {
                tracing::warn!(error = failure.text(), "could not subscribe; will try again");
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

    /// Texts that Redis 6.2 and 7.0 say.
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
        ] {
            let error = classify("lock", Duration::ZERO, &Failure::Refused(text.to_owned()));
            assert!(matches!(error, LedgerError::Disconnected(_)), "{error:?}");
        }
        for text in ["OOM command not allowed when used memory > 'maxmemory'.", "NOPERM no permissions", "ERR LOADING"]
        {
            let error = classify("lock", Duration::ZERO, &Failure::Refused(text.to_owned()));
            assert!(matches!(error, LedgerError::Refused { .. }), "{error:?}");
        }
    }
}
