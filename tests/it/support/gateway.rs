//! A gateway on a free port, and clients of two kinds: raw WebSocket frames, and the real `socket.io-client` in Node.

#![expect(clippy::wildcard_enum_match_arm, reason = "everything but what is expected fails the test")]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use seatlock::callers::Addresses;
use seatlock::domain::{LockRequest, ReplicaId};
use seatlock::fanout::{Fanout, FanoutOptions};
use seatlock::gateway::auth::{KeySource, TokenIssuer, TokenVerifier, VerifierOptions};
use seatlock::gateway::{Gateway, GatewayOptions, Line};
use seatlock::http::serve::{Limits, serve};
use seatlock::inventory::{Catalogue, Stock, StockOptions};
use seatlock::ledger::{Ledger, LedgerOptions, MemoryLedger, RedisClock, RedisLedger, RedisOptions, Sweeper};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};
use tokio_util::sync::CancellationToken;
use tungstenite::Message;
use tungstenite::client::IntoClientRequest as _;

use super::ledger::user;

/// The longest that anything in these tests may take.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What tokens are signed with.
pub const SECRET: &[u8] = b"a secret of the tests, long enough to be one";

/// A token for a user, valid for an hour.
pub fn token(id: u64) -> String {
    token_for(id, Duration::from_hours(1))
}

/// A token for a user.
pub fn token_for(id: u64, lifetime: Duration) -> String {
    TokenIssuer::new(SECRET).issue(user(id), lifetime)
}

/// A running replica. Event 1 has categories 1 (10 tickets) and 2 (50); event 2 has category 3, sold out; event 3 is
/// closed; event 9 has 500 categories; events 10..=60 have one each.
pub struct Replica {
    pub gateway: Gateway,
    pub ledger: Arc<dyn Ledger>,
    pub stock: Arc<Stock>,
    pub address: SocketAddr,
    stop: CancellationToken,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn catalogue() -> Catalogue {
    let mut events = vec![
        json!({"id": 1, "ticketCategories": [
            {"id": 1, "totalSeats": 12, "availableSeats": 10}, {"id": 2, "totalSeats": 50, "availableSeats": 50}]}),
        json!({"id": 2, "ticketCategories": [{"id": 3, "totalSeats": 5, "availableSeats": 0}]}),
        json!({"id": 3, "isActive": false, "ticketCategories": [{"id": 4, "totalSeats": 5, "availableSeats": 5}]}),
    ];
    let many: Vec<_> = (1..=500).map(|id| json!({"id": id, "totalSeats": 100_000, "availableSeats": 50_000})).collect();
    events.push(json!({"id": 9, "ticketCategories": many}));
    events.extend((10..=60).map(|id| json!({"id": id, "ticketCategories": [{"id": 1, "availableSeats": 5}]})));
    Catalogue::parse("test", &Value::from(events).to_string()).expect("a catalogue")
}

pub fn ledger_options() -> LedgerOptions {
    LedgerOptions { settle_timeout: Duration::from_secs(30), expiry_warning: Duration::from_mins(1) }
}

/// Options under which tests are quick.
pub fn options() -> GatewayOptions {
    GatewayOptions { disconnect_grace: Duration::from_millis(400), rate: None, ..GatewayOptions::default() }
}

/// What `lock-tickets` and `unlock-tickets` are asked with.
pub fn lock(event: u64, category: u64, quantity: u64) -> Value {
    json!({ "eventId": event, "categoryId": category, "quantity": quantity })
}

/// A replica on the embedded ledger.
pub async fn replica(options: GatewayOptions) -> Replica {
    replica_on(Arc::new(MemoryLedger::new(ledger_options())), options).await
}

/// A ledger in Redis, whose round trips take at most `timeout`.
pub fn redis_ledger(url: String, timeout: Duration) -> Arc<dyn Ledger> {
    let redis = RedisOptions {
        url,
        ca_file: None,
        replica: ReplicaId::generate(),
        timeout,
        wait: 0,
        clock: RedisClock::default(),
    };
    Arc::new(RedisLedger::connect(&redis, ledger_options()).expect("a connection to Redis"))
}

/// A replica on a ledger.
pub async fn replica_on(ledger: Arc<dyn Ledger>, options: GatewayOptions) -> Replica {
    replica_with_tick(ledger, options, Duration::from_millis(20)).await
}

/// A replica on a ledger that tells a room at most so often.
pub async fn replica_with_tick(ledger: Arc<dyn Ledger>, options: GatewayOptions, tick: Duration) -> Replica {
    let stop = CancellationToken::new();
    let stock = Stock::new(Arc::clone(&ledger), Arc::new(catalogue()), StockOptions::default(), stop.clone());
    let keys = KeySource::Secret(SECRET.to_vec());
    let events_claim = Some("events".to_owned());
    let verifier = VerifierOptions { keys, issuer: None, audience: None, events_claim };
    let verifier = TokenVerifier::new(verifier).expect("a verifier");
    let gateway = Gateway::new(options, Arc::new(verifier), Arc::clone(&ledger), Arc::clone(&stock));
    let fanout = Fanout::start(
        Arc::clone(&ledger),
        Arc::clone(&stock),
        gateway.audience(),
        FanoutOptions { tick, ..FanoutOptions::default() },
        stop.clone(),
    );
    gateway.attach(fanout);
    let sweeper = Sweeper::new(Arc::clone(&ledger), {
        let stock = Arc::clone(&stock);
        move |event| stock.refresh(event)
    });
    tokio::spawn(sweeper.run(stop.clone()));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let (routes, addresses) = (gateway.routes(), Addresses::unlimited());
    tokio::spawn(serve(listener, routes, Line::wrap, Limits::default(), addresses, stop.clone()));
    Replica { gateway, ledger, stock, address, stop }
}

impl Replica {
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A raw client of a user, connected and greeted.
    pub async fn client(&self, user: u64) -> Raw {
        Raw::greeted(self.address, user).await
    }

