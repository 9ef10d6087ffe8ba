//! What one address and one user may take of the real process, and that neither can pass for another.

use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::HeaderValue;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use tungstenite::Error;

use super::House;
use crate::support::gateway::{Got, Raw, token};
use crate::support::node::until;

/// The forwarded address of one client behind the proxy that these tests are.
const ONE: (&str, &str) = ("x-forwarded-for", "198.51.100.1");
const OTHER: (&str, &str) = ("x-forwarded-for", "198.51.100.2");
/// What a client writes into the header itself stands left of what the proxy appends.
const ONE_FORGING: (&str, &str) = ("x-forwarded-for", "198.51.100.2, 203.0.113.9, 198.51.100.1");

const PROXY: (&str, &str) = ("SEATLOCK_TRUSTED_PROXIES", "127.0.0.0/8, ::1");

fn status(refused: Result<Raw, Error>) -> Option<StatusCode> {
    match refused {
        Err(Error::Http(response)) => StatusCode::from_u16(response.status().as_u16()).ok(),
        Ok(_) | Err(_) => None,
    }
}

/// Transports are limited by the rate at which one address opens them, on both transports, with the time to wait; a forged
/// header changes nothing, and another address is not concerned.
#[tokio::test(flavor = "multi_thread")]
async fn handshakes_of_an_address() {
    let house = House::start(&[PROXY, ("SEATLOCK_ADDRESS_HANDSHAKES", "1/m burst 3")]);
    for headers in [ONE, ONE_FORGING, ONE] {
        Raw::open_with(house.address, "", &[headers]).await.expect("within the burst");
    }
    for headers in [ONE, ONE_FORGING] {
        let refused = Raw::open_with(house.address, "", &[headers]).await;
        assert_eq!(status(refused), Some(StatusCode::TOO_MANY_REQUESTS));
    }
    let url = format!("{}/socket.io/?EIO=4&transport=polling", house.service.url);
    let polling = reqwest::Client::new().get(&url).header(ONE.0, ONE.1).send().await.expect("an answer");
    assert_eq!(polling.status(), StatusCode::TOO_MANY_REQUESTS);
    let wait: u64 = polling.headers()["retry-after"].to_str().expect("a text").parse().expect("seconds");
    assert!((1..=60).contains(&wait), "{wait}");
    // A session id is one only as the transport reads it, and the client's bytes do not hide what the proxy wrote.
    for (query, client) in [("&%73id=x", &b"198.51.100.1"[..]), ("", b"\xff\xfe, 198.51.100.1")] {
        let forged = HeaderValue::from_bytes(client).expect("a header's bytes");
        let request = reqwest::Client::new().get(format!("{url}{query}")).header(ONE.0, forged);
        assert_eq!(request.send().await.expect("an answer").status(), StatusCode::TOO_MANY_REQUESTS, "{query}");
    }
    assert_eq!(house.limited("address_handshakes").await, 5);
    Raw::open_with(house.address, "", &[OTHER]).await.expect("another address");
}

/// Tokens tried on one transport count too: guessing is slowed down before a signature is looked at.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_an_address() {
    let house = House::start(&[PROXY, ("SEATLOCK_ADDRESS_HANDSHAKES", "1/m burst 3")]);
    let mut guessing = Raw::open_with(house.address, "", &[ONE]).await.expect("a WebSocket");
    for _ in 0..3 {
        assert_eq!(guessing.refusal(&json!({ "token": "a.b.c" })).await, "unauthorized");
    }
    assert_eq!(guessing.refusal(&json!({ "token": token(7) })).await, "too_many_connections");
    assert_eq!(house.limited("address_handshakes").await, 1);
    let mut other = Raw::open_with(house.address, "", &[OTHER]).await.expect("a WebSocket");
    other.connect(&json!({ "token": token(7) })).await;
}

