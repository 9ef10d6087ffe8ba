//! The exact texts on the wire, both ways.

use super::*;
use crate::domain::LockStatus;

const T: Instant = Instant::from_ms(1_795_360_000_250);
const T_TEXT: &str = "2026-11-22T15:06:40.250Z";

fn event() -> EventId {
    EventId::new(12).unwrap()
}

fn category() -> CategoryId {
    CategoryId::new(3).unwrap()
}

fn user() -> UserId {
    UserId::new(7).unwrap()
}

fn tickets(n: u64) -> Quantity {
    Quantity::new(n).unwrap()
}

fn lock_id() -> LockId {
    LockId::from_random(event(), 0)
}

const LOCK_TEXT: &str = "00000000-0000-8600-8000-000000000000";

fn lock() -> Lock {
    Lock {
        id: lock_id(),
        user: user(),
        category: category(),
        quantity: tickets(2),
        created_at: T,
        deadline: Instant::from_ms(T.as_ms() + 300_000),
        status: LockStatus::Active,
        version: None,
        session: Some(SessionId::from_u128(0xab)),
        order: None,
        pinned: false,
    }
}

const LOCK_JSON: &str = r#"{"lockId":"00000000-0000-8600-8000-000000000000","eventId":12,"categoryId":3,"quantity":2,"userId":7,"createdAt":"2026-11-22T15:06:40.250Z","expiresAt":"2026-11-22T15:11:40.250Z","status":"active","sessionId":"000000000000000000000000000000ab"}"#;

fn counts() -> Availability {
    Availability {
        event: event(),
        category: category(),
        total: 50,
        stock: 20,
        active: 4,
        settling: 2,
        open: true,
        version: 9,
        at: T,
    }
}

const COUNTS_JSON: &str = r#"{"eventId":12,"categoryId":3,"availableTickets":14,"lockedTickets":6,"totalTickets":50,"timestamp":"2026-11-22T15:06:40.250Z","status":"available","version":9}"#;

const IDS: &str = "must be an integer between 1 and 9007199254740991";

fn ask(name: Name, data: &str) -> Result<Request, (Code, String)> {
    let data = RawValue::from_string(data.to_owned()).unwrap();
    read(name, Some(&data), user(), 10).1.map_err(|refusal| (refusal.code, refusal.message.into_owned()))
}

#[test]
fn instants_are_iso_with_milliseconds_in_utc() {
    assert_eq!(iso(T), T_TEXT);
    assert_eq!(iso(Instant::from_ms(0)), "1970-01-01T00:00:00.000Z");
    assert_eq!(iso(Instant::from_ms(u64::MAX)), "1970-01-01T00:00:00.000Z", "no such day");
}

#[test]
fn every_name_is_read_back() {
    for name in Name::ALL {
        assert_eq!(Name::parse(name.as_str()), Some(name));
    }
    for text in ["", "lock", "lock-tickets-response", "LOCK-TICKETS", "connected"] {
        assert_eq!(Name::parse(text), None, "{text}");
    }
}