    /// A raw client that has an open transport and is not in the namespace.
    pub async fn raw(&self, query: &str) -> Raw {
        self.try_raw(query, None).await.expect("a WebSocket")
    }

    pub async fn try_raw(&self, query: &str, origin: Option<&str>) -> Result<Raw, tungstenite::Error> {
        Raw::open(self.address, query, origin).await
    }

    /// A lock made behind the gateway's back.
    pub async fn grant(&self, event: u64, category: u64, user: u64, quantity: u64) -> seatlock::domain::LockId {
        let request = LockRequest {
            stock_age_max: Duration::from_mins(1),
            ..super::ledger::request(super::ledger::event(event), category, user, quantity)
        };
        match self.stock.lock(request).await.expect("an answer") {
            seatlock::domain::LockOutcome::Granted(grant) => grant.lock,
            other => panic!("{other:?}"),
        }
    }
}

/// What a raw client receives.
#[derive(Debug, Clone, PartialEq)]
pub enum Got {
    Event(String, Value),
    Ack(u64, Value),
    Refused(Value),
    Connected,
    Closed,
}

/// A client that speaks frames.
pub struct Raw {
    pub socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    asked: u64,
    /// The data of `connected`.
    pub greeting: Value,
}

impl Raw {
    /// An open transport to whoever listens there, not yet in the namespace.
    pub async fn open(address: SocketAddr, query: &str, origin: Option<&str>) -> Result<Self, tungstenite::Error> {
        let headers: Vec<_> = origin.map(|origin| ("origin", origin)).into_iter().collect();
        Self::open_with(address, query, &headers).await
    }

