//! The pipe: the connection of a WebSocket, as it is written to.
//!
//! The session's own messages wait here until what is before them in socketioxide's queue was told by the
//! [carrier](super::carrier); then they are written straight into the connection.

use std::io;
use std::sync::{Arc, Mutex};

use bytes::{Buf as _, BytesMut};
use tokio::net::tcp::OwnedWriteHalf;

use super::lock;

/// What may wait for a client that does not read: some hundred answers. The system has taken as much as it takes before.
const REST_BYTES_MAX: usize = 64 * 1024;

/// What becomes of something that cannot be written at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// It is superseded soon: it is not sent at all.
    News,
    /// It waits, within a limit.
    Owed,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passed {
    /// It is on its way.
    Yes,
    /// The client does not read as fast as it is written to; nothing of it was sent.
    Full,
    /// The connection is gone.
    Gone,
}

/// What became of the mark that ends a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marked {
    /// It is the last of the session in there: everything goes through the pipe from now on.
    Yes,
    /// The queue is full.
    Later,
    /// The session is over.
    Never,
}

/// A TCP connection as it is written to.
pub struct Pipe {
    writer: OwnedWriteHalf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    stage: Stage,
    /// What is to be written before anything else.
    rest: BytesMut,
    /// A task is at it.
    flushing: bool,
}

/// Who writes into it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Carried,
    Own,
    Dead,
}

impl std::fmt::Debug for Pipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pipe").field("stage", &lock(&self.state).stage).finish_non_exhaustive()
    }
}

impl Pipe {
    /// Of a connection that the carrier writes to: what is sent waits.
    pub fn new(writer: OwnedWriteHalf) -> Self {
        Self { writer, state: Mutex::default() }
    }

