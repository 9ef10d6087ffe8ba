//! Redis, RabbitMQ and the events-service, each replaced by something that sends what it never should.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::{Duration, Instant};

use fred::interfaces::HashesInterface;
use serde_json::{Value, json};

use super::House;
use crate::support::gateway::{Got, Raw, token};
use crate::support::node::until;
use crate::support::redis::RedisServer;

/// What one such neighbour sends on every connection, for ever or as long as it is let.
#[derive(Clone, Copy)]
struct Evil {
    what: &'static str,
    /// First.
    once: &'static [u8],
    /// Then, again and again, up to this many bytes.
    again: &'static [u8],
    bytes_max: usize,
}

const fn evil(what: &'static str, once: &'static [u8], again: &'static [u8], bytes_max: usize) -> Evil {
    Evil { what, once, again, bytes_max }
}

/// Far above what any limit lets in.
const HUGE: usize = 400 << 20;

/// What a process may grow by while it is sent this.
const GROWTH_KB_MAX: u64 = 96 * 1024;

fn start(evil: Evil) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    // Ends with the test's process.
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let mut reading = stream.try_clone().expect("a handle");
                thread::spawn(move || while reading.read(&mut [0; 4096]).is_ok_and(|read| read > 0) {});
                let mut stream = stream;
                let mut sent = evil.once.len();
                let block = evil.again.repeat(64 * 1024 / evil.again.len().max(1));
                let mut open = stream.write_all(evil.once).is_ok();
                while open && sent < evil.bytes_max && !block.is_empty() {
                    open = stream.write_all(&block).is_ok();
                    sent += block.len();
                }
                // Held open: whoever waits for more has to give up by itself.
                thread::sleep(Duration::from_mins(2));
            });
        }
    });
    address
}

/// Asks for tickets until the first answer, which must come in time, and watches the process's memory meanwhile.
async fn besieged(house: &House, evil: Evil) -> Value {
    let before = house.resident_kb();
    let mut raw = Raw::open(house.address, "", None).await.expect("a WebSocket");
    raw.send(&format!("40/realtime,{}", json!({ "token": token(7) }))).await;
    assert_eq!(raw.next().await, Got::Connected, "{}", evil.what);
    let began = Instant::now();
    let answer = raw.ask("lock-tickets", &json!({"eventId": 1, "categoryId": 1, "quantity": 1})).await;
    assert!(began.elapsed() < Duration::from_secs(4), "{}: {:?}", evil.what, began.elapsed());
    let mut most = 0;
    while began.elapsed() < Duration::from_secs(4) {
        most = most.max(house.resident_kb());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    crate::support::say(&format!("{}: {} KiB more at most", evil.what, most.saturating_sub(before)));
    assert!(most < before + GROWTH_KB_MAX, "{}: {before} KiB before, {most} KiB at most", evil.what);
    house.is_well(&[]).await;
    answer
}

/// Of which each is read to its end before it turns out to be none.
fn long_message() -> &'static [u8] {
    let text = "0|".repeat(16 * 1024);
    let message = format!(">3\r\n$7\r\nmessage\r\n$16\r\nseatlock:expired\r\n${}\r\n{text}\r\n", text.len());
    message.into_bytes().leak()
}

/// What answers in place of Redis is never believed: requests are `unavailable` in time.
#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_talks_nonsense() {
    for evil in [
        evil("Redis: noise", b"\x00\xff\x01garbage\r\n\r\n", b"\xfe\xff\x80\x00\r\n", 1 << 20),
        evil("Redis: yes to everything", b"", b"+OK\r\n", 1 << 20),
        evil("Redis: errors", b"", b"-ERR no\r\n", 1 << 20),
        evil("Redis: a length that is none", b"", b"$-7\r\n*x\r\n", 1 << 20),
        evil("Redis: lists in lists", b"", b"*1\r\n", HUGE),
        evil("Redis: lists in lists, once greeted", b"%1\r\n+server\r\n+redis\r\n", b"*1\r\n", HUGE),
        evil("Redis: a list without end", b"%1\r\n+server\r\n+redis\r\n*2147483647\r\n", b":1\r\n", HUGE),
        evil("Redis: a map without end", b"%4611686018427387904\r\n", b":1\r\n", HUGE),
        evil("Redis: a text without end", b"%1\r\n+server\r\n+redis\r\n$9223372036854775807\r\n", b"xxxx", HUGE),
        evil("Redis: a text as long as it may be", b"$16777216\r\n", b"xxxxxxxxxxxxxxxx", HUGE),
        evil("Redis: a line without end", b"%1\r\n+server\r\n+redis\r\n+", b"xxxxxxxxxxxxxxxx", HUGE),
        evil("Redis: lists of lists", b"*499999\r\n", b"*0\r\n", HUGE),
        evil(
            "Redis: messages that nobody asked for",
            b"%1\r\n+server\r\n+redis\r\n",
            b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nt\r\n",
            HUGE,
        ),
        evil("Redis: answers that nobody asked for", b"%1\r\n+server\r\n+redis\r\n", b"*2\r\n$2\r\nok\r\n:1\r\n", HUGE),
        // Two lines to who ends them at a line feed, one to who does not; behind it a list that only the latter sees.
        evil(
            "Redis: a line that is two",
            b"%1\r\n+server\r\n+redis\r\n+a\n$11\r\n*2147483647\r\n",
            b"$5\r\nxxxxx\r\n",
            HUGE,
        ),
        evil("Redis: an error shorter than nothing", b"%1\r\n+server\r\n+redis\r\n!-1\r\n", b"$5\r\nxxxxx\r\n", HUGE),
        evil("Redis: long messages", b"%1\r\n+server\r\n+redis\r\n", long_message(), HUGE),
    ] {
        let address = start(evil);
        let house = House::start(&[("SEATLOCK_REDIS_URL", &format!("redis://{address}"))]);
        let answer = besieged(&house, evil).await;
        assert_eq!(answer["code"], "unavailable", "{}: {answer}", evil.what);
    }
}

