//! What it costs to tell a room: thousands of watchers of one event on one replica, beside a plain socket.io room.
//!
//! Locks are asked for by buyers at a steady rate; every watcher must end on the right number. See `benches/README.md`.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use tokio::sync::mpsc;
use tokio::task::{LocalSet, spawn_local};

use crate::support::client::{Socket, number, word};
use crate::support::process::{Process, catalogue, token};
use crate::support::{Wanted, quantile, say, until, verdict};

const SEATS: u64 = 1_000_000;
const BUYERS: usize = 128;
/// The service's default.
const TICK: Duration = Duration::from_millis(50);
/// From the last answer to the last watcher: a room that is not right by then is not going to be.
const SETTLE: Duration = Duration::from_mins(2);
/// Connections that are being opened at once.
const OPENING: usize = 64;

/// What a buyer asks for.
const LOCK: &str = "42/realtime,7[\"lock-tickets\",{\"eventId\":1,\"categoryId\":1,\"quantity\":1}]";

/// A load on the room.
#[derive(Clone, Copy)]
struct Load {
    per_second: u32,
    changes: usize,
    /// Only locks, so that each change is known by its number of free tickets and can be timed.
    timed: bool,
}

/// What came of it.
#[derive(Default)]
struct Measured {
    seconds: f64,
    answered: u64,
    cpu: f64,
    updates: u64,
    others: u64,
    most: u64,
    latencies: Vec<u32>,
}

impl Measured {
    fn delivered(&self) -> f64 {
        (self.updates + self.others) as f64
    }

    fn us_per_message(&self) -> f64 {
        self.cpu * 1e6 / self.delivered()
    }

    fn ms_per_change(&self) -> f64 {
        self.cpu * 1e3 / self.answered as f64
    }
}

/// What all tasks of a run write down.
#[derive(Default)]
struct Board {
    watchers: Vec<Watched>,
    /// When the n-th lock of a timed load was answered.
    granted_at: Vec<Instant>,
    /// Free tickets when the timed load began.
    timed_from: Option<u64>,
    latencies: Vec<u32>,
    answered: u64,
    held: u64,
    refused: Option<String>,
    failed: Option<anyhow::Error>,
}

/// One watcher.
#[derive(Default, Clone)]
struct Watched {
    joined: bool,
    updates: u64,
    others: u64,
    version: u64,
    available: u64,
    /// Changes of the timed load that it has seen.
    seen: usize,
}

type Shared = Rc<RefCell<Board>>;

impl Board {
    fn update(&mut self, at: usize, text: &str) {
        let watcher = &mut self.watchers[at];
        let Some(available) = number(text, "\"availableTickets\":") else { return };
        let version = number(text, "\"version\":").unwrap_or(0);
        if version < watcher.version {
            self.failed.get_or_insert_with(|| anyhow::anyhow!("a watcher was told something older than it knew"));
        }
        (watcher.version, watcher.available) = (version, available);
        watcher.updates += 1;
        if let Some(from) = self.timed_from {
            let (now, shown) = (Instant::now(), (from - available.min(from)) as usize);
            for change in watcher.seen..shown {
                // A watcher may hear of a lock before its buyer.
                let late = self.granted_at.get(change).map_or(Duration::ZERO, |at| now.duration_since(*at));
                self.latencies.push(late.as_micros() as u32);
            }
            watcher.seen = watcher.seen.max(shown);
        }
    }
}

async fn watch(mut socket: Socket, at: usize, board: Shared) {
    let failed = board.clone();
    let work = async move {
        socket.send("42/realtime,[\"join-event-room\",{\"eventId\":1}]").await?;
        loop {
            let mut board = None;
            socket
                .read(|text| {
                    let Some(event) = text.strip_prefix("42/realtime,[\"") else { return };
                    let board = board.get_or_insert_with(|| failed.borrow_mut());
                    if event.starts_with("availability-update") {
                        board.update(at, event);
                    } else if event.starts_with("tickets-") {
                        board.watchers[at].others += 1;
                    } else if event.starts_with("joined-event-room") {
                        board.watchers[at].joined = true;
                    }
                })
                .await?;
        }
    };
    let ended: anyhow::Result<()> = work.await;
    if let Err(error) = ended {
        board.borrow_mut().failed.get_or_insert(error.context("a watcher"));
    }
}

