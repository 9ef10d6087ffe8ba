//! RabbitMQ as a NestJS service uses it: requests with direct reply-to, events that are confirmed, a queue that is served.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeclareOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::{Mutex as AsyncMutex, oneshot};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::nest::{self, Fault, Packet, Refusal, Service};

/// Within which a request is answered, or its outcome is unknown. Seatlock answers within 2 s; a NestJS caller would
/// write `.pipe(timeout(3000))`.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// For the broker itself.
const BROKER_TIMEOUT: Duration = Duration::from_secs(5);

/// Messages in work at once.
const PREFETCH: u16 = 64;

/// The broker's pseudo-queue for replies.
const REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It was answered: no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It may or may not have been carried out. Ask again: everything here can be repeated.
    #[error("unknown: {0}")]
    Unknown(String),
}

/// A connection for requests and events, made when it is needed and made again when it broke.
pub struct Broker {
    url: String,
    session: AsyncMutex<Option<Arc<Session>>>,
}

struct Session {
    connection: Connection,
    channel: Channel,
    waiting: Mutex<HashMap<String, oneshot::Sender<Vec<u8>>>>,
}

impl Session {
    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<String, oneshot::Sender<Vec<u8>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Broker {
    /// Connects with the first message.
    pub fn new(url: &str) -> Self {
        Self { url: connection_url(url), session: AsyncMutex::default() }
    }

    /// Asks and waits for the answer.
    pub async fn request(&self, queue: &str, pattern: &str, data: &impl Serialize) -> Result<Value, CallError> {
        self.request_within(ANSWER_TIMEOUT, queue, pattern, data).await
    }

    /// Asks and waits for the answer so long.
    pub async fn request_within(
        &self,
        limit: Duration,
        queue: &str,
        pattern: &str,
        data: &impl Serialize,
    ) -> Result<Value, CallError> {
        let id = Uuid::new_v4().simple().to_string();
        let properties = BasicProperties::default()
            .with_headers(FieldTable::default())
            .with_reply_to(REPLY_TO.into())
            .with_correlation_id(id.as_str().into())
            // A request that nobody waits for any more is not carried out.
            .with_expiration(limit.as_millis().to_string().as_str().into());
        let session = self.session().await?;
        let (sender, answer) = oneshot::channel();
        session.waiting().insert(id.clone(), sender);
        let asked = async {
            self.publish(&session, queue, &nest::packet(pattern, data, Some(&id)), properties).await?;
            answer.await.map_err(|_| CallError::Unknown("the connection broke".to_owned()))
        };
        let answer = timeout(limit, asked).await;
        session.waiting().remove(&id);
        match answer {
            Ok(body) => Ok(nest::outcome(&body?)?),
            Err(_) => Err(CallError::Unknown(format!("{queue} did not answer {pattern} within {limit:?}"))),
        }
    }

    /// Tells, and waits until the broker has it on disk.
    pub async fn emit(&self, queue: &str, pattern: &str, data: &impl Serialize) -> Result<(), CallError> {
        let session = self.session().await?;
        let properties = BasicProperties::default().with_headers(FieldTable::default()).with_delivery_mode(2);
        let body = nest::packet(pattern, data, None);
        timeout(BROKER_TIMEOUT, self.publish(&session, queue, &body, properties))
            .await
            .unwrap_or_else(|_| Err(CallError::Unknown("the broker did not answer".to_owned())))
    }

    async fn publish(
        &self,
        session: &Session,
        queue: &str,
        body: &[u8],
        properties: BasicProperties,
    ) -> Result<(), CallError> {
        // A message for a queue that does not exist comes back instead of disappearing.
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let confirmed =
            async { session.channel.basic_publish("".into(), queue.into(), options, body, properties).await?.await };
        let confirmation = confirmed.await.map_err(|error| CallError::Unknown(error.to_string()))?;
        if confirmation.is_nack() || confirmation.take_message().is_some() {
            return Err(CallError::Unknown(format!("the broker has no queue {queue}")));
        }
        Ok(())
    }

    async fn session(&self) -> Result<Arc<Session>, CallError> {
        let mut current = self.session.lock().await;
        if let Some(session) = current.as_ref()
            && session.connection.status().connected()
            && session.channel.status().connected()
        {
            return Ok(Arc::clone(session));
        }
        let opened = timeout(BROKER_TIMEOUT, open(&self.url)).await;
        let opened = opened.map_err(|_| CallError::Unknown("the broker did not answer".to_owned()))?;
        let session = opened.map_err(|error| CallError::Unknown(error.to_string()))?;
        *current = Some(Arc::clone(&session));
        Ok(session)
    }
}

/// A connection whose reply consumer runs. It has to run before the first request, on the same channel.
async fn open(url: &str) -> lapin::Result<Arc<Session>> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut replies = channel.basic_consume(REPLY_TO.into(), "".into(), options, FieldTable::default()).await?;
    let session = Arc::new(Session { connection, channel, waiting: Mutex::default() });
    let heard = Arc::clone(&session);
    tokio::spawn(async move {
        while let Some(Ok(delivery)) = replies.next().await {
            let id = delivery.properties.correlation_id().as_ref().map(ShortString::as_str);
            if let Some(waiting) = id.and_then(|id| heard.waiting().remove(id)) {
                // Whoever asked may have stopped waiting.
                let _ = waiting.send(delivery.data);
            }
        }
        // Replies of a lost connection never come: whoever waits learns it now, by the dropped sender.
        heard.waiting().clear();
        let _ = heard.connection.close(200, "".into()).await;
    });
    Ok(session)
}

