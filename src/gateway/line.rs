//! The line: one accepted connection, and the means to end it from our side.
//!
//! socketioxide offers no way to close one socket's transport, and its writer waits for ever for a client that does not
//! read. So every connection is wrapped before HTTP sees it: [`Line::wrap`] gives the stream and a handle that is put
//! into the extensions of the connection's requests.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture, WaitForCancellationFutureOwned};

use super::lock;

/// The handle of one accepted connection.
#[derive(Debug, Clone)]
pub struct Line {
    closing: CancellationToken,
    cut: CancellationToken,
    /// Alive as long as the stream is, or whoever took it over.
    stream: Weak<()>,
}

/// Keeps a line open.
pub(super) type Alive = Arc<()>;

impl Line {
    /// Wraps an accepted connection. The handle belongs into the extensions of every request that comes over it.
    pub fn wrap<S>(stream: S) -> (LineStream<S>, Self) {
        let (closing, cut) = (CancellationToken::new(), CancellationToken::new());
        let alive = Arc::new(());
        let stream_lives = Arc::downgrade(&alive);
        let line = Self { closing: closing.clone(), cut: cut.clone(), stream: stream_lives };
        let stream = LineStream {
            inner: stream,
            read_ends: Box::pin(closing.cancelled_owned()),
            write_ends: Box::pin(cut.cancelled_owned()),
            alive,
        };
        (stream, line)
    }

    /// Returns when reading ends.
    pub(super) fn until_closed(&self) -> WaitForCancellationFuture<'_> {
        self.closing.cancelled()
    }

    /// Returns when writing ends, too; reading has then.
    pub(super) fn until_cut(&self) -> WaitForCancellationFuture<'_> {
        self.cut.cancelled()
    }

    /// Ends reading: to the HTTP server or the WebSocket above it, the client is gone. What is waiting to be written
    /// still is.
    pub fn close(&self) {
        self.closing.cancel();
    }

    /// Ends reading and writing at once.
    pub fn cut(&self) {
        self.closing.cancel();
        self.cut.cancel();
    }

    /// Whether the connection is still there.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.stream.strong_count() > 0
    }
}

/// An accepted connection that its [`Line`] can end.
#[derive(Debug)]
pub struct LineStream<S> {
    inner: S,
    read_ends: Pin<Box<WaitForCancellationFutureOwned>>,
    write_ends: Pin<Box<WaitForCancellationFutureOwned>>,
    alive: Alive,
}

impl<S> LineStream<S> {
    /// What was accepted, and what keeps its line open.
    pub(super) fn into_inner(self) -> (S, Alive) {
        (self.inner, self.alive)
    }

