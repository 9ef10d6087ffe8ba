//! The processes under measurement: started on free ports, read through `/proc`, ended by their own id.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use jsonwebtoken::{EncodingKey, Header};

/// What tokens are signed with.
const SECRET: &str = "only the benches sign with this text, which is long enough";

/// A process may take so long to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// Clock ticks of `/proc/PID/stat` in a second: the same on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// Started by the bench, killed when dropped.
pub struct Process {
    child: Child,
    /// Where it listens.
    pub port: u16,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

impl Process {
    fn start(mut command: Command, port: u16) -> anyhow::Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let mut process = Self { child: child.with_context(|| format!("{name} does not start"))?, port };
        let end = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(process.child.try_wait()?.is_none(), "{name} ended at once");
            ensure!(Instant::now() < end, "{name} does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(process)
    }

    /// A Redis without persistence.
    pub fn redis(folder: &Path) -> anyhow::Result<Self> {
        let port = free_port()?;
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        command.arg("--dir").arg(folder);
        Self::start(command, port)
    }

    /// The service on that Redis, selling `catalogue`.
    pub fn service(binary: &str, redis: &Self, catalogue: &Path, more: &[(&str, &str)]) -> anyhow::Result<Self> {
        let port = free_port()?;
        let mut command = Command::new(binary);
        command
            .env_clear()
            .env("SEATLOCK_LISTEN", format!("127.0.0.1:{port}"))
            .env("SEATLOCK_REDIS_URL", format!("redis://127.0.0.1:{}", redis.port))
            .env("SEATLOCK_EVENTS_URL", format!("file:{}", catalogue.display()))
            .env("SEATLOCK_JWT_SECRET", SECRET)
            .env("SEATLOCK_LOG", "warn")
            .env("SEATLOCK_CORS_ORIGINS", "https://shop.example")
            .envs(more.iter().copied());
        Self::start(command, port)
    }

    /// A Node peer, with the collector of garbage within reach.
    pub fn node(script: &str, more: &[(&str, String)]) -> anyhow::Result<Self> {
        let port = free_port()?;
        let peers = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/peers");
        ensure!(peers.join("node_modules").is_dir(), "npm ci in {} (benches/run does it)", peers.display());
        let mut command = Command::new("node");
        command
            .args(["--expose-gc", script])
            .current_dir(peers)
            .env("NODE_ENV", "production")
            .env("PORT", port.to_string())
            .env("SECRET", SECRET);
        command.envs(more.iter().map(|(name, value)| (name, value)));
        Self::start(command, port)
    }

    fn signal(&self, name: &str) -> anyhow::Result<()> {
        let done = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status()?;
        ensure!(done.success(), "kill -s {name}");
        Ok(())
    }

    /// Has a Node peer collect its garbage, so that what it no longer needs is not counted.
    pub fn tidy_up(&self) -> anyhow::Result<()> {
        self.signal("USR2")
    }

    /// Ends the service as an operator does, and waits for it.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.signal("TERM")?;
        let end = Instant::now() + Duration::from_secs(40);
        while self.child.try_wait()?.is_none() {
            ensure!(Instant::now() < end, "a process does not stop");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Seconds of processor that it has used.
    pub fn cpu(&self) -> anyhow::Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The name in parentheses may have spaces; utime and stime are the 12th and 13th field after it.
        let fields = text.rsplit_once(')').context("/proc/PID/stat")?.1;
        let mut times = fields.split_whitespace().skip(11).map(str::parse::<f64>);
        let (user, system) = (times.next().context("utime")??, times.next().context("stime")??);
        Ok((user + system) / TICKS_PER_SECOND)
    }

    /// Resident bytes.
    pub fn rss(&self) -> anyhow::Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0)
    }
}

/// A user's token, good for an hour.
pub fn token(user: u64) -> anyhow::Result<String> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let claims = serde_json::json!({ "sub": user.to_string(), "exp": now + 3600 });
    Ok(jsonwebtoken::encode(&Header::default(), &claims, &EncodingKey::from_secret(SECRET.as_bytes()))?)
}

/// A catalogue of events 1 to `events` with categories 1 to `categories`, each of `seats`.
pub fn catalogue(folder: &Path, events: u64, categories: u64, seats: u64) -> anyhow::Result<PathBuf> {
    let category = |id| {
        serde_json::json!({ "id": id, "categoryName": format!("C{id}"), "price": "1.00", "totalSeats": seats,
            "reservedSeats": 0, "isActive": true })
    };
    let events: Vec<_> = (1..=events)
        .map(|id| {
            serde_json::json!({ "idEvent": id, "eventName": format!("E{id}"), "isActive": true,
                "ticketCategories": (1..=categories).map(category).collect::<Vec<_>>() })
        })
        .collect();
    let path = folder.join("catalogue.json");
    std::fs::write(&path, serde_json::json!({ "events": events }).to_string())?;
    Ok(path)
}
