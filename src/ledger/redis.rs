//! The ledger of a fleet: TTL keys in Redis, one script for each transition.

mod presence;

use std::fmt::{Display, from_fn};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::future::join_all;
use tokio::sync::mpsc;

use super::call::Call;
use super::driver::{Delivery, Driver, DriverOptions, Witness};
use super::lone::Lone;
use super::notice::{read_change, read_expired, read_personal};
use super::recent::Recent;
use super::reply::{self, OrderReply, Parts};
use super::script::{self, Script};
use super::{FEED_LEN_MAX, FeedItem, Footing, Ledger, LedgerError, LedgerOptions, Presence, Swept, Topic, ends, key};
use crate::domain::{
    AcceptOutcome, AskOutcome, Availability, CategoryId, ConfirmOutcome, EventId, FleetStats, Kept, Lock, LockId,
    LockOutcome, LockRequest, OrderId, OrderOutcome, OrderReport, OrderResult, Personal, Quantity, RateLimit,
    ReleaseOutcome, Releaser, ReplicaId, ReplicaReport, RestoreOutcome, RestoreRequest, SessionId, Snapshot,
    SnapshotNumber, UserId, ValidateOutcome, ValidateRequest, whole_ms,
};
use crate::{metrics, telemetry};

/// A replica whose lease was not renewed for so long is dead. Five beats.
const LEASE: Duration = Duration::from_secs(5);

/// How many events one sweep claims, and for how long other replicas leave them alone.
const SWEEP_EVENTS_MAX: usize = 64;
const CLAIM: Duration = Duration::from_secs(1);

/// A lock that is due sooner is announced to the sweep by a touch of its own: twice the time between two looks that
/// `lua/plan.lua` plans after a touch.
const UNTOUCHED_DUE_MIN: Duration = Duration::from_secs(10);

/// After Redis came back without its data: no new lock is granted for so long, so that those who had locks come first.
/// Replicas are connected and notice within about two seconds, and restore at thousands of locks a second.
const RESTORE_WINDOW: Duration = Duration::from_secs(5);

/// How many events are read for the statistics. Beyond it the least recently touched are left out.
const STATS_EVENTS_MAX: usize = 10_000;

/// The longest time that scripts are told in microseconds: added to the time of day it is still a whole number in Lua.
const WHOLE_US_MAX: u64 = 1 << 52;

/// How many calls are on their way at once for one such answer.
const PARALLEL: usize = 64;

/// How to reach Redis.
#[derive(Clone)]
pub struct RedisOptions {
    /// `redis://`, `rediss://`, `redis-sentinel://`, `redis-cluster://` or `unix:`; may hold a password.
    pub url: String,
    /// The certificates that TLS trusts, a PEM file; without it those of the system.
    pub ca_file: Option<PathBuf>,
    /// This process.
    pub replica: ReplicaId,
    /// The limit of one round trip.
    pub timeout: Duration,
    /// How many Redis replicas must have a grant before it is answered; 0 does not wait.
    pub wait: u32,
    /// Where scripts read the time.
    pub clock: RedisClock,
}

/// What makes it impossible to connect at all. Never repeats the URL, which may hold a password.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RedisSettingError {
    /// The URL is not one of Redis.
    #[error("the Redis client cannot read this URL")]
    Url,
    /// The file of trusted certificates.
    #[error("{}: {why}", file.display())]
    CaFile {
        /// Which.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The folder of the stepped clock's scripts; says what the system said.
    #[error("the scripts of the stepped clock: {0}")]
    Scripts(String),
}

/// Where scripts read the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RedisClock {
    /// From the server's `TIME`.
    #[default]
    Server,
    /// From the list `test:clock`, seconds and microseconds, so that tests can step it. Never in production: two
    /// replicas that disagree about the clock disagree about deadlines.
    Stepped {
        /// Where the scripts' texts are read from instead of the compiled-in ones, so that tests can run changed ones.
        scripts: Option<&'static Path>,
    },
}

