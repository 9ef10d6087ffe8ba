//! Reading a WebSocket that was taken over: frames, Engine.IO packets, Socket.IO packets, and pings to see that it lives.
//!
//! What a client may send and what becomes of it is as with socketioxide, which carries the session before: what cannot
//! be read ends the connection, what is for no namespace of ours is passed over.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::ops::ControlFlow;
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::net::tcp::OwnedReadHalf;
use tokio::time::{Instant, Sleep, sleep_until};

use super::frame::{Breach, Frames, Received};
use super::handshake::Guest;
use super::limits::{HANDSHAKE_TIMEOUT, PING_INTERVAL, PING_TIMEOUT};
use super::line::{Alive, Line};
use super::packet;
use super::pipe::{Passed, Pipe, Urgency};
use super::session::{Incoming, Session};
use super::wire;
use super::{NAMESPACE, Shared};
use crate::metrics;

/// What is read at once, for all connections of a thread.
const SCRATCH_BYTES: usize = 16 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH_BYTES].into());
}

/// Why a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Its client closed it.
    Closed,
    /// This service did.
    Ended,
    /// It broke.
    Broken,
    /// The client sent what nobody can read.
    Unreadable,
    /// The client gave no sign of life.
    Silent,
}

impl End {
    /// The metric label: as socketioxide's reasons are called.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Closed | Self::Ended => "transport_close",
            Self::Broken => "transport_error",
            Self::Unreadable => "parse_error",
            Self::Silent => "ping_timeout",
        }
    }
}

impl From<Breach> for End {
    fn from(breach: Breach) -> Self {
        match breach {
            Breach::Protocol | Breach::TooLong | Breach::NotText => Self::Broken,
        }
    }
}

