//! Every script answers each of the words that its header documents, and no other, and leaves no key without a lifetime.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use fred::clients::Client;
use fred::interfaces::{HashesInterface, KeysInterface, ListInterface, LuaInterface, SortedSetsInterface};
use fred::types::Value;
use seatlock::ledger::Script;

use crate::support::ledger::scripts;
use crate::support::redis::RedisServer;
use crate::tidy::lua::documented_replies;

const LOCK: &str = "lock-1";
const START_MS: u64 = 1_800_000_000_000;

/// Five minutes, on a snapshot of at most ten.
const UNLIMITED: [u64; 5] = [300_000, 600_000, 0, 0, 0];

/// The same, so many tickets of the event, and tries by this interval in us and what those allowed at once take.
const fn within(held_max: u64, interval: u64, burst: u64) -> [u64; 5] {
    [300_000, 600_000, held_max, interval, burst]
}

/// Runs scripts by name on event 1 and notes what they answer.
struct Bench {
    server: RedisServer,
    client: Client,
    seen: RefCell<BTreeSet<(String, String)>>,
    now_ms: Cell<u64>,
}

fn script(name: &str) -> &'static Script {
    Script::ALL.iter().find(|script| script.name == name).expect("a script of that name")
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| format!("{value:?}"), |text| text.to_string())
}

impl Bench {
    async fn new() -> Self {
        let server = RedisServer::start().await;
        let client = server.client().await;
        let bench = Self { server, client, seen: RefCell::default(), now_ms: Cell::new(START_MS) };
        bench.pass(0).await;
        bench
    }

    /// Lets time pass.
    async fn pass(&self, ms: u64) {
        self.now_ms.set(self.now_ms.get() + ms);
        let now = vec![(self.now_ms.get() % 1000 * 1000).to_string(), (self.now_ms.get() / 1000).to_string()];
        let _: () = self.client.lpush("test:clock", now).await.expect("LPUSH answers");
    }

    /// Runs a script with these keys and arguments; its reply as texts: the values of a list, or the words of a text.
    async fn alone(&self, name: &str, keys: &[&str], args: &[&str]) -> Vec<String> {
        let source = script(name).on_stepped_clock(scripts()).expect("the script's text");
        let (keys, args) = (keys.to_vec(), args.to_vec());
        let reply: Value =
            self.client.eval(source, keys, args).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let reply: Vec<String> = match reply.as_str() {
            Some(words) => words.split(' ').map(str::to_owned).collect(),
            None => reply.into_array().iter().map(text).collect(),
        };
        self.seen.borrow_mut().insert((name.to_owned(), reply[0].clone()));
        reply
    }

    /// Runs a script about event 1: its keys come first.
    async fn event(&self, name: &str, keys: &[&str], args: &[&str]) -> Vec<String> {
        let own = ["book", "deadlines", "ended", "settling", "sold"];
        let keys: Vec<&str> = own.into_iter().take(script(name).of_event).chain(keys.iter().copied()).collect();
        self.alone(name, &keys, args).await
    }

    /// Tries to lock. `wanted`: lock, user, category, quantity, session, generation; `limits`: as the script's header lists
    /// them.
    async fn lock_within(&self, keys: &[&str], wanted: [&str; 6], limits: [u64; 5]) -> Vec<String> {
        let [.., burst] = limits;
        // A lifetime goes by the server's own time, which goes on while that of the scripts stands.
        let burst_ms = burst.div_ceil(1000).max(1000).to_string();
        let limits = limits.map(|limit| limit.to_string()).join(" ");
        let args: Vec<&str> = wanted.into_iter().chain([limits.as_str(), &burst_ms]).collect();
        self.event("lock", keys, &args).await
    }

    /// A session of replica `r` enters; `user` is the key of its user.
    async fn enter(&self, user: &str, session: &str) -> Vec<String> {
        self.alone("enter", &[user, "told"], &[session, "r", "600000", "20000"]).await
    }

    async fn leave(&self, user: &str, [session, replica, before_us]: [&str; 3]) -> Vec<String> {
        self.alone("leave", &[user, "told"], &[session, replica, before_us, "20000"]).await
    }

    async fn every_key_ends(&self) {
        for key in self.server.keys().await.iter().filter(|key| *key != "test:clock") {
            let left = self.server.pttl(key).await;
            assert!(left > 0, "{key} lives for ever ({left})");
        }
    }

    async fn stock(&self, categories: &[&str]) {
        let number = self.event("ask", &[], &["0"]).await[1].clone();
        let args: Vec<&str> = std::iter::once(number.as_str()).chain(categories.iter().copied()).collect();
        assert_eq!(self.event("accept", &[], &args).await, ["accepted"]);
    }

    async fn lock(&self, lock: &str, user: &str, category: &str, quantity: &str) -> Vec<String> {
        self.lock_within(&[lock, "rate"], [lock, user, category, quantity, "-", "0"], UNLIMITED).await
    }

    async fn confirm(&self, lock: &str, user: &str, order: &str) -> String {
        let key = if order.is_empty() { lock.to_owned() } else { format!("order-{order}") };
        self.event("confirm", &[lock, &key], &[lock, user, order, "30000"]).await.remove(0)
    }

    async fn release(&self, lock: &str, by: &str, user: &str) -> String {
        self.event("release", &[lock], &[lock, by, user, "-"]).await.remove(0)
    }

    async fn order(&self, order: &str, user: &str, quantity: &str, result: &str) -> Vec<String> {
        let key = format!("order-{order}");
        self.event("order", &[&key], &[order, "1", quantity, user, "", result, "1"]).await
    }
}

/// How many of the fields of a book are about users.
fn of_users(fields: &[String]) -> usize {
    fields.iter().filter(|field| field.contains([':', '~'])).count()
}

/// The words of a script's RETURNS section.
fn documented(script: &Script) -> BTreeSet<String> {
    let header = script.source().lines().skip_while(|line| !line.starts_with(&format!("-- {}:", script.name)));
    let returns = header.take_while(|line| line.starts_with("--")).skip_while(|line| !line.starts_with("-- RETURNS"));
    let returns: Vec<&str> = returns.take_while(|line| !line.starts_with("-- COST")).collect();
    documented_replies(&returns)
}

