//! Metric names follow one pattern, and every metric is used.

use std::collections::HashSet;

use seatlock::metrics::{ALL, Kind};

use super::{File, assert_tidy, files, source::tokens};

/// Who has metrics.
const MODULES: &[&str] = &["app", "fanout", "gateway", "http", "inventory", "ledger", "rpc"];
/// What a histogram or gauge may count in.
const UNITS: &[&str] = &["seconds", "bytes", "total"];
/// Labels with as many values as there are users or shows would grow without bound.
const UNBOUNDED: &[&str] =
    &["event", "category_id", "user", "lock", "order", "session", "socket", "id", "request", "ip", "path"];

/// A metric as this check sees it.
struct Seen<'a> {
    name: &'a str,
    kind: &'a str,
    help: &'a str,
    labels: &'a [&'a str],
}

fn names(metrics: &[Seen<'_>]) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut known = HashSet::new();
    for metric in metrics {
        let mut complain = |what: &str| complaints.push(format!("{}: {what}", metric.name));
        if !known.insert(metric.name) {
            complain("twice");
        }
        let mut parts = metric.name.split('_');
        if parts.next() != Some("seatlock") || !parts.next().is_some_and(|module| MODULES.contains(&module)) {
            complain("is not seatlock_<module>_…");
        }
        if !metric.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_') {
            complain("has other characters than a-z, 0-9 and _");
        }
        let last = metric.name.rsplit('_').next().unwrap_or_default();
        match metric.kind {
            "counter" if last != "total" => complain("is a counter and does not end in _total"),
            "gauge" if last == "total" => complain("is a gauge and ends in _total"),
            "histogram" if !UNITS.contains(&last) || last == "total" => complain("is a histogram without a unit"),
            _ => {}
        }
        let help = metric.help.trim();
        if !help.ends_with('.') || help.len() < 10 {
            complain("its help is no sentence");
        }
        for label in metric.labels.iter().filter(|label| UNBOUNDED.contains(label)) {
            complain(&format!("the label {label} is unbounded"));
        }
    }
    complaints
}

/// The names under which `metrics.rs` declares them: `counter NAME = "…"`.
fn identifiers(declaring: &File) -> Vec<String> {
    let tokens = tokens(&declaring.text);
    let declared = tokens.windows(3).filter(|window| {
        ["counter", "gauge", "histogram"].contains(&window[0].text.as_str())
            && window[1].text.starts_with(|c: char| c.is_ascii_uppercase())
            && window[2].text == "="
    });
    declared.map(|window| window[1].text.clone()).collect()
}

fn unused(declaring: &File, others: &[File]) -> Vec<String> {
    let used: HashSet<String> = others
        .iter()
        .filter(|file| file.path != declaring.path)
        .flat_map(|file| tokens(&file.text))
        .map(|token| token.text)
        .collect();
    let declared = identifiers(declaring).into_iter();
    declared.filter(|name| !used.contains(name)).map(|name| format!("{name} is measured nowhere")).collect()
}

#[test]
fn metric_names_follow_the_pattern() {
    let seen: Vec<Seen<'_>> = ALL
        .iter()
        .map(|metric| Seen {
            name: metric.name,
            kind: match metric.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram(_) => "histogram",
            },
            help: metric.help,
            labels: metric.labels,
        })
        .collect();
    assert!(!seen.is_empty());
    assert_tidy(&names(&seen));
}

#[test]
fn every_metric_is_measured() {
    let source = files("src", ".rs");
    let declaring = source.iter().find(|file| file.path == "src/metrics.rs").unwrap();
    assert_eq!(identifiers(declaring).len(), ALL.len(), "this check reads the declarations as the compiler does");
    assert_tidy(&unused(declaring, &source));
}

#[test]
fn a_bad_metric_is_found() {
    let help = "Counts something.";
    let metric = |name, kind| Seen { name, kind, help, labels: &[] };
    let bad = [
        metric("seatlock_rpc_calls", "counter"),
        metric("seatlock_rpc_queue_total", "gauge"),
        metric("seatlock_rpc_call_total", "histogram"),
        metric("seatlock_moon_calls_total", "counter"),
        metric("rpc_calls_total", "counter"),
        metric("seatlock_rpc_Calls_total", "counter"),
        metric("seatlock_http_open", "gauge"),
        metric("seatlock_http_open", "gauge"),
        Seen { name: "seatlock_rpc_faults_total", kind: "counter", help: "faults", labels: &["kind", "user"] },
    ];
    assert_eq!(
        names(&bad),
        [
            "seatlock_rpc_calls: is a counter and does not end in _total",
            "seatlock_rpc_queue_total: is a gauge and ends in _total",
            "seatlock_rpc_call_total: is a histogram without a unit",
            "seatlock_moon_calls_total: is not seatlock_<module>_…",
            "rpc_calls_total: is not seatlock_<module>_…",
            "seatlock_rpc_Calls_total: has other characters than a-z, 0-9 and _",
            "seatlock_http_open: twice",
            "seatlock_rpc_faults_total: its help is no sentence",
            "seatlock_rpc_faults_total: the label user is unbounded",
        ]
    );
}

#[test]
fn an_unused_metric_is_found() {
    let declaring = File::sample("src/metrics.rs", "counter A = \"a\";\ngauge B = \"b\" { x };\n");
    let user = File::sample("src/rpc/mod.rs", "metrics::A.count(&[]); // B\n");
    assert_eq!(unused(&declaring, &[declaring.clone(), user]), ["B is measured nowhere"]);
}
