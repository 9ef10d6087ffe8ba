//! The bypass: how the news of a room reach a WebSocket without a detour.
//!
//! socketioxide has a queue, a task and a buffer for every socket, and copies and wakes its way through them for each
//! message. News are the same for thousands of sockets, so they are encoded once, as the bytes of WebSocket frames, and
//! written straight into the connection, between two frames of its own writer. A connection begins with the queue: only
//! when an update that went that way has been seen to leave does the bypass open, so nothing overtakes what a joiner is
//! told first. What is not news never takes the bypass.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::lock;
use super::wire::Json;

/// The longest payload whose length fits into the second byte of a frame, and the longest that fits into two more.
const SHORT_MAX: usize = 125;
const MEDIUM_MAX: usize = 0xffff;

/// A message to any number of sockets: encoded once.
#[derive(Debug, Clone)]
pub struct Packet {
    /// Its name.
    pub name: &'static str,
    /// Its data.
    pub data: Json,
    frame: Bytes,
}

impl Packet {
    /// The packet as socketioxide would put it on a WebSocket, byte for byte.
    pub fn new(namespace: &str, name: &'static str, data: Json) -> Self {
        let text = format!("42{namespace},[\"{name}\",{}]", data.get());
        let mut frame = Vec::with_capacity(text.len() + 10);
        frame.push(0x81);
        match text.len() {
            short @ 0..=SHORT_MAX => frame.push(u8::try_from(short).unwrap_or_default()),
            medium @ 126..=MEDIUM_MAX => {
                frame.push(126);
                frame.extend_from_slice(&u16::try_from(medium).unwrap_or_default().to_be_bytes());
            }
            long => {
                frame.push(127);
                frame.extend_from_slice(&(long as u64).to_be_bytes());
            }
        }
        frame.extend_from_slice(text.as_bytes());
        Self { name, data, frame: frame.into() }
    }

    /// The frames of several packets, one after the other.
    pub fn frames<'a>(packets: impl IntoIterator<Item = &'a Self>) -> Bytes {
        packets.into_iter().flat_map(|packet| packet.frame.iter().copied()).collect()
    }
}

/// What became of news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passed {
    /// They are on their way.
    Yes,
    /// The bypass is not open: they have to take the queue, and it opens when they have left.
    Closed,
    /// The client does not read as fast as it is written to; nothing of the news was sent.
    Full,
    /// The connection is gone.
    Gone,
}

/// The handle of a connection's bypass.
#[derive(Debug, Clone)]
pub struct Bypass {
    pipe: Weak<Pipe>,
}

impl Bypass {
    /// Writes whole frames at once, or nothing.
    pub fn send(&self, frames: &Bytes) -> Passed {
        let Some(pipe) = self.pipe.upgrade() else { return Passed::Gone };
        let mut state = lock(&pipe.state);
        if !state.open {
            return Passed::Closed;
        }
        if state.unfinished > 0 || state.rest.has_remaining() {
            return Passed::Full;
        }
        match pipe.stream.try_write(frames) {
            Ok(written) if written == frames.len() => Passed::Yes,
            Ok(written) => {
                state.rest = frames.slice(written..);
                drop(state);
                tokio::spawn(finish(pipe));
                Passed::Yes
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Passed::Full,
            Err(_) => Passed::Gone,
        }
    }

    /// Something is in the queue that later news must not overtake: they take the queue too, until one of them has left.
    pub fn shut(&self) {
        if let Some(pipe) = self.pipe.upgrade() {
            let mut state = lock(&pipe.state);
            (state.open, state.shut) = (false, true);
        }
    }

    /// The packet is about to be put into the queue: when it has left, the bypass opens.
    pub fn await_passing(&self, packet: &Packet) {
        if let Some(pipe) = self.pipe.upgrade() {
            let mut state = lock(&pipe.state);
            state.shut = false;
            if !state.open {
                // The same may be in the queue already: then the bypass opens behind the last of them.
                let before = if state.awaited == packet.frame { state.copies } else { 0 };
                if before == 0 {
                    state.passing = 0;
                }
                (state.awaited, state.copies) = (packet.frame.clone(), before + 1);
            }
        }
    }
}

/// Writes the rest of a frame that the system did not take whole. Ends with the connection: a client that reads nothing
/// for as long as the system waits loses it.
async fn finish(pipe: Arc<Pipe>) {
    while pipe.stream.writable().await.is_ok() {
        let mut state = lock(&pipe.state);
        // An error is its own writer's to find.
        if state.dead || pipe.write_rest(&mut state).unwrap_or(true) {
            return;
        }
    }
}

/// A TCP connection with a bypass, as its reader and its writer see it.
#[derive(Debug)]
pub struct Tap {
    pipe: Arc<Pipe>,
}

#[derive(Debug)]
struct Pipe {
    stream: TcpStream,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    open: bool,
    dead: bool,
    /// The frame that opens the bypass when it leaves; empty when none is awaited.
    awaited: Bytes,
    /// What is awaited does not open it.
    shut: bool,
    /// How many of it are in the queue, and how many are among what the writer is writing.
    copies: usize,
    passing: usize,
    /// Bytes that the writer has offered and the system has not taken. The writer always offers whole frames: between
    /// them and only there is room for others.
    unfinished: usize,
    /// The rest of a frame that took the bypass.
    rest: Bytes,
}

impl Tap {
    /// Wraps an accepted connection.
    pub fn new(stream: TcpStream) -> (Self, Bypass) {
        let pipe = Arc::new(Pipe { stream, state: Mutex::default() });
        let bypass = Bypass { pipe: Arc::downgrade(&pipe) };
        (Self { pipe }, bypass)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // Whoever is still at the rest of a frame holds the connection: it must not wait for a client any more.
        lock(&self.pipe.state).dead = true;
        if Arc::strong_count(&self.pipe) > 1 {
            socket2::SockRef::from(&self.pipe.stream).shutdown(std::net::Shutdown::Both).ok();
        }
    }
}

impl Pipe {
    /// True when nothing is left of a frame that took the bypass.
    fn write_rest(&self, state: &mut State) -> io::Result<bool> {
        while state.rest.has_remaining() {
            match self.stream.try_write(&state.rest) {
                Ok(written) => state.rest.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => {
                    state.rest = Bytes::new();
                    return Err(error);
                }
            }
        }
        Ok(true)
    }

