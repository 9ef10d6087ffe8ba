//! A limit for what Redis sends: how deep, how long, in how many parts, and no more answers than questions.
//!
//! The client's decoder believes the lengths that it reads and keeps all of a reply until its end has come. Replies are
//! measured here while they pass, before it sees them, so that a server which is none, or means harm, costs a connection
//! and not the process. That holds only as long as both see the same values in the same bytes: whatever the decoder could
//! read in another way is [`Excess::NotRedis`].

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use tokio_util::sync::CancellationToken;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Lists within lists of one reply. Our scripts answer with three.
const DEPTH_MAX: usize = 16;

/// Values in one reply: ten times those of the longest listing.
const PARTS_MAX: u64 = 500_000;

/// Bytes of one reply.
const BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Bytes of a value that is a line: numbers, states, errors. The decoder looks for its end from its beginning again with
/// every piece that arrives, so a longer one would cost the square of its length.
const LINE_MAX: u64 = 64 * 1024;

/// What both sides of a connection know of it: the stream that measures it, and whoever asks on it.
pub(super) struct Account {
    /// How many answers Redis owes at most: one that was not sent after all because nobody waited any more stays counted.
    owed: AtomicI64,
    /// Whether Redis may send something unasked: where nothing is subscribed it may not.
    pushes: bool,
    /// Why the connection ended, as far as its stream saw it.
    why: OnceLock<String>,
    /// Ends the connection.
    end: CancellationToken,
}

impl Account {
    /// Of a connection that begins with so many questions.
    pub(super) fn new(questions: i64, pushes: bool) -> Self {
        Self { owed: AtomicI64::new(questions), pushes, why: OnceLock::new(), end: CancellationToken::new() }
    }

    /// One more question is sent.
    pub(super) fn asked(&self) {
        self.owed.fetch_add(1, Ordering::Relaxed);
    }

    /// One more answer has come; false when none was owed.
    pub(super) fn answered(&self) -> bool {
        self.settled(1)
    }

    fn settled(&self, answers: i64) -> bool {
        let settle = |owed: i64| owed.checked_sub(answers).filter(|left| *left >= 0);
        self.owed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, settle).is_ok()
    }

    /// Ends the connection.
    pub(super) fn end(&self, why: &impl ToString) {
        // The first reason is the one.
        self.why.set(why.to_string()).ok();
        self.end.cancel();
    }

    /// Returns when somebody has ended the connection.
    pub(super) async fn ended(&self) {
        self.end.cancelled().await;
    }

    /// Why the connection ended; "" when nobody knows.
    pub(super) fn why(&self) -> &str {
        self.why.get().map_or("", String::as_str)
    }
}

/// A stream whose replies are measured; one that is too much ends it with [`io::ErrorKind::InvalidData`].
pub(super) struct Bounded<S> {
    stream: S,
    measure: Measure,
    account: Arc<Account>,
}

impl<S> Bounded<S> {
    pub(super) fn new(stream: S, account: Arc<Account>) -> Self {
        Self { stream, measure: Measure::default(), account }
    }

