//! The bytes of NestJS's RabbitMQ format: request bodies in, reply bodies out.
//!
//! Pure: no I/O, no clock, no async, and nothing here panics on any input. What a body means is decided as a NestJS
//! server decides it; what a reply looks like is what a NestJS server writes. The peers are JavaScript, so whatever
//! `JSON.stringify` can produce is understood: a repeated key counts with its last value, `1.0` is the integer 1, and
//! texts that are not looked at may hold lone surrogates.

use std::borrow::Cow;
use std::fmt;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::de::{Deserializer as _, MapAccess, Visitor};
use serde::{Serialize, Serializer};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::domain::{
    CategoryId, EventId, IdError, Instant, Lock, LockId, OrderId, OrderReport, OrderResult, Quantity, UserId,
};

/// The largest body that is looked at: a thousand times the largest request of the contract.
pub const BODY_BYTES_MAX: usize = 256 * 1024;

/// The largest integer that a JavaScript peer keeps exact.
const INTEGER_MAX: u64 = (1 << 53) - 1;

/// What a NestJS server says when a handler throws anything but an `RpcException`.
pub const INTERNAL: &str = "Internal server error";

/// What a NestJS server says when no handler has the pattern.
const NO_HANDLER: &str = "There is no matching message handler defined in the remote service.";

/// A body, taken apart. Borrows from it.
#[derive(Debug, Clone)]
pub struct Packet<'a> {
    /// The pattern in its normal form; `None` when it is absent or `null`.
    pub pattern: Option<String>,
    /// The data, unread; `None` when it is absent.
    pub data: Option<&'a RawValue>,
    /// The request's id, spelled as it came. Present makes it a request, even `null`; absent makes it an event.
    pub id: Option<&'a RawValue>,
}

/// Why a body is neither a request nor an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Undecodable {
    /// Longer than [`BODY_BYTES_MAX`].
    #[error("the body is longer than {BODY_BYTES_MAX} bytes")]
    TooLong,
    /// Not one JSON object.
    #[error("the body is not a JSON object")]
    NotAnObject,
    /// An object with neither a pattern nor data.
    #[error("the body has neither a pattern nor data")]
    Empty,
}

/// A body as text, as Node's `Buffer.toString()` makes it: bytes that are not UTF-8 become U+FFFD.
#[must_use]
pub fn text(body: &[u8]) -> Cow<'_, str> {
    // Longer bodies are refused by `Packet::decode`; one byte more is enough for it to see that.
    String::from_utf8_lossy(body.get(..=BODY_BYTES_MAX).unwrap_or(body))
}

impl<'a> Packet<'a> {
    /// Takes a body apart.
    ///
    /// # Errors
    /// When it can be neither a request nor an event. No reply is due then, whatever its properties say.
    pub fn decode(text: &'a str) -> Result<Self, Undecodable> {
        if text.len() > BODY_BYTES_MAX {
            return Err(Undecodable::TooLong);
        }
        let [pattern, data, id] = members(text, ["pattern", "data", "id"]).ok_or(Undecodable::NotAnObject)?;
        if pattern.is_none() && data.is_none() {
            return Err(Undecodable::Empty);
        }
        Ok(Self { pattern: pattern.and_then(|raw| normal_form(raw.get())), data, id })
    }
}

