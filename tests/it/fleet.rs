//! A fleet under faults: three replicas behind HAProxy, real clients and orders that never stop, and everything around
//! them breaking. An auditor hears every request and every answer.
//!
//! `SEATLOCK_FAULTS` says how many faults there are (without it, every kind at least once), `SEATLOCK_SEED` which and in
//! which order. An hour of it:
//!
//! ```text
//! SEATLOCK_FAULTS=300 cargo test --test it fleet::nothing_is_lost -- --nocapture
//! ```

mod crowd;
mod faults;
mod log;
mod orders;
mod shop;
mod stage;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use self::crowd::{Counts, Crowd};
use self::faults::{Breaker, Fault};
use self::log::Log;
use self::orders::Orders;
use self::stage::Stage;
use crate::audit::outside::{self, Rules, Seen, Span};
use crate::support::say;

const EVENT: u64 = 1;

/// Categories and their tickets: one that everybody fights for, some with room.
const CATEGORIES: [(u64, u64); 4] = [(1, 8), (2, 60), (3, 400), (4, 20)];

const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// The service promises its request timeout; the rest is the way there and back on a machine that is busy with compilers.
const ANSWER_LATE: Duration = Duration::from_secs(5);

/// Rooms are promised to be right within 5 s of the path being back; twice that where processors are shared.
const CONVERGED_WITHIN: Duration = Duration::from_secs(10);

/// Real clients back off for a second at most here, and a connection attempt that hangs is given up after five.
const BACK_WITHIN: Duration = Duration::from_secs(25);

/// A client that is moved is back after its first pause, a tenth of a second; the rest is for a busy machine, and for pages
/// that their users close and open again meanwhile.
const AWAY_MAX: Duration = Duration::from_secs(8);

const GRACE: Duration = Duration::from_secs(10);
const WINDOW: Duration = Duration::from_secs(15);

/// Short, so that each of them runs out many times.
const SETTINGS: &[(&str, &str)] = &[
    ("SEATLOCK_LOCK_TTL", "20s"),
    ("SEATLOCK_CHECKOUT_WINDOW", "15s"),
    ("SEATLOCK_DISCONNECT_GRACE", "10s"),
    // Longer than it takes a confirmation to be answered, whatever is broken: an orders-service that knows nothing for
    // longer than this sells tickets that somebody else may have by then.
    ("SEATLOCK_SETTLE_TIMEOUT", "30s"),
    ("SEATLOCK_EXPIRY_WARNING", "5s"),
    ("SEATLOCK_STOCK_REFRESH", "2s"),
    ("SEATLOCK_REQUEST_TIMEOUT", "2s"),
    ("SEATLOCK_DRAIN_TIMEOUT", "15s"),
    ("SEATLOCK_RATE_LIMIT", "off"),
    ("SEATLOCK_CORS_ORIGINS", "*"),
];

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).expect("short")
}

/// The same numbers for the same seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % u64::try_from(bound).expect("small")).expect("small")
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

/// The whole run.
struct Run {
    stage: Arc<Stage>,
    log: Arc<Log>,
    crowd: Arc<Crowd>,
    orders: Arc<Orders>,
    breaker: Breaker,
    began: Instant,
    done: AtomicUsize,
    /// How long the slowest room took, by fault.
    converged: Mutex<Vec<(Duration, Fault)>>,
}

/// Everything breaks, again and again, and nothing is sold twice, no lock is lost that must not be, every request has an
/// answer or a reason for having none, every room sees the truth again, and in the end every ticket is where it belongs.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_whatever_breaks() {
    let seed = number("SEATLOCK_SEED").unwrap_or_else(|| log::now() % 1_000_000);
    let mut random = Random(seed);
    let mut lanes = faults::lanes(|bound| random.below(bound));
    let least: usize = lanes.iter().map(Vec::len).sum();
    let wanted = number("SEATLOCK_FAULTS").map_or(least, |count| usize::try_from(count).expect("a count"));
    say(&format!("fleet: seed {seed}, {wanted} faults"));
    let run = Run::begin(seed).await;
    let failed = Arc::clone(&run).play(&mut lanes, wanted, &mut random).await;
    run.verdict(failed, &format!("SEATLOCK_SEED={seed} SEATLOCK_FAULTS={wanted}"));
}

/// All replicas are restarted one after the other, twice, while everybody goes on: no lock and no answer is lost, and nobody
/// is away for long.
#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_loses_no_lock_and_no_answer() {
    let run = Run::begin(log::now() % 1_000_000).await;
    let failed = Arc::clone(&run).roll().await;
    run.verdict(failed, "two rolling restarts");
}