/// Each documented reply is provoked once, and nothing else was ever answered.
#[tokio::test]
async fn every_documented_reply_is_reached() {
    let on = Bench::new().await;
    assert_eq!(on.event("availability", &[], &["600000"]).await, ["stock_unknown"]);
    assert_eq!(on.lock(LOCK, "7", "1", "1").await, ["stock_unknown"]);
    on.stock(&["1", "9", "9", "1", "2", "9", "0", "1", "3", "9", "9", "0"]).await;
    assert_eq!(on.event("ask", &[], &["10000"]).await, ["fresh"]);
    assert_eq!(on.event("accept", &[], &["1", "1", "9", "9", "1"]).await, ["older"]);
    assert_eq!(on.event("availability", &[], &["600000"]).await[0], "known");

    let repeat = async |lock: &str, quantity: &str| {
        let limits = within(4, 1_000_000, 9_000_000);
        on.lock_within(&[lock, "rate-7", "request"], [lock, "7", "1", quantity, "s", "0"], limits).await
    };
    assert_eq!(repeat(LOCK, "2").await[0], "granted");
    let again = repeat("lock-x", "2").await;
    assert_eq!((again[0].as_str(), again[9].as_str()), ("granted_before", LOCK));
    assert_eq!(repeat("lock-x", "3").await, ["request_mismatch"]);
    assert_eq!(on.lock("lock-x", "7", "1", "1").await, ["already_locked", LOCK]);
    assert_eq!(on.lock("lock-x", "8", "9", "1").await, ["category_not_found"]);
    assert_eq!(on.lock("lock-x", "8", "3", "1").await, ["closed"]);
    assert_eq!(on.lock("lock-x", "8", "2", "1").await, ["sold_out"]);
    assert_eq!(on.lock("lock-x", "8", "1", "8").await, ["insufficient", "7"]);
    let capped = ["lock-x", "7", "2", "3", "-", "0"];
    assert_eq!(on.lock_within(&["lock-x", "rate"], capped, within(4, 0, 0)).await, ["limit_exceeded", "2"]);
    for (rate, interval) in [("rate-8", 1_000_000), ("rate-9", 1)] {
        let rated = async |burst: u64| {
            on.lock_within(&["lock-x", rate], ["lock-x", "8", "2", "1", "-", "0"], within(0, interval, burst)).await
        };
        assert_eq!(rated(interval).await, ["sold_out"]);
        assert_eq!(rated(interval).await, ["rate_limited", &interval.to_string()]);
        assert_eq!(rated(2 * interval).await, ["sold_out"], "two at once");
        assert_eq!(rated(2 * interval).await, ["rate_limited", &interval.to_string()]);
    }

    assert_eq!(on.event("locks", &[], &["7"]).await.len(), 2);
    assert_eq!(on.event("find", &[LOCK], &[LOCK]).await[..2], ["found", "active"]);
    assert_eq!(on.event("find", &["lock-x"], &["lock-x"]).await, ["not_found"]);
    assert_eq!(on.event("validate", &[], &["7", "1", "2", "60000"]).await[..2], ["valid", LOCK]);
    assert_eq!(on.event("validate", &[], &["8", "1", "2", "60000"]).await, ["not_found"]);
    assert_eq!(on.event("abandon", &[], &["7", "1", "15000"]).await, ["abandoned", "0", "1"], "pinned");
    assert_eq!(on.event("adopt", &[], &["7", "2"]).await.len(), 2);

    assert_eq!(on.confirm("lock-x", "", "").await, "not_found");
    assert_eq!(on.confirm(LOCK, "8", "").await, "wrong_user");
    assert_eq!(on.confirm(LOCK, "7", "A").await, "confirmed");
    assert_eq!(on.confirm(LOCK, "7", "A").await, "already_confirmed");
    assert_eq!(on.confirm(LOCK, "7", "B").await, "other_order");
    assert_eq!(on.release(LOCK, "owner", "7").await, "confirmed");
    assert_eq!(repeat("lock-x", "2").await, ["request_ended", LOCK]);
    assert_eq!(on.order("A", "7", "2", "completed").await, ["noted"]);
    assert_eq!(on.order("A", "7", "2", "completed").await, ["repeated"]);
    assert_eq!(on.order("A", "7", "2", "cancelled").await, ["noted"]);
    assert_eq!(on.order("A", "7", "2", "completed").await, ["after_cancel"]);

    on.lock("lock-2", "8", "1", "1").await;
    on.event("validate", &[], &["8", "1", "1", "60000"]).await;
    assert_eq!(on.order("C", "8", "1", "completed").await, ["confirm_first", "lock-2"]);
    on.lock("lock-3", "9", "1", "1").await;
    assert_eq!(on.event("abandon", &[], &["9", "1", "300000"]).await, ["abandoned", "1", "1"]);
    assert_eq!(on.order("D", "9", "1", "completed").await, ["noted"]);
    assert_eq!(on.confirm("lock-3", "9", "D").await, "confirmed_reported");
    on.lock("lock-4", "10", "1", "1").await;
    assert_eq!(on.release("lock-4", "owner", "9").await, "wrong_user");
    assert_eq!(on.release("lock-4", "owner", "10").await, "released");
    assert_eq!(on.release("lock-4", "owner", "10").await, "already_released");
    assert_eq!(on.release("lock-4", "orders", "").await, "released_by_other");
    assert_eq!(on.confirm("lock-4", "", "").await, "released");
    assert_eq!(on.release("lock-x", "orders", "").await, "not_found");

    on.lock("lock-5", "11", "1", "1").await;
    on.pass(300_000).await;
    assert_eq!(on.confirm("lock-5", "", "").await, "expired");
    assert_eq!(on.release("lock-5", "orders", "").await, "expired");
    assert_eq!(on.event("validate", &[], &["11", "1", "1", "60000"]).await, ["expired"]);
    on.pass(600_000).await;
    assert_eq!(on.event("sweep", &[], &["60000"]).await[0], "swept");
    assert_eq!(on.alone("bury", &["ended", "book", "lock-5"], &["lock-5|1|1|11"]).await, ["buried"]);
    assert_eq!(on.alone("tally", &["book", "deadlines"], &[]).await[0], "tally");

    restore_replies(&on).await;
    fleet_replies(&on).await;

    let seen = on.seen.borrow();
    for script in Script::ALL {
        let said = seen.iter().filter(|(name, _)| name == script.name).map(|(_, word)| word.clone()).collect();
        assert_eq!(documented(script), said, "{}: documented and reached", script.name);
    }
}

