//! Ten thousand frames that no client of ours would send.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::time::timeout;
use tungstenite::Message;

use super::House;
use crate::support::gateway::{Raw, SECRET};
use crate::support::node::until;

/// Frames that are well formed and whose contents are random, and frames that are random bytes.
const REQUESTS: usize = 8_000;
const BROKEN: usize = 2_000;

/// Requests in flight at once: below what may wait for one socket.
const AT_ONCE: usize = 50;

/// Codes of the contract that a request can be refused with here.
const CODES: &[&str] = &[
    "unauthorized",
    "invalid_request",
    "event_not_found",
    "event_closed",
    "category_not_found",
    "insufficient_tickets",
    "sold_out",
    "already_locked",
    "limit_exceeded",
    "rate_limited",
    "lock_not_found",
];

/// Numbers that look like chance and are the same in every run.
struct Dice(fastrand::Rng);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0.usize(..end)
    }

    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }

    fn value(&mut self, depth: usize) -> Value {
        match self.below(if depth > 3 { 7 } else { 9 }) {
            0 => Value::Null,
            1 => json!(self.below(2) == 0),
            2 => json!(self.below(4)),
            3 => self.of(&[json!(-1), json!(1.5), json!(1e300), json!(9_007_199_254_740_992_u64), json!(u64::MAX)]),
            4 => json!("x".repeat(self.below(300))),
            5 => self.of(&[json!("7"), json!("\u{0}\u{202e}\n"), json!("🎫"), json!("r-1"), json!("__proto__")]),
            6 => json!("00000000-0001-8000-8000-000000000001"),
            7 => (0..self.below(4)).map(|_| self.value(depth + 1)).collect(),
            _ => Value::Object((0..self.below(4)).map(|_| (self.key(), self.value(depth + 1))).collect()),
        }
    }

    fn key(&mut self) -> String {
        self.of(&["eventId", "categoryId", "quantity", "userId", "lockId", "requestId", "token", "", "__proto__"])
            .to_owned()
    }

    fn request(&mut self, id: usize) -> String {
        let names = [
            "join-event-room",
            "leave-event-room",
            "lock-tickets",
            "unlock-tickets",
            "get-my-locks",
            "heartbeat",
            "refresh-token",
            "connected",
            "lock-tickets-response",
            "",
            "🎫",
        ];
        let mut data = serde_json::Map::new();
        for field in ["eventId", "categoryId", "quantity"] {
            if self.below(4) > 0 {
                data.insert(field.to_owned(), json!(self.below(4)));
            }
        }
        for _ in 0..self.below(4) {
            data.insert(self.key(), self.value(0));
        }
        let mut message = vec![json!(self.of(&names))];
        match self.below(8) {
            0 => {}
            1 => message.push(self.value(0)),
            2 => message.extend([Value::Object(data), self.value(0), self.value(0)]),
            _ => message.push(Value::Object(data)),
        }
        format!("42/realtime,{id}{}", Value::from(message))
    }

    /// A frame that is no packet, or one that only looks like one.
    fn broken(&mut self) -> Message {
        let bytes: Vec<u8> = (0..self.below(200)).map(|_| u8::try_from(self.below(256)).expect("a byte")).collect();
        let noise = String::from_utf8_lossy(&bytes).into_owned();
        match self.below(8) {
            0 => Message::binary(bytes),
            1 => Message::text(noise),
            2 => Message::text(format!("4{noise}")),
            3 => Message::text(format!("42/realtime,{noise}")),
            4 => {
                let whole = self.request(1);
                let cut = (0..=self.below(whole.len())).rev().find(|at| whole.is_char_boundary(*at)).unwrap_or(0);
                Message::text(whole[..cut].to_owned())
            }
            5 => Message::text(format!("42/realtime,[\"heartbeat\",{}", "[".repeat(self.below(20_000)))),
            6 => {
                Message::text(self.of(&["1", "3probe", "6", "40", "41", "44/realtime,{}", "43/realtime,1[]", "451-[]"]))
            }
            _ => Message::text(format!("4{}/realtime,{}", self.below(10), self.value(0))),
        }
    }
}

