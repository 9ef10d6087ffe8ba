//! A master of three dies; its Redis replica is promoted. A slot moves.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use seatlock::domain::{ConfirmOutcome, EventId, LockOutcome};
use seatlock::ledger::{FeedItem, Topic};

use super::body::{connected, told};
use super::load::{Answer, Load, counts, lost, tickets};
use crate::support::cluster::{Cluster, slot};
use crate::support::ledger::{event, live_at, request, stock};
use crate::support::node::until;

const LIMIT: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(20);
const FLEET: &str = "{fleet}";
const ROOMY: u64 = 1_000_000;
const SCARCE: u64 = 60;

/// The first slots of the three masters; see [`Cluster::start`].
const FIRST: [u16; 3] = [0, 5_461, 10_923];

/// Which of the three masters has a key at the beginning.
fn shard(key: &str) -> usize {
    FIRST.iter().rposition(|first| slot(key) >= *first).expect("zero is the first")
}

/// Neither the fleet's master nor this one: whose users and events go on when the third dies.
fn victim() -> usize {
    (shard(FLEET) + 1) % 3
}

fn lives_on(user: u64) -> bool {
    shard(&format!("{{u:{user}}}")) != victim()
}

/// So many events on a master.
fn events(on: usize, count: usize) -> Vec<EventId> {
    (1..).map(event).filter(|event| shard(&format!("{{e:{event}}}")) == on).take(count).collect()
}

/// The longest time between two grants of these events.
fn longest_pause(answers: &[Answer], of: &[EventId]) -> Duration {
    let mut at: Vec<Instant> = answers
        .iter()
        .filter(|answer| answer.is_grant && of.contains(&answer.event))
        .map(|answer| answer.answered)
        .collect();
    at.sort_unstable();
    at.windows(2).map(|pair| pair[1] - pair[0]).max().expect("several grants")
}

/// Kills a master under load. Events on the other two go on without one error and without a pause; those of the dead
/// one recover when its Redis replica is promoted and, because grants wait for a Redis replica, the killed node is back.
/// Nothing that was promised is lost, and nothing is sold twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_others_go_on_when_a_master_is_killed() {
    let mut cluster = Cluster::start().await;
    let ledger = live_at(cluster.url(), None, LIMIT, 1);
    connected(ledger.as_ref()).await;
    let mut feed = ledger.feed().expect("taken once");
    let hit = events(victim(), 3);
    let spared: Vec<EventId> = (0..3).filter(|on| *on != victim()).flat_map(|on| events(on, 3)).collect();
    let scarce = [hit[0], spared[0], spared[3]];
    let all: Vec<EventId> = hit.iter().chain(&spared).copied().collect();
    for event in &all {
        let tickets = if scarce.contains(event) { SCARCE } else { ROOMY };
        stock(ledger.as_ref(), *event, &[(1, tickets, tickets)]).await;
    }
    ledger.subscribe(Topic::Event(hit[1])).await.expect("subscribed");
    // Two loads, so that nobody waits for the dead master who has something else to do.
    let calm = Load::start(&ledger, &spared, lives_on);
    let hurt = Load::start(&ledger, &hit, lives_on);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(cluster.master(&format!("{{e:{}}}", hit[0]), 0).await, Some(victim()));
    cluster.nodes[victim()].kill();
    let killed = Instant::now();
    let asked = (victim() + 1) % 3;
    let key = format!("{{e:{}}}", hit[0]);
    until("its Redis replica is promoted", PATIENCE, async || cluster.master(&key, asked).await == Some(victim() + 3))
        .await;
    let promoted = killed.elapsed();
    cluster.nodes[victim()].restart(&[]).await;
    let outage = hurt.granted_after(hit[1], killed, PATIENCE).await.expect("a grant") - killed;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (calm, hurt) = (calm.stop().await, hurt.stop().await);

    let pause = longest_pause(&calm.answers, &spared);
    println!(
        "promoted after {promoted:.1?}, granted again after {outage:.1?}; {} grants elsewhere, longest pause {pause:.1?}, \
         errors there {:?}, errors here {:?}",
        calm.promises.len(),
        calm.errors,
        hurt.errors
    );
    assert!(calm.answers.iter().all(|answer| !answer.is_error), "{:?}", calm.errors);
    assert!(pause < Duration::from_secs(2), "{pause:?}");
    assert_eq!(hurt.worst, None);
    let LockOutcome::Granted(grant) = ledger.lock(&request(hit[1], 1, 999_999, 1)).await.expect("an answer") else {
        panic!("no grant");
    };
    let heard = told(&mut feed, |item| match item {
        FeedItem::Changed(notice) => Some(notice.availability.version).filter(|version| *version >= grant.version),
        FeedItem::Personal(..) | FeedItem::Resync => None,
    });
    assert_eq!(heard.await, grant.version);
    for (record, events) in [(&calm, &spared), (&hurt, &hit)] {
        assert_eq!(lost(ledger.as_ref(), &record.promises).await.len(), 0);
        for event in events {
            let (stock, taken) = counts(ledger.as_ref(), *event).await;
            assert!(taken <= stock, "{taken} of {stock} are taken in {event}");
        }
        let event = *events.iter().find(|event| scarce.contains(event)).expect("one is");
        assert!(tickets(&record.promises, event) <= SCARCE);
        let mut sold = 0;
        for promise in record.promises.iter().filter(|promise| promise.lock.event() == event) {
            let answer = ledger.confirm(promise.lock, None, None).await.expect("an answer");
            assert_eq!(answer, ConfirmOutcome::Confirmed);
            sold += promise.quantity;
        }
        assert!(sold <= SCARCE, "{sold}");
    }
}

