//! Forged, borrowed and narrowed tokens.

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};

use super::{House, seconds_from_now, sign};
use crate::support::gateway::{Got, Raw, options, replica};

fn ask(event: u64) -> Value {
    json!({ "eventId": event, "categoryId": 1, "quantity": 1 })
}

/// A token that names its events joins and locks those and no others, with the documented refusal; a renewal widens or
/// narrows it from then on, and the rooms that it no longer names are left, with a message for each.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_opens_the_events_it_names() {
    let replica = replica(options()).await;
    let mut client = replica.raw("").await;
    client.connect(&json!({ "token": sign(&json!({ "sub": "7", "events": [10, "11"] })) })).await;
    client.expect("connected").await;
    let refused = json!("unauthorized");
    for (event, code) in [(10, &Value::Null), (11, &Value::Null), (12, &refused), (1, &refused)] {
        let joined = client.ask("join-event-room", &json!({ "eventId": event })).await;
        assert_eq!(&joined["code"], code, "{event}: {joined}");
        let locked = client.ask("lock-tickets", &ask(event)).await;
        assert_eq!(&locked["code"], code, "{event}: {locked}");
        if code == &refused {
            assert_eq!(
                joined,
                json!({"success": false, "code": refused, "eventId": event,
                "message": "Unauthorized for this event"})
            );
            assert_eq!(locked["message"], "Unauthorized for this event");
        }
    }
    // What is one's own can be seen and given back, whatever the token is for.
    let narrowed = sign(&json!({ "sub": "7", "events": [12] }));
    client.emit("refresh-token", &json!({ "token": narrowed })).await;
    let mut left = Vec::new();
    while left.len() < 2 {
        left.push(client.expect("left-event-room").await["eventId"].as_u64());
    }
    left.sort_unstable();
    assert_eq!(left, [Some(10), Some(11)]);
    assert_eq!(client.expect("refresh-token-response").await["success"], true);
    assert_eq!(client.ask("lock-tickets", &ask(10)).await["code"], refused);
    assert_eq!(client.ask("lock-tickets", &ask(12)).await["success"], true);
    assert_eq!(client.ask("get-my-locks", &Value::Null).await["locks"].as_array().map(Vec::len), Some(3));
    assert_eq!(client.ask("unlock-tickets", &ask(10)).await["success"], true);
    // The room's news go to those who watch it, and no longer to somebody who may not.
    let mut watcher = replica.client(9).await;
    watcher.ask("join-event-room", &json!({ "eventId": 11 })).await;
    // A joiner is in the room behind its answer, and before the next one.
    watcher.ask("heartbeat", &Value::Null).await;
    replica.grant(11, 1, 8, 1).await;
    watcher.expect("tickets-locked-by-other-user").await;
    client.emit("heartbeat", &json!({})).await;
    loop {
        let got = client.next().await;
        if matches!(&got, Got::Event(name, _) if name == "heartbeat-response") {
            break;
        }
        assert!(!format!("{got:?}").contains("by-other-user"), "{got:?}");
    }

    let mut closed = replica.raw("").await;
    closed.connect(&json!({ "token": sign(&json!({ "sub": "8", "events": [] })) })).await;
    closed.expect("connected").await;
    assert_eq!(closed.ask("join-event-room", &json!({ "eventId": 10 })).await["code"], refused);
    // A renewal that cannot be read changes nothing; one without the claim is for any event.
    let unreadable = sign(&json!({ "sub": "8", "events": "all" }));
    assert_eq!(closed.ask("refresh-token", &json!({ "token": unreadable })).await["code"], refused);
    assert_eq!(closed.ask("join-event-room", &json!({ "eventId": 10 })).await["code"], refused);
    let wide = sign(&json!({ "sub": "8" }));
    assert_eq!(closed.ask("refresh-token", &json!({ "token": wide })).await["success"], true);
    assert_eq!(closed.ask("join-event-room", &json!({ "eventId": 10 })).await["success"], true);
}

fn openssl(args: &[&str], input: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    use std::process::{Command, Stdio};
    let mut command = Command::new("openssl");
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().expect("openssl is installed (tests/run installs it)");
    child.stdin.take().expect("piped").write_all(input).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "openssl {args:?}");
    output.stdout
}

