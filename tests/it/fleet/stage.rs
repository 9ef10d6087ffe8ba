//! Everything that the fault run runs: three replicas behind HAProxy, and their neighbours, each behind a path of its own
//! that can be broken.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

use super::crowd::Counts;
use super::shop::Shop;
use crate::support::free_port;
use crate::support::gateway::SECRET;
use crate::support::node::Node;
use crate::support::process::Seatlock;
use crate::support::proxy::{Path, Proxy};
use crate::support::rabbit::RabbitServer;

/// One replica and its paths.
pub struct Post {
    pub name: char,
    port: u16,
    pub process: Mutex<Option<Seatlock>>,
    pub front: Proxy,
    pub redis: Proxy,
    pub rabbit: Proxy,
    pub shop: Proxy,
}

pub struct Stage {
    pub redis: Mutex<Node>,
    pub rabbit: Mutex<RabbitServer>,
    pub shop: Mutex<Shop>,
    pub posts: Vec<Post>,
    haproxy: Child,
    _folder: TempDir,
    /// Where clients go.
    pub url: String,
    /// What replicas that have ended said of panics.
    pub panics: std::sync::Mutex<Vec<String>>,
    settings: Vec<(String, String)>,
    http: reqwest::Client,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.haproxy.kill().ok();
        self.haproxy.wait().ok();
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// The shipped configuration with nothing but its addresses replaced.
fn configuration(public: SocketAddr, posts: &[Post]) -> String {
    let shipped = include_str!("../../../deploy/haproxy.cfg");
    let mut text = replaced(shipped, "bind 0.0.0.0:80", &format!("bind {public}"));
    for (index, post) in posts.iter().enumerate() {
        text = replaced(&text, &format!("10.0.0.{}:8880", index + 1), &post.front.address().to_string());
    }
    text
}

fn replaced(text: &str, what: &str, by: &str) -> String {
    assert_eq!(text.matches(what).count(), 1, "{what} in deploy/haproxy.cfg");
    text.replace(what, by)
}

impl Stage {
    /// Starts everything and waits until every replica is ready.
    pub async fn start(categories: &[(u64, u64)], settings: &[(&str, &str)]) -> Arc<Self> {
        // What was answered is in the file: a killed server has everything, as long as the machine runs.
        let redis = Node::server(&["--appendonly", "yes", "--appendfsync", "no"]);
        let (redis, rabbit) = tokio::join!(redis, RabbitServer::start());
        let shop = Shop::open(categories);
        let mut posts = Vec::new();
        for name in ['a', 'b', 'c'] {
            let port = free_port();
            posts.push(Post {
                name,
                port,
                process: Mutex::new(None),
                front: Proxy::to(loopback(port)).await,
                redis: Proxy::to(loopback(redis.port)).await,
                rabbit: Proxy::to(loopback(rabbit.port())).await,
                shop: Proxy::to(shop.address).await,
            });
        }
        let public = loopback(free_port());
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("haproxy.cfg");
        std::fs::write(&file, configuration(public, &posts)).expect("our folder");
        let mut haproxy = Command::new(if std::path::Path::new("/usr/sbin/haproxy").exists() {
            "/usr/sbin/haproxy"
        } else {
            "haproxy"
        });
        haproxy.arg("-db").arg("-f").arg(&file).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let haproxy = haproxy.spawn().expect("haproxy is installed (tests/run installs it)");
        let stage = Arc::new(Self {
            redis: Mutex::new(redis),
            rabbit: Mutex::new(rabbit),
            shop: Mutex::new(shop),
            posts,
            haproxy,
            _folder: folder,
            url: format!("http://{public}"),
            panics: std::sync::Mutex::default(),
            settings: settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            http: reqwest::Client::builder().timeout(Duration::from_secs(3)).build().expect("a client"),
        });
        for post in &stage.posts {
            stage.launch(post).await;
        }
        for post in &stage.posts {
            stage.ready(post).await;
        }
        stage
    }

