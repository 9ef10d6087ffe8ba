//! The captured bytes of real NestJS peers (majors 10 and 11), and what no capture shows.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use serde::Deserialize;
use serde_json::json;

use super::*;
use crate::domain::{LockStatus, SessionId};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Vector {
    name: String,
    #[serde(rename = "nest_major")]
    major: u8,
    direction: String,
    properties: Value,
    body: String,
    expect: String,
}

/// Of the four directions, three are ours: a client's requests are decoded, and what a server answers to a peer is
/// produced. `service-to-client` is what a Nest *client* makes of replies; that is the business of whoever asks a
/// NestJS service over RabbitMQ, not of this service's own queue.
fn vectors(direction: &str) -> Vec<Vector> {
    let all: Vec<Vector> =
        serde_json::from_str(include_str!("../../../tests/vectors/nestjs-rmq.json")).expect("the vectors are JSON");
    all.into_iter().filter(|vector| vector.direction == direction).collect()
}

fn raw(json: &str) -> Box<RawValue> {
    RawValue::from_string(json.to_owned()).expect("JSON")
}

/// Splits `<json> rest` after the JSON.
fn json_then(text: &str) -> (&str, &str) {
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<&RawValue>();
    let value = stream.next().expect("a value").expect("JSON").get();
    (value, &text[stream.byte_offset()..])
}

#[test]
fn every_message_of_a_nest_client_is_read_as_what_it_is() {
    let vectors = vectors("client-to-service");
    assert_eq!(vectors.len(), 70);
    for vector in vectors {
        let name = format!("{} (Nest {})", vector.name, vector.major);
        let packet = Packet::decode(&vector.body).expect(&name);
        let (kind, rest) = vector.expect.split_once(" pattern=").expect(&name);
        let (pattern, rest) = json_then(rest);
        assert_eq!(packet.pattern, normal_form(pattern), "{name}");
        let rest = rest.strip_prefix(" data=").expect(&name);
        let rest = if let Some(rest) = rest.strip_prefix("absent") {
            assert!(packet.data.is_none(), "{name}");
            rest
        } else {
            let (data, rest) = json_then(rest);
            assert_eq!(packet.data.map(RawValue::get), Some(data), "{name}");
            rest
        };
        match kind {
            "request" => {
                let id = json_then(rest.strip_prefix(" id=").expect(&name)).0;
                assert_eq!(packet.id.map(RawValue::get), Some(id), "{name}");
            }
            "event" => assert!(packet.id.is_none(), "{name}"),
            other => panic!("{name}: {other}"),
        }
    }
}

/// What a Nest server with these handlers did with hand-written messages: which handler ran with what, and whether it
/// replied. The replies' bytes are compared below.
#[test]
fn every_message_to_a_nest_server_reaches_the_same_handler_and_is_answered_or_not_alike() {
    let vectors = vectors("peer-to-server");
    assert_eq!(vectors.len(), 162);
    let handler = |vector: &Vector| {
        vector.expect.strip_prefix("handler ").map(|rest| normal_form(json_then(rest).0).expect("a handler"))
    };
    let handlers: BTreeSet<String> = vectors.iter().filter_map(handler).collect();
    for vector in &vectors {
        let name = format!("{} (Nest {})", vector.name, vector.major);
        let packet = Packet::decode(&vector.body);
        let found = packet.as_ref().ok().and_then(|packet| packet.pattern.clone()).filter(|it| handlers.contains(it));
        assert_eq!(found, handler(vector), "{name}");
        if found.is_some() {
            let (_, rest) = vector.expect.split_once(" data=").expect(&name);
            let data = packet.as_ref().ok().and_then(|packet| packet.data).map(RawValue::get);
            // Serialised again by the capture, so compared as values.
            let (expected, _) = rest.split_once("; ").expect(&name);
            assert_eq!(
                data.map(|data| serde_json::from_str::<Value>(data).expect(&name)),
                (expected != "undefined").then(|| serde_json::from_str(expected).expect(&name)),
                "{name}"
            );
        }
        let request = packet.is_ok_and(|packet| packet.id.is_some());
        let answered = request && vector.properties.get("replyTo").is_some();
        // The one handler whose value cannot be serialised; ours return nothing of that kind.
        let expected = vector.expect.contains("; replies: ") || vector.name.contains("BigInt");
        assert_eq!(answered, expected, "{name}");
    }
}