impl Run {
    /// Everything runs, and everybody has come.
    async fn begin(seed: u64) -> Arc<Self> {
        let stage = Stage::start(&CATEGORIES, SETTINGS).await;
        let log = Arc::new(Log::default());
        Log::watch_the_clock(&log);
        let book = Arc::clone(&stage.shop.lock().await.book);
        for (category, total) in CATEGORIES {
            log.note(Span::at(0), Seen::Tickets { category, total });
        }
        let url = stage.rabbit.lock().await.url();
        let orders = Orders::start(url, Arc::clone(&log), Arc::clone(&book));
        let crowd = Crowd::begin(&stage.url, seed, 24, 16, Arc::clone(&log), Arc::clone(&orders)).await;
        let breaker =
            Breaker { stage: Arc::clone(&stage), log: Arc::clone(&log), shop_whole: tokio::sync::Mutex::default() };
        Arc::new(Self {
            stage,
            log,
            crowd,
            orders,
            breaker,
            began: Instant::now(),
            done: AtomicUsize::new(0),
            converged: Mutex::default(),
        })
    }

    /// Fails if anything is to be complained of; what led to it was told as it happened.
    fn verdict(&self, failed: Result<(), String>, how: &str) {
        self.orders.stop();
        let mut complaints = self.log.complaints();
        complaints.extend(failed.err());
        complaints.extend(self.stage.panics.lock().unwrap().iter().cloned());
        let rules = Rules { grace: millis(GRACE), window: millis(WINDOW), shown: 5_000 };
        complaints.extend(outside::complaints(&self.log.seen(), rules));
        self.summary();
        assert!(
            complaints.is_empty(),
            "{how}: {} complaints:\n{}",
            complaints.len(),
            complaints.iter().take(40).cloned().collect::<Vec<_>>().join("\n"),
        );
    }

    /// Two rolling restarts, and rest.
    async fn roll(self: Arc<Self>) -> Result<(), String> {
        self.everybody_sees("the beginning", None).await?;
        for _ in 0..2 {
            let began = log::now();
            self.tell("Rolling");
            self.breaker.run(Fault::Rolling).await;
            self.done.fetch_add(1, Ordering::SeqCst);
            self.everybody_sees("the room after it", Some(Fault::Rolling)).await?;
            self.crowd.check().await;
            let (moved, longest) = self.crowd.absences(began);
            self.tell(&format!("  {moved} times somebody was away, for {longest} ms at most"));
            if moved < 24 || longest > millis(AWAY_MAX) {
                return Err(format!("{moved} times somebody was away, for {longest} ms at most"));
            }
        }
        self.rest().await
    }

    fn tell(&self, what: &str) {
        say(&format!("{:7.1} s  {what}", self.began.elapsed().as_secs_f64()));
    }

    /// Breaks everything, then lets it come to rest and counts the tickets.
    async fn play(
        self: Arc<Self>,
        lanes: &mut [Vec<Fault>; 3],
        wanted: usize,
        random: &mut Random,
    ) -> Result<(), String> {
        self.everybody_sees("the beginning", None).await?;
        let over = CancellationToken::new();
        let supply = tokio::spawn(supply(Arc::clone(&self.orders), over.clone(), random.below(1 << 20) as u64));
        let every_kind = wanted >= lanes.iter().map(Vec::len).sum();
        let mut running = Vec::new();
        for (lane, faults) in lanes.iter_mut().enumerate() {
            random.shuffle(faults);
            let (run, mut random, faults) = (Arc::clone(&self), Random(random.below(1 << 30) as u64), faults.clone());
            running.push(tokio::spawn(async move { run.lane(lane, faults, wanted, every_kind, &mut random).await }));
        }
        for lane in running {
            lane.await.map_err(|error| format!("a lane panicked: {error}"))??;
        }
        over.cancel();
        supply.await.map_err(|error| error.to_string())?;
        self.rest().await
    }

    /// The faults of one lane, one after the other, until so many have happened; each at least once where there is room.
    async fn lane(
        &self,
        lane: usize,
        faults: Vec<Fault>,
        wanted: usize,
        every_kind: bool,
        random: &mut Random,
    ) -> Result<(), String> {
        let mut bag = faults.clone();
        let mut first = every_kind;
        while first || self.done.load(Ordering::SeqCst) < wanted {
            let Some(fault) = bag.pop() else {
                first = false;
                bag.clone_from(&faults);
                random.shuffle(&mut bag);
                continue;
            };
            self.tell(&format!("{fault}"));
            self.breaker.run(fault).await;
            self.done.fetch_add(1, Ordering::SeqCst);
            if lane == 0 {
                self.everybody_sees("the room after it", Some(fault)).await?;
                self.crowd.check().await;
                sleep(fault.rest()).await;
            } else {
                sleep(fault.rest().max(Duration::from_millis(500))).await;
            }
        }
        Ok(())
    }