/// The last value of each named member of a JSON object; `None` when the text is not one JSON object.
fn members<'a, const N: usize>(text: &'a str, names: [&'static str; N]) -> Option<[Option<&'a RawValue>; N]> {
    struct Members<const N: usize>([&'static str; N]);

    impl<'de, const N: usize> Visitor<'de> for Members<N> {
        type Value = [Option<&'de RawValue>; N];

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut found = [None; N];
            while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                // A value that is not looked at is skipped without being built, however deep it is.
                let value = map.next_value::<&'de RawValue>()?;
                if let Some(slot) = self.0.iter().position(|name| *name == key) {
                    found[slot] = Some(value);
                }
            }
            Ok(found)
        }
    }

    let mut json = serde_json::Deserializer::from_str(text);
    let found = json.deserialize_map(Members(names)).ok()?;
    json.end().ok()?;
    Some(found)
}

/// A pattern as NestJS compares it: `{"b":1,"a":"x"}`, the same with its keys in another order and the *text*
/// `{"a":"x","b":1}` are one pattern; so are `7` and `"7"`. `None` for `null`.
///
/// NestJS orders keys by locale. Any fixed order gives the same equality, and no pattern of ours is an object.
fn normal_form(raw: &str) -> Option<String> {
    let pattern = match serde_json::from_str::<Value>(raw) {
        // A text that is itself JSON stands for what it spells.
        Ok(Value::String(text)) => match serde_json::from_str::<Value>(&text) {
            Ok(inner @ (Value::Object(_) | Value::Array(_) | Value::String(_) | Value::Number(_))) => inner,
            Ok(Value::Null | Value::Bool(_)) | Err(_) => return Some(text),
        },
        Ok(Value::Null) => return None,
        Ok(other) => other,
        // Too deep, or a text that Rust cannot hold: no pattern of anybody's handler, but a pattern.
        Err(_) => return Some(raw.to_owned()),
    };
    let mut route = String::new();
    write_route(&pattern, &mut route);
    Some(route)
}

/// Recursion is bounded: `serde_json` builds no value deeper than 128.
fn write_route(pattern: &Value, route: &mut String) {
    match pattern {
        Value::String(text) => route.push_str(text),
        Value::Number(number) => match number.as_f64().and_then(exact_integer) {
            Some(integer) => route.push_str(&integer.to_string()),
            None => route.push_str(&number.to_string()),
        },
        Value::Null => route.push_str("null"),
        Value::Bool(value) => route.push_str(if *value { "true" } else { "false" }),
        Value::Object(members) => {
            let members = members.iter().map(|(key, value)| (Cow::Borrowed(key.as_str()), value));
            write_members(members, route);
        }
        // JavaScript sees an array as an object whose keys are its indices.
        Value::Array(items) => {
            let members = items.iter().enumerate().map(|(index, value)| (Cow::Owned(index.to_string()), value));
            write_members(members, route);
        }
    }
}

fn write_members<'a>(members: impl Iterator<Item = (Cow<'a, str>, &'a Value)>, route: &mut String) {
    route.push('{');
    for (index, (key, value)) in members.enumerate() {
        if index > 0 {
            route.push(',');
        }
        let quote = if value.is_string() { "\"" } else { "" };
        route.extend(["\"", &key, "\":", quote]);
        write_route(value, route);
        route.push_str(quote);
    }
    route.push('}');
}

/// The integer that a JavaScript number is, if it is one that JavaScript keeps exact.
fn exact_integer(number: f64) -> Option<u64> {
    #[expect(clippy::cast_precision_loss, reason = "2^53 - 1 is exact in a double")]
    let fits = number.fract() == 0.0 && (0.0..=INTEGER_MAX as f64).contains(&number);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be 0..=2^53-1")]
    fits.then_some(number as u64)
}

/// The patterns of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pattern {
    /// Does the user hold what an order needs? Pins the lock.
    ValidateUserLocks,
    /// A lock becomes a sale; the caller does not say whose.
    ConfirmTicketLock,
    /// A lock becomes a sale; the caller says whose.
    ConfirmLock,
    /// The orders-service gives a lock back.
    ReleaseTicketLock,
    /// A user's active locks.
    GetUserLocks,
    /// One lock.
    GetLock,
    /// An order was completed.
    OrderCompleted,
    /// An order was cancelled.
    OrderCancelled,
    /// The events-service changed its stock.
    AvailabilityChanged,
    /// What `/stats` says.
    GetRealtimeStats,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::ValidateUserLocks,
        Self::ConfirmTicketLock,
        Self::ConfirmLock,
        Self::ReleaseTicketLock,
        Self::GetUserLocks,
        Self::GetLock,
        Self::OrderCompleted,
        Self::OrderCancelled,
        Self::AvailabilityChanged,
        Self::GetRealtimeStats,
    ];

    /// Its name on the wire, which is its normal form and its metric label too.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ValidateUserLocks => "validate-user-locks",
            Self::ConfirmTicketLock => "confirm-ticket-lock",
            Self::ConfirmLock => "confirm-lock",
            Self::ReleaseTicketLock => "release-ticket-lock",
            Self::GetUserLocks => "get-user-locks",
            Self::GetLock => "get-lock",
            Self::OrderCompleted => "order-completed",
            Self::OrderCancelled => "order-cancelled",
            Self::AvailabilityChanged => "availability-changed",
            Self::GetRealtimeStats => "get-realtime-stats",
        }
    }

    /// The pattern of this normal form, if it is one of ours.
    #[must_use]
    pub fn of(normal_form: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|pattern| pattern.as_str() == normal_form)
    }
}

