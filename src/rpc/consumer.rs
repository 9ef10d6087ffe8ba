//! The consumer: connects, declares, consumes, answers, acknowledges, and comes back from whatever the broker does.
//!
//! Its invariant: a message is acknowledged once its reply is with the broker or is known to be undeliverable; a
//! message that is neither is delivered again, here or at another replica. `lapin`'s own recovery is not used. It does
//! not notice a deleted queue, so the loop here is needed anyway, and one mechanism is enough.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;
use uuid::Uuid;

use super::RpcOptions;
use super::dispatch::Dispatcher;
use super::link::{CALL_TIMEOUT, Link, LinkError, parse_url, within};
use super::reply::{Replies, ReplyError};
use super::wire::{self, Answer, Call, Packet, Pattern};
use crate::ledger::LedgerError;
use crate::metrics;
use crate::telemetry::{Headers, Request, from_queue};

/// Pauses between attempts double from the first to the last.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// A consumption that stood this long was a success: the next failure is the first of its kind again.
const STEADY: Duration = Duration::from_secs(5);

/// How often a silent loss of the connection is looked for.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// For the handshake that ends the connections of a drained consumer.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// A foreign pattern is logged no longer than this.
const PATTERN_CHARS_LOGGED: usize = 64;

/// AMQP's word for "there is no such queue".
const NOT_FOUND: u16 = 404;

/// What other tasks may know about the consumer.
#[derive(Debug, Default)]
pub struct State {
    consuming: AtomicBool,
    blocked: AtomicBool,
}

impl State {
    pub fn is_consuming(&self) -> bool {
        self.consuming.load(Ordering::Relaxed)
    }

    pub fn is_blocked(&self) -> bool {
        self.blocked.load(Ordering::Relaxed)
    }

    fn set_consuming(&self, value: bool) {
        self.consuming.store(value, Ordering::Relaxed);
        metrics::RPC_CONSUMING.set(&[], f64::from(u8::from(value)));
    }

    fn set_blocked(&self, value: bool) {
        self.blocked.store(value, Ordering::Relaxed);
        metrics::RPC_BLOCKED.set(&[], f64::from(u8::from(value)));
    }
}

/// Growing pauses with jitter, so that replicas do not come back in step.
struct Pause(Duration);

impl Pause {
    const fn new() -> Self {
        Self(PAUSE_MIN)
    }

    /// The pause after something that stood so long.
    fn after(&mut self, stood: Duration) -> Duration {
        if stood > STEADY {
            *self = Self::new();
        }
        self.next()
    }

    fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(PAUSE_MAX);
        // Between half and the whole of it.
        let random = u32::from(Uuid::new_v4().as_bytes()[0]);
        pause / 2 + pause * random / 510
    }
}

/// Why a consumption ended.
#[derive(Debug)]
enum Ended {
    /// `stop` was called, and the consumer is cancelled.
    Stopped,
    /// The broker cancelled the consumer (its queue was deleted) or closed the channel; the connection stands.
    Cancelled,
}

/// A session that broke.
struct Loss {
    cause: LinkError,
    stood: Duration,
}

/// See the module.
pub struct Consumer {
    options: RpcOptions,
    worker: Arc<Worker>,
    state: Arc<State>,
    stop: CancellationToken,
}

/// One connection's worth of consuming.
struct Session {
    link: Link,
    replies: Replies,
    /// Messages in work.
    tasks: TaskTracker,
    /// Ends with the session: what was delivered in it will be delivered again.
    over: CancellationToken,
    /// Somebody found that replies cannot be sent.
    broken: Notify,
}

impl Session {
    fn in_work(&self) -> f64 {
        u32::try_from(self.tasks.len()).map_or(f64::MAX, f64::from)
    }
}

