//! Reading what clients send: strict about what the contract fixes, blind to everything else.

use std::borrow::Cow;
use std::fmt;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Code, Name, Refusal};
use crate::domain::{CategoryId, EventId, LockId, Quantity, RequestId, UserId};

/// What a refused or granted request was about, as far as it could be read: refusals of `lock-tickets` carry it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct About {
    /// The event.
    pub event: Option<EventId>,
    /// The category.
    pub category: Option<CategoryId>,
    /// The client's name for the attempt.
    pub request: Option<RequestId>,
}

/// A readable message from a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Show me an event.
    Join(EventId),
    /// No longer.
    Leave(EventId),
    /// Lock tickets.
    Lock {
        /// Of which event.
        event: EventId,
        /// Of which category.
        category: CategoryId,
        /// How many.
        quantity: Quantity,
        /// The client's name for the attempt.
        request: Option<RequestId>,
    },
    /// Give back the lock of a category.
    UnlockCategory(EventId, CategoryId),
    /// Give back this lock.
    UnlockLock(LockId),
    /// Which locks are mine?
    MyLocks,
    /// Are you there?
    Heartbeat,
    /// Here is a new token.
    Refresh(String),
}

/// Splits `["name", data, ...]` into the name and the first argument. The Socket.IO parser has seen that the text begins
/// like an array with a string; the rest may be anything.
pub fn split(text: &str) -> Option<(Cow<'_, str>, Option<&RawValue>)> {
    struct Parts;
    impl<'de> Visitor<'de> for Parts {
        type Value = (Cow<'de, str>, Option<&'de RawValue>);

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array of a name and arguments")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let Text(name) = seq.next_element()?.ok_or_else(|| serde::de::Error::invalid_length(0, &self))?;
            let data = seq.next_element()?;
            while seq.next_element::<IgnoredAny>()?.is_some() {}
            Ok((name, data))
        }
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let parts = json.deserialize_seq(Parts).ok()?;
    json.end().ok()?;
    Some(parts)
}

/// Whether a text begins like an array with a text; the rest may be anything.
pub fn begins_with_a_name(text: &str) -> bool {
    let names = text.strip_prefix('[').map(|rest| serde_json::Deserializer::from_str(rest).into_iter::<Text<'_>>());
    names.is_some_and(|mut names| names.next().is_some_and(|name| name.is_ok()))
}

/// A text that is not copied unless it is written with escapes.
struct Text<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Letters;
        impl<'de> Visitor<'de> for Letters {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        json.deserialize_str(Letters)
    }
}

/// Reads a message of a known name, sent by `user`, who may lock at most `per_lock_max` tickets at once.
pub fn read(name: Name, data: Option<&RawValue>, user: UserId, per_lock_max: u32) -> (About, Result<Request, Refusal>) {
    match name {
        Name::MyLocks => return (About::default(), Ok(Request::MyLocks)),
        Name::Heartbeat => return (About::default(), Ok(Request::Heartbeat)),
        Name::Join | Name::Leave | Name::Lock | Name::Unlock | Name::Refresh => {}
    }
    let Some(Ok(fields)) = data.map(|data| serde_json::from_str::<Fields>(data.get())) else {
        return (About::default(), Err(invalid("The data of a request must be an object")));
    };
    let about = About {
        event: fields.event().ok(),
        category: fields.category().ok(),
        request: fields.request().ok().flatten(),
    };
    let request = fields.user_is(user).and_then(|()| fields.read(name, per_lock_max));
    (about, request)
}

fn invalid(message: impl Into<Cow<'static, str>>) -> Refusal {
    Refusal::saying(Code::InvalidRequest, message)
}

/// The fields of a request; unknown ones are ignored, `null` is the same as absent, of several of one name the last counts.
#[derive(Default)]
struct Fields {
    event: Value,
    category: Value,
    quantity: Value,
    user: Value,
    request: Value,
    lock: Value,
    token: Value,
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Fields::default();
                while let Some(Text(name)) = map.next_key()? {
                    let field = match &*name {
                        "eventId" => &mut fields.event,
                        "categoryId" => &mut fields.category,
                        "quantity" => &mut fields.quantity,
                        "userId" => &mut fields.user,
                        "requestId" => &mut fields.request,
                        "lockId" => &mut fields.lock,
                        "token" => &mut fields.token,
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                            continue;
                        }
                    };
                    *field = map.next_value()?;
                }
                Ok(fields)
            }
        }
        json.deserialize_map(Object)
    }
}

impl Fields {
    fn read(&self, name: Name, per_lock_max: u32) -> Result<Request, Refusal> {
        match name {
            Name::Join => Ok(Request::Join(self.event()?)),
            Name::Leave => Ok(Request::Leave(self.event()?)),
            Name::Lock => Ok(Request::Lock {
                event: self.event()?,
                category: self.category()?,
                request: self.request()?,
                quantity: self.quantity(per_lock_max)?,
            }),
            Name::Unlock => match self.lock.as_str() {
                Some(lock) => lock.parse().map(Request::UnlockLock).map_err(|_| Refusal::new(Code::LockNotFound)),
                None if self.lock.is_null() => Ok(Request::UnlockCategory(self.event()?, self.category()?)),
                None => Err(invalid("lockId must be a text")),
            },
            Name::Refresh => match self.token.as_str() {
                Some(token) => Ok(Request::Refresh(token.to_owned())),
                None => Err(invalid("token must be a text")),
            },
            Name::MyLocks => Ok(Request::MyLocks),
            Name::Heartbeat => Ok(Request::Heartbeat),
        }
    }

    fn event(&self) -> Result<EventId, Refusal> {
        let id = self.event.as_u64().and_then(|id| EventId::new(id).ok());
        id.ok_or_else(|| invalid("eventId must be an integer between 1 and 9007199254740991"))
    }

    fn category(&self) -> Result<CategoryId, Refusal> {
        let id = self.category.as_u64().and_then(|id| CategoryId::new(id).ok());
        id.ok_or_else(|| invalid("categoryId must be an integer between 1 and 9007199254740991"))
    }

    fn request(&self) -> Result<Option<RequestId>, Refusal> {
        match self.request.as_str() {
            Some(id) => id.parse().map(Some).map_err(|error| invalid(format!("requestId {error}"))),
            None if self.request.is_null() => Ok(None),
            None => Err(invalid("requestId must be a text")),
        }
    }

    fn quantity(&self, per_lock_max: u32) -> Result<Quantity, Refusal> {
        let wrong = || invalid(format!("quantity must be an integer between 1 and {per_lock_max}"));
        let quantity = self.quantity.as_u64().filter(|&n| n > 0).ok_or_else(wrong)?;
        if quantity > u64::from(per_lock_max) {
            let message = format!("You cannot lock more than {per_lock_max} tickets at once");
            return Err(Refusal::saying(Code::LimitExceeded, message));
        }
        Quantity::new(quantity).map_err(|_| wrong())
    }

    /// A user id in the data is never trusted over the token's: it must be the same or absent.
    fn user_is(&self, user: UserId) -> Result<(), Refusal> {
        let same = match &self.user {
            Value::Null => true,
            Value::Number(id) => id.as_u64() == Some(user.value()),
            Value::String(id) => id.parse() == Ok(user),
            Value::Bool(_) | Value::Array(_) | Value::Object(_) => false,
        };
        if same { Ok(()) } else { Err(Refusal::new(Code::Unauthorized)) }
    }
}
