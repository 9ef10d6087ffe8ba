//! The files that run the service and what is beside it: the image, HAProxy, Redis, RabbitMQ.

use std::{
    collections::BTreeSet,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use fred::{clients::Client, interfaces::ClientLike, types::config::Config};
use futures_util::StreamExt;
use lapin::{
    BasicProperties, Connection, ConnectionProperties,
    options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions},
    types::FieldTable,
};
use seatlock::domain::LockStatus;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{items, path, text, word, yaml};
use crate::support::{
    free_port,
    ledger::{event, live_at, request, stock},
    node::until,
    process::{Seatlock, run},
    rabbit::RabbitServer,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// The instructions of a Dockerfile, each with its words, lines joined.
fn instructions(text: &str) -> Vec<(String, String)> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
    let joined = lines.join("\n").replace("\\\n", " ");
    let split = |line: &str| line.split_once(' ').map(|(word, rest)| (word.to_owned(), rest.trim().to_owned()));
    joined.lines().filter_map(split).collect()
}

/// What is wrong with an image, as far as its text tells.
fn image_complaints(dockerfile: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut stages = BTreeSet::new();
    let (mut user, mut health, mut entry) = (None, None, None);
    for (instruction, rest) in instructions(dockerfile) {
        match instruction.as_str() {
            "FROM" => {
                let (image, stage) = rest.split_once(" AS ").unwrap_or((&rest, ""));
                let pinned = image.rsplit_once(':').is_some_and(|(_, tag)| tag.contains('.') && tag != "latest");
                if !pinned && !stages.contains(image) {
                    complaints.push(format!("{image} is no version and no stage"));
                }
                stages.insert(stage.to_owned());
                // A stage on a foreign image begins anew; one on a stage of ours goes on.
                if pinned {
                    user = None;
                }
                (health, entry) = (None, None);
            }
            "COPY" => {
                if let Some(from) = rest.strip_prefix("--from=").and_then(|rest| rest.split(' ').next())
                    && !stages.contains(from)
                {
                    complaints.push(format!("no stage {from}"));
                }
            }
            "USER" => user = Some(rest),
            "HEALTHCHECK" => health = rest.split_once("CMD ").map(|(_, command)| command.to_owned()),
            "ENTRYPOINT" => entry = Some(rest),
            _ => {}
        }
    }
    let numeric = |user: &String| user.split(':').all(|id| id.parse::<u32>().is_ok_and(|id| id > 0));
    if !user.as_ref().is_some_and(numeric) {
        complaints.push(format!("the user {user:?} is root or a name"));
    }
    for (what, command) in [("health check", health), ("entry point", entry)] {
        let words: Option<Vec<String>> = command.as_deref().and_then(|command| serde_json::from_str(command).ok());
        if words.is_none() {
            complaints.push(format!("the {what} {command:?} needs a shell"));
        }
    }
    complaints
}

#[test]
fn the_image_is_pinned_and_needs_neither_root_nor_shell() {
    let dockerfile = text("deploy/Dockerfile");
    assert_eq!(image_complaints(&dockerfile), [""; 0]);
    let all = instructions(&dockerfile);
    let has = |instruction: &str, part: &str| all.iter().any(|(word, rest)| word == instruction && rest.contains(part));
    let toolchain = text("rust-toolchain.toml");
    let channel = toolchain.lines().find_map(|line| line.strip_prefix("channel = ")).expect("a channel");
    assert!(has("FROM", &format!("rust:{}-", channel.trim_matches('"'))), "built with {channel}");
    assert!(has("EXPOSE", "8880"), "the default of --listen");
    assert!(has("HEALTHCHECK", "\"--health\"]") && run(&["--help"], &[]).out.contains("--health"));
    let ignored = text(".dockerignore");
    for line in ["target", ".git", "**/node_modules"] {
        assert!(ignored.lines().any(|ignored| ignored == line), "{line} is not sent to the builder");
    }

    let compose = yaml(&text("deploy/compose.yaml"));
    let build = &compose["services"]["events"]["build"];
    assert_eq!(build, &json!({ "context": "..", "dockerfile": "deploy/Dockerfile", "target": "stack" }));
    assert!(has("FROM", " AS stack"));
    assert!(dockerfile.contains(&format!("USER {}", word(&compose["services"]["events"]["user"]))));
    let redis = &compose["configs"]["redis"]["file"];
    assert!(path("deploy").join(word(redis)).exists(), "{redis}");
}

