//! The consumer, on a real RabbitMQ: what NestJS peers see, and what happens when broker, ledger or peers misbehave.
//!
//! A broker takes seconds to start, so the scenarios that leave it whole share one; each has a queue of its own and
//! says its name when it begins. `get-realtime-stats` is answered by the test itself, which makes it slow, failing or
//! panicking at will.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use seatlock::domain::{EventId, LockId, LockOutcome, OrderResult, Personal, Snapshot};
use seatlock::inventory::{SourceError, Stock, StockOptions, StockSource};
use seatlock::ledger::{FeedItem, Ledger, LedgerError, MemoryLedger, Topic};
use seatlock::rpc::{self, Rpc, RpcOptions, StatsSource};
use serde_json::{Value, json};
use tokio::sync::{Mutex, Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use crate::support::ledger::{category, event, live, options, order_id, quantity, request, snapshot, stock, user};
use crate::support::rabbit::RabbitServer;
use crate::support::redis::RedisServer;

const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);

/// For anything that should take milliseconds.
const SOON: Duration = Duration::from_secs(10);

/// Waits for something with a bound.
async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, wait).await.unwrap_or_else(|_| panic!("not within {SOON:?}: {what}"))
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    soon(what, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// A stock source that always has the same and counts how often it is asked.
struct Shelf {
    asked: AtomicUsize,
}

#[async_trait]
impl StockSource for Shelf {
    async fn snapshot(&self, _event: EventId) -> Result<Snapshot, SourceError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        Ok(snapshot(&[(1, 100, 100), (2, 100, 100)]))
    }
}

/// What `get-realtime-stats` does: counts, waits for a permit, answers with a name.
struct Handler {
    name: &'static str,
    gate: Semaphore,
    began: AtomicUsize,
    at_once: AtomicUsize,
    at_once_max: AtomicUsize,
    panics: bool,
}

impl Handler {
    fn open(name: &'static str) -> Arc<Self> {
        Self::new(name, Semaphore::MAX_PERMITS, false)
    }

    fn shut(name: &'static str) -> Arc<Self> {
        Self::new(name, 0, false)
    }

    fn new(name: &'static str, permits: usize, panics: bool) -> Arc<Self> {
        Arc::new(Self {
            name,
            gate: Semaphore::new(permits),
            began: AtomicUsize::new(0),
            at_once: AtomicUsize::new(0),
            at_once_max: AtomicUsize::new(0),
            panics,
        })
    }
}

#[async_trait]
impl StatsSource for Handler {
    async fn stats(&self) -> Result<Value, LedgerError> {
        self.began.fetch_add(1, Ordering::SeqCst);
        let at_once = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        self.at_once_max.fetch_max(at_once, Ordering::SeqCst);
        self.gate.acquire().await.expect("never closed").forget();
        self.at_once.fetch_sub(1, Ordering::SeqCst);
        assert!(!self.panics, "a handler with a defect");
        Ok(json!({ "service": self.name }))
    }
}

/// One replica's consumer and what it works on.
struct Replica {
    rpc: Rpc,
    ledger: Arc<dyn Ledger>,
    shelf: Arc<Shelf>,
    handler: Arc<Handler>,
    stop: CancellationToken,
}

impl Replica {
    async fn start(url: &str, queue: &str, handler: Arc<Handler>) -> Self {
        Self::with(url, queue, handler, Arc::new(MemoryLedger::new(options())), 16).await
    }

    async fn with(url: &str, queue: &str, handler: Arc<Handler>, ledger: Arc<dyn Ledger>, prefetch: u16) -> Self {
        let shelf = Arc::new(Shelf { asked: AtomicUsize::new(0) });
        let stop = CancellationToken::new();
        let source: Arc<dyn StockSource> = Arc::clone(&shelf) as _;
        let stock = Stock::new(Arc::clone(&ledger), source, StockOptions::default(), stop.clone());
        let options = RpcOptions {
            url: url.to_owned(),
            queue: queue.to_owned(),
            prefetch,
            request_timeout: REQUEST_TIMEOUT,
            checkout_window: Duration::from_mins(1),
        };
        let stats: Arc<dyn StatsSource> = Arc::clone(&handler) as _;
        let rpc = rpc::start(options, Arc::clone(&ledger), stock, stats, stop.clone());
        let replica = Self { rpc, ledger, shelf, handler, stop };
        until("consuming", || replica.rpc.is_connected()).await;
        replica
    }

    async fn stop(&self) {
        self.stop.cancel();
        soon("drained", self.rpc.drained()).await;
        assert!(!self.rpc.is_connected());
    }

