//! Who is here: the local sockets by user and by room, and how the fan-out reaches them.
//!
//! The registry's lock is held for looking up only, never while something is sent. News are encoded once for a room and
//! told to its sockets in portions; a socket that does not take them gets the latest instead, later.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::packet::Packet;
use super::pipe::Urgency;
use super::session::{Ending, Session, Told};
use super::wire;
use super::{Shared, lock};
use crate::domain::{Availability, CategoryId, ChangeKind, EventId, Personal, SessionId, UserId};
use crate::fanout::{Audience, News, Telling};
use crate::ledger::Ledger;
use crate::metrics;

/// How often sockets that do not read as fast as they are told are tried again, with the latest counts.
const MEND_EVERY: Duration = Duration::from_millis(250);

/// Sockets told before others have their turn: below a millisecond.
const PORTION_LEN: usize = 128;

/// News that are on their way round at once: what is left to tell is written anew for each that joins in.
const LEGS_MAX: usize = 4;

/// How many may come while a room is told before what joins in needs a new list of everybody.
const LATE_MAX: usize = 1024;

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
    /// Counts what is told to rooms. Who joins in a turn has read the counts later than those were that are told in it.
    turn: u64,
}

#[derive(Debug)]
struct Members {
    sessions: HashMap<SessionId, Arc<Session>>,
    /// The same as a list, made when the room is told and somebody came or went.
    list: Option<Crowd>,
    /// The turn in which everybody was last gathered.
    gathered: u64,
    /// Who came since then and is still here; `None` when too many did.
    late: Option<HashMap<SessionId, Arc<Session>>>,
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

impl Room {
    /// From now on these news are what the room was told last.
    fn is_told(&self, leg: &Leg) {
        let categories = leg.news.changed.iter().map(|counts| counts.category);
        lock(&self.told).extend(categories.zip(leg.updates.iter().cloned()));
    }
}

/// An update as every socket of a room gets it.
pub fn update(counts: &Availability) -> Packet {
    Packet::new("availability-update", wire::availability(counts))
}

impl Rooms {
    /// A socket is here.
    pub fn enter(&self, session: &Arc<Session>, ledger: &dyn Ledger) {
        let mut state = lock(&self.state);
        state.users.entry(session.user).or_default().insert(session.id, Arc::clone(session));
        state.sids.insert(session.sid.clone(), Arc::clone(session));
        ledger.alone(session.user, state.only_session(session.user));
    }

    /// A socket is gone, from every room. True when it was here; a repeat changes nothing.
    pub fn leave(&self, session: &Session, ledger: &dyn Ledger) -> bool {
        let mut state = lock(&self.state);
        let mut was_here = false;
        if let Some(sessions) = state.users.get_mut(&session.user) {
            was_here = sessions.remove(&session.id).is_some();
            if sessions.is_empty() {
                state.users.remove(&session.user);
            }
        }
        ledger.alone(session.user, state.only_session(session.user));
        if state.sids.get(&session.sid).is_some_and(|known| known.id == session.id) {
            state.sids.remove(&session.sid);
        }
        for event in session.take_rooms() {
            state.leave_room(event, session.id);
        }
        was_here
    }

    /// A socket watches an event.
    pub fn join(&self, event: EventId, session: &Arc<Session>) {
        let mut state = lock(&self.state);
        // Under the registry's lock, so that a socket that is gone never joins.
        if !session.add_room(event, state.turn) {
            return;
        }
        let members = state.rooms.entry(event).or_insert_with(|| Members {
            sessions: HashMap::new(),
            list: None,
            gathered: 0,
            late: None,
            room: Arc::new(Room { event, told: Mutex::default(), behind: Mutex::default() }),
        });
        members.sessions.insert(session.id, Arc::clone(session));
        members.list = None;
        if let Some(late) = &mut members.late {
            late.insert(session.id, Arc::clone(session));
            if late.len() > LATE_MAX {
                members.late = None;
            }
        }
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

    /// Something is there for everybody.
    pub fn stir_all(&self) {
        let state = lock(&self.state);
        state.users.values().flat_map(HashMap::values).for_each(|session| session.stir.notify_one());
    }

    /// The local sockets of a user.
    fn of_user(&self, user: UserId) -> Vec<Arc<Session>> {
        lock(&self.state).users.get(&user).map(|sessions| sessions.values().cloned().collect()).unwrap_or_default()
    }

    /// A new turn: those who are in a room now are to be told in it.
    fn turn(&self) -> u64 {
        lock(&self.state).take_turn()
    }

    /// The room and everybody in it, in a new turn.
    fn gather(&self, event: EventId) -> Option<(Arc<Room>, Crowd, u64)> {
        let mut state = lock(&self.state);
        let turn = state.take_turn();
        let members = state.rooms.get_mut(&event)?;
        let list = members.list.get_or_insert_with(|| members.sessions.values().cloned().collect());
        (members.gathered, members.late) = (turn, Some(HashMap::new()));
        Some((Arc::clone(&members.room), Arc::clone(list), turn))
    }

    /// Whether it is known who came since everybody was gathered in a turn.
    fn knows_late(&self, event: EventId, gathered: u64) -> bool {
        lock(&self.state).late(event, gathered).is_some()
    }

    /// Those who came since everybody was gathered in a turn, in a new turn; `None` when that is not known.
    fn gather_late(&self, event: EventId, gathered: u64) -> Option<(Crowd, u64)> {
        let mut state = lock(&self.state);
        let late = state.late(event, gathered)?.values().cloned().collect();
        Some((late, state.take_turn()))
    }
}

impl State {
    /// The session of a user who has one here.
    fn only_session(&self, user: UserId) -> Option<SessionId> {
        let sessions = self.users.get(&user).filter(|sessions| sessions.len() == 1)?;
        sessions.keys().next().copied()
    }

