//! From polling to a WebSocket: what waits for the client on one transport reaches it on the other.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::StreamBody;
use hyper::body::Frame;
use reqwest::{Body, Client, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use crate::support::gateway::{Browser, Got, PATIENCE, Raw, Replica, lock, options, replica, token};

/// A client that polls, by hand: between two polls what it is told waits.
struct Poller {
    client: Client,
    base: String,
    sid: String,
    /// What the transport said of itself.
    open: Value,
}

impl Poller {
    async fn open(replica: &Replica) -> Self {
        let base = format!("{}/socket.io/?EIO=4&transport=polling", replica.url());
        let client = Client::builder().timeout(PATIENCE).build().expect("a client");
        let opened = client.get(&base).send().await.expect("an answer").text().await.expect("a text");
        let open: Value = serde_json::from_str(opened.strip_prefix('0').expect("an open packet")).expect("JSON");
        let sid = open["sid"].as_str().expect("an id").to_owned();
        Self { client, base, sid, open }
    }

    /// In the namespace and greeted.
    async fn greeted(replica: &Replica, user: u64) -> Self {
        let poller = Self::open(replica).await;
        assert_eq!(poller.post(&format!("40/realtime,{}", json!({ "token": token(user) }))).await, StatusCode::OK);
        let start = Instant::now();
        while !poller.poll().await.iter().any(|text| text.starts_with("42/realtime,[\"connected\"")) {
            assert!(start.elapsed() < PATIENCE, "not greeted");
        }
        poller
    }

    fn url(&self) -> String {
        format!("{}&sid={}", self.base, self.sid)
    }

    async fn post(&self, body: &str) -> StatusCode {
        self.client.post(self.url()).body(body.to_owned()).send().await.expect("an answer").status()
    }

    /// The packets that wait, or the first that comes.
    async fn poll(&self) -> Vec<String> {
        let polled = self.client.get(self.url()).send().await.expect("an answer").text().await.expect("a text");
        polled.split('\u{1e}').map(str::to_owned).collect()
    }

    async fn upgrade(&self, replica: &Replica) -> Raw {
        let mut raw = Raw::probing(replica.address, &self.sid).await;
        raw.send("5").await;
        raw
    }
}

/// The category of an update.
fn category(text: &str) -> Option<u64> {
    let (name, data): (String, Value) = serde_json::from_str(text.strip_prefix("42/realtime,")?).ok()?;
    (name == "availability-update").then(|| data["categoryId"].as_u64())?
}

/// More waits for a poll than one carries, and the client upgrades after that poll: the answer that is next reaches it
/// all the same, as does all behind it.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_a_poll_is_not_lost_when_the_client_upgrades() {
    let replica = replica(options()).await;
    let poller = Poller::greeted(&replica, 1).await;
    // Each is answered with five hundred categories in one packet.
    for request in 0..2 {
        let join = json!(["join-event-room", { "eventId": 9 }]);
        assert_eq!(poller.post(&format!("42/realtime,{request}{join}")).await, StatusCode::OK);
    }
    // Long enough for everything to be there.
    sleep(Duration::from_millis(500)).await;
    let (mut answers, mut told) = (Vec::<u64>::new(), BTreeSet::new());
    while told.len() < 500 {
        for text in poller.poll().await {
            told.extend(category(&text));
            answers
                .extend(text.strip_prefix("43/realtime,").and_then(|rest| rest.split_once('[')?.0.parse::<u64>().ok()));
        }
    }
    let mut raw = poller.upgrade(&replica).await;
    for got in raw.within(Duration::from_millis(500)).await {
        if let Got::Ack(id, _) = got {
            answers.push(id);
        }
    }
    assert_eq!(answers, [0, 1]);
}

