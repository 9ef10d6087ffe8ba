//! The pipe: one TCP connection, lent to socketioxide until its session stands on a WebSocket, and then ours.
//!
//! socketioxide opens sessions, on either transport, and carries those that poll. For each it keeps queues, tasks and
//! buffers, 18 KiB of memory, and every message goes through all of them. A session on a WebSocket needs none of it any
//! more, so its connection is taken over: socketioxide is told that the client leaves (the close packet of a client, put
//! between two of its frames), writes what is in its queue, and lets go; from then on messages are written straight into
//! the connection and read by [`super::attend`]. What is sent meanwhile waits, so nothing is lost and nothing overtakes.
//!
//! A session that began on a WebSocket puts nothing of its own into that queue: what comes into it in the instant in which
//! the client leaves may be overlooked. engineioxide's writer looks into the queue first and then whether the session is
//! over, and both may change between the two looks.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::frame::Head;
use super::lock;

/// What may wait for a client that does not read: some hundred answers. The system has taken as much as it takes before.
const REST_BYTES_MAX: usize = 64 * 1024;

/// What a client sends to end its transport: a masked frame (the mask is zero) with an Engine.IO close packet.
const LEAVES: &[u8] = b"\x81\x81\x00\x00\x00\x001";

/// What is offered first on a WebSocket is the greeting of the transport; the second offer is of the task that writes what
/// is queued. Before that task has begun it would not write the queue when the client leaves.
const OFFERS_MIN: u8 = 2;

/// What is in the packet by which a client is in the namespace, the last that comes out of the queue of a session that began on
/// a WebSocket, and in no ping.
const ACCEPTED: &[u8] = b"40/";

/// How the answer to the opening of a WebSocket begins, and a request that has no body ends.
const SWITCHING: &[u8] = b"HTTP/1.1 101 ";
const HEADER_END: [u8; 4] = *b"\r\n\r\n";

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

/// Who takes a connection over.
pub trait Heir: Send {
    /// Whether the session began on this connection; else it comes here by an upgrade from polling.
    fn began_here(&self) -> bool;

    /// Sends everything through the pipe from now on.
    fn take_over(&self, pipe: &Arc<Pipe>);

    /// Reads what comes. Called once, after [`Heir::take_over`].
    fn attend(self: Box<Self>, reader: OwnedReadHalf, pipe: Arc<Pipe>);
}

/// A TCP connection as it is written to.
pub struct Pipe {
    writer: OwnedWriteHalf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    stage: Stage,
    heir: Option<Box<dyn Heir>>,
    /// Who waits for the client meanwhile.
    waker: Option<Waker>,
    /// What is to be written before anything else.
    rest: BytesMut,
    /// A task is at it.
    flushing: bool,
    /// Nobody knows where the client's frames begin: it stays lent.
    is_unknown: bool,
}

/// Whose a connection is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Lent,
    /// Still socketioxide's, which writes its last.
    Leaving,
    Own,
    Dead,
}

impl std::fmt::Debug for Pipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pipe").field("stage", &lock(&self.state).stage).finish_non_exhaustive()
    }
}

impl Pipe {
    /// Names who takes the connection over as soon as that can be. The last one counts: a client may leave its session and
    /// begin another on the same connection.
    pub fn offer(&self, heir: Box<dyn Heir>) {
        let mut state = lock(&self.state);
        if state.stage == Stage::Lent {
            state.heir = Some(heir);
            if let Some(waker) = state.waker.take() {
                waker.wake();
            }
        }
    }

    /// Whether it can be taken over, now or later, as far as is known: what is sent here before waits for that.
    pub fn can_be_own(&self) -> bool {
        let state = lock(&self.state);
        state.stage != Stage::Dead && !state.is_unknown
    }

