//! Who is here: the local sockets by user and by room, and how the fan-out reaches them.
//!
//! The registry's lock is held for looking up only, never while something is sent. News are encoded once for a room and
//! told to its sockets in portions; a socket that does not take them gets the latest instead, later.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::bypass::Packet;
use super::session::{Ending, Session, Told};
use super::wire;
use super::{NAMESPACE, Shared, lock};
use crate::domain::{Availability, CategoryId, ChangeKind, EventId, Personal, SessionId, UserId};
use crate::fanout::{Audience, News, Telling};
use crate::metrics;

/// How often sockets that do not read as fast as they are told are tried again, with the latest counts.
const MEND_EVERY: Duration = Duration::from_millis(250);

/// Sockets told before others have their turn: below a millisecond.
const PORTION_LEN: usize = 128;

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
    /// The same as a list, made when the room is told and somebody came or went.
    list: Option<Crowd>,
    room: Arc<Room>,
}

/// Everybody in a room at one moment.
type Crowd = Arc<[Arc<Session>]>;

/// One event's local audience.
#[derive(Debug)]
pub struct Room {
    event: EventId,
    /// What the room was told last. Held while some of it are told, so that the fan-out and the mending speak in turn;
    /// those who join or leave do not need it.
    told: Mutex<BTreeMap<CategoryId, Packet>>,
    behind: Mutex<Behind>,
}

/// Sockets that did not take what they were told: what they missed is superseded, and the latest is tried again.
#[derive(Debug, Default)]
struct Behind {
    /// With when that began. A socket that does not catch up within `slow_client` is closed.
    sessions: HashMap<SessionId, (Arc<Session>, Instant)>,
    /// A task looks after them.
    mending: bool,
}

/// An update as every socket of a room gets it.
pub fn update(counts: &Availability) -> Packet {
    Packet::new(NAMESPACE, "availability-update", wire::availability(counts))
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
            list: None,
            room: Arc::new(Room { event, told: Mutex::default(), behind: Mutex::default() }),
        });
        members.sessions.insert(session.id, Arc::clone(session));
        members.list = None;
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

    /// The room and everybody in it.
    fn gather(&self, event: EventId) -> Option<(Arc<Room>, Crowd)> {
        let mut state = lock(&self.state);
        let members = state.rooms.get_mut(&event)?;
        let list = members.list.get_or_insert_with(|| members.sessions.values().cloned().collect());
        Some((Arc::clone(&members.room), Arc::clone(list)))
    }
}

impl State {
    fn leave_room(&mut self, event: EventId, session: SessionId) {
        if let Some(members) = self.rooms.get_mut(&event) {
            members.sessions.remove(&session);
            members.list = None;
            if members.sessions.is_empty() {
                self.rooms.remove(&event);
            }
        }
    }
}

