//! What a script is called with: keys and arguments, written into one text that all of them share.
//!
//! A lock has some twenty-five of both. A text of its own for each would cost the service as much as all else it does
//! for the call.

use std::fmt::{Display, Write as _};
use std::ops::Range;

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
        // Written once and copied: it is the half of every word here.
        let tag = call.write(key::tag(event));
        for name in key::OF_EVENT {
            let range = call.copy(tag.clone(), name);
            call.keys.push(range);
        }
        let range = call.copy(tag, key::CHANGES);
        call.args.push(range);
        call
    }

    /// Repeats what is written already, and adds a name.
    fn copy(&mut self, tag: Range<usize>, name: &str) -> Range<usize> {
        let from = self.text.len();
        self.text.extend_from_within(tag);
        self.text.push_str(name);
        from..self.text.len()
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
        ClosedCall { text: self.text, keys: self.keys, args: self.args }
    }
}

/// See [`Call::close`].
pub(super) struct ClosedCall {
    text: String,
    keys: Vec<Range<usize>>,
    args: Vec<Range<usize>>,
}

impl ClosedCall {
    /// The key that says which server is asked; "" when there is none.
    pub(super) fn first_key(&self) -> &str {
        self.words().next().filter(|_| !self.keys.is_empty()).unwrap_or_default()
    }

    /// How many keys and how many arguments.
    pub(super) fn count(&self) -> (usize, usize) {
        (self.keys.len(), self.args.len())
    }

    /// How long all of them are together, in bytes.
    pub(super) fn len(&self) -> usize {
        self.text.len()
    }

    /// The keys, then the arguments.
    pub(super) fn words(&self) -> impl Iterator<Item = &str> {
        // Each range was taken where a text was written.
        self.keys.iter().chain(&self.args).map(|range| self.text.get(range.clone()).unwrap_or_default())
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
        let words: Vec<&str> = call.words().collect();
        assert_eq!(words[5..8], ["seatlock:{e:7}:holders", "a", "bc"]);
        assert_eq!(words[8..], ["seatlock:{e:7}:changes", "", "12", "d", "ef"]);
        assert_eq!(Call::new().close().first_key(), "");
    }
}
