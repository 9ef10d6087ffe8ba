//! Random histories driven into the model and into Redis together: every answer and every count must be the same, and
//! the auditor must have nothing to say. Two replicas share the Redis; requests go to either, and some are asked twice
//! because the first answer is lost.
//!
//! In other histories replicas die in the middle of what they do. The model cannot die half-way, so there the laws are
//! checked, and that nothing is left over when everything has ended.
//!
//! `SEATLOCK_HISTORIES=20000 cargo nextest run --release --test it histories` is the long run (so many histories in
//! each of the tests). A failing history is printed shrunk, as the list of its steps, with the seed that makes the same
//! histories again: `SEATLOCK_SEED=<seed>`.

use std::collections::HashMap;
use std::fmt::{Debug, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fred::interfaces::{HashesInterface, KeysInterface, SortedSetsInterface};
use futures_util::future::join_all;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use seatlock::domain::{
    AskOutcome, CategoryId, Instant, Kept, LockId, LockOutcome, LockRequest, LockStatus, Memento, OrderReport,
    OrderResult, Personal, RateLimit, Releaser, RestoreRequest, SessionId, SnapshotNumber, ValidateRequest,
};
use seatlock::ledger::{Ledger, Presence, Script};

use crate::audit::{Auditor, Deed, When};
use crate::support::ledger::{
    SETTLE, Stepped, category, event, order_id, quantity, report, request, scripts, snapshot, user,
};

const EVENTS: u64 = 2;
const CATEGORIES: u64 = 2;
const USERS: u64 = 3;
const STOCK_AGE: Duration = Duration::from_mins(5);
const LOCK_TTL: Duration = Duration::from_secs(5);
const GRACE: Duration = Duration::from_secs(2);
const WINDOW: Duration = Duration::from_secs(3);

/// How many histories each of the tests runs, unless `SEATLOCK_HISTORIES` says. Together well above two thousand.
const HISTORIES: u32 = 800;

/// One step. Small numbers, so that steps meet: users, events and categories are few, locks and questions are named by
/// how many came before.
#[derive(Debug, Clone)]
enum Step {
    Pass {
        ms: u64,
    },
    Lock {
        event: u64,
        category: u64,
        user: u64,
        quantity: u64,
        request: Option<u8>,
        rated: bool,
        capped: bool,
    },
    Validate {
        event: u64,
        category: u64,
        user: u64,
        quantity: u64,
    },
    Confirm {
        nth: usize,
        user: Option<u64>,
        order: Option<u8>,
    },
    Release {
        nth: usize,
        user: Option<u64>,
        owner: bool,
    },
    Enter {
        user: u64,
        session: u8,
    },
    Leave {
        user: u64,
        session: u8,
    },
    Ask {
        event: u64,
        age_s: u64,
    },
    Accept {
        nth: usize,
        stock: u64,
        other_stock: u64,
        closed: bool,
    },
    Order {
        event: u64,
        category: u64,
        user: u64,
        quantity: u64,
        order: u8,
        lock: Option<usize>,
        cancelled: bool,
    },
    Restore {
        known: Option<usize>,
        event: u64,
        category: u64,
        user: u64,
        quantity: u64,
        kept: u8,
        named: Option<u8>,
        left_ms: u64,
    },
    Sweep,
    Look,
}

/// What one buyer or two do to a few orders of a few tickets, in every order of events.
fn step_of_an_order() -> impl Strategy<Value = Step> {
    let (event, category, users) = (1_u64, 1_u64, 1..=2_u64);
    let order = || prop::option::weighted(0.7, 0..2_u8);
    prop_oneof![
        2 => prop_oneof![Just(1000_u64), Just(4999), Just(29_999), Just(30_000)].prop_map(|ms| Step::Pass { ms }),
        6 => (users.clone(), 1..=3_u64, any::<bool>()).prop_map(move |(user, quantity, capped)| Step::Lock {
            event, category, user, quantity, request: None, rated: false, capped,
        }),
        2 => (users.clone(), 1..=3_u64).prop_map(move |(user, quantity)| Step::Validate { event, category, user, quantity }),
        6 => (0..3_usize, order()).prop_map(|(nth, order)| Step::Confirm { nth, user: None, order }),
        2 => (0..3_usize, any::<bool>()).prop_map(|(nth, owner)| Step::Release { nth, user: None, owner }),
        2 => Just(Step::Ask { event, age_s: 0 }),
        2 => (0..2_usize, 2..8_u64).prop_map(|(nth, stock)| Step::Accept { nth, stock, other_stock: 0, closed: false }),
        8 => (users, 1..=4_u64, 0..2_u8, prop::option::weighted(0.3, 0..3_usize), prop::bool::weighted(0.3))
            .prop_map(move |(user, quantity, order, lock, cancelled)| Step::Order {
                event, category, user, quantity, order, lock, cancelled,
            }),
        1 => Just(Step::Sweep),
        3 => Just(Step::Look),
    ]
}

/// Everything, and locks that a replica hands back, known and forgotten ones.
fn step_after_a_loss() -> impl Strategy<Value = Step> {
    let place = (1..=EVENTS, 1..=CATEGORIES, 1..=USERS, 1..=3_u64);
    let left_ms = prop_oneof![Just(0_u64), Just(1), 0..9000_u64];
    let known = prop::option::weighted(0.3, 0..4_usize);
    let restore = (place, known, 0..6_u8, prop::option::weighted(0.3, 0..3_u8), left_ms).prop_map(
        |((event, category, user, quantity), known, kept, named, left_ms)| Step::Restore {
            known,
            event,
            category,
            user,
            quantity,
            kept,
            named,
            left_ms,
        },
    );
    prop_oneof![5 => step(), 1 => restore]
}

fn step() -> impl Strategy<Value = Step> {
    let place = (1..=EVENTS, 1..=CATEGORIES, 1..=USERS, 1..=3_u64);
    prop_oneof![
        4 => prop_oneof![Just(1_u64), Just(1000), Just(4999), Just(5000), 0..7000_u64].prop_map(|ms| Step::Pass { ms }),
        8 => (place.clone(), prop::option::weighted(0.3, 0..3_u8), prop::bool::weighted(0.2), prop::bool::weighted(0.2))
            .prop_map(|((event, category, user, quantity), request, rated, capped)| Step::Lock {
                event, category, user, quantity, request, rated, capped,
            }),
        3 => place.clone().prop_map(|(event, category, user, quantity)| Step::Validate { event, category, user, quantity }),
        5 => (0..8_usize, prop::option::weighted(0.3, 1..=USERS), prop::option::weighted(0.4, 0..4_u8))
            .prop_map(|(nth, user, order)| Step::Confirm { nth, user, order }),
        4 => (0..8_usize, prop::option::weighted(0.3, 1..=USERS), any::<bool>())
            .prop_map(|(nth, user, owner)| Step::Release { nth, user, owner }),
        2 => (1..=USERS, 0..2_u8).prop_map(|(user, session)| Step::Enter { user, session }),
        2 => (1..=USERS, 0..2_u8).prop_map(|(user, session)| Step::Leave { user, session }),
        3 => (1..=EVENTS, prop_oneof![Just(0_u64), Just(10)]).prop_map(|(event, age_s)| Step::Ask { event, age_s }),
        4 => (0..4_usize, 0..8_u64, 0..8_u64, prop::bool::weighted(0.1))
            .prop_map(|(nth, stock, other_stock, closed)| Step::Accept { nth, stock, other_stock, closed }),
        4 => (place, 0..4_u8, prop::option::weighted(0.3, 0..8_usize), prop::bool::weighted(0.3))
            .prop_map(|((event, category, user, quantity), order, lock, cancelled)| Step::Order {
                event, category, user, quantity, order, lock, cancelled,
            }),
        3 => Just(Step::Sweep),
        2 => Just(Step::Look),
    ]
}

/// What becomes of a step's answer.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Answered,
    /// The answer is lost, and the same is asked again.
    Repeated,
    /// The replica dies when so many scripts have run.
    Cut {
        after: u8,
    },
}

