//! What buyers and the orders-service do is counted once, on whichever of two replicas it happens.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    options::{BasicConsumeOptions, BasicPublishOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};

use crate::support::{
    gateway::{Raw, SECRET, token},
    process::Seatlock,
    rabbit::RabbitServer,
    redis::RedisServer,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// Somebody who asks over RabbitMQ, one question after the other.
pub struct Caller {
    channel: Channel,
    replies: Consumer,
    queue: &'static str,
    _connection: Connection,
}

impl Caller {
    pub async fn on(broker: &RabbitServer) -> Self {
        let connection =
            Connection::connect(&broker.url(), ConnectionProperties::default()).await.expect("a connection");
        let channel = connection.create_channel().await.expect("a channel");
        let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
        let direct = channel.basic_consume("amq.rabbitmq.reply-to".into(), "".into(), options, FieldTable::default());
        let replies = direct.await.expect("direct replies");
        Self { channel, replies, queue: "realtime_queue", _connection: connection }
    }

    pub async fn ask(&mut self, pattern: &str, data: &Value) -> Value {
        self.ask_with(pattern, data, FieldTable::default()).await
    }

    pub async fn ask_with(&mut self, pattern: &str, data: &Value, headers: FieldTable) -> Value {
        let body = json!({ "pattern": pattern, "data": data, "id": "1" }).to_string();
        let properties = BasicProperties::default().with_reply_to("amq.rabbitmq.reply-to".into()).with_headers(headers);
        let options = BasicPublishOptions::default();
        let sent = self.channel.basic_publish("".into(), self.queue.into(), options, body.as_bytes(), properties);
        sent.await.expect("published");
        let reply = tokio::time::timeout(PATIENCE, self.replies.next()).await.expect("in time");
        let reply: Value = serde_json::from_slice(&reply.expect("open").expect("a reply").data).expect("JSON");
        reply["response"].clone()
    }
}

/// Every series of both replicas, summed, without what differs each time.
async fn sums(fleet: &[Seatlock]) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for replica in fleet {
        let text =
            reqwest::get(format!("{}/metrics", replica.url)).await.expect("an answer").text().await.expect("text");
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            let (series, value) = line.rsplit_once(' ').expect("a series and its value");
            *sums.entry(series.to_owned()).or_insert(0.0) += value.parse::<f64>().expect("a number");
        }
    }
    sums
}

