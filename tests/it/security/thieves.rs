//! Somebody with a good token of their own, and other people's ids.

use serde_json::{Value, json};

use super::House;
use crate::support::gateway::{Raw, SECRET};

/// In every message that has room for it, another user's id is refused before anything is done, in whatever form it is
/// written; where there is none it changes nothing, and the answer is about oneself.
#[tokio::test(flavor = "multi_thread")]
async fn another_users_id_opens_nothing() {
    let house = House::start(&[]);
    let mut victim = Raw::greeted(house.address, 8).await;
    let mut thief = Raw::greeted(house.address, 7).await;
    let wanted = json!({"eventId": 1, "categoryId": 1, "quantity": 2});
    let lock = victim.ask("lock-tickets", &wanted).await["lockId"].clone();
    assert!(lock.is_string());
    for id in [json!(8), json!("8"), json!(8.0), json!([7]), json!({"id": 7}), json!(true), json!("7 "), json!(-7)] {
        for (name, mut data) in [
            ("join-event-room", json!({"eventId": 1})),
            ("leave-event-room", json!({"eventId": 1})),
            ("lock-tickets", wanted.clone()),
            ("unlock-tickets", json!({"eventId": 1, "categoryId": 1})),
            ("unlock-tickets", json!({"lockId": lock})),
            ("refresh-token", json!({"token": super::sign(&json!({"sub": "8"}))})),
        ] {
            data["userId"] = id.clone();
            let answer = thief.ask(name, &data).await;
            assert_eq!((&answer["success"], &answer["code"]), (&json!(false), &json!("unauthorized")), "{name} {data}");
        }
        let locks = thief.ask("get-my-locks", &json!({"userId": id})).await;
        assert_eq!(locks, json!({"locks": []}));
    }
    let locks = victim.ask("get-my-locks", &Value::Null).await;
    assert_eq!(locks["locks"].as_array().map(Vec::len), Some(1), "{locks}");
    house.is_well(&[]).await;
}

/// Another user's lock looks like none, by its id and by its category, and nothing that a room is told names a user, a
/// lock or a session.
#[tokio::test(flavor = "multi_thread")]
async fn another_users_lock_does_not_exist() {
    let house = House::start(&[]);
    let mut victim = Raw::greeted(house.address, 4_711).await;
    let mut thief = Raw::greeted(house.address, 7).await;
    thief.ask("join-event-room", &json!({"eventId": 1})).await;
    let granted = victim.ask("lock-tickets", &json!({"eventId": 1, "categoryId": 1, "quantity": 2})).await;
    let news = thief.expect("tickets-locked-by-other-user").await;
    assert_eq!(news, json!({"eventId": 1, "categoryId": 1, "quantity": 2}));
    let nothing = json!({"success": false, "code": "lock_not_found", "message": "No tickets found to unlock"});
    for data in [json!({"lockId": granted["lockId"]}), json!({"eventId": 1, "categoryId": 1})] {
        assert_eq!(thief.ask("unlock-tickets", &data).await, nothing);
    }
    // The same request id is another request when somebody else sends it.
    let wanted = json!({"eventId": 1, "categoryId": 1, "quantity": 1, "requestId": "r"});
    let own = thief.ask("lock-tickets", &wanted).await["lockId"].clone();
    assert_ne!(own, granted["lockId"]);
    for public in ["/", "/stats", "/events/1/availability", "/metrics", "/readyz"] {
        let text = reqwest::get(format!("{}{public}", house.service.url)).await.expect("an answer");
        let text = text.text().await.expect("a text");
        for secret in [granted["lockId"].as_str().expect("an id"), "4711", std::str::from_utf8(SECRET).expect("a text")]
        {
            assert!(!text.contains(secret), "{public} has {secret}: {text}");
        }
    }
    house.is_well(&[std::str::from_utf8(SECRET).expect("a text")]).await;
}

/// Tickets of an event that its organiser has closed cannot be locked; its room can be watched.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_event_sells_nothing() {
    let house = House::start(&[]);
    let mut buyer = Raw::greeted(house.address, 7).await;
    assert_eq!(buyer.ask("join-event-room", &json!({"eventId": 3})).await["success"], true);
    let refused = buyer.ask("lock-tickets", &json!({"eventId": 3, "categoryId": 1, "quantity": 1})).await;
    assert_eq!((&refused["code"], &refused["message"]), (&json!("event_closed"), &json!("Ticket sales are closed")));
}
