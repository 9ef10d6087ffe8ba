//! Both ledgers on a clock that tests step.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::{ClientLike, ListInterface};
use seatlock::domain::{
    CategoryId, CategoryStock, EventId, LockId, LockOutcome, LockRequest, Now, OrderId, OrderReport, OrderResult,
    Personal, Quantity, ReplicaId, Snapshot, UserId,
};
use seatlock::ledger::{Ledger, LedgerOptions, MemoryLedger, RedisClock, RedisLedger, RedisOptions};

use super::redis::RedisServer;

/// 2027-01-15T08:00:00Z.
pub const START_US: u64 = 1_800_000_000_000_000;

pub const SETTLE: Duration = Duration::from_secs(30);
pub const WARNING: Duration = Duration::from_mins(1);
pub const TTL: Duration = Duration::from_mins(5);

/// A ledger and its clock.
pub struct Stepped {
    pub name: &'static str,
    pub ledger: Arc<dyn Ledger>,
    now_us: Arc<AtomicU64>,
    redis: Option<(RedisServer, Client)>,
}

impl Stepped {
    /// The model.
    pub fn memory() -> Self {
        let now_us = Arc::new(AtomicU64::new(START_US));
        let clock = Arc::clone(&now_us);
        let ledger = MemoryLedger::with_clock(options(), Arc::new(move || Now(clock.load(Ordering::SeqCst))));
        Self { name: "memory", ledger: Arc::new(ledger), now_us, redis: None }
    }

    /// The product, on a Redis of its own.
    pub async fn redis() -> Self {
        let server = RedisServer::start().await;
        let client = server.client().await;
        let stepped = Self {
            name: "redis",
            ledger: stepped_ledger(&server, scripts()),
            now_us: Arc::new(AtomicU64::new(START_US)),
            redis: Some((server, client)),
        };
        stepped.tell_clock(START_US).await;
        stepped
    }

    /// Another replica on the same Redis and the same clock; with scripts of its own when a folder is given.
    pub fn another(&self, scripts: Option<&'static Path>) -> Arc<dyn Ledger> {
        stepped_ledger(&self.redis.as_ref().expect("the model has one replica").0, scripts)
    }

    /// A client of the test's own on the same Redis.
    pub fn client(&self) -> &Client {
        &self.redis.as_ref().expect("the model has no Redis").1
    }

    /// The ledger's clock, in microseconds.
    pub fn now_us(&self) -> u64 {
        self.now_us.load(Ordering::SeqCst)
    }

    /// The same, in milliseconds.
    pub fn now_ms(&self) -> u64 {
        self.now_us.load(Ordering::SeqCst) / 1000
    }

    /// Lets time pass.
    pub async fn step(&self, by: Duration) {
        if by.is_zero() {
            return;
        }
        let now = self.now_us.fetch_add(u64::try_from(by.as_micros()).expect("short"), Ordering::SeqCst)
            + u64::try_from(by.as_micros()).expect("short");
        self.tell_clock(now).await;
    }

    async fn tell_clock(&self, now: u64) {
        if let Some((_, client)) = &self.redis {
            // The latest reading is in front; what is behind it is never read.
            let words = vec![(now % 1_000_000).to_string(), (now / 1_000_000).to_string()];
            let _: () = client.lpush("test:clock", words).await.expect("LPUSH answers");
        }
    }

    /// Everything forgotten, and the clock at the start again: a new history on the same server.
    pub async fn clear(&self) {
        self.now_us.store(START_US, Ordering::SeqCst);
        if let Some((_, client)) = &self.redis {
            let _: () = client.flushall(false).await.expect("FLUSHALL answers");
        }
        self.tell_clock(START_US).await;
    }

    /// Hands in a fresh snapshot: (category, total, stock).
    pub async fn stock(&self, event: EventId, categories: &[(u64, u64, u64)]) {
        stock(self.ledger.as_ref(), event, categories).await;
    }

    /// Locks, and expects the grant.
    pub async fn grant(&self, event: EventId, category: u64, user: u64, quantity: u64) -> LockId {
        let answer = self.ledger.lock(&request(event, category, user, quantity)).await.expect("an answer");
        let LockOutcome::Granted(grant) = answer else {
            panic!("{}: expected a grant, got {answer:?}", self.name);
        };
        grant.lock
    }

