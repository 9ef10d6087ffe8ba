//! Replicas die, or are only slow, and Redis forgets: sessions and their locks are looked after by whoever is left.

use std::sync::Arc;
use std::time::Duration;

use fred::interfaces::{ClientLike, SortedSetsInterface};
use seatlock::domain::{
    ConfirmOutcome, Instant, Kept, LockId, LockOutcome, Memento, Releaser, ReplicaId, ReplicaReport, RestoreOutcome,
    RestoreRequest, SessionId, ValidateRequest,
};
use seatlock::ledger::{ErrorKind, Footing, Ledger, SILENT_MAX};

use crate::support::ledger::{Stepped, TTL, completed, event, live, request, stock, user};
use crate::support::redis::RedisServer;

const GRACE: Duration = Duration::from_secs(15);
const LEASE: Duration = Duration::from_secs(5);
const MS: Duration = Duration::from_millis(1);

/// Two replicas, a clock that the test steps, and one user at the first replica who holds a lock of event 1.
struct Pair {
    on: Stepped,
    other: Arc<dyn Ledger>,
    session: SessionId,
    lock: LockId,
}

async fn beat(ledger: &dyn Ledger) -> Footing {
    // A ledger says who it is by itself; the report only counts.
    let report = ReplicaReport { replica: ReplicaId::generate(), users: 1, sockets: 1 };
    ledger.beat(&report).await.unwrap()
}

impl Pair {
    async fn start() -> Self {
        let on = Stepped::redis().await;
        let other = on.another(None);
        let session = SessionId::generate();
        for ledger in [&on.ledger, &other] {
            assert_eq!(beat(ledger.as_ref()).await, Footing::Firm);
        }
        on.stock(event(1), &[(1, 9, 9)]).await;
        let generation = on.ledger.enter(user(7), session).await.unwrap().generation;
        let mut asked = request(event(1), 1, 7, 2);
        asked.generation = generation;
        assert!(matches!(on.ledger.lock(&asked).await.unwrap(), LockOutcome::Granted(_)));
        Self { on, other, session, lock: asked.lock }
    }

    /// What the lock has left.
    async fn left(&self) -> Duration {
        let lock = self.other.find(self.lock).await.unwrap().unwrap();
        Duration::from_millis(lock.deadline.as_ms() - self.on.now_us() / 1000)
    }

    /// The first replica says nothing for longer than its lease, and the other notices.
    async fn die(&self) {
        self.on.step(LEASE - MS).await;
        beat(self.other.as_ref()).await;
        assert_eq!(self.other.reap(GRACE).await.unwrap(), 0, "the lease runs");
        self.on.step(MS).await;
        beat(self.other.as_ref()).await;
    }
}

/// The users of a replica that died have the same grace as others, and find their locks at another replica.
#[tokio::test]
async fn a_dead_replicas_users_have_the_grace() {
    let pair = Pair::start().await;
    pair.die().await;
    assert_eq!(pair.left().await, TTL - LEASE, "nobody has reaped yet");
    assert_eq!(pair.other.reap(GRACE).await.unwrap(), 1);
    assert_eq!(pair.left().await, GRACE);
    assert_eq!(pair.other.reap(GRACE).await.unwrap(), 0, "done");
    pair.on.step(GRACE - MS).await;
    let presence = pair.other.enter(user(7), SessionId::generate()).await.unwrap();
    assert_eq!(presence.locks[0].id, pair.lock);
    assert_eq!(pair.left().await, TTL - LEASE - GRACE + MS, "as if nothing had been");

    let pair = Pair::start().await;
    pair.die().await;
    pair.other.reap(GRACE).await.unwrap();
    pair.on.step(GRACE).await;
    assert_eq!(pair.on.counts(event(1), 1).await, (9, 0, 0), "who does not come back has lost them");
}

