//! Sockets come, join and go, in every way in which sockets go, as fast as they can; then nothing of them is left in the
//! real process: no place, no room, no subscription, no task, and no memory beyond a tenth.
//!
//! `SEATLOCK_CHURN` says how many; without it 3,000. The long one:
//!
//! ```text
//! SEATLOCK_CHURN=100000 cargo test --release --test it churn -- --nocapture
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::support::gateway::{Raw, SECRET};
use crate::support::node::Node;
use crate::support::process::Seatlock;
use crate::support::say;

/// Sockets that are open at the same time.
const AT_ONCE: u64 = 40;

/// Before the first measurement: buffers, arenas and tables have the size that this load needs. It takes longer than the
/// eight seconds for which a transport without a namespace may stay, so that there are as many of those as there will be.
const WARM_UP: u64 = 6_000;

/// Far above what leaving takes, far below for ever.
const PATIENCE: Duration = Duration::from_secs(90);

/// What a process shows of itself.
#[derive(Debug, Clone, Copy)]
struct Footprint {
    sockets: f64,
    users: f64,
    watched: f64,
    listening: f64,
    tasks: f64,
    rss_kib: u64,
}

async fn footprint(service: &Seatlock) -> Footprint {
    let text = reqwest::get(format!("{}/metrics", service.url)).await.expect("an answer").text().await.expect("a text");
    let gauge = |name: &str| {
        let line = text.lines().find(|line| line.split(' ').next() == Some(name)).expect(name);
        line.split(' ').nth(1).expect("a value").parse::<f64>().expect("a number")
    };
    let status = std::fs::read_to_string(format!("/proc/{}/status", service.pid())).expect("it runs");
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
    Footprint {
        sockets: gauge("seatlock_gateway_sockets"),
        users: gauge("seatlock_gateway_users"),
        watched: gauge("seatlock_fanout_watched_events"),
        listening: gauge("seatlock_fanout_listening_users"),
        tasks: gauge("seatlock_app_tasks"),
        rss_kib: rss.trim().trim_end_matches(" kB").parse().expect("a number"),
    }
}

/// One socket's life. It goes as a page that is closed, as one that leaves the namespace first, as a connection that is
/// lost, without having joined, or without having been in the namespace.
async fn live(address: SocketAddr, number: u64) {
    let user = 1 + number % 997;
    if number % 10 == 9 {
        drop(Raw::open(address, "", None).await.expect("a WebSocket"));
        return;
    }
    let mut raw = Raw::greeted(address, user).await;
    if number % 5 != 4 {
        let joined = raw.ask("join-event-room", &json!({ "eventId": 1 + number % 3 })).await;
        // A Redis without a processor answers late; how quick the service is, is not the claim.
        assert!(joined["success"] == true || joined["code"] == "unavailable", "{joined}");
    }
    match number % 3 {
        0 => raw.leave().await,
        1 => raw.send("41/realtime,").await,
        _ => drop(raw),
    }
}

/// So many sockets, a few at a time.
async fn churn(address: SocketAddr, count: u64) {
    let next = Arc::new(AtomicU64::new(0));
    let workers = (0..AT_ONCE).map(|_| {
        let next = Arc::clone(&next);
        tokio::spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return;
                }
                live(address, number).await;
            }
        })
    });
    for worker in join_all(workers).await {
        worker.expect("every socket lives");
    }
}

/// What is left when everybody has gone.
async fn settled(service: &Seatlock, tasks_max: f64) -> Footprint {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = footprint(service).await;
        let is_empty = now.sockets + now.users + now.watched + now.listening == 0.0 && now.tasks > 0.0;
        if is_empty && now.tasks <= tasks_max {
            return now;
        }
        assert!(Instant::now() < end, "something is left: {now:?}, and at most {tasks_max} tasks");
        sleep(Duration::from_millis(200)).await;
    }
}

/// The claim of this module, on a real Redis.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_sockets_that_came_and_went() {
    let count = std::env::var("SEATLOCK_CHURN").map_or(3_000, |text| text.parse().expect("a number"));
    let redis = Node::server(&[]).await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let catalogue = folder.path().join("events.json");
    let events: Vec<_> =
        (1..=3).map(|id| json!({"id": id, "ticketCategories": [{"id": 1, "availableSeats": 100}]})).collect();
    std::fs::write(&catalogue, json!(events).to_string()).expect("our folder");
    let (redis_url, events_url) =
        (format!("redis://127.0.0.1:{}", redis.port), format!("file:{}", catalogue.display()));
    let service = Seatlock::start(
        &[],
        &[
            ("SEATLOCK_JWT_SECRET", std::str::from_utf8(SECRET).expect("a text")),
            ("SEATLOCK_REDIS_URL", &redis_url),
            ("SEATLOCK_EVENTS_URL", &events_url),
            ("SEATLOCK_LOG", "warn,seatlock::app=info"),
        ],
    );
    let address: SocketAddr = service.url.trim_start_matches("http://").parse().expect("an address");

    let idle = settled(&service, f64::MAX).await;
    // A few more or less: what the process does now and then by itself.
    let tasks_max = idle.tasks * 1.1 + 3.0;
    churn(address, WARM_UP).await;
    // Transports that never came to the namespace are given eight seconds.
    let before = settled(&service, tasks_max).await;
    let began = Instant::now();
    churn(address, count).await;
    let took = began.elapsed();
    let after = settled(&service, tasks_max).await;
    say(&format!(
        "churn: {count} sockets in {:.0} s; RSS {} KiB before, {} KiB after; tasks {} idle, {} after",
        took.as_secs_f64(),
        before.rss_kib,
        after.rss_kib,
        idle.tasks,
        after.tasks,
    ));
    assert!(after.rss_kib * 10 <= before.rss_kib * 11, "more memory than before: {before:?} and {after:?}");
    let keys = redis.ask(&["KEYS", "seatlock:{r:*"]).await;
    assert_eq!(keys, "", "the ledger knows users of sessions that are over");
}
