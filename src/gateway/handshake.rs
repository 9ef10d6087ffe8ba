//! Who may connect: the origin of a page, the token of a user, the number of sockets.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use url::form_urlencoded;

use super::Shared;
use super::auth::{Claims, TokenError};
use super::line::Line;
use super::wire::Auth;
use crate::domain::UserId;
use crate::metrics;

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

/// Every `userId` of the query must be the token's.
fn same_user(query: &str, user: UserId) -> bool {
    form_urlencoded::parse(query.as_bytes())
        .filter(|(key, _)| key == "userId")
        .all(|(_, id)| id.parse::<UserId>() == Ok(user))
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

/// The first thing a request of the transport meets: origins are checked (browsers do not ask for permission before
/// a WebSocket), a draining replica takes nobody in, the lines of WebSocket connections are noted, polls of sessions that are being
/// closed end.
pub(super) async fn gate(State(shared): State<Arc<Shared>>, mut request: Request, next: Next) -> Response {
    if !shared.options.origins.admit(request.headers()) {
        metrics::GATEWAY_REFUSED.count(&["origin"]);
        return json(StatusCode::FORBIDDEN, r#"{"code":4,"message":"Forbidden"}"#);
    }
    let query = request.uri().query().unwrap_or_default();
    let sid = value_of(query, "sid");
    let websocket = value_of(query, "transport").as_deref() == Some("websocket");
    let session = sid.as_deref().and_then(|sid| shared.rooms.by_sid(sid));
    if shared.draining.is_cancelled() && session.is_none() {
        metrics::GATEWAY_REFUSED.count(&[Refused::Unavailable.as_str()]);
        return match (&sid, request.method()) {
            (Some(_), &Method::GET) if !websocket => closed(),
            _ => json(StatusCode::SERVICE_UNAVAILABLE, r#"{"code":3,"message":"Service unavailable"}"#),
        };
    }
    if websocket && let Some(line) = request.extensions_mut().get::<Line>().cloned() {
        shared.lines.add(sid.as_deref(), line);
    }
    match session {
        Some(session) if !websocket && request.method() == Method::GET => {
            tokio::select! {
                biased;
                response = next.run(request) => response,
                () = session.closing.cancelled() => {
                    session.told.store(true, Ordering::Release);
                    closed()
                }
            }
        }
        _ => next.run(request).await,
    }
}

/// An Engine.IO close packet: the client sees `transport close` and connects again by itself.
fn closed() -> Response {
    ([(header::CONTENT_TYPE, "text/plain; charset=UTF-8")], Body::from("1")).into_response()
}

fn json(status: StatusCode, body: &'static str) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
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
