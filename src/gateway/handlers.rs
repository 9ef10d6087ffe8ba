//! What each request does: ledger and stock are asked, the outcome becomes an answer. Decides nothing by itself.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::UNIX_EPOCH;

use serde_json::value::RawValue;
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};
use tracing::Instrument;

use super::actor::{Actor, Watching};
use super::limits::ROOMS_MAX;
use super::now;
use super::packet::Packet;
use super::pipe::Urgency;
use super::rooms::update;
use super::session::Answer;
use super::wire::{self, About, Code, Json, Name, Refusal, Request};
use crate::domain::{
    self, Availability, CategoryId, EventId, Kept, Lock, LockId, LockOutcome, LockRequest, LockStatus, Memento,
    Quantity, ReleaseOutcome, Releaser, RequestId,
};
use crate::inventory::StockError;
use crate::ledger::LedgerError;

/// Updates that a joiner is told in one go: a few kilobytes.
const UPDATES_AT_ONCE: usize = 32;

type Granted = Result<Json, Refusal>;

impl From<LedgerError> for Refusal {
    fn from(error: LedgerError) -> Self {
        tracing::debug!(%error, "the ledger gave no answer to a request");
        Self::new(Code::Unavailable)
    }
}

impl From<StockError> for Refusal {
    fn from(error: StockError) -> Self {
        match error {
            StockError::EventNotFound => Self::new(Code::EventNotFound),
            StockError::Unavailable(_) => Self::new(Code::InventoryUnavailable),
            StockError::Ledger(error) => error.into(),
        }
    }
}

/// Runs work that must not be dropped half-way: after `deadline` it is *unknown* what became of it, and it runs on in a
/// task of its own. Work whose deadline is over before its turn came is not begun.
async fn within<T: Send + 'static>(
    deadline: Instant,
    alarm: &mut Option<Pin<Box<Sleep>>>,
    work: impl Future<Output = Result<T, Refusal>> + Send + 'static,
) -> Result<T, Refusal> {
    if deadline <= Instant::now() {
        return Err(Refusal::new(Code::Unavailable));
    }
    let mut work = Box::pin(work.in_current_span());
    let alarm = alarm.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
    let result = poll_fn(|cx| {
        if let Poll::Ready(result) = work.as_mut().poll(cx) {
            return Poll::Ready(Some(result));
        }
        loop {
            ready!(alarm.as_mut().poll(cx));
            if alarm.deadline() >= deadline {
                return Poll::Ready(None);
            }
            alarm.as_mut().reset(deadline);
        }
    });
    if let Some(result) = result.await {
        return result;
    }
    tokio::spawn(work);
    Err(Refusal::new(Code::Unavailable))
}

/// What a refused lock is called.
fn refusal_of(outcome: &LockOutcome, per_event_max: Option<u32>) -> Refusal {
    match outcome {
        LockOutcome::Closed => Refusal::new(Code::EventClosed),
        LockOutcome::CategoryNotFound => Refusal::new(Code::CategoryNotFound),
        LockOutcome::AlreadyLocked { lock } => Refusal { lock: Some(*lock), ..Refusal::new(Code::AlreadyLocked) },
        LockOutcome::LimitExceeded { held } => match per_event_max {
            Some(most) => Refusal::saying(
                Code::LimitExceeded,
                format!("You cannot have more than {most} tickets of this event; you have {held}"),
            ),
            None => Refusal::new(Code::LimitExceeded),
        },
        LockOutcome::RateLimited { retry_after } => Refusal::later(*retry_after),
        LockOutcome::Insufficient { available } => Refusal::short(Code::InsufficientTickets, *available),
        LockOutcome::SoldOut => Refusal::short(Code::SoldOut, 0),
        LockOutcome::RequestEnded { lock } => Refusal {
            lock: Some(*lock),
            ..Refusal::saying(Code::LockNotFound, "This request was granted before and its lock has ended")
        },
        LockOutcome::RequestMismatch => {
            Refusal::saying(Code::InvalidRequest, "This requestId was used for another request")
        }
        // The stock never answers the first, and the others are no refusals.
        LockOutcome::StockUnknown | LockOutcome::Granted(_) | LockOutcome::GrantedBefore(_) => {
            Refusal::new(Code::InventoryUnavailable)
        }
    }
}