/// Tokens that are forged, confused in their algorithm, not for us, not yet or no longer good: each is refused with the
/// contract's word by the handshake and by a renewal, the good one is taken, and no log line at the finest level has any
/// of them, or anything that they were signed with.
#[tokio::test(flavor = "multi_thread")]
async fn bad_tokens_get_their_words_and_are_not_logged() {
    let rsa = || openssl(&["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"], b"");
    let (private, stranger) = (rsa(), rsa());
    let public = openssl(&["pkey", "-pubout"], &private);
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), &public).expect("our file");
    let house = House::keyed(&[
        ("SEATLOCK_JWT_PUBLIC_KEY_FILE", file.path().to_str().expect("a text")),
        ("SEATLOCK_JWT_AUDIENCE", "tickets"),
        ("SEATLOCK_JWT_ISSUER", "shop"),
        ("SEATLOCK_TOKEN_GRACE", "1s"),
        ("SEATLOCK_LOG", "trace"),
    ]);
    let claims = |change: Value| {
        let mut claims = json!({"sub": "7", "iss": "shop", "aud": "tickets", "exp": seconds_from_now(60)});
        claims.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        claims
    };
    let signed = |algorithm: Algorithm, key: &EncodingKey, change: Value| {
        encode(&Header::new(algorithm), &claims(change), key).expect("a token")
    };
    let own = EncodingKey::from_rsa_pem(&private).expect("a key");
    let foreign = EncodingKey::from_rsa_pem(&stranger).expect("a key");
    let good = signed(Algorithm::RS256, &own, json!({}));
    let parts: Vec<&str> = good.split('.').collect();
    let none = "eyJhbGciOiJub25lIn0";
    let tokens = [
        (good.clone(), None),
        (signed(Algorithm::PS256, &own, json!({"sub": 7})), None),
        (signed(Algorithm::RS256, &foreign, json!({})), Some("unauthorized")),
        // The public key as the secret of an HMAC: whoever has read it could sign.
        (signed(Algorithm::HS256, &EncodingKey::from_secret(&public), json!({})), Some("unauthorized")),
        (signed(Algorithm::HS256, &EncodingKey::from_secret(b""), json!({})), Some("unauthorized")),
        (format!("{none}.{}.", parts[1]), Some("unauthorized")),
        (format!("{none}.{}.{}", parts[1], parts[2]), Some("unauthorized")),
        (format!("{}.{}.", parts[0], parts[1]), Some("unauthorized")),
        (format!("{}.{}", parts[0], parts[1]), Some("unauthorized")),
        (format!("{}.{}A.{}", parts[0], parts[1], parts[2]), Some("unauthorized")),
        (signed(Algorithm::RS256, &own, json!({"aud": "other"})), Some("unauthorized")),
        (signed(Algorithm::RS256, &own, json!({"aud": null})), Some("unauthorized")),
        (signed(Algorithm::RS256, &own, json!({"iss": "other"})), Some("unauthorized")),
        (signed(Algorithm::RS256, &own, json!({"exp": null})), Some("unauthorized")),
        (signed(Algorithm::RS256, &own, json!({"nbf": seconds_from_now(60)})), Some("unauthorized")),
        (signed(Algorithm::RS256, &own, json!({"exp": seconds_from_now(-60)})), Some("token_expired")),
        (signed(Algorithm::RS256, &own, json!({"sub": "0"})), Some("unauthorized")),
    ];
    let mut renewing = Raw::open(house.address, "", None).await.expect("a WebSocket");
    renewing.connect(&json!({ "token": good })).await;
    for (token, refused) in &tokens {
        let mut raw = Raw::open(house.address, "", None).await.expect("a WebSocket");
        match refused {
            None => raw.connect(&json!({ "token": token })).await,
            Some(word) => assert_eq!(raw.refusal(&json!({ "token": token })).await, *word, "{token}"),
        }
        let renewed = renewing.ask("refresh-token", &json!({ "token": token })).await;
        assert_eq!(renewed["code"].as_str(), *refused, "{token}: {renewed}");
    }
    // Somebody else's good token does not turn this connection into theirs.
    let theirs = signed(Algorithm::RS256, &own, json!({"sub": "8"}));
    assert_eq!(renewing.ask("refresh-token", &json!({ "token": theirs })).await["code"], "unauthorized");
    let mismatch = Raw::open(house.address, "userId=8", None).await;
    assert_eq!(mismatch.expect("a WebSocket").refusal(&json!({ "token": good })).await, "user_mismatch");
    // One in the query is in every access log of the world, and still not in ours.
    let mut asked = Raw::open(house.address, &format!("token={good}"), None).await.expect("a WebSocket");
    asked.connect(&json!({})).await;
    let log = house.service.log().join("\n");
    assert!(log.len() > 1_000, "it logs: {log}");
    for (token, _) in &tokens {
        let signature = token.rsplit('.').next().filter(|signature| signature.len() > 20).unwrap_or(token);
        assert!(!log.contains(signature), "{signature} is logged");
    }
}
