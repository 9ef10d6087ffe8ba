//! Spans as a collector gets them: from whoever asked, over this service, to the scripts.

use std::collections::HashMap;
use std::future::{Ready, ready};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::{Router, body::Bytes, extract::State, routing::post};
use lapin::types::{AMQPValue, FieldTable};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{AnyValue, KeyValue, any_value},
    trace::v1::{Span, span::SpanKind, status::StatusCode as Status},
};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::counted::Caller;
use crate::support::{
    gateway::{Raw, SECRET, token},
    process::Seatlock,
    rabbit::RabbitServer,
    redis::RedisServer,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// The span of whoever asks.
const PARENT: &str = "b7ad6b7169203331";

/// Traces of callers.
const OF_SOCKET: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const OF_MESSAGE: &str = "0af7651916cd43dd8448eb211c80319c";
const UNSAMPLED: &str = "c0ffee1916cd43dd8448eb211c80319c";

type Attributes = HashMap<String, String>;

/// A collector: keeps the spans that it is sent, each with the attributes of who sent it.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(Attributes, Span)>>>);

impl Collector {
    /// Where it listens, for as long as the test runs.
    async fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let routes = Router::new().route("/v1/traces", post(Self::answer)).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, routes).await });
        url
    }

    fn answer(State(collector): State<Self>, body: Bytes) -> Ready<Vec<u8>> {
        let sent = ExportTraceServiceRequest::decode(body).expect("OTLP in protobuf");
        let mut kept = collector.0.lock().expect("no panic");
        for group in sent.resource_spans {
            let sender = attributes(&group.resource.expect("a resource").attributes);
            let spans = group.scope_spans.into_iter().flat_map(|scope| scope.spans);
            kept.extend(spans.map(|span| (sender.clone(), span)));
        }
        ready(ExportTraceServiceResponse::default().encode_to_vec())
    }

    fn all(&self) -> Vec<(Attributes, Span)> {
        self.0.lock().expect("no panic").clone()
    }

    /// The spans of this name and trace.
    fn named(&self, trace: &str, name: &str) -> Vec<Span> {
        let all = self.all().into_iter().map(|(_, span)| span);
        all.filter(|span| hex(&span.trace_id) == trace && span.name == name).collect()
    }

    /// The one span of this name and trace, waited for.
    async fn one(&self, trace: &str, name: &str) -> Span {
        let start = Instant::now();
        loop {
            let mut found = self.named(trace, name);
            if let Some(span) = found.pop() {
                assert!(found.is_empty(), "{name} twice in {trace}: {found:#?}");
                return span;
            }
            assert!(start.elapsed() < PATIENCE, "no {name} in {trace}: {:#?}", self.all());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| char::from_digit(digit.into(), 16).expect("a digit")).collect()
}

fn attributes(list: &[KeyValue]) -> Attributes {
    let text = |value: &Option<AnyValue>| match value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(any_value::Value::StringValue(text)) => text.clone(),
        other => format!("{other:?}"),
    };
    list.iter().map(|one| (one.key.clone(), text(&one.value))).collect()
}

/// What a span says of itself, with the attributes of these names.
fn says<const N: usize>(span: &Span, names: [&str; N]) -> [String; N] {
    let said = attributes(&span.attributes);
    names.map(|name| said.get(name).cloned().unwrap_or_default())
}

fn is_error(span: &Span) -> bool {
    span.status.as_ref().is_some_and(|status| status.code() == Status::Error)
}

/// What others of the trace have told each other.
const STATE: &str = "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE";

fn traceparent(trace: &str, flags: &str) -> String {
    format!("00-{trace}-{PARENT}-{flags}")
}

/// A replica that exports there.
fn replica(endpoint: &str, more: &[(&str, &str)]) -> Seatlock {
    let secret = String::from_utf8(SECRET.to_vec()).expect("a text");
    let env = [
        ("SEATLOCK_EVENTS_URL", "file:src/inventory/demo.json"),
        ("SEATLOCK_JWT_SECRET", secret.as_str()),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
    ];
    Seatlock::start(&[], &[&env, more].concat())
}

/// A socket whose client says so of its trace, in its query: browsers can set no headers.
async fn socket(replica: &Seatlock, user: u64, traceparent: Option<String>) -> Raw {
    let address: SocketAddr = replica.url.trim_start_matches("http://").parse().expect("an address");
    let state = STATE.replace('=', "%3D").replace(',', "%2C");
    let query = traceparent.map_or(String::new(), |text| format!("traceparent={text}&tracestate={state}"));
    let mut socket = Raw::open(address, &query, None).await.expect("a transport");
    socket.connect(&json!({ "token": token(user) })).await;
    socket.expect("connected").await;
    socket
}

fn wanted() -> Value {
    json!({ "eventId": 2, "categoryId": 4, "quantity": 1 })
}

