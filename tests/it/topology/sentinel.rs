//! A master dies, under load, again and again; Sentinel promotes a Redis replica.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use seatlock::domain::{ConfirmOutcome, EventId, LockOutcome};
use seatlock::ledger::{ErrorKind, FeedItem, Ledger, Topic};
use tokio::sync::watch;

use super::body::connected;
use super::load::{Load, counts, lost, tickets};
use crate::support::ledger::{event, live_at, request, stock};
use crate::support::node::{Node, ask, until};
use crate::support::sentinel::Sentinels;

const LIMIT: Duration = Duration::from_secs(1);
/// A sentinel that was not scheduled for two seconds distrusts its clock and does nothing for thirty (its TILT mode); then
/// it begins to count.
const PATIENCE: Duration = Duration::from_secs(90);

/// One event that never sells out, and one that is sold out before the master dies.
const ROOMY: u64 = 1_000_000;
const SCARCE: u64 = 60;

/// The highest version that the feed has told of each event.
type Told = watch::Receiver<Heard>;

#[derive(Default)]
struct Heard {
    versions: BTreeMap<EventId, u64>,
    /// When each notice came.
    at: Vec<Instant>,
}

/// What a round showed.
#[derive(Debug)]
struct Round {
    promised: usize,
    lost: usize,
    /// From the end of the master to the next grant, and to the next notice.
    outage: Duration,
    silence: Duration,
    promised_scarce: u64,
    sold_scarce: u64,
    errors: BTreeMap<&'static str, u64>,
}

impl std::fmt::Display for Round {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { promised, lost, outage, silence, promised_scarce, sold_scarce, errors } = self;
        write!(f, "{promised} promised, {lost} lost, {promised_scarce} and {sold_scarce} sold of {SCARCE}, ")?;
        write!(f, "no grant for {outage:.1?}, no notice for {silence:.1?}, {errors:?}")
    }
}

/// How a master ends.
enum End {
    Killed,
    /// Its Redis replicas lose it before, so that they miss its last grants.
    Forsaken,
    /// Asked to step down.
    Retired,
}

