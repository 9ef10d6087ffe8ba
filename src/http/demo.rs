//! `--demo`: a page to try the service with, which loads nothing else, and tokens for anybody.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Query, State, rejection::QueryRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Redirect, Response},
    routing::get,
};

use super::{refusal, wire};
use crate::{domain::UserId, inventory::ListedEvent};

const PAGE: &str = include_str!("../../examples/test-client.html");

/// How long a token that is handed out is good. The page asks for the next one in time.
const TOKEN_TTL: Duration = Duration::from_hours(1);

/// The page has its scripts and style in itself, and nothing from anywhere else.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src *; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Makes a token for a user that is good for so long.
pub type Issue = Arc<dyn Fn(UserId, Duration) -> String + Send + Sync>;

/// What the demo routes answer from.
#[derive(Clone)]
pub struct Demo {
    issue: Issue,
    catalogue: Arc<wire::Catalogue>,
}

impl Demo {
    /// Anybody gets tokens made by `issue`, and the page offers `events`.
    #[must_use]
    pub fn new(issue: Issue, events: &[ListedEvent]) -> Self {
        Self { issue, catalogue: Arc::new(events.into()) }
    }
}

pub(super) fn routes(demo: Demo) -> Router {
    Router::new()
        .route("/demo", get(|| async { Redirect::permanent("/demo/") }))
        .route("/demo/", get(|| async { page() }))
        .route("/demo/catalogue.json", get(catalogue))
        .route("/demo/token", get(token))
        .with_state(demo)
}

fn page() -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, PAGE).into_response()
}

async fn catalogue(State(demo): State<Demo>) -> Response {
    Json(&*demo.catalogue).into_response()
}

async fn token(State(demo): State<Demo>, asked: Result<Query<wire::TokenQuery>, QueryRejection>) -> Response {
    let user = asked.ok().and_then(|Query(asked)| asked.user.parse::<UserId>().ok());
    let Some(user) = user else {
        let message = "The user must be an integer between 1 and 9007199254740991, as in /demo/token?user=7";
        return refusal(StatusCode::BAD_REQUEST, "invalid_request", message);
    };
    let token = (demo.issue)(user, TOKEN_TTL);
    let expires_in_ms = u64::try_from(TOKEN_TTL.as_millis()).unwrap_or(u64::MAX);
    super::fresh(Json(wire::GivenToken { token, user_id: user.value(), expires_in_ms }))
}
