//! Redis in each of the shapes that the URL can name: the same promises hold, and hold on when a master dies.

mod body;
mod cluster;
mod load;
mod sentinel;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use seatlock::ledger::Script;
use tempfile::TempDir;

use crate::support::cluster::Cluster;
use crate::support::ledger::live_at;
use crate::support::node::{Node, ask};
use crate::support::redis::RedisServer;
use crate::support::sentinel::Sentinels;

const LIMIT: Duration = Duration::from_secs(2);

/// Characters that mean something in a URL, and how they are written there.
const PASSWORD: &str = "p@ss/w:rd?#%+1";
const PASSWORD_IN_URL: &str = "p%40ss%2Fw%3Ard%3F%23%25%2B1";

#[tokio::test]
async fn a_unix_socket() {
    let server = RedisServer::start().await;
    body::runs(live_at(server.url(), None, LIMIT, 0)).await;
}

/// The rule as the operator reads it, and a user who may do nothing else.
#[tokio::test]
async fn tcp_with_a_user_of_the_documented_rights() {
    let server = Node::server(&[]).await;
    let rule = documented_rule().replace("PASSWORD", PASSWORD);
    assert_eq!(server.ask(&rule.split(' ').collect::<Vec<_>>()).await, "OK");
    assert_eq!(server.ask(&["ACL", "SETUSER", "default", "off"]).await, "OK");
    let url = format!("redis://seatlock:{PASSWORD_IN_URL}@127.0.0.1:{}/0", server.port);
    body::runs(live_at(url, None, LIMIT, 0)).await;
    let denied = ask_as(server.port, "seatlock", PASSWORD, &["GET", "someone:else"]).await;
    assert!(denied.contains("NOPERM"), "{denied}");

    let wrong =
        live_at(format!("redis://seatlock:wrong@127.0.0.1:{}", server.port), None, Duration::from_millis(500), 0);
    wrong.ping().await.expect_err("a wrong password");
}

/// No script has a command that the documented rule forbids, and it allows none that neither a script nor the driver has.
#[test]
fn the_documented_rights_are_those_that_are_needed() {
    let rule = documented_rule();
    let allowed: BTreeSet<String> =
        rule.split(" +").skip(1).map(|command| command.replace('|', " ").to_uppercase()).collect();
    let of_scripts: BTreeSet<String> = Script::ALL
        .iter()
        .flat_map(|script| script.source().split("redis.call('").skip(1).filter_map(|rest| rest.split('\'').next()))
        .map(str::to_uppercase)
        .collect();
    assert_eq!(of_scripts.difference(&allowed).collect::<Vec<_>>(), Vec::<&String>::new());
    let driver = [
        include_str!("../../src/ledger/driver.rs"),
        include_str!("../../src/ledger/driver/link.rs"),
        include_str!("../../src/ledger/driver/cluster.rs"),
        include_str!("../../src/ledger/driver/sentinel.rs"),
    ]
    .concat();
    // The rest: two words of one command, how the client chooses a database, what scripts say on a cluster.
    let needless = allowed.difference(&of_scripts).filter(|command| !driver.contains(&format!("\"{command}\"")));
    assert_eq!(needless.collect::<Vec<_>>(), ["CLUSTER SLOTS", "SELECT", "SPUBLISH"]);
}

/// A server whose certificate is signed by a CA that no system knows: with the CA's file it works, without it does not.
#[tokio::test]
async fn tls_with_a_ca_of_ones_own() {
    let tls = Certificates::make();
    let server = Node::server(&tls.settings()).await;
    let url = format!("rediss://127.0.0.1:{}", server.port);
    body::runs(live_at(url.clone(), Some(tls.ca()), LIMIT, 0)).await;
    let stranger = live_at(url, None, Duration::from_millis(500), 0);
    stranger.ping().await.expect_err("an unknown CA");
}