async fn eventually<T, E: std::fmt::Display>(mut call: impl AsyncFnMut() -> Result<T, E>) -> T {
    let started = Instant::now();
    loop {
        match call().await {
            Ok(answer) => return answer,
            Err(error) => assert!(started.elapsed() < PATIENCE, "never: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Notes what the feed tells until it ends.
fn listen(ledger: &dyn Ledger) -> Told {
    let mut feed = ledger.feed().expect("taken once");
    let (sender, receiver) = watch::channel(Heard::default());
    tokio::spawn(async move {
        while let Some(item) = feed.recv().await {
            if let FeedItem::Changed(notice) = item {
                sender.send_modify(|heard| {
                    let row = notice.availability;
                    let version = heard.versions.entry(row.event).or_default();
                    *version = row.version.max(*version);
                    heard.at.push(Instant::now());
                });
            }
        }
    });
    receiver
}

async fn round(number: u64, sentinels: &mut Sentinels, ledger: &Arc<dyn Ledger>, told: &mut Told, end: &End) -> Round {
    let (roomy, scarce) = (event(2 * number + 1), event(2 * number + 2));
    eventually(async || ledger.subscribe(Topic::Event(roomy)).await).await;
    stock(ledger.as_ref(), roomy, &[(1, ROOMY, ROOMY)]).await;
    stock(ledger.as_ref(), scarce, &[(1, SCARCE, SCARCE)]).await;
    let load = Load::start(ledger, &[roomy, roomy, roomy, scarce], |_| true);
    // Another moment in each round.
    tokio::time::sleep(Duration::from_millis(300 + number * 97 % 400)).await;
    let master = sentinels.master().await.expect("one master");
    match end {
        End::Killed => sentinels.servers[master].kill(),
        End::Forsaken => {
            let port = sentinels.servers[master].port;
            assert_eq!(ask(port, &["CONFIG", "SET", "requirepass", "x"]).await, "OK");
            ask(port, &["--pass", "x", "--no-auth-warning", "CLIENT", "KILL", "TYPE", "replica"]).await;
            tokio::time::sleep(Duration::from_millis(400)).await;
            sentinels.servers[master].kill();
        }
        End::Retired => sentinels.fail_over().await,
    }
    let ended = Instant::now();
    let outage = match load.granted_after(roomy, ended, PATIENCE).await {
        Ok(answered) => answered - ended,
        Err(wrong) => panic!("{wrong}{}", sentinels.say().await),
    };
    until("another master", PATIENCE, async || sentinels.master().await.is_some_and(|now| now != master)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    load.granted_after(roomy, Instant::now(), PATIENCE).await.expect("a grant");
    let record = load.stop().await;

    // One notice may be lost while a subscription comes and goes, which the feed says; not every one.
    let mut buyer = 1_000_000 + number * 1000;
    eventually(async || {
        buyer += 1;
        let version = match ledger.lock(&request(roomy, 1, buyer, 1)).await {
            Ok(LockOutcome::Granted(grant)) => grant.version,
            Ok(other) => return Err(format!("{other:?}")),
            Err(error) => return Err(error.to_string()),
        };
        let heard = told.wait_for(|heard| heard.versions.get(&roomy).is_some_and(|told| *told >= version));
        match tokio::time::timeout(LIMIT, heard).await {
            Ok(heard) => heard.map(drop).map_err(|_| "the feed has ended".to_owned()),
            Err(_) => Err("nobody is told of grants".to_owned()),
        }
    })
    .await;
    // What was on its way when the master ended still came.
    let afterwards = told.borrow().at.iter().copied().find(|at| *at > ended + Duration::from_millis(300));
    let silence = afterwards.expect("told afterwards") - ended;

    let lost = lost(ledger.as_ref(), &record.promises).await.len();
    for event in [roomy, scarce] {
        let (stock, taken) = counts(ledger.as_ref(), event).await;
        assert!(taken <= stock, "round {number}: {taken} of {stock} are taken");
    }
    let promised_scarce = tickets(&record.promises, scarce);
    let mut sold_scarce = 0;
    for promise in record.promises.iter().filter(|promise| promise.lock.event() == scarce) {
        let answer = eventually(async || ledger.confirm(promise.lock, None, None).await).await;
        if matches!(answer, ConfirmOutcome::Confirmed | ConfirmOutcome::AlreadyConfirmed) {
            sold_scarce += promise.quantity;
        }
    }
    assert!(sold_scarce <= SCARCE, "round {number}: {sold_scarce} of {SCARCE} are sold");
    assert_eq!(record.worst, None, "round {number}: {:?}", record.errors);
    if !matches!(end, End::Retired) {
        sentinels.revive(master).await;
    }
    sentinels.whole().await;
    Round {
        promised: record.promises.len(),
        lost,
        outage,
        silence,
        promised_scarce,
        sold_scarce,
        errors: record.errors,
    }
}

/// Kills the master so many times and prints what each time showed.
#[expect(clippy::print_stdout, reason = "what was measured")]
async fn rounds(count: u64, wait: u32, end: End) -> Vec<Round> {
    let mut sentinels = Sentinels::start().await;
    let ledger = live_at(sentinels.url(), None, LIMIT, wait);
    connected(ledger.as_ref()).await;
    let mut told = listen(ledger.as_ref());
    let mut all = Vec::new();
    for number in 0..count {
        let round = round(number, &mut sentinels, &ledger, &mut told, &end).await;
        println!("round {number}: {round}");
        all.push(round);
    }
    all
}

fn nothing_is_lost(rounds: &[Round]) {
    for (number, round) in rounds.iter().enumerate() {
        assert_eq!(round.lost, 0, "round {number}: {round:?}");
        assert!(round.promised_scarce <= SCARCE, "round {number}: {round:?}");
        assert!(round.promised > 20, "round {number} shows nothing: {round:?}");
    }
}

/// With `SEATLOCK_REDIS_WAIT=1` no grant that was answered is lost, and nothing is promised twice. `FAILOVERS=20` before
/// the command runs twenty rounds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answered_lock_is_lost_when_the_master_is_killed() {
    let count = std::env::var("FAILOVERS").map_or(6, |count| count.parse().expect("a number"));
    let rounds = rounds(count, 1, End::Killed).await;
    nothing_is_lost(&rounds);
}

/// The Redis replicas miss what the master grants last. Who waits for them loses nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_keeps_promises_when_replication_stops_before_the_master_dies() {
    nothing_is_lost(&rounds(1, 1, End::Forsaken).await);
}

/// The same without waiting: promises are lost, and so may be made twice, but what was lost cannot be sold.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_waiting_a_lost_lock_is_never_sold() {
    let rounds = rounds(1, 0, End::Forsaken).await;
    assert!(rounds[0].lost > 0, "the failover was too kind to show anything: {rounds:?}");
}

/// A planned failover, whose old master answers on for a while, and keeps one of its two Redis replicas for as long:
/// only who waits for both loses nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_the_master_steps_down_and_both_are_waited_for() {
    nothing_is_lost(&rounds(1, 2, End::Retired).await);
}

/// A master becomes a replica under a connection that stays: the answer can be retried, and a master is looked for again.
#[tokio::test]
async fn a_demoted_master_is_no_refusal() {
    let server = Node::server(&[]).await;
    let ledger = live_at(format!("redis://127.0.0.1:{}", server.port), None, LIMIT, 0);
    connected(ledger.as_ref()).await;
    stock(ledger.as_ref(), event(1), &[(1, 9, 9)]).await;
    let connections = async || {
        let said = server.ask(&["INFO", "stats"]).await;
        let line =
            said.lines().find(|line| line.starts_with("total_connections_received:")).expect("a line").to_owned();
        line.trim().rsplit(':').next().and_then(|count| count.parse::<u64>().ok()).expect("a number")
    };
    server.ask(&["REPLICAOF", "127.0.0.1", "1"]).await;
    let before = connections().await;
    let error = ledger.lock(&request(event(1), 1, 7, 1)).await.expect_err("a replica");
    assert!(error.kind() == ErrorKind::Disconnected && error.is_retryable(), "{error}");
    until("connected anew", PATIENCE, async || {
        // Asking is a connection too.
        let asked = 1;
        connections().await > before + asked + 1
    })
    .await;
    server.ask(&["REPLICAOF", "NO", "ONE"]).await;
    eventually(async || ledger.lock(&request(event(1), 1, 7, 1)).await).await;
}
