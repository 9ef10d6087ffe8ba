//! A RabbitMQ of the test's own.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lapin::{Connection, ConnectionProperties};
use tempfile::TempDir;
use tokio::time::timeout;

use super::free_port;

/// A single node takes about five seconds of processor time to start; test machines are small and busy.
const START_TIMEOUT: Duration = Duration::from_secs(90);

/// Where distributions put the plain scripts. (Debian's wrapper on the path changes the user and the folder.)
const SCRIPT_FOLDERS: [&str; 3] = ["/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/usr/local/sbin"];

/// A `rabbitmq-server` with one listener on a free port, a name server and all files of its own, and no plugins; killed
/// when dropped. The Erlang virtual machine takes the place of the start script, so its process is the one we kill.
pub struct RabbitServer {
    child: Option<Child>,
    /// Without one of ours the broker would start a name server that outlives it.
    names: Child,
    folder: TempDir,
    node: String,
    port: u16,
    cluster_port: u16,
    names_port: u16,
}

impl RabbitServer {
    /// Starts one and waits until it answers.
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [port, cluster_port, names_port] = [(); 3].map(|()| free_port());
        // Erlang terms are read at once; the usual `key = value` form costs a second of translation.
        let config = format!(
            "[{{rabbit, [{{tcp_listeners, [{{\"127.0.0.1\", {port}}}]}}, {{loopback_users, []}},\
             {{num_acceptors, [{{tcp, 2}}]}}]}}].\n"
        );
        std::fs::write(folder.path().join("rabbitmq.config"), config).expect("the folder is ours");
        std::fs::write(folder.path().join("enabled_plugins"), "[].\n").expect("the folder is ours");
        let node = format!("seatlock-{port}@localhost");
        let names = Command::new("epmd")
            .args(["-port", &names_port.to_string(), "-address", "127.0.0.1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("epmd is installed (it comes with rabbitmq-server)");
        let mut server = Self { child: None, names, folder, node, port, cluster_port, names_port };
        server.restart().await;
        server
    }

    /// Starts it again after [`RabbitServer::kill`] or [`RabbitServer::stop`]: same address, same data.
    pub async fn restart(&mut self) {
        let log = std::fs::File::create(self.folder.path().join("log")).expect("the folder is ours");
        let child = self
            .command("rabbitmq-server")
            // Makes the script replace itself by the virtual machine, as it does for a service manager.
            .env("RUNNING_UNDER_SYSTEMD", "true")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file handle"))
            .stderr(log)
            .spawn()
            .expect("rabbitmq-server is installed (tests/run installs it)");
        self.child = Some(child);
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            // A server that hangs up in the middle of its start leaves the driver waiting for ever.
            let url = self.url();
            let attempt = Connection::connect(&url, ConnectionProperties::default());
            if let Ok(Ok(connection)) = timeout(Duration::from_secs(2), attempt).await {
                connection.close(200, "OK".into()).await.ok();
                return;
            }
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok()).flatten();
            assert!(ended.is_none() && Instant::now() < deadline, "rabbitmq-server did not start: {}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("the server runs");
            child.wait().expect("the server is ours");
        }
    }

    /// An orderly shutdown: clients are told with `CONNECTION_FORCED`.
    pub fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        signal(&child, "TERM");
        let deadline = Instant::now() + START_TIMEOUT;
        while child.try_wait().expect("the server is ours").is_none() {
            assert!(Instant::now() < deadline, "rabbitmq-server did not stop: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Stops the process without ending it (`STOP`), or lets it run again (`CONT`).
    pub fn signal(&self, name: &str) {
        signal(self.child.as_ref().expect("the server runs"), name);
    }

    /// Runs `rabbitmqctl` on it. Takes seconds.
    pub fn ctl(&self, args: &[&str]) -> String {
        let output = self.command("rabbitmqctl").args(["-n", &self.node]).args(args).output().expect("rabbitmqctl");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "rabbitmqctl {args:?}: {text} {errors} {:?}", output.status.signal());
        text
    }

    /// Where it listens on the loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// As operators write it.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}", self.port)
    }

    fn command(&self, script: &str) -> Command {
        let at = |name: &str| self.folder.path().join(name);
        let mut command = Command::new(script_path(script));
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            // Holds the Erlang cookie: nodes of other tests and of the machine are strangers.
            .env("HOME", self.folder.path())
            .env("LANG", "C.UTF-8")
            .env("ERL_EPMD_PORT", self.names_port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODENAME", &self.node)
            .env("RABBITMQ_DIST_PORT", self.cluster_port.to_string())
            .env("RABBITMQ_MNESIA_BASE", at("data"))
            .env("RABBITMQ_LOG_BASE", at("logs"))
            .env("RABBITMQ_SCHEMA_DIR", at("schema"))
            .env("RABBITMQ_GENERATED_CONFIG_DIR", at("generated"))
            .env("RABBITMQ_PID_FILE", at("pid"))
            .env("RABBITMQ_CONFIG_FILE", at("rabbitmq.config"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", at("enabled_plugins"))
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null");
        command
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for RabbitServer {
    fn drop(&mut self) {
        self.kill();
        self.names.kill().ok();
        self.names.wait().ok();
    }
}

fn signal(child: &Child, name: &str) {
    let done = Command::new("kill").arg(format!("-{name}")).arg(child.id().to_string()).status();
    assert!(done.expect("kill exists").success());
}

fn script_path(script: &str) -> PathBuf {
    let plain = SCRIPT_FOLDERS.iter().map(|folder| Path::new(folder).join(script)).find(|path| path.exists());
    plain.unwrap_or_else(|| PathBuf::from(script))
}