/// Locks a ticket, or gives back the one it has, whenever it is told to.
async fn buy(mut socket: Socket, mut orders: mpsc::Receiver<()>, board: Shared) {
    let mut lock: Option<String> = None;
    let mut waiting = false;
    let failed = board.clone();
    let work = async move {
        loop {
            let mut answers = Vec::new();
            tokio::select! {
                order = orders.recv(), if !waiting => {
                    if order.is_none() { return Ok(()); }
                    let wanted = match &lock {
                        None => LOCK.to_owned(),
                        Some(id) => format!("42/realtime,7[\"unlock-tickets\",{{\"lockId\":\"{id}\"}}]"),
                    };
                    socket.send(&wanted).await?;
                    waiting = true;
                }
                read = socket.read(|text| if text.starts_with("43/") { answers.push(text.to_owned()) }) => read?,
            }
            for answer in answers {
                waiting = false;
                let mut board = board.borrow_mut();
                if !answer.contains("\"success\":true") {
                    board.refused.get_or_insert(answer);
                    continue;
                }
                board.answered += 1;
                if lock.take().is_none() {
                    lock = word(&answer, "\"lockId\":\"").map(str::to_owned);
                    board.held += 1;
                    if board.timed_from.is_some() {
                        board.granted_at.push(Instant::now());
                    }
                } else {
                    board.held -= 1;
                }
            }
        }
    };
    let ended: anyhow::Result<()> = work.await;
    if let Err(error) = ended {
        failed.borrow_mut().failed.get_or_insert(error.context("a buyer"));
    }
}

/// A server with its room full of watchers.
struct Room<'a> {
    server: &'a Process,
    board: Shared,
    buyers: Vec<mpsc::Sender<()>>,
    next_buyer: usize,
}

/// What connecting cost.
struct Opened {
    kib_per_watcher: f64,
    cpu_ms: f64,
}