/// A client is told how much it may send in one request; what is longer ends its session with an answer, whether its
/// length is said first or not.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_may_send_in_one_request_is_said_and_kept_to() {
    const LEN_MAX: usize = 32 * 1024;
    let replica = replica(options()).await;
    for (len, chunked, expected) in [
        (LEN_MAX, false, StatusCode::OK),
        (LEN_MAX, true, StatusCode::OK),
        (LEN_MAX + 1, false, StatusCode::PAYLOAD_TOO_LARGE),
        (LEN_MAX + 1, true, StatusCode::PAYLOAD_TOO_LARGE),
    ] {
        let poller = Poller::greeted(&replica, 1).await;
        assert_eq!(poller.open["maxPayload"], LEN_MAX);
        let mut text = "42/realtime,[\"heartbeat\",\"".to_owned();
        text += &"x".repeat(len - text.len() - 2);
        text += "\"]";
        let body = if chunked {
            let parts = [text[..20_000].to_owned(), text[20_000..].to_owned()];
            let frames = parts.map(|part| Ok::<_, Infallible>(Frame::data(Bytes::from(part))));
            Body::wrap(StreamBody::new(futures_util::stream::iter(frames)))
        } else {
            Body::from(text)
        };
        let answer = poller.client.post(poller.url()).body(body).send().await.expect("an answer");
        assert_eq!(answer.status(), expected, "{len} {chunked}");
        let is_open = poller.post("42/realtime,[\"heartbeat\"]").await == StatusCode::OK;
        assert_eq!(is_open, expected == StatusCode::OK, "{len} {chunked}");
    }
}

/// What a client has asked by a poll, just before its upgraded connection is taken over, is answered, each question once
/// and in order, however the answers fall into that instant.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_question_before_an_upgrade_is_answered() {
    const ROUNDS: usize = 6;
    const CLIENTS: u64 = 24;
    const QUESTIONS: u64 = 60;
    let replica = Arc::new(replica(options()).await);
    let questions: Vec<_> =
        (0..QUESTIONS).map(|id| format!("42/realtime,{id}[\"join-event-room\",{{\"eventId\":1}}]")).collect();
    let questions: Arc<str> = questions.join("\u{1e}").into();
    for _ in 0..ROUNDS {
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS {
            let (replica, questions) = (Arc::clone(&replica), Arc::clone(&questions));
            clients.spawn(async move {
                let poller = Poller::greeted(&replica, client + 1).await;
                let mut raw = Raw::probing(replica.address, &poller.sid).await;
                assert_eq!(poller.post(&questions).await, StatusCode::OK);
                raw.send("5").await;
                let mut answered = 0;
                while answered < QUESTIONS {
                    match raw.next().await {
                        Got::Ack(id, _) if id == answered => answered += 1,
                        Got::Event(name, _) if name == "availability-update" => {}
                        other => panic!("{other:?} after {answered} answers"),
                    }
                }
                raw.leave().await;
            });
        }
        clients.join_all().await;
    }
}

/// A proxy that lets a WebSocket begin and then breaks it, or lets nothing through, costs the client nothing: its session
/// goes on by polling, and a later attempt is as good as the first.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_outlives_a_websocket_that_does_not_work() {
    let replica = replica(options()).await;
    let poller = Poller::greeted(&replica, 1).await;
    for broken in 0..4 {
        let mut raw = Raw::probing(replica.address, &poller.sid).await;
        match broken {
            // Cut; closed in form; a message that is out of place; no WebSocket frame.
            0 => drop(raw),
            1 => raw.leave().await,
            2 => {
                raw.send("42/realtime,7[\"heartbeat\"]").await;
                raw.closed().await;
            }
            _ => {
                raw.socket.get_mut().write_all(b"\xff\xff\xff\xff").await.expect("written");
                raw.closed().await;
            }
        }
        sleep(Duration::from_millis(200)).await;
        assert_eq!(poller.post(&format!("42/realtime,{broken}[\"heartbeat\"]")).await, StatusCode::OK, "{broken}");
        let answers = poller.poll().await;
        assert!(
            answers.iter().any(|text| text.starts_with(&format!("43/realtime,{broken}["))),
            "{broken}: {answers:?}"
        );
    }
    let mut raw = poller.upgrade(&replica).await;
    assert!(raw.ask("heartbeat", &json!({})).await["timestamp"].is_string());
}

/// A poll that waits while the client probes is ended, so that the client can come over; what it was to carry comes on the
/// WebSocket, and a poll that comes late is refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_poll_that_waits_is_ended_for_a_client_that_probes() {
    let replica = replica(options()).await;
    let poller = Arc::new(Poller::greeted(&replica, 1).await);
    let waits = || {
        let poller = Arc::clone(&poller);
        tokio::spawn(async move { poller.poll().await })
    };
    let first = waits();
    sleep(Duration::from_millis(50)).await;
    let mut raw = Raw::probing(replica.address, &poller.sid).await;
    let ended = async |poll: JoinHandle<Vec<String>>| {
        let mut packets = poll.await.expect("no panic");
        // A ping may be due.
        packets.retain(|text| text != "2");
        packets
    };
    let probed = Instant::now();
    let first = ended(first).await;
    assert!(first.is_empty() || first == ["6"], "{first:?}");
    assert!(probed.elapsed() < Duration::from_secs(2), "{:?}", probed.elapsed());
    // One that is still under way when the client says that it has come over carries nothing either.
    let second = waits();
    sleep(Duration::from_millis(20)).await;
    raw.send("5").await;
    assert_eq!(raw.ask("heartbeat", &json!({})).await["timestamp"].as_str().map(str::len), Some(24));
    assert_eq!(ended(second).await, ["6"]);
    assert_eq!(poller.post("42/realtime,[\"heartbeat\"]").await, StatusCode::BAD_REQUEST);
    assert_eq!(poller.client.get(poller.url()).send().await.expect("an answer").status(), StatusCode::BAD_REQUEST);
    assert!(raw.ask("heartbeat", &json!({})).await["timestamp"].is_string());
}