/// What `restore` answers; 'lock-2' is known, and the stock is too old.
async fn restore_replies(on: &Bench) {
    let restore = async |lock: &str, user: &str, quantity: &str, deadline: u64, state: &str, order: &str| {
        let (deadline, order_key) = (deadline.to_string(), format!("order-{order}"));
        let keys = [lock, "request-2", if order.is_empty() { lock } else { &order_key }];
        let given = [lock, user, "1", quantity, "1", &deadline, "600000", "s", "1", state, order, "30000", "1"];
        on.event("restore", &keys, &given).await.remove(0)
    };
    let now = on.now_ms.get();
    assert_eq!(restore("lock-2", "8", "1", now + 1, "attended", "").await, "known");
    assert_eq!(restore("lock-6", "12", "1", now, "attended", "").await, "expired");
    assert_eq!(restore("lock-6", "12", "1", now + 1000, "attended", "").await, "stock_unknown");
    on.stock(&["1", "9", "9", "0", "2", "9", "0", "1", "3", "9", "9", "0"]).await;
    on.pass(600_001).await;
    let now = on.now_ms.get();
    assert_eq!(restore("lock-6", "12", "1", now + 1000, "attended", "").await, "stock_unknown");
    on.stock(&["1", "9", "9", "0", "2", "9", "0", "1", "3", "9", "9", "0"]).await;
    on.pass(600_000).await;
    let now = on.now_ms.get();
    assert_eq!(restore("lock-6", "12", "10", now + 1000, "attended", "").await, "no_room");
    assert_eq!(restore("lock-6", "12", "1", now + 1000, "attended", "").await, "restored", "though it is closed");
    assert!((540_000..=601_000).contains(&on.server.pttl("request-2").await), "as long as its lock, and ten minutes");
    assert_eq!(restore("lock-7", "12", "1", now + 1000, "pinned", "").await, "no_room", "one lock in a category");
    assert_eq!(restore("lock-7", "12", "1", 1, "confirmed", "").await, "restored");
    assert_eq!(on.order("E", "12", "2", "completed").await, ["noted"]);
    assert_eq!(restore("lock-8", "12", "1", 1, "confirmed", "E").await, "restored_reported");
}

/// What the scripts about users, replicas and the fleet answer.
async fn fleet_replies(on: &Bench) {
    assert_eq!(on.alone("due", &["due"], &["64", "1000"]).await[..2], ["due", "-1"], "nothing ever");
    assert_eq!(on.alone("touch", &["due", "events"], &["1", "700"]).await, ["touched"]);
    assert_eq!(on.alone("due", &["due"], &["64", "1000"]).await[..2], ["due", "700"]);
    on.pass(700).await;
    let due = on.alone("due", &["due"], &["64", "1000"]).await;
    assert_eq!(due[3..], ["1"]);
    let plan = async || on.alone("plan", &["due", "events"], &["1", "-1", &due[2], "1000"]).await;
    let looks_in = async || {
        let at: Option<f64> = on.client.zscore("due", "1").await.expect("ZSCORE answers");
        #[expect(clippy::cast_possible_truncation, reason = "whole milliseconds")]
        let ms = at.expect("in the index") as i64;
        ms - i64::try_from(on.now_ms.get()).expect("before the year 292000000")
    };
    assert_eq!(looks_in().await, 1000, "claimed");
    assert_eq!(plan().await, ["planned", "5000"], "touched a moment ago: a lock may be on its way");
    assert_eq!(looks_in().await, 5000);
    on.alone("touch", &["due", "events"], &["1", "40"]).await;
    plan().await;
    assert_eq!(looks_in().await, 40, "never later than what was touched since");
    on.alone("touch", &["due", "events"], &["1", "1000"]).await;
    assert_eq!(plan().await, ["planned", "100"], "touched since it was claimed");
    on.pass(29_999).await;
    let claimed = (on.now_ms.get() + 1000).to_string();
    let later = async || on.alone("plan", &["due", "events"], &["1", "540000", &claimed, "1000"]).await;
    assert_eq!(later().await, ["planned", "5000"], "its touch may stand for other locks too");
    on.pass(1).await;
    assert_eq!(later().await, ["planned", "540000"]);
    on.pass(30_001).await;
    assert_eq!(plan().await, ["dropped"]);
    assert_eq!(on.alone("visit", &["visited"], &["1"]).await, ["visited"]);
    assert_eq!(on.alone("forget", &["visited"], &["1"]).await, ["forgotten"]);
    let entered = on.enter("sessions", "s").await;
    assert_eq!((entered[0].as_str(), &entered[1]), ("entered", &(on.now_ms.get() * 1000).to_string()));
    let second = on.enter("sessions", "t").await;
    assert_eq!(second[0], "entered");
    let left = on.leave("sessions", ["s", "r", ""]).await;
    assert_eq!((left[0].as_str(), &left[2], &left[3]), ("left", &"1".to_owned(), &"1".to_owned()));
    assert!(on.server.pttl("sessions").await > 90_000_000, "one is there: a week");
    assert_eq!(left[1], (on.now_ms.get() * 1000 + 2).to_string(), "rises within a microsecond");
    let forgotten = on.leave("forgotten", ["s", "r", ""]).await;
    assert_eq!(forgotten[1], (on.now_ms.get() * 1000).to_string(), "rises also when Redis has lost what was before");
    let left = on.leave("sessions", ["", "r", &second[1]]).await;
    assert_eq!(left[2..4], ["1", "1"], "it began at that very time");
    let field =
        async |name: &str| on.client.hget::<Option<String>, _, _>("sessions", name).await.expect("HGET answers");
    assert_eq!(field("#").await.as_ref(), Some(&left[1]));
    on.pass(1).await;
    let left = on.leave("sessions", ["", "other", "9000000000000000"]).await;
    assert_eq!(left[2..4], ["1", "0"], "of another replica");
    let left = on.leave("sessions", ["", "r", &left[4]]).await;
    assert_eq!(left[2..4], ["0", "0"]);
    assert_eq!(field("t").await, None);
    assert!(on.server.pttl("sessions").await <= 90_000_000, "nobody is there: a day");
    assert_eq!(on.alone("tell", &["told"], &["news", "channel", "600000"]).await, ["told"]);
    assert_eq!(on.alone("host", &["hosted"], &["7"]).await, ["hosted"]);
    assert_eq!(on.alone("unhost", &["hosted"], &["7", &left[4]]).await, ["unhosted", "1"], "began since");
    on.pass(1).await;
    let found_us = (on.now_ms.get() * 1000).to_string();
    assert_eq!(on.alone("unhost", &["hosted"], &["7", &found_us]).await, ["unhosted", "0"]);
    let beat = async |replica: &str, lease: &str, epoch: &str| {
        on.alone("beat", &["leases", "reports", "events", "dead", "epoch"], &[replica, lease, "1 2", epoch]).await
    };
    assert_eq!(beat("r", "5000", "e1").await, ["alive", "0", "e1", "1 2"]);
    assert_eq!(beat("r", "5000", "e2").await, ["alive", "1", "e1", "1 2"]);
    on.pass(5000).await;
    assert_eq!(beat("r", "5000", "e2").await, ["alive", "0", "e1", "1 2"], "it ran out this very millisecond");
    on.pass(5000).await;
    assert_eq!(beat("q", "5000", "e3").await, ["alive", "0", "e1", "1 2"], "r is dead");
    beat("r", "5000", "e3").await;
    assert_eq!(on.client.zcard::<u64, _>("dead").await.expect("ZCARD answers"), 0, "r was only slow");
    on.pass(5000).await;
    beat("q", "5000", "e3").await;
    let dead = on.alone("due", &["dead"], &["4", "5000"]).await;
    assert_eq!(dead[3..], ["r"]);
    assert_eq!(on.alone("drop", &["dead"], &["r", "1"]).await, ["rewritten"]);
    let buried = async || on.client.zcard::<u64, _>("dead").await.expect("ZCARD answers");
    assert_eq!(buried().await, 1);
    assert_eq!(on.alone("drop", &["dead"], &["r", &dead[2]]).await, ["dropped"]);
    assert_eq!(buried().await, 0);
    assert_eq!(beat("q", "0", "e3").await, ["alive", "1", "e1"], "gone without a word left");
    assert_eq!(on.alone("due", &["dead"], &["4", "5000"]).await[3..], ["q"], "and looked after");
}