#[test]
fn every_reply_of_a_nest_server_that_is_of_our_kind_is_written_byte_for_byte() {
    let requests: BTreeMap<(u8, String), Vector> =
        vectors("peer-to-server").into_iter().map(|vector| ((vector.major, vector.name.clone()), vector)).collect();
    let replies = vectors("server-to-peer");
    assert_eq!(replies.len(), 134);
    let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
    for reply in &replies {
        let name = format!("{} (Nest {})", reply.name, reply.major);
        let of = reply.name.strip_prefix("reply to: ").expect(&name);
        let of = of.split(" [").next().expect(&name);
        // Properties: an empty table of headers and the correlation id of the request, if it had one.
        let properties = reply.properties.as_object().expect(&name);
        assert!(properties.keys().all(|key| key == "headers" || key == "correlationId"), "{name}");
        let body: BTreeMap<String, Box<RawValue>> = serde_json::from_str(&reply.body).expect(&name);
        let done = body.get("isDisposed").map(|raw| raw.get()) == Some("true");
        let (kind, made) = match (body.get("response"), body.get("err").map(|raw| raw.get())) {
            (Some(value), None) if done => ("value", Some(response(value))),
            (None, Some(err)) if done => match serde_json::from_str(err).expect(&name) {
                RpcError { status: Some(status), message: Some(message), others } if others.is_empty() => {
                    assert_eq!(status, "error", "{name}");
                    ("error", Some(error(&message)))
                }
                RpcError { .. } => ("an error that is not a text", None),
            },
            (None, Some(_)) => {
                let request = requests.get(&(reply.major, of.to_owned())).expect(&name);
                let packet = Packet::decode(&request.body).expect(&name);
                ("no handler", Some(no_handler(packet.id.expect(&name))))
            }
            (None, None) => ("no value", None),
            (Some(_), _) => ("a value of a stream that goes on", None),
        };
        if let Some(made) = made {
            assert_eq!(String::from_utf8(made).expect(&name), reply.body, "{name}");
        }
        *seen.entry(kind).or_default() += 1;
    }
    // No handler of ours streams, returns nothing, or fails with anything but a text.
    let expected = [
        ("a value of a stream that goes on", 12),
        ("an error that is not a text", 12),
        ("error", 24),
        ("no handler", 12),
        ("no value", 6),
        ("value", 68),
    ];
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), expected);
}

