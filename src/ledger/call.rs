//! What a script is called with: keys and arguments, written down as they are sent.
//!
//! A lock has some twenty of both. A text of its own for each, or all of them written twice, would cost the service as
//! much as all else it does for the call.

use std::fmt::{self, Display, Write as _};
use std::ops::Range;

use bytes::Bytes;

use super::driver::LINE_END;
use super::key;
use super::script::Script;
use crate::domain::EventId;

/// Room for the length of a word in front of it, which has two digits of nearly every one.
const HEAD: &[u8] = b"$00\r\n";

/// Keys and arguments of one call, each in the order in which they were added, keys first.
pub(super) struct Call {
    words: Words,
    keys: usize,
    args: usize,
    first_key: Range<usize>,
    /// What all keys of the event begin with, where it is about one.
    tag: Range<usize>,
}

/// Words as they are sent: each behind its length.
struct Words(Vec<u8>);

impl fmt::Write for Words {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

impl Words {
    /// Adds what `write` writes as one word; where that is.
    fn word(&mut self, write: impl FnOnce(&mut Self)) -> Range<usize> {
        let head = self.0.len();
        self.0.extend_from_slice(HEAD);
        let from = self.0.len();
        write(self);
        let length = self.0.len() - from;
        let digits = self.0.get_mut(head + 1..head + 3);
        let from = match (u8::try_from(length), digits) {
            (Ok(both @ 10..=99), Some(digits)) => {
                digits.copy_from_slice(&[b'0' + both / 10, b'0' + both % 10]);
                from
            }
            (Ok(one @ 0..=9), Some(digits)) => {
                digits.fill(b'0' + one);
                self.0.remove(head + 1);
                from - 1
            }
            _ => {
                let line = format!("${length}\r\n");
                self.0.splice(head..from, line.bytes());
                head + line.len()
            }
        };
        self.0.extend_from_slice(LINE_END);
        from..from + length
    }

    fn number(&mut self, number: u64) {
        self.0.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    }

    fn shown(&mut self, word: impl Display) {
        // What takes everything fails for no `Display` that does not fail itself, and none of those is written here.
        write!(self, "{word}").ok();
    }
}

impl Call {
    /// Without keys and arguments.
    pub(super) fn new() -> Self {
        let words = Words(Vec::with_capacity(256));
        Self { words, keys: 0, args: 0, first_key: 0..0, tag: 0..0 }
    }

    /// Of a script about an event: those of its keys that the script takes come first.
    pub(super) fn about(event: EventId, script: &Script) -> Self {
        let mut call = Self { words: Words(Vec::with_capacity(640)), ..Self::new() };
        let [first, others @ ..] = key::OF_EVENT;
        call = call.key(key::of_event(event, first));
        call.tag = call.first_key.start..call.first_key.end - first.len();
        others.into_iter().take(script.of_event.saturating_sub(1)).fold(call, |call, name| call.own(name, ""))
    }

    /// Adds a key.
    pub(super) fn key(self, key: impl Display) -> Self {
        self.add_key(|words| words.shown(key))
    }

    /// Adds a key of the event that the call is about: one of the names in [`key`], and what distinguishes it.
    pub(super) fn own(self, name: &str, rest: impl Display) -> Self {
        let tag = self.tag.clone();
        self.add_key(|words| {
            words.0.extend_from_within(tag);
            words.0.extend_from_slice(name.as_bytes());
            words.shown(rest);
        })
    }

    fn add_key(mut self, write: impl FnOnce(&mut Words)) -> Self {
        debug_assert_eq!(self.args, 0, "a key behind arguments");
        let range = self.words.word(write);
        if self.keys == 0 {
            self.first_key = range;
        }
        self.keys += 1;
        self
    }

    /// Adds an argument.
    pub(super) fn arg(self, arg: impl Display) -> Self {
        self.add_arg(|words| words.shown(arg))
    }

    /// Adds a number, which is an argument as any other and written in a third of the time.
    pub(super) fn number(self, number: u64) -> Self {
        self.add_arg(|words| words.number(number))
    }

    /// Adds numbers as one argument, spaces between them.
    pub(super) fn numbers(self, numbers: &[u64]) -> Self {
        self.add_arg(|words| {
            for (at, &number) in numbers.iter().enumerate() {
                if at > 0 {
                    words.0.push(b' ');
                }
                words.number(number);
            }
        })
    }

    /// Adds arguments.
    pub(super) fn args(self, args: impl IntoIterator<Item: Display>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    fn add_arg(mut self, write: impl FnOnce(&mut Words)) -> Self {
        self.words.word(write);
        self.args += 1;
        self
    }

    /// How many keys and how many arguments so far.
    pub(super) const fn count(&self) -> (usize, usize) {
        (self.keys, self.args)
    }

    /// Ready to be sent, more than once if need be.
    pub(super) fn close(self) -> ClosedCall {
        let (keys, args, first_key) = (self.keys, self.args, self.first_key);
        ClosedCall { keys, args, first_key, words: self.words.0.into() }
    }
}

/// See [`Call::close`].
pub(super) struct ClosedCall {
    /// How many keys.
    pub(super) keys: usize,
    /// How many arguments.
    pub(super) args: usize,
    first_key: Range<usize>,
    /// The keys, then the arguments, as they are sent.
    pub(super) words: Bytes,
}

impl ClosedCall {
    /// The key that says which server is asked; "" when there is none.
    pub(super) fn first_key(&self) -> &str {
        // It was written as a text.
        self.words.get(self.first_key.clone()).and_then(|key| std::str::from_utf8(key).ok()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::script;
    use super::*;

    fn sent(words: &[&str]) -> String {
        words.iter().fold(String::new(), |sent, word| sent + &format!("${}\r\n{word}\r\n", word.len()))
    }

    #[test]
    fn keys_and_arguments_keep_their_order_and_their_bounds() {
        let event = EventId::new(7).expect("an id");
        let call = Call::about(event, &script::ORDER).key("a").own("rate:", 12).arg("").number(12).args(["d", "ef"]);
        assert_eq!(call.count(), (7, 4));
        let call = call.close();
        assert_eq!((call.keys, call.args, call.first_key()), (7, 4, "seatlock:3:{e:7}:book"));
        let own = key::OF_EVENT.map(|name| format!("seatlock:3:{{e:7}}:{name}"));
        let mut words: Vec<&str> = own.iter().map(String::as_str).collect();
        words.extend(["a", "seatlock:3:{e:7}:rate:12", "", "12", "d", "ef"]);
        assert_eq!(String::from_utf8_lossy(&call.words), sent(&words));
        let bare = Call::about(event, &script::LOCK).close();
        assert_eq!((bare.keys, bare.args), (3, 0));
        let nothing = Call::new().close();
        assert_eq!((nothing.keys, nothing.args, nothing.first_key(), nothing.words.len()), (0, 0, "", 0));
    }

    #[test]
    fn a_word_of_any_length_is_behind_its_length() {
        for length in [0, 1, 9, 10, 11, 99, 100, 101, 255, 256, 12_345] {
            let word = "x".repeat(length);
            let call = Call::new().key(&word).arg("a").arg(&word).number(length as u64).close();
            assert_eq!(String::from_utf8_lossy(&call.words), sent(&[&word, "a", &word, &length.to_string()]));
            assert_eq!(call.first_key(), word);
        }
        assert_eq!(Call::new().number(u64::MAX).close().words, sent(&[&u64::MAX.to_string()]).as_bytes());
        assert_eq!(Call::new().numbers(&[1, 20, 0]).numbers(&[]).close().words, sent(&["1 20 0", ""]).as_bytes());
    }
}