/// An address has as many transports as it may, however many users and tokens it has; the next ones are told so, those far
/// beyond it are not let in, and one that leaves makes room.
#[tokio::test(flavor = "multi_thread")]
async fn connections_of_an_address() {
    let house = House::start(&[PROXY, ("SEATLOCK_ADDRESS_CONNECTIONS", "3")]);
    let open = async || Raw::open_with(house.address, "", &[ONE]).await;
    let mut within = Vec::new();
    for user in 1..=3 {
        let mut raw = open().await.expect("a WebSocket");
        raw.connect(&json!({ "token": token(user) })).await;
        within.push(raw);
    }
    let mut surplus = open().await.expect("a WebSocket, to be told");
    assert_eq!(surplus.refusal(&json!({ "token": token(9) })).await, "too_many_connections");
    let mut told = vec![surplus];
    let refused = loop {
        match open().await {
            Ok(raw) => told.push(raw),
            Err(error) => break error,
        }
        assert!(told.len() < 100, "no end of it");
    };
    assert_eq!(status(Err(refused)), Some(StatusCode::TOO_MANY_REQUESTS));
    assert_eq!(house.limited("address_connections").await, 2, "one told, one not let in");
    let mut other = Raw::open_with(house.address, "", &[OTHER]).await.expect("a WebSocket");
    other.connect(&json!({ "token": token(9) })).await;
    drop(told);
    within.pop().expect("one of three").leave().await;
    until("a place is free", Duration::from_secs(10), async || {
        // Until the last of those who were told is gone, nobody else is let in.
        let Ok(mut raw) = open().await else { return false };
        raw.send(&format!("40/realtime,{}", json!({ "token": token(3) }))).await;
        raw.next().await == Got::Connected
    })
    .await;
}

/// Connections that carry nothing count for who opened them, proxies excepted: one stranger cannot take all there are.
#[tokio::test(flavor = "multi_thread")]
async fn bare_connections_of_an_address() {
    let house = House::start(&[("SEATLOCK_ADDRESS_CONNECTIONS", "5")]);
    let mut held = Vec::new();
    let mut closed = 0;
    for _ in 0..9 {
        let mut stream = TcpStream::connect(house.address).await.expect("accepted by the system");
        let end = timeout(Duration::from_millis(300), stream.read(&mut [0; 1])).await;
        if end.is_ok() { closed += 1 } else { held.push(stream) }
    }
    assert_eq!((held.len(), closed), (5, 4));
    drop(held);
    until("there is room again", Duration::from_secs(10), async || {
        reqwest::get(format!("{}/livez", house.service.url)).await.is_ok_and(|answer| answer.status() == StatusCode::OK)
    })
    .await;
    assert_eq!(house.metric("seatlock_http_connections_total{outcome=\"crowded\"}").await, closed);
}

/// Messages beyond the rate of their address or their user are answered with the time to wait; who goes on is closed.
#[tokio::test(flavor = "multi_thread")]
async fn messages_of_an_address_and_of_a_user() {
    let house = House::start(&[
        PROXY,
        ("SEATLOCK_ADDRESS_MESSAGES", "1/m burst 10"),
        ("SEATLOCK_USER_MESSAGES", "1/m burst 4"),
    ]);
    let mut first = Raw::open_with(house.address, "", &[ONE]).await.expect("a WebSocket");
    first.connect(&json!({ "token": token(1) })).await;
    let mut second = Raw::open_with(house.address, "", &[OTHER]).await.expect("a WebSocket");
    second.connect(&json!({ "token": token(1) })).await;
    // Two sockets of one user on two addresses have one rate.
    for socket in [&mut first, &mut second] {
        for _ in 0..2 {
            assert!(socket.ask("heartbeat", &json!({})).await["timestamp"].is_string());
        }
    }
    for socket in [&mut first, &mut second] {
        let refused = socket.ask("lock-tickets", &json!({"eventId": 1, "categoryId": 1, "quantity": 1})).await;
        assert_eq!(refused["code"], "rate_limited", "{refused}");
        let wait = refused["retryAfterMs"].as_u64().expect("a time");
        assert!((1..=60_000).contains(&wait), "{refused}");
    }
    assert_eq!(house.limited("user_messages").await, 2);
    // Two of the first address's ten are used: other users of it have eight, questions over HTTP included.
    let mut answered = 0;
    for user in 2..=4 {
        let mut raw = Raw::open_with(house.address, "", &[ONE]).await.expect("a WebSocket");
        raw.connect(&json!({ "token": token(user) })).await;
        for _ in 0..2 {
            answered += u32::from(raw.ask("heartbeat", &json!({})).await["timestamp"].is_string());
        }
    }
    assert_eq!(answered, 6);
    let client = reqwest::Client::new();
    let mut statuses = Vec::new();
    for path in ["/stats", "/events/1/availability", "/", "/stats", "/livez"] {
        let asked = client.get(format!("{}{path}", house.service.url)).header(ONE.0, ONE.1);
        statuses.push(asked.send().await.expect("an answer").status().as_u16());
    }
    assert_eq!(statuses, [200, 200, 429, 429, 200], "probes are not limited");
    let mut flood = Raw::open_with(house.address, "", &[OTHER]).await.expect("a WebSocket");
    flood.connect(&json!({ "token": token(5) })).await;
    let began = Instant::now();
    let mut refused = 0_u32;
    loop {
        flood.emit("heartbeat", &json!({})).await;
        let got = flood.next().await;
        let Got::Event(_, answer) = got else {
            assert_eq!(got, Got::Closed);
            break;
        };
        refused += u32::from(answer["code"] == "rate_limited");
        assert!(began.elapsed() < Duration::from_mins(1), "{refused} refusals");
    }
    assert!((1_000..=1_100).contains(&refused), "{refused}");
    assert_eq!(house.metric("seatlock_gateway_ended_total{reason=\"flood\"}").await, 1);
}

