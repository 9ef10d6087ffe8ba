//! Buyers that lock as fast as they are answered, and remember what they were promised.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use seatlock::domain::{EventId, LockId, LockOutcome, LockStatus, Releaser};
use seatlock::ledger::{ErrorKind, Ledger};
use tokio::task::JoinHandle;

use crate::support::ledger::{request, user};

const BUYERS: usize = 8;

/// A grant that was answered and not given back.
#[derive(Debug, Clone, Copy)]
pub struct Promise {
    pub lock: LockId,
    pub quantity: u64,
}

/// One answer to a lock.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    pub event: EventId,
    pub asked: Instant,
    pub answered: Instant,
    pub is_grant: bool,
    pub is_error: bool,
}

#[derive(Default)]
pub struct Record {
    pub promises: Vec<Promise>,
    pub answers: Vec<Answer>,
    /// Errors by kind.
    pub errors: BTreeMap<&'static str, u64>,
    /// The last error that was a refusal or a surprise.
    pub worst: Option<String>,
}

pub struct Load {
    stop: Arc<AtomicBool>,
    record: Arc<Mutex<Record>>,
    buyers: Vec<JoinHandle<()>>,
}

/// Each user asks once.
static NEXT_USER: AtomicU64 = AtomicU64::new(1);

impl Load {
    /// Lets buyers at these events. `may_ask` picks the users.
    pub fn start(ledger: &Arc<dyn Ledger>, events: &[EventId], may_ask: fn(u64) -> bool) -> Self {
        let (stop, record) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Record::default())));
        let buyers = (0..BUYERS).map(|buyer| {
            let (ledger, stop, record) = (Arc::clone(ledger), Arc::clone(&stop), Arc::clone(&record));
            let events = events.to_vec();
            tokio::spawn(async move {
                let mut turn = buyer;
                while !stop.load(Ordering::SeqCst) {
                    let user = std::iter::repeat_with(|| NEXT_USER.fetch_add(1, Ordering::SeqCst))
                        .find(|user| may_ask(*user))
                        .expect("there is always another");
                    buy(ledger.as_ref(), &record, events[turn % events.len()], user).await;
                    turn += 1;
                }
            })
        });
        Self { buyers: buyers.collect(), stop, record }
    }

    /// Waits for a grant of an event that was asked for after a moment; when it was answered. Otherwise what went wrong.
    pub async fn granted_after(&self, event: EventId, moment: Instant, within: Duration) -> Result<Instant, String> {
        loop {
            let found = self.record.lock().unwrap().answers.iter().rev().find_map(|answer| {
                (answer.event == event && answer.is_grant && answer.asked > moment).then_some(answer.answered)
            });
            if let Some(answered) = found {
                return Ok(answered);
            }
            if moment.elapsed() >= within {
                return Err(format!("no grant within {within:?}: {:?}", self.record.lock().unwrap().errors));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub async fn stop(self) -> Record {
        self.stop.store(true, Ordering::SeqCst);
        join_all(self.buyers).await.into_iter().for_each(|buyer| buyer.expect("no buyer panics"));
        std::mem::take(&mut *self.record.lock().unwrap())
    }
}

/// Locks one to three tickets; every eleventh user gives them back.
async fn buy(ledger: &dyn Ledger, record: &Mutex<Record>, event: EventId, id: u64) {
    let quantity = id % 3 + 1;
    let gives_back = id.is_multiple_of(11);
    let asked = Instant::now();
    let answer = ledger.lock(&request(event, 1, id, quantity)).await;
    let promise = match &answer {
        Ok(LockOutcome::Granted(grant)) => Some(Promise { lock: grant.lock, quantity }),
        Ok(_) | Err(_) => None,
    };
    {
        let mut record = record.lock().unwrap();
        let answered = Instant::now();
        let (is_grant, is_error) = (promise.is_some(), answer.is_err());
        record.answers.push(Answer { event, asked, answered, is_grant, is_error });
        match &answer {
            Ok(_) => {}
            Err(error) => {
                *record.errors.entry(error.kind().as_str()).or_default() += 1;
                if matches!(error.kind(), ErrorKind::Refused | ErrorKind::Protocol) {
                    record.worst = Some(error.to_string());
                }
            }
        }
        record.promises.extend(promise.filter(|_| !gives_back));
    }
    match promise {
        // What becomes of it does not matter: nobody holds the ledger to it any more.
        Some(promise) if gives_back => {
            ledger.release(promise.lock, Releaser::Orders { user: Some(user(id)) }).await.ok();
        }
        Some(_) => {}
        // A sold-out event is not asked ten thousand times a second.
        None => tokio::time::sleep(Duration::from_millis(5)).await,
    }
}

/// Of these promises those that the ledger does not know any more.
pub async fn lost(ledger: &dyn Ledger, promises: &[Promise]) -> Vec<Promise> {
    let mut lost = Vec::new();
    for portion in promises.chunks(64) {
        let found = join_all(portion.iter().map(|promise| ledger.find(promise.lock))).await;
        for (promise, found) in portion.iter().zip(found) {
            let status = found.expect("an answer").map(|lock| lock.status);
            if !matches!(status, Some(LockStatus::Active | LockStatus::Confirmed)) {
                lost.push(*promise);
            }
        }
    }
    lost
}

/// All tickets of promises about an event.
pub fn tickets(promises: &[Promise], event: EventId) -> u64 {
    promises.iter().filter(|promise| promise.lock.event() == event).map(|promise| promise.quantity).sum()
}

/// (stock, active + settling) of an event's one category.
pub async fn counts(ledger: &dyn Ledger, event: EventId) -> (u64, u64) {
    let rows = ledger.availability(event, Duration::from_hours(1)).await.expect("an answer").expect("known");
    (rows[0].stock, rows[0].active + rows[0].settling)
}
