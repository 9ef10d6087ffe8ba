//! Who is here: the local sockets by user and by room, and how the fan-out reaches them.
//!
//! The registry's lock is held for looking up only, never while something is sent.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use futures_util::FutureExt as _;
use socketioxide::operators::BroadcastOperators;
use socketioxide::{BroadcastError, SocketError};
use tokio::time::Instant;

use super::session::{Ending, Sent, Session};
use super::wire::{self, Json};
use super::{NAMESPACE, Shared, lock};
use crate::domain::{Availability, CategoryId, ChangeKind, EventId, Personal, SessionId, UserId};
use crate::fanout::{Audience, Summary};
use crate::metrics;

const UPDATE: &str = "availability-update";

/// After an update that did not fit into some socket's send buffer: time for the buffer to drain.
const MEND_AFTER: Duration = Duration::from_secs(1);

/// The local sockets.
#[derive(Debug, Default)]
pub struct Rooms {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    users: HashMap<UserId, HashMap<SessionId, Arc<Session>>>,
    sids: HashMap<Box<str>, Arc<Session>>,
    rooms: HashMap<EventId, Members>,
}

#[derive(Debug)]
struct Members {
    sessions: HashMap<SessionId, Arc<Session>>,
    room: Arc<Room>,
}

/// One event's local audience.
#[derive(Debug)]
pub struct Room {
    event: EventId,
    /// What the room was told last. Held while the room is told, so that the room and its mending speak in turn; those
    /// who join or leave do not need it.
    told: Mutex<BTreeMap<CategoryId, Availability>>,
    /// A mending will look at every socket of the room; one is enough.
    mending: AtomicBool,
    /// Sockets that are known to be behind: their full buffers are no news.
    behind: AtomicUsize,
}

/// The name of an event's room.
pub fn room_of(event: EventId) -> String {
    format!("e:{event}")
}

/// The name of the room that all sockets of a user are in.
pub fn room_of_user(user: UserId) -> String {
    let mut name = String::with_capacity(18);
    // Writing to a text cannot fail.
    write!(name, "u:{user}").ok();
    name
}

impl Rooms {
    /// A socket is here.
    pub fn enter(&self, session: &Arc<Session>) {
        let mut state = lock(&self.state);
        state.users.entry(session.user).or_default().insert(session.id, Arc::clone(session));
        state.sids.insert(session.sid.clone(), Arc::clone(session));
    }

    /// A socket is gone, from every room. True when it was its user's last; a repeat changes nothing.
    pub fn leave(&self, session: &Session) -> bool {
        let mut state = lock(&self.state);
        let mut last = false;
        if let Some(sessions) = state.users.get_mut(&session.user) {
            sessions.remove(&session.id);
            if sessions.is_empty() {
                state.users.remove(&session.user);
                last = true;
            }
        }
        if state.sids.get(&session.sid).is_some_and(|known| known.id == session.id) {
            state.sids.remove(&session.sid);
        }
        for event in session.take_rooms() {
            state.leave_room(event, session.id);
        }
        last
    }

    /// A socket watches an event.
    pub fn join(&self, event: EventId, session: &Arc<Session>) {
        let mut state = lock(&self.state);
        // Under the registry's lock, so that a socket that is gone never joins.
        if !session.add_room(event) {
            return;
        }
        let members = state.rooms.entry(event).or_insert_with(|| Members {
            sessions: HashMap::new(),
            room: Arc::new(Room {
                event,
                told: Mutex::default(),
                mending: AtomicBool::new(false),
                behind: AtomicUsize::new(0),
            }),
        });
        members.sessions.insert(session.id, Arc::clone(session));
    }

    /// A socket no longer watches an event.
    pub fn part(&self, event: EventId, session: &Session) {
        let mut state = lock(&self.state);
        session.remove_room(event);
        state.leave_room(event, session.id);
    }

    /// The session behind a transport's session id.
    pub fn by_sid(&self, sid: &str) -> Option<Arc<Session>> {
        lock(&self.state).sids.get(sid).cloned()
    }

    /// The local sockets of a user.
    fn of_user(&self, user: UserId) -> Vec<Arc<Session>> {
        lock(&self.state).users.get(&user).map(|sessions| sessions.values().cloned().collect()).unwrap_or_default()
    }

    fn room(&self, event: EventId) -> Option<Arc<Room>> {
        lock(&self.state).rooms.get(&event).map(|members| Arc::clone(&members.room))
    }

    fn in_room(&self, event: EventId) -> Vec<Arc<Session>> {
        lock(&self.state)
            .rooms
            .get(&event)
            .map(|members| members.sessions.values().cloned().collect())
            .unwrap_or_default()
    }

    /// Those of `users` that have sockets in the room, with these sockets.
    fn present(&self, event: EventId, users: &[(UserId, u64)]) -> Vec<(UserId, Vec<Arc<Session>>)> {
        let state = lock(&self.state);
        let Some(members) = state.rooms.get(&event) else { return Vec::new() };
        users
            .iter()
            .filter_map(|(user, _)| {
                let sessions = state.users.get(user)?;
                let here: Vec<_> =
                    sessions.values().filter(|session| members.sessions.contains_key(&session.id)).cloned().collect();
                (!here.is_empty()).then_some((*user, here))
            })
            .collect()
    }
}

impl State {
    fn leave_room(&mut self, event: EventId, session: SessionId) {
        if let Some(members) = self.rooms.get_mut(&event) {
            members.sessions.remove(&session);
            if members.sessions.is_empty() {
                self.rooms.remove(&event);
            }
        }
    }
}