    fn take_turn(&mut self) -> u64 {
        self.turn += 1;
        self.turn
    }

    fn late(&self, event: EventId, gathered: u64) -> Option<&HashMap<SessionId, Arc<Session>>> {
        self.rooms.get(&event).filter(|members| members.gathered == gathered)?.late.as_ref()
    }

    fn leave_room(&mut self, event: EventId, session: SessionId) {
        if let Some(members) = self.rooms.get_mut(&event) {
            members.sessions.remove(&session);
            members.list = None;
            if let Some(late) = &mut members.late {
                late.remove(&session);
            }
            lock(&members.room.behind).sessions.remove(&session);
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
            let turn = shared.rooms.turn();
            let waiting: Vec<_> = lock(&room.behind).sessions.values().cloned().collect();
            for portion in waiting.chunks(PORTION_LEN) {
                let latest = lock(&room.told);
                let packets: Vec<_> = latest.values().cloned().collect();
                let frames = Packet::frames(&packets);
                let now = Instant::now();
                for (session, since) in portion {
                    let tell = || session.tell(&frames, &packets, &[], Urgency::News);
                    // Who has left meanwhile is in no list any more, unless they came again and missed something since.
                    let Some(told) = session.while_in(room.event, turn, tell) else { continue };
                    let slow = now.duration_since(*since) >= shared.options.slow_client;
                    if told == Told::Full && !slow {
                        continue;
                    }
                    if told == Told::Full {
                        shared.end(session, Ending::Slow);
                    }
                    lock(&room.behind).sessions.remove(&session.id);
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
        self.hoard.heard(message);
        let sessions = self.rooms.of_user(user);
        let mut others = sessions.iter().filter(|session| Some(session.id) != author).peekable();
        if others.peek().is_none() {
            return;
        }
        let Some((name, data)) = wire::personal(message) else { return };
        for session in others {
            if session.heard.is_news(message) {
                session.deliver(name, &data);
            }
        }
    }
}

/// A way round through a room, a portion of its sockets at a time. Later news that join in make it longer: they go once
/// round from where they joined in. Who came meanwhile is told of them, and of nothing that is older.
struct Tour {
    shared: Arc<Shared>,
    room: Arc<Room>,
    crowd: Crowd,
    turn: u64,
    /// The next one, counted on from round to round.
    at: usize,
    /// What is left of the way, never empty.
    legs: VecDeque<Leg>,
    /// Ways of their own for those who were not there at the beginning, which come first.
    late: VecDeque<Late>,
    /// Where it is not known who was not: the last news have a way of their own.
    then: Option<Box<Tour>>,
}

/// A short way to those who came while a longer one was under way.
struct Late {
    crowd: Crowd,
    turn: u64,
    at: usize,
    leg: Leg,
}

/// A stretch on which everybody is told the same.
struct Leg {
    /// Where it ends, counted as `Tour::at` is.
    end: usize,
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
        (quantity > 0).then(|| Packet::new(name, data))
    };
    news.summaries.iter().filter_map(packet).collect()
}

impl Leg {
    fn new(end: usize, news: News) -> Self {
        let updates: Vec<_> = news.changed.iter().map(update).collect();
        let others = others(&news, None);
        let frames = Packet::frames(updates.iter().chain(&others));
        let movers = news.summaries.iter().flat_map(|summary| &summary.by_user).map(|(user, _)| *user).collect();
        Self { end, news, updates, others, frames, movers }
    }

    fn tell(&self, session: &Session) -> Told {
        if !self.movers.contains(&session.user) {
            return session.tell(&self.frames, &self.updates, &self.others, Urgency::News);
        }
        let others = others(&self.news, Some(session.user));
        let frames = Packet::frames(self.updates.iter().chain(&others));
        if frames.is_empty() {
            return Told::Queued;
        }
        session.tell(&frames, &self.updates, &others, Urgency::News)
    }
}

impl Tour {
    fn begin(shared: &Arc<Shared>, news: News) -> Option<Self> {
        let (room, crowd, turn) = shared.rooms.gather(news.event)?;
        let leg = Leg::new(crowd.len(), news);
        room.is_told(&leg);
        let (legs, late) = (VecDeque::from([leg]), VecDeque::new());
        Some(Self { shared: Arc::clone(shared), room, crowd, turn, at: 0, legs, late, then: None })
    }

    /// A socket that did not take it all: what it missed of the counts is told later.
    fn note(&self, session: &Arc<Session>, leg: &Leg) {
        if !leg.others.is_empty() {
            metrics::GATEWAY_DROPPED.count(&["others"]);
        }
        if leg.updates.is_empty() {
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

    /// Tells those of a crowd at the next places of a leg, as far as they were there before its turn; where that ends for
    /// now.
    fn portion(&self, crowd: &Crowd, turn: u64, at: usize, leg: &Leg) -> usize {
        let end = leg.end.min(at + PORTION_LEN);
        let (mut written, mut queued) = (0, 0);
        let told = lock(&self.room.told);
        for place in at..end {
            let session = &crowd[place % crowd.len()];
            let tell = || {
                let told = leg.tell(session);
                if told == Told::Full {
                    self.note(session, leg);
                }
                told
            };
            match session.while_in(self.room.event, turn, tell) {
                Some(Told::Written) => written += 1,
                Some(Told::Queued) => queued += 1,
                Some(Told::Full | Told::Gone) | None => {}
            }
        }
        drop(told);
        metrics::GATEWAY_NEWS.add(&["write"], written);
        metrics::GATEWAY_NEWS.add(&["queue"], queued);
        end
    }
}

impl Telling for Tour {
    fn go_on(&mut self) -> bool {
        if let Some(mut late) = self.late.pop_front() {
            late.at = self.portion(&late.crowd, late.turn, late.at, &late.leg);
            if late.at < late.leg.end {
                self.late.push_front(late);
            }
        } else if let Some(leg) = self.legs.front() {
            self.at = self.portion(&self.crowd, self.turn, self.at, leg);
            if self.at == leg.end {
                self.legs.pop_front();
            }
        }
        if self.legs.is_empty()
            && self.late.is_empty()
            && let Some(then) = self.then.take()
        {
            *self = *then;
        }
        !(self.legs.is_empty() && self.late.is_empty())
    }

    fn is_open(&self) -> bool {
        let room_for_more = self.then.is_none() && self.legs.len() < LEGS_MAX;
        room_for_more && self.shared.rooms.knows_late(self.room.event, self.turn)
    }

    fn join_in(&mut self, news: News) {
        let Some((late, turn)) = self.shared.rooms.gather_late(news.event, self.turn) else {
            self.then = Tour::begin(&self.shared, news).map(Box::new);
            return;
        };
        for leg in &mut self.legs {
            *leg = Leg::new(leg.end, leg.news.and(&news));
        }
        if !late.is_empty() {
            let leg = Leg::new(late.len(), news.clone());
            self.late.push_back(Late { crowd: late, turn, at: 0, leg });
        }
        let last = Leg::new(self.at + self.crowd.len(), news);
        self.room.is_told(&last);
        self.legs.push_back(last);
    }

    fn laps(&self) -> f64 {
        let whole = |places: usize| u32::try_from(places).map_or(f64::MAX, f64::from);
        whole(self.at) / whole(self.crowd.len()).max(1.0)
    }
}

/// The fan-out's view of the gateway.
#[derive(Debug)]
pub(super) struct Here(pub Arc<Shared>);

impl Audience for Here {
    fn gather(&self, news: News) -> Option<Box<dyn Telling>> {
        Some(Box::new(Tour::begin(&self.0, news)?))
    }

    fn personal(&self, user: UserId, message: &Personal) {
        self.0.tell_user(user, message);
    }

    fn missed(&self) {
        self.0.doubt();
    }
}
