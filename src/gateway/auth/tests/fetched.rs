//! Keys that are fetched: the verifier against a provider that rotates, breaks, stalls and lies.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Response, StatusCode};
use axum::routing::get;
use jsonwebtoken::jwk::{Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;

/// What the provider answers next.
#[derive(Clone)]
enum Answer {
    Body(StatusCode, Vec<u8>),
    Redirect(String),
    /// Takes the request and says nothing.
    Silence,
}

/// An identity provider on a free port.
struct Provider {
    address: SocketAddr,
    shared: Arc<Script>,
    server: JoinHandle<()>,
}

struct Script {
    answer: Mutex<Answer>,
    asked: AtomicUsize,
}

impl Provider {
    async fn start(answer: Answer) -> Self {
        let shared = Arc::new(Script { answer: Mutex::new(answer), asked: AtomicUsize::new(0) });
        let router = Router::new().route("/keys", get(answer_request)).with_state(Arc::clone(&shared));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, shared, server }
    }

    fn url(&self) -> Url {
        format!("http://{}/keys", self.address).parse().unwrap()
    }

    fn answers(&self, answer: Answer) {
        *self.shared.answer.lock().unwrap() = answer;
    }

    fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::SeqCst)
    }

    async fn stop(&mut self) {
        self.server.abort();
        (&mut self.server).await.unwrap_err();
    }

    fn verifier(&self, pace: Pace) -> TokenVerifier {
        fetching(self.url(), pace)
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn answer_request(State(script): State<Arc<Script>>) -> Response<Body> {
    script.asked.fetch_add(1, Ordering::SeqCst);
    let answer = script.answer.lock().unwrap().clone();
    match answer {
        Answer::Body(status, body) => Response::builder().status(status).body(Body::from(body)).unwrap(),
        Answer::Redirect(to) => Response::builder().status(302).header("location", to).body(Body::empty()).unwrap(),
        Answer::Silence => std::future::pending().await,
    }
}

fn fetching(url: Url, pace: Pace) -> TokenVerifier {
    let options = VerifierOptions { keys: KeySource::Jwks(url), issuer: None, audience: None, events_claim: None };
    // A proxy in the environment of the tests must not come between.
    TokenVerifier::with(options, pace, reqwest::Client::builder().no_proxy()).unwrap()
}

/// Every fetch that somebody asks for is allowed.
const EAGER: Pace = Pace {
    refetch: Duration::ZERO,
    retry: Duration::ZERO,
    age_max: Duration::from_hours(1),
    deadline: Duration::from_secs(2),
};

fn jwk(pair: &Pair, id: Option<&str>) -> Jwk {
    let mut jwk = Jwk::from_encoding_key(&pair.private, pair.algorithm).unwrap();
    jwk.common.key_id = id.map(str::to_owned);
    jwk
}

fn set(keys: &[Jwk]) -> Answer {
    Answer::Body(StatusCode::OK, json!({ "keys": keys }).to_string().into_bytes())
}

fn text(body: impl Into<Vec<u8>>) -> Answer {
    Answer::Body(StatusCode::OK, body.into())
}

fn named(pair: &Pair, id: Option<&str>) -> String {
    let mut header = Header::new(pair.algorithm);
    header.kid = id.map(str::to_owned);
    encode(&header, &good(), &pair.private).unwrap()
}

async fn says(verifier: &TokenVerifier, token: &str) -> Result<(), TokenError> {
    let answer = timeout(Duration::from_secs(10), verifier.verify_at(token, at(NOW))).await;
    answer.expect("an answer within the deadline").map(|_| ())
}

/// Waits until `condition`, at most 5 s.
async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(5), waiting).await.unwrap_or_else(|_| panic!("in vain: {what}"));
}