impl Shared {
    fn room_operators(&self, event: EventId) -> Option<BroadcastOperators> {
        self.io.of(NAMESPACE).map(|namespace| namespace.to(room_of(event)))
    }

    /// Encodes once and hands to every socket's send buffer; the local adapter never waits. Answers how many buffers
    /// were full.
    fn broadcast(to: BroadcastOperators, name: &'static str, data: &Json, what: &'static str) -> usize {
        let Some(Err(error)) = to.emit(name, data).now_or_never() else { return 0 };
        match error {
            BroadcastError::Socket(errors) => {
                let full = errors.iter().filter(|error| matches!(error, SocketError::InternalChannelFull)).count();
                if full > 0 {
                    metrics::GATEWAY_DROPPED.add(&[what], full as u64);
                }
                full
            }
            BroadcastError::Adapter(_) | BroadcastError::Serialize(_) => {
                tracing::error!(%error, name, "a message for a room could not be sent");
                0
            }
        }
    }

    /// Tells the sockets again, one by one, that did not get everything: the ones whose buffers stay full are found
    /// and, after `slow_client`, closed.
    async fn mend(shared: Weak<Self>, room: Arc<Room>) {
        let mut behind: Option<Vec<(Arc<Session>, Instant)>> = None;
        let mut known = 0;
        loop {
            tokio::time::sleep(MEND_AFTER).await;
            let Some(shared) = shared.upgrade() else { return };
            let now = Instant::now();
            let tell = behind.take().unwrap_or_else(|| {
                // From now on a torn broadcast starts another mending.
                room.mending.store(false, Ordering::Release);
                shared.rooms.in_room(room.event).into_iter().map(|session| (session, now)).collect()
            });
            let still: Vec<_> = {
                let told = lock(&room.told);
                let news: Vec<_> = told.values().map(wire::availability).collect();
                let full = |session: &Session| news.iter().any(|json| session.emit(UPDATE, json) == Sent::Full);
                tell.into_iter().filter(|(session, _)| session.is_in(room.event) && full(session)).collect()
            };
            metrics::GATEWAY_MENDED.count(&[]);
            room.behind.fetch_sub(known, Ordering::AcqRel);
            let (slow, still): (Vec<_>, Vec<_>) =
                still.into_iter().partition(|(_, since)| now.duration_since(*since) >= shared.options.slow_client);
            for (session, _) in slow {
                shared.end(&session, Ending::Slow);
            }
            if still.is_empty() {
                return;
            }
            known = still.len();
            room.behind.fetch_add(known, Ordering::AcqRel);
            behind = Some(still);
        }
    }

    fn tell_updates(self: &Arc<Self>, event: EventId, changed: &[Availability]) {
        let Some(room) = self.rooms.room(event) else { return };
        let mut torn = false;
        {
            let mut told = lock(&room.told);
            for counts in changed {
                let Some(to) = self.room_operators(event) else { return };
                let full = Self::broadcast(to, UPDATE, &wire::availability(counts), "update");
                torn |= full > room.behind.load(Ordering::Acquire);
                told.insert(counts.category, *counts);
            }
        }
        if torn && !room.mending.swap(true, Ordering::AcqRel) {
            self.tasks.spawn(Self::mend(Arc::downgrade(self), room));
        }
    }

    /// Those who moved tickets themselves are told of the others' only; sums that are then zero are not sent.
    fn tell_others(&self, event: EventId, summaries: &[Summary]) {
        for summary in summaries {
            let (name, reason) = match summary.kind {
                ChangeKind::Locked => ("tickets-locked-by-other-user", None),
                ChangeKind::Back(reason) => ("tickets-released-by-other-user", Some(reason)),
            };
            let movers = self.rooms.present(event, &summary.by_user);
            let Some(to) = self.room_operators(event) else { return };
            let to = to.except(movers.iter().map(|(user, _)| room_of_user(*user)).collect::<Vec<_>>());
            Self::broadcast(to, name, &wire::moved(event, summary.category, summary.total, reason), "others");
            for (user, sessions) in movers {
                let quantity = summary.without(user);
                if quantity == 0 {
                    continue;
                }
                let data = wire::moved(event, summary.category, quantity, reason);
                for session in sessions {
                    if session.emit(name, &data) == Sent::Full {
                        metrics::GATEWAY_DROPPED.count(&["others"]);
                    }
                }
            }
        }
    }

    /// Tells the sockets of a user that are here.
    pub(super) fn tell_user(&self, user: UserId, message: &Personal) {
        let author = match message {
            Personal::Released { by, .. } => *by,
            Personal::Expired { .. }
            | Personal::Expiring { .. }
            | Personal::Order { .. }
            | Personal::Pinned { .. }
            | Personal::Confirmed { .. } => None,
        };
        self.keep.heard(user, message);
        let sessions = self.rooms.of_user(user);
        if sessions.is_empty() {
            return;
        }
        let Some((name, data)) = wire::personal(message) else { return };
        for session in sessions {
            if Some(session.id) != author {
                session.deliver(name, &data);
            }
        }
    }
}

/// The fan-out's view of the gateway.
#[derive(Debug)]
pub(super) struct Here(pub Arc<Shared>);

impl Audience for Here {
    fn updates(&self, event: EventId, changed: &[Availability]) {
        self.0.tell_updates(event, changed);
    }

    fn others(&self, event: EventId, summaries: &[Summary]) {
        self.0.tell_others(event, summaries);
    }

    fn personal(&self, user: UserId, message: &Personal) {
        self.0.tell_user(user, message);
    }

    fn missed(&self) {
        self.0.doubts.send_modify(|doubts| doubts.of_locks += 1);
    }
}