/// A step, on which replica, and what becomes of the answer.
#[derive(Debug, Clone)]
struct Act {
    step: Step,
    replica: usize,
    fate: Fate,
}

fn act(step: impl Strategy<Value = Step>, fate: impl Strategy<Value = Fate>) -> impl Strategy<Value = Act> {
    (step, 0..2_usize, fate).prop_map(|(step, replica, fate)| Act { step, replica, fate })
}

fn answered_or_repeated() -> impl Strategy<Value = Fate> {
    prop_oneof![6 => Just(Fate::Answered), 1 => Just(Fate::Repeated)]
}

fn any_fate() -> impl Strategy<Value = Fate> {
    prop_oneof![4 => answered_or_repeated(), 2 => (0..6_u8).prop_map(|after| Fate::Cut { after })]
}

/// What a history has made so far and later steps may name.
#[derive(Default, Clone)]
struct Made {
    locks: Vec<LockId>,
    questions: Vec<(u64, SnapshotNumber)>,
    /// Of each user's latest session.
    generations: HashMap<u64, u64>,
    tries: u128,
}

impl Made {
    /// The nth latest lock; one that never was when there are not so many.
    fn lock(&self, nth: usize) -> LockId {
        self.locks.iter().rev().nth(nth).copied().unwrap_or_else(|| LockId::from_random(event(1), 99))
    }
}