/// A Socket.IO packet, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    /// A message in our namespace: the array of name and arguments, and the id of the acknowledgement that is wanted.
    Message(&'a str, Option<i64>),
    /// The client wants to be in a namespace.
    Connect(&'a str),
    /// The client leaves our namespace.
    Disconnect,
    /// Nothing that we ask for or that is for us.
    Other,
}

impl<'a> Packet<'a> {
    /// Reads the text of an Engine.IO message; `None` when it is no packet without attachments.
    pub fn read(text: &'a str) -> Option<Self> {
        let (kind, rest) = text.split_at_checked(1)?;
        let (namespace, rest) =
            if rest.starts_with('/') { rest.split_once(',').unwrap_or((rest, "")) } else { ("/", rest) };
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (id, data) = rest.split_at(digits);
        // Where no data follows, or a number too large for an id, there is none.
        let id = if data.starts_with(['[', '{']) { id.parse().ok() } else { None };
        let ours = namespace == NAMESPACE;
        match kind {
            "0" => Some(Self::Connect(namespace)),
            "1" if ours => Some(Self::Disconnect),
            "2" if ours => wire::begins_with_a_name(data).then_some(Self::Message(data, id)),
            "1" | "2" => Some(Self::Other),
            "3" => id.map(|_| Self::Other),
            _ => None,
        }
    }
}

/// Held as long as the connection lasts: it keeps its line open, and it counts for its address.
pub(super) type Held = (Alive, Option<Guest>);

/// Reads the connection of a session that was taken over, until one of both ends.
pub(super) fn attend(
    shared: Weak<Shared>,
    session: Arc<Session>,
    line: Line,
    held: Held,
    (reader, pipe, frames): (OwnedReadHalf, Arc<Pipe>, Frames),
) {
    let now = Instant::now();
    // Its client may have left while the connection went over.
    let leaves_at = session.is_over.load(Ordering::Acquire).then(|| now + HANDSHAKE_TIMEOUT);
    let pulse = Pulse { ping_at: now + PING_INTERVAL, pong_by: None, leaves_at };
    let reading = Reading { shared, session, pipe, reader, frames, pulse };
    tokio::spawn(reading.live(line, held));
}

/// When the client is asked for a sign of life, and when it must have given one.
#[derive(Debug, Clone, Copy)]
struct Pulse {
    ping_at: Instant,
    pong_by: Option<Instant>,
    /// It has left the namespace: when its connection is closed, if nothing happens.
    leaves_at: Option<Instant>,
}

impl Pulse {
    fn next(&self) -> Instant {
        let next = self.pong_by.unwrap_or(self.ping_at);
        self.leaves_at.map_or(next, |leaves| leaves.min(next))
    }
}

struct Reading {
    shared: Weak<Shared>,
    session: Arc<Session>,
    pipe: Arc<Pipe>,
    reader: OwnedReadHalf,
    frames: Frames,
    pulse: Pulse,
}

impl Reading {
    /// Reads until the connection ends; then the session does.
    async fn live(mut self, line: Line, _held: Held) {
        let end = self.read(&line).await;
        if self.pulse.leaves_at.is_none() {
            metrics::GATEWAY_DISCONNECTS.count(&[end.as_str()]);
        }
        if let Some(shared) = self.shared.upgrade() {
            shared.forget(&self.session);
        }
        // What is owed is still written, until the line is cut.
        tokio::select! {
            biased;
            () = line.until_cut() => {}
            () = self.pipe.flush() => {}
        }
        self.pipe.close();
    }

    async fn read(&mut self, line: &Line) -> End {
        let mut closed = pin!(line.until_closed());
        let mut timer = pin!(sleep_until(self.pulse.next()));
        let end = poll_fn(|cx| {
            loop {
                if closed.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(End::Ended);
                }
                match self.poll_read(cx) {
                    Poll::Ready(ControlFlow::Break(end)) => return Poll::Ready(end),
                    Poll::Ready(ControlFlow::Continue(())) => {}
                    Poll::Pending => return self.poll_pulse(cx, timer.as_mut()),
                }
            }
        });
        end.await
    }

    /// Reads what is there, as much as is read at once.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<ControlFlow<End>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buf = ReadBuf::new(scratch);
            let read = ready!(Pin::new(&mut self.reader).poll_read(cx, &mut buf));
            Poll::Ready(self.take(&read, buf.filled_mut()))
        })
    }

    fn take(&mut self, read: &io::Result<()>, bytes: &mut [u8]) -> ControlFlow<End> {
        match read {
            Err(_) => return ControlFlow::Break(End::Broken),
            Ok(()) if bytes.is_empty() && self.pipe.is_dead() => return ControlFlow::Break(End::Broken),
            Ok(()) if bytes.is_empty() => return ControlFlow::Break(End::Closed),
            Ok(()) => {}
        }
        let Self { shared, session, pipe, frames, pulse, .. } = self;
        let read = frames.read(bytes, |received| match received {
            Received::Text(text) => Self::text(shared, session, pipe, pulse, text),
            Received::Binary => ControlFlow::Break(End::Unreadable),
            Received::Ping(payload) => owe(pipe, &packet::pong(payload)),
            Received::Close => ControlFlow::Break(End::Closed),
        });
        let end = match read {
            Ok(ControlFlow::Continue(())) => return ControlFlow::Continue(()),
            Ok(ControlFlow::Break(end)) => end,
            Err(breach) => breach.into(),
        };
        if end != End::Ended {
            // A farewell in form, if the client still reads.
            pipe.send(packet::CLOSE, Urgency::Owed);
        }
        ControlFlow::Break(end)
    }

    /// An Engine.IO packet.
    fn text(
        shared: &Weak<Shared>,
        session: &Arc<Session>,
        pipe: &Arc<Pipe>,
        pulse: &mut Pulse,
        text: &str,
    ) -> ControlFlow<End> {
        let message = match text.as_bytes() {
            [b'2' | b'3'] => {
                pulse.pong_by = None;
                return ControlFlow::Continue(());
            }
            [b'1', ..] => return ControlFlow::Break(End::Closed),
            [b'4', ..] => text.get(1..).and_then(Packet::read),
            _ => None,
        };
        let Some(shared) = shared.upgrade() else { return ControlFlow::Break(End::Closed) };
        match message {
            None => ControlFlow::Break(End::Unreadable),
            Some(Packet::Message(..) | Packet::Disconnect) if pulse.leaves_at.is_some() => ControlFlow::Continue(()),
            Some(Packet::Message(text, ack)) => {
                if shared.take_in(session, Incoming { text: text.into(), ack, at: Instant::now() }) {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(End::Ended)
                }
            }
            Some(Packet::Disconnect) => {
                pulse.leaves_at = Some(Instant::now() + HANDSHAKE_TIMEOUT);
                shared.has_left(session);
                ControlFlow::Continue(())
            }
            // The handshake of this connection is over: the client opens a new one by itself.
            Some(Packet::Connect(NAMESPACE)) if pulse.leaves_at.is_some() => ControlFlow::Break(End::Closed),
            Some(Packet::Connect(NAMESPACE) | Packet::Other) => ControlFlow::Continue(()),
            Some(Packet::Connect(other)) => owe(pipe, &packet::no_namespace(other)),
        }
    }

    fn poll_pulse(&mut self, cx: &mut Context<'_>, mut timer: Pin<&mut Sleep>) -> Poll<End> {
        loop {
            let next = self.pulse.next();
            if timer.deadline() != next {
                timer.as_mut().reset(next);
            }
            ready!(timer.as_mut().poll(cx));
            let now = Instant::now();
            if self.pulse.leaves_at.is_some_and(|leaves| leaves <= now) {
                return Poll::Ready(End::Closed);
            }
            if self.pulse.pong_by.is_some_and(|until| until <= now) {
                return Poll::Ready(End::Silent);
            }
            if self.pulse.pong_by.is_none() && self.pulse.ping_at <= now {
                // A client that takes nothing gives no sign of life either.
                self.pipe.send(packet::PING, Urgency::Owed);
                self.pulse.pong_by = Some(now + PING_TIMEOUT);
                self.pulse.ping_at = now + PING_INTERVAL;
            }
        }
    }
}

