//! Users who lock tickets again and again and buy none.

use std::time::Duration;

use serde_json::{Value, json};

use super::House;
use crate::support::gateway::Raw;
use crate::support::node::until;

/// Milliseconds that a granted lock stands.
fn life_ms(granted: &Value) -> i64 {
    let at = |field: &str| {
        let text = granted[field].as_str().unwrap_or_else(|| panic!("no {field} in {granted}"));
        chrono::DateTime::parse_from_rfc3339(text).expect("an instant").timestamp_millis()
    };
    at("expiresAt") - at("serverTime")
}

/// After three locks in a row that were left to lapse the next stands half as long; it shows in the metrics, also for
/// locks whose user left and of whose end nobody here was told.
#[tokio::test(flavor = "multi_thread")]
async fn who_lets_locks_lapse_keeps_them_less_long() {
    let house = House::start(&[
        ("SEATLOCK_LOCK_TTL", "2s"),
        ("SEATLOCK_ABANDONER_TTL", "1s"),
        ("SEATLOCK_DISCONNECT_GRACE", "0s"),
    ]);
    let wanted = json!({"eventId": 1, "categoryId": 1, "quantity": 1});
    let mut hoarder = Raw::greeted(house.address, 7).await;
    for expected in [2_000, 2_000, 2_000, 1_000] {
        let granted = hoarder.ask("lock-tickets", &wanted).await;
        assert_eq!(life_ms(&granted), expected, "{granted}");
        assert_eq!(hoarder.expect("lock-expired").await["lockId"], granted["lockId"]);
    }
    let mut buyer = Raw::greeted(house.address, 8).await;
    assert_eq!(life_ms(&buyer.ask("lock-tickets", &wanted).await), 2_000, "somebody else's are as long as ever");
    buyer.leave().await;
    let abandoned = "seatlock_gateway_lock_endings_total{ending=\"abandoned\"}";
    until("the buyer's is found too", Duration::from_secs(25), async || house.metric(abandoned).await == 5).await;
    let all = "seatlock_gateway_users_by_abandoned_share{share=\"all\"}";
    until("the hoarder shows", Duration::from_secs(10), async || house.metric(all).await == 1).await;
}
