//! HTTP and the life of the process, on the real binary: what the routes answer, when it is ready, how it ends.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

use reqwest::{Client, Response};
use serde_json::{Value, json};

use crate::support::{
    free_port,
    process::{Seatlock, run},
    redis::RedisServer,
};

/// No wait of these tests is longer.
const PATIENCE: Duration = Duration::from_secs(20);

const KEY: (&str, &str) = ("SEATLOCK_JWT_SECRET", "a-key-of-32-bytes-for-tests-only");

async fn get(seatlock: &Seatlock, path: &str) -> Response {
    let client = Client::builder().timeout(PATIENCE).redirect(reqwest::redirect::Policy::none()).build();
    client.expect("a client").get(format!("{}{path}", seatlock.url)).send().await.expect("an answer")
}

async fn json(seatlock: &Seatlock, path: &str) -> (u16, Value) {
    let response = get(seatlock, path).await;
    (response.status().as_u16(), response.json().await.expect("JSON"))
}

/// Asks `/readyz` until it answers with `status`.
async fn readiness(seatlock: &Seatlock, status: u16) -> Value {
    let start = Instant::now();
    loop {
        let (got, body) = json(seatlock, "/readyz").await;
        if got == status {
            return body;
        }
        assert!(start.elapsed() < PATIENCE, "still {got}: {body}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// An events-service that accepts connections and never answers.
fn silent_events_service() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("tcp://{}", listener.local_addr().expect("bound"));
    (listener, url)
}

#[tokio::test]
async fn the_root_says_exactly_who_answers() {
    let seatlock = Seatlock::start(&["--demo"], &[]);
    let response = get(&seatlock, "/").await;
    assert_eq!(response.headers()["content-type"], "application/json");
    let version = env!("CARGO_PKG_VERSION");
    let exact = format!(r#"{{"service":"realtime-service","status":"active","version":"{version}"}}"#);
    assert_eq!(response.text().await.expect("a body"), exact);
}

/// The fields that existing callers read have their names, places and types; ours come beside them.
#[tokio::test]
async fn stats_have_the_fixed_shape() {
    let seatlock = Seatlock::start(&["--demo"], &[]);
    let (answer, mut stats) = json(&seatlock, "/stats").await;
    assert_eq!(answer, 200);
    let ours = stats.as_object_mut().expect("an object");
    assert_eq!(ours.remove("replicas"), Some(json!(1)));
    assert_eq!(ours.remove("connectedSockets"), Some(json!(0)));
    assert_eq!(ours.remove("version"), Some(json!(env!("CARGO_PKG_VERSION"))));
    assert_eq!(ours.remove("replica").expect("a replica").as_str().expect("text").len(), 32);
    assert!(ours.remove("uptime").expect("an uptime").as_u64().expect("seconds") < 60);
    let scripts = ours.remove("scripts").expect("scripts");
    assert_eq!(scripts["lock"].as_str().expect("a SHA-1").len(), 40);
    let fixed = json!({
        "service": "realtime-service",
        "status": "active",
        "connectedUsers": 0,
        "ticketLocks": {
            "totalLocks": 0,
            "activeLocks": 0,
            "usersWithLocks": 0,
            "categoriesWithLocks": 0,
            "locksByStatus": { "active": 0, "expired": 0, "confirmed": 0, "released": 0 },
        },
    });
    assert_eq!(stats, fixed);
}

#[tokio::test]
async fn availability_is_told_or_refused_in_words() {
    let seatlock = Seatlock::start(&["--demo"], &[]);
    let (status, categories) = json(&seatlock, "/events/2/availability").await;
    assert_eq!(status, 200);
    let mut stalls = categories[0].clone();
    let fields = stalls.as_object_mut().expect("an object");
    let timestamp = fields.remove("timestamp").expect("a timestamp");
    assert!(timestamp.as_str().is_some_and(|text| text.len() == 24 && text.ends_with('Z')), "{timestamp}");
    assert!(fields.remove("version").expect("a version").as_u64().expect("a number") > 0);
    let expected = json!({
        "eventId": 2, "categoryId": 4, "availableTickets": 10, "lockedTickets": 0, "totalTickets": 300,
        "status": "available",
    });
    assert_eq!(stalls, expected);
    assert_eq!(categories[1]["status"], "sold-out");

    for (path, status, code) in [
        ("/events/4711/availability", 404, "event_not_found"),
        ("/events/0/availability", 400, "invalid_request"),
        ("/events/one/availability", 400, "invalid_request"),
        ("/events/9007199254740992/availability", 400, "invalid_request"),
        ("/events/%20/availability", 400, "invalid_request"),
        ("/nowhere", 404, "not_found"),
        ("/events", 404, "not_found"),
    ] {
        let (got, body) = json(&seatlock, path).await;
        assert_eq!((got, body["code"].as_str()), (status, Some(code)), "{path}");
        assert!(!body["message"].as_str().expect("a message").is_empty());
    }
    let posted = Client::new().post(format!("{}/stats", seatlock.url)).send().await.expect("an answer");
    assert_eq!(posted.status(), 405);
    assert_eq!(posted.json::<Value>().await.expect("JSON")["code"], "invalid_request");
}

/// Nobody answers for the stock: the refusal comes in time and says that it is the stock that is missing.
#[tokio::test]
async fn without_an_events_service_availability_is_503_in_time() {
    let (_events, url) = silent_events_service();
    let seatlock = Seatlock::start(&[], &[KEY, ("SEATLOCK_EVENTS_URL", &url), ("SEATLOCK_REQUEST_TIMEOUT", "1s")]);
    let start = Instant::now();
    let (status, body) = json(&seatlock, "/events/1/availability").await;
    assert_eq!((status, body["code"].as_str()), (503, Some("inventory_unavailable")), "{body}");
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

/// Ready once Redis answers, not when it is gone, again when it is back; alive all the time.
#[tokio::test]
async fn readiness_follows_redis_and_liveness_does_not() {
    let mut redis = RedisServer::start().await;
    let (_events, events) = silent_events_service();
    let url = redis.url();
    let mut seatlock = Seatlock::start(&[], &[KEY, ("SEATLOCK_EVENTS_URL", &events), ("SEATLOCK_REDIS_URL", &url)]);
    assert_eq!(readiness(&seatlock, 200).await, json!({ "status": "ready", "ledger": "connected", "rpc": "off" }));
    redis.kill();
    let reasons = readiness(&seatlock, 503).await["reasons"].clone();
    assert_eq!(reasons, json!(["the ledger does not answer"]));
    assert_eq!(json(&seatlock, "/livez").await, (200, json!({ "status": "alive" })));
    let (status, body) = json(&seatlock, "/stats").await;
    assert_eq!((status, body["code"].as_str()), (503, Some("unavailable")));
    redis.restart().await;
    readiness(&seatlock, 200).await;
    seatlock.signal("TERM");
    assert_eq!(seatlock.exit_code(), 0);
}

/// What alerts divide or watch is there as zero from the start: a rate says nothing of a series' first value.
#[tokio::test]
async fn failures_are_counted_from_zero() {
    let seatlock = Seatlock::start(
        &[],
        &[
            ("SEATLOCK_AMQP_URL", "amqp://127.0.0.1:1"),
            ("SEATLOCK_JWKS_URL", "http://127.0.0.1:1/keys"),
            ("SEATLOCK_EVENTS_URL", "file:src/inventory/demo.json"),
        ],
    );
    let text = reqwest::get(format!("{}/metrics", seatlock.url)).await.expect("an answer").text().await.expect("text");
    for series in [
        r#"seatlock_ledger_locks_total{outcome="timeout"} 0"#,
        r#"seatlock_ledger_locks_total{outcome="not_replicated"} 0"#,
        r#"seatlock_ledger_locks_total{outcome="busy"} 0"#,
        r#"seatlock_rpc_messages_total{pattern="confirm-ticket-lock",outcome="failed"} 0"#,
        r#"seatlock_rpc_messages_total{pattern="validate-user-locks",outcome="given_back"} 0"#,
        r#"seatlock_gateway_key_fetches_total{outcome="fetched"} 0"#,
    ] {
        assert!(text.lines().any(|line| line == series), "{series} in\n{text}");
    }
}

/// A new replica waits a little for its broker before it calls itself ready, and no longer: without one sockets work.
#[tokio::test]
async fn a_new_replica_waits_a_little_for_its_broker() {
    let broker = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("amqp://{}", broker.local_addr().expect("bound"));
    let began = Instant::now();
    let seatlock = Seatlock::start(&["--demo"], &[("SEATLOCK_AMQP_URL", &url)]);
    let reasons = readiness(&seatlock, 503).await["reasons"].clone();
    assert_eq!(reasons, json!(["RabbitMQ is not reached yet"]));
    let ready = readiness(&seatlock, 200).await;
    assert_eq!(ready, json!({ "status": "ready", "ledger": "connected", "rpc": "disconnected" }));
    assert!(began.elapsed() >= Duration::from_secs(5), "{:?}", began.elapsed());
}

/// SIGTERM during a request: readiness is lost at once, the request is still answered, and the process ends with 0.
#[tokio::test]
async fn a_drain_answers_what_is_in_flight() {
    let (events, url) = silent_events_service();
    let mut seatlock = Seatlock::start(&[], &[KEY, ("SEATLOCK_EVENTS_URL", &url), ("SEATLOCK_REQUEST_TIMEOUT", "2s")]);
    let address = seatlock.url.trim_start_matches("http://").to_owned();
    let mut stream = TcpStream::connect(&address).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream.write_all(b"GET /events/1/availability HTTP/1.1\r\nhost: a\r\n\r\n").expect("sent");
    // The question has reached the events-service: the request is in flight.
    let (asked, _) = events.accept().expect("a connection");
    asked.set_read_timeout(Some(PATIENCE)).expect("set");
    let mut asked = BufReader::new(asked);
    asked.read_until(b'#', &mut Vec::new()).expect("a question");
    seatlock.signal("TERM");
    seatlock.logged("not ready: draining");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer and the end");
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("inventory_unavailable"), "{answer}");
    assert_eq!(seatlock.exit_code(), 0);
    assert!(TcpStream::connect(&address).is_err(), "the port is free");
}

/// The second signal does not wait for what the first one left in flight.
#[tokio::test]
async fn a_second_signal_stops_at_once() {
    let (events, url) = silent_events_service();
    let long = [("SEATLOCK_REQUEST_TIMEOUT", "60s"), ("SEATLOCK_DRAIN_TIMEOUT", "2m")];
    let mut seatlock = Seatlock::start(&[], &[&[KEY, ("SEATLOCK_EVENTS_URL", url.as_str())], &long[..]].concat());
    let mut stream = TcpStream::connect(seatlock.url.trim_start_matches("http://")).expect("connected");
    stream.write_all(b"GET /events/1/availability HTTP/1.1\r\nhost: a\r\n\r\n").expect("sent");
    let _asked = events.accept().expect("a connection");
    seatlock.signal("TERM");
    seatlock.logged("not ready: draining");
    let start = Instant::now();
    seatlock.signal("INT");
    assert_eq!(seatlock.exit_code(), 70);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test]
async fn exit_codes_say_what_kind_of_end_it_was() {
    let mut seatlock = Seatlock::start(&["--demo"], &[]);
    let taken = seatlock.url.trim_start_matches("http://");
    let ended = run(&["--demo", "--listen", taken], &[]);
    assert_eq!(ended.code, 69, "{ended:?}");
    assert!(ended.err.contains(&format!("cannot listen on {taken}")), "{}", ended.err);
    let ended = run(&["--events-url", "file:/no/such/file.json", "--listen", "127.0.0.1:0"], &[KEY]);
    assert_eq!(ended.code, 64, "{ended:?}");
    assert!(ended.err.contains("/no/such/file.json"), "{}", ended.err);
    assert_eq!(run(&["--lock-ttl", "5"], &[]).code, 64);
    seatlock.signal("INT");
    assert_eq!(seatlock.exit_code(), 0);
}

#[tokio::test]
async fn operators_routes_move_to_their_own_address() {
    let mut seatlock = Seatlock::start(&["--demo", "--admin-listen", "127.0.0.1:0"], &[]);
    let admin = seatlock.logged("serving admin")["listen"].as_str().expect("an address").to_owned();
    for path in ["/metrics", "/livez", "/readyz"] {
        assert_eq!(json(&seatlock, path).await.0, 404, "{path}");
        let there = reqwest::get(format!("http://{admin}{path}")).await.expect("an answer");
        assert!(there.status() == 200 || path == "/readyz", "{path}: {}", there.status());
    }
    assert_eq!(reqwest::get(format!("http://{admin}/stats")).await.expect("an answer").status(), 404);
    let text = reqwest::get(format!("http://{admin}/metrics")).await.expect("an answer").text().await.expect("text");
    assert!(text.contains("# HELP seatlock_http_ready One while new clients are welcome, else zero."), "{text}");
    assert!(text.contains("seatlock_http_requests_total{route=\"other\",status=\"4xx\"} 4"), "{text}");
}

#[tokio::test]
async fn json_logs_are_one_object_a_line() {
    let mut seatlock = Seatlock::start(&["--demo"], &[("SEATLOCK_LOG", "debug")]);
    assert_eq!(get(&seatlock, "/events/1/availability").await.status(), 200);
    seatlock.signal("TERM");
    assert_eq!(seatlock.exit_code(), 0);
    let lines = seatlock.log();
    assert!(lines.len() >= 4, "{lines:#?}");
    for line in lines {
        let line: Value = serde_json::from_str(&line).expect("JSON");
        assert!(line["timestamp"].is_string() && line["level"].is_string() && line["message"].is_string(), "{line}");
    }
}

/// The page comes from the binary with everything that it needs, and names no place that anything is loaded from.
#[tokio::test]
async fn the_demo_page_is_complete_and_loads_nothing_from_elsewhere() {
    let seatlock = Seatlock::start(&["--demo"], &[]);
    let moved = get(&seatlock, "/demo").await;
    assert_eq!((moved.status().as_u16(), &moved.headers()["location"]), (308, &"/demo/".parse().expect("a header")));
    let response = get(&seatlock, "/demo/").await;
    let policy = response.headers()["content-security-policy"].to_str().expect("text").to_owned();
    assert!(policy.starts_with("default-src 'none'; script-src 'unsafe-inline';"), "{policy}");
    let page = response.text().await.expect("a page");
    for part in
        ["<script src", "src=\"", "href=\"http", "href=\"//", "<link rel=\"stylesheet", "url(", "@import", "import("]
    {
        assert!(!page.contains(part), "{part} in the page");
    }
    let library = include_str!("../../examples/vendor/socket.io.min.js");
    assert!(library.starts_with("/*!\n * Socket.IO v4.8.4\n"));
    assert!(page.contains(&format!("<script>\n{library}</script>")), "the page has the client library, unchanged");
    let catalogue = json(&seatlock, "/demo/catalogue.json").await.1;
    assert_eq!(catalogue["events"][0]["name"], "Harbour Jazz Night");
    assert_eq!(catalogue["events"][0]["categories"][0]["id"], 1);
    assert_eq!(json(&seatlock, "/demo/token?user=7").await.1["userId"], 7);
    for path in ["/demo/token", "/demo/token?user=x", "/demo/token?user=0"] {
        assert_eq!(json(&seatlock, path).await.1["code"], "invalid_request", "{path}");
    }
}

/// Without `--demo` there is no page and nobody hands out tokens.
#[tokio::test]
async fn without_the_demo_nobody_hands_out_tokens() {
    let (_events, url) = silent_events_service();
    let seatlock = Seatlock::start(&[], &[KEY, ("SEATLOCK_EVENTS_URL", &url)]);
    for path in ["/demo/", "/demo/token?user=7", "/demo/catalogue.json"] {
        assert_eq!(json(&seatlock, path).await.0, 404, "{path}");
    }
}

/// A token from the demo opens a socket of the demo: the page needs nothing else. Spoken over long polling, by hand.
#[tokio::test]
async fn a_token_of_the_demo_opens_a_socket() {
    let seatlock = Seatlock::start(&["--demo"], &[]);
    let token = json(&seatlock, "/demo/token?user=7").await.1["token"].as_str().expect("a token").to_owned();
    let open = get(&seatlock, "/socket.io/?EIO=4&transport=polling").await.text().await.expect("text");
    let open: Value = serde_json::from_str(open.strip_prefix('0').expect("an open packet")).expect("JSON");
    let path = format!("/socket.io/?EIO=4&transport=polling&sid={}", open["sid"].as_str().expect("a session"));
    let connect = format!("40/realtime,{}", json!({ "token": token }));
    let posted = Client::new().post(format!("{}{path}", seatlock.url)).body(connect).send().await.expect("an answer");
    assert_eq!(posted.status(), 200);
    let start = Instant::now();
    let mut said = String::new();
    while !said.contains("\"connected\"") {
        assert!(start.elapsed() < PATIENCE, "{said}");
        said += &get(&seatlock, &path).await.text().await.expect("text");
    }
    assert!(said.contains("40/realtime,") && said.contains("\"userId\":7"), "{said}");
}

/// A page of a listed origin may read the routes, any other may not, as with the sockets.
#[tokio::test]
async fn origins_hold_for_the_routes_too() {
    let seatlock = Seatlock::start(&["--demo", "--cors-origins", "https://shop.example"], &[]);
    for (origin, allowed) in [("https://shop.example", true), ("https://evil.example", false)] {
        let url = format!("{}/events/1/availability", seatlock.url);
        let answer = Client::new().get(url).header("origin", origin).send().await.expect("an answer");
        let header = answer.headers().get("access-control-allow-origin").map(|value| value.to_str().expect("text"));
        assert_eq!(header, allowed.then_some(origin));
    }
}

/// Passwords of neighbours that cannot be reached are not in the log, however much is logged.
#[tokio::test]
async fn no_log_line_shows_a_password() {
    let mut seatlock = Seatlock::start(
        &[],
        &[
            ("SEATLOCK_JWT_SECRET", "hunter2-hunter2-hunter2-hunter2-"),
            ("SEATLOCK_REDIS_URL", "redis://:hunter2@127.0.0.1:1"),
            ("SEATLOCK_AMQP_URL", "amqp://hunter2:hunter2@127.0.0.1:1"),
            ("SEATLOCK_EVENTS_URL", "amqp://hunter2:hunter2@127.0.0.1:1/?queue=events_queue"),
            ("SEATLOCK_LOG", "trace"),
        ],
    );
    assert_eq!(seatlock.logged("RPC is on")["broker"], "amqp://***@127.0.0.1:1");
    assert_eq!(seatlock.logged("lock state is in Redis")["redis"], "redis://***@127.0.0.1:1");
    assert_eq!(readiness(&seatlock, 503).await["rpc"], "disconnected");
    assert_eq!(json(&seatlock, "/events/1/availability").await.0, 503);
    seatlock.signal("TERM");
    assert_eq!(seatlock.exit_code(), 0);
    let log = seatlock.log().join("\n");
    assert!(!log.contains("hunter2"), "{log}");
}

/// `--health` asks the running process, by the addresses that it was given, and its exit code is what container engines want.
#[tokio::test]
async fn the_binary_says_of_another_whether_it_is_ready() {
    let redis = RedisServer::start().await;
    let (url, admin) = (redis.url(), format!("0.0.0.0:{}", free_port()));
    let catalogue = ("SEATLOCK_EVENTS_URL", "file:src/inventory/demo.json");
    let env = [KEY, catalogue, ("SEATLOCK_REDIS_URL", &url), ("SEATLOCK_ADMIN_LISTEN", &admin)];
    let seatlock = Seatlock::start(&[], &env);
    let public = seatlock.url.trim_start_matches("http://").to_owned();
    let health = async |env: Vec<(&'static str, String)>| {
        let asked = tokio::task::spawn_blocking(move || {
            let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
            run(&["--health"], &env)
        });
        let ended = asked.await.expect("it ends");
        (ended.code, ended.err)
    };
    let asked = vec![("SEATLOCK_LISTEN", public.clone()), ("SEATLOCK_ADMIN_LISTEN", admin)];
    let start = Instant::now();
    while health(asked.clone()).await.0 != 0 {
        assert!(start.elapsed() < PATIENCE, "it gets ready");
    }
    assert_eq!(health(asked.clone()).await, (0, String::new()));

    drop(redis);
    let start = Instant::now();
    let (code, why) = loop {
        let answer = health(asked.clone()).await;
        if answer.0 != 0 {
            break answer;
        }
        assert!(start.elapsed() < PATIENCE, "it stays ready without its ledger");
    };
    assert!(code == 1 && why.starts_with("seatlock: not ready: {") && why.contains("ledger"), "{code} {why}");

    let (code, why) = health(vec![("SEATLOCK_LISTEN", public)]).await;
    assert!(code == 1 && why.starts_with("seatlock: not ready: "), "readiness is not public here: {code} {why}");
    let nobody = format!("127.0.0.1:{}", free_port());
    let (code, why) = health(vec![("SEATLOCK_LISTEN", nobody)]).await;
    assert!(code == 1 && why.contains("does not answer"), "{code} {why}");
    let (code, why) = health(vec![("SEATLOCK_LISTEN", "nowhere".to_owned())]).await;
    assert!(code == 64 && why.contains("SEATLOCK_LISTEN"), "{code} {why}");
    assert_eq!(health(vec![("SEATLOCK_ADMIN_LISTEN", "x".to_owned())]).await.0, 64);
}