/// Times in microseconds have sixteen digits, two more than Lua writes of a number by itself.
#[tokio::test]
async fn microseconds_are_kept_whole() {
    let on = Bench::new().await;
    let _: () = on.client.del("test:clock").await.expect("DEL answers");
    let now = vec!["1800000000".to_owned(), "123457".to_owned()];
    let _: () = on.client.rpush("test:clock", now).await.expect("RPUSH answers");
    on.alone("host", &["hosted"], &["7"]).await;
    let began: Option<f64> = on.client.zscore("hosted", "7").await.expect("ZSCORE answers");
    assert_eq!(began, Some(1_800_000_000_123_457.0));
    assert_eq!(on.enter("sessions", "s").await, ["entered", "1800000000123457", "1800000000123", "0"]);
    let began: String = on.client.hget("sessions", "s").await.expect("HGET answers");
    assert_eq!(began, "r 1800000000123457");
    let left = on.leave("sessions", ["s", "r", ""]).await;
    assert_eq!(left, ["left", "1800000000123458", "0", "0", "1800000000123457"]);
}

/// What was told is dropped when the last session ends that can have shown it, and by no leaving that ended nothing.
#[tokio::test]
async fn what_was_told_is_kept_until_the_last_session_ends() {
    let on = Bench::new().await;
    on.alone("tell", &["told"], &["news", "channel", "600000"]).await;
    on.pass(20_000).await;
    let kept = async || on.client.zcard::<u64, _>("told").await.expect("ZCARD answers");
    for nobody in [["s", "r", ""], ["", "r", "9000000000000000"]] {
        on.leave("sessions", nobody).await;
        assert_eq!(kept().await, 1, "{nobody:?} has ended nothing");
    }
    for session in ["s", "t"] {
        on.enter("sessions", session).await;
    }
    on.leave("sessions", ["s", "r", ""]).await;
    assert_eq!(kept().await, 1, "another is open");
    on.pass(1).await;
    on.leave("sessions", ["", "r", "9000000000000000"]).await;
    assert_eq!(kept().await, 0);
}

/// When everybody forgets an event, a user or the fleet, every key of theirs ends by itself.
#[tokio::test]
async fn every_key_has_a_lifetime() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    on.lock("lock-1", "7", "1", "1").await;
    on.lock("lock-2", "8", "1", "1").await;
    on.lock("lock-3", "9", "1", "1").await;
    on.confirm("lock-1", "7", "A").await;
    on.order("A", "7", "3", "completed").await;
    on.confirm("lock-2", "8", "").await;
    on.alone("visit", &["visited"], &["1"]).await;
    on.enter("sessions", "s").await;
    on.alone("tell", &["told"], &["news", "channel", "600000"]).await;
    on.alone("host", &["hosted"], &["7"]).await;
    let fleet = ["leases", "reports", "events", "dead", "epoch"];
    on.alone("beat", &fleet, &["r", "5000", "1 2", "e"]).await;
    on.alone("beat", &fleet, &["q", "0", "", "e"]).await;
    on.pass(300_000).await;
    on.event("sweep", &[], &["60000"]).await;
    let keys = on.server.keys().await;
    assert!(
        ["leases", "reports", "dead", "epoch", "hosted"].iter().all(|key| keys.iter().any(|k| k == key)),
        "{keys:?}"
    );
    assert!(["book", "ended", "settling", "sold"].iter().all(|key| keys.iter().any(|k| k == key)), "{keys:?}");
    on.every_key_ends().await;
}

/// The same where an order is covered by its lock, so that only the marks are written.
#[tokio::test]
async fn every_key_of_a_covered_order_has_a_lifetime() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    on.lock("lock-1", "7", "1", "1").await;
    on.confirm("lock-1", "7", "A").await;
    on.order("A", "7", "1", "completed").await;
    assert!(on.server.keys().await.iter().any(|key| key == "sold"));
    on.every_key_ends().await;
}

/// A question that is never answered leaves nothing behind, and each answer is kept as long as the one before.
#[tokio::test]
async fn questions_and_answers_have_a_lifetime() {
    let on = Bench::new().await;
    let number = on.event("ask", &[], &["0"]).await[1].clone();
    on.every_key_ends().await;
    assert!(on.client.persist::<bool, _>("book").await.expect("PERSIST answers"));
    on.event("accept", &[], &[&number, "1", "9", "9", "1"]).await;
    on.every_key_ends().await;
}

/// Of an event that may not exist nothing is kept for long; of one with stock or sales it is.
#[tokio::test]
async fn questions_about_nothing_are_forgotten_soon() {
    let on = Bench::new().await;
    let number = on.event("ask", &[], &["0"]).await[1].clone();
    let left = on.server.pttl("book").await;
    assert!((1..=60_000).contains(&left), "{left}");
    on.event("accept", &[], &[&number, "1", "9", "9", "1"]).await;
    on.client.pexpire::<(), _>("book", 1000, None).await.expect("PEXPIRE answers");
    on.event("ask", &[], &["0"]).await;
    assert!(on.server.pttl("book").await > 60_000);
}

