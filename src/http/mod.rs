//! HTTP: what people, probes and Prometheus ask the process.
//!
//! Owns the routes beside Socket.IO and the connections that carry both. Answers are JSON, refusals too:
//! `{code, message}` with the codes of the sockets. Knows no sockets, no rooms and no tokens, except that the demo hands
//! tokens out.

pub mod demo;
pub mod health;
pub mod probe;
pub mod serve;
pub mod stats;
mod wire;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{ConnectInfo, MatchedPath, Path, Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::json;

use crate::{
    callers::Addresses,
    domain::EventId,
    inventory::{Stock, StockError},
    ledger::LedgerError,
    metrics,
};
use demo::Demo;
use health::Health;
use stats::Stats;

/// The name under which existing callers know the service.
pub const SERVICE: &str = "realtime-service";

/// What the routes answer from.
#[derive(Clone)]
pub struct Sources {
    /// Counts over the fleet.
    pub stats: Arc<Stats>,
    /// Whether this replica can serve.
    pub health: Arc<Health>,
    /// The stock and, behind it, the ledger.
    pub stock: Arc<Stock>,
    /// The process's metrics.
    pub metrics: metrics::Handle,
    /// Within which every request is answered.
    pub request_timeout: Duration,
    /// What one address may ask.
    pub addresses: Arc<Addresses>,
}

/// The routes for everybody; with those of [`admin`] unless they are served elsewhere.
pub fn public(sources: &Sources, demo: Option<Demo>, with_admin: bool) -> Router {
    let mut router = Router::new()
        .route("/", get(root))
        .route("/stats", get(fleet_stats))
        .route("/events/{id}/availability", get(availability))
        .route_layer(middleware::from_fn_with_state(sources.clone(), limit))
        .with_state(sources.clone());
    if let Some(demo) = demo {
        router = router.merge(demo::routes(demo));
    }
    if with_admin {
        router = router.merge(admin_routes(sources));
    }
    with_refusals(router)
}

/// The routes for operators.
pub fn admin(sources: &Sources) -> Router {
    with_refusals(admin_routes(sources))
}

fn admin_routes(sources: &Sources) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(prometheus))
        .with_state(sources.clone())
}

fn with_refusals(router: Router) -> Router {
    router
        .method_not_allowed_fallback(|| async {
            refusal(StatusCode::METHOD_NOT_ALLOWED, "invalid_request", "This path is read with GET")
        })
        .fallback(not_found)
        .layer(middleware::from_fn(count))
}

/// A refusal as JSON.
fn refusal(status: StatusCode, code: &'static str, message: &str) -> Response {
    (status, Json(json!({ "code": code, "message": message }))).into_response()
}

async fn not_found() -> Response {
    refusal(StatusCode::NOT_FOUND, "not_found", "No such path")
}

/// Refuses an address that has asked too much: behind these routes are Redis and the events-service.
async fn limit(State(sources): State<Sources>, request: Request, next: Next) -> Response {
    let Some(ConnectInfo(peer)) = request.extensions().get::<ConnectInfo<SocketAddr>>() else {
        return next.run(request).await;
    };
    let forwarded = request.headers().get_all("x-forwarded-for").iter().map(HeaderValue::as_bytes);
    let wait = match sources.addresses.quotas.caller(sources.addresses.of(peer.ip(), forwarded)) {
        Ok(None) => None,
        Ok(Some(address)) => address.message().err(),
        Err(_) => Some(Duration::from_secs(1)),
    };
    let Some(wait) = wait else { return next.run(request).await };
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    let refusal = refusal(StatusCode::TOO_MANY_REQUESTS, "rate_limited", "Too many requests");
    ([(header::RETRY_AFTER, seconds.to_string())], refusal).into_response()
}

async fn root() -> Response {
    Json(wire::Root { service: SERVICE, status: "active", version: env!("CARGO_PKG_VERSION") }).into_response()
}

async fn fleet_stats(State(sources): State<Sources>) -> Response {
    match tokio::time::timeout(sources.request_timeout, sources.stats.json()).await {
        Ok(Ok(stats)) => fresh(Json(stats)),
        Ok(Err(error)) => unanswered("stats", &error),
        Err(_) => refusal(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "The ledger did not answer in time"),
    }
}

async fn availability(State(sources): State<Sources>, Path(id): Path<String>) -> Response {
    let event = match id.parse::<EventId>() {
        Ok(event) => event,
        Err(error) => return refusal(StatusCode::BAD_REQUEST, "invalid_request", &format!("The event id: {error}")),
    };
    // A task of its own: a request to the ledger is not to be dropped half-way when the client goes.
    let asked = tokio::spawn(async move { sources.stock.availability(event).await });
    match tokio::time::timeout(sources.request_timeout, asked).await {
        Ok(Ok(Ok(categories))) => fresh(Json(categories.iter().map(wire::Availability::from).collect::<Vec<_>>())),
        Ok(Ok(Err(StockError::EventNotFound))) => refusal(StatusCode::NOT_FOUND, "event_not_found", "Event not found"),
        Ok(Ok(Err(StockError::Unavailable(_)))) => {
            refusal(StatusCode::SERVICE_UNAVAILABLE, "inventory_unavailable", "Failed to verify ticket availability")
        }
        Ok(Ok(Err(StockError::Ledger(error)))) => unanswered("availability", &error),
        Ok(Err(_)) | Err(_) => {
            refusal(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "The ledger did not answer in time")
        }
    }
}

fn unanswered(what: &'static str, error: &LedgerError) -> Response {
    tracing::debug!(what, %error, "the ledger gave no answer");
    refusal(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "The ledger did not answer")
}

/// An answer that is old as soon as it is read: no cache may keep it.
fn fresh(body: impl IntoResponse) -> Response {
    ([(header::CACHE_CONTROL, "no-store")], body).into_response()
}

async fn livez() -> Response {
    fresh(Json(json!({ "status": "alive" })))
}

async fn readyz(State(sources): State<Sources>) -> Response {
    let verdict = sources.health.verdict();
    let status = if verdict.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    fresh((status, Json(wire::Readiness::from(&verdict))))
}

async fn prometheus(State(sources): State<Sources>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], sources.metrics.render()).into_response()
}

/// Counts an answer under its route's name.
async fn count(path: Option<MatchedPath>, request: Request, next: Next) -> Response {
    let route = match path.as_ref().map(MatchedPath::as_str) {
        Some("/") => "root",
        Some("/stats") => "stats",
        Some("/events/{id}/availability") => "availability",
        Some("/livez") => "livez",
        Some("/readyz") => "readyz",
        Some("/metrics") => "metrics",
        Some(path) if path.starts_with("/demo") => "demo",
        Some(_) | None => "other",
    };
    let response = next.run(request).await;
    let class = match response.status().as_u16() {
        200..=299 => "2xx",
        300..=399 => "3xx",
        400..=499 => "4xx",
        _ => "5xx",
    };
    metrics::HTTP_REQUESTS.count(&[route, class]);
    response
}
