//! The millisecond of the deadline, on the server's own clock: a confirm, a validate, a release and a stranger's lock
//! of the same last ticket meet there, thousands of times. Never do two of them win, and never is the ticket lost.
//!
//! And ten thousand deadlines in the same millisecond: the tickets come back announced in time, once a category, and
//! every owner is told.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use seatlock::domain::{
    AskOutcome, ConfirmOutcome, EventId, LockId, LockOutcome, LockRequest, ReleaseOutcome, Releaser, ValidateOutcome,
    ValidateRequest,
};
use seatlock::ledger::Ledger;

use crate::audit::{Auditor, Deed, When};
use crate::support::ledger::{SETTLE, category, event, live, quantity, request, snapshot, user};
use crate::support::redis::RedisServer;

const OWNER: u64 = 1;
const STRANGER: u64 = 2;

/// How many races, and how many of them at once.
const RACES: u64 = 2400;
const AT_ONCE: u64 = 60;

/// The Redis server runs on this machine, so this is its clock too.
fn clock_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_millis()).expect("before the year 500000000")
}

/// One event with one ticket, two replicas, and what was asked and answered about it.
struct Race {
    event: EventId,
    replicas: [Arc<dyn Ledger>; 2],
    ticks: AtomicU64,
    deeds: Mutex<Vec<(When, Deed)>>,
}

/// What a contender did in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Won {
    Confirm,
    Release,
    Stranger,
}

impl Race {
    async fn asked<T>(&self, ask: impl Future<Output = T>, told: impl FnOnce(&T) -> Deed) -> T {
        let (began, from_ms) = (self.ticks.fetch_add(1, Ordering::SeqCst), clock_ms());
        let answer = ask.await;
        let (until_ms, ended) = (clock_ms(), self.ticks.fetch_add(1, Ordering::SeqCst));
        let deed = told(&answer);
        self.deeds.lock().expect("nobody panics with it").push((When { began, ended, from_ms, until_ms }, deed));
        answer
    }

    async fn lock(&self, ledger: &dyn Ledger, who: u64, ttl: Duration) -> LockOutcome {
        let wanted = LockRequest { ttl, ..request(self.event, 1, who, 1) };
        self.asked(async { ledger.lock(&wanted).await.expect("an answer") }, |answer| {
            Deed::Lock(wanted.clone(), Some(answer.clone()))
        })
        .await
    }

    async fn confirm(&self, lock: LockId) -> Option<Won> {
        let answer = self
            .asked(async { self.replicas[0].confirm(lock, None, None).await.expect("an answer") }, |answer| {
                Deed::Confirm { lock, user: None, order: None, answer: Some(*answer) }
            })
            .await;
        (answer == ConfirmOutcome::Confirmed).then_some(Won::Confirm)
    }

    async fn release(&self, lock: LockId) -> Option<Won> {
        let by = Releaser::Owner { user: user(OWNER), session: None };
        let answer =
            self.asked(async { self.replicas[1].release(lock, by).await.expect("an answer") }, |answer| {
                Deed::Release { lock, by, answer: Some(answer.clone()) }
            })
            .await;
        matches!(answer, ReleaseOutcome::Released(_)).then_some(Won::Release)
    }

    async fn validate(&self) -> ValidateOutcome {
        let (event, category, quantity) = (self.event, category(1), quantity(1));
        let window = Duration::from_millis(20);
        let wanted = ValidateRequest { event, category, user: user(OWNER), quantity, window };
        self.asked(async { self.replicas[1].validate(&wanted).await.expect("an answer") }, |answer| {
            Deed::Validate(wanted, Some(*answer))
        })
        .await
    }

    /// The stranger asks again and again until the ticket is the stranger's, or sold.
    async fn stranger(&self, sold: &AtomicU64) -> Option<Won> {
        let give_up = clock_ms() + 20_000;
        while clock_ms() < give_up && sold.load(Ordering::SeqCst) == 0 {
            if let LockOutcome::Granted(_) =
                self.lock(self.replicas[0].as_ref(), STRANGER, Duration::from_mins(1)).await
            {
                return Some(Won::Stranger);
            }
            tokio::time::sleep(Duration::from_micros(700)).await;
        }
        None
    }