    /// The same with these headers.
    pub async fn open_with(
        address: SocketAddr,
        query: &str,
        headers: &[(&'static str, &str)],
    ) -> Result<Self, tungstenite::Error> {
        let url = format!("ws://{address}/socket.io/?{query}&EIO=4&transport=websocket");
        let mut request = url.into_client_request().expect("a request");
        for (name, value) in headers {
            request.headers_mut().append(*name, value.parse().expect("a header"));
        }
        let (socket, _) = timeout(PATIENCE, tokio_tungstenite::connect_async(request)).await.expect("in time")?;
        let mut raw = Self { socket, asked: 0, greeting: Value::Null };
        let open = raw.text().await.expect("an open packet");
        assert!(open.starts_with('0'), "{open}");
        Ok(raw)
    }

    /// The WebSocket to which a session is to go over that began with polling: it does at a `5`. No poll may be under way.
    pub async fn probing(address: SocketAddr, sid: &str) -> Self {
        let url = format!("ws://{address}/socket.io/?sid={sid}&EIO=4&transport=websocket");
        let request = url.into_client_request().expect("a request");
        let connected = timeout(PATIENCE, tokio_tungstenite::connect_async(request)).await.expect("in time");
        let mut raw = Self { socket: connected.expect("a WebSocket").0, asked: 0, greeting: Value::Null };
        raw.send("2probe").await;
        assert_eq!(raw.text().await.as_deref(), Some("3probe"));
        raw
    }

    /// Connected and greeted by whoever listens there.
    pub async fn greeted(address: SocketAddr, user: u64) -> Self {
        let mut raw = Self::open(address, "", None).await.expect("a WebSocket");
        raw.connect(&json!({ "token": token(user) })).await;
        raw.greeting = raw.expect("connected").await;
        raw
    }

    /// The next text, pings answered; `None` at the end of the connection.
    async fn text(&mut self) -> Option<String> {
        let end = Instant::now() + PATIENCE;
        loop {
            let message = timeout_at(end, self.socket.next()).await.expect("a message in time")?;
            match message {
                Ok(Message::Text(text)) if text.as_str() == "2" => {
                    // A connection that ends meanwhile is found at its end, by the next read.
                    self.socket.send(Message::text("3")).await.ok();
                }
                // A close packet: over WebSocket the real client ignores it and waits for the end, as we do.
                Ok(Message::Text(text)) if text.as_str() == "1" => {}
                Ok(Message::Text(text)) => return Some(text.as_str().to_owned()),
                Ok(Message::Close(_)) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// Sends a text. A connection that has ended meanwhile is found at its end, by the next read.
    pub async fn send(&mut self, text: &str) {
        self.socket.send(Message::text(text)).await.ok();
    }

    pub async fn next(&mut self) -> Got {
        let Some(text) = self.text().await else { return Got::Closed };
        if let Some(reason) = text.strip_prefix("44/realtime,") {
            return Got::Refused(serde_json::from_str(reason).expect("JSON"));
        }
        if text.starts_with("40/realtime,") {
            return Got::Connected;
        }
        if let Some(event) = text.strip_prefix("42/realtime,") {
            let mut parts: Vec<Value> = serde_json::from_str(event).expect("JSON");
            assert_eq!(parts.len(), 2, "{text}");
            let data = parts.pop().expect("two parts");
            return Got::Event(parts.pop().and_then(|name| name.as_str().map(str::to_owned)).expect("a name"), data);
        }
        if let Some(ack) = text.strip_prefix("43/realtime,") {
            let digits = ack.find('[').expect("an array");
            let mut parts: Vec<Value> = serde_json::from_str(&ack[digits..]).expect("JSON");
            assert_eq!(parts.len(), 1, "{text}");
            return Got::Ack(ack[..digits].parse().expect("an id"), parts.pop().expect("one part"));
        }
        panic!("unexpected {text}");
    }

    pub async fn connect(&mut self, auth: &Value) {
        self.send(&format!("40/realtime,{auth}")).await;
        assert_eq!(self.next().await, Got::Connected);
    }

    /// The message with which a handshake is refused.
    pub async fn refusal(&mut self, auth: &Value) -> String {
        self.send(&format!("40/realtime,{auth}")).await;
        match self.next().await {
            Got::Refused(reason) => reason["message"].as_str().expect("a message").to_owned(),
            other => panic!("{other:?}"),
        }
    }

    pub async fn emit(&mut self, name: &str, data: &Value) {
        self.send(&format!("42/realtime,{}", json!([name, data]))).await;
    }

    /// Sends a request with an acknowledgement and returns it; other messages that come first are dropped.
    pub async fn ask(&mut self, name: &str, data: &Value) -> Value {
        let id = self.asked;
        self.asked += 1;
        self.send(&format!("42/realtime,{id}{}", json!([name, data]))).await;
        loop {
            match self.next().await {
                Got::Ack(answered, data) if answered == id => return data,
                Got::Event(..) => {}
                other => panic!("{other:?} instead of the answer to {name}"),
            }
        }
    }

    /// Waits for a message of this name; others that come first are dropped.
    pub async fn expect(&mut self, name: &str) -> Value {
        loop {
            match self.next().await {
                Got::Event(got, data) if got == name => return data,
                Got::Event(..) => {}
                other => panic!("{other:?} instead of {name}"),
            }
        }
    }

    /// Waits for the end of the connection; what comes first is returned.
    pub async fn closed(&mut self) -> Vec<Got> {
        let mut seen = Vec::new();
        loop {
            match self.next().await {
                Got::Closed => return seen,
                got => seen.push(got),
            }
        }
    }

    /// Everything that comes within a time.
    pub async fn within(&mut self, time: Duration) -> Vec<Got> {
        let end = Instant::now() + time;
        let mut seen = Vec::new();
        while let Ok(got) = timeout_at(end, self.next()).await {
            seen.push(got);
        }
        seen
    }

    /// A clean end from the client's side.
    pub async fn leave(mut self) {
        self.socket.close(None).await.ok();
    }
}

/// The real client, in a Node process of its own.
pub struct Browser {
    _child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    /// Reports that nobody has asked for yet.
    seen: VecDeque<Value>,
}

impl Browser {
    /// A client that connects with these options.
    pub async fn open(replica: &Replica, options: &Value) -> Self {
        Self::open_at(&replica.url(), options).await
    }

    /// The same by way of whoever is at this address.
    pub async fn open_at(url: &str, options: &Value) -> Self {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/gateway");
        let installed = std::path::Path::new(folder).join("node_modules/socket.io-client/package.json");
        assert!(installed.exists(), "socket.io-client is missing: run `npm ci` in tests/it/gateway (tests/run does)");
        let mut child = Command::new("node")
            .arg("driver.js")
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("Node is installed");
        let input = child.stdin.take().expect("piped");
        let output = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut browser = Self { _child: child, input, output, seen: VecDeque::new() };
        browser.order(&json!({ "do": "connect", "url": url, "options": options })).await;
        browser
    }

    /// A client of a user, connected.
    pub async fn of(replica: &Replica, user: u64, transports: &[&str]) -> Self {
        let options = json!({ "auth": { "token": token(user) }, "transports": transports });
        let mut browser = Self::open(replica, &options).await;
        browser.report("connect").await;
        browser
    }

    pub async fn order(&mut self, command: &Value) {
        self.input.write_all(format!("{command}\n").as_bytes()).await.expect("Node runs");
        self.input.flush().await.expect("Node runs");
    }

    /// The first report so far or to come that fits; the others stay for later.
    async fn find(&mut self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + PATIENCE;
        let mut looked = 0;
        loop {
            if let Some(at) = self.seen.iter().skip(looked).position(&fits) {
                return self.seen.remove(looked + at).expect("just found");
            }
            looked = self.seen.len();
            let line = timeout_at(end, self.output.next_line()).await;
            let line = line.unwrap_or_else(|_| panic!("no {what} in time")).expect("Node runs").expect("Node runs");
            self.seen.push_back(serde_json::from_str(&line).expect("JSON"));
        }
    }

    /// The first report that has this field.
    pub async fn report(&mut self, field: &str) -> Value {
        self.find(field, |report| report.get(field).is_some()).await
    }

    /// Whether it has reported such a field before what was asked for last.
    pub fn had(&self, field: &str) -> bool {
        self.seen.iter().any(|report| report.get(field).is_some())
    }

    /// The data of the first message of this name.
    pub async fn event(&mut self, name: &str) -> Value {
        self.find(name, |report| report["event"] == name).await["data"].take()
    }

    /// Sends a request with an acknowledgement and returns it.
    pub async fn ask(&mut self, name: &str, data: &Value) -> Value {
        self.order(&json!({ "do": "emit", "name": name, "data": data, "ack": 1 })).await;
        self.report("ack").await["data"].take()
    }

    /// What it speaks over now.
    pub async fn transport(&mut self) -> String {
        self.order(&json!({ "do": "transport" })).await;
        self.report("transport").await["transport"].as_str().expect("a name").to_owned()
    }

    pub async fn emit(&mut self, name: &str, data: &Value) {
        self.order(&json!({ "do": "emit", "name": name, "data": data })).await;
    }
}
