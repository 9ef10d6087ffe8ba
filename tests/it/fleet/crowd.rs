//! The crowd of real clients in one Node process, and what it reports.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::EVENT;
use super::log::{Log, Road, instant};
use super::orders::{Orders, Wish};
use crate::audit::outside::{Seen, Span, Told};
use crate::support::gateway::token;

/// What somebody in the room sees of a category.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub version: u64,
    pub available: u64,
    pub locked: u64,
    pub total: u64,
}

impl Counts {
    pub fn read(counts: &Value) -> (u64, Self) {
        let number = |name: &str| counts[name].as_u64().expect("a number");
        let all = Self {
            version: number("version"),
            available: number("availableTickets"),
            locked: number("lockedTickets"),
            total: number("totalTickets"),
        };
        (number("categoryId"), all)
    }
}

/// One client: whether it is connected, and what it sees.
#[derive(Debug)]
pub struct View {
    pub user: u64,
    pub is_on: bool,
    pub counts: BTreeMap<u64, Counts>,
}

pub struct Crowd {
    _child: Child,
    input: tokio::sync::Mutex<ChildStdin>,
    shared: Arc<Shared>,
    next: AtomicU64,
    buyers: usize,
}

struct Shared {
    log: Arc<Log>,
    orders: Arc<Orders>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Value>>>,
    calm: Mutex<HashSet<u64>>,
    /// When each user was greeted (true) or lost.
    moves: Mutex<Vec<(u64, bool, u64)>>,
}

impl Crowd {
    /// Everybody comes to this address: a third over WebSocket, a third over polling, a third as the client does by itself.
    pub async fn begin(
        url: &str,
        seed: u64,
        people: u64,
        buyers: u64,
        log: Arc<Log>,
        orders: Arc<Orders>,
    ) -> Arc<Self> {
        let driver = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/gateway/crowd.js");
        let mut command = Command::new("node");
        command.arg(driver).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("Node is installed (tests/run installs it)");
        let input = child.stdin.take().expect("piped");
        let mut output = BufReader::new(child.stdout.take().expect("piped")).lines();
        let shared = Arc::new(Shared {
            log,
            orders,
            waiting: Mutex::default(),
            calm: Mutex::default(),
            moves: Mutex::default(),
        });
        let crowd = Arc::new(Self {
            _child: child,
            input: tokio::sync::Mutex::new(input),
            shared: Arc::clone(&shared),
            next: AtomicU64::new(0),
            buyers: usize::try_from(buyers).expect("few"),
        });
        let (paid, mut payments) = tokio::sync::mpsc::unbounded_channel::<String>();
        tokio::spawn(async move {
            while let Ok(Some(line)) = output.next_line().await {
                let report = serde_json::from_str(&line).expect("a report");
                shared.hear(report, &paid);
            }
            shared.log.complain("the crowd has ended".to_owned());
        });
        let teller = Arc::clone(&crowd);
        tokio::spawn(async move {
            while let Some(order) = payments.recv().await {
                teller.order(&json!({"do": "paid", "order": order})).await;
            }
        });
        let transports = [&["websocket"][..], &["polling"], &["polling", "websocket"]];
        let people: Vec<Value> = (1..=people)
            .zip(transports.iter().cycle())
            .map(|(user, transports)| {
                json!({"user": user, "token": token(user), "transports": transports, "buys": user <= buyers})
            })
            .collect();
        let categories: Vec<u64> = super::CATEGORIES.iter().map(|(id, _)| *id).collect();
        let begin = json!({
            "do": "begin", "url": url, "event": EVENT, "categories": categories, "seed": seed & 0xffff_ffff, "people": people
        });
        crowd.order(&begin).await;
        crowd
    }

    async fn order(&self, command: &Value) {
        let mut input = self.input.lock().await;
        // The end of the crowd is found and complained of where it is heard.
        input.write_all(format!("{command}\n").as_bytes()).await.ok();
        input.flush().await.ok();
    }

    async fn ask(&self, what: &str, within: Duration) -> Value {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.shared.waiting.lock().unwrap().insert(id, sender);
        self.order(&json!({"do": what, "id": id})).await;
        timeout(within, receiver).await.expect("the crowd answers").expect("the crowd lives")
    }

    /// What everybody sees now.
    pub async fn views(&self) -> Vec<View> {
        let report = self.ask("views", Duration::from_secs(20)).await;
        let views = report["views"].as_array().expect("a list").iter();
        views
            .map(|view| View {
                user: view["user"].as_u64().expect("a user"),
                is_on: view["isOn"] == true,
                counts: view["view"].as_array().expect("a list").iter().map(Counts::read).collect(),
            })
            .collect()
    }

    /// Everybody asks for their locks, until all have an answer.
    pub async fn check(&self) {
        self.ask("check", Duration::from_mins(1)).await;
    }

