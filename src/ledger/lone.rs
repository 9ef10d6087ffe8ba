//! Users with one session on this replica: what that session has done itself need not be told to it.
//!
//! A release is told to the owner's other sockets, and every replica where the owner is reads that. Where the only socket
//! is the one that has the answer, reading it would cost as much as the answer did.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::key;
use super::notice::author;
use crate::domain::{SessionId, UserId};

/// The only session of each user who has one here.
#[derive(Default)]
pub(super) struct Lone {
    sessions: Mutex<HashMap<UserId, SessionId>>,
}

impl Lone {
    fn sessions(&self) -> MutexGuard<'_, HashMap<UserId, SessionId>> {
        // Nothing panics half-way through a change.
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes it; `None` for a user who has more than one, or none.
    pub(super) fn note(&self, user: UserId, session: Option<SessionId>) {
        match session {
            Some(session) => self.sessions().insert(user, session),
            None => self.sessions().remove(&user),
        };
    }

    /// Whether a message says only what the one session that would be told has done itself.
    pub(super) fn knows(&self, channel: &str, text: &str) -> bool {
        let user = channel.strip_prefix(key::USER_CHANNEL).and_then(|user| user.parse().ok());
        let (Some(user), Some(author)) = (user, author(text)) else { return false };
        self.sessions().get(&user) == Some(&author)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{CategoryId, EventId, LockId, Personal, Quantity, ReleaseReason};
    use crate::ledger::write_personal;

    #[test]
    fn only_what_the_only_session_did_is_known() {
        let (user, other) = (UserId::new(7).expect("an id"), UserId::new(77).expect("an id"));
        let [mine, second] = [(); 2].map(|()| SessionId::generate());
        let lock = LockId::generate(EventId::new(1).expect("an id"));
        let (category, quantity) = (CategoryId::new(2).expect("an id"), Quantity::new(3).expect("a quantity"));
        let reason = ReleaseReason::Released;
        let released = |by| write_personal(&Personal::Released { lock, category, quantity, reason, by });
        let (lone, own) = (Lone::default(), key::user_channel(user));
        assert!(!lone.knows(&own, &released(Some(mine))), "nobody is known to be alone");
        lone.note(user, Some(mine));
        assert!(lone.knows(&own, &released(Some(mine))));
        assert!(!lone.knows(&own, &released(Some(second))), "a socket elsewhere did it");
        assert!(!lone.knows(&own, &released(None)), "the orders-service did it");
        assert!(!lone.knows(&key::user_channel(other), &released(Some(mine))));
        assert!(!lone.knows(&key::event_channel(lock.event()), &released(Some(mine))));
        for message in [Personal::Expired { lock, category, quantity }, Personal::Confirmed { lock, order: None }] {
            assert!(!lone.knows(&own, &write_personal(&message)), "{message:?}");
        }
        assert!(!lone.knows(&own, &format!("other {mine}")));
        lone.note(user, None);
        assert!(!lone.knows(&own, &released(Some(mine))), "a second session began");
    }
}
