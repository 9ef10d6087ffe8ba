//! The gateway, from outside: frames where order and bytes matter, the real `socket.io-client` where its behaviour does.

#![expect(clippy::wildcard_enum_match_arm, reason = "everything but what is expected fails the test")]

mod again;
mod upgrade;

use std::sync::Arc;
use std::time::Duration;

use futures_util::SinkExt as _;
use seatlock::domain::{AskOutcome, LockOutcome, LockRequest, OrderResult, Personal, Quantity, Releaser};
use seatlock::gateway::{GatewayOptions, Origins};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};
use tungstenite::Message;

use crate::support::gateway::{
    Browser, Got, PATIENCE, Raw, Replica, lock, options, redis_ledger, replica, replica_on, token, token_for,
};
use crate::support::ledger::{category, event, order_id, snapshot, user};
use crate::support::proxy::{Path, Proxy};
use crate::support::redis::RedisServer;

/// Waits for a condition about the replica.
async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < end, "never: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn is_instant(value: &Value) -> bool {
    let text = value.as_str().unwrap_or_default();
    text.len() == 24 && text.ends_with('Z') && text.as_bytes()[19] == b'.'
}

/// Each field of a granted lock is what the contract says, as acknowledgement and as message.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_is_granted_as_the_contract_says() {
    let replica = replica(options()).await;
    let mut buyer = replica.client(7).await;
    assert_eq!(buyer.greeting["success"], true);
    assert_eq!(buyer.greeting["userId"], 7);
    assert_eq!(buyer.greeting["locks"], json!([]));
    assert!(is_instant(&buyer.greeting["serverTime"]), "{}", buyer.greeting);
    let session = buyer.greeting["sessionId"].clone();

    let wanted = json!({"eventId": 1, "categoryId": 1, "quantity": 3, "requestId": "r-1"});
    let granted = buyer.ask("lock-tickets", &wanted).await;
    let id = granted["lockId"].as_str().expect("an id").to_owned();
    assert_eq!(id.len(), 36);
    assert!(is_instant(&granted["expiresAt"]) && is_instant(&granted["serverTime"]), "{granted}");
    let mut rest = granted.as_object().expect("an object").clone();
    for field in ["lockId", "expiresAt", "serverTime"] {
        rest.remove(field);
    }
    assert_eq!(
        Value::from(rest),
        json!({"success": true, "availableTickets": 7, "eventId": 1, "categoryId": 1, "quantity": 3, "requestId": "r-1"})
    );

    // The same request again, now without an acknowledgement: the same lock in the named message.
    buyer.emit("lock-tickets", &json!({"eventId": 1, "categoryId": 1, "quantity": 3, "requestId": "r-1"})).await;
    assert_eq!(buyer.expect("lock-tickets-response").await["lockId"], id);

    let locks = buyer.ask("get-my-locks", &Value::Null).await;
    let mine = &locks["locks"][0];
    assert_eq!(
        (&mine["lockId"], &mine["eventId"], &mine["categoryId"], &mine["quantity"], &mine["userId"], &mine["status"]),
        (&json!(id), &json!(1), &json!(1), &json!(3), &json!(7), &json!("active"))
    );
    assert_eq!(mine["sessionId"], session);

    let unlocked = buyer.ask("unlock-tickets", &json!({"eventId": 1, "categoryId": 1})).await;
    assert_eq!(unlocked, json!({"success": true, "message": "Tickets unlocked successfully", "lockId": id}));
    let again = buyer.ask("unlock-tickets", &json!({"eventId": 1, "categoryId": 1})).await;
    assert_eq!(again, json!({"success": false, "message": "No tickets found to unlock", "code": "lock_not_found"}));
    let repeated = buyer.ask("unlock-tickets", &json!({ "lockId": id })).await;
    assert_eq!(repeated["success"], true, "a repeat by id is as good as the first: {repeated}");
    let beat = buyer.ask("heartbeat", &Value::Null).await;
    assert!(is_instant(&beat["timestamp"]));
}

/// Every refusal that a client can provoke has its code and, where callers compare it, its text.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_have_their_codes_and_texts() {
    let replica = replica(GatewayOptions { max_per_event: Some(12), ..options() }).await;
    let mut one = replica.client(1).await;
    let mut two = replica.client(2).await;
    assert_eq!(one.ask("lock-tickets", &lock(1, 1, 8)).await["success"], true);
    let cases = [
        (lock(1, 1, 1), "already_locked", "You already have tickets locked for this category"),
        (lock(1, 9, 1), "category_not_found", "Ticket category not found"),
        (lock(999, 1, 1), "event_not_found", "Event not found"),
        (lock(3, 4, 1), "event_closed", "Ticket sales are closed"),
        (lock(2, 3, 1), "sold_out", "Only 0 tickets available"),
        (lock(1, 2, 11), "limit_exceeded", "You cannot lock more than 10 tickets at once"),
        (lock(1, 2, 5), "limit_exceeded", "You cannot have more than 12 tickets of this event; you have 8"),
        (json!({"eventId": 1, "categoryId": 2, "quantity": 1, "userId": 2}), "unauthorized", "Unauthorized"),
    ];
    for (data, code, message) in cases {
        let refused = one.ask("lock-tickets", &data).await;
        assert_eq!(refused["success"], false, "{refused}");
        assert_eq!((&refused["code"], &refused["message"]), (&json!(code), &json!(message)), "{data}");
        assert_eq!(refused["eventId"], data["eventId"], "{refused}");
        assert_eq!(refused["categoryId"], data["categoryId"], "{refused}");
    }
    let short = two.ask("lock-tickets", &lock(1, 1, 3)).await;
    assert_eq!(short["code"], "insufficient_tickets");
    assert_eq!((&short["message"], &short["availableTickets"]), (&json!("Only 2 tickets available"), &json!(2)));
    let own = two.ask("lock-tickets", &json!({"eventId": 1, "categoryId": 1, "quantity": 2, "userId": 2})).await;
    assert_eq!(own["success"], true, "one's own user id is no offence: {own}");
}

