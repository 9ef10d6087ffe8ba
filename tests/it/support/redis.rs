//! A Redis of the test's own.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fred::clients::Client;
use fred::interfaces::{ClientLike, KeysInterface};
use fred::types::config::Config;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;

/// A `redis-server` on a unix socket in a folder of its own, without persistence; killed when dropped.
pub struct RedisServer {
    child: Option<Child>,
    folder: TempDir,
}

impl RedisServer {
    /// Starts one and waits until it answers.
    pub async fn start() -> Self {
        let mut server = Self { child: None, folder: tempfile::tempdir().expect("a temporary folder") };
        server.restart().await;
        server
    }

    /// Starts it again after [`RedisServer::kill`]: with the same address and no data.
    pub async fn restart(&mut self) {
        let child = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"])
            .arg(self.socket())
            .arg("--dir")
            .arg(self.folder.path())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed (tests/run installs it)");
        self.child = Some(child);
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            assert!(Instant::now() < deadline, "redis-server did not start within 10 s");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let client = self.client().await;
        client.quit().await.expect("a started server says goodbye");
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("the server runs");
            child.wait().expect("the server is ours");
            // A killed server leaves its socket behind.
            std::fs::remove_file(self.socket()).ok();
        }
    }

    /// Stops the process without ending it (`STOP`), or lets it run again (`CONT`).
    pub fn signal(&self, signal: &str) {
        let child = self.child.as_ref().expect("the server runs");
        let done = Command::new("kill").arg(format!("-{signal}")).arg(child.id().to_string()).status();
        assert!(done.expect("kill exists").success());
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("redis.sock")
    }

    /// The address as operators write it.
    pub fn url(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    /// A client of its own, connected.
    pub async fn client(&self) -> Client {
        let config = Config::from_url(&format!("redis+unix://{}", self.socket().display())).expect("a good address");
        let client = Client::new(config, None, None, None);
        client.init().await.expect("the server answers");
        client
    }

    /// Everything that is published on a channel from now on, as lines of RESP, on a connection that waits however long
    /// the server is stopped.
    pub async fn overhear(&self, channel: &str) -> Lines<BufReader<UnixStream>> {
        let mut stream = UnixStream::connect(self.socket()).await.expect("the server listens");
        stream.write_all(format!("SUBSCRIBE {channel}\r\n").as_bytes()).await.expect("the server reads");
        let mut lines = BufReader::new(stream).lines();
        while lines.next_line().await.expect("RESP").expect("an answer") != ":1" {}
        lines
    }

    /// Listens on a TCP port of the loopback too; which one.
    pub async fn listen(&self, port: u16) -> u16 {
        use fred::types::{ClusterHash, CustomCommand, Value};
        let client = self.client().await;
        let command = CustomCommand::new_static("CONFIG", ClusterHash::Random, false);
        let args = vec!["SET".to_owned(), "port".to_owned(), port.to_string()];
        let _: Value = client.custom(command, args).await.expect("CONFIG SET answers");
        client.quit().await.expect("a goodbye");
        port
    }

    /// The names of all keys.
    pub async fn keys(&self) -> Vec<String> {
        use fred::types::{ClusterHash, CustomCommand};
        let client = self.client().await;
        let command = CustomCommand::new_static("KEYS", ClusterHash::Random, false);
        let keys: Vec<String> = client.custom(command, vec!["*".to_owned()]).await.expect("KEYS answers");
        client.quit().await.expect("a goodbye");
        keys
    }

    /// Milliseconds until a key is gone; -1 when it never is.
    pub async fn pttl(&self, key: &str) -> i64 {
        let client = self.client().await;
        let left = client.pttl(key).await.expect("PTTL answers");
        client.quit().await.expect("a goodbye");
        left
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}
