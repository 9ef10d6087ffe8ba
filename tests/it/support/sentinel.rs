//! A master, two Redis replicas and three sentinels.

use std::fmt::Write as _;
use std::time::Duration;

use super::node::{Node, until};

const NAME: &str = "seatlock";

pub struct Sentinels {
    pub servers: Vec<Node>,
    watchers: Vec<Node>,
    scheme: &'static str,
}

impl Sentinels {
    /// Starts all of them and waits until each knows the others.
    pub async fn start() -> Self {
        Self::start_with("redis-sentinel", &[]).await
    }

    /// The same with more settings for every server and sentinel, for an address of this scheme.
    pub async fn start_with(scheme: &'static str, more: &[&str]) -> Self {
        let master = Node::server(more).await;
        let follow = format!("127.0.0.1 {}", master.port);
        let mut servers = vec![master];
        for _ in 0..2 {
            servers.push(Node::server(&[more, &["--replicaof", &follow]].concat()).await);
        }
        let configuration = format!(
            "sentinel monitor {NAME} {follow} 2\nsentinel down-after-milliseconds {NAME} 1500\n\
             sentinel failover-timeout {NAME} 3000\nsentinel parallel-syncs {NAME} 2"
        );
        let mut sentinels = Vec::new();
        for _ in 0..3 {
            sentinels.push(Node::sentinel(&configuration, more).await);
        }
        let all = Self { servers, watchers: sentinels, scheme };
        all.whole().await;
        for sentinel in &all.watchers {
            until("a sentinel knows the other two and both Redis replicas", Duration::from_secs(30), async || {
                let said = sentinel.ask(&["SENTINEL", "master", NAME]).await;
                field(&said, "num-other-sentinels") == "2" && field(&said, "num-slaves") == "2"
            })
            .await;
        }
        all
    }

    /// The address for the ledger.
    pub fn url(&self) -> String {
        let [first, second, third] = [0, 1, 2].map(|index| self.watchers[index].port);
        let scheme = self.scheme;
        format!(
            "{scheme}://127.0.0.1:{first}/?sentinelServiceName={NAME}&node=127.0.0.1:{second}&node=127.0.0.1:{third}"
        )
    }

    /// Which server the sentinels call the master; `None` when they do not agree.
    pub async fn master(&self) -> Option<usize> {
        let mut named = Vec::new();
        for sentinel in &self.watchers {
            named.push(sentinel.ask(&["SENTINEL", "get-master-addr-by-name", NAME]).await);
        }
        named.dedup();
        let [one] = named.as_slice() else { return None };
        let port: u16 = one.lines().last()?.parse().ok()?;
        self.servers.iter().position(|server| server.port == port)
    }

    /// What each sentinel and each server thinks, for whoever has to find out what went wrong.
    pub async fn say(&self) -> String {
        let mut said = String::new();
        for sentinel in &self.watchers {
            let master = sentinel.ask(&["SENTINEL", "master", NAME]).await;
            let fields = ["port", "flags", "num-slaves", "num-other-sentinels", "config-epoch"];
            let fields = fields.map(|name| format!("{name} {}", field(&master, name)));
            let itself = sentinel.ask(&["INFO", "sentinel"]).await;
            writeln!(said, "\nsentinel {}: {}\n{itself}", sentinel.port, fields.join(", ")).expect("a text");
        }
        for server in &self.servers {
            let roles = server.ask(&["INFO", "replication"]).await;
            let clients = server.ask(&["CLIENT", "LIST"]).await;
            writeln!(said, "\nserver {}:\n{roles}\n{clients}", server.port).expect("a text");
        }
        said
    }

    /// Waits until the master has two Redis replicas that follow it and no sentinel is still at a failover: it would name
    /// the server that it has promoted for as long as that one is dead.
    pub async fn whole(&self) {
        until("two Redis replicas follow the master", Duration::from_secs(30), async || {
            for watcher in &self.watchers {
                if watcher.ask(&["SENTINEL", "master", NAME]).await.contains("failover_in_progress") {
                    return false;
                }
            }
            let Some(master) = self.master().await else { return false };
            let said = self.servers[master].ask(&["INFO", "replication"]).await;
            said.contains("role:master") && said.matches("state=online").count() == 2
        })
        .await;
    }

    /// Makes the master step down.
    pub async fn fail_over(&self) {
        assert_eq!(self.watchers[0].ask(&["SENTINEL", "failover", NAME]).await, "OK");
    }

    /// Starts a killed server as a Redis replica of the master that there is now.
    pub async fn revive(&mut self, index: usize) {
        until("the sentinels agree", Duration::from_secs(10), async || self.master().await.is_some()).await;
        let master = self.master().await.expect("a moment ago they agreed");
        let follow = format!("127.0.0.1 {}", self.servers[master].port);
        self.servers[index].restart(&["--replicaof", &follow]).await;
    }
}

impl Drop for Sentinels {
    /// Shows what they logged to whoever has to find out what went wrong.
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in self.watchers.iter().chain(&self.servers) {
                super::say(&format!("log of {}:\n{}\n", node.port, node.log()));
            }
        }
    }
}

/// A field of an answer that has names and values on alternate lines.
fn field<'a>(said: &'a str, name: &str) -> &'a str {
    said.lines().skip_while(|line| *line != name).nth(1).unwrap_or_default()
}