    /// Starts a replica.
    pub async fn launch(&self, post: &Post) {
        let secret = String::from_utf8(SECRET.to_vec()).expect("a text");
        let mut env = vec![
            ("SEATLOCK_LISTEN".to_owned(), loopback(post.port).to_string()),
            ("SEATLOCK_JWT_SECRET".to_owned(), secret),
            ("SEATLOCK_REDIS_URL".to_owned(), format!("redis://{}", post.redis.address())),
            ("SEATLOCK_AMQP_URL".to_owned(), format!("amqp://guest:guest@{}/?heartbeat=2", post.rabbit.address())),
            ("SEATLOCK_EVENTS_URL".to_owned(), format!("tcp://{}", post.shop.address())),
        ];
        env.extend(self.settings.iter().cloned());
        let start = move || {
            let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            Seatlock::start(&[], &env)
        };
        let started = tokio::task::spawn_blocking(start).await.expect("it starts");
        let before = post.process.lock().await.replace(started);
        assert!(before.is_none(), "replica {} runs", post.name);
    }

    /// Until a replica says that it is ready.
    pub async fn ready(&self, post: &Post) {
        let end = Instant::now() + Duration::from_secs(30);
        while self.get(post, "/readyz").await.is_none() {
            assert!(Instant::now() < end, "replica {} is not ready", post.name);
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// A page of a replica, not by way of HAProxy; `None` unless it is 200.
    pub async fn get(&self, post: &Post, page: &str) -> Option<String> {
        let url = format!("http://127.0.0.1:{}{page}", post.port);
        let answer = self.http.get(url).send().await.ok()?;
        if answer.status() != 200 {
            return None;
        }
        answer.text().await.ok()
    }

    /// What the ledger says now of every category, asked of every replica; `None` when one of them cannot tell.
    pub async fn counts_of_all(&self) -> Option<BTreeMap<u64, Counts>> {
        let mut latest: BTreeMap<u64, Counts> = BTreeMap::new();
        for post in &self.posts {
            let text = self.get(post, &format!("/events/{}/availability", super::EVENT)).await?;
            let all: Vec<Value> = serde_json::from_str(&text).expect("JSON");
            for (category, counts) in all.iter().map(Counts::read) {
                let known = latest.entry(category).or_insert(counts);
                if known.version < counts.version {
                    *known = counts;
                }
            }
        }
        Some(latest)
    }

    /// Why the ledger cannot be read: what each replica says, and what Redis has logged.
    pub async fn unreadable(&self) -> String {
        let mut said = Vec::new();
        for post in &self.posts {
            let url = format!("http://127.0.0.1:{}/events/{}/availability", post.port, super::EVENT);
            let answer = match self.http.get(url).send().await {
                Ok(answer) => format!("{}: {}", answer.status(), answer.text().await.unwrap_or_default()),
                Err(error) => error.to_string(),
            };
            said.push(format!("{} says {answer}", post.name));
        }
        said.push(self.redis.lock().await.log());
        said.join("\n")
    }

    /// `kill -9` of a replica.
    pub async fn kill(&self, post: &Post) {
        self.end(post, "KILL").await;
    }

    /// SIGTERM to a replica, and its exit code once it has drained.
    pub async fn drain(&self, post: &Post) -> i32 {
        self.end(post, "TERM").await
    }

    /// Ends a replica and reads what it has logged.
    async fn end(&self, post: &Post, signal: &str) -> i32 {
        let mut process = post.process.lock().await.take().expect("it runs");
        process.signal(signal);
        let ended = tokio::task::spawn_blocking(move || (process.exit_code(), process.log()));
        let (code, log) = ended.await.expect("it ends");
        let faults = log.iter().filter(|line| line.contains("panicked"));
        self.panics.lock().unwrap().extend(faults.map(|line| format!("replica {}: {line}", post.name)));
        if code != 0 && signal == "TERM" {
            let last: Vec<_> = log.iter().rev().take(20).rev().collect();
            crate::support::say(&format!("replica {} ended with {code}: {last:#?}", post.name));
        }
        code
    }

    pub async fn signal(&self, post: &Post, name: &str) {
        post.process.lock().await.as_ref().expect("it runs").signal(name);
    }

    pub fn all(&self, of: fn(&Post) -> &Proxy, path: Path) {
        for post in &self.posts {
            of(post).set(path);
        }
    }
}
