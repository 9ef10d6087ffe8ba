//! The events-service over the NestJS `RabbitMQ` transport, as an ordinary Nest client would ask it.
//!
//! A task keeps one connection with one channel, which consumes the reply address before anything is published. The
//! queue of the events-service is never declared: a queue made with other arguments than a Nest peer's would end that
//! peer. A queue that does not exist shows itself by the returned message instead.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use url::Url;
use uuid::Uuid;

use super::frame::{FRAME_BYTES_MAX, Frame};
use super::nest::{self, Answer, Peer};
use super::source::{SourceError, SourceOptions};
use super::{Reply, StockSource};
use crate::domain::{EventId, Snapshot};
use crate::metrics;

/// Direct reply-to: the broker's pseudo-queue.
const REPLY_TO: &str = "amq.rabbitmq.reply-to";
/// Open requests.
const OUTSTANDING_MAX: usize = 256;
/// Pauses between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Seconds after which the broker and we notice that the other is gone, twice: the broker's own 60 is too slow.
const HEARTBEAT_SECONDS: &str = "10";
/// A channel on which nothing comes back for so many requests in a row is replaced.
const SILENT_MAX: u32 = 3;

/// A client of a NestJS service over `RabbitMQ`.
#[derive(Debug)]
pub struct NestRmq {
    session: watch::Receiver<Link>,
    queue: Arc<str>,
    permits: Arc<Semaphore>,
    options: SourceOptions,
}

/// How the connection stands.
#[derive(Debug, Clone)]
enum Link {
    Connecting,
    Down(Arc<str>),
    Up(Arc<Session>),
    Stopped,
}

type Outcome = Result<Answer, SourceError>;

/// One channel and the requests open on it. They fail with it.
#[derive(Debug)]
struct Session {
    channel: Channel,
    open: Mutex<HashMap<String, oneshot::Sender<Outcome>>>,
    silent: Mutex<u32>,
    broken: CancellationToken,
}

impl Session {
    fn open(&self) -> MutexGuard<'_, HashMap<String, oneshot::Sender<Outcome>>> {
        // Nothing that runs under this mutex panics half-way through a change.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle(&self, id: &str, outcome: Outcome) {
        if let Some(answer) = self.open().remove(id) {
            // The caller may have gone; then nobody is to be told.
            let _ = answer.send(outcome);
        }
    }

    fn fail(&self, why: &str) {
        for (_, answer) in self.open().drain() {
            // The caller may have gone; then nobody is to be told.
            let _ = answer.send(Err(SourceError::Unavailable(why.to_owned())));
        }
    }

    /// Counts an answer or its absence; too many absences in a row break the session.
    fn heard(&self, something: bool) {
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        *silent = if something { 0 } else { *silent + 1 };
        if *silent >= SILENT_MAX {
            self.broken.cancel();
        }
    }
}

impl NestRmq {
    /// Connects in the background and stays connected until `stop`. Must be called inside a runtime.
    #[must_use]
    pub fn start(broker: &Url, queue: String, options: SourceOptions, stop: CancellationToken) -> Self {
        let uri = connection_uri(broker);
        let host = broker.host_str().unwrap_or_default().to_owned();
        let (sender, session) = watch::channel(Link::Connecting);
        tokio::spawn(async move {
            let keeper = Keeper { uri, host, options, link: sender };
            keeper.run(&stop).await;
            metrics::INVENTORY_CONNECTED.set(&[], 0.0);
        });
        Self { session, queue: queue.into(), permits: Arc::new(Semaphore::new(OUTSTANDING_MAX)), options }
    }

    /// The session, or why there is none; waits while the first connection is being made.
    async fn session(&self, deadline: Instant) -> Result<Arc<Session>, SourceError> {
        let mut session = self.session.clone();
        let settled = timeout_at(deadline, session.wait_for(|link| !matches!(link, Link::Connecting))).await;
        match settled {
            Ok(Ok(link)) => match &*link {
                Link::Up(session) => Ok(Arc::clone(session)),
                Link::Down(why) => Err(SourceError::Unavailable(why.to_string())),
                Link::Stopped | Link::Connecting => Err(SourceError::Stopping),
            },
            Ok(Err(_)) => Err(SourceError::Stopping),
            Err(_) => Err(SourceError::Unavailable("not connected yet".to_owned())),
        }
    }
}