impl Shared {
    /// Tells the sockets again that did not take everything, the latest of each category; the ones that do not catch up
    /// are closed after `slow_client`.
    async fn mend(shared: Weak<Self>, room: Arc<Room>) {
        loop {
            tokio::time::sleep(MEND_EVERY).await;
            let Some(shared) = shared.upgrade() else { return };
            metrics::GATEWAY_MENDED.count(&[]);
            let waiting: Vec<_> = lock(&room.behind).sessions.values().cloned().collect();
            for portion in waiting.chunks(PORTION_LEN) {
                let latest = lock(&room.told);
                let packets: Vec<_> = latest.values().cloned().collect();
                let frames = Packet::frames(&packets);
                let now = Instant::now();
                for (session, since) in portion {
                    let told = session.while_in(room.event, || session.tell(&shared.lines, &frames, &packets, &[]));
                    let still = told == Some(Told::Full);
                    let slow = now.duration_since(*since) >= shared.options.slow_client;
                    if still && slow {
                        shared.end(session, Ending::Slow);
                    }
                    if slow || !still {
                        lock(&room.behind).sessions.remove(&session.id);
                    }
                }
            }
            let mut behind = lock(&room.behind);
            if behind.sessions.is_empty() {
                behind.mending = false;
                return;
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

/// One round through a room: a portion of its sockets at a time.
struct Tour {
    shared: Arc<Shared>,
    room: Arc<Room>,
    sessions: Crowd,
    /// The next one.
    at: usize,
    news: News,
    updates: Vec<Packet>,
    others: Vec<Packet>,
    /// All of them.
    frames: Bytes,
    /// Users who moved tickets themselves: they are told of the others' only.
    movers: HashSet<UserId>,
}

/// What everybody, or one user, is told of what others did. Sums that are then zero are not sent.
fn others(news: &News, user: Option<UserId>) -> Vec<Packet> {
    let packet = |summary: &crate::fanout::Summary| {
        let (name, reason) = match summary.kind {
            ChangeKind::Locked => ("tickets-locked-by-other-user", None),
            ChangeKind::Back(reason) => ("tickets-released-by-other-user", Some(reason)),
        };
        let quantity = user.map_or(summary.total, |user| summary.without(user));
        let data = wire::moved(news.event, summary.category, quantity, reason);
        (quantity > 0).then(|| Packet::new(NAMESPACE, name, data))
    };
    news.summaries.iter().filter_map(packet).collect()
}

impl Tour {
    fn tell(&self, session: &Session) -> Told {
        if !self.movers.contains(&session.user) {
            return session.tell(&self.shared.lines, &self.frames, &self.updates, &self.others);
        }
        let others = others(&self.news, Some(session.user));
        let frames = Packet::frames(self.updates.iter().chain(&others));
        if frames.is_empty() {
            return Told::Queued;
        }
        session.tell(&self.shared.lines, &frames, &self.updates, &others)
    }

    /// A socket that did not take it all: what it missed of the counts is told later.
    fn note(&self, session: &Arc<Session>) {
        if !self.others.is_empty() {
            metrics::GATEWAY_DROPPED.count(&["others"]);
        }
        if self.updates.is_empty() {
            return;
        }
        metrics::GATEWAY_DROPPED.count(&["update"]);
        let mut behind = lock(&self.room.behind);
        behind.sessions.entry(session.id).or_insert_with(|| (Arc::clone(session), Instant::now()));
        if !behind.mending {
            behind.mending = true;
            self.shared.tasks.spawn(Shared::mend(Arc::downgrade(&self.shared), Arc::clone(&self.room)));
        }
    }
}

impl Telling for Tour {
    fn go_on(&mut self) -> bool {
        let end = self.sessions.len().min(self.at + PORTION_LEN);
        let (mut bypassed, mut queued) = (0, 0);
        let told = lock(&self.room.told);
        for session in &self.sessions[self.at..end] {
            match session.while_in(self.room.event, || self.tell(session)).unwrap_or(Told::Gone) {
                Told::Bypassed => bypassed += 1,
                Told::Queued => queued += 1,
                Told::Full => self.note(session),
                Told::Gone => {}
            }
        }
        drop(told);
        metrics::GATEWAY_NEWS.add(&["bypass"], bypassed);
        metrics::GATEWAY_NEWS.add(&["queue"], queued);
        self.at = end;
        end < self.sessions.len()
    }
}

/// The fan-out's view of the gateway.
#[derive(Debug)]
pub(super) struct Here(pub Arc<Shared>);

impl Audience for Here {
    fn gather(&self, news: News) -> Option<Box<dyn Telling>> {
        let (room, sessions) = self.0.rooms.gather(news.event)?;
        let updates: Vec<_> = news.changed.iter().map(update).collect();
        lock(&room.told).extend(news.changed.iter().map(|counts| counts.category).zip(updates.iter().cloned()));
        let others = others(&news, None);
        let frames = Packet::frames(updates.iter().chain(&others));
        let movers = news.summaries.iter().flat_map(|summary| &summary.by_user).map(|(user, _)| *user).collect();
        Some(Box::new(Tour {
            shared: Arc::clone(&self.0),
            room,
            sessions,
            at: 0,
            news,
            updates,
            others,
            frames,
            movers,
        }))
    }

    fn personal(&self, user: UserId, message: &Personal) {
        self.0.tell_user(user, message);
    }

    fn missed(&self) {
        self.0.doubts.send_modify(|doubts| doubts.of_locks += 1);
    }
}
