//! Who may connect: the origin of a page, the token of a user, the number of sockets.

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header, request::Parts};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use url::form_urlencoded;

use super::Shared;
use super::auth::{Claims, TokenError};
use super::carrier;
use super::limits::{BODY_TIMEOUT, SID_BYTES_MAX};
use super::polls::Poll;
use super::wire::Auth;
use crate::callers::{Address, Caller, Connection};
use crate::domain::UserId;
use crate::{metrics, telemetry};

/// Engine.IO packets: the transport is closed; nothing, so that a poll ends.
pub(super) const CLOSE: &str = "1";
const NOOP: &str = "6";

/// Which pages may use the service from a browser.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origins {
    /// Any: the token alone decides.
    Any,
    /// Those (`https://shop.example`), and pages that this service serves itself.
    Listed(Vec<String>),
}

impl Origins {
    /// From a list of origins in which `*` stands for any. An empty list admits only pages of this service.
    #[must_use]
    pub fn new(listed: Vec<String>) -> Self {
        if listed.iter().any(|origin| origin == "*") { Self::Any } else { Self::Listed(listed) }
    }

    /// Whether a request may come from where its headers say. Requests without an origin do not come from a page.
    fn admit(&self, headers: &HeaderMap) -> bool {
        let Self::Listed(listed) = self else { return true };
        let Some(origin) = headers.get(header::ORIGIN) else { return true };
        let Ok(origin) = origin.to_str() else { return false };
        let own = || {
            let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
            let authority = origin.split_once("://").map(|(_, authority)| authority);
            host.is_some() && host == authority
        };
        listed.iter().any(|admitted| admitted.eq_ignore_ascii_case(origin)) || own()
    }

    /// What browsers are told about it.
    pub fn cors(&self) -> CorsLayer {
        let cors =
            CorsLayer::new().allow_methods([Method::GET, Method::POST]).allow_headers(AllowHeaders::mirror_request());
        match self {
            Self::Any => cors.allow_origin(tower_http::cors::Any),
            Self::Listed(listed) => {
                let listed = listed.iter().filter_map(|origin| HeaderValue::from_str(origin).ok());
                cors.allow_origin(AllowOrigin::list(listed)).allow_credentials(true)
            }
        }
    }
}

/// Why a connection is not accepted. The text is the `message` of the client's `connect_error`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// No token, or not a good one.
    Unauthorized,
    /// The token was good and ran out.
    TokenExpired,
    /// `query.userId` is somebody else.
    UserMismatch,
    /// The user or the replica has as many sockets as allowed.
    TooManyConnections,
    /// Tokens cannot be verified now, or this replica is going away.
    Unavailable,
}

impl Refused {
    /// The word on the wire, also the metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::TokenExpired => "token_expired",
            Self::UserMismatch => "user_mismatch",
            Self::TooManyConnections => "too_many_connections",
            Self::Unavailable => "unavailable",
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<TokenError> for Refused {
    fn from(error: TokenError) -> Self {
        match error {
            TokenError::Unauthorized(_) => Self::Unauthorized,
            TokenError::Expired => Self::TokenExpired,
            TokenError::Unavailable => Self::Unavailable,
        }
    }
}

/// The token of a handshake: `auth.token`, else `query.token`, else the `Authorization` header.
fn token(auth: &Auth, query: &str, headers: &HeaderMap) -> Option<String> {
    let in_auth = || auth.token.as_str().map(str::to_owned);
    let in_query = || value_of(query, "token");
    let in_header = || Some(headers.get(header::AUTHORIZATION)?.to_str().ok()?.to_owned());
    let given = |token: String| {
        let token = match token.get(..7) {
            Some(scheme) if scheme.eq_ignore_ascii_case("bearer ") => token[7..].trim().to_owned(),
            _ => token,
        };
        Some(token).filter(|token| !token.is_empty())
    };
    in_auth().and_then(given).or_else(|| in_query().and_then(given)).or_else(|| in_header().and_then(given))
}

fn value_of(query: &str, name: &str) -> Option<String> {
    form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
}

/// A parameter of the transport, read as engineioxide reads it: as it is written.
fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

fn is_websocket(query: &str) -> bool {
    parameter(query, "transport").and_then(|value| value.split('=').next()) == Some("websocket")
}

/// Every `userId` of the query must be the token's.
fn same_user(query: &str, user: UserId) -> bool {
    form_urlencoded::parse(query.as_bytes())
        .filter(|(key, _)| key == "userId")
        .all(|(_, id)| id.parse::<UserId>() == Ok(user))
}

/// Which trace a client says that its session belongs to.
pub(super) struct Trace<'a> {
    parent: Option<Cow<'a, str>>,
    state: Option<Cow<'a, str>>,
}

