//! A real Prometheus with the shipped configuration reads a running fleet.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::{alerts, items, text, word};
use crate::support::{free_port, process::Seatlock, redis::RedisServer};

const KEY: (&str, &str) = ("SEATLOCK_JWT_SECRET", "a-key-of-32-bytes-for-tests-only");
const PATIENCE: Duration = Duration::from_secs(30);

struct Prometheus {
    child: Child,
    _folder: TempDir,
    url: String,
    http: reqwest::Client,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn replaced(text: &str, what: &str, by: &str) -> String {
    assert_eq!(text.matches(what).count(), 1, "{what} in a file of deploy/prometheus");
    text.replace(what, by)
}

impl Prometheus {
    /// The shipped files with nothing replaced but addresses and how often it looks.
    fn start(targets: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let shipped = text("deploy/prometheus/prometheus.yml");
        let targets = format!("{targets:?}");
        let shipped = replaced(&shipped, r#"["10.0.0.1:8881", "10.0.0.2:8881", "10.0.0.3:8881"]"#, &targets);
        let shipped = replaced(&shipped, "scrape_interval: 15s", "scrape_interval: 1s");
        let shipped = replaced(&shipped, "scrape_timeout: 5s", "scrape_timeout: 1s");
        let shipped = replaced(&shipped, "evaluation_interval: 15s", "evaluation_interval: 1s");
        std::fs::write(folder.path().join("prometheus.yml"), shipped).expect("our folder");
        let rules = replaced(&text("deploy/prometheus/alerts.yaml"), "interval: 15s", "interval: 1s");
        std::fs::write(folder.path().join("alerts.yaml"), rules).expect("our folder");
        let address = format!("127.0.0.1:{}", free_port());
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", folder.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .args(["--log.level=error"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("prometheus is installed (tests/run installs it)");
        let http = reqwest::Client::builder().timeout(Duration::from_secs(5)).build().expect("a client");
        Self { child, _folder: folder, url: format!("http://{address}/api/v1"), http }
    }

    async fn api(&self, page: &str, query: &[(&str, &str)]) -> Option<Value> {
        let mut url = url::Url::parse(&format!("{}/{page}", self.url)).expect("a URL");
        url.query_pairs_mut().extend_pairs(query);
        self.http.get(url).send().await.ok()?.json().await.ok()
    }

    /// The first value of an expression; `None` when there is none yet.
    async fn value(&self, expr: &str) -> Option<f64> {
        let answer = self.api("query", &[("query", expr)]).await?;
        word(items(&answer["data"]["result"]).first()?["value"].get(1)?).parse().ok()
    }

    async fn becomes(&self, expr: &str, is: impl Fn(f64) -> bool) {
        let start = Instant::now();
        loop {
            let value = self.value(expr).await;
            if value.is_some_and(&is) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{expr} is still {value:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Two replicas on one Redis are scraped on their admin addresses, every rule can be evaluated and none fires but the one
/// for what then breaks, every panel's expression is one, and what is exported is what is declared.
#[tokio::test]
async fn prometheus_reads_a_running_fleet() {
    let mut redis = RedisServer::start().await;
    let url = redis.url();
    let admins = [(); 2].map(|()| format!("127.0.0.1:{}", free_port()));
    let fleet: Vec<Seatlock> = admins
        .iter()
        .map(|admin| {
            let catalogue = ("SEATLOCK_EVENTS_URL", "file:src/inventory/demo.json");
            Seatlock::start(&[], &[KEY, ("SEATLOCK_REDIS_URL", &url), ("SEATLOCK_ADMIN_LISTEN", admin), catalogue])
        })
        .collect();
    let prometheus = Prometheus::start(&admins.each_ref().map(String::as_str));
    prometheus.becomes(r#"sum(up{job="seatlock"})"#, |up| up > 1.5).await;
    prometheus.becomes("sum(seatlock_ledger_connected)", |up| up > 1.5).await;
    prometheus.becomes("min(seatlock_ledger_delivery_seconds_count)", |count| count >= 2.0).await;
    prometheus.becomes(r#"min(seatlock_ledger_call_seconds_count{script="beat"})"#, |count| count >= 2.0).await;
    prometheus.becomes("count(seatlock_app_info)", |count| count > 1.5).await;

    for (title, expr) in alerts::panels() {
        let expr = expr.replace("$__rate_interval", "1m").replace("$__range", "1h");
        let answer = prometheus.api("query", &[("query", &expr)]).await.expect("an answer");
        assert_eq!(answer["status"], "success", "panel {title}: {expr}: {answer}");
    }
    let start = Instant::now();
    let health = loop {
        let rules = prometheus.api("rules", &[]).await.expect("an answer");
        let all: Vec<Value> =
            items(&rules["data"]["groups"]).iter().flat_map(|group| items(&group["rules"]).to_vec()).collect();
        // Rates have an interval of their own.
        let due = |rule: &Value| word(&rule["type"]) == "alerting" && word(&rule["health"]) == "unknown";
        if !all.is_empty() && !all.iter().any(due) {
            break all;
        }
        assert!(start.elapsed() < PATIENCE, "rules that are not evaluated: {all:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let ill: Vec<_> = health.iter().filter(|rule| word(&rule["health"]) == "err").collect();
    assert!(ill.is_empty(), "{ill:#?}");
    let firing: Vec<_> = health.iter().filter(|rule| word(&rule["state"]) == "firing").collect();
    assert!(firing.is_empty(), "{firing:#?}");

    redis.kill();
    prometheus.becomes(r#"count(ALERTS{alertname="SeatlockRedisDown"})"#, |count| count > 0.5).await;
    drop(fleet);
}
