//! One socket from its handshake to its end.
//!
//! [`Session`] is what others see of it; its [`Actor`] handles its messages and ends what it began. Every path ends a
//! session once, a failed handshake included: the socket holds a [`Guard`].

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use socketioxide::adapter::{Adapter, LocalAdapter};
use socketioxide::extract::AckSender;
use socketioxide::handler::{FromConnectParts, FromMessageParts, Value};
use socketioxide::socket::{DisconnectReason, Socket};
use socketioxide::{SendError, SocketError};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::actor::Actor;
use super::auth::Claims;
use super::handshake::{self, Guest};
use super::heard::Heard;
use super::limits::{HANDSHAKE_TIMEOUT, INBOX_LEN_MAX, INBOX_RETRY_AFTER, REFUSALS_MAX, Seat, TOO_FAST};
use super::packet::{self, Packet};
use super::pipe::{Marked, Passed, Pipe, Urgency};
use super::queue::{self, Rejected};
use super::wire::{self, About, Code, Json, Name, Refusal};
use super::{Shared, lock};
use crate::callers::{Address, Caller, Pace};
use crate::domain::{EventId, SessionId, UserId};
use crate::{metrics, telemetry};

/// Messages for a user's socket whose send buffer was full, waiting to be tried again.
const MAIL_LEN_MAX: usize = 64;

/// From the end of reading to the end of the connection: the answers of a closed session are written in this time.
const CLOSING: Duration = Duration::from_secs(3);
const CLOSING_STEP: Duration = Duration::from_millis(20);

/// Why this service ended a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Its token ran out and no new one came.
    Token,
    /// It did not take what it was sent.
    Slow,
    /// It went on asking although it was told to wait.
    Flood,
    /// This replica is going away.
    Drain,
    /// A defect of ours: its task panicked.
    Fault,
}

impl Ending {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Token => "token_expired",
            Self::Slow => "slow",
            Self::Flood => "flood",
            Self::Drain => "drain",
            Self::Fault => "fault",
        }
    }
}

const fn reason_label(reason: DisconnectReason) -> &'static str {
    match reason {
        DisconnectReason::TransportClose => "transport_close",
        DisconnectReason::MultipleHttpPollingError => "double_poll",
        DisconnectReason::PacketParsingError => "parse_error",
        DisconnectReason::TransportError => "transport_error",
        DisconnectReason::HeartbeatTimeout => "ping_timeout",
        DisconnectReason::ClientNSDisconnect => "client",
        DisconnectReason::ServerNSDisconnect => "server",
        DisconnectReason::ClosingServer => "closing",
    }
}

/// What became of an attempt to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// In the socket's send buffer.
    Yes,
    /// The send buffer is full.
    Full,
    /// The socket is gone.
    Gone,
}

impl From<Result<(), SendError>> for Sent {
    fn from(result: Result<(), SendError>) -> Self {
        match result {
            Ok(()) => Self::Yes,
            Err(SendError::Socket(SocketError::InternalChannelFull)) => Self::Full,
            Err(SendError::Socket(SocketError::Closed)) => Self::Gone,
            Err(SendError::Serialize(error)) => {
                tracing::error!(%error, "a message could not be encoded");
                Self::Gone
            }
        }
    }
}

/// What became of news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Written.
    Written,
    /// In the socket's send buffer.
    Queued,
    /// The client does not read as fast as it is told.
    Full,
    /// The socket is gone.
    Gone,
}

impl From<Passed> for Sent {
    fn from(passed: Passed) -> Self {
        match passed {
            Passed::Yes => Self::Yes,
            Passed::Full => Self::Full,
            Passed::Gone => Self::Gone,
        }
    }
}

impl From<Told> for Sent {
    fn from(told: Told) -> Self {
        match told {
            Told::Written | Told::Queued => Self::Yes,
            Told::Full => Self::Full,
            Told::Gone => Self::Gone,
        }
    }
}