#[test]
fn a_careless_image_is_found() {
    let careless = "FROM rust:latest AS build\nFROM debian:12.8-slim\nCOPY --from=builder /a /b\nUSER nobody\n\
                    HEALTHCHECK CMD curl localhost\nENTRYPOINT seatlock";
    assert_eq!(image_complaints(careless).len(), 5, "{:#?}", image_complaints(careless));
    let rootly =
        "FROM debian:12.8-slim AS a\nUSER 7:7\nFROM debian:12.8-slim\nHEALTHCHECK CMD [\"a\"]\nENTRYPOINT [\"a\"]";
    assert_eq!(image_complaints(rootly), ["the user None is root or a name"]);
}

/// The shipped configurations of HAProxy, each with its file: the one for a fleet, then those of the stacks to try.
fn haproxy_configurations() -> [(&'static str, String); 3] {
    let compose = yaml(&text("deploy/compose.yaml"));
    let inline = word(&compose["configs"]["haproxy"]["content"]).to_owned();
    let file = |name: &'static str| (name, text(name));
    [file("deploy/haproxy.cfg"), file("deploy/local/haproxy.cfg"), ("deploy/compose.yaml", inline)]
}

/// The directives of a section.
fn directives<'a>(configuration: &'a str, section: &str) -> Vec<&'a str> {
    let rest = configuration.lines().skip_while(|line| *line != section).skip(1);
    let own = rest.take_while(|line| line.is_empty() || line.starts_with(' ')).map(str::trim);
    own.filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

/// How requests find a replica, without where the replicas are.
fn rules(configuration: &str) -> Vec<&str> {
    let all = directives(configuration, "backend replicas").into_iter();
    all.filter(|directive| !directive.starts_with("server ")).collect()
}

/// What keeps a session at its replica, lets a replica drain and names the client is the same wherever it is tried.
#[test]
fn every_load_balancer_has_the_rules_of_the_shipped_one() {
    let all = haproxy_configurations();
    let due = rules(&all[0].1);
    assert!(due.len() > 10, "{due:?}");
    for (name, configuration) in &all {
        assert!(directives(configuration, "defaults").contains(&"option forwardfor"), "{name}: whom it speaks for");
        assert_eq!(rules(configuration), due, "{name}");
    }
}