/// A lock of another user cannot be given back, by category or by id, and looks as if it did not exist.
#[tokio::test(flavor = "multi_thread")]
async fn another_users_lock_cannot_be_released() {
    let replica = replica(options()).await;
    let mut owner = replica.client(1).await;
    let mut thief = replica.client(2).await;
    let id = owner.ask("lock-tickets", &lock(1, 1, 2)).await["lockId"].clone();
    for data in [json!({"lockId": id}), json!({"eventId": 1, "categoryId": 1}), json!({"lockId": "x"})] {
        let answer = thief.ask("unlock-tickets", &data).await;
        let refusal = json!({"success": false, "code": "lock_not_found", "message": "No tickets found to unlock"});
        assert_eq!(answer, refusal, "{data}");
    }
    assert_eq!(owner.ask("get-my-locks", &Value::Null).await["locks"][0]["lockId"], id);
}

/// More tries than the rate allows are refused with the time to wait.
#[tokio::test(flavor = "multi_thread")]
async fn the_rate_limit_says_when_to_try_again() {
    let rate = seatlock::domain::RateLimit { interval: Duration::from_secs(5), burst: 2 };
    let replica = replica(GatewayOptions { rate: Some(rate), ..options() }).await;
    let mut client = replica.client(1).await;
    client.ask("lock-tickets", &lock(1, 1, 1)).await;
    client.ask("lock-tickets", &lock(1, 1, 1)).await;
    let refused = client.ask("lock-tickets", &lock(1, 1, 1)).await;
    assert_eq!(refused["code"], "rate_limited");
    let wait = refused["retryAfterMs"].as_u64().expect("a time");
    assert!((1..=5_000).contains(&wait), "{refused}");
}

/// Fifty requests in one TCP write are answered in the order in which they were sent, although each waits for a ledger.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_messages_in_one_write_are_answered_in_order() {
    let replica = replica(options()).await;
    let mut client = replica.client(1).await;
    for id in 0..50 {
        let name = if id % 2 == 0 { "lock-tickets" } else { "unlock-tickets" };
        let text = format!("42/realtime,{id}{}", json!([name, lock(1, 1, 1)]));
        client.socket.feed(Message::text(text)).await.expect("an open connection");
    }
    client.socket.flush().await.expect("an open connection");
    for id in 0..50 {
        match client.next().await {
            Got::Ack(answered, data) => {
                assert_eq!(answered, id);
                assert_eq!(data["success"], true, "lock and unlock alternate: {data}");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// More messages than may wait are all answered all the same, the surplus with `rate_limited`.
#[tokio::test(flavor = "multi_thread")]
async fn no_message_is_dropped_silently() {
    let server = RedisServer::start().await;
    let replica = replica_on(redis_ledger(server.url(), Duration::from_millis(300)), options()).await;
    let mut client = replica.client(1).await;
    // While the ledger hangs, what comes in waits.
    server.signal("STOP");
    for id in 0..200 {
        let text = format!("42/realtime,{id}[\"heartbeat\"]");
        let text = if id == 0 { format!("42/realtime,0{}", json!(["get-my-locks"])) } else { text };
        client.socket.feed(Message::text(text)).await.expect("an open connection");
    }
    client.socket.flush().await.expect("an open connection");
    let mut codes = vec![None; 200];
    for _ in 0..200 {
        match client.next().await {
            Got::Ack(id, data) => {
                let seen = &mut codes[usize::try_from(id).expect("small")];
                assert!(seen.is_none(), "{id} was answered twice");
                *seen = Some(data["code"].as_str().unwrap_or("ok").to_owned());
            }
            other => panic!("{other:?}"),
        }
    }
    server.signal("CONT");
    let count = |code: &str| codes.iter().flatten().filter(|seen| *seen == code).count();
    assert_eq!(codes[0].as_deref(), Some("unavailable"));
    assert!(count("rate_limited") >= 60, "{codes:?}");
    assert!(count("ok") >= 120, "{codes:?}");
}

/// What cannot be read is refused by name, an unknown name by `error`, and the connection survives both.
#[tokio::test(flavor = "multi_thread")]
async fn odd_input_is_answered_and_survived() {
    let replica = replica(options()).await;
    let mut client = replica.client(1).await;
    for data in [json!(null), json!("x"), json!([1]), json!({}), json!({"eventId": "1"}), json!({"eventId": 0})] {
        let refused = client.ask("join-event-room", &data).await;
        assert_eq!((&refused["success"], &refused["code"]), (&json!(false), &json!("invalid_request")), "{data}");
    }
    for quantity in [json!(0), json!(-1), json!(1.5), json!("2"), json!(null), json!(1e30)] {
        let data = json!({"eventId": 1, "categoryId": 1, "quantity": quantity});
        let refused = client.ask("lock-tickets", &data).await;
        assert_eq!(refused["code"], "invalid_request", "{data}");
        assert_eq!(refused["eventId"], 1);
    }
    client.emit("unlock-tickets", &json!({"eventId": 1})).await;
    assert_eq!(client.expect("unlock-tickets-response").await["code"], "invalid_request");
    client.send("42/realtime,[\"lock-tickets\"]").await;
    assert_eq!(client.expect("lock-tickets-response").await["code"], "invalid_request");
    client.emit("steal-tickets", &json!({})).await;
    let error = client.expect("error").await;
    assert_eq!(
        (&error["code"], &error["message"]),
        (&json!("invalid_request"), &json!("Unknown message: steal-tickets"))
    );
    assert_eq!(client.ask("steal-tickets", &json!({})).await["code"], "invalid_request");
    client.send("42/realtime,[\"heartbeat\",\"anything\",{\"at\":[1,2]}]").await;
    assert!(is_instant(&client.expect("heartbeat-response").await["timestamp"]));
    let deep = format!("42/realtime,[\"lock-tickets\",{}{}]", "[".repeat(5_000), "]".repeat(5_000));
    client.send(&deep).await;
    let answer = client.next().await;
    assert!(matches!(&answer, Got::Event(_, data) if data["code"] == "invalid_request"), "{answer:?}");
    assert!(is_instant(&client.ask("heartbeat", &json!({})).await["timestamp"]));
}

/// A binary message, an oversized one and broken JSON end the connection of their sender and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_client_sends_ends_its_connection_only() {
    let replica = replica(options()).await;
    let mut other = replica.client(2).await;
    for text in ["451-/realtime,[\"lock-tickets\",{\"_placeholder\":true,\"num\":0}]", "42/realtime,[\"x", "49"] {
        let mut client = replica.client(1).await;
        client.send(text).await;
        client.closed().await;
    }
    let mut client = replica.client(1).await;
    let long = format!("42/realtime,[\"heartbeat\",\"{}\"]", "x".repeat(70_000));
    // The connection may end while it is still being sent.
    client.socket.send(Message::text(long)).await.ok();
    client.closed().await;
    assert!(is_instant(&other.ask("heartbeat", &json!({})).await["timestamp"]));
    eventually("only the other is left", async || replica.gateway.counts() == (1, 1)).await;
}

/// A message sent right behind the connection is answered: 40 times, with nothing in between.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_right_behind_the_connection_is_not_lost() {
    let replica = replica(options()).await;
    for _ in 0..40 {
        let mut raw = replica.raw("").await;
        raw.connect(&json!({ "token": token(1) })).await;
        let answer = raw.ask("get-my-locks", &Value::Null).await;
        assert_eq!(answer, json!({ "locks": [] }));
        raw.leave().await;
    }
}

/// Handshakes that are not good are refused with the contract's word, in `auth`, in the query and in the header.
#[tokio::test(flavor = "multi_thread")]
async fn handshakes_are_refused_with_the_contracts_words() {
    let replica = replica(GatewayOptions { sockets_per_user_max: 2, ..options() }).await;
    let refused = async |query: &str, auth: Value| replica.raw(query).await.refusal(&auth).await;
    let good = json!({ "token": token(7) });
    assert_eq!(refused("", json!({})).await, "unauthorized");
    assert_eq!(refused("", json!({ "token": "nonsense" })).await, "unauthorized");
    assert_eq!(refused("", json!({ "token": 7 })).await, "unauthorized");
    let expired = token_for(7, Duration::ZERO);
    assert_eq!(refused("userId=8", good.clone()).await, "user_mismatch");
    assert_eq!(refused("userId=x", good.clone()).await, "user_mismatch");
    // Without `auth` at all, and with the token where older pages put it.
    let mut bare = replica.raw("").await;
    bare.send("40/realtime,").await;
    assert!(matches!(bare.next().await, Got::Refused(reason) if reason["message"] == "unauthorized"));
    let mut asked = replica.raw(&format!("userId=7&token={}", token(7))).await;
    asked.connect(&json!({})).await;
    asked.expect("connected").await;
    let mut second = replica.client(7).await;
    assert_eq!(refused("", good.clone()).await, "too_many_connections");
    second.ask("heartbeat", &json!({})).await;
    second.leave().await;
    eventually("the place is free", async || replica.gateway.counts() == (1, 1)).await;
    replica.client(7).await;
    // The leeway of 5 s is over when this one is tried.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(refused("", json!({ "token": expired })).await, "token_expired");
}

/// A page of a foreign origin gets neither a WebSocket nor a poll; a listed one gets both, with its CORS headers.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_origins_are_refused_on_both_transports() {
    let origins = Origins::new(vec!["https://shop.example".to_owned()]);
    let replica = replica(GatewayOptions { origins, ..options() }).await;
    assert!(replica.try_raw("", Some("https://evil.example")).await.is_err());
    replica.try_raw("", Some("https://shop.example")).await.expect("a listed origin");
    replica.try_raw("", Some(&replica.url())).await.expect("our own page");
    let poll = async |origin: &'static str| {
        let url = format!("{}/socket.io/?EIO=4&transport=polling", replica.url());
        reqwest::Client::new().get(url).header("origin", origin).send().await.expect("an answer")
    };
    assert_eq!(poll("https://evil.example").await.status(), 403);
    let listed = poll("https://shop.example").await;
    assert_eq!(listed.status(), 200);
    assert_eq!(listed.headers()["access-control-allow-origin"], "https://shop.example");
}