impl Consumer {
    pub fn new(options: RpcOptions, dispatcher: Dispatcher, state: Arc<State>, stop: CancellationToken) -> Self {
        let prefetch = options.prefetch.max(2);
        let options = RpcOptions { prefetch, ..options };
        let worker = Arc::new(Worker {
            dispatcher: Arc::new(dispatcher),
            request_timeout: options.request_timeout,
            calls: Arc::new(Semaphore::new(prefetch.into())),
            waiting: Semaphore::new(usize::from(prefetch) / 2),
            stop: stop.clone(),
        });
        Self { options, worker, state, stop }
    }

    /// Until `stop`.
    pub async fn run(&self) {
        let mut pause = Pause::new();
        while let Some(error) = self.run_once().await {
            metrics::RPC_INTERRUPTIONS.count(&["connection"]);
            let pause = pause.after(error.stood);
            tracing::warn!(error = %error.cause, ?pause, "no connection to RabbitMQ; trying again");
            if self.stop.run_until_cancelled(sleep(pause)).await.is_none() {
                break;
            }
        }
    }

    /// One session, from connecting to its end. `None` means stopped.
    async fn run_once(&self) -> Option<Loss> {
        let session = match self.stop.run_until_cancelled(self.connect()).await? {
            Ok(session) => session,
            Err(cause) => return Some(Loss { cause, stood: Duration::ZERO }),
        };
        let began = Instant::now();
        let ended = self.consume_all(&session).await;
        self.state.set_consuming(false);
        self.state.set_blocked(false);
        if ended.is_ok() {
            self.finish(&session).await;
        }
        session.over.cancel();
        ended.err().map(|cause| Loss { cause, stood: began.elapsed() })
    }

    async fn connect(&self) -> Result<Arc<Session>, LinkError> {
        let uri = parse_url(&self.options.url)?;
        let link = Link::open(&uri, "seatlock consumer").await?;
        let replies = Replies::open(&uri).await?;
        Ok(Arc::new(Session {
            link,
            replies,
            tasks: TaskTracker::new(),
            over: CancellationToken::new(),
            broken: Notify::new(),
        }))
    }

    /// Consumes on one connection, again and again when the consumer is cancelled. `Ok` means stopped.
    async fn consume_all(&self, session: &Arc<Session>) -> Result<(), LinkError> {
        let mut pause = Pause::new();
        loop {
            let began = Instant::now();
            let ended = self.consume(session).await;
            self.state.set_consuming(false);
            match ended? {
                Ended::Stopped => return Ok(()),
                Ended::Cancelled if session.link.is_connected() => {}
                Ended::Cancelled => return Err(LinkError::Lost),
            }
            metrics::RPC_INTERRUPTIONS.count(&["consumer"]);
            let (queue, pause) = (&self.options.queue, pause.after(began.elapsed()));
            tracing::warn!(queue, ?pause, "the broker ended the consumer; declaring and consuming again");
            if self.stop.run_until_cancelled(sleep(pause)).await.is_none() {
                return Ok(());
            }
        }
    }