/// See the module.
pub struct RedisLedger {
    driver: Arc<Driver>,
    options: LedgerOptions,
    replica: ReplicaId,
    wait: u32,
    /// How long Redis replicas have to receive a grant: half a round trip's limit, so that the answer comes in time.
    wait_within: Duration,
    feed: Mutex<Option<mpsc::Receiver<FeedItem>>>,
    known: Mutex<Known>,
    lone: Arc<Lone>,
    /// Index entries written a moment ago; none on a stepped clock, whose moments are not this machine's.
    touched: Option<Recent<(EventId, Duration)>>,
    visited: Option<Recent<(UserId, EventId)>>,
}

/// What the last beat told.
#[derive(Default)]
struct Known {
    /// Users and sockets of the living replicas.
    fleet: Vec<(u64, u64)>,
    /// The data's own name.
    epoch: Option<String>,
    /// Connections to Redis that had been made before it.
    connections: u64,
    /// Until when those who had locks come first.
    restoring: Option<Instant>,
}

impl RedisLedger {
    /// A ledger that connects in the background; calls fail within the timeout until it has.
    ///
    /// # Errors
    /// When the URL is not one, or the file of trusted certificates cannot be used.
    pub fn connect(redis: &RedisOptions, options: LedgerOptions) -> Result<Self, RedisSettingError> {
        let lone = Arc::new(Lone::default());
        let (driver, deliveries) = Driver::connect(DriverOptions {
            url: redis.url.clone(),
            ca_file: redis.ca_file.clone(),
            timeout: redis.timeout,
            clock: redis.clock,
            probe: format!("{}{}", key::PROBE_CHANNEL, redis.replica),
            is_known: {
                let lone = Arc::clone(&lone);
                Box::new(move |channel, text| lone.knows(channel, text))
            },
        })?;
        let (sender, feed) = mpsc::channel(FEED_LEN_MAX);
        tokio::spawn(read_deliveries(Arc::downgrade(&driver), deliveries, sender));
        Ok(Self {
            driver,
            options,
            replica: redis.replica,
            wait: redis.wait,
            wait_within: redis.timeout / 2,
            feed: Mutex::new(Some(feed)),
            known: Mutex::default(),
            lone,
            touched: (redis.clock == RedisClock::Server).then(Recent::new),
            visited: (redis.clock == RedisClock::Server).then(Recent::new),
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True while it is not known, or known too short a time, what Redis has lost.
    fn is_restoring(&self) -> bool {
        let known = self.known();
        let unsure = known.connections > 0 && known.connections != self.driver.connections();
        unsure || known.restoring.is_some_and(|until| until > Instant::now())
    }

    /// An answer, but for that a lock is not known while those that Redis has lost are handed back.
    fn unless_on_its_way_back<T>(&self, outcome: T, is_unknown: bool) -> Result<T, LedgerError> {
        if is_unknown && self.is_restoring() { Err(LedgerError::Restoring) } else { Ok(outcome) }
    }

    async fn run(&self, script: &'static Script, call: Call) -> Result<Parts, LedgerError> {
        Parts::new(script, self.driver.eval(script, call).await?)
    }

    /// Makes sure that a sweep looks at the event by then.
    async fn touch(&self, event: EventId, within: Duration) -> Result<(), LedgerError> {
        let call = Call::new().key(key::DUE).key(key::EVENTS).arg(event).arg(whole_ms(within));
        reply::said(&self.run(&script::TOUCH, call).await?, "touched")
    }

    /// What of the indexes by which a lock is found was written a moment ago: that of the event, that of the user. A touch
    /// for a lock that has its first due time as far ahead is as good as one for this lock: the sweep goes on looking
    /// every few seconds for a while.
    fn indexed(&self, event: EventId, first_due: Duration, user: UserId) -> (bool, bool) {
        let (now, connections) = (Instant::now(), self.driver.connections());
        let touched = first_due >= UNTOUCHED_DUE_MIN
            && self.touched.as_ref().is_some_and(|recent| recent.has(&(event, first_due), now, connections));
        let visited = self.visited.as_ref().is_some_and(|recent| recent.has(&(user, event), now, connections));
        (touched, visited)
    }

    /// Writes what is missing of the indexes by which a lock is found.
    async fn index(
        &self,
        event: EventId,
        first_due: Duration,
        user: UserId,
        (touched, visited): (bool, bool),
    ) -> Result<(), LedgerError> {
        let (now, connections) = (Instant::now(), self.driver.connections());
        let touch = async {
            if !touched {
                self.touch(event, first_due).await?;
                self.touched.iter().for_each(|recent| recent.note((event, first_due), now, connections));
            }
            Ok(())
        };
        let visit = async {
            if !visited {
                self.visit(user, event).await?;
                self.visited.iter().for_each(|recent| recent.note((user, event), now, connections));
            }
            Ok(())
        };
        let (touched, visited) = tokio::join!(biased; touch, visit);
        touched.and(visited)
    }

    async fn visit(&self, user: UserId, event: EventId) -> Result<(), LedgerError> {
        reply::said(&self.run(&script::VISIT, Call::new().key(key::user(user)).arg(event)).await?, "visited")
    }

    async fn events_of(&self, user: UserId) -> Result<Vec<EventId>, LedgerError> {
        let fields = self.driver.fields(&key::user(user)).await?;
        Ok(fields.iter().filter_map(|field| key::event_of_field(field)).collect())
    }

    async fn forget(&self, user: UserId, events: &[EventId]) {
        if events.is_empty() {
            return;
        }
        // A leftover costs one read next time and ends with its key.
        self.run(&script::FORGET, Call::new().key(key::user(user)).args(events)).await.ok();
    }

    /// Reads something about a user's locks in each of the user's events, and forgets events without any.
    async fn in_events_of<F>(&self, user: UserId, read: impl Fn(EventId) -> F) -> Result<Vec<Lock>, LedgerError>
    where
        F: Future<Output = Result<Vec<Lock>, LedgerError>>,
    {
        let events = self.events_of(user).await?;
        let (mut locks, mut without) = (Vec::new(), Vec::new());
        for portion in events.chunks(PARALLEL) {
            for (event, found) in portion.iter().zip(join_all(portion.iter().map(|event| read(*event))).await) {
                let mut found = found?;
                if found.is_empty() {
                    without.push(*event);
                }
                locks.append(&mut found);
            }
        }
        self.forget(user, &without).await;
        locks.sort_unstable_by_key(|lock| (lock.event(), lock.category));
        Ok(locks)
    }

    async fn count_order(&self, report: &OrderReport, claim: bool) -> Result<OrderReply, LedgerError> {
        let call = Call::about(report.event, &script::ORDER)
            .own(key::ORDER, &report.order)
            .arg(&report.order)
            .arg(report.category)
            .arg(report.quantity)
            .arg(report.user)
            .arg(text(report.lock.as_ref()))
            .arg(report.result.as_str())
            .arg(u8::from(claim));
        reply::order(self.run(&script::ORDER, call).await?)
    }

    /// Counts a reported order again, now that the lock it used is confirmed.
    async fn match_order(
        &self,
        order: &OrderId,
        event: EventId,
        category: CategoryId,
        quantity: Quantity,
        user: UserId,
    ) -> Result<(), LedgerError> {
        // Known by its record: what is confirmed for it by name is its, of whichever lock the report spoke.
        let (order, lock) = (order.clone(), None);
        let report = OrderReport { order, event, category, quantity, user, lock, result: OrderResult::Completed };
        self.count_order(&report, false).await.map(drop)
    }

    /// Returns when enough Redis replicas have the grant. When they have not in time, a new one is undone, unless it was
    /// confirmed meanwhile; of an earlier one its user has had the answer.
    async fn make_durable(&self, lock: LockId, new_of: Option<UserId>, witness: Witness) -> Result<(), LedgerError> {
        let got = self.driver.replicated(witness, self.wait, self.wait_within).await?;
        if got >= self.wait {
            return Ok(());
        }
        if let Some(user) = new_of {
            self.release(lock, Releaser::Owner { user, session: None }).await?;
        }
        Err(LedgerError::NotReplicated { wanted: self.wait, got, within: self.wait_within })
    }

    async fn sweep_event(&self, event: EventId, claimed_ms: u64) -> Result<EventSwept, LedgerError> {
        let begun = Instant::now();
        let mut expired = 0;
        let swept = loop {
            let call = Call::about(event, &script::SWEEP).arg(whole_ms(self.options.expiry_warning));
            let swept = reply::sweep(self.run(&script::SWEEP, call).await?)?;
            for members in swept.old.chunks(100) {
                self.bury(event, members).await?;
            }
            swept.ends.iter().copied().for_each(ends::count);
            expired += swept.expired;
            // A wave of expiries is more than one call may end: the rest at once, while the event is claimed.
            if !swept.goes_on() || begun.elapsed() > CLAIM / 2 {
                break swept;
            }
        };
        let call = Call::new().key(key::DUE).key(key::EVENTS);
        let call = call.arg(event).arg(swept.next_ms).arg(claimed_ms).arg(whole_ms(CLAIM));
        let planned = self.run(&script::PLAN, call).await?;
        Ok(EventSwept { event, expired, refresh: swept.refresh, next: reply::plan(planned)? })
    }

    async fn bury(&self, event: EventId, members: &[String]) -> Result<(), LedgerError> {
        let ids = members.iter().filter_map(|member| member.split('|').next()?.parse::<LockId>().ok());
        let call = Call::new().key(key::of_event(event, "ended")).key(key::of_event(event, "book"));
        let call = ids.map(key::lock).fold(call, Call::key).args(members);
        if call.count() != (members.len() + 2, members.len()) {
            return Err(LedgerError::Protocol { script: script::BURY.name, reply: members.join(" ") });
        }
        reply::said(&self.run(&script::BURY, call).await?, "buried")
    }

    async fn report(&self, lease: Duration, report: String) -> Result<Footing, LedgerError> {
        let connections = self.driver.connections();
        let keys = [key::LEASES, key::REPORTS, key::EVENTS, key::DEAD, key::EPOCH];
        let call = keys.into_iter().fold(Call::new(), Call::key);
        let call = call.arg(self.replica).arg(whole_ms(lease)).arg(report).arg(uuid::Uuid::new_v4());
        let alive = reply::alive(self.run(&script::BEAT, call).await?)?;
        let mut known = self.known();
        let footing = match &known.epoch {
            None => Footing::Firm,
            Some(epoch) if *epoch != alive.epoch => {
                tracing::warn!("Redis has lost its data: the locks of open sessions are restored");
                known.restoring = Some(Instant::now() + RESTORE_WINDOW);
                Footing::Doubtful
            }
            // The first connection may be counted a moment after the first beat.
            Some(_) if alive.held && (known.connections == connections || known.connections == 0) => Footing::Firm,
            Some(_) => Footing::Doubtful,
        };
        if footing == Footing::Doubtful {
            self.touched.iter().for_each(Recent::forget);
            self.visited.iter().for_each(Recent::forget);
        }
        (known.fleet, known.epoch, known.connections) = (alive.reports, Some(alive.epoch), connections);
        Ok(footing)
    }
}

impl Drop for RedisLedger {
    fn drop(&mut self) {
        self.driver.close();
    }
}

struct EventSwept {
    event: EventId,
    expired: u64,
    refresh: bool,
    next: Option<Duration>,
}

#[async_trait]
impl Ledger for RedisLedger {
    async fn lock(&self, request: &LockRequest) -> Result<LockOutcome, LedgerError> {
        if self.is_restoring() {
            return Err(LedgerError::Restoring);
        }
        let event = request.event();
        let rate = request.rate.unwrap_or(RateLimit { interval: Duration::ZERO, burst: 1 });
        let burst = rate.interval.saturating_mul(rate.burst.max(1));
        let call = Call::about(event, &script::LOCK).own(key::LOCK, request.lock).own(key::RATE, request.user);
        let call = match &request.request {
            Some(name) => call.own(key::REQUEST, key::request(request.user, name)),
            None => call,
        };
        let call = call
            .arg(request.lock)
            .number(request.user.value())
            .number(request.category.value())
            .number(request.quantity.value().into())
            .arg(dash(request.session))
            .number(request.generation)
            .numbers(&[
                whole_ms(request.ttl),
                whole_ms(request.stock_age_max),
                request.per_event_max.unwrap_or(0).into(),
                whole_us(rate.interval),
                whole_us(burst),
            ])
            .number(whole_us(burst).div_ceil(1000));
        // The indexes are written first (one connection keeps the order, and `biased` does where a script's text has to
        // be sent after all), so that they are never too small; the first thing due is the warning, or the deadline
        // where it is too near for one.
        let first_due = request.ttl.saturating_sub(self.options.expiry_warning);
        let first_due = if first_due.is_zero() { request.ttl } else { first_due };
        let witness = match self.wait {
            0 => None,
            _ => Some(Box::pin(self.driver.witness(&key::lock(request.lock).to_string())).await?),
        };
        let answer = self.driver.eval(&script::LOCK, call);
        let (indexed, answer) = match self.indexed(event, first_due, request.user) {
            (true, true) => (Ok(()), answer.await),
            some => {
                Box::pin(async { tokio::join!(biased; self.index(event, first_due, request.user, some), answer) }).await
            }
        };
        let outcome = reply::lock(&answer?, request)?;
        let (LockOutcome::Granted(grant) | LockOutcome::GrantedBefore(grant)) = &outcome else { return Ok(outcome) };
        // A lock that no index knows expires unannounced and is not found after a reconnect. The client repeats.
        indexed?;
        if let Some(witness) = witness {
            let new_of = matches!(outcome, LockOutcome::Granted(_)).then_some(request.user);
            Box::pin(self.make_durable(grant.lock, new_of, witness)).await?;
        }
        Ok(outcome)
    }

    async fn validate(&self, request: &ValidateRequest) -> Result<ValidateOutcome, LedgerError> {
        let call =
            Call::about(request.event, &script::VALIDATE).arg(request.user).arg(request.category).arg(request.quantity);
        let outcome = reply::validate(self.run(&script::VALIDATE, call.arg(whole_ms(request.window))).await?)?;
        self.unless_on_its_way_back(outcome, outcome == ValidateOutcome::NotFound)
    }

    async fn restore(&self, request: &RestoreRequest) -> Result<RestoreOutcome, LedgerError> {
        let memento = &request.memento;
        let event = memento.lock.event();
        let (state, order) = match &memento.kept {
            Kept::Attended => ("attended", None),
            Kept::Pinned => ("pinned", None),
            Kept::Confirmed { order } => ("confirmed", order.as_ref()),
        };
        let named = memento.request.as_ref().map(|name| key::request(request.user, name));
        let call = Call::about(event, &script::RESTORE).own(key::LOCK, memento.lock);
        let call = match &named {
            Some(named) => call.own(key::REQUEST, named),
            None => call.own(key::LOCK, memento.lock),
        };
        let call = match order {
            Some(order) => call.own(key::ORDER, order),
            None => call.own(key::LOCK, memento.lock),
        };
        let call = call
            .arg(memento.lock)
            .arg(request.user)
            .arg(memento.category)
            .arg(memento.quantity)
            .arg(memento.created_at.as_ms())
            .arg(memento.deadline.as_ms())
            .arg(whole_ms(request.stock_age_max))
            .arg(dash(memento.session))
            .arg(request.generation)
            .arg(state)
            .arg(text(order))
            .arg(whole_ms(self.options.settle_timeout))
            .arg(if named.is_some() { "1" } else { "" });
        // The indexes first, as for a new lock. When it is due is looked up by the sweep at once.
        self.touch(event, Duration::ZERO).await?;
        self.visit(request.user, event).await?;
        let (outcome, reported) = reply::restore(&self.run(&script::RESTORE, call).await?)?;
        if reported && let Some(order) = order {
            self.match_order(order, event, memento.category, memento.quantity, request.user).await?;
        }
        Ok(outcome)
    }

    async fn confirm(
        &self,
        lock: LockId,
        user: Option<UserId>,
        order: Option<&OrderId>,
    ) -> Result<ConfirmOutcome, LedgerError> {
        let event = lock.event();
        self.touch(event, self.options.settle_timeout).await?;
        let call = Call::about(event, &script::CONFIRM).own(key::LOCK, lock);
        let call = match order {
            Some(order) => call.own(key::ORDER, order),
            None => call.own(key::LOCK, lock),
        };
        let call = call.arg(lock).arg(text(user)).arg(text(order)).arg(whole_ms(self.options.settle_timeout));
        let (outcome, reported) = ends::counted(reply::confirm(self.run(&script::CONFIRM, call).await?)?);
        if reported && let (Some(order), Some(found)) = (order, self.find(lock).await?) {
            self.match_order(order, event, found.category, found.quantity, found.user).await?;
        }
        self.unless_on_its_way_back(outcome, outcome == ConfirmOutcome::NotFound)
    }

    async fn release(&self, lock: LockId, by: Releaser) -> Result<ReleaseOutcome, LedgerError> {
        let (releaser, user, session) = match by {
            Releaser::Owner { user, session } => ("owner", Some(user), session),
            Releaser::Orders { user } => ("orders", user, None),
        };
        let call = Call::about(lock.event(), &script::RELEASE).own(key::LOCK, lock);
        let call = call.arg(lock).arg(releaser).arg(text(user)).arg(dash(session));
        let outcome = ends::counted(reply::release(&self.driver.eval(&script::RELEASE, call).await?, lock)?);
        let is_unknown = outcome == ReleaseOutcome::NotFound;
        self.unless_on_its_way_back(outcome, is_unknown)
    }

    async fn find(&self, lock: LockId) -> Result<Option<Lock>, LedgerError> {
        let call = Call::about(lock.event(), &script::FIND).own(key::LOCK, lock).arg(lock);
        reply::find(self.run(&script::FIND, call).await?, lock)
    }

    async fn locks_in(&self, event: EventId, user: UserId) -> Result<Vec<Lock>, LedgerError> {
        let call = Call::about(event, &script::LOCKS).arg(user);
        reply::locks(self.run(&script::LOCKS, call).await?, user)
    }

    async fn locks_of(&self, user: UserId) -> Result<Vec<Lock>, LedgerError> {
        self.in_events_of(user, |event| self.locks_in(event, user)).await
    }

    async fn availability(&self, event: EventId, age_max: Duration) -> Result<Option<Vec<Availability>>, LedgerError> {
        let call = Call::about(event, &script::AVAILABILITY).arg(whole_ms(age_max));
        reply::availability(&self.driver.eval(&script::AVAILABILITY, call).await?, event)
    }

    async fn ask(&self, event: EventId, age_min: Duration) -> Result<AskOutcome, LedgerError> {
        let call = Call::about(event, &script::ASK).arg(whole_ms(age_min));
        let (outcome, timed_out) = reply::ask(self.run(&script::ASK, call).await?)?;
        if timed_out > 0 {
            metrics::LEDGER_SETTLE_TIMEOUTS.add(&[], timed_out);
            tracing::warn!(%event, locks = timed_out, "confirmed locks whose order was never reported leave settlement");
        }
        Ok(outcome)
    }

    async fn accept(
        &self,
        event: EventId,
        number: SnapshotNumber,
        snapshot: &Snapshot,
    ) -> Result<AcceptOutcome, LedgerError> {
        let mut call = Call::about(event, &script::ACCEPT).arg(number.0);
        for told in &snapshot.categories {
            let open = u8::from(told.open && snapshot.open);
            call = call.arg(told.category).arg(told.total).arg(told.stock).arg(open);
        }
        reply::accept(&self.run(&script::ACCEPT, call).await?)
    }

    async fn order(&self, report: &OrderReport) -> Result<OrderOutcome, LedgerError> {
        self.touch(report.event, Duration::ZERO).await?;
        let mut answer = self.count_order(report, true).await?;
        if let OrderReply::ConfirmFirst(lock) = answer {
            self.confirm(lock, Some(report.user), Some(&report.order)).await?;
            answer = self.count_order(report, false).await?;
        }
        match answer {
            OrderReply::Noted => Ok(OrderOutcome::Noted),
            OrderReply::Repeated => Ok(OrderOutcome::Repeated),
            OrderReply::AfterCancel => Ok(OrderOutcome::AfterCancel),
            OrderReply::ConfirmFirst(lock) => {
                let reply = format!("confirm_first {lock}");
                Err(LedgerError::Protocol { script: script::ORDER.name, reply })
            }
        }
    }

    async fn enter(&self, user: UserId, session: SessionId) -> Result<Presence, LedgerError> {
        self.session_enters(user, session).await
    }

    async fn leave(&self, user: UserId, session: SessionId, grace: Duration) -> Result<(), LedgerError> {
        self.session_leaves(user, session, grace).await
    }

    async fn tell(&self, user: UserId, message: &Personal) -> Result<(), LedgerError> {
        self.tell_sockets(user, message).await
    }

    async fn sweep(&self) -> Result<Swept, LedgerError> {
        let call = Call::new().key(key::DUE).arg(SWEEP_EVENTS_MAX).arg(whole_ms(CLAIM));
        let (claimed_ms, next_ms, events) = reply::due::<EventId>(self.run(&script::DUE, call).await?)?;
        let mut swept = Swept::default();
        let mut next = u64::try_from(next_ms).ok().map(Duration::from_millis);
        let sweep =
            |event| telemetry::work("sweep", self.sweep_event(event, claimed_ms), |error| error.kind().as_str());
        for one in join_all(events.into_iter().map(sweep)).await {
            let one = one?;
            swept.expired += one.expired;
            if one.refresh {
                swept.refresh.push(one.event);
            }
            next = [next, one.next].into_iter().flatten().min();
        }
        swept.next = next;
        Ok(swept)
    }

    async fn reap(&self, grace: Duration) -> Result<u64, LedgerError> {
        self.reap_dead(grace).await
    }

    async fn beat(&self, report: &ReplicaReport) -> Result<Footing, LedgerError> {
        self.report(LEASE, format!("{} {}", report.users, report.sockets)).await
    }

    async fn farewell(&self, _replica: ReplicaId) -> Result<(), LedgerError> {
        self.report(Duration::ZERO, String::new()).await.map(drop)
    }

    async fn stats(&self) -> Result<FleetStats, LedgerError> {
        let mut fleet = FleetStats::default();
        for (users, sockets) in &self.known().fleet {
            fleet.replicas += 1;
            fleet.users += users;
            fleet.sockets += sockets;
        }
        let members = self.driver.newest(key::EVENTS, STATS_EVENTS_MAX).await?;
        let events: Vec<EventId> = members.iter().filter_map(|text| text.parse().ok()).collect();
        for portion in events.chunks(PARALLEL) {
            let tally = |event: &EventId| {
                let call = Call::new().key(key::of_event(*event, "book")).key(key::of_event(*event, "deadlines"));
                self.run(&script::TALLY, call)
            };
            for answer in join_all(portion.iter().map(tally)).await {
                fleet.add(reply::tally(answer?)?);
            }
        }
        Ok(fleet)
    }

    async fn ping(&self) -> Result<(), LedgerError> {
        // The fleet's keys are part of every lock, so on a cluster their server must be there.
        self.driver.ping(key::DUE).await
    }

    async fn subscribe(&self, topic: Topic) -> Result<(), LedgerError> {
        self.driver.subscribe(channel(topic)).await
    }

    async fn unsubscribe(&self, topic: Topic) -> Result<(), LedgerError> {
        self.driver.unsubscribe(channel(topic)).await
    }

    fn alone(&self, user: UserId, session: Option<SessionId>) {
        self.lone.note(user, session);
    }

    fn feed(&self) -> Option<mpsc::Receiver<FeedItem>> {
        self.feed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Turns what the subscription delivers into feed items. A full feed drops and says so with a resync.
async fn read_deliveries(driver: Weak<Driver>, mut deliveries: mpsc::Receiver<Delivery>, feed: mpsc::Sender<FeedItem>) {
    let mut gap = false;
    while let Some(delivery) = deliveries.recv().await {
        if gap && feed.try_send(FeedItem::Resync).is_ok() {
            gap = false;
        }
        let items = match delivery {
            Delivery::Gap => Some(vec![FeedItem::Resync]),
            Delivery::Message { channel, text, room: _room } if channel == key::EXPIRED_CHANNEL => {
                let Some(driver) = driver.upgrade() else { return };
                read_expired(&text).map(|told| of_listeners(&driver, told))
            }
            Delivery::Message { channel, text, room: _room } => read_message(&channel, &text).map(|item| vec![item]),
        };
        let Some(items) = items else {
            metrics::LEDGER_NOTICES_UNREADABLE.count(&[]);
            tracing::debug!("a notice that does not read as one");
            continue;
        };
        for item in items {
            match feed.try_send(item) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(_)) => {
                    metrics::LEDGER_NOTICES_LOST.count(&[]);
                    gap = true;
                }
                Err(mpsc::error::TrySendError::Closed(_)) => return,
            }
        }
    }
}

/// What everybody is told of locks is for the users who are listened for here.
fn of_listeners(driver: &Driver, told: Vec<(UserId, Personal)>) -> Vec<FeedItem> {
    let here = told.into_iter().filter(|(user, _)| driver.wants(&key::user_channel(*user)));
    here.map(|(user, message)| FeedItem::Personal(user, message)).collect()
}

fn read_message(channel: &str, text: &str) -> Option<FeedItem> {
    if let Some(event) = key::event_of_channel(channel) {
        read_change(event, text).map(FeedItem::Changed)
    } else {
        let user = channel.strip_prefix(key::USER_CHANNEL)?.parse().ok()?;
        read_personal(text).map(|message| FeedItem::Personal(user, message))
    }
}

fn channel(topic: Topic) -> String {
    match topic {
        Topic::Event(event) => key::event_channel(event),
        Topic::User(user) => key::user_channel(user),
    }
}

fn whole_us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).map_or(WHOLE_US_MAX, |us| us.min(WHOLE_US_MAX))
}

/// "" for nothing: how scripts are told that a caller does not say.
fn text(value: Option<impl Display>) -> impl Display {
    from_fn(move |f| value.as_ref().map_or(Ok(()), |value| value.fmt(f)))
}

/// "-" for nothing: how scripts are told that no session asks.
fn dash(value: Option<SessionId>) -> impl Display {
    from_fn(move |f| match value {
        Some(value) => value.fmt(f),
        None => f.write_str("-"),
    })
}