/// Kills the master of the fleet's own keys: locks everywhere wait for it, and all go on when its Redis replica is
/// promoted, personal messages too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_recovers_when_the_master_of_the_fleet_is_killed() {
    let mut cluster = Cluster::start().await;
    let ledger = live_at(cluster.url(), None, LIMIT, 0);
    connected(ledger.as_ref()).await;
    let mut feed = ledger.feed().expect("taken once");
    let all: Vec<EventId> = (0..3).flat_map(|on| events(on, 1)).collect();
    for event in &all {
        stock(ledger.as_ref(), *event, &[(1, ROOMY, ROOMY)]).await;
        ledger.subscribe(Topic::Event(*event)).await.expect("subscribed");
    }
    let load = Load::start(&ledger, &all, |_| true);
    tokio::time::sleep(Duration::from_millis(500)).await;
    cluster.nodes[shard(FLEET)].kill();
    let killed = Instant::now();
    for event in &all {
        let outage = load.granted_after(*event, killed, PATIENCE).await.expect("a grant") - killed;
        println!("{event} granted again after {outage:.1?}");
    }
    until("reachable", PATIENCE, async || ledger.ping().await.is_ok()).await;
    let record = load.stop().await;
    assert_eq!(record.worst, None);
    for event in &all {
        let (stock, taken) = counts(ledger.as_ref(), *event).await;
        assert!(taken <= stock);
    }
    let mut silent: BTreeSet<EventId> = all.iter().copied().collect();
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut buyer = 2_000_000;
    while !silent.is_empty() {
        assert!(Instant::now() < deadline, "no notice of {silent:?}");
        let mut versions = Vec::new();
        for event in &silent {
            buyer += 1;
            if let Ok(LockOutcome::Granted(grant)) = ledger.lock(&request(*event, 1, buyer, 1)).await {
                versions.push((*event, grant.version));
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        while let Ok(item) = feed.try_recv() {
            if let FeedItem::Changed(notice) = item {
                let row = notice.availability;
                if versions.iter().any(|(event, version)| *event == row.event && *version <= row.version) {
                    silent.remove(&row.event);
                }
            }
        }
    }
}

/// A slot moves to another master while its event is watched: calls follow it, and so does the subscription, within 5 s.
#[tokio::test]
async fn calls_and_subscriptions_follow_a_slot_that_moves() {
    let cluster = Cluster::start().await;
    let ledger = live_at(cluster.url(), None, LIMIT, 0);
    connected(ledger.as_ref()).await;
    let mut feed = ledger.feed().expect("taken once");
    let moved = events(0, 1)[0];
    ledger.subscribe(Topic::Event(moved)).await.expect("subscribed");
    stock(ledger.as_ref(), moved, &[(1, 99, 99)]).await;
    let channel = format!("seatlock:3:{{e:{moved}}}:book");
    let is_carried_by = async |node: usize| {
        cluster.nodes[node].ask(&["PUBSUB", "SHARDCHANNELS"]).await.lines().any(|line| line == channel)
    };
    assert!(is_carried_by(0).await && !is_carried_by(1).await, "changes are sharded");
    cluster.move_slot(slot(&format!("{{e:{moved}}}")), 0, 1).await;

    let first = ledger.lock(&request(moved, 1, 1, 1)).await.expect("follows at once");
    assert!(matches!(first, LockOutcome::Granted(_)), "{first:?}");
    let deadline = Instant::now() + Duration::from_secs(5);
    for user in 2.. {
        assert!(Instant::now() < deadline, "no notice after the slot has moved");
        let answer = ledger.lock(&request(moved, 1, user, 1)).await.expect("an answer");
        let LockOutcome::Granted(grant) = answer else { panic!("{answer:?}") };
        tokio::time::sleep(Duration::from_millis(100)).await;
        let news = std::iter::from_fn(|| feed.try_recv().ok()).any(|item| match item {
            FeedItem::Changed(notice) => notice.availability.version == grant.version,
            FeedItem::Personal(..) | FeedItem::Resync => false,
        });
        if news {
            break;
        }
    }
    assert!(is_carried_by(1).await && !is_carried_by(0).await);
}