/// A sale is shown by a question that comes after it, also when Redis has gone back to a number before the question's.
#[tokio::test]
async fn an_older_question_never_shows_a_sale() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    on.lock("lock-1", "7", "1", "1").await;
    on.confirm("lock-1", "7", "").await;
    let before: String = on.client.hget("book", "counter").await.expect("HGET answers");
    on.pass(1).await;
    let asked = on.event("ask", &[], &["0"]).await[1].clone();
    assert_ne!(asked, before);
    let _: () = on.client.hset("book", ("counter", before)).await.expect("HSET answers");
    on.pass(1).await;
    on.order("A", "7", "1", "completed").await;
    on.order("B", "8", "2", "completed").await;
    assert_eq!(on.event("accept", &[], &[&asked, "1", "9", "9", "1"]).await[0], "accepted");
    assert_eq!(on.client.zcard::<u64, _>("sold").await.expect("ZCARD answers"), 2, "both wait for a later question");
    let later = on.event("ask", &[], &["0"]).await[1].clone();
    assert_eq!(on.event("accept", &[], &[&later, "1", "9", "6", "1"]).await[0], "accepted");
    assert_eq!(on.client.zcard::<u64, _>("sold").await.expect("ZCARD answers"), 0);
}

/// Locks and their tombstones live as long as they answer for themselves.
#[tokio::test]
async fn every_tombstone_has_its_own_lifetime() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    let lives = async |key: &str, hours: f64| {
        let left = on.server.pttl(key).await;
        #[expect(clippy::cast_possible_truncation, reason = "whole milliseconds of a day")]
        let wanted = (hours * 3_600_000.0) as i64;
        assert!((wanted - 60_000..=wanted).contains(&left), "{key} lives for {left} ms");
    };
    for (lock, user) in [("lock-1", "7"), ("lock-2", "8"), ("lock-3", "9")] {
        on.lock(lock, user, "1", "1").await;
    }
    on.confirm("lock-1", "7", "A").await;
    on.release("lock-2", "owner", "8").await;
    on.order("A", "7", "1", "completed").await;
    lives("lock-1", 24.0).await;
    lives("lock-2", 1.0 / 6.0).await;
    lives("lock-3", 25.0).await;
    lives("order-A", 24.0).await;
    lives("book", 25.0).await;
}

/// Counts have a lifetime also when they are written to by what only notes that a lock was there already, or, after they
/// were lost, that a sale was given back or a lock expired. A rate is kept until it limits nobody.
#[tokio::test]
async fn endings_and_repeats_renew_lifetimes() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    let forget = async || assert!(on.client.persist::<bool, _>("book").await.expect("PERSIST answers"));
    let try_again = async |lock: &str| {
        let limits = within(0, 100_000, 2_000_000);
        on.lock_within(&[lock, "rate", "request"], ["lock-1", "7", "1", "1", "-", "0"], limits).await
    };
    assert_eq!(try_again("lock-1").await[0], "granted");
    let rate = on.server.pttl("rate").await;
    assert!((1_800..=2_000).contains(&rate), "twenty tries at once, ten a second, count for {rate} ms");
    forget().await;
    assert_eq!(try_again("lock-2").await[0], "granted_before");
    on.every_key_ends().await;
    for key in ["deadlines", "book"] {
        assert!(on.client.persist::<bool, _>(key).await.expect("PERSIST answers"), "{key}");
    }
    assert_eq!(on.event("validate", &[], &["7", "1", "1", "60000"]).await[0], "valid");
    on.every_key_ends().await;
    forget().await;
    assert_eq!(on.confirm("lock-1", "7", "A").await, "confirmed");
    on.every_key_ends().await;
    assert!(on.client.del::<bool, _>("book").await.expect("DEL answers"));
    assert_eq!(on.release("lock-1", "orders", "7").await, "released");
    assert!(on.server.keys().await.iter().any(|key| key == "book"));
    on.every_key_ends().await;
    on.stock(&["1", "9", "9", "1"]).await;
    on.lock("lock-3", "9", "1", "1").await;
    assert!(on.client.del::<bool, _>("book").await.expect("DEL answers"));
    on.pass(300_000).await;
    assert_eq!(on.event("sweep", &[], &["60000"]).await[1], "1");
    assert!(on.server.keys().await.iter().any(|key| key == "book"));
    on.every_key_ends().await;
}

/// A lock of which only its own key is left is not known.
#[tokio::test]
async fn a_lock_without_a_deadline_is_none() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    on.lock("lock-1", "7", "1", "1").await;
    assert!(on.client.del::<bool, _>("deadlines").await.expect("DEL answers"));
    assert_eq!(on.event("find", &["lock-1"], &["lock-1"]).await, ["not_found"]);
}

/// What every lock writes to has its lifetime anew when it was given ten minutes ago, or nobody knows when. It stays, with
/// its lifetime, when the last lock ends, and the next lock comes to it.
#[tokio::test]
async fn locks_renew_lifetimes_once_in_ten_minutes() {
    const SHORT_MS: i64 = 3_600_000;
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1", "2", "9", "9", "1"]).await;
    let renewed = async |user: &str, category: &str| {
        let keys = ["book", "deadlines"];
        for key in keys {
            on.client.pexpire::<(), _>(key, SHORT_MS, None).await.expect("PEXPIRE answers");
        }
        let lock = format!("lock-{user}");
        let limits = [3_600_000, 86_400_000, 0, 0, 0];
        assert_eq!(
            on.lock_within(&[&lock, "rate"], [&lock, user, category, "2", "-", "0"], limits).await[0],
            "granted"
        );
        on.every_key_ends().await;
        let mut renewed = [false; 2];
        for (key, renewed) in keys.iter().zip(&mut renewed) {
            *renewed = on.server.pttl(key).await > SHORT_MS;
        }
        renewed
    };
    assert_eq!(renewed("1", "1").await, [true; 2]);
    on.pass(599_999).await;
    assert_eq!(renewed("2", "1").await, [false; 2]);
    assert_eq!(renewed("3", "2").await, [false; 2]);
    on.pass(1).await;
    assert_eq!(renewed("4", "1").await, [true; 2]);
    for user in ["1", "2", "3", "4"] {
        assert_eq!(on.release(&format!("lock-{user}"), "owner", user).await, "released");
    }
    let left: Vec<String> =
        on.client.zrange("deadlines", 0, -1, None, false, None, false).await.expect("ZRANGE answers");
    assert_eq!(left, ["-"]);
    assert_eq!(renewed("6", "1").await, [false; 2]);
    on.client.hdel::<(), _, _>("book", "due_ms").await.expect("HDEL answers");
    assert_eq!(renewed("7", "1").await, [true; 2], "nobody knows when");
}

/// A sale that is written down again lives as long as one that was never lost, with everything written beside it.
#[tokio::test]
async fn a_restored_sale_has_a_lifetime() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    let given = ["lock-1", "7", "1", "1", "1", "1", "600000", "-", "1", "confirmed", "A", "30000", ""];
    assert!(on.client.persist::<bool, _>("book").await.expect("PERSIST answers"));
    assert_eq!(on.event("restore", &["lock-1", "lock-1", "order-A"], &given).await, ["restored"]);
    on.every_key_ends().await;
    let left = on.server.pttl("lock-1").await;
    assert!((86_340_000..=86_400_000).contains(&left), "a day: {left} ms");
}

