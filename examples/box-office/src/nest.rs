//! The messages of NestJS microservices: what a request, an event and a reply look like, on RabbitMQ and on TCP.
//!
//! Pure text. A request has an `id`, an event has none. A reply carries `response`, or `err`, and `isDisposed: true`.

use serde::Serialize;
use serde_json::{Value, json};

/// The largest body or frame that is read.
pub const BYTES_MAX: usize = 1024 * 1024;

/// A refusal as it crosses the wire and as HTTP shows it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({code})")]
pub struct Refusal {
    /// As in HTTP.
    pub status: u16,
    /// For programs.
    pub code: String,
    /// For people.
    pub message: String,
}

impl Refusal {
    /// A refusal of our own.
    pub fn new(status: u16, code: &str, message: impl Into<String>) -> Self {
        Self { status, code: code.to_owned(), message: message.into() }
    }

    /// Reads the `err` of a reply, which other services write in several shapes.
    pub fn read(err: &Value) -> Self {
        let inner = err.get("error").filter(|inner| inner.is_object()).unwrap_or(err);
        let text = |name: &str| inner.get(name).or_else(|| err.get(name)).and_then(Value::as_str);
        let status = inner.get("statusCode").or_else(|| err.get("statusCode")).and_then(Value::as_u64);
        Self {
            status: status.and_then(|status| u16::try_from(status).ok()).unwrap_or(500),
            code: text("code").unwrap_or("internal").to_owned(),
            message: err.as_str().or_else(|| text("message")).unwrap_or("Internal server error").to_owned(),
        }
    }
}

/// What became of a message.
#[derive(Debug)]
pub enum Fault {
    /// Nobody handles the pattern.
    NoHandler,
    /// The rules said no.
    Refused(Refusal),
    /// Something broke. Said in the log, not to the caller.
    Broken(anyhow::Error),
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl<E: Into<anyhow::Error>> From<Broken<E>> for Fault {
    fn from(Broken(error): Broken<E>) -> Self {
        Self::Broken(error.into())
    }
}

/// Marks an error as ours: `.map_err(Broken)?`.
pub struct Broken<E>(pub E);

/// What answers messages. Every message may come twice.
pub trait Service: Send + Sync + 'static {
    /// Answers one message.
    fn handle(&self, pattern: &str, data: Value) -> impl Future<Output = Result<Value, Fault>> + Send;
}

/// A message that came in.
#[derive(Debug)]
pub struct Packet {
    /// What is asked.
    pub pattern: String,
    /// With what.
    pub data: Value,
    /// Present in a request; an event has none and gets no reply.
    pub id: Option<Value>,
}

impl Packet {
    /// Reads a body; `None` when it is no message.
    pub fn read(body: &[u8]) -> Option<Self> {
        let mut value: Value = serde_json::from_slice(body.get(..BYTES_MAX).unwrap_or(body)).ok()?;
        let fields = value.as_object_mut()?;
        let pattern = fields.remove("pattern")?;
        let pattern = pattern.as_str().map_or_else(|| pattern.to_string(), str::to_owned);
        Some(Self { pattern, data: fields.remove("data").unwrap_or(Value::Null), id: fields.remove("id") })
    }
}

/// A request, or an event when there is no id.
pub fn packet(pattern: &str, data: &impl Serialize, id: Option<&str>) -> Vec<u8> {
    let mut body = json!({ "pattern": pattern, "data": data });
    if let Some(id) = id {
        body["id"] = id.into();
    }
    body.to_string().into_bytes()
}

/// The reply to a request with this id.
pub fn reply(id: &Value, outcome: &Result<Value, Fault>) -> Value {
    match outcome {
        Ok(value) => json!({ "response": value, "isDisposed": true }),
        Err(Fault::NoHandler) => json!({
            "id": id,
            "err": "There is no matching message handler defined in the remote service.",
            "status": "error",
        }),
        Err(Fault::Refused(Refusal { status, code, message })) => {
            json!({ "err": { "statusCode": status, "message": message, "code": code }, "isDisposed": true })
        }
        Err(Fault::Broken(_)) => {
            json!({ "err": { "status": "error", "message": "Internal server error" }, "isDisposed": true })
        }
    }
}

/// What a reply says.
pub fn outcome(body: &[u8]) -> Result<Value, Refusal> {
    let mut reply: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    match reply.get_mut("err").map(Value::take) {
        Some(err) if !err.is_null() => Err(Refusal::read(&err)),
        _ => Ok(reply.get_mut("response").map_or(Value::Null, Value::take)),
    }
}

