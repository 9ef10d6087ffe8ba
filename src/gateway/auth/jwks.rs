//! The key set that an identity provider publishes (JWKS, RFC 7517), fetched and kept.
//!
//! Owns the cache, its pace and its bounds. Knows no token beyond its key id and algorithm.
//!
//! Invariants: one fetch at a time; a failed or useless answer never replaces keys that worked; nothing a client sends
//! makes fetches more frequent than [`Pace`] allows; no answer of the provider takes more than [`BODY_BYTES_MAX`] of
//! memory or holds a caller longer than the deadline.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, AlgorithmFamily, Validation};
use reqwest::header::ACCEPT;
use reqwest::{Client, ClientBuilder, StatusCode, redirect};
use serde_json::Value;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::JoinHandle;
use url::Url;

use super::key::{KeyError, VerifyingKey};
use super::{Reason, TokenError};
use crate::metrics;

/// The largest answer that is read. Sets in the wild are below 20 KiB, certificate chains included.
const BODY_BYTES_MAX: usize = 256 << 10;

/// The most keys a set may offer. Providers publish two to ten.
const KEYS_MAX: usize = 64;

/// How often the provider is asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// The shortest time between two fetches once keys are known: what a token with an unknown key id can cause.
    pub refetch: Duration,
    /// The shortest time between two fetches while no keys are known yet.
    pub retry: Duration,
    /// Keys older than this are fetched again beside the next token, so that a withdrawn key stops working.
    pub age_max: Duration,
    /// How long one fetch may take, from the name lookup to the last byte.
    pub deadline: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            refetch: Duration::from_secs(30),
            retry: Duration::from_secs(1),
            age_max: Duration::from_mins(10),
            deadline: Duration::from_secs(2),
        }
    }
}

/// Why a fetch brought no keys.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("no complete answer within {0:?}")]
    Timeout(Duration),
    #[error("the key set cannot be fetched")]
    Http(#[source] reqwest::Error),
    #[error("answered {0}")]
    Status(StatusCode),
    #[error("answered more than {BODY_BYTES_MAX} bytes")]
    TooLong,
    #[error("answered something that is not a key set")]
    Malformed,
    #[error("offers {0} keys, more than {KEYS_MAX}")]
    TooMany(usize),
    #[error("offers no usable key among {0}")]
    NoneUsable(usize),
}

impl FetchError {
    /// The metric label.
    const fn kind(&self) -> &'static str {
        match self {
            Self::Timeout(_) => "timeout",
            Self::Http(_) => "http",
            Self::Status(_) => "status",
            Self::TooLong | Self::TooMany(_) => "too_large",
            Self::Malformed => "malformed",
            Self::NoneUsable(_) => "none_usable",
        }
    }
}

/// The keys of one answer.
struct KeySet {
    keys: Vec<Arc<VerifyingKey>>,
    fetched: Instant,
}

/// What a set says about a token's key.
enum Pick {
    Key(Arc<VerifyingKey>),
    Unknown,
    Refused(Reason),
}

impl KeySet {
    /// The key that `id` names. A token without a key id is taken only when one single key of the set fits its
    /// algorithm: trying them all would multiply the work that a stranger can cause.
    fn pick(&self, id: Option<&str>, algorithm: Algorithm) -> Pick {
        let Some(id) = id else {
            let mut fitting = self.keys.iter().filter(|key| key.allows(algorithm));
            return match (fitting.next(), fitting.next()) {
                (Some(only), None) => Pick::Key(Arc::clone(only)),
                (None, _) => Pick::Unknown,
                (Some(_), Some(_)) => Pick::Refused(Reason::KeyNotNamed),
            };
        };
        let mut named = self.keys.iter().filter(|key| key.id.as_deref() == Some(id)).peekable();
        if named.peek().is_none() {
            return Pick::Unknown;
        }
        match named.find(|key| key.allows(algorithm)) {
            Some(key) => Pick::Key(Arc::clone(key)),
            None => Pick::Refused(Reason::Algorithm),
        }
    }
}

/// The key set of one provider. Cheap to clone: all clones are the same cache.
#[derive(Clone)]
pub(super) struct Jwks(Arc<Shared>);

struct Shared {
    client: Client,
    url: Url,
    /// Issuer and audience, which every key's validation carries.
    checks: Validation,
    pace: Pace,
    known: RwLock<Option<Arc<KeySet>>>,
    /// Finished fetches, so that a caller who waited for one knows that it need not start another.
    fetches: AtomicU64,
    /// Whoever holds it may fetch. Inside: when the last fetch ended.
    gate: Arc<Mutex<Option<Instant>>>,
}

