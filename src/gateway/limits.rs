//! What a client may take, and who counts it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::lock;
use crate::domain::{RateLimit, UserId};
use crate::metrics;

/// The largest message a client may send. The longest legal one is a token renewal: [`super::auth::TOKEN_BYTES_MAX`]
/// and its JSON around it.
pub const MESSAGE_BYTES_MAX: usize = 32 * 1024;

/// Messages of one socket that may wait for their turn. Beyond it they are answered `rate_limited` at once. More than
/// a page asks in one go after it was offline, and little enough to be worked off within a few request timeouts.
pub const INBOX_LEN_MAX: usize = 128;

/// Messages of one socket that are answered `rate_limited` because its inbox is full before the connection is closed, unless
/// the inbox has been empty in between: eight times what may wait. No page asks so much without waiting for an answer.
pub const REFUSALS_MAX: usize = 8 * INBOX_LEN_MAX;

/// What a client is told to wait when its own messages stand in its way.
pub const INBOX_RETRY_AFTER: Duration = Duration::from_secs(1);

/// Rooms that one socket may be in. A page shows one event; a wall of events shows a few.
pub const ROOMS_MAX: usize = 32;

/// Packets that may wait for the transport of a socket that polls, or is not taken over yet. Twice the categories an event
/// may have, which a joiner is told at once; 1024 of the usual 300 bytes are 0.3 MiB for a client that has stalled.
pub const OUTBOX_LEN_MAX: usize = 1024;

/// A ping goes out this often.
pub const PING_INTERVAL: Duration = Duration::from_secs(10);

/// A pong must come within this time: a vanished client is noticed 18 s after its last sign of life at the latest.
pub const PING_TIMEOUT: Duration = Duration::from_secs(8);

/// From the opening of a transport to the end of its handshake.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(8);

/// A transport's session id is shorter; a longer one is nobody's, and not worth remembering beside its connection.
pub const SID_BYTES_MAX: usize = 64;

/// From the header of a poll that sends to the end of its body: the largest takes a second on the slowest mobile line.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Messages of one socket that are refused for coming too fast before it is closed: as many at once as [`REFUSALS_MAX`],
/// and one a second for ever.
pub const TOO_FAST: RateLimit = RateLimit { interval: Duration::from_secs(1), burst: 1024 };

/// The user has too many sockets, or the replica has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// Counts open sockets, by user and together.
#[derive(Debug)]
pub struct Seats {
    total_max: usize,
    user_max: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    total: usize,
    users: HashMap<UserId, usize>,
}

/// One socket's place, given back when dropped.
#[derive(Debug)]
pub struct Seat {
    seats: Arc<Seats>,
    user: UserId,
}

impl Seats {
    /// Nobody is seated.
    pub fn new(total_max: usize, user_max: usize) -> Arc<Self> {
        Arc::new(Self { total_max, user_max, taken: Mutex::default() })
    }

    /// Takes a place for a socket of `user`.
    pub fn take(self: &Arc<Self>, user: UserId) -> Result<Seat, Full> {
        let mut taken = lock(&self.taken);
        let of_user = taken.users.get(&user).copied().unwrap_or(0);
        if taken.total >= self.total_max || of_user >= self.user_max {
            return Err(Full);
        }
        taken.total += 1;
        taken.users.insert(user, of_user + 1);
        Self::show(&taken);
        Ok(Seat { seats: Arc::clone(self), user })
    }

    /// Users with at least one socket, and sockets.
    pub fn counts(&self) -> (usize, usize) {
        let taken = lock(&self.taken);
        (taken.users.len(), taken.total)
    }

    #[expect(clippy::cast_precision_loss, reason = "counts of sockets are far below 2^52")]
    fn show(taken: &Taken) {
        metrics::GATEWAY_SOCKETS.set(&[], taken.total as f64);
        metrics::GATEWAY_USERS.set(&[], taken.users.len() as f64);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = lock(&self.seats.taken);
        taken.total = taken.total.saturating_sub(1);
        if let Entry::Occupied(mut entry) = taken.users.entry(self.user) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
        Seats::show(&taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(id: u64) -> UserId {
        UserId::new(id).unwrap()
    }

    #[test]
    fn seats_are_bounded_by_user_and_together_and_come_back() {
        let seats = Seats::new(3, 2);
        let first = seats.take(user(1)).unwrap();
        let second = seats.take(user(1)).unwrap();
        assert_eq!(seats.take(user(1)).unwrap_err(), Full, "two for one user");
        let third = seats.take(user(2)).unwrap();
        assert_eq!(seats.take(user(3)).unwrap_err(), Full, "three together");
        assert_eq!(seats.counts(), (2, 3));
        drop(third);
        drop(first);
        assert_eq!(seats.counts(), (1, 1));
        seats.take(user(1)).unwrap();
        drop(second);
        assert_eq!(seats.counts(), (0, 0));
    }
}
