//! Reading the WebSocket frames of a client (RFC 6455, section 5), as a server must: bounded, masked, in order.
//!
//! Bytes come as they come; what is complete is shown in place, only a frame whose end has not come is kept.

use std::ops::ControlFlow;

use super::limits::MESSAGE_BYTES_MAX;

/// A first byte: the message goes on in another frame, or not.
const LAST: u8 = 0x80;
/// A second byte: the payload is masked.
const MASKED: u8 = 0x80;
/// Extensions would use these; none was agreed on.
const RESERVED: u8 = 0x70;

const CONTINUED: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// The payload of a frame that controls the connection is at most so long.
const CONTROL_BYTES_MAX: usize = 125;

/// Something complete.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// A text.
    Text(&'a str),
    /// Other data.
    Binary,
    /// To be answered with the same payload.
    Ping(&'a [u8]),
    /// Nothing comes after it.
    Close,
}

/// Why nothing more can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breach {
    /// Not a frame that a client may send here.
    Protocol,
    /// A frame or a message of more than [`MESSAGE_BYTES_MAX`].
    TooLong,
    /// A text that is not UTF-8.
    NotText,
}

/// What a frame says of itself.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    first: u8,
    mask: [u8; 4],
    /// Of the head itself.
    pub len: usize,
    /// Of what follows.
    pub payload_len: usize,
}

