//! Oversized, deep, truncated and unreadable input on the port that the world can reach.

use std::net::SocketAddr;
use std::time::Duration;

use reqwest::{Client, StatusCode, header};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::House;
use crate::support::gateway::{Raw, token};

/// What comes back for these bytes until the connection ends or nothing comes for a while.
async fn raw_http(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    // The answer may come, and the connection end, before everything is sent.
    stream.write_all(bytes).await.ok();
    let mut answer = vec![0; 64 * 1024];
    let mut len = 0;
    while let Ok(Ok(read)) = timeout(Duration::from_millis(500), stream.read(&mut answer[len..])).await {
        len += read;
        if read == 0 || len == answer.len() {
            break;
        }
    }
    String::from_utf8_lossy(&answer[..len]).into_owned()
}

/// Requests that are no HTTP, or too much of it, get a 4xx or a closed connection, on the operators' port too; the process goes
/// on.
#[tokio::test(flavor = "multi_thread")]
async fn http_that_is_none() {
    let house = House::start(&[]);
    http_is_refused(house.address).await;
    house.is_well(&["passwd"]).await;

    let mut house = House::start(&[("SEATLOCK_ADMIN_LISTEN", "127.0.0.1:0")]);
    let admin = house.service.logged("serving admin")["listen"].as_str().and_then(|text| text.parse().ok());
    let admin = admin.expect("an address");
    http_is_refused(admin).await;
    let lives = raw_http(admin, b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert!(lives.starts_with("HTTP/1.1 200"), "{lives}");
    for line in house.service.log() {
        assert!(!line.contains("panicked") && !line.contains("passwd"), "{line}");
    }
}

async fn http_is_refused(address: SocketAddr) {
    let long = "x".repeat(100_000);
    let many = "x: y\r\n".repeat(500);
    for request in [
        "\r\n\r\n\r\n".to_owned(),
        "GET\r\n\r\n".to_owned(),
        "\u{0}\u{1}\u{2}\r\n\r\n".to_owned(),
        "GET / HTTP/9.9\r\n\r\n".to_owned(),
        format!("GET /{long} HTTP/1.1\r\nhost: a\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nhost: a\r\nx: {long}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nhost: a\r\n{many}\r\n"),
        "GET /events/%ff%fe/availability HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
        format!("GET /events/{}/availability HTTP/1.1\r\nhost: a\r\n\r\n", "9".repeat(4_000)),
        "GET /events/../../etc/passwd HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999\r\n\r\n".to_owned(),
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n".to_owned(),
        "GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\n\r\n".to_owned(),
        format!("GET /socket.io/?EIO=4&transport=polling&sid={} HTTP/1.1\r\nhost: a\r\n\r\n", "s".repeat(5_000)),
        "GET /socket.io/?EIO=4&transport=telepathy HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
    ] {
        let answer = raw_http(address, request.as_bytes()).await;
        let shown: String = request.chars().take(80).collect();
        let (status, rest) = answer.split_at(answer.len().min(12));
        assert!(answer.is_empty() || status.starts_with("HTTP/1.1 4"), "{shown:?} -> {status}{rest}");
    }
}

/// Bodies of polls that are too large, too deep, cut short, compressed or no UTF-8 are refused or end their session;
/// nothing is unpacked.
#[tokio::test(flavor = "multi_thread")]
async fn polls_that_no_client_sends() {
    let house = House::start(&[]);
    let client = Client::builder().timeout(Duration::from_secs(10)).build().expect("a client");
    let base = format!("{}/socket.io/?EIO=4&transport=polling", house.service.url);
    let before = house.resident_kb();
    let deep = format!("42/realtime,[\"lock-tickets\",{}", "[".repeat(30_000));
    let gzip = [0x1f_u8, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 0x33, 0x04, 0, 0xb7, 0xef, 0xdc, 0x83, 1, 0, 0, 0];
    for (what, body, encoding, expected) in [
        ("too large", vec![b'4'; 5_000_000], None, StatusCode::PAYLOAD_TOO_LARGE),
        ("no UTF-8", b"42/realtime,[\"\xff\xfe\"]".to_vec(), None, StatusCode::BAD_REQUEST),
        ("no packet", b"x".to_vec(), None, StatusCode::BAD_REQUEST),
        ("empty", Vec::new(), None, StatusCode::OK),
        ("compressed", gzip.to_vec(), Some("gzip"), StatusCode::BAD_REQUEST),
        ("deep", deep.into_bytes(), None, StatusCode::OK),
        ("many packets", "42/realtime,[\"heartbeat\"]\u{1e}".repeat(1_000).into_bytes(), None, StatusCode::OK),
    ] {
        let opened = client.get(&base).send().await.expect("an answer").text().await.expect("a text");
        let open: serde_json::Value = serde_json::from_str(&opened[1..]).expect("an open packet");
        let url = format!("{base}&sid={}", open["sid"].as_str().expect("an id"));
        let connect = format!("40/realtime,{}", json!({ "token": token(7) }));
        assert_eq!(client.post(&url).body(connect).send().await.expect("an answer").status(), StatusCode::OK);
        let mut post = client.post(&url).body(body);
        if let Some(encoding) = encoding {
            post = post.header(header::CONTENT_ENCODING, encoding);
        }
        // A body that is refused at its length may end the connection while it is still being sent.
        let status = post.send().await.map(|answer| answer.status());
        assert!(status.as_ref().map_or(what == "too large", |status| *status == expected), "{what}: {status:?}");
    }
    let mut buyer = Raw::greeted(house.address, 7).await;
    assert!(buyer.ask("heartbeat", &json!({})).await["timestamp"].is_string());
    let after = house.resident_kb();
    assert!(after < before + 32 * 1024, "{before} KiB before, {after} KiB after");
    house.is_well(&[]).await;
}

/// A client that offers to compress its WebSocket is not taken up on it: what it sends is as long as it looks.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_unpacked() {
    let house = House::start(&[]);
    let request = "GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                   sec-websocket-extensions: permessage-deflate; client_max_window_bits\r\naccept-encoding: gzip\r\n\r\n";
    let answer = raw_http(house.address, request.as_bytes()).await.to_lowercase();
    assert!(answer.starts_with("http/1.1 101"), "{answer}");
    assert!(!answer.contains("sec-websocket-extensions") && !answer.contains("content-encoding"), "{answer}");
}