    /// Buyers give back what they hold and stop.
    pub async fn calm(&self, within: Duration) {
        self.order(&json!({"do": "calm"})).await;
        let end = Instant::now() + within;
        while self.shared.calm.lock().unwrap().len() < self.buyers {
            assert!(Instant::now() < end, "only {:?} are calm", self.shared.calm.lock().unwrap());
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// How often somebody was lost since a moment of the machine's clock, and for how many milliseconds at most.
    pub fn absences(&self, began: u64) -> (usize, u64) {
        let moves = self.shared.moves.lock().unwrap();
        let mut away: HashMap<u64, u64> = HashMap::new();
        let (mut count, mut longest) = (0, 0);
        for &(user, is_on, at) in moves.iter().filter(|(.., at)| *at >= began) {
            if is_on {
                longest = away.remove(&user).map_or(longest, |since| longest.max(at - since));
            } else {
                away.insert(user, at);
                count += 1;
            }
        }
        (count, longest)
    }
}

fn told(lock: &Value) -> Told {
    Told {
        lock: lock["lockId"].as_str().expect("an id").to_owned(),
        category: lock["categoryId"].as_u64().expect("a category"),
        quantity: lock["quantity"].as_u64().expect("a quantity"),
        expires: instant(&lock["expiresAt"]),
    }
}

fn all_told(locks: &Value) -> Vec<Told> {
    locks.as_array().expect("a list").iter().map(told).collect()
}

impl Shared {
    fn hear(self: &Arc<Self>, report: Value, paid: &tokio::sync::mpsc::UnboundedSender<String>) {
        let number = |name: &str| report[name].as_u64().unwrap_or_default();
        if let Some(name) = report["ask"].as_str() {
            self.asked(name, &report);
        } else if let Some(user) = report["on"].as_u64() {
            let span = Span { began: number("contact"), ended: number("at") };
            self.moves.lock().unwrap().push((user, true, number("at")));
            self.log.count(|counts| counts.reconnects += 1);
            self.log.note(span, Seen::Away { user });
            self.log.note(span, Seen::Listed { user, locks: all_told(&report["locks"]) });
        } else if let Some(user) = report["off"].as_u64() {
            self.moves.lock().unwrap().push((user, false, number("at")));
        } else if report["stalled"] == true {
            self.log.stood_still(Span { began: number("began"), ended: number("ended") }, "the crowd");
        } else if !report["pay"].is_null() {
            let pay = &report["pay"];
            let wish = Wish {
                user: pay["user"].as_u64().expect("a user"),
                order: pay["order"].as_str().expect("an order").to_owned(),
                lock: pay["lockId"].as_str().expect("a lock").to_owned(),
                category: pay["categoryId"].as_u64().expect("a category"),
                quantity: pay["quantity"].as_u64().expect("a quantity"),
            };
            let (orders, paid) = (Arc::clone(&self.orders), paid.clone());
            tokio::spawn(async move {
                let order = wish.order.clone();
                orders.pay(wish).await;
                paid.send(order).ok();
            });
        } else if let Some(user) = report["calm"].as_u64() {
            self.calm.lock().unwrap().insert(user);
        } else if let Some(id) = report["id"].as_u64().or_else(|| report["checked"].as_u64()) {
            if let Some(waiting) = self.waiting.lock().unwrap().remove(&id) {
                waiting.send(report).ok();
            }
        } else if report["told"] == "lock-expired" {
            let lock = report["data"]["lockId"].as_str().expect("an id").to_owned();
            self.log.note(Span::at(number("at")), Seen::Expired { lock });
        } else if report["told"].is_null() {
            self.log.complain(report.to_string());
        }
    }

    /// A request of a socket and its answer.
    fn asked(&self, name: &str, report: &Value) {
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        let span = Span { began: number(&report["began"]), ended: number(&report["ended"]) };
        let (user, data, answer) = (number(&report["user"]), &report["data"], &report["answer"]);
        let is_known = !answer.is_null() && answer["code"] != "unavailable";
        self.log.count(|counts| {
            counts.asked += 1;
            counts.unknown += u64::from(!is_known);
        });
        let took = span.ended - span.began;
        if report["why"] == "silence" || answer.is_object() && took > super::millis(super::ANSWER_LATE) {
            let (transport, greeted) = (&report["transport"], number(&report["greeted"]));
            let asked = format!("user {user} over {transport}, greeted at {greeted}, asked {name} {data}");
            self.log.late(Road::Front, span, format!("{asked}, {took} ms: {answer}"));
        }
        let lock = || data["lockId"].as_str().unwrap_or_default().to_owned();
        match (name, is_known) {
            ("lock-tickets", false) => {
                let request = data["requestId"].as_str().unwrap_or_default().to_owned();
                self.log.note(Span { began: span.began, ended: u64::MAX }, Seen::Wished { user, request });
            }
            ("lock-tickets", true) if answer["success"] == true => {
                let request = answer["requestId"].as_str().expect("our request").to_owned();
                let server = instant(&answer["serverTime"]);
                self.log.note(span, Seen::Granted { user, request, told: told(answer), server });
            }
            ("unlock-tickets", false) => self.log.note(span, Seen::Unlock { lock: lock(), answer: None }),
            ("unlock-tickets", true) => {
                let answer = Some(answer["success"] == true);
                self.log.note(span, Seen::Unlock { lock: lock(), answer });
            }
            ("get-my-locks", true) if answer["locks"].is_array() => {
                self.log.note(span, Seen::Listed { user, locks: all_told(&answer["locks"]) });
            }
            _ => {}
        }
    }
}
