//! The JSON of section 1 of the contract: the names, the codes, and writing what clients are told. What they send is
//! read in [`mod@read`].
//!
//! Pure functions over texts and domain types. Knows no sockets.

mod read;

use std::borrow::Cow;
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::ser::Error as _;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use serde_json::value::RawValue;

pub use read::{About, Request, begins_with_a_name, read, split};

use crate::domain::{
    Availability, CategoryId, EventId, Grant, Instant, Lock, LockId, OrderResult, Personal, Quantity, ReleaseReason,
    RequestId, SessionId, UserId,
};

/// A message that clients may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    /// `join-event-room`.
    Join,
    /// `leave-event-room`.
    Leave,
    /// `lock-tickets`.
    Lock,
    /// `unlock-tickets`.
    Unlock,
    /// `get-my-locks`.
    MyLocks,
    /// `heartbeat`.
    Heartbeat,
    /// `refresh-token`.
    Refresh,
}

impl Name {
    /// Every one of them.
    pub const ALL: [Self; 7] =
        [Self::Join, Self::Leave, Self::Lock, Self::Unlock, Self::MyLocks, Self::Heartbeat, Self::Refresh];

    /// The name on the wire, also the metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Join => "join-event-room",
            Self::Leave => "leave-event-room",
            Self::Lock => "lock-tickets",
            Self::Unlock => "unlock-tickets",
            Self::MyLocks => "get-my-locks",
            Self::Heartbeat => "heartbeat",
            Self::Refresh => "refresh-token",
        }
    }

    /// The name of the message that answers it.
    pub const fn answer(self) -> &'static str {
        match self {
            Self::Join => "joined-event-room",
            Self::Leave => "left-event-room",
            Self::Lock => "lock-tickets-response",
            Self::Unlock => "unlock-tickets-response",
            Self::MyLocks => "my-locks-response",
            Self::Heartbeat => "heartbeat-response",
            Self::Refresh => "refresh-token-response",
        }
    }

    /// `None` for a name that no client may send.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|name| name.as_str() == text)
    }
}

/// The stable code of a refusal, also the metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Not the token's user, or no valid token.
    Unauthorized,
    /// The token ran out.
    TokenExpired,
    /// Unreadable, or not what the contract says.
    InvalidRequest,
    /// The events-service does not know the event.
    EventNotFound,
    /// Closed for sale.
    EventClosed,
    /// The event has no such category.
    CategoryNotFound,
    /// Fewer are free than asked for.
    InsufficientTickets,
    /// Nothing is free and nothing is locked.
    SoldOut,
    /// One active lock per user and category.
    AlreadyLocked,
    /// More than a lock, a user or a socket may have.
    LimitExceeded,
    /// Too many tries.
    RateLimited,
    /// The stock cannot be known.
    InventoryUnavailable,
    /// No such lock of this user.
    LockNotFound,
    /// The ledger did not answer in time.
    Unavailable,
}

impl Code {
    /// The code on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::TokenExpired => "token_expired",
            Self::InvalidRequest => "invalid_request",
            Self::EventNotFound => "event_not_found",
            Self::EventClosed => "event_closed",
            Self::CategoryNotFound => "category_not_found",
            Self::InsufficientTickets => "insufficient_tickets",
            Self::SoldOut => "sold_out",
            Self::AlreadyLocked => "already_locked",
            Self::LimitExceeded => "limit_exceeded",
            Self::RateLimited => "rate_limited",
            Self::InventoryUnavailable => "inventory_unavailable",
            Self::LockNotFound => "lock_not_found",
            Self::Unavailable => "unavailable",
        }
    }

    /// The text that goes with it where nothing more is to be said.
    const fn message(self) -> &'static str {
        match self {
            Self::Unauthorized => "Unauthorized",
            Self::TokenExpired => "Your session has expired. Please sign in again.",
            Self::InvalidRequest => "The request cannot be read",
            Self::EventNotFound => "Event not found",
            Self::EventClosed => "Ticket sales are closed",
            Self::CategoryNotFound => "Ticket category not found",
            Self::InsufficientTickets | Self::SoldOut => "Only 0 tickets available",
            Self::AlreadyLocked => "You already have tickets locked for this category",
            Self::LimitExceeded => "You cannot have more tickets of this event",
            Self::RateLimited => "Too many requests. Please try again in a moment.",
            Self::InventoryUnavailable => "Failed to verify ticket availability",
            Self::LockNotFound => "No tickets found to unlock",
            Self::Unavailable => "The service did not answer in time. Please try again.",
        }
    }
}

