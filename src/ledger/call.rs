//! What a script is called with: keys and arguments, written into one text that all of them share.
//!
//! A lock has some twenty-five of both. A text of its own for each would cost the service as much as all else it does
//! for the call.

use std::fmt::{Display, Write as _};
use std::ops::Range;

use bytes::Bytes;

use super::key;
use crate::domain::EventId;

/// Keys and arguments of one call, each in the order in which they were added.
#[derive(Default)]
pub(super) struct Call {
    text: String,
    keys: Vec<Range<usize>>,
    args: Vec<Range<usize>>,
}

impl Call {
    /// Without keys and arguments.
    pub(super) fn new() -> Self {
        Self { text: String::with_capacity(160), keys: Vec::with_capacity(5), args: Vec::with_capacity(4) }
    }

    /// About an event: its six keys and its channel come first.
    pub(super) fn about(event: EventId) -> Self {
        let (text, keys, args) = (String::with_capacity(768), Vec::with_capacity(9), Vec::with_capacity(14));
        let mut call = Self { text, keys, args };
        for name in key::OF_EVENT {
            call = call.key(key::of_event(event, name));
        }
        call.arg(key::event_channel(event))
    }

    fn write(&mut self, word: impl Display) -> Range<usize> {
        let from = self.text.len();
        // A text takes everything; what is written here has no failing `Display`.
        write!(self.text, "{word}").ok();
        from..self.text.len()
    }

    /// Adds a key.
    pub(super) fn key(mut self, key: impl Display) -> Self {
        let range = self.write(key);
        self.keys.push(range);
        self
    }

    /// Adds an argument.
    pub(super) fn arg(mut self, arg: impl Display) -> Self {
        let range = self.write(arg);
        self.args.push(range);
        self
    }

    /// Adds arguments.
    pub(super) fn args(self, args: impl IntoIterator<Item: Display>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// How many keys and how many arguments.
    pub(super) fn count(&self) -> (usize, usize) {
        (self.keys.len(), self.args.len())
    }

    /// Ready to be sent, more than once if need be.
    pub(super) fn close(self) -> ClosedCall {
        ClosedCall { text: Bytes::from(self.text), keys: self.keys, args: self.args }
    }
}

/// See [`Call::close`].
pub(super) struct ClosedCall {
    text: Bytes,
    keys: Vec<Range<usize>>,
    args: Vec<Range<usize>>,
}

impl ClosedCall {
    /// The key that says which server is asked; "" when there is none.
    pub(super) fn first_key(&self) -> &str {
        let range = self.keys.first().cloned().unwrap_or_default();
        std::str::from_utf8(&self.text[range]).unwrap_or_default()
    }

    /// The keys.
    pub(super) fn keys<T: From<Bytes>>(&self) -> Vec<T> {
        self.words(&self.keys)
    }

    /// The arguments.
    pub(super) fn args<T: From<Bytes>>(&self) -> Vec<T> {
        self.words(&self.args)
    }

    fn words<T: From<Bytes>>(&self, ranges: &[Range<usize>]) -> Vec<T> {
        ranges.iter().map(|range| T::from(self.text.slice(range.clone()))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_arguments_keep_their_order_and_their_bounds() {
        let event = EventId::new(7).expect("an id");
        let call = Call::about(event).key("a").arg("").arg(12).key("bc").args(["d", "ef"]);
        assert_eq!(call.count(), (8, 5));
        let call = call.close();
        assert_eq!(call.first_key(), "seatlock:{e:7}:counts");
        let keys: Vec<Bytes> = call.keys();
        assert_eq!(keys[5..], ["seatlock:{e:7}:holders", "a", "bc"]);
        let args: Vec<Bytes> = call.args();
        assert_eq!(args, ["seatlock:{e:7}:changes", "", "12", "d", "ef"]);
        assert_eq!(Call::new().close().first_key(), "");
    }
}