/// How much time a step takes. The model forgets a generation when nothing of its user is left, which is right as long
/// as no user comes and goes twice in a microsecond.
fn passes(step: &Step) -> Duration {
    if let Step::Pass { ms } = *step {
        Duration::from_millis(ms)
    } else if matches!(step, Step::Enter { .. } | Step::Leave { .. }) {
        Duration::from_micros(10)
    } else {
        Duration::ZERO
    }
}

fn session(user: u64, n: u8) -> SessionId {
    SessionId::from_u128(u128::from(user) << 8 | u128::from(n))
}

/// A step's answer as text, so that two ledgers' answers can be compared whole, and as the auditor is told it.
#[derive(Debug)]
struct Done {
    text: String,
    deed: Option<Deed>,
    failed: bool,
    /// What later steps may name.
    lock: Option<LockId>,
    question: Option<(u64, SnapshotNumber)>,
    generation: Option<(u64, u64)>,
}

impl Done {
    fn of<T: Debug, E: Debug>(answer: Result<T, E>, told: impl FnOnce(Option<T>) -> Option<Deed>) -> Self {
        let text = format!("{answer:?}");
        let failed = answer.is_err();
        let deed = told(answer.ok());
        let lock = match &deed {
            // Without an answer it may be there.
            Some(Deed::Lock(wanted, Some(LockOutcome::Granted(_)) | None)) => Some(wanted.lock),
            _ => None,
        };
        let question = match &deed {
            Some(Deed::Ask { event, answer: Some(AskOutcome::Ask(number)) }) => Some((event.value(), *number)),
            _ => None,
        };
        Self { text, deed, failed, lock, question, generation: None }
    }

    /// The same with its answer lost on the way.
    fn lost(mut self) -> Self {
        match &mut self.deed {
            Some(Deed::Lock(_, answer)) => *answer = None,
            Some(Deed::Validate(_, answer)) => *answer = None,
            Some(Deed::Confirm { answer, .. }) => *answer = None,
            Some(Deed::Release { answer, .. }) => *answer = None,
            Some(Deed::Ask { answer, .. }) => *answer = None,
            Some(Deed::Accept { answer, .. }) => *answer = None,
            Some(Deed::Order(_, answer)) => *answer = None,
            Some(Deed::Leave { .. } | Deed::Availability(..) | Deed::Find(..) | Deed::Holds { .. }) | None => {}
        }
        self
    }
}

