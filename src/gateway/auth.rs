//! Who a token speaks for.
//!
//! Owns the verification of JSON Web Tokens (RFC 7519) and the keys it needs; makes tokens for the demo. Knows no
//! socket, no event and no ledger.
//!
//! Invariants: no algorithm is taken from a token's header, only compared with what the configured key allows; no token
//! without an expiry is accepted; no secret, key or token appears in a log, an error or a `Debug` text.

#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing;
mod jwks;
mod key;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, EncodingKey, Header, Validation, decode, decode_header, encode};
use serde_json::{Map, Value, json};
use url::Url;

use crate::domain::{EventId, UserId};
use jwks::{Jwks, Pace};
pub use key::KeyError;
use key::VerifyingKey;

/// The longest token that is looked at. Tokens with many roles reach 4 KiB, and proxies stop at 8 KiB of headers.
pub const TOKEN_BYTES_MAX: usize = 8 << 10;

/// How far the clock of whoever signs tokens may be from ours: a token is accepted this long after its expiry and
/// before its beginning. Synchronised clocks differ by far less; the usual minute would double short-lived tokens.
pub const LEEWAY: Duration = Duration::from_secs(5);

/// An HMAC secret shorter than this can be guessed from one token (RFC 7518, 3.2 asks for the size of the hash).
const SECRET_BYTES_GOOD: usize = 32;

/// The end of the year 9999. An expiry after it is read as this, which every calendar and timer can still express.
const EXPIRY_MAX: Duration = Duration::from_secs(253_402_300_799);

/// Where the keys come from that tokens are verified with.
pub enum KeySource {
    /// A secret shared with the signer: HS256, HS384, HS512.
    Secret(Vec<u8>),
    /// The text of a PEM file with one public key: RS and PS for RSA, ES256 or ES384 by the curve, `EdDSA` for Ed25519.
    PublicKeyPem(Vec<u8>),
    /// The address of a key set that an identity provider publishes; the algorithms as for a PEM key, or the one that
    /// a key of the set is restricted to.
    Jwks(Url),
}

impl fmt::Debug for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Secret(_) => f.write_str("Secret([redacted])"),
            // Not secret in itself, but a private key can be here by mistake.
            Self::PublicKeyPem(_) => f.write_str("PublicKeyPem([redacted])"),
            Self::Jwks(url) => f.debug_tuple("Jwks").field(&without_secrets(url).as_str()).finish(),
        }
    }
}

/// The address without the parts that may hold a credential.
fn without_secrets(url: &Url) -> Url {
    let mut shown = url.clone();
    shown.set_query(None);
    shown.set_fragment(None);
    // Both fail only for addresses that cannot hold a credential.
    shown.set_username("").ok();
    shown.set_password(None).ok();
    shown
}

/// What a token is compared with.
#[derive(Debug)]
pub struct VerifierOptions {
    /// The keys.
    pub keys: KeySource,
    /// The `iss` that a token must have; `None` accepts any and none.
    pub issuer: Option<String>,
    /// The `aud` that a token must have or have among others; `None` accepts any and none.
    pub audience: Option<String>,
    /// The claim whose list names the only events that a token is for; `None` looks at none.
    pub events_claim: Option<String>,
}

/// What a good token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// Whom it speaks for.
    pub user: UserId,
    /// Its expiry as written, without the leeway: up to [`LEEWAY`] in the past, and never after the year 9999.
    pub expires_at: SystemTime,
    /// Which events it is for.
    pub scope: Scope,
}

/// The events that a token lets its user watch and lock tickets of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Scope {
    /// Any: the token says nothing of it.
    #[default]
    Any,
    /// These and no others, ascending; none of them is possible. Bounded by [`TOKEN_BYTES_MAX`]: below four thousand.
    Only(Arc<[EventId]>),
}

impl Scope {
    /// Whether `event` is among them.
    #[must_use]
    pub fn admits(&self, event: EventId) -> bool {
        match self {
            Self::Any => true,
            Self::Only(events) => events.binary_search(&event).is_ok(),
        }
    }
}

/// Why a token is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is not a token that this service accepts. The reason is for logs: clients learn no more than the refusal.
    #[error("unauthorized: {0}")]
    Unauthorized(Reason),
    /// It was good in every other way: a new one will be accepted.
    #[error("the token is expired")]
    Expired,
    /// It cannot be verified now, because no keys were ever fetched.
    #[error("no keys to verify tokens with")]
    Unavailable,
}

impl TokenError {
    /// The word of the contract for it (also a metric label): `unauthorized`, `token_expired` or `unavailable`.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Unauthorized(_) => "unauthorized",
            Self::Expired => "token_expired",
            Self::Unavailable => "unavailable",
        }
    }
}