/// A replica is cut off, and an order is reported meanwhile. Its session hears of that when it enters again, and a new one
/// elsewhere at once, also when the cut-off replica tells late that its session has ended.
#[tokio::test]
async fn what_a_dead_replica_did_not_hear_is_kept() {
    for returns in [true, false] {
        let pair = Pair::start().await;
        pair.other.tell(user(7), &completed("heard", 2)).await.unwrap();
        pair.on.step(SILENT_MAX - LEASE).await;
        beat(pair.on.ledger.as_ref()).await;
        beat(pair.other.as_ref()).await;
        pair.die().await;
        assert_eq!(pair.other.reap(GRACE).await.unwrap(), 1);
        pair.other.tell(user(7), &completed("missed", 2)).await.unwrap();
        pair.on.step(SILENT_MAX * 2).await;
        let (ledger, session) = if returns {
            (&pair.on.ledger, pair.session)
        } else {
            pair.on.ledger.leave(user(7), pair.session, GRACE).await.unwrap();
            (&pair.other, SessionId::generate())
        };
        let presence = ledger.enter(user(7), session).await.unwrap();
        let told: Vec<_> = presence.told.into_iter().map(|told| told.message).collect();
        assert_eq!((told, presence.seen_until), (vec![completed("missed", 2)], Instant::from_ms(0)), "{returns}");
    }
}

/// Several replicas reap at once: every user is seen to, once.
#[tokio::test]
async fn reaping_is_shared() {
    let pair = Pair::start().await;
    for id in 100..400 {
        pair.on.ledger.enter(user(id), SessionId::generate()).await.unwrap();
    }
    let third = pair.on.another(None);
    beat(third.as_ref()).await;
    pair.die().await;
    let (one, two) = tokio::join!(pair.other.reap(GRACE), third.reap(GRACE));
    assert_eq!(one.unwrap() + two.unwrap(), 301);
}

/// A replica that was only slow enters its sessions again, and reaping that has begun does not end them.
#[tokio::test]
async fn a_slow_replica_keeps_its_sessions() {
    let pair = Pair::start().await;
    pair.die().await;
    pair.other.reap(GRACE).await.unwrap();
    pair.on.step(MS).await;
    assert_eq!(beat(pair.on.ledger.as_ref()).await, Footing::Doubtful);
    pair.on.ledger.enter(user(7), pair.session).await.unwrap();
    assert_eq!(pair.left().await, TTL - LEASE - MS);
    assert_eq!(beat(pair.on.ledger.as_ref()).await, Footing::Firm);
    assert_eq!(pair.other.reap(GRACE).await.unwrap(), 0);
    assert_eq!(pair.left().await, TTL - LEASE - MS);
}

/// The grace begins when a user's last session anywhere has gone: tabs and telephones share.
#[tokio::test]
async fn the_last_session_anywhere_counts() {
    let pair = Pair::start().await;
    let phone = SessionId::generate();
    pair.other.enter(user(7), phone).await.unwrap();
    pair.die().await;
    assert_eq!(pair.other.reap(GRACE).await.unwrap(), 1);
    assert_eq!(pair.left().await, TTL - LEASE, "the telephone is there");
    pair.other.leave(user(7), phone, GRACE).await.unwrap();
    assert_eq!(pair.left().await, GRACE);
}

/// A session that leaves is not looked after again, one that a farewell left behind is.
#[tokio::test]
async fn a_farewell_leaves_nothing_behind() {
    let pair = Pair::start().await;
    let second = SessionId::generate();
    pair.on.ledger.enter(user(8), second).await.unwrap();
    pair.on.step(MS).await;
    pair.on.ledger.leave(user(8), second, GRACE).await.unwrap();
    pair.on.ledger.farewell(ReplicaId::generate()).await.unwrap();
    assert_eq!(pair.other.reap(GRACE).await.unwrap(), 1, "only who was left");
    assert_eq!(pair.left().await, GRACE);
    pair.on.step(LEASE).await;
    assert_eq!(pair.other.reap(GRACE).await.unwrap(), 0);
}

