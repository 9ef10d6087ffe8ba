//! The fan-out between the embedded ledger and an audience that writes down what it is told, on a stepped clock; and once
//! on a real Redis that dies.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use seatlock::domain::{
    Availability, ChangeKind, EventId, LockId, OrderResult, Personal, Quantity, ReleaseReason, Releaser, ReplicaId,
    UserId,
};
use seatlock::fanout::{Audience, Fanout, FanoutOptions, News, Summary, Telling};
use seatlock::inventory::{Catalogue, Stock, StockOptions};
use seatlock::ledger::{FEED_LEN_MAX, Ledger, RedisClock, RedisLedger, RedisOptions, Topic};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::inventory::ledger;
use crate::support::ledger::{event, options, order_id, request, snapshot, user};
use crate::support::redis::RedisServer;

const TICK: Duration = Duration::from_millis(50);

/// Writes down what it is told.
#[derive(Default)]
struct Ears {
    updates: Mutex<Vec<(Instant, Availability)>>,
    others: Mutex<Vec<(EventId, Summary)>>,
    personal: Mutex<Vec<(UserId, Personal)>>,
    missed: AtomicUsize,
}

impl Audience for Ears {
    fn gather(&self, news: News) -> Option<Box<dyn Telling>> {
        assert!(news.changed.iter().all(|counts| counts.event == news.event));
        assert!(news.changed.is_sorted_by_key(|counts| counts.category), "each category once: {news:?}");
        let now = Instant::now();
        self.updates.lock().expect("no panic").extend(news.changed.iter().map(|&counts| (now, counts)));
        let others = news.summaries.into_iter().map(|summary| (news.event, summary));
        self.others.lock().expect("no panic").extend(others);
        None
    }

    fn personal(&self, user: UserId, message: &Personal) {
        self.personal.lock().expect("no panic").push((user, message.clone()));
    }

    fn missed(&self) {
        self.missed.fetch_add(1, Ordering::SeqCst);
    }
}

impl Ears {
    fn updates(&self) -> Vec<(Instant, Availability)> {
        self.updates.lock().expect("no panic").clone()
    }

    fn last(&self) -> Option<Availability> {
        self.updates().last().map(|&(_, counts)| counts)
    }

    fn forget(&self) {
        self.updates.lock().expect("no panic").clear();
        self.others.lock().expect("no panic").clear();
    }
}

/// A fan-out, its ledger and its audience; one event is known.
struct House {
    ledger: Arc<dyn Ledger>,
    fanout: Arc<Fanout>,
    ears: Arc<Ears>,
}

async fn house() -> House {
    let house = open(ledger());
    house.stock(1, 5_000).await;
    house
}

fn open(ledger: Arc<dyn Ledger>) -> House {
    let catalogue =
        r#"[{"id": 1, "ticketCategories": [{"id": 1, "availableSeats": 5000}, {"id": 2, "availableSeats": 50}]}]"#;
    let source = Arc::new(Catalogue::parse("test", catalogue).expect("a catalogue"));
    let stop = CancellationToken::new();
    let stock = Stock::new(Arc::clone(&ledger), source, StockOptions::default(), stop.clone());
    let ears = Arc::new(Ears::default());
    let options = FanoutOptions { tick: TICK, ..FanoutOptions::default() };
    let audience = Arc::clone(&ears) as Arc<dyn Audience>;
    House { fanout: Fanout::start(Arc::clone(&ledger), stock, audience, options, stop), ledger, ears }
}

impl House {
    async fn stock(&self, id: u64, left: u64) {
        let asked = self.ledger.ask(event(id), Duration::ZERO).await.expect("an answer");
        let seatlock::domain::AskOutcome::Ask(number) = asked else { unreachable!("zero always draws") };
        let stock = snapshot(&[(1, 5_000, left), (2, 50, 50)]);
        self.ledger.accept(event(id), number, &stock).await.expect("an answer");
    }

