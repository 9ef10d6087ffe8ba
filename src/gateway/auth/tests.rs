//! Tokens good and bad, against each kind of key. The keys are made by `openssl`, as an operator would.

mod fetched;
mod openssl;

use std::io::Write;
use std::sync::{Mutex, PoisonError};

use jsonwebtoken::crypto::sign;

use super::*;
use openssl::Pair;

/// Long enough to be no reason for a warning.
const SECRET: &[u8] = b"a secret of the tests, 32 bytes or more";

/// An instant after every test key was made; all times below are relative to it.
const NOW: u64 = 1_800_000_000;

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn verifier(keys: KeySource) -> TokenVerifier {
    TokenVerifier::new(VerifierOptions { keys, issuer: None, audience: None, events_claim: None }).unwrap()
}

fn by_secret() -> TokenVerifier {
    verifier(KeySource::Secret(SECRET.to_vec()))
}

fn by_pem(pair: &Pair) -> TokenVerifier {
    verifier(KeySource::PublicKeyPem(pair.public_pem.clone()))
}

fn secret_key() -> EncodingKey {
    EncodingKey::from_secret(SECRET)
}

/// Claims that are good at `NOW`.
fn good() -> Value {
    json!({ "sub": "42", "exp": NOW + 60 })
}

fn token(algorithm: Algorithm, key: &EncodingKey, claims: &Value) -> String {
    encode(&Header::new(algorithm), claims, key).unwrap()
}

/// What `verifier` says at `NOW` to a token with these claims, signed as it should be.
async fn judged(verifier: &TokenVerifier, claims: Value) -> Result<Claims, TokenError> {
    verifier.verify_at(&token(Algorithm::HS256, &secret_key(), &claims), at(NOW)).await
}

fn unauthorized<T>(reason: Reason) -> Result<T, TokenError> {
    Err(TokenError::Unauthorized(reason))
}

#[tokio::test]
async fn a_good_token_names_its_user_and_its_expiry() {
    let expected = Claims { user: UserId::new(42).unwrap(), expires_at: at(NOW + 60), scope: Scope::Any };
    for algorithm in [Algorithm::HS256, Algorithm::HS384, Algorithm::HS512] {
        let token = token(algorithm, &secret_key(), &good());
        assert_eq!(by_secret().verify_at(&token, at(NOW)).await, Ok(expected.clone()), "{algorithm:?}");
    }
}

#[tokio::test]
async fn a_public_key_verifies_the_algorithms_of_its_type_and_no_other() {
    let expected = Claims { user: UserId::new(42).unwrap(), expires_at: at(NOW + 60), scope: Scope::Any };
    let rsa =
        [Algorithm::RS256, Algorithm::RS384, Algorithm::RS512, Algorithm::PS256, Algorithm::PS384, Algorithm::PS512];
    let cases: [(Pair, &[Algorithm]); 4] = [
        (openssl::rsa(2048), &rsa),
        (openssl::ec("P-256"), &[Algorithm::ES256]),
        (openssl::ec("P-384"), &[Algorithm::ES384]),
        (openssl::ed25519(), &[Algorithm::EdDSA]),
    ];
    for (pair, allowed) in &cases {
        let verifier = by_pem(pair);
        for algorithm in *allowed {
            let token = token(*algorithm, &pair.private, &good());
            assert_eq!(verifier.verify_at(&token, at(NOW)).await, Ok(expected.clone()), "{algorithm:?}");
        }
        for (other, algorithms) in &cases {
            if std::ptr::eq(pair, other) {
                continue;
            }
            let token = token(algorithms[0], &other.private, &good());
            assert_eq!(verifier.verify_at(&token, at(NOW)).await, unauthorized(Reason::Algorithm), "{algorithms:?}");
        }
    }
}

#[tokio::test]
async fn an_rsa_key_in_pkcs1_form_is_read_too() {
    let mut pair = openssl::rsa(2048);
    pair.public_pem = openssl::run(&["rsa", "-pubin", "-RSAPublicKey_out"], &pair.public_pem);
    assert!(pair.public_pem.starts_with(b"-----BEGIN RSA PUBLIC KEY-----"));
    let token = token(Algorithm::RS256, &pair.private, &good());
    assert!(by_pem(&pair).verify_at(&token, at(NOW)).await.is_ok());
}