/// A message from the client, as it came.
#[derive(Debug)]
pub struct Incoming {
    /// The array of name and arguments.
    pub text: Box<str>,
    /// The id of the acknowledgement, if one is wanted.
    pub ack: Option<i64>,
    /// When it came: its answer is due a request timeout later, however many messages are before it.
    pub at: Instant,
}

impl<A: Adapter> FromMessageParts<A> for Incoming {
    type Error = Infallible;

    fn from_message_parts(_: &Arc<Socket<A>>, value: &mut Value, ack: &Option<i64>) -> Result<Self, Infallible> {
        let text = match value {
            Value::Str(text, _) => text.as_str().into(),
            Value::Bytes(_) => Box::default(),
        };
        Ok(Self { text, ack: *ack, at: Instant::now() })
    }
}

/// The socket itself, for those who must not keep it alive.
pub struct WeakSocket(pub Weak<Socket>);

impl FromConnectParts<LocalAdapter> for WeakSocket {
    type Error = Infallible;

    fn from_connect_parts(socket: &Arc<Socket>, _: &Option<Value>) -> Result<Self, Infallible> {
        Ok(Self(Arc::downgrade(socket)))
    }
}

/// An answer to a request: the name of its message, its data, and what the metrics call it.
#[derive(Debug)]
pub struct Answer {
    /// The message's name, used when no acknowledgement is wanted.
    pub name: &'static str,
    /// The data.
    pub data: Json,
    /// `ok` or a code.
    pub outcome: &'static str,
}

impl Answer {
    /// A granted request.
    pub fn ok(name: Name, data: Json) -> Self {
        Self { name: name.answer(), data, outcome: "ok" }
    }

    /// A refused one; `None` for a message that is no request.
    pub fn refusal(name: Option<Name>, refusal: &Refusal, about: &About) -> Self {
        Self {
            name: name.map_or("error", Name::answer),
            data: wire::refused(refusal, about),
            outcome: refusal.code.as_str(),
        }
    }

    /// An unknown name or an unreadable message.
    pub fn unknown(text: &str) -> Self {
        // As much of the name as helps the developer and cannot hurt the reader.
        let shown: String = text.chars().filter(|letter| !letter.is_control()).take(64).collect();
        let message = format!("Unknown message: {shown}");
        Self::refusal(None, &Refusal::saying(Code::InvalidRequest, message), &About::default())
    }

    /// Whether something of ours or behind us did not work, as opposed to a refusal.
    pub fn failed(&self) -> bool {
        [Code::Unavailable, Code::InventoryUnavailable].iter().any(|code| code.as_str() == self.outcome)
    }

    /// Counts it, as the answer to a message of this name.
    pub fn count(&self, name: Option<Name>) {
        metrics::GATEWAY_ANSWERS.count(&[name.map_or("unknown", Name::as_str), self.outcome]);
    }
}

/// Whom a socket's messages count for, where that is limited.
#[derive(Debug)]
pub struct Callers {
    /// Its user.
    pub user: Option<Caller<UserId>>,
    /// Where it comes from.
    pub address: Option<Caller<Address>>,
}

impl Callers {
    /// Counts a message; or says how long to wait.
    fn message(&self) -> Result<(), Duration> {
        let refused = |limit: &'static str| move |_: &Duration| metrics::GATEWAY_LIMITED.count(&[limit]);
        let of_user = self.user.as_ref().map_or(Ok(()), Caller::message);
        of_user.inspect_err(refused("user_messages"))?;
        let of_address = self.address.as_ref().map_or(Ok(()), Caller::message);
        of_address.inspect_err(refused("address_messages"))
    }
}