/// What answers in place of RabbitMQ stops nobody from buying.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_talks_nonsense() {
    for evil in [
        evil("RabbitMQ: noise", b"\x00\xff\x01garbage\r\n\r\n", b"\xfe\xff\x80\x00\r\n", 1 << 20),
        evil("RabbitMQ: another protocol", b"AMQP\x00\x01\x00\x00", b"", 0),
        evil("RabbitMQ: a frame without end", b"\x01\x00\x00\x7f\xff\xff\xff", b"xxxxxxxxxxxxxxxx", HUGE),
        evil("RabbitMQ: heartbeats only", b"", b"\x08\x00\x00\x00\x00\x00\x00\xce", 1 << 20),
    ] {
        let address = start(evil);
        let house = House::start(&[("SEATLOCK_AMQP_URL", &format!("amqp://guest:guest@{address}"))]);
        let answer = besieged(&house, evil).await;
        assert_eq!(answer["success"], true, "{}: {answer}", evil.what);
    }
}

/// What answers in place of the events-service brings no stock, and the refusal says that it is the stock that is missing.
#[tokio::test(flavor = "multi_thread")]
async fn an_events_service_that_talks_nonsense() {
    for evil in [
        evil("events: noise", b"", b"\xfe\xff\x80\x00\r\n", 1 << 20),
        evil("events: a length without end", b"", b"9999999999999999", 1 << 20),
        evil("events: a text without end", b"4194304#\"", b"xxxxxxxxxxxxxxxx", HUGE),
        evil("events: answers to nobody", b"", b"36#{\"response\":[],\"isDisposed\":true,\"a", 1 << 20),
        evil("events: empty lists", b"", b"2#[]", HUGE),
    ] {
        let address = start(evil);
        let house = House::asking(&format!("tcp://{address}"));
        let answer = besieged(&house, evil).await;
        assert_eq!(answer["code"], "inventory_unavailable", "{}: {answer}", evil.what);
    }
}

/// Redis does not answer for longer than a session that ends tries to say so: it is said when Redis does, and locks that the
/// same user makes later are given back after the grace.
#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_away_for_long_hears_of_who_left() {
    let redis = RedisServer::start().await;
    let client = redis.client().await;
    let house = House::start(&[
        ("SEATLOCK_REDIS_URL", redis.url().as_str()),
        ("SEATLOCK_REQUEST_TIMEOUT", "500ms"),
        ("SEATLOCK_DISCONNECT_GRACE", "1s"),
    ]);
    let tab = Raw::greeted(house.address, 7).await;
    let sessions = async || {
        let fields: Vec<String> = client.hkeys("seatlock:{u:7}").await.expect("HKEYS answers");
        fields.iter().filter(|field| *field != "#" && !field.starts_with("e:")).count()
    };
    redis.signal("STOP");
    drop(tab);
    tokio::time::sleep(Duration::from_secs(17)).await;
    redis.signal("CONT");
    let mut back = Raw::greeted(house.address, 7).await;
    let wanted = json!({"eventId": 1, "categoryId": 1, "quantity": 1});
    until("Redis is back", Duration::from_secs(10), async || {
        back.ask("lock-tickets", &wanted).await["success"] == true
    })
    .await;
    until("only the new session stands there", Duration::from_secs(20), async || sessions().await == 1).await;
    drop(back);
    let mut other = Raw::greeted(house.address, 8).await;
    let all = json!({"eventId": 1, "categoryId": 1, "quantity": 10});
    until("the lock is given back", Duration::from_secs(10), async || {
        other.ask("join-event-room", &json!({ "eventId": 1 })).await["availability"][0]["lockedTickets"] == 0
    })
    .await;
    assert_eq!(other.ask("lock-tickets", &all).await["success"], true);
}