/// The classic forgery: the attacker knows the public key, says `HS256` in the header and uses the key's own text as
/// the secret.
#[tokio::test]
async fn a_public_key_is_never_the_secret_of_an_hmac() {
    for pair in [openssl::rsa(2048), openssl::ec("P-256"), openssl::ed25519()] {
        let verifier = by_pem(&pair);
        let trimmed = pair.public_pem.trim_ascii_end();
        for secret in [&pair.public_pem[..], trimmed] {
            for algorithm in [Algorithm::HS256, Algorithm::HS384, Algorithm::HS512] {
                let forged = token(algorithm, &EncodingKey::from_secret(secret), &good());
                assert_eq!(verifier.verify_at(&forged, at(NOW)).await, unauthorized(Reason::Algorithm));
            }
        }
    }
}

#[tokio::test]
async fn a_secret_verifies_no_asymmetric_token() {
    for (pair, algorithm) in [
        (openssl::rsa(2048), Algorithm::RS256),
        (openssl::ec("P-256"), Algorithm::ES256),
        (openssl::ed25519(), Algorithm::EdDSA),
    ] {
        let foreign = token(algorithm, &pair.private, &good());
        assert_eq!(by_secret().verify_at(&foreign, at(NOW)).await, unauthorized(Reason::Algorithm));
    }
}

#[tokio::test]
async fn the_algorithm_none_does_not_exist() {
    let signed = token(Algorithm::HS256, &secret_key(), &good());
    let mut parts = signed.split('.').skip(1);
    let (payload, signature) = (parts.next().unwrap(), parts.next().unwrap());
    // {"alg":"none","typ":"JWT"}, {"alg":"None"}, {"alg":""} and {"typ":"JWT"}
    for header in ["eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0", "eyJhbGciOiJOb25lIn0", "eyJhbGciOiIifQ", "eyJ0eXAiOiJKV1QifQ"]
    {
        for signature in ["", signature] {
            let unsigned = format!("{header}.{payload}.{signature}");
            assert_eq!(by_secret().verify_at(&unsigned, at(NOW)).await, unauthorized(Reason::Malformed), "{header}");
        }
    }
}

#[tokio::test]
async fn a_token_signed_by_another_key_or_changed_since_is_refused() {
    let wrong_secret = token(Algorithm::HS256, &EncodingKey::from_secret(b"another"), &good());
    assert_eq!(by_secret().verify_at(&wrong_secret, at(NOW)).await, unauthorized(Reason::Signature));

    for make in [|| openssl::rsa(2048), || openssl::ec("P-256"), openssl::ed25519] {
        let (ours, theirs) = (make(), make());
        let wrong_key = token(ours.algorithm, &theirs.private, &good());
        assert_eq!(by_pem(&ours).verify_at(&wrong_key, at(NOW)).await, unauthorized(Reason::Signature));
    }

    let mine = token(Algorithm::HS256, &secret_key(), &good());
    let forged =
        token(Algorithm::HS256, &EncodingKey::from_secret(b"another"), &json!({ "sub": "1", "exp": NOW + 60 }));
    let (mine, forged): (Vec<_>, Vec<_>) = (mine.split('.').collect(), forged.split('.').collect());
    for (header, payload, signature) in
        [(mine[0], forged[1], mine[2]), (mine[0], mine[1], ""), (mine[0], mine[1], &mine[2][..42])]
    {
        let changed = format!("{header}.{payload}.{signature}");
        assert!(matches!(by_secret().verify_at(&changed, at(NOW)).await, Err(TokenError::Unauthorized(_))));
    }
}

#[tokio::test]
async fn garbage_is_refused_whatever_it_is_made_of() {
    let good = token(Algorithm::HS256, &secret_key(), &good());
    let deep = format!("{}{}", "[".repeat(6000), "]".repeat(6000));
    let texts = [
        String::new(),
        ".".to_owned(),
        "..".to_owned(),
        "...".to_owned(),
        "a.b.c".to_owned(),
        "undefined".to_owned(),
        "null".to_owned(),
        "\0\0.\u{1f3ab}.é".to_owned(),
        format!("Bearer {good}"),
        format!("{good}."),
        format!("{good}.{good}"),
        format!(" {good}"),
        format!("{good}="),
        good.replace('.', ""),
    ];
    for text in texts {
        let refused = by_secret().verify_at(&text, at(NOW)).await;
        assert!(matches!(refused, Err(TokenError::Unauthorized(_))), "{text:?} is {refused:?}");
    }
    // Payloads that are signed as they should be, and are not what a payload is.
    for payload in ["", "7", "[]", "\"text\"", "{", "{}x", "{\"sub\":\"42\",\"sub\":\"43\",\"exp\":1800000060}", &deep]
    {
        let text = openssl::token_of(payload, &secret_key());
        let refused = by_secret().verify_at(&text, at(NOW)).await;
        assert!(matches!(refused, Err(TokenError::Unauthorized(_))), "{payload:.20} is {refused:?}");
    }
}