    fn pass(&mut self, piece: &[u8]) -> Result<(), Excess> {
        self.measure.pass(piece)?;
        let (replies, pushes) = self.measure.take();
        // The client would give an answer too many to whoever asks next, and theirs to the one after.
        if (pushes > 0 && !self.account.pushes) || (replies > 0 && !self.account.settled(replies)) {
            return Err(Excess::Unasked);
        }
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        let new = buf.filled().get(before..).unwrap_or_default();
        let read = match read {
            Ok(()) if new.is_empty() => {
                self.account.why.set("Redis closed the connection".to_owned()).ok();
                Ok(())
            }
            Ok(()) => self.pass(new).map_err(|excess| io::Error::new(io::ErrorKind::InvalidData, excess)),
            Err(error) => Err(error),
        };
        if let Err(error) = &read {
            self.account.why.set(error.to_string()).ok();
            buf.set_filled(before);
        }
        Poll::Ready(read)
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
    #[error("Redis answers with more than {BYTES_MAX} bytes, or {LINE_MAX} in a line")]
    Bytes,
    #[error("Redis sends what nobody asked for")]
    Unasked,
    #[error("what Redis sends is not its protocol")]
    NotRedis,
}

/// Where in a reply the stream is.
#[derive(Clone, Copy)]
enum Place {
    /// Before a value.
    Type,
    /// In the line that says how long a text or how many a list has.
    Length { kind: u8, negative: bool, digits: u8, value: u64 },
    /// At the end of that line.
    LengthEnd { kind: u8, negative: bool, value: u64 },
    /// In a line that is the value, with so many bytes of it read; whether the last one may be half of the line's end.
    Line { read: u64, returned: bool },
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
    /// Whether the outermost value comes unasked.
    is_push: bool,
    /// Complete outermost values: answers, and what came unasked.
    replies: i64,
    pushes: i64,
}

impl Default for Measure {
    fn default() -> Self {
        Self {
            place: Place::Type,
            open: [0; DEPTH_MAX],
            depth: 0,
            parts: 0,
            bytes: 0,
            is_push: false,
            replies: 0,
            pushes: 0,
        }
    }
}

impl Measure {
    /// Measures the next piece.
    pub(super) fn pass(&mut self, mut piece: &[u8]) -> Result<(), Excess> {
        while let Some(first) = piece.first() {
            let taken = match self.place {
                Place::Type => {
                    self.begun(*first)?;
                    1
                }
                Place::Length { kind, negative, digits, value } => {
                    self.place = match first {
                        b'\r' if digits > 0 => Place::LengthEnd { kind, negative, value },
                        b'-' if digits == 0 && !negative => Place::Length { kind, negative: true, digits, value },
                        // Nineteen digits are the most that the decoder reads; nobody writes as many.
                        b'0'..=b'9' if digits < 19 && value <= BYTES_MAX => {
                            let value = value * 10 + u64::from(first - b'0');
                            Place::Length { kind, negative, digits: digits + 1, value }
                        }
                        b'0'..=b'9' => return Err(Excess::Bytes),
                        _ => return Err(Excess::NotRedis),
                    };
                    1
                }
                Place::LengthEnd { kind, negative, value } => {
                    if *first != b'\n' {
                        return Err(Excess::NotRedis);
                    }
                    self.length(kind, negative, value)?;
                    1
                }
                Place::Line { read, returned } => self.line(piece, read, returned)?,
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
            if self.is_between() {
                self.bytes = 0;
            }
            piece = piece.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    /// How many answers were complete since this was asked, and how many that came unasked.
    pub(super) fn take(&mut self) -> (i64, i64) {
        (std::mem::take(&mut self.replies), std::mem::take(&mut self.pushes))
    }

    /// Whether the last reply is complete and the next one has not begun.
    pub(super) fn is_between(&self) -> bool {
        self.depth == 0 && matches!(self.place, Place::Type)
    }

    /// A value of a kind begins.
    fn begun(&mut self, kind: u8) -> Result<(), Excess> {
        if self.depth == 0 {
            self.is_push = kind == b'>';
        }
        self.place = match kind {
            b'$' | b'=' | b'!' | b'*' | b'~' | b'>' | b'%' | b'|' => {
                Place::Length { kind, negative: false, digits: 0, value: 0 }
            }
            b'+' | b'-' | b':' | b',' | b'#' | b'(' | b'_' => Place::Line { read: 0, returned: false },
            _ => return Err(Excess::NotRedis),
        };
        Ok(())
    }

    /// A line goes on; how much of the piece belongs to it.
    fn line(&mut self, piece: &[u8], read: u64, returned: bool) -> Result<usize, Excess> {
        // A line's end that is not the decoder's would make the rest of the stream mean something else to each.
        let end = if returned && piece.first() == Some(&b'\n') {
            Some(1)
        } else {
            piece.windows(2).position(|two| two == b"\r\n").map(|at| at + 2)
        };
        let taken = end.unwrap_or(piece.len());
        let read = read + taken as u64;
        if read > LINE_MAX {
            return Err(Excess::Bytes);
        }
        if end.is_some() {
            self.ended();
        } else {
            self.place = Place::Line { read, returned: piece.last() == Some(&b'\r') };
        }
        Ok(taken)
    }

    /// A length was read to its end.
    fn length(&mut self, kind: u8, negative: bool, value: u64) -> Result<(), Excess> {
        match kind {
            // Nothing in the place of a text or a list is what Redis 5 and older say.
            b'$' | b'*' if negative && value == 1 => self.ended(),
            _ if negative => return Err(Excess::NotRedis),
            // The end of its line belongs to a text.
            b'$' | b'=' | b'!' if value <= BYTES_MAX => self.place = Place::Text(value + 2),
            b'$' | b'=' | b'!' => return Err(Excess::Bytes),
            b'*' | b'~' | b'>' | b'%' if value == 0 => self.ended(),
            b'*' | b'~' | b'>' => self.opened(value)?,
            b'%' => self.opened(value * 2)?,
            // What is told about a value comes before it and does not stand for it.
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
        if self.is_push {
            self.pushes += 1;
        } else {
            self.replies += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::codec::Decoder as _;

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

    /// How many values the decoder finds, which must be all.
    fn reply_count(text: &str) -> i64 {
        let mut buffer = bytes::BytesMut::from(text);
        let mut codec = redis::ValueCodec::default();
        let mut count = 0;
        while !buffer.is_empty() {
            assert!(codec.decode(&mut buffer).expect("readable").is_some(), "{text:?}");
            count += 1;
        }
        count
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
            "+a\rb\nc\r\r\n",
        ] {
            let mut measure = Measure::default();
            assert_eq!(measure.pass(reply.as_bytes()), Ok(()), "{reply:?}");
            assert!(measure.is_between(), "{reply:?} has not ended");
            assert_eq!(measure.take(), if reply.starts_with('>') { (0, 1) } else { (reply_count(reply), 0) });
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
        assert_eq!(line.pass(&endless), Err(Excess::Bytes));
        let text =
            |length: u64| measured(format!("+{}\r\n", "x".repeat(usize::try_from(length).expect("small"))).as_bytes());
        assert_eq!((text(LINE_MAX - 2), text(LINE_MAX - 1)), (Ok(()), Err(Excess::Bytes)));
    }

    #[test]
    fn what_is_not_the_protocol_ends_it() {
        for text in ["HTTP/1.1 400\r\n", "\r\n", "*?\r\n", "$1x\r\n", "*--1\r\n", "|-1\r\n", "\u{0}"] {
            assert_eq!(measured(text.as_bytes()), Err(Excess::NotRedis), "{text:?}");
        }
        // What the decoder could take for the beginning of something else: an end that is none, a text that is said to be
        // shorter than nothing and is waited for without end.
        for text in [
            "$5\nabcde\r\n",
            "$1\r2\r\n",
            "*1\r\r\n",
            "$\r\n",
            "$-0\r\n",
            "$-2\r\n",
            "!-1\r\n",
            "=-1\r\n",
            "%-1\r\n",
            ">-1\r\n",
        ] {
            assert_eq!(measured(text.as_bytes()), Err(Excess::NotRedis), "{text:?}");
        }
        // One line to the decoder, and so to the measure.
        let mut measure = Measure::default();
        assert_eq!(measure.pass(b"+a\n$1000\n"), Ok(()));
        assert!(!measure.is_between());
        for text in ["*9223372036854775807\r\n", "$9223372036854775807\r\n", "%99999999999999999999\r\n"] {
            assert!(measured(text.as_bytes()).is_err(), "{text:?}");
        }
    }

    #[tokio::test]
    async fn an_answer_too_many_ends_it() {
        use tokio::io::AsyncReadExt;

        let read = async |questions, pushes, bytes: &'static [u8]| {
            let account = Arc::new(Account::new(questions, pushes));
            let mut stream = Bounded::new(tokio::io::join(bytes, tokio::io::sink()), Arc::clone(&account));
            let read = stream.read_to_end(&mut Vec::new()).await.map_err(|error| error.to_string());
            (read, account.why().to_owned())
        };
        let closed = "Redis closed the connection".to_owned();
        let unasked = Excess::Unasked.to_string();
        assert_eq!(read(2, false, b":1\r\n*1\r\n:1\r\n").await, (Ok(12), closed.clone()));
        assert_eq!(read(1, false, b":1\r\n:1\r\n").await, (Err(unasked.clone()), unasked.clone()));
        assert_eq!(read(9, false, b">1\r\n+x\r\n").await, (Err(unasked.clone()), unasked));
        assert_eq!(read(0, true, b">1\r\n+x\r\n").await, (Ok(8), closed));
    }
}
