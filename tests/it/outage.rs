//! Redis stops, dies, forgets or lags: calls end in time with an error that says what is known, and everything works again
//! by itself when Redis does.

use std::time::{Duration, Instant};

use fred::interfaces::ClientLike;
use fred::types::{ClusterHash, CustomCommand, Value};
use seatlock::domain::{ConfirmOutcome, LockId, LockOutcome, LockRequest, LockStatus};
use seatlock::ledger::{ErrorKind, FeedItem, Ledger, Topic};

use crate::support::ledger::{event, live, request, stock, user};
use crate::support::redis::RedisServer;

const LIMIT: Duration = Duration::from_millis(500);

/// Waits until the ledger answers again.
async fn recovered(ledger: &dyn Ledger) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while ledger.ping().await.is_err() {
        assert!(Instant::now() < deadline, "the ledger did not recover within 10 s");
    }
}

/// Every call of a burst ends in time.
async fn all_end_in_time(ledger: &dyn Ledger) {
    for user in 1..=5 {
        let asked = Instant::now();
        let answer = ledger.lock(&request(event(1), 1, user, 1)).await;
        assert!(asked.elapsed() < LIMIT * 2, "answered after {:?}", asked.elapsed());
        assert!(answer.expect_err("no Redis").is_retryable());
    }
}

/// A stopped process (every call hangs) and a killed one (every call fails), each while calls keep coming.
#[tokio::test]
async fn calls_end_in_time_and_everything_recovers() {
    let mut server = RedisServer::start().await;
    let ledger = live(&server, LIMIT, 0);
    recovered(ledger.as_ref()).await;
    stock(ledger.as_ref(), event(1), &[(1, 100, 100)]).await;

    server.signal("STOP");
    all_end_in_time(ledger.as_ref()).await;
    server.signal("CONT");
    recovered(ledger.as_ref()).await;
    let granted = ledger.lock(&request(event(1), 1, 50, 1)).await.expect("Redis is back");
    assert!(matches!(granted, LockOutcome::Granted(_)), "{granted:?}");

    server.kill();
    all_end_in_time(ledger.as_ref()).await;
    server.restart().await;
    recovered(ledger.as_ref()).await;
    let forgotten = ledger.lock(&request(event(1), 1, 51, 1)).await.expect("Redis is back");
    assert_eq!(forgotten, LockOutcome::StockUnknown, "an empty Redis knows no stock and grants nothing");
    stock(ledger.as_ref(), event(1), &[(1, 100, 100)]).await;
    assert!(matches!(ledger.lock(&request(event(1), 1, 51, 1)).await, Ok(LockOutcome::Granted(_))));
}

/// Subscriptions stand again after Redis died, and say that something may have been missed.
#[tokio::test]
async fn subscriptions_come_back_and_say_so() {
    let mut server = RedisServer::start().await;
    let ledger = live(&server, LIMIT, 0);
    recovered(ledger.as_ref()).await;
    let mut feed = ledger.feed().expect("taken once");
    ledger.subscribe(Topic::Event(event(1))).await.expect("Redis answers");
    stock(ledger.as_ref(), event(1), &[(1, 9, 9)]).await;
    let mut next = async || {
        let item = tokio::time::timeout(Duration::from_secs(10), feed.recv()).await.expect("told in time");
        item.expect("the feed lives")
    };
    while !matches!(next().await, FeedItem::Changed(_)) {}
    server.kill();
    server.restart().await;
    while next().await != FeedItem::Resync {}
    recovered(ledger.as_ref()).await;
    stock(ledger.as_ref(), event(1), &[(1, 9, 8)]).await;
    while !matches!(next().await, FeedItem::Changed(notice) if notice.availability.stock == 8) {}
}