/// Nothing is left of an expired lock whose tombstone is old enough.
#[tokio::test]
async fn a_buried_lock_leaves_nothing() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    on.lock("lock-1", "7", "1", "1").await;
    on.pass(300_000).await;
    on.event("sweep", &[], &["60000"]).await;
    let keys =
        async || on.server.keys().await.iter().filter(|key| *key != "test:clock").cloned().collect::<BTreeSet<_>>();
    assert_eq!(keys().await, ["book", "deadlines", "ended", "lock-1"].map(str::to_owned).into());
    assert_eq!(on.alone("bury", &["ended", "book", "lock-1"], &["lock-1|1|1|7"]).await, ["buried"]);
    assert_eq!(keys().await, ["book", "deadlines"].map(str::to_owned).into(), "which end by themselves");
    on.every_key_ends().await;
    assert_eq!(of_users(&on.client.hkeys::<Vec<String>, _>("book").await.expect("HKEYS answers")), 0);
}

/// Who may claim fewer events than are due is told that the next is due now.
#[tokio::test]
async fn what_is_due_and_not_claimed_is_due_now() {
    let on = Bench::new().await;
    for event in ["1", "2"] {
        on.alone("touch", &["due", "events"], &[event, "100"]).await;
    }
    on.pass(107).await;
    let due = async || on.alone("due", &["due"], &["1", "1000"]).await;
    let claim = (on.now_ms.get() + 1000).to_string();
    assert_eq!(due().await, ["due", "0", &claim, "1"]);
    assert_eq!(due().await, ["due", "1000", &claim, "2"]);
}

/// An event whose last lock may be on its way is looked at for a minute after it was touched, and then no more.
#[tokio::test]
async fn an_event_without_locks_is_dropped_after_a_minute() {
    let on = Bench::new().await;
    on.alone("touch", &["due", "events"], &["1", "1000"]).await;
    on.pass(60_000).await;
    let plan = async || on.alone("plan", &["due", "events"], &["1", "-1", "1900000000000", "0"]).await;
    assert_eq!(plan().await, ["planned", "5000"]);
    on.pass(1).await;
    assert_eq!(plan().await, ["dropped"]);
}

/// A sale that the orders-service gives back waits for no report any more.
#[tokio::test]
async fn a_sale_given_back_is_not_settled() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    on.lock("lock-1", "7", "1", "1").await;
    on.confirm("lock-1", "7", "A").await;
    assert!(on.server.keys().await.iter().any(|key| key == "settling"));
    assert_eq!(on.release("lock-1", "orders", "7").await, "released");
    assert!(!on.server.keys().await.iter().any(|key| key == "settling"));
}

/// One more lock is due than a call ends: it is over all the same, and its ticket is free for whoever wants it.
#[tokio::test]
async fn the_last_of_a_backlog_is_over_too() {
    let on = Bench::new().await;
    // Due at the same time, so in the order of their names; the last one is of the other category.
    let wave = async || {
        on.stock(&["1", "1", "1", "1", "2", "1000", "1000", "1"]).await;
        for n in 1000..2000 {
            assert_eq!(on.lock(&format!("lock-{n}"), &n.to_string(), "2", "1").await[0], "granted");
        }
        assert_eq!(on.lock("lock-9", "9", "1", "1").await[0], "granted");
        on.pass(300_000).await;
    };
    let tombs_gone = async || {
        on.pass(700_000).await;
        while on.event("sweep", &[], &["0"]).await[2] == "1" {}
    };
    wave().await;
    assert_eq!(on.release("lock-9", "owner", "9").await, "expired");
    tombs_gone().await;
    wave().await;
    assert_eq!(on.confirm("lock-9", "9", "A").await, "expired");
    tombs_gone().await;
    wave().await;
    assert_eq!(on.lock("lock-8", "8", "1", "1").await[0], "granted");
}

/// A user's index forgets an event a minute after the last try there, a fleet a replica with its lease.
#[tokio::test]
async fn indexes_forget_in_time() {
    let on = Bench::new().await;
    on.alone("visit", &["visited"], &["1"]).await;
    on.pass(59_000).await;
    on.alone("forget", &["visited"], &["1"]).await;
    assert!(on.server.keys().await.contains(&"visited".to_owned()), "a lock may be on its way");
    on.pass(1000).await;
    on.alone("forget", &["visited"], &["1"]).await;
    assert!(on.server.keys().await.contains(&"visited".to_owned()), "a minute ago, not more");
    on.pass(1000).await;
    on.alone("forget", &["visited"], &["1"]).await;
    assert!(!on.server.keys().await.contains(&"visited".to_owned()));

    for event in 1..=1003 {
        on.alone("visit", &["visited"], &[&event.to_string()]).await;
    }
    let fields = async || on.client.hkeys::<Vec<String>, _>("visited").await.expect("HKEYS answers");
    assert_eq!(fields().await.len(), 1003);
    on.enter("visited", "s").await;
    on.pass(1).await;
    for event in 1004..=1099 {
        on.alone("visit", &["visited"], &[&event.to_string()]).await;
    }
    let left = fields().await;
    assert_eq!(left.len(), 1002, "the latest thousand, a session and the generation");
    assert!((1004..=1099).all(|event| left.contains(&format!("e:{event}"))) && left.contains(&"s".to_owned()));
    assert_eq!(on.leave("visited", ["s", "r", ""]).await[2..4], ["0", "0"], "events are no sessions");

    let beat = async |replica: &str, lease: &str, report: &str| {
        let keys = ["leases", "reports", "events", "dead", "epoch"];
        let mut told = on.alone("beat", &keys, &[replica, lease, report, "e"]).await;
        told[3..].sort();
        told.drain(1..3);
        told
    };
    on.alone("touch", &["due", "events"], &["1", "1000"]).await;
    beat("r", "5000", "1 2").await;
    on.pass(4999).await;
    assert_eq!(beat("s", "5000", "3 4").await, ["alive", "1 2", "3 4"]);
    on.pass(1).await;
    assert_eq!(beat("s", "5000", "5 6").await, ["alive", "5 6"], "the lease of r has run out");
    assert_eq!(on.client.zcard::<u64, _>("leases").await.expect("ZCARD answers"), 1);
    assert_eq!(beat("s", "0", "").await, ["alive"], "given back");
    assert!(on.server.keys().await.contains(&"events".to_owned()));
    on.pass(25 * 3_600_000).await;
    beat("s", "5000", "5 6").await;
    assert!(!on.server.keys().await.contains(&"events".to_owned()), "untouched for a day");
}

