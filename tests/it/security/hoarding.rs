//! Users who lock tickets again and again and buy none.

use std::time::Duration;

use serde_json::{Value, json};

use super::House;
use crate::support::gateway::Raw;
use crate::support::node::until;
use crate::support::redis::RedisServer;

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

/// Events that somebody invents are answered with a clear refusal and leave nothing in Redis for longer than a minute.
#[tokio::test(flavor = "multi_thread")]
async fn invented_events_are_not_written_down() {
    let redis = RedisServer::start().await;
    let house = House::start(&[("SEATLOCK_REDIS_URL", redis.url().as_str())]);
    let mut stranger = Raw::greeted(house.address, 7).await;
    for id in 1000..1005 {
        let wanted = json!({"eventId": id, "categoryId": 1, "quantity": 1});
        assert_eq!(stranger.ask("lock-tickets", &wanted).await["code"], "event_not_found");
        assert_eq!(stranger.ask("join-event-room", &json!({ "eventId": id })).await["code"], "event_not_found");
    }
    for key in redis.keys().await {
        assert!(!key.ends_with(":events") && !key.ends_with(":due"), "{key}");
        if key.contains(":book") {
            let left = redis.pttl(&key).await;
            assert!((1..=60_000).contains(&left), "{key} {left}");
        }
    }
    let wanted = json!({"eventId": 1, "categoryId": 1, "quantity": 1});
    assert_eq!(stranger.ask("lock-tickets", &wanted).await["success"], true);
    assert!(redis.keys().await.iter().any(|key| key.ends_with(":events")), "one that is real is");
}
