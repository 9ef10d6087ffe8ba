//! A TCP proxy between two parts of the system, whose path a test can break in the ways in which paths break.

use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// How a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    Open,
    /// Connections are reset, new ones are closed at once.
    Cut,
    /// Nothing comes through either way, and nobody is told. What was sent meanwhile arrives when the path is open again.
    Frozen,
    /// What the server sends comes through, what the client sends does not, until the path is open again.
    OnlyDown,
    /// What the client sends comes through, what the server sends does not, until the path is open again.
    OnlyUp,
    /// Everything comes so much later.
    Delayed(Duration),
    /// So many bytes a second each way.
    Throttled(u32),
}

/// Bytes carried at once.
const CHUNK: usize = 16 * 1024;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Up,
    Down,
}

impl Path {
    fn passes(self, way: Way) -> bool {
        match self {
            Self::Cut | Self::Frozen => false,
            Self::OnlyDown => way == Way::Down,
            Self::OnlyUp => way == Way::Up,
            Self::Open | Self::Delayed(_) | Self::Throttled(_) => true,
        }
    }
}

/// One path: a listener on a free port of the loopback in front of one server.
pub struct Proxy {
    address: SocketAddr,
    path: watch::Sender<Path>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// A path that is open.
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", super::free_port())).await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (path, seen) = watch::channel(Path::Open);
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, server, seen.clone()));
            }
        });
        Self { address, path, accepting }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn set(&self, path: Path) {
        self.path.send_replace(path);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.path.send_replace(Path::Cut);
        self.accepting.abort();
    }
}

async fn carry(client: TcpStream, server: SocketAddr, mut path: watch::Receiver<Path>) {
    // A client that connects while nothing comes through gets no further than the system's queue.
    let begun = path.wait_for(|path| *path == Path::Cut || path.passes(Way::Up)).await.map(|path| *path);
    let upstream = match begun {
        Ok(Path::Cut) | Err(_) => None,
        Ok(_) => TcpStream::connect(server).await.ok(),
    };
    let Some(server) = upstream else { return reset(&client) };
    for stream in [&client, &server] {
        stream.set_nodelay(true).ok();
    }
    let mut up = pin!(pump(&client, &server, Way::Up, path.clone()));
    let mut down = pin!(pump(&server, &client, Way::Down, path.clone()));
    let (mut up_ended, mut down_ended) = (false, false);
    let broken = loop {
        tokio::select! {
            orderly = &mut up, if !up_ended => up_ended = orderly || break true,
            orderly = &mut down, if !down_ended => down_ended = orderly || break true,
            _ = path.wait_for(|path| *path == Path::Cut) => break true,
            else => break false,
        }
    };
    if broken {
        reset(&client);
        reset(&server);
    }
}

/// Ends a connection without a farewell as soon as it is dropped.
fn reset(stream: &TcpStream) {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).ok();
}

/// Carries bytes one way to their end; false when the connection breaks.
async fn pump(from: &TcpStream, to: &TcpStream, way: Way, mut path: watch::Receiver<Path>) -> bool {
    let mut bytes = vec![0; CHUNK];
    loop {
        let Ok(len) = read(from, &mut bytes).await else { return false };
        let Ok(now) = path.wait_for(|path| path.passes(way)).await.map(|path| *path) else { return false };
        match now {
            Path::Delayed(time) => sleep(time).await,
            Path::Throttled(rate) => sleep(Duration::from_secs(1) * u32::try_from(len).unwrap_or(0) / rate).await,
            Path::Open | Path::Cut | Path::Frozen | Path::OnlyDown | Path::OnlyUp => {}
        }
        if len == 0 {
            return socket2::SockRef::from(to).shutdown(std::net::Shutdown::Write).is_ok();
        }
        if write(to, &bytes[..len]).await.is_err() {
            return false;
        }
    }
}

async fn read(from: &TcpStream, bytes: &mut [u8]) -> std::io::Result<usize> {
    loop {
        from.readable().await?;
        match from.try_read(bytes) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            read => return read,
        }
    }
}

async fn write(to: &TcpStream, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        match to.try_write(bytes) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
            Ok(len) => bytes = &bytes[len..],
        }
    }
    Ok(())
}
