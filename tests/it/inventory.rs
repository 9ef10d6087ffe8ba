//! The stock: NestJS bytes, the TCP client against a server that misbehaves, and the refresher between a scripted source
//! and the embedded ledger on a stepped clock.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use seatlock::domain::{EventId, LockOutcome, Now, Snapshot};
use seatlock::inventory::{
    Frame, Frames, NestTcp, Reply, SourceError, SourceOptions, Stock, StockError, StockOptions, StockSource,
};
use seatlock::ledger::{Ledger, MemoryLedger};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::support::ledger::{START_US, event, options, request, snapshot};

mod vectors {
    use super::*;

    fn vectors(text: &str) -> Vec<Value> {
        serde_json::from_str(text).expect("the vectors are JSON")
    }

    fn field<'a>(vector: &'a Value, name: &str) -> &'a str {
        vector[name].as_str().unwrap_or_default()
    }

    fn tcp() -> Vec<Value> {
        vectors(include_str!("../vectors/nestjs-tcp.json"))
    }

    fn tcp_frame(name: &str) -> String {
        let all = tcp();
        let vector = all.iter().find(|vector| field(vector, "name") == name).expect(name);
        field(vector, "frame").to_owned()
    }

    /// Every captured TCP frame is decoded to its JSON, whole and byte by byte, and every captured request is produced
    /// byte for byte.
    #[test]
    fn every_tcp_vector_is_decoded_or_produced() {
        let mut decoded = 0;
        let mut produced = 0;
        for vector in tcp() {
            let (name, frame) = (field(&vector, "name"), field(&vector, "frame"));
            if frame.is_empty() {
                continue;
            }
            let mut frames = Frames::default();
            let mut values = Vec::new();
            for byte in frame.as_bytes() {
                frames.push(&[*byte]);
                match frames.next_frame() {
                    Ok(value) => values.extend(value),
                    Err(error) => {
                        assert_eq!(
                            (name, error.to_string().as_str()),
                            ("bad JSON or a bad length", "a frame is not JSON")
                        );
                    }
                }
            }
            if name == "bad JSON or a bad length" {
                continue;
            }
            let text = frame.split_once('#').expect("a header").1;
            let value: Value = serde_json::from_str(text).expect("JSON");
            assert_eq!(values, std::slice::from_ref(&value), "{name}");
            decoded += 1;
            if field(&vector, "direction") == "client->server" {
                let request = Frame {
                    pattern: value["pattern"].as_str().expect("a pattern"),
                    data: value["data"].as_u64().expect("an id"),
                    id: value["id"].as_str(),
                };
                assert_eq!(String::from_utf8(request.encode()).expect("UTF-8"), frame, "{name}");
                produced += 1;
            }
        }
        assert_eq!((decoded, produced), (7, 2));
    }

    /// All frames of the file behind each other, cut at every possible place, are the same frames.
    #[test]
    fn frames_in_one_read_and_in_many_reads_are_the_same() {
        let frames: Vec<String> = tcp()
            .iter()
            .map(|vector| field(vector, "frame").to_owned())
            .filter(|frame| !frame.is_empty() && !frame.contains("nonsense"))
            .collect();
        let stream = frames.concat();
        for cut in 0..stream.len() {
            let (one, two) = stream.as_bytes().split_at(cut);
            let mut reader = Frames::default();
            let mut count = 0;
            for part in [one, two] {
                reader.push(part);
                while reader.next_frame().expect("frames").is_some() {
                    count += 1;
                }
            }
            assert_eq!(count, frames.len(), "cut at {cut}");
        }
    }

    /// The captured answers of a real events-service, through the whole client, mean the stock they state.
    #[tokio::test]
    async fn the_captured_answers_mean_what_the_events_service_meant() {
        let found = |names: &[&str]| {
            let frames: Vec<String> = names.iter().map(|name| tcp_frame(name)).collect();
            async move {
                let server = Server::start().await;
                let client = server.client(Duration::from_secs(2));
                let answers = tokio::spawn(async move {
                    let mut peer = server.accept().await;
                    for frame in frames {
                        let asked = peer.request().await;
                        peer.reply_as(&frame, &asked).await;
                    }
                    peer
                });
                let read = client.snapshot(event(3)).await;
                (read, answers.await.expect("the server's script"))
            }
        };
        let expected = snapshot(&[(4, 4, 4), (5, 2, 0)]);
        assert_eq!(found(&["reply, array of categories"]).await.0, Ok(expected.clone()));
        let whole = "reply, event with ticketCategories and no availableSeats";
        assert_eq!(found(&["error reply, unknown pattern", whole]).await.0, Ok(expected));
        let unknown = "error reply, NotFoundException through an RPC exception filter";
        assert_eq!(found(&[unknown, unknown]).await.0, Err(SourceError::EventNotFound));
        assert_eq!(found(&[unknown, "error reply, unknown pattern"]).await.0, Err(SourceError::EventNotFound));
        let failed = found(&["error reply with multi-byte text", "error reply with multi-byte text"]).await.0;
        assert_eq!(failed, Err(SourceError::Refused("invalid input syntax for type integer: \"café €\"".to_owned())));
    }

    fn show(value: &Value) -> String {
        // As JavaScript prints it: whole numbers beyond 2^53 are rounded.
        match (value.as_u64(), value.as_f64()) {
            (Some(whole), Some(rounded)) if whole > 1 << 53 => rounded.to_string(),
            _ => value.to_string(),
        }
    }

    /// Every reply that a real Nest client was given is read as that client read it.
    #[test]
    fn every_reply_vector_is_read_as_a_nest_client_reads_it() {
        let all = vectors(include_str!("../vectors/nestjs-rmq.json"));
        let mut groups: Vec<(String, Vec<&Value>)> = Vec::new();
        for vector in &all {
            let direction = field(vector, "direction");
            if direction != "service-to-client" && direction != "server-to-peer" {
                continue;
            }
            let base = field(vector, "name").split(" [").next().unwrap_or_default();
            let key = format!("{direction} {} {base}", vector["nest_major"]);
            // Replies to one request are read together where the capture read them together.
            let together = field(vector, "expect").starts_with("all ");
            match groups.last_mut() {
                Some((last, group)) if together && *last == key => group.push(vector),
                _ => groups.push((key, vec![vector])),
            }
        }
        for (key, group) in &groups {
            let expect = field(group[0], "expect");
            let (expect, wanted) = match expect.split_once(" (the request had correlationId ") {
                Some((expect, id)) => (expect, Some(id.trim_end_matches(')'))),
                None => (expect, group[0]["properties"]["correlationId"].as_str()),
            };
            let expect = expect.split_once("together: ").map_or(expect, |(_, expect)| expect);
            let expect = expect.split(" (no correlationId").next().unwrap_or_default();
            let mut seen = Vec::new();
            let mut over = false;
            for vector in group {
                let id = vector["properties"]["correlationId"].as_str();
                if over || id.is_none() || id != wanted {
                    continue;
                }
                match Reply::read(field(vector, "body").as_bytes()) {
                    Reply::Error(error) => {
                        seen.push(format!("error {}", show(&error)));
                        over = true;
                    }
                    Reply::Next { value, complete } => {
                        match value {
                            Some(value) => seen.push(format!("next {}", show(&value))),
                            None if !complete => seen.push("next undefined".to_owned()),
                            None => {}
                        }
                        if complete {
                            seen.push("complete".to_owned());
                            over = true;
                        }
                    }
                }
            }
            if !over {
                seen.push("pending".to_owned());
            }
            assert_eq!(canonical(&seen.join(" | ")), canonical(expect), "{key}");
        }
        assert_eq!(groups.iter().map(|(_, group)| group.len()).sum::<usize>(), 128 + 134);
    }

    /// The same text with every JSON document's keys in one order.
    fn canonical(expect: &str) -> String {
        expect
            .split(" | ")
            .map(|step| {
                step.split_once(' ')
                    .and_then(|(word, json)| {
                        let value: Value = serde_json::from_str(json).ok()?;
                        Some(format!("{word} {value}"))
                    })
                    .unwrap_or_else(|| step.to_owned())
            })
            .collect::<Vec<_>>()
            .join(" | ")
    }
}

