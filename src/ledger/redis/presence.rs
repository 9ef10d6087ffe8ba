//! Who is here: the sessions of users and replicas, and what users are told.

use std::time::Duration;

use futures_util::future::join_all;

use super::{PARALLEL, RedisLedger};
use crate::domain::{EventId, Personal, SessionId, UserId, whole_ms};
use crate::ledger::call::Call;
use crate::ledger::notice::write_personal;
use crate::ledger::reply::{self, Left};
use crate::ledger::{LedgerError, Presence, SILENT_MAX, TOLD_KEPT, key, script};

/// How many dead replicas one call reaps, how many users of each, and for how long other replicas leave them alone.
const REAP_REPLICAS_MAX: usize = 4;
const REAP_USERS_MAX: usize = 5000;
const REAP_CLAIM: Duration = Duration::from_secs(5);

/// Which sessions of a user end.
#[derive(Clone, Copy)]
enum Departing<'a> {
    One(SessionId),
    AllOf { replica: &'a str, before_us: u64 },
}

impl RedisLedger {
    pub(super) async fn session_enters(&self, user: UserId, session: SessionId) -> Result<Presence, LedgerError> {
        // The index first, so that it is never too small; and once more, because the leaving of another session here may
        // have taken the user out of it before this one could be seen.
        self.host(user).await?;
        let call = Call::new().key(key::user(user)).key(key::told(user)).arg(session).arg(self.replica);
        let call = call.arg(whole_ms(TOLD_KEPT)).arg(whole_ms(SILENT_MAX));
        let mut presence = reply::entered(self.run(&script::ENTER, call).await?)?;
        let generation = presence.generation;
        let adopt = |event| async move {
            let call = Call::about(event, &script::ADOPT).arg(user).arg(generation);
            reply::locks(self.run(&script::ADOPT, call).await?, user)
        };
        let (hosted, locks) = tokio::join!(self.host(user), self.in_events_of(user, adopt));
        hosted?;
        presence.locks = locks?;
        Ok(presence)
    }

    pub(super) async fn session_leaves(
        &self,
        user: UserId,
        session: SessionId,
        grace: Duration,
    ) -> Result<(), LedgerError> {
        let left = self.depart(user, Departing::One(session), grace).await?;
        if left.here == 0 {
            // A leftover costs one look when this replica is reaped.
            self.unhost(&self.replica.to_string(), &[(user, left.found_us)]).await.ok();
        }
        Ok(())
    }

    pub(super) async fn tell_sockets(&self, user: UserId, message: &Personal) -> Result<(), LedgerError> {
        let (channel, text) = (key::user_channel(user), write_personal(message));
        if let Personal::Order { .. } = message {
            let call = Call::new().key(key::told(user)).arg(text).arg(channel).arg(whole_ms(TOLD_KEPT));
            return reply::said(&self.run(&script::TELL, call).await?, "told");
        }
        self.driver.publish(&channel, &text).await
    }

    pub(super) async fn reap_dead(&self, grace: Duration) -> Result<u64, LedgerError> {
        let call = Call::new().key(key::DEAD).arg(REAP_REPLICAS_MAX).arg(whole_ms(REAP_CLAIM));
        let (claimed_ms, _, replicas) = reply::due::<String>(self.run(&script::DUE, call).await?)?;
        let mut users = 0;
        for replica in replicas {
            users += self.reap_replica(&replica, claimed_ms, grace).await?;
        }
        Ok(users)
    }

    async fn host(&self, user: UserId) -> Result<(), LedgerError> {
        reply::said(&self.run(&script::HOST, Call::new().key(key::hosted(self.replica)).arg(user)).await?, "hosted")
    }

    /// Ends sessions of a user on a replica: one, or all that began before an instant. If none is left anywhere, the
    /// user's locks are abandoned.
    async fn depart(&self, user: UserId, which: Departing<'_>, grace: Duration) -> Result<Left, LedgerError> {
        let call = Call::new().key(key::user(user)).key(key::told(user));
        let call = match which {
            Departing::One(session) => call.arg(session).arg(self.replica).arg(""),
            Departing::AllOf { replica, before_us } => call.arg("").arg(replica).arg(before_us),
        };
        let call = call.arg(whole_ms(SILENT_MAX));
        let left = reply::left(self.run(&script::LEAVE, call).await?)?;
        if left.remaining > 0 {
            return Ok(left);
        }
        for portion in self.events_of(user).await?.chunks(PARALLEL) {
            let abandon = |event: &EventId| {
                let event = *event;
                async move {
                    self.touch(event, grace).await?;
                    let call = Call::about(event, &script::ABANDON).arg(user).arg(left.generation).arg(whole_ms(grace));
                    reply::said(&self.run(&script::ABANDON, call).await?, "abandoned")
                }
            };
            for done in join_all(portion.iter().map(abandon)).await {
                done?;
            }
        }
        Ok(left)
    }

    /// Forgets that a replica has sessions of these users; how many it may still have. `found_us` is when it was seen
    /// that there are none.
    async fn unhost(&self, replica: &str, users: &[(UserId, u64)]) -> Result<u64, LedgerError> {
        let call = Call::new().key(key::hosted(replica));
        let call = users.iter().fold(call, |call, (user, found_us)| call.arg(user).arg(found_us));
        reply::unhosted(self.run(&script::UNHOST, call).await?)
    }

    async fn reap_replica(&self, replica: &str, claimed_ms: u64, grace: Duration) -> Result<u64, LedgerError> {
        // A session that began later shows that the replica lives after all.
        let before_us = claimed_ms.saturating_sub(whole_ms(REAP_CLAIM)) * 1000;
        let (mut ended, mut left_before) = (0, u64::MAX);
        while ended < REAP_USERS_MAX {
            let members = self.driver.oldest(&key::hosted(replica), PARALLEL).await?;
            let users: Vec<UserId> = members.iter().filter_map(|text| text.parse().ok()).collect();
            if users.is_empty() {
                let call = Call::new().key(key::DEAD).arg(replica).arg(claimed_ms);
                reply::dropped(&self.run(&script::DROP, call).await?)?;
                break;
            }
            let all = Departing::AllOf { replica, before_us };
            let mut gone = Vec::with_capacity(users.len());
            for (user, left) in
                users.iter().zip(join_all(users.iter().map(|user| self.depart(*user, all, grace))).await)
            {
                gone.push((*user, left?.found_us));
            }
            ended += gone.len();
            let left = self.unhost(replica, &gone).await?;
            if left >= left_before {
                break;
            }
            left_before = left;
        }
        tracing::info!(replica, users = ended, "ended the sessions of a replica that is gone");
        Ok(u64::try_from(ended).unwrap_or(u64::MAX))
    }
}