impl Actor {
    /// The answer to a request of a known name.
    pub(super) async fn respond(&mut self, name: Name, data: Option<&RawValue>) -> Answer {
        let (about, request) = wire::read(name, data, self.session.user, self.shared.options.max_per_lock);
        let granted = match request {
            Err(refusal) => Err(refusal),
            Ok(Request::Join(event) | Request::Lock { event, .. }) if !self.scope.admits(event) => {
                Err(Refusal::saying(Code::Unauthorized, "Unauthorized for this event"))
            }
            Ok(Request::Join(event)) => self.join(event).await,
            Ok(Request::Leave(event)) => Ok(self.leave(event)),
            Ok(Request::Lock { event, category, quantity, request }) => {
                self.lock(event, category, quantity, request).await
            }
            Ok(Request::UnlockCategory(event, category)) => self.unlock_category(event, category).await,
            Ok(Request::UnlockLock(lock)) => self.unlock(lock).await,
            Ok(Request::MyLocks) => self.my_locks().await,
            Ok(Request::Heartbeat) => Ok(wire::heartbeat(now())),
            Ok(Request::Refresh(token)) => self.refresh(&token).await,
        };
        match granted {
            Ok(data) => Answer::ok(name, data),
            Err(refusal) => {
                let about = match name {
                    Name::Lock => about,
                    Name::Join | Name::Leave => About { event: about.event, ..About::default() },
                    Name::Unlock | Name::MyLocks | Name::Heartbeat | Name::Refresh => About::default(),
                };
                Answer::refusal(Some(name), &refusal, &about)
            }
        }
    }

    /// What follows the answer to a joiner: the counts one by one, and to be in the room from then on.
    pub(super) async fn after(&mut self, (event, availability): (EventId, Vec<Availability>)) {
        let packets: Vec<_> = availability.iter().map(update).collect();
        for portion in packets.chunks(UPDATES_AT_ONCE) {
            let frames = Packet::frames(portion);
            self.patiently(|session| session.tell(&frames, portion, &[], Urgency::Owed).into()).await;
        }
        self.shared.rooms.join(event, &self.session);
        // Once more: what happened between the reading and the room is the joiner's too.
        if let Some(fanout) = self.shared.fanout.get() {
            fanout.observe(&availability);
        }
    }

    async fn join(&mut self, event: EventId) -> Granted {
        let shared = &self.shared;
        let Some(fanout) = shared.fanout.get().cloned() else { return Err(Refusal::new(Code::Unavailable)) };
        let new = !self.watched.contains_key(&event);
        if new && self.watched.len() >= ROOMS_MAX {
            let message = format!("One connection can watch at most {ROOMS_MAX} events");
            return Err(Refusal::saying(Code::LimitExceeded, message));
        }
        let (ledger, stock) = (Arc::clone(&shared.ledger), Arc::clone(&shared.stock));
        let user = self.session.user;
        let work = {
            let fanout = Arc::clone(&fanout);
            async move {
                // Subscribed before it is read: what changes in between is announced.
                let watching = if new { Some(Watching::begin(fanout, event).await?) } else { None };
                let availability: Vec<Availability> = stock.availability(event).await?;
                let locks: Vec<Lock> = ledger.locks_in(event, user).await?;
                Ok((watching, availability, locks))
            }
        };
        let (watching, availability, locks) = within(self.deadline, &mut self.alarm, work).await?;
        match watching {
            Some(watching) => drop(self.watched.insert(event, watching)),
            // A round that is under way may tell what was true before this reading.
            None => shared.rooms.part(event, &self.session),
        }
        fanout.observe(&availability);
        shared.keep.listed(user, &locks);
        let data = wire::joined(event, &availability, &locks);
        self.joined = Some((event, availability));
        Ok(data)
    }

    /// Leaves a room, as asked or because the token is no longer for it.
    pub(super) fn leave(&mut self, event: EventId) -> Json {
        self.shared.rooms.part(event, &self.session);
        self.watched.remove(&event);
        wire::left(event)
    }