/// Does a step.
async fn apply(ledger: &dyn Ledger, made: &Made, now_ms: u64, step: &Step) -> Done {
    match *step {
        Step::Pass { .. } | Step::Look => Done::of(Ok::<_, ()>(()), |_| None),
        Step::Lock { event: e, category: c, user: u, quantity: q, request: name, rated, capped } => {
            let wanted = LockRequest {
                lock: LockId::from_random(event(e), made.tries << 64 | made.tries),
                ttl: LOCK_TTL,
                stock_age_max: STOCK_AGE,
                session: Some(session(u, 0)),
                generation: made.generations.get(&u).copied().unwrap_or(0),
                request: name.map(|name| format!("try-{name}").parse().expect("a request id")),
                rate: rated.then_some(RateLimit { interval: Duration::from_secs(20), burst: 2 }),
                per_event_max: capped.then_some(4),
                ..request(event(e), c, u, q)
            };
            Done::of(ledger.lock(&wanted).await, |answer| Some(Deed::Lock(wanted, answer)))
        }
        Step::Validate { event: e, category: c, user: u, quantity: q } => {
            let (event, category) = (event(e), category(c));
            let wanted = ValidateRequest { event, category, user: user(u), quantity: quantity(q), window: WINDOW };
            Done::of(ledger.validate(&wanted).await, |answer| Some(Deed::Validate(wanted, answer)))
        }
        Step::Confirm { nth, user: u, order } => {
            let (lock, user, order) = (made.lock(nth), u.map(user), order.map(|order| order_id(&order.to_string())));
            let answer = ledger.confirm(lock, user, order.as_ref()).await;
            Done::of(answer, |answer| Some(Deed::Confirm { lock, user, order, answer }))
        }
        Step::Release { nth, user: u, owner } => {
            let lock = made.lock(nth);
            let by = match (owner, u) {
                (true, u) => Releaser::Owner { user: user(u.unwrap_or(1)), session: None },
                (false, u) => Releaser::Orders { user: u.map(user) },
            };
            Done::of(ledger.release(lock, by).await, |answer| Some(Deed::Release { lock, by, answer }))
        }
        Step::Enter { user: u, session: n } => {
            let presence = ledger.enter(user(u), session(u, n)).await;
            let generation = presence.as_ref().ok().map(|presence| (u, presence.generation));
            let seen = presence.map(|presence| {
                let Presence { generation, now, locks, told, seen_until } = presence;
                (generation, now, without_sessions(locks), told, seen_until)
            });
            Done { generation, ..Done::of(seen, |_| None) }
        }
        Step::Leave { user: u, session: n } => {
            let left = ledger.leave(user(u), session(u, n), GRACE).await;
            Done::of(left, |_| Some(Deed::Leave { user: user(u), grace: GRACE }))
        }
        Step::Ask { event: e, age_s } => {
            let answer = ledger.ask(event(e), Duration::from_secs(age_s)).await;
            Done::of(answer, |answer| Some(Deed::Ask { event: event(e), answer }))
        }
        Step::Accept { nth, stock, other_stock, closed } => {
            let Some(&(e, number)) = made.questions.iter().rev().nth(nth) else {
                return Done::of(Ok::<_, ()>(()), |_| None);
            };
            let mut told = snapshot(&[(1, 10, stock), (2, 10, other_stock)]);
            told.categories[0].open = !closed;
            let answer = ledger.accept(event(e), number, &told).await;
            Done::of(answer, |answer| Some(Deed::Accept { event: event(e), number, snapshot: told, answer }))
        }
        Step::Order { event: e, category: c, user: u, quantity: q, order, lock, cancelled } => {
            let result = if cancelled { OrderResult::Cancelled } else { OrderResult::Completed };
            let mut told = report(event(e), &order.to_string(), c, u, q, result);
            told.lock = lock.map(|nth| made.lock(nth)).filter(|lock| lock.event() == event(e));
            let answer = ledger.order(&told).await;
            if answer.is_ok() {
                let OrderReport { order, event, category, quantity, .. } = told.clone();
                let message = Personal::Order { result, order, order_is_number: true, event, category, quantity };
                ledger.tell(told.user, &message).await.ok();
            }
            Done::of(answer, |answer| Some(Deed::Order(told, answer)))
        }
        Step::Restore { known, event: e, category: c, user: u, quantity: q, kept, named, left_ms } => {
            let lock = LockId::from_random(event(e), made.tries << 64 | made.tries);
            let order = |name: u8| Some(order_id(&name.to_string()));
            let memento = Memento {
                lock: known.map_or(lock, |nth| made.lock(nth)),
                category: category(c),
                quantity: quantity(q),
                created_at: Instant::from_ms(now_ms - 1000),
                deadline: Instant::from_ms(now_ms + left_ms),
                kept: match kept {
                    0 | 1 => Kept::Attended,
                    2 => Kept::Pinned,
                    3 => Kept::Confirmed { order: None },
                    other => Kept::Confirmed { order: order(other - 4) },
                },
                request: named.map(|name| format!("try-{name}").parse().expect("a request id")),
                session: Some(session(u, 0)),
            };
            let generation = made.generations.get(&u).copied().unwrap_or(0);
            let asked = RestoreRequest { user: user(u), memento, generation, stock_age_max: STOCK_AGE };
            let answer = ledger.restore(&asked).await;
            let lock = Some(asked.memento.lock).filter(|_| known.is_none());
            Done { lock, ..Done::of(answer, |_| None) }
        }
        // Redis looks only at events that are due and says when it will look again; what was done must be the same.
        Step::Sweep => Done::of(ledger.sweep().await.map(drop), |_| None),
    }
}

