//! The decoders of everything that comes from outside, for `fuzz/` and for the short runs below: one function each, which
//! returns whatever it is given and panics where a decoder breaks its word.
//!
//! Not part of the service: built with the feature `fuzzing` and for tests only.

use std::net::{IpAddr, Ipv4Addr};

use crate::callers::{Addresses, Quota, Range};
use crate::rpc::wire::{Call, Packet, Pattern};
use crate::{gateway, inventory, ledger, rpc, telemetry};

/// A decoder and its name: that of its target in `fuzz/` and of the folder of its seeds.
pub type Target = (&'static str, fn(&[u8]));

/// Every one of them.
pub const TARGETS: &[Target] = &[
    ("gateway_frames", gateway::fuzzing::frames),
    ("gateway_messages", gateway::fuzzing::messages),
    ("gateway_handshakes", gateway::fuzzing::handshakes),
    ("gateway_tokens", gateway::fuzzing::tokens),
    ("gateway_claims", gateway::fuzzing::claims),
    ("gateway_keys", gateway::fuzzing::keys),
    ("rpc_bodies", rpc_bodies),
    ("inventory_frames", inventory::fuzzing::frames),
    ("inventory_replies", inventory::fuzzing::replies),
    ("inventory_catalogues", inventory::fuzzing::catalogues),
    ("ledger_notices", ledger::fuzzing::notices),
    ("ledger_replies", ledger::fuzzing::replies),
    ("ledger_streams", ledger::fuzzing::streams),
    ("callers_forwarded", forwarded),
    ("telemetry_headers", telemetry::fuzz),
];

/// Gives a target its input.
///
/// # Panics
/// Where the decoder breaks its word, and for a name that is no target's.
pub fn run(name: &str, data: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a target of this name");
    target(data);
}

/// The body of a `RabbitMQ` message, read under every pattern.
fn rpc_bodies(data: &[u8]) {
    let text = rpc::wire::text(data);
    let Ok(packet) = Packet::decode(&text) else { return };
    let named = packet.pattern.as_deref().and_then(Pattern::of);
    for pattern in named.into_iter().chain(Pattern::ALL) {
        drop(Call::read(pattern, packet.data));
    }
    if let Some(id) = packet.id {
        let reply = rpc::wire::no_handler(id);
        assert!(
            serde_json::from_slice::<serde_json::Value>(&reply).is_ok() || id.get().contains("\\u"),
            "a reply is JSON"
        );
    }
}

/// `X-Forwarded-For`, a line each: an address that the proxy did not write is never believed.
fn forwarded(data: &[u8]) {
    let (proxy, stranger) = (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)), IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9)));
    let addresses = Addresses::new(vec![Range::new(proxy, 8)], Quota::default());
    assert_eq!(addresses.of(stranger, data.split(|byte| *byte == b'\n')), stranger.into());
    let appended = [data, b",", stranger.to_string().as_bytes()].concat();
    assert_eq!(addresses.of(proxy, appended.split(|byte| *byte == b'\n')), stranger.into());
    addresses.of(proxy, data.split(|byte| *byte == b'\n'));
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;
    use std::time::{Duration, Instant};

    use super::*;

    /// For each target, unless `FUZZ_SECONDS` says another number; a compiler of any kind will do for it.
    const FOR: Duration = Duration::from_secs(2);

    /// The longest input made here.
    const BYTES_MAX: usize = 4096;

    /// What decoders look for, put where it does not belong.
    const MORSELS: &[&[u8]] = &[
        b"\"",
        b"\\",
        b"\\u0000",
        b"\\ud800",
        b"{",
        b"}",
        b"[[[[[[[[[[[[[[[[",
        b"]",
        b",",
        b":",
        b" ",
        b"\n",
        b"\r",
        b"\r\n",
        b"#",
        b".",
        b"-1",
        b"0",
        b"1e999",
        b"9007199254740992",
        b"18446744073709551616",
        b"null",
        b"\xff\xfe",
        b"\xf0\x9f\x8e\xab",
    ];

    fn folder(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name)
    }

    fn seeds(name: &str) -> Vec<Vec<u8>> {
        let files = fs::read_dir(folder(name)).expect("every target has seeds");
        let mut seeds: Vec<_> = files.map(|file| fs::read(file.expect("an entry").path()).expect("a file")).collect();
        seeds.sort();
        assert!(!seeds.is_empty(), "{name} has no seeds");
        seeds
    }

    /// Numbers that look like chance and are the same in every run.
    struct Dice(fastrand::Rng);

    impl Dice {
        fn below(&mut self, end: usize) -> usize {
            self.0.usize(..end.max(1))
        }

        fn part<'a>(&mut self, of: &'a [u8]) -> &'a [u8] {
            let start = self.below(of.len() + 1);
            let end = start + self.below(of.len() - start + 1);
            &of[start..end]
        }

        /// A seed after a few changes.
        fn input(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
            let mut input = seeds[self.below(seeds.len())].clone();
            for _ in 0..=self.below(6) {
                let at = self.below(input.len() + 1);
                match self.below(6) {
                    0 if at < input.len() => input[at] ^= 1 << self.below(8),
                    1 => input.truncate(at),
                    2 => drop(input.drain(at..at + self.below(input.len() - at + 1))),
                    3 => drop(input.splice(at..at, MORSELS[self.below(MORSELS.len())].iter().copied())),
                    4 => {
                        let other = self.below(seeds.len());
                        let part = self.part(&seeds[other]).to_vec();
                        drop(input.splice(at..at, part));
                    }
                    _ => {
                        let part = self.part(&input).to_vec();
                        drop(input.splice(at..at, part));
                    }
                }
            }
            input.truncate(BYTES_MAX);
            input
        }
    }

    /// Whatever a target is given that is not far from what it is meant to read, it returns. What `fuzz/` has found before
    /// is among the seeds.
    fn survives(name: &str) {
        let seeds = seeds(name);
        for seed in &seeds {
            run(name, seed);
        }
        let told = std::env::var("FUZZ_SECONDS").ok().map(|text| text.parse().expect("a number of seconds"));
        let (mut dice, mut runs) = (Dice(fastrand::Rng::with_seed(0x5eed)), 0_u32);
        let until = Instant::now() + told.map_or(FOR, Duration::from_secs);
        while Instant::now() < until {
            run(name, &dice.input(&seeds));
            runs += 1;
        }
        assert!(runs > 100, "only {runs} runs");
    }

    macro_rules! targets {
        ($($name:ident),* $(,)?) => {
            $(#[test] fn $name() { survives(stringify!($name)); })*
            const TESTED: &[&str] = &[$(stringify!($name)),*];
        };
    }

    targets!(
        gateway_frames,
        gateway_messages,
        gateway_handshakes,
        gateway_tokens,
        gateway_claims,
        gateway_keys,
        rpc_bodies,
        inventory_frames,
        inventory_replies,
        inventory_catalogues,
        ledger_notices,
        ledger_replies,
        ledger_streams,
        callers_forwarded,
        telemetry_headers,
    );

    /// Here, in `fuzz/`, and in its folder of seeds are the same targets.
    #[test]
    fn every_target_is_run() {
        let names = |folder: &str| -> BTreeSet<String> {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(folder);
            let entries = fs::read_dir(path).expect("a folder");
            let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().trim_end_matches(".rs").to_owned();
            entries.map(|entry| name(entry.expect("an entry"))).collect()
        };
        let all: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(TESTED.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>(), all);
        assert_eq!(names("seeds"), all);
        assert_eq!(names("targets"), all);
    }
}