    /// Watches and takes a reading as a joiner does; what the room is told afterwards is in the ears.
    async fn join(&self) -> Vec<Availability> {
        self.fanout.watch(event(1)).await.expect("a subscription");
        let read = self.read().await;
        self.fanout.observe(&read);
        read
    }

    async fn read(&self) -> Vec<Availability> {
        self.ledger.availability(event(1), Duration::from_hours(1)).await.expect("an answer").expect("known")
    }

    async fn lock(&self, by: u64, quantity: u64) -> LockId {
        let request = request(event(1), 1, by, quantity);
        self.ledger.lock(&request).await.expect("an answer");
        request.lock
    }

    async fn release(&self, lock: LockId, by: u64) {
        let by = Releaser::Owner { user: user(by), session: None };
        self.ledger.release(lock, by).await.expect("an answer");
    }
}

/// A thousand users lock at once, within one tick: the room is told twice, at once and a tick later, and the last time
/// everything.
#[tokio::test(start_paused = true)]
async fn a_burst_within_a_tick_is_two_updates_and_the_last_one_is_right() {
    let house = house().await;
    house.join().await;
    sleep(TICK * 4).await;
    assert_eq!(house.ears.updates(), [], "the joiner has its reading");
    let started = Instant::now();
    for by in 1..=1000 {
        house.lock(by, 1).await;
    }
    sleep(TICK * 4).await;
    let updates = house.ears.updates();
    assert!((1..=2).contains(&updates.len()), "{} updates", updates.len());
    assert_eq!(updates[0].0, started, "the first change is told at once");
    let last = updates.last().expect("told").1;
    assert_eq!((last.active, last.available()), (1000, 4000));
    assert_eq!(house.read().await[0].version, last.version);
}

/// Locks come and go every millisecond for a second: the room is told once per tick and the last value is the truth.
#[tokio::test(start_paused = true)]
async fn a_steady_stream_is_one_update_per_tick() {
    let house = house().await;
    house.join().await;
    for by in 1..=500 {
        let lock = house.lock(by, 2).await;
        sleep(Duration::from_millis(1)).await;
        house.release(lock, by).await;
        sleep(Duration::from_millis(1)).await;
    }
    house.lock(999, 7).await;
    sleep(TICK * 2).await;
    let updates = house.ears.updates();
    assert!((18..=22).contains(&updates.len()), "{} updates in a second", updates.len());
    assert!(updates.windows(2).all(|pair| pair[1].0 - pair[0].0 >= TICK), "closer than a tick");
    assert!(updates.is_sorted_by_key(|(_, counts)| counts.version));
    assert_eq!(updates.last().expect("told").1.active, 7);
}

/// The subscription is silently dead (ended behind the fan-out's back) when a lock is granted: the room is told within five
/// seconds all the same, once, and nothing else is told.
#[tokio::test(start_paused = true)]
async fn a_lost_notice_is_healed_within_five_seconds() {
    let house = house().await;
    house.join().await;
    for round in 1..=5 {
        house.ledger.unsubscribe(Topic::Event(event(1))).await.expect("an answer");
        house.lock(round, 3).await;
        sleep(Duration::from_secs(5)).await;
        let updates = house.ears.updates();
        assert_eq!(updates.len(), 1, "round {round}");
        assert_eq!(updates[0].1.active, 3 * round);
        house.ears.forget();
    }
    sleep(Duration::from_secs(20)).await;
    assert_eq!(house.ears.updates(), [], "nothing changed");
}