/// Listings do not carry what they do not read.
fn without_sessions(mut locks: Vec<seatlock::domain::Lock>) -> Vec<seatlock::domain::Lock> {
    for lock in &mut locks {
        lock.session = None;
    }
    locks
}

/// Everything a caller can see, and as the auditor is told it; the sums of what is seen must be what is counted.
async fn view(on: &Stepped, made: &Made) -> (String, Vec<Deed>) {
    let (mut seen, mut deeds) = (String::new(), Vec::new());
    let mut active: HashMap<(u64, CategoryId), u64> = HashMap::new();
    let hour = Duration::from_hours(1);
    let places: Vec<(u64, u64)> = (1..=EVENTS).flat_map(|e| (1..=USERS).map(move |u| (e, u))).collect();
    // The counts come last: they end what is due, and what is seen before must not need that.
    let held = join_all(places.iter().map(|&(e, u)| on.ledger.locks_in(event(e), user(u)))).await;
    let found = join_all(made.locks.iter().map(|lock| on.ledger.find(*lock))).await;
    let rows = join_all((1..=EVENTS).map(|e| on.ledger.availability(event(e), hour))).await;
    for ((e, u), locks) in places.into_iter().zip(held) {
        let locks = without_sessions(locks.unwrap());
        for lock in &locks {
            *active.entry((e, lock.category)).or_default() += lock.quantity.wide();
        }
        writeln!(seen, "user {u} in {e} holds {locks:?}").unwrap();
        deeds.push(Deed::Holds { event: event(e), user: user(u), locks });
    }
    for (e, rows) in (1..=EVENTS).zip(rows) {
        let rows = rows.unwrap();
        for row in rows.iter().flatten() {
            let sum = active.get(&(e, row.category)).copied().unwrap_or(0);
            assert_eq!(row.active, sum, "{}: active is the sum of active locks", on.name);
        }
        writeln!(seen, "event {e}: {rows:?}").unwrap();
        deeds.extend(rows.map(|rows| Deed::Availability(event(e), rows)));
    }
    for (lock, found) in made.locks.iter().zip(found) {
        let found = found.unwrap();
        writeln!(seen, "{lock}: {found:?}").unwrap();
        deeds.push(Deed::Find(*lock, found));
    }
    seen += &glance(on).await;
    (seen, deeds)
}

/// What can be seen without ending what is due.
async fn glance(on: &Stepped) -> String {
    let fleet = on.ledger.stats().await.unwrap();
    let (users, categories) = (fleet.users_with_locks, fleet.categories_with_locks);
    format!("{} {} {} {} {users} {categories}", fleet.active, fleet.expired, fleet.confirmed, fleet.released)
}

/// The Redis of a test, its replicas, and the auditor of the history that runs.
struct Stage {
    redis: Stepped,
    replicas: [Arc<dyn Ledger>; 2],
    /// Runs scripts that stop when `test:fuse` has burnt down.
    dying: Arc<dyn Ledger>,
    auditor: Auditor,
    ticks: u64,
    made: Made,
}

impl Stage {
    async fn new(fused: &'static Path) -> Self {
        let redis = Stepped::redis().await;
        let replicas = [Arc::clone(&redis.ledger), redis.another(scripts())];
        let dying = redis.another(Some(fused));
        Self { redis, replicas, dying, auditor: Auditor::new(SETTLE), ticks: 0, made: Made::default() }
    }

    /// A new history.
    async fn clear(&mut self) {
        self.redis.clear().await;
        self.auditor = Auditor::new(SETTLE);
        self.made = Made::default();
        for e in 1..=EVENTS {
            self.stock(e, &[(1, 10, 5), (2, 10, 3)]).await;
        }
    }

