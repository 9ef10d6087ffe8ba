//! Asks a process of ours from outside whether it is ready: what a container without a shell is checked with.
//!
//! Needs no runtime and no client: one connection, one request, the first line of the answer.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    time::Duration,
};

/// For each step. The answer is ready before it is asked for; container engines wait longer.
const PATIENCE: Duration = Duration::from_secs(2);

/// More than the answer of `/readyz` has.
const ANSWER_BYTES_MAX: u64 = 4096;

/// Why a process is not ready.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It cannot be asked.
    #[error("{address} does not answer: {source}")]
    Silent {
        /// Where it should listen.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// It says no, and why.
    #[error("not ready: {0}")]
    NotReady(String),
}

/// Whether the process that listens there is ready. An address for everybody is asked on the loopback.
///
/// # Errors
/// When it is not, or does not say within some seconds.
pub fn ready(mut address: SocketAddr) -> Result<(), ProbeError> {
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    let answer = ask(address).map_err(|source| ProbeError::Silent { address, source })?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.split_whitespace().nth(1) == Some("200") {
        return Ok(());
    }
    let said = if body.is_empty() { head } else { body };
    Err(ProbeError::NotReady(said.chars().filter(|letter| !letter.is_control()).collect()))
}

fn ask(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
