//! The scripts: one file of `lua/` for each transition, compiled in.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::OnceLock;

/// What the scripts about one event share.
const PRELUDE: &str = include_str!("../../lua/_prelude.lua");

/// A script behind what it needs of the prelude, whose parts have blank lines between them: all that make no function, and
/// the functions that are called by the script or by a part that is joined. Redis runs the whole text in each call, and
/// to make a function that nobody calls takes a seventh of a read. Whoever joins them elsewhere
/// (`benches/peers/locks.js`) follows the same rule.
fn join(prelude: &str, script: &str) -> String {
    prelude.trim_end().rsplit("\n\n").fold(script.to_owned(), |text, part| {
        let function = part.lines().find_map(|line| line.strip_prefix("local function ")?.split('(').next());
        if function.is_none_or(|name| calls(&text, name)) { format!("{part}\n\n{text}") } else { text }
    })
}

/// Whether the name of a function stands before a parenthesis.
fn calls(text: &str, function: &str) -> bool {
    text.match_indices(function).any(|(at, name)| {
        let longer = text[..at].ends_with(|before: char| before.is_ascii_alphanumeric() || before == '_');
        !longer && text[at + name.len()..].starts_with('(')
    })
}

/// How many keys or arguments a script takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arity {
    /// Exactly so many.
    Exactly(usize),
    /// At least so many; the last documented one repeats.
    AtLeast(usize),
}

impl Arity {
    pub(super) const fn admits(self, count: usize) -> bool {
        match self {
            Self::Exactly(n) => count == n,
            Self::AtLeast(n) => count >= n,
        }
    }
}

/// One script and what it takes.
#[derive(Debug)]
pub struct Script {
    /// The file's name without its ending; also the metric label.
    pub name: &'static str,
    /// Its KEYS.
    pub keys: Arity,
    /// Its ARGV.
    pub args: Arity,
    /// How many of the event's own keys come first in its KEYS; 0 for a script that is not about one event, in front of
    /// which no prelude is joined.
    pub of_event: usize,
    own: &'static str,
    source: OnceLock<String>,
    sha: OnceLock<String>,
    on_cluster: OnceLock<(String, String)>,
}

impl Script {
    const fn new(name: &'static str, keys: Arity, args: Arity, of_event: usize, own: &'static str) -> Self {
        Self {
            name,
            keys,
            args,
            of_event,
            own,
            source: OnceLock::new(),
            sha: OnceLock::new(),
            on_cluster: OnceLock::new(),
        }
    }

    /// The text that Redis gets.
    pub fn source(&self) -> &str {
        self.source.get_or_init(|| if self.of_event > 0 { join(PRELUDE, self.own) } else { self.own.to_owned() })
    }

    /// The lower-case hexadecimal SHA-1 that EVALSHA names it by.
    pub fn sha(&self) -> &str {
        self.sha.get_or_init(|| super::driver::sha1(self.source()))
    }

    /// The same script on a cluster, where changes are told by sharded pub/sub, and its SHA-1. Redis 6 does not know
    /// that command, so it cannot be the same text everywhere.
    pub(super) fn on_cluster(&self) -> (&str, &str) {
        let (text, sha) = self.on_cluster.get_or_init(|| {
            let text = self.source().replace("redis.call('PUBLISH', KEYS[1],", "redis.call('SPUBLISH', KEYS[1],");
            let sha = super::driver::sha1(&text);
            (text, sha)
        });
        (text, sha)
    }

    /// The text for [`super::RedisClock::Stepped`]: it reads the time from a list that tests step, and it is taken from
    /// `folder` instead of the compiled-in text when one is given.
    ///
    /// # Errors
    /// When the folder does not have the script's file.
    pub fn on_stepped_clock(&self, folder: Option<&Path>) -> io::Result<String> {
        let read = |folder: &Path, name: &str| std::fs::read_to_string(folder.join(name).with_extension("lua"));
        let source = match folder {
            None => self.source().to_owned(),
            Some(folder) if self.of_event > 0 => join(&read(folder, "_prelude")?, &read(folder, self.name)?),
            Some(folder) => read(folder, self.name)?,
        };
        Ok(source.replace("redis.call('TIME')", "redis.call('LRANGE', 'test:clock', 0, 1)"))
    }
}

