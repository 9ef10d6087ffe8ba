//! What Redis says, as it came: one text, whose parts are found when they are asked for.

use std::fmt;

use bytes::Bytes;

use super::measure::{LINE_END, line_end};

/// Bytes of a reply in a log or an error.
const SHOWN_MAX: usize = 200;

/// One whole value that passed the measure.
#[derive(Clone, PartialEq, Eq)]
pub(in crate::ledger) struct Reply(Bytes);

/// The beginning, in printable characters. No more of it is written: it may be as long as a reply may be.
impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.get(..SHOWN_MAX).unwrap_or(&self.0).escape_ascii())
    }
}

/// What a value is. Numbers, states and truths are texts, as they are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::ledger) enum Value<'a> {
    Text(&'a [u8]),
    /// A text that says why there is no answer.
    Error(&'a [u8]),
    /// A list, a set, or a map's keys and values in turn.
    List(Parts<'a>),
    /// A list that comes unasked, or answers in the place of a reply.
    Push(Parts<'a>),
    Nothing,
}

impl<'a> Value<'a> {
    /// A text that is one.
    pub(in crate::ledger) fn text(self) -> Option<&'a str> {
        if let Self::Text(text) = self { std::str::from_utf8(text).ok() } else { None }
    }

    /// What a list has.
    pub(in crate::ledger) fn parts(self) -> Option<Parts<'a>> {
        if let Self::List(parts) = self { Some(parts) } else { None }
    }
}

/// The values of a list that were not read yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::ledger) struct Parts<'a> {
    rest: &'a [u8],
    left: usize,
}

impl<'a> Iterator for Parts<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        self.left = self.left.checked_sub(1)?;
        let (value, rest) = first(self.rest)?;
        self.rest = rest;
        Some(value)
    }
}

/// The same of a list in a reply, which they keep.
#[derive(Debug, Clone)]
pub(in crate::ledger) struct List {
    whole: Reply,
    /// Where the next value begins, and how many there are.
    at: usize,
    left: usize,
}

impl List {
    /// How many values they are.
    pub(in crate::ledger) const fn left(&self) -> usize {
        self.left
    }

    /// What all of it is in.
    pub(in crate::ledger) const fn whole(&self) -> &Reply {
        &self.whole
    }

    /// Reads the next value as what `read` makes of it; one that it makes nothing of stays unread.
    pub(in crate::ledger) fn next<T>(&mut self, read: impl FnOnce(Value<'_>) -> Option<T>) -> Option<T> {
        let left = self.left.checked_sub(1)?;
        let (value, rest) = first(self.whole.0.get(self.at..)?)?;
        let read = read(value)?;
        (self.at, self.left) = (self.whole.0.len() - rest.len(), left);
        Some(read)
    }

    /// Reads the next value, which is a list of its own.
    pub(in crate::ledger) fn list(&mut self) -> Option<Self> {
        let length = self.whole.0.len();
        let (rest, left) = self.next(|value| value.parts().map(|parts| (parts.rest.len(), parts.left)))?;
        Some(Self { whole: self.whole.clone(), at: length - rest, left })
    }
}

impl Reply {
    /// Of a value that passed the measure whole.
    pub(super) fn new(bytes: Bytes) -> Self {
        Self(bytes)
    }

    /// What is written in the protocol; `None` when that is not one value, or too much.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(in crate::ledger) fn of(text: impl Into<Bytes>) -> Option<Self> {
        let bytes = text.into();
        (super::measure::Measure::default().pass(&bytes) == Ok(Some(bytes.len()))).then_some(Self(bytes))
    }

    /// What it is.
    pub(in crate::ledger) fn value(&self) -> Value<'_> {
        head(&self.0).map_or(Value::Nothing, |(value, ..)| value)
    }

    /// The text that it begins with, if it is a list, or the first word of a text; "" when there is none.
    pub(in crate::ledger) fn word(&self) -> &str {
        let word = match self.value() {
            Value::List(mut parts) => parts.next().and_then(Value::text),
            value @ Value::Text(_) => value.text().and_then(|text| text.split(' ').next()),
            Value::Error(_) | Value::Push(_) | Value::Nothing => None,
        };
        word.unwrap_or_default()
    }

    /// Its values, if it is a list.
    pub(in crate::ledger) fn list(self) -> Result<List, Self> {
        let Value::List(Parts { rest, left }) = self.value() else { return Err(self) };
        let at = self.0.len() - rest.len();
        Ok(List { whole: self, at, left })
    }
}

/// The first value, and what is behind it. What did not pass the measure may have less in it than it says.
fn first(bytes: &[u8]) -> Option<(Value<'_>, &[u8])> {
    let (value, behind, inside) = head(bytes)?;
    Some((value, past(behind, inside)?))
}