    /// Writes what the writer offers: `None` when the system takes nothing now.
    fn write(&self, state: &mut State, offered: &[u8]) -> io::Result<Option<usize>> {
        if !self.write_rest(state)? {
            return Ok(None);
        }
        let offered = match state.unfinished {
            0 => offered,
            begun => &offered[..begun.min(offered.len())],
        };
        let written = match self.stream.try_write(offered) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        if state.unfinished == 0 {
            state.passing = if state.awaited.is_empty() { 0 } else { count(offered, &state.awaited) };
        }
        state.unfinished = offered.len() - written;
        if state.unfinished == 0 && state.passing > 0 {
            state.copies = state.copies.saturating_sub(std::mem::take(&mut state.passing));
            if state.copies == 0 && !state.shut {
                (state.open, state.awaited) = (true, Bytes::new());
            }
        }
        Ok(Some(written))
    }
}

/// How many of the whole frames in `data` are `frame`.
fn count(mut data: &[u8], frame: &[u8]) -> usize {
    let mut found = 0;
    loop {
        let len = match *data {
            [_, len, ..] if usize::from(len) <= SHORT_MAX => 2 + usize::from(len),
            [_, 126, high, low, ..] => 4 + usize::from(u16::from_be_bytes([high, low])),
            // The end, a frame longer than any that is awaited, or no frame at all.
            _ => return found,
        };
        let Some(first) = data.get(..len) else { return found };
        found += usize::from(first == frame);
        data = &data[len..];
    }
}

impl AsyncRead for Tap {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.pipe.stream.poll_read_ready(cx))?;
            match self.pipe.stream.try_read_buf(buf) {
                Ok(_) => return Poll::Ready(Ok(())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Tap {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            if let Some(written) = self.pipe.write(&mut lock(&self.pipe.state), buf)? {
                return Poll::Ready(Ok(written));
            }
            ready!(self.pipe.stream.poll_write_ready(cx))?;
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(socket2::SockRef::from(&self.pipe.stream).shutdown(std::net::Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::value::RawValue;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn packet(text: &str) -> Packet {
        Packet::new("/r", "n", RawValue::from_string(format!("\"{text}\"")).expect("JSON"))
    }

    async fn pair() -> (Tap, Bypass, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connected");
        let (stream, _) = listener.accept().await.expect("accepted");
        let (tap, bypass) = Tap::new(stream);
        (tap, bypass, client)
    }

    /// Opens the bypass as the first update of a session does.
    async fn open(tap: &mut Tap, bypass: &Bypass, client: &mut TcpStream) {
        let first = packet("first");
        bypass.await_passing(&first);
        tap.write_all(&first.frame).await.expect("written");
        let mut seen = vec![0; first.frame.len()];
        client.read_exact(&mut seen).await.expect("read");
        assert_eq!(seen, first.frame);
    }

    #[test]
    fn frames_say_how_long_they_are() {
        // The frame's text is as long as its data and 11 more.
        for (data, head) in [
            (114, vec![0x81, 125]),
            (115, vec![0x81, 126, 0, 126]),
            (0xffff - 11, vec![0x81, 126, 255, 255]),
            (0x1_0000 - 11, vec![0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0]),
        ] {
            let packet = packet(&"x".repeat(data - 2));
            assert_eq!(packet.frame[..head.len()], head, "{data}");
            assert!(packet.frame[head.len()..].starts_with(b"42/r,[\"n\",\"x"), "{data}");
        }
    }

    #[tokio::test]
    async fn it_opens_behind_the_last_of_what_is_awaited() {
        let (mut tap, bypass, mut client) = pair().await;
        let (old, new, other) = (packet("old"), packet("new"), packet("other"));
        assert_eq!(bypass.send(&new.frame), Passed::Closed);
        bypass.await_passing(&old);
        bypass.await_passing(&new);
        bypass.await_passing(&new);
        for (passes, wanted) in [(&old, Passed::Closed), (&other, Passed::Closed), (&new, Passed::Closed)] {
            tap.write_all(&Packet::frames([&other, passes])).await.expect("written");
            assert_eq!(bypass.send(&other.frame), wanted);
        }
        tap.write_all(&Packet::frames([&new, &other])).await.expect("written");
        assert_eq!(bypass.send(&packet("direct").frame), Passed::Yes);
        drop(tap);
        assert_eq!(bypass.send(&other.frame), Passed::Gone);
        let mut seen = Vec::new();
        timeout(PATIENCE, client.read_to_end(&mut seen)).await.expect("in time").expect("read");
        assert!(seen.ends_with(b"\"direct\"]"), "{}", String::from_utf8_lossy(&seen));
    }

    #[tokio::test]
    async fn once_shut_it_opens_behind_what_is_awaited_later() {
        let (mut tap, bypass, mut client) = pair().await;
        open(&mut tap, &bypass, &mut client).await;
        let (old, answer, update) = (packet("old"), packet("answer"), packet("update"));
        bypass.shut();
        assert_eq!(bypass.send(&update.frame), Passed::Closed);
        // The old one was sent before the answer was, and leaves after the bypass was shut again.
        bypass.await_passing(&old);
        bypass.shut();
        tap.write_all(&old.frame).await.expect("written");
        assert_eq!(bypass.send(&update.frame), Passed::Closed);
        bypass.await_passing(&update);
        tap.write_all(&answer.frame).await.expect("written");
        assert_eq!(bypass.send(&update.frame), Passed::Closed);
        tap.write_all(&update.frame).await.expect("written");
        assert_eq!(bypass.send(&update.frame), Passed::Yes);
    }

    #[tokio::test]
    async fn frames_of_both_ways_stay_whole_when_the_client_reads_late() {
        let (mut tap, bypass, mut client) = pair().await;
        open(&mut tap, &bypass, &mut client).await;
        let news = packet(&"n".repeat(50_000));
        let mut sent = 0;
        while bypass.send(&news.frame) == Passed::Yes {
            sent += 1;
        }
        assert!(sent > 0);
        assert_eq!(bypass.send(&news.frame), Passed::Full, "nothing piles up");
        // Its own writer waits for the rest of what took the bypass, and the bypass for the writer's.
        let own = packet(&"o".repeat(30_000));
        let writing = tokio::spawn({
            let frame = own.frame.clone();
            async move {
                tap.write_all(&frame).await.expect("written");
                tap
            }
        });
        tokio::task::yield_now().await;
        assert_eq!(bypass.send(&news.frame), Passed::Full);
        let mut seen = vec![0; sent * news.frame.len() + own.frame.len()];
        timeout(PATIENCE, client.read_exact(&mut seen)).await.expect("in time").expect("read");
        assert_eq!(count(&seen, &news.frame), sent);
        assert_eq!(count(&seen, &own.frame), 1);
        let tap = timeout(PATIENCE, writing).await.expect("in time").expect("no panic");
        assert_eq!(bypass.send(&news.frame), Passed::Yes, "open again");
        drop(tap);
    }

    #[tokio::test]
    async fn who_is_at_the_rest_of_a_frame_holds_no_connection_that_is_over() {
        let (mut tap, bypass, mut client) = pair().await;
        open(&mut tap, &bypass, &mut client).await;
        let news = packet(&"n".repeat(50_000));
        while bypass.send(&news.frame) == Passed::Yes {}
        drop(tap);
        let gone = async {
            while bypass.pipe.strong_count() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, gone).await.expect("the connection is let go of");
    }
}