/// Two buyers on two replicas: one buys, is told no twice and pays twice; the other gives back. Every answer is in the
/// counts of the fleet, each once.
#[tokio::test]
async fn the_fleet_counts_what_happened_once() {
    let (broker, redis) = tokio::join!(RabbitServer::start(), RedisServer::start());
    let (amqp, url) = (broker.url(), redis.url());
    let secret = String::from_utf8(SECRET.to_vec()).expect("a text");
    let env = [
        ("SEATLOCK_REDIS_URL", url.as_str()),
        ("SEATLOCK_AMQP_URL", amqp.as_str()),
        ("SEATLOCK_EVENTS_URL", "file:src/inventory/demo.json"),
        ("SEATLOCK_JWT_SECRET", secret.as_str()),
    ];
    let fleet = [Seatlock::start(&[], &env), Seatlock::start(&[], &env)];
    what_belongs_to_a_trace_says_so(&broker, &env).await;
    let mut orders = Caller::on(&broker).await;
    let address = |replica: &Seatlock| replica.url.trim_start_matches("http://").parse().expect("an address");
    let mut seven = Raw::greeted(address(&fleet[0]), 7).await;
    let mut eight = Raw::greeted(address(&fleet[1]), 8).await;
    let place = json!({ "eventId": 2, "categoryId": 4 });
    for buyer in [&mut seven, &mut eight] {
        assert_eq!(buyer.ask("join-event-room", &place).await["success"], true);
    }
    let wanted = json!({ "eventId": 2, "categoryId": 4, "quantity": 2 });
    let bought = seven.ask("lock-tickets", &wanted).await;
    assert_eq!(bought["success"], true, "{bought}");
    assert_eq!(seven.ask("lock-tickets", &wanted).await["code"], "already_locked");
    assert_eq!(eight.ask("lock-tickets", &wanted).await["success"], true);
    assert_eq!(eight.ask("unlock-tickets", &place).await["success"], true);

    let of = |user: u64| json!({ "userId": user, "eventId": 2, "categoryId": 4, "quantity": 2 });
    assert_eq!(orders.ask("validate-user-locks", &of(7)).await["valid"], true);
    assert_eq!(orders.ask("validate-user-locks", &of(8)).await["valid"], false);
    let paid = json!({ "lockId": bought["lockId"], "orderId": "A" });
    assert_eq!(orders.ask("confirm-ticket-lock", &paid).await, true);
    assert_eq!(orders.ask("confirm-ticket-lock", &paid).await, true);
    let other = json!({ "lockId": bought["lockId"], "userId": 8 });
    assert_eq!(orders.ask("release-ticket-lock", &other).await, false);
    let mut order = of(7);
    (order["orderId"], order["lockId"]) = (json!("A"), bought["lockId"].clone());
    for _ in 0..2 {
        assert_eq!(orders.ask("order-completed", &order).await, true);
    }
    seven.expect("order-completed").await;

    let due = [
        (r#"seatlock_ledger_locks_total{outcome="granted"}"#, 2.0),
        (r#"seatlock_ledger_locks_total{outcome="already_locked"}"#, 1.0),
        (r#"seatlock_ledger_ends_total{reason="confirmed"}"#, 1.0),
        (r#"seatlock_ledger_ends_total{reason="released"}"#, 1.0),
        (r#"seatlock_ledger_held_seconds_count{reason="confirmed"}"#, 1.0),
        (r#"seatlock_rpc_validations_total{outcome="valid"}"#, 1.0),
        (r#"seatlock_rpc_validations_total{outcome="not_found"}"#, 1.0),
        (r#"seatlock_rpc_confirms_total{outcome="confirmed"}"#, 1.0),
        (r#"seatlock_rpc_confirms_total{outcome="already_confirmed"}"#, 1.0),
        (r#"seatlock_rpc_releases_total{outcome="wrong_user"}"#, 1.0),
        (r#"seatlock_rpc_orders_total{result="completed",outcome="noted"}"#, 1.0),
        (r#"seatlock_rpc_orders_total{result="completed",outcome="repeated"}"#, 1.0),
        ("seatlock_rpc_configured", 2.0),
        ("seatlock_rpc_consuming", 2.0),
        ("seatlock_ledger_connected", 2.0),
        ("seatlock_inventory_connected", 2.0),
        ("seatlock_gateway_sockets", 2.0),
        ("seatlock_fanout_watched_events", 2.0),
        ("seatlock_fanout_oversold_categories", 0.0),
        ("seatlock_fanout_overgrants_total", 0.0),
        ("seatlock_ledger_disconnects_total", 0.0),
        (concat!("seatlock_app_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), 2.0),
    ];
    let start = Instant::now();
    // Some are counted a moment after the answer has left.
    let wrong = loop {
        let sums = sums(&fleet).await;
        let is = |series: &str| sums.get(series).copied().unwrap_or(f64::NAN);
        let mut wrong: Vec<String> = Vec::new();
        for (series, due) in due {
            if (is(series) - due).abs() > 0.5 || is(series).is_nan() {
                wrong.push(format!("{series} is {}, not {due}", is(series)));
            }
        }
        let nonzero = ["seatlock_fanout_lag_seconds_count", "seatlock_ledger_delivery_seconds_count"];
        let zero = nonzero.iter().filter(|series| is(series).is_nan() || is(series) < 1.0);
        wrong.extend(zero.map(|series| format!("{series} is {}", is(series))));
        if sums.get(r#"seatlock_gateway_pushes_total{outcome="sent"}"#).is_none_or(|count| *count < 1.0) {
            wrong.push("no message was pushed".to_owned());
        }
        if wrong.is_empty() || start.elapsed() > PATIENCE {
            break wrong;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A replica that logs what belongs to a trace, and only that: a validation over RabbitMQ and a lock over a socket, each with
/// a trace of its own, from the transport to the script and back. What is no trace, and who names none, logs nothing more.
async fn what_belongs_to_a_trace_says_so(broker: &RabbitServer, env: &[(&str, &str)]) {
    // A queue of its own: the others must not answer.
    let more = [("SEATLOCK_AMQP_QUEUE", "traced"), ("SEATLOCK_LOG", "info,[request{trace_id}]=debug")];
    let replica = Seatlock::start(&[], &[env, &more].concat());
    let (first, second, third) =
        ("4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c", "c0ffee1916cd43dd8448eb211c80319c");
    let header = |text: &str| {
        let mut headers = FieldTable::default();
        headers.insert("traceparent".into(), AMQPValue::LongString(text.into()));
        headers
    };
    let mut orders = Caller::on(broker).await;
    orders.queue = "traced";
    let start = Instant::now();
    while reqwest::get(format!("{}/readyz", replica.url)).await.is_ok_and(|ready| ready.status() != 200) {
        assert!(start.elapsed() < PATIENCE, "it gets ready: {:#?}", replica.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let data = json!({ "userId": 9, "eventId": 2, "categoryId": 4, "quantity": 1 });
    for headers in [FieldTable::default(), header("00-of no trace"), header(&format!("00-{first}-b7ad6b7169203331-01"))]
    {
        assert_eq!(orders.ask_with("validate-user-locks", &data, headers).await["valid"], false);
    }
    let address = replica.url.trim_start_matches("http://").parse().expect("an address");
    let query = format!("traceparent=00-{second}-b7ad6b7169203331-01");
    let in_header = format!("00-{third}-b7ad6b7169203331-01");
    let wanted = json!({ "eventId": 1, "categoryId": 1, "quantity": 1 });
    for (user, query, headers) in [(9, query.as_str(), vec![]), (10, "", vec![("traceparent", in_header.as_str())])] {
        let mut socket = Raw::open_with(address, query, &headers).await.expect("a transport");
        socket.connect(&json!({ "token": token(user) })).await;
        socket.expect("connected").await;
        assert_eq!(socket.ask("lock-tickets", &wanted).await["success"], true);
    }

    let start = Instant::now();
    loop {
        let log: Vec<Value> = replica.log().iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let debug: Vec<&Value> = log.iter().filter(|line| line["level"] == "DEBUG").collect();
        let traced = |trace: &str, field: &str, value: &str| {
            debug.iter().any(|line| line["span"]["trace_id"] == trace && line[field] == value)
        };
        let all = traced(first, "script", "validate")
            && traced(first, "pattern", "validate-user-locks")
            && traced(second, "script", "lock")
            && traced(second, "name", "lock-tickets")
            && traced(third, "script", "lock")
            && traced(third, "name", "lock-tickets");
        if all {
            let stray: Vec<_> = debug.iter().filter(|line| !line["span"]["trace_id"].is_string()).collect();
            assert!(stray.is_empty(), "of nobody's trace: {stray:#?}");
            let validations = debug.iter().filter(|line| line["script"] == "validate").count();
            assert_eq!(validations, 1, "one of three said which trace it belongs to");
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{log:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