    async fn lock(
        &mut self,
        event: EventId,
        category: CategoryId,
        quantity: Quantity,
        request: Option<RequestId>,
    ) -> Granted {
        // A lock of a session that the ledger does not know could outlive it.
        if self.generation().is_none() {
            self.settle_until(self.deadline).await;
        }
        let Some(generation) = self.generation() else { return Err(Refusal::new(Code::Unavailable)) };
        let (options, user, session) = (&self.shared.options, self.session.user, Some(self.session.id));
        let ttl = self.shared.hoard.life(user, options.lock_ttl, options.abandoner_ttl);
        let asked = LockRequest {
            lock: LockId::generate(event),
            user,
            category,
            quantity,
            request: request.clone(),
            session,
            generation,
            ttl,
            stock_age_max: options.stock_age_max,
            per_event_max: options.max_per_event,
            rate: options.rate,
        };
        let stock = Arc::clone(&self.shared.stock);
        let outcome =
            within(self.deadline, &mut self.alarm, async move { stock.lock(asked).await.map_err(Refusal::from) })
                .await?;
        match outcome {
            LockOutcome::Granted(grant) | LockOutcome::GrantedBefore(grant) => {
                let answer = wire::granted(&grant, category, quantity, request.as_ref());
                let (lock, created_at, deadline, kept) = (grant.lock, grant.now, grant.deadline, Kept::Attended);
                let memento = Memento { lock, category, quantity, created_at, deadline, kept, request, session };
                self.shared.keep.granted(user, memento);
                self.shared.hoard.granted(user, lock, ttl);
                Ok(answer)
            }
            LockOutcome::Closed
            | LockOutcome::CategoryNotFound
            | LockOutcome::AlreadyLocked { .. }
            | LockOutcome::LimitExceeded { .. }
            | LockOutcome::RateLimited { .. }
            | LockOutcome::Insufficient { .. }
            | LockOutcome::SoldOut
            | LockOutcome::RequestEnded { .. }
            | LockOutcome::RequestMismatch
            | LockOutcome::StockUnknown => Err(refusal_of(&outcome, options.max_per_event)),
        }
    }

    async fn unlock_category(&mut self, event: EventId, category: CategoryId) -> Granted {
        let (ledger, user) = (Arc::clone(&self.shared.ledger), self.session.user);
        let by = Releaser::Owner { user, session: Some(self.session.id) };
        let released = within(self.deadline, &mut self.alarm, async move {
            let locks = ledger.locks_in(event, user).await?;
            let held = locks.iter().find(|lock| lock.category == category && lock.status == LockStatus::Active);
            let Some(held) = held else { return Err(Refusal::new(Code::LockNotFound)) };
            Ok((held.id, ledger.release(held.id, by).await?))
        });
        let (lock, outcome) = released.await?;
        self.given_back(lock, &outcome)
    }

    async fn unlock(&mut self, lock: LockId) -> Granted {
        let ledger = Arc::clone(&self.shared.ledger);
        let by = Releaser::Owner { user: self.session.user, session: Some(self.session.id) };
        let released = async move { ledger.release(lock, by).await.map_err(Refusal::from) };
        let outcome = within(self.deadline, &mut self.alarm, released).await?;
        self.given_back(lock, &outcome)
    }

    fn given_back(&self, lock: LockId, outcome: &ReleaseOutcome) -> Granted {
        let answer = given_back(lock, outcome);
        // Another user's lock is not among those that are remembered of this one.
        self.shared.keep.ended(self.session.user, lock);
        if answer.is_ok() {
            // The message that says so comes only where the user has other sockets.
            self.shared.hoard.given_back(lock);
        }
        answer
    }

    async fn my_locks(&mut self) -> Granted {
        let (ledger, user) = (Arc::clone(&self.shared.ledger), self.session.user);
        let read = async move { ledger.locks_of(user).await.map_err(Refusal::from) };
        let locks = within(self.deadline, &mut self.alarm, read).await?;
        self.shared.keep.listed(user, &locks);
        Ok(wire::my_locks(&locks))
    }

    async fn refresh(&mut self, token: &str) -> Granted {
        let verifying = self.shared.verifier.verify(token);
        let claims = match timeout_at(self.deadline, verifying).await {
            Ok(Ok(claims)) => claims,
            Ok(Err(error)) => {
                tracing::debug!(%error, "a renewed token was not accepted");
                return Err(Refusal::new(Code::from(error)));
            }
            Err(_) => return Err(Refusal::new(Code::Unavailable)),
        };
        if claims.user != self.session.user {
            return Err(Refusal::new(Code::Unauthorized));
        }
        let expires_at = claims.expires_at;
        self.renew(claims);
        let expires = expires_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(wire::refreshed(domain::Instant::from_ms(expires.as_millis().try_into().unwrap_or(u64::MAX))))
    }
}