#[tokio::test]
async fn a_token_over_the_size_limit_is_refused_before_it_is_read() {
    let sized = |padding: usize| {
        token(Algorithm::HS256, &secret_key(), &json!({ "sub": "42", "exp": NOW + 60, "x": "x".repeat(padding) }))
    };
    let fits = sized(5_900);
    assert!(fits.len() <= TOKEN_BYTES_MAX);
    assert!(by_secret().verify_at(&fits, at(NOW)).await.is_ok());
    let over = sized(6_100);
    assert!(over.len() > TOKEN_BYTES_MAX);
    assert_eq!(by_secret().verify_at(&over, at(NOW)).await, unauthorized(Reason::TooLong));
    assert_eq!(by_secret().verify_at(&"x".repeat(1 << 20), at(NOW)).await, unauthorized(Reason::TooLong));
}

#[tokio::test]
async fn a_token_that_demands_an_extension_is_refused() {
    let mut header = Header::new(Algorithm::HS256);
    header.crit = Some(vec!["b64".to_owned()]);
    let token = encode(&header, &good(), &secret_key()).unwrap();
    assert_eq!(by_secret().verify_at(&token, at(NOW)).await, unauthorized(Reason::Extension));
}

#[tokio::test]
async fn a_token_ends_five_seconds_after_its_expiry_to_the_millisecond() {
    let token = token(Algorithm::HS256, &secret_key(), &json!({ "sub": "42", "exp": NOW }));
    let verifier = by_secret();
    let millisecond = Duration::from_millis(1);
    let claims = Claims { user: UserId::new(42).unwrap(), expires_at: at(NOW), scope: Scope::Any };
    assert_eq!(verifier.verify_at(&token, at(NOW)).await, Ok(claims.clone()));
    assert_eq!(verifier.verify_at(&token, at(NOW) + LEEWAY - millisecond).await, Ok(claims));
    assert_eq!(verifier.verify_at(&token, at(NOW) + LEEWAY).await, Err(TokenError::Expired));
    assert_eq!(verifier.verify_at(&token, at(NOW + 86_400)).await, Err(TokenError::Expired));
    assert_eq!(judged(&verifier, json!({ "sub": "42", "exp": 0 })).await, Err(TokenError::Expired));
}

#[tokio::test]
async fn a_token_begins_five_seconds_before_it_says_to_the_millisecond() {
    let token = token(Algorithm::HS256, &secret_key(), &json!({ "sub": "42", "nbf": NOW, "exp": NOW + 60 }));
    let verifier = by_secret();
    let millisecond = Duration::from_millis(1);
    assert!(verifier.verify_at(&token, at(NOW)).await.is_ok());
    assert!(verifier.verify_at(&token, at(NOW) - LEEWAY).await.is_ok());
    let early = verifier.verify_at(&token, at(NOW) - LEEWAY - millisecond).await;
    assert_eq!(early, unauthorized(Reason::NotYet));
    for nbf in [json!("soon"), json!(-1)] {
        let unreadable = judged(&verifier, json!({ "sub": "42", "nbf": nbf, "exp": NOW + 60 })).await;
        assert_eq!(unreadable, unauthorized(Reason::NotYet), "{nbf}");
    }
    assert!(judged(&verifier, json!({ "sub": "42", "nbf": null, "exp": NOW + 60 })).await.is_ok());
}

#[tokio::test]
async fn a_token_without_a_readable_expiry_is_refused() {
    let verifier = by_secret();
    assert_eq!(judged(&verifier, json!({ "sub": "42" })).await, unauthorized(Reason::Expiry));
    for exp in [Value::Null, json!(-1), json!("1800000060"), json!(true), json!(-0.5)] {
        let refused = judged(&verifier, json!({ "sub": "42", "exp": exp })).await;
        assert_eq!(refused, unauthorized(Reason::Expiry), "{exp}");
    }
}