/// A script that Redis has forgotten (SCRIPT FLUSH, failover) is sent again by the ledger.
#[tokio::test]
async fn forgotten_scripts_are_sent_again() {
    use std::time::Duration;

    let server = RedisServer::start().await;
    let ledger = crate::support::ledger::live(&server, Duration::from_secs(5), 0);
    let event = crate::support::ledger::event(1);
    ledger.ask(event, Duration::ZERO).await.expect("an answer");
    server.client().await.script_flush(false).await.expect("an answer");
    ledger.ask(event, Duration::ZERO).await.expect("an answer");
}

/// An abandonment or an adoption of an earlier presence touches nothing that a later one has seen, in whatever order
/// they arrive.
#[tokio::test]
async fn presence_goes_by_generations() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    let of_presence = ["lock-1", "7", "1", "1", "-", "2"];
    assert_eq!(on.lock_within(&["lock-1", "rate"], of_presence, UNLIMITED).await[0], "granted");
    let deadline = async || on.event("locks", &[], &["7"]).await.pop().expect("its lock");
    let full = deadline().await;
    let abandon = async |generation: &str| on.event("abandon", &[], &["7", generation, "15000"]).await[1].clone();
    let adopt = async |generation: &str| on.event("adopt", &[], &["7", generation]).await;
    assert_eq!(abandon("1").await, "0", "by an earlier presence");
    assert_eq!(abandon("2").await, "1", "by the presence that has it");
    let short = deadline().await;
    assert_ne!(short, full);
    adopt("2").await;
    assert_eq!(deadline().await, short, "not by the presence that left");
    adopt("4").await;
    assert_eq!(deadline().await, full);
    assert_eq!(abandon("3").await, "0", "before the adoption, told after it");
    assert_eq!(abandon("6").await, "1");
    adopt("5").await;
    assert_eq!(deadline().await, short, "before the abandonment, told after it");
}

/// An order without a lock is all that an event has: it is not kept for ever.
#[tokio::test]
async fn an_order_without_a_lock_ends() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    assert!(on.client.persist::<bool, _>("book").await.expect("PERSIST answers"));
    assert_eq!(on.order("A", "7", "2", "completed").await, ["noted"]);
    on.every_key_ends().await;
}

/// Who locks for less than the warning is not warned: the horizon has passed that deadline already.
#[tokio::test]
async fn the_horizon_of_warnings_moves_on() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    on.lock("lock-1", "7", "1", "1").await;
    for _ in 0..2 {
        on.pass(250_000).await;
        assert_eq!(on.event("sweep", &[], &["60000"]).await[0], "swept");
        let horizon: u64 = on.client.hget("book", "warned_ms").await.expect("HGET answers");
        assert_eq!(horizon, on.now_ms.get() + 60_000);
        on.lock("lock-2", "8", "1", "1").await;
    }
}

/// A sweep says when to come again: at the next warning, deadline, time limit of a sale or end of a tombstone.
#[tokio::test]
async fn a_sweep_says_when_to_come_again() {
    let on = Bench::new().await;
    let next = async || on.event("sweep", &[], &["60000"]).await[4].clone();
    on.stock(&["1", "9", "9", "1"]).await;
    assert_eq!(next().await, "-1");
    on.lock("lock-1", "7", "1", "1").await;
    assert_eq!(next().await, "240000", "its warning");
    on.pass(240_000).await;
    assert_eq!(next().await, "60000", "its deadline");
    on.pass(10_000).await;
    on.confirm("lock-1", "7", "").await;
    on.lock("lock-2", "8", "1", "1").await;
    assert_eq!(next().await, "30000", "the time limit of its order, before the other's warning");
    on.pass(30_007).await;
    assert_eq!(next().await, "0", "nobody said so in time");
    on.order("A", "7", "1", "completed").await;
    assert_eq!(next().await, "209993", "the other's warning");
    assert!(on.client.persist::<bool, _>("book").await.expect("PERSIST answers"));
    assert_eq!(next().await, "209993");
    on.every_key_ends().await;
    on.pass(300_000).await;
    assert_eq!(next().await, "569993", "the end of the other's tombstone");
}

/// What waits for its order is forgotten lock by lock, and a sale that no question was ever asked after is shown by the
/// first snapshot.
#[tokio::test]
async fn a_settled_lock_waits_no_more() {
    let on = Bench::new().await;
    on.stock(&["1", "9", "9", "1"]).await;
    for lock in ["lock-1", "lock-2"] {
        on.lock(lock, "7", "1", "1").await;
        assert_eq!(on.confirm(lock, "7", "").await, "confirmed");
    }
    on.client.hdel::<(), _, _>("book", "counter").await.expect("HDEL answers");
    on.order("A", "7", "1", "completed").await;
    let waiting: Option<String> = on.client.hget("book", "7~1").await.expect("HGET answers");
    assert_eq!(waiting.as_deref(), Some("lock-2:1:"));
    let mark: Option<f64> = on.client.zscore("sold", "lock-1|1|1|7").await.expect("ZSCORE answers");
    assert_eq!(mark, Some(1_800_000_000_000_000.0));
    on.order("B", "7", "1", "completed").await;
    let waiting: Option<String> = on.client.hget("book", "7~1").await.expect("HGET answers");
    assert_eq!(waiting, None);
}