/// The real client over polling, over WebSocket, and with its defaults (polling first, then an upgrade) does all that
/// the page needs: greeting, room, lock, another's lock, unlock.
#[tokio::test(flavor = "multi_thread")]
async fn the_real_client_works_over_both_transports() {
    let replica = replica(options()).await;
    for (buyer, transports) in [(1, &["polling"][..]), (2, &["websocket"][..]), (3, &["polling", "websocket"][..])] {
        let mut watcher = replica.client(100 + buyer).await;
        watcher.ask("join-event-room", &json!({ "eventId": 1 })).await;
        let mut browser = Browser::of(&replica, buyer, transports).await;
        assert_eq!(browser.event("connected").await["userId"], buyer);
        if transports.len() == 2 {
            let end = Instant::now() + PATIENCE;
            while browser.transport().await != "websocket" {
                assert!(Instant::now() < end, "never upgraded");
            }
        }
        browser.emit("join-event-room", &json!({ "eventId": 1, "userId": buyer })).await;
        let joined = browser.event("joined-event-room").await;
        assert_eq!(joined["availability"][0]["availableTickets"], 10, "{joined}");
        assert_eq!(browser.event("availability-update").await["categoryId"], 1);
        assert_eq!(browser.event("availability-update").await["categoryId"], 2);
        let granted = browser.ask("lock-tickets", &lock(1, 1, 4)).await;
        assert_eq!(granted["success"], true, "{granted}");
        assert_eq!(browser.event("availability-update").await["availableTickets"], 6);
        let locked = watcher.expect("tickets-locked-by-other-user").await;
        assert_eq!(locked, json!({"eventId": 1, "categoryId": 1, "quantity": 4}));
        browser.emit("unlock-tickets", &json!({"eventId": 1, "categoryId": 1, "quantity": 4})).await;
        assert_eq!(browser.event("unlock-tickets-response").await["lockId"], granted["lockId"]);
        let released = watcher.expect("tickets-released-by-other-user").await;
        assert_eq!(released, json!({"eventId": 1, "categoryId": 1, "quantity": 4, "reason": "released"}));
        assert_eq!(browser.event("availability-update").await["availableTickets"], 10);
    }
}

