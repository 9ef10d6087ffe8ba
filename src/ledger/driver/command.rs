//! A command as it is sent.

use bytes::Bytes;

use super::measure::LINE_END;
use crate::ledger::call::ClosedCall;

const DIGITS: [&str; 10] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];

/// A name and its arguments, written down.
#[derive(Debug, Clone, Default)]
pub(super) struct Command {
    count: usize,
    words: Vec<u8>,
    /// The last of them, which were written elsewhere.
    rest: Bytes,
}

impl Command {
    /// A command with its arguments.
    pub(super) fn new(name: &str, args: &[&str]) -> Self {
        args.iter().fold(Self::default().word(name), |command, arg| command.word(arg))
    }

    /// A call of a script, by its SHA or its text.
    pub(super) fn script(name: &str, script: &str, call: &ClosedCall) -> Self {
        // Three words behind their lengths.
        let words = Vec::with_capacity(script.len() + 40);
        let command = Self { count: 0, words, rest: Bytes::new() }.word(name).word(script).number(call.keys);
        Self { count: command.count + call.keys + call.args, rest: call.words.clone(), ..command }
    }

    /// Adds a word.
    pub(super) fn word(mut self, word: &str) -> Self {
        self.count += 1;
        line(&mut self.words, b'$', word.len());
        self.words.extend_from_slice(word.as_bytes());
        self.words.extend_from_slice(LINE_END);
        self
    }

    /// Adds a number.
    pub(super) fn number(self, number: usize) -> Self {
        match DIGITS.get(number) {
            Some(digit) => self.word(digit),
            None => self.word(&number.to_string()),
        }
    }

    /// Writes it behind others.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        line(out, b'*', self.count);
        out.extend_from_slice(&self.words);
        out.extend_from_slice(&self.rest);
    }
}

/// A line that says how long a text or a list is. Of nearly all of them that has one digit or two.
fn line(out: &mut Vec<u8>, kind: u8, length: usize) {
    out.push(kind);
    match u8::try_from(length) {
        Ok(ones @ 0..=9) => out.push(b'0' + ones),
        Ok(both @ 10..=99) => out.extend_from_slice(&[b'0' + both / 10, b'0' + both % 10]),
        _ => out.extend_from_slice(length.to_string().as_bytes()),
    }
    out.extend_from_slice(LINE_END);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::call::Call;

    #[test]
    fn a_command_is_a_list_of_texts() {
        let mut out = b"before".to_vec();
        Command::new("SET", &["k", ""]).word("\u{e9}").number(12).write(&mut out);
        assert_eq!(
            String::from_utf8_lossy(&out),
            "before*5\r\n$3\r\nSET\r\n$1\r\nk\r\n$0\r\n\r\n$2\r\n\u{e9}\r\n$2\r\n12\r\n"
        );
        let call = Call::new().key("k").arg("").close();
        let mut out = Vec::new();
        Command::script("EVAL", "return 1", &call).write(&mut out);
        assert_eq!(
            String::from_utf8_lossy(&out),
            "*5\r\n$4\r\nEVAL\r\n$8\r\nreturn 1\r\n$1\r\n1\r\n$1\r\nk\r\n$0\r\n\r\n"
        );
        for length in [0, 1, 9, 10, 11, 99, 100, 101, 255, 256, 12_345] {
            let mut out = Vec::new();
            line(&mut out, b'$', length);
            assert_eq!(String::from_utf8_lossy(&out), format!("${length}\r\n"));
        }
    }
}