/// The broker's URL as the driver reads it: a lone `/` is no virtual host (the driver would take it for one with an
/// empty name), and the heartbeat is ours unless the URL says otherwise.
fn connection_uri(broker: &Url) -> String {
    let mut broker = broker.clone();
    if broker.path() == "/" {
        broker.set_path("");
    }
    if !broker.query_pairs().any(|(name, _)| name == "heartbeat") {
        broker.query_pairs_mut().append_pair("heartbeat", HEARTBEAT_SECONDS);
    }
    broker.into()
}

#[async_trait]
impl StockSource for NestRmq {
    async fn snapshot(&self, event: EventId) -> Result<Snapshot, SourceError> {
        nest::snapshot(self, event).await
    }
}

impl Peer for NestRmq {
    async fn request(&self, pattern: &'static str, data: EventId) -> Outcome {
        let limit = self.options.request_timeout;
        let deadline = Instant::now() + limit;
        let permit = Arc::clone(&self.permits).try_acquire_owned().map_err(|_| SourceError::Busy)?;
        let session = self.session(deadline).await?;
        let id = Uuid::new_v4().simple().to_string();
        let (sender, answer) = oneshot::channel();
        session.open().insert(id.clone(), sender);
        let _entry = Entry { session: &session, id: &id };
        let publish = Publish {
            session: Arc::clone(&session),
            queue: Arc::clone(&self.queue),
            body: Frame { pattern, data: data.value(), id: Some(&id) }.text().into_bytes(),
            id: id.clone(),
            deadline,
            _permit: permit,
        };
        tokio::spawn(publish.run());
        tokio::select! {
            answer = answer => answer.unwrap_or(Err(SourceError::Stopping)),
            () = session.broken.cancelled() => Err(SourceError::Unavailable("the connection broke".to_owned())),
            () = tokio::time::sleep_until(deadline) => {
                session.heard(false);
                Err(SourceError::Timeout(limit))
            }
        }
    }
}

/// Forgets a request whose caller is gone.
struct Entry<'a> {
    session: &'a Session,
    id: &'a str,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.session.open().remove(self.id);
    }
}

/// One message to the events-service. Runs as a task of its own: the driver keeps a confirmation that nobody waits for.
struct Publish {
    session: Arc<Session>,
    queue: Arc<str>,
    id: String,
    body: Vec<u8>,
    deadline: Instant,
    _permit: OwnedSemaphorePermit,
}

impl Publish {
    async fn run(self) {
        tokio::select! {
            () = self.publish() => {}
            () = self.session.broken.cancelled() => {}
        }
    }

    async fn publish(&self) {
        let left = self.deadline.saturating_duration_since(Instant::now()).as_millis().max(1);
        let properties = BasicProperties::default()
            .with_headers(FieldTable::default())
            .with_delivery_mode(1)
            .with_correlation_id(self.id.as_str().into())
            .with_reply_to(REPLY_TO.into())
            // A question that nobody waits for any more need not be answered.
            .with_expiration(left.to_string().as_str().into());
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let confirmation = async {
            self.session
                .channel
                .basic_publish("".into(), (&*self.queue).into(), options, &self.body, properties)
                .await?
                .await
        };
        match confirmation.await {
            Ok(confirmation) => {
                let refused = confirmation.is_nack();
                if let Some(returned) = confirmation.take_message() {
                    let id = returned.properties.correlation_id().as_ref().map_or(self.id.as_str(), |id| id.as_str());
                    let why = format!("nothing consumes the queue {}: {}", self.queue, returned.reply_text.as_str());
                    self.session.heard(true);
                    self.session.settle(id, Err(SourceError::Unavailable(why)));
                } else if refused {
                    let why = "the broker did not take the question".to_owned();
                    self.session.settle(&self.id, Err(SourceError::Unavailable(why)));
                }
            }
            Err(error) => {
                self.session.settle(&self.id, Err(SourceError::Unavailable(error.to_string())));
                self.session.broken.cancel();
            }
        }
    }
}