/// The real client sees the contract's word in `connect_error` and does not try again by itself.
#[tokio::test(flavor = "multi_thread")]
async fn the_real_client_sees_why_it_is_refused() {
    let replica = replica(options()).await;
    for (options, word) in [
        (json!({ "auth": { "token": "nonsense" } }), "unauthorized"),
        (json!({ "auth": { "token": token(1) }, "query": { "userId": 2 } }), "user_mismatch"),
        (json!({}), "unauthorized"),
    ] {
        let mut browser = Browser::open(&replica, &options).await;
        let report = browser.report("connect_error").await;
        assert_eq!((&report["connect_error"], &report["active"]), (&json!(word), &json!(false)));
    }
    let header =
        json!({ "extraHeaders": { "Authorization": format!("Bearer {}", token(1)) }, "query": { "userId": 1 } });
    let mut browser = Browser::open(&replica, &header).await;
    assert_eq!(browser.event("connected").await["userId"], 1);
}

/// Joining: the answer has everything, then comes one update per category; then only what is newer.
#[tokio::test(flavor = "multi_thread")]
async fn a_joiner_gets_the_room_and_then_its_news() {
    let replica = replica(options()).await;
    let mut watcher = replica.client(1).await;
    let held = watcher.ask("lock-tickets", &lock(1, 2, 5)).await["lockId"].clone();
    watcher.emit("join-event-room", &json!({ "eventId": 1 })).await;
    let Got::Event(name, joined) = watcher.next().await else { panic!("not a message") };
    assert_eq!(name, "joined-event-room");
    assert_eq!((&joined["success"], &joined["eventId"]), (&json!(true), &json!(1)));
    assert!(joined["message"].is_string());
    assert_eq!(joined["locks"][0]["lockId"], held);
    let second = &joined["availability"][1];
    assert_eq!(
        (&second["availableTickets"], &second["lockedTickets"], &second["totalTickets"], &second["status"]),
        (&json!(45), &json!(5), &json!(50), &json!("available"))
    );
    for at in 0..2 {
        let Got::Event(name, update) = watcher.next().await else { panic!("not a message") };
        assert_eq!((name.as_str(), &update), ("availability-update", &joined["availability"][at]));
    }
    let mut buyer = replica.client(2).await;
    buyer.ask("lock-tickets", &lock(1, 2, 10)).await;
    let update = watcher.expect("availability-update").await;
    assert_eq!((&update["availableTickets"], &update["lockedTickets"]), (&json!(35), &json!(15)));
    assert!(update["version"].as_u64() > second["version"].as_u64(), "{update}");

    let left = watcher.ask("leave-event-room", &json!({ "eventId": 1 })).await;
    assert_eq!((&left["success"], &left["eventId"]), (&json!(true), &json!(1)));
    buyer.ask("unlock-tickets", &lock(1, 2, 10)).await;
    assert_eq!(watcher.within(Duration::from_millis(300)).await, [], "nothing after leaving");
    assert_eq!(watcher.ask("join-event-room", &json!({ "eventId": 999 })).await["code"], "event_not_found");
}

/// Also of a room that it is in already, when news no longer take the queue that the answer takes.
#[tokio::test(flavor = "multi_thread")]
async fn who_joins_again_gets_the_answer_first() {
    let replica = replica(options()).await;
    let mut watcher = replica.client(1).await;
    watcher.ask("join-event-room", &json!({ "eventId": 1 })).await;
    // That the first snapshot was stored may be told to a room whose first joiner has read it already.
    watcher.within(Duration::from_millis(300)).await;
    for _ in 0..200 {
        watcher.emit("join-event-room", &json!({ "eventId": 1 })).await;
        for expected in ["joined-event-room", "availability-update", "availability-update"] {
            let Got::Event(name, _) = watcher.next().await else { panic!("not a message") };
            assert_eq!(name, expected);
        }
    }
}

/// News are written past the queue of every WebSocket, also of one that began with polling; who polls has them by the
/// queue. Each is told once for each change.
#[tokio::test(flavor = "multi_thread")]
async fn news_are_written_at_once_to_every_websocket() {
    let handle = seatlock::metrics::install().expect("nobody else counts in this process");
    let told = |path: &str| {
        let name = format!("seatlock_gateway_news_total{{kind=\"{path}\"}} ");
        handle.render().lines().find_map(|line| line.strip_prefix(&name)?.parse::<u64>().ok()).unwrap_or(0)
    };
    let replica = replica(options()).await;
    let mut direct = replica.client(1).await;
    direct.ask("join-event-room", &json!({ "eventId": 1 })).await;
    let mut upgraded = Browser::of(&replica, 2, &["polling", "websocket"]).await;
    upgraded.ask("join-event-room", &json!({ "eventId": 1 })).await;
    let mut polling = Browser::of(&replica, 3, &["polling"]).await;
    polling.ask("join-event-room", &json!({ "eventId": 1 })).await;
    let end = Instant::now() + PATIENCE;
    while upgraded.transport().await != "websocket" {
        assert!(Instant::now() < end, "the client stays with polling");
    }

    let mut buyer = replica.client(4).await;
    let mut version = 0;
    let (mut before, mut began) = (0, 0);
    for change in 0..8 {
        if change == 4 {
            // The first news of a WebSocket may go by the queue, and the next wait for them.
            (before, began) = (told("write"), told("queue"));
        }
        let request = if change % 2 == 0 { "lock-tickets" } else { "unlock-tickets" };
        assert_eq!(buyer.ask(request, &lock(1, 2, 1)).await["success"], true);
        let left = if change % 2 == 0 { 49 } else { 50 };
        loop {
            let update = direct.expect("availability-update").await;
            let newer = update["version"].as_u64() > Some(version);
            if newer && update["categoryId"] == 2 && update["availableTickets"] == left {
                version = update["version"].as_u64().expect("a number");
                break;
            }
        }
        for client in [&mut upgraded, &mut polling] {
            while client.event("availability-update").await["version"] != version {}
        }
    }
    eventually("four changes, two WebSockets", async || told("write") >= before + 8).await;
    eventually("four changes, one poller", async || told("queue") >= began + 4).await;
    assert_eq!((told("write") - before, told("queue") - began), (8, 4));
}

