//! What a NestJS reply means, the same over TCP and `RabbitMQ`: the rule of a Nest `ClientProxy`, as a pure function.

use serde_json::Value;

/// One reply to a request. A handler may send several; the last one is complete.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// The handler failed; any JSON but a falsy one.
    Error(Value),
    /// A value or the end, or both.
    Next {
        /// The value; `None` where JavaScript has `undefined`.
        value: Option<Value>,
        /// Nothing follows.
        complete: bool,
    },
}

impl Reply {
    /// Reads a reply's body. Every body means something: what is not JSON is its own text, what is JSON but no reply
    /// object is the value itself.
    #[must_use]
    pub fn read(body: &[u8]) -> Self {
        let text = String::from_utf8_lossy(body);
        let body = serde_json::from_str(&text).unwrap_or_else(|_| Value::String(text.into_owned()));
        Self::of(body)
    }

    /// Reads a reply that is parsed already.
    #[must_use]
    pub fn of(body: Value) -> Self {
        let Value::Object(mut fields) = body else {
            return Self::Next { value: Some(body), complete: true };
        };
        let (error, value, complete) = (fields.remove("err"), fields.remove("response"), fields.remove("isDisposed"));
        if error.is_none() && value.is_none() && complete.is_none() {
            return Self::Next { value: Some(Value::Object(fields)), complete: true };
        }
        match error {
            Some(error) if truthy(&error) => Self::Error(error),
            _ => Self::Next { value, complete: complete.is_some_and(|flag| truthy(&flag)) },
        }
    }
}

/// What JavaScript takes for true.
fn truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(_) | Value::Object(_) => true,
    }
}
