//! What both benches need: the processes they measure, a light Socket.IO client, and a way to print.

pub mod client;
pub mod process;

use std::io::Write as _;
use std::time::{Duration, Instant};

/// A line of the report. Whether anybody reads it does not matter to the measurement.
pub fn say(line: &str) {
    let mut out = std::io::stdout();
    writeln!(out, "{line}").ok();
    out.flush().ok();
}

/// What the command line asks for. `cargo bench` passes `--bench`, which means nothing here.
pub struct Wanted {
    /// A few seconds that show that everything still works; the numbers mean nothing.
    pub quick: bool,
    /// Which benches; all of them when it is empty.
    names: Vec<String>,
    /// Leave the Node peer out.
    pub alone: bool,
    /// Another binary of the service than the one that was built with the bench.
    pub service: String,
}

impl Wanted {
    /// # Errors
    /// When an argument is not known.
    pub fn read() -> anyhow::Result<Self> {
        let mut wanted =
            Self { quick: false, names: Vec::new(), alone: false, service: env!("CARGO_BIN_EXE_seatlock").to_owned() };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--bench" => {}
                "--quick" => wanted.quick = true,
                "fanout" | "locks" => wanted.names.push(arg),
                "--alone" => wanted.alone = true,
                "--service" => wanted.service = args.next().ok_or_else(|| anyhow::anyhow!("--service PATH"))?,
                other => anyhow::bail!("{other} is not known; fanout, locks, --quick, --alone, --service PATH are"),
            }
        }
        Ok(wanted)
    }

    /// Whether a bench is to run.
    pub fn wants(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|given| given == name)
    }
}

/// The value below which a share of the measured ones lies. Sorts them.
pub fn quantile(values: &mut [u32], share: f64) -> f64 {
    if values.is_empty() {
        return f64::NAN;
    }
    values.sort_unstable();
    let at = (values.len() as f64 * share).ceil() as usize;
    f64::from(values[at.clamp(1, values.len()) - 1])
}

/// The middle one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Waits for a condition.
///
/// # Errors
/// When it does not come true within `limit`.
pub async fn until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> anyhow::Result<()> {
    let end = Instant::now() + limit;
    while !condition() {
        anyhow::ensure!(Instant::now() < end, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// How a measured ratio stands to its bar.
pub fn verdict(value: f64, bar: f64) -> &'static str {
    if value <= bar { "met" } else { "MISSED" }
}
