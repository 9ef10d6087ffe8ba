//! What a lock costs: lock and unlock in a closed loop over 64 sockets, beside the scripts alone and beside socket.io with
//! ioredis. See `benches/README.md`.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use seatlock::domain::{EventId, LockId};
use seatlock::ledger::Script;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{LocalSet, spawn_local};

use crate::support::client::{Socket, word};
use crate::support::process::{Process, catalogue, token};
use crate::support::{Wanted, median, quantile, say, verdict};

const SOCKETS: usize = 64;
const EVENTS: u64 = 50;
const CATEGORIES: u64 = 4;
/// Categories of all events.
const PLACES: usize = (EVENTS * CATEGORIES) as usize;
/// Fewer than sockets, so that a run in which everybody wants every category must refuse some.
const SEATS: u64 = 60;
/// An answer that takes longer will not come.
const PATIENCE: Duration = Duration::from_secs(10);
/// Tickets that a user may hold of one event: what a run may want, so that the limit is looked at and never reached.
const PER_EVENT_MAX: &str = "8";
/// Locks that a user may ask for in an event: twice what is so by default, which 64 users over 50 events meet now and then
/// where a cycle takes less than 50 us. The same for the service, and for the scripts that are called without it.
const RATE: &str = "20/s burst 40";
const INTERVAL_US: &str = "50000";
const BURST_US: &str = "2000000";
const BURST_MS: &str = "2000";

/// What one run came to.
struct Measured {
    cycles_per_second: f64,
    service_us: f64,
    redis_us: f64,
    latencies: Vec<u32>,
}

/// Tickets that buyers hold, by their own accounts.
#[derive(Default)]
struct Held {
    tickets: Vec<u64>,
    granted: u64,
    refused: u64,
    latencies: Vec<u32>,
}

impl Held {
    fn grant(&mut self, place: usize) -> anyhow::Result<()> {
        self.tickets[place] += 1;
        self.granted += 1;
        ensure!(self.tickets[place] <= SEATS, "OVERSOLD: {} locks on {SEATS} tickets", self.tickets[place]);
        Ok(())
    }
}

/// A deterministic order of places that looks like none.
struct Places(u64);

impl Places {
    fn next(&mut self) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % PLACES as u64) as usize
    }
}

fn event_and_category(place: usize) -> (u64, u64) {
    (place as u64 / CATEGORIES + 1, place as u64 % CATEGORIES + 1)
}

struct Buyer {
    socket: Socket,
    held: Rc<RefCell<Held>>,
}

impl Buyer {
    /// Asks and waits for the answer.
    async fn ask(&mut self, request: &str) -> anyhow::Result<String> {
        let began = Instant::now();
        self.socket.send(request).await?;
        let mut answer = None;
        while answer.is_none() {
            let read = self.socket.read(|text| {
                if text.starts_with("43/") {
                    answer = Some(text.to_owned());
                }
            });
            tokio::time::timeout(PATIENCE, read).await.context("no answer")??;
        }
        self.held.borrow_mut().latencies.push(began.elapsed().as_micros() as u32);
        answer.context("an answer")
    }

    /// The lock's id, if it was granted.
    async fn lock(&mut self, place: usize) -> anyhow::Result<Option<String>> {
        let (event, category) = event_and_category(place);
        let wanted =
            format!("42/realtime,7[\"lock-tickets\",{{\"eventId\":{event},\"categoryId\":{category},\"quantity\":1}}]");
        let answer = self.ask(&wanted).await?;
        if answer.contains("\"success\":true") {
            self.held.borrow_mut().grant(place)?;
            return Ok(Some(word(&answer, "\"lockId\":\"").context("a lock's id")?.to_owned()));
        }
        ensure!(answer.contains("\"insufficient") || answer.contains("\"sold_out"), "refused: {answer}");
        self.held.borrow_mut().refused += 1;
        Ok(None)
    }

    async fn cycle(&mut self, place: usize) -> anyhow::Result<()> {
        let lock = self.lock(place).await?.context("refused though there is enough for everybody")?;
        // Counted back before it is asked for: the ledger may have given it to somebody else before we hear of it.
        self.held.borrow_mut().tickets[place] -= 1;
        let answer = self.ask(&format!("42/realtime,8[\"unlock-tickets\",{{\"lockId\":\"{lock}\"}}]")).await?;
        ensure!(answer.contains("\"success\":true"), "not unlocked: {answer}");
        Ok(())
    }
}

