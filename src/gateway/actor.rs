//! The one task of a socket: it handles messages in the order in which they were sent, keeps the session's standing with
//! the ledger and with its token, and ends what the session began.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use futures_util::FutureExt as _;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout, timeout_at};
use tracing::Instrument as _;

use super::auth::{Claims, Scope};
use super::queue::{self, Taken};
use super::session::{Answer, Ending, Incoming, Sent, Session};
use super::wire::{self, About, Code, Json, Name, Refusal};
use super::{Drain, Shared, Word};
use crate::domain::{
    self, Availability, EventId, Kept, Lock, LockStatus, Personal, ReleaseReason, Releaser, RestoreOutcome,
    RestoreRequest, SessionId, UserId,
};
use crate::fanout::Fanout;
use crate::inventory::StockError;
use crate::ledger::{LedgerError, Presence};
use crate::{metrics, telemetry};

/// Between two tries to put an answer into a full send buffer.
const SEND_RETRY: Duration = Duration::from_millis(50);

/// Between two tries to enter a session into a ledger that does not answer, doubling up to the longest.
const ENTER_RETRY: Duration = Duration::from_millis(250);
const ENTER_RETRY_MAX: Duration = Duration::from_secs(4);

/// How long a leaving session tries to tell the ledger before that is left to a small task.
const LEAVE_FOR: Duration = Duration::from_secs(15);
/// How often that tries again.
const OWED_RETRY: Duration = Duration::from_secs(5);

/// Timers are set at most this far ahead; a token that lives longer is looked at again then.
const TIMER_MAX: Duration = Duration::from_hours(24);

/// Counts a socket as a watcher of an event until dropped.
#[derive(Debug)]
pub(super) struct Watching {
    fanout: Arc<Fanout>,
    event: EventId,
}

impl Watching {
    /// Returns when the event's notices arrive.
    pub async fn begin(fanout: Arc<Fanout>, event: EventId) -> Result<Self, LedgerError> {
        fanout.watch(event).await?;
        Ok(Self { fanout, event })
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.fanout.unwatch(self.event);
    }
}

/// Counts a socket as a listener of its user's messages until dropped.
#[derive(Debug)]
struct Listening {
    fanout: Arc<Fanout>,
    user: UserId,
}

impl Listening {
    async fn begin(fanout: Arc<Fanout>, user: UserId) -> Result<Self, LedgerError> {
        fanout.listen(user).await?;
        Ok(Self { fanout, user })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.fanout.unlisten(self.user);
    }
}

/// How a session stands with the ledger.
enum Standing {
    /// Not asked yet, or the last try failed.
    Out {
        /// When to try again.
        at: Instant,
        /// How long to wait after the next failure.
        pause: Duration,
    },
    /// Asked; no answer yet.
    Entering(JoinHandle<Entered>, Duration),
    /// The ledger knows the session.
    In,
}

/// The user's messages arrive, if they did not before; the ledger knows the session.
type Entered = Result<(Option<Listening>, Presence), StockError>;

/// How a session stands with its token.
enum Token {
    /// Good until then; when that is looked at again.
    Good(SystemTime, Instant),
    /// Ran out; the connection closes then.
    Expired(Instant),
}

impl Token {
    fn good(until: SystemTime) -> Self {
        let left = until.duration_since(SystemTime::now()).unwrap_or_default();
        Self::Good(until, Instant::now() + left.min(TIMER_MAX))
    }
}