/// A client that goes away while its poll waits is gone at once, not when a ping of it is missed: so are its locks, after
/// the grace.
#[tokio::test(flavor = "multi_thread")]
async fn a_poll_that_breaks_off_is_the_end_of_its_session() {
    let replica = replica(options()).await;
    let poller = Poller::greeted(&replica, 1).await;
    replica.grant(1, 1, 1, 3).await;
    let mut watcher = replica.client(2).await;
    watcher.ask("join-event-room", &json!({ "eventId": 1 })).await;
    let start = Instant::now();
    // What waits is polled, and then nothing comes.
    while timeout(Duration::from_millis(300), poller.poll()).await.is_ok() {}
    watcher.expect("tickets-released-by-other-user").await;
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert_eq!(replica.gateway.counts().1, 1, "the watcher");
}

/// What a proxy does to a WebSocket.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Proxy {
    /// It lets one begin, and ends it.
    Breaks,
    /// It lets one begin, and nothing through.
    Swallows,
}

impl Proxy {
    /// Its address, and what says each time that a WebSocket is over.
    async fn before(self, server: SocketAddr) -> (SocketAddr, mpsc::UnboundedReceiver<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (over, ends) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let over = over.clone();
                tokio::spawn(async move {
                    if self.pass(client, server).await {
                        // The test may have seen enough.
                        over.send(()).ok();
                    }
                });
            }
        });
        (address, ends)
    }

    /// One connection: requests and their answers, until one is answered with a WebSocket; whether one was.
    async fn pass(self, mut client: TcpStream, server: SocketAddr) -> bool {
        let mut server = TcpStream::connect(server).await.expect("it listens");
        let (mut up, mut down) = ([0; 4096], [0; 4096]);
        loop {
            tokio::select! {
                read = client.read(&mut up) => match read {
                    Ok(len) if len > 0 => server.write_all(&up[..len]).await.expect("written"),
                    _ => return false,
                },
                read = server.read(&mut down) => match read {
                    Ok(len) if len > 0 => {
                        client.write_all(&down[..len]).await.expect("written");
                        if down.starts_with(b"HTTP/1.1 101") {
                            break;
                        }
                    }
                    _ => return false,
                },
            }
        }
        if self == Self::Swallows {
            // Until one of both has enough of it.
            let [mut up, mut down] = [tokio::io::sink(), tokio::io::sink()];
            tokio::select! {
                _ = tokio::io::copy(&mut client, &mut up) => {}
                _ = tokio::io::copy(&mut server, &mut down) => {}
            }
        }
        true
    }
}

/// The real client, as it is by default, keeps its session and its socket behind proxies that break each WebSocket.
#[tokio::test(flavor = "multi_thread")]
async fn the_real_client_stays_with_polling_behind_a_proxy_that_breaks_websockets() {
    let replica = replica(options()).await;
    let seen = async |proxy: Proxy, user: u64| {
        let (address, mut ends) = proxy.before(replica.address).await;
        let options = json!({ "auth": { "token": token(user) } });
        let mut browser = Browser::open_at(&format!("http://{address}"), &options).await;
        browser.event("connected").await;
        // The service gives a WebSocket up over which nothing comes.
        timeout(PATIENCE * 2, ends.recv()).await.expect("in time").expect("one was tried");
        assert_eq!(browser.transport().await, "polling", "{proxy:?}");
        let granted = browser.ask("lock-tickets", &lock(1, 2, 1)).await;
        assert_eq!(granted["success"], true, "{proxy:?}: {granted}");
        assert!(!browser.had("disconnect"), "{proxy:?}");
    };
    tokio::join!(seen(Proxy::Breaks, 1), seen(Proxy::Swallows, 2));
}
