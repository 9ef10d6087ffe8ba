//! One short life of some locks, for any ledger.

use std::sync::Arc;
use std::time::{Duration, Instant};

use seatlock::domain::{
    ChangeKind, ConfirmOutcome, LockOutcome, LockStatus, OrderOutcome, OrderResult, Personal, ReleaseOutcome,
    ReleaseReason, Releaser, ReplicaId, ReplicaReport, SessionId, ValidateOutcome, ValidateRequest,
};
use seatlock::ledger::{FeedItem, Ledger, Topic};
use tokio::sync::mpsc;

use crate::support::ledger::{category, event, order_id, quantity, report, request, stock, user};

const AGE: Duration = Duration::from_mins(10);

/// The next thing from the feed that is wanted.
pub async fn told<T>(feed: &mut mpsc::Receiver<FeedItem>, wanted: impl Fn(FeedItem) -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        let item = tokio::time::timeout_at(deadline, feed.recv()).await.expect("told within 10 s");
        if let Some(found) = wanted(item.expect("the feed lives")) {
            return found;
        }
    }
}

/// Waits until a call succeeds.
pub async fn connected(ledger: &dyn Ledger) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while let Err(error) = ledger.ping().await {
        assert!(Instant::now() < deadline, "no connection within 10 s: {error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Everything that a ledger does, once, on so many events and users that a cluster has them everywhere.
pub async fn runs(ledger: Arc<dyn Ledger>) {
    let ledger = ledger.as_ref();
    connected(ledger).await;
    let mut feed = ledger.feed().expect("taken once");
    for id in 1..=12 {
        lives(ledger, &mut feed, id).await;
    }
    let replica = ReplicaId::generate();
    ledger.beat(&ReplicaReport { replica, users: 3, sockets: 4 }).await.expect("a beat");
    let fleet = ledger.stats().await.expect("an answer");
    assert_eq!((fleet.replicas, fleet.users, fleet.sockets), (1, 3, 4));
    assert_eq!((fleet.active, fleet.expired, fleet.confirmed, fleet.released), (0, 12, 12, 12));
    ledger.farewell(replica).await.expect("a farewell");
}

async fn lives(ledger: &dyn Ledger, feed: &mut mpsc::Receiver<FeedItem>, id: u64) {
    let event = event(id);
    let (buyer, other) = (user(1000 + id), user(2000 + id));
    for topic in [Topic::Event(event), Topic::User(buyer), Topic::User(other)] {
        ledger.subscribe(topic).await.expect("subscribed");
    }
    stock(ledger, event, &[(1, 100, 100)]).await;
    let known = ledger.availability(event, AGE).await.expect("an answer").expect("known");
    assert_eq!(known[0].available(), 100);

    let session = SessionId::generate();
    ledger.enter(buyer, session).await.expect("entered");
    let Ok(LockOutcome::Granted(grant)) = ledger.lock(&request(event, 1, buyer.value(), 2)).await else {
        panic!("no grant in event {id}");
    };
    let locked = told(feed, |item| match item {
        FeedItem::Changed(notice) => {
            let by_buyer =
                |change: &&seatlock::ledger::Change| change.user == buyer && change.kind == ChangeKind::Locked;
            notice.changes.iter().any(|change| by_buyer(&change)).then_some(notice.availability)
        }
        FeedItem::Personal(..) | FeedItem::Resync => None,
    })
    .await;
    assert_eq!((locked.event, locked.active), (event, 2));
    let held = ledger.locks_of(buyer).await.expect("an answer");
    assert_eq!(held.iter().map(|lock| lock.id).collect::<Vec<_>>(), [grant.lock]);

    let wish = ValidateRequest {
        event,
        category: category(1),
        user: buyer,
        quantity: quantity(2),
        window: Duration::from_mins(1),
    };
    let valid = ledger.validate(&wish).await.expect("an answer");
    assert!(matches!(valid, ValidateOutcome::Valid { lock, .. } if lock == grant.lock), "{valid:?}");
    let order = order_id(&format!("order-{id}"));
    let confirmed = ledger.confirm(grant.lock, Some(buyer), Some(&order)).await.expect("an answer");
    assert_eq!(confirmed, ConfirmOutcome::Confirmed);
    let mut done = report(event, &format!("order-{id}"), 1, buyer.value(), 2, OrderResult::Completed);
    done.lock = Some(grant.lock);
    assert_eq!(ledger.order(&done).await.expect("an answer"), OrderOutcome::Noted);
    let found = ledger.find(grant.lock).await.expect("an answer").expect("known");
    assert_eq!(found.status, LockStatus::Confirmed);
    stock(ledger, event, &[(1, 100, 98)]).await;

    let Ok(LockOutcome::Granted(second)) = ledger.lock(&request(event, 1, buyer.value(), 3)).await else {
        panic!("no second grant in event {id}");
    };
    let released = ledger.release(second.lock, Releaser::Orders { user: Some(buyer) }).await.expect("an answer");
    assert!(matches!(released, ReleaseOutcome::Released(_)), "{released:?}");

    let mut brief = request(event, 1, other.value(), 4);
    brief.ttl = Duration::from_millis(50);
    let Ok(LockOutcome::Granted(third)) = ledger.lock(&brief).await else { panic!("no third grant in event {id}") };
    let deadline = Instant::now() + Duration::from_secs(10);
    while ledger.sweep().await.expect("a sweep").expired == 0 {
        assert!(Instant::now() < deadline, "never swept");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let expired = told(feed, |item| match item {
        FeedItem::Personal(user, Personal::Expired { lock, .. }) => Some((user, lock)),
        FeedItem::Personal(..) | FeedItem::Changed(_) | FeedItem::Resync => None,
    })
    .await;
    assert_eq!(expired, (other, third.lock));
    let message = Personal::Released {
        lock: second.lock,
        category: category(1),
        quantity: quantity(3),
        reason: ReleaseReason::Released,
        by: None,
    };
    ledger.tell(buyer, &message).await.expect("told");
    let heard = told(feed, |item| match item {
        FeedItem::Personal(user, message @ Personal::Released { .. }) if user == buyer => Some(message),
        FeedItem::Personal(..) | FeedItem::Changed(_) | FeedItem::Resync => None,
    })
    .await;
    assert_eq!(heard, message);
    ledger.leave(buyer, session, Duration::from_secs(5)).await.expect("left");

    let last = ledger.availability(event, AGE).await.expect("an answer").expect("known")[0];
    assert_eq!((last.stock, last.active, last.settling), (98, 0, 0));
    ledger.unsubscribe(Topic::Event(event)).await.expect("unsubscribed");
    ledger.unsubscribe(Topic::User(buyer)).await.expect("unsubscribed");
}
