//! What several tests need: real peers, started and stopped by the test that uses them.

pub mod cluster;
pub mod gateway;
pub mod ledger;
pub mod node;
pub mod process;
pub mod rabbit;
pub mod redis;
pub mod sentinel;

/// A TCP port of the loopback that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").port()
}

/// A measured number, for whoever reads the test's output.
pub fn say(line: &str) {
    use std::io::Write;
    // Whether anybody reads it does not matter to the test.
    writeln!(std::io::stderr(), "{line}").ok();
}