    fn note(&mut self, deed: Option<Deed>) {
        let Some(deed) = deed else { return };
        self.ticks += 2;
        let now = self.redis.now_ms();
        self.auditor.note(When { began: self.ticks - 1, ended: self.ticks, from_ms: now, until_ms: now }, deed);
    }

    async fn stock(&mut self, e: u64, categories: &[(u64, u64, u64)]) {
        let asked = self.redis.ledger.ask(event(e), Duration::ZERO).await.unwrap();
        self.note(Some(Deed::Ask { event: event(e), answer: Some(asked) }));
        let AskOutcome::Ask(number) = asked else { panic!("zero always draws") };
        let told = snapshot(categories);
        let answer = self.redis.ledger.accept(event(e), number, &told).await.ok();
        self.note(Some(Deed::Accept { event: event(e), number, snapshot: told, answer }));
    }

    /// Does an act on Redis; every answer as text.
    async fn perform(&mut self, act: &Act) -> Vec<String> {
        self.redis.step(passes(&act.step)).await;
        let mut done = Vec::new();
        match act.fate {
            Fate::Answered => {}
            Fate::Repeated => {
                done.push(apply(self.replicas[act.replica].as_ref(), &self.made, self.redis.now_ms(), &act.step).await);
                self.made.tries += 1;
            }
            Fate::Cut { after } => {
                let client = self.redis.client();
                let _: () = client.set("test:fuse", i64::from(after), None, None, false).await.unwrap();
                let cut = apply(self.dying.as_ref(), &self.made, self.redis.now_ms(), &act.step).await;
                let _: () = client.del("test:fuse").await.unwrap();
                assert!(!cut.failed || cut.text.contains("CUT"), "{}", cut.text);
                done.push(cut);
            }
        }
        if !matches!(act.fate, Fate::Cut { .. }) {
            done.push(apply(self.replicas[1 - act.replica].as_ref(), &self.made, self.redis.now_ms(), &act.step).await);
            assert!(done.iter().all(|done| !done.failed), "{done:?}");
        }
        self.made.tries += 1;
        let mut answers = Vec::new();
        for done in done {
            self.made.locks.extend(done.lock);
            self.made.questions.extend(done.question);
            self.made.generations.extend(done.generation);
            answers.push(done.text.clone());
            let repeated = matches!(act.fate, Fate::Repeated) && answers.len() == 1;
            self.note(if repeated { done.lost().deed } else { done.deed });
        }
        answers
    }

    /// Everything that can be seen now, and told to the auditor.
    async fn look(&mut self) -> String {
        let (seen, deeds) = view(&self.redis, &self.made).await;
        for deed in deeds {
            self.note(Some(deed));
        }
        seen
    }

    fn judge(&self) -> Result<(), TestCaseError> {
        let complaints = self.auditor.complaints();
        prop_assert!(complaints.is_empty(), "the auditor: {:#?}", complaints);
        Ok(())
    }
}

async fn agree(stage: &mut Stage, acts: &[Act]) -> Result<(), TestCaseError> {
    compare(stage, acts).await?;
    stage.judge()
}

/// Every answer of the model and of Redis, every count, and what each user is charged with in the end.
async fn compare(stage: &mut Stage, acts: &[Act]) -> Result<(), TestCaseError> {
    let memory = Stepped::memory();
    stage.clear().await;
    for e in 1..=EVENTS {
        memory.stock(event(e), &[(1, 10, 5), (2, 10, 3)]).await;
    }
    for (at, act) in acts.iter().enumerate() {
        let mut made = stage.made.clone();
        memory.step(passes(&act.step)).await;
        let mut model = Vec::new();
        if matches!(act.fate, Fate::Repeated) {
            model.push(apply(memory.ledger.as_ref(), &made, memory.now_ms(), &act.step).await.text);
            made.tries += 1;
        }
        model.push(apply(memory.ledger.as_ref(), &made, memory.now_ms(), &act.step).await.text);
        prop_assert_eq!(&model, &stage.perform(act).await, "answers to step {} {:?}", at, act);
        if matches!(act.step, Step::Look) || at + 1 == acts.len() {
            let model = view(&memory, &stage.made).await.0;
            prop_assert_eq!(model, stage.look().await, "after step {} {:?}", at, act);
        } else {
            prop_assert_eq!(glance(&memory).await, glance(&stage.redis).await, "after step {} {:?}", at, act);
        }
    }
    prop_assert_eq!(charged(&memory).await, charged(&stage.redis).await, "charged in the end");
    Ok(())
}

