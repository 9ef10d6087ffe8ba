//! The orders-service of the fault run: it pays for locks over RabbitMQ as NestJS services do, asks again when an answer
//! does not come, and writes everything down.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::log::Log;
use super::shop::Book;
use super::{EVENT, REQUEST_TIMEOUT};
use crate::audit::outside::{Seen, Validity};

const QUEUE: &str = "realtime_queue";

/// Without an answer for so long, a call is one whose fate is not known.
const ANSWER_WITHIN: Duration = Duration::from_secs(6);

/// How long an answer is insisted on.
const INSIST: Duration = Duration::from_secs(90);

/// What a buyer wants to pay for.
#[derive(Debug, Clone)]
pub struct Wish {
    pub user: u64,
    pub order: String,
    pub lock: String,
    pub category: u64,
    pub quantity: u64,
}

type Pending = Arc<Mutex<HashMap<String, oneshot::Sender<Value>>>>;

pub struct Orders {
    channel: Arc<Mutex<Option<Channel>>>,
    pending: Pending,
    log: Arc<Log>,
    book: Book,
    over: CancellationToken,
}

impl Orders {
    /// Connects, and connects again whenever the broker has gone, as long as it lives.
    pub fn start(url: String, log: Arc<Log>, book: Book) -> Arc<Self> {
        let over = CancellationToken::new();
        let orders =
            Arc::new(Self { channel: Arc::default(), pending: Pending::default(), log, book, over: over.clone() });
        let (channel, pending) = (Arc::clone(&orders.channel), Arc::clone(&orders.pending));
        tokio::spawn(async move {
            while !over.is_cancelled() {
                over.run_until_cancelled(converse(&url, &channel, &pending)).await;
                channel.lock().unwrap().take();
                sleep(Duration::from_millis(100)).await;
            }
        });
        orders
    }

    /// Disconnects, and does not come back.
    pub fn stop(&self) {
        self.over.cancel();
    }

    async fn publish(&self, body: &Value, properties: BasicProperties) -> Option<()> {
        let channel = self.channel.lock().unwrap().clone()?;
        let options = BasicPublishOptions::default();
        let body = body.to_string();
        let sent = channel.basic_publish("".into(), QUEUE.into(), options, body.as_bytes(), properties);
        timeout(ANSWER_WITHIN, sent).await.ok()?.ok().map(drop)
    }

    /// A request and its answer; `None` when there is none or it is an error.
    pub async fn call(&self, pattern: &str, data: &Value) -> Option<Value> {
        let id = Uuid::new_v4().simple().to_string();
        let (sender, receiver) = oneshot::channel();
        self.pending.lock().unwrap().insert(id.clone(), sender);
        let properties = BasicProperties::default()
            .with_reply_to("amq.rabbitmq.reply-to".into())
            .with_correlation_id(id.clone().into());
        let asked = Instant::now();
        let answer = async {
            self.publish(&json!({"pattern": pattern, "data": data, "id": id}), properties).await?;
            receiver.await.ok()
        };
        let answer = timeout(ANSWER_WITHIN, answer).await.ok().flatten();
        self.pending.lock().unwrap().remove(&id);
        self.log.called(asked.elapsed(), answer.is_some(), pattern);
        answer.filter(|answer| answer.get("err").is_none_or(Value::is_null)).map(|mut answer| answer["response"].take())
    }

    /// Tells without asking, now and then twice, as at-least-once delivery does.
    async fn emit(&self, pattern: &str, data: &Value, twice: bool) {
        for _ in 0..=u8::from(twice) {
            self.publish(&json!({"pattern": pattern, "data": data}), BasicProperties::default()).await;
        }
    }

    /// Asks until there is an answer; each attempt is written down as `seen` says.
    async fn insist(&self, pattern: &str, data: &Value, seen: impl Fn(Option<&Value>) -> Seen) -> Option<Value> {
        let end = Instant::now() + INSIST;
        while Instant::now() < end {
            if self.channel.lock().unwrap().is_none() {
                sleep(Duration::from_millis(100)).await;
                continue;
            }
            let span = super::log::now();
            let answer = self.call(pattern, data).await;
            self.log.end(span, seen(answer.as_ref()));
            if answer.is_some() {
                return answer;
            }
            sleep(Duration::from_millis(300)).await;
        }
        None
    }