/// The task of one socket.
pub(super) struct Actor {
    pub shared: Arc<Shared>,
    pub session: Arc<Session>,
    inbox: queue::Receiver<Incoming>,
    post: queue::Receiver<(&'static str, Json)>,
    standing: Standing,
    listening: Option<Listening>,
    /// The client has been told that it is connected.
    greeted: bool,
    word: watch::Receiver<Word>,
    /// The doubts that the entry under way began with, and the last ones that an entry has put to rest.
    doubt: u64,
    rested: u64,
    /// The generation of the last entry, and how often the ledger had perhaps lost sessions when that began.
    vouched: Option<(u64, u64)>,
    losses: u64,
    /// What was told of orders up to then, other sessions have shown; `None` until an entry was tried.
    missed_from: Option<domain::Instant>,
    token: Token,
    /// The events that the token is for.
    pub scope: Scope,
    pub watched: HashMap<EventId, Watching>,
    /// Set while a join is answered: what the joiner gets next.
    pub joined: Option<(EventId, Vec<Availability>)>,
    /// When the message in work must be answered.
    pub deadline: Instant,
    /// Says that it has not been. Set for an earlier message it rings too early, and is set anew then: requests follow each
    /// other faster than their deadlines come, and to set a timer and take it back costs more than all else it is for.
    pub alarm: Option<Pin<Box<Sleep>>>,
    moving: Moving,
    /// The trace that the client says it belongs to, as it says so.
    trace: Option<Box<telemetry::Trace>>,
}

/// How a session stands with a drain of its replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moving {
    /// There is none.
    No,
    /// It goes on as before until its turn comes.
    At(Instant),
    /// What is in the inbox is still answered, nothing more is taken.
    Now,
}