#[tokio::test]
async fn keys_of_every_type_are_fetched_once_and_then_known() {
    let pairs = [openssl::rsa(2048), openssl::ec("P-256"), openssl::ec("P-384"), openssl::ed25519()];
    let ids = ["rsa", "p256", "p384", "ed"];
    let keys: Vec<_> = pairs.iter().zip(ids).map(|(pair, id)| jwk(pair, Some(id))).collect();
    let provider = Provider::start(set(&keys)).await;
    let verifier = provider.verifier(Pace::default());
    for _ in 0..3 {
        for (pair, id) in pairs.iter().zip(ids) {
            assert_eq!(says(&verifier, &named(pair, Some(id))).await, Ok(()), "{id}");
        }
    }
    assert_eq!(provider.asked(), 1);
    // The name of one key and the signature of another.
    let mixed = named(&openssl::ec("P-256"), Some("p256"));
    assert_eq!(says(&verifier, &mixed).await, unauthorized(Reason::Signature));
    let confused = named(&pairs[1], Some("rsa"));
    assert_eq!(says(&verifier, &confused).await, unauthorized(Reason::Algorithm));
}

#[tokio::test]
async fn a_new_key_is_fetched_when_the_first_token_names_it() {
    let (old, new) = (openssl::ec("P-256"), openssl::ec("P-256"));
    let provider = Provider::start(set(&[jwk(&old, Some("old"))])).await;
    let verifier = provider.verifier(EAGER);
    assert_eq!(says(&verifier, &named(&old, Some("old"))).await, Ok(()));
    provider.answers(set(&[jwk(&new, Some("new"))]));
    assert_eq!(says(&verifier, &named(&old, Some("old"))).await, Ok(()), "nobody has asked again yet");
    assert_eq!(says(&verifier, &named(&new, Some("new"))).await, Ok(()));
    assert_eq!(provider.asked(), 2);
    assert_eq!(says(&verifier, &named(&old, Some("old"))).await, unauthorized(Reason::UnknownKey), "withdrawn");
}

#[tokio::test]
async fn unknown_keys_cause_no_more_than_one_fetch_per_interval() {
    let pair = openssl::ec("P-256");
    let provider = Provider::start(set(&[jwk(&pair, Some("a"))])).await;
    let verifier = provider.verifier(Pace { refetch: Duration::from_hours(1), ..EAGER });
    assert!(verifier.prepare().await);
    for n in 0..100 {
        let token = named(&pair, Some(&format!("invented-{n}")));
        assert_eq!(says(&verifier, &token).await, unauthorized(Reason::UnknownKey));
    }
    assert_eq!(provider.asked(), 1);
    assert_eq!(says(&verifier, &named(&pair, Some("a"))).await, Ok(()));
}

#[tokio::test]
async fn many_first_tokens_wait_for_one_fetch() {
    let pair = openssl::ec("P-256");
    let provider = Provider::start(set(&[jwk(&pair, Some("a"))])).await;
    let verifier = provider.verifier(EAGER);
    let token = named(&pair, Some("a"));
    let answers = futures_util::future::join_all((0..200).map(|_| says(&verifier, &token))).await;
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(provider.asked(), 1);
}

#[tokio::test]
async fn waiting_for_a_provider_that_does_not_answer_ends_at_the_deadline_for_everybody() {
    let pair = openssl::ec("P-256");
    let provider = Provider::start(Answer::Silence).await;
    let verifier = provider.verifier(Pace { deadline: Duration::from_millis(300), ..EAGER });
    let token = named(&pair, Some("a"));
    let begin = std::time::Instant::now();
    let answers = futures_util::future::join_all((0..50).map(|_| says(&verifier, &token))).await;
    assert!(answers.iter().all(|answer| *answer == Err(TokenError::Unavailable)));
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert_eq!(provider.asked(), 1);
}

#[tokio::test]
async fn a_client_that_leaves_does_not_take_the_fetch_with_it() {
    let pair = openssl::ec("P-256");
    let provider = Provider::start(set(&[jwk(&pair, Some("a"))])).await;
    let verifier = provider.verifier(Pace { retry: Duration::from_hours(1), ..EAGER });
    let token = named(&pair, Some("a"));
    {
        let leaving = verifier.verify_at(&token, at(NOW));
        tokio::pin!(leaving);
        assert!(futures_util::poll!(&mut leaving).is_pending());
    }
    assert_eq!(says(&verifier, &token).await, Ok(()), "no second fetch is allowed: the first must have gone on");
    assert_eq!(provider.asked(), 1);
}

