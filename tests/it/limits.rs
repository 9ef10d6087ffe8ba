//! At each limit of the real process: a decided answer, and a metric that says so.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::json;
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};
use tungstenite::Message;

use crate::support::gateway::{Raw, SECRET, token};
use crate::support::node::Node;
use crate::support::process::Seatlock;

/// The event with the many categories.
const MANY: u64 = 41;

/// The real process on a Redis of its own, with forty events, and one that has five hundred categories.
struct House {
    service: Seatlock,
    address: SocketAddr,
    redis: Node,
    _folder: TempDir,
}

impl House {
    async fn start() -> Self {
        let redis = Node::server(&[]).await;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let catalogue = folder.path().join("events.json");
        let mut events: Vec<_> =
            (1..=40).map(|id| json!({"id": id, "ticketCategories": [{"id": 1, "availableSeats": 100}]})).collect();
        let many: Vec<_> = (1..=500).map(|id| json!({"id": id, "availableSeats": 100})).collect();
        events.push(json!({"id": MANY, "ticketCategories": many}));
        std::fs::write(&catalogue, json!(events).to_string()).expect("our folder");
        let service = Seatlock::start(
            &[],
            &[
                ("SEATLOCK_JWT_SECRET", std::str::from_utf8(SECRET).expect("a text")),
                ("SEATLOCK_REDIS_URL", &format!("redis://127.0.0.1:{}", redis.port)),
                ("SEATLOCK_EVENTS_URL", &format!("file:{}", catalogue.display())),
                ("SEATLOCK_SLOW_CLIENT", "5s"),
            ],
        );
        let address = service.url.trim_start_matches("http://").parse().expect("an address");
        Self { service, address, redis, _folder: folder }
    }

    /// A counter with its labels, 0 when it is not there yet.
    async fn counter(&self, line: &str) -> u64 {
        let text = reqwest::get(format!("{}/metrics", self.service.url)).await.expect("an answer").text().await;
        let text = text.expect("a text");
        let value = text.lines().find_map(|found| found.strip_prefix(line)).map_or("0", str::trim);
        value.parse().expect("a number")
    }
}

/// A user has fifty sockets and no more, a socket thirty-two rooms and no more; others are not concerned.
#[tokio::test(flavor = "multi_thread")]
async fn sockets_of_a_user_and_rooms_of_a_socket() {
    let house = House::start().await;
    let mut sockets = Vec::new();
    for _ in 0..50 {
        sockets.push(Raw::greeted(house.address, 7).await);
    }
    let mut surplus = Raw::open(house.address, "", None).await.expect("a WebSocket");
    assert_eq!(surplus.refusal(&json!({ "token": token(7) })).await, "too_many_connections");
    let refused = "seatlock_gateway_handshakes_refused_total{reason=\"too_many_connections\"}";
    assert_eq!(house.counter(refused).await, 1);
    Raw::greeted(house.address, 8).await.leave().await;

    let socket = &mut sockets[0];
    for event in 1..=40 {
        let answer = socket.ask("join-event-room", &json!({ "eventId": event })).await;
        let expected = if event <= 32 { json!(null) } else { json!("limit_exceeded") };
        assert_eq!(answer["code"], expected, "{event}: {answer}");
    }
    let answered = "seatlock_gateway_answers_total{name=\"join-event-room\",outcome=\"limit_exceeded\"}";
    assert_eq!(house.counter(answered).await, 8);
}

/// A client that goes on asking although its messages are refused is answered a thousand times and then closed; a neighbour
/// is served meanwhile, and the client may come again.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_is_limited_answered_and_closed() {
    let house = House::start().await;
    let mut neighbour = Raw::greeted(house.address, 8).await;
    let client = Raw::greeted(house.address, 7).await;
    // The first question waits for a ledger that hangs, and the rest behind it.
    house.redis.signal("STOP");
    let (mut sink, mut stream) = client.socket.split();
    let flood = tokio::spawn(async move {
        sink.feed(Message::text("42/realtime,0[\"get-my-locks\"]")).await.ok();
        for id in 1.. {
            if sink.send(Message::text(format!("42/realtime,{id}[\"heartbeat\"]"))).await.is_err() {
                return id;
            }
        }
        0
    });
    let mut refused = 0;
    let ended = async {
        while let Some(Ok(message)) = stream.next().await {
            let text = message.to_text().unwrap_or_default();
            refused += u64::from(text.contains("rate_limited"));
        }
    };
    timeout(Duration::from_mins(1), ended).await.expect("the flood is closed");
    let sent = timeout(Duration::from_mins(1), flood).await.expect("it cannot be sent any more").expect("no panic");
    // The last answers may be on their way when the connection ends.
    assert!((500..=1_100).contains(&refused), "{refused} of {sent} were refused");
    let beat = neighbour.ask("heartbeat", &json!({})).await;
    assert!(beat["timestamp"].is_string(), "{beat}");
    assert_eq!(house.counter("seatlock_gateway_ended_total{reason=\"flood\"}").await, 1);
    let answered = "seatlock_gateway_answers_total{name=\"heartbeat\",outcome=\"rate_limited\"}";
    assert!(house.counter(answered).await >= 1_024);
    house.redis.signal("CONT");
    Raw::greeted(house.address, 7).await.leave().await;
}

/// A client that asks for much and reads nothing is cut within the time set for it and a little; until then its process
/// holds a few megabytes for it at most: what its send buffer holds, and what of it is being written.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_costs_little_and_not_for_long() {
    let house = House::start().await;
    let rss = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", house.service.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number")
    };
    let ask = json!({ "eventId": MANY });
    let mut neighbour = Raw::greeted(house.address, 8).await;
    let mut client = Raw::greeted(house.address, 7).await;
    client.ask("join-event-room", &ask).await;
    neighbour.ask("join-event-room", &ask).await;
    let before = rss();
    let (mut sink, _unread) = client.socket.split();
    // Slowly enough that it is no flood.
    let asking = tokio::spawn(async move {
        let ask = format!("42/realtime,1{}", json!(["join-event-room", ask]));
        while sink.send(Message::text(ask.clone())).await.is_ok() {
            sleep(Duration::from_millis(25)).await;
        }
    });
    let began = Instant::now();
    let mut most = before;
    while !asking.is_finished() {
        assert!(began.elapsed() < Duration::from_secs(40), "it is never cut");
        let beat = neighbour.ask("heartbeat", &json!({})).await;
        assert!(beat["timestamp"].is_string(), "{beat}");
        most = most.max(rss());
        sleep(Duration::from_millis(50)).await;
    }
    crate::support::say(&format!(
        "a client that never reads: cut after {:.1} s, {} KiB for it at most",
        began.elapsed().as_secs_f64(),
        most - before
    ));
    assert!(most - before < 8 * 1024, "{before} KiB before, {most} KiB at most");
    // The client may learn of it first.
    let cut = async {
        for reason in ["ended_total{reason=\"slow\"}", "disconnects_total{reason=\"transport_error\"}"].iter().cycle() {
            if house.counter(&format!("seatlock_gateway_{reason}")).await > 0 {
                return;
            }
        }
    };
    timeout(Duration::from_secs(5), cut).await.expect("cut by its writer's patience or by the system's");
}