/// A message of the contract, its data read and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// [`Pattern::ValidateUserLocks`].
    Validate {
        /// Whose lock.
        user: UserId,
        /// Of which event.
        event: EventId,
        /// Of which category.
        category: CategoryId,
        /// At least how many tickets.
        quantity: Quantity,
    },
    /// [`Pattern::ConfirmTicketLock`] and [`Pattern::ConfirmLock`].
    Confirm {
        /// Which lock; `None` for a text that no lock of this service has.
        lock: Option<LockId>,
        /// Checked when given.
        user: Option<UserId>,
        /// For which order.
        order: Option<OrderId>,
    },
    /// [`Pattern::ReleaseTicketLock`].
    Release {
        /// Which lock; `None` for a text that no lock of this service has.
        lock: Option<LockId>,
        /// Checked when given.
        user: Option<UserId>,
    },
    /// [`Pattern::GetUserLocks`].
    Locks {
        /// Whose.
        user: UserId,
    },
    /// [`Pattern::GetLock`].
    Find {
        /// Which lock; `None` for a text that no lock of this service has.
        lock: Option<LockId>,
    },
    /// [`Pattern::OrderCompleted`] and [`Pattern::OrderCancelled`].
    Order {
        /// What the orders-service says.
        report: OrderReport,
        /// True when it wrote the order's id as a number.
        order_is_number: bool,
    },
    /// [`Pattern::AvailabilityChanged`].
    StockChanged {
        /// Of which event.
        event: EventId,
    },
    /// [`Pattern::GetRealtimeStats`].
    Stats,
}