#[tokio::test]
async fn without_any_keys_the_answer_is_unavailable_until_the_provider_is_there() {
    let pair = openssl::ec("P-256");
    let mut provider = Provider::start(set(&[jwk(&pair, Some("a"))])).await;
    provider.stop().await;
    let verifier = provider.verifier(EAGER);
    let token = named(&pair, Some("a"));
    assert!(!verifier.prepare().await);
    assert_eq!(says(&verifier, &token).await, Err(TokenError::Unavailable));
    assert_eq!(says(&verifier, "garbage").await, unauthorized(Reason::Malformed), "needs no key to be refused");

    let again = TcpListener::bind(provider.address).await.unwrap();
    let router = Router::new().route("/keys", get(answer_request)).with_state(Arc::clone(&provider.shared));
    provider.server = tokio::spawn(async move { axum::serve(again, router).await.unwrap() });
    assert_eq!(says(&verifier, &token).await, Ok(()));
}

#[tokio::test]
async fn a_failing_provider_is_asked_once_per_retry_interval() {
    let pair = openssl::ec("P-256");
    let provider = Provider::start(Answer::Body(StatusCode::INTERNAL_SERVER_ERROR, Vec::new())).await;
    let verifier = provider.verifier(Pace { retry: Duration::from_hours(1), ..EAGER });
    for _ in 0..20 {
        assert_eq!(says(&verifier, &named(&pair, Some("a"))).await, Err(TokenError::Unavailable));
    }
    assert_eq!(provider.asked(), 1);
}