impl From<super::auth::TokenError> for Code {
    fn from(error: super::auth::TokenError) -> Self {
        match error {
            super::auth::TokenError::Unauthorized(_) => Self::Unauthorized,
            super::auth::TokenError::Expired => Self::TokenExpired,
            super::auth::TokenError::Unavailable => Self::Unavailable,
        }
    }
}

/// Why a request is not granted, with what the client may see of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What kind.
    pub code: Code,
    /// The text for people.
    pub message: Cow<'static, str>,
    /// What could be locked now, where that is the reason.
    pub available: Option<u64>,
    /// When to try again, where that is known.
    pub retry_after: Option<Duration>,
    /// The lock in question.
    pub lock: Option<LockId>,
}

impl Refusal {
    /// With the code's own text.
    pub const fn new(code: Code) -> Self {
        Self { code, message: Cow::Borrowed(code.message()), available: None, retry_after: None, lock: None }
    }

    /// With a text that says more.
    pub fn saying(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self { message: message.into(), ..Self::new(code) }
    }

    /// Fewer are free than asked for.
    pub fn short(code: Code, available: u64) -> Self {
        let message = format!("Only {available} tickets available");
        Self { available: Some(available), ..Self::saying(code, message) }
    }

    /// Too early.
    pub fn later(retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(Code::RateLimited) }
    }
}

/// What the transport says of a session when it opens it, as far as it matters.
#[derive(Deserialize)]
struct Open {
    sid: Box<str>,
}

/// The session's id in the Engine.IO packet that says that it is open.
pub fn opened(packet: &str) -> Option<Box<str>> {
    let open: Open = serde_json::from_str(packet.strip_prefix('0')?).ok()?;
    Some(open.sid)
}

/// An instant of the ledger's clock as the contract writes it.
pub fn iso(at: Instant) -> String {
    i64::try_from(at.as_ms())
        .ok()
        .and_then(DateTime::<Utc>::from_timestamp_millis)
        .unwrap_or_default()
        .to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// A rendered message: encoded once, sent to any number of sockets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Json(Box<str>);

impl Json {
    /// Its text.
    pub fn get(&self) -> &str {
        &self.0
    }
}

/// As it is; for socketioxide, which writes what goes to a session that polls.
impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_json::from_str::<&RawValue>(&self.0).map_err(S::Error::custom)?.serialize(serializer)
    }
}

pub(super) fn json(value: &impl Serialize) -> Json {
    // Texts, numbers and lists of them: nothing that JSON cannot hold.
    Json(serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned()).into())
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LockJson {
    lock_id: String,
    event_id: u64,
    category_id: u64,
    quantity: u32,
    user_id: u64,
    created_at: String,
    expires_at: String,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    session_id: Option<String>,
}

impl From<&Lock> for LockJson {
    fn from(lock: &Lock) -> Self {
        Self {
            lock_id: lock.id.to_string(),
            event_id: lock.event().value(),
            category_id: lock.category.value(),
            quantity: lock.quantity.value(),
            user_id: lock.user.value(),
            created_at: iso(lock.created_at),
            expires_at: iso(lock.deadline),
            status: lock.status.as_str(),
            session_id: lock.session.map(|session| session.to_string()),
        }
    }
}