    async fn consume(&self, session: &Arc<Session>) -> Result<Ended, LinkError> {
        let Some(started) = self.stop.run_until_cancelled(self.start(&session.link)).await else {
            return Ok(Ended::Stopped);
        };
        let (channel, mut consumer) = started?;
        self.state.set_consuming(true);
        tracing::info!(queue = self.options.queue, prefetch = self.options.prefetch, "consuming");
        let mut check = interval(CHECK_EVERY);
        check.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                () = session.broken.notified() => return Err(LinkError::Lost),
                _ = check.tick() => {
                    self.state.set_blocked(session.replies.is_blocked());
                    metrics::RPC_IN_WORK.set(&[], session.in_work());
                    if !session.link.is_connected() || !channel.status().connected() {
                        return Ok(Ended::Cancelled);
                    }
                }
                delivery = consumer.next() => match delivery {
                    Some(Ok(delivery)) => self.take(session, &channel, delivery),
                    Some(Err(error)) => {
                        tracing::debug!(%error, "the consumer's channel");
                        return Ok(Ended::Cancelled);
                    }
                    None => return Ok(Ended::Cancelled),
                }
            }
        }
        self.state.set_consuming(false);
        let last_call = async {
            if let Err(error) = channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()).await {
                tracing::debug!(%error, "cancelling the consumer");
                return;
            }
            // What came before the cancellation took effect is in work like the rest. The stream ends by itself.
            while let Some(Ok(delivery)) = consumer.next().await {
                self.take(session, &channel, delivery);
            }
        };
        if timeout(CALL_TIMEOUT, last_call).await.is_err() {
            tracing::debug!("the broker did not end the consumer");
        }
        Ok(Ended::Stopped)
    }

    async fn start(&self, link: &Link) -> Result<(Channel, lapin::Consumer), LinkError> {
        self.ensure_queue(link).await?;
        let channel = link.channel().await?;
        within(channel.basic_qos(self.options.prefetch, BasicQosOptions::default())).await?;
        let queue = ShortString::from(self.options.queue.as_str());
        let options = BasicConsumeOptions::default();
        let consumer = within(channel.basic_consume(queue, "".into(), options, FieldTable::default())).await?;
        Ok((channel, consumer))
    }

    /// Uses the queue as it is, or makes it exactly as a NestJS peer would. Any other argument of ours would end every
    /// NestJS process that declares it: 406, which Nest does not handle.
    async fn ensure_queue(&self, link: &Link) -> Result<(), LinkError> {
        let queue = ShortString::from(self.options.queue.as_str());
        // A refused declaration closes its channel, so each has one to throw away.
        let probe = link.channel().await?;
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        match within(probe.queue_declare(queue.clone(), passive, FieldTable::default())).await {
            Ok(_) => return Ok(()),
            Err(error) if error.code() == Some(NOT_FOUND) => {}
            Err(error) => return Err(error),
        }
        let channel = link.channel().await?;
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        within(channel.queue_declare(queue, durable, FieldTable::default())).await?;
        tracing::info!(queue = self.options.queue, "declared the queue");
        Ok(())
    }

    /// Starts the work on one message. The broker's prefetch bounds how many there are.
    fn take(&self, session: &Arc<Session>, channel: &Channel, delivery: Delivery) {
        let worker = Arc::clone(&self.worker);
        // The channel must outlive the acknowledgement: dropping its last handle closes it.
        let (on, channel) = (Arc::clone(session), channel.clone());
        let (span, request) = from_queue(&self.options.queue, headers(&delivery));
        let work = async move {
            worker.work(&on, delivery, request).await;
            drop(channel);
        };
        session.tasks.spawn(work.instrument(span));
    }

    /// After the consumer is cancelled: finishes what is in work and says goodbye.
    async fn finish(&self, session: &Session) {
        session.tasks.close();
        if timeout(self.options.request_timeout + CALL_TIMEOUT, session.tasks.wait()).await.is_err() {
            let messages = session.tasks.len();
            tracing::warn!(messages, "some messages were not finished in time and go back to the queue");
        }
        let goodbye = async { tokio::join!(session.replies.close(), session.link.close()) };
        if timeout(GOODBYE_TIMEOUT, goodbye).await.is_err() {
            tracing::debug!("the broker did not say goodbye");
        }
    }
}

/// Carries messages out.
struct Worker {
    dispatcher: Arc<Dispatcher>,
    request_timeout: Duration,
    /// One permit for each call that the ledger is busy with, also when its requester has had an answer already.
    calls: Arc<Semaphore>,
    /// One permit for each event that waits for the ledger to come back.
    waiting: Semaphore,
    stop: CancellationToken,
}

/// What is said to the broker about a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Settle {
    /// It is done with.
    Acknowledge,
    /// Somebody else should do it.
    GiveBack,
    /// Nothing: it will be delivered again when the session is over.
    Leave,
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("no answer within the request timeout")]
    Late,
    #[error("the handler panicked")]
    Panicked,
}

impl Failure {
    const fn is_retryable(&self) -> bool {
        match self {
            Self::Ledger(error) => error.is_retryable(),
            Self::Late => true,
            Self::Panicked => false,
        }
    }
}