impl Actor {
    /// The task of a session that has not begun.
    pub fn new(
        shared: Arc<Shared>,
        session: Arc<Session>,
        claims: Claims,
        inbox: queue::Receiver<Incoming>,
        post: queue::Receiver<(&'static str, Json)>,
    ) -> Self {
        let mut word = shared.word.subscribe();
        // A drain may have begun before.
        word.mark_changed();
        let rested = word.borrow().doubts;
        Self {
            word,
            doubt: rested,
            rested,
            vouched: None,
            losses: 0,
            missed_from: None,
            shared,
            session,
            inbox,
            post,
            standing: Standing::Out { at: Instant::now(), pause: ENTER_RETRY },
            listening: None,
            greeted: false,
            token: Token::good(claims.expires_at),
            scope: claims.scope,
            watched: HashMap::new(),
            joined: None,
            deadline: Instant::now(),
            alarm: None,
            moving: Moving::No,
            trace: None,
        }
    }

    /// Notes which trace the client says it belongs to.
    pub fn belongs_to(&mut self, trace: Box<telemetry::Trace>) {
        self.trace = Some(trace);
    }

    /// Lives until the session is over and the ledger knows it.
    pub async fn live(mut self) {
        if AssertUnwindSafe(self.work()).catch_unwind().await.is_err() {
            self.shared.end(&self.session, Ending::Fault);
        }
        Box::pin(self.finish()).await;
    }

    async fn work(&mut self) {
        self.enter().await;
        let mut timer = Box::pin(sleep_until(self.wake_at()));
        let session = Arc::clone(&self.session);
        loop {
            if session.is_over.load(Ordering::Acquire) || self.heeds_an_end() {
                return;
            }
            let wake = self.wake_at();
            if wake <= Instant::now() {
                self.tick().await;
                continue;
            }
            if let Standing::Entering(task, _) = &self.standing
                && task.is_finished()
            {
                let entered = Self::entered(&mut self.standing).await;
                self.settle(entered).await;
                continue;
            }
            if let Taken::Item((name, data)) = self.post.try_recv() {
                self.patiently(|session| session.emit(name, &data)).await;
                continue;
            }
            match self.inbox.try_recv() {
                Taken::Item(message) => {
                    self.handle(message).await;
                    continue;
                }
                Taken::Nothing => {}
                Taken::Closed => {
                    if self.moving == Moving::Now {
                        self.shared.end(&self.session, Ending::Drain);
                    }
                    return;
                }
            }
            if timer.deadline() != wake {
                timer.as_mut().reset(wake);
            }
            tokio::select! {
                biased;
                () = session.stir.notified() => {}
                () = timer.as_mut() => {}
                entered = Self::entered(&mut self.standing) => self.settle(entered).await,
            }
        }
    }

    /// Looks at what all sessions were told since it looked last; true when this one is to end.
    fn heeds_an_end(&mut self) -> bool {
        // The sender lives as long as the gateway.
        if !self.word.has_changed().unwrap_or(false) {
            return false;
        }
        match self.word.borrow_and_update().drain {
            Drain::No => {}
            Drain::InTurn => {
                if self.moving == Moving::No {
                    self.moving = Moving::At(self.shared.turn());
                }
            }
            Drain::AtOnce => {
                self.shared.end(&self.session, Ending::Drain);
                return true;
            }
        }
        if matches!(self.standing, Standing::In) && self.doubts_itself() {
            self.standing = Standing::Out { at: Instant::now(), pause: ENTER_RETRY };
        }
        false
    }

    /// What the last entry said may not be so any more.
    fn doubts_itself(&self) -> bool {
        self.word.borrow().doubts > self.rested
    }

    /// When something is due by itself.
    fn wake_at(&self) -> Instant {
        let (Token::Good(_, token) | Token::Expired(token)) = self.token;
        let own = match self.moving {
            Moving::At(turn) => turn.min(token),
            Moving::No | Moving::Now => token,
        };
        match self.standing {
            Standing::Out { at, .. } => at.min(own),
            Standing::Entering(..) | Standing::In => own,
        }
    }

    async fn tick(&mut self) {
        if let Moving::At(turn) = self.moving
            && turn <= Instant::now()
        {
            self.moving = Moving::Now;
            self.inbox.close();
        }
        match self.token {
            Token::Good(until, _) if until <= SystemTime::now() => {
                self.token = Token::Expired(Instant::now() + self.shared.options.token_grace);
                let answer = Answer::refusal(None, &Refusal::new(Code::TokenExpired), &About::default());
                self.patiently(|session| session.answer(&answer, None)).await;
            }
            Token::Expired(closes) if closes <= Instant::now() => {
                self.shared.end(&self.session, Ending::Token);
                return;
            }
            Token::Good(until, at) if at <= Instant::now() => self.token = Token::good(until),
            Token::Good(..) | Token::Expired(_) => {}
        }
        if let Standing::Out { at, .. } = self.standing
            && at <= Instant::now()
        {
            self.enter().await;
        }
    }

    /// Takes a new token of the same user. Rooms that it is not for are left, and the client is told which.
    pub fn renew(&mut self, claims: Claims) {
        self.token = Token::good(claims.expires_at);
        self.scope = claims.scope;
        let lost: Vec<_> = self.watched.keys().copied().filter(|&event| !self.scope.admits(event)).collect();
        for event in lost {
            let left = self.leave(event);
            self.session.deliver(Name::Leave.answer(), &left);
        }
    }

    /// The presence generation of the session's last entry, as long as the ledger knows of that for all that is known here.
    /// Messages that may have been missed are no reason to keep anybody waiting.
    pub fn generation(&self) -> Option<u64> {
        let (generation, losses) = self.vouched?;
        let stands = matches!(self.standing, Standing::In) || losses == self.word.borrow().losses;
        stands.then_some(generation)
    }

    /// Tells the ledger that the session is here, and the client what it has. The first time it waits for half as long as
    /// a request may, so that the greeting comes first; what the client asks meanwhile has its own deadline.
    async fn enter(&mut self) {
        let Standing::Out { pause, .. } = self.standing else { return };
        let Some(fanout) = self.shared.fanout.get().cloned() else {
            self.standing = Standing::Out { at: Instant::now() + pause, pause };
            return;
        };
        let (shared, user, id) = (Arc::clone(&self.shared), self.session.user, self.session.id);
        let word = *self.word.borrow();
        (self.doubt, self.losses) = (word.doubts, word.losses);
        let (listen, doubted) = (self.listening.is_none(), self.doubt != self.rested);
        let task = tokio::spawn(async move {
            // The semaphore is never closed.
            let _permit = shared.entering.acquire().await.ok();
            let listening = if listen { Some(Listening::begin(fanout, user).await?) } else { None };
            let presence = shared.ledger.enter(user, id).await?;
            if doubted {
                shared.hand_back(user, &presence).await?;
            }
            Ok((listening, presence))
        });
        self.standing = Standing::Entering(task, pause);
        if !self.greeted {
            self.settle_until(Instant::now() + self.shared.options.request_timeout / 2).await;
        }
    }

    /// Waits for the answer to an entry that is under way, if one is.
    pub async fn settle_until(&mut self, deadline: Instant) {
        if let Standing::Entering(..) = self.standing
            && let Ok(entered) = timeout_at(deadline, Self::entered(&mut self.standing)).await
        {
            self.settle(entered).await;
        }
    }

    /// Waits for the answer to an entry that is under way; for ever if none is.
    async fn entered(standing: &mut Standing) -> Option<(Option<Listening>, Presence)> {
        match standing {
            Standing::Entering(task, _) => match task.await {
                Ok(Ok(entered)) => Some(entered),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a session could not be entered");
                    None
                }
                Err(_) => None,
            },
            Standing::Out { .. } | Standing::In => std::future::pending().await,
        }
    }