/// A TCP server that speaks the frames of the vectors, and worse, as a test tells it.
struct Server {
    listener: TcpListener,
}

/// One connection to it.
struct Connection {
    stream: TcpStream,
    frames: Frames,
}

impl Server {
    async fn start() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.expect("a free port") }
    }

    fn port(&self) -> u16 {
        self.listener.local_addr().expect("bound").port()
    }

    fn client(&self, request_timeout: Duration) -> Arc<NestTcp> {
        let options = SourceOptions { request_timeout, connect_timeout: Duration::from_secs(2) };
        Arc::new(NestTcp::start("127.0.0.1".to_owned(), self.port(), options, CancellationToken::new()))
    }

    async fn accept(&self) -> Connection {
        let (stream, _) = timeout(Duration::from_secs(5), self.listener.accept())
            .await
            .expect("a client comes")
            .expect("a connection");
        Connection { stream, frames: Frames::default() }
    }
}

impl Connection {
    async fn request(&mut self) -> Value {
        loop {
            if let Some(value) = self.frames.next_frame().expect("the client sends frames") {
                return value;
            }
            let mut bytes = [0; 1024];
            let read = timeout(Duration::from_secs(5), self.stream.read(&mut bytes)).await.expect("the client asks");
            let len = read.expect("the connection stands");
            assert!(len > 0, "the client closed the connection");
            self.frames.push(&bytes[..len]);
        }
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("the connection stands");
    }

