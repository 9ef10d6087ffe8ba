//! The frames of the NestJS TCP transport: `<length>#<json>`, where the length counts UTF-16 code units of the text
//! (JavaScript's string length) and the text travels as UTF-8.

use serde::Serialize;
use serde_json::Value;

/// The largest frame accepted, in bytes. An answer with [`crate::domain::Snapshot::CATEGORIES_MAX`] categories and two
/// kilobytes of description each is a quarter of it.
pub const FRAME_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Digits of a length: [`FRAME_BYTES_MAX`] has seven.
const LENGTH_DIGITS_MAX: usize = 7;

/// Why bytes are not frames. The connection cannot be used any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No decimal length before `#`.
    #[error("a frame does not begin with its length")]
    Length,
    /// The frame is longer than [`FRAME_BYTES_MAX`].
    #[error("a frame is longer than {FRAME_BYTES_MAX} bytes")]
    TooLong,
    /// Not UTF-8, or the length ends inside a character.
    #[error("a frame is not UTF-8 of the stated length")]
    Text,
    /// Not JSON.
    #[error("a frame is not JSON")]
    Json,
}

/// A frame to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Frame<'a> {
    /// What is asked.
    pub pattern: &'a str,
    /// About which id.
    pub data: u64,
    /// Comes back with the reply. Without it the server takes the frame for an event and never replies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<&'a str>,
}

impl Frame<'_> {
    /// The JSON text: what travels in a `RabbitMQ` message.
    #[must_use]
    pub fn text(&self) -> String {
        // Texts and a number: nothing that JSON cannot hold.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The bytes on a TCP connection.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let text = self.text();
        let units: usize = text.chars().map(char::len_utf16).sum();
        format!("{units}#{text}").into_bytes()
    }
}

/// Splits a stream of bytes into frames. Never looks at a byte of a frame's text twice before the frame is complete.
#[derive(Debug, Default)]
pub struct Frames {
    /// Bytes not yet given out.
    buffer: Vec<u8>,
    /// Set when the header of the first frame is read and removed.
    header: Option<Header>,
}

#[derive(Debug, Clone, Copy)]
struct Header {
    /// Code units still to be found.
    units_left: usize,
    /// Bytes of text already counted.
    counted: usize,
}

impl Frames {
    /// Adds what was read. Call [`Frames::next_frame`] until it says `None` before adding more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete frame's JSON.
    ///
    /// # Errors
    /// [`FrameError`], after which the stream is useless.
    pub fn next_frame(&mut self) -> Result<Option<Value>, FrameError> {
        let mut header = match self.header {
            Some(header) => header,
            None => match self.read_header()? {
                Some(header) => header,
                None => return Ok(None),
            },
        };
        while header.units_left > 0 {
            let Some(&lead) = self.buffer.get(header.counted) else { break };
            let (bytes, units) = match lead {
                0x00..=0x7f => (1, 1),
                0xc2..=0xdf => (2, 1),
                0xe0..=0xef => (3, 1),
                0xf0..=0xf4 => (4, 2),
                _ => return Err(FrameError::Text),
            };
            if self.buffer.len() < header.counted + bytes {
                break;
            }
            header.units_left = header.units_left.checked_sub(units).ok_or(FrameError::Text)?;
            header.counted += bytes;
            if header.counted > FRAME_BYTES_MAX {
                return Err(FrameError::TooLong);
            }
        }
        if header.units_left > 0 {
            self.header = Some(header);
            return Ok(None);
        }
        self.header = None;
        let text = std::str::from_utf8(&self.buffer[..header.counted]).map_err(|_| FrameError::Text)?;
        let value = serde_json::from_str(text).map_err(|_| FrameError::Json)?;
        self.buffer.drain(..header.counted);
        Ok(Some(value))
    }

    fn read_header(&mut self) -> Result<Option<Header>, FrameError> {
        let Some(end) = self.buffer.iter().take(LENGTH_DIGITS_MAX + 1).position(|&byte| byte == b'#') else {
            let digits = self.buffer.iter().take(LENGTH_DIGITS_MAX + 1).all(u8::is_ascii_digit);
            return if digits && self.buffer.len() <= LENGTH_DIGITS_MAX {
                Ok(None)
            } else {
                Err(if digits { FrameError::TooLong } else { FrameError::Length })
            };
        };
        let digits = &self.buffer[..end];
        if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
            return Err(FrameError::Length);
        }
        let units = digits.iter().fold(0, |sum, digit| sum * 10 + usize::from(digit - b'0'));
        if units > FRAME_BYTES_MAX {
            return Err(FrameError::TooLong);
        }
        self.buffer.drain(..=end);
        let header = Header { units_left: units, counted: 0 };
        self.header = Some(header);
        Ok(Some(header))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn all(frames: &mut Frames) -> Result<Vec<Value>, FrameError> {
        let mut values = Vec::new();
        while let Some(value) = frames.next_frame()? {
            values.push(value);
        }
        Ok(values)
    }

    fn error(bytes: &[u8]) -> FrameError {
        let mut frames = Frames::default();
        frames.push(bytes);
        all(&mut frames).expect_err("garbage")
    }

    #[test]
    fn frames_are_found_however_the_bytes_arrive() {
        let stream = "7#\"a€😀é\"1#12#{}4#null".as_bytes();
        let expected = [json!("a€😀é"), json!(1), json!({}), json!(null)];
        for len in 1..=stream.len() {
            let mut frames = Frames::default();
            let mut values = Vec::new();
            for chunk in stream.chunks(len) {
                frames.push(chunk);
                values.extend(all(&mut frames).expect("frames"));
            }
            assert_eq!(values, expected, "in pieces of {len}");
            assert!(frames.buffer.is_empty() && frames.header.is_none());
        }
    }

    #[test]
    fn garbage_is_refused_as_soon_as_it_can_be_told() {
        for bytes in ["#{}", "x#{}", "-1#1", "+1#1", "1 #1", " 1#1", "12x", "{\"a\":1}"] {
            assert_eq!(error(bytes.as_bytes()), FrameError::Length, "{bytes}");
        }
        for bytes in ["8#nonsense", "0#", "3#1 2"] {
            assert_eq!(error(bytes.as_bytes()), FrameError::Json, "{bytes}");
        }
        // The length ends in the middle of a character of two code units.
        assert_eq!(error("2#\"😀\"".as_bytes()), FrameError::Text);
        assert_eq!(error(b"4#\"\xff\x80\""), FrameError::Text);
        assert_eq!(error(b"3#\"\xe0\x80\x80\""), FrameError::Text);
    }

    #[test]
    fn a_frame_above_the_limit_is_refused_at_its_header_or_where_its_bytes_exceed_it() {
        assert_eq!(error(b"4194305#"), FrameError::TooLong);
        assert_eq!(error(b"99999999"), FrameError::TooLong);
        let mut frames = Frames::default();
        frames.push(b"4194304#");
        assert_eq!(frames.next_frame(), Ok(None));
        let mut frames = Frames::default();
        frames.push(b"2000000#");
        frames.push("€".repeat(1_500_000).as_bytes());
        assert_eq!(frames.next_frame(), Err(FrameError::TooLong));
    }
}