/// One socket, as the rest of the gateway sees it.
pub struct Session {
    /// Ours; the transport's own id is a secret of its client.
    pub id: SessionId,
    /// Whose.
    pub user: UserId,
    /// The transport's session id.
    pub sid: Box<str>,
    /// It is being closed by us: a poll that waits ends.
    pub closing: CancellationToken,
    /// A poll has carried the news that the transport is closed.
    pub told: AtomicBool,
    /// It is over: the actor ends. The same for who only looks, as often as there is a message.
    pub over: CancellationToken,
    pub is_over: AtomicBool,
    /// Something is there for the actor.
    pub stir: Notify,
    socket: Weak<Socket>,
    /// Set when its connection begins to be taken over: where everything is written from then on. Before, it is put into
    /// socketioxide's queue, which is `queueing`.
    own: OnceLock<Weak<Pipe>>,
    queueing: Mutex<()>,
    /// Its connection was taken over: socketioxide's part is over, and that is not the session's end.
    is_own: AtomicBool,
    /// Its client has been told that it is connected to the namespace, or will be before anything else.
    begun: AtomicBool,
    inbox: queue::Sender<Incoming>,
    seat: Mutex<Option<Seat>>,
    /// Messages refused since the inbox was empty last.
    refused: AtomicUsize,
    callers: Callers,
    /// When it began, and how many messages were refused since for coming too fast.
    began: Instant,
    too_fast: Pace,
    /// With the turn in which each was joined; `None` when the session is over.
    rooms: Mutex<Option<HashMap<EventId, u64>>>,
    mail: queue::Sender<(&'static str, Json)>,
    /// What it was told of orders and deadlines.
    pub heard: Heard,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("id", &self.id).field("user", &self.user).finish_non_exhaustive()
    }
}

impl Session {
    /// Writes a frame into the connection, where it is ours, or puts a message into socketioxide's queue.
    fn send(&self, frame: impl FnOnce() -> Vec<u8>, queue: impl FnOnce(&Arc<Socket>) -> Sent) -> Sent {
        match self.queue(Sent::Gone, queue) {
            Ok(sent) => sent,
            Err(pipe) => pipe.upgrade().map_or(Sent::Gone, |pipe| pipe.send(&frame(), Urgency::Owed).into()),
        }
    }

    /// Puts something into socketioxide's queue; or says where it is to be written.
    fn queue<T>(&self, gone: T, put: impl FnOnce(&Arc<Socket>) -> T) -> Result<T, &Weak<Pipe>> {
        if let Some(pipe) = self.own.get() {
            return Err(pipe);
        }
        let _queueing = lock(&self.queueing);
        match self.own.get() {
            Some(pipe) => Err(pipe),
            None => Ok(self.socket.upgrade().map_or(gone, |socket| put(&socket))),
        }
    }

    /// Everything is written into the connection from now on; what is in socketioxide's queue ends with a mark.
    pub fn mark(&self, pipe: &Arc<Pipe>) -> Marked {
        let _queueing = lock(&self.queueing);
        let (name, data) = packet::MARK;
        let socket = self.socket.upgrade().filter(|_| !self.is_over.load(Ordering::Acquire));
        match socket.map_or(Sent::Gone, |socket| socket.emit(name, &data).into()) {
            Sent::Yes => {
                self.own.set(Arc::downgrade(pipe)).ok();
                Marked::Yes
            }
            Sent::Full => Marked::Later,
            Sent::Gone => Marked::Never,
        }
    }

    /// The connection is taken over now: what it counts for.
    pub fn goes_over(&self) -> Option<Guest> {
        self.is_own.store(true, Ordering::Release);
        metrics::GATEWAY_TAKEN_OVER.count(&[]);
        self.socket.upgrade()?.req_parts().extensions.get::<Guest>().cloned()
    }

    fn is_own(&self) -> bool {
        self.is_own.load(Ordering::Acquire)
    }

    /// Sends unless the send buffer is full.
    pub fn emit(&self, name: &'static str, data: &Json) -> Sent {
        self.send(|| packet::event(name, data), |socket| socket.emit(name, data).into())
    }

