//! Messages to clients as the bytes of WebSocket frames, byte for byte as socketioxide would put them there.

use bytes::Bytes;

use super::NAMESPACE;
use super::wire::Json;

/// The longest payload whose length fits into the second byte of a frame, and the longest that fits into two more.
const SHORT_MAX: usize = 125;
const MEDIUM_MAX: usize = 0xffff;

/// A message to any number of sockets: encoded once.
#[derive(Debug, Clone)]
pub struct Packet {
    /// Its name.
    pub name: &'static str,
    /// Its data.
    pub data: Json,
    frame: Bytes,
}

impl Packet {
    /// A message of that name.
    pub fn new(name: &'static str, data: Json) -> Self {
        let frame = event(name, &data).into();
        Self { name, data, frame }
    }

    /// The frames of several packets, one after the other.
    pub fn frames<'a>(packets: impl IntoIterator<Item = &'a Self>) -> Bytes {
        packets.into_iter().flat_map(|packet| packet.frame.iter().copied()).collect()
    }
}

/// A message.
pub fn event(name: &str, data: &Json) -> Vec<u8> {
    text(&["42", NAMESPACE, ",[\"", name, "\",", data.get(), "]"])
}

/// A packet of the transport, as it is.
pub fn message(packet: &str) -> Vec<u8> {
    text(&[packet])
}

/// The acknowledgement of a message.
pub fn acknowledgement(id: i64, data: &Json) -> Vec<u8> {
    text(&["43", NAMESPACE, ",", &id.to_string(), "[", data.get(), "]"])
}

/// The refusal of a namespace that there is not.
pub fn no_namespace(name: &str) -> Vec<u8> {
    let (name, comma) = if name == "/" { ("", "") } else { (name, ",") };
    text(&["44", name, comma, "{\"message\":\"Invalid namespace\"}"])
}

/// Are you there?
pub const PING: &[u8] = b"\x81\x012";

/// The name and the data of a message that nobody is sent: it ends a session's part of socketioxide's queue.
pub const MARK: (&str, u8) = ("mark", 0);

/// How it comes out.
pub const MARKED: &str = "42/realtime,[\"mark\",0]";

/// The WebSocket is over.
pub const CLOSE: &[u8] = b"\x88\x00";

/// The answer to a ping of the WebSocket's own, whose payload is at most 125 bytes.
pub fn pong(payload: &[u8]) -> Vec<u8> {
    frame(0x8a, payload.len(), |bytes| bytes.extend_from_slice(payload))
}

fn text(parts: &[&str]) -> Vec<u8> {
    let len = parts.iter().map(|part| part.len()).sum();
    frame(0x81, len, |bytes| parts.iter().for_each(|part| bytes.extend_from_slice(part.as_bytes())))
}

fn frame(first: u8, len: usize, write: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = Vec::with_capacity(len + 10);
    frame.push(first);
    match len {
        short @ 0..=SHORT_MAX => frame.push(u8::try_from(short).unwrap_or_default()),
        medium @ 126..=MEDIUM_MAX => {
            frame.push(126);
            frame.extend_from_slice(&u16::try_from(medium).unwrap_or_default().to_be_bytes());
        }
        long => {
            frame.push(127);
            frame.extend_from_slice(&(long as u64).to_be_bytes());
        }
    }
    write(&mut frame);
    frame
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::*;
    use crate::gateway::wire;

    fn json(text: &str) -> Json {
        wire::json(&RawValue::from_string(text.to_owned()).expect("JSON"))
    }

    #[test]
    fn frames_say_how_long_they_are() {
        let around = event("n", &json("1")).len() - 3;
        for (payload, head) in [
            (125, vec![0x81, 125]),
            (126, vec![0x81, 126, 0, 126]),
            (0xffff, vec![0x81, 126, 255, 255]),
            (0x1_0000, vec![0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
        ] {
            let packet = Packet::new("n", json(&format!("\"{}\"", "x".repeat(payload - around - 2))));
            assert_eq!(packet.frame[..head.len()], head, "{payload}");
            assert!(packet.frame[head.len()..].starts_with(b"42/realtime,[\"n\",\"x"), "{payload}");
            assert_eq!(packet.frame.len(), head.len() + payload);
        }
    }

    #[test]
    fn each_kind_reads_as_clients_expect() {
        let shown = |frame: Vec<u8>| String::from_utf8(frame[2..].to_vec()).expect("text");
        assert_eq!(shown(acknowledgement(7, &json("{}"))), "43/realtime,7[{}]");
        assert_eq!(shown(no_namespace("/")), "44{\"message\":\"Invalid namespace\"}");
        assert_eq!(shown(no_namespace("/x")), "44/x,{\"message\":\"Invalid namespace\"}");
        assert_eq!(pong(b"ab"), b"\x8a\x02ab");
        assert_eq!(shown(event(MARK.0, &json(&MARK.1.to_string()))), MARKED);
        assert_eq!(message(MARKED)[..2], [0x81, 22]);
    }
}