async fn buyers(server: &Process) -> anyhow::Result<(Vec<Buyer>, Rc<RefCell<Held>>)> {
    let held = Held { tickets: vec![0; PLACES], ..Held::default() };
    let held = Rc::new(RefCell::new(held));
    let mut buyers = Vec::new();
    for user in 1..=SOCKETS as u64 {
        buyers.push(Buyer { socket: Socket::open(server.port, &token(user)?).await?, held: Rc::clone(&held) });
    }
    Ok((buyers, held))
}

/// Lock and unlock in a closed loop. The sockets are opened anew for each of `rounds`.
async fn cycles(server: &Process, redis: &Process, seconds: f64, rounds: usize) -> anyhow::Result<Measured> {
    let (mut rates, mut service_us, mut redis_us, mut latencies) = (vec![], vec![], vec![], vec![]);
    for round in 0..=rounds {
        let (crowd, held) = buyers(server).await?;
        let (began, cpu, redis_cpu) = (Instant::now(), server.cpu()?, redis.cpu()?);
        // The first round warms up: the stock of every event is fetched, code is compiled.
        let lasts = Duration::from_secs_f64(if round == 0 { seconds / 4.0 } else { seconds });
        let tasks: Vec<_> = crowd
            .into_iter()
            .zip(1_u64..)
            .map(|(mut buyer, seed)| {
                spawn_local(async move {
                    let mut places = Places(seed);
                    let mut cycles = 0_u64;
                    if round == 0 {
                        for step in 0..4 {
                            buyer.cycle((seed as usize + SOCKETS * step) % PLACES).await?;
                        }
                    }
                    while began.elapsed() < lasts {
                        buyer.cycle(places.next()).await?;
                        cycles += 1;
                    }
                    anyhow::Ok(cycles)
                })
            })
            .collect();
        let mut done = 0;
        for task in tasks {
            done += task.await??;
        }
        if round > 0 {
            let done = done as f64;
            rates.push(done / began.elapsed().as_secs_f64());
            service_us.push((server.cpu()? - cpu) * 1e6 / done);
            redis_us.push((redis.cpu()? - redis_cpu) * 1e6 / done);
            latencies.append(&mut held.borrow_mut().latencies);
        }
    }
    Ok(Measured {
        cycles_per_second: median(rates),
        service_us: median(service_us),
        redis_us: median(redis_us),
        latencies,
    })
}

/// Everybody wants a ticket of every category, and there is not enough: microseconds of Redis for each grant.
async fn grants(server: &Process, redis: &Process) -> anyhow::Result<f64> {
    let (crowd, held) = buyers(server).await?;
    let cpu = redis.cpu()?;
    let tasks: Vec<_> = crowd
        .into_iter()
        .enumerate()
        .map(|(at, mut buyer)| {
            spawn_local(async move {
                // Not all at the same place at the same time.
                for step in 0..PLACES {
                    buyer.lock((at * 3 + step) % PLACES).await?;
                }
                anyhow::Ok(buyer)
            })
        })
        .collect();
    let mut still_here = Vec::new();
    for task in tasks {
        still_here.push(task.await??);
    }
    let cpu = redis.cpu()? - cpu;
    let held = held.borrow();
    ensure!(held.tickets.iter().all(|tickets| *tickets == SEATS), "a category ended with other than {SEATS} locks");
    Ok(cpu * 1e6 / held.granted as f64)
}

/// The same two scripts from one connection, sixty-four of each at a time: what is left when there is no service.
struct Floor {
    stream: TcpStream,
    out: Vec<u8>,
    asked: usize,
    input: Vec<u8>,
}