/// What is wrong with a token, in words that repeat nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// Longer than [`TOKEN_BYTES_MAX`].
    #[error("too long")]
    TooLong,
    /// Not three parts, not base64, not JSON, or an algorithm that does not exist here (such as `none`).
    #[error("malformed")]
    Malformed,
    /// It demands an extension (`crit`), and RFC 7515, 4.1.11 says that it must then be refused.
    #[error("demands an extension")]
    Extension,
    /// Signed by an algorithm that the configured key is not for.
    #[error("algorithm not allowed")]
    Algorithm,
    /// Its key id is not in the key set.
    #[error("unknown key id")]
    UnknownKey,
    /// It names no key, and several of the key set fit.
    #[error("names no key")]
    KeyNotNamed,
    /// Not signed by this key, or changed since.
    #[error("bad signature")]
    Signature,
    /// Not from the configured issuer.
    #[error("wrong issuer")]
    Issuer,
    /// Not meant for the configured audience.
    #[error("wrong audience")]
    Audience,
    /// No `exp`, or one that is not a number of seconds.
    #[error("no readable expiry")]
    Expiry,
    /// Its `nbf` is still to come, or is not a number of seconds.
    #[error("not valid yet")]
    NotYet,
    /// Neither `sub` nor `userId` is a user id.
    #[error("names no user")]
    User,
    /// The claim that names its events is no list of event ids.
    #[error("names its events in no readable way")]
    Events,
}

impl From<Reason> for TokenError {
    fn from(reason: Reason) -> Self {
        Self::Unauthorized(reason)
    }
}

/// Verifies tokens. One per process, shared by all connections.
pub struct TokenVerifier {
    keys: Keys,
    events_claim: Option<String>,
}

enum Keys {
    Fixed(Arc<VerifyingKey>),
    Fetched(Jwks),
}

impl fmt::Debug for TokenVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenVerifier").finish_non_exhaustive()
    }
}

impl TokenVerifier {
    /// Reads the keys. A key set is not fetched yet: that happens with the first token, or by [`Self::prepare`].
    ///
    /// # Errors
    /// When no token could ever be verified with these keys.
    pub fn new(options: VerifierOptions) -> Result<Self, KeyError> {
        Self::with(options, Pace::default(), reqwest::Client::builder())
    }

    fn with(options: VerifierOptions, pace: Pace, client: reqwest::ClientBuilder) -> Result<Self, KeyError> {
        let checks = checks(options.issuer.as_deref(), options.audience.as_deref());
        let keys = match options.keys {
            KeySource::Secret(secret) => {
                let key = VerifyingKey::secret(&secret, &checks)?;
                if secret.len() < SECRET_BYTES_GOOD {
                    tracing::warn!("the token secret is shorter than {SECRET_BYTES_GOOD} bytes: it can be guessed");
                }
                Keys::Fixed(Arc::new(key))
            }
            KeySource::PublicKeyPem(pem) => Keys::Fixed(Arc::new(VerifyingKey::pem(&pem, &checks)?)),
            KeySource::Jwks(url) => Keys::Fetched(Jwks::new(url, checks, pace, client)?),
        };
        Ok(Self { keys, events_claim: options.events_claim })
    }

    /// Whether tokens can be verified; fetches the key set if that has not been done. Takes at most 2 s.
    ///
    /// Worth calling at start, so that a wrong address shows in the log before the first user does.
    pub async fn prepare(&self) -> bool {
        match &self.keys {
            Keys::Fixed(_) => true,
            Keys::Fetched(set) => set.prepare().await,
        }
    }

    /// Whom `token` speaks for, and until when.
    ///
    /// Answers from memory, except for a token that names a key unknown so far: then it waits for at most one fetch of
    /// the key set (2 s). May be dropped at any time. Must be called within a Tokio runtime.
    ///
    /// # Errors
    /// See [`TokenError`].
    pub async fn verify(&self, token: &str) -> Result<Claims, TokenError> {
        self.verify_at(token, SystemTime::now()).await
    }

    async fn verify_at(&self, token: &str, now: SystemTime) -> Result<Claims, TokenError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(Reason::TooLong.into());
        }
        let header = decode_header(token).map_err(|_| Reason::Malformed)?;
        if header.crit.is_some() {
            return Err(Reason::Extension.into());
        }
        let key = match &self.keys {
            Keys::Fixed(key) => Arc::clone(key),
            Keys::Fetched(set) => set.find(header.kid.as_deref(), header.alg).await?,
        };
        let token = decode::<Map<String, Value>>(token, &key.decoding, &key.validation)
            .map_err(|error| refusal(error.kind()))?;
        read(&token.claims, self.events_claim.as_deref(), now)
    }
}