impl<'a> Trace<'a> {
    /// From the headers of its handshake or, as browsers cannot set them, from its query.
    pub(super) fn of(parts: &'a Parts) -> Self {
        let said = |name: &str| {
            let mut in_headers = parts.headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
            match in_headers.next() {
                Some(first) => Some(in_headers.fold(Cow::Borrowed(first), |all, next| format!("{all},{next}").into())),
                None => value_of(parts.uri.query().unwrap_or_default(), name).map(Cow::Owned),
            }
        };
        let parent = said("traceparent");
        let state = if parent.is_some() && telemetry::exports() { said("tracestate") } else { None };
        Self { parent, state }
    }

    pub(super) fn headers(&self) -> telemetry::Headers<'_> {
        telemetry::Headers { parent: self.parent.as_deref(), state: self.state.as_deref() }
    }
}

/// Whom a handshake is for.
pub(super) async fn check(shared: &Shared, auth: &Auth, query: &str, headers: &HeaderMap) -> Result<Claims, Refused> {
    let token = token(auth, query, headers).ok_or(Refused::Unauthorized)?;
    let claims = shared.verifier.verify(&token).await.map_err(|error| {
        tracing::debug!(%error, "a token was not accepted");
        Refused::from(error)
    })?;
    if same_user(query, claims.user) { Ok(claims) } else { Err(Refused::UserMismatch) }
}

/// What is remembered of a transport whose address is limited, for as long as it lives.
#[derive(Clone)]
pub(super) struct Guest {
    pub address: Caller<Address>,
    pub connection: Arc<Connection>,
}

/// Counts a transport that is being opened for its address; or says how long to wait.
fn guest(shared: &Shared, request: &Request) -> Result<Option<Guest>, Duration> {
    let Some(ConnectInfo(peer)) = request.extensions().get::<ConnectInfo<SocketAddr>>() else { return Ok(None) };
    let addresses = &shared.options.addresses;
    let forwarded = request.headers().get_all("x-forwarded-for").iter().map(HeaderValue::as_bytes);
    let refused = |limit: &'static str, wait: Duration| {
        metrics::GATEWAY_LIMITED.count(&[limit]);
        wait
    };
    let counted = addresses.quotas.caller(addresses.of(peer.ip(), forwarded));
    let Some(address) = counted.map_err(|_| refused("addresses", Duration::from_secs(1)))? else { return Ok(None) };
    address.transport().map_err(|wait| refused("address_handshakes", wait))?;
    let connection = address.connection().ok_or_else(|| refused("address_connections", Duration::from_secs(5)))?;
    Ok(Some(Guest { address, connection: Arc::new(connection) }))
}