impl Floor {
    async fn connect(redis: &Process) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", redis.port)).await?;
        stream.set_nodelay(true)?;
        let mut floor = Self { stream, out: Vec::new(), asked: 0, input: Vec::new() };
        for script in ["lock", "release"] {
            floor.command(&["SCRIPT", "LOAD", named(script)?.source()]);
        }
        floor.exchange("").await?;
        Ok(floor)
    }

    fn command(&mut self, parts: &[&str]) {
        self.out.extend_from_slice(format!("*{}\r\n", parts.len()).as_bytes());
        for part in parts {
            self.out.extend_from_slice(format!("${}\r\n{part}\r\n", part.len()).as_bytes());
        }
        self.asked += 1;
    }

    /// Sends what was written and reads as many replies, of which `wanted` must begin with this word.
    async fn exchange(&mut self, wanted: &str) -> anyhow::Result<usize> {
        self.stream.write_all(&self.out).await?;
        self.out.clear();
        self.input.clear();
        let (mut replies, mut at, mut found) = (0, 0, 0);
        while replies < self.asked {
            while let Some(end) = reply_end(&self.input, at) {
                let text = &self.input[at..end];
                ensure!(!text.starts_with(b"-"), "{}", String::from_utf8_lossy(text));
                found += usize::from(!wanted.is_empty() && text.windows(wanted.len()).any(|w| w == wanted.as_bytes()));
                (replies, at) = (replies + 1, end);
            }
            if replies < self.asked {
                let read = tokio::time::timeout(PATIENCE, self.stream.read_buf(&mut self.input)).await??;
                ensure!(read > 0, "Redis closed the connection");
            }
        }
        self.asked = 0;
        Ok(found)
    }

    async fn cycles(&mut self, redis: &Process, seconds: f64) -> anyhow::Result<(f64, f64)> {
        let [lock, release] = [named("lock")?, named("release")?].map(Script::sha);
        let limits = ["300000", "86400000", PER_EVENT_MAX, INTERVAL_US, BURST_US].join(" ");
        let (began, cpu, mut done, mut places) = (Instant::now(), redis.cpu()?, 0_usize, Places(7));
        while began.elapsed().as_secs_f64() < seconds {
            let mut locks = Vec::new();
            for user in 1..=SOCKETS as u64 {
                let (event, category) = event_and_category(places.next());
                let id = LockId::generate(EventId::new(event)?).to_string();
                let (user, category) = (user.to_string(), category.to_string());
                let keys =
                    ["book", "deadlines", "ended", "settling"].map(|name| format!("seatlock:3:{{e:{event}}}:{name}"));
                let own = format!("seatlock:3:{{e:{event}}}:lock:{id}");
                let rate = format!("seatlock:3:{{e:{event}}}:rate:{user}");
                let keys = keys.each_ref().map(String::as_str);
                let session = "00000000000000000000000000000000";
                let mut parts = vec!["EVALSHA", lock, "5"];
                parts.extend(&keys[..3]);
                parts.extend([own.as_str(), &rate, &id, &user, &category, "1", session, "1", &limits, BURST_MS]);
                self.command(&parts);
                let mut parts = vec!["EVALSHA".to_owned(), release.to_owned(), "5".to_owned()];
                parts.extend(keys.map(str::to_owned));
                parts.extend([own, id, "owner".to_owned(), user, session.to_owned()]);
                locks.push(parts);
            }
            // Each has at most one lock in a category, so some places are taken twice and nobody is in the way.
            let granted = self.exchange("granted").await?;
            ensure!(granted == SOCKETS, "{granted} of {SOCKETS} locks were granted");
            for parts in &locks {
                self.command(&parts.iter().map(String::as_str).collect::<Vec<_>>());
            }
            let released = self.exchange("released").await?;
            ensure!(released == SOCKETS, "{released} of {SOCKETS} locks were released");
            done += SOCKETS;
        }
        let done = done as f64;
        Ok((done / began.elapsed().as_secs_f64(), (redis.cpu()? - cpu) * 1e6 / done))
    }
}

fn named(name: &str) -> anyhow::Result<&'static Script> {
    Script::ALL.iter().copied().find(|script| script.name == name).context("a script of that name")
}

/// Where the reply that begins at `at` ends, if all of it is there.
fn reply_end(input: &[u8], at: usize) -> Option<usize> {
    let line = input.get(at..)?.windows(2).position(|pair| pair == b"\r\n")? + at;
    let number = || std::str::from_utf8(&input[at + 1..line]).ok()?.parse::<i64>().ok();
    match input[at] {
        b'$' => {
            let end = line + 2 + usize::try_from(number()?).map_or(0, |len| len + 2);
            (input.len() >= end).then_some(end)
        }
        b'*' => {
            let mut end = line + 2;
            for _ in 0..number()?.max(0) {
                end = reply_end(input, end)?;
            }
            Some(end)
        }
        _ => Some(line + 2),
    }
}

