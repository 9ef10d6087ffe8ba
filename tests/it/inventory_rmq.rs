//! The events-service over a real RabbitMQ. A consumer in the test answers with the bytes captured from a Nest server; a
//! breakable path lies between the client and the broker.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use seatlock::domain::Snapshot;
use seatlock::inventory::{SourceError, SourceOptions, SourceUrl, StockSource, connect};
use serde_json::Value;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::support::ledger::{event, snapshot};
use crate::support::rabbit::RabbitServer;

const DEADLINE: Duration = Duration::from_secs(5);

/// A TCP path to the broker that can be cut.
struct Path {
    port: u16,
    cut: Arc<std::sync::Mutex<CancellationToken>>,
}

impl Path {
    async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let path = Self {
            port: listener.local_addr().expect("bound").port(),
            cut: Arc::new(std::sync::Mutex::new(CancellationToken::new())),
        };
        let cut = Arc::clone(&path.cut);
        tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.expect("a connection");
                let cut = cut.lock().expect("no panic").clone();
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                    tokio::select! {
                        _ = copy_bidirectional(&mut near, &mut far) => {}
                        () = cut.cancelled() => {}
                    }
                });
            }
        });
        path
    }

    /// Breaks every connection that stands; new ones are let through.
    fn cut(&self) {
        std::mem::take(&mut *self.cut.lock().expect("no panic")).cancel();
    }
}

/// An events-service: answers each pattern with a captured body, and writes down the requests.
struct Events {
    channel: Channel,
    _connection: Connection,
}

/// A request as the broker delivered it.
struct Asked {
    body: Value,
    text: String,
    properties: BasicProperties,
}

impl Events {
    async fn open(broker: &str) -> Self {
        let connection = Connection::connect(broker, ConnectionProperties::default()).await.expect("a broker");
        let channel = connection.create_channel().await.expect("a channel");
        // Exactly as a Nest server declares it: the client must not have declared it differently.
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare("events_queue".into(), options, FieldTable::default()).await.expect("a queue");
        Self { channel, _connection: connection }
    }

    async fn requests(&self) -> lapin::Consumer {
        let options = BasicConsumeOptions::default();
        self.channel
            .basic_consume("events_queue".into(), "".into(), options, FieldTable::default())
            .await
            .expect("a consumer")
    }

    async fn next(&self, requests: &mut lapin::Consumer) -> Asked {
        let delivery = requests.next().await.expect("a request").expect("a delivery");
        delivery.ack(BasicAckOptions::default()).await.expect("an acknowledgement");
        let text = String::from_utf8(delivery.data).expect("UTF-8");
        Asked { body: serde_json::from_str(&text).expect("JSON"), text, properties: delivery.properties }
    }

    async fn reply(&self, asked: &Asked, body: &str) {
        let id = asked.properties.correlation_id().clone().expect("a correlation id");
        let to = asked.properties.reply_to().clone().expect("a reply address");
        self.channel
            .basic_publish(
                "".into(),
                to,
                BasicPublishOptions::default(),
                body.as_bytes(),
                BasicProperties::default().with_headers(FieldTable::default()).with_correlation_id(id),
            )
            .await
            .expect("a reply is sent");
    }
}

fn captured(name: &str) -> String {
    let all: Vec<Value> = serde_json::from_str(include_str!("../vectors/nestjs-rmq.json")).expect("JSON");
    let vector = all.iter().find(|vector| vector["name"] == name && vector["direction"] == "server-to-peer");
    vector.expect(name)["body"].as_str().expect("a body").to_owned()
}