#[tokio::test]
async fn an_expiry_may_have_a_fraction_and_an_absurd_one_is_still_an_instant() {
    let verifier = by_secret();
    let half = judged(&verifier, json!({ "sub": "42", "exp": 1_800_000_060.5 })).await.unwrap();
    assert_eq!(half.expires_at, at(NOW + 60) + Duration::from_millis(500));
    let end = at(253_402_300_799);
    for exp in [json!(NOW * 1000), json!(u64::MAX), json!(1e15)] {
        assert_eq!(judged(&verifier, json!({ "sub": "42", "exp": exp })).await.unwrap().expires_at, end, "{exp}");
        // What the gateway does with it must not overflow either.
        let _shown = chrono::DateTime::<chrono::Utc>::from(end).to_rfc3339();
        let _timer = std::time::Instant::now() + end.duration_since(at(NOW)).unwrap();
    }
    assert_eq!(judged(&verifier, json!({ "sub": "42", "exp": 1e300 })).await, unauthorized(Reason::Expiry));
}

#[tokio::test]
async fn issuer_and_audience_are_compared_when_configured_and_only_then() {
    let options = |issuer: Option<&str>, audience: Option<&str>| VerifierOptions {
        keys: KeySource::Secret(SECRET.to_vec()),
        issuer: issuer.map(str::to_owned),
        audience: audience.map(str::to_owned),
        events_claim: None,
    };
    let claims = |extra: Value| {
        let mut claims = good();
        claims.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        claims
    };

    let any = TokenVerifier::new(options(None, None)).unwrap();
    for extra in [json!({}), json!({ "iss": "x", "aud": "y" }), json!({ "aud": ["y", "z"] }), json!({ "iss": 7 })] {
        assert!(judged(&any, claims(extra.clone())).await.is_ok(), "{extra}");
    }

    let strict = TokenVerifier::new(options(Some("auth-service"), Some("seatlock"))).unwrap();
    let cases = [
        (json!({ "iss": "auth-service", "aud": "seatlock" }), None),
        (json!({ "iss": "auth-service", "aud": ["orders", "seatlock"] }), None),
        (json!({ "aud": "seatlock" }), Some(Reason::Issuer)),
        (json!({ "iss": "auth-service2", "aud": "seatlock" }), Some(Reason::Issuer)),
        (json!({ "iss": "Auth-Service", "aud": "seatlock" }), Some(Reason::Issuer)),
        (json!({ "iss": "", "aud": "seatlock" }), Some(Reason::Issuer)),
        (json!({ "iss": null, "aud": "seatlock" }), Some(Reason::Issuer)),
        (json!({ "iss": 7, "aud": "seatlock" }), Some(Reason::Issuer)),
        (json!({ "iss": "auth-service" }), Some(Reason::Audience)),
        (json!({ "iss": "auth-service", "aud": "orders" }), Some(Reason::Audience)),
        (json!({ "iss": "auth-service", "aud": [] }), Some(Reason::Audience)),
        (json!({ "iss": "auth-service", "aud": { "seatlock": 1 } }), Some(Reason::Audience)),
    ];
    for (extra, refused) in cases {
        let judged = judged(&strict, claims(extra.clone())).await;
        assert_eq!(judged.err(), refused.map(TokenError::Unauthorized), "{extra}");
    }
}

#[tokio::test]
async fn the_user_is_sub_else_user_id_as_digits_or_as_a_number() {
    let verifier = by_secret();
    let max = (1_u64 << 53) - 1;
    let cases = [
        (json!({ "sub": "42" }), Some(42)),
        (json!({ "sub": 42 }), Some(42)),
        (json!({ "sub": max }), Some(max)),
        (json!({ "sub": max.to_string() }), Some(max)),
        (json!({ "userId": 7 }), Some(7)),
        (json!({ "userId": "7" }), Some(7)),
        (json!({ "sub": null, "userId": 7 }), Some(7)),
        (json!({ "sub": "42", "userId": 7 }), Some(42)),
        (json!({}), None),
        (json!({ "sub": 0 }), None),
        (json!({ "sub": "0" }), None),
        (json!({ "sub": -1 }), None),
        (json!({ "sub": "-1" }), None),
        (json!({ "sub": 1.5 }), None),
        (json!({ "sub": 42.0 }), None),
        (json!({ "sub": "42.0" }), None),
        (json!({ "sub": "4e1" }), None),
        (json!({ "sub": max + 1 }), None),
        (json!({ "sub": (max + 1).to_string() }), None),
        (json!({ "sub": "99999999999999999999999" }), None),
        (json!({ "sub": "" }), None),
        (json!({ "sub": " 42" }), None),
        (json!({ "sub": "٤٢" }), None),
        (json!({ "sub": true }), None),
        (json!({ "userId": null }), None),
        (json!({ "userId": 0 }), None),
        // Somebody else, not nobody: the other claim must not be taken for them.
        (json!({ "sub": "auth0|5f7c", "userId": 7 }), None),
        (json!({ "sub": 0, "userId": 7 }), None),
    ];
    for (mut claims, user) in cases {
        claims["exp"] = json!(NOW + 60);
        let judged = judged(&verifier, claims.clone()).await;
        let expected = user.map(|id| UserId::new(id).unwrap()).ok_or(TokenError::Unauthorized(Reason::User));
        assert_eq!(judged.map(|claims| claims.user), expected, "{claims}");
    }
}