/// Whatever the provider says or does not say, the keys that worked go on working.
#[tokio::test]
async fn no_bad_answer_replaces_good_keys() {
    let (pair, symmetric) = (openssl::ec("P-256"), EncodingKey::from_secret(SECRET));
    let mut provider = Provider::start(set(&[jwk(&pair, Some("a"))])).await;
    let verifier = provider.verifier(Pace { deadline: Duration::from_millis(500), ..EAGER });
    let known = named(&pair, Some("a"));
    let unknown = named(&pair, Some("b"));
    assert_eq!(says(&verifier, &known).await, Ok(()));

    // Taken, any of these would make the token that names "b" a good one.
    let tempting = json!({ "keys": [jwk(&pair, Some("b"))] }).to_string();
    let mut encryption = jwk(&pair, Some("b"));
    encryption.common.public_key_use = Some(PublicKeyUse::Encryption);
    let mut wrapping = jwk(&pair, Some("b"));
    wrapping.common.key_operations = Some(vec![KeyOperations::WrapKey]);
    let mut foreign = jwk(&pair, Some("b"));
    foreign.common.key_algorithm = Some(KeyAlgorithm::ES384);
    let elsewhere = Provider::start(text(tempting.clone())).await;
    let oct = Jwk::from_encoding_key(&symmetric, Algorithm::HS256).unwrap();
    let many = vec![jwk(&pair, Some("b")); 65];
    let padded = format!("{tempting}{}", " ".repeat(256 << 10));
    let bad = [
        text(""),
        text("garbage"),
        text("<html>"),
        text("null"),
        text("[]"),
        text("{}"),
        text(r#"{"keys":null}"#),
        text(r#"{"keys":{}}"#),
        text(r#"{"keys":[]}"#),
        text(r#"{"keys":[1,"x",null,[],{}]}"#),
        text(r#"{"keys":[{"kty":"EC","kid":"b","crv":"P-256","x":"AAAA","y":"AAAA"}]}"#),
        text(r#"{"keys":[{"kty":"RSA","kid":"b","n":"AQAB","e":"AQAB"}]}"#),
        text(r#"{"keys":[{"kty":"RSA","kid":"b","n":"***","e":"AQAB"}]}"#),
        text("[".repeat(100_000)),
        text(padded),
        set(&[oct]),
        set(&[encryption]),
        set(&[wrapping]),
        set(&[foreign]),
        set(&many),
        Answer::Body(StatusCode::NOT_FOUND, tempting.clone().into_bytes()),
        Answer::Redirect(elsewhere.url().to_string()),
        Answer::Silence,
    ];
    for (n, answer) in bad.into_iter().enumerate() {
        let asked = provider.asked();
        provider.answers(answer);
        assert_eq!(says(&verifier, &unknown).await, unauthorized(Reason::UnknownKey), "bad answer {n}");
        assert_eq!(says(&verifier, &known).await, Ok(()), "after bad answer {n}");
        assert_eq!(provider.asked(), asked + 1, "bad answer {n} was given");
    }
    assert_eq!(elsewhere.asked(), 0);
    provider.answers(text(&tempting[..tempting.len() - 1]));
    assert_eq!(says(&verifier, &unknown).await, unauthorized(Reason::UnknownKey), "cut off");
    provider.stop().await;
    assert_eq!(says(&verifier, &unknown).await, unauthorized(Reason::UnknownKey));
    assert_eq!(says(&verifier, &known).await, Ok(()), "the provider is gone");
}

#[tokio::test]
async fn a_key_of_a_type_not_known_here_does_not_cost_the_others() {
    let pair = openssl::ec("P-256");
    let body = json!({ "keys": [
        { "kty": "OKP", "crv": "Ed448", "kid": "x", "x": "AAAA" },
        { "kty": "AKP", "alg": "ML-DSA-44", "kid": "y", "pub": "AAAA" },
        { "kty": "EC", "crv": "P-521", "alg": "ES512", "kid": "z", "x": "AAAA", "y": "AAAA" },
        jwk(&pair, Some("a")),
    ] });
    let provider = Provider::start(text(body.to_string())).await;
    let verifier = provider.verifier(EAGER);
    assert_eq!(says(&verifier, &named(&pair, Some("a"))).await, Ok(()));
}

/// The forgery of a symmetric key: whoever reads the public set can sign with what it holds.
#[tokio::test]
async fn a_symmetric_key_in_the_set_signs_nothing() {
    let (pair, symmetric) = (openssl::ec("P-256"), EncodingKey::from_secret(SECRET));
    let mut oct = Jwk::from_encoding_key(&symmetric, Algorithm::HS256).unwrap();
    oct.common.key_id = Some("oct".to_owned());
    let provider = Provider::start(set(&[oct, jwk(&pair, Some("a"))])).await;
    let verifier = provider.verifier(EAGER);
    for id in ["oct", "a", "invented"] {
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some(id.to_owned());
        let forged = encode(&header, &good(), &symmetric).unwrap();
        assert_eq!(says(&verifier, &forged).await, unauthorized(Reason::Algorithm), "{id}");
    }
    assert_eq!(provider.asked(), 0, "such a token is not worth a fetch");
}

#[tokio::test]
async fn a_key_restricted_to_one_algorithm_verifies_no_other() {
    let pair = openssl::rsa(2048);
    let restricted = jwk(&pair, Some("a"));
    let mut open = restricted.clone();
    open.common.key_algorithm = None;
    open.common.key_id = Some("b".to_owned());
    let provider = Provider::start(set(&[restricted, open])).await;
    let verifier = provider.verifier(EAGER);
    for (id, algorithm, expected) in [
        ("a", Algorithm::RS256, Ok(())),
        ("a", Algorithm::PS256, unauthorized(Reason::Algorithm)),
        ("b", Algorithm::RS256, Ok(())),
        ("b", Algorithm::PS256, Ok(())),
    ] {
        let mut header = Header::new(algorithm);
        header.kid = Some(id.to_owned());
        let token = encode(&header, &good(), &pair.private).unwrap();
        assert_eq!(says(&verifier, &token).await, expected, "{id} {algorithm:?}");
    }
}

/// RFC 7517, 4.5 allows one id for keys of different types.
#[tokio::test]
async fn keys_of_different_types_may_share_an_id() {
    let pairs = [openssl::ec("P-256"), openssl::ed25519()];
    let provider = Provider::start(set(&pairs.each_ref().map(|pair| jwk(pair, Some("a"))))).await;
    let verifier = provider.verifier(EAGER);
    for pair in &pairs {
        assert_eq!(says(&verifier, &named(pair, Some("a"))).await, Ok(()), "{:?}", pair.algorithm);
    }
}

#[tokio::test]
async fn a_token_that_names_no_key_needs_exactly_one_that_fits() {
    let (one, two, three) = (openssl::ec("P-256"), openssl::ec("P-256"), openssl::ed25519());
    let provider = Provider::start(set(&[jwk(&one, None), jwk(&three, Some("ed"))])).await;
    let verifier = provider.verifier(EAGER);
    assert_eq!(says(&verifier, &named(&one, None)).await, Ok(()));
    assert_eq!(says(&verifier, &named(&three, None)).await, Ok(()));
    assert_eq!(says(&verifier, &named(&one, Some("a"))).await, unauthorized(Reason::UnknownKey));

    provider.answers(set(&[jwk(&one, None), jwk(&two, Some("two"))]));
    assert_eq!(says(&verifier, &named(&two, Some("two"))).await, Ok(()));
    assert_eq!(says(&verifier, &named(&one, None)).await, unauthorized(Reason::KeyNotNamed));
}

#[tokio::test]
async fn old_keys_are_fetched_again_beside_the_tokens_that_use_them() {
    let (old, new) = (openssl::ec("P-256"), openssl::ec("P-256"));
    let provider = Provider::start(set(&[jwk(&old, Some("old"))])).await;
    let verifier = provider.verifier(Pace { age_max: Duration::ZERO, ..EAGER });
    let token = named(&old, Some("old"));
    assert_eq!(says(&verifier, &token).await, Ok(()));
    provider.answers(set(&[jwk(&new, Some("new"))]));
    eventually("the withdrawn key is refused", async || {
        says(&verifier, &token).await == unauthorized(Reason::UnknownKey)
    })
    .await;
}

#[tokio::test]
async fn issuer_and_times_are_checked_for_fetched_keys_too() {
    let pair = openssl::ec("P-256");
    let provider = Provider::start(set(&[jwk(&pair, Some("a"))])).await;
    let options = VerifierOptions {
        keys: KeySource::Jwks(provider.url()),
        issuer: Some("https://id.example/".to_owned()),
        audience: None,
        events_claim: None,
    };
    let verifier = TokenVerifier::with(options, EAGER, reqwest::Client::builder().no_proxy()).unwrap();
    let mut header = Header::new(Algorithm::ES256);
    header.kid = Some("a".to_owned());
    for (claims, expected) in [
        (json!({ "sub": 1, "iss": "https://id.example/", "exp": NOW + 60 }), Ok(())),
        (json!({ "sub": 1, "iss": "https://id.example", "exp": NOW + 60 }), unauthorized(Reason::Issuer)),
        (json!({ "sub": 1, "iss": "https://id.example/", "exp": NOW - 60 }), Err(TokenError::Expired)),
    ] {
        let token = encode(&header, &claims, &pair.private).unwrap();
        assert_eq!(says(&verifier, &token).await, expected, "{claims}");
    }
}

/// The TLS client is set up with the one crypto provider of the process, without anybody having installed it, and a
/// peer that speaks no TLS is an error like any other.
#[tokio::test]
async fn an_https_provider_needs_no_setup_and_its_failure_is_no_panic() {
    let pair = openssl::ec("P-256");
    let provider = Provider::start(set(&[jwk(&pair, Some("a"))])).await;
    let url = format!("https://{}/keys", provider.address).parse().unwrap();
    let verifier = fetching(url, EAGER);
    assert_eq!(says(&verifier, &named(&pair, Some("a"))).await, Err(TokenError::Unavailable));
}

#[tokio::test]
async fn what_is_logged_about_a_failure_helps_and_betrays_nothing() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .with_max_level(tracing::Level::WARN);
    let _guard = tracing::subscriber::set_default(subscriber.finish());

    let mut provider = Provider::start(Answer::Silence).await;
    provider.stop().await;
    let url: Url = format!("http://reader:hunter2@{}/keys?code=hunter3", provider.address).parse().unwrap();
    let verifier = fetching(url, EAGER);
    assert!(!verifier.prepare().await);
    let text = log.text();
    assert!(text.contains(&format!("http://{}/keys", provider.address)), "{text}");
    assert!(text.contains("onnection refused"), "{text}");
    assert!(!text.contains("hunter"), "{text}");
}