#[test]
fn a_message_is_split_into_its_name_and_its_first_argument() {
    let parts =
        |text: &str| split(text).map(|(name, data)| (name.into_owned(), data.map(|data| data.get().to_owned())));
    let named = |name: &str, data: Option<&str>| Some((name.to_owned(), data.map(str::to_owned)));
    assert_eq!(parts(r#"["heartbeat"]"#), named("heartbeat", None));
    assert_eq!(parts(r#"["a",{"b":1},2,[3]]"#), named("a", Some(r#"{"b":1}"#)));
    assert_eq!(parts(r#"["a\n",null]"#), named("a\n", Some("null")));
    for text in ["", "[]", "{}", "[1]", r#"["a""#, r#"["a",]"#, r#"["a"] x"#, "\"a\"", "[\"a\",{\"b\":}]"] {
        assert_eq!(parts(text), None, "{text}");
    }
}

#[test]
fn requests_are_read() {
    assert_eq!(ask(Name::Join, r#"{"eventId":12,"userId":7,"more":[1]}"#), Ok(Request::Join(event())));
    assert_eq!(ask(Name::Leave, r#"{"eventId":12,"userId":null}"#), Ok(Request::Leave(event())));
    let wanted = |request: Option<&str>| Request::Lock {
        event: event(),
        category: category(),
        quantity: tickets(2),
        request: request.map(|id| id.parse().unwrap()),
    };
    assert_eq!(ask(Name::Lock, r#"{"eventId":12,"categoryId":3,"quantity":2}"#), Ok(wanted(None)));
    let named = r#"{"eventId":12,"categoryId":3,"quantity":2,"requestId":"r-1","userId":"7"}"#;
    assert_eq!(ask(Name::Lock, named), Ok(wanted(Some("r-1"))));
    let by_category = r#"{"eventId":12,"categoryId":3,"quantity":99}"#;
    assert_eq!(ask(Name::Unlock, by_category), Ok(Request::UnlockCategory(event(), category())));
    let by_id = format!(r#"{{"lockId":"{LOCK_TEXT}","eventId":1}}"#);
    assert_eq!(ask(Name::Unlock, &by_id), Ok(Request::UnlockLock(lock_id())));
    assert_eq!(ask(Name::Refresh, r#"{"token":"t"}"#), Ok(Request::Refresh("t".to_owned())));
    assert_eq!(ask(Name::MyLocks, "7"), Ok(Request::MyLocks));
    assert_eq!(read(Name::Heartbeat, None, user(), 10).1, Ok(Request::Heartbeat));
}

#[test]
fn what_is_wrong_with_a_request_is_said() {
    let invalid = |name: Name, data: &str| match ask(name, data) {
        Err((Code::InvalidRequest, message)) => message,
        other => panic!("{data}: {other:?}"),
    };
    for data in ["null", "7", "\"x\"", "[]", "[{}]"] {
        assert_eq!(invalid(Name::Lock, data), "The data of a request must be an object");
    }
    for id in ["0", "-1", "1.5", "\"12\"", "9007199254740992", "1e30", "true", "null", "[]"] {
        assert_eq!(invalid(Name::Join, &format!(r#"{{"eventId":{id}}}"#)), format!("eventId {IDS}"));
    }
    assert_eq!(invalid(Name::Lock, r#"{"eventId":12,"quantity":1}"#), format!("categoryId {IDS}"));
    for quantity in ["0", "-2", "2.5", "\"2\"", "null", "1e30"] {
        let data = format!(r#"{{"eventId":12,"categoryId":3,"quantity":{quantity}}}"#);
        assert_eq!(invalid(Name::Lock, &data), "quantity must be an integer between 1 and 10");
    }
    for request in ["\"\"", "\"a b\"", "7"] {
        let data = format!(r#"{{"eventId":12,"categoryId":3,"quantity":1,"requestId":{request}}}"#);
        assert!(invalid(Name::Lock, &data).starts_with("requestId must be "), "{data}");
    }
    assert_eq!(invalid(Name::Unlock, r#"{"lockId":7}"#), "lockId must be a text");
    assert_eq!(invalid(Name::Refresh, "{}"), "token must be a text");
}

#[test]
fn some_wrong_requests_have_codes_of_their_own() {
    let many = r#"{"eventId":12,"categoryId":3,"quantity":11}"#;
    let message = "You cannot lock more than 10 tickets at once".to_owned();
    assert_eq!(ask(Name::Lock, many), Err((Code::LimitExceeded, message)));
    for other in ["8", "\"8\"", "\"x\"", "7.5", "{}", "true"] {
        let data = format!(r#"{{"eventId":12,"categoryId":3,"quantity":1,"userId":{other}}}"#);
        assert_eq!(ask(Name::Lock, &data), Err((Code::Unauthorized, "Unauthorized".to_owned())), "{data}");
    }
    for id in ["", "x", "3fa85f64-5717-4562-b3fc-2c963f66afa6"] {
        let data = format!(r#"{{"lockId":"{id}"}}"#);
        assert_eq!(ask(Name::Unlock, &data), Err((Code::LockNotFound, "No tickets found to unlock".to_owned())));
    }
}

#[test]
fn a_refused_lock_says_what_it_was_about_as_far_as_it_could_be_read() {
    let data = RawValue::from_string(r#"{"eventId":12,"categoryId":"x","requestId":"r-1"}"#.to_owned()).unwrap();
    let (about, request) = read(Name::Lock, Some(&data), user(), 10);
    assert_eq!(
        refused(&request.unwrap_err(), &about).get(),
        r#"{"success":false,"code":"invalid_request","message":"categoryId must be an integer between 1 and 9007199254740991","eventId":12,"requestId":"r-1"}"#
    );
}

#[test]
fn answers_are_written_as_the_contract_says() {
    let grant = Grant { lock: lock_id(), deadline: T, available: 5, version: 9, now: T };
    let request = "r-1".parse().unwrap();
    for (json, expected) in [
        (
            granted(&grant, category(), tickets(2), Some(&request)),
            format!(
                r#"{{"success":true,"lockId":"{LOCK_TEXT}","expiresAt":"{T_TEXT}","availableTickets":5,"eventId":12,"categoryId":3,"quantity":2,"serverTime":"{T_TEXT}","requestId":"r-1"}}"#
            ),
        ),
        (
            granted(&grant, category(), tickets(2), None),
            format!(
                r#"{{"success":true,"lockId":"{LOCK_TEXT}","expiresAt":"{T_TEXT}","availableTickets":5,"eventId":12,"categoryId":3,"quantity":2,"serverTime":"{T_TEXT}"}}"#
            ),
        ),
        (
            granted(&grant, category(), tickets(2), Some(&r#"a"\b"#.parse().unwrap())),
            format!(
                r#"{{"success":true,"lockId":"{LOCK_TEXT}","expiresAt":"{T_TEXT}","availableTickets":5,"eventId":12,"categoryId":3,"quantity":2,"serverTime":"{T_TEXT}","requestId":"a\"\\b"}}"#
            ),
        ),
        (
            connected(SessionId::from_u128(0xab), user(), T, &[lock()]),
            format!(
                r#"{{"success":true,"sessionId":"000000000000000000000000000000ab","message":"Connected to the realtime service","userId":7,"serverTime":"{T_TEXT}","locks":[{LOCK_JSON}]}}"#
            ),
        ),
        (
            joined(event(), &[counts()], &[lock()]),
            format!(
                r#"{{"success":true,"eventId":12,"message":"Joined the room of event 12","availability":[{COUNTS_JSON}],"locks":[{LOCK_JSON}]}}"#
            ),
        ),
        (left(event()), r#"{"success":true,"eventId":12,"message":"Left the room of event 12"}"#.to_owned()),
        (
            unlocked(lock_id()),
            format!(r#"{{"success":true,"message":"Tickets unlocked successfully","lockId":"{LOCK_TEXT}"}}"#),
        ),
        (my_locks(&[lock()]), format!(r#"{{"locks":[{LOCK_JSON}]}}"#)),
        (my_locks(&[]), r#"{"locks":[]}"#.to_owned()),
        (heartbeat(T), format!(r#"{{"timestamp":"{T_TEXT}"}}"#)),
        (refreshed(T), format!(r#"{{"success":true,"expiresAt":"{T_TEXT}"}}"#)),
        (availability(&counts()), COUNTS_JSON.to_owned()),
    ] {
        assert_eq!(json.get(), expected);
        assert_eq!(serde_json::to_string(&json).expect("JSON in JSON"), expected);
    }
}

#[test]
fn refusals_are_written_as_the_contract_says() {
    let about = About { event: Some(event()), category: Some(category()), request: Some("r-1".parse().unwrap()) };
    for (refusal, about, expected) in [
        (
            Refusal::short(Code::InsufficientTickets, 3),
            &about,
            r#"{"success":false,"code":"insufficient_tickets","message":"Only 3 tickets available","availableTickets":3,"eventId":12,"categoryId":3,"requestId":"r-1"}"#,
        ),
        (
            Refusal::short(Code::SoldOut, 0),
            &About::default(),
            r#"{"success":false,"code":"sold_out","message":"Only 0 tickets available","availableTickets":0}"#,
        ),
        (
            Refusal::later(Duration::from_micros(70_001)),
            &About::default(),
            r#"{"success":false,"code":"rate_limited","message":"Too many requests. Please try again in a moment.","retryAfterMs":71}"#,
        ),
        (
            Refusal::new(Code::Unauthorized),
            &About::default(),
            r#"{"success":false,"code":"unauthorized","message":"Unauthorized"}"#,
        ),
    ] {
        assert_eq!(refused(&refusal, about).get(), expected);
    }
}

#[test]
fn the_words_of_the_contract_are_kept() {
    let words = |code: Code| (code.as_str(), Refusal::new(code).message.into_owned());
    for (code, word, text) in [
        (Code::Unauthorized, "unauthorized", "Unauthorized"),
        (Code::AlreadyLocked, "already_locked", "You already have tickets locked for this category"),
        (Code::CategoryNotFound, "category_not_found", "Ticket category not found"),
        (Code::InventoryUnavailable, "inventory_unavailable", "Failed to verify ticket availability"),
        (Code::LockNotFound, "lock_not_found", "No tickets found to unlock"),
    ] {
        assert_eq!(words(code), (word, text.to_owned()));
    }
    for (code, word) in [
        (Code::InvalidRequest, "invalid_request"),
        (Code::EventNotFound, "event_not_found"),
        (Code::EventClosed, "event_closed"),
        (Code::InsufficientTickets, "insufficient_tickets"),
        (Code::SoldOut, "sold_out"),
        (Code::LimitExceeded, "limit_exceeded"),
        (Code::RateLimited, "rate_limited"),
        (Code::Unavailable, "unavailable"),
        (Code::TokenExpired, "token_expired"),
    ] {
        assert_eq!(code.as_str(), word);
    }
}

#[test]
fn news_are_written_as_the_contract_says() {
    assert_eq!(moved(event(), category(), 5, None).get(), r#"{"eventId":12,"categoryId":3,"quantity":5}"#);
    for (reason, word) in [
        (ReleaseReason::Released, "released"),
        (ReleaseReason::Expired, "expired"),
        (ReleaseReason::Abandoned, "abandoned"),
        (ReleaseReason::Cancelled, "cancelled"),
    ] {
        assert_eq!(
            moved(event(), category(), 5, Some(reason)).get(),
            format!(r#"{{"eventId":12,"categoryId":3,"quantity":5,"reason":"{word}"}}"#)
        );
    }
    let told = |message: Personal| {
        let (name, json) = personal(&message).expect("for clients");
        format!("{name} {}", json.get())
    };
    let (lock, category, quantity) = (lock_id(), category(), tickets(2));
    assert_eq!(
        told(Personal::Expired { lock, category, quantity }),
        format!(r#"lock-expired {{"lockId":"{LOCK_TEXT}","eventId":12,"categoryId":3,"quantity":2}}"#)
    );
    assert_eq!(
        told(Personal::Expiring { lock, deadline: T, remaining: Duration::from_micros(59_999_900) }),
        format!(r#"lock-expiring {{"lockId":"{LOCK_TEXT}","expiresAt":"{T_TEXT}","remainingMs":59999}}"#)
    );
    assert!(personal(&Personal::Pinned { lock, deadline: T }).is_none());
    assert!(personal(&Personal::Confirmed { lock, order: None }).is_none());
    let reason = ReleaseReason::Released;
    assert_eq!(
        told(Personal::Released { lock, category, quantity, reason, by: Some(SessionId::from_u128(1)) }),
        format!(
            r#"lock-released {{"lockId":"{LOCK_TEXT}","eventId":12,"categoryId":3,"quantity":2,"reason":"released"}}"#
        )
    );
}

#[test]
fn order_ids_keep_the_form_in_which_they_came() {
    let told = |result, order: &str, order_is_number| {
        let order = order.parse().unwrap();
        let (name, json) = personal(&Personal::Order {
            result,
            order,
            order_is_number,
            event: event(),
            category: category(),
            quantity: tickets(2),
        })
        .expect("for clients");
        format!("{name} {}", json.get())
    };
    assert_eq!(
        told(OrderResult::Completed, "55", true),
        r#"order-completed {"orderId":55,"eventId":12,"categoryId":3,"quantity":2,"message":"Your order has been completed successfully"}"#
    );
    assert_eq!(
        told(OrderResult::Cancelled, "55", false),
        r#"order-cancelled {"orderId":"55","eventId":12,"categoryId":3,"quantity":2,"message":"Your order has been cancelled"}"#
    );
    assert!(told(OrderResult::Completed, "o-1", true).contains(r#""orderId":"o-1""#), "not a number after all");
}