    fn check_write(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.write_ends.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionAborted.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for LineStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.read_ends.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LineStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check_write(cx)?;
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_write(cx)?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_write(cx)?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_write(cx)?;
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

/// The lines of WebSocket connections, by the transport's session id. One entry per open connection: dead ones leave when
/// the map has doubled.
#[derive(Debug, Default)]
pub struct Lines(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    lines: HashMap<Box<str>, Entry>,
    sweep_at: usize,
}

#[derive(Debug)]
struct Entry {
    line: Line,
    /// The session is on it, and does not poll any more.
    crossed: bool,
    stir: Arc<Notify>,
}

/// Below this many lines none are looked for that are dead.
const SWEEP_MIN: usize = 64;

impl Lines {
    /// Notes the line of a WebSocket, on which the session is when it has [crossed](Lines::cross), and answers how its
    /// [carrier](super::carrier) is stirred. `None` when the session has one already: no second one is to be taken for it.
    pub fn add(&self, sid: &str, line: Line) -> Option<Arc<Notify>> {
        let mut known = lock(&self.0);
        if known.lines.get(sid).is_some_and(|entry| entry.line.is_open()) {
            return None;
        }
        if known.lines.len() >= known.sweep_at.max(SWEEP_MIN) {
            known.lines.retain(|_, entry| entry.line.is_open());
            known.sweep_at = known.lines.len() * 2;
        }
        let stir = Arc::new(Notify::new());
        known.lines.insert(sid.into(), Entry { line, crossed: false, stir: Arc::clone(&stir) });
        Some(stir)
    }

    /// The session is on its WebSocket now.
    pub fn cross(&self, sid: &str) {
        if let Some(entry) = lock(&self.0).lines.get_mut(sid) {
            entry.crossed = true;
        }
    }

    /// Forgets the line whose carrier is stirred so.
    pub fn remove(&self, sid: &str, stir: &Arc<Notify>) {
        let mut known = lock(&self.0);
        if known.lines.get(sid).is_some_and(|entry| Arc::ptr_eq(&entry.stir, stir)) {
            known.lines.remove(sid);
        }
    }

    /// The line of a session that is on a WebSocket.
    pub fn find(&self, sid: &str) -> Option<Line> {
        let known = lock(&self.0);
        known.lines.get(sid).filter(|entry| entry.crossed && entry.line.is_open()).map(|entry| entry.line.clone())
    }

    /// There may be a session to be taken over.
    pub fn stir(&self, sid: &str) {
        if let Some(entry) = lock(&self.0).lines.get(sid) {
            entry.stir.notify_one();
        }
    }

    /// Ends every line at once and says how many there were.
    pub fn cut_all(&self) -> usize {
        let lines = std::mem::take(&mut lock(&self.0).lines);
        lines.into_values().filter(|entry| entry.line.is_open()).map(|entry| entry.line.cut()).count()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_closed_line_reads_nothing_more_but_still_writes() {
        let (mut client, server) = tokio::io::duplex(64);
        let (mut stream, line) = Line::wrap(server);
        client.write_all(b"before").await.unwrap();
        let mut bytes = [0; 6];
        stream.read_exact(&mut bytes).await.unwrap();
        line.close();
        client.write_all(b"after").await.unwrap();
        assert_eq!(stream.read(&mut bytes).await.unwrap(), 0);
        stream.write_all(b"answer").await.unwrap();
        client.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"answer");
    }

    #[tokio::test]
    async fn a_cut_line_wakes_a_writer_that_waits_for_a_client_who_does_not_read() {
        let (client, server) = tokio::io::duplex(4);
        let (mut stream, line) = Line::wrap(server);
        let writer = tokio::spawn(async move { stream.write_all(b"more than fits").await });
        tokio::task::yield_now().await;
        line.cut();
        let error = writer.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        assert!(!line.is_open());
        drop(client);
    }

    #[tokio::test]
    async fn a_session_has_one_line_as_long_as_it_is_open() {
        let lines = Lines::default();
        let (stream, first) = Line::wrap(tokio::io::empty());
        let (_second_stream, second) = Line::wrap(tokio::io::empty());
        assert!(lines.add("s", first).is_some());
        assert!(lines.add("s", second.clone()).is_none(), "the first is open");
        assert!(lines.add("other", second.clone()).is_some(), "of another session");
        assert!(lines.find("s").is_none(), "the session is not on it yet");
        lines.cross("s");
        lines.find("s").unwrap().close();
        assert!(!second.closing.is_cancelled());
        drop(stream);
        assert!(lines.find("s").is_none());
        let stir = lines.add("s", second).expect("the first is gone");
        lines.stir("s");
        stir.notified().await;
        lines.cross("s");
        lines.remove("s", &Arc::new(Notify::new()));
        assert!(lines.find("s").is_some());
        lines.remove("s", &stir);
        assert!(lines.find("s").is_none());
        assert_eq!(lines.cut_all(), 1, "the other");
    }

    #[tokio::test]
    async fn dead_lines_do_not_pile_up() {
        let lines = Lines::default();
        for sid in 0..10_000 {
            let (_stream, line) = Line::wrap(tokio::io::empty());
            lines.add(&sid.to_string(), line);
        }
        assert!(lock(&lines.0).lines.len() <= SWEEP_MIN + 1);
    }
}