    async fn reply(&mut self, mut body: Value, request: &Value) {
        body["id"] = request["id"].clone();
        self.send(&framed(&body)).await;
    }

    /// A captured frame, with the id of the request it answers.
    async fn reply_as(&mut self, frame: &str, request: &Value) {
        let body = serde_json::from_str(frame.split_once('#').expect("a header").1).expect("JSON");
        self.reply(body, request).await;
    }

    async fn closed_by_client(&mut self) {
        let mut bytes = [0; 1024];
        let end = async { while self.stream.read(&mut bytes).await.is_ok_and(|len| len > 0) {} };
        timeout(Duration::from_secs(5), end).await.expect("the client closes the connection");
    }
}

fn framed(body: &Value) -> Vec<u8> {
    let text = body.to_string();
    format!("{}#{text}", text.encode_utf16().count()).into_bytes()
}

fn categories(stock: u64) -> Value {
    json!({"response": [{"id": 1, "totalSeats": 100, "availableSeats": stock}], "isDisposed": true})
}

const SHORT: Duration = Duration::from_millis(300);

/// Ten requests are open at once on one connection; replies come in the opposite order, in single bytes, and each
/// reaches the request that it answers.
#[tokio::test]
async fn requests_share_a_connection_and_replies_find_theirs() {
    let server = Server::start().await;
    let client = server.client(Duration::from_secs(5));
    let asking: Vec<_> = (1..=10)
        .map(|id| {
            let client = Arc::clone(&client);
            tokio::spawn(async move { client.snapshot(event(id)).await })
        })
        .collect();
    let mut peer = server.accept().await;
    let mut asked = Vec::new();
    while asked.len() < 10 {
        asked.push(peer.request().await);
    }
    for request in asked.iter().rev() {
        let mut body = categories(request["data"].as_u64().expect("an id"));
        body["id"] = request["id"].clone();
        body["note"] = json!("more than one byte: é€😀");
        for byte in framed(&body) {
            peer.send(&[byte]).await;
        }
        // A second reply to the same request and a reply to nobody are ignored.
        peer.reply(categories(77), request).await;
        peer.reply(categories(78), &json!({"id": "nobody"})).await;
    }
    for (id, answer) in (1..=10).zip(asking) {
        assert_eq!(answer.await.expect("no panic"), Ok(snapshot(&[(1, 100, id)])));
    }
}