async fn until_ready(replica: &Seatlock) {
    let start = Instant::now();
    while reqwest::get(format!("{}/readyz", replica.url)).await.is_ok_and(|ready| ready.status() != 200) {
        assert!(start.elapsed() < PATIENCE, "it gets ready: {:#?}", replica.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A buyer's lock over a socket and its confirmation over RabbitMQ, each in a trace of its caller: the collector gets a span
/// of each below its caller's, and one of the script below that, and what others of the trace have told each other goes on with
/// both. Handshakes have one too. Callers who name no trace get one each; of one who does not sample nothing is sent. Nothing
/// is sent before the drain, so all of it comes with the last flush.
#[tokio::test]
async fn spans_lead_from_the_caller_to_the_script() {
    let collector = Collector::default();
    let (broker, redis, endpoint) = tokio::join!(RabbitServer::start(), RedisServer::start(), collector.start());
    let (amqp, url) = (broker.url(), redis.url());
    let mut replica = replica(
        &endpoint,
        &[
            ("SEATLOCK_REDIS_URL", url.as_str()),
            ("SEATLOCK_AMQP_URL", amqp.as_str()),
            ("SEATLOCK_LOG", "info,[request{trace_id}]=debug"),
            ("OTEL_BSP_SCHEDULE_DELAY", "600000"),
            ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test"),
        ],
    );
    until_ready(&replica).await;
    let mut orders = Caller::on(&broker).await;

    let mut unsampled = socket(&replica, 6, Some(traceparent(UNSAMPLED, "00"))).await;
    assert_eq!(unsampled.ask("lock-tickets", &wanted()).await["success"], true);
    let mut buyer = socket(&replica, 7, Some(traceparent(OF_SOCKET, "01"))).await;
    let bought = buyer.ask("lock-tickets", &wanted()).await;
    assert_eq!(bought["success"], true, "{bought}");
    let mut nameless = socket(&replica, 8, None).await;
    assert_eq!(nameless.ask("lock-tickets", &wanted()).await["success"], true);
    let refused = nameless.ask("lock-tickets", &wanted()).await;
    assert_eq!(refused["code"], "already_locked");

    let paid = json!({ "lockId": bought["lockId"], "orderId": "A" });
    let mut headers = FieldTable::default();
    headers.insert("traceparent".into(), AMQPValue::LongString(traceparent(OF_MESSAGE, "01").into()));
    headers.insert("tracestate".into(), AMQPValue::LongString(STATE.into()));
    assert_eq!(orders.ask_with("confirm-ticket-lock", &paid, headers).await, true);
    assert_eq!(orders.ask("confirm-ticket-lock", &paid).await, true);
    for socket in [unsampled, buyer, nameless] {
        socket.leave().await;
    }
    assert!(collector.all().is_empty(), "not yet");
    replica.signal("TERM");
    assert_eq!(replica.exit_code(), 0, "{:#?}", replica.log());

    let lock = collector.one(OF_SOCKET, "lock-tickets").await;
    assert_eq!((hex(&lock.parent_span_id).as_str(), lock.kind()), (PARENT, SpanKind::Server));
    assert_eq!(says(&lock, ["rpc.system.name", "rpc.method", "seatlock.outcome"]), ["socket.io", "lock-tickets", "ok"]);
    let confirm = collector.one(OF_MESSAGE, "process realtime_queue").await;
    assert_eq!((hex(&confirm.parent_span_id).as_str(), confirm.kind()), (PARENT, SpanKind::Consumer));
    assert_eq!(
        says(&confirm, ["messaging.system", "messaging.destination.name", "seatlock.pattern", "seatlock.outcome"]),
        ["rabbitmq", "realtime_queue", "confirm-ticket-lock", "answered"]
    );
    for (above, trace, script, outcome) in
        [(&lock, OF_SOCKET, "lock", "granted"), (&confirm, OF_MESSAGE, "confirm", "confirmed")]
    {
        let call = collector.one(trace, &format!("EVALSHA {script}")).await;
        assert_eq!((&call.parent_span_id, call.kind()), (&above.span_id, SpanKind::Client), "{call:#?}");
        let names = ["db.system.name", "db.operation.name", "db.stored_procedure.name", "seatlock.outcome"];
        assert_eq!(says(&call, names), ["redis", "EVALSHA", script, outcome]);
        assert_eq!((above.trace_state.as_str(), call.trace_state.as_str()), (STATE, STATE));
        assert!(above.start_time_unix_nano <= call.start_time_unix_nano, "{call:#?}");
        assert!(call.end_time_unix_nano <= above.end_time_unix_nano, "{call:#?}");
    }

    let greeted = collector.one(OF_SOCKET, "connect").await;
    assert_eq!((hex(&greeted.parent_span_id).as_str(), greeted.kind()), (PARENT, SpanKind::Server));
    assert_eq!(says(&greeted, ["rpc.system.name", "rpc.method", "seatlock.outcome"]), ["socket.io", "connect", "ok"]);

    let all = collector.all();
    let roots = all.iter().map(|(_, span)| span).filter(|span| span.parent_span_id.is_empty());
    // What a sweep looks at, and when, is not what this is about.
    let roots: Vec<_> = roots.filter(|span| span.name != "sweep").collect();
    let mut names: Vec<_> = roots.iter().map(|root| (root.name.as_str(), says(root, ["seatlock.outcome"]))).collect();
    names.sort_unstable();
    let outcome = |name| [String::from(name)];
    let due = [
        ("connect", outcome("ok")),
        ("lock-tickets", outcome("already_locked")),
        ("lock-tickets", outcome("ok")),
        ("process realtime_queue", outcome("answered")),
    ];
    assert_eq!(names, due, "of callers who name no trace, and of nothing that nobody asked for");
    let log: Vec<Value> = replica.log().iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
    for root in roots.into_iter().filter(|root| root.name != "connect") {
        let trace = hex(&root.trace_id);
        assert!(log.iter().any(|line| line["span"]["trace_id"] == trace), "{trace} in {log:#?}");
        assert!(all.iter().any(|(_, span)| span.parent_span_id == root.span_id), "no call below {root:#?}");
    }
    assert!(all.iter().all(|(_, span)| hex(&span.trace_id) != UNSAMPLED), "{all:#?}");
    assert!(log.iter().any(|line| line["span"]["trace_id"] == UNSAMPLED), "the log has what is not exported");
    assert!(all.iter().all(|(_, span)| !is_error(span)), "a refusal is no error: {all:#?}");

    let (sender, _) = &all[0];
    assert_eq!(sender.get("service.name").map(String::as_str), Some("seatlock"));
    assert_eq!(sender.get("service.version").map(String::as_str), Some(env!("CARGO_PKG_VERSION")));
    assert_eq!(sender.get("deployment.environment.name").map(String::as_str), Some("test"));
    let told = format!("{all:?}");
    let lock = bought["lockId"].as_str().expect("an id");
    for secret in ["eyJ", "guest", lock, std::str::from_utf8(SECRET).expect("a text")] {
        assert!(!told.contains(secret), "{secret} in {told}");
    }
}

/// The sampler decides about those who name no trace, and about nobody else; the service goes by the name that it is given.
#[tokio::test]
async fn the_sampler_decides_about_roots_only() {
    let collector = Collector::default();
    let endpoint = collector.start().await;
    let replica = replica(
        &endpoint,
        &[
            ("OTEL_TRACES_SAMPLER", "parentbased_always_off"),
            ("OTEL_SERVICE_NAME", "box-office-seats"),
            ("OTEL_BSP_SCHEDULE_DELAY", "50"),
            ("SEATLOCK_LOG", "warn,seatlock::app=info"),
        ],
    );
    let mut nameless = socket(&replica, 8, None).await;
    assert_eq!(nameless.ask("lock-tickets", &wanted()).await["success"], true);
    let mut named = socket(&replica, 7, Some(traceparent(OF_SOCKET, "01"))).await;
    assert_eq!(named.ask("lock-tickets", &wanted()).await["success"], true);
    collector.one(OF_SOCKET, "lock-tickets").await;
    for (sender, span) in collector.all() {
        assert_eq!(hex(&span.trace_id), OF_SOCKET, "{span:#?}");
        assert_eq!(sender["service.name"], "box-office-seats");
    }
}

/// What nobody asked for has traces of its own, where there was something to do: the sweep that ends a lock, with its scripts
/// below it. A refused handshake has its word, and is no error.
#[tokio::test]
async fn sweeps_and_refused_handshakes_have_spans() {
    let collector = Collector::default();
    let (redis, endpoint) = tokio::join!(RedisServer::start(), collector.start());
    let url = redis.url();
    let more = [
        ("SEATLOCK_REDIS_URL", url.as_str()),
        ("SEATLOCK_LOCK_TTL", "1s"),
        ("SEATLOCK_EXPIRY_WARNING", "500ms"),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
        ("SEATLOCK_LOG", "info"),
    ];
    let replica = replica(&endpoint, &more);
    until_ready(&replica).await;
    let address: SocketAddr = replica.url.trim_start_matches("http://").parse().expect("an address");
    let parent = traceparent(OF_SOCKET, "01");
    let headers = [("traceparent", parent.as_str()), ("tracestate", "rojo=1"), ("tracestate", "congo=2")];
    let mut stranger = Raw::open_with(address, "", &headers).await.expect("a transport");
    assert_eq!(stranger.refusal(&json!({ "token": "eyJ" })).await, "unauthorized");
    let refused = collector.one(OF_SOCKET, "connect").await;
    assert_eq!(says(&refused, ["seatlock.outcome", "error.type"]), ["unauthorized", ""]);
    assert!(!is_error(&refused) && refused.trace_state == "rojo=1,congo=2", "{refused:#?}");

    let mut buyer = socket(&replica, 7, None).await;
    assert_eq!(buyer.ask("lock-tickets", &wanted()).await["success"], true);
    buyer.expect("lock-expired").await;
    let start = Instant::now();
    loop {
        let all: Vec<Span> = collector.all().into_iter().map(|(_, span)| span).collect();
        let sweeps = all.iter().filter(|span| span.name == "sweep" && span.parent_span_id.is_empty());
        let mut ended = sweeps.filter(|sweep| {
            let below = |span: &&Span| span.parent_span_id == sweep.span_id && span.trace_id == sweep.trace_id;
            let names: Vec<_> = all.iter().filter(below).map(|span| span.name.as_str()).collect();
            sweep.kind() == SpanKind::Internal
                && ["EVALSHA sweep", "EVALSHA plan"].iter().all(|name| names.contains(name))
        });
        if let Some(sweep) = ended.next() {
            assert_eq!(says(sweep, ["seatlock.outcome", "error.type"]), ["ok", ""]);
            return;
        }
        assert!(start.elapsed() < PATIENCE, "no sweep: {all:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Redis is gone: what could not be answered is an error in its trace, and so is the call that failed.
#[tokio::test]
async fn what_did_not_work_is_an_error() {
    let collector = Collector::default();
    let (mut redis, endpoint) = tokio::join!(RedisServer::start(), collector.start());
    let url = redis.url();
    let more = [("SEATLOCK_REDIS_URL", url.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "50")];
    let replica = replica(&endpoint, &more);
    until_ready(&replica).await;
    let mut buyer = socket(&replica, 7, Some(traceparent(OF_SOCKET, "01"))).await;
    // From now on the replica knows that there is such an event, and need not look.
    assert_eq!(buyer.ask("join-event-room", &json!({ "eventId": 2 })).await["success"], true);
    redis.kill();
    assert_eq!(buyer.ask("lock-tickets", &wanted()).await["code"], "unavailable");
    let lock = collector.one(OF_SOCKET, "lock-tickets").await;
    assert!(is_error(&lock), "{lock:#?}");
    assert_eq!(says(&lock, ["error.type", "seatlock.outcome"]), ["unavailable", "unavailable"]);
    let call = collector.one(OF_SOCKET, "EVALSHA lock").await;
    assert!(is_error(&call) && call.parent_span_id == lock.span_id, "{call:#?}");
    assert!(["timeout", "disconnected"].contains(&says(&call, ["error.type"])[0].as_str()), "{call:#?}");
}

/// A collector that is not there, and one that takes connections and never answers: every request is answered as if there
/// were none, the log says it once, and the drain ends.
#[tokio::test]
async fn a_dead_collector_changes_no_answer() {
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let absent = format!("http://127.0.0.1:{}", crate::support::free_port());
    for endpoint in [absent, format!("http://{}", silent.local_addr().expect("bound"))] {
        let mut replica = replica(
            &endpoint,
            &[
                ("SEATLOCK_RATE_LIMIT", "off"),
                ("OTEL_BSP_SCHEDULE_DELAY", "10"),
                ("OTEL_BSP_MAX_QUEUE_SIZE", "8"),
                ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4"),
                ("OTEL_EXPORTER_OTLP_TIMEOUT", "300"),
            ],
        );
        let mut buyer = socket(&replica, 7, None).await;
        let start = Instant::now();
        for _ in 0..200 {
            assert_eq!(buyer.ask("lock-tickets", &wanted()).await["success"], true);
            assert_eq!(buyer.ask("unlock-tickets", &wanted()).await["success"], true);
        }
        let took = start.elapsed();
        assert!(took < Duration::from_secs(8), "four hundred answers took {took:?}");
        replica.logged("spans cannot be exported; requests go on without them");
        // Several batches more are lost meanwhile.
        for _ in 0..20 {
            assert!(buyer.ask("heartbeat", &Value::Null).await["timestamp"].is_string());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        buyer.leave().await;
        let start = Instant::now();
        replica.signal("TERM");
        assert_eq!(replica.exit_code(), 0, "{:#?}", replica.log());
        assert!(start.elapsed() < Duration::from_secs(6), "the drain took {:?}", start.elapsed());
        let log = replica.log();
        let said = log.iter().filter(|line| line.contains("spans cannot be exported")).count();
        assert_eq!(said, 1, "{log:#?}");
        let loud = log.iter().filter(|line| line.contains(r#""level":"ERROR""#)).count();
        assert_eq!(loud, 0, "{log:#?}");
    }
}