/// The feed overflows: what is watched is read again within a second.
#[tokio::test(start_paused = true)]
async fn after_a_gap_everything_watched_is_read_within_a_second() {
    let house = house().await;
    house.join().await;
    house.fanout.listen(user(7)).await.expect("a subscription");
    // Just after a regular reading, so that the next one is far away.
    sleep(Duration::from_millis(100)).await;
    let warning = Personal::Expired {
        lock: LockId::generate(event(1)),
        category: seatlock::domain::CategoryId::new(1).expect("an id"),
        quantity: Quantity::new(1).expect("a quantity"),
    };
    for _ in 0..FEED_LEN_MAX {
        house.ledger.tell(user(7), &warning).await.expect("an answer");
    }
    house.lock(1, 5).await;
    let started = Instant::now();
    sleep(Duration::from_millis(1)).await;
    house.ledger.tell(user(7), &warning).await.expect("an answer");
    while house.ears.last().is_none() {
        assert!(started.elapsed() < Duration::from_secs(1), "not read within a second");
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(house.ears.last().map(|counts| counts.active), Some(5));
}

/// Somebody joins in the middle of a storm of changes, a hundred times: from its reading on the joiner is told only newer
/// counts (or the same), and in the end the newest.
#[tokio::test(start_paused = true)]
async fn a_late_joiner_never_sees_an_older_version() {
    let house = house().await;
    house.join().await;
    for by in 1..=100 {
        house.lock(by, 1).await;
        sleep(Duration::from_millis(by % 17)).await;
        house.lock(1000 + by, 1).await;
        house.fanout.watch(event(1)).await.expect("a subscription");
        let read = house.read().await;
        if by % 3 == 0 {
            // Others are quicker than the joiner.
            house.lock(2000 + by, 1).await;
            tokio::task::yield_now().await;
        }
        house.fanout.observe(&read);
        house.ears.forget();
        sleep(Duration::from_millis(by % 7 * 20)).await;
        let told: Vec<u64> = house.ears.updates().iter().map(|(_, counts)| counts.version).collect();
        assert!(told.iter().all(|&version| version >= read[0].version), "{told:?} after {}", read[0].version);
        house.fanout.unwatch(event(1));
    }
    sleep(TICK * 2).await;
    house.fanout.observe(&house.read().await);
    sleep(TICK * 2).await;
    assert_eq!(house.ears.last().map(|counts| counts.version), Some(house.read().await[0].version));
}

/// Whoever reads an older version than the room was told gets the newer one with the next tick.
#[tokio::test(start_paused = true)]
async fn a_joiner_with_an_older_reading_is_told_the_newer_one() {
    let house = house().await;
    let old = house.join().await;
    house.lock(1, 1).await;
    sleep(TICK * 2).await;
    house.ears.forget();
    house.fanout.observe(&old);
    sleep(TICK).await;
    assert_eq!(house.ears.last().map(|counts| counts.active), Some(1));
}

/// Three users lock and one gives back within a tick: the room's summary says how many tickets of each kind, and how many
/// each user moved, so that its author can be left out.
#[tokio::test(start_paused = true)]
async fn summaries_hold_every_users_own_amount() {
    let house = house().await;
    house.join().await;
    sleep(TICK).await;
    // The leading edge goes out with the first notice; the rest is summed.
    house.lock(9, 1).await;
    sleep(Duration::from_millis(1)).await;
    house.ears.forget();
    let mine = house.lock(1, 2).await;
    house.lock(2, 3).await;
    house.release(mine, 1).await;
    house.lock(1, 4).await;
    sleep(TICK * 2).await;
    let others = house.ears.others.lock().expect("no panic").clone();
    let [(_, locked), (_, back)] = others.as_slice() else { unreachable!("{others:?}") };
    assert_eq!((locked.kind, locked.total), (ChangeKind::Locked, 9));
    assert_eq!(locked.by_user, [(user(1), 6), (user(2), 3)]);
    assert_eq!((locked.without(user(1)), locked.without(user(2)), locked.without(user(3))), (3, 6, 9));
    assert_eq!((back.kind, back.total), (ChangeKind::Back(ReleaseReason::Released), 2));
    assert_eq!((back.without(user(1)), back.without(user(2))), (0, 2));
}

/// Personal messages come at once, all of them, in order, and only for users that are listened to.
#[tokio::test(start_paused = true)]
async fn personal_messages_come_at_once_and_in_order() {
    let house = house().await;
    house.fanout.listen(user(7)).await.expect("a subscription");
    house.fanout.listen(user(7)).await.expect("a subscription");
    house.fanout.unlisten(user(7));
    let order = |number: u64| Personal::Order {
        result: OrderResult::Completed,
        order: order_id(&number.to_string()),
        order_is_number: true,
        event: event(1),
        category: seatlock::domain::CategoryId::new(1).expect("an id"),
        quantity: Quantity::new(1).expect("a quantity"),
    };
    for number in 0..500 {
        house.ledger.tell(user(7), &order(number)).await.expect("an answer");
        house.ledger.tell(user(8), &order(number)).await.expect("an answer");
    }
    sleep(Duration::from_millis(1)).await;
    let told = house.ears.personal.lock().expect("no panic").clone();
    assert_eq!(told, (0..500).map(|number| (user(7), order(number))).collect::<Vec<_>>());
    house.fanout.unlisten(user(7));
    sleep(Duration::from_millis(1)).await;
    house.ledger.tell(user(7), &order(0)).await.expect("an answer");
    sleep(Duration::from_millis(1)).await;
    assert_eq!(house.ears.personal.lock().expect("no panic").len(), 500);
}

/// Watchers are counted: the room is told while one is left, not after the last, and again after somebody came back, also
/// when that happened in the same instant.
#[tokio::test(start_paused = true)]
async fn the_last_watcher_ends_the_subscription() {
    let house = house().await;
    let told = async || {
        house.ears.forget();
        let lock = house.lock(1, 1).await;
        house.release(lock, 1).await;
        sleep(TICK * 3).await;
        !house.ears.updates().is_empty()
    };
    house.join().await;
    house.join().await;
    house.fanout.unwatch(event(1));
    assert!(told().await);
    house.fanout.unwatch(event(1));
    sleep(Duration::from_millis(1)).await;
    assert!(!told().await);
    // One more goes than came: nothing happens.
    house.fanout.unwatch(event(1));
    house.join().await;
    assert!(told().await);
    for _ in 0..10 {
        house.fanout.unwatch(event(1));
        house.fanout.watch(event(1)).await.expect("a subscription");
        assert!(told().await);
    }
}

/// Redis is killed with all its data while somebody watches, and comes back empty: readings fail for a while and are
/// repeated, the stock is asked for again, and the room is told the counts without the lost lock, with a higher version.
#[tokio::test]
async fn after_redis_died_and_lost_everything_the_room_is_told_the_truth() {
    let mut redis = RedisServer::start().await;
    let replica = RedisOptions {
        wait: 0,
        url: redis.url(),
        ca_file: None,
        replica: ReplicaId::generate(),
        timeout: Duration::from_millis(500),
        clock: RedisClock::Server,
    };
    let house = open(Arc::new(RedisLedger::connect(&replica, options()).expect("a good address")));
    let started = Instant::now();
    while house.ledger.ping().await.is_err() {
        assert!(started.elapsed() < Duration::from_secs(10), "no connection");
        sleep(Duration::from_millis(20)).await;
    }
    house.stock(1, 5_000).await;
    house.join().await;
    house.lock(1, 5).await;
    let until = async |what: &str, good: &dyn Fn(Availability) -> bool| {
        let started = Instant::now();
        while !house.ears.last().is_some_and(good) {
            assert!(started.elapsed() < Duration::from_secs(15), "{what}: {:?}", house.ears.last());
            sleep(Duration::from_millis(20)).await;
        }
    };
    until("the lock", &|counts| counts.active == 5).await;
    let before = house.ears.last().expect("told");
    redis.kill();
    sleep(Duration::from_secs(1)).await;
    redis.restart().await;
    until("the counts rebuilt", &|counts| counts.category != before.category || counts.active == 0).await;
    let updates = house.ears.updates();
    let after = updates.iter().rev().find(|(_, counts)| counts.category == before.category).expect("told").1;
    assert_eq!(after.available(), 5_000);
    assert!(after.version > before.version);
    // Notices come again, too.
    let started = Instant::now();
    while house.ledger.lock(&request(event(1), 1, 2, 1)).await.is_err() {
        assert!(started.elapsed() < Duration::from_secs(10), "no lock");
        sleep(Duration::from_millis(50)).await;
    }
    until("the next lock", &|counts| counts.category == before.category && counts.active >= 1).await;
}