/// The scripts as a ledger on a stepped clock sends them, by name.
pub(super) struct SteppedScripts(HashMap<&'static str, (String, String)>);

impl SteppedScripts {
    /// Every script, from `folder` when one is given.
    pub(super) fn read(folder: Option<&Path>) -> io::Result<Self> {
        let read = |script: &&'static Script| {
            let text = script.on_stepped_clock(folder)?;
            let sha = super::driver::sha1(&text);
            Ok((script.name, (text, sha)))
        };
        Script::ALL.iter().map(read).collect::<io::Result<_>>().map(Self)
    }

    /// A script's text and SHA-1.
    pub(super) fn named(&self, script: &'static Script) -> (&str, &str) {
        self.0.get(script.name).map_or((script.source(), ""), |(text, sha)| (text, sha))
    }
}

macro_rules! scripts {
    ($($ident:ident = $name:literal keys $of_event:literal ($keys:expr, $args:expr);)*) => {
        $(pub(super) static $ident: Script = Script::new(
            $name, $keys, $args, $of_event, include_str!(concat!("../../lua/", $name, ".lua")),
        );)*

        impl Script {
            /// Every script there is.
            pub const ALL: &[&Self] = &[$(&$ident),*];
        }
    };
}

use Arity::{AtLeast, Exactly};

scripts! {
    LOCK = "lock" keys 3 (AtLeast(5), Exactly(8));
    RESTORE = "restore" keys 4 (Exactly(7), Exactly(13));
    VALIDATE = "validate" keys 3 (Exactly(3), Exactly(4));
    CONFIRM = "confirm" keys 4 (Exactly(6), Exactly(4));
    RELEASE = "release" keys 4 (Exactly(5), Exactly(4));
    FIND = "find" keys 3 (Exactly(4), Exactly(1));
    LOCKS = "locks" keys 3 (Exactly(3), Exactly(1));
    AVAILABILITY = "availability" keys 3 (Exactly(3), Exactly(1));
    ASK = "ask" keys 5 (Exactly(5), Exactly(1));
    ACCEPT = "accept" keys 5 (Exactly(5), AtLeast(1));
    ORDER = "order" keys 5 (Exactly(6), Exactly(7));
    ADOPT = "adopt" keys 3 (Exactly(3), Exactly(2));
    ABANDON = "abandon" keys 3 (Exactly(3), Exactly(3));
    SWEEP = "sweep" keys 5 (Exactly(5), Exactly(1));
    BURY = "bury" keys 0 (AtLeast(3), AtLeast(1));
    TALLY = "tally" keys 0 (Exactly(2), Exactly(0));
    TOUCH = "touch" keys 0 (Exactly(2), Exactly(2));
    DUE = "due" keys 0 (Exactly(1), Exactly(2));
    PLAN = "plan" keys 0 (Exactly(2), Exactly(4));
    VISIT = "visit" keys 0 (Exactly(1), Exactly(1));
    FORGET = "forget" keys 0 (Exactly(1), AtLeast(1));
    ENTER = "enter" keys 0 (Exactly(2), Exactly(4));
    LEAVE = "leave" keys 0 (Exactly(2), Exactly(4));
    TELL = "tell" keys 0 (Exactly(1), Exactly(3));
    HOST = "host" keys 0 (Exactly(1), Exactly(1));
    UNHOST = "unhost" keys 0 (Exactly(1), AtLeast(2));
    DROP = "drop" keys 0 (Exactly(1), Exactly(2));
    BEAT = "beat" keys 0 (Exactly(5), Exactly(4));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_gets_the_functions_that_it_calls_and_what_those_call() {
        let parts = [
            "-- What all share.",
            "local now = 1",
            "-- Of one.\nlocal function one(a)\n  return a\nend",
            "local function only_one(a)\n  return a\nend",
            "local function two(a)\n  return one(a)\nend",
        ];
        let shared = parts.join("\n\n") + "\n";
        for (script, needed) in [
            ("two(now)\n", [0, 1, 2, 4].as_slice()),
            ("only_one(now)\n", &[0, 1, 3]),
            ("return one\n", &[0, 1]),
            ("one(two(only_one(now)))\n", &[0, 1, 2, 3, 4]),
        ] {
            let mut wanted: Vec<&str> = needed.iter().map(|&at: &usize| parts[at]).collect();
            wanted.push(script);
            assert_eq!(join(&shared, script), wanted.join("\n\n"));
        }
    }
}