fn report(name: &str, measured: &mut Measured) {
    let (p50, p99) = (quantile(&mut measured.latencies, 0.5) / 1e3, quantile(&mut measured.latencies, 0.99) / 1e3);
    say(&format!(
        "  {name:<8} {:>6.0} cycles/s, an answer p50 {p50:.1} ms, p99 {p99:.1} ms; {:.0} us of it and {:.0} us of Redis \
         per cycle",
        measured.cycles_per_second, measured.service_us, measured.redis_us
    ));
}

/// The Node peer as ioredis is by default, or with its option to send the commands of a turn of its loop together.
async fn peer(redis: &Process, batches: &str, seconds: f64, rounds: usize) -> anyhow::Result<Measured> {
    let env = [
        ("REDIS_PORT", redis.port.to_string()),
        ("PER_EVENT_MAX", PER_EVENT_MAX.to_owned()),
        ("INTERVAL_US", INTERVAL_US.to_owned()),
        ("BURST_US", BURST_US.to_owned()),
        ("BURST_MS", BURST_MS.to_owned()),
        ("AUTO_PIPELINING", batches.to_owned()),
    ];
    let node = Process::node("locks.js", &env)?;
    LocalSet::new().run_until(cycles(&node, redis, seconds, rounds)).await.context("the Node peer")
}

/// Measures and reports.
pub async fn run(wanted: &Wanted, folder: &Path) -> anyhow::Result<()> {
    let (seconds, rounds) = if wanted.quick { (0.4, 1) } else { (4.0, 5) };
    let seats = catalogue(folder, EVENTS, CATEGORIES, SEATS)?;
    let redis = Process::redis(folder)?;
    let limits = [("SEATLOCK_MAX_PER_EVENT", PER_EVENT_MAX), ("SEATLOCK_RATE_LIMIT", RATE)];
    let service = Process::service(&wanted.service, &redis, &seats, &limits)?;
    let mut ours = LocalSet::new().run_until(cycles(&service, &redis, seconds, rounds)).await.context("the service")?;
    service.stop()?;
    // The scripts find the stock that the service has stored.
    let mut floor = Floor::connect(&redis).await?;
    let (mut rates, mut costs) = (vec![], vec![]);
    for _ in 0..rounds {
        let (rate, cost) = floor.cycles(&redis, seconds / 2.0).await.context("the floor")?;
        rates.push(rate);
        costs.push(cost);
    }
    let (floor_rate, floor_us) = (median(rates), median(costs));

    say(&format!("lock and unlock over {SOCKETS} sockets, {EVENTS} events of {CATEGORIES} categories:"));
    report("seatlock", &mut ours);
    say(&format!("  floor    {floor_rate:>6.0} cycles/s of the scripts alone, {floor_us:.0} us of Redis per cycle"));
    if !wanted.alone {
        let mut theirs = peer(&redis, "no", seconds, rounds).await?;
        report("node", &mut theirs);
        let mut batched = peer(&redis, "yes", seconds, rounds).await?;
        report("batched", &mut batched);
        let cost = ours.service_us / theirs.service_us;
        let pace = theirs.cycles_per_second / ours.cycles_per_second;
        say(&format!("  ratio    {cost:.2} x its processor per cycle, {:.2} x its cycles/s", 1.0 / pace));
        let (batched_cost, batched_pace) =
            (ours.service_us / batched.service_us, ours.cycles_per_second / batched.cycles_per_second);
        say(&format!("           {batched_cost:.2} x and {batched_pace:.2} x of Node with commands sent in batches"));
        say(&format!(
            "  bars     0.35 x per cycle, aim 0.2: {}; 2 x its cycles/s: {}",
            verdict(cost, 0.35),
            verdict(pace, 0.5)
        ));
    }
    let service = Process::service(&wanted.service, &redis, &seats, &limits)?;
    let redis_us_per_grant = LocalSet::new().run_until(grants(&service, &redis)).await.context("the service")?;
    service.stop()?;
    say(&format!(
        "  bar      45 us of Redis per granted lock with every limit on: {redis_us_per_grant:.0}, {}",
        verdict(redis_us_per_grant, 45.0)
    ));
    Ok(())
}