#[tokio::test]
async fn a_claim_that_is_a_list_or_an_object_where_a_value_belongs_is_refused() {
    for claim in ["sub", "exp", "nbf"] {
        for value in [json!([42]), json!([]), json!({ "id": 42 })] {
            let mut claims = json!({ "sub": "42", "nbf": NOW, "exp": NOW + 60 });
            claims[claim] = value;
            let judged = judged(&by_secret(), claims.clone()).await;
            assert!(matches!(judged, Err(TokenError::Unauthorized(_))), "{claims} is {judged:?}");
        }
    }
    let listed = judged(&by_secret(), json!({ "userId": [42], "exp": NOW + 60 })).await;
    assert_eq!(listed, unauthorized(Reason::User));
}

/// A token may be for some events only. What is there and cannot be read is refused, never taken for no restriction.
#[tokio::test]
async fn a_token_may_name_the_only_events_it_is_for() {
    let of = |events_claim: Option<&str>| {
        let keys = KeySource::Secret(SECRET.to_vec());
        let events_claim = events_claim.map(str::to_owned);
        TokenVerifier::new(VerifierOptions { keys, issuer: None, audience: None, events_claim }).unwrap()
    };
    let (events, shows, blind) = (of(Some("events")), of(Some("https://shop.example/shows")), of(None));
    let event = |id| EventId::new(id).unwrap();
    let claims = |name: &str, list: Value| {
        let mut claims = good();
        claims.as_object_mut().unwrap().insert(name.to_owned(), list);
        claims
    };
    for (list, admitted) in [
        (json!([7, "9", 3]), vec![3, 7, 9]),
        (json!([]), vec![]),
        (json!([7, 7]), vec![7]),
        (Value::Null, (1..=10).collect()),
    ] {
        let scope = judged(&events, claims("events", list.clone())).await.unwrap().scope;
        let found: Vec<u64> = (1..=10).filter(|&id| scope.admits(event(id))).collect();
        assert_eq!(found, admitted, "{list}");
        assert_eq!(judged(&blind, claims("events", list.clone())).await.unwrap().scope, Scope::Any);
        assert_eq!(judged(&shows, claims("events", list.clone())).await.unwrap().scope, Scope::Any);
    }
    let scope = judged(&shows, claims("https://shop.example/shows", json!([7]))).await.unwrap().scope;
    assert!(scope.admits(event(7)) && !scope.admits(event(8)));
    for list in [json!(7), json!("7"), json!({}), json!(true), json!([0]), json!([7, null]), json!([[7]]), json!([1.5])]
    {
        assert_eq!(judged(&events, claims("events", list.clone())).await, unauthorized(Reason::Events), "{list}");
    }
}

/// A client that is told `token_expired` gets itself a new token; told so for any other defect it would do that for
/// ever.
#[tokio::test]
async fn expired_is_said_only_of_a_token_that_is_otherwise_good() {
    let options = VerifierOptions {
        keys: KeySource::Secret(SECRET.to_vec()),
        issuer: Some("auth-service".to_owned()),
        audience: None,
        events_claim: None,
    };
    let verifier = TokenVerifier::new(options).unwrap();
    let old = NOW - 3600;
    for (claims, expected) in [
        (json!({ "sub": "42", "iss": "auth-service", "exp": old }), TokenError::Expired),
        (json!({ "sub": "42", "iss": "x", "exp": old }), TokenError::Unauthorized(Reason::Issuer)),
        (json!({ "sub": "x", "iss": "auth-service", "exp": old }), TokenError::Unauthorized(Reason::User)),
    ] {
        assert_eq!(judged(&verifier, claims).await, Err(expected));
    }
    let forged = token(Algorithm::HS256, &EncodingKey::from_secret(b"x"), &json!({ "sub": "42", "exp": old }));
    assert_eq!(verifier.verify_at(&forged, at(NOW)).await, unauthorized(Reason::Signature));
}

