//! What a lock costs Redis: the same time with ten active locks and with a hundred thousand, a bounded number of bytes,
//! and nothing at all when everything has ended.

use std::sync::Arc;
use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::{ClientLike, KeysInterface, LuaInterface};
use fred::types::{ClusterHash, CustomCommand, InfoKind};
use futures_util::future::join_all;
use seatlock::domain::{LockOutcome, LockRequest, OrderResult, ReplicaId, ReplicaReport, SessionId};
use seatlock::ledger::Ledger;

use crate::support::ledger::{Stepped, event, live, order_id, report, request, stock};
use crate::support::redis::RedisServer;
use crate::support::say;

const FEW: u64 = 10;
const MANY: u64 = 100_000;

/// Bytes of Redis for each active lock of a user who has no other, with everything that makes it findable. Where they
/// go is in `lua/README.md`.
const BYTES_MAX: u64 = 700;

async fn info(client: &Client, kind: InfoKind, field: &str) -> String {
    let told: String = client.info(Some(kind)).await.expect("INFO answers");
    let line = told.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap_or_default();
    line.to_owned()
}

/// Locks one ticket for each of these users.
async fn lock(ledger: &Arc<dyn Ledger>, users: impl Iterator<Item = u64>) {
    let users: Vec<u64> = users.collect();
    for portion in users.chunks(100) {
        let asked = portion.iter().map(|&user| {
            let wanted = LockRequest {
                session: Some(SessionId::generate()),
                generation: 1_800_000_000_000_000,
                ttl: Duration::from_hours(1),
                ..request(event(1), 1, user, 1)
            };
            async move { ledger.lock(&wanted).await.expect("an answer") }
        });
        for answer in join_all(asked).await {
            assert!(matches!(answer, LockOutcome::Granted(_)), "{answer:?}");
        }
    }
}

/// Microseconds of Redis that one lock took, in the best of a few rounds: whoever else has the processor is not the cost.
async fn microseconds(client: &Client, ledger: &Arc<dyn Ledger>, first: u64) -> f64 {
    let mut best = f64::INFINITY;
    for round in 0..8 {
        let reset = CustomCommand::new_static("CONFIG", ClusterHash::Random, false);
        let _: () = client.custom(reset, vec!["RESETSTAT"]).await.expect("CONFIG RESETSTAT answers");
        lock(ledger, first + round * 100..first + (round + 1) * 100).await;
        let told = info(client, InfoKind::CommandStats, "cmdstat_evalsha").await;
        let total = told.split(',').find_map(|part| part.strip_prefix("usec=")).expect("scripts ran");
        best = best.min(total.parse::<f64>().expect("a number") / 100.0);
    }
    best
}

/// See the module.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_costs_the_same_among_many_and_few_bytes() {
    let server = RedisServer::start().await;
    let (ledger, client) = (live(&server, Duration::from_secs(20), 0), server.client().await);
    stock(ledger.as_ref(), event(1), &[(1, 2 * MANY, 2 * MANY)]).await;
    lock(&ledger, 1..=FEW).await;
    let few = microseconds(&client, &ledger, 1_000_000).await;

    let used = async || info(&client, InfoKind::Memory, "used_memory").await.parse::<u64>().expect("a number");
    // Whoever locks is connected, and has a hash of their own with their session in it.
    let here = "for user = ARGV[1], ARGV[2] do
        local key = 'seatlock:{u:' .. string.format('%.0f', user) .. '}'
        redis.call('HSET', key, string.rep('5', 32), string.rep('7', 32) .. ' 1800000000000000', '#', '1800000000000000')
        redis.call('PEXPIRE', key, 604800000)
    end";
    let users = vec![10_000.to_string(), (9_999 + MANY).to_string()];
    let _: () = client.eval(here, Vec::<String>::new(), users).await.expect("EVAL answers");
    let before = used().await;
    lock(&ledger, 10_000..10_000 + MANY).await;
    let bytes = (used().await - before) / MANY;
    let many = microseconds(&client, &ledger, 2_000_000).await;
    say(&format!("a lock takes {few:.0} us among {FEW}, {many:.0} us among {MANY}, and {bytes} bytes"));
    assert!(many < 2.0 * few, "{few:.0} us among {FEW}, {many:.0} us among {MANY}");
    assert!(bytes <= BYTES_MAX, "{bytes} bytes");
}

/// When all that was ever done has ended and its lifetimes have passed, Redis is empty again.
#[tokio::test]
async fn nothing_is_left_when_everything_has_ended() {
    let on = Stepped::redis().await;
    let session = SessionId::generate();
    on.ledger.enter(crate::support::ledger::user(1), session).await.unwrap();
    on.stock(event(1), &[(1, 9, 9), (2, 9, 9)]).await;
    let confirmed = on.grant(event(1), 1, 1, 2).await;
    on.ledger.confirm(confirmed, None, Some(&order_id("A"))).await.unwrap();
    on.ledger.order(&report(event(1), "A", 1, 1, 3, OrderResult::Completed)).await.unwrap();
    let unreported = on.grant(event(1), 2, 1, 2).await;
    on.ledger.confirm(unreported, None, None).await.unwrap();
    on.grant(event(1), 1, 2, 1).await;
    let wanted = LockRequest { request: Some("try".parse().unwrap()), ..request(event(2), 1, 2, 1) };
    on.stock(event(2), &[(1, 9, 9)]).await;
    on.ledger.lock(&wanted).await.unwrap();
    on.step(Duration::from_millis(1)).await;
    on.ledger.leave(crate::support::ledger::user(1), session, Duration::from_secs(15)).await.unwrap();
    let told = ReplicaReport { replica: ReplicaId::generate(), users: 1, sockets: 1 };
    on.ledger.beat(&told).await.unwrap();
    on.step(Duration::from_mins(6)).await;
    assert_eq!(on.ledger.sweep().await.unwrap().expired, 2);

    // A minute after the last touch the sweep forgets the events; a day later Redis has forgotten the rest.
    on.step(Duration::from_mins(11)).await;
    for _ in 0..3 {
        on.ledger.sweep().await.unwrap();
        on.step(Duration::from_secs(5)).await;
    }
    on.step(Duration::from_hours(26)).await;
    let keys = async || {
        let command = CustomCommand::new_static("KEYS", ClusterHash::Random, false);
        let keys: Vec<String> = on.client().custom(command, vec!["seatlock:*"]).await.expect("KEYS answers");
        keys
    };
    for key in keys().await {
        let left: i64 = on.client().pttl(&key).await.expect("PTTL answers");
        assert!(left > 0 || key.starts_with("seatlock:{fleet}:"), "{key} lives for ever ({left})");
        assert!(left <= 26 * 3_600_000, "{key} lives for {left} ms");
        if left > 0 {
            // The clock of the scripts was stepped, that of Redis was not: what would have gone by now.
            let _: () = on.client().del(&key).await.expect("DEL answers");
        }
    }
    for _ in 0..3 {
        on.ledger.sweep().await.unwrap();
        on.step(Duration::from_secs(6)).await;
    }
    // Whoever is left looks after a replica that has said goodbye; the epoch outlives all of them by a day.
    on.ledger.farewell(told.replica).await.unwrap();
    on.ledger.reap(Duration::from_secs(15)).await.unwrap();
    assert_eq!(keys().await, ["seatlock:{fleet}:epoch"]);
    let left: i64 = on.client().pttl("seatlock:{fleet}:epoch").await.expect("PTTL answers");
    assert!(left > 0 && left <= 26 * 3_600_000, "it lives for {left} ms");
}