/// A repeat is as good as the first: the tickets are back. Whose lock it is or was is told to its owner only.
fn given_back(lock: LockId, outcome: &ReleaseOutcome) -> Granted {
    match outcome {
        ReleaseOutcome::Released(_) | ReleaseOutcome::AlreadyReleased(_) => Ok(wire::unlocked(lock)),
        ReleaseOutcome::ReleasedByOther
        | ReleaseOutcome::Confirmed
        | ReleaseOutcome::WrongUser
        | ReleaseOutcome::Expired
        | ReleaseOutcome::NotFound => Err(Refusal::new(Code::LockNotFound)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[test]
    fn every_refusal_of_a_lock_has_its_code_and_text() {
        let lock = LockId::generate(EventId::new(1).unwrap());
        for (outcome, code, message) in [
            (LockOutcome::Closed, Code::EventClosed, "Ticket sales are closed"),
            (LockOutcome::CategoryNotFound, Code::CategoryNotFound, "Ticket category not found"),
            (
                LockOutcome::AlreadyLocked { lock },
                Code::AlreadyLocked,
                "You already have tickets locked for this category",
            ),
            (
                LockOutcome::LimitExceeded { held: 3 },
                Code::LimitExceeded,
                "You cannot have more than 4 tickets of this event; you have 3",
            ),
            (LockOutcome::Insufficient { available: 3 }, Code::InsufficientTickets, "Only 3 tickets available"),
            (LockOutcome::SoldOut, Code::SoldOut, "Only 0 tickets available"),
            (LockOutcome::StockUnknown, Code::InventoryUnavailable, "Failed to verify ticket availability"),
            (
                LockOutcome::RequestEnded { lock },
                Code::LockNotFound,
                "This request was granted before and its lock has ended",
            ),
            (LockOutcome::RequestMismatch, Code::InvalidRequest, "This requestId was used for another request"),
        ] {
            let refusal = refusal_of(&outcome, Some(4));
            assert_eq!((refusal.code, refusal.message.as_ref()), (code, message), "{outcome:?}");
        }
        let limited = refusal_of(&LockOutcome::RateLimited { retry_after: Duration::from_millis(70) }, None);
        assert_eq!(limited.retry_after, Some(Duration::from_millis(70)));
    }

    #[test]
    fn a_lock_that_is_another_users_looks_like_none() {
        let lock = LockId::generate(EventId::new(1).unwrap());
        let foreign = given_back(lock, &ReleaseOutcome::WrongUser).unwrap_err();
        assert_eq!(foreign, given_back(lock, &ReleaseOutcome::NotFound).unwrap_err());
        assert_eq!(foreign.message, "No tickets found to unlock");
    }

    #[tokio::test]
    async fn work_that_takes_too_long_is_unknown_and_runs_on() {
        let (done, finished) = tokio::sync::oneshot::channel();
        let work = async move {
            tokio::time::sleep(Duration::from_millis(60)).await;
            done.send(()).ok();
            Ok(())
        };
        let refusal = within(Instant::now() + Duration::from_millis(5), &mut None, work).await.unwrap_err();
        assert_eq!(refusal.code, Code::Unavailable);
        timeout(Duration::from_secs(5), finished).await.unwrap().unwrap();
    }

    /// Set for one piece of work, it serves the next ones: each has its own deadline all the same.
    #[tokio::test]
    async fn an_alarm_that_was_set_for_earlier_work_ends_nothing_too_soon_and_nothing_too_late() {
        let work = async |takes: u64| {
            tokio::time::sleep(Duration::from_millis(takes)).await;
            Ok(())
        };
        let mut alarm = None;
        let began = Instant::now();
        assert_eq!(within(began + Duration::from_millis(20), &mut alarm, work(1)).await, Ok(()));
        assert_eq!(within(began + Duration::from_mins(1), &mut alarm, work(60)).await, Ok(()));
        assert_eq!(alarm.as_ref().map(|alarm| alarm.deadline()), Some(began + Duration::from_mins(1)));
        let mut alarm = Some(Box::pin(sleep_until(began)));
        let refusal = within(began + Duration::from_millis(150), &mut alarm, work(60_000)).await.unwrap_err();
        assert_eq!(refusal.code, Code::Unavailable);
        assert!((150..30_000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn work_whose_time_is_over_is_not_begun() {
        let (begun, heard) = tokio::sync::oneshot::channel::<()>();
        let work = async move {
            begun.send(()).ok();
            Ok(())
        };
        let refusal = within(Instant::now(), &mut None, work).await.unwrap_err();
        assert_eq!(refusal.code, Code::Unavailable);
        assert!(heard.await.is_err(), "dropped, not run");
    }
}