    /// Sends, later if the send buffer is full now.
    pub fn deliver(&self, name: &'static str, data: &Json) {
        let outcome = match self.emit(name, data) {
            Sent::Full if self.mail.try_send((name, data.clone())).is_err() => {
                metrics::GATEWAY_DROPPED.count(&["personal"]);
                "dropped"
            }
            Sent::Full => {
                self.stir.notify_one();
                "waiting"
            }
            Sent::Yes => "sent",
            Sent::Gone => return,
        };
        metrics::GATEWAY_PUSHES.count(&[outcome]);
    }

    fn acknowledge(&self, id: i64, data: &Json) -> Sent {
        self.send(
            || packet::acknowledgement(id, data),
            |socket| {
                let sender = AckSender::from_message_parts(socket, &mut Value::Str("".into(), None), &Some(id));
                let Ok(sender) = sender;
                sender.send(data).into()
            },
        )
    }

    /// Sends an answer as the client wants it, unless the send buffer is full.
    pub fn answer(&self, answer: &Answer, ack: Option<i64>) -> Sent {
        match ack {
            Some(id) => self.acknowledge(id, &answer.data),
            None => self.emit(answer.name, &answer.data),
        }
    }

    /// Refuses a message because too many of the same user or address came before. True when that is enough.
    fn slow_down(&self, message: &Incoming, wait: Duration) -> bool {
        self.later(message, wait);
        let now = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.too_fast.take(TOO_FAST, now).is_err()
    }

    /// Refuses a message because too many of the same socket wait already. True when that is enough.
    fn refuse(&self, message: &Incoming) -> bool {
        self.later(message, INBOX_RETRY_AFTER);
        self.refused.fetch_add(1, Ordering::Relaxed) + 1 >= REFUSALS_MAX
    }

    /// Answers a message that is not looked at now.
    fn later(&self, message: &Incoming, wait: Duration) {
        let name = wire::split(&message.text).and_then(|(name, _)| Name::parse(&name));
        let answer = Answer::refusal(name, &Refusal::later(wait), &About::default());
        metrics::GATEWAY_MESSAGES.count(&[name.map_or("unknown", Name::as_str)]);
        answer.count(name);
        if self.answer(&answer, message.ack) == Sent::Full {
            metrics::GATEWAY_DROPPED.count(&["answer"]);
        }
    }

    /// The inbox is empty: the client has waited for its answers.
    pub fn forgive(&self) {
        if self.refused.load(Ordering::Relaxed) > 0 {
            self.refused.store(0, Ordering::Relaxed);
        }
    }

    /// Does something, unless the session does not watch the event, or only since that turn or a later one; it cannot
    /// leave meanwhile.
    pub fn while_in<T>(&self, event: EventId, turn: u64, act: impl FnOnce() -> T) -> Option<T> {
        let rooms = lock(&self.rooms);
        rooms.as_ref()?.get(&event).is_some_and(|joined| *joined < turn).then(act)
    }

    /// Notes a room, and the turn in which it was joined; false when the session is over.
    pub fn add_room(&self, event: EventId, turn: u64) -> bool {
        lock(&self.rooms).as_mut().map(|rooms| rooms.insert(event, turn)).is_some()
    }

    /// Forgets a room.
    pub fn remove_room(&self, event: EventId) {
        if let Some(rooms) = lock(&self.rooms).as_mut() {
            rooms.remove(&event);
        }
    }

    /// The rooms it was in; from now on it is in none.
    pub fn take_rooms(&self) -> Vec<EventId> {
        lock(&self.rooms).take().into_iter().flatten().map(|(event, _)| event).collect()
    }