#[test]
fn keys_that_can_verify_nothing_are_refused_at_start() {
    let refused = |keys| {
        TokenVerifier::new(VerifierOptions { keys, issuer: None, audience: None, events_claim: None })
            .expect_err("a refusal")
    };
    let pem = |pem: &[u8]| refused(KeySource::PublicKeyPem(pem.to_vec()));
    let rsa = openssl::rsa(2048);

    assert!(matches!(refused(KeySource::Secret(Vec::new())), KeyError::EmptySecret));
    assert!(matches!(refused(KeySource::Secret(rsa.public_pem.clone())), KeyError::SecretIsPem));
    assert!(matches!(pem(b""), KeyError::NotOnePem(0)));
    assert!(matches!(pem(b"\xff\xfe"), KeyError::NotOnePem(0)));
    assert!(matches!(pem(SECRET), KeyError::NotOnePem(0)));
    assert!(matches!(pem(&rsa.public_pem.repeat(2)), KeyError::NotOnePem(2)));
    assert!(matches!(pem(&rsa.private_pem), KeyError::NotPublic(label) if label == "PRIVATE KEY"));
    assert!(matches!(pem(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"), KeyError::Unsupported));
    assert!(matches!(pem(b"-----BEGIN PUBLIC KEY-----"), KeyError::Unsupported));
    for unsupported in [openssl::rsa_pem(1024), openssl::ec_pem("P-521"), openssl::pem(&["-algorithm", "ed448"])] {
        assert!(matches!(pem(&openssl::public_pem(&unsupported)), KeyError::Unsupported));
    }
    let certificate = openssl::run(
        &["req", "-x509", "-new", "-key", "/dev/stdin", "-subj", "/CN=test", "-days", "1"],
        &rsa.private_pem,
    );
    assert!(matches!(pem(&certificate), KeyError::NotPublic(label) if label == "CERTIFICATE"));
    let url = "file:///etc/passwd".parse().unwrap();
    assert!(matches!(refused(KeySource::Jwks(url)), KeyError::Scheme(scheme) if scheme == "file"));
}

#[test]
fn secrets_are_in_no_debug_text() {
    let text = str::from_utf8(SECRET).unwrap();
    let keys = KeySource::Secret(SECRET.to_vec());
    let options = VerifierOptions { keys, issuer: None, audience: None, events_claim: None };
    assert!(!format!("{options:?}").contains(text));
    let bytes = format!("{SECRET:?}");
    assert!(!format!("{options:?}").contains(&bytes[1..20]));
    assert!(!format!("{:?} {:?}", by_secret(), TokenIssuer::new(SECRET)).contains(text));

    let url = "https://seatlock:hunter2@id.example/keys?code=hunter3#hunter4".parse().unwrap();
    let shown = format!("{:?}", KeySource::Jwks(url));
    assert_eq!(shown, r#"Jwks("https://id.example/keys")"#);
}

#[tokio::test]
async fn a_token_of_the_demo_is_good_for_its_lifetime() {
    let issuer = TokenIssuer::new(SECRET);
    let user = UserId::new(7).unwrap();
    let verifier = by_secret();
    let before = SystemTime::now();
    let token = issuer.issue(user, Duration::from_hours(1));
    let claims = verifier.verify(&token).await.unwrap();
    assert_eq!(claims.user, user);
    let lifetime = claims.expires_at.duration_since(before).unwrap();
    assert!((3600..=3602).contains(&lifetime.as_secs()), "{lifetime:?}");
    let late = claims.expires_at + LEEWAY;
    assert_eq!(verifier.verify_at(&token, late).await, Err(TokenError::Expired));
    assert_eq!(verifier.verify(&issuer.issue(user, Duration::MAX)).await.unwrap().expires_at, at(253_402_300_799));
    let other = verifier_of(b"another secret that is long enough, really").verify(&token).await;
    assert_eq!(other, unauthorized(Reason::Signature));
}

fn verifier_of(secret: &[u8]) -> TokenVerifier {
    verifier(KeySource::Secret(secret.to_vec()))
}

#[test]
fn codes_are_those_of_the_contract() {
    let codes = [TokenError::Unauthorized(Reason::User), TokenError::Expired, TokenError::Unavailable];
    assert_eq!(codes.map(TokenError::code), ["unauthorized", "token_expired", "unavailable"]);
}

/// Collects what is logged while a test runs on its thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