/// Data that is not what its pattern needs. Its text is written for the developer of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Not an object.
    #[error("data must be an object")]
    NotAnObject,
    /// A field is absent or `null`.
    #[error("{0} is required")]
    Missing(&'static str),
    /// Not a JSON integer of an id's range.
    #[error("{0} must be an integer between 1 and 9007199254740991")]
    NotAnId(&'static str),
    /// Not a JSON integer of a quantity's range.
    #[error("{0} must be an integer between 1 and {max}", max = Quantity::MAX)]
    NotAQuantity(&'static str),
    /// Not a text.
    #[error("{0} must be a string")]
    NotAText(&'static str),
    /// An order id that is neither an integer nor a short text.
    #[error("{0} must be an integer, or 1 to 64 printable ASCII characters without spaces")]
    NotAnOrderId(&'static str),
    /// The lock of an order is a lock of another event.
    #[error("lockId is a lock of another event than eventId")]
    OtherEvent,
}

impl Call {
    /// Reads the data of a message. Fields that the contract does not name are ignored.
    ///
    /// # Errors
    /// When a field is missing or is not what the contract says.
    pub fn read(pattern: Pattern, data: Option<&RawValue>) -> Result<Self, Malformed> {
        match pattern {
            Pattern::ValidateUserLocks => {
                let [user, event, category, quantity] = fields(data, ["userId", "eventId", "categoryId", "quantity"])?;
                Ok(Self::Validate {
                    user: user.id(UserId::new)?,
                    event: event.id(EventId::new)?,
                    category: category.id(CategoryId::new)?,
                    quantity: quantity.quantity()?,
                })
            }
            Pattern::ConfirmTicketLock => {
                let [lock, order] = fields(data, ["lockId", "orderId"])?;
                Ok(Self::Confirm { lock: lock.lock()?, user: None, order: order.optional(Field::order)?.map(first) })
            }
            Pattern::ConfirmLock => {
                let [lock, user, order] = fields(data, ["lockId", "userId", "orderId"])?;
                Ok(Self::Confirm {
                    lock: lock.lock()?,
                    user: Some(user.id(UserId::new)?),
                    order: order.optional(Field::order)?.map(first),
                })
            }
            Pattern::ReleaseTicketLock => {
                let [lock, user] = fields(data, ["lockId", "userId"])?;
                Ok(Self::Release { lock: lock.lock()?, user: user.optional(|field| field.id(UserId::new))? })
            }
            Pattern::GetUserLocks => {
                let [user] = fields(data, ["userId"])?;
                Ok(Self::Locks { user: user.id(UserId::new)? })
            }
            Pattern::GetLock => {
                let [lock] = fields(data, ["lockId"])?;
                Ok(Self::Find { lock: lock.lock()? })
            }
            Pattern::OrderCompleted => Self::order(data, OrderResult::Completed),
            Pattern::OrderCancelled => Self::order(data, OrderResult::Cancelled),
            Pattern::AvailabilityChanged => {
                let [event] = fields(data, ["eventId"])?;
                Ok(Self::StockChanged { event: event.id(EventId::new)? })
            }
            Pattern::GetRealtimeStats => Ok(Self::Stats),
        }
    }

    fn order(data: Option<&RawValue>, result: OrderResult) -> Result<Self, Malformed> {
        let [order, event, category, quantity, user, lock] =
            fields(data, ["orderId", "eventId", "categoryId", "quantity", "userId", "lockId"])?;
        let (order, order_is_number) = order.order()?;
        let event = event.id(EventId::new)?;
        // A text that no lock of this service has says as little as none.
        let lock = lock.optional(Field::lock)?.flatten();
        if lock.is_some_and(|lock| lock.event() != event) {
            return Err(Malformed::OtherEvent);
        }
        let report = OrderReport {
            order,
            event,
            category: category.id(CategoryId::new)?,
            quantity: quantity.quantity()?,
            user: user.id(UserId::new)?,
            lock,
            result,
        };
        Ok(Self::Order { report, order_is_number })
    }
}

fn first<A, B>((first, _): (A, B)) -> A {
    first
}

/// One named field of a message's data. `null` is as good as absent.
#[derive(Debug, Clone, Copy)]
struct Field<'a> {
    name: &'static str,
    value: Option<&'a str>,
}

fn fields<'a, const N: usize>(
    data: Option<&'a RawValue>,
    names: [&'static str; N],
) -> Result<[Field<'a>; N], Malformed> {
    let found = data.and_then(|data| members(data.get(), names)).ok_or(Malformed::NotAnObject)?;
    Ok(std::array::from_fn(|index| Field {
        name: names[index],
        value: found[index].map(RawValue::get).filter(|value| *value != "null"),
    }))
}

impl<'a> Field<'a> {
    fn optional<T>(self, read: impl FnOnce(Self) -> Result<T, Malformed>) -> Result<Option<T>, Malformed> {
        self.value.map(|_| read(self)).transpose()
    }

    fn required(self) -> Result<&'a str, Malformed> {
        self.value.ok_or(Malformed::Missing(self.name))
    }

    fn id<T>(self, new: impl FnOnce(u64) -> Result<T, IdError>) -> Result<T, Malformed> {
        integer(self.required()?).and_then(|value| new(value).ok()).ok_or(Malformed::NotAnId(self.name))
    }

    fn quantity(self) -> Result<Quantity, Malformed> {
        let value = integer(self.required()?).and_then(|value| Quantity::new(value).ok());
        value.ok_or(Malformed::NotAQuantity(self.name))
    }

    fn lock(self) -> Result<Option<LockId>, Malformed> {
        let value = serde_json::from_str::<String>(self.required()?).map_err(|_| Malformed::NotAText(self.name))?;
        Ok(value.parse().ok())
    }

    /// The order's id, and whether it was written as a number.
    fn order(self) -> Result<(OrderId, bool), Malformed> {
        let raw = self.required()?;
        let number = integer(raw);
        let text = number.map(|number| number.to_string()).or_else(|| serde_json::from_str::<String>(raw).ok());
        match text.and_then(|text| text.parse().ok()) {
            Some(order) => Ok((order, number.is_some())),
            None => Err(Malformed::NotAnOrderId(self.name)),
        }
    }
}

/// The integer 0..=2^53-1 that this JSON spells.
fn integer(raw: &str) -> Option<u64> {
    serde_json::from_str::<f64>(raw).ok().and_then(exact_integer)
}

/// What a handler returns.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Done, or not.
    Truth(bool),
    /// The lock that an order may use.
    Held(Held),
    /// Why an order may not go on.
    NotHeld(NotHeld),
    /// A user's locks.
    Locks(Vec<Lock>),
    /// One lock, or `null`.
    Lock(Option<Lock>),
    /// The statistics, as they were made elsewhere.
    Stats(Value),
}

impl Serialize for Answer {
    /// In the contract's shape.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Truth(truth) => truth.serialize(serializer),
            Self::Held(held) => held.serialize(serializer),
            Self::NotHeld(not_held) => not_held.serialize(serializer),
            Self::Locks(locks) => serializer.collect_seq(locks.iter().map(LockBody::from)),
            Self::Lock(lock) => lock.as_ref().map(LockBody::from).serialize(serializer),
            Self::Stats(stats) => stats.serialize(serializer),
        }
    }
}