/// Too many: browsers' clients take it for a broken connection and try again, each time later.
fn busy(wait: Duration) -> Response {
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    let body = json(StatusCode::TOO_MANY_REQUESTS, r#"{"code":3,"message":"Too many requests"}"#);
    ([(header::RETRY_AFTER, seconds.to_string())], body).into_response()
}

/// The first thing a request of the transport meets: origins are checked (browsers do not ask for permission before
/// a WebSocket), a draining replica takes nobody in, the lines of WebSocket connections are noted, polls of sessions that are being
/// closed end.
pub(super) async fn gate(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    if !shared.options.origins.admit(request.headers()) {
        metrics::GATEWAY_REFUSED.count(&["origin"]);
        return json(StatusCode::FORBIDDEN, r#"{"code":4,"message":"Forbidden"}"#);
    }
    let query = request.uri().query().unwrap_or_default();
    let sid = parameter(query, "sid").map(str::to_owned);
    if sid.as_ref().is_some_and(|sid| sid.len() > SID_BYTES_MAX) {
        return json(StatusCode::BAD_REQUEST, r#"{"code":1,"message":"Session ID unknown"}"#);
    }
    let websocket = is_websocket(query);
    let session = sid.as_deref().and_then(|sid| shared.rooms.by_sid(sid));
    if shared.draining.is_cancelled() && session.is_none() {
        metrics::GATEWAY_REFUSED.count(&[Refused::Unavailable.as_str()]);
        return match (&sid, request.method()) {
            (Some(_), &Method::GET) if !websocket => polled(CLOSE),
            _ => json(StatusCode::SERVICE_UNAVAILABLE, r#"{"code":3,"message":"Service unavailable"}"#),
        };
    }
    if sid.is_none() {
        match guest(&shared, &request) {
            Ok(Some(guest)) => {
                request.extensions_mut().insert(guest);
            }
            Ok(None) => {}
            Err(wait) => return busy(wait),
        }
    }
    if websocket {
        return match *request.method() {
            Method::GET => carrier::open(&shared, sid.as_deref(), request).await,
            _ => bad_request(),
        };
    }
    // Before it is looked whether the session crosses: who does so waits for those that are counted.
    let poll = sid.as_deref().filter(|_| request.method() == Method::GET).map(|sid| shared.polls.begin(sid));
    let nudged = poll.as_ref().map(Poll::nudged);
    if sid.as_deref().is_some_and(|sid| shared.lines.find(sid).is_some()) {
        return bad_request();
    }
    let mut unanswered = Unanswered { shared: &shared, sid: sid.as_deref().filter(|_| poll.is_some()) };
    let response = match nudged {
        Some(nudged) => {
            let closing = async {
                match &session {
                    Some(session) => session.closing.cancelled().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                response = next.run(request) => response,
                () = nudged => polled(NOOP),
                () = closing => {
                    if let Some(session) = &session {
                        session.told.store(true, Ordering::Release);
                    }
                    polled(CLOSE)
                }
            }
        }
        None if request.method() == Method::POST => {
            tokio::time::timeout(BODY_TIMEOUT, next.run(request)).await.unwrap_or_else(|_| {
                metrics::GATEWAY_LIMITED.count(&["slow_body"]);
                json(StatusCode::REQUEST_TIMEOUT, r#"{"code":3,"message":"Request timeout"}"#)
            })
        }
        None => next.run(request).await,
    };
    unanswered.sid = None;
    response
}

/// A poll whose client goes away before it is answered: whatever it was to carry is lost, and its client takes that for the
/// end of the session, as it does with the server in Node.
struct Unanswered<'a> {
    shared: &'a Arc<Shared>,
    sid: Option<&'a str>,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        let Some(sid) = self.sid.map(str::to_owned) else { return };
        let shared = Arc::clone(self.shared);
        tokio::spawn(async move {
            // It may be on a WebSocket by now, and what it was to be told with it.
            if shared.lines.find(&sid).is_none() {
                shared.close_polling(&sid).await;
            }
        });
    }
}

/// The answer to a poll that ends with an Engine.IO packet of ours: at a close packet the client sees `transport close` and
/// connects again by itself.
fn polled(packet: &'static str) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; charset=UTF-8")], Body::from(packet)).into_response()
}

/// Something that the transport does not do: as socketioxide answers it.
pub(super) fn bad_request() -> Response {
    json(StatusCode::BAD_REQUEST, r#"{"code":3,"message":"Bad request"}"#)
}

fn json(status: StatusCode, body: &'static str) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing {
    use super::{Auth, HeaderMap, Origins, UserId, header, same_user, token};

    /// Everything of a handshake that is read before its token is verified.
    pub fn read(auth: &Auth, query: &str, headers: &HeaderMap) {
        if let Some(token) = token(auth, query, headers) {
            assert!(!token.is_empty(), "no token is none");
        }
        if let Ok(user) = UserId::new(7) {
            same_user(query, user);
        }
        assert!(Origins::Any.admit(headers));
        let listed = Origins::new(vec!["https://shop.example".to_owned()]);
        let foreign = headers.get(header::ORIGIN).is_some_and(|origin| origin == "https://evil.example");
        let own = headers.get(header::HOST).is_some_and(|host| host == "evil.example");
        assert!(!(listed.admit(headers) && foreign && !own));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        list.iter().map(|&(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect()
    }

    fn auth(json: &str) -> Auth {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_token_is_looked_for_in_auth_then_in_the_query_then_in_the_header() {
        let header = headers(&[("authorization", "Bearer c")]);
        let find = |json: &str, query: &str, headers: &HeaderMap| token(&auth(json), query, headers);
        assert_eq!(find(r#"{"token":"a"}"#, "token=b", &header).as_deref(), Some("a"));
        assert_eq!(find(r#"{"token":null}"#, "token=b%2B", &header).as_deref(), Some("b+"));
        assert_eq!(find(r#"{"token":""}"#, "x=1", &header).as_deref(), Some("c"));
        assert_eq!(find(r#"{"token":"bearer a"}"#, "", &header).as_deref(), Some("a"));
        assert_eq!(find(r#"{"token":7}"#, "token=", &headers(&[])), None);
    }

    #[test]
    fn a_user_id_in_the_query_must_be_the_tokens() {
        let user = UserId::new(7).unwrap();
        for (query, same) in [
            ("", true),
            ("EIO=4", true),
            ("userId=7", true),
            ("userId=8", false),
            ("userId=", false),
            ("userId=undefined", false),
            ("userId=7&userId=8", false),
        ] {
            assert_eq!(same_user(query, user), same, "{query}");
        }
    }

    #[test]
    fn origins_are_compared_whole() {
        let listed = Origins::new(vec!["https://shop.example".into()]);
        for (origin, admitted) in [
            ("https://shop.example", true),
            ("https://shop.example.evil", false),
            ("http://shop.example", false),
            ("https://evil.example", false),
            ("null", false),
            ("http://tickets.example:8880", true),
        ] {
            let headers = headers(&[("origin", origin), ("host", "tickets.example:8880")]);
            assert_eq!(listed.admit(&headers), admitted, "{origin}");
        }
        assert!(listed.admit(&headers(&[("host", "x")])), "not from a page");
        assert!(Origins::new(vec!["*".into()]).admit(&headers(&[("origin", "https://any.example")])));
        assert!(!Origins::new(vec![]).admit(&headers(&[("origin", "https://any.example")])));
    }
}