/// What the library checks besides the signature. Times it does not check: see [`read`].
fn checks(issuer: Option<&str>, audience: Option<&str>) -> Validation {
    let mut checks = Validation::default();
    checks.algorithms.clear();
    checks.required_spec_claims.clear();
    checks.validate_exp = false;
    checks.validate_nbf = false;
    checks.validate_aud = audience.is_some();
    if let Some(issuer) = issuer {
        checks.set_issuer(&[issuer]);
        checks.required_spec_claims.insert("iss".to_owned());
    }
    if let Some(audience) = audience {
        checks.set_audience(&[audience]);
        checks.required_spec_claims.insert("aud".to_owned());
    }
    checks
}

fn refusal(error: &ErrorKind) -> Reason {
    #[expect(clippy::wildcard_enum_match_arm, reason = "the library may add kinds; each is some malformed token")]
    match error {
        ErrorKind::InvalidAlgorithm => Reason::Algorithm,
        ErrorKind::InvalidSignature => Reason::Signature,
        ErrorKind::InvalidIssuer => Reason::Issuer,
        ErrorKind::InvalidAudience => Reason::Audience,
        ErrorKind::MissingRequiredClaim(claim) if claim == "iss" => Reason::Issuer,
        ErrorKind::MissingRequiredClaim(claim) if claim == "aud" => Reason::Audience,
        _ => Reason::Malformed,
    }
}

/// Reads the claims of a token whose signature is good.
///
/// The times are checked here and not by the library, which rounds to seconds and reads its own clock. The expiry comes
/// last, so that [`TokenError::Expired`] means that a new token will do.
fn read(claims: &Map<String, Value>, events_claim: Option<&str>, now: SystemTime) -> Result<Claims, TokenError> {
    let user = user(claims).ok_or(Reason::User)?;
    let scope = match events_claim.and_then(|name| claim(claims, name)) {
        None => Scope::Any,
        Some(list) => scope(list).ok_or(Reason::Events)?,
    };
    let expires_at = claim(claims, "exp").and_then(instant).ok_or(Reason::Expiry)?;
    if let Some(begin) = claim(claims, "nbf")
        && instant(begin).is_none_or(|begin| begin > now + LEEWAY)
    {
        return Err(Reason::NotYet.into());
    }
    if now >= expires_at + LEEWAY {
        return Err(TokenError::Expired);
    }
    Ok(Claims { user, expires_at, scope })
}

/// A list of event ids, as numbers or as digits. Anything else in it spoils it: what cannot be read must not open more.
fn scope(list: &Value) -> Option<Scope> {
    let id = |item: &Value| match item {
        Value::Number(number) => EventId::new(number.as_u64()?).ok(),
        Value::String(digits) => digits.parse().ok(),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    };
    let mut events = list.as_array()?.iter().map(id).collect::<Option<Vec<_>>>()?;
    events.sort_unstable();
    Some(Scope::Only(events.into()))
}

/// A claim that is there; `null` is not.
fn claim<'a>(claims: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    claims.get(name).filter(|value| !value.is_null())
}

/// `sub`, or `userId` when there is no `sub`. A `sub` that is no user id names somebody else: `userId` is then not
/// looked at.
fn user(claims: &Map<String, Value>) -> Option<UserId> {
    match claim(claims, "sub").or_else(|| claim(claims, "userId"))? {
        Value::String(digits) => digits.parse().ok(),
        Value::Number(number) => UserId::new(number.as_u64()?).ok(),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

/// A `NumericDate`: seconds since 1970, possibly with a fraction.
fn instant(date: &Value) -> Option<SystemTime> {
    let since_epoch = match date.as_u64() {
        Some(seconds) => Duration::from_secs(seconds),
        None => Duration::try_from_secs_f64(date.as_f64()?).ok()?,
    };
    Some(UNIX_EPOCH + since_epoch.min(EXPIRY_MAX))
}

/// Makes tokens for the demo, which has no identity provider. HS256.
pub struct TokenIssuer {
    key: EncodingKey,
}

impl fmt::Debug for TokenIssuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenIssuer").finish_non_exhaustive()
    }
}

impl TokenIssuer {
    /// An issuer whose tokens a verifier with the same secret accepts.
    #[must_use]
    pub fn new(secret: &[u8]) -> Self {
        Self { key: EncodingKey::from_secret(secret) }
    }

    /// A token for `user` that expires after `lifetime`, rounded up to a second.
    #[must_use]
    #[expect(clippy::missing_panics_doc, reason = "it cannot")]
    pub fn issue(&self, user: UserId, lifetime: Duration) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let end = now.saturating_add(lifetime).min(EXPIRY_MAX);
        let expiry = end.as_secs() + u64::from(end.subsec_nanos() > 0);
        let claims = json!({ "sub": user.to_string(), "iat": now.as_secs(), "exp": expiry });
        encode(&Header::new(Algorithm::HS256), &claims, &self.key).expect("an HMAC takes a key of any length")
    }
}
