//! Where what Redis sends begins and ends, and a limit for it: how deep, how long, in how many parts.
//!
//! Lengths are not believed: a value is kept only as far as it has come, so that a server which is none, or means harm,
//! costs a connection and not the process.

/// Lists within lists of one reply. Our scripts answer with three.
const DEPTH_MAX: usize = 16;

/// Values in one reply: ten times those of the longest listing.
const PARTS_MAX: u64 = 500_000;

/// Bytes of one reply.
const BYTES_MAX: u64 = 16 * 1024 * 1024;

/// Bytes of a value that is a line: numbers, states, errors.
const LINE_MAX: u64 = 64 * 1024;

/// Digits of a length that is read at once. With all of them it is less than what any kind may have.
const SHORT_LENGTH_MAX: usize = 5;

/// What ends a line, and a text behind it.
pub(in crate::ledger) const LINE_END: &[u8] = b"\r\n";

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
}

impl Default for Measure {
    fn default() -> Self {
        Self { place: Place::Type, open: [0; DEPTH_MAX], depth: 0, parts: 0, bytes: 0 }
    }
}

impl Measure {
    /// Measures the next piece up to the end of an outermost value: how much of the piece belongs to that, or `None` when
    /// it does not end there.
    pub(super) fn pass(&mut self, piece: &[u8]) -> Result<Option<usize>, Excess> {
        let mut at = 0;
        while let Some(rest) = piece.get(at..).filter(|rest| !rest.is_empty()) {
            let first = rest.first().unwrap_or(&0);
            let taken = match self.place {
                Place::Type => {
                    self.begun(*first)?;
                    match (self.place, rest.get(1..).and_then(short_length)) {
                        (Place::Length { kind, .. }, Some((value, len))) => {
                            self.length(kind, false, value)?;
                            1 + len
                        }
                        _ => 1,
                    }
                }
                Place::Length { kind, negative, digits, value } => {
                    self.place = match first {
                        b'\r' if digits > 0 => Place::LengthEnd { kind, negative, value },
                        b'-' if digits == 0 && !negative => Place::Length { kind, negative: true, digits, value },
                        // Longer than any length that passes; zeros in front are no reason for more.
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
                Place::Line { read, returned } => self.line(rest, read, returned)?,
                Place::Text(left) => {
                    let left = usize::try_from(left).unwrap_or(usize::MAX);
                    let taken = rest.len().min(left);
                    let end = rest.get(left.saturating_sub(LINE_END.len())..taken).unwrap_or_default();
                    if !LINE_END
                        .get(LINE_END.len().saturating_sub(left)..)
                        .is_some_and(|line_end| line_end.starts_with(end))
                    {
                        return Err(Excess::NotRedis);
                    }
                    self.place = Place::Text((left - taken) as u64);
                    if taken == left {
                        self.ended();
                    }
                    taken
                }
            };
            self.bytes += taken as u64;
            if self.bytes > BYTES_MAX {
                return Err(Excess::Bytes);
            }
            at += taken;
            if self.is_between() {
                self.bytes = 0;
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    /// Whether the last reply is complete and the next one has not begun.
    fn is_between(&self) -> bool {
        self.depth == 0 && matches!(self.place, Place::Type)
    }

    /// A value of a kind begins.
    fn begun(&mut self, kind: u8) -> Result<(), Excess> {
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
        let end = if returned && piece.first() == Some(&b'\n') {
            Some(1)
        } else {
            line_end(piece).map(|at| at + LINE_END.len())
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
            b'$' | b'=' | b'!' if value <= BYTES_MAX => self.place = Place::Text(value + LINE_END.len() as u64),
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
    }
}

/// A length that is there to the end of its line, as nearly all are, and how long that is; whatever else it may be, it is
/// looked at character by character.
fn short_length(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut value = 0;
    for (at, byte) in bytes.iter().enumerate().take(SHORT_LENGTH_MAX + 1) {
        match byte {
            b'0'..=b'9' => value = value * 10 + u64::from(byte - b'0'),
            b'\r' if at > 0 && bytes.get(at + 1) == Some(&b'\n') => return Some((value, at + LINE_END.len())),
            _ => return None,
        }
    }
    None
}

/// Where the first end of a line begins.
pub(super) fn line_end(bytes: &[u8]) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + bytes.get(from..)?.iter().position(|byte| *byte == b'\n')?;
        if let Some(before) = at.checked_sub(1)
            && bytes.get(before) == Some(&b'\r')
        {
            return Some(before);
        }
        from = at + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes all of a piece; how many outermost values ended in it.
    fn pass(measure: &mut Measure, mut piece: &[u8]) -> Result<usize, Excess> {
        let mut ends = 0;
        while let Some(end) = measure.pass(piece)? {
            piece = &piece[end..];
            ends += 1;
        }
        Ok(ends)
    }

    fn whole(bytes: &[u8]) -> Result<usize, Excess> {
        pass(&mut Measure::default(), bytes)
    }

    /// Whole, byte by byte, and cut in two at every place: the same.
    fn measured(bytes: &[u8]) -> Result<usize, Excess> {
        let whole = whole(bytes);
        let add = |measure: &mut Measure, ends: usize, piece: &[u8]| Ok(ends + pass(measure, piece)?);
        let mut single = Measure::default();
        assert_eq!(bytes.chunks(1).try_fold(0, |ends, byte| add(&mut single, ends, byte)), whole);
        for at in 0..bytes.len().min(200) {
            let (first, second) = bytes.split_at(at);
            let mut cut = Measure::default();
            assert_eq!(
                [first, second].iter().try_fold(0, |ends, part| add(&mut cut, ends, part)),
                whole,
                "cut at {at}"
            );
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
            "=6\r\ntxt:ab\r\n",
            "(123\r\n",
            "!3\r\nERR\r\n",
            "-ERR no\r\n",
            "+a\rb\nc\r\r\n",
        ] {
            assert_eq!(Measure::default().pass(reply.as_bytes()), Ok(Some(reply.len())), "{reply:?}");
            assert_eq!(measured(reply.repeat(3).as_bytes()), Ok(3), "{reply:?}");
        }
    }

    #[test]
    fn each_limit_is_the_last_that_passes() {
        let nested = |depth: usize| measured("*1\r\n".repeat(depth).as_bytes());
        assert_eq!((nested(DEPTH_MAX), nested(DEPTH_MAX + 1)), (Ok(0), Err(Excess::Depth)));
        let listed = |parts: u64| measured(format!("*{parts}\r\n").as_bytes());
        assert_eq!((listed(PARTS_MAX), listed(PARTS_MAX + 1)), (Ok(0), Err(Excess::Parts)));
        // Two lists of one reply are summed up; two replies are not.
        let half = PARTS_MAX / 2;
        let list = format!("*{half}\r\n{}", "_\r\n".repeat(usize::try_from(half).expect("small")));
        assert_eq!(whole(format!("*2\r\n{list}{list}").as_bytes()), Err(Excess::Parts));
        assert_eq!(whole(list.repeat(3).as_bytes()), Ok(3));
        let text = |bytes: u64| measured(format!("${bytes}\r\n").as_bytes());
        assert_eq!((text(BYTES_MAX), text(BYTES_MAX + 1)), (Ok(0), Err(Excess::Bytes)));
        // A text within the limit, and the list around it beyond.
        let most = usize::try_from(BYTES_MAX).expect("small") / 2;
        let text = format!("${most}\r\n{}\r\n", "a".repeat(most));
        assert_eq!(whole(format!("*2\r\n{text}{text}").as_bytes()), Err(Excess::Bytes));
        assert_eq!(whole(text.repeat(3).as_bytes()), Ok(3));
        let mut line = Measure::default();
        let endless = vec![b'x'; 1 << 20];
        assert_eq!(line.pass(b"+"), Ok(None));
        assert_eq!(line.pass(&endless), Err(Excess::Bytes));
        let text =
            |length: u64| measured(format!("+{}\r\n", "x".repeat(usize::try_from(length).expect("small"))).as_bytes());
        assert_eq!((text(LINE_MAX - 2), text(LINE_MAX - 1)), (Ok(1), Err(Excess::Bytes)));
    }

    #[test]
    fn what_is_not_the_protocol_ends_it() {
        for text in ["HTTP/1.1 400\r\n", "\r\n", "*?\r\n", "$1x\r\n", "*--1\r\n", "|-1\r\n", "\u{0}"] {
            assert_eq!(measured(text.as_bytes()), Err(Excess::NotRedis), "{text:?}");
        }
        // An end of a line that is none, a text that is said to be shorter than nothing.
        for text in [
            "$5\nabcde\r\n",
            "$5\r\nabcdefg",
            "$1\r\na\r\r",
            "$0\r\n\n\r",
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
        // A line ends with both characters.
        assert_eq!(measured(b"+a\n$1000\n"), Ok(0));
        for text in ["*9223372036854775807\r\n", "$9223372036854775807\r\n", "%99999999999999999999\r\n"] {
            assert!(measured(text.as_bytes()).is_err(), "{text:?}");
        }
    }
}
