//! Random histories driven into the model and into Redis together: every answer and every count must be the same after
//! every step, and the law of conservation must hold in each.
//!
//! `SEATLOCK_HISTORIES=20000 cargo nextest run --test it histories` is the long run. A failing history is printed shrunk,
//! as the list of its steps, with the seed that replays it.

use std::collections::HashMap;
use std::fmt::{Debug, Write};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use seatlock::domain::{
    AskOutcome, CategoryId, LockId, LockRequest, OrderResult, RateLimit, Releaser, SessionId, SnapshotNumber,
    ValidateRequest,
};

use crate::support::ledger::{Stepped, category, event, order_id, quantity, report, request, snapshot, user};

const EVENTS: u64 = 2;
const CATEGORIES: u64 = 2;
const USERS: u64 = 3;
const STOCK_AGE: Duration = Duration::from_mins(5);

/// One step. Small numbers, so that steps meet: users, events and categories are few, locks and questions are named by
/// how many came before.
#[derive(Debug, Clone)]
enum Step {
    Pass { ms: u64 },
    Lock { event: u64, category: u64, user: u64, quantity: u64, request: Option<u8>, rated: bool, capped: bool },
    Validate { event: u64, category: u64, user: u64, quantity: u64 },
    Confirm { nth: usize, user: Option<u64>, order: Option<u8> },
    Release { nth: usize, user: Option<u64>, owner: bool },
    Enter { user: u64, session: u8 },
    Leave { user: u64, session: u8 },
    Ask { event: u64, age_s: u64 },
    Accept { nth: usize, stock: u64, other_stock: u64, closed: bool },
    Order { event: u64, category: u64, user: u64, quantity: u64, order: u8, lock: Option<usize>, cancelled: bool },
    Sweep,
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
    ]
}

/// What a history has made so far and later steps may name.
#[derive(Default)]
struct Made {
    locks: Vec<LockId>,
    questions: Vec<(u64, SnapshotNumber)>,
    tries: u128,
}

impl Made {
    /// The nth latest lock; one that never was when there are not so many.
    fn lock(&self, nth: usize) -> LockId {
        self.locks.iter().rev().nth(nth).copied().unwrap_or_else(|| LockId::from_random(event(1), 99))
    }
}

fn session(user: u64, n: u8) -> SessionId {
    SessionId::from_u128(u128::from(user) << 8 | u128::from(n))
}

fn lock_request(made: &Made, step: &Step) -> Option<LockRequest> {
    let Step::Lock { event: e, category: c, user: u, quantity: q, request: name, rated, capped } = step else {
        return None;
    };
    let mut wanted = request(event(*e), *c, *u, *q);
    wanted.lock = LockId::from_random(event(*e), made.tries << 64 | made.tries);
    wanted.ttl = Duration::from_secs(5);
    wanted.stock_age_max = STOCK_AGE;
    wanted.request = name.map(|name| format!("try-{name}").parse().expect("a request id"));
    wanted.rate = rated.then_some(RateLimit { interval: Duration::from_secs(20), burst: 2 });
    wanted.per_event_max = capped.then_some(4);
    Some(wanted)
}

/// The step's answer, as text, so that two ledgers' answers can be compared whole.
async fn apply(on: &Stepped, made: &Made, step: &Step) -> String {
    fn show(answer: impl Debug) -> String {
        format!("{answer:?}")
    }
    let ledger = &on.ledger;
    match *step {
        Step::Pass { ms } => {
            on.step(Duration::from_millis(ms)).await;
            String::new()
        }
        Step::Lock { .. } => show(ledger.lock(&lock_request(made, step).expect("a lock step")).await.unwrap()),
        Step::Validate { event: e, category: c, user: u, quantity: q } => {
            let window = Duration::from_secs(3);
            let wanted = ValidateRequest {
                event: event(e),
                category: category(c),
                user: user(u),
                quantity: quantity(q),
                window,
            };
            show(ledger.validate(&wanted).await.unwrap())
        }
        Step::Confirm { nth, user: u, order } => {
            let order = order.map(|order| order_id(&order.to_string()));
            show(ledger.confirm(made.lock(nth), u.map(user), order.as_ref()).await.unwrap())
        }
        Step::Release { nth, user: u, owner } => {
            let by = match (owner, u) {
                (true, u) => Releaser::Owner { user: user(u.unwrap_or(1)), session: None },
                (false, u) => Releaser::Orders { user: u.map(user) },
            };
            show(ledger.release(made.lock(nth), by).await.unwrap())
        }
        Step::Enter { user: u, session: n } => {
            let mut presence = ledger.enter(user(u), session(u, n)).await.unwrap();
            strip_sessions(&mut presence.locks);
            show(presence.locks)
        }
        Step::Leave { user: u, session: n } => {
            ledger.leave(user(u), session(u, n), Duration::from_secs(2)).await.unwrap();
            String::new()
        }
        Step::Ask { event: e, age_s } => show(ledger.ask(event(e), Duration::from_secs(age_s)).await.unwrap()),
        Step::Accept { nth, stock, other_stock, closed } => {
            let Some(&(e, number)) = made.questions.iter().rev().nth(nth) else { return String::new() };
            let mut told = snapshot(&[(1, 10, stock), (2, 10, other_stock)]);
            told.categories[0].open = !closed;
            show(ledger.accept(event(e), number, &told).await.unwrap())
        }
        Step::Order { event: e, category: c, user: u, quantity: q, order, lock, cancelled } => {
            let result = if cancelled { OrderResult::Cancelled } else { OrderResult::Completed };
            let mut told = report(event(e), &order.to_string(), c, u, q, result);
            told.lock = lock.map(|nth| made.lock(nth)).filter(|lock| lock.event() == event(e));
            show(ledger.order(&told).await.unwrap())
        }
        Step::Sweep => {
            // Redis looks only at events that are due and says when it will look again; what was done must be the same.
            ledger.sweep().await.unwrap();
            String::new()
        }
    }
}