impl Worker {
    async fn work(&self, session: &Session, delivery: Delivery, request: Request) {
        let began = Instant::now();
        let text = wire::text(&delivery.data);
        let (pattern, outcome, settle) = match Packet::decode(&text) {
            Ok(packet) => {
                let pattern = packet.pattern.as_deref().and_then(Pattern::of);
                let (outcome, settle) = match pattern {
                    Some(pattern) => self.handle(session, &delivery, &packet, pattern, began).await,
                    None => self.refuse(session, &delivery, &packet).await,
                };
                (pattern.map_or("unknown", Pattern::as_str), outcome, settle)
            }
            // Acknowledged, so that it comes and is logged once only. To give it back would be to get it back.
            Err(error) => {
                tracing::warn!(%error, bytes = delivery.data.len(), "dropped a message that cannot be read");
                ("unknown", "undecodable", Settle::Acknowledge)
            }
        };
        let settled = match settle {
            Settle::Acknowledge => within(delivery.ack(BasicAckOptions::default())).await.map(drop),
            Settle::GiveBack => {
                let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
                within(delivery.nack(options)).await.map(drop)
            }
            Settle::Leave => Ok(()),
        };
        if let Err(error) = settled {
            tracing::debug!(%error, "a message will be delivered again");
        }
        metrics::RPC_MESSAGES.count(&[pattern, outcome]);
        metrics::RPC_SECONDS.observe(&[pattern], began.elapsed());
        tracing::debug!(pattern, outcome, ms = began.elapsed().as_secs_f64() * 1000.0, "settled a message");
        request.ends(pattern, outcome, matches!(outcome, "failed" | "dropped"));
    }

    /// Nobody handles the pattern.
    async fn refuse(&self, session: &Session, delivery: &Delivery, packet: &Packet<'_>) -> (&'static str, Settle) {
        let pattern: String =
            packet.pattern.as_deref().unwrap_or_default().chars().take(PATTERN_CHARS_LOGGED).collect();
        tracing::warn!(?pattern, request = packet.id.is_some(), "no handler for this pattern");
        let settle = match packet.id {
            Some(id) => self.reply(session, delivery, &wire::no_handler(id)).await,
            None => Settle::Acknowledge,
        };
        ("unknown", settle)
    }

    async fn handle(
        &self,
        session: &Session,
        delivery: &Delivery,
        packet: &Packet<'_>,
        pattern: Pattern,
        began: Instant,
    ) -> (&'static str, Settle) {
        let request = packet.id.is_some();
        let call = match Call::read(pattern, packet.data) {
            Ok(call) => Arc::new(call),
            Err(error) => {
                tracing::warn!(%error, pattern = pattern.as_str(), request, "malformed data");
                let settle = if request {
                    self.reply(session, delivery, &wire::error(&error.to_string())).await
                } else {
                    Settle::Acknowledge
                };
                return ("malformed", settle);
            }
        };
        if !request {
            return self.carry(session, pattern, &call, began).await;
        }
        let (outcome, body) = match self.call(&call, began).await {
            Ok(answer) => ("answered", wire::response(&answer)),
            Err(error) => {
                log_failure(pattern, &error);
                ("failed", wire::error(wire::INTERNAL))
            }
        };
        (outcome, self.reply(session, delivery, &body).await)
    }