/// The server closes the connection while a request is open, then speaks garbage, then a frame that is too long: each time
/// the open request fails at once, and the next connection works.
#[tokio::test]
async fn a_broken_connection_fails_what_is_open_and_is_replaced() {
    let server = Server::start().await;
    let client = server.client(Duration::from_secs(5));
    let ask = || {
        let client = Arc::clone(&client);
        tokio::spawn(async move { client.snapshot(event(1)).await })
    };
    for garbage in [None, Some("8#nonsense"), Some("hello"), Some("4194305#"), Some("2#\u{1f600}x")] {
        let mut peer = server.accept().await;
        let started = Instant::now();
        let open = ask();
        peer.request().await;
        match garbage {
            Some(bytes) => {
                peer.send(bytes.as_bytes()).await;
                peer.closed_by_client().await;
            }
            None => drop(peer),
        }
        let answer = open.await.expect("no panic");
        assert!(matches!(answer, Err(SourceError::Unavailable(_))), "{garbage:?}: {answer:?}");
        assert!(started.elapsed() < Duration::from_secs(2), "{garbage:?}: failed only by its deadline");
    }
    let mut peer = server.accept().await;
    let open = ask();
    let request = peer.request().await;
    peer.reply(categories(5), &request).await;
    assert_eq!(open.await.expect("no panic"), Ok(snapshot(&[(1, 100, 5)])));
}

/// A server that accepts and reads and never answers: the request ends by its deadline, and the silent connection is given
/// up for a new one.
#[tokio::test]
async fn a_silent_connection_is_replaced() {
    let server = Server::start().await;
    let client = server.client(SHORT);
    let mut silent = server.accept().await;
    let started = Instant::now();
    assert_eq!(client.snapshot(event(1)).await, Err(SourceError::Timeout(SHORT)));
    assert!(started.elapsed() < SHORT * 3);
    silent.closed_by_client().await;
    let mut peer = server.accept().await;
    let asked = tokio::spawn({
        let client = Arc::clone(&client);
        async move { client.snapshot(event(1)).await }
    });
    let request = peer.request().await;
    peer.reply(categories(5), &request).await;
    assert_eq!(asked.await.expect("no panic"), Ok(snapshot(&[(1, 100, 5)])));
}

/// Nobody listens on the port: requests fail long before their deadline.
#[tokio::test]
async fn without_a_server_requests_fail_at_once() {
    let port = Server::start().await.port();
    let options = SourceOptions { request_timeout: Duration::from_secs(30), ..SourceOptions::default() };
    let client = NestTcp::start("127.0.0.1".to_owned(), port, options, CancellationToken::new());
    let answer = timeout(Duration::from_secs(5), client.snapshot(event(1))).await.expect("an answer at once");
    assert!(matches!(answer, Err(SourceError::Unavailable(_))), "{answer:?}");
}

/// A thousand requests at once to a server that does not answer: those beyond the limit are refused as too many.
#[tokio::test]
async fn open_requests_are_bounded() {
    let server = Server::start().await;
    let client = server.client(SHORT);
    let asking: Vec<_> = (1..=1000)
        .map(|id| {
            let client = Arc::clone(&client);
            tokio::spawn(async move { client.snapshot(event(id)).await })
        })
        .collect();
    let mut busy = 0;
    for answer in asking {
        if answer.await.expect("no panic") == Err(SourceError::Busy) {
            busy += 1;
        }
    }
    assert!(busy >= 400, "{busy} of 1000 were refused");
}

type Script = VecDeque<(Duration, Result<Snapshot, SourceError>)>;

/// A source that answers as it is told: the next line of its script, or else its rule.
struct Scripted {
    script: Mutex<Script>,
    rule: Mutex<(Duration, Result<Snapshot, SourceError>)>,
    asked: AtomicUsize,
    open: AtomicUsize,
    open_max: AtomicUsize,
}

impl Scripted {
    fn new(rule: Result<Snapshot, SourceError>) -> Arc<Self> {
        Arc::new(Self {
            script: Mutex::default(),
            rule: Mutex::new((Duration::from_millis(20), rule)),
            asked: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            open_max: AtomicUsize::new(0),
        })
    }