    /// Tells packets of a room, of which `frames` are all. When the answer is `Full` some were not sent, and all
    /// `updates` are to be told again.
    pub fn tell(&self, frames: &Bytes, updates: &[Packet], others: &[Packet], urgency: Urgency) -> Told {
        let queued = self.queue(Told::Gone, |socket| {
            let emit = |packet: &Packet| Sent::from(socket.emit(packet.name, &packet.data));
            for packet in updates {
                match emit(packet) {
                    Sent::Yes => {}
                    Sent::Full => return Told::Full,
                    Sent::Gone => return Told::Gone,
                }
            }
            let dropped = others.iter().filter(|packet| emit(packet) == Sent::Full).count();
            metrics::GATEWAY_DROPPED.add(&["others"], dropped as u64);
            Told::Queued
        });
        let pipe = match queued {
            Ok(told) => return told,
            Err(pipe) => pipe,
        };
        match pipe.upgrade().map_or(Passed::Gone, |pipe| pipe.send(frames, urgency)) {
            Passed::Yes => Told::Written,
            Passed::Full => Told::Full,
            Passed::Gone => Told::Gone,
        }
    }
}

/// Held by the socket: dropped with it, whatever became of it. A connection that was taken over outlives it.
pub struct Guard {
    session: Arc<Session>,
    shared: Weak<Shared>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade()
            && !self.session.is_own()
        {
            shared.forget(&self.session);
        }
    }
}

impl Shared {
    /// Prepares a socket whose handshake is good, before it is connected: handlers are registered here because a
    /// message may follow the connection at once.
    pub(super) fn admit(self: &Arc<Self>, socket: &Arc<Socket>, claims: Claims, seat: Seat, callers: Callers) {
        let (mail, post) = queue::bounded(MAIL_LEN_MAX);
        let (sender, inbox) = queue::bounded(INBOX_LEN_MAX);
        let session = Arc::new(Session {
            id: SessionId::generate(),
            user: claims.user,
            sid: socket.id.to_string().into(),
            closing: CancellationToken::new(),
            told: AtomicBool::new(false),
            over: CancellationToken::new(),
            is_over: AtomicBool::new(false),
            stir: Notify::new(),
            socket: Arc::downgrade(socket),
            own: OnceLock::new(),
            queueing: Mutex::default(),
            is_own: AtomicBool::new(false),
            begun: AtomicBool::new(false),
            inbox: sender,
            seat: Mutex::new(Some(seat)),
            refused: AtomicUsize::new(0),
            callers,
            began: Instant::now(),
            too_fast: Pace::default(),
            rooms: Mutex::new(Some(HashMap::new())),
            mail,
            heard: Heard::default(),
        });
        let guard = Guard { session: Arc::clone(&session), shared: Arc::downgrade(self) };
        socket.extensions.insert(Arc::new(guard));
        let actor = Actor::new(Arc::clone(self), Arc::clone(&session), claims, inbox, post);
        socket.extensions.insert(Arc::new(Mutex::new(Some(actor))));
        socket.on_fallback({
            let (session, shared) = (Arc::clone(&session), Arc::downgrade(self));
            move |message: Incoming| {
                if let Some(shared) = shared.upgrade() {
                    shared.take_in(&session, message);
                }
                std::future::ready(())
            }
        });
        socket.on_disconnect({
            let (session, shared) = (Arc::clone(&session), Arc::downgrade(self));
            move |reason: DisconnectReason| {
                if let Some(shared) = shared.upgrade()
                    && !session.is_own()
                {
                    if reason == DisconnectReason::ClientNSDisconnect {
                        shared.has_left(&session);
                        shared.vacate(&session);
                    } else {
                        metrics::GATEWAY_DISCONNECTS.count(&[reason_label(reason)]);
                        shared.forget(&session);
                    }
                }
                std::future::ready(())
            }
        });
        self.keep.begin(session.user);
        self.rooms.enter(&session, self.ledger.as_ref());
    }

    /// A message has come: it waits for its turn, or is refused because too many do. False when that was one too many: the
    /// session has been ended.
    pub(super) fn take_in(self: &Arc<Self>, session: &Arc<Session>, message: Incoming) -> bool {
        let floods = match session.callers.message() {
            Err(wait) => session.slow_down(&message, wait),
            Ok(()) => match session.inbox.try_send(message) {
                Err(Rejected::Full(message)) => session.refuse(&message),
                Err(Rejected::Closed(_)) => false,
                Ok(()) => {
                    session.stir.notify_one();
                    false
                }
            },
        };
        if floods {
            self.end(session, Ending::Flood);
        }
        !floods
    }