/// One connection can watch 32 events and no more.
#[tokio::test(flavor = "multi_thread")]
async fn rooms_are_bounded() {
    let replica = replica(options()).await;
    let mut client = replica.client(1).await;
    for event in 10..42 {
        assert_eq!(client.ask("join-event-room", &json!({ "eventId": event })).await["success"], true);
    }
    assert_eq!(client.ask("join-event-room", &json!({ "eventId": 42 })).await["code"], "limit_exceeded");
    assert_eq!(client.ask("join-event-room", &json!({ "eventId": 10 })).await["success"], true, "it is there already");
    client.ask("leave-event-room", &json!({ "eventId": 10 })).await;
    assert_eq!(client.ask("join-event-room", &json!({ "eventId": 42 })).await["success"], true);
}

/// Two tabs of one user and a stranger: who locks is never told as another user, in neither tab; the tab that did not
/// release is told that the lock is gone, the other one is not.
#[tokio::test(flavor = "multi_thread")]
async fn two_tabs_of_one_user() {
    let replica = replica(options()).await;
    let mut first = replica.client(1).await;
    let mut second = replica.client(1).await;
    let mut stranger = replica.client(2).await;
    for client in [&mut first, &mut second, &mut stranger] {
        client.ask("join-event-room", &json!({ "eventId": 1 })).await;
    }
    let id = first.ask("lock-tickets", &lock(1, 1, 2)).await["lockId"].clone();
    assert_eq!(stranger.expect("tickets-locked-by-other-user").await["quantity"], 2);
    assert_eq!(second.ask("get-my-locks", &Value::Null).await["locks"][0]["lockId"], id);
    let refused = second.ask("lock-tickets", &lock(1, 1, 1)).await;
    assert_eq!(refused["code"], "already_locked");
    first.ask("unlock-tickets", &json!({ "lockId": id })).await;
    let told = second.expect("lock-released").await;
    assert_eq!(told, json!({"lockId": id, "eventId": 1, "categoryId": 1, "quantity": 2, "reason": "released"}));
    let names = |got: Vec<Got>| -> Vec<String> {
        got.into_iter().map(|got| if let Got::Event(name, _) = got { name } else { format!("{got:?}") }).collect()
    };
    for tab in [&mut first, &mut second] {
        let seen = names(tab.within(Duration::from_millis(300)).await);
        assert!(seen.iter().all(|name| name == "availability-update"), "{seen:?}");
    }
    // Closing one tab leaves the lock of the other alone.
    second.ask("lock-tickets", &lock(1, 1, 2)).await;
    first.leave().await;
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert_eq!(second.ask("get-my-locks", &Value::Null).await["locks"].as_array().map(Vec::len), Some(1));
}

/// In one tick two users lock: each is told of the other's tickets only, the room of both.
#[tokio::test(flavor = "multi_thread")]
async fn sums_leave_ones_own_tickets_out() {
    let replica = replica(options()).await;
    let mut clients = [replica.client(1).await, replica.client(2).await, replica.client(3).await];
    for client in &mut clients {
        client.ask("join-event-room", &json!({ "eventId": 1 })).await;
    }
    let [one, two, three] = &mut clients;
    one.emit("lock-tickets", &lock(1, 2, 3)).await;
    two.emit("lock-tickets", &lock(1, 2, 4)).await;
    let told = async |client: &mut Raw, tickets: u64| {
        let mut sum = 0;
        while sum < tickets {
            sum += client.expect("tickets-locked-by-other-user").await["quantity"].as_u64().expect("a number");
        }
        assert_eq!(sum, tickets);
    };
    told(three, 7).await;
    told(one, 4).await;
    told(two, 3).await;
}

/// Personal messages reach every socket of the user and nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn orders_are_told_to_every_socket_of_the_user() {
    let replica = replica(options()).await;
    let mut tabs = [replica.client(1).await, replica.client(1).await];
    let mut other = replica.client(2).await;
    for (number, order) in [(true, "55"), (false, "order-55")] {
        let message = Personal::Order {
            result: OrderResult::Completed,
            order: order_id(order),
            order_is_number: number,
            event: event(1),
            category: category(1),
            quantity: Quantity::new(2).expect("a quantity"),
        };
        replica.ledger.tell(user(1), &message).await.expect("told");
        for tab in &mut tabs {
            let told = tab.expect("order-completed").await;
            assert_eq!(told["orderId"], if number { json!(55) } else { json!("order-55") });
            assert_eq!((&told["eventId"], &told["categoryId"], &told["quantity"]), (&json!(1), &json!(1), &json!(2)));
            assert!(told["message"].is_string());
        }
    }
    assert_eq!(other.within(Duration::from_millis(200)).await, []);
}

/// A lock that runs out is told to its owner and, as tickets that came back, to the room.
#[tokio::test(flavor = "multi_thread")]
async fn expiry_is_told() {
    let replica = replica(GatewayOptions { lock_ttl: Duration::from_millis(600), ..options() }).await;
    let mut owner = replica.client(1).await;
    let mut watcher = replica.client(2).await;
    watcher.ask("join-event-room", &json!({ "eventId": 1 })).await;
    let id = owner.ask("lock-tickets", &lock(1, 1, 10)).await["lockId"].clone();
    let told = owner.expect("lock-expired").await;
    assert_eq!(told, json!({"lockId": id, "eventId": 1, "categoryId": 1, "quantity": 10}));
    while watcher.expect("availability-update").await["availableTickets"] != 0 {}
    // Who came while the room was being told may be told the same counts once more.
    let free = loop {
        let free = watcher.expect("availability-update").await["availableTickets"].clone();
        if free != 0 {
            break free;
        }
    };
    assert_eq!(free, 10);
    let back = watcher.expect("tickets-released-by-other-user").await;
    assert_eq!(back, json!({"eventId": 1, "categoryId": 1, "quantity": 10, "reason": "expired"}));
}