    /// Writes past everything that waits. For the carrier alone, and never again after [`Pipe::own`].
    pub async fn write_all(&self, mut frames: &[u8]) -> io::Result<()> {
        while !frames.is_empty() {
            self.writer.writable().await?;
            match self.writer.try_write(frames) {
                Ok(written) => frames = frames.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What waits is written now, and what is sent from now on at once.
    pub fn own(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        if state.stage == Stage::Carried {
            state.stage = Stage::Own;
            // An error ends the connection, and that is the reader's to find.
            if !self.write_rest(&mut state).unwrap_or(true) {
                self.flush_later(&mut state);
            }
        }
    }

    /// Writes whole frames at once, or nothing.
    pub fn send(self: &Arc<Self>, frames: &[u8], urgency: Urgency) -> Passed {
        let mut state = lock(&self.state);
        match state.stage {
            Stage::Dead => return Passed::Gone,
            Stage::Own if state.rest.is_empty() => {
                let written = match self.writer.try_write(frames) {
                    Ok(written) => written,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock && urgency == Urgency::Owed => 0,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Passed::Full,
                    Err(_) => {
                        self.end(&mut state);
                        return Passed::Gone;
                    }
                };
                let rest = frames.get(written..).unwrap_or_default();
                if !rest.is_empty() {
                    state.rest.extend_from_slice(rest);
                    self.flush_later(&mut state);
                }
                return Passed::Yes;
            }
            Stage::Carried | Stage::Own => {}
        }
        if urgency == Urgency::News || state.rest.len() + frames.len() > REST_BYTES_MAX {
            return Passed::Full;
        }
        state.rest.extend_from_slice(frames);
        Passed::Yes
    }

    fn flush_later(self: &Arc<Self>, state: &mut State) {
        if !std::mem::replace(&mut state.flushing, true) {
            let pipe = Arc::clone(self);
            tokio::spawn(async move { pipe.flush().await });
        }
    }

    /// Returns when nothing waits to be written. Ends with the connection: of a client that reads nothing for as long as
    /// the system waits it is lost.
    pub async fn flush(&self) {
        while self.writer.writable().await.is_ok() {
            let mut state = lock(&self.state);
            if state.stage != Stage::Own || self.write_rest(&mut state).unwrap_or(true) {
                state.flushing = false;
                return;
            }
        }
    }

    /// True when nothing is left.
    fn write_rest(&self, state: &mut State) -> io::Result<bool> {
        while !state.rest.is_empty() {
            match self.writer.try_write(&state.rest) {
                Ok(written) => state.rest.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => {
                    self.end(state);
                    return Err(error);
                }
            }
        }
        state.rest = BytesMut::new();
        Ok(true)
    }

    /// Ends the connection.
    pub fn close(&self) {
        self.end(&mut lock(&self.state));
    }

    /// Whether it broke while something was written: who reads is told of an end, and not why.
    pub fn is_dead(&self) -> bool {
        lock(&self.state).stage == Stage::Dead
    }

    fn end(&self, state: &mut State) {
        (state.stage, state.rest) = (Stage::Dead, BytesMut::new());
        // It may be gone already.
        socket2::SockRef::from(self.writer.as_ref()).shutdown(std::net::Shutdown::Both).ok();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncReadExt as _;
    use tokio::net::tcp::OwnedReadHalf;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    async fn connected() -> (Arc<Pipe>, OwnedReadHalf, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connected");
        let (reader, writer) = listener.accept().await.expect("accepted").0.into_split();
        (Arc::new(Pipe::new(writer)), reader, client)
    }

    async fn read(client: &mut TcpStream, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        timeout(PATIENCE, client.read_exact(&mut bytes)).await.expect("in time").expect("read");
        bytes
    }

    #[tokio::test]
    async fn what_is_sent_waits_for_what_the_carrier_writes() {
        let (pipe, _reader, mut client) = connected().await;
        assert_eq!(pipe.send(b"second", Urgency::Owed), Passed::Yes);
        assert_eq!(pipe.send(b"news", Urgency::News), Passed::Full, "what waits must not be overtaken");
        pipe.write_all(b"first").await.expect("written");
        assert_eq!(read(&mut client, 5).await, b"first");
        pipe.own();
        assert_eq!(pipe.send(b"third", Urgency::News), Passed::Yes);
        assert_eq!(read(&mut client, 11).await, b"secondthird");
        pipe.close();
        assert!(pipe.is_dead());
        pipe.own();
        assert_eq!(pipe.send(b"late", Urgency::Owed), Passed::Gone);
        assert_eq!(client.read(&mut [0; 8]).await.expect("the end"), 0);
    }

    #[tokio::test]
    async fn what_waits_for_a_client_who_reads_late_is_bounded_and_whole() {
        let (pipe, _reader, mut client) = connected().await;
        pipe.own();
        let news = vec![b'n'; 50_000];
        let mut sent = 0;
        while pipe.send(&news, Urgency::News) == Passed::Yes {
            sent += news.len();
        }
        let answer = [b'a'; 1000];
        let mut owed = 0;
        while pipe.send(&answer, Urgency::Owed) == Passed::Yes {
            owed += answer.len();
            assert!(owed <= REST_BYTES_MAX, "nothing piles up");
        }
        assert!(sent > 0 && owed > 0);
        let seen = read(&mut client, sent + owed).await;
        assert!(seen[..sent].iter().all(|&byte| byte == b'n') && seen[sent..].iter().all(|&byte| byte == b'a'));
        timeout(PATIENCE, pipe.flush()).await.expect("nothing waits");
        assert_eq!(pipe.send(&news, Urgency::News), Passed::Yes, "open again");
    }

    #[tokio::test]
    async fn who_is_at_the_rest_holds_no_connection_that_is_over() {
        let (pipe, _reader, _client) = connected().await;
        pipe.own();
        while pipe.send(&vec![b'n'; 50_000], Urgency::News) == Passed::Yes {}
        pipe.close();
        let held = Arc::downgrade(&pipe);
        drop(pipe);
        let gone = async {
            while held.strong_count() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, gone).await.expect("the connection is let go of");
    }
}