    async fn settle(&mut self, entered: Option<(Option<Listening>, Presence)>) {
        let Some((listening, presence)) = entered else {
            let pause = match self.standing {
                Standing::Entering(_, pause) => pause,
                Standing::Out { .. } | Standing::In => ENTER_RETRY,
            };
            self.standing = Standing::Out { at: Instant::now() + pause, pause: (pause * 2).min(ENTER_RETRY_MAX) };
            // Only the answer may be lost: what the ledger says next takes this session for one that has shown all.
            self.missed_from.get_or_insert(domain::Instant::from_ms(0));
            return;
        };
        self.standing = Standing::In;
        self.vouched = Some((presence.generation, self.losses));
        self.listening = listening.or(self.listening.take());
        self.rested = self.doubt;
        if self.doubts_itself() {
            // Doubted while it was under way: it proves nothing.
            self.standing = Standing::Out { at: Instant::now(), pause: ENTER_RETRY };
        }
        self.shared.keep.listed(self.session.user, &presence.locks);
        if !std::mem::replace(&mut self.greeted, true) {
            let data = wire::connected(self.session.id, self.session.user, presence.now, &presence.locks);
            self.patiently(|session| session.emit("connected", &data)).await;
        }
        let missed = self.missed(&presence);
        if !missed.is_empty() {
            Box::pin(self.retell(missed)).await;
        }
    }

    /// What the client may not have been told: of orders, and that deadlines are near.
    fn missed(&mut self, presence: &Presence) -> Vec<Personal> {
        let from = *self.missed_from.get_or_insert(presence.seen_until);
        let orders = presence.told.iter().filter(|told| told.at > from).map(|told| told.message.clone());
        let left = |lock: &Lock| Duration::from_millis(lock.deadline.as_ms().saturating_sub(presence.now.as_ms()));
        let near = |lock: &&Lock| {
            left(lock) <= self.shared.options.expiry_warning && !self.shared.keep.has_ended(lock.user, lock.id)
        };
        let warning =
            |lock: &Lock| Personal::Expiring { lock: lock.id, deadline: lock.deadline, remaining: left(lock) };
        orders.chain(presence.locks.iter().filter(near).map(warning)).collect()
    }

    /// Tells what the client has not been told yet.
    async fn retell(&self, missed: Vec<Personal>) {
        for message in missed {
            if let Some((name, data)) = wire::personal(&message)
                && self.session.heard.is_news(&message)
            {
                self.shared.keep.heard(self.session.user, &message);
                metrics::GATEWAY_PUSHES.count(&["again"]);
                self.patiently(|session| session.emit(name, &data)).await;
            }
        }
    }