    /// The client has left the namespace; its transport is still there.
    pub(super) fn has_left(&self, session: &Session) {
        metrics::GATEWAY_DISCONNECTS.count(&[reason_label(DisconnectReason::ClientNSDisconnect)]);
        self.forget(session);
    }

    /// The session of a transport, if its client is in the namespace.
    pub(super) fn begun(&self, sid: &str) -> Option<Arc<Session>> {
        self.rooms.by_sid(sid).filter(|session| session.begun.load(Ordering::Acquire))
    }

    /// Starts the actor of a socket that is connected now.
    pub(super) fn begin(self: &Arc<Self>, socket: &Socket) {
        let actor = socket.extensions.remove::<Arc<Mutex<Option<Actor>>>>().and_then(|actor| lock(&actor).take());
        let Some(mut actor) = actor else { return };
        let session = Arc::clone(&actor.session);
        let trace = handshake::Trace::of(socket.req_parts());
        // Boxed where there is a span, so that the others have no room for one.
        match telemetry::session(trace.headers()) {
            Some((trace, span)) => {
                actor.belongs_to(trace);
                self.tasks.spawn(Box::pin(actor.live().instrument(span)))
            }
            None => self.tasks.spawn(actor.live()),
        };
        session.begun.store(true, Ordering::Release);
        // Whoever notes the line of a WebSocket looks for the session afterwards.
        self.lines.stir(&session.sid);
    }

    /// The session is over: its place is free, nothing more is sent to it, its actor ends. A repeat changes nothing.
    pub(super) fn forget(&self, session: &Session) {
        if self.rooms.leave(session, self.ledger.as_ref()) {
            self.keep.forget(session.user);
        }
        lock(&session.seat).take();
        session.is_over.store(true, Ordering::Release);
        session.over.cancel();
        session.stir.notify_one();
    }

    /// The client has left the namespace: a transport that nobody comes back on within the time of a handshake is
    /// closed, as one that nobody ever came on is. It would hold memory and count for nobody.
    fn vacate(self: &Arc<Self>, session: &Session) {
        let (shared, sid) = (Arc::clone(self), session.sid.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = sleep(HANDSHAKE_TIMEOUT) => {}
                // Transports without a session end with the drain.
                () = shared.draining.cancelled() => return,
            }
            if shared.rooms.by_sid(&sid).is_some() {
                return;
            }
            match shared.lines.find(&sid) {
                Some(line) => line.close(),
                None => shared.close_polling(&sid).await,
            }
        });
    }

    /// Ends a session from our side, so that its client connects again by itself: the transport is closed, the socket
    /// is never told to stay away.
    pub(super) fn end(self: &Arc<Self>, session: &Arc<Session>, why: Ending) {
        if session.closing.is_cancelled() {
            return;
        }
        session.closing.cancel();
        metrics::GATEWAY_ENDED.count(&[why.as_str()]);
        if let Some(line) = self.lines.find(&session.sid) {
            if why == Ending::Slow {
                line.cut();
            } else {
                line.close();
                self.tasks.spawn(async move {
                    until(CLOSING, || !line.is_open()).await;
                    line.cut();
                });
            }
        } else if session.own.get().is_none() {
            let (shared, session) = (Arc::clone(self), Arc::clone(session));
            self.tasks.spawn(async move {
                // A poll that waits is told by the gate, and so is the next one: it comes within this time.
                until(CLOSING, || session.told.load(Ordering::Acquire)).await;
                shared.close_polling(&session.sid).await;
            });
        }
        self.forget(session);
    }
}

/// Waits for a condition, within a limit.
async fn until(limit: Duration, condition: impl Fn() -> bool) {
    let end = Instant::now() + limit;
    while !condition() && Instant::now() < end {
        sleep(CLOSING_STEP).await;
    }
}
