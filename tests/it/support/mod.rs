//! What several tests need: real peers, started and stopped by the test that uses them.

pub mod cluster;
pub mod gateway;
pub mod ledger;
pub mod node;
pub mod process;
pub mod proxy;
pub mod rabbit;
pub mod redis;
pub mod sentinel;

/// A TCP port of the loopback that was free a moment ago, and that nobody else will take: it is below those that systems
/// give to connections, and each process (each test is one) looks for it somewhere else.
pub fn free_port() -> u16 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static TRIED: AtomicU32 = AtomicU32::new(0);
    let from = std::process::id().wrapping_mul(61);
    (0..20_000)
        .map(|_| 10_000 + from.wrapping_add(TRIED.fetch_add(1, Ordering::Relaxed)) % 20_000)
        .filter_map(|port| u16::try_from(port).ok())
        .find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("one of twenty thousand ports")
}

/// A measured number, for whoever reads the test's output.
pub fn say(line: &str) {
    use std::io::Write;
    // Whether anybody reads it does not matter to the test.
    writeln!(std::io::stderr(), "{line}").ok();
}