impl<'a> Room<'a> {
    async fn open(server: &'a Process, watchers: usize, node: bool) -> anyhow::Result<(Self, Opened)> {
        let board = Shared::default();
        board.borrow_mut().watchers = vec![Watched::default(); watchers];
        let mut room = Self { server, board, buyers: Vec::new(), next_buyer: 0 };
        for user in 1..=BUYERS as u64 {
            let socket = Socket::open(server.port, &token(user)?).await?;
            let (sender, orders) = mpsc::channel(2);
            spawn_local(buy(socket, orders, room.board.clone()));
            room.buyers.push(sender);
        }
        let rest = async || -> anyhow::Result<f64> {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if node {
                server.tidy_up()?;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            server.rss()
        };
        let (rss, cpu) = (rest().await?, server.cpu()?);
        let slots = Rc::new(tokio::sync::Semaphore::new(OPENING));
        for at in 0..watchers {
            let slot = Rc::clone(&slots);
            let permit = tokio::sync::Semaphore::acquire(&slot).await?;
            permit.forget();
            let (board, port) = (room.board.clone(), server.port);
            spawn_local(async move {
                let opened = match token(1_000_000 + at as u64) {
                    Ok(token) => Socket::open(port, &token).await,
                    Err(error) => Err(error),
                };
                slot.add_permits(1);
                match opened {
                    Ok(socket) => watch(socket, at, board).await,
                    Err(error) => {
                        board.borrow_mut().failed.get_or_insert(error.context("a watcher comes in"));
                    }
                }
            });
        }
        until("every watcher is in the room", SETTLE, || {
            let board = room.board.borrow();
            board.failed.is_some() || board.watchers.iter().all(|watcher| watcher.joined && watcher.updates > 0)
        })
        .await?;
        room.check()?;
        let cpu_ms = (server.cpu()? - cpu) * 1e3 / watchers as f64;
        let kib_per_watcher = (rest().await? - rss) / 1024.0 / watchers as f64;
        Ok((room, Opened { kib_per_watcher, cpu_ms }))
    }

    fn check(&self) -> anyhow::Result<()> {
        let mut board = self.board.borrow_mut();
        if let Some(error) = board.failed.take() {
            return Err(error);
        }
        if let Some(answer) = &board.refused {
            bail!("a buyer was refused: {answer}");
        }
        ensure!(board.held <= SEATS, "OVERSOLD: {} of {SEATS} tickets are locked", board.held);
        Ok(())
    }

    /// Puts a load on the room and waits until every watcher has heard of its last change.
    async fn load(&mut self, load: Load) -> anyhow::Result<Measured> {
        {
            let mut board = self.board.borrow_mut();
            let from = SEATS - board.held;
            (board.timed_from, board.answered) = (load.timed.then_some(from), 0);
            (board.granted_at, board.latencies) = (Vec::new(), Vec::new());
            for watcher in &mut board.watchers {
                (watcher.updates, watcher.others, watcher.seen) = (0, 0, 0);
            }
        }
        let (began, cpu) = (Instant::now(), self.server.cpu()?);
        let mut asked = 0_u64;
        while (asked as usize) < load.changes {
            let due = began + Duration::from_secs_f64(asked as f64 / f64::from(load.per_second));
            tokio::time::sleep_until(due.into()).await;
            let buyer = &self.buyers[self.next_buyer % BUYERS];
            self.next_buyer += 1;
            // A server that cannot keep up has its buyers wait.
            tokio::time::timeout(SETTLE, buyer.send(())).await.context("a buyer waits for ever")??;
            asked += 1;
        }
        until("every request is answered", SETTLE, || {
            let board = self.board.borrow();
            board.failed.is_some() || board.refused.is_some() || board.answered == asked
        })
        .await?;
        let right = SEATS - self.board.borrow().held;
        let told = until("every watcher ends on the right number", SETTLE, || {
            let board = self.board.borrow();
            board.failed.is_some() || board.watchers.iter().all(|watcher| watcher.available == right)
        })
        .await;
        self.check()?;
        told?;
        let seconds = began.elapsed().as_secs_f64();
        // What is on its way without changing a number: the messages about others.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut board = self.board.borrow_mut();
        Ok(Measured {
            seconds,
            answered: board.answered,
            cpu: self.server.cpu()? - cpu,
            updates: board.watchers.iter().map(|watcher| watcher.updates).sum(),
            others: board.watchers.iter().map(|watcher| watcher.others).sum(),
            most: board.watchers.iter().map(|watcher| watcher.updates).max().unwrap_or(0),
            latencies: std::mem::take(&mut board.latencies),
        })
    }
}

/// Everything measured of one server.
struct Side {
    opened: Opened,
    loads: Vec<Measured>,
    kib_after: f64,
}

async fn side(server: &Process, watchers: usize, loads: &[Load], node: bool) -> anyhow::Result<Side> {
    let before = server.rss()?;
    let (mut room, opened) = Room::open(server, watchers, node).await?;
    let mut measured = Vec::new();
    for &load in loads {
        measured.push(room.load(load).await?);
    }
    if node {
        server.tidy_up()?;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let kib_after = (server.rss()? - before) / 1024.0 / watchers as f64;
    Ok(Side { opened, loads: measured, kib_after })
}

/// A room of one size on both servers, each started anew.
async fn pair(
    wanted: &Wanted,
    folder: &Path,
    watchers: usize,
    ours: &[Load],
    theirs: &[Load],
) -> anyhow::Result<(Side, Option<Side>)> {
    let seats = catalogue(folder, 1, 1, SEATS)?;
    let redis = Process::redis(folder)?;
    let service = Process::service(&wanted.service, &redis, &seats, &[])?;
    let local = LocalSet::new();
    let measured = local.run_until(side(&service, watchers, ours, false)).await.context("the service")?;
    drop(local);
    service.stop()?;
    if wanted.alone {
        return Ok((measured, None));
    }
    let node = Process::node("fanout.js", &[("SEATS", SEATS.to_string())])?;
    let local = LocalSet::new();
    let beside = local.run_until(side(&node, watchers, theirs, true)).await.context("the Node peer")?;
    Ok((measured, Some(beside)))
}

fn report(name: &str, measured: &mut Measured) {
    let (p50, p99) = (quantile(&mut measured.latencies, 0.5) / 1e3, quantile(&mut measured.latencies, 0.99) / 1e3);
    let late = if p50.is_nan() { String::new() } else { format!(", p50 {p50:.0} ms, p99 {p99:.0} ms") };
    say(&format!(
        "  {name:<8} {:>6.0} changes/s, {:>9.0} messages, {:>6.2} us each, {:>7.2} ms per change, {:.2} cores{late}",
        measured.answered as f64 / measured.seconds,
        measured.delivered(),
        measured.us_per_message(),
        measured.ms_per_change(),
        measured.cpu / measured.seconds,
    ));
}

fn compare(what: &str, ours: &mut Measured, theirs: Option<&mut Measured>) {
    say(&format!("{what}:"));
    report("seatlock", ours);
    if let Some(theirs) = theirs {
        report("node", theirs);
        say(&format!(
            "  ratio    {:.2} x per change, {:.2} x per message",
            ours.ms_per_change() / theirs.ms_per_change(),
            ours.us_per_message() / theirs.us_per_message(),
        ));
    }
}

/// At most one update per tick, the one at once, and one that a tick's edge may add.
fn within_the_tick(measured: &Measured) -> anyhow::Result<()> {
    let bound = (measured.seconds / TICK.as_secs_f64()).ceil() as u64 + 2;
    ensure!(measured.most <= bound, "a watcher was told {} times, the tick allows {bound}", measured.most);
    Ok(())
}

/// Measures both sizes of room and reports.
pub async fn run(wanted: &Wanted, folder: &Path) -> anyhow::Result<()> {
    let (small, large) = if wanted.quick { (50, 100) } else { (2_000, 10_000) };
    let scale = if wanted.quick { 10 } else { 1 };
    let load = |per_second, changes: usize, timed| Load { per_second, changes: changes / scale, timed };

    let ours = [load(20, 200, false), load(200, 2_000, false)];
    let theirs = [load(20, 200, false), load(200, 200, false)];
    let (mut seatlock, mut node) = pair(wanted, folder, small, &ours, &theirs).await?;
    let mut beside = node.as_mut().map(|side| side.loads.iter_mut());
    for (what, measured) in ["20 changes/s", "200 changes/s"].iter().zip(&mut seatlock.loads) {
        within_the_tick(measured)?;
        let other = beside.as_mut().and_then(Iterator::next);
        let bars = other.as_ref().map(|other| {
            (measured.us_per_message() / other.us_per_message(), measured.ms_per_change() / other.ms_per_change())
        });
        compare(&format!("{small} watchers, {what}"), measured, other);
        match (bars, *what) {
            (Some((message, _)), "20 changes/s") => {
                say(&format!("  bar      1 x per message, aim 0.5: {}", verdict(message, 1.0)));
            }
            (Some((_, change)), _) => say(&format!("  bar      0.2 x per change: {}", verdict(change, 0.2))),
            (None, _) => {}
        }
    }

    let ours = [load(10, 100, true), load(1_000, 10_000, false)];
    let theirs = [load(10, 50, true), load(1_000, 40, false)];
    let (mut seatlock, mut node) = pair(wanted, folder, large, &ours, &theirs).await?;
    let mut beside = node.as_mut().map(|side| side.loads.iter_mut());
    for (what, measured) in ["10 changes/s", "1000 changes/s"].iter().zip(&mut seatlock.loads) {
        within_the_tick(measured)?;
        compare(&format!("{large} watchers, {what}"), measured, beside.as_mut().and_then(Iterator::next));
        if *what == "10 changes/s" {
            let p99 = quantile(&mut measured.latencies, 0.99) / 1e3;
            say(&format!("  bar      p99 of 150 ms: {}", verdict(p99, 150.0)));
        } else {
            let (told, cores) =
                (measured.updates as f64 / large as f64 / measured.seconds, measured.cpu / measured.seconds);
            say(&format!(
                "  bar      one core: {}; each watcher was told {told:.1} times a second",
                verdict(cores, 1.0)
            ));
        }
    }

    say(&format!("{large} watchers, memory and coming in:"));
    let line = |name: &str, side: &Side| {
        say(&format!(
            "  {name:<8} {:.1} KiB per idle watcher, {:.1} after the loads; {:.2} ms of processor to come in",
            side.opened.kib_per_watcher, side.kib_after, side.opened.cpu_ms
        ));
    };
    line("seatlock", &seatlock);
    if let Some(node) = &node {
        line("node", node);
    }
    say(&format!("  bar      20 KiB, aim 11: {}", verdict(seatlock.opened.kib_per_watcher, 20.0)));
    Ok(())
}