    /// An event: nobody waits for an answer, but it must not be lost because the ledger is away. A few wait for it here;
    /// they keep their place in the prefetch, and requests keep at least half of it. Beyond that an event is dropped:
    /// what it would have said, a fresh stock snapshot says after the settle timeout.
    async fn carry(
        &self,
        session: &Session,
        pattern: Pattern,
        call: &Arc<Call>,
        began: Instant,
    ) -> (&'static str, Settle) {
        let Err(mut error) = self.call(call, began).await else { return ("done", Settle::Acknowledge) };
        log_failure(pattern, &error);
        let waiting = self.waiting.try_acquire();
        let mut pause = Pause::new();
        while error.is_retryable() && waiting.is_ok() {
            tokio::select! {
                () = sleep(pause.next()) => {}
                () = self.stop.cancelled() => return ("given_back", Settle::GiveBack),
                () = session.over.cancelled() => return ("given_back", Settle::Leave),
            }
            match self.call(call, Instant::now()).await {
                Ok(_) => return ("done", Settle::Acknowledge),
                Err(again) => error = again,
            }
        }
        tracing::error!(%error, pattern = pattern.as_str(), "dropped an event that the ledger cannot take now");
        ("dropped", Settle::Acknowledge)
    }

    /// One attempt. The ledger is never interrupted: when the time is up, the call runs on and only its answer is lost.
    async fn call(&self, call: &Arc<Call>, began: Instant) -> Result<Answer, Failure> {
        // A tenth is kept for the reply's way.
        let deadline = began + self.request_timeout * 9 / 10;
        let Ok(Ok(permit)) = timeout_at(deadline, Arc::clone(&self.calls).acquire_owned()).await else {
            return Err(Failure::Late);
        };
        let (dispatcher, call) = (Arc::clone(&self.dispatcher), Arc::clone(call));
        let running = async move {
            let answer = dispatcher.run(&call).await;
            drop(permit);
            answer
        };
        let running = tokio::spawn(running.in_current_span());
        match timeout_at(deadline, running).await {
            Ok(Ok(answer)) => Ok(answer?),
            Ok(Err(_)) => Err(Failure::Panicked),
            Err(_) => Err(Failure::Late),
        }
    }

    /// Sends a reply to whoever asked.
    async fn reply(&self, session: &Session, delivery: &Delivery, body: &[u8]) -> Settle {
        let properties = &delivery.properties;
        let Some(address) = properties.reply_to().as_ref().filter(|address| !address.as_str().is_empty()) else {
            metrics::RPC_REPLIES.count(&["no_address"]);
            return Settle::Acknowledge;
        };
        // Echoed as it is. The text `error` would make a Nest client drop its connection, but Nest clients choose
        // hexadecimal ones, and any other requester can wait for what it likes.
        let correlation = properties.correlation_id().as_ref();
        let too_late = async {
            session.over.cancelled().await;
            sleep(CALL_TIMEOUT).await;
        };
        let sent = tokio::select! {
            sent = session.replies.send(address, correlation, body) => sent,
            () = too_late => return Settle::Leave,
        };
        let (outcome, settle) = match sent {
            Ok(()) => ("sent", Settle::Acknowledge),
            Err(ReplyError::Unreachable(error)) => {
                tracing::debug!(%error, "a reply cannot be sent");
                session.broken.notify_one();
                ("unreachable", Settle::Leave)
            }
            Err(error @ ReplyError::BadAddress(_)) => {
                tracing::warn!(%error, "gave up a reply");
                ("bad_address", Settle::Acknowledge)
            }
            Err(error @ ReplyError::Rejected) => {
                tracing::warn!(%error, "gave up a reply");
                ("rejected", Settle::Acknowledge)
            }
        };
        metrics::RPC_REPLIES.count(&[outcome]);
        settle
    }
}

/// What the sender says of its trace.
fn headers(delivery: &Delivery) -> Headers<'_> {
    let text = |name: &str| {
        let value = delivery.properties.headers().as_ref()?.inner().get(name)?;
        // The only text that clients send in headers.
        let AMQPValue::LongString(text) = value else { return None };
        std::str::from_utf8(text.as_bytes()).ok()
    };
    Headers { parent: text("traceparent"), state: text("tracestate") }
}

/// An outage of Redis is logged by the ledger, once; here it would be once per message.
fn log_failure(pattern: Pattern, error: &Failure) {
    let pattern = pattern.as_str();
    if error.is_retryable() {
        tracing::debug!(%error, pattern, "no answer");
    } else {
        tracing::error!(%error, pattern, "no answer");
    }
}