#[derive(Deserialize)]
struct RpcError {
    status: Option<String>,
    message: Option<String>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

#[test]
fn patterns_are_equal_as_nest_finds_them_equal() {
    let same = [
        (r#""a-b""#, "a-b"),
        ("7", "7"),
        ("7.0", "7"),
        (r#""7""#, "7"),
        ("7.5", "7.5"),
        (r#"{"b":1,"a":"x"}"#, r#"{"a":"x","b":1}"#),
        (r#""{\"b\":1, \"a\":\"x\"}""#, r#"{"a":"x","b":1}"#),
        (r#"{"n":{"b":[1,"z"],"a":null}}"#, r#"{"n":{"a":null,"b":{"0":1,"1":"z"}}}"#),
        (r#""true""#, "true"),
        (r#""\"get-lock\"""#, "get-lock"),
    ];
    for (json, form) in same {
        assert_eq!(normal_form(json).as_deref(), Some(form), "{json}");
    }
    assert_eq!(normal_form("null"), None);
    for pattern in Pattern::ALL {
        assert_eq!(Pattern::of(pattern.as_str()), Some(pattern));
        assert_eq!(normal_form(&Value::from(pattern.as_str()).to_string()).as_deref(), Some(pattern.as_str()));
    }
    assert_eq!(Pattern::of("get-event-by-id"), None);
}

#[test]
fn what_only_javascript_writes_is_read_too() {
    // A repeated key counts with its last value; a lone surrogate in a field that nobody reads does no harm; an integer
    // may be spelled as a fraction or a power.
    let body = r#"{"pattern":"x","data":{"userId":1,"note":"\ud83d","userId":2.0e0},"pattern":"get-user-locks","id":"\ud83d"}"#;
    let packet = Packet::decode(body).expect("a packet");
    assert_eq!(packet.pattern.as_deref(), Some("get-user-locks"));
    assert_eq!(Call::read(Pattern::GetUserLocks, packet.data), Ok(Call::Locks { user: UserId::new(2).expect("2") }));
    assert_eq!(String::from_utf8(no_handler(packet.id.expect("an id"))).expect("UTF-8").find(r#""\ud83d""#), Some(6));
    // Bytes that are not UTF-8 arrive as Node would have them.
    let body = b"{\"pattern\":\"caf\xe9\",\"data\":1}";
    assert_eq!(Packet::decode(&text(body)).expect("a packet").pattern.as_deref(), Some("caf\u{fffd}"));
}

#[test]
fn what_is_too_long_or_too_deep_is_refused_or_skipped_without_harm() {
    let long = format!(r#"{{"pattern":"x","data":"{}"}}"#, "x".repeat(BODY_BYTES_MAX));
    assert_eq!(Packet::decode(&text(long.as_bytes())).err(), Some(Undecodable::TooLong));
    let deep = format!("{}{}", "[".repeat(60_000), "]".repeat(60_000));
    let body = format!(r#"{{"pattern":"get-user-locks","data":{{"userId":7,"deep":{deep}}}}}"#);
    let packet = Packet::decode(&body).expect("a packet");
    assert_eq!(Call::read(Pattern::GetUserLocks, packet.data), Ok(Call::Locks { user: UserId::new(7).expect("7") }));
    let body = format!(r#"{{"pattern":{deep},"data":1}}"#);
    assert_eq!(Packet::decode(&body).expect("a packet").pattern.as_deref().and_then(Pattern::of), None);
}

fn read(pattern: Pattern, data: &Value) -> Result<Call, Malformed> {
    Call::read(pattern, Some(&raw(&data.to_string())))
}

const LOCK: u128 = 0x1234_5678_9abc;

fn lock_id() -> LockId {
    LockId::from_random(EventId::new(1).expect("1"), LOCK)
}

#[test]
fn the_data_of_every_pattern_is_read_into_domain_types() {
    let (user, event) = (UserId::new(123).expect("id"), EventId::new(1).expect("id"));
    let (category, quantity) = (CategoryId::new(2).expect("id"), Quantity::new(3).expect("quantity"));
    let order: OrderId = "55".parse().expect("an order id");
    let (lock, id) = (lock_id(), lock_id().to_string());
    let report = |result, lock| OrderReport { order: order.clone(), event, category, quantity, user, lock, result };
    let given = [
        (
            Pattern::ValidateUserLocks,
            json!({"userId": 123, "eventId": 1, "categoryId": 2, "quantity": 3, "more": {"a": 1}}),
            Call::Validate { user, event, category, quantity },
        ),
        (
            Pattern::ConfirmTicketLock,
            json!({"lockId": id, "orderId": 55, "userId": "ignored"}),
            Call::Confirm { lock: Some(lock), user: None, order: Some(order.clone()) },
        ),
        (
            Pattern::ConfirmTicketLock,
            json!({"lockId": "lock_1700000000_abc", "orderId": null}),
            Call::Confirm { lock: None, user: None, order: None },
        ),
        (
            Pattern::ConfirmLock,
            json!({"lockId": id, "userId": 123, "orderId": "55"}),
            Call::Confirm { lock: Some(lock), user: Some(user), order: Some(order.clone()) },
        ),
        (Pattern::ReleaseTicketLock, json!({"lockId": id}), Call::Release { lock: Some(lock), user: None }),
        (
            Pattern::ReleaseTicketLock,
            json!({"lockId": id, "userId": 123}),
            Call::Release { lock: Some(lock), user: Some(user) },
        ),
        (Pattern::GetUserLocks, json!({"userId": 123}), Call::Locks { user }),
        (Pattern::GetLock, json!({"lockId": id}), Call::Find { lock: Some(lock) }),
        (
            Pattern::OrderCompleted,
            json!({"orderId": 55, "eventId": 1, "categoryId": 2, "quantity": 3, "userId": 123, "lockId": id}),
            Call::Order { report: report(OrderResult::Completed, Some(lock)), order_is_number: true },
        ),
        (
            Pattern::OrderCancelled,
            json!({"orderId": "55", "eventId": 1, "categoryId": 2, "quantity": 3, "userId": 123, "lockId": "other"}),
            Call::Order { report: report(OrderResult::Cancelled, None), order_is_number: false },
        ),
        (Pattern::AvailabilityChanged, json!({"eventId": 1}), Call::StockChanged { event }),
        (Pattern::GetRealtimeStats, json!({}), Call::Stats),
    ];
    for (pattern, data, call) in given {
        assert_eq!(read(pattern, &data), Ok(call), "{pattern:?} {data}");
    }
    assert_eq!(Call::read(Pattern::GetRealtimeStats, None), Ok(Call::Stats));
}

#[test]
fn malformed_data_is_named_for_the_developer_who_sent_it() {
    let id = lock_id().to_string();
    let validate = |change: Value| {
        let mut data = json!({"userId": 1, "eventId": 1, "categoryId": 1, "quantity": 1});
        data.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        (Pattern::ValidateUserLocks, data)
    };
    let order = json!({"orderId": 5, "eventId": 2, "categoryId": 2, "quantity": 3, "userId": 1, "lockId": id});
    let given = [
        (validate(json!({"userId": null})), "userId is required"),
        (validate(json!({"userId": "7"})), "userId must be an integer between 1 and 9007199254740991"),
        (validate(json!({"eventId": 0})), "eventId must be an integer between 1 and 9007199254740991"),
        (validate(json!({"eventId": 1.5})), "eventId must be an integer between 1 and 9007199254740991"),
        (validate(json!({"categoryId": -1})), "categoryId must be an integer between 1 and 9007199254740991"),
        (
            validate(json!({"categoryId": 9_007_199_254_740_993_u64})),
            "categoryId must be an integer between 1 and 9007199254740991",
        ),
        (validate(json!({"quantity": 0})), "quantity must be an integer between 1 and 100000"),
        ((Pattern::GetLock, json!({})), "lockId is required"),
        ((Pattern::GetLock, json!({"lockId": 5})), "lockId must be a string"),
        ((Pattern::GetLock, json!([id])), "data must be an object"),
        ((Pattern::GetUserLocks, json!(5)), "data must be an object"),
        ((Pattern::GetUserLocks, Value::Null), "data must be an object"),
        ((Pattern::OrderCompleted, order), "lockId is a lock of another event than eventId"),
        (
            (Pattern::ConfirmTicketLock, json!({"lockId": id, "orderId": "a b"})),
            "orderId must be an integer, or 1 to 64 printable ASCII characters without spaces",
        ),
        (
            (Pattern::ConfirmTicketLock, json!({"lockId": id, "orderId": 1.5})),
            "orderId must be an integer, or 1 to 64 printable ASCII characters without spaces",
        ),
    ];
    for ((pattern, data), message) in given {
        let error = read(pattern, &data).expect_err(message);
        assert_eq!(error.to_string(), message, "{pattern:?} {data}");
    }
    assert_eq!(Call::read(Pattern::GetLock, None), Err(Malformed::NotAnObject));
}

#[test]
fn answers_have_the_contracts_shape_in_the_contracts_order() {
    let lock = Lock {
        id: lock_id(),
        user: UserId::new(123).expect("id"),
        category: CategoryId::new(2).expect("id"),
        quantity: Quantity::new(3).expect("quantity"),
        created_at: Instant::from_ms(1_795_361_107_250),
        deadline: Instant::from_ms(1_795_361_407_000),
        status: LockStatus::Active,
        version: None,
        session: Some(SessionId::from_u128(1)),
        order: None,
        pinned: false,
    };
    let id = lock_id();
    let body = format!(
        r#"{{"lockId":"{id}","eventId":1,"categoryId":2,"quantity":3,"userId":123,"createdAt":"2026-11-22T15:25:07.250Z","expiresAt":"2026-11-22T15:30:07.000Z","status":"active","sessionId":"00000000000000000000000000000001""#
    );
    let shown = |answer: &Answer| String::from_utf8(response(answer)).expect("UTF-8");
    assert_eq!(shown(&Answer::Locks(vec![lock.clone()])), format!(r#"{{"response":[{body}}}],"isDisposed":true}}"#));
    assert_eq!(shown(&Answer::Locks(vec![])), r#"{"response":[],"isDisposed":true}"#);
    let lock = Lock { version: Some(1_795_361_107_250_001), ..lock };
    assert_eq!(
        shown(&Answer::Lock(Some(lock))),
        format!(r#"{{"response":{body},"version":1795361107250001}},"isDisposed":true}}"#)
    );
    assert_eq!(shown(&Answer::Lock(None)), r#"{"response":null,"isDisposed":true}"#);
    assert_eq!(shown(&Answer::Truth(false)), r#"{"response":false,"isDisposed":true}"#);
    assert_eq!(
        shown(&Answer::Held(Held::new(id, Instant::from_ms(0)))),
        format!(
            r#"{{"response":{{"valid":true,"lockId":"{id}","expiresAt":"1970-01-01T00:00:00.000Z"}},"isDisposed":true}}"#
        )
    );
    assert_eq!(
        shown(&Answer::NotHeld(NotHeld::EXPIRED)),
        r#"{"response":{"valid":false,"message":"Ticket locks have expired. Please select tickets again.","code":"lock_not_found"},"isDisposed":true}"#
    );
    assert_eq!(iso(Instant::from_ms(u64::MAX)).len(), "+262142-12-31T23:59:59.999Z".len());
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let text = text(&body);
        if let Ok(packet) = Packet::decode(&text) {
            for pattern in Pattern::ALL {
                let _ = Call::read(pattern, packet.data);
            }
        }
    }

    #[test]
    fn no_json_makes_the_decoder_panic_and_every_reply_to_it_is_json(
        pattern in json_text(), data in json_text(), id in json_text()
    ) {
        let body = format!(r#"{{"pattern":{pattern},"data":{data},"id":{id}}}"#);
        let packet = Packet::decode(&body).expect("a packet");
        for pattern in Pattern::ALL {
            if let Err(malformed) = Call::read(pattern, packet.data) {
                prop_assert!(serde_json::from_slice::<Value>(&error(&malformed.to_string())).is_ok());
            }
        }
        let reply: Value = serde_json::from_slice(&no_handler(packet.id.expect("an id"))).expect("JSON");
        prop_assert_eq!(&reply["id"], &serde_json::from_str::<Value>(&id).expect("JSON"));
    }

    #[test]
    fn every_integer_is_an_id_or_refused_by_the_same_bounds(value in any::<i64>()) {
        let read = read(Pattern::AvailabilityChanged, &json!({ "eventId": value }));
        let fits = (1..=9_007_199_254_740_991).contains(&value);
        prop_assert_eq!(read.is_ok(), fits);
    }
}

/// JSON whose objects often have the names that are looked for.
fn json_text() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        "[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}".prop_map(Value::from),
    ];
    let names = prop::sample::select(vec!["lockId", "userId", "eventId", "categoryId", "quantity", "orderId", "x"]);
    leaf.prop_recursive(3, 24, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(names.clone().prop_map(str::to_owned), inner, 0..7)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
    .prop_map(|value| value.to_string())
}
