//! Tokens, claims and keys as bytes.

use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::FutureExt as _;
use serde_json::{Map, Value};

use super::{EXPIRY_MAX, KeySource, LEEWAY, Scope, TOKEN_BYTES_MAX, TokenVerifier, VerifierOptions, jwks, key, read};

/// What the seeds are signed with.
const SECRET: &[u8] = b"a secret of the seeds, long enough to be one";

static VERIFIER: LazyLock<TokenVerifier> = LazyLock::new(|| {
    let keys = KeySource::Secret(SECRET.to_vec());
    let events_claim = Some("events".to_owned());
    TokenVerifier::new(VerifierOptions { keys, issuer: None, audience: None, events_claim }).expect("a usable secret")
});

/// A moment at which the seeds' tokens are good: midnight of 2026-11-22.
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_hours(498_696)
}

/// One token.
pub fn verify(token: &str) {
    // A fixed key is answered from memory, so the future is ready at once.
    let verdict = VERIFIER.verify_at(token, now()).now_or_never().expect("nothing to wait for");
    assert!(verdict.is_err() || token.len() <= TOKEN_BYTES_MAX);
}

/// The claims of a token whose signature is good, as JSON.
pub fn read_claims(json: &[u8]) {
    let Ok(claims) = serde_json::from_slice::<Map<String, Value>>(json) else { return };
    let Ok(read) = read(&claims, Some("events"), now()) else { return };
    assert!(read.expires_at + LEEWAY > now() && read.expires_at <= UNIX_EPOCH + EXPIRY_MAX);
    let names_events = claims.get("events").is_some_and(|events| !events.is_null());
    assert_eq!(names_events, read.scope != Scope::Any, "what restricts is never taken for no restriction");
}

/// A key set, and a PEM file.
pub fn read_keys(bytes: &[u8]) {
    jwks::fuzz(bytes);
    if let Ok(key) = key::VerifyingKey::pem(bytes, &super::checks(None, None)) {
        assert!(!key.allows(jsonwebtoken::Algorithm::HS256));
    }
}