    /// Every client is connected and has every category's counts as they were when the ledger could be read again, or later
    /// ones.
    async fn everybody_sees(&self, what: &str, fault: Option<Fault>) -> Result<(), String> {
        let healed = Instant::now();
        let truth = loop {
            if let Some(counts) = self.stage.counts_of_all().await {
                break counts;
            }
            if healed.elapsed() > Duration::from_secs(20) {
                let why = self.stage.unreadable().await;
                return Err(format!("{what}: the ledger cannot be read: {why}"));
            }
            sleep(Duration::from_millis(100)).await;
        };
        let readable = Instant::now();
        let mut right = Duration::ZERO;
        loop {
            let views = self.crowd.views().await;
            let behind: Vec<_> = views.iter().filter(|view| view.is_on && !sees(&view.counts, &truth)).collect();
            let away: Vec<u64> = views.iter().filter(|view| !view.is_on).map(|view| view.user).collect();
            if behind.is_empty() && away.is_empty() {
                break;
            }
            // Who has just come back joins first.
            let late = behind.iter().filter(|view| !view.counts.is_empty()).count();
            if late > 0 {
                right = readable.elapsed();
            }
            if late > 0 && readable.elapsed() > CONVERGED_WITHIN || readable.elapsed() > BACK_WITHIN {
                return Err(format!("{what}: away {away:?}, behind {behind:?}, the truth {truth:?}"));
            }
            sleep(Duration::from_millis(50)).await;
        }
        if let Some(fault) = fault {
            let (room, back) = (right.as_secs_f64(), readable.elapsed().as_secs_f64());
            self.tell(&format!(
                "  rooms right {room:.2} s after they could be read, everybody there after {back:.2} s"
            ));
            self.converged.lock().unwrap().push((right, fault));
        }
        Ok(())
    }

    /// Buyers give back what they hold; then no ticket is locked, and what is left is what the shop has not sold.
    async fn rest(&self) -> Result<(), String> {
        self.tell("at rest");
        self.crowd.calm(Duration::from_secs(150)).await;
        let end = Instant::now() + Duration::from_mins(1);
        loop {
            let left: BTreeMap<u64, u64> = {
                let shop = self.stage.shop.lock().await;
                let book = shop.book.lock().unwrap();
                book.iter().map(|(id, seats)| (*id, seats.total - seats.sold)).collect()
            };
            let counts = self.stage.counts_of_all().await.unwrap_or_default();
            let whole = left
                .iter()
                .all(|(id, left)| counts.get(id).is_some_and(|counts| counts.locked == 0 && counts.available == *left));
            let views = self.crowd.views().await;
            let same = |view: &crowd::View| view.is_on && view.counts == counts;
            if whole && views.iter().all(same) {
                break;
            }
            if Instant::now() >= end {
                let odd: Vec<_> = views.into_iter().filter(|view| !same(view)).collect();
                return Err(format!("at rest: unsold {left:?}, counts {counts:?}, others see {odd:?}"));
            }
            sleep(Duration::from_millis(200)).await;
        }
        self.tell("every ticket is where it belongs");
        for post in &self.stage.posts {
            let code = self.stage.drain(post).await;
            if code != 0 {
                return Err(format!("replica {} ended with {code}", post.name));
            }
        }
        Ok(())
    }

    fn summary(&self) {
        let counts = self.log.counts();
        let mut converged = self.converged.lock().unwrap().clone();
        converged.sort_by_key(|(time, _)| *time);
        let worst =
            converged.last().map_or_else(String::new, |(time, fault)| format!("{:.2} s ({fault})", time.as_secs_f64()));
        let median = converged.get(converged.len() / 2).map_or(0.0, |(time, _)| time.as_secs_f64());
        say(&format!(
            "fleet: {} faults in {:.0} s; {} socket requests ({} unknown, asked again), {} RabbitMQ requests ({} unknown); {} \
             connections; rooms right after {median:.2} s in the median, {worst} at worst",
            self.done.load(Ordering::SeqCst),
            self.began.elapsed().as_secs_f64(),
            counts.asked,
            counts.unknown,
            counts.called,
            counts.calls_unknown,
            counts.reconnects,
        ));
    }
}

fn sees(view: &BTreeMap<u64, Counts>, truth: &BTreeMap<u64, Counts>) -> bool {
    truth.iter().all(|(category, counts)| view.get(category).is_some_and(|seen| seen.version >= counts.version))
}

/// More tickets now and then, so that buyers never run out of something to fight for.
async fn supply(orders: Arc<Orders>, over: CancellationToken, seed: u64) {
    let mut random = Random(seed);
    loop {
        tokio::select! {
            () = sleep(Duration::from_secs(8)) => {}
            () = over.cancelled() => return,
        }
        let (category, _) = CATEGORIES[random.below(CATEGORIES.len())];
        orders.add_tickets(category, 4 + random.below(12) as u64).await;
    }
}