    /// `waker` is woken when there may be something to be taken over.
    fn wakes(&self, waker: &Waker) {
        let mut state = lock(&self.state);
        if !state.waker.as_ref().is_some_and(|known| known.will_wake(waker)) {
            state.waker = Some(waker.clone());
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
            Stage::Lent | Stage::Leaving | Stage::Own => {}
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

/// The connection as HTTP and socketioxide see it.
pub struct Tap {
    pipe: Arc<Pipe>,
    /// Handed on with the heir.
    reader: Option<OwnedReadHalf>,
    seen: Seen,
    /// Bytes that were offered and the system has not taken.
    unfinished: usize,
    /// How often something was offered since the WebSocket began, at most as often as it matters.
    offers: u8,
    /// The client was offered the packet by which it is in the namespace.
    accepted: bool,
    heir: Option<Box<dyn Heir>>,
}

impl std::fmt::Debug for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tap").field("pipe", &self.pipe).finish_non_exhaustive()
    }
}

/// What the client has sent so far.
#[derive(Debug)]
enum Seen {
    /// Requests, of the last of which this is the end.
    Requests([u8; 4]),
    /// Frames.
    Frames(Place),
    /// Something else, or nobody knows where its frames begin: it is never taken over.
    Unknown,
}

/// A place in a client's frames.
#[derive(Debug, Default)]
pub(super) struct Place {
    /// The beginning of a frame, as far as it has come.
    head: Vec<u8>,
    /// Bytes of its payload that are to come.
    left: usize,
    /// More of its message is to come.
    in_message: bool,
    /// The head of a text of one letter.
    letter: Option<Head>,
    /// That letter was the end of an upgrade from polling.
    upgraded: bool,
}

impl Place {
    /// False when the client breaks the rules.
    pub fn follow(&mut self, bytes: &[u8]) -> bool {
        let mut bytes = bytes.iter();
        while !bytes.as_slice().is_empty() {
            if self.left > 0 {
                let taken = self.left.min(bytes.as_slice().len());
                if let Some(head) = self.letter.take() {
                    self.upgraded |= bytes.as_slice().first().is_some_and(|&letter| head.clear(letter) == b'5');
                }
                self.left -= taken;
                bytes = bytes.as_slice().get(taken..).unwrap_or_default().iter();
                continue;
            }
            self.head.extend(bytes.next());
            let head = match Head::read(&self.head) {
                Ok(Some(head)) => head,
                Ok(None) => continue,
                Err(_) => return false,
            };
            self.head = Vec::new();
            self.left = head.payload_len;
            self.in_message = head.ends_message().map_or(self.in_message, |last| !last);
            self.letter = Some(head).filter(|head| head.is_whole_text() && head.payload_len == 1);
        }
        true
    }

    const fn is_between_messages(&self) -> bool {
        self.left == 0 && self.head.is_empty() && !self.in_message
    }
}

impl Tap {
    /// Wraps an accepted connection.
    pub fn new(stream: TcpStream) -> (Self, Weak<Pipe>) {
        let (reader, writer) = stream.into_split();
        let pipe = Arc::new(Pipe { writer, state: Mutex::default() });
        let handle = Arc::downgrade(&pipe);
        let seen = Seen::Requests([0; 4]);
        (Self { pipe, reader: Some(reader), seen, unfinished: 0, offers: 0, accepted: false, heir: None }, handle)
    }

    /// Takes the connection over, if there is an heir and this is the moment.
    fn hand_over(&mut self) -> bool {
        let Seen::Frames(place) = &self.seen else { return false };
        if !place.is_between_messages() || self.offers < OFFERS_MIN {
            return false;
        }
        let (upgraded, accepted) = (place.upgraded, self.accepted);
        let mut state = lock(&self.pipe.state);
        let Some(heir) = state.heir.take_if(|heir| upgraded || heir.began_here() && accepted) else { return false };
        state.stage = Stage::Leaving;
        drop(state);
        heir.take_over(&self.pipe);
        self.heir = Some(heir);
        true
    }

    /// What was read of the connection into the new part of a buffer.
    fn follow(&mut self, bytes: &[u8]) {
        match &mut self.seen {
            Seen::Requests(end) => {
                for &byte in bytes.iter().rev().take(end.len()).rev() {
                    end.rotate_left(1);
                    end[3] = byte;
                }
            }
            Seen::Frames(place) => {
                if !place.follow(bytes) {
                    self.lose_track();
                }
            }
            Seen::Unknown => {}
        }
    }