/// A user who is back within the grace finds the lock; one who is not has lost it, and the room learns why.
#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_starts_the_grace_and_a_return_ends_it() {
    let replica = replica(GatewayOptions { disconnect_grace: Duration::from_millis(800), ..options() }).await;
    let mut watcher = replica.client(2).await;
    watcher.ask("join-event-room", &json!({ "eventId": 1 })).await;
    let mut buyer = replica.client(1).await;
    let granted = buyer.ask("lock-tickets", &lock(1, 1, 2)).await;
    // The connection is lost, not closed.
    drop(buyer);
    eventually("the socket is gone", async || replica.gateway.counts() == (1, 1)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let back = replica.client(1).await;
    assert_eq!(back.greeting["locks"][0]["lockId"], granted["lockId"]);
    assert_eq!(back.greeting["locks"][0]["expiresAt"], granted["expiresAt"], "the old deadline is back");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(replica.ledger.locks_of(user(1)).await.expect("locks").len(), 1, "the grace is over, the lock is not");
    back.leave().await;
    let released = watcher.expect("tickets-released-by-other-user").await;
    assert_eq!(released, json!({"eventId": 1, "categoryId": 1, "quantity": 2, "reason": "abandoned"}));
    assert_eq!(replica.client(1).await.greeting["locks"], json!([]));
}

/// A token that runs out is announced, a new one of the same user is taken, and without one the transport is closed.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_expire_and_are_renewed() {
    let replica = replica(GatewayOptions { token_grace: Duration::from_millis(700), ..options() }).await;
    let short = token_for(1, Duration::from_secs(1));
    let mut client = replica.raw("").await;
    client.connect(&json!({ "token": short })).await;
    let error = client.expect("error").await;
    assert_eq!(error["code"], "token_expired");
    for bad in [json!({ "token": "nonsense" }), json!({ "token": token(2) })] {
        let refused = client.ask("refresh-token", &bad).await;
        assert_eq!((&refused["success"], &refused["code"]), (&json!(false), &json!("unauthorized")));
    }
    assert_eq!(client.ask("refresh-token", &json!({})).await["code"], "invalid_request");
    let renewed = client.ask("refresh-token", &json!({ "token": token_for(1, Duration::from_secs(2)) })).await;
    assert_eq!(renewed["success"], true);
    assert!(is_instant(&renewed["expiresAt"]), "{renewed}");
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert!(is_instant(&client.ask("heartbeat", &json!({})).await["timestamp"]), "the grace of the old token is over");
    assert_eq!(client.expect("error").await["code"], "token_expired");
    let told = Instant::now();
    client.closed().await;
    assert!(told.elapsed() >= Duration::from_millis(600), "{:?}", told.elapsed());
    eventually("nobody is left", async || replica.gateway.counts() == (0, 0)).await;

    // The real client sees a closed transport and comes back by itself, with the token that it has by then.
    for transport in ["websocket", "polling"] {
        let options = json!({ "auth": { "token": token_for(5, Duration::from_secs(1)) }, "transports": [transport] });
        let mut browser = Browser::open(&replica, &options).await;
        browser.report("connect").await;
        browser.order(&json!({ "do": "auth", "auth": { "token": token(5) } })).await;
        assert_eq!(browser.event("error").await["code"], "token_expired");
        let report = browser.report("disconnect").await;
        assert_eq!(
            (&report["disconnect"], &report["active"]),
            (&json!("transport close"), &json!(true)),
            "{transport}"
        );
        browser.report("connect").await;
        browser.event("connected").await;
    }
}

/// A drain answers what was asked, closes transports so that clients go elsewhere by themselves, keeps their locks for
/// the longer grace, and takes nobody in any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_moves_clients_and_loses_no_lock() {
    let ledger: Arc<dyn seatlock::ledger::Ledger> =
        Arc::new(seatlock::ledger::MemoryLedger::new(crate::support::gateway::ledger_options()));
    let replica = replica_on(ledger, GatewayOptions { drain_grace: Duration::from_secs(30), ..options() }).await;
    let mut raw = replica.client(1).await;
    let granted = raw.ask("lock-tickets", &lock(1, 1, 2)).await;
    let mut half_open = replica.raw("").await;
    let mut browsers = Vec::new();
    for (user, transport) in [(2, "websocket"), (3, "polling")] {
        let mut browser = Browser::of(&replica, user, &[transport]).await;
        browser.event("connected").await;
        browsers.push(browser);
    }
    // On their way when the drain begins.
    for id in 0..20 {
        let text = format!("42/realtime,{}[\"heartbeat\"]", 100 + id);
        raw.socket.feed(Message::text(text)).await.expect("an open connection");
    }
    raw.socket.flush().await.expect("an open connection");
    tokio::time::sleep(Duration::from_millis(50)).await;
    let begun = Instant::now();
    let drain = tokio::spawn({
        let gateway = replica.gateway.clone();
        async move { gateway.drain(Duration::from_secs(20)).await }
    });
    let answered = raw.closed().await;
    assert_eq!(answered.iter().filter(|got| matches!(got, Got::Ack(..))).count(), 20, "{answered:?}");
    for browser in &mut browsers {
        let report = browser.report("disconnect").await;
        assert_eq!((&report["disconnect"], &report["active"]), (&json!("transport close"), &json!(true)));
        // It keeps trying: refused by this replica, welcome at another.
        let error = browser.report("connect_error").await;
        assert_eq!(error["active"], true, "{error}");
    }
    timeout(Duration::from_secs(10), drain).await.expect("drained in time").expect("no panic");
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    half_open.closed().await;
    assert_eq!(replica.gateway.counts(), (0, 0));
    assert!(replica.try_raw("", None).await.is_err(), "nobody is taken in");
    // Far beyond the usual grace, the locks are still there.
    tokio::time::sleep(Duration::from_millis(900)).await;
    let locks = replica.ledger.locks_of(user(1)).await.expect("locks");
    assert_eq!(locks.iter().map(|lock| lock.id.to_string()).collect::<Vec<_>>(), [granted["lockId"].as_str().unwrap()]);
}