/// A frame of the TCP transport: the length in UTF-16 units (JavaScript's), `#`, and the text as UTF-8.
pub fn frame(body: &Value) -> Vec<u8> {
    let text = body.to_string();
    format!("{}#{text}", text.encode_utf16().count()).into_bytes()
}

/// Takes the first complete frame's text off the buffer. `Err` when the bytes are no frames.
pub fn take_frame(buffer: &mut Vec<u8>) -> Result<Option<Vec<u8>>, ()> {
    let Some(hash) = buffer.iter().position(|&byte| byte == b'#') else {
        return if buffer.len() > 7 { Err(()) } else { Ok(None) };
    };
    let length = std::str::from_utf8(&buffer[..hash]).ok().and_then(|text| text.parse::<usize>().ok());
    let mut units = length.filter(|&units| units <= BYTES_MAX).ok_or(())?;
    let mut end = hash + 1;
    while units > 0 {
        // Bytes and UTF-16 units of a character, by its first byte.
        let (bytes, its) = match buffer.get(end) {
            None => return Ok(None),
            Some(0x00..=0x7f) => (1, 1),
            Some(0xc2..=0xdf) => (2, 1),
            Some(0xe0..=0xef) => (3, 1),
            Some(0xf0..=0xf4) => (4, 2),
            Some(_) => return Err(()),
        };
        units = units.checked_sub(its).ok_or(())?;
        end += bytes;
    }
    if buffer.len() < end {
        return Ok(None);
    }
    let text = buffer[hash + 1..end].to_vec();
    buffer.drain(..end);
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_an_id_and_an_event_has_none() {
        let data = json!({"lockId": "x", "userId": 7});
        assert_eq!(
            String::from_utf8(packet("confirm-lock", &data, Some("a1"))).unwrap(),
            r#"{"data":{"lockId":"x","userId":7},"id":"a1","pattern":"confirm-lock"}"#
        );
        let request = Packet::read(br#"{"pattern":"get-event-by-id","data":3,"id":"a1"}"#).unwrap();
        assert_eq!(
            (request.pattern.as_str(), request.data, request.id),
            ("get-event-by-id", json!(3), Some(json!("a1")))
        );
        let event = Packet::read(br#"{"pattern":{"cmd":"x"}}"#).unwrap();
        assert_eq!((event.pattern.as_str(), event.id), (r#"{"cmd":"x"}"#, None));
        assert!(Packet::read(b"{}").is_none() && Packet::read(b"nonsense").is_none());
    }

    #[test]
    fn replies_are_read_as_they_are_written() {
        let id = json!("a1");
        let read = |result: Result<Value, Fault>| outcome(reply(&id, &result).to_string().as_bytes());
        assert_eq!(read(Ok(json!(true))), Ok(json!(true)));
        let refusal = Refusal::new(409, "sold_out", "Sold out");
        assert_eq!(read(Err(refusal.clone().into())), Err(refusal));
        assert_eq!(read(Err(Fault::Broken(anyhow::anyhow!("a secret")))).unwrap_err().message, "Internal server error");
        assert!(read(Err(Fault::NoHandler)).unwrap_err().message.starts_with("There is no matching"));
        let nested = json!({"error": {"statusCode": 404, "message": "Event not found"}, "message": "Event not found"});
        assert_eq!(Refusal::read(&nested), Refusal::new(404, "internal", "Event not found"));
        assert_eq!(Refusal::read(&json!("boom")), Refusal::new(500, "internal", "boom"));
    }

    #[test]
    fn frames_are_found_however_the_bytes_arrive() {
        let texts = [json!("a€😀é"), json!({"pattern": "x"})];
        let stream: Vec<u8> = texts.iter().flat_map(frame).collect();
        assert!(stream.starts_with(b"7#"));
        for len in 1..=stream.len() {
            let (mut buffer, mut found) = (Vec::new(), Vec::new());
            for chunk in stream.chunks(len) {
                buffer.extend_from_slice(chunk);
                while let Some(text) = take_frame(&mut buffer).unwrap() {
                    found.push(serde_json::from_slice::<Value>(&text).unwrap());
                }
            }
            assert_eq!(found, texts, "in pieces of {len}");
        }
        for garbage in ["x#1", "99999999", "#", "2#\"😀\""] {
            assert!(take_frame(&mut garbage.as_bytes().to_vec()).is_err(), "{garbage}");
        }
    }
}
