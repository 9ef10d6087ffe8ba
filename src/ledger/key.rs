//! Every key and channel in Redis, and nothing else makes one.
//!
//! All keys of one event share the hash tag `{e:<event>}`, all of one user `{u:<user>}`, the fleet's `{fleet}`: a script
//! touches one slot. `lua/README.md` is the schema.

use std::fmt::{self, Display, Formatter, from_fn};

use crate::domain::{EventId, LockId, RequestId, UserId};

/// The keys that scripts of an event take, in the order of the scripts' `KEYS`: each the first few, as many as it needs.
pub(super) const OF_EVENT: [&str; 5] = [BOOK, "deadlines", "ended", "settling", "sold"];
const BOOK: &str = "book";

// Piece by piece, which takes half as long as a format of formats.
fn write_tag(f: &mut Formatter<'_>, event: EventId) -> fmt::Result {
    f.write_str(TAG)?;
    event.fmt(f)?;
    f.write_str(TAG_END)
}

/// One of [`OF_EVENT`].
pub(super) fn of_event(event: EventId, name: &str) -> impl Display {
    from_fn(move |f| {
        write_tag(f, event)?;
        f.write_str(name)
    })
}

/// A lock's own key.
pub(super) fn lock(lock: LockId) -> impl Display {
    from_fn(move |f| {
        write_tag(f, lock.event())?;
        f.write_str(LOCK)?;
        lock.fmt(f)
    })
}

/// What the other keys of an event are called, with what distinguishes them behind it, see [`super::call::Call::own`]: a
/// lock's own key by its id, a user's rate by the user, what is remembered of a reported order by its id.
pub(super) const LOCK: &str = "lock:";
pub(super) const RATE: &str = "rate:";
pub(super) const ORDER: &str = "order:";
/// What is remembered of a client's request id: behind it [`request`].
pub(super) const REQUEST: &str = "request:";

/// A user's request.
pub(super) fn request(user: UserId, request: &RequestId) -> impl Display {
    from_fn(move |f| write!(f, "{user}:{request}"))
}

/// A user's open sessions, and the events in which the user may have locks.
pub(super) fn user(user: UserId) -> String {
    format!("seatlock:{{u:{user}}}")
}

/// What a user was told a short time ago of orders.
pub(super) fn told(user: UserId) -> String {
    format!("seatlock:{{u:{user}}}:told")
}

/// The event that a field of a user's hash stands for, if it stands for one.
pub(super) fn event_of_field(field: &str) -> Option<EventId> {
    field.strip_prefix("e:")?.parse().ok()
}

/// Users that a replica may have sessions of.
pub(super) fn hosted(replica: impl Display) -> String {
    format!("seatlock:{{r:{replica}}}:users")
}

/// Events by when the sweep should look at them.
pub(super) const DUE: &str = "seatlock:{fleet}:due";

/// Events by when they were last touched.
pub(super) const EVENTS: &str = "seatlock:{fleet}:events";

/// Replicas by the end of their lease.
pub(super) const LEASES: &str = "seatlock:{fleet}:leases";

/// What replicas say of themselves.
pub(super) const REPORTS: &str = "seatlock:{fleet}:reports";

/// Replicas whose lease ran out, by when their sessions should be looked at.
pub(super) const DEAD: &str = "seatlock:{fleet}:dead";

/// Made by the fleet's first beat: another one means that the data was lost.
pub(super) const EPOCH: &str = "seatlock:{fleet}:epoch";

/// Where an event's changes are told: its book's name is that of a channel too, so that no script needs another.
pub(super) fn event_channel(event: EventId) -> String {
    of_event(event, BOOK).to_string()
}

/// The event that a channel tells the changes of.
pub(super) fn event_of_channel(channel: &str) -> Option<EventId> {
    channel.strip_prefix(TAG)?.strip_suffix(BOOK)?.strip_suffix(TAG_END)?.parse().ok()
}

/// Whether a channel tells an event's changes.
pub(super) fn is_event_channel(channel: &str) -> bool {
    channel.starts_with(TAG)
}

/// Where a user's messages are told.
pub(super) fn user_channel(user: UserId) -> String {
    format!("{USER_CHANNEL}{user}")
}

/// What stands around the event in its keys and its channel. The number is that of their layout: what another layout wrote is
/// never read.
const TAG: &str = "seatlock:3:{e:";
const TAG_END: &str = "}:";

/// What every user's channel begins with; the scripts know it too.
pub(super) const USER_CHANNEL: &str = "seatlock:user:";

/// Where every replica hears which locks have reached their deadline: `lock|category|quantity|user ...`.
pub(super) const EXPIRED_CHANNEL: &str = "seatlock:expired";

/// What a replica's own channel begins with: it tells itself that its subscription is alive.
pub(super) const PROBE_CHANNEL: &str = "seatlock:probe:";