/// One story on one broker: no queue; an events-service with the captured bodies; fifty requests at once; a service that
/// does not answer; a connection that breaks while a request is open.
#[tokio::test]
async fn the_events_service_is_asked_over_rabbitmq() {
    let broker = RabbitServer::start().await;
    let path = Path::to(broker.port()).await;
    let url: SourceUrl =
        format!("amqp://guest:guest@127.0.0.1:{}/?queue=events_queue", path.port).parse().expect("a URL");
    let options = SourceOptions { request_timeout: DEADLINE, connect_timeout: DEADLINE };
    let stop = CancellationToken::new();
    let source = connect(&url, options, stop.clone()).expect("a source").stock;
    let ask = |id: u64| {
        let source: Arc<dyn StockSource> = Arc::clone(&source);
        tokio::spawn(async move { source.snapshot(event(id)).await })
    };

    // Nobody has declared the queue: the broker returns the question, which is not waited for.
    let started = Instant::now();
    let unroutable = ask(1).await.expect("no panic");
    let Err(SourceError::Unavailable(why)) = &unroutable else { unreachable!("{unroutable:?}") };
    assert!(why.contains("NO_ROUTE"), "{why}");
    assert!(started.elapsed() < DEADLINE, "{:?}", started.elapsed());

    // A service without the first pattern.
    let events = Events::open(&broker.url()).await;
    let mut requests = events.requests().await;
    let open = ask(1);
    let first = events.next(&mut requests).await;
    let id = first.body["id"].as_str().expect("an id");
    assert_eq!(first.text, format!(r#"{{"pattern":"get-ticket-categories","data":1,"id":"{id}"}}"#));
    let properties = &first.properties;
    assert_eq!(properties.correlation_id().as_ref().map(ShortString::as_str), Some(id));
    assert!(properties.reply_to().as_ref().is_some_and(|to| to.as_str().starts_with("amq.rabbitmq.reply-to.")));
    assert_eq!(*properties.delivery_mode(), Some(1));
    let left: u64 = properties.expiration().as_ref().expect("an expiration").as_str().parse().expect("milliseconds");
    assert!((1..=5000).contains(&left), "{left} ms");
    events.reply(&first, &captured("reply to: unknown pattern")).await;
    let second = events.next(&mut requests).await;
    assert_eq!(second.body["pattern"], "get-event-by-id");
    let event_body = captured("reply to: events service: get-event-by-id bare number");
    events.reply(&second, &event_body).await;
    let read = open.await.expect("no panic").expect("a snapshot");
    let whole: Value = serde_json::from_str(&event_body).expect("JSON");
    let categories = whole["response"]["ticketCategories"].as_array().expect("categories");
    assert_eq!(read.categories.len(), categories.len());
    for (read, category) in read.categories.iter().zip(categories) {
        assert_eq!(read.category.value(), category["id"].as_u64().expect("an id"));
        assert!(read.stock <= read.total && read.total > 0);
    }

    // An unknown event, in both shapes that a service gives it.
    for name in ["errors=rpc", "errors=filter"] {
        let open = ask(99);
        let body = captured(&format!("reply to: events service: get-event-by-id missing event, {name}"));
        for _ in 0..2 {
            let asked = events.next(&mut requests).await;
            events.reply(&asked, &body).await;
        }
        assert_eq!(open.await.expect("no panic"), Err(SourceError::EventNotFound), "{name}");
    }

    // Fifty at once, answered in the opposite order, each twice.
    let open: Vec<_> = (1..=50).map(|id| (id, ask(id))).collect();
    let mut asked = Vec::new();
    while asked.len() < open.len() {
        asked.push(events.next(&mut requests).await);
    }
    for asked in asked.iter().rev() {
        let stock = &asked.body["data"];
        let body =
            format!(r#"{{"response":[{{"id":1,"totalSeats":100,"availableSeats":{stock}}}],"isDisposed":true}}"#);
        events.reply(asked, &body).await;
        events.reply(asked, &body).await;
    }
    for (id, answer) in open {
        assert_eq!(answer.await.expect("no panic"), Ok(snapshot(&[(1, 100, id)])));
    }

    // The connection breaks while a request is open; soon the next one is answered.
    let open = ask(1);
    events.next(&mut requests).await;
    let started = Instant::now();
    path.cut();
    let failed = open.await.expect("no panic");
    assert!(matches!(failed, Err(SourceError::Unavailable(_))), "{failed:?}");
    assert!(started.elapsed() < DEADLINE / 2, "{:?}", started.elapsed());
    let again = async {
        loop {
            let answer = ask(7).await.expect("no panic");
            if let Ok(snapshot) = answer {
                return snapshot;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "{answer:?}");
            sleep(Duration::from_millis(50)).await;
        }
    };
    let serve = async {
        let asked = events.next(&mut requests).await;
        events.reply(&asked, r#"[{"id":1,"totalSeats":9,"availableSeats":7}]"#).await;
        std::future::pending::<Snapshot>().await
    };
    let read = tokio::select! { read = again => read, read = serve => read };
    assert_eq!(read, snapshot(&[(1, 9, 7)]));

    // A service that takes questions and says nothing.
    let open = ask(1);
    let started = Instant::now();
    events.next(&mut requests).await;
    assert_eq!(open.await.expect("no panic"), Err(SourceError::Timeout(DEADLINE)));
    assert!(started.elapsed() < DEADLINE + Duration::from_secs(1));

    // Stopped: no more questions.
    stop.cancel();
    sleep(Duration::from_millis(100)).await;
    let stopped = ask(1).await.expect("no panic");
    assert_eq!(stopped, Err(SourceError::Stopping));
}
