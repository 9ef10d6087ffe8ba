//! How locks end is counted once in the fleet, and the same by both ledgers.

use std::time::Duration;

use seatlock::domain::Releaser;
use seatlock::ledger::Ledger;
use seatlock::metrics;

use crate::support::ledger::{Stepped, TTL, event, user};

const ORDERS: Releaser = Releaser::Orders { user: None };

/// The value of a series, as text; "0" when there is none.
fn value(text: &str, series: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or("0").to_owned()
}

const SERIES: [&str; 10] = [
    r#"seatlock_ledger_ends_total{reason="confirmed"}"#,
    r#"seatlock_ledger_ends_total{reason="released"}"#,
    r#"seatlock_ledger_ends_total{reason="expired"}"#,
    r#"seatlock_ledger_ends_total{reason="abandoned"}"#,
    r#"seatlock_ledger_held_seconds_sum{reason="confirmed"}"#,
    r#"seatlock_ledger_held_seconds_sum{reason="released"}"#,
    r#"seatlock_ledger_held_seconds_sum{reason="expired"}"#,
    r#"seatlock_ledger_held_seconds_sum{reason="abandoned"}"#,
    "seatlock_ledger_expiry_lag_seconds_count",
    "seatlock_ledger_expiry_lag_seconds_sum",
];

/// Five locks: one is sold (and the sale undone), one given back, two run out, one of them of a user who has left, and one
/// goes on. Two replicas take turns, each asks twice, and both sweep.
async fn history(on: &Stepped, other: &dyn Ledger) {
    on.stock(event(1), &[(1, 10, 10)]).await;
    let mut locks = Vec::new();
    for buyer in 1..=4 {
        locks.push(on.grant(event(1), 1, buyer, 1).await);
    }
    on.step(Duration::from_secs(10)).await;
    for ledger in [on.ledger.as_ref(), other] {
        ledger.confirm(locks[0], None, None).await.expect("an answer");
    }
    on.step(Duration::from_secs(10)).await;
    for ledger in [other, on.ledger.as_ref()] {
        ledger.release(locks[1], ORDERS).await.expect("an answer");
        ledger.release(locks[0], ORDERS).await.expect("an answer");
    }
    let session = seatlock::domain::SessionId::generate();
    on.ledger.enter(user(3), session).await.expect("an answer");
    on.ledger.leave(user(3), session, Duration::from_secs(15)).await.expect("an answer");
    on.step(Duration::from_secs(17)).await;
    // Whoever meets it first ends it.
    other.availability(event(1), Duration::from_hours(1)).await.expect("an answer");
    on.step(TTL - Duration::from_secs(37)).await;
    on.grant(event(1), 1, 5, 1).await;
    for ledger in [other, on.ledger.as_ref(), other] {
        ledger.sweep().await.expect("an answer");
        on.step(Duration::from_secs(2)).await;
    }
}

#[tokio::test]
async fn each_end_is_counted_once_with_the_time_that_the_lock_was_held() {
    let handle = metrics::install().expect("no recorder before");
    let read = || SERIES.map(|series| value(&handle.render(), series));

    let redis = Stepped::redis().await;
    let other = redis.another(None);
    history(&redis, other.as_ref()).await;
    assert_eq!(read(), ["1", "1", "1", "1", "10", "20", "300", "35", "2", "2"], "{SERIES:#?} on Redis");

    let memory = Stepped::memory();
    history(&memory, memory.ledger.as_ref()).await;
    assert_eq!(read(), ["2", "2", "2", "2", "20", "40", "600", "70", "4", "4"], "{SERIES:#?} in memory too");
}
