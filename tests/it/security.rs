//! What a stranger, a thief or a broken neighbour can send, and what each of them gets for it.

mod frames;
mod hoarding;
mod limits;
mod neighbours;
mod ports;
mod thieves;
mod tokens;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};

use std::net::SocketAddr;

use tempfile::TempDir;

use crate::support::gateway::SECRET;
use crate::support::process::Seatlock;

/// The real process on its embedded ledger, with two events of a hundred tickets; event 3 is closed.
struct House {
    service: Seatlock,
    address: SocketAddr,
    _folder: TempDir,
}

impl House {
    fn start(settings: &[(&str, &str)]) -> Self {
        let secret = ("SEATLOCK_JWT_SECRET", std::str::from_utf8(SECRET).expect("a text"));
        Self::keyed(&[&[secret], settings].concat())
    }

    /// With another key than the tests' secret.
    fn keyed(settings: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let catalogue = folder.path().join("events.json");
        let event = |id: u64| {
            let category = json!({"id": 1, "availableSeats": 100});
            json!({"id": id, "isActive": id != 3, "ticketCategories": [category]})
        };
        std::fs::write(&catalogue, json!([event(1), event(2), event(3)]).to_string()).expect("our folder");
        let events = format!("file:{}", catalogue.display());
        Self::with(&[&[("SEATLOCK_EVENTS_URL", events.as_str())], settings].concat(), folder)
    }

    /// With an events-service instead of the two events.
    fn asking(events: &str) -> Self {
        let secret = std::str::from_utf8(SECRET).expect("a text");
        let folder = tempfile::tempdir().expect("a temporary folder");
        Self::with(&[("SEATLOCK_JWT_SECRET", secret), ("SEATLOCK_EVENTS_URL", events)], folder)
    }

    fn with(settings: &[(&str, &str)], folder: TempDir) -> Self {
        let service = Seatlock::start(&[], settings);
        let address = service.url.trim_start_matches("http://").parse().expect("an address");
        Self { service, address, _folder: folder }
    }

    /// A line of `/metrics` by how it begins; 0 when it is not there.
    async fn metric(&self, line: &str) -> u64 {
        let text = reqwest::get(format!("{}/metrics", self.service.url)).await.expect("an answer");
        let text = text.text().await.expect("a text");
        let value = text.lines().find_map(|found| found.strip_prefix(line)).map_or("0", str::trim);
        value.parse().expect("a number")
    }

    /// Kilobytes that the process has in memory.
    fn resident_kb(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.service.pid())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process has memory");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// It runs, nothing in it has panicked, and nothing that it logged has one of these texts in it.
    async fn is_well(&self, secrets: &[&str]) {
        assert_eq!(reqwest::get(format!("{}/livez", self.service.url)).await.expect("an answer").status(), 200);
        for line in self.service.log() {
            let leaks = secrets.iter().any(|secret| line.contains(secret));
            assert!(!line.contains("panicked") && !leaks, "{line}");
        }
        assert_eq!(self.metric("seatlock_gateway_ended_total{reason=\"fault\"}").await, 0);
    }

    /// What one of the limits has refused so far.
    async fn limited(&self, limit: &str) -> u64 {
        self.metric(&format!("seatlock_gateway_limited_total{{limit=\"{limit}\"}}")).await
    }
}

/// Seconds since 1970, so many from now.
fn seconds_from_now(seconds: i64) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(now.as_secs()).expect("a time of this age") + seconds
}

/// A token with these claims, valid for a minute unless they say otherwise, signed with the tests' secret.
fn sign(claims: &Value) -> String {
    let mut all = json!({ "exp": seconds_from_now(60) });
    all.as_object_mut().expect("an object").extend(claims.as_object().expect("an object").clone());
    encode(&Header::new(Algorithm::HS256), &all, &EncodingKey::from_secret(SECRET)).expect("a token")
}
