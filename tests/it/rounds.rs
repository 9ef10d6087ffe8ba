//! Rounds through a full room: what is told while some of the room have been told and others have not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use seatlock::ledger::MemoryLedger;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::support::gateway::{Got, Raw, Replica, lock, options, replica_with_tick};
use crate::support::ledger::options as ledger_options;

/// A replica whose rooms may be told far more often than one of hundreds can be gone round.
async fn room_of_many_rounds() -> Replica {
    replica_with_tick(Arc::new(MemoryLedger::new(ledger_options())), options(), Duration::from_millis(1)).await
}

/// What one watcher has heard of a category.
#[derive(Debug, Default)]
struct Heard {
    versions: Vec<u64>,
    moved: BTreeMap<String, u64>,
}

impl Heard {
    /// Listens until nothing comes for a second after the `end`.
    async fn all(mut watcher: Raw, end: CancellationToken) -> Self {
        let mut heard = Self::default();
        loop {
            match timeout(Duration::from_secs(1), watcher.next()).await {
                Ok(Got::Event(name, data)) if name == "availability-update" && data["categoryId"] == 2 => {
                    heard.versions.push(data["version"].as_u64().expect("a version"));
                }
                Ok(Got::Event(name, data)) if name.ends_with("-by-other-user") => {
                    *heard.moved.entry(name).or_default() += data["quantity"].as_u64().expect("a quantity");
                }
                Err(_) if end.is_cancelled() => return heard,
                Ok(Got::Event(..)) | Err(_) => {}
                Ok(other) => panic!("{other:?} after {heard:?}"),
            }
        }
    }

    /// Whether so many tickets were locked and as many released.
    fn is_whole(&self, each: u64) -> bool {
        let moved = ["tickets-locked-by-other-user", "tickets-released-by-other-user"].map(|kind| self.moved.get(kind));
        moved == [Some(&each); 2] && self.versions.is_sorted()
    }
}

/// News that come while a round is under way join in: each watcher hears every ticket that others moved exactly once and
/// no counts that are older than what it knows, whether it had been told the news before or hears both at once.
#[tokio::test(flavor = "multi_thread")]
async fn news_that_join_in_are_told_to_everybody_once() {
    const TURNS: u64 = 150;
    let replica = room_of_many_rounds().await;
    let end = CancellationToken::new();
    let mut listening = Vec::new();
    for user in 2..400 {
        let mut one = replica.client(user).await;
        one.ask("join-event-room", &json!({ "eventId": 1 })).await;
        listening.push(tokio::spawn(Heard::all(one, end.clone())));
    }
    let mut listening = listening.into_iter();
    let buy = async |user: u64| {
        let mut buyer = replica.client(user).await;
        for _ in 0..TURNS {
            for request in ["lock-tickets", "unlock-tickets"] {
                assert_eq!(buyer.ask(request, &lock(1, 2, 1)).await["success"], true);
            }
        }
    };
    tokio::join!(buy(2), buy(3));
    end.cancel();
    // The two buyers are in the room too: each hears of the other's tickets only.
    for buyer in listening.by_ref().take(2) {
        let heard = buyer.await.expect("no panic");
        assert!(heard.is_whole(TURNS), "{heard:?}");
    }
    let mut sequences = BTreeSet::new();
    for watcher in listening {
        let heard = watcher.await.expect("no panic");
        assert!(heard.is_whole(2 * TURNS), "{heard:?}");
        sequences.insert(heard.versions);
    }
    // Who is told two news at once does not hear the former's counts.
    assert!(sequences.len() > 1, "nothing joined in");
}