    fn next(&self, after: Duration, answer: Result<Snapshot, SourceError>) {
        self.script.lock().expect("no panic").push_back((after, answer));
    }

    fn rule(&self, answer: Result<Snapshot, SourceError>) {
        self.rule.lock().expect("no panic").1 = answer;
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl StockSource for Scripted {
    async fn snapshot(&self, _event: EventId) -> Result<Snapshot, SourceError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let open = self.open.fetch_add(1, Ordering::SeqCst) + 1;
        self.open_max.fetch_max(open, Ordering::SeqCst);
        let next = self.script.lock().expect("no panic").pop_front();
        let (after, answer) = next.unwrap_or_else(|| self.rule.lock().expect("no panic").clone());
        sleep(after).await;
        self.open.fetch_sub(1, Ordering::SeqCst);
        answer
    }
}

/// The embedded ledger on tokio's clock, which a test with paused time steps.
pub fn ledger() -> Arc<dyn Ledger> {
    let start = Instant::now();
    let clock = move || Now(START_US + u64::try_from(start.elapsed().as_micros()).expect("a short test"));
    Arc::new(MemoryLedger::with_clock(options(), Arc::new(clock)))
}

const REFRESH: Duration = Duration::from_secs(10);

fn stock(ledger: &Arc<dyn Ledger>, source: &Arc<Scripted>) -> Arc<Stock> {
    let options = StockOptions::new(REFRESH, Duration::from_secs(1));
    Stock::new(Arc::clone(ledger), Arc::clone(source) as Arc<dyn StockSource>, options, CancellationToken::new())
}

async fn free(stock: &Stock) -> Result<u64, StockError> {
    Ok(stock.availability(event(1)).await?[0].available())
}

fn down() -> Result<Snapshot, SourceError> {
    Err(SourceError::Unavailable("refused".to_owned()))
}

/// A hundred users ask for the same unknown event at once, half of them for its counts and half for a lock: the source is
/// asked once and everybody has an outcome.
#[tokio::test(start_paused = true)]
async fn concurrent_misses_of_one_event_share_one_question() {
    let (ledger, source) = (ledger(), Scripted::new(Ok(snapshot(&[(1, 60, 40)]))));
    let stock = stock(&ledger, &source);
    let asking: Vec<_> = (1..=100)
        .map(|id| {
            let stock = Arc::clone(&stock);
            tokio::spawn(async move {
                if id % 2 == 0 {
                    return stock.availability(event(1)).await.is_ok();
                }
                matches!(
                    stock.lock(request(event(1), 1, id, 1)).await,
                    Ok(LockOutcome::Granted(_) | LockOutcome::Insufficient { .. })
                )
            })
        })
        .collect();
    let mut good = 0;
    for answer in asking {
        good += u32::from(answer.await.expect("no panic"));
    }
    assert_eq!((good, source.asked()), (100, 1));
}

/// Replica A asks, and its answer (10 left) is slow; replica B asks later and hears sooner (4 left). When A's answer comes
/// it changes nothing.
#[tokio::test(start_paused = true)]
async fn a_late_answer_never_replaces_a_newer_one() {
    let ledger = ledger();
    let slow = Scripted::new(Ok(snapshot(&[(1, 10, 10)])));
    slow.next(Duration::from_millis(500), Ok(snapshot(&[(1, 10, 10)])));
    let quick = Scripted::new(Ok(snapshot(&[(1, 10, 4)])));
    let (a, b) = (stock(&ledger, &slow), stock(&ledger, &quick));
    a.refresh(event(1));
    sleep(Duration::from_millis(100)).await;
    b.refresh(event(1));
    sleep(Duration::from_secs(2)).await;
    assert_eq!((slow.asked(), quick.asked()), (1, 1));
    assert_eq!(free(&a).await.expect("known"), 4);
}

/// Somebody asks for an event that does not exist, again and again: the source is asked once in five seconds. When the
/// events-service says that it changed, it is asked at once.
#[tokio::test(start_paused = true)]
async fn an_unknown_event_is_remembered_for_a_while() {
    let (ledger, source) = (ledger(), Scripted::new(Err(SourceError::EventNotFound)));
    let stock = stock(&ledger, &source);
    for _ in 0..40 {
        assert!(matches!(free(&stock).await, Err(StockError::EventNotFound)));
        let refused = stock.lock(request(event(1), 1, 1, 1)).await;
        assert!(matches!(refused, Err(StockError::EventNotFound)));
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(source.asked(), 1);
    sleep(Duration::from_secs(2)).await;
    assert!(matches!(free(&stock).await, Err(StockError::EventNotFound)));
    assert_eq!(source.asked(), 2);
    source.rule(Ok(snapshot(&[(1, 10, 10)])));
    sleep(Duration::from_millis(200)).await;
    stock.refresh(event(1));
    sleep(Duration::from_millis(200)).await;
    assert_eq!(free(&stock).await.expect("known now"), 10);
}

/// The source no longer knows an event that had stock: it is closed from the answer on, for those who watch it and for those
/// who would lock; what is held stays held. An event that it never knew leaves nothing in the ledger, and one that it knows
/// again is open again.
#[tokio::test(start_paused = true)]
async fn an_event_that_is_gone_is_closed() {
    let (ledger, source) = (ledger(), Scripted::new(Ok(snapshot(&[(1, 10, 10)]))));
    let stock = stock(&ledger, &source);
    let granted = stock.lock(request(event(1), 1, 1, 2)).await.expect("an outcome");
    assert!(matches!(granted, LockOutcome::Granted { .. }), "{granted:?}");
    source.rule(Err(SourceError::EventNotFound));
    stock.refresh(event(1));
    sleep(Duration::from_millis(200)).await;
    for pause in [Duration::ZERO, 3 * REFRESH] {
        sleep(pause).await;
        let counts = stock.availability(event(1)).await.expect("known once")[0];
        assert_eq!((counts.open, counts.available(), counts.active), (false, 0, 2));
        let refused = stock.lock(request(event(1), 1, 2, 1)).await.expect("an outcome");
        assert_eq!(refused, LockOutcome::Closed);
    }
    let invented = stock.lock(request(event(9), 1, 2, 1)).await;
    assert!(matches!(invented, Err(StockError::EventNotFound)), "{invented:?}");
    assert_eq!(ledger.availability(event(9), Duration::MAX).await.expect("an answer"), None);
    source.rule(Ok(snapshot(&[(1, 10, 10)])));
    stock.refresh(event(1));
    sleep(Duration::from_millis(200)).await;
    assert_eq!(free(&stock).await.expect("known"), 8);
}

/// The source dies. Known stock is served and locked from until it is as old as allowed, then nothing is; when the source
/// is back, so is the stock.
#[tokio::test(start_paused = true)]
async fn known_stock_is_served_up_to_its_age_limit_when_the_source_is_down() {
    let (ledger, source) = (ledger(), Scripted::new(Ok(snapshot(&[(1, 10, 10)]))));
    let stock = stock(&ledger, &source);
    assert_eq!(free(&stock).await.expect("known"), 10);
    source.rule(down());
    for second in (0..55).step_by(5) {
        assert_eq!(free(&stock).await.expect("known"), 10 - second / 5, "after {second} s");
        let mut lock = request(event(1), 1, second + 1, 1);
        lock.stock_age_max = stock.age_wanted();
        if second / 5 < 10 {
            assert!(matches!(stock.lock(lock).await, Ok(LockOutcome::Granted(_))), "after {second} s");
        }
        sleep(Duration::from_secs(5)).await;
    }
    sleep(Duration::from_secs(6)).await;
    assert!(matches!(free(&stock).await, Err(StockError::Unavailable(SourceError::Unavailable(_)))));
    let mut lock = request(event(1), 1, 99, 1);
    lock.stock_age_max = stock.age_wanted();
    assert!(matches!(stock.lock(lock).await, Err(StockError::Unavailable(_))));
    source.rule(Ok(snapshot(&[(1, 20, 20)])));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(free(&stock).await.expect("known again"), 10);
}

/// A dead source that swallows questions makes only the first request of an event wait; those of the next half second fail
/// at once.
#[tokio::test(start_paused = true)]
async fn nobody_queues_behind_a_dead_source() {
    let (ledger, source) = (ledger(), Scripted::new(down()));
    source.next(Duration::from_hours(1), down());
    let stock = stock(&ledger, &source);
    let started = Instant::now();
    assert!(matches!(free(&stock).await, Err(StockError::Unavailable(SourceError::Timeout(_)))));
    assert_eq!(started.elapsed().as_millis(), 1000);
    assert!(matches!(free(&stock).await, Err(StockError::Unavailable(SourceError::Timeout(_)))));
    assert_eq!((started.elapsed().as_millis(), source.asked()), (1000, 1));
}

/// A burst of refreshes while a question is open becomes one question after it, because the open one may have been
/// answered before the change.
#[tokio::test(start_paused = true)]
async fn refreshes_coalesce_and_one_follows_the_open_question() {
    let (ledger, source) = (ledger(), Scripted::new(Ok(snapshot(&[(1, 10, 3)]))));
    source.next(Duration::from_millis(300), Ok(snapshot(&[(1, 10, 9)])));
    let stock = stock(&ledger, &source);
    stock.refresh(event(1));
    sleep(Duration::from_millis(100)).await;
    for _ in 0..50 {
        stock.refresh(event(1));
    }
    sleep(Duration::from_secs(1)).await;
    assert_eq!(source.asked(), 2);
    assert_eq!(free(&stock).await.expect("known"), 3);
}

/// A refresh that fails is tried again without anybody watching.
#[tokio::test(start_paused = true)]
async fn a_failed_refresh_is_tried_again() {
    let (ledger, source) = (ledger(), Scripted::new(Ok(snapshot(&[(1, 10, 3)]))));
    source.next(Duration::ZERO, down());
    source.next(Duration::ZERO, Err(SourceError::Refused("Internal server error".to_owned())));
    let stock = stock(&ledger, &source);
    stock.refresh(event(1));
    sleep(Duration::from_secs(3)).await;
    assert_eq!(source.asked(), 3);
}

/// Two replicas watch an event for a minute: together they ask about once per interval, not twice, and its stock never gets
/// older than two intervals. When the last watcher goes nobody asks any more.
#[tokio::test(start_paused = true)]
async fn a_watched_event_is_kept_fresh_by_one_replica_at_a_time() {
    let (ledger, source) = (ledger(), Scripted::new(Ok(snapshot(&[(1, 10, 3)]))));
    let (a, b) = (stock(&ledger, &source), stock(&ledger, &source));
    a.watch(event(1));
    a.watch(event(1));
    b.watch(event(1));
    sleep(Duration::from_secs(1)).await;
    for _ in 0..600 {
        sleep(Duration::from_millis(100)).await;
        let known = ledger.availability(event(1), REFRESH * 2).await.expect("an answer");
        assert!(known.is_some(), "the stock is older than two intervals");
    }
    let asked = source.asked();
    assert!((5..=10).contains(&asked), "{asked} questions in a minute");
    a.unwatch(event(1));
    b.unwatch(event(1));
    a.unwatch(event(1));
    sleep(REFRESH * 2).await;
    let asked = source.asked();
    sleep(REFRESH * 5).await;
    assert_eq!(source.asked(), asked);
}

/// Five hundred events are missed at once: at most sixteen questions are open at any time.
#[tokio::test(start_paused = true)]
async fn open_questions_are_bounded() {
    let (ledger, source) = (ledger(), Scripted::new(Ok(snapshot(&[(1, 10, 3)]))));
    let stock = stock(&ledger, &source);
    let asking: Vec<_> = (1..=500)
        .map(|id| {
            let stock = Arc::clone(&stock);
            tokio::spawn(async move { stock.availability(event(id)).await.is_ok() })
        })
        .collect();
    for answer in asking {
        assert!(answer.await.expect("no panic"));
    }
    assert_eq!((source.asked(), source.open_max.load(Ordering::SeqCst)), (500, 16));
}