    fn lose_track(&mut self) {
        self.seen = Seen::Unknown;
        lock(&self.pipe.state).is_unknown = true;
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        match (self.heir.take(), self.reader.take()) {
            (Some(heir), Some(reader)) => {
                let mut state = lock(&self.pipe.state);
                if state.stage == Stage::Leaving {
                    state.stage = Stage::Own;
                    // An error ends the connection, and that is the reader's to find.
                    if !self.pipe.write_rest(&mut state).unwrap_or(true) {
                        self.pipe.flush_later(&mut state);
                    }
                }
                drop(state);
                heir.attend(reader, Arc::clone(&self.pipe));
            }
            _ => self.pipe.close(),
        }
    }
}

impl AsyncRead for Tap {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // Asked again, socketioxide has seen to all that it was given.
        if this.heir.is_some() {
            return Poll::Ready(Ok(()));
        }
        if buf.remaining() >= LEAVES.len() && this.hand_over() {
            buf.put_slice(LEAVES);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let Some(reader) = &mut this.reader else { return Poll::Ready(Ok(())) };
        match Pin::new(reader).poll_read(cx, buf) {
            Poll::Ready(read) => {
                this.follow(buf.filled().get(before..).unwrap_or_default());
                Poll::Ready(read)
            }
            Poll::Pending => {
                this.pipe.wakes(cx.waker());
                // What came to be so before this is not told any more.
                if buf.remaining() >= LEAVES.len() && this.hand_over() {
                    buf.put_slice(LEAVES);
                    return Poll::Ready(Ok(()));
                }
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for Tap {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let offered = match this.unfinished {
            0 => buf,
            begun => &buf[..begun.min(buf.len())],
        };
        if this.unfinished == 0 {
            match &this.seen {
                Seen::Requests(end) if offered.starts_with(SWITCHING) => {
                    if *end == HEADER_END {
                        this.seen = Seen::Frames(Place::default());
                    } else {
                        this.lose_track();
                    }
                }
                Seen::Frames(_) if this.offers < OFFERS_MIN || !this.accepted => {
                    this.offers = this.offers.saturating_add(1).min(OFFERS_MIN);
                    this.accepted |= offered.windows(ACCEPTED.len()).any(|piece| piece == ACCEPTED);
                    if this.offers == OFFERS_MIN
                        && let Some(waker) = lock(&this.pipe.state).waker.take()
                    {
                        waker.wake();
                    }
                }
                Seen::Requests(_) | Seen::Frames(_) | Seen::Unknown => {}
            }
            // The last word of socketioxide, and not ours. It comes alone: what is before it was flushed.
            if this.heir.is_some() && offered.first() == Some(&0x88) {
                return Poll::Ready(Ok(buf.len()));
            }
        }
        loop {
            match this.pipe.writer.try_write(offered) {
                Ok(written) => {
                    this.unfinished = offered.len() - written;
                    return Poll::Ready(Ok(written));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            ready!(this.pipe.writer.as_ref().poll_write_ready(cx))?;
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.heir.is_some() {
            return Poll::Ready(Ok(()));
        }
        Poll::Ready(socket2::SockRef::from(self.pipe.writer.as_ref()).shutdown(std::net::Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;
    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\n\r\n";
    const SWITCHED: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\n\r\n";

    /// Hands on what it is given.
    struct Watching {
        began_here: bool,
        taken: mpsc::UnboundedSender<(Option<OwnedReadHalf>, Arc<Pipe>)>,
    }

    impl Heir for Watching {
        fn began_here(&self) -> bool {
            self.began_here
        }

        fn take_over(&self, pipe: &Arc<Pipe>) {
            self.taken.send((None, Arc::clone(pipe))).ok();
        }

        fn attend(self: Box<Self>, reader: OwnedReadHalf, pipe: Arc<Pipe>) {
            self.taken.send((Some(reader), pipe)).ok();
        }
    }

    /// A connection that was switched to WebSocket after the client had sent so much; the transport's greeting was
    /// written, and what the task wrote first that writes the queue.
    async fn switched(sent: &[u8]) -> (Tap, Weak<Pipe>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let mut client = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("connected");
        let (mut tap, pipe) = Tap::new(listener.accept().await.expect("accepted").0);
        client.write_all(sent).await.expect("sent");
        assert_eq!(read(&mut tap, sent.len()).await, sent);
        for written in [SWITCHED, b"0", ACCEPTED] {
            tap.write_all(written).await.expect("written");
        }
        let mut seen = vec![0; SWITCHED.len() + 1 + ACCEPTED.len()];
        client.read_exact(&mut seen).await.expect("read");
        (tap, pipe, client)
    }

    async fn read(tap: &mut Tap, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        timeout(PATIENCE, tap.read_exact(&mut bytes)).await.expect("in time").expect("read");
        bytes
    }

    fn offer(pipe: &Weak<Pipe>, began_here: bool) -> mpsc::UnboundedReceiver<(Option<OwnedReadHalf>, Arc<Pipe>)> {
        let (taken, receiver) = mpsc::unbounded_channel();
        pipe.upgrade().expect("open").offer(Box::new(Watching { began_here, taken }));
        receiver
    }

    /// A client's text whose mask is zero.
    fn text(payload: &[u8]) -> Vec<u8> {
        [&[0x81, 0x80 | u8::try_from(payload.len()).expect("short"), 0, 0, 0, 0], payload].concat()
    }

    #[tokio::test]
    async fn a_session_goes_over_between_two_messages_and_nothing_overtakes() {
        let (mut tap, pipe, mut client) = switched(REQUEST).await;
        client.write_all(&text(b"first")).await.expect("sent");
        let first = read(&mut tap, 7).await;
        let mut taken = offer(&pipe, true);
        // In the midst of a message it stays where it is.
        let rest = read(&mut tap, 4).await;
        assert_eq!([first, rest].concat(), text(b"first"));
        assert!(taken.try_recv().is_err());
        // Nothing more comes from the client, and whoever reads is told all the same.
        assert_eq!(read(&mut tap, LEAVES.len()).await, LEAVES);
        let (reader, own) = taken.recv().await.expect("taken over");
        assert!(reader.is_none());
        assert_eq!(tap.read(&mut [0; 8]).await.expect("the end"), 0);
        assert_eq!(own.send(b"second", Urgency::Owed), Passed::Yes);
        assert_eq!(own.send(b"news", Urgency::News), Passed::Full, "what waits must not be overtaken");
        tap.write_all(b"first").await.expect("written");
        tap.write_all(b"\x88\x02\x03\xe8").await.expect("swallowed");
        tap.shutdown().await.expect("ignored");
        drop(tap);
        let (reader, own) = taken.recv().await.expect("attended");
        assert_eq!(own.send(b"third", Urgency::News), Passed::Yes);
        let mut seen = [0; 16];
        timeout(PATIENCE, client.read_exact(&mut seen)).await.expect("in time").expect("read");
        assert_eq!(&seen, b"firstsecondthird");
        client.write_all(&text(b"to us")).await.expect("sent");
        let mut bytes = vec![0; 11];
        let mut reader = reader.expect("the reader");
        timeout(PATIENCE, reader.read_exact(&mut bytes)).await.expect("in time").expect("read");
        assert_eq!(bytes, text(b"to us"));
        own.close();
        assert_eq!(own.send(b"late", Urgency::Owed), Passed::Gone);
        assert_eq!(client.read(&mut seen).await.expect("the end"), 0);
    }

    #[tokio::test]
    async fn who_waits_for_the_client_is_woken_by_an_heir() {
        let (mut tap, pipe, _client) = switched(REQUEST).await;
        let reading = tokio::spawn(async move { read(&mut tap, LEAVES.len()).await });
        tokio::task::yield_now().await;
        let mut taken = offer(&pipe, true);
        assert_eq!(timeout(PATIENCE, reading).await.expect("in time").expect("no panic"), LEAVES);
        assert!(taken.recv().await.is_some());
    }

    #[tokio::test]
    async fn it_waits_for_the_task_that_writes_the_queue() {
        let (mut tap, pipe, mut client) = switched(REQUEST).await;
        tap.offers = 1;
        let mut taken = offer(&pipe, true);
        client.write_all(&text(b"4")).await.expect("sent");
        assert_eq!(read(&mut tap, 7).await, text(b"4"));
        let (mut reading, mut writing) = tokio::io::split(tap);
        let read = tokio::spawn(async move {
            let mut bytes = [0; LEAVES.len()];
            reading.read_exact(&mut bytes).await.expect("read");
            bytes
        });
        tokio::task::yield_now().await;
        assert!(taken.try_recv().is_err());
        writing.write_all(b"x").await.expect("written");
        assert_eq!(timeout(PATIENCE, read).await.expect("in time").expect("no panic"), LEAVES);
        assert!(taken.recv().await.is_some());
    }

    #[tokio::test]
    async fn the_last_session_of_a_connection_has_it() {
        let (mut tap, pipe, _client) = switched(REQUEST).await;
        let (mut first, mut last) = (offer(&pipe, true), offer(&pipe, true));
        assert_eq!(read(&mut tap, LEAVES.len()).await, LEAVES);
        assert!(first.recv().await.is_none() && last.recv().await.is_some());
        let mut late = offer(&pipe, true);
        drop(tap);
        assert!(late.recv().await.is_none() && last.recv().await.is_some());
    }

    #[tokio::test]
    async fn a_session_that_began_with_polling_goes_over_after_its_upgrade() {
        let (mut tap, pipe, mut client) = switched(REQUEST).await;
        let mut taken = offer(&pipe, false);
        for message in [&b"2probe"[..], b"4", b"5"] {
            client.write_all(&text(message)).await.expect("sent");
            assert_eq!(read(&mut tap, message.len() + 6).await, text(message));
            assert!(taken.try_recv().is_err());
        }
        assert_eq!(read(&mut tap, LEAVES.len()).await, LEAVES);
        assert!(taken.recv().await.is_some());
    }

    #[tokio::test]
    async fn a_client_whose_frames_cannot_be_followed_stays_where_it_is() {
        let ahead = [REQUEST, &text(b"4")].concat();
        let unmasked = b"\x81\x014";
        let in_parts = [b"\x01\x81\0\0\0\0a", &text(b"")[..]].concat();
        for (sent, then) in [(&ahead[..], &text(b"4")[..]), (REQUEST, unmasked), (REQUEST, &in_parts[..7])] {
            let (mut tap, pipe, mut client) = switched(sent).await;
            client.write_all(then).await.expect("sent");
            assert_eq!(read(&mut tap, then.len()).await, then);
            let mut taken = offer(&pipe, true);
            client.write_all(&text(b"4")).await.expect("sent");
            assert_eq!(read(&mut tap, 7).await, text(b"4"));
            assert!(taken.try_recv().is_err(), "{then:?}");
            drop(tap);
            assert!(taken.recv().await.is_none(), "forgotten with the connection");
            assert_eq!(client.read(&mut [0; 8]).await.unwrap_or(0), 0);
        }
    }

    #[tokio::test]
    async fn what_waits_for_a_client_who_reads_late_is_bounded_and_whole() {
        let (mut tap, pipe, mut client) = switched(REQUEST).await;
        let mut taken = offer(&pipe, true);
        read(&mut tap, LEAVES.len()).await;
        drop(tap);
        taken.recv().await.expect("taken over");
        let (_reader, own) = taken.recv().await.expect("attended");
        let news = vec![b'n'; 50_000];
        let mut sent = 0;
        while own.send(&news, Urgency::News) == Passed::Yes {
            sent += news.len();
        }
        let answer = [b'a'; 1000];
        let mut owed = 0;
        while own.send(&answer, Urgency::Owed) == Passed::Yes {
            owed += answer.len();
            assert!(owed <= REST_BYTES_MAX, "nothing piles up");
        }
        assert!(sent > 0 && owed > 0);
        let mut seen = vec![0; sent + owed];
        timeout(PATIENCE, client.read_exact(&mut seen)).await.expect("in time").expect("read");
        assert!(seen[..sent].iter().all(|&byte| byte == b'n') && seen[sent..].iter().all(|&byte| byte == b'a'));
        timeout(PATIENCE, own.flush()).await.expect("nothing waits");
        assert_eq!(own.send(&news, Urgency::News), Passed::Yes, "open again");
    }

    #[tokio::test]
    async fn who_is_at_the_rest_holds_no_connection_that_is_over() {
        let (mut tap, pipe, _client) = switched(REQUEST).await;
        let mut taken = offer(&pipe, true);
        read(&mut tap, LEAVES.len()).await;
        drop(tap);
        taken.recv().await.expect("taken over");
        let (_, own) = taken.recv().await.expect("attended");
        while own.send(&vec![b'n'; 50_000], Urgency::News) == Passed::Yes {}
        own.close();
        drop(own);
        drop(taken);
        let gone = async {
            while pipe.strong_count() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, gone).await.expect("the connection is let go of");
    }
}