    /// Locks 2 tickets of category 1 for a user.
    async fn lock(&self, event: EventId, user: u64) -> LockId {
        stock(&*self.ledger, event, &[(1, 100, 100)]).await;
        let outcome = self.ledger.lock(&request(event, 1, user, 2)).await.expect("an answer");
        let LockOutcome::Granted(grant) = outcome else { panic!("{outcome:?}") };
        grant.lock
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<Delivery>>>>;

/// A requester that does what a Nest client does: direct reply-to, a correlation id that is the body's id.
struct Peer {
    connection: Connection,
    channel: Channel,
    queue: String,
    waiting: Waiting,
    next: AtomicUsize,
}

impl Peer {
    async fn connect(url: &str, queue: &str) -> Self {
        let connection = Connection::connect(url, ConnectionProperties::default()).await.expect("the broker runs");
        let channel = connection.create_channel().await.expect("a channel");
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        let no_ack = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let replies = channel
            .basic_consume("amq.rabbitmq.reply-to".into(), "".into(), no_ack, FieldTable::default())
            .await
            .expect("direct reply-to");
        let waiting = Waiting::default();
        tokio::spawn(deliver(replies, Arc::clone(&waiting)));
        Self { connection, channel, queue: queue.to_owned(), waiting, next: AtomicUsize::new(0) }
    }

    async fn publish(&self, body: &[u8], properties: BasicProperties) {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let sent = self.channel.basic_publish("".into(), self.queue.as_str().into(), options, body, properties).await;
        let confirmed = sent.expect("the channel stands").await.expect("a confirm");
        assert!(confirmed.is_ack() && confirmed.take_message().is_none(), "the queue took it");
    }

    async fn emit(&self, pattern: &str, data: Value) {
        let body = json!({ "pattern": pattern, "data": data }).to_string();
        self.publish(body.as_bytes(), BasicProperties::default().with_delivery_mode(1)).await;
    }

    /// Publishes a body as a request and gives back what will be its reply.
    async fn ask_raw(&self, body: &[u8], correlation: &str) -> oneshot::Receiver<Delivery> {
        let (sender, receiver) = oneshot::channel();
        self.waiting.lock().await.insert(correlation.to_owned(), sender);
        let properties = BasicProperties::default()
            .with_headers(FieldTable::default())
            .with_delivery_mode(1)
            .with_reply_to("amq.rabbitmq.reply-to".into())
            .with_correlation_id(correlation.into());
        self.publish(body, properties).await;
        receiver
    }

    async fn ask(&self, pattern: &str, data: &Value) -> oneshot::Receiver<Delivery> {
        let id = format!("id-{}", self.next.fetch_add(1, Ordering::SeqCst));
        let body = format!(r#"{{"pattern":"{pattern}","data":{data},"id":"{id}"}}"#);
        self.ask_raw(body.as_bytes(), &id).await
    }

    /// A request and the body of its reply.
    async fn call(&self, pattern: &str, data: Value) -> String {
        let reply = self.ask(pattern, &data).await;
        text(soon(&format!("a reply to {pattern} {data}"), reply).await.expect("a reply"))
    }

    /// The value of a successful reply.
    async fn value(&self, pattern: &str, data: Value) -> Value {
        let body = self.call(pattern, data).await;
        let reply: Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!(reply["isDisposed"], true, "{body}");
        assert!(reply.get("err").is_none(), "{body}");
        reply["response"].clone()
    }

    /// Messages that wait in the queue, and consumers.
    async fn depth(&self) -> (u32, u32) {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let channel = self.connection.create_channel().await.expect("a channel");
        let queue = channel.queue_declare(self.queue.as_str().into(), passive, FieldTable::default()).await;
        let queue = queue.expect("the queue exists");
        (queue.message_count(), queue.consumer_count())
    }

    async fn until_depth(&self, what: &str, expected: (u32, u32)) {
        soon(&format!("{what}: {expected:?} messages and consumers"), async {
            while self.depth().await != expected {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
}

async fn deliver(mut replies: lapin::Consumer, waiting: Waiting) {
    while let Some(Ok(delivery)) = replies.next().await {
        let correlation = delivery.properties.correlation_id().as_ref().map_or("none", |id| id.as_str()).to_owned();
        // A Nest client ignores replies that nobody waits for.
        if let Some(sender) = waiting.lock().await.remove(&correlation) {
            sender.send(delivery).ok();
        }
    }
}

fn text(delivery: Delivery) -> String {
    String::from_utf8(delivery.data).expect("UTF-8")
}

const INTERNAL: &str = r#"{"err":{"status":"error","message":"Internal server error"},"isDisposed":true}"#;

async fn declare(channel: &Channel, queue: &str, arguments: FieldTable) -> lapin::Result<lapin::Queue> {
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), durable, arguments).await
}

macro_rules! scenarios {
    ($broker:expr; $($scenario:ident),* $(,)?) => {
        $(
            println!("scenario {}", stringify!($scenario));
            $scenario($broker).await;
        )*
    };
}

/// Every pattern of the contract gets the contract's answer, and every message that means nothing is survived.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_get_the_contracts_answers() {
    let broker = RabbitServer::start().await;
    scenarios!(&broker.url();
        orders_with_locks,
        what_happened_to_orders,
        strangers_and_the_malformed,
        poison,
        requests_without_addresses,
        bad_addresses,
        a_defective_handler,
    );
}

/// validate, confirm, repeat, release: the whole life of a lock as the orders-service drives it.
async fn orders_with_locks(url: &str) {
    let replica = Replica::start(url, "orders", Handler::open("a")).await;
    let peer = Peer::connect(url, "orders").await;
    let show = event(7);
    let lock = replica.lock(show, 123).await.to_string();

    let wanted = json!({"userId": 123, "eventId": 7, "categoryId": 1, "quantity": 2});
    let valid = peer.value("validate-user-locks", wanted.clone()).await;
    assert_eq!((&valid["valid"], &valid["lockId"]), (&json!(true), &json!(lock)));
    let expires = valid["expiresAt"].as_str().expect("an instant");
    assert!(expires.len() == 24 && expires.ends_with('Z'), "{expires}");
    assert_eq!(
        peer.call("validate-user-locks", json!({"userId": 5, "eventId": 7, "categoryId": 1, "quantity": 2})).await,
        r#"{"response":{"valid":false,"message":"No valid locks found for the requested tickets","code":"lock_not_found"},"isDisposed":true}"#
    );

    let locks = peer.value("get-user-locks", json!({"userId": 123})).await;
    assert_eq!((locks.as_array().map(Vec::len), &locks[0]["lockId"]), (Some(1), &json!(lock)));
    assert_eq!(
        (&locks[0]["status"], &locks[0]["eventId"], &locks[0]["quantity"]),
        (&json!("active"), &json!(7), &json!(2))
    );
    assert!(locks[0].get("version").is_none());
    assert_eq!(peer.value("get-user-locks", json!({"userId": 5})).await, json!([]));

    // Another user's, and no lock at all.
    assert_eq!(peer.value("confirm-lock", json!({"lockId": lock, "userId": 5})).await, false);
    assert_eq!(peer.value("release-ticket-lock", json!({"lockId": lock, "userId": 5})).await, false);
    assert_eq!(peer.value("confirm-ticket-lock", json!({"lockId": LockId::generate(show).to_string()})).await, false);
    assert_eq!(peer.value("confirm-ticket-lock", json!({"lockId": "lock:7:1:123"})).await, false);
    // Confirmed, and confirmed again.
    assert_eq!(peer.value("confirm-lock", json!({"lockId": lock, "userId": 123, "orderId": 55})).await, true);
    assert_eq!(peer.value("confirm-ticket-lock", json!({"lockId": lock, "orderId": "55"})).await, true);
    let found = peer.value("get-lock", json!({"lockId": lock})).await;
    assert_eq!(found["status"], "confirmed");
    assert!(found["version"].as_u64().is_some_and(|version| version > 0), "{found}");
    // The order failed: the confirmed lock is given back, and again.
    for _ in 0..2 {
        assert_eq!(peer.value("release-ticket-lock", json!({"lockId": lock, "userId": 123})).await, true);
    }
    assert_eq!(peer.value("confirm-ticket-lock", json!({"lockId": lock})).await, false);
    assert_eq!(peer.value("release-ticket-lock", json!({"lockId": "unknown"})).await, false);
    assert_eq!(peer.value("get-lock", json!({"lockId": lock})).await["status"], "released");
    assert_eq!(peer.value("get-lock", json!({"lockId": LockId::generate(show).to_string()})).await, Value::Null);
    assert_eq!(peer.call("get-realtime-stats", json!({})).await, r#"{"response":{"service":"a"},"isDisposed":true}"#);

    // The bytes of one reply, properties included: what a Nest server sends and nothing else.
    let reply = soon("a reply", peer.ask("get-user-locks", &json!({"userId": 5})).await).await.expect("a reply");
    let expected = BasicProperties::default()
        .with_headers(FieldTable::default())
        .with_correlation_id(reply.properties.correlation_id().clone().expect("a correlation id"));
    assert_eq!(reply.properties, expected);
    assert_eq!(text(reply), r#"{"response":[],"isDisposed":true}"#);
    replica.stop().await;
    assert_eq!(peer.depth().await, (0, 0));
}

/// `order-*` and `availability-changed`, emitted and asked: the counts move, the user hears of it, the stock is asked for.
async fn what_happened_to_orders(url: &str) {
    let replica = Replica::start(url, "happened", Handler::open("a")).await;
    let peer = Peer::connect(url, "happened").await;
    let show = event(8);
    let mut feed = replica.ledger.feed().expect("the first time");
    replica.ledger.subscribe(Topic::User(user(123))).await.expect("subscribed");
    let lock = replica.lock(show, 123).await.to_string();
    assert_eq!(peer.value("confirm-ticket-lock", json!({"lockId": lock, "orderId": 55})).await, true);

    let mut personal = async |what: &str| match soon(what, feed.recv()).await {
        Some(FeedItem::Personal(user, message)) => (user, message),
        other => panic!("{what}: {other:?}"),
    };
    let confirmed = Personal::Confirmed { lock: lock.parse().expect("an id"), order: Some(order_id("55")) };
    assert_eq!(personal("confirmed, for replicas").await, (user(123), confirmed));
    let told = |result, order_is_number| {
        let order = order_id("55");
        let (category, quantity) = (category(1), quantity(2));
        (user(123), Personal::Order { result, order, order_is_number, event: show, category, quantity })
    };
    let order = json!({"orderId": 55, "eventId": 8, "categoryId": 1, "quantity": 2, "userId": 123, "lockId": lock});
    let asked = replica.shelf.asked.load(Ordering::SeqCst);
    peer.emit("order-completed", order.clone()).await;
    assert_eq!(personal("completed").await, told(OrderResult::Completed, true));
    until("the stock is asked for", || replica.shelf.asked.load(Ordering::SeqCst) > asked).await;
    // The same as a request: answered `true`, and told again, because nobody knows what became of the first message.
    assert_eq!(peer.value("order-completed", order.clone()).await, true);
    assert_eq!(personal("completed again").await, told(OrderResult::Completed, true));

    let cancelled = json!({"orderId": "55", "eventId": 8, "categoryId": 1, "quantity": 2, "userId": 123});
    assert_eq!(peer.value("order-cancelled", cancelled.clone()).await, true);
    assert_eq!(personal("cancelled").await, told(OrderResult::Cancelled, false));
    // A completion that was overtaken by its cancellation tells nobody.
    assert_eq!(peer.value("order-completed", order).await, true);
    assert_eq!(peer.value("order-cancelled", cancelled).await, true);
    assert_eq!(personal("cancelled again").await, told(OrderResult::Cancelled, false));

    let asked = replica.shelf.asked.load(Ordering::SeqCst);
    peer.emit("availability-changed", json!({"eventId": 9})).await;
    until("the stock is asked for", || replica.shelf.asked.load(Ordering::SeqCst) > asked).await;
    peer.until_depth("events are acknowledged", (0, 1)).await;
    replica.stop().await;
    assert_eq!(peer.depth().await, (0, 0));
}

/// Unknown patterns and malformed data get the bodies that a Nest server sends.
async fn strangers_and_the_malformed(url: &str) {
    let replica = Replica::start(url, "strangers", Handler::open("a")).await;
    let peer = Peer::connect(url, "strangers").await;
    let unknown = |id: &str| {
        format!(
            r#"{{"id":{id},"err":"There is no matching message handler defined in the remote service.","status":"error"}}"#
        )
    };
    for (pattern, id, correlation) in [
        (r#""get-event-by-id""#, r#""c-1""#, "c-1"),
        (r#"{"cmd":"get-lock"}"#, r#""other""#, "c-2"),
        ("7", "null", "c-3"),
        ("null", "5", "c-4"),
    ] {
        let body = format!(r#"{{"pattern":{pattern},"data":1,"id":{id}}}"#);
        let reply = soon("a reply", peer.ask_raw(body.as_bytes(), correlation).await).await.expect("a reply");
        assert_eq!(text(reply), unknown(id));
    }
    // A pattern as Nest may spell it in another way reaches the handler.
    let body = br#"{ "id": "x", "data": {"userId": 5}, "pattern": "\u0067et-user-locks" }"#;
    let reply = soon("a reply", peer.ask_raw(body, "c-5").await).await.expect("a reply");
    assert_eq!(text(reply), r#"{"response":[],"isDisposed":true}"#);
    // Malformed, each way.
    let malformed =
        |message: &str| format!(r#"{{"err":{{"status":"error","message":"{message}"}},"isDisposed":true}}"#);
    assert_eq!(peer.call("get-user-locks", json!({})).await, malformed("userId is required"));
    assert_eq!(peer.call("get-user-locks", json!(null)).await, malformed("data must be an object"));
    assert_eq!(
        peer.call("validate-user-locks", json!({"userId": "123", "eventId": 1, "categoryId": 1, "quantity": 1})).await,
        malformed("userId must be an integer between 1 and 9007199254740991")
    );
    // Malformed and unknown events are acknowledged and forgotten.
    peer.emit("order-completed", json!({"orderId": 1})).await;
    peer.emit("somebody-else's-event", json!({})).await;
    assert_eq!(peer.value("get-user-locks", json!({"userId": 1})).await, json!([]));
    replica.stop().await;
    assert_eq!(peer.depth().await, (0, 0));
}

/// Messages that nobody can read are acknowledged: none comes back, and the queue goes on.
async fn poison(url: &str) {
    let replica = Replica::start(url, "poison", Handler::open("a")).await;
    let peer = Peer::connect(url, "poison").await;
    let huge = vec![b'['; 400_000];
    let bodies: [&[u8]; 12] = [
        b"",
        b"null",
        b"5",
        b"\"echo\"",
        b"[1,2]",
        b"{}",
        b"{\"foo\":1,\"id\":\"i\"}",
        b"{\"pattern\":\"get-lock\",",
        b"\xef\xbb\xbf{\"pattern\":\"get-lock\",\"data\":1,\"id\":\"i\"}",
        b"\x00\xff\xfe\x80",
        b"{\"pattern\":\"get-lock\"} trailing",
        &huge,
    ];
    for body in bodies {
        let reply = peer.ask_raw(body, "poison").await;
        // Never answered: the next one takes its place in the map.
        drop(reply);
        peer.publish(body, BasicProperties::default()).await;
    }
    // And bodies that chance (xorshift, the same in every run) has made of a good one.
    let good = br#"{"pattern":"confirm-lock","data":{"lockId":"00000000-0001-8000-8000-000000000001","userId":5}}"#;
    let mut chance = 0x5eed_u64;
    for _ in 0..500 {
        let mut body = good.to_vec();
        for _ in 0..3 {
            chance ^= chance << 13;
            chance ^= chance >> 7;
            chance ^= chance << 17;
            let [byte, low, high, ..] = chance.to_le_bytes();
            let at = usize::from(u16::from_le_bytes([low, high])) % body.len();
            body[at] = byte;
        }
        peer.publish(&body, BasicProperties::default()).await;
    }
    assert_eq!(peer.value("get-user-locks", json!({"userId": 1})).await, json!([]));
    assert!(peer.waiting.lock().await.contains_key("poison"), "a Nest server does not answer these");
    replica.stop().await;
    assert_eq!(peer.depth().await, (0, 0));
}

/// A request without `reply-to` or without `correlation-id` is done all the same.
async fn requests_without_addresses(url: &str) {
    let replica = Replica::start(url, "addresses", Handler::open("a")).await;
    let peer = Peer::connect(url, "addresses").await;
    let lock = replica.lock(event(3), 123).await;
    let body = json!({"pattern": "confirm-ticket-lock", "data": {"lockId": lock.to_string()}, "id": "i"}).to_string();
    peer.publish(body.as_bytes(), BasicProperties::default().with_correlation_id("c".into())).await;
    peer.until_depth("taken", (0, 1)).await;
    soon("confirmed", async {
        while peer.value("get-lock", json!({"lockId": lock.to_string()})).await["status"] != "confirmed" {}
    })
    .await;

    let (sender, receiver) = oneshot::channel();
    peer.waiting.lock().await.insert("none".to_owned(), sender);
    let properties = BasicProperties::default().with_reply_to("amq.rabbitmq.reply-to".into());
    peer.publish(body.as_bytes(), properties).await;
    let reply = soon("a reply without a correlation id", receiver).await.expect("a reply");
    assert_eq!(reply.properties, BasicProperties::default().with_headers(FieldTable::default()));

    // A Nest client would drop its connection on this id. It never chooses it; who does gets it back.
    let reply = soon("a reply", peer.ask_raw(body.as_bytes(), "error").await).await.expect("a reply");
    assert_eq!(reply.properties.correlation_id().as_ref().map(lapin::types::ShortString::as_str), Some("error"));
    replica.stop().await;
    assert_eq!(peer.depth().await, (0, 0));
}

/// Reply addresses that nobody answers to, among them those that make RabbitMQ close the replier's connection with 541.
/// Requests in work at the same time get their answers, nothing is delivered twice for ever, the consumer stays.
async fn bad_addresses(url: &str) {
    let handler = Handler::shut("a");
    let replica = Replica::start(url, "forged", Arc::clone(&handler)).await;
    let peer = Peer::connect(url, "forged").await;

    // The requester is gone when its reply is ready.
    let gone = Peer::connect(url, "forged").await;
    let lost = gone.ask("get-realtime-stats", &json!({})).await;
    until("in work", || handler.began.load(Ordering::SeqCst) == 1).await;
    gone.connection.close(200, "bye".into()).await.expect("closed");
    drop(lost);

    let forged = [
        "amq.rabbitmq.reply-to.AAAA.AAAA",
        "amq.rabbitmq.reply-to.!!!!.####",
        "amq.rabbitmq.reply-to.g2QABWZvb2Jh.QUFB",
        "amq.rabbitmq.reply-to.g1h2AA1yZXBseUA5NTAyNjUzAAAvXAAAAABrAv/T.GMEPfLnyxr0c/0tN925Syw==",
        "no-such-queue",
    ];
    let body = br#"{"pattern":"get-realtime-stats","data":{},"id":"i"}"#;
    for address in forged {
        peer.publish(body, BasicProperties::default().with_reply_to(address.into())).await;
    }
    let mut bystanders = Vec::new();
    for _ in 0..8 {
        bystanders.push(peer.ask("get-realtime-stats", &json!({})).await);
    }
    until("all in work", || handler.began.load(Ordering::SeqCst) == 14).await;
    handler.gate.add_permits(1000);
    for bystander in bystanders {
        let reply = soon("a bystander's reply", bystander).await.expect("a reply");
        assert_eq!(text(reply), r#"{"response":{"service":"a"},"isDisposed":true}"#);
    }
    assert_eq!(peer.value("get-user-locks", json!({"userId": 1})).await, json!([]));
    assert!(replica.rpc.is_connected());
    replica.stop().await;
    assert_eq!(peer.depth().await, (0, 0));
    assert_eq!(handler.began.load(Ordering::SeqCst), 14, "nothing was delivered twice");
}

/// A handler that panics answers as a Nest handler that throws, and takes nothing with it.
async fn a_defective_handler(url: &str) {
    let replica = Replica::start(url, "defective", Handler::new("a", 100, true)).await;
    let peer = Peer::connect(url, "defective").await;
    assert_eq!(peer.call("get-realtime-stats", json!({})).await, INTERNAL);
    peer.emit("get-realtime-stats", json!({})).await;
    assert_eq!(peer.value("get-user-locks", json!({"userId": 1})).await, json!([]));
    replica.stop().await;
    assert_eq!(peer.depth().await, (0, 0));
}

/// The queue as others make it, delete it and share it, and the order of work, reply and acknowledgement.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queue_is_shared_mended_and_left_in_order() {
    let broker = RabbitServer::start().await;
    scenarios!(&broker.url();
        a_nest_peer_declares_the_same_queue,
        a_queue_of_other_arguments_is_used_as_it_is,
        a_deleted_queue_is_made_again,
        replicas_share_the_work,
        prefetch_bounds_the_work,
        a_message_is_acknowledged_after_its_reply,
        a_drain_finishes_what_it_has_and_takes_no_more,
        slow_handlers_are_answered_for_in_time,
    );
}

/// Nest declares `durable` without arguments on every connection, and ends its process on a 406.
async fn a_nest_peer_declares_the_same_queue(url: &str) {
    let replica = Replica::start(url, "plain", Handler::open("a")).await;
    let peer = Peer::connect(url, "plain").await;
    declare(&peer.channel, "plain", FieldTable::default()).await.expect("no 406");
    assert_eq!(peer.value("get-user-locks", json!({"userId": 1})).await, json!([]));
    replica.stop().await;
}

async fn a_queue_of_other_arguments_is_used_as_it_is(url: &str) {
    let peer = Peer::connect(url, "limited").await;
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1000));
    let made = peer.connection.create_channel().await.expect("a channel");
    declare(&made, "limited", arguments.clone()).await.expect("declared");
    let replica = Replica::start(url, "limited", Handler::open("a")).await;
    assert_eq!(peer.value("get-user-locks", json!({"userId": 1})).await, json!([]));
    declare(&made, "limited", arguments).await.expect("its arguments are what they were");
    replica.stop().await;
}

/// RabbitMQ cancels the consumers of a deleted queue. A Nest server would stay deaf; this one declares it again, and
/// what was in work is still answered.
async fn a_deleted_queue_is_made_again(url: &str) {
    let handler = Handler::shut("a");
    let replica = Replica::start(url, "deleted", Arc::clone(&handler)).await;
    let peer = Peer::connect(url, "deleted").await;
    let in_work = peer.ask("get-realtime-stats", &json!({})).await;
    until("in work", || handler.began.load(Ordering::SeqCst) == 1).await;
    for _ in 0..3 {
        peer.channel.queue_delete("deleted".into(), QueueDeleteOptions::default()).await.expect("deleted");
        soon("made again", async {
            let channel = || async { peer.connection.create_channel().await.expect("a channel") };
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            while channel().await.queue_declare("deleted".into(), passive, FieldTable::default()).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        peer.until_depth("consumed again", (0, 1)).await;
        assert_eq!(peer.value("get-user-locks", json!({"userId": 1})).await, json!([]));
    }
    handler.gate.add_permits(1);
    let reply = soon("the reply to what was in work", in_work).await.expect("a reply");
    assert_eq!(text(reply), r#"{"response":{"service":"a"},"isDisposed":true}"#);
    declare(&peer.channel, "deleted", FieldTable::default()).await.expect("made as Nest makes it");
    replica.stop().await;
}

async fn replicas_share_the_work(url: &str) {
    let a = Replica::start(url, "shared", Handler::open("a")).await;
    let b = Replica::start(url, "shared", Handler::open("b")).await;
    let peer = Peer::connect(url, "shared").await;
    let mut replies = Vec::new();
    for _ in 0..200 {
        replies.push(peer.ask("get-realtime-stats", &json!({})).await);
    }
    let mut by_name: HashMap<String, u32> = HashMap::new();
    for reply in replies {
        *by_name.entry(text(soon("a reply", reply).await.expect("a reply"))).or_default() += 1;
    }
    assert_eq!(by_name.len(), 2, "{by_name:?}");
    assert_eq!(a.handler.began.load(Ordering::SeqCst) + b.handler.began.load(Ordering::SeqCst), 200);
    a.stop().await;
    peer.until_depth("one is left", (0, 1)).await;
    assert_eq!(peer.call("get-realtime-stats", json!({})).await, r#"{"response":{"service":"b"},"isDisposed":true}"#);
    b.stop().await;
    assert_eq!(peer.depth().await, (0, 0));
}

async fn prefetch_bounds_the_work(url: &str) {
    let handler = Handler::shut("a");
    let ledger = Arc::new(MemoryLedger::new(options()));
    let replica = Replica::with(url, "bounded", Arc::clone(&handler), ledger, 4).await;
    let peer = Peer::connect(url, "bounded").await;
    let mut replies = Vec::new();
    for _ in 0..20 {
        replies.push(peer.ask("get-realtime-stats", &json!({})).await);
    }
    peer.until_depth("the rest waits with the broker", (16, 1)).await;
    until("four in work", || handler.began.load(Ordering::SeqCst) == 4).await;
    handler.gate.add_permits(20);
    for reply in replies {
        soon("a reply", reply).await.expect("a reply");
    }
    assert_eq!(handler.at_once_max.load(Ordering::SeqCst), 4);
    replica.stop().await;
    assert_eq!(peer.depth().await, (0, 0));
}

/// A replica that dies with a request in work leaves it to another: nothing was acknowledged before its reply. Done
/// twice, it answers the same.
async fn a_message_is_acknowledged_after_its_reply(url: &str) {
    let peer = Peer::connect(url, "acknowledged").await;
    let url_of_a = url.to_owned();
    let handler = Handler::shut("a");
    let handler_of_a = Arc::clone(&handler);
    let ledger: Arc<dyn Ledger> = Arc::new(MemoryLedger::new(options()));
    let ledger_of_a = Arc::clone(&ledger);
    // A runtime of its own stands for a process: it ends without a word.
    let (runtime, a) = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let a = runtime.block_on(Replica::with(&url_of_a, "acknowledged", handler_of_a, ledger_of_a, 16));
        (runtime, a)
    })
    .await
    .expect("started");
    let lock = a.lock(event(4), 123).await.to_string();
    let reply = peer.ask("get-realtime-stats", &json!({})).await;
    until("in work", || handler.began.load(Ordering::SeqCst) == 1).await;
    assert_eq!(peer.value("confirm-ticket-lock", json!({"lockId": lock, "orderId": 9})).await, true);
    assert_eq!(peer.depth().await, (0, 1), "delivered, not acknowledged, not waiting");
    runtime.shutdown_background();
    std::mem::forget(a);
    let b = Replica::with(url, "acknowledged", Handler::open("b"), ledger, 16).await;
    let reply = soon("the other replica's reply", reply).await.expect("a reply");
    assert!(reply.data.starts_with(br#"{"response":{"service":"b"}"#), "{reply:?}");
    assert_eq!(peer.value("confirm-ticket-lock", json!({"lockId": lock, "orderId": 9})).await, true);
    b.stop().await;
    assert_eq!(peer.depth().await, (0, 0));
}

async fn a_drain_finishes_what_it_has_and_takes_no_more(url: &str) {
    let handler = Handler::shut("a");
    let replica = Replica::start(url, "drained", Arc::clone(&handler)).await;
    let peer = Peer::connect(url, "drained").await;
    let mut in_work = Vec::new();
    for _ in 0..3 {
        in_work.push(peer.ask("get-realtime-stats", &json!({})).await);
    }
    until("in work", || handler.began.load(Ordering::SeqCst) == 3).await;
    replica.stop.cancel();
    peer.until_depth("the consumer is gone", (0, 0)).await;
    assert!(!replica.rpc.is_connected());
    let late = peer.ask("get-realtime-stats", &json!({})).await;
    handler.gate.add_permits(10);
    for reply in in_work {
        soon("a reply", reply).await.expect("a reply");
    }
    soon("drained", replica.rpc.drained()).await;
    assert_eq!(peer.depth().await, (1, 0), "what came later waits for another replica");
    let next = Replica::start(url, "drained", Handler::open("b")).await;
    assert!(soon("a reply", late).await.expect("a reply").data.starts_with(br#"{"response":{"service":"b"}"#));
    next.stop().await;
}

/// Nest callers wait for ever, so a request whose handler hangs is answered with an error in time.
async fn slow_handlers_are_answered_for_in_time(url: &str) {
    let handler = Handler::shut("a");
    let replica = Replica::start(url, "slow", Arc::clone(&handler)).await;
    let peer = Peer::connect(url, "slow").await;
    let began = Instant::now();
    assert_eq!(peer.call("get-realtime-stats", json!({})).await, INTERNAL);
    assert!(began.elapsed() <= REQUEST_TIMEOUT, "{:?}", began.elapsed());
    // The calls that hang count against the bound until they end; when all places are taken, answers still come.
    let mut replies = Vec::new();
    for _ in 0..40 {
        replies.push(peer.ask("get-realtime-stats", &json!({})).await);
    }
    for reply in replies {
        assert_eq!(text(soon("an error", reply).await.expect("a reply")), INTERNAL);
    }
    assert_eq!(handler.at_once_max.load(Ordering::SeqCst), 16);
    handler.gate.add_permits(100);
    assert_eq!(peer.call("get-realtime-stats", json!({})).await, r#"{"response":{"service":"a"},"isDisposed":true}"#);
    replica.stop().await;
    assert_eq!(peer.depth().await, (0, 0));
}

/// The broker is short of memory, and killed; the consumer notices and comes back by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_fails_is_waited_for() {
    let mut broker = RabbitServer::start().await;
    let url = broker.url();
    let handler = Handler::shut("a");
    let replica = Replica::start(&format!("{url}?heartbeat=1"), "outages", Arc::clone(&handler)).await;

    println!("scenario blocked");
    let peer = Peer::connect(&url, "outages").await;
    let reply = peer.ask("get-realtime-stats", &json!({})).await;
    until("in work", || handler.began.load(Ordering::SeqCst) == 1).await;
    tokio::task::block_in_place(|| {
        broker.ctl(&["eval", "rabbit_alarm:set_alarm({{resource_limit, memory, node()}, []})."]);
    });
    handler.gate.add_permits(1);
    until("blocked", || replica.rpc.is_blocked()).await;
    assert!(replica.rpc.is_connected());
    tokio::task::block_in_place(|| {
        broker.ctl(&["eval", "rabbit_alarm:clear_alarm({resource_limit, memory, node()})."]);
    });
    let reply = soon("the reply that was held up", reply).await.expect("a reply");
    assert_eq!(text(reply), r#"{"response":{"service":"a"},"isDisposed":true}"#);
    until("not blocked", || !replica.rpc.is_blocked()).await;

    println!("scenario killed");
    broker.kill();
    until("noticed", || !replica.rpc.is_connected()).await;
    broker.restart().await;
    until("consuming again", || replica.rpc.is_connected()).await;
    let peer = Peer::connect(&url, "outages").await;
    assert_eq!(peer.value("get-user-locks", json!({"userId": 1})).await, json!([]));

    replica.stop().await;
}

/// The broker is frozen, and stopped; the consumer notices, comes back by itself, and stops without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_freezes_is_waited_for() {
    let mut broker = RabbitServer::start().await;
    let url = broker.url();
    let replica = Replica::start(&format!("{url}?heartbeat=1"), "outages", Handler::open("a")).await;

    println!("scenario frozen");
    let threads = io_threads();
    broker.signal("STOP");
    until("noticed", || !replica.rpc.is_connected()).await;
    // Attempts to connect are accepted by the system and never answered by the broker. The consumer had two connections
    // and makes one attempt at a time, each for three seconds: after four of them there must be no more threads than
    // without their leftovers.
    tokio::time::sleep(Duration::from_secs(16)).await;
    assert!(io_threads() < threads, "{} threads instead of {threads}", io_threads());
    broker.signal("CONT");
    until("consuming again", || replica.rpc.is_connected()).await;
    let peer = Peer::connect(&url, "outages").await;
    assert_eq!(peer.value("get-user-locks", json!({"userId": 1})).await, json!([]));

    println!("scenario stopped");
    broker.stop();
    until("noticed", || !replica.rpc.is_connected()).await;
    // Told to stop while there is no broker, it stops.
    replica.stop().await;
}

/// Threads that `lapin` keeps for connections.
fn io_threads() -> usize {
    let threads = std::fs::read_dir("/proc/self/task").expect("a list of threads");
    let names = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("lapin-io-loop")).count()
}

/// Redis is frozen: requests are answered with an error in time, and events wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_that_is_away_is_answered_for() {
    let (broker, redis) = tokio::join!(RabbitServer::start(), RedisServer::start());
    let url = broker.url();
    let ledger = live(&redis, Duration::from_millis(500), 0);
    until_ledger(&*ledger).await;
    let replica = Replica::with(&url, "away", Handler::open("a"), Arc::clone(&ledger), 8).await;
    let peer = Peer::connect(&url, "away").await;
    let show = event(5);
    let lock = replica.lock(show, 123).await.to_string();
    assert_eq!(peer.value("confirm-ticket-lock", json!({"lockId": lock, "orderId": 55})).await, true);

    // Not by a feed, which may take the stop for a lost connection and begin another while it is told.
    let mut overheard = redis.overhear("seatlock:user:123").await;
    redis.signal("STOP");
    let began = Instant::now();
    assert_eq!(peer.call("get-user-locks", json!({"userId": 123})).await, INTERNAL);
    assert!(began.elapsed() <= REQUEST_TIMEOUT, "{:?}", began.elapsed());
    // Four may wait (half of the prefetch of 8), the others are dropped, and requests are answered all the while.
    for order in 0..12 {
        let order = json!({"orderId": 55 + order, "eventId": 5, "categoryId": 1, "quantity": 2, "userId": 123});
        peer.emit("order-cancelled", order).await;
    }
    for _ in 0..3 {
        let began = Instant::now();
        assert_eq!(peer.call("get-lock", json!({"lockId": lock})).await, INTERNAL);
        assert!(began.elapsed() <= REQUEST_TIMEOUT, "{:?}", began.elapsed());
    }

    redis.signal("CONT");
    // Those that waited are carried out: their user hears of it.
    let mut told = BTreeSet::new();
    soon("the user is told", async {
        while told.len() < 4 {
            let line = overheard.next_line().await.expect("RESP").expect("a server that lives");
            if let Some(order) = line.strip_prefix("order cancelled ") {
                told.insert(order.to_owned());
            }
        }
    })
    .await;
    replica.stop().await;
    // An event that was still waiting then is back in the queue.
    let next = Replica::with(&url, "away", Handler::open("b"), ledger, 8).await;
    peer.until_depth("the rest is carried out", (0, 1)).await;
    next.stop().await;
    assert_eq!(peer.depth().await, (0, 0));
}

async fn until_ledger(ledger: &dyn Ledger) {
    soon("Redis answers", async {
        while ledger.ping().await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}