    /// Pays for one lock: validate, confirm, sell, report; one in six orders fails after the confirmation.
    pub async fn pay(&self, wish: Wish) {
        let Wish { user, order, lock, category, quantity } = &wish;
        let asked = json!({"userId": user, "eventId": EVENT, "categoryId": category, "quantity": quantity});
        let read = |answer: Option<&Value>| {
            let read = |answer: &Value| match answer["lockId"].as_str() {
                Some(lock) if answer["valid"] == true => {
                    Validity::Until { lock: lock.to_owned(), expires: super::log::instant(&answer["expiresAt"]) }
                }
                _ => Validity::No,
            };
            Seen::Validate { user: *user, category: *category, quantity: *quantity, answer: answer.map(read) }
        };
        let Some(valid) = self.insist("validate-user-locks", &asked, read).await else { return };
        if valid["lockId"] != json!(lock) {
            return;
        }
        let asked = json!({"lockId": lock, "userId": user, "orderId": order});
        let read = |answer: Option<&Value>| {
            let answer = answer.map(|answer| *answer == json!(true));
            Seen::Confirm { lock: lock.clone(), order: order.clone(), answer }
        };
        let Some(confirmed) = self.insist("confirm-lock", &asked, read).await else { return };
        if confirmed != json!(true) {
            return;
        }
        let report = json!({
            "orderId": order, "eventId": EVENT, "categoryId": category, "quantity": quantity, "userId": user, "lockId": lock
        });
        let lot = Uuid::new_v4().as_bytes()[0];
        if lot.is_multiple_of(6) {
            let asked = json!({"lockId": lock, "userId": user});
            let read = |answer: Option<&Value>| Seen::Release {
                lock: lock.clone(),
                answer: answer.map(|answer| *answer == json!(true)),
            };
            self.insist("release-ticket-lock", &asked, read).await;
            self.emit("order-cancelled", &report, lot.is_multiple_of(4)).await;
        } else {
            let span = super::log::now();
            {
                let mut book = self.book.lock().unwrap();
                let seats = book.get_mut(category).expect("a category");
                seats.sold += quantity;
                assert!(seats.sold <= seats.total, "sold more than there is: {wish:?}");
            }
            self.log.end(span, Seen::Sold { lock: lock.clone() });
            self.emit("order-completed", &report, lot.is_multiple_of(4)).await;
        }
    }

    /// The organiser has found more tickets.
    pub async fn add_tickets(&self, category: u64, more: u64) {
        let total = {
            let mut book = self.book.lock().unwrap();
            let seats = book.get_mut(&category).expect("a category");
            seats.total += more;
            seats.total
        };
        let span = super::log::now();
        self.log.end(span, Seen::Tickets { category, total });
        self.emit("availability-changed", &json!({"eventId": EVENT}), false).await;
    }
}

/// One connection, from its handshake to its end.
async fn converse(url: &str, channel: &Mutex<Option<Channel>>, pending: &Pending) -> Result<(), lapin::Error> {
    let connecting = Connection::connect(url, ConnectionProperties::default());
    let Ok(connection) = timeout(Duration::from_secs(3), connecting).await else { return Ok(()) };
    let connection = connection?;
    let opened = connection.create_channel().await?;
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let consuming = opened.basic_consume("amq.rabbitmq.reply-to".into(), "".into(), options, FieldTable::default());
    let mut replies = consuming.await?;
    channel.lock().unwrap().replace(opened);
    while let Some(reply) = replies.next().await {
        let reply = reply?;
        let id = reply.properties.correlation_id().as_ref().map(ToString::to_string);
        let reply: Value = serde_json::from_slice(&reply.data).expect("JSON");
        let waiting = id.and_then(|id| pending.lock().unwrap().remove(&id));
        if let Some(waiting) = waiting {
            // Fails when the caller has given up.
            waiting.send(reply).ok();
        }
    }
    Ok(())
}

const _: () = assert!(REQUEST_TIMEOUT.as_secs() < ANSWER_WITHIN.as_secs());

/// Deletes the queue with everything in it, as an operator might by mistake.
pub async fn delete_queue(url: &str) {
    let deleted = async {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.queue_delete(QUEUE.into(), lapin::options::QueueDeleteOptions::default()).await?;
        connection.close(200, "OK".into()).await
    };
    timeout(Duration::from_secs(20), deleted).await.expect("the broker answers").expect("the queue is deleted");
}