/// Sentinels that speak TLS too, and tell the TLS port of the master.
#[tokio::test]
async fn through_sentinel_over_tls() {
    let tls = Certificates::make();
    let settings = [&tls.settings()[..], &["--tls-replication", "yes"]].concat();
    let sentinels = Sentinels::start_with("rediss-sentinel", &settings).await;
    let url = with_documented_user(&sentinels.servers, &sentinels.url()).await;
    body::runs(live_at(url, Some(tls.ca()), LIMIT, 2)).await;
    nothing_was_denied(&sentinels.servers).await;
}

/// A cluster whose nodes know each other by their TLS ports.
#[tokio::test]
async fn on_a_cluster_over_tls() {
    let tls = Certificates::make();
    let settings = [&tls.settings()[..], &["--tls-replication", "yes", "--tls-cluster", "yes"]].concat();
    let cluster = Cluster::start_with("rediss-cluster", &settings).await;
    let url = with_documented_user(&cluster.nodes, &cluster.url()).await;
    body::runs(live_at(url, Some(tls.ca()), LIMIT, 1)).await;
    nothing_was_denied(&cluster.nodes).await;
}

#[tokio::test]
async fn through_sentinel() {
    let sentinels = Sentinels::start().await;
    let url = with_documented_user(&sentinels.servers, &sentinels.url()).await;
    body::runs(live_at(url, None, LIMIT, 2)).await;
    nothing_was_denied(&sentinels.servers).await;
}

#[tokio::test]
async fn on_a_cluster() {
    let cluster = Cluster::start().await;
    let url = with_documented_user(&cluster.nodes, &cluster.url()).await;
    body::runs(live_at(url, None, LIMIT, 1)).await;
    nothing_was_denied(&cluster.nodes).await;
}

/// The `ACL SETUSER` of the manual.
fn documented_rule() -> String {
    let text = include_str!("../../docs/redis.md");
    let rule = text.lines().find(|line| line.starts_with("ACL SETUSER ")).expect("the rule");
    rule.to_owned()
}

/// The same address for a user of the documented rights, who is made on every server.
async fn with_documented_user(servers: &[Node], url: &str) -> String {
    let rule = documented_rule().replace("PASSWORD", PASSWORD);
    for server in servers {
        assert_eq!(server.ask(&rule.split(' ').collect::<Vec<_>>()).await, "OK");
    }
    url.replacen("://", &format!("://seatlock:{PASSWORD_IN_URL}@"), 1)
}

/// What the client asks for by itself is allowed too.
async fn nothing_was_denied(servers: &[Node]) {
    for server in servers {
        assert_eq!(server.ask(&["ACL", "LOG"]).await, "");
    }
}

async fn ask_as(port: u16, user: &str, password: &str, words: &[&str]) -> String {
    ask(port, &[&["--user", user, "--pass", password, "--no-auth-warning"], words].concat()).await
}

/// A CA and a server's certificate for the loopback address, in a folder that goes with it.
struct Certificates {
    folder: TempDir,
    files: [String; 3],
}

impl Certificates {
    fn make() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let openssl = |words: &str| {
            let done = Command::new("openssl").args(words.split(' ')).current_dir(folder.path()).output();
            let done = done.expect("openssl is installed (tests/run installs it)");
            assert!(done.status.success(), "openssl {words}: {}", String::from_utf8_lossy(&done.stderr));
        };
        std::fs::write(folder.path().join("names"), "subjectAltName=IP:127.0.0.1\n").expect("a temporary file");
        openssl("req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 2 -subj /CN=seatlock-test-ca");
        openssl("req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=redis");
        openssl(
            "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt",
        );
        let files = ["server.crt", "server.key", "ca.crt"].map(|name| folder.path().join(name).display().to_string());
        Self { folder, files }
    }

    /// What makes a Redis speak TLS with them.
    fn settings(&self) -> Vec<&str> {
        let [certificate, key, ca] = &self.files;
        let own = ["--tls-cert-file", certificate, "--tls-key-file", key];
        [&own[..], &["--tls-ca-cert-file", ca, "--tls-auth-clients", "no"]].concat()
    }

    fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }
}
