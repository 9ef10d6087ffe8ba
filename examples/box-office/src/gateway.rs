//! The api gateway: HTTP for pages. It holds nothing; it asks the services behind it.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{Html, IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tower_http::cors::{Any, CorsLayer};
use uuid::Uuid;

use crate::broker::{Broker, CallError};
use crate::config::Queues;
use crate::nest::Refusal;
use crate::token::{LIFETIME, Tokens};

/// An order is answered within 5 s by the orders-service.
const ORDER_TIMEOUT: Duration = Duration::from_secs(8);

const PAGE: &str = include_str!("../../test-client.html");

/// What the routes answer from.
#[derive(Clone)]
pub struct Gateway {
    broker: Arc<Broker>,
    queues: Queues,
    tokens: Arc<Tokens>,
}

/// Who asks: the user of the bearer token.
struct Buyer(i64);

impl FromRequestParts<Gateway> for Buyer {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, gateway: &Gateway) -> Result<Self, Failure> {
        let header = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let user = header.and_then(|text| text.strip_prefix("Bearer ")).and_then(|token| gateway.tokens.user(token));
        user.map(Self).ok_or_else(|| Failure(Refusal::new(401, "unauthorized", "Unauthorized")))
    }
}

/// An error as pages see it: `{status, message, code}`.
struct Failure(Refusal);

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(refusal) => Self(refusal),
            CallError::Unknown(why) => {
                tracing::warn!(why, "a request has no answer");
                let message = "No answer in time. Ask again with the same Idempotency-Key.";
                Self(Refusal::new(503, "unavailable", message))
            }
        }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Refusal { status, code, message } = self.0;
        let answer = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (answer, Json(json!({ "status": answer.as_u16(), "message": message, "code": code }))).into_response()
    }
}

type Answer = Result<Json<Value>, Failure>;

impl Gateway {
    /// Asks these services.
    pub fn new(broker: Arc<Broker>, queues: Queues, jwt_secret: &str) -> Self {
        Self { broker, queues, tokens: Arc::new(Tokens::new(jwt_secret)) }
    }

    /// The HTTP face. Pages of any origin may use it: there are no cookies, only bearer tokens.
    pub fn routes(self) -> Router {
        let cors = CorsLayer::new().allow_origin(Any).allow_methods(Any).allow_headers([
            header::AUTHORIZATION,
            header::CONTENT_TYPE,
            header::HeaderName::from_static("idempotency-key"),
        ]);
        Router::new()
            .route("/api/auth/login", post(login))
            .route("/api/events", get(events))
            .route("/api/events/{id}", get(event))
            .route("/api/orders", get(orders).post(create_order))
            .route("/api/orders/with-lock", post(create_order_with_lock))
            .route("/api/orders/{id}", get(order))
            .route("/api/orders/{id}/cancel", post(cancel_order))
            .route("/demo", get(|| async { Redirect::permanent("/demo/") }))
            .route("/demo/", get(|| async { Html(PAGE) }))
            .route("/livez", get(|| async { "ok" }))
            .fallback(|| async { Failure(Refusal::new(404, "not_found", "Not found")) })
            .layer(cors)
            .with_state(self)
    }

    async fn orders(&self, pattern: &str, data: &Value) -> Answer {
        Ok(Json(self.broker.request_within(ORDER_TIMEOUT, &self.queues.orders, pattern, data).await?))
    }

    async fn create(&self, pattern: &str, buyer: i64, headers: &HeaderMap, body: &[u8]) -> Answer {
        let mut body = parse(body)?;
        let fields = body.as_object_mut();
        let fields =
            fields.ok_or_else(|| Failure(Refusal::new(400, "invalid_request", "The body must be an object")))?;
        // Whose order it is says the token, never the body.
        fields.insert("userId".to_owned(), buyer.into());
        let key =
            match headers.get("idempotency-key") {
                None => Uuid::new_v4(),
                Some(key) => key.to_str().ok().and_then(|key| key.parse().ok()).ok_or_else(|| {
                    Failure(Refusal::new(400, "invalid_request", "The Idempotency-Key must be a UUID"))
                })?,
            };
        fields.insert("requestId".to_owned(), key.to_string().into());
        self.orders(pattern, &body).await
    }
}

fn parse(body: &[u8]) -> Result<Value, Failure> {
    serde_json::from_slice(body).map_err(|error| Failure(Refusal::new(400, "invalid_request", error.to_string())))
}

fn number(id: &str) -> Result<i64, Failure> {
    id.parse().map_err(|_| Failure(Refusal::new(400, "invalid_request", "The id must be an integer")))
}

/// No passwords in a miniature: whoever says so is the user.
async fn login(State(gateway): State<Gateway>, body: Bytes) -> Answer {
    let user = parse(&body)?["userId"].as_i64().filter(|user| (1..1 << 53).contains(user));
    let user = user.ok_or_else(|| {
        Failure(Refusal::new(400, "invalid_request", "userId must be an integer between 1 and 9007199254740991"))
    })?;
    let token = gateway.tokens.issue(user).map_err(|error| {
        tracing::error!(%error, "no token");
        Failure(Refusal::new(500, "internal", "Internal server error"))
    })?;
    Ok(Json(json!({ "token": token, "userId": user, "expiresInMs": LIFETIME.as_secs() * 1000 })))
}

async fn events(State(gateway): State<Gateway>) -> Answer {
    Ok(Json(gateway.broker.request(&gateway.queues.events, "get-events", &json!({})).await?))
}

async fn event(State(gateway): State<Gateway>, Path(id): Path<String>) -> Answer {
    Ok(Json(gateway.broker.request(&gateway.queues.events, "get-event-by-id", &number(&id)?).await?))
}

async fn create_order(State(gateway): State<Gateway>, Buyer(buyer): Buyer, headers: HeaderMap, body: Bytes) -> Answer {
    gateway.create("create-order", buyer, &headers, &body).await
}

async fn create_order_with_lock(
    State(gateway): State<Gateway>,
    Buyer(buyer): Buyer,
    headers: HeaderMap,
    body: Bytes,
) -> Answer {
    gateway.create("create-order-with-lock", buyer, &headers, &body).await
}

async fn orders(State(gateway): State<Gateway>, Buyer(buyer): Buyer) -> Answer {
    gateway.orders("get-orders", &json!({ "userId": buyer })).await
}

async fn order(State(gateway): State<Gateway>, Buyer(buyer): Buyer, Path(id): Path<String>) -> Answer {
    gateway.orders("get-order", &json!({ "userId": buyer, "orderId": number(&id)? })).await
}

async fn cancel_order(State(gateway): State<Gateway>, Buyer(buyer): Buyer, Path(id): Path<String>) -> Answer {
    gateway.orders("cancel-order", &json!({ "userId": buyer, "orderId": number(&id)? })).await
}