/// Listings do not carry what they do not read.
fn strip_sessions(locks: &mut [seatlock::domain::Lock]) {
    for lock in locks {
        lock.session = None;
    }
}

/// Everything a caller can see, and the law of conservation.
async fn view(on: &Stepped, made: &Made) -> String {
    let mut seen = String::new();
    for e in 1..=EVENTS {
        let rows = on.ledger.availability(event(e), Duration::from_hours(1)).await.unwrap();
        for row in rows.iter().flatten() {
            let free = row.stock.saturating_sub(row.active + row.settling);
            assert_eq!(row.available(), if row.open { free } else { 0 }, "{}: conservation", on.name);
        }
        writeln!(seen, "event {e}: {rows:?}").unwrap();
        let mut active: HashMap<CategoryId, u64> = HashMap::new();
        for u in 1..=USERS {
            let mut locks = on.ledger.locks_in(event(e), user(u)).await.unwrap();
            strip_sessions(&mut locks);
            for lock in &locks {
                *active.entry(lock.category).or_default() += lock.quantity.wide();
            }
            writeln!(seen, "user {u} in {e} holds {locks:?}").unwrap();
        }
        for row in rows.iter().flatten() {
            let sum = active.get(&row.category).copied().unwrap_or(0);
            assert_eq!(row.active, sum, "{}: active is the sum of active locks", on.name);
        }
    }
    for lock in &made.locks {
        writeln!(seen, "{:?}", on.ledger.find(*lock).await.unwrap()).unwrap();
    }
    let fleet = on.ledger.stats().await.unwrap();
    seen + &format!("{} {} {} {}", fleet.active, fleet.expired, fleet.confirmed, fleet.released)
}

async fn run(redis: &Stepped, steps: &[Step]) -> Result<(), TestCaseError> {
    let memory = Stepped::memory();
    redis.clear().await;
    let mut made = Made::default();
    for e in 1..=EVENTS {
        memory.stock(event(e), &[(1, 10, 5), (2, 10, 3)]).await;
        redis.stock(event(e), &[(1, 10, 5), (2, 10, 3)]).await;
    }
    for (at, step) in steps.iter().enumerate() {
        let model = apply(&memory, &made, step).await;
        let product = apply(redis, &made, step).await;
        prop_assert_eq!(&model, &product, "answers to step {} {:?}", at, step);
        if let Some(wanted) = lock_request(&made, step) {
            made.tries += 1;
            if model.starts_with("Granted(") {
                made.locks.push(wanted.lock);
            }
        }
        if let Step::Ask { event: e, .. } = step
            && let Some(number) = model.strip_prefix("Ask(SnapshotNumber(").and_then(|rest| rest.split(')').next())
        {
            made.questions.push((*e, SnapshotNumber(number.parse().expect("a number"))));
        }
        prop_assert_eq!(view(&memory, &made).await, view(redis, &made).await, "after step {} {:?}", at, step);
    }
    Ok(())
}

/// See the module.
#[test]
fn model_and_redis_agree_on_every_history() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let cases = std::env::var("SEATLOCK_HISTORIES").map_or(150, |n| n.parse().expect("SEATLOCK_HISTORIES is a number"));
    let redis = runtime.block_on(Stepped::redis());
    let config = Config { cases, max_shrink_iters: 2000, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new(config);
    let histories = prop::collection::vec(step(), 1..60);
    if let Err(failure) = runner.run(&histories, |steps| runtime.block_on(run(&redis, &steps))) {
        panic!("{failure}");
    }
}

/// The comparison itself can fail: a step applied to one ledger only is noticed.
#[tokio::test]
async fn a_difference_is_noticed() {
    let (memory, redis) = (Stepped::memory(), Stepped::redis().await);
    for on in [&memory, &redis] {
        on.stock(event(1), &[(1, 10, 5), (2, 10, 3)]).await;
    }
    let made = Made::default();
    assert_eq!(view(&memory, &made).await, view(&redis, &made).await);
    let AskOutcome::Ask(_) = memory.ledger.ask(event(1), Duration::ZERO).await.unwrap() else { panic!("draws") };
    memory.grant(event(1), 1, 1, 1).await;
    assert_ne!(view(&memory, &made).await, view(&redis, &made).await);
}