/// HAProxy with the shipped configuration, in which all replicas are one.
struct Haproxy {
    child: Child,
    url: String,
    _folder: TempDir,
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Haproxy {
    fn start(replica: &str) -> Self {
        let (folder, public) = (tempfile::tempdir().expect("a temporary folder"), format!("127.0.0.1:{}", free_port()));
        let mut configuration = text("deploy/haproxy.cfg").replace("bind 0.0.0.0:80", &format!("bind {public}"));
        for shipped in ["10.0.0.1:8880", "10.0.0.2:8880", "10.0.0.3:8880"] {
            configuration = configuration.replace(shipped, replica);
        }
        let file = folder.path().join("haproxy.cfg");
        std::fs::write(&file, configuration).expect("our folder");
        // Debian's is not on everybody's path.
        let installed = "/usr/sbin/haproxy";
        let program = if std::path::Path::new(installed).exists() { installed } else { "haproxy" };
        let mut command = Command::new(program);
        command.arg("-db").arg("-f").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().expect("haproxy is installed (tests/run installs it)");
        Self { child, url: format!("http://{public}"), _folder: folder }
    }
}

/// The status of a handshake of a client that says that it is somebody else.
async fn handshake(client: &reqwest::Client, haproxy: &Haproxy, forged: &str) -> u16 {
    let url = format!("{}/socket.io/?EIO=4&transport=polling", haproxy.url);
    let answer = client.get(url).header("x-forwarded-for", forged).send().await.expect("an answer");
    answer.status().as_u16()
}

/// What a client writes into `X-Forwarded-For` neither makes it another address nor takes anything from that address: the
/// load balancer appends whom it has heard.
#[tokio::test]
async fn behind_the_load_balancer_nobody_chooses_an_address() {
    let settings = [("SEATLOCK_TRUSTED_PROXIES", "127.0.0.1"), ("SEATLOCK_ADDRESS_HANDSHAKES", "1/m burst 3")];
    let seatlock = Seatlock::start(&["--demo"], &settings);
    let haproxy = Haproxy::start(seatlock.url.trim_start_matches("http://"));
    let client = |last: u8| {
        let from = std::net::IpAddr::from([127, 0, 0, last]);
        reqwest::Client::builder().local_address(from).build().expect("a client")
    };
    let (forger, other) = (client(2), client(3));
    until("HAProxy serves", PATIENCE, async || {
        let answer = other.get(format!("{}/readyz", haproxy.url)).send().await;
        answer.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    for forged in ["198.51.100.1", "198.51.100.2", "127.0.0.3"] {
        assert_eq!(handshake(&forger, &haproxy, forged).await, 200, "within the burst");
    }
    assert_eq!(handshake(&forger, &haproxy, "198.51.100.3").await, 429, "a fourth name is nobody new");
    for _ in 0..3 {
        assert_eq!(handshake(&other, &haproxy, "127.0.0.2").await, 200, "another address, whatever it says");
    }
}

/// A number of bytes as Redis writes it: `512mb`.
fn bytes(text: &str) -> Option<u64> {
    let units = [("gb", 1_u64 << 30), ("mb", 1 << 20)];
    units.iter().find_map(|(unit, of)| Some(text.strip_suffix(unit)?.parse::<u64>().ok()? * of))
}

/// The backlog for Redis replicas counts as memory in use, so it must leave most of that to locks.
#[test]
fn the_memory_of_redis_has_room_beside_its_backlog() {
    let shipped = text("deploy/redis.conf");
    let compose = yaml(&text("deploy/compose.yaml"));
    let command: Vec<&str> = items(&compose["services"]["redis"]["command"]).iter().map(word).collect();
    let shipped: Vec<(&str, &str)> = shipped.lines().filter_map(|line| line.split_once(' ')).collect();
    let given: Vec<(&str, &str)> =
        command.windows(2).filter_map(|pair| Some((pair[0].strip_prefix("--")?, pair[1]))).collect();
    for (name, settings) in [("deploy/redis.conf", &shipped), ("deploy/compose.yaml", &given)] {
        let value = |wanted: &str| {
            let found = settings.iter().find(|(setting, _)| *setting == wanted);
            found.and_then(|(_, value)| bytes(value)).unwrap_or_else(|| panic!("{name}: no {wanted}"))
        };
        assert!(value("repl-backlog-size") <= value("maxmemory") / 4, "{name}");
    }
}

/// A `redis-server` with the shipped configuration.
struct Redis {
    child: Child,
    port: u16,
    folder: TempDir,
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Redis {
    async fn start() -> Self {
        let (folder, port) = (tempfile::tempdir().expect("a temporary folder"), free_port());
        let child = Self::spawn(&folder, port);
        let mut redis = Self { child, port, folder };
        redis.wait().await;
        redis
    }

    fn spawn(folder: &TempDir, port: u16) -> Child {
        let mut command = Command::new("redis-server");
        command.arg(path("deploy/redis.conf")).args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--dir"]);
        command.arg(folder.path()).stdin(Stdio::null()).stdout(Stdio::null());
        command.spawn().expect("redis-server is installed (tests/run installs it)")
    }

    async fn wait(&mut self) {
        let start = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let ended = self.child.try_wait().expect("it is ours");
            assert!(ended.is_none() && start.elapsed() < PATIENCE, "redis-server takes deploy/redis.conf: {ended:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// `kill -9`, and started again where it was.
    async fn crash(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it is ours");
        self.child = Self::spawn(&self.folder, self.port);
        self.wait().await;
    }

    async fn ask(&self, words: &[&str]) -> Vec<String> {
        let config = Config::from_url(&format!("redis://127.0.0.1:{}", self.port)).expect("a URL");
        let client = Client::new(config, None, None, None);
        client.init().await.expect("a connection");
        let command = fred::types::CustomCommand::new(words[0].to_owned(), fred::types::ClusterHash::FirstKey, false);
        let args: Vec<String> = words[1..].iter().map(ToString::to_string).collect();
        client.custom(command, args).await.expect("an answer")
    }
}

/// A real server takes the file and each line is in force; the ledger works on it, and finds its locks after a crash.
#[tokio::test]
async fn redis_takes_its_configuration_and_keeps_locks() {
    let shipped = text("deploy/redis.conf");
    let mut redis = Redis::start().await;
    let mut told = 0;
    let mut reason = false;
    for line in shipped.lines() {
        if line.is_empty() || line.starts_with("# ----") {
            reason = false;
        } else if line.starts_with('#') {
            reason = true;
        } else {
            assert!(reason, "why: {line}");
            let (name, value) = line.split_once(' ').expect("a directive and its value");
            let name = if name == "client-output-buffer-limit" { continue } else { name };
            let is = redis.ask(&["CONFIG", "GET", name]).await;
            let value = value.trim_matches('"');
            let due = bytes(value).map_or_else(|| value.to_owned(), |bytes| bytes.to_string());
            assert_eq!(is, [name.to_owned(), due], "{line}");
            told += 1;
        }
    }
    assert!(told > 10, "{told} directives");
    let limits = redis.ask(&["CONFIG", "GET", "client-output-buffer-limit"]).await;
    assert!(limits[1].contains("pubsub 67108864 16777216 10"), "{limits:?}");

    let ledger = live_at(format!("redis://127.0.0.1:{}", redis.port), None, Duration::from_secs(5), 0);
    stock(ledger.as_ref(), event(1), &[(1, 10, 10)]).await;
    let wanted = request(event(1), 1, 7, 2);
    assert_eq!(ledger.lock(&wanted).await.expect("an answer").as_str(), "granted");
    // While the disk is being waited for, what follows is in memory for up to two seconds.
    let start = Instant::now();
    while !redis.ask(&["INFO", "persistence"]).await.concat().contains("aof_buffer_length:0\r\n") {
        assert!(start.elapsed() < PATIENCE, "the file is written");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    redis.crash().await;
    let start = Instant::now();
    let found = loop {
        match ledger.find(wanted.lock).await {
            Ok(found) => break found.expect("it is known"),
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!((found.status, found.quantity), (LockStatus::Active, wanted.quantity));
}

/// The broker takes the definitions, twice; a replica with the documented rights makes nothing that NestJS would refuse, and
/// answers; the policy is in force.
#[tokio::test]
async fn rabbitmq_takes_its_definitions_and_rights_are_enough() {
    let broker = RabbitServer::start().await;
    let definitions = path("deploy/rabbitmq/definitions.json").display().to_string();
    let readme = text("deploy/rabbitmq/README.md");
    let rights =
        readme.lines().find_map(|line| line.trim().strip_prefix("$ rabbitmqctl set_permissions ")).expect("rights");
    let rights: Vec<&str> = rights.split(' ').map(|word| word.trim_matches('\'')).collect();
    for _ in 0..2 {
        broker.ctl(&["import_definitions", &definitions]);
    }
    broker.ctl(&["add_user", "seatlock", "a-password"]);
    broker.ctl(&[&["set_permissions"], rights.as_slice()].concat());
    let queues = broker.ctl(&["-q", "list_queues", "name", "durable", "arguments", "policy"]);
    assert!(
        queues.lines().any(|line| line.split_whitespace().eq(["realtime_queue", "true", "[]", "seatlock"])),
        "{queues}"
    );

    let amqp = format!("amqp://seatlock:a-password@127.0.0.1:{}", broker.port());
    let seatlock = Seatlock::start(&["--demo"], &[("SEATLOCK_AMQP_URL", &amqp)]);
    let guest = Connection::connect(&broker.url(), ConnectionProperties::default()).await.expect("a connection");
    let channel = guest.create_channel().await.expect("a channel");
    // As a NestJS service does.
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare("realtime_queue".into(), durable, FieldTable::default()).await.expect("no 406");
    let consume = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut replies = channel
        .basic_consume("amq.rabbitmq.reply-to".into(), "".into(), consume, FieldTable::default())
        .await
        .expect("direct replies");
    let asked = json!({ "pattern": "get-realtime-stats", "data": {}, "id": "1" }).to_string();
    let properties =
        BasicProperties::default().with_reply_to("amq.rabbitmq.reply-to".into()).with_correlation_id("1".into());
    channel
        .basic_publish("".into(), "realtime_queue".into(), BasicPublishOptions::default(), asked.as_bytes(), properties)
        .await
        .expect("published");
    let reply = tokio::time::timeout(PATIENCE, replies.next()).await.expect("in time").expect("open").expect("a reply");
    let reply: Value = serde_json::from_slice(&reply.data).expect("JSON");
    assert_eq!(reply["response"]["service"], "realtime-service", "{reply}; {:#?}", seatlock.log());

    // The limits are in force.
    let policies = broker.ctl(&["-q", "list_policies"]);
    for part in
        ["^realtime_queue$", "\"max-length\":100000", "\"overflow\":\"reject-publish\"", "\"message-ttl\":600000"]
    {
        assert!(policies.contains(part), "{part} in {policies}");
    }
}