    /// The owner locks the ticket; at its deadline, give or take, everybody comes at once. Who had the last word.
    async fn run(&self, ttl: Duration, early: [Duration; 3], confirms: bool) -> Vec<Won> {
        let LockOutcome::Granted(grant) = self.lock(self.replicas[0].as_ref(), OWNER, ttl).await else {
            panic!("one is free")
        };
        let sold = AtomicU64::new(0);
        let wait = |early: Duration| {
            let left = grant.deadline.as_ms().saturating_sub(clock_ms());
            tokio::time::sleep(Duration::from_millis(left).saturating_sub(early))
        };
        let owner = async {
            wait(early[0]).await;
            let won = if confirms { self.confirm(grant.lock).await } else { self.release(grant.lock).await };
            sold.fetch_add(u64::from(won == Some(Won::Confirm)), Ordering::SeqCst);
            won
        };
        let validator = async {
            wait(early[1]).await;
            self.validate().await
        };
        let stranger = async {
            wait(early[2]).await;
            self.stranger(&sold).await
        };
        let (owner, _, stranger) = tokio::join!(owner, validator, stranger);
        [owner, stranger].into_iter().flatten().collect()
    }
}

/// See the module. A stranger may follow a release or an expiry, but never a sale; and when nothing was sold, the
/// ticket is the stranger's in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_else_wins_and_nothing_is_lost_at_the_deadline() {
    let server = RedisServer::start().await;
    let replicas = [live(&server, Duration::from_secs(10), 0), live(&server, Duration::from_secs(10), 0)];
    let (mut sold, mut released, mut expired) = (0, 0, 0);
    // How much earlier the owner comes: on a busy machine everybody is late, and the owner must not always be too late.
    let mut head_start = Duration::ZERO;
    for round in 0..RACES / AT_ONCE {
        let races = (0..AT_ONCE).map(|n| {
            let (nth, replicas) = (round * AT_ONCE + n, replicas.clone());
            tokio::spawn(async move {
                let event = event(1 + nth);
                let race = Race { event, replicas, ticks: AtomicU64::new(1), deeds: Mutex::default() };
                let ledger = race.replicas[0].as_ref();
                let asked =
                    race.asked(async { ledger.ask(event, Duration::ZERO).await.expect("an answer") }, |answer| {
                        Deed::Ask { event, answer: Some(*answer) }
                    })
                    .await;
                let AskOutcome::Ask(number) = asked else { panic!("zero always draws") };
                let snapshot = snapshot(&[(1, 1, 1)]);
                race.asked(async { ledger.accept(event, number, &snapshot).await.expect("an answer") }, |answer| {
                    Deed::Accept { event, number, snapshot: snapshot.clone(), answer: Some(*answer) }
                })
                .await;
                // A little before and a little after: each contender's lead goes through its own cycle.
                let lead = |cycle: u64| Duration::from_micros(nth % cycle * 4000 / cycle);
                let ttl = Duration::from_millis(40 + nth % 41);
                let won = race.run(ttl, [lead(7) + head_start, lead(11) * 2, lead(13)], nth % 4 != 3).await;
                let mut auditor = Auditor::new(SETTLE);
                for (when, deed) in race.deeds.into_inner().expect("nobody panicked with it") {
                    auditor.note(when, deed);
                }
                (won, auditor.complaints())
            })
        });
        let (in_time, late) = (sold + released, expired);
        for race in join_all(races).await {
            let (won, complaints) = race.expect("a race ends");
            assert_eq!(complaints, [""; 0], "{won:?}");
            match won[..] {
                [Won::Confirm] => sold += 1,
                [Won::Release, Won::Stranger] => released += 1,
                [Won::Stranger] => expired += 1,
                _ => panic!("two winners or none: {won:?}"),
            }
        }
        if (sold + released - in_time) * 3 < expired - late {
            head_start = (head_start + Duration::from_millis(2)).min(Duration::from_millis(30));
        } else if (expired - late) * 3 < sold + released - in_time {
            head_start = head_start.saturating_sub(Duration::from_millis(2));
        }
    }
    // Each way of ending was met: the races did happen at the deadline and not beside it.
    assert!(sold > 50 && released > 50 && expired > 50, "sold {sold}, released {released}, expired {expired}");
}