/// With Redis stopped, requests are answered `unavailable` in time and the socket stays; a client that comes meanwhile
/// is greeted when Redis is back; everything works again by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_that_does_not_answer_costs_no_connection() {
    let server = RedisServer::start().await;
    let ledger = redis_ledger(server.url(), Duration::from_secs(1));
    let replica = replica_on(ledger, GatewayOptions { request_timeout: Duration::from_millis(700), ..options() }).await;
    let mut client = replica.client(1).await;
    client.ask("lock-tickets", &lock(1, 1, 1)).await;
    server.signal("STOP");
    for (name, data) in [
        ("lock-tickets", lock(1, 2, 1)),
        ("unlock-tickets", lock(1, 1, 1)),
        ("get-my-locks", json!({})),
        ("join-event-room", json!({ "eventId": 1 })),
    ] {
        let begun = Instant::now();
        let answer = client.ask(name, &data).await;
        assert_eq!(answer["code"], "unavailable", "{name}: {answer}");
        // 0.7 s and what a busy machine adds.
        assert!(begun.elapsed() < Duration::from_secs(3), "{name}: {:?}", begun.elapsed());
    }
    assert!(is_instant(&client.ask("heartbeat", &json!({})).await["timestamp"]));
    let mut late = replica.raw("").await;
    late.connect(&json!({ "token": token(2) })).await;
    assert_eq!(late.ask("lock-tickets", &lock(1, 2, 1)).await["code"], "unavailable");
    server.signal("CONT");
    let greeting = late.expect("connected").await;
    assert_eq!(greeting["userId"], 2);
    assert_eq!(late.ask("lock-tickets", &lock(1, 2, 1)).await["success"], true);
    assert_eq!(client.ask("join-event-room", &json!({ "eventId": 1 })).await["success"], true);
}

/// A client that reads nothing is disconnected within bounds; the others in its room get every last count on time.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_cut_and_hurts_nobody() {
    let replica = replica(GatewayOptions { slow_client: Duration::from_secs(2), ..options() }).await;
    let mut stalled = replica.client(1).await;
    stalled.ask("join-event-room", &json!({ "eventId": 1 })).await;
    let mut watcher = replica.client(2).await;
    watcher.ask("join-event-room", &json!({ "eventId": 1 })).await;
    // From here on `stalled` sends and never reads: the answers fill every buffer on the way. It asks too slowly for a
    // flood, for five hundred categories at a time.
    let (mut sink, _unread) = futures_util::StreamExt::split(stalled.socket);
    let flood = tokio::spawn(async move {
        let ask = format!("42/realtime,1{}", json!(["join-event-room", { "eventId": 9 }]));
        while sink.send(Message::text(ask.clone())).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    });
    let begun = Instant::now();
    let mut buyer = replica.client(3).await;
    while replica.gateway.counts().1 > 2 {
        assert!(begun.elapsed() < Duration::from_secs(40), "the stalled client is never cut");
        let asked = Instant::now();
        buyer.ask("lock-tickets", &lock(1, 2, 1)).await;
        buyer.ask("unlock-tickets", &lock(1, 2, 1)).await;
        assert!(asked.elapsed() < Duration::from_secs(2), "others wait: {:?}", asked.elapsed());
    }
    flood.abort();
    buyer.ask("lock-tickets", &lock(1, 2, 7)).await;
    while watcher.expect("availability-update").await["availableTickets"] != 43 {}
}

/// A room with more news than fits: a socket that reads nothing is found and cut, one that reads gets the last counts
/// of every category although some of its updates were dropped on the way.
#[tokio::test(flavor = "multi_thread")]
async fn who_missed_updates_is_told_again_and_who_takes_none_is_cut() {
    let replica = replica(GatewayOptions { slow_client: Duration::from_secs(2), ..options() }).await;
    let mut stalled = replica.client(1).await;
    stalled.ask("join-event-room", &json!({ "eventId": 9 })).await;
    let mut watcher = replica.client(2).await;
    watcher.ask("join-event-room", &json!({ "eventId": 9 })).await;
    let mut latest = std::collections::HashMap::new();
    let mut note = |got: Got| {
        let Got::Event(name, data) = got else { panic!("{got:?}") };
        if name == "availability-update" {
            let version = data["version"].as_u64();
            let last = latest.insert(data["categoryId"].as_u64(), (version, data["availableTickets"].as_u64()));
            assert!(last.is_none_or(|(last, _)| last <= version), "an older version after a newer one: {data}");
        }
        latest.len() == 500 && latest.values().all(|&(_, left)| left == Some(7))
    };
    let stock = async |left: u64| {
        let asked = replica.ledger.ask(event(9), Duration::ZERO).await.expect("an answer");
        let AskOutcome::Ask(number) = asked else { panic!("{asked:?}") };
        let categories: Vec<_> = (1..=500).map(|id| (id, 100_000, left)).collect();
        replica.ledger.accept(event(9), number, &snapshot(&categories)).await.expect("an answer");
    };
    let begun = Instant::now();
    let mut left = 40_000;
    while replica.gateway.counts().1 > 1 {
        assert!(begun.elapsed() < Duration::from_secs(40), "the stalled client is never cut");
        left -= 1;
        stock(left).await;
        for got in watcher.within(Duration::from_millis(15)).await {
            note(got);
        }
    }
    stock(7).await;
    let end = Instant::now() + PATIENCE;
    while !note(watcher.next().await) {
        assert!(Instant::now() < end, "the watcher never has the last counts of all categories");
    }
    drop(stalled);
}

/// Nothing is left behind by sockets that come and go in every way: no place, no room, no presence.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_behind() {
    let replica: Replica = replica(options()).await;
    for round in 0..30 {
        let mut client = replica.client(1).await;
        client.ask("join-event-room", &json!({ "eventId": 1 })).await;
        match round % 3 {
            0 => client.leave().await,
            1 => client.send("41/realtime,").await,
            _ => drop(client),
        }
    }
    eventually("every place is free", async || replica.gateway.counts() == (0, 0)).await;
    // The user's last session is over: a lock made for the user elsewhere is abandoned by nobody, one made here is.
    let mut client = replica.client(1).await;
    client.ask("lock-tickets", &lock(1, 1, 1)).await;
    client.leave().await;
    eventually("the lock is given up", async || replica.ledger.locks_of(user(1)).await.expect("locks").is_empty())
        .await;
    let lock = replica.grant(1, 1, 9, 2).await;
    let by = Releaser::Owner { user: user(9), session: None };
    replica.ledger.release(lock, by).await.expect("an answer");
}

