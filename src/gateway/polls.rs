//! Polls that wait for something to be told, by the transport's session id: a client that comes over to a WebSocket has
//! them end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use super::lock;

/// All of a replica.
#[derive(Debug, Default)]
pub struct Polls {
    sessions: Mutex<HashMap<Box<str>, Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    count: usize,
    nudge: Arc<Notify>,
}

/// One that is under way.
#[derive(Debug)]
pub struct Poll<'a> {
    polls: &'a Polls,
    sid: &'a str,
    nudge: Arc<Notify>,
}

impl Polls {
    /// Counts a poll for as long as it is held.
    pub fn begin<'a>(&'a self, sid: &'a str) -> Poll<'a> {
        let mut sessions = lock(&self.sessions);
        if let Some(waiting) = sessions.get_mut(sid) {
            waiting.count += 1;
            return Poll { polls: self, sid, nudge: Arc::clone(&waiting.nudge) };
        }
        let nudge = Arc::new(Notify::new());
        sessions.insert(sid.into(), Waiting { count: 1, nudge: Arc::clone(&nudge) });
        Poll { polls: self, sid, nudge }
    }

    /// Those of a session are to end; false when there is none.
    pub fn nudge(&self, sid: &str) -> bool {
        let sessions = lock(&self.sessions);
        sessions.get(sid).inspect(|waiting| waiting.nudge.notify_waiters()).is_some()
    }
}

impl Poll<'_> {
    /// Returns when it is to end.
    pub fn nudged(&self) -> Notified<'_> {
        self.nudge.notified()
    }
}

impl Drop for Poll<'_> {
    fn drop(&mut self) {
        let mut sessions = lock(&self.polls.sessions);
        if let Some(waiting) = sessions.get_mut(self.sid) {
            waiting.count -= 1;
            if waiting.count == 0 {
                sessions.remove(self.sid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn polls_are_told_to_end_and_counted_until_they_have() {
        let polls = Polls::default();
        assert!(!polls.nudge("a"));
        let (first, second, other) = (polls.begin("a"), polls.begin("a"), polls.begin("b"));
        let ends = [&first, &second].map(Poll::nudged);
        let stays = other.nudged();
        assert!(polls.nudge("a"));
        futures_util::future::join_all(ends).await;
        assert!(stays.now_or_never().is_none());
        drop(first);
        assert!(polls.nudge("a"));
        drop(second);
        assert!(!polls.nudge("a"));
        assert!(polls.nudge("b"));
        drop(other);
        assert!(lock(&polls.sessions).is_empty());
    }
}
