//! The files that run the service and what is beside it: the image, Redis, RabbitMQ.

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

use super::{path, text, word, yaml};
use crate::support::{
    free_port,
    ledger::{event, live_at, request, stock},
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
            let bytes = |text: &str| {
                let text = text.trim_matches('"');
                [("gb", 1_u64 << 30), ("mb", 1 << 20)]
                    .iter()
                    .find_map(|(unit, of)| Some((text.strip_suffix(unit)?.parse::<u64>().ok()? * of).to_string()))
                    .unwrap_or_else(|| text.to_owned())
            };
            assert_eq!(is, [name.to_owned(), bytes(value)], "{line}");
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