/// `amqp://host/` means the default virtual host, as in Node; a silent peer is noticed after twice the heartbeat.
fn connection_url(url: &str) -> String {
    let url = url.trim_end_matches('/');
    let mark = if url.contains('?') { '&' } else { '?' };
    if url.contains("heartbeat=") { url.to_owned() } else { format!("{url}{mark}heartbeat=10") }
}

/// Serves a queue for ever; a broken connection is made again.
pub async fn serve<S: Service>(url: String, queue: String, service: Arc<S>) {
    let mut told = false;
    loop {
        let why = match consume(&connection_url(&url), &queue, &service, &mut told).await {
            Ok(()) => "the broker ended the consumer".to_owned(),
            Err(error) => error.to_string(),
        };
        if !told {
            tracing::warn!(queue, error = %why, "not served; trying again");
            told = true;
        }
        sleep(Duration::from_millis(500)).await;
    }
}

async fn consume<S: Service>(url: &str, queue: &str, service: &Arc<S>, told: &mut bool) -> lapin::Result<()> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    // Exactly as NestJS declares it: with other arguments every NestJS peer of this queue would end.
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), durable, FieldTable::default()).await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let mut messages = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await?;
    *told = false;
    tracing::info!(queue, "serving");
    while let Some(delivery) = messages.next().await {
        let (service, channel, delivery) = (Arc::clone(service), channel.clone(), delivery?);
        tokio::spawn(async move {
            // Acknowledged only now: who dies before leaves the message to another.
            if answer(&*service, &channel, &delivery).await.is_ok()
                && let Err(error) = delivery.ack(BasicAckOptions::default()).await
            {
                tracing::debug!(%error, "a message will come again");
            }
        });
    }
    Ok(())
}

async fn answer<S: Service>(service: &S, channel: &Channel, delivery: &Delivery) -> lapin::Result<()> {
    let Some(packet) = Packet::read(&delivery.data) else {
        tracing::warn!(bytes = delivery.data.len(), "dropped a message that cannot be read");
        return Ok(());
    };
    let outcome = service.handle(&packet.pattern, packet.data).await;
    if let Err(Fault::Broken(error)) = &outcome {
        tracing::error!(pattern = packet.pattern, error = format!("{error:#}"), "a message failed");
    }
    let (Some(id), Some(address)) = (&packet.id, delivery.properties.reply_to()) else { return Ok(()) };
    let mut properties = BasicProperties::default().with_headers(FieldTable::default());
    if let Some(correlation) = delivery.properties.correlation_id() {
        properties = properties.with_correlation_id(correlation.clone());
    }
    let body = nest::reply(id, &outcome).to_string();
    // Never mandatory: some brokers return replies that they delivered.
    let options = BasicPublishOptions::default();
    channel.basic_publish("".into(), address.clone(), options, body.as_bytes(), properties).await?;
    Ok(())
}