impl Head {
    /// `None` when its end has not come.
    pub fn read(bytes: &[u8]) -> Result<Option<Self>, Breach> {
        let [first, second, rest @ ..] = bytes else { return Ok(None) };
        let (first, second) = (*first, *second);
        let control = first & 0x08 != 0;
        let known = matches!(first & 0x0f, CONTINUED | TEXT | BINARY | CLOSE | PING | PONG);
        if !known || first & RESERVED != 0 || second & MASKED == 0 || control && first & LAST == 0 {
            return Err(Breach::Protocol);
        }
        let (payload_len, rest) = match second & !MASKED {
            126 => match rest {
                [high, low, rest @ ..] => (u64::from(u16::from_be_bytes([*high, *low])), rest),
                _ => return Ok(None),
            },
            127 => match rest.split_first_chunk::<8>() {
                Some((len, rest)) => (u64::from_be_bytes(*len), rest),
                None => return Ok(None),
            },
            len => (u64::from(len), rest),
        };
        let payload_len = usize::try_from(payload_len).unwrap_or(usize::MAX);
        if control && payload_len > CONTROL_BYTES_MAX {
            return Err(Breach::Protocol);
        }
        if payload_len > MESSAGE_BYTES_MAX {
            return Err(Breach::TooLong);
        }
        let Some((mask, after)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        Ok(Some(Self { first, mask: *mask, len: bytes.len() - after.len(), payload_len }))
    }
}

/// The frames of one client.
#[derive(Debug, Default)]
pub struct Frames {
    /// The beginning of a frame.
    rest: Vec<u8>,
    /// The kind of a message that came in parts so far, and these parts.
    open: Option<(u8, Vec<u8>)>,
}

impl Frames {
    /// Reads what came and shows what is complete, until that breaks off. The bytes are unmasked in place.
    pub fn read<B>(
        &mut self,
        bytes: &mut [u8],
        mut each: impl FnMut(Received<'_>) -> ControlFlow<B>,
    ) -> Result<ControlFlow<B>, Breach> {
        if self.rest.is_empty() {
            let (read, flow) = self.read_all(bytes, &mut each)?;
            self.rest = bytes.get(read..).unwrap_or_default().to_vec();
            return Ok(flow);
        }
        let mut all = std::mem::take(&mut self.rest);
        all.extend_from_slice(bytes);
        let (read, flow) = self.read_all(&mut all, &mut each)?;
        if read < all.len() {
            all.drain(..read);
            self.rest = all;
        }
        Ok(flow)
    }

    /// How many bytes were of complete frames.
    fn read_all<B>(
        &mut self,
        bytes: &mut [u8],
        each: &mut impl FnMut(Received<'_>) -> ControlFlow<B>,
    ) -> Result<(usize, ControlFlow<B>), Breach> {
        let mut at = 0;
        while let Some(head) = Head::read(bytes.get(at..).unwrap_or_default())? {
            let from = at + head.len;
            let Some(payload) = bytes.get_mut(from..from + head.payload_len) else { break };
            unmask(payload, head.mask);
            at = from + head.payload_len;
            if let ControlFlow::Break(end) = self.frame(head.first, payload, each)? {
                return Ok((at, ControlFlow::Break(end)));
            }
        }
        Ok((at, ControlFlow::Continue(())))
    }

    fn frame<B>(
        &mut self,
        first: u8,
        payload: &[u8],
        each: &mut impl FnMut(Received<'_>) -> ControlFlow<B>,
    ) -> Result<ControlFlow<B>, Breach> {
        let (kind, last) = (first & 0x0f, first & LAST != 0);
        match (kind, &mut self.open) {
            (CLOSE, _) => Ok(each(Received::Close)),
            (PING, _) => Ok(each(Received::Ping(payload))),
            (PONG, _) => Ok(ControlFlow::Continue(())),
            (CONTINUED, Some((kind, parts))) => {
                if parts.len() + payload.len() > MESSAGE_BYTES_MAX {
                    return Err(Breach::TooLong);
                }
                parts.extend_from_slice(payload);
                if !last {
                    return Ok(ControlFlow::Continue(()));
                }
                let (kind, whole) = (*kind, std::mem::take(parts));
                self.open = None;
                message(kind, &whole, each)
            }
            (CONTINUED, None) | (_, Some(_)) => Err(Breach::Protocol),
            (kind, None) if last => message(kind, payload, each),
            (kind, open @ None) => {
                *open = Some((kind, payload.to_vec()));
                Ok(ControlFlow::Continue(()))
            }
        }
    }
}

/// Undoes the mask, two lengths of it at a time.
fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    let [a, b, c, d] = mask;
    let twice = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (eights, rest) = payload.as_chunks_mut::<8>();
    for eight in eights {
        *eight = (u64::from_ne_bytes(*eight) ^ twice).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(mask.into_iter().cycle()) {
        *byte ^= key;
    }
}

fn message<B>(
    kind: u8,
    payload: &[u8],
    each: &mut impl FnMut(Received<'_>) -> ControlFlow<B>,
) -> Result<ControlFlow<B>, Breach> {
    if kind == BINARY {
        return Ok(each(Received::Binary));
    }
    std::str::from_utf8(payload).map(|text| each(Received::Text(text))).map_err(|_| Breach::NotText)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame as a client sends it.
    fn sent(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [7, 0, 200, 31];
        let mut frame = vec![first];
        match payload.len() {
            len @ 0..126 => frame.push(MASKED | u8::try_from(len).expect("short")),
            len @ 126..0x1_0000 => {
                frame.push(MASKED | 0x7e);
                frame.extend_from_slice(&u16::try_from(len).expect("medium").to_be_bytes());
            }
            len => {
                frame.push(MASKED | 0x7f);
                frame.extend_from_slice(&(len as u64).to_be_bytes());
            }
        }
        frame.extend_from_slice(&mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
        frame
    }

    /// What is read, in words, given so many bytes at a time; and why it ended, if it did.
    fn read_by(bytes: &[u8], portion: usize) -> (Vec<String>, Option<Breach>) {
        let (mut frames, mut seen) = (Frames::default(), Vec::new());
        for piece in bytes.chunks(portion) {
            let mut piece = piece.to_vec();
            let read = frames.read(&mut piece, |received| {
                seen.push(match received {
                    Received::Text(text) => format!("text {text}"),
                    Received::Binary => "binary".to_owned(),
                    Received::Ping(payload) => format!("ping {}", payload.len()),
                    Received::Close => "close".to_owned(),
                });
                ControlFlow::<()>::Continue(())
            });
            if let Err(breach) = read {
                return (seen, Some(breach));
            }
        }
        assert!(frames.rest.capacity() <= 2 * (MESSAGE_BYTES_MAX + 14), "nothing piles up");
        (seen, None)
    }

    /// The same however the bytes come.
    fn read(bytes: &[u8]) -> (Vec<String>, Option<Breach>) {
        let whole = read_by(bytes, bytes.len().max(1));
        for portion in [1, 2, 3, 7, 100] {
            assert_eq!(read_by(bytes, portion), whole, "{portion} bytes at a time");
        }
        whole
    }

    #[test]
    fn messages_come_whole_and_in_order() {
        let long = "é".repeat(200);
        let longest = "x".repeat(MESSAGE_BYTES_MAX);
        let mut bytes = sent(LAST | TEXT, b"42[\"a\"]");
        bytes.extend(sent(LAST | PONG, b"x"));
        bytes.extend(sent(TEXT, "é".as_bytes().first_chunk::<1>().expect("two bytes")));
        bytes.extend(sent(LAST | PING, b"in between"));
        bytes.extend(sent(CONTINUED, &"é".as_bytes()[1..]));
        bytes.extend(sent(LAST | CONTINUED, b"!"));
        bytes.extend(sent(LAST | TEXT, long.as_bytes()));
        bytes.extend(sent(LAST | TEXT, longest.as_bytes()));
        bytes.extend(sent(LAST | BINARY, b"\xff"));
        bytes.extend(sent(LAST | TEXT, b""));
        bytes.extend(sent(LAST | CLOSE, b"\x03\xe8"));
        let (seen, breach) = read(&bytes);
        let wanted =
            ["text 42[\"a\"]", "ping 10", "text é!", &format!("text {long}"), &format!("text {longest}"), "binary"];
        assert_eq!(seen[..6], wanted);
        assert_eq!((&seen[6..], breach), (&["text ".to_owned(), "close".to_owned()][..], None));
    }

    #[test]
    fn what_a_client_must_not_send_ends_it() {
        let mut unmasked = sent(LAST | TEXT, b"a");
        unmasked[1] &= !MASKED;
        let too_long = vec![0; MESSAGE_BYTES_MAX + 1];
        let mut in_parts = sent(TEXT, &too_long[1..]);
        in_parts.extend(sent(LAST | CONTINUED, b"a"));
        let mut begun_twice = sent(TEXT, b"a");
        begun_twice.extend(sent(LAST | TEXT, b"b"));
        let endless = [&[LAST | TEXT, MASKED | 0x7f][..], &[0xff; 8]].concat();
        for (bytes, breach) in [
            (unmasked, Breach::Protocol),
            (sent(LAST | TEXT | 0x40, b"a"), Breach::Protocol),
            (sent(LAST | 3, b"a"), Breach::Protocol),
            (sent(LAST | 0x0b, b"a"), Breach::Protocol),
            (sent(PING, b"a"), Breach::Protocol),
            (sent(LAST | PING, &[0; 126]), Breach::Protocol),
            (sent(LAST | CONTINUED, b"a"), Breach::Protocol),
            (begun_twice, Breach::Protocol),
            (sent(LAST | TEXT, &too_long), Breach::TooLong),
            (in_parts, Breach::TooLong),
            (endless, Breach::TooLong),
            (sent(LAST | TEXT, b"\xff"), Breach::NotText),
        ] {
            assert_eq!(read(&bytes), (vec![], Some(breach)), "{:?}", &bytes[..bytes.len().min(16)]);
        }
    }

    #[test]
    fn it_breaks_off_where_it_is_told_to() {
        let mut bytes = [sent(LAST | TEXT, b"a"), sent(LAST | TEXT, b"b")].concat();
        let mut frames = Frames::default();
        let mut seen = 0;
        let flow = frames.read(&mut bytes, |_| {
            seen += 1;
            ControlFlow::Break("enough")
        });
        assert_eq!((flow, seen), (Ok(ControlFlow::Break("enough")), 1));
    }
}