    /// What a message needs while it is worked on is boxed, here and below: an idle socket is not to have room for it.
    async fn handle(&mut self, message: Incoming) {
        if self.inbox.is_empty() {
            self.session.forgive();
        }
        self.deadline = message.at + self.shared.options.request_timeout;
        match telemetry::from_socket(self.trace.as_deref()) {
            None => {
                self.reply(&message).await;
            }
            Some((span, request)) => {
                let replied = async {
                    let (name, answer) = self.reply(&message).await;
                    request.ends(name, answer.outcome, answer.failed());
                };
                Box::pin(replied.instrument(span)).await;
            }
        }
        if let Some(joined) = self.joined.take() {
            Box::pin(self.after(joined)).await;
        }
    }

    /// Answers a message, and says how, after its name.
    async fn reply(&mut self, message: &Incoming) -> (&'static str, Answer) {
        let (name, answer) = match wire::split(&message.text) {
            None => (None, Answer::unknown("")),
            Some((text, data)) => match Name::parse(&text) {
                None => (None, Answer::unknown(&text)),
                Some(name) => (Some(name), Box::pin(self.respond(name, data)).await),
            },
        };
        let label = name.map_or("unknown", Name::as_str);
        metrics::GATEWAY_MESSAGES.count(&[label]);
        answer.count(name);
        let took = message.at.elapsed();
        metrics::GATEWAY_ANSWER_SECONDS.observe(&[label], took);
        tracing::debug!(name = label, outcome = answer.outcome, ms = took.as_secs_f64() * 1000.0, "answered");
        self.patiently(|session| session.answer(&answer, message.ack)).await;
        (label, answer)
    }

    /// Sends something that must not be lost: waits while the send buffer is full, and closes the connection of a
    /// client that takes nothing for `slow_client`.
    pub async fn patiently(&self, send: impl Fn(&Session) -> Sent) {
        if send(&self.session) == Sent::Full {
            Box::pin(self.insist(send)).await;
        }
    }

    async fn insist(&self, send: impl Fn(&Session) -> Sent) {
        let patience = Instant::now() + self.shared.options.slow_client;
        loop {
            metrics::GATEWAY_FULL.count(&[]);
            if Instant::now() >= patience {
                metrics::GATEWAY_DROPPED.count(&["answer"]);
                self.shared.end(&self.session, Ending::Slow);
                return;
            }
            tokio::select! {
                () = sleep(SEND_RETRY) => {}
                () = self.session.over.cancelled() => return,
                () = self.shared.impatient.cancelled() => return,
            }
            if send(&self.session) != Sent::Full {
                return;
            }
        }
    }

    /// Ends what the session began. The ledger is told last and as long as it takes.
    async fn finish(mut self) {
        self.shared.forget(&self.session);
        self.watched.clear();
        match std::mem::replace(&mut self.standing, Standing::Out { at: Instant::now(), pause: ENTER_RETRY }) {
            // An entry that the ledger sees after the leaving would stand for ever.
            Standing::Entering(mut task, _) => {
                if timeout(LEAVE_FOR, &mut task).await.is_err() {
                    task.abort();
                }
            }
            Standing::Out { .. } | Standing::In => {}
        }
        let drains = self.shared.draining.is_cancelled();
        let options = &self.shared.options;
        let grace = if drains { options.drain_grace } else { options.disconnect_grace };
        let give_up = Instant::now() + LEAVE_FOR;
        let mut pause = ENTER_RETRY;
        loop {
            let left = match self.shared.leaving.acquire().await {
                Ok(_permit) => self.shared.ledger.leave(self.session.user, self.session.id, grace).await,
                Err(_) => return,
            };
            let Err(error) = left else {
                metrics::GATEWAY_LEAVES.count(&["left"]);
                return;
            };
            if Instant::now() + pause >= give_up {
                tracing::debug!(%error, "the ledger could not be told yet that a session ended");
                return self.shared.owe(self.session.user, self.session.id, grace);
            }
            metrics::GATEWAY_LEAVES.count(&["retried"]);
            sleep(pause).await;
            pause = (pause * 2).min(ENTER_RETRY_MAX);
        }
    }
}