/// What counts against each user's limit in each event once no lock is left: a lock beyond the limit is
/// refused, and the refusal says it.
async fn charged(on: &Stepped) -> Vec<String> {
    on.step(LOCK_TTL + WINDOW + Duration::from_secs(10)).await;
    let mut told = Vec::new();
    for e in 1..=EVENTS {
        on.stock(event(e), &[(1, 10, 10), (2, 10, 10)]).await;
        for u in 1..=USERS {
            let wanted = LockRequest { per_event_max: Some(1), ..request(event(e), 1, u, 2) };
            told.push(format!("{:?}", on.ledger.lock(&wanted).await));
        }
    }
    told
}

async fn keep_the_laws(stage: &mut Stage, acts: &[Act]) -> Result<(), TestCaseError> {
    stage.clear().await;
    for act in acts {
        stage.perform(act).await;
        if matches!(act.step, Step::Look) {
            stage.look().await;
        }
    }
    stage.look().await;
    // Everything runs out: what is active, what is on its way to be sold, and what a dead replica had claimed.
    for interval in [LOCK_TTL + WINDOW, Duration::from_secs(2), SETTLE] {
        stage.redis.step(interval).await;
        stage.redis.ledger.sweep().await.unwrap();
    }
    let fleet = stage.redis.ledger.stats().await.unwrap();
    prop_assert_eq!((fleet.active, fleet.users_with_locks, fleet.categories_with_locks), (0, 0, 0), "swept");
    for e in 1..=EVENTS {
        stage.stock(e, &[(1, 10, 7), (2, 10, 7)]).await;
        let rows = stage.redis.ledger.availability(event(e), STOCK_AGE).await.unwrap().unwrap();
        for row in &rows {
            prop_assert_eq!((row.available(), row.active, row.settling), (7, 0, 0), "nothing is left over: {:?}", row);
        }
    }
    left_over(stage).await?;
    for lock in stage.made.locks.clone() {
        let found = stage.redis.ledger.find(lock).await.unwrap();
        prop_assert!(found.is_none_or(|lock| lock.status != LockStatus::Active), "{} lives for ever", lock);
    }
    stage.judge()
}

/// A while after everything has ended, nothing is kept of it but what users have bought.
async fn left_over(stage: &Stage) -> Result<(), TestCaseError> {
    // The last tombstones are as old as the last locks; a touch keeps an event in the index for a minute.
    for _ in 0..2 {
        stage.redis.step(Duration::from_mins(10)).await;
        stage.redis.ledger.sweep().await.unwrap();
    }
    let client = stage.redis.client();
    for e in 1..=EVENTS {
        for name in ["deadlines", "ended", "settling", "sold"] {
            let key = format!("seatlock:3:{{e:{e}}}:{name}");
            let left: Vec<String> = client.zrange(key, 0, -1, None, false, None, false).await.unwrap();
            prop_assert!(left.iter().all(|member| member == "-"), "{} of event {} is left over: {:?}", name, e, left);
        }
        let book: HashMap<String, String> = client.hgetall(format!("seatlock:3:{{e:{e}}}:book")).await.unwrap();
        for (field, value) in book.into_iter().filter(|(field, _)| field.contains([':', '~'])) {
            let bought = value.strip_prefix("0 ").is_some_and(|tickets| tickets != "0");
            prop_assert!(bought, "holders of event {} are left over: {} {}", e, field, value);
        }
    }
    let due: u64 = client.zcard("seatlock:{fleet}:due").await.unwrap();
    prop_assert_eq!(due, 0, "events that the sweep looks at");
    Ok(())
}