/// Sends requests with acknowledgements and checks that each is answered once, with an answer of the contract.
async fn asked(raw: &mut Raw, requests: &[String], first: usize) {
    for request in requests {
        raw.socket.send(Message::text(request.clone())).await.expect("an open connection");
    }
    let mut answered = vec![0; requests.len()];
    while answered.contains(&0) {
        let message = timeout(Duration::from_secs(10), raw.socket.next()).await.expect("an answer in time");
        let Some(Ok(message)) = message else {
            let left = answered.iter().position(|count| *count == 0).unwrap_or_default();
            panic!("the connection ended at {}", requests[left]);
        };
        let text = message.to_text().expect("a text");
        if text == "2" {
            raw.socket.send(Message::text("3")).await.expect("an open connection");
        }
        let Some(ack) = text.strip_prefix("43/realtime,") else { continue };
        let array = ack.find('[').expect("an array");
        let id = ack[..array].parse::<usize>().expect("an id") - first;
        let answer = &serde_json::from_str::<Value>(&ack[array..]).expect("JSON")[0];
        if let Some(code) = answer["code"].as_str() {
            assert!(CODES.contains(&code), "{} -> {answer}", requests[id]);
            assert!(answer["message"].as_str().is_some_and(|message| message.len() < 500), "{answer}");
        } else {
            let is_success = answer["success"] == true || answer["timestamp"].is_string() || answer["locks"].is_array();
            assert!(is_success, "{} -> {answer}", requests[id]);
        }
        answered[id] += 1;
    }
    assert!(answered.iter().all(|count| *count == 1), "each once: {answered:?}");
}

/// Each well-formed request, whatever is in it, is answered once and as documented. A broken frame is ignored or ends its
/// connection, and never anything else. Afterwards nothing is left: no socket, no task, no memory, no lock.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_random_frames() {
    let house = House::start(&[
        ("SEATLOCK_USER_HANDSHAKES", "off"),
        ("SEATLOCK_USER_MESSAGES", "off"),
        ("SEATLOCK_DISCONNECT_GRACE", "0s"),
    ]);
    let mut witness = Raw::greeted(house.address, 9).await;
    let mut dice = Dice(fastrand::Rng::with_seed(0x5eed));
    let mut raw = Raw::greeted(house.address, 7).await;
    let mut before = None;
    for round in 0..REQUESTS / AT_ONCE {
        let first = round * AT_ONCE;
        let requests: Vec<_> = (first..first + AT_ONCE).map(|id| dice.request(id)).collect();
        asked(&mut raw, &requests, first).await;
        assert!(witness.ask("heartbeat", &json!({})).await["timestamp"].is_string(), "nobody else is hurt");
        if round == 20 {
            before = Some(house.resident_kb());
        }
    }
    let mut closed = 0;
    for id in 0..BROKEN {
        if id % 50 == 0 {
            assert!(witness.ask("heartbeat", &json!({})).await["timestamp"].is_string(), "nobody else is hurt");
        }
        if raw.socket.send(dice.broken()).await.is_err() {
            closed += 1;
            raw = Raw::greeted(house.address, 7).await;
            continue;
        }
        // Either it is still served, or its connection ends. A frame can also leave the namespace, or ask for an end.
        let probe = format!("42/realtime,{id}[\"heartbeat\"]");
        let served = async {
            if raw.socket.send(Message::text(probe)).await.is_err() {
                return false;
            }
            while let Some(Ok(message)) = raw.socket.next().await {
                let text = message.to_text().unwrap_or_default();
                if text.starts_with(&format!("43/realtime,{id}[")) {
                    return true;
                }
            }
            false
        };
        if !timeout(Duration::from_millis(400), served).await.unwrap_or(false) {
            closed += 1;
            raw.socket.close(None).await.ok();
            raw = Raw::greeted(house.address, 7).await;
        }
    }
    // Nine of ten, and some more on a machine that lets an answer wait.
    assert!((BROKEN / 10..BROKEN * 49 / 50).contains(&closed), "{closed} of {BROKEN} ended their connection");
    drop(raw);
    until("only the witness is left", Duration::from_secs(30), async || {
        house.metric("seatlock_gateway_sockets").await == 1
    })
    .await;
    until("all tickets are back", Duration::from_secs(10), async || {
        let text = reqwest::get(format!("{}/stats", house.service.url)).await.expect("an answer").text().await;
        text.expect("a text").contains("\"activeLocks\":0")
    })
    .await;
    let (before, after) = (before.expect("measured"), house.resident_kb());
    assert!(after < before + 16 * 1024, "{before} KiB before, {after} KiB after");
    house.is_well(&[std::str::from_utf8(SECRET).expect("a text")]).await;
}