/// A user may open only so many sockets in a time.
#[tokio::test(flavor = "multi_thread")]
async fn handshakes_of_a_user() {
    let house = House::start(&[("SEATLOCK_USER_HANDSHAKES", "1/m burst 2"), ("SEATLOCK_USER_CONNECTIONS", "1")]);
    Raw::greeted(house.address, 7).await.leave().await;
    until("its place is free", Duration::from_secs(10), async || house.metric("seatlock_gateway_sockets").await == 0)
        .await;
    let second = Raw::greeted(house.address, 7).await;
    let mut third = Raw::open(house.address, "", None).await.expect("a WebSocket");
    assert_eq!(third.refusal(&json!({ "token": token(7) })).await, "too_many_connections");
    assert_eq!(house.limited("user_handshakes").await, 1);
    let mut another = Raw::greeted(house.address, 8).await;
    assert!(another.ask("heartbeat", &json!({})).await["timestamp"].is_string());
    drop(second);
}

/// Transports that nobody presents a token on, or whose user has left the namespace, are closed in the time of a handshake;
/// so is a body that does not come.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_dawdles_is_closed() {
    let house = House::start(&[]);
    let began = Instant::now();
    let mut silent = Raw::open(house.address, "", None).await.expect("a WebSocket");
    let mut refused = Raw::open(house.address, "", None).await.expect("a WebSocket");
    assert_eq!(refused.refusal(&json!({})).await, "unauthorized");
    let mut left = Raw::greeted(house.address, 7).await;
    left.send("41/realtime,").await;
    let mut back = Raw::greeted(house.address, 8).await;
    back.send("41/realtime,").await;
    sleep(Duration::from_millis(100)).await;
    // Who changes its mind on the same connection is sent for a new one, as after any lost connection.
    back.send(&format!("40/realtime,{}", json!({ "token": token(8) }))).await;
    back.closed().await;
    assert!(began.elapsed() < Duration::from_secs(7), "at once");
    back = Raw::greeted(house.address, 8).await;
    let mut slow = TcpStream::connect(house.address).await.expect("a connection");
    let head = "POST /socket.io/?EIO=4&transport=polling&sid=none HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n1";
    slow.write_all(head.as_bytes()).await.expect("sent");
    for raw in [&mut silent, &mut refused, &mut left] {
        raw.closed().await;
    }
    let took = began.elapsed();
    assert!((Duration::from_secs(7)..Duration::from_secs(12)).contains(&took), "{took:?}");
    let mut answer = Vec::new();
    timeout(Duration::from_secs(15), slow.read_to_end(&mut answer)).await.expect("answered").ok();
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    assert!(back.ask("heartbeat", &json!({})).await["timestamp"].is_string(), "who came back stays");
}