    /// (available, active, settling) of a category.
    pub async fn counts(&self, event: EventId, category: u64) -> (u64, u64, u64) {
        let rows = self.ledger.availability(event, Duration::from_hours(1)).await.expect("an answer").expect("known");
        let row = rows.iter().find(|row| row.category.value() == category).expect("the category");
        (row.available(), row.active, row.settling)
    }
}

/// Where tests on a stepped clock read the scripts from instead of the compiled-in ones (`tests/mutate` sets it).
pub fn scripts() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER.get_or_init(|| std::env::var_os("SEATLOCK_TEST_SCRIPTS").map(PathBuf::from)).as_deref()
}

fn stepped_ledger(server: &RedisServer, scripts: Option<&'static Path>) -> Arc<dyn Ledger> {
    let redis = RedisOptions {
        url: server.url(),
        ca_file: None,
        replica: ReplicaId::generate(),
        timeout: Duration::from_secs(5),
        wait: 0,
        clock: RedisClock::Stepped { scripts },
    };
    Arc::new(RedisLedger::connect(&redis, options()).expect("a good address"))
}

pub fn options() -> LedgerOptions {
    LedgerOptions { settle_timeout: SETTLE, expiry_warning: WARNING }
}

pub fn event(id: u64) -> EventId {
    EventId::new(id).expect("an id")
}

pub fn category(id: u64) -> CategoryId {
    CategoryId::new(id).expect("an id")
}

pub fn user(id: u64) -> UserId {
    UserId::new(id).expect("an id")
}

pub fn quantity(n: u64) -> Quantity {
    Quantity::new(n).expect("a quantity")
}

pub fn order_id(text: &str) -> OrderId {
    text.parse().expect("an order id")
}

/// What a user is told of an order of `n` tickets.
pub fn completed(order: &str, n: u64) -> Personal {
    Personal::Order {
        result: OrderResult::Completed,
        order: order_id(order),
        order_is_number: true,
        event: event(1),
        category: category(1),
        quantity: quantity(n),
    }
}

pub fn snapshot(categories: &[(u64, u64, u64)]) -> Snapshot {
    let categories = categories
        .iter()
        .map(|&(id, total, stock)| CategoryStock { category: category(id), total, stock, open: true })
        .collect();
    Snapshot { open: true, categories }
}

pub fn request(event: EventId, category_id: u64, user_id: u64, n: u64) -> LockRequest {
    LockRequest {
        lock: LockId::generate(event),
        user: user(user_id),
        category: category(category_id),
        quantity: quantity(n),
        request: None,
        session: None,
        generation: 0,
        ttl: TTL,
        stock_age_max: Duration::from_mins(10),
        per_event_max: None,
        rate: None,
    }
}

pub fn report(event: EventId, order: &str, category_id: u64, user_id: u64, n: u64, result: OrderResult) -> OrderReport {
    OrderReport {
        order: order_id(order),
        event,
        category: category(category_id),
        quantity: quantity(n),
        user: user(user_id),
        lock: None,
        result,
    }
}

/// A ledger on this server's own clock.
pub fn live(server: &RedisServer, timeout: Duration, wait: u32) -> Arc<dyn Ledger> {
    live_at(server.url(), None, timeout, wait)
}

/// A ledger at any address, on its own clock.
pub fn live_at(url: String, ca_file: Option<PathBuf>, timeout: Duration, wait: u32) -> Arc<dyn Ledger> {
    let clock = RedisClock::Server;
    let redis = RedisOptions { url, ca_file, replica: ReplicaId::generate(), timeout, wait, clock };
    Arc::new(RedisLedger::connect(&redis, options()).expect("a good address"))
}

/// Hands in a fresh snapshot: (category, total, stock).
pub async fn stock(ledger: &dyn Ledger, event: EventId, categories: &[(u64, u64, u64)]) {
    let asked = ledger.ask(event, Duration::ZERO).await.expect("an answer");
    let seatlock::domain::AskOutcome::Ask(number) = asked else { panic!("zero always draws") };
    ledger.accept(event, number, &snapshot(categories)).await.expect("an answer");
}