/// The scripts, each with a fuse in front of it.
fn fused(folder: &Path) -> &'static Path {
    const FUSE: &str = "if redis.call('EXISTS', 'test:fuse') == 1 and redis.call('DECR', 'test:fuse') < 0 then \
                        return redis.error_reply('CUT') end\n";
    let lua = scripts().map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("lua"), Path::to_owned);
    let text = |name: &str| std::fs::read_to_string(lua.join(name).with_extension("lua")).expect("a script's text");
    let write = |name: &str, text: String| {
        std::fs::write(folder.join(name).with_extension("lua"), text).expect("a writable folder");
    };
    write("_prelude", FUSE.to_owned() + &text("_prelude"));
    for script in Script::ALL {
        write(script.name, if script.of_event > 0 { text(script.name) } else { FUSE.to_owned() + &text(script.name) });
    }
    Box::leak(folder.to_owned().into_boxed_path())
}

/// Runs random histories, and fails with the shortest that fails, its steps and the seed.
fn run(acts: impl Strategy<Value = Act>, body: &impl AsyncFn(&mut Stage, &[Act]) -> Result<(), TestCaseError>) {
    let number = |name: &str| std::env::var(name).ok().map(|n| n.parse::<u64>().expect("a number"));
    let cases = number("SEATLOCK_HISTORIES").map_or(HISTORIES, |n| u32::try_from(n).expect("a small number"));
    let seed = number("SEATLOCK_SEED").unwrap_or_else(|| u64::from(rand_seed()));
    let bytes: Vec<u8> = seed.to_le_bytes().into_iter().cycle().take(32).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let stage = runtime.block_on(Stage::new(fused(folder.path())));
    let stage = std::cell::RefCell::new(stage);
    let max_shrink_iters = number("SEATLOCK_SHRINK").map_or(2000, |n| u32::try_from(n).expect("a small number"));
    let config = Config { cases, max_shrink_iters, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let histories = prop::collection::vec(acts, 1..60);
    let outcome = runner.run(&histories, |acts| {
        // A panic inside a history is its failure; the next one begins from nothing.
        let mut stage = stage.borrow_mut();
        runtime.block_on(body(&mut stage, &acts))
    });
    if let Err(failure) = outcome {
        panic!("SEATLOCK_SEED={seed} SEATLOCK_HISTORIES={cases} makes this again: {failure}");
    }
}

/// A new one for each run, so that no two runs try the same.
fn rand_seed() -> u32 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    since.subsec_nanos() ^ std::process::id()
}

/// See the module.
#[test]
fn model_and_redis_agree_on_every_history() {
    run(act(step(), answered_or_repeated()), &agree);
}

/// The same where little else happens than orders: those without a lock, doubled, in any order, for another quantity.
#[test]
fn model_and_redis_agree_on_every_order() {
    run(act(step_of_an_order(), answered_or_repeated()), &agree);
}

/// The same with locks that are handed back after a loss. The auditor, who knows grants only, is not asked.
#[test]
fn model_and_redis_agree_on_what_is_restored() {
    run(act(step_after_a_loss(), answered_or_repeated()), &compare);
}

/// See the module.
#[test]
fn replicas_that_die_half_way_break_no_law() {
    run(act(step(), any_fate()), &keep_the_laws);
}

/// The comparison itself can fail: a step applied to one ledger only is noticed.
#[tokio::test]
async fn a_difference_is_noticed() {
    let (memory, redis) = (Stepped::memory(), Stepped::redis().await);
    for on in [&memory, &redis] {
        on.stock(event(1), &[(1, 10, 5), (2, 10, 3)]).await;
    }
    let made = Made::default();
    assert_eq!(view(&memory, &made).await.0, view(&redis, &made).await.0);
    memory.grant(event(1), 1, 1, 1).await;
    assert_ne!(view(&memory, &made).await.0, view(&redis, &made).await.0);
    assert_ne!(glance(&memory).await, glance(&redis).await);
}

/// The fuse does cut: a lock's three scripts need three, and what a dead replica did not do is not there.
#[tokio::test]
async fn a_replica_dies_half_way() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut stage = Stage::new(fused(folder.path())).await;
    stage.clear().await;
    for after in 0..4 {
        let (category, user, quantity) = (1, 1, 1);
        let step = Step::Lock { event: 1, category, user, quantity, request: None, rated: false, capped: false };
        let answers = stage.perform(&Act { step, replica: 0, fate: Fate::Cut { after } }).await;
        assert_eq!(answers[0].contains("CUT"), after < 3, "{answers:?}");
        assert_eq!(stage.redis.counts(event(1), 1).await.1, u64::from(after == 3));
    }
}
