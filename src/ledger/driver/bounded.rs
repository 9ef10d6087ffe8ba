//! A limit for what Redis sends: how deep, how long and in how many parts.
//!
//! The client's decoder believes the lengths that it reads and keeps all of a reply until its end has come. Replies are
//! measured here while they pass, before it sees them, so that a server which is none, or means harm, costs a connection
//! and not the process.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Lists within lists of one reply. Our scripts answer with three.
const DEPTH_MAX: usize = 16;

/// Values in one reply: ten times those of the longest listing.
const PARTS_MAX: u64 = 500_000;

/// Bytes of one reply.
const BYTES_MAX: u64 = 16 * 1024 * 1024;

/// A stream whose replies are measured; one that is too much ends it with [`io::ErrorKind::InvalidData`].
pub(super) struct Bounded<S> {
    stream: S,
    measure: Measure,
}

impl<S> Bounded<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, measure: Measure::default() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        let new = buf.filled().get(before..).unwrap_or_default();
        Poll::Ready(self.measure.pass(new).map_err(|excess| io::Error::new(io::ErrorKind::InvalidData, excess)))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Why a reply was not let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Excess {
    #[error("Redis nests lists deeper than {DEPTH_MAX}")]
    Depth,
    #[error("Redis answers with more than {PARTS_MAX} values")]
    Parts,
    #[error("Redis answers with more than {BYTES_MAX} bytes")]
    Bytes,
    #[error("what Redis sends is not its protocol")]
    NotRedis,
}

/// Where in a reply the stream is.
#[derive(Clone, Copy)]
enum Place {
    /// Before a value.
    Type,
    /// In the line that says how long a text or how many a list has.
    Length { kind: u8, negative: bool, value: u64 },
    /// In a line that is the value.
    Line,
    /// In a text, with so many bytes left.
    Text(u64),
}

/// Follows the stream's values, whichever way it is cut into pieces. Rules of RESP3,
/// <https://redis.io/docs/latest/develop/reference/protocol-spec/>.
pub(super) struct Measure {
    place: Place,
    /// For each list that is open how many values it still lacks.
    open: [u64; DEPTH_MAX],
    depth: usize,
    parts: u64,
    bytes: u64,
}

impl Default for Measure {
    fn default() -> Self {
        Self { place: Place::Type, open: [0; DEPTH_MAX], depth: 0, parts: 0, bytes: 0 }
    }
}