impl Shared {
    /// Goes on telling the ledger that a session ended for as long as it takes: one that stood there for ever would keep
    /// the user's later locks from being abandoned.
    fn owe(self: &Arc<Self>, user: UserId, session: SessionId, grace: Duration) {
        let Ok(place) = Arc::clone(&self.owed).try_acquire_owned() else {
            metrics::GATEWAY_LEAVES.count(&["given_up"]);
            tracing::warn!(%user, "the ledger cannot be told that a session ended; the user's locks live to their deadlines");
            return;
        };
        let shared = Arc::clone(self);
        self.tasks.spawn(async move {
            let _place = place;
            loop {
                tokio::select! {
                    () = sleep(OWED_RETRY) => {}
                    // Who finds this replica's lease run out ends its sessions.
                    () = shared.impatient.cancelled() => return,
                }
                let Ok(_permit) = shared.leaving.acquire().await else { return };
                let left = shared.ledger.leave(user, session, grace).await;
                metrics::GATEWAY_LEAVES.count(&[if left.is_ok() { "left" } else { "retried" }]);
                if left.is_ok() {
                    return;
                }
            }
        });
    }

    /// Hands what is remembered of a user's locks back to a ledger that may have lost them. The owner is told of what
    /// cannot be had back.
    async fn hand_back(&self, user: UserId, presence: &Presence) -> Result<(), StockError> {
        for memento in self.keep.of(user) {
            let (id, category, quantity, kept) =
                (memento.lock, memento.category, memento.quantity, memento.kept.clone());
            if presence.locks.iter().any(|lock| lock.id == id) {
                // An older copy of the data may not know of the sale yet.
                if let Kept::Confirmed { order } = &kept {
                    self.ledger.confirm(id, Some(user), order.as_ref()).await?;
                }
                continue;
            }
            if self.keep.has_ended(user, id) {
                continue;
            }
            let (generation, stock_age_max) = (presence.generation, self.options.stock_age_max);
            let asked = RestoreRequest { user, memento, generation, stock_age_max };
            let outcome = match self.stock.restore(asked).await {
                Ok(outcome) => outcome,
                Err(StockError::EventNotFound) => RestoreOutcome::NoRoom,
                Err(error) => return Err(error),
            };
            metrics::LEDGER_RESTORED.count(&[outcome.as_str()]);
            tracing::debug!(%user, lock = %id, outcome = outcome.as_str(), "handed back");
            // The user's messages went by pub/sub, and that was gone too: the sockets here are told from here.
            let end = match outcome {
                RestoreOutcome::Restored => {
                    // Its owner, who gave it back meanwhile, was told that it is gone.
                    if !matches!(kept, Kept::Confirmed { .. }) && self.keep.has_ended(user, id) {
                        self.ledger.release(id, Releaser::Owner { user, session: None }).await?;
                    }
                    continue;
                }
                RestoreOutcome::Known => self.ledger.find(id).await?.map(|lock| lock.status),
                RestoreOutcome::Expired | RestoreOutcome::NoRoom | RestoreOutcome::StockUnknown => {
                    Some(LockStatus::Expired)
                }
            };
            let reason = ReleaseReason::Released;
            let message = match (kept, end) {
                // The sale is not settled, as far as is known here, and can still be lost.
                (Kept::Confirmed { .. }, Some(LockStatus::Confirmed)) => continue,
                (Kept::Confirmed { .. }, _) | (_, Some(LockStatus::Confirmed) | None) => None,
                // It began after the session entered: nothing is lost.
                (_, Some(LockStatus::Active)) => continue,
                (_, Some(LockStatus::Expired)) => Some(Personal::Expired { lock: id, category, quantity }),
                (_, Some(LockStatus::Released)) => {
                    Some(Personal::Released { lock: id, category, quantity, reason, by: None })
                }
            };
            if self.keep.ended(user, id)
                && let Some(message) = message
            {
                self.tell_user(user, &message);
            }
        }
        Ok(())
    }
}