/// `{valid:true, ..}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Held {
    valid: bool,
    lock_id: String,
    expires_at: String,
}

impl Held {
    /// This lock, until this deadline.
    #[must_use]
    pub fn new(lock: LockId, deadline: Instant) -> Self {
        Self { valid: true, lock_id: lock.to_string(), expires_at: iso(deadline) }
    }
}

/// `{valid:false, ..}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NotHeld {
    valid: bool,
    message: &'static str,
    code: &'static str,
}

impl NotHeld {
    /// There is no such lock. Callers show or compare the message, so it stays word for word.
    pub const NOT_FOUND: Self =
        Self { valid: false, message: "No valid locks found for the requested tickets", code: "lock_not_found" };

    /// There was one. The message stays word for word, too.
    pub const EXPIRED: Self = Self {
        valid: false,
        message: "Ticket locks have expired. Please select tickets again.",
        code: "lock_not_found",
    };
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LockBody {
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
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u64>,
}

impl From<&Lock> for LockBody {
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
            version: lock.version,
        }
    }
}

/// ISO-8601 UTC with milliseconds, as `Date.prototype.toISOString` writes it.
fn iso(instant: Instant) -> String {
    let time = i64::try_from(instant.as_ms()).ok().and_then(DateTime::<Utc>::from_timestamp_millis);
    time.unwrap_or(DateTime::<Utc>::MAX_UTC).to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// The body of the one reply that ends a request.
#[must_use]
pub fn response<T: Serialize + ?Sized>(answer: &T) -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Body<'a, T: ?Sized> {
        response: &'a T,
        is_disposed: bool,
    }
    // Text keys and plain values only; if that ever fails, the caller still must hear something.
    serde_json::to_vec(&Body { response: answer, is_disposed: true }).unwrap_or_else(|_| error(INTERNAL))
}

/// The body that a NestJS server sends when a handler throws an `RpcException` with this message, or (with
/// [`INTERNAL`]) anything else.
#[must_use]
pub fn error(message: &str) -> Vec<u8> {
    let message = Value::from(message);
    format!(r#"{{"err":{{"status":"error","message":{message}}},"isDisposed":true}}"#).into_bytes()
}

/// The body that a NestJS server sends when no handler has the pattern. It carries the id of the body (not the
/// correlation id) and, unlike every other reply, no `isDisposed`.
#[must_use]
pub fn no_handler(id: &RawValue) -> Vec<u8> {
    format!(r#"{{"id":{id},"err":"{NO_HANDLER}","status":"error"}}"#).into_bytes()
}

#[cfg(test)]
mod tests;