impl Measure {
    /// Measures the next piece.
    pub(super) fn pass(&mut self, mut piece: &[u8]) -> Result<(), Excess> {
        while let Some(first) = piece.first() {
            let taken = match self.place {
                Place::Type => {
                    self.place = match first {
                        b'$' | b'=' | b'!' | b'*' | b'~' | b'>' | b'%' | b'|' => {
                            Place::Length { kind: *first, negative: false, value: 0 }
                        }
                        b'+' | b'-' | b':' | b',' | b'#' | b'(' | b'_' => Place::Line,
                        _ => return Err(Excess::NotRedis),
                    };
                    1
                }
                Place::Length { kind, negative, value } => {
                    match first {
                        b'\r' => {}
                        b'\n' => self.length(kind, negative, value)?,
                        b'-' if value == 0 && !negative => self.place = Place::Length { kind, negative: true, value },
                        b'0'..=b'9' if value <= BYTES_MAX => {
                            let value = value * 10 + u64::from(first - b'0');
                            self.place = Place::Length { kind, negative, value };
                        }
                        b'0'..=b'9' => return Err(Excess::Bytes),
                        _ => return Err(Excess::NotRedis),
                    }
                    1
                }
                Place::Line => match piece.iter().position(|byte| *byte == b'\n') {
                    Some(at) => {
                        self.ended();
                        at + 1
                    }
                    None => piece.len(),
                },
                Place::Text(left) => {
                    let taken = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    self.place = Place::Text(left - taken as u64);
                    if taken as u64 == left {
                        self.ended();
                    }
                    taken
                }
            };
            self.bytes += taken as u64;
            if self.bytes > BYTES_MAX {
                return Err(Excess::Bytes);
            }
            if self.depth == 0 && matches!(self.place, Place::Type) {
                self.bytes = 0;
            }
            piece = piece.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    /// A length was read to its end.
    fn length(&mut self, kind: u8, negative: bool, value: u64) -> Result<(), Excess> {
        match kind {
            b'$' | b'=' | b'!' if negative => self.ended(),
            // The end of its line belongs to a text.
            b'$' | b'=' | b'!' if value <= BYTES_MAX => self.place = Place::Text(value + 2),
            b'$' | b'=' | b'!' => return Err(Excess::Bytes),
            b'*' | b'~' | b'>' | b'%' if negative || value == 0 => self.ended(),
            b'*' | b'~' | b'>' => self.opened(value)?,
            b'%' => self.opened(value * 2)?,
            // What is told about a value comes before it and does not stand for it.
            _ if negative => return Err(Excess::NotRedis),
            _ => self.opened(value * 2 + 1)?,
        }
        Ok(())
    }

    fn opened(&mut self, lacks: u64) -> Result<(), Excess> {
        self.parts = self.parts.saturating_add(lacks);
        if self.parts > PARTS_MAX {
            return Err(Excess::Parts);
        }
        let place = self.open.get_mut(self.depth).ok_or(Excess::Depth)?;
        *place = lacks;
        self.depth += 1;
        self.place = Place::Type;
        Ok(())
    }

    /// A value is complete, and with it perhaps the lists that it is the last of.
    fn ended(&mut self) {
        self.place = Place::Type;
        while let Some(lacks) = self.depth.checked_sub(1).and_then(|at| self.open.get_mut(at)) {
            *lacks -= 1;
            if *lacks > 0 {
                return;
            }
            self.depth -= 1;
        }
        self.parts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whole, byte by byte, and cut in two at every place: the same.
    fn measured(bytes: &[u8]) -> Result<(), Excess> {
        let whole = Measure::default().pass(bytes);
        let mut single = Measure::default();
        assert_eq!(bytes.iter().try_for_each(|byte| single.pass(std::slice::from_ref(byte))), whole);
        for at in 0..bytes.len().min(200) {
            let (first, second) = bytes.split_at(at);
            let mut cut = Measure::default();
            assert_eq!(cut.pass(first).and_then(|()| cut.pass(second)), whole, "cut at {at}");
        }
        whole
    }

    #[test]
    fn what_redis_says_passes() {
        for reply in [
            "+OK\r\n",
            ":-12\r\n",
            "$5\r\na\r\nbc\r\n",
            "$0\r\n\r\n",
            "$-1\r\n",
            "*-1\r\n",
            "*0\r\n",
            "*3\r\n:1\r\n*2\r\n$1\r\na\r\n_\r\n+x\r\n",
            "%2\r\n+a\r\n:1\r\n+b\r\n*1\r\n:2\r\n",
            "|1\r\n+ttl\r\n:5\r\n*1\r\n:1\r\n",
            ">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nt\r\n",
            "~2\r\n#t\r\n,1.5\r\n",
            "=6\r\ntxt:ab\r\n(123\r\n!3\r\nERR\r\n-ERR no\r\n",
        ] {
            let mut measure = Measure::default();
            assert_eq!(measure.pass(reply.as_bytes()), Ok(()), "{reply:?}");
            assert!(matches!(measure.place, Place::Type) && measure.depth == 0, "{reply:?} has not ended");
            assert_eq!(measured(reply.repeat(3).as_bytes()), Ok(()), "{reply:?}");
        }
    }

    #[test]
    fn each_limit_is_the_last_that_passes() {
        let nested = |depth: usize| measured("*1\r\n".repeat(depth).as_bytes());
        assert_eq!((nested(DEPTH_MAX), nested(DEPTH_MAX + 1)), (Ok(()), Err(Excess::Depth)));
        let listed = |parts: u64| measured(format!("*{parts}\r\n").as_bytes());
        assert_eq!((listed(PARTS_MAX), listed(PARTS_MAX + 1)), (Ok(()), Err(Excess::Parts)));
        // Two lists of one reply are summed up; two replies are not.
        let half = PARTS_MAX / 2;
        let list = format!("*{half}\r\n{}", "_\r\n".repeat(usize::try_from(half).expect("small")));
        assert_eq!(Measure::default().pass(format!("*2\r\n{list}{list}").as_bytes()), Err(Excess::Parts));
        assert_eq!(Measure::default().pass(list.repeat(3).as_bytes()), Ok(()));
        let text = |bytes: u64| measured(format!("${bytes}\r\n").as_bytes());
        assert_eq!((text(BYTES_MAX), text(BYTES_MAX + 1)), (Ok(()), Err(Excess::Bytes)));
        // A text within the limit, and the list around it beyond.
        let most = usize::try_from(BYTES_MAX).expect("small") / 2;
        let text = format!("${most}\r\n{}\r\n", "a".repeat(most));
        assert_eq!(Measure::default().pass(format!("*2\r\n{text}{text}").as_bytes()), Err(Excess::Bytes));
        assert_eq!(Measure::default().pass(text.repeat(3).as_bytes()), Ok(()));
        let mut line = Measure::default();
        let endless = vec![b'x'; 1 << 20];
        assert_eq!(line.pass(b"+"), Ok(()));
        assert_eq!((0..17).try_for_each(|_| line.pass(&endless)), Err(Excess::Bytes));
    }

    #[test]
    fn what_is_not_the_protocol_ends_it() {
        for text in ["HTTP/1.1 400\r\n", "\r\n", "*?\r\n", "$1x\r\n", "*--1\r\n", "|-1\r\n", "\u{0}"] {
            assert_eq!(measured(text.as_bytes()), Err(Excess::NotRedis), "{text:?}");
        }
        for text in ["*9223372036854775807\r\n", "$9223372036854775807\r\n", "%99999999999999999999\r\n"] {
            assert!(measured(text.as_bytes()).is_err(), "{text:?}");
        }
    }
}