/// Something that a client asked for in passing: who does not take the answers is not to ask.
fn owe(pipe: &Arc<Pipe>, frame: &[u8]) -> ControlFlow<End> {
    match pipe.send(frame, Urgency::Owed) {
        Passed::Yes => ControlFlow::Continue(()),
        Passed::Full | Passed::Gone => ControlFlow::Break(End::Broken),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_read_as_socketioxide_reads_them() {
        for (text, packet) in [
            ("2/realtime,[\"a\"]", Some(Packet::Message("[\"a\"]", None))),
            ("2/realtime,17[\"a\",{}]", Some(Packet::Message("[\"a\",{}]", Some(17)))),
            ("2/realtime,[ \"a\"]", Some(Packet::Message("[ \"a\"]", None))),
            ("2/realtime,99999999999999999999[\"a\"]", Some(Packet::Message("[\"a\"]", None))),
            ("2/realtime,[\"\\u0061\", ", Some(Packet::Message("[\"\\u0061\", ", None))),
            ("2/realtime,[\"a", None),
            ("2/realtime,[]", None),
            ("2/realtime,[7]", None),
            ("2/realtime,{}", None),
            ("2/realtime,", None),
            ("2/realtime", None),
            ("2[\"a\"]", Some(Packet::Other)),
            ("2/other,[\"a\"]", Some(Packet::Other)),
            ("0/realtime,{\"token\":\"t\"}", Some(Packet::Connect("/realtime"))),
            ("0/realtime", Some(Packet::Connect("/realtime"))),
            ("0", Some(Packet::Connect("/"))),
            ("0/é,", Some(Packet::Connect("/é"))),
            ("1/realtime,", Some(Packet::Disconnect)),
            ("1/realtime", Some(Packet::Disconnect)),
            ("1", Some(Packet::Other)),
            ("3/realtime,7[]", Some(Packet::Other)),
            ("3/realtime,[]", None),
            ("4/realtime,{}", None),
            ("51-/realtime,[\"a\"]", None),
            ("61-/realtime,7[]", None),
            ("7", None),
            ("é", None),
            ("", None),
        ] {
            assert_eq!(Packet::read(text), packet, "{text}");
        }
    }
}