fn locks_json(locks: &[Lock]) -> Vec<LockJson> {
    locks.iter().map(LockJson::from).collect()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct AvailabilityJson {
    event_id: u64,
    category_id: u64,
    available_tickets: u64,
    locked_tickets: u64,
    total_tickets: u64,
    timestamp: String,
    status: &'static str,
    version: u64,
}

impl From<&Availability> for AvailabilityJson {
    fn from(counts: &Availability) -> Self {
        Self {
            event_id: counts.event.value(),
            category_id: counts.category.value(),
            available_tickets: counts.available(),
            locked_tickets: counts.locked(),
            total_tickets: counts.total,
            timestamp: iso(counts.at),
            status: counts.status().as_str(),
            version: counts.version,
        }
    }
}

/// `availability-update`.
pub fn availability(counts: &Availability) -> Json {
    json(&AvailabilityJson::from(counts))
}

/// `connected`.
pub fn connected(session: SessionId, user: UserId, now: Instant, locks: &[Lock]) -> Json {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Connected {
        success: bool,
        session_id: String,
        message: &'static str,
        user_id: u64,
        server_time: String,
        locks: Vec<LockJson>,
    }
    json(&Connected {
        success: true,
        session_id: session.to_string(),
        message: "Connected to the realtime service",
        user_id: user.value(),
        server_time: iso(now),
        locks: locks_json(locks),
    })
}

/// `joined-event-room`.
pub fn joined(event: EventId, availability: &[Availability], locks: &[Lock]) -> Json {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Joined {
        success: bool,
        event_id: u64,
        message: String,
        availability: Vec<AvailabilityJson>,
        locks: Vec<LockJson>,
    }
    json(&Joined {
        success: true,
        event_id: event.value(),
        message: format!("Joined the room of event {event}"),
        availability: availability.iter().map(AvailabilityJson::from).collect(),
        locks: locks_json(locks),
    })
}

/// `left-event-room`.
pub fn left(event: EventId) -> Json {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Left {
        success: bool,
        event_id: u64,
        message: String,
    }
    json(&Left { success: true, event_id: event.value(), message: format!("Left the room of event {event}") })
}

/// `lock-tickets-response`, granted. Written by hand, as the next one: of numbers, ids and instants nothing needs to be
/// escaped, and to look for that took a tenth of the service's own time for a lock.
pub fn granted(grant: &Grant, category: CategoryId, quantity: Quantity, request: Option<&RequestId>) -> Json {
    let Grant { lock, deadline, available, version: _, now } = grant;
    let request = request.map_or_else(String::new, |request| format!(",\"requestId\":{}", json(&request.as_str()).0));
    let text = format!(
        "{{\"success\":true,\"lockId\":\"{lock}\",\"expiresAt\":\"{}\",\"availableTickets\":{available},\"eventId\":{},\
         \"categoryId\":{category},\"quantity\":{quantity},\"serverTime\":\"{}\"{request}}}",
        iso(*deadline),
        lock.event(),
        iso(*now),
    );
    Json(text.into())
}

/// `unlock-tickets-response`, given back.
pub fn unlocked(lock: LockId) -> Json {
    let text = format!("{{\"success\":true,\"message\":\"Tickets unlocked successfully\",\"lockId\":\"{lock}\"}}");
    Json(text.into())
}

/// `my-locks-response`.
pub fn my_locks(locks: &[Lock]) -> Json {
    #[derive(Serialize)]
    struct MyLocks {
        locks: Vec<LockJson>,
    }
    json(&MyLocks { locks: locks_json(locks) })
}

/// `heartbeat-response`.
pub fn heartbeat(now: Instant) -> Json {
    #[derive(Serialize)]
    struct Heartbeat {
        timestamp: String,
    }
    json(&Heartbeat { timestamp: iso(now) })
}

/// `refresh-token-response`, accepted.
pub fn refreshed(expires_at: Instant) -> Json {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Refreshed {
        success: bool,
        expires_at: String,
    }
    json(&Refreshed { success: true, expires_at: iso(expires_at) })
}

/// The refusal of any request; `about` is empty for those that carry no ids. Also the `error` message.
pub fn refused(refusal: &Refusal, about: &About) -> Json {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Refused<'a> {
        success: bool,
        code: &'static str,
        message: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        available_tickets: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        lock_id: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        event_id: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        category_id: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        request_id: Option<&'a str>,
    }
    json(&Refused {
        success: false,
        code: refusal.code.as_str(),
        message: &refusal.message,
        available_tickets: refusal.available,
        lock_id: refusal.lock.map(|lock| lock.to_string()),
        event_id: about.event.map(EventId::value),
        category_id: about.category.map(CategoryId::value),
        // Rounded up: a retry after that many milliseconds is late enough.
        retry_after_ms: refusal
            .retry_after
            .map(|after| after.as_micros().div_ceil(1000).try_into().unwrap_or(u64::MAX)),
        request_id: about.request.as_ref().map(RequestId::as_str),
    })
}