/// Two hundred clients are moved one after the other over the time for draining, after a moment in which load balancers
/// notice; each is served until its turn.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_is_spread_over_its_time() {
    const CLIENTS: u64 = 200;
    let limit = Duration::from_secs(9);
    let replica = replica(options()).await;
    let mut clients = Vec::new();
    for user in 1..=CLIENTS {
        clients.push(replica.client(user).await);
    }
    let begun = Instant::now();
    let drain = tokio::spawn({
        let gateway = replica.gateway.clone();
        async move { gateway.drain(limit).await }
    });
    let moved = clients.into_iter().map(|mut client| {
        tokio::spawn(async move {
            let mut answered = Duration::ZERO;
            for id in 0.. {
                // A client whose turn it is may not get this one out any more.
                let asked = Message::text(format!("42/realtime,{id}[\"heartbeat\"]"));
                client.socket.send(asked).await.ok();
                match client.next().await {
                    Got::Ack(..) => answered = begun.elapsed(),
                    Got::Closed => break,
                    other => panic!("{other:?}"),
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            (answered, begun.elapsed())
        })
    });
    let mut times = Vec::new();
    for one in moved.collect::<Vec<_>>() {
        times.push(one.await.expect("no panic"));
    }
    drain.await.expect("no panic");
    times.sort_by_key(|(_, moved)| *moved);
    let notice = Duration::from_secs(1);
    assert!(times[0].1 >= notice, "the first was moved after {:?}", times[0].1);
    let last = times.last().expect("many").1;
    assert!(last < limit, "the last was moved after {last:?}");
    // Evenly over two thirds of the limit: no second has much more than its share, which is a sixth.
    for second in 0..limit.as_secs() {
        let (from, to) = (Duration::from_secs(second), Duration::from_secs(second + 1));
        let share = times.iter().filter(|(_, moved)| (from..to).contains(moved)).count();
        assert!(share < 90, "{share} of {CLIENTS} in second {second}");
    }
    let late = times.iter().filter(|(_, moved)| *moved > notice + limit / 3).count();
    assert!(late > 50, "only {late} of {CLIENTS} were moved in the second half");
    for (answered, moved) in &times {
        assert!(*moved - *answered < Duration::from_secs(3), "served until {answered:?}, moved at {moved:?}");
    }
}

/// The path to Redis is cut for a moment, and meanwhile a lock ends elsewhere. Its owner is told all the same when the
/// path is back, although the message went by while nobody listened.
#[tokio::test(flavor = "multi_thread")]
async fn what_happened_to_a_lock_while_nobody_listened_is_told_afterwards() {
    let server = crate::support::node::Node::server(&[]).await;
    let path = Proxy::to(std::net::SocketAddr::from(([127, 0, 0, 1], server.port))).await;
    let ledger = redis_ledger(format!("redis://{}", path.address()), Duration::from_secs(1));
    let elsewhere = redis_ledger(format!("redis://127.0.0.1:{}", server.port), Duration::from_secs(5));
    let replica = replica_on(ledger, options()).await;
    let mut owner = replica.client(1).await;
    let mut idle = replica.client(2).await;
    let mut ids = Vec::new();
    for wanted in [lock(1, 1, 2), lock(1, 2, 3)] {
        let granted = owner.ask("lock-tickets", &wanted).await;
        ids.push(granted["lockId"].as_str().expect("granted").parse::<seatlock::domain::LockId>().expect("an id"));
    }
    path.set(Path::Cut);
    let by = Releaser::Orders { user: Some(user(1)) };
    elsewhere.release(ids[0], by).await.expect("an answer");
    path.set(Path::Open);
    let told = owner.expect("lock-released").await;
    assert_eq!(
        told,
        json!({"lockId": ids[0].to_string(), "eventId": 1, "categoryId": 1, "quantity": 2, "reason": "released"})
    );
    let left = owner.ask("get-my-locks", &Value::Null).await;
    assert_eq!(left["locks"].as_array().map(Vec::len), Some(1), "{left}");
    assert_eq!(idle.within(Duration::from_millis(200)).await, []);
}

/// A replica that is full takes nobody in until somebody goes.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_full() {
    let replica = replica(GatewayOptions { sockets_max: 2, ..options() }).await;
    let first = replica.client(1).await;
    let mut second = replica.client(2).await;
    let refused = replica.raw("").await.refusal(&json!({ "token": token(3) })).await;
    assert_eq!(refused, "too_many_connections");
    assert!(is_instant(&second.ask("heartbeat", &json!({})).await["timestamp"]));
    first.leave().await;
    eventually("a place is free", async || replica.gateway.counts() == (1, 1)).await;
    replica.client(3).await;
}

/// A replica is cut off from Redis in each way in which paths break, and meanwhile something changes. When the path is
/// back its room is right within five seconds (and what a busy machine adds), without its clients doing anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_room_is_right_again_after_its_replica_was_cut_off() {
    let server = crate::support::node::Node::server(&[]).await;
    let path = Proxy::to(std::net::SocketAddr::from(([127, 0, 0, 1], server.port))).await;
    let ledger = redis_ledger(format!("redis://{}", path.address()), Duration::from_secs(1));
    let elsewhere = redis_ledger(format!("redis://127.0.0.1:{}", server.port), Duration::from_secs(5));
    let replica = replica_on(ledger, options()).await;
    let mut watcher = replica.client(1).await;
    let joined = watcher.ask("join-event-room", &json!({ "eventId": 1 })).await;
    assert_eq!(joined["success"], true, "{joined}");
    let broken = [Path::Cut, Path::Frozen, Path::OnlyUp, Path::OnlyDown];
    for (buyer, broken) in (100..).zip(broken) {
        path.set(broken);
        // Longer than any call to Redis may take, and than a subscription may be silent.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let wanted = LockRequest {
            stock_age_max: Duration::from_hours(1),
            ..crate::support::ledger::request(event(1), 2, buyer, 5)
        };
        let granted = elsewhere.lock(&wanted).await.expect("an answer");
        assert!(matches!(granted, LockOutcome::Granted(_)), "{granted:?}");
        path.set(Path::Open);
        let healed = Instant::now();
        let left = 50 - 5 * (buyer - 99);
        while watcher.expect("availability-update").await["availableTickets"] != left {}
        crate::support::say(&format!("{broken:?}: the room is right after {:.2} s", healed.elapsed().as_secs_f64()));
        assert!(healed.elapsed() < Duration::from_secs(8), "{broken:?}: {:?}", healed.elapsed());
    }
}
