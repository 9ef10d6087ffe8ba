//! The real binary as a child process: started with exactly the variables of the test, read line by line, stopped by
//! its own process id, and killed when the test forgets it.

use std::{
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

/// No wait of these tests is longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a process that ended by itself left behind.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; 128 and the signal's number if a signal ended it.
    pub code: i32,
    /// All of its standard output.
    pub out: String,
    /// All of its standard error.
    pub err: String,
}

/// A command that sees these variables and no others.
fn command(args: &[&str], env: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_seatlock"));
    command.args(args).env_clear().envs(env.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs the binary to its end, which must come by itself.
pub fn run(args: &[&str], env: &[(&str, &str)]) -> Ended {
    let mut child = command(args, env).spawn().expect("the binary starts");
    let out = collect(child.stdout.take().expect("piped"));
    let err = collect(child.stderr.take().expect("piped"));
    let status = wait(&mut child);
    let text = |reader: thread::JoinHandle<String>| reader.join().expect("the reader ends");
    Ended { code: code(status), out: text(out), err: text(err) }
}

fn collect(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut text = String::new();
        from.read_to_string(&mut text).expect("UTF-8");
        text
    })
}

fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).expect("a code or a signal")
}

fn wait(child: &mut Child) -> ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child can be asked") {
            return status;
        }
        let late = start.elapsed() > PATIENCE;
        if late {
            let _ = child.kill();
        }
        assert!(!late, "the process did not end within {PATIENCE:?}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// The service, running. Its logs are JSON, on both streams collected.
pub struct Seatlock {
    child: Child,
    /// `http://127.0.0.1:PORT`
    pub url: String,
    log: Arc<Mutex<Vec<String>>>,
}

impl Seatlock {
    /// Starts it on a free port and returns when it says that it serves.
    pub fn start(args: &[&str], env: &[(&str, &str)]) -> Self {
        let mut command = command(args, env);
        for (name, value) in [("SEATLOCK_LISTEN", "127.0.0.1:0"), ("SEATLOCK_LOG_FORMAT", "json")] {
            if !env.iter().any(|(given, _)| *given == name) {
                command.env(name, value);
            }
        }
        let mut child = command.spawn().expect("the binary starts");
        let log = Arc::new(Mutex::new(Vec::new()));
        let err = BufReader::new(child.stderr.take().expect("piped"));
        let out = BufReader::new(child.stdout.take().expect("piped"));
        thread::spawn({
            let log = Arc::clone(&log);
            move || err.lines().map_while(Result::ok).for_each(|line| log.lock().expect("no panic").push(line))
        });
        thread::spawn(move || out.lines().map_while(Result::ok).for_each(drop));
        let mut seatlock = Self { child, url: String::new(), log };
        let serving = seatlock.logged("serving");
        let address = serving["listen"].as_str().expect("an address").to_owned();
        seatlock.url = format!("http://{address}");
        seatlock
    }

    /// Everything logged so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().expect("no panic").clone()
    }

    /// The first log line whose message is `message`, waited for.
    pub fn logged(&mut self, message: &str) -> serde_json::Value {
        let start = Instant::now();
        loop {
            let lines = self.log();
            let parsed = lines.iter().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
            if let Some(line) = parsed.into_iter().find(|line| line["message"] == message) {
                return line;
            }
            let ended = self.child.try_wait().expect("a child can be asked");
            assert!(ended.is_none() && start.elapsed() < PATIENCE, "no {message:?} ({ended:?}) in {lines:#?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by name, such as `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(status.expect("kill runs").success());
    }

    /// Waits for its end.
    pub fn exit_code(&mut self) -> i32 {
        code(wait(&mut self.child))
    }
}

impl Drop for Seatlock {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
