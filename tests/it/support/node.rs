//! A Redis process on a TCP port, one of several that a test plugs together.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::free_port;

const LOG_LINES: usize = 80;

/// A `redis-server` or sentinel in a folder of its own, killed when dropped.
pub struct Node {
    pub port: u16,
    /// Gone with the node.
    folder: TempDir,
    args: Vec<String>,
    child: Option<Child>,
}

impl Node {
    /// A server without persistence, which copies to and from others at once.
    pub async fn server(more: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let port = free_port();
        let common = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0"];
        let mut args: Vec<String> = common.iter().chain(more).map(ToString::to_string).collect();
        let ports = if is_tls(more) { format!("--port 0 --tls-port {port}") } else { format!("--port {port}") };
        args.extend(ports.split(' ').map(ToOwned::to_owned));
        args.extend(["--dir".to_owned(), folder.path().display().to_string()]);
        let mut node = Self { port, folder, args, child: None };
        node.restart(&[]).await;
        node
    }

    /// A sentinel with this configuration, and settings as servers take them.
    pub async fn sentinel(configuration: &str, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let port = free_port();
        let file = folder.path().join("sentinel.conf");
        let dir = folder.path().display();
        let ports = if is_tls(more) { format!("port 0\ntls-port {port}") } else { format!("port {port}") };
        let text = format!("bind 127.0.0.1\n{ports}\ndir {dir}\n{configuration}\n");
        std::fs::write(&file, text).expect("a temporary file");
        let mut args = vec![file.display().to_string(), "--sentinel".to_owned()];
        args.extend(more.iter().map(ToString::to_string));
        let mut node = Self { port, folder, args, child: None };
        node.restart(&[]).await;
        node
    }

    /// Starts it (again), and waits until it accepts connections.
    pub async fn restart(&mut self, more: &[&str]) {
        assert!(self.child.is_none(), "it runs");
        let mut command = Command::new("redis-server");
        let log = std::fs::File::options().append(true).create(true).open(self.log_path()).expect("our folder");
        command.args(&self.args).args(more).stdin(Stdio::null()).stdout(log);
        self.child = Some(command.spawn().expect("redis-server is installed (tests/run installs it)"));
        let deadline = Instant::now() + Duration::from_secs(10);
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(Instant::now() < deadline, "redis-server did not start within 10 s");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn log_path(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// The last lines that it has logged.
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("the server runs");
            child.wait().expect("the server is ours");
        }
    }

    /// Stops the process without ending it (`STOP`), or lets it run again (`CONT`).
    pub fn signal(&self, name: &str) {
        let child = self.child.as_ref().expect("the server runs");
        let done = Command::new("kill").arg(format!("-{name}")).arg(child.id().to_string()).status();
        assert!(done.expect("kill exists").success());
    }

    /// Removes what a killed server would read when it starts again.
    pub fn forget(&self) {
        assert!(self.child.is_none(), "it runs");
        for entry in std::fs::read_dir(self.folder.path()).expect("our folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.expect("our file");
        }
    }

    /// What Redis answers to a command, as `redis-cli` shows it.
    pub async fn ask(&self, words: &[&str]) -> String {
        let over_tls: &[&str] = if is_tls(&self.args) { &["--tls", "--insecure"] } else { &[] };
        ask(self.port, &[over_tls, words].concat()).await
    }
}

/// Whether the settings of a server make it speak TLS.
fn is_tls(settings: &[impl AsRef<str>]) -> bool {
    settings.iter().any(|word| word.as_ref() == "--tls-cert-file")
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What the Redis on a port answers to a command, as `redis-cli` shows it.
pub async fn ask(port: u16, words: &[&str]) -> String {
    let mut command = tokio::process::Command::new("redis-cli");
    command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "--raw"]).args(words);
    let output = tokio::time::timeout(Duration::from_secs(10), command.kill_on_drop(true).output()).await;
    let output = output.expect("an answer within 10 s").expect("redis-cli is installed with redis-server");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Waits until something holds.
pub async fn until(what: &str, within: Duration, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !holds().await {
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