/// The task that keeps the connection.
struct Keeper {
    uri: String,
    host: String,
    options: SourceOptions,
    link: watch::Sender<Link>,
}

impl Keeper {
    async fn run(&self, stop: &CancellationToken) {
        let mut pause = BACKOFF.0;
        let mut told = false;
        loop {
            let why = tokio::select! {
                why = self.serve(&mut told, &mut pause) => why,
                () = stop.cancelled() => {
                    self.link.send_replace(Link::Stopped);
                    return;
                }
            };
            self.link.send_replace(Link::Down(why.as_str().into()));
            metrics::INVENTORY_CONNECTED.set(&[], 0.0);
            metrics::INVENTORY_DISCONNECTS.count(&[]);
            if !told {
                tracing::warn!(host = %self.host, error = %why, "no connection to the events-service's broker");
                told = true;
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = stop.cancelled() => {
                    self.link.send_replace(Link::Stopped);
                    return;
                }
            }
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    /// One connection from its beginning to its end; why it ended.
    async fn serve(&self, told: &mut bool, pause: &mut Duration) -> String {
        let (connection, channel, mut replies) = match timeout(self.options.connect_timeout, self.connect()).await {
            Ok(Ok(parts)) => parts,
            Ok(Err(error)) => return error.to_string(),
            Err(_) => return "no connection in time".to_owned(),
        };
        let session = Arc::new(Session {
            channel,
            open: Mutex::default(),
            silent: Mutex::default(),
            broken: CancellationToken::new(),
        });
        let _broken = session.broken.clone().drop_guard();
        self.link.send_replace(Link::Up(Arc::clone(&session)));
        metrics::INVENTORY_CONNECTED.set(&[], 1.0);
        let why = loop {
            tokio::select! {
                reply = replies.next() => match reply {
                    Some(Ok(delivery)) => {
                        (*told, *pause) = (false, BACKOFF.0);
                        session.heard(true);
                        if let Some(id) = delivery.properties.correlation_id() {
                            session.settle(id.as_str(), read(&delivery.data));
                        }
                    }
                    Some(Err(error)) => break error.to_string(),
                    None => break "the broker ended the reply consumer".to_owned(),
                },
                () = session.broken.cancelled() => break "the channel broke or fell silent".to_owned(),
            }
        };
        session.fail(&why);
        // The broker may be gone: its farewell is waited for only briefly.
        let _ = timeout(self.options.connect_timeout, connection.close(200, "".into())).await;
        why
    }

    async fn connect(&self) -> lapin::Result<(Connection, Channel, Consumer)> {
        let properties = ConnectionProperties::default().with_connection_name("seatlock-inventory".into());
        let connection = Connection::connect(&self.uri, properties).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let replies = channel.basic_consume(REPLY_TO.into(), "".into(), options, FieldTable::default()).await?;
        Ok((connection, channel, replies))
    }
}

fn read(body: &[u8]) -> Outcome {
    if body.len() > FRAME_BYTES_MAX {
        return Err(SourceError::Malformed(format!("a reply of {} bytes", body.len())));
    }
    Ok(match Reply::read(body) {
        Reply::Error(error) => Answer::Refused(error),
        Reply::Next { value, .. } => Answer::Value(value.unwrap_or(Value::Null)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_gets_a_virtual_host_only_where_the_url_names_one() {
        for (text, expected) in [
            ("amqp://u:p@h/", "amqp://u:p@h?heartbeat=10"),
            ("amqp://h:5672", "amqp://h:5672?heartbeat=10"),
            ("amqp://h/v%2Fw?heartbeat=3", "amqp://h/v%2Fw?heartbeat=3"),
        ] {
            assert_eq!(connection_uri(&Url::parse(text).expect("a URL")), expected);
        }
    }
}