/// Redis comes back empty: that is noticed, new locks wait for a moment, and those who had locks have them back.
#[tokio::test]
async fn lost_data_is_noticed_and_locks_are_handed_back() {
    let server = RedisServer::start().await;
    let ledger = live(&server, Duration::from_secs(5), 0);
    assert_eq!(beat(ledger.as_ref()).await, Footing::Firm);
    assert_eq!(beat(ledger.as_ref()).await, Footing::Firm);
    stock(ledger.as_ref(), event(1), &[(1, 9, 9)]).await;
    let asked = request(event(1), 1, 7, 2);
    let LockOutcome::Granted(grant) = ledger.lock(&asked).await.unwrap() else { panic!("nine are free") };
    let client = server.client().await;
    let () = client.flushall(false).await.unwrap();

    assert_eq!(beat(ledger.as_ref()).await, Footing::Doubtful);
    let noticed = std::time::Instant::now();
    assert_eq!(beat(ledger.as_ref()).await, Footing::Firm, "said once");
    let refused = ledger.lock(&request(event(1), 1, 8, 2)).await.expect_err("others had locks before");
    assert_eq!((refused.kind(), refused.is_retryable()), (ErrorKind::Restoring, true));
    // It is not known yet, and on its way back: nobody is told that there is none.
    let wanted = ValidateRequest {
        event: event(1),
        user: user(7),
        category: asked.category,
        quantity: asked.quantity,
        window: MS,
    };
    let owner = Releaser::Owner { user: user(7), session: None };
    for refused in [
        ledger.confirm(asked.lock, None, None).await.map(drop),
        ledger.validate(&wanted).await.map(drop),
        ledger.release(asked.lock, owner).await.map(drop),
    ] {
        assert_eq!(refused.map_err(|error| error.kind()), Err(ErrorKind::Restoring));
    }
    stock(ledger.as_ref(), event(1), &[(1, 9, 9)]).await;
    let memento = Memento {
        lock: asked.lock,
        category: asked.category,
        quantity: asked.quantity,
        created_at: grant.now,
        deadline: grant.deadline,
        kept: Kept::Attended,
        request: None,
        session: None,
    };
    let stock_age_max = Duration::from_mins(1);
    let remembered = RestoreRequest { user: asked.user, memento, generation: 0, stock_age_max };
    assert_eq!(ledger.restore(&remembered).await.unwrap(), RestoreOutcome::Restored);
    let found = ledger.find(asked.lock).await.unwrap().expect("handed back");
    assert_eq!(found.deadline, grant.deadline);
    assert!(found.version > Some(grant.version), "versions and fencing tokens go on rising");
    while ledger.lock(&request(event(1), 1, 8, 2)).await.is_err() {
        assert!(noticed.elapsed() < Duration::from_secs(10), "still restoring");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(noticed.elapsed() >= Duration::from_secs(5), "{:?}", noticed.elapsed());
    let rows = ledger.availability(event(1), Duration::from_mins(1)).await.unwrap().expect("known");
    assert_eq!((rows[0].available(), rows[0].active), (5, 4));
    let unknown = LockId::generate(event(1));
    assert_eq!(ledger.confirm(unknown, None, None).await.unwrap(), ConfirmOutcome::NotFound, "that was long ago");
}

/// Who comes is written down last where the users of a replica are: the leaving of another session of theirs, which took
/// them out of there meanwhile, comes before.
#[tokio::test]
async fn who_is_here_is_written_down_last() {
    let server = RedisServer::start().await;
    let ledger = live(&server, Duration::from_secs(2), 0);
    let client = server.client().await;
    for _ in 0..5 {
        let presence = ledger.enter(user(7), SessionId::generate()).await.unwrap();
        let keys = server.keys().await;
        let hosted = keys.iter().find(|key| key.contains("{r:")).expect("the users of the replica");
        let since: f64 = client.zscore(hosted, "7").await.expect("ZSCORE answers");
        #[expect(clippy::cast_precision_loss, reason = "microseconds since 1970 are below 2^53")]
        let entered = presence.generation as f64;
        assert!(since >= entered, "{since} {entered}");
    }
}

/// The fleet's counts look at ten thousand events at most, and at those that live longest first.
#[tokio::test]
async fn counts_of_very_many_events_are_those_of_the_newest() {
    let on = Stepped::redis().await;
    for portion in 0..11_u64 {
        let old = (0..1000_u64).map(|at| (1.0, (1_000_000 + portion * 1000 + at).to_string())).collect::<Vec<_>>();
        let _: () = on.client().zadd("seatlock:{fleet}:events", None, None, false, false, old).await.unwrap();
    }
    on.stock(event(1), &[(1, 9, 9)]).await;
    on.grant(event(1), 1, 7, 2).await;
    assert_eq!(on.ledger.stats().await.unwrap().users_with_locks, 1);
}