/// A page of a foreign origin gets nothing: no poll, no WebSocket, no permission; our own and the listed ones do.
#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_page_gets_nothing() {
    let house = House::start(&[("SEATLOCK_CORS_ORIGINS", "https://shop.example")]);
    let own = house.service.url.clone();
    let client = Client::new();
    for (origin, admitted) in [
        ("https://shop.example", true),
        (own.as_str(), true),
        ("https://evil.example", false),
        ("https://shop.example.evil.example", false),
        ("http://shop.example", false),
        ("null", false),
        ("", false),
    ] {
        let socket = Raw::open(house.address, "", Some(origin)).await;
        assert_eq!(socket.is_ok(), admitted, "{origin}");
        let url = format!("{own}/socket.io/?EIO=4&transport=polling");
        for request in [client.get(&url), client.post(&url).body("40")] {
            let answer = request.header(header::ORIGIN, origin).send().await.expect("an answer");
            assert_eq!(answer.status() != StatusCode::FORBIDDEN, admitted, "{origin}");
            let allowed = answer.headers().get(header::ACCESS_CONTROL_ALLOW_ORIGIN);
            assert_eq!(allowed.is_some(), origin == "https://shop.example", "{origin}: {allowed:?}");
        }
    }
    let refused = house.metric("seatlock_gateway_handshakes_refused_total{reason=\"origin\"}").await;
    assert_eq!(refused, 15, "three requests of each of five foreign origins");
}