/// Of a wave of expiries the counts come first. Until the rest is written down too, whoever asks for one of the locks
/// and whoever is limited by one of them is served all the same, and what a user holds is let go once.
#[tokio::test]
async fn a_wave_is_counted_before_it_is_written_down() {
    const LOCKS: usize = 2050;
    let on = Bench::new().await;
    on.stock(&["1", "2100", "2100", "1", "2", "9", "9", "1"]).await;
    let grant = async |lock: &str, user: &str, category: &str, held_max: u64| {
        let limits = [300_000, 9_000_000, held_max, 0, 0];
        on.lock_within(&[lock, "rate"], [lock, user, category, "1", "-", "0"], limits).await
    };
    // All deadlines are the same, so that they are due in the order of their names.
    let names: Vec<(String, String)> = (1000..1000 + LOCKS).map(|n| (format!("lock-{n}"), n.to_string())).collect();
    for (lock, user) in &names {
        assert_eq!(grant(lock, user, "1", 1).await[0], "granted");
    }
    let users = async || on.alone("tally", &["book", "deadlines"], &[]).await[5].clone();
    let sweep = async || on.event("sweep", &[], &["0"]).await[1..5].join(" ");
    let free = async || {
        let counts: String = on.client.hget("book", "1").await.expect("HGET answers");
        2100 - counts.split(' ').nth(3).expect("six numbers").parse::<usize>().expect("a number")
    };
    let found = async |at: usize| on.event("find", &[&names[at].0], &[&names[at].0]).await[1..].join(" ");
    assert_eq!((free().await, users().await), (50, LOCKS.to_string()));
    on.pass(300_000).await;
    let ended = on.now_ms.get().to_string();

    assert!(on.client.persist::<bool, _>("book").await.expect("PERSIST answers"));
    assert_eq!(sweep().await, "1000 1 0 0", "the counts of a thousand, and the rest is left");
    assert_eq!((free().await, users().await), (1050, LOCKS.to_string()), "nobody has let go yet");
    on.every_key_ends().await;
    assert_eq!(sweep().await, "1000 1 0 0");
    assert_eq!((free().await, users().await), (2050, LOCKS.to_string()));
    assert!(found(249).await.starts_with("expired "), "the last of the first 250, which are written down for it");
    assert_eq!(users().await, "1800", "and no more than that");
    assert!(found(1500).await.starts_with(&format!("expired {} 1 1 ", names[1500].1)), "by seven calls in one");
    assert_eq!(found(1500).await.split(' ').nth(5), Some(ended.as_str()), "with its deadline");
    assert_eq!(users().await, "300");
    on.every_key_ends().await;
    assert_eq!(found(2049).await.split(' ').next(), Some("expired"), "due, and not ended yet");

    // The last fifty are ended whole by the call that finds them.
    assert_eq!(grant("lock-a", &names[2049].1, "1", 1).await[0], "granted");
    assert_eq!((free().await, users().await), (2099, "251".to_owned()));
    assert_eq!(sweep().await, "0 0 0 300000", "the 250 that are left");
    let holders = async || of_users(&on.client.hkeys::<Vec<String>, _>("book").await.expect("HKEYS answers"));
    assert_eq!(holders().await, LOCKS + 1, "each lock until its tombstone goes, and one user");
    assert_eq!(sweep().await, "0 0 0 300000");

    // The same again, for a user who may hold one: that nobody has let go yet is not held against her.
    on.pass(600_000).await;
    for (lock, user) in &names[..1000] {
        assert_eq!(grant(lock, user, "1", 1).await[0], "granted");
    }
    on.pass(300_000).await;
    assert_eq!(sweep().await.split(' ').next(), Some("1000"));
    assert_eq!((free().await, users().await), (2100, "1000".to_owned()));
    assert_eq!(grant("lock-b", &names[999].1, "2", 1).await[0], "granted");
    assert_eq!(users().await, "1");
    // One more than a call ends, two of them of one user.
    for (lock, user) in &names[..1000] {
        assert_eq!(grant(lock, user, "1", 9).await[0], "granted");
    }
    on.pass(300_000).await;
    for left_and_users in [("1", "1000"), ("1", "1000"), ("1", "750"), ("1", "500"), ("1", "250"), ("0", "0")] {
        let swept = sweep().await;
        assert_eq!((swept.split(' ').nth(1).unwrap(), users().await.as_str()), left_and_users, "{swept}");
    }
    assert_eq!(holders().await, LOCKS + 1, "each lock and lock-b until their tombstones go");

    // 250 are ended whole by whoever finds them, of one more the rest is left.
    on.pass(600_000).await;
    for (ends, users_left) in [(250, "0"), (251, "251")] {
        for (lock, user) in &names[..ends] {
            assert_eq!(grant(lock, user, "1", 1).await[0], "granted");
        }
        on.pass(300_000).await;
        assert_eq!(sweep().await.split(' ').next(), Some(ends.to_string().as_str()));
        assert_eq!((free().await, users().await.as_str()), (2100, users_left));
        on.pass(600_000).await;
    }

    // Whoever finds a wave gives what it writes a lifetime.
    while sweep().await.split(' ').nth(1) == Some("1") {}
    for n in 100..351 {
        assert_eq!(grant(&format!("late-{n}"), &n.to_string(), "1", 9).await[0], "granted");
    }
    on.pass(300_000).await;
    assert!(on.client.persist::<bool, _>("book").await.expect("PERSIST answers"));
    assert_eq!(on.confirm("lock-x", "", "").await, "not_found");
    on.every_key_ends().await;
    assert_eq!(
        on.event("find", &["late-350"], &["late-350"]).await[1],
        "expired",
        "250 and one more are written down for it"
    );
}

/// Every lock that stops being active is told once, with how long it was: by the call that ended it, or, where it reached
/// its deadline, by the next sweep, whichever script met it first. What waits to be told is bounded.
#[tokio::test]
async fn every_end_is_told_once() {
    let on = Bench::new().await;
    let ends = async || on.event("sweep", &[], &["60000"]).await[5].clone();
    on.stock(&["1", "9", "9", "1"]).await;
    for (lock, user) in [("lock-1", "7"), ("lock-2", "8"), ("lock-3", "9"), ("lock-4", "10"), ("lock-0", "6")] {
        on.lock(lock, user, "1", "1").await;
    }
    on.pass(1_500).await;
    let args = ["lock-1", "7", "A", "30000"];
    assert_eq!(on.event("confirm", &["lock-1", "order-A"], &args).await, ["confirmed", "1500"]);
    on.pass(500).await;
    let held = async |lock: &str| {
        let released = on.event("release", &[lock], &[lock, "orders", "", "-"]).await;
        match released[8].as_str() {
            "-1" => None,
            ended_ms => Some(ended_ms.parse::<u64>().expect("a time") - released[4].parse::<u64>().expect("a time")),
        }
    };
    assert_eq!(held("lock-2").await, Some(2000));
    assert_eq!(held("lock-1").await, None, "its active life has ended before");
    assert_eq!(ends().await, "", "nothing reached its deadline");
    on.event("abandon", &[], &["9", "1", "15000"]).await;
    on.pass(15_007).await;
    on.event("availability", &[], &["86400000"]).await;
    on.pass(283_000).await;
    on.lock("lock-5", "11", "1", "1").await;
    assert_eq!(ends().await, " abandoned:17000:7 expired:300000:7 expired:300000:7");
    assert_eq!(ends().await, "");
    on.client.hset::<(), _, _>("book", ("#ends", "x".repeat(131_072))).await.expect("HSET answers");
    on.pass(300_000).await;
    assert_eq!(ends().await.trim_start_matches('x'), "", "as much as may wait");
    on.stock(&["1", "9", "9", "1"]).await;
    on.lock("lock-6", "12", "1", "1").await;
    on.client.hset::<(), _, _>("book", ("#ends", "x".repeat(131_071))).await.expect("HSET answers");
    on.pass(300_000).await;
    assert_eq!(ends().await.trim_start_matches('x'), " expired:300000:0");
}