/// Many grants wait for Redis replicas that are not there: they wait together, so each is answered in time, and so is
/// everything else.
#[tokio::test]
async fn waiting_in_vain_holds_up_nobody() {
    let server = RedisServer::start().await;
    let ledger = live(&server, LIMIT * 2, 1);
    recovered(ledger.as_ref()).await;
    stock(ledger.as_ref(), event(1), &[(1, 900, 900)]).await;
    let locks: Vec<_> = (1..=40).map(|user| request(event(1), 1, user, 1)).collect();
    let answers = futures_util::future::join_all(locks.iter().map(|lock| ledger.lock(lock)));
    let pings = async {
        for _ in 0..5 {
            ledger.ping().await.expect("answered in time");
        }
    };
    for answer in futures_util::future::join(answers, pings).await.0 {
        assert_eq!(answer.expect_err("nobody follows").kind(), ErrorKind::NotReplicated);
    }
}

/// A grant that too few Redis replicas have is undone and not answered; with enough of them it is.
#[tokio::test]
async fn a_grant_waits_for_redis_replicas() {
    let (primary, follower) = (RedisServer::start().await, RedisServer::start().await);
    let ledger = live(&primary, Duration::from_secs(2), 1);
    recovered(ledger.as_ref()).await;
    stock(ledger.as_ref(), event(1), &[(1, 9, 9)]).await;
    let error = ledger.lock(&request(event(1), 1, 7, 2)).await.expect_err("nobody follows");
    assert_eq!(error.kind(), ErrorKind::NotReplicated);
    let free =
        async || ledger.availability(event(1), LIMIT * 1000).await.expect("an answer").expect("known")[0].available();
    assert_eq!(free().await, 9, "undone");

    let port = primary.listen(crate::support::free_port()).await;
    let command = CustomCommand::new_static("REPLICAOF", ClusterHash::Random, false);
    let client = follower.client().await;
    let _: Value = client.custom(command, vec!["127.0.0.1".to_owned(), port.to_string()]).await.expect("follows");
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match ledger.lock(&request(event(1), 1, 8, 2)).await {
            Ok(LockOutcome::Granted(_)) => break,
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NotReplicated);
                assert!(Instant::now() < deadline, "never replicated");
            }
        }
    }
    assert_eq!(free().await, 7);
}

/// A repeat of a lock that its user has been told of is not answered either while too few have it, and nothing of it is
/// undone, confirmed or not.
#[tokio::test]
async fn a_repeat_that_is_not_replicated_ends_nothing() {
    let (primary, mut follower) = (RedisServer::start().await, RedisServer::start().await);
    let port = primary.listen(crate::support::free_port()).await;
    let ledger = live(&primary, Duration::from_secs(2), 1);
    recovered(ledger.as_ref()).await;
    stock(ledger.as_ref(), event(1), &[(1, 9, 9)]).await;
    let command = CustomCommand::new_static("REPLICAOF", ClusterHash::Random, false);
    let client = follower.client().await;
    let _: Value = client.custom(command, vec!["127.0.0.1".to_owned(), port.to_string()]).await.expect("follows");
    let deadline = Instant::now() + Duration::from_secs(20);
    while ledger.lock(&request(event(1), 1, 9, 1)).await.is_err() {
        assert!(Instant::now() < deadline, "never replicated");
    }
    let wanted = [7, 8].map(|user| LockRequest { request: "r-1".parse().ok(), ..request(event(1), 1, user, 2) });
    let mut locks = Vec::new();
    for wanted in &wanted {
        let LockOutcome::Granted(grant) = ledger.lock(wanted).await.expect("an answer") else { panic!("free") };
        locks.push(grant.lock);
    }
    assert_eq!(ledger.confirm(locks[1], Some(user(8)), None).await.expect("an answer"), ConfirmOutcome::Confirmed);
    follower.kill();
    for (wanted, lock) in wanted.iter().zip(&locks) {
        for fresh in [wanted.clone(), LockRequest { lock: LockId::generate(event(1)), ..wanted.clone() }] {
            match ledger.lock(&fresh).await {
                Err(error) => assert_eq!(error.kind(), ErrorKind::NotReplicated),
                // Nothing is written for a lock that is confirmed: its request is over.
                Ok(outcome) => assert!(matches!(outcome, LockOutcome::RequestEnded { .. }), "{outcome:?}"),
            }
            let status = ledger.find(*lock).await.expect("an answer").expect("known").status;
            let expected = if *lock == locks[1] { LockStatus::Confirmed } else { LockStatus::Active };
            assert_eq!(status, expected);
        }
    }
}