/// Who joins again, having left or not, while rounds go through a full room: nothing comes that is older than the answer.
#[tokio::test(flavor = "multi_thread")]
async fn who_joins_again_is_told_nothing_older() {
    let replica = room_of_many_rounds().await;
    let event = json!({ "eventId": 1 });
    // So many that a round is made of many portions.
    let mut crowd = Vec::new();
    for user in 100..400 {
        let mut one = replica.client(user).await;
        one.ask("join-event-room", &event).await;
        crowd.push(tokio::spawn(async move { while one.next().await != Got::Closed {} }));
    }
    let mut buyer = replica.client(2).await;
    let buying = tokio::spawn(async move {
        loop {
            buyer.ask("lock-tickets", &lock(1, 2, 1)).await;
            buyer.ask("unlock-tickets", &lock(1, 2, 1)).await;
        }
    });
    let mut client = replica.client(1).await;
    let version = |counts: &Value| counts["version"].as_u64().expect("a version");
    let (mut joined, mut updates, mut changes) = (0_u64, 0_u64, 0);
    let end = Instant::now() + Duration::from_mins(1);
    for turn in 0.. {
        if changes > 40 && updates > 200 {
            break;
        }
        assert!(Instant::now() < end, "{changes} joins saw another version, {updates} updates: too few");
        if turn % 3 == 0 {
            client.emit("leave-event-room", &event).await;
        }
        client.emit("join-event-room", &event).await;
        let (mut answered, mut until) = (false, end);
        loop {
            match timeout_at(until, client.next()).await {
                Ok(Got::Event(name, data)) if name == "joined-event-room" => {
                    let second = version(&data["availability"][1]);
                    changes += u64::from(second > joined);
                    (joined, answered) = (second, true);
                    until = Instant::now() + Duration::from_millis(turn % 40);
                }
                Ok(Got::Event(name, data)) if name == "availability-update" && data["categoryId"] == 2 => {
                    assert!(!answered || version(&data) >= joined, "{data} after {joined}");
                    updates += 1;
                }
                Ok(Got::Event(..)) => {}
                Err(_) if answered => break,
                other => panic!("{other:?}"),
            }
        }
    }
    buying.abort();
    crowd.iter().for_each(tokio::task::JoinHandle::abort);
}

/// Who comes while a round goes through a full room hears what joins in later, as everybody does, and nothing that is
/// older than the answer.
#[tokio::test(flavor = "multi_thread")]
async fn who_comes_in_the_midst_of_a_round_ends_on_the_right_counts() {
    const BURSTS: u64 = 60;
    let replica = room_of_many_rounds().await;
    let event = json!({ "eventId": 1 });
    let version = |counts: &Value| counts["version"].as_u64().expect("a version");
    let (heard, _) = watch::channel(0_u64);
    let mut crowd = Vec::new();
    for user in 100..400 {
        let (mut one, heard) = (replica.client(user).await, heard.clone());
        one.ask("join-event-room", &event).await;
        crowd.push(tokio::spawn(async move {
            loop {
                match one.next().await {
                    Got::Event(name, data) if name == "availability-update" && data["categoryId"] == 2 => {
                        heard.send_if_modified(|latest| {
                            std::mem::replace(latest, version(&data).max(*latest)) < *latest
                        });
                    }
                    Got::Event(..) => {}
                    Got::Ack(..) | Got::Refused(_) | Got::Connected | Got::Closed => return,
                }
            }
        }));
    }
    let mut buyer = replica.client(2).await;
    let (mut client, mut meanwhile) = (replica.client(1).await, 0);
    for burst in 0..BURSTS {
        let buying = async {
            for request in ["lock-tickets", "unlock-tickets", "lock-tickets", "unlock-tickets"] {
                assert_eq!(buyer.ask(request, &lock(1, 2, 1)).await["success"], true);
                tokio::time::sleep(Duration::from_millis(burst % 5)).await;
            }
        };
        let coming = async {
            tokio::time::sleep(Duration::from_millis(burst % 11)).await;
            client.emit("leave-event-room", &event).await;
            version(&client.ask("join-event-room", &event).await["availability"][1])
        };
        let ((), joined) = tokio::join!(buying, coming);
        let (mut latest, end) = (joined, Instant::now() + Duration::from_secs(5));
        // Everybody else may still be on the way there, and is told nothing more when nothing has come for so long.
        loop {
            match timeout(Duration::from_millis(200), client.next()).await {
                Ok(Got::Event(name, data)) if name == "availability-update" && data["categoryId"] == 2 => {
                    assert!(version(&data) >= latest, "{data} after {latest}");
                    latest = version(&data);
                }
                Ok(Got::Event(..)) => {}
                Err(_) if latest == *heard.borrow() => break,
                Err(_) => assert!(Instant::now() < end, "burst {burst}: {latest} instead of {}", *heard.borrow()),
                other => panic!("{other:?}"),
            }
        }
        meanwhile += u64::from(joined < latest);
    }
    assert!(meanwhile > BURSTS / 6, "only {meanwhile} times something changed after the answer");
    crowd.iter().for_each(tokio::task::JoinHandle::abort);
}