impl Jwks {
    pub fn new(url: Url, checks: Validation, pace: Pace, client: ClientBuilder) -> Result<Self, KeyError> {
        let client = match url.scheme() {
            "https" => client,
            // No TLS will be spoken: the root certificates, which a small image may lack, need not be there.
            "http" => client.tls_certs_only([]),
            other => return Err(KeyError::Scheme(other.to_owned())),
        };
        let client = client
            .redirect(redirect::Policy::none())
            .timeout(pace.deadline)
            // Between two fetches minutes pass: a kept connection would be a dead one.
            .pool_max_idle_per_host(0)
            .user_agent(concat!("seatlock/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(KeyError::Client)?;
        Ok(Self(Arc::new(Shared {
            client,
            url,
            checks,
            pace,
            known: RwLock::default(),
            fetches: AtomicU64::new(0),
            gate: Arc::default(),
        })))
    }

    /// The key for a token with this key id and algorithm. Waits for a fetch when the set does not name it, at most
    /// for one deadline.
    pub async fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Arc<VerifyingKey>, TokenError> {
        if algorithm.family() == AlgorithmFamily::Hmac {
            return Err(TokenError::Unauthorized(Reason::Algorithm));
        }
        if let Some(set) = self.0.known() {
            if set.fetched.elapsed() > self.0.pace.age_max {
                self.refresh();
            }
            match set.pick(id, algorithm) {
                Pick::Key(key) => return Ok(key),
                Pick::Refused(reason) => return Err(TokenError::Unauthorized(reason)),
                Pick::Unknown => {}
            }
        }
        self.refetch().await;
        match self.0.known().ok_or(TokenError::Unavailable)?.pick(id, algorithm) {
            Pick::Key(key) => Ok(key),
            Pick::Refused(reason) => Err(TokenError::Unauthorized(reason)),
            Pick::Unknown => Err(TokenError::Unauthorized(Reason::UnknownKey)),
        }
    }

    /// Fetches the set unless keys are known already; says whether they are now.
    pub async fn prepare(&self) -> bool {
        if self.0.known().is_none() {
            self.refetch().await;
        }
        self.0.known().is_some()
    }

    /// Fetches, or waits for the fetch that is under way, or returns at once when the pace forbids one.
    async fn refetch(&self) {
        let seen = self.0.fetches.load(Ordering::Acquire);
        let gate = Arc::clone(&self.0.gate).lock_owned().await;
        if self.0.fetches.load(Ordering::Acquire) == seen
            && let Some(fetch) = self.start(gate)
        {
            // The task logs its own failure, and a panic in it is reported by the runtime.
            fetch.await.ok();
        }
    }

    /// Fetches beside the caller, unless a fetch is under way.
    fn refresh(&self) {
        if let Ok(gate) = Arc::clone(&self.0.gate).try_lock_owned() {
            self.start(gate);
        }
    }

    /// Starts a fetch if the pace allows one. It is a task of its own, so that a client that connects and leaves at
    /// once cannot cut short the fetch that everybody else waits for.
    fn start(&self, mut gate: OwnedMutexGuard<Option<Instant>>) -> Option<JoinHandle<()>> {
        let pause = if self.0.known().is_some() { self.0.pace.refetch } else { self.0.pace.retry };
        if gate.is_some_and(|ended| ended.elapsed() < pause) {
            return None;
        }
        let shared = Arc::clone(&self.0);
        Some(tokio::spawn(async move {
            shared.update().await;
            *gate = Some(Instant::now());
            shared.fetches.fetch_add(1, Ordering::Release);
        }))
    }
}

impl Shared {
    fn known(&self) -> Option<Arc<KeySet>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// One fetch; keys that are known stay when it fails.
    async fn update(&self) {
        metrics::GATEWAY_KEY_FETCHES.show(&["fetched"]);
        let deadline = self.pace.deadline;
        let answer = tokio::time::timeout(deadline, self.fetch()).await;
        match answer.unwrap_or(Err(FetchError::Timeout(deadline))) {
            Ok(keys) => {
                metrics::GATEWAY_KEY_FETCHES.count(&["fetched"]);
                tracing::debug!(keys = keys.len(), "token keys fetched");
                let set = KeySet { keys, fetched: Instant::now() };
                *self.known.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(set));
            }
            Err(error) => {
                metrics::GATEWAY_KEY_FETCHES.count(&[error.kind()]);
                let known = self.known().is_some();
                let error: &(dyn std::error::Error + 'static) = &error;
                tracing::warn!(error, url = %super::without_secrets(&self.url), keys_known = known, "no token keys fetched");
            }
        }
    }

    async fn fetch(&self) -> Result<Vec<Arc<VerifyingKey>>, FetchError> {
        // The URL may hold a password, and the library puts it into its errors.
        let http = |error: reqwest::Error| FetchError::Http(error.without_url());
        let request = self.client.get(self.url.clone()).header(ACCEPT, "application/json");
        let mut response = request.send().await.map_err(http)?;
        if response.status() != StatusCode::OK {
            return Err(FetchError::Status(response.status()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(http)? {
            if body.len() + chunk.len() > BODY_BYTES_MAX {
                return Err(FetchError::TooLong);
            }
            body.extend_from_slice(&chunk);
        }
        self.read(&body)
    }

    fn read(&self, body: &[u8]) -> Result<Vec<Arc<VerifyingKey>>, FetchError> {
        read(body, &self.checks)
    }
}

/// Reads a key set key by key: one of a type not known here must not cost the others.
fn read(body: &[u8], checks: &Validation) -> Result<Vec<Arc<VerifyingKey>>, FetchError> {
    let mut set: Value = serde_json::from_slice(body).map_err(|_| FetchError::Malformed)?;
    let Some(Value::Array(offered)) = set.get_mut("keys").map(Value::take) else {
        return Err(FetchError::Malformed);
    };
    let count = offered.len();
    if count > KEYS_MAX {
        return Err(FetchError::TooMany(count));
    }
    let keys: Vec<_> = offered
        .into_iter()
        .filter_map(|key| serde_json::from_value::<Jwk>(key).ok())
        .filter_map(|key| VerifyingKey::jwk(&key, checks))
        .map(Arc::new)
        .collect();
    if keys.is_empty() { Err(FetchError::NoneUsable(count)) } else { Ok(keys) }
}

/// Reads a key set for nothing but its algorithms: none of them is symmetric.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzz(body: &[u8]) {
    let keys = read(body, &super::checks(None, None)).unwrap_or_default();
    assert!(keys.iter().all(|key| !key.allows(Algorithm::HS256) && !key.validation.algorithms.is_empty()));
}