/// The first value, what is behind it, and how many values of that are still its own.
fn head(bytes: &[u8]) -> Option<(Value<'_>, &[u8], usize)> {
    let (line, behind) = line(bytes)?;
    let (kind, line) = line.split_first()?;
    let number = || number(line);
    let text = || {
        let length = number()?;
        Some((behind.get(..length)?, behind.get(length + LINE_END.len()..)?))
    };
    Some(match kind {
        b'_' => (Value::Nothing, behind, 0),
        b'$' | b'*' if line == b"-1" => (Value::Nothing, behind, 0),
        b'$' => text().map(|(text, behind)| (Value::Text(text), behind, 0))?,
        // Its first four characters say what kind of text it is.
        b'=' => text().map(|(text, behind)| (Value::Text(text.get(4..).unwrap_or_default()), behind, 0))?,
        b'!' => text().map(|(text, behind)| (Value::Error(text), behind, 0))?,
        b'-' => (Value::Error(line), behind, 0),
        b'*' | b'~' => number().map(|left| (Value::List(Parts { rest: behind, left }), behind, left))?,
        b'>' => number().map(|left| (Value::Push(Parts { rest: behind, left }), behind, left))?,
        b'%' => {
            let left = number()?.checked_mul(2)?;
            (Value::List(Parts { rest: behind, left }), behind, left)
        }
        // What is told about a value comes before it and does not stand for it.
        b'|' => head(past(behind, number()?.checked_mul(2)?)?)?,
        _ => (Value::Text(line), behind, 0),
    })
}

/// What is behind so many values.
fn past(bytes: &[u8], values: usize) -> Option<&[u8]> {
    (0..values).try_fold(bytes, |rest, _| first(rest).map(|(_, rest)| rest))
}

/// A length. It has passed the measure, so it is not too large.
fn number(digits: &[u8]) -> Option<usize> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_usize, |number, digit| match digit {
        b'0'..=b'9' => number.checked_mul(10)?.checked_add((digit - b'0').into()),
        _ => None,
    })
}

/// The first line, without its end, and what is behind it.
fn line(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = line_end(bytes)?;
    Some((bytes.get(..end)?, bytes.get(end + LINE_END.len()..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(text: &'static str) -> Reply {
        Reply::of(text).unwrap_or_else(|| panic!("{text:?} is no reply"))
    }

    #[test]
    fn every_kind_of_value_is_read() {
        for (text, expected) in [
            ("+OK\r\n", Value::Text(b"OK")),
            ("+a\rb\nc\r\r\n", Value::Text(b"a\rb\nc\r")),
            (":-12\r\n", Value::Text(b"-12")),
            ("#t\r\n", Value::Text(b"t")),
            (",1.5\r\n", Value::Text(b"1.5")),
            ("(123\r\n", Value::Text(b"123")),
            ("$5\r\na\r\nbc\r\n", Value::Text(b"a\r\nbc")),
            ("$0\r\n\r\n", Value::Text(b"")),
            ("=6\r\ntxt:ab\r\n", Value::Text(b"ab")),
            ("=2\r\nab\r\n", Value::Text(b"")),
            ("-ERR no\r\n", Value::Error(b"ERR no")),
            ("!3\r\nERR\r\n", Value::Error(b"ERR")),
            ("$-1\r\n", Value::Nothing),
            ("*-1\r\n", Value::Nothing),
            ("_\r\n", Value::Nothing),
            ("|1\r\n+ttl\r\n*1\r\n:5\r\n:7\r\n", Value::Text(b"7")),
        ] {
            assert_eq!(reply(text).value(), expected, "{text:?}");
        }
        assert_eq!(reply("$2\r\n\u{e9}\r\n").value().text(), Some("\u{e9}"));
        assert_eq!(Value::Text(b"\xff").text(), None);
    }

    #[test]
    fn lists_are_read_front_to_back() {
        let nested = reply("*4\r\n:1\r\n*2\r\n$1\r\na\r\n*1\r\n_\r\n%1\r\n+b\r\n~1\r\n:2\r\n+c\r\n");
        let mut list = nested.list().expect("a list");
        assert_eq!(list.left(), 4);
        assert_eq!(list.list().map(|_| ()), None, "no list, and so not read");
        assert_eq!(list.next(|value| value.text().map(str::to_owned)).as_deref(), Some("1"));
        let mut inner = list.list().expect("a list");
        assert_eq!(inner.next(|value| value.text().map(str::to_owned)).as_deref(), Some("a"));
        let mut innermost = inner.list().expect("a list");
        assert_eq!((innermost.next(|value| Some(value == Value::Nothing)), innermost.left()), (Some(true), 0));
        assert_eq!((innermost.next(|_| Some(())), inner.left()), (None, 0));
        let pairs =
            list.next(|value| value.parts().map(|mut parts| (parts.next() == Some(Value::Text(b"b")), parts.count())));
        assert_eq!((pairs, list.left()), (Some((true, 1)), 1));
        assert_eq!(list.next(|value| Some(value == Value::Text(b"c"))), Some(true));
        assert!(reply("+OK\r\n").list().is_err());
        let pushed = reply(">2\r\n+message\r\n$1\r\nc\r\n");
        let Value::Push(mut told) = pushed.value() else { panic!("no push") };
        assert_eq!(
            (told.next(), told.next(), told.next()),
            (Some(Value::Text(b"message")), Some(Value::Text(b"c")), None)
        );
    }

    #[test]
    fn no_more_of_a_reply_is_shown_than_helps() {
        assert_eq!(format!("{:?}", reply("$2\r\n\u{e9}\r\n")), r"$2\r\n\xc3\xa9\r\n");
        let long = Reply::of(format!("+{}\r\n", "x".repeat(1000))).expect("a reply");
        assert_eq!(format!("{long:?}").len(), SHOWN_MAX);
    }
}