/// `tickets-locked-by-other-user`, or with a reason `tickets-released-by-other-user`.
pub fn moved(event: EventId, category: CategoryId, quantity: u64, reason: Option<ReleaseReason>) -> Json {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Moved {
        event_id: u64,
        category_id: u64,
        quantity: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<&'static str>,
    }
    json(&Moved {
        event_id: event.value(),
        category_id: category.value(),
        quantity,
        reason: reason.map(ReleaseReason::as_str),
    })
}

/// A message for all sockets of a user: its name and its data; `None` for what is not for clients.
pub fn personal(message: &Personal) -> Option<(&'static str, Json)> {
    Some(match message {
        Personal::Expired { lock, category, quantity } => ("lock-expired", ended(*lock, *category, *quantity, None)),
        Personal::Released { lock, category, quantity, reason, by: _ } => {
            ("lock-released", ended(*lock, *category, *quantity, Some(*reason)))
        }
        Personal::Expiring { lock, deadline, remaining } => ("lock-expiring", expiring(*lock, *deadline, *remaining)),
        Personal::Order { result, order, order_is_number, event, category, quantity } => {
            let (name, message) = match result {
                OrderResult::Completed => ("order-completed", "Your order has been completed successfully"),
                OrderResult::Cancelled => ("order-cancelled", "Your order has been cancelled"),
            };
            let order = match order.as_str().parse::<u64>() {
                Ok(number) if *order_is_number => Value::from(number),
                _ => Value::from(order.as_str()),
            };
            (name, ordered(order, *event, *category, *quantity, message))
        }
        Personal::Pinned { .. } | Personal::Confirmed { .. } => return None,
    })
}

fn ended(lock: LockId, category: CategoryId, quantity: Quantity, reason: Option<ReleaseReason>) -> Json {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Ended {
        lock_id: String,
        event_id: u64,
        category_id: u64,
        quantity: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<&'static str>,
    }
    json(&Ended {
        lock_id: lock.to_string(),
        event_id: lock.event().value(),
        category_id: category.value(),
        quantity: quantity.value(),
        reason: reason.map(ReleaseReason::as_str),
    })
}

fn expiring(lock: LockId, deadline: Instant, remaining: Duration) -> Json {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Expiring {
        lock_id: String,
        expires_at: String,
        remaining_ms: u64,
    }
    json(&Expiring {
        lock_id: lock.to_string(),
        expires_at: iso(deadline),
        remaining_ms: u64::try_from(remaining.as_millis()).unwrap_or(u64::MAX),
    })
}

fn ordered(order: Value, event: EventId, category: CategoryId, quantity: Quantity, message: &'static str) -> Json {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Ordered {
        order_id: Value,
        event_id: u64,
        category_id: u64,
        quantity: u32,
        message: &'static str,
    }
    json(&Ordered {
        order_id: order,
        event_id: event.value(),
        category_id: category.value(),
        quantity: quantity.value(),
        message,
    })
}

/// The `auth` object of the client; anything else in it is the page's own affair.
#[derive(Debug, Default, Deserialize)]
pub struct Auth {
    /// The token, if it is a text.
    #[serde(default)]
    pub token: Value,
}

#[cfg(test)]
mod tests;
